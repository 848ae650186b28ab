"""Operators: what actors of every account do at once, with a reason and without a number."""

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
from tests.flows import ALICE, BOSS, CAROL, HOME, OFFICE, Desk

EVERY_KNOWN_ACCOUNT = Actor(
    username="almost", email="almost@bank.example", manages=frozenset({"U1", "U2"})
)


# -- impose ------------------------------------------------------------------------------------


def test_impose_holds_at_once(desk: Desk) -> None:
    """Without a number, with its reason on the trail, and the user is told."""
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


def test_each_row_says_by_what_way_the_actor_came(desk: Desk) -> None:
    """With `via`, every row of that actor has it, as one pair that no label can forge."""
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
    """Width, duplicates, how many, the future: as for a request; an expired one is replaced."""
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


def test_impose_knows_no_lockout(desk: Desk) -> None:
    """An operator who restricts itself at once is not asked: an emergency is an emergency."""
    desk.store.put_users([User(username="boss", full_name="Boss", account_id="B")])
    desk.add(OFFICE, "boss")
    assert desk.held("boss") == [OFFICE]


@pytest.mark.parametrize("actor", [ALICE, CAROL, EVERY_KNOWN_ACCOUNT])
def test_operators_alone_do_these(desk: Desk, actor: Actor) -> None:
    """Who manages every account there is, one by one, still is no operator; nothing exists here."""
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
    """One line of text, and not an empty one; without it nothing happens."""
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


def test_a_reason_is_required_by_name(desk: Desk) -> None:
    """Leaving it out is an error of the program."""
    flow: Any = desk.flow
    with desk.unchanged(), pytest.raises(TypeError):
        flow.impose(BOSS, "jsmith", HOME)
    with desk.unchanged(), pytest.raises(TypeError):
        flow.lift(BOSS, "0" * 16)


# -- impose_many -------------------------------------------------------------------------------


def test_many_are_one_revision_that_says_everybody(desk: Desk) -> None:
    """All rows hold under one change; guards are told that anybody may be concerned."""
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


def test_a_bulk_row_is_for_actors_of_every_account(desk: Desk) -> None:
    """Who manages the accounts that it concerned does not see it."""
    desk.flow.impose_many(BOSS, [("jsmith", OFFICE)], reason="x")
    assert desk.flow.history(BOSS).items[0].action is Action.IMPOSE_MANY
    for actor in (ALICE, EVERY_KNOWN_ACCOUNT):
        actions = {row.action for row in desk.flow.history(actor)}
        assert Action.IMPOSE_MANY not in actions


def test_everybody_concerned_is_told_of_many(desk: Desk) -> None:
    """The actor once, and each user with an address, to that user's address alone."""
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
def test_a_hundred_users_are_told_and_no_more(desk: Desk, count: int, mails: int) -> None:
    """Beyond a hundred only the actor is."""
    names = [f"user{n}" for n in range(count)]
    desk.store.put_users(
        User(username=name, full_name="", account_id="U3", email=f"{name}@x.example")
        for name in names
    )
    desk.flow.impose_many(BOSS, ((name, OFFICE) for name in names), reason="x")
    assert len(desk.outbox.messages) == mails


def test_rows_are_streamed_before_the_turn_is_taken(desk: Desk) -> None:
    """Reading a slow source holds nobody up: another writer commits between two rows."""

    def rows() -> Iterator[tuple[str, str]]:
        yield ("mary", OFFICE)
        desk.add(HOME)
        yield ("mary", HOME)

    desk.flow.impose_many(BOSS, rows(), reason="x")
    assert len(desk.held("mary")) == 2
    assert [row.action for row in desk.rows()[:2]] == [Action.IMPOSE_MANY, Action.IMPOSE]


def test_a_row_that_is_refused_ends_the_reading(desk: Desk) -> None:
    """Nothing after it is read."""
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
        (("mary", "0.0.0.0/0"), ipguard.AddressTooBroad),
        (("", HOME), ipguard.UsernameError),
        ((5, HOME), ipguard.UsernameError),
        (("mary", 5), ipguard.AddressError),
        (("mary", HOME, "x" * 101), InvalidValue),
        (("mary", HOME, None), InvalidValue),
        (("mary", HOME, "", "tomorrow"), InvalidValue),
        (("mary", HOME, "", ipguard.testing.FakeClock()().replace(tzinfo=None)), InvalidValue),
        (("mary", HOME, "", ipguard.testing.FakeClock()()), InvalidValue),
        (("mary",), InvalidValue),
        (("mary", HOME, "", None, "more"), InvalidValue),
        ("mary,198.51.100.20", InvalidValue),
        (b"ab", InvalidValue),
        (5, InvalidValue),
        (None, InvalidValue),
        ({"username": "mary"}, InvalidValue),
        ({"addresses": HOME}, InvalidValue),
        ({"username": "mary", "addresses": HOME, "lable": "x"}, InvalidValue),
        ({"username": "mary", "addresses": HOME, "label": 0}, InvalidValue),
    ],
)
def test_a_bad_row_is_named_and_nothing_holds(desk: Desk, row: Any, error: type[Exception]) -> None:
    """A note on the error says which row it was; those before it do not hold either."""
    with desk.unchanged(), pytest.raises(error) as caught:
        desk.flow.impose_many(BOSS, [("jsmith", OFFICE), ("mary", OFFICE), row], reason="x")
    assert caught.value.__notes__ == ["row 3"]


@pytest.mark.parametrize(
    ("rows", "error", "told"),
    [
        ([("mary", OFFICE), ("nobody", OFFICE)], UnknownUser, "nobody"),
        ([("mary", OFFICE), ("mary", "203.0.113.7/32")], DuplicateRestriction, "mary"),
        ([("mary", HOME), ("jsmith", OFFICE)], DuplicateRestriction, "jsmith"),
        ([("mary", f"192.0.2.{n}") for n in range(4)], TooManyRestrictions, "mary"),
    ],
)
def test_all_or_nothing(
    desk: Desk, rows: list[tuple[str, str]], error: type[Exception], told: str
) -> None:
    """What only all the rows together show is refused by the user's name, and nothing holds."""
    desk.use(restrictions_per_user=3)
    desk.add()
    with desk.unchanged(), pytest.raises(error) as caught:
        desk.flow.impose_many(BOSS, rows, reason="x")
    assert told in str(caught.value)


def test_an_expired_one_is_replaced_by_many(desk: Desk) -> None:
    """As by one."""
    desk.add(expires_at=desk.later(hours=1))
    desk.wait(hours=1)
    desk.flow.impose_many(BOSS, [("jsmith", OFFICE)], reason="x")
    (held,) = desk.store.load_policy("jsmith").restrictions
    assert held.expires_at is None


@pytest.mark.parametrize("rows", [[], (), iter([])])
def test_no_rows_are_an_error(desk: Desk, rows: Any) -> None:
    """An empty file is a mistake, and takes no revision."""
    with desk.unchanged(), pytest.raises(InvalidValue) as caught:
        desk.flow.impose_many(BOSS, rows, reason="x")
    assert caught.value.name == "rows"


def test_a_source_that_breaks_changes_nothing(desk: Desk) -> None:
    """What the rows' own reading raises comes through as it is."""

    def rows() -> Iterator[tuple[str, str]]:
        yield ("mary", OFFICE)
        raise OSError("the disk broke")

    with desk.unchanged(), pytest.raises(OSError, match="the disk broke"):
        desk.flow.impose_many(BOSS, rows(), reason="x")
    with desk.unchanged(), pytest.raises(TypeError):
        desk.flow.impose_many(BOSS, 5, reason="x")  # type: ignore[arg-type]


def test_many_thousands(desk: Desk, long: bool) -> None:
    """Any number of rows, from a generator, in one revision."""
    users, each = (1000, 100) if long else (100, 20)
    desk.store.put_users(
        User(username=f"u{n}", full_name="", account_id="U3") for n in range(users)
    )
    head = desk.rows()[0].revision
    applied = desk.flow.impose_many(
        BOSS, ((f"u{n}", f"10.0.0.{m}") for m in range(each) for n in range(users)), reason="x"
    )
    assert applied.revision == head + 1
    assert desk.rows()[0].detail["restrictions"] == str(users * each)
    assert len(desk.held(f"u{users - 1}")) == each


# -- lift --------------------------------------------------------------------------------------


def test_lift_ends_a_restriction_at_once(desk: Desk) -> None:
    """Without a number though deletes need one, with its reason, and the user is told."""
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


def test_unlock_is_on_the_trail_and_the_actor_is_told(desk: Desk) -> None:
    """With the reason, with how many failures it forgave, under the account of the unlocked."""
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
    """Administrators need not be users; the row then is for actors of every account."""
    desk.guess(desk.ask(actor=BOSS), BOSS, times=2)
    desk.flow.unlock(BOSS, "boss", reason="it was me")
    row = desk.rows()[0]
    assert (row.username, row.account_id) == ("boss", None)
    assert desk.outbox.messages[-1].user is None
    assert desk.failures(BOSS) == 0


def test_unlock_touches_no_policy(desk: Desk) -> None:
    """No guard has to forget anybody for it."""
    head, token, _ = desk.store.changes_since(None)
    desk.flow.unlock(BOSS, "alice", reason="x")
    assert desk.store.changes_since((head, token)).usernames == frozenset()


# -- what is replaced, and what exists already -------------------------------------------------


@pytest.mark.parametrize("how", ["impose", "impose_many", "confirm"])
def test_replacing_an_expired_restriction_cancels_its_deletion(desk: Desk, how: str) -> None:
    """Whichever call replaces it, no request is left that nothing can confirm."""
    desk.use(confirm_deletes=True)
    old = desk.add(OFFICE, expires_at=desk.later(hours=1))
    other = desk.add(HOME)
    request, kept = desk.ask_to_delete(old), desk.ask_to_delete(other)
    desk.wait(hours=2)
    if how == "impose":
        desk.add(OFFICE)
    elif how == "impose_many":
        desk.flow.impose_many(BOSS, [("mary", HOME), ("jsmith", OFFICE)], reason="a file")
    else:
        desk.confirm(desk.ask(OFFICE))
    assert desk.request(request).state is RequestState.CANCELLED
    assert desk.request(kept).state is RequestState.PENDING
    (line,) = desk.flow.overview(BOSS, search="jsmith")
    assert [pending.id for pending in line.pending] == [kept.id]


@pytest.mark.parametrize(
    ("how", "pending"),
    [("request", False), ("request", True), ("impose", False), ("impose_many", False)],
)
def test_a_duplicate_says_how_it_differs(desk: Desk, how: str, pending: bool) -> None:
    """The same addresses with another label or expiry are refused, and the error says so."""
    until = desk.later(days=9)
    if pending:
        desk.ask(OFFICE, label="fair", expires_at=until)
    else:
        desk.add(OFFICE, label="fair", expires_at=until)
    for label, expires_at in (("fair", until), ("fair", None), ("", until)):
        row = ("jsmith", OFFICE, label, expires_at)
        call: Any = {
            "request": partial(desk.ask, OFFICE, label=label, expires_at=expires_at),
            "impose": partial(desk.add, OFFICE, label=label, expires_at=expires_at),
            "impose_many": partial(desk.flow.impose_many, BOSS, [row], reason="a file"),
        }[how]
        with desk.unchanged(), pytest.raises(ipguard.DuplicateRestriction) as caught:
            call()
        error = caught.value
        assert (error.found, error.label) == ("request" if pending else "restriction", "fair")
        assert error.expires_at == until
        assert error.differs is ((label, expires_at) != ("fair", until))
        assert ("was not changed" in str(error)) is error.differs


def test_deleting_twice_says_that_the_deletion_is_pending(desk: Desk) -> None:
    """A second request to delete a restriction names the first, not the restriction."""
    desk.use(confirm_deletes=True)
    restriction = desk.add(OFFICE)
    desk.ask_to_delete(restriction)
    with desk.unchanged(), pytest.raises(ipguard.DuplicateRestriction) as caught:
        desk.ask_to_delete(restriction)
    assert str(caught.value) == f"a request to delete {OFFICE} of jsmith is already pending"


@pytest.mark.parametrize("how", ["request", "impose", "impose_many"])
def test_hints_know_the_settings(desk: Desk, how: str) -> None:
    """No call proposes a network that its settings refuse."""
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
    """Restrictions of one moment are listed as the file has them, by every reader."""
    wanted = [f"203.0.113.{n * 7 % 50}" for n in range(50)]
    desk.flow.impose_many(BOSS, [("jsmith", text) for text in wanted], reason="a file")
    assert desk.held() == wanted
    (line,) = desk.flow.overview(BOSS, search="jsmith")
    assert [str(each.addresses) for each in line.restrictions] == wanted
    policies = dict(desk.store.load_all_policies()[1])
    assert [str(each.addresses) for each in policies["jsmith"].restrictions] == wanted
    with desk.store.transaction() as turn:
        assert [str(each.addresses) for each in turn.restrictions("jsmith")] == wanted


def test_ids_of_an_import_cannot_be_counted() -> None:
    """They increase by steps that cannot be guessed, and have the length of every other id."""
    ids = list(islice(_transaction.increasing_ids(), 100))
    assert ids == sorted(set(ids))
    assert {len(each) for each in ids} == {16}
    values = [int(each, 16) for each in ids]
    assert len({after - before for before, after in pairwise(values)}) > 90
