"""The record through the workflow: as of a time, what an entry changed, the access review."""

from __future__ import annotations

from datetime import datetime, timedelta

import attrs
import pytest

from ipguard import (
    AccessLine,
    Action,
    Actor,
    InvalidValue,
    Policy,
    UnknownUser,
    User,
    UsernameError,
)
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, PEOPLE, Desk

ELSEWHERE = "192.0.2.66"


def addresses(policy: Policy) -> list[str]:
    return [str(each.addresses) for each in policy.restrictions]


def moved(desk: Desk, user: User = JSMITH, account: str = "U2") -> int:
    """Move a user to another account, and return the revision."""
    return desk.store.put_users(
        [User(username=user.username, full_name=user.full_name, account_id=account)]
    )


# -- as of a time ------------------------------------------------------------------------------


def test_a_policy_as_it_was(desk: Desk) -> None:
    """By a revision or by a time; the policy has the revision that was in force."""
    began = desk.rows()[0].revision
    desk.wait(hours=1)
    desk.add(OFFICE)
    first = desk.rows()[0]
    desk.wait(hours=1)
    desk.flow.impose(BOSS, "jsmith", HOME, reason="x", only=True)
    second = desk.rows()[0]
    for revision, expected in ((began, []), (first.revision, [OFFICE]), (second.revision, [HOME])):
        assert addresses(desk.flow.as_of(ALICE, "JSmith", revision=revision)) == expected
    for at, expected in (
        (first.at - timedelta(microseconds=1), []),
        (first.at, [OFFICE]),
        (second.at - timedelta(seconds=1), [OFFICE]),
        (desk.clock(), [HOME]),
    ):
        assert addresses(desk.flow.as_of(ALICE, "jsmith", at=at)) == expected
    policy = desk.flow.as_of(ALICE, "jsmith", at=desk.clock())
    assert policy.revision == second.revision
    assert policy.known


def test_a_time_or_a_revision_is_needed(desk: Desk) -> None:
    desk.add()
    now, head = desk.clock(), desk.rows()[0].revision
    for at, revision in (
        (None, None),
        (now, head),
        (now + timedelta(microseconds=1), None),
        (datetime(2030, 1, 1), None),  # noqa: DTZ001 - a naive time is refused
        (None, head + 1),
        (None, -1),
        (None, True),
        (None, 2**63),
    ):
        with pytest.raises(InvalidValue):
            desk.flow.as_of(ALICE, "jsmith", at=at, revision=revision)


def test_the_past_of_other_accounts_does_not_exist(desk: Desk) -> None:
    """An operator may ask about any username, registered or not."""
    desk.add(OFFICE)
    head = desk.rows()[0].revision
    for actor, name in ((CAROL, "jsmith"), (ALICE, "zed"), (ALICE, "nobody")):
        with pytest.raises(UnknownUser):
            desk.flow.as_of(actor, name, revision=head)
    assert desk.flow.as_of(BOSS, "nobody", revision=head).restrictions == ()
    assert not desk.flow.as_of(BOSS, "nobody", revision=head).known
    with pytest.raises(UsernameError):
        desk.flow.as_of(BOSS, "", revision=head)


def test_what_a_username_had_before_a_rename_is_not_the_new_accounts(desk: Desk) -> None:
    """Another user had the name then; its restrictions are not for the managers of this one."""
    desk.add(HOME, "zed")
    before = desk.rows()[0].revision
    desk.store.rename_user("zed", "zoe")
    renamed = desk.store.rename_user("mary", "zed")
    assert desk.flow.as_of(ALICE, "zed", revision=renamed).restrictions == ()
    for revision in (before, renamed - 1):
        with pytest.raises(UnknownUser):
            desk.flow.as_of(ALICE, "zed", revision=revision)
    assert addresses(desk.flow.as_of(BOSS, "zed", revision=before)) == [HOME]
    assert addresses(desk.flow.as_of(CAROL, "zoe", revision=renamed)) == [HOME]
    with pytest.raises(UnknownUser):
        desk.flow.as_of(CAROL, "zoe", revision=before)


def test_what_a_user_had_in_another_account_is_not_shown(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the audit log: an entry belongs to the account that the user had then."""
    monkeypatch.setattr("ipguard.workflow._PAGE_LIMIT", 2)  # to read several pages
    desk.add(HOME)
    arrived = moved(desk)
    for n in range(5):
        desk.add(f"198.51.100.{n}")
    assert addresses(desk.flow.as_of(CAROL, "jsmith", revision=arrived)) == [HOME]
    with pytest.raises(UnknownUser):
        desk.flow.as_of(CAROL, "jsmith", revision=arrived - 1)
    with pytest.raises(UnknownUser):
        desk.flow.as_of(ALICE, "jsmith", revision=arrived - 1)
    assert addresses(desk.flow.as_of(BOSS, "jsmith", revision=arrived - 1)) == [HOME]


def test_an_actor_of_both_accounts_sees_both_times(desk: Desk) -> None:
    desk.add(HOME)
    before = desk.rows()[0].revision
    moved(desk)
    both = attrs.evolve(CAROL, manages={"U1", "U2"})
    assert addresses(desk.flow.as_of(both, "jsmith", revision=before)) == [HOME]


def test_a_user_who_is_registered_again_in_another_account(desk: Desk) -> None:
    """Entries of the other account show since when the user is this account's."""
    held = desk.add(HOME)
    before = desk.rows()[0].revision
    desk.flow.lift(BOSS, held.id, reason="x")
    lifted = desk.rows()[0].revision
    desk.store.remove_users(["jsmith"])
    desk.flow.unlock(BOSS, "jsmith", reason="x")
    moved(desk)
    assert desk.flow.as_of(CAROL, "jsmith", revision=desk.rows()[0].revision).restrictions == ()
    with pytest.raises(UnknownUser):
        desk.flow.as_of(CAROL, "jsmith", revision=before)
    with pytest.raises(UnknownUser):
        desk.flow.as_of(CAROL, "jsmith", revision=lifted - 1)
    assert addresses(desk.flow.as_of(BOSS, "jsmith", revision=before)) == [HOME]


def test_entries_that_name_no_user_hide_what_was_before(desk: Desk) -> None:
    """Several users in one entry: the username may have been of another user or account."""

    def put(account: str, *names: str) -> None:
        desk.store.put_users(
            [User(username=name, full_name="", account_id=account) for name in names]
        )

    put("U1", "bob", "bo")
    for address in (HOME, OFFICE):
        rows = [("bob", address), ("bo", address)]
        desk.flow.impose_many(BOSS, rows, reason="x", replace=True)
    first = desk.rows()[1].revision
    assert addresses(desk.flow.as_of(ALICE, "bob", revision=first)) == [HOME]
    desk.store.rename_user("bob", "bob2")
    desk.store.remove_users(["bo", "mary"])
    put("U2", "bob", "bo")
    now = desk.rows()[0].revision
    assert desk.flow.as_of(CAROL, "bob", revision=now).restrictions == ()
    assert addresses(desk.flow.as_of(CAROL, "bo", revision=now)) == [OFFICE]
    for name in ("bob", "bo"):
        for revision in range(now):
            with pytest.raises(UnknownUser):
                desk.flow.as_of(CAROL, name, revision=revision)
    assert addresses(desk.flow.as_of(BOSS, "bo", revision=first)) == [HOME]


# -- what an entry changed ---------------------------------------------------------------------


def test_the_restrictions_of_an_entry(desk: Desk) -> None:
    """An import names each of its restrictions, page by page."""
    old = desk.add(OFFICE)
    rows = [("jsmith", HOME), ("mary", HOME), ("zed", HOME)]
    applied = desk.flow.impose_many(BOSS, rows, reason="x", replace=True)
    first = desk.flow.restrictions_changed(BOSS, applied.revision, limit=2)
    rest = desk.flow.restrictions_changed(BOSS, applied.revision, after=first.next)
    assert len(first.items) == 2
    assert rest.next is None
    found = [*first, *rest]
    assert [each for each, added in found if not added] == [old]
    assert [each.username for each, added in found if added] == ["jsmith", "mary", "zed"]


def test_the_restrictions_of_an_entry_that_is_not_visible(desk: Desk) -> None:
    """An import is visible to operators alone; a user's entry to the account's managers."""
    one = desk.add(HOME)
    entry = desk.rows()[0].revision
    assert desk.flow.restrictions_changed(ALICE, entry).items == ((one, True),)
    applied = desk.flow.impose_many(BOSS, [("jsmith", OFFICE)], reason="x")
    for actor, revision in (
        (CAROL, entry),
        (ALICE, applied.revision),
        (BOSS, applied.revision + 1),
        (BOSS, 0),
        (BOSS, 2**63 - 1),
    ):
        with pytest.raises(InvalidValue, match="revision"):
            desk.flow.restrictions_changed(actor, revision)
    for wrong in ({"after": 7}, {"limit": 0}, {"limit": 1001}):
        with pytest.raises(InvalidValue):
            desk.flow.restrictions_changed(BOSS, entry, **wrong)  # type: ignore[arg-type]


# -- the access review -------------------------------------------------------------------------


def lines(desk: Desk, actor: Actor = BOSS, unused: timedelta | None = None) -> list[str]:
    return [
        f"{each.user.username} {each.restriction.addresses if each.restriction else 'anywhere'}"
        for each in desk.flow.report(actor, unused=unused)
    ]


def test_the_report_has_each_user_with_each_restriction(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipguard.workflow._PAGE_LIMIT", 2)
    desk.add(HOME)
    desk.wait(seconds=1)
    desk.add(OFFICE)
    desk.add(HOME, "zed")
    expected = ["alice anywhere", f"jsmith {HOME}", f"jsmith {OFFICE}", "mary anywhere"]
    assert lines(desk) == [*expected, f"zed {HOME}"]
    assert lines(desk, ALICE) == expected
    assert lines(desk, CAROL) == [f"zed {HOME}"]
    desk.store.remove_users(["jsmith"])
    assert [each.user.username for each in desk.flow.report(BOSS) if each.removed] == ["jsmith"] * 2
    assert "jsmith" not in {each.user.username for each in desk.flow.report(ALICE)}


def test_the_report_has_the_last_change_and_the_last_use(desk: Desk) -> None:
    """The change has its direction; one that the actor cannot see is left out."""
    held = desk.add(HOME)
    change = desk.rows()[0]
    desk.wait(days=1)
    desk.log_in(HOME)
    (line,) = [each for each in desk.flow.report(ALICE) if each.restriction]
    assert line == AccessLine(
        user=JSMITH, removed=False, restriction=held, last_used=desk.clock(), changed=change
    )
    assert line.changed is not None
    assert line.changed.detail["direction"] == "tightens"
    assert {each.changed for each in desk.flow.report(ALICE) if not each.restriction} == {None}
    moved(desk)
    (line,) = [each for each in desk.flow.report(CAROL) if each.restriction]
    assert (line.restriction, line.changed) == (held, None)
    (line,) = [each for each in desk.flow.report(BOSS) if each.restriction]
    assert line.changed == change


def test_the_report_of_unused_restrictions(desk: Desk) -> None:
    """New ones may not have had their time; users without restrictions are not listed."""
    for address in (HOME, OFFICE, ELSEWHERE):
        desk.add(address)
    desk.log_in(HOME)
    desk.wait(days=20)
    desk.log_in(OFFICE)
    desk.add("192.0.2.67")
    desk.wait(days=10)
    month = timedelta(days=30)
    assert sorted(lines(desk, ALICE, month)) == [f"jsmith {ELSEWHERE}", f"jsmith {HOME}"]
    assert lines(desk, ALICE, month + timedelta(microseconds=1)) == []
    assert len(lines(desk, ALICE, timedelta(days=10))) == 4
    for wrong in (timedelta(0), timedelta(days=90, microseconds=1), timedelta(days=-1), 30):
        with pytest.raises(InvalidValue):
            desk.flow.report(ALICE, unused=wrong)  # type: ignore[arg-type]


def test_forgetting_leaves_the_record_alone(desk: Desk) -> None:
    held = desk.add(HOME)
    desk.log_in(HOME)
    desk.flow.forget_sightings(BOSS, "jsmith")
    assert desk.rows()[0].action is Action.FORGET_SIGHTINGS
    (line,) = [each for each in desk.flow.report(ADAM) if each.restriction]
    assert (line.restriction, line.last_used) == (held, None)
    assert len(list(desk.flow.report(BOSS))) == len(PEOPLE)
