"""Every store passes the conformance suite, and all of them answer alike."""

import contextlib
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.errors import IPGuardError
from ipguard.model import (
    EVERYBODY,
    RESET,
    Action,
    Actor,
    Demand,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    User,
    UserFilter,
)
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock, StoreConformance
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema
from tests.test_scale_listing import two_are_many as two_are_many  # noqa: PLC0414 - a fixture


class TestMemory(StoreConformance):
    many = rounds(200, 10_000)

    def open_store(self, clock: FakeClock) -> MemoryStore:
        return MemoryStore(clock=clock)


class TestSQLite(StoreConformance):
    many = rounds(200, 10_000)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.urls: dict[RestrictionStore, str] = {}

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        url = f"sqlite:///{self.folder / secrets.token_hex(4)}.db"
        store = open_store(url, clock=clock)
        self.urls[store] = url
        return store

    def reopen(self, store: RestrictionStore, clock: FakeClock) -> RestrictionStore:
        return open_store(self.urls[store], clock=clock)


class TestPostgres(StoreConformance):
    many = rounds(200, 10_000)

    @pytest.fixture(autouse=True)
    def _server(self, postgres: Server | Given) -> None:
        self.server = postgres
        self.urls: dict[RestrictionStore, str] = {}

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        url = self.server.url(schema=fresh_schema())
        store = open_store(url, clock=clock)
        self.urls[store] = url
        return store

    def reopen(self, store: RestrictionStore, clock: FakeClock) -> RestrictionStore:
        return open_store(self.urls[store], clock=clock)


# ------------------------------------------------------------- the same questions, the same answers

START = datetime(2030, 1, 1, 12, tzinfo=UTC)
NAMES = ("alice", "bob", "a_b", "söhne", "10.0.0.1")
ACCOUNTS = ("A1", "B2", "ä")
RANGES = (
    "10.0.0.1",
    "10.0.0.0/24",
    "10.0.0.0-10.0.1.5",
    "0.0.0.0/0",
    "2001:db8::/32",
    "::-ffff::",
)
SEARCHES = (
    "",
    "a",
    "A_",
    "ali",
    "b",
    "SÖ",
    "%",
    "one",
    "ß",
    "two w",
    "10.0.0.1",
    "10.0.0.77",
    "::1",
)

names = st.sampled_from(NAMES)
users = st.builds(
    User,
    username=names,
    full_name=st.sampled_from(["", "One Two Words", "Straße  Eins"]),
    account_id=st.sampled_from(ACCOUNTS),
    email=st.sampled_from([None, "a@example.com"]),
)
moments = st.integers(-3, 3).map(lambda n: START + timedelta(seconds=n))
later = st.none() | st.integers(0, 5).map(lambda n: START + timedelta(seconds=n))
ranges = st.sampled_from(RANGES).map(AddressRange.parse)
restrictions = st.builds(
    Restriction,
    id=st.sampled_from("abcdefghij"),
    username=names,
    addresses=ranges,
    label=st.sampled_from(["", "office"]),
    created_at=moments,
    created_by=names,
    expires_at=later,
)
contents = st.tuples(st.lists(ranges, max_size=2), st.dictionaries(st.sampled_from("ab"), ranges))
requests = st.builds(
    lambda content, **fields: PendingRequest(
        kind=RequestKind.ADD if not content[1] else RequestKind.REPLACE,
        adds=tuple(content[0]),
        removes=tuple(content[1]),
        removed=tuple(content[1].values()),
        **fields,
    ),
    contents.filter(any),
    id=st.sampled_from("pqrstu"),
    username=names,
    batch=st.none() | st.sampled_from("pq"),
    demand=st.builds(Demand, number=st.booleans(), approvals=st.integers(0, 2)),
    label=st.just(""),
    requested_by=names,
    requested_at=moments,
    expires_at=moments,
    number_expires_at=moments,
    attempts_left=st.integers(0, 5),
    state=st.sampled_from([RequestState.PENDING, *RequestState]),
    restriction_expires_at=later,
)
stored_requests = st.builds(
    StoredRequest,
    request=requests,
    email=st.just("a@example.com"),
    key_id=st.just(b"key id"),
    digest=st.binary(min_size=32, max_size=32),
    resends=st.integers(0, 3),
    mails_failed=st.integers(0, 3),
    sent_at=later,
)
accounts = st.just(Actor.EVERY_ACCOUNT) | st.frozensets(st.sampled_from([*ACCOUNTS, "none"]))
Ask = Callable[[Any], Any]


class Undone(Exception):
    """Rolls a transaction back."""


def _outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except IPGuardError as error:  # of several users that are refused any may be the one named
        return type(error)


def _add(restriction: Restriction) -> Ask:
    return lambda turn: (
        _outcome(lambda: turn.add_restriction(restriction)),
        turn.restriction(restriction.id),
    )


def _save(stored: StoredRequest) -> Ask:
    return lambda turn: (
        turn.request(stored.request.id),
        _outcome(lambda: turn.save_request(stored)),
        turn.request(stored.request.id),
    )


def _about(name: str) -> Ask:
    return lambda turn: (
        turn.user(name),
        turn.restrictions(name),
        turn.pending_requests(name),
        turn.batch("p"),
        turn.request_times(name, START - timedelta(seconds=1)),
        turn.failures(name),
    )


def _append(username: str | None, account: str | None, touches: Any) -> Ask:
    return lambda turn: turn.append(
        Action.IMPOSE,
        actor="boss",
        username=username,
        account_id=account,
        touches=touches,
    )


steps = st.one_of(
    restrictions.map(_add),
    stored_requests.map(_save),
    names.map(_about),
    st.sampled_from("abcdefghijz").map(lambda i: lambda turn: turn.remove_restriction(i)),
    st.builds(lambda a, n: lambda turn: turn.set_failures(a, n), names, st.integers(0, 3)),
    st.builds(
        lambda n, options: lambda turn: _outcome(lambda: turn.add_staged(per_user=n, **options)),
        st.integers(1, 4),
        st.sampled_from([{}, {"replace": True}, {"skip_existing": True}]),
    ),
    st.builds(
        _append,
        st.none() | names,
        st.none() | st.sampled_from(ACCOUNTS),
        st.frozensets(names) | st.just(EVERYBODY),
    ),
)


def _turn(inside: list[Ask], staged: list[Restriction] | None, *, undo: bool) -> Ask:
    def ask(store: RestrictionStore) -> object:
        answers: list[object] = []
        # Each committed transaction appends an entry, so no two of them share these ids.
        head = store.changes_since(None).head
        rows = staged and [attrs.evolve(r, id=f"{head} {n}") for n, r in enumerate(staged)]
        with contextlib.suppress(Undone), store.transaction(staged=rows) as turn:
            answers.append(turn.now)
            answers += [step(turn) for step in inside]
            if undo:
                raise Undone
            answers.append(turn.append(Action.IMPOSE_MANY, actor=None))
        return answers

    return ask


questions = st.one_of(
    st.lists(users, max_size=4).map(lambda u: lambda store: store.put_users(u)),
    st.lists(names, max_size=3).map(lambda n: lambda store: store.remove_users(n)),
    st.builds(
        _turn,
        st.lists(steps, max_size=6),
        st.none() | st.lists(restrictions, max_size=4),
        undo=st.booleans(),
    ),
    st.builds(
        lambda accounts, search, after, limit, only: (
            lambda store: store.overview(
                accounts, search=search, after=after, limit=limit, only=only
            )
        ),
        accounts,
        st.sampled_from(SEARCHES),
        st.none() | names,
        st.integers(1, 4),
        st.none() | st.sampled_from(get_args(UserFilter)),
    ),
    accounts.map(lambda accounts: lambda store: store.counts(accounts)),
    st.builds(
        lambda accounts, username, before, limit: (
            lambda store: store.history(accounts, username=username, before=before, limit=limit)
        ),
        accounts,
        st.none() | names | st.just("\ud800"),
        st.none() | st.integers(-1, 12),
        st.integers(1, 4),
    ),
)


def _state(store: RestrictionStore, cursors: list[tuple[int, str]]) -> object:
    """Return everything that a store's state shows, except for its random tokens."""
    revision, policies = store.load_all_policies()
    changes = [store.changes_since(cursor) for cursor in cursors]
    head = store.changes_since(None)
    cursors.append((head.head, head.token))
    return (
        revision,
        dict(policies),
        [store.load_policy(name) for name in NAMES],
        [(c.head, c.usernames, c.token == head.token) for c in changes],
        [store.wait(cursor[0], 0.0) for cursor in cursors],
        store.overview(Actor.EVERY_ACCOUNT),
        store.history(Actor.EVERY_ACCOUNT),
        store.open_requests(Actor.EVERY_ACCOUNT, requested_by="alice"),
        store.open_requests(frozenset({"A1", "B2"}), requested_by="bob", limit=2),
    )


def _record(store: RestrictionStore) -> object:
    """Return all that a store's record shows."""
    revisions = range(store.changes_since(None).head + 1)
    return (
        [store.policy_at(name, n) for name in NAMES for n in revisions],
        [_pages_of_changed(store, n) for n in revisions],
        [store.revision_at(START + timedelta(seconds=n)) for n in range(-1, 25, 2)],
        store.last_changes(NAMES),
        _verified(store),
    )


def _pages_of_changed(store: RestrictionStore, revision: int) -> object:
    first = store.restrictions_changed(revision, limit=2)
    return first, store.restrictions_changed(revision, after=first.next, limit=3)


def _verified(store: RestrictionStore) -> object:
    found = store.verify()
    assert found.damage == ()
    return found.first, found.head, found.entries, found.restrictions, found.uncovered


@pytest.mark.slow
@pytest.mark.usefixtures("two_are_many")
@settings(max_examples=rounds(50, 2_000))
@given(
    known=st.lists(users, max_size=6),
    asked=st.lists(st.tuples(questions, st.integers(0, 2)), max_size=12),
)
def test_all_stores_answer_alike(
    known: list[User],
    asked: list[tuple[Ask, int]],
    tmp_path_factory: pytest.TempPathFactory,
    postgres: Server | Given,
) -> None:
    """Each store answers any sequence of writes and reads like the memory store."""
    clock = FakeClock(START)
    folder = tmp_path_factory.mktemp("alike")
    with (
        MemoryStore(clock=clock) as memory,
        open_store(f"sqlite:///{folder}/a.db", clock=clock) as sqlite,
        open_store(postgres.url(schema=fresh_schema(), timeout=20), clock=clock) as server,
    ):
        others = (sqlite, server)
        revision = memory.put_users(known)
        assert [store.put_users(known) for store in others] == [revision] * 2
        cursors: dict[RestrictionStore, list[tuple[int, str]]] = {
            store: [] for store in (memory, *others)
        }
        for question, seconds in asked:
            answer = question(memory)
            state = _state(memory, cursors[memory])
            for store in others:
                assert question(store) == answer
                assert _state(store, cursors[store]) == state
            clock.advance(timedelta(seconds=seconds))
        assert [_record(store) for store in others] == [_record(memory)] * 2


# ------------------------------------------------------------------------------- pruning


def touched(store: RestrictionStore) -> int:
    """Commit a change that touches a policy, and return its revision."""
    with store.transaction() as turn:
        return turn.append(Action.IMPOSE, actor="boss", touches=frozenset({"jo"})).revision


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_pruning_keeps_a_gapless_end(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Entries before the time are deleted, but never the last one, nor one after a kept entry."""
    clock = FakeClock(START)
    url = f"sqlite:///{tmp_path}/a.db"
    if kind == "postgres":
        url = request.getfixturevalue("postgres").url(schema=fresh_schema())
    with open_store(url, clock=clock) as opened:
        store: Any = opened
        old = store.changes_since(None)[:2]
        for seconds in (10, 20, -15, 30):  # the third was written by a clock that was set back
            clock.set(START + timedelta(seconds=seconds))
            touched(store)
        # The empty store's row, and the first.
        assert store.prune(START + timedelta(seconds=20)) == 2
        assert [c.revision for c in store.history(Actor.EVERY_ACCOUNT)] == [5, 4, 3, 2]
        assert store.changes_since(old).usernames is RESET
        assert store.prune(START + timedelta(days=1)) == 3
        assert [c.revision for c in store.history(Actor.EVERY_ACCOUNT)] == [6, 5]
        here = store.changes_since(None)[:2]
        latest = datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))  # beyond the calendar
        assert store.prune(latest) == 0
        assert store.changes_since(here).usernames == frozenset()
        assert touched(store) == 7
        assert store.put_users([User(username="jo", full_name="Jo", account_id="A1")]) == 8
