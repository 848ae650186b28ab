"""Operators: changes at once, with a reason and without a number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from typing import Any

import attrs
import pytest

import ipguard
from ipguard import (
    Action,
    Actor,
    AddressRange,
    Applied,
    DuplicateRestriction,
    InvalidValue,
    RequestState,
    TooManyRestrictions,
    UnknownRestriction,
    UnknownUser,
    User,
)
from ipguard.model import EVERYBODY
from ipguard.workflow import _transaction
from tests.flows import ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk

EVERY_KNOWN_ACCOUNT = Actor(
    username="almost", email="almost@bank.example", manages=frozenset({"U1", "U2"})
)


# -- impose ------------------------------------------------------------------------------------


def test_impose_holds_at_once(desk: Desk) -> None:
    """A restriction is added with its reason, and the user gets a notice."""
    expires = desk.later(days=1)
    applied = desk.flow.impose(
        BOSS, "JSMITH", " 203.0.113.7 ", reason="stolen laptop", label="office", expires_at=expires
    )
    (held,) = desk.store.load_policy("jsmith").restrictions
    assert applied == Applied(
        revision=desk.rows()[0].revision, restriction=held, unrestricted=False
    )
    assert (str(held.addresses), held.label, held.expires_at, held.created_by) == (
        OFFICE,
        "office",
        expires,
        "boss",
    )
    assert held.created_at == desk.clock()
    row = desk.rows()[0]
    assert (row.action, row.actor, row.actor_address, row.username, row.account_id) == (
        Action.IMPOSE,
        "boss",
        "192.0.2.1",
        "jsmith",
        "U1",
    )
    assert row.detail["reason"] == "stolen laptop"
    (mail,) = desk.outbox.messages
    assert (mail.kind, mail.to) == ("change_applied", ("boss@bank.example", "jsmith@firm.example"))
    assert mail.change == row


def test_via_is_audited(desk: Desk) -> None:
    """Every entry of an actor with `via` has it, whatever labels contain."""
    via = 'command line "x" reason=none'
    boss, alice = attrs.evolve(BOSS, via=via), attrs.evolve(ALICE, via=via)
    asked = desk.ask(actor=alice, label="via=page")
    desk.guess(asked, actor=alice)
    restriction = desk.confirm(asked, actor=alice).restriction
    assert restriction is not None
    desk.flow.lift(boss, restriction.id, reason="x")
    desk.flow.impose_many(boss, [("jsmith", OFFICE)], reason="x")
    desk.flow.unlock(boss, "alice", reason="x")
    rows = desk.rows()[:-1]
    assert [row.action for row in rows][::-1] == [
        Action.REQUEST,
        Action.WRONG_NUMBER,
        Action.CONFIRM,
        Action.LIFT,
        Action.IMPOSE_MANY,
        Action.UNLOCK,
    ]
    assert [row.detail["via"] for row in rows] == [via] * 6
    desk.flow.unlock(BOSS, "alice", reason="x")
    assert desk.rows()[0].detail == {"failures": "0", "reason": "x"}


def test_impose_obeys_the_rules(desk: Desk) -> None:
    """The rules of requests apply; an expired restriction is replaced."""
    desk.use(restrictions_per_user=1)
    old = desk.add(expires_at=desk.later(hours=1))
    for addresses, more, error in (
        ("10.0.0.0/8", {}, ipguard.AddressTooBroad),
        (OFFICE, {}, DuplicateRestriction),
        (HOME, {}, TooManyRestrictions),
        ("nonsense", {}, ipguard.AddressError),
        (HOME, {"expires_at": desk.clock()}, InvalidValue),
    ):
        with desk.unchanged(), pytest.raises(error):
            desk.flow.impose(BOSS, "jsmith", addresses, reason="x", **more)
    desk.wait(hours=1)
    new = desk.add()
    assert [r.id for r in desk.store.load_policy("jsmith").restrictions] == [new.id]
    assert new.id != old.id


def test_impose_ignores_lockout(desk: Desk) -> None:
    desk.store.put_users([User(username="boss", full_name="Boss", account_id="B")])
    desk.add(OFFICE, "boss")
    assert desk.held("boss") == [OFFICE]


@pytest.mark.parametrize("actor", [ALICE, CAROL, EVERY_KNOWN_ACCOUNT])
def test_only_operators(desk: Desk, actor: Actor) -> None:
    """Managing every account one by one does not make an operator."""
    restriction = desk.add()
    flow = desk.flow
    for call, error in (
        (lambda: flow.impose(actor, "jsmith", HOME, reason="x"), UnknownUser),
        (lambda: flow.impose_many(actor, [("jsmith", HOME)], reason="x"), UnknownUser),
        (lambda: flow.lift(actor, restriction.id, reason="x"), UnknownRestriction),
        (lambda: flow.unlock(actor, "alice", reason="x"), UnknownUser),
        (lambda: flow.unlock(actor, "nobody", reason="x"), UnknownUser),
    ):
        with desk.unchanged(), pytest.raises(error):
            call()


@pytest.mark.parametrize(
    "reason", ["", " ", "\u3000", "x" * 501, "two\nlines", "a\u2028b", None, 5]
)
def test_operators_give_a_reason(desk: Desk, reason: Any) -> None:
    restriction = desk.add()
    flow = desk.flow
    for call in (
        lambda: flow.impose(BOSS, "jsmith", HOME, reason=reason),
        lambda: flow.impose_many(BOSS, [("jsmith", HOME)], reason=reason),
        lambda: flow.lift(BOSS, restriction.id, reason=reason),
        lambda: flow.unlock(BOSS, "alice", reason=reason),
    ):
        with desk.unchanged(), pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.name == "reason"


# -- impose_many -------------------------------------------------------------------------------


def test_an_import_is_one_revision(desk: Desk) -> None:
    """All rows are one change that may concern any user."""
    head, token, _ = desk.store.changes_since(None)
    expires = desk.later(days=1)
    applied = desk.flow.impose_many(
        BOSS,
        [
            ("jsmith", OFFICE),
            ("JSmith", "::ffff:198.51.100.20", "home"),
            ["mary", "2001:db8::/64", "", expires],
            {"username": "zed", "addresses": HOME, "label": None, "expires_at": None},
            {"username": "zed", "addresses": AddressRange.parse(OFFICE), "label": "office"},
        ],
        reason="the migration",
    )
    assert applied == Applied(revision=head + 1, restriction=None, unrestricted=False)
    changes = desk.store.changes_since((head, token))
    assert (changes.head, changes.usernames) == (head + 1, EVERYBODY)
    assert sorted(desk.held("jsmith")) == sorted([OFFICE, HOME])
    assert desk.held("mary") == ["2001:db8::/64"]
    assert {(str(r.addresses), r.label) for r in desk.store.load_policy("zed").restrictions} == {
        (HOME, ""),
        (OFFICE, "office"),
    }
    (mary,) = desk.store.load_policy("mary").restrictions
    assert (mary.expires_at, mary.created_by, mary.created_at) == (expires, "boss", desk.clock())
    row = desk.rows()[0]
    assert (row.action, row.username, row.account_id) == (Action.IMPOSE_MANY, None, None)
    assert row.detail == {"restrictions": "5", "reason": "the migration"}


@pytest.mark.parametrize("replace", [True, False])
def test_a_list_replaces_or_completes_what_is_there(desk: Desk, replace: bool):
    """`counts` and the entry say what became of the rows; the user keeps what is equal."""
    kept, other = desk.flow.impose(BOSS, "jsmith", [HOME, "192.0.2.7"], reason="x").added
    rows = [("jsmith", HOME), ("jsmith", OFFICE), ("mary", OFFICE)]
    options = {"replace": True} if replace else {"skip_existing": True}
    applied = desk.flow.impose_many(BOSS, rows, reason="the list", **options)
    assert applied.counts == (2, 1, int(replace))
    held = desk.store.load_policy("jsmith").restrictions
    assert kept in held
    assert (other in held) is not replace
    assert len(held) == 3 - replace
    (entry,) = desk.flow.history(BOSS, limit=1)
    ended = {"ended": "1", "replace": "true"} if replace else {}
    assert entry.detail == {"restrictions": "2", "kept": "1", "reason": "the list"} | ended
    assert [mail.to for mail in desk.outbox.messages[-2:]] == [(BOSS.email,), (JSMITH.email,)]
    # A user whose rows exist already is not told of those of another.
    desk.flow.impose_many(BOSS, [*rows, ("alice", HOME)], reason="the list", **options)
    assert [mail.to for mail in desk.outbox.messages[-2:]] == [(BOSS.email,), (ALICE.email,)]
    rows.append(("alice", HOME))
    # The same list again changes nothing, tells no user, and drops no cached answer.
    cursor = desk.store.changes_since(None)[:2]
    sent = len(desk.outbox.messages)
    again = desk.flow.impose_many(BOSS, rows, reason="the list", **options)
    assert again.counts == (0, 4, 0)
    assert desk.store.changes_since(cursor).usernames == frozenset()
    assert len(desk.outbox.messages) == sent + 1


def test_a_list_cannot_both_replace_and_skip(desk: Desk):
    with pytest.raises(InvalidValue):
        desk.flow.impose_many(
            BOSS, [("jsmith", HOME)], reason="x", replace=True, skip_existing=True
        )
    assert desk.store.changes_since(None).head == 1


def test_notices_of_an_import(desk: Desk) -> None:
    """The actor gets one notice, and each user with an address one."""
    desk.flow.impose_many(
        BOSS, [("jsmith", OFFICE), ("jsmith", HOME), ("mary", HOME), ("zed", HOME)], reason="x"
    )
    assert [(mail.to, mail.user and mail.user.username) for mail in desk.outbox.messages] == [
        (("boss@bank.example",), None),
        (("jsmith@firm.example",), "jsmith"),
        (("zed@other.example",), "zed"),
    ]
    assert {mail.change for mail in desk.outbox.messages} == {desk.rows()[0]}


@pytest.mark.parametrize(("count", "mails"), [(100, 101), (101, 1), (150, 1)])
def test_at_most_100_users_get_notices(desk: Desk, count: int, mails: int) -> None:
    names = [f"user{n}" for n in range(count)]
    desk.store.put_users(
        User(username=name, full_name="", account_id="U3", email=f"{name}@x.example")
        for name in names
    )
    desk.flow.impose_many(BOSS, ((name, OFFICE) for name in names), reason="x")
    assert len(desk.outbox.messages) == mails


def test_reading_ends_at_a_refused_row(desk: Desk) -> None:
    read = []

    def rows() -> Iterator[tuple[str, str]]:
        for n, addresses in enumerate([OFFICE, "nonsense", HOME]):
            read.append(n)
            yield ("mary", addresses)

    with desk.unchanged(), pytest.raises(ipguard.AddressError):
        desk.flow.impose_many(BOSS, rows(), reason="x")
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (("mary", "nonsense"), ipguard.AddressError),
        (("", HOME), ipguard.UsernameError),
        (("mary", HOME, "x" * 101), InvalidValue),
        (("mary", HOME, None), InvalidValue),
        (("mary", HOME, "", ipguard.testing.FakeClock()()), InvalidValue),
        (("mary",), InvalidValue),
        (("mary", HOME, "", None, "more"), InvalidValue),
        ("mary,198.51.100.20", InvalidValue),
        (5, InvalidValue),
        ({"username": "mary"}, InvalidValue),
        ({"username": "mary", "addresses": HOME, "lable": "x"}, InvalidValue),
        ({"username": "mary", "addresses": HOME, "label": 0}, InvalidValue),
    ],
)
def test_a_bad_row_is_named_and_nothing_holds(desk: Desk, row: Any, error: type[Exception]) -> None:
    with desk.unchanged(), pytest.raises(error) as caught:
        desk.flow.impose_many(BOSS, [("jsmith", OFFICE), ("mary", OFFICE), row], reason="x")
    assert caught.value.__notes__ == ["row 3"]


@pytest.mark.parametrize("rows", [[], (), iter([])])
def test_an_empty_import(desk: Desk, rows: Any) -> None:
    with desk.unchanged(), pytest.raises(InvalidValue) as caught:
        desk.flow.impose_many(BOSS, rows, reason="x")
    assert caught.value.name == "rows"


# -- lift --------------------------------------------------------------------------------------


def test_lift_ends_a_restriction_at_once(desk: Desk) -> None:
    """No number is needed even if deletions need one, and the user gets a notice."""
    desk.use(confirm_deletes=True)
    restriction = desk.add()
    applied = desk.flow.lift(BOSS, restriction.id, reason="a mistake")
    row = desk.rows()[0]
    assert applied == Applied(revision=row.revision, restriction=restriction, unrestricted=True)
    assert row.action is Action.LIFT
    assert (row.detail["reason"], row.detail["unrestricted"]) == ("a mistake", "true")
    assert desk.outbox.messages[-1].to == ("boss@bank.example", "jsmith@firm.example")
    with desk.unchanged(), pytest.raises(UnknownRestriction):
        desk.flow.lift(BOSS, restriction.id, reason="again")


# -- unlock ------------------------------------------------------------------------------------


def test_unlock_is_audited_and_notified(desk: Desk) -> None:
    """The entry has the reason and the number of failures."""
    desk.guess(desk.ask(), times=3)
    desk.flow.unlock(BOSS, "Alice", reason="she called")
    row = desk.rows()[0]
    assert (row.action, row.actor, row.username, row.account_id) == (
        Action.UNLOCK,
        "boss",
        "alice",
        "U1",
    )
    assert row.detail == {"failures": "3", "reason": "she called"}
    assert desk.outbox.messages[-1].to == ("boss@bank.example", "alice@firm.example")
    assert desk.failures() == 0


def test_unlock_needs_no_registered_user(desk: Desk) -> None:
    """Only actors of every account see the entry of an unregistered actor."""
    desk.guess(desk.ask(actor=BOSS), BOSS, times=2)
    desk.flow.unlock(BOSS, "boss", reason="it was me")
    row = desk.rows()[0]
    assert (row.username, row.account_id) == ("boss", None)
    assert desk.outbox.messages[-1].user is None
    assert desk.failures(BOSS) == 0


# -- what is replaced, and what exists already -------------------------------------------------


@pytest.mark.parametrize("how", ["impose", "confirm"])
def test_replacing_an_expired_restriction_cancels_its_deletion(desk: Desk, how: str) -> None:
    desk.use(confirm_deletes=True)
    old = desk.add(OFFICE, expires_at=desk.later(hours=1))
    other = desk.add(HOME)
    request, kept = desk.ask_to_delete(old), desk.ask_to_delete(other)
    desk.wait(hours=2)
    if how == "impose":
        desk.add(OFFICE)
    else:
        desk.confirm(desk.ask(OFFICE))
    assert desk.request(request).state is RequestState.CANCELLED
    assert desk.request(kept).state is RequestState.PENDING
    (line,) = desk.flow.overview(BOSS, search="jsmith")
    assert [pending.id for pending in line.pending] == [kept.id]


@pytest.mark.parametrize("how", ["request", "pending", "impose", "impose_many"])
def test_a_duplicate_says_how_it_differs(desk: Desk, how: str) -> None:
    """The error says whether the label or the expiry differs."""
    until = desk.later(days=9)
    (desk.ask if how == "pending" else desk.add)(OFFICE, label="fair", expires_at=until)
    for label, expires_at in (("fair", until), ("fair", None), ("", until)):
        row = ("jsmith", OFFICE, label, expires_at)
        call: Any = {
            "impose": partial(desk.add, OFFICE, label=label, expires_at=expires_at),
            "impose_many": partial(desk.flow.impose_many, BOSS, [row], reason="a file"),
        }.get(how, partial(desk.ask, OFFICE, label=label, expires_at=expires_at))
        with desk.unchanged(), pytest.raises(ipguard.DuplicateRestriction) as caught:
            call()
        error = caught.value
        assert error.found == ("request" if how == "pending" else "restriction")
        assert (error.label, error.expires_at) == ("fair", until)
        assert error.differs is ((label, expires_at) != ("fair", until))


@pytest.mark.parametrize("how", ["request", "impose", "impose_many"])
def test_hints_know_the_settings(desk: Desk, how: str) -> None:
    call: Any = {
        "request": desk.ask,
        "impose": desk.add,
        "impose_many": lambda text: desk.flow.impose_many(BOSS, [("jsmith", text)], reason="x"),
    }[how]
    for text, hint in (("10.0.0.1/8", None), ("10.1.2.3/16", "10.1.0.0/16")):
        with desk.unchanged(), pytest.raises(ipguard.AddressError) as caught:
            call(text)
        assert caught.value.hint == hint


def test_an_import_keeps_the_order_of_its_rows(desk: Desk) -> None:
    wanted = [f"203.0.113.{n * 7 % 50}" for n in range(50)]
    desk.flow.impose_many(BOSS, [("jsmith", text) for text in wanted], reason="a file")
    assert desk.held() == wanted
    (line,) = desk.flow.overview(BOSS, search="jsmith")
    assert [str(each.addresses) for each in line.restrictions] == wanted
    policies = dict(desk.store.load_all_policies()[1])
    assert [str(each.addresses) for each in policies["jsmith"].restrictions] == wanted
    with desk.store.transaction() as turn:
        assert [str(each.addresses) for each in turn.restrictions("jsmith")] == wanted


def test_ids_of_an_import_cannot_be_guessed() -> None:
    """The ids of an import increase by random steps, and are as long as other ids."""
    ids = list(islice(_transaction.increasing_ids(), 100))
    assert ids == sorted(set(ids))
    assert {len(each) for each in ids} == {16}
    values = [int(each, 16) for each in ids]
    assert len({after - before for before, after in pairwise(values)}) > 90
