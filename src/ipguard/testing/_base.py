"""What the parts of `StoreConformance` share: the hooks, the values, the threads."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import attrs

from ipguard.addresses import AddressRange
from ipguard.model import (
    Action,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    Touched,
    User,
)
from ipguard.store import RestrictionStore, Transaction
from ipguard.testing.clock import FakeClock

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

PATIENCE = 20.0
"""How long a test waits for what should happen at once, in seconds; then it fails."""

START = datetime(2030, 3, 1, 9, 30, 0, 123_457, tzinfo=UTC)
"""When the clock of a test begins; whoever keeps only milliseconds is found out."""

EXTREMES = (
    (4, 0, 0),
    (4, 0, 2**32 - 1),
    (4, 2**32 - 1, 2**32 - 1),
    (4, 2**31 - 1, 2**31),
    (6, 0, 0),
    (6, 0, 2**128 - 1),
    (6, 1, 1),
    (6, 2**127 - 1, 2**127),
    (6, 2**63 - 1, 2**63),
    (6, 2**64 - 1, 2**64),
    (6, 2**128 - 1, 2**128 - 1),
)
"""Version, first, last: whoever keeps numbers too narrow, signed, or as text shows here."""

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
"""Labels and reasons that come back as they are, or not at all."""


class Interrupted(BaseException):
    """Raised to leave a block as KeyboardInterrupt does: it is no Exception."""


@attrs.define
class Raised(Generic[E]):
    """What `raises` caught, once it has."""

    errors: list[E] = attrs.field(factory=list)

    @property
    def value(self) -> E:
        """The error."""
        return self.errors[0]


@contextmanager
def raises(kind: type[E]) -> Iterator[Raised[E]]:
    """Fail unless the block raises that error; a plain copy of what pytest has, without pytest."""
    raised: Raised[E] = Raised()
    try:
        yield raised
    except kind as error:
        raised.errors.append(error)
    assert raised.errors, f"{kind.__name__} was not raised"


class Call(Generic[T]):
    """A function that runs on a thread of its own from now on."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:
            self._error = error

    def over(self, within: float) -> bool:
        """Tell whether the function has returned or raised, waiting so many seconds at the most."""
        self._thread.join(within)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the function to return, and return or raise what it did."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "what should have returned at once did not"
        if self._error is not None:
            raise self._error
        return self._result[0]


def happens(event: threading.Event) -> None:
    """Wait for an event of another thread."""
    assert event.wait(PATIENCE), "what should have happened at once did not"


def together(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run functions on a thread each, begun at one moment, and return their results in order."""
    todo = list(functions)
    barrier = threading.Barrier(len(todo))

    def begin(function: Callable[[], Any]) -> Any:
        barrier.wait(PATIENCE)
        return function()

    calls = [Call(lambda f=f: begin(f)) for f in todo]  # type: ignore[misc]
    return [call.result() for call in calls]


@contextmanager
def logged() -> Iterator[list[str]]:
    """Give the lines that the block writes to `ipguard.audit`, as they come."""
    lines: list[str] = []
    audit, handler = logging.getLogger("ipguard.audit"), logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = audit.level
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        audit.setLevel(level)
        audit.removeHandler(handler)


def address(number: int, version: int = 4) -> AddressRange:
    """Return one address, another one for each number."""
    first = (0x0A000000 if version == 4 else 0x20010DB8 << 96) + number
    return AddressRange(version=version, first=first, last=first)


def user(name: str, **fields: Any) -> User:
    """Return a user of account A1 whose name says nothing."""
    given = {"full_name": "Some One", "account_id": "A1", "email": "one@example.com"} | fields
    return User(username=name, **given)


class Hooks:
    """What a subclass says of its store, and what the tests make of that.

    Attributes:
        many: How many restrictions the tests that want many use.
        clock: The clock of the test that runs.
    """

    many = 200
    clock: FakeClock

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        """Return a new and empty store, unlike any other.

        Args:
            clock: The clock that the store has to use.
        """
        raise NotImplementedError

    def reopen(self, store: RestrictionStore, clock: FakeClock) -> RestrictionStore | None:
        """Return a second store over the same data, as another process would open it.

        Args:
            store: What `open_store` returned.
            clock: The clock that the second store has to use.

        Returns:
            The store; None where that cannot be, and the tests that need it then pass.
        """
        del store, clock
        return None

    def setup_method(self) -> None:
        """Begin a test; pytest calls it."""
        self.clock = FakeClock(START)
        self._opened: list[RestrictionStore] = []
        self._store: RestrictionStore | None = None
        self._opening = threading.Lock()
        self._numbers = itertools.count(1)

    def teardown_method(self) -> None:
        """End a test; pytest calls it."""
        for store in self._opened:
            store.close()

    @property
    def store(self) -> RestrictionStore:
        """The store of this test, opened at the first use: a subclass's fixtures are ready then."""
        with self._opening:
            if self._store is None:
                self._store = self.another()
            return self._store

    def another(self) -> RestrictionStore:
        """Open one more empty store, and close it when the test is over."""
        store = self.open_store(self.clock)
        self._opened.append(store)
        return store

    def second(self) -> RestrictionStore | None:
        """Open the store of this test once more, and close it when the test is over."""
        store = self.reopen(self.store, self.clock)
        if store is not None:
            self._opened.append(store)
        return store

    def restriction(
        self, username: str = "alice", addresses: AddressRange | str | None = None, **fields: Any
    ) -> Restriction:
        """Return a restriction with an id of its own and, unless given, addresses of its own."""
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
        """Return a request with an id of its own, pending for another day."""
        number = next(self._numbers)
        given: dict[str, Any] = {
            "id": f"q{number:06d}",
            "username": username,
            "kind": RequestKind.ADD,
            "addresses": address(number),
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
        """Put users, and return the revision."""
        return self.store.put_users([user(name, **fields) for name in names])

    def note(
        self,
        turn: Transaction,
        touches: frozenset[str] | Touched = frozenset(),
        **fields: Any,
    ) -> int:
        """Append a row where it does not matter which, and return its revision."""
        given: dict[str, Any] = {"actor": "boss", "touches": touches}
        return turn.append(Action.IMPOSE, **(given | fields)).revision

    def touch(self, *names: str, store: RestrictionStore | None = None, **fields: Any) -> int:
        """Commit a row that touches these users, and return its revision."""
        with (store or self.store).transaction() as turn:
            return self.note(turn, frozenset(names), **fields)

    def add(self, *restrictions: Restriction) -> int:
        """Commit restrictions under one row, and return its revision."""
        with self.store.transaction() as turn:
            for restriction in restrictions:
                turn.add_restriction(restriction)
            return self.note(turn, frozenset(r.username for r in restrictions))

    def save(self, *requests: StoredRequest) -> int:
        """Commit requests under one row, and return its revision."""
        with self.store.transaction() as turn:
            for request in requests:
                turn.save_request(request)
            return self.note(turn)

    def held(self, username: str = "alice") -> tuple[Restriction, ...]:
        """Return a user's restrictions as a guard sees them."""
        return self.store.load_policy(username).restrictions

    def cursor(self) -> tuple[int, str]:
        """Return where the store is."""
        head, token, _ = self.store.changes_since(None)
        return head, token
