"""The base of the conformance tests: hooks for subclasses, sample values and threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, TypeVar
from unittest import TestCase

from ipguard.addresses import AddressRange
from ipguard.model import (
    EVERYBODY,
    Action,
    Actor,
    BulkCounts,
    Change,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    Touched,
    User,
)
from ipguard.store import RestrictionStore, Transaction
from ipguard.testing._doubles import FakeClock

T = TypeVar("T")

EVERY: Any = Actor.EVERY_ACCOUNT
A1 = frozenset({"A1"})

PATIENCE = 20.0
"""Seconds that a test waits for another thread before it fails."""

START = datetime(2030, 3, 1, 9, 30, 0, 123_457, tzinfo=UTC)
"""The time at the start of a test; its microseconds expose stores that keep milliseconds."""

EXTREMES = tuple(
    AddressRange(version=version, first=first, last=last)
    for version, end, more in (
        (4, 2**32 - 1, ()),
        (6, 2**128 - 1, ((1, 1), (2**63 - 1, 2**63), (2**64 - 1, 2**64))),
    )
    for first, last in ((0, 0), (0, end), (end, end), (end // 2, end // 2 + 1), *more)
)
"""Address ranges that expose columns that are too narrow, signed or text."""

TEXTS = (
    "",
    "office",
    'it\'s "quoted" \\ % _ ; -- $1 :name {} <b>&amp;',
    "  blanks  at  the  ends  ",
    "Zürich Ω漢字 مكتب",
    "e\u0301 decomposed, \u00e9 composed",
    "\U0001f3e2" * 100,
    "x" * 100,
    "null",
)
"""Labels that a store must return unchanged."""


class Interrupted(BaseException):
    """Leave a block as KeyboardInterrupt does, which is not an Exception."""


# This package must not need pytest.
raises: Final = TestCase().assertRaises
logs: Final = TestCase().assertLogs


class Call(Generic[T]):
    """A function call on a thread of its own, started at once."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=[function], daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._future.set_result(function())
        except BaseException as error:
            self._future.set_exception(error)

    def over(self, within: float) -> bool:
        """Return whether the call ends within so many seconds."""
        self._thread.join(within)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the call to end; return its result or raise its error."""
        assert self.over(PATIENCE), "the call still waits"
        return self._future.result()


def happens(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "the event was not set"


def together(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call each function on a thread, all at the same moment; return the results in order."""
    todo = list(functions)
    barrier = threading.Barrier(len(todo))

    def begin(function: Callable[[], Any]) -> Any:
        barrier.wait(PATIENCE)
        return function()

    calls = [Call(lambda f=f: begin(f)) for f in todo]  # type: ignore[misc]
    return [call.result() for call in calls]


def address(number: int) -> AddressRange:
    """Return a single address, a different one for each number."""
    return AddressRange(version=4, first=0x0A000000 + number, last=0x0A000000 + number)


def user(name: str, **fields: Any) -> User:
    """Return a user of account A1."""
    given = {"full_name": "Some One", "account_id": "A1", "email": "one@example.com"}
    return User(username=name, **(given | fields))


def look_ups(tx: Any) -> list[object]:
    """Return all that a transaction or a snapshot shows of alice and of the actor boss."""
    before = tx.now - timedelta(days=1)
    return [
        (tx.now, tx.user("alice"), tx.failures("boss"), tx.request_times("boss", before)),
        [tx.restriction(restriction.id) for restriction in tx.restrictions("alice")],
        [tx.request(request.id) for request in tx.pending_requests("alice")],
    ]


def everything(store: Any) -> list[object]:
    """Return all that a store's reads show, the search for an address included."""
    revision, policies = store.load_all_policies()
    found = [
        store.changes_since(None),
        revision,
        dict(policies),
        store.load_policy("alice"),
        store.overview(EVERY, limit=1000),
        store.overview(EVERY, search="203.0.113.8"),
        store.history(EVERY, limit=1000),
        store.open_requests(EVERY, requested_by="boss"),
    ]
    if hasattr(store, "snapshot"):  # stores need not have it
        with store.snapshot() as snapshot:
            found += look_ups(snapshot)
    return found


class StoreCase:
    """The hooks that a subclass overrides, and what the tests share."""

    many = 200
    clock: FakeClock

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        """Open a new, empty store with data of its own.

        Args:
            clock: The clock that the store must use.
        """
        raise NotImplementedError

    def reopen(self, store: RestrictionStore, clock: FakeClock) -> RestrictionStore | None:
        """Open a second store on the same data, as another process would.

        Args:
            store: A store that `open_store` returned.
            clock: The clock that the second store must use.

        Returns:
            The store, or None if that is impossible; tests that need it then pass.
        """
        del store, clock
        return None

    def setup_method(self) -> None:
        self.clock = FakeClock(START)
        self._opened: list[RestrictionStore] = []
        self._store: RestrictionStore | None = None
        self._opening = threading.Lock()
        self._numbers = itertools.count(1)

    def teardown_method(self) -> None:
        for store in self._opened:
            store.close()

    @property
    def store(self) -> RestrictionStore:
        """The store of the current test, opened on first use, after the subclass's fixtures."""
        with self._opening:
            if self._store is None:
                self._store = self.another()
            return self._store

    def another(self) -> RestrictionStore:
        store = self.open_store(self.clock)
        self._opened.append(store)
        return store

    def second(self) -> RestrictionStore | None:
        store = self.reopen(self.store, self.clock)
        if store is not None:
            self._opened.append(store)
        return store

    def restriction(
        self, username: str = "alice", addresses: AddressRange | str | None = None, **fields: Any
    ) -> Restriction:
        """Return a restriction with a new id and, unless given, addresses that are not in use."""
        number = next(self._numbers)
        if isinstance(addresses, str):
            addresses = AddressRange.parse(addresses)
        given: dict[str, Any] = {
            "id": f"r{number:06d}",
            "username": username,
            "addresses": addresses or address(number),
            "label": "",
            "created_at": self.clock(),
            "created_by": "boss",
        }
        return Restriction(**(given | fields))

    def request(self, username: str = "alice", **fields: Any) -> StoredRequest:
        """Return a pending request with a new id that expires in a day."""
        number = next(self._numbers)
        given: dict[str, Any] = {
            "id": f"q{number:06d}",
            "username": username,
            "kind": RequestKind.ADD,
            "adds": (address(number),),
            "label": "",
            "requested_by": "boss",
            "requested_at": self.clock(),
            "expires_at": self.clock() + timedelta(days=1),
            "number_expires_at": self.clock() + timedelta(minutes=10),
            "attempts_left": 5,
            "state": RequestState.PENDING,
        }
        return StoredRequest(
            request=PendingRequest(**(given | fields)),
            email="boss@example.com",
            key_id=b"key id 1",
            digest=bytes(range(32)),
        )

    def put(self, *names: str, **fields: Any) -> int:
        """Put users; return the revision."""
        return self.store.put_users([user(name, **fields) for name in names])

    def append(
        self, tx: Transaction, touches: frozenset[str] | Touched = frozenset(), **fields: Any
    ) -> int:
        """Append an entry to the audit log; return its revision."""
        given: dict[str, Any] = {"actor": "boss", "touches": touches}
        return tx.append(Action.IMPOSE, **(given | fields)).revision

    def touch(self, *names: str, store: RestrictionStore | None = None, **fields: Any) -> int:
        """Commit an audit entry that touches these users; return its revision."""
        with (store or self.store).transaction() as tx:
            return self.append(tx, frozenset(names), **fields)

    def add(self, *restrictions: Restriction) -> int:
        """Commit restrictions with one audit entry; return its revision."""
        with self.store.transaction() as tx:
            for restriction in restrictions:
                tx.add_restriction(restriction)
            return self.append(tx, frozenset(r.username for r in restrictions))

    def save(self, *requests: StoredRequest) -> int:
        """Commit requests with one audit entry; return its revision."""
        with self.store.transaction() as tx:
            for request in requests:
                tx.save_request(request)
            return self.append(tx)

    def add_staged(self, staged: Iterable[Restriction], per_user: int = 1000) -> int:
        """Add staged restrictions and commit; return how many."""
        return self.stage(staged, per_user=per_user).added

    def stage(
        self, staged: Iterable[Restriction], per_user: int = 1000, **options: bool
    ) -> BulkCounts:
        """Call `add_staged` and commit; return its answer."""
        with self.store.transaction(staged=staged) as tx:
            counts = tx.add_staged(per_user=per_user, **options)
            self.append(tx, EVERYBODY)
        return counts

    def held(self, username: str = "alice") -> tuple[Restriction, ...]:
        return self.store.load_policy(username).restrictions

    def cursor(self) -> tuple[int, str]:
        head, token, _ = self.store.changes_since(None)
        return head, token

    def last_change(self) -> Change:
        return self.store.history(EVERY, limit=1).items[0]
