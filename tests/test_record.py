"""The record in the databases: what `verify` finds, older libraries, pruning, random histories."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard import Actor, User, Workflow, WorkflowSettings
from ipguard.addresses import AddressRange
from ipguard.audit import micros, read_anchor
from ipguard.errors import InvalidValue, IPGuardError, StoreUnavailable
from ipguard.model import Action, Policy, Restriction, Verification
from ipguard.stores import open_store
from ipguard.stores._sql import SCHEMA_VERSION, migrations, record
from ipguard.testing import FakeClock, Outbox
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema
from tests.test_scale_listing import START, Postgres, Run, Sqlite, old_put

pytestmark = pytest.mark.slow

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
HOME, OFFICE = "203.0.113.7", "198.51.100.0/24"
FIELDS = "id, first_ip, last_ip, label, created_at, created_by, expires_at"


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, tmp_path: Path, postgres: Server | Given) -> Sqlite | Postgres:
    """A database with the present schema."""
    found = Sqlite(tmp_path, SCHEMA_VERSION) if kind == "SQLite" else Postgres(postgres, 7)
    assert len(migrations("sqlite")) == SCHEMA_VERSION
    return found


@pytest.fixture
def older(kind: str, tmp_path: Path, postgres: Server | Given) -> Sqlite | Postgres:
    """A database with the schema before the record."""
    return Sqlite(tmp_path, 6) if kind == "SQLite" else Postgres(postgres, 6)


def user(name: str, **fields: Any) -> User:
    return User(username=name, full_name="", account_id="A1", **fields)


def workflow(store: Any) -> Workflow:
    return Workflow(store, Outbox(), key=bytes(32))


def fill(store: Any, tick: Callable[[], object] = lambda: None) -> None:
    """Make nine entries: restrictions of each kind, of which some end.

    The revisions are 1: users; 2 and 3: impose; 4: import; 5: lift of the one from 2; 6: rename of
    "kim" to "sue"; 7: an import that replaces the list of "al"; 8 and 9: impose. `tick` is called
    before each.
    """
    flow = workflow(store)
    held: list[Restriction] = []

    def impose(name: str, addresses: str) -> None:
        restriction = flow.impose(BOSS, name, addresses, reason="x").restriction
        assert restriction is not None
        held.append(restriction)

    rows = [("al", HOME), ("kim", HOME), ("al", OFFICE)]
    steps: list[Callable[[], object]] = [
        lambda: store.put_users([user("al"), user("jo"), user("kim")]),
        lambda: impose("jo", HOME),
        lambda: impose("jo", OFFICE),
        lambda: flow.impose_many(BOSS, rows, reason="list"),
        lambda: flow.lift(BOSS, held[0].id, reason="moved"),
        lambda: store.rename_user("kim", "sue"),
        lambda: flow.impose_many(BOSS, [("al", "2001:db8::/64")], reason="list", replace=True),
        lambda: impose("jo", "203.0.113.8"),
        lambda: impose("jo", "203.0.113.9"),
    ]
    for step in steps:
        tick()
        step()


def sql(place: Sqlite | Postgres, *statements: str) -> None:
    """Run statements behind the library's back."""

    def write(run: Run) -> None:
        for statement in statements:
            run(statement, ())

    place.old(write)


def damaged(place: Sqlite | Postgres) -> list[int | None]:
    """Return the revisions of the damage that `verify` finds."""
    store: Any = place.open()
    with store:
        return [each.revision for each in store.verify().damage]


# ------------------------------------------------------------------------------- damage

ENTRY = {
    "its actor": ("UPDATE changes SET actor = 'other' WHERE revision = 3", 3),
    "its address": ("UPDATE changes SET actor_address = '::1' WHERE revision = 3", 3),
    "its action": ("UPDATE changes SET action = 'lift' WHERE revision = 3", 3),
    "its user": ("UPDATE changes SET username = 'al' WHERE revision = 3", 3),
    "its account": ("UPDATE changes SET account_id = 'B2' WHERE revision = 3", 3),
    "its detail": ("UPDATE changes SET detail = '' WHERE revision = 3", 3),
    "its time": ("UPDATE changes SET at = at + 1 WHERE revision = 3", 3),
    "whom it touches": ("UPDATE changes SET touched = NULL WHERE revision = 3", 3),
    "its salt": ("UPDATE changes SET salt = token WHERE revision = 3", 3),
    "its missing salt": ("UPDATE changes SET salt = NULL WHERE revision = 3", 3),
    "its digest": ("UPDATE changes SET restrictions = '' WHERE revision = 3", 3),
    "its token": ("UPDATE changes SET token = salt WHERE revision = 3", 3),
    "its token, of the last": ("UPDATE changes SET token = salt WHERE revision = 9", 9),
}
MADE_UP = (
    f"INSERT INTO past_restrictions (username, ended, {FIELDS}, began)"
    f" SELECT username, 8, {FIELDS}, began FROM restrictions WHERE began = 3"
)
RESTRICTION = {
    "its addresses": ("UPDATE restrictions SET last_ip = first_ip WHERE began = 3", 3),
    "its label": ("UPDATE restrictions SET label = 'x' WHERE began = 3", 3),
    "its expiry": ("UPDATE restrictions SET expires_at = 1 WHERE began = 3", 3),
    "its user": ("UPDATE restrictions SET username = 'al' WHERE began = 3", 3),
    "its id": ("UPDATE restrictions SET id = 'x' WHERE began = 3", 3),
    "its time": ("UPDATE restrictions SET created_at = 1 WHERE began = 3", 3),
    "its author": ("UPDATE restrictions SET created_by = 'x' WHERE began = 3", 3),
    "its beginning": ("UPDATE restrictions SET began = 2 WHERE began = 3", 2),
    "its import": ("UPDATE imports SET revision = 8 WHERE revision = 7", 7),
    "the label of an ended one": ("UPDATE past_restrictions SET label = 'x' WHERE began = 2", 2),
    "the end of an ended one": ("UPDATE past_restrictions SET ended = 6 WHERE began = 2", 5),
    "that it has ended": ("DELETE FROM past_restrictions WHERE began = 2", 2),
    "an end that is made up": (MADE_UP, 8),
    "that it exists": ("DELETE FROM restrictions WHERE began = 3", 10),
}  # fmt: skip


@pytest.mark.parametrize("name", [*ENTRY, *RESTRICTION])
def test_a_changed_row_is_found(place: Sqlite | Postgres, name: str) -> None:
    """`verify` finds each change behind the library's back, and names the revision."""
    statement, revision = {**ENTRY, **RESTRICTION}[name]
    store: Any = place.open()
    with store:
        fill(store)
        found = store.verify()
        assert (found.damage, found.head, found.entries) == ((), 9, 9)
        assert (found.restrictions, found.uncovered) == (9, 0)
    sql(place, statement)
    assert revision in damaged(place)


@pytest.mark.parametrize("revision", [1, 4, 8])
def test_a_removed_entry_is_found(place: Sqlite | Postgres, revision: int) -> None:
    store: Any = place.open()
    with store:
        fill(store)
    sql(place, f"DELETE FROM changes WHERE revision = {revision}")
    assert revision in damaged(place)


def test_a_removed_last_entry_is_found(place: Sqlite | Postgres) -> None:
    """With the head set back, the restriction that it added has no entry."""
    store: Any = place.open()
    with store:
        fill(store)
    sql(place, "DELETE FROM changes WHERE revision = 9")
    assert 9 in damaged(place)
    sql(
        place,
        "UPDATE head SET revision = 8, token = (SELECT token FROM changes WHERE revision = 8)",
    )
    assert damaged(place) == [9]


def test_an_inserted_entry_is_found(place: Sqlite | Postgres) -> None:
    """The entries after it are renumbered, and the head with them."""
    store: Any = place.open()
    with store:
        fill(store)
    columns = "token, at, actor, actor_address, action, username, account_id, detail, touched, salt"
    for table, column in (("restrictions", "began"), ("past_restrictions", "ended")):
        sql(place, f"UPDATE {table} SET {column} = {column} + 1 WHERE {column} > 4")
    sql(
        place,
        "UPDATE changes SET revision = revision + 1001 WHERE revision > 4",
        "UPDATE changes SET revision = revision - 1000 WHERE revision > 1000",
        f"INSERT INTO changes (revision, {columns}, restrictions)"
        f" SELECT 5, {columns}, '' FROM changes WHERE revision = 1",
        "UPDATE head SET revision = 10",
    )
    assert 5 in damaged(place)


def test_two_swapped_entries_are_found(place: Sqlite | Postgres) -> None:
    store: Any = place.open()
    with store:
        fill(store)
    sql(
        place,
        "UPDATE changes SET revision = 1000 WHERE revision = 8",
        "UPDATE changes SET revision = 8 WHERE revision = 9",
        "UPDATE changes SET revision = 9 WHERE revision = 1000",
    )
    assert {8, 9} <= set(damaged(place))


@pytest.mark.parametrize(
    ("began", "revision"), [("NULL", None), ("0", 0), ("3", 3), ("12", 12), ("-5", None)]
)
def test_an_inserted_restriction_is_found(
    place: Sqlite | Postgres, began: str, revision: int | None
) -> None:
    """Whatever beginning it claims; no entry has added it."""
    store: Any = place.open()
    with store:
        fill(store)
    sql(
        place,
        f"INSERT INTO restrictions (username, {FIELDS}, began) SELECT 'al', 'x',"
        f" first_ip, last_ip, label, created_at, created_by, expires_at, {began}"
        " FROM restrictions WHERE began = 3",
    )
    assert damaged(place) == [revision]


def test_a_restriction_deleted_without_a_trace_is_found(place: Sqlite | Postgres) -> None:
    """Also if the row that the trigger writes is deleted too."""
    store: Any = place.open()
    with store:
        fill(store)
    sql(
        place,
        "DELETE FROM restrictions WHERE began = 3",
        "DELETE FROM past_restrictions WHERE began = 3",
    )
    assert damaged(place) == [3]


def test_a_truncated_log_is_found_by_what_was_noted(place: Sqlite | Postgres) -> None:
    """A whole log that was cut at its end, with its restrictions, is only found by a note."""
    store: Any = place.open()
    with store:
        fill(store)
        noted = store.verify()
        workflow(store).impose(BOSS, "al", "::1", reason="more")
        later = store.verify()
        expected = store.verify(expect=(noted.head, noted.token))
    assert (later.head, later.damage, expected.damage) == (10, (), ())
    sql(
        place,
        "DELETE FROM restrictions WHERE began = 10",
        "DELETE FROM past_restrictions WHERE ended > 9",
        "DELETE FROM changes WHERE revision = 10",
        f"UPDATE head SET revision = 9, token = '{noted.token}'",
    )
    with place.open() as store:  # type: ignore[attr-defined]
        assert store.verify().damage == ()
        assert store.verify(expect=(9, noted.token)).damage == ()
        (damage,) = store.verify(expect=(later.head, later.token)).damage
        assert damage.revision == 10
        (damage,) = store.verify(expect=(9, later.token)).damage
        assert damage.revision == 9


def test_memory_does_not_grow_with_the_store(place: Sqlite | Postgres) -> None:
    """An import and its verification hold a part of the restrictions at a time."""

    def rows(number: int, size: int) -> Iterator[Restriction]:
        for n in range(size):
            yield Restriction(
                id=f"{number} {n}",
                username="jo",
                addresses=AddressRange(version=4, first=n, last=n),
                label="",
                created_at=START,
                created_by="boss",
            )

    peaks: list[tuple[int, int]] = []
    store: Any = place.open()
    with store:
        store.put_users([user("jo")])
        for number, size in enumerate((6_000, 18_000)):
            tracemalloc.start()
            with store.transaction(staged=rows(number, size)) as tx:
                tx.add_staged(per_user=100_000, replace=True)
                tx.append(Action.IMPOSE_MANY, actor=None, touches=frozenset({"jo"}))
            imported = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            assert store.verify().damage == ()
            peaks.append((imported, tracemalloc.get_traced_memory()[1]))
            tracemalloc.stop()
    for small, large in zip(*peaks, strict=True):
        assert large < 1.5 * small + 1_000_000


@pytest.mark.parametrize("beginning", [4, 9])
def test_a_beginning_that_was_moved_is_found(place: Sqlite | Postgres, beginning: int) -> None:
    """Else what is written before it would not be checked."""
    store: Any = place.open()
    with store:
        fill(store)
        noted = store.verify()
    sql(
        place,
        "UPDATE changes SET actor = 'other' WHERE revision = 3",
        f"UPDATE changes SET salt = NULL WHERE revision <= {beginning}",
        f"UPDATE head SET recorded = {beginning}",
    )
    with place.open() as store:  # type: ignore[attr-defined]
        assert [each.revision for each in store.verify().damage][:1] == [beginning]
    sql(
        place,
        "UPDATE changes SET token = 'x' WHERE revision = 9",
        "UPDATE head SET token = 'x', recorded = 9",
    )
    with place.open() as store:  # type: ignore[attr-defined]
        assert store.verify().damage == ()
        (damage,) = store.verify(expect=(9, noted.token)).damage
        assert damage.revision == 9
        sql(place, "UPDATE changes SET token = 'noted' WHERE revision = 4")
        (damage,) = store.verify(expect=(4, "noted")).damage
        assert damage.revision == 4


def test_at_most_a_hundred_places_are_reported(place: Sqlite | Postgres) -> None:
    store: Any = place.open()
    with store:
        store.put_users([user(f"user{n}") for n in range(200)])
        flow = workflow(store)
        flow.impose_many(BOSS, [(f"user{n}", HOME) for n in range(200)], reason="list")
        sql(place, "UPDATE restrictions SET began = NULL")
        found = store.verify()
    assert len(found.damage) == 100
    assert found.uncovered == 200


# ------------------------------------------------------------------------------- older libraries

_APPEND = (
    "INSERT INTO changes (revision, token, at, actor, action, username, detail, touched)"
    " SELECT h.revision + 1, 'aaaa' || (h.revision + 1), ?, 'boss', 'impose', 'jo', '', '*'"
    " FROM head h"
)
_MOVE = (
    "UPDATE head SET revision = revision + 1, touching = revision + 1,"
    " token = 'aaaa' || (revision + 1)"
)
_IMPOSE = (
    f"INSERT INTO restrictions (username, {FIELDS}) VALUES ('jo', ?, ?, ?, '', ?, 'boss', NULL)"
)


def old_impose(run: Run, restriction_id: str, seconds: int) -> None:
    """Impose a restriction as the libraries for schemas 1 to 6 do."""
    at = micros(START) + seconds * 1_000_000
    run(_IMPOSE, (restriction_id, *AddressRange.parse(HOME).packed, at))
    run(_APPEND, (at,))
    run(_MOVE, ())


def old_lift(run: Run, restriction_id: str, seconds: int) -> None:
    run("DELETE FROM restrictions WHERE id = ?", (restriction_id,))
    run(_APPEND, (micros(START) + seconds * 1_000_000,))
    run(_MOVE, ())


def ids(policy: Policy) -> list[str]:
    return [each.id for each in policy.restrictions]


def test_a_store_is_migrated_with_its_data(older: Sqlite | Postgres) -> None:
    """The record begins with the restrictions of that time, which no entry covers."""
    older.old(lambda run: old_put(run, [user("jo")], schema=2))
    older.old(lambda run: old_impose(run, "r1", 1))
    older.old(lambda run: old_impose(run, "r2", 2))
    older.old(lambda run: old_lift(run, "r1", 3))
    store: Any = older.open()
    with store:
        assert ids(store.load_policy("jo")) == ["r2"]
        assert ids(store.policy_at("jo", 3)) == ["r2"]
        with pytest.raises(InvalidValue, match="begins at revision 3"):
            store.policy_at("jo", 2)
        found = store.verify()
        assert (found.first, found.head, found.entries, found.damage) == (4, 3, 0, ())
        assert (found.restrictions, found.uncovered) == (1, 1)
        assert store.verify(expect=(3, found.token)).damage == ()
        workflow(store).lift(BOSS, "r2", reason="moved")
        assert ids(store.policy_at("jo", 3)) == ["r2"]
        assert ids(store.policy_at("jo", 4)) == []
        found = store.verify()
        assert (found.first, found.entries, found.damage, found.uncovered) == (4, 1, (), 1)
        store.prune(START)  # nothing is that old, but the anchor covers the restriction
        found = store.verify()
        assert (found.first, found.entries, found.damage, found.uncovered) == (4, 2, (), 0)
    sql(older, "UPDATE past_restrictions SET label = 'x'")
    assert len(damaged(older)) == 1


def test_an_older_library_writes_beside_this_one(place: Sqlite | Postgres) -> None:
    """Its deletions are kept, its additions count by their time, and `verify` reports both."""
    store: Any = place.open()
    with store:
        store.put_users([user("jo")])
        mine = workflow(store).impose(BOSS, "jo", OFFICE, reason="office").restriction
        assert mine is not None
        place.old(lambda run: old_impose(run, "r1", 10))
        place.old(lambda run: old_impose(run, "r2", 20))
        place.old(lambda run: old_lift(run, "r1", 30))
        place.old(lambda run: old_lift(run, mine.id, 40))
        assert [sorted(ids(store.policy_at("jo", n))) for n in range(1, 7)] == [
            [],
            [mine.id],
            sorted([mine.id, "r1"]),
            sorted([mine.id, "r1", "r2"]),
            sorted([mine.id, "r2"]),
            ["r2"],
        ]
        found = store.verify()
        assert [each.revision for each in found.damage] == [3, 4, 5, 6, None, None]
        assert found.uncovered == 2
        store._clock.advance(timedelta(minutes=1))
        workflow(store).lift(BOSS, "r2", reason="moved")
        assert ids(store.policy_at("jo", 6)) == ["r2"]
        assert store.prune(START + timedelta(days=1)) == 7
        found = store.verify()
        assert (found.first, found.head, found.damage, found.uncovered) == (7, 8, (), 0)
        assert ids(store.policy_at("jo", 6)) == ["r2"]
        assert ids(store.policy_at("jo", 7)) == []


def test_a_rename_by_an_older_library_is_no_older_than_its_entry(place: Sqlite | Postgres) -> None:
    """It inserts the restrictions again, with the time at which they were created."""

    def rename(run: Run) -> None:
        run("DELETE FROM restrictions WHERE id = 'r1'", ())
        run(_IMPOSE.replace("'jo'", "'joe'"), ("r1", *AddressRange.parse(HOME).packed, at))
        run(_APPEND, (at + 10_000_000,))
        run(_MOVE, ())

    at = micros(START) + 10_000_000
    store: Any = place.open()
    with store:
        store.put_users([user("jo"), user("joe")])
        place.old(lambda run: old_impose(run, "r1", 10))
        place.old(rename)
        assert [ids(store.policy_at("jo", n)) for n in (1, 2, 3)] == [[], ["r1"], []]
        assert [ids(store.policy_at("joe", n)) for n in (1, 2, 3)] == [[], [], ["r1"]]


def test_a_prune_by_an_older_library_leaves_a_gap(place: Sqlite | Postgres) -> None:
    """It writes no anchor; the next prune does, and gives up one entry for the token."""
    store: Any = place.open()
    with store:
        fill(store)
        sql(place, "DELETE FROM changes WHERE revision < 4")
        assert len(store.verify().damage) > 1
        with pytest.raises(InvalidValue, match="begins at revision 3"):
            store.policy_at("jo", 2)
        assert store.prune(START - timedelta(days=1)) == 1
        found = store.verify()
        assert (found.first, found.damage, found.uncovered) == (5, (), 0)


# ------------------------------------------------------------------------------- pruning


@attrs.define
class Filled:
    """A store with the nine entries of `fill`, a minute apart."""

    store: Any
    policies: dict[int, dict[str, Policy]]


@pytest.fixture
def filled(place: Sqlite | Postgres) -> Iterator[Filled]:
    clock = FakeClock(START)
    url = f"sqlite:///{place.path}" if isinstance(place, Sqlite) else place.server.url(
        schema=place.schema, timeout=20
    )  # fmt: skip
    with open_store(url, clock=clock) as store:
        fill(store, lambda: clock.advance(timedelta(minutes=1)))
        policies = {
            n: {name: store.policy_at(name, n) for name in ("al", "jo", "kim", "sue")}
            for n in range(10)
        }
        yield Filled(store, policies)


def at_revision(filled: Filled, revision: int) -> Any:
    changes = filled.store.history(Actor.EVERY_ACCOUNT).items
    return next(change.at for change in changes if change.revision == revision)


@pytest.mark.parametrize("kept_from", [2, 4, 6, 9])
def test_a_pruned_log_is_verified_from_its_anchor(
    filled: Filled, place: Sqlite | Postgres, kept_from: int
) -> None:
    """The anchor has the token and the restrictions of the time; earlier policies are gone."""
    store, before = filled.store, filled.store.verify()
    assert store.prune(at_revision(filled, kept_from)) == kept_from
    found = store.verify()
    assert (found.first, found.head, found.damage) == (kept_from, 10, ())
    assert (found.entries, found.uncovered) == (11 - kept_from, 0)
    (entry,) = store.history(Actor.EVERY_ACCOUNT, limit=1).items
    anchor = read_anchor(entry.detail)
    assert (entry.action, entry.actor, entry.username) == (Action.PRUNE, None, None)
    assert anchor is not None
    assert (anchor.kept_from, entry.detail["deleted"]) == (kept_from, str(kept_from))
    for revision in range(kept_from - 1, 10):
        for name, policy in filled.policies[revision].items():
            assert store.policy_at(name, revision).restrictions == policy.restrictions
    with pytest.raises(InvalidValue):
        store.policy_at("jo", kept_from - 2)
    assert store.verify(expect=(before.head, before.token)).damage == ()
    (damage,) = store.verify(expect=(kept_from - 1, anchor.token)).damage
    assert damage.revision == kept_from - 1
    # A second prune at the same time has nothing to do; a later one replaces the anchor.
    assert store.prune(at_revision(filled, kept_from)) == 0
    assert store.verify().head == 10
    assert store.prune(at_revision(filled, 9)) == max(0, 9 - kept_from)
    assert store.verify().damage == ()


def test_a_change_of_what_an_anchor_covers_is_found(
    filled: Filled, place: Sqlite | Postgres
) -> None:
    """A restriction that is older than the first entry is in the anchor's digest."""
    filled.store.prune(at_revision(filled, 6))
    sql(place, "UPDATE restrictions SET label = 'x' WHERE began = 3")
    assert damaged(place) == [6]


def test_a_prune_that_was_interrupted_is_resumed(filled: Filled, place: Sqlite | Postgres) -> None:
    """Entries that its anchor replaces do no harm, and go with the next prune."""
    store: Any = filled.store
    store.prune(at_revision(filled, 6))
    columns = "token, at, action, detail"
    sql(place, f"INSERT INTO changes (revision, {columns}) SELECT 4, {columns} FROM changes"
               " WHERE revision = 7")  # fmt: skip
    assert store.verify().damage == ()
    assert store.prune(at_revision(filled, 6)) == 1
    assert store.verify().damage == ()
    assert store.verify().head == 10


def test_an_anchor_is_pruned_like_other_entries(filled: Filled) -> None:
    """The next one replaces it, as often as the store is pruned."""
    anchored = 0
    for _ in range(3):
        filled.store.prune(filled.store.now())
        filled.store._clock.advance(timedelta(days=1))
        for address in (HOME, OFFICE):
            workflow(filled.store).impose(BOSS, "jo", address, reason="x", only=True)
        found = filled.store.verify()
        assert (found.damage, found.uncovered) == ((), 0)
        assert found.first > anchored
        anchored = found.first


def test_text_for_a_number_is_found(tmp_path: Path) -> None:
    """SQLite stores it, if another program writes it."""
    place = Sqlite(tmp_path, SCHEMA_VERSION)
    store: Any = place.open()
    with store:
        fill(store)
    sql(
        place,
        "UPDATE restrictions SET began = 'x' WHERE began = 3",
        "UPDATE past_restrictions SET ended = 'y' WHERE began = 2",
    )
    with place.open() as store:  # type: ignore[attr-defined]
        found = [str(each) for each in store.verify().damage]
    assert any("begins at revision x, which has no entry" in each for each in found)
    assert any("ends at revision y, which has no entry" in each for each in found)
    sql(place, "UPDATE head SET recorded = NULL")
    with place.open() as store, pytest.raises(StoreUnavailable):  # type: ignore[attr-defined]
        store.verify()


def test_two_prunes_at_once_are_refused(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later anchor could otherwise keep more than is left."""
    store: Any = filled.store
    answers = iter([(0, None), (99, None)])
    monkeypatch.setattr(record, "latest_anchor", lambda _: next(answers))
    with pytest.raises(StoreUnavailable, match="same time"):
        store.prune(at_revision(filled, 6))
    monkeypatch.undo()
    assert store.verify().entries == 9


def test_an_anchor_that_cannot_be_read_is_none(filled: Filled, place: Sqlite | Postgres) -> None:
    """An entry of another program with this action does not hide entries."""
    store: Any = filled.store
    with store.transaction() as tx:
        tx.append(Action.PRUNE, actor="other", detail={"kept_from": "soon"})
    assert store.verify().first == 1
    assert store.verify().damage == ()


# ------------------------------------------------------------------------------- random histories

NAMES = ("al", "jo", "kim", "sue")
RUNS = (HOME, OFFICE, "203.0.113.0/28", "2001:db8::/64", "::1")

_names = st.sampled_from(NAMES)
_rows = st.lists(st.tuples(_names, st.sampled_from(RUNS)), max_size=6)
_people = st.lists(
    st.tuples(_names, st.none() | st.sampled_from("123")), max_size=4, unique_by=lambda p: p[0]
)
_steps = st.one_of(
    st.tuples(st.just("impose"), _names, st.sampled_from(RUNS), st.none() | st.integers(1, 3)),
    st.tuples(st.just("request"), _names, st.sampled_from(RUNS)),
    st.tuples(st.just("many"), _rows, st.sampled_from(["", "replace", "skip_existing"])),
    st.tuples(st.just("lift"), _names, st.integers(0, 3)),
    st.tuples(st.just("delete"), _names, st.integers(0, 3)),
    st.tuples(st.just("wait"), st.integers(1, 4)),
    st.tuples(st.just("rename"), _names, _names),
    st.tuples(st.just("remove"), st.lists(_names, max_size=2)),
    st.tuples(st.just("put"), _people),
    st.tuples(st.just("sync"), _people, st.booleans()),
)

Policies = dict[str, tuple[Restriction, ...]]


class History:
    """A store, and a model of it: each user's restrictions after each revision.

    The model is what logins were decided by: the policies that the store gave to guards after each
    change. Between the entries of one change it moves the restrictions of renamed users itself.
    """

    def __init__(self, url: str) -> None:
        self.clock = FakeClock(START)
        self.store = open_store(url, clock=self.clock)
        self.outbox = Outbox()
        self.flow = Workflow(
            self.store,
            self.outbox,
            key=bytes(32),
            settings=WorkflowSettings(requests_per_hour=1000, restrictions_per_user=3),
        )
        self.model: list[Policies] = [self.held()]
        self.store.put_users([user("al", uid="1"), user("jo", uid="2"), user("kim")])
        self.observe()

    def held(self) -> Policies:
        return {name: self.store.load_policy(name).restrictions for name in NAMES}

    def observe(self) -> None:
        """Add the state after each new revision to the model."""
        before, head = self.model[-1], self.store.changes_since(None).head
        changes = self.store.history(Actor.EVERY_ACCOUNT, limit=100).items
        state = dict(before)
        for change in reversed(changes):
            if change.revision < len(self.model):
                continue
            if change.action is Action.RENAME_USER:
                old, new = change.detail["old"], change.detail["new"]
                moved = [attrs.evolve(each, username=new) for each in before[old]]
                gone = {each.id for each in before[old]}
                state[old] = tuple(each for each in state[old] if each.id not in gone)
                both = (*state[new], *moved)
                state[new] = tuple(sorted(both, key=lambda r: (r.created_at, r.id)))
            self.model.append(self.held() if change.revision == head else dict(state))
        assert len(self.model) == head + 1

    def do(self, step: tuple[Any, ...]) -> None:
        with suppress(IPGuardError):
            getattr(self, step[0])(*step[1:])
        self.observe()

    def impose(self, name: str, run: str, minutes: int | None) -> None:
        until = None if minutes is None else self.clock() + timedelta(minutes=minutes)
        self.flow.impose(BOSS, name, run, reason="x", expires_at=until)

    def request(self, name: str, run: str) -> None:
        request = self.flow.request(BOSS, name, run)
        self.flow.confirm(BOSS, request.id, self.outbox.number_for(request.id))

    def many(self, rows: list[tuple[str, str]], option: str) -> None:
        self.flow.impose_many(BOSS, rows, reason="x", **({option: True} if option else {}))

    def lift(self, name: str, place: int) -> None:
        held = self.store.load_policy(name).restrictions
        if place < len(held):
            self.flow.lift(BOSS, held[place].id, reason="x")

    def delete(self, name: str, place: int) -> None:
        held = self.store.load_policy(name).restrictions
        if place < len(held):
            self.flow.delete(BOSS, held[place].id)

    def wait(self, minutes: int) -> None:
        self.clock.advance(timedelta(minutes=minutes))

    def rename(self, old: str, new: str) -> None:
        self.store.rename_user(old, new)

    def remove(self, names: list[str]) -> None:
        self.store.remove_users(names)

    def put(self, people: list[tuple[str, str | None]]) -> None:
        self.store.put_users([user(name, uid=uid) for name, uid in people])

    def sync(self, people: list[tuple[str, str | None]], remove_missing: bool) -> None:
        self.store.sync_users(
            [user(name, uid=uid) for name, uid in people], remove_missing=remove_missing
        )

    def check(self) -> None:
        """Compare the record with the model, at every revision."""
        for revision, policies in enumerate(self.model):
            for name, held in policies.items():
                assert self.store.policy_at(name, revision).restrictions == held
            before = set() if revision == 0 else set().union(*self.model[revision - 1].values())
            after = set().union(*policies.values())
            expected = {(each, False) for each in before - after}
            expected |= {(each, True) for each in after - before}
            assert set(self.store.restrictions_changed(revision).items) == expected
        found: Verification = self.store.verify()
        assert (found.damage, found.uncovered) == ((), 0)


def run_history(url: str, steps: list[tuple[Any, ...]]) -> None:
    history = History(url)
    with history.store:
        for step in steps:
            history.do(step)
        history.check()


# The long run has 10,000 histories in all.


@settings(max_examples=rounds(150, 8_000))
@given(steps=st.lists(_steps, max_size=12))
def test_the_record_agrees_with_a_model_in_memory(steps: list[tuple[Any, ...]]) -> None:
    run_history("memory://", steps)


@settings(max_examples=rounds(25, 1_500))
@given(steps=st.lists(_steps, max_size=12))
def test_the_record_agrees_with_a_model_on_sqlite(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_history(f"sqlite:///{folder}/a.db", steps)


@settings(max_examples=rounds(12, 500))
@given(steps=st.lists(_steps, max_size=12))
def test_the_record_agrees_with_a_model_on_postgresql(
    steps: list[tuple[Any, ...]], postgres: Server | Given
) -> None:
    run_history(postgres.url(schema=fresh_schema(), timeout=20, listen="off"), steps)
