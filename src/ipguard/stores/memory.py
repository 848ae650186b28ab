"""The store in memory: the reference that every other store is tested against.

It favours being plain over being fast. A committed state is never written to: a writer copies each
table before its first change to it, and committing swaps one reference. So a reader takes that
reference and has a snapshot, no lock needed, and an exception undoes everything by never swapping.

It lasts as long as its process. A forked child would have a copy that drifts away from its parent's
unnoticed, and perhaps a lock that nobody will release; so in a child every call is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from unicodedata import normalize

from ipguard import rules
from ipguard._locks import ReentrantLock, acquire
from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import AddressError, InvalidValue, StoreUnavailable
from ipguard.model import (
    EVERYBODY,
    RESET,
    Accounts,
    Actor,
    Change,
    Changes,
    Page,
    Policy,
    RequestState,
    Restriction,
    StoredUser,
    Touched,
    User,
    UserOverview,
    checked_time,
)
from ipguard.store import Closing, Transaction, checked_accounts, log_change
from ipguard.stores._memory import Row, State, Turn, new_token, pending_of
from ipguard.usernames import canonical_usernames

__all__ = ["MemoryStore"]


class MemoryStore(Closing):
    """A store that lives and dies with its process. See `ipguard.store.RestrictionStore`.

    Args:
        clock: Returns the current time as an aware datetime; the host's clock without it.
        timeout: How long a writer waits for its turn, in seconds.
    """

    def __init__(
        self, *, clock: Callable[[], datetime] | None = None, timeout: float = 5.0
    ) -> None:
        self._clock = clock or (lambda: datetime.now(UTC))
        self._timeout = timeout
        self._pid = os.getpid()
        self._closed = False
        self._origin = new_token()  # of revision 0: another store's 0 is not this one's
        self._state = State(token=self._origin)
        # All states share this list, which only grows: a state's own rows are the first `head`.
        self._rows: list[Row] = []
        self._turn = threading.Lock()
        self._writer: int | None = None
        self._lock = ReentrantLock()
        self._touched = threading.Condition(self._lock)

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""
        return checked_time("clock", self._clock())

    def load_policy(self, username: str) -> Policy:
        """Return what decides about a user, and the revision of that very snapshot."""
        return self._snapshot().policy(username)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions."""
        state = self._snapshot()
        return state.head, ((name, state.policy(name)) for name in sorted(state.restrictions))

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return where the store is, and whose policy changed since a revision."""
        state = self._snapshot()
        if cursor is None:
            return Changes(state.head, state.token, frozenset())
        revision, token = cursor
        if not 0 <= revision <= state.head or token != self._token_of(revision):
            return Changes(state.head, state.token, RESET)
        names: set[str] = set()
        for row in self._rows[revision : state.head]:
            if isinstance(row.touches, Touched):
                return Changes(state.head, state.token, EVERYBODY)
            names |= row.touches
        return Changes(state.head, state.token, frozenset(names))

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy, or the store is closed."""
        self._snapshot()
        with self._lock:
            self._touched.wait_for(lambda: self._closed or self._state.touching > revision, timeout)
            return self._state.touching > revision

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        """Take the writer's turn."""
        rows = () if staged is None else tuple(staged)
        with self._take_turn(rows) as turn:
            yield turn

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; what is already so appends nothing."""
        by_name = {user.username: user for user in users}
        with self._take_turn() as turn:
            turn.put_users(by_name)
        return _logged(turn)

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change."""
        names = set(canonical_usernames(usernames))
        with self._take_turn() as turn:
            turn.remove_users(names)
        return _logged(turn)

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username."""
        _check_limit(limit)
        accounts = checked_accounts(accounts)
        state, now, matches = self._snapshot(), self.now(), _Search(search)
        found = sorted(
            name
            for name, stored in state.users.items()
            if (after is None or name > after)
            and _visible(state, stored, accounts)
            and matches(stored.user, state.restrictions.get(name, ()))
        )
        items = tuple(_overview(state, name, now) for name in found[:limit])
        return Page(items=items, next=found[limit - 1] if len(found) > limit else None)

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return changes, the newest first."""
        _check_limit(limit)
        accounts = checked_accounts(accounts)
        head = self._snapshot().head
        found = []
        for revision in range(head if before is None else min(head, before - 1), 0, -1):
            change = self._rows[revision - 1].change
            if change.account_id in accounts and username in (None, change.username):
                found.append(change)
            if len(found) > limit:
                break
        items = tuple(found[:limit])
        return Page(items=items, next=items[-1].revision if len(found) > limit else None)

    def close(self) -> None:
        """Let the waiting go and refuse every later call."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._touched.notify_all()

    def _snapshot(self) -> State:
        # Before any lock: a thread of the parent may have held it, and in a child nobody lets go.
        if os.getpid() != self._pid:
            raise StoreUnavailable("a memory store does not outlive a fork")
        if self._closed:
            raise StoreUnavailable("the store is closed")
        return self._state

    def _token_of(self, revision: int) -> str:
        return self._rows[revision - 1].token if revision else self._origin

    @contextmanager
    def _take_turn(self, staged: tuple[Restriction, ...] = ()) -> Iterator[Turn]:
        self._snapshot()
        if self._writer == threading.get_ident():
            raise RuntimeError("this thread is in a transaction of this store already")
        held: list[bool] = []
        try:
            if not acquire(self._turn, self._timeout, held):
                raise StoreUnavailable(f"no writer's turn within {self._timeout:g} s")
            self._writer = threading.get_ident()
            turn = Turn(self._snapshot(), self.now(), staged)
            try:
                yield turn
                self._commit(turn)
            finally:
                turn.over = True
        finally:
            if True in held:
                self._writer = None
                self._turn.release()

    def _commit(self, turn: Turn) -> None:
        base, new = self._snapshot(), turn.result()
        self._rows[base.head :] = turn.rows
        with self._lock:
            self._state = new
            if new.touching > base.touching:
                self._touched.notify_all()


class _Search:
    """What an overview's search text matches.

    The text is the start of a username, of an account id, or of a full name from any of its words
    on; and where it is an address, whoever has a restriction that holds it.
    """

    def __init__(self, text: str) -> None:
        self._start = _folded(text)
        try:
            self._address: AddressRange | None = parse_address(text.strip(" \t\r\n"))
        except AddressError:
            self._address = None

    def __call__(self, user: User, restrictions: tuple[Restriction, ...]) -> bool:
        return (
            _folded(user.username).startswith(self._start)
            or _folded(user.account_id).startswith(self._start)
            or f" {self._start}" in f" {_folded(user.full_name)}"
            or (
                self._address is not None
                and any(self._address in r.addresses for r in restrictions)
            )
        )


def _folded(text: str) -> str:
    """Return text as it is searched for: two rounds make any username its canonical form."""
    once = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", once).casefold().split())


def _logged(turn: Turn) -> int:
    for row in turn.rows:
        log_change(row.change)
    return turn.head


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise InvalidValue("limit", "must be at least 1")


def _visible(state: State, stored: StoredUser, accounts: Accounts) -> bool:
    if stored.removed:
        return accounts is Actor.EVERY_ACCOUNT and stored.user.username in state.restrictions
    return stored.user.account_id in accounts


def _overview(state: State, username: str, now: datetime) -> UserOverview:
    stored = state.users[username]
    restrictions = state.restrictions.get(username, ())
    return UserOverview(
        user=stored.user,
        restrictions=restrictions,
        pending=tuple(
            request
            for request in pending_of(state.requests, state.pending.get(username, ()))
            if rules.state_at(request, now) is RequestState.PENDING
        ),
        summary=rules.summarise(restrictions, now),
        removed=stored.removed,
    )
