"""What the memory store keeps, and a writer's turn over it."""

from __future__ import annotations

import os
import secrets
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Generic, NamedTuple, TypeVar

import attrs

from ipguard import audit, rules
from ipguard._checks import check_time, check_whole
from ipguard._fork import ReentrantLock, acquire
from ipguard.errors import (
    DuplicateRestriction,
    StoreError,
    StoreUnavailable,
    TooManyRestrictions,
    UnknownUser,
    shorten,
)
from ipguard.model import (
    EVERYBODY,
    RESET,
    Accounts,
    Action,
    Change,
    Changes,
    Page,
    PendingRequest,
    Policy,
    RequestState,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserOverview,
)
from ipguard.rules import Step
from ipguard.store import (
    NAMED_AT_MOST,
    NO_DETAIL,
    Closing,
    Snapshot,
    Transaction,
    check_accounts,
    log_change,
)
from ipguard.usernames import canonical_usernames

V = TypeVar("V")


class Row(NamedTuple):
    """One change as the store keeps it."""

    change: Change
    token: str
    touches: frozenset[str] | Touched


@attrs.frozen(kw_only=True)
class State:
    """A committed state. The dictionaries are written to by nobody once they are in here."""

    head: int = 0
    token: str
    touching: int = 0  # the last revision that touched a policy
    users: dict[str, StoredUser] = attrs.field(factory=dict)
    restrictions: dict[str, tuple[Restriction, ...]] = attrs.field(factory=dict)
    owners: dict[str, str] = attrs.field(factory=dict)  # restriction id -> username
    requests: dict[str, StoredRequest] = attrs.field(factory=dict)
    pending: dict[str, frozenset[str]] = attrs.field(factory=dict)  # username -> request ids
    asked: dict[str, tuple[tuple[datetime, str], ...]] = attrs.field(factory=dict)
    failures: dict[str, int] = attrs.field(factory=dict)

    def policy(self, username: str) -> Policy:
        stored = self.users.get(username)
        return Policy(
            revision=self.head,
            restrictions=self.restrictions.get(username, ()),
            known=stored is not None and not stored.removed,
        )


class Table(Generic[V]):
    """A table as a turn sees it: the committed one until the first write to it, then a copy."""

    def __init__(self, committed: dict[str, V]) -> None:
        self.rows = committed
        self._copied = False

    def __setitem__(self, key: str, value: V) -> None:
        self._own()[key] = value

    def drop(self, key: str) -> None:
        del self._own()[key]

    def _own(self) -> dict[str, V]:
        if not self._copied:
            self.rows, self._copied = dict(self.rows), True
        return self.rows


def _restriction_order(restriction: Restriction) -> tuple[datetime, str]:
    return restriction.created_at, restriction.id


def _error_order(error: DuplicateRestriction | TooManyRestrictions) -> int:
    if isinstance(error, TooManyRestrictions):
        return 2
    return int(error.found != "row")


def pending_of(
    requests: dict[str, StoredRequest], ids: Iterable[str]
) -> tuple[PendingRequest, ...]:
    found = (requests[request_id].request for request_id in ids)
    return tuple(sorted(found, key=lambda request: (request.requested_at, request.id)))


class Turn:
    """A writer's turn; see `ipguard.store.Transaction` for what each method promises."""

    def __init__(self, base: State, now: datetime, staged: tuple[Restriction, ...]) -> None:
        self.now = now
        self._base = base
        self._staged = staged
        self._replaced: set[str] = set()
        self._users = Table(base.users)
        self._restrictions = Table(base.restrictions)
        self._owners = Table(base.owners)
        self._requests = Table(base.requests)
        self._pending = Table(base.pending)
        self._asked = Table(base.asked)
        self._failures = Table(base.failures)
        self.rows: list[Row] = []
        self.over = False

    @property
    def head(self) -> int:
        """The revision that this turn has come to."""
        return self._base.head + len(self.rows)

    def result(self) -> State:
        """Return the state that committing this turn leads to."""
        touching = [row.change.revision for row in self.rows if row.touches]
        return State(
            head=self.head,
            token=self.rows[-1].token if self.rows else self._base.token,
            touching=touching[-1] if touching else self._base.touching,
            users=self._users.rows,
            restrictions=self._restrictions.rows,
            owners=self._owners.rows,
            requests=self._requests.rows,
            pending=self._pending.rows,
            asked=self._asked.rows,
            failures=self._failures.rows,
        )

    def _check(self) -> None:
        # The tables may be a committed state's by now, which nobody writes to.
        if self.over:
            raise RuntimeError("this transaction is over")

    def user(self, username: str) -> StoredUser | None:
        return self._users.rows.get(username)

    def restriction(self, restriction_id: str) -> Restriction | None:
        owner = self._owners.rows.get(restriction_id)
        held = () if owner is None else self._restrictions.rows[owner]
        return next((r for r in held if r.id == restriction_id), None)

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        return self._restrictions.rows.get(username, ())

    def request(self, request_id: str) -> StoredRequest | None:
        return self._requests.rows.get(request_id)

    def pending_requests(self, username: str) -> tuple[PendingRequest, ...]:
        return pending_of(self._requests.rows, self._pending.rows.get(username, ()))

    def request_times(self, requested_by: str, since: datetime) -> tuple[datetime, ...]:
        asked = self._asked.rows.get(requested_by, ())
        first = bisect_right(asked, since, key=lambda entry: entry[0])
        return tuple(at for at, _ in asked[first:])

    def failures(self, actor: str) -> int:
        return self._failures.rows.get(actor, 0)

    def save_request(self, stored: StoredRequest) -> None:
        self._check()
        new, old = stored.request, self._requests.rows.get(stored.request.id)
        if old is not None:
            waiting = self._pending.rows.get(old.request.username, frozenset())
            self._pending[old.request.username] = waiting - {new.id}
            entry = (old.request.requested_at, new.id)
            asked = self._asked.rows[old.request.requested_by]
            self._asked[old.request.requested_by] = tuple(e for e in asked if e != entry)
        self._requests[new.id] = stored
        if new.state is RequestState.PENDING:
            waiting = self._pending.rows.get(new.username, frozenset())
            self._pending[new.username] = waiting | {new.id}
        by_actor = list(self._asked.rows.get(new.requested_by, ()))
        insort(by_actor, (new.requested_at, new.id))
        self._asked[new.requested_by] = tuple(by_actor)

    def set_failures(self, actor: str, count: int) -> None:
        self._check()
        self._failures[actor] = count

    def add_restriction(self, restriction: Restriction) -> None:
        self._check()
        if restriction.id in self._owners.rows:
            raise StoreError(f"there is a restriction {shorten(restriction.id)} already")
        held = list(self.restrictions(restriction.username))
        insort(held, restriction, key=_restriction_order)
        self._restrictions[restriction.username] = tuple(held)
        self._owners[restriction.id] = restriction.username

    def remove_restriction(self, restriction_id: str) -> None:
        self._check()
        owner = self._owners.rows.get(restriction_id)
        if owner is None:
            return
        self._owners.drop(restriction_id)
        left = tuple(r for r in self._restrictions.rows[owner] if r.id != restriction_id)
        if left:
            self._restrictions[owner] = left
        else:
            self._restrictions.drop(owner)

    def add_staged(self, *, per_user: int) -> int:
        self._check()
        by_user: dict[str, list[Restriction]] = {}
        for restriction in self._staged:
            by_user.setdefault(restriction.username, []).append(restriction)
        # Everything is tested before anything is written, each error for all users before the next:
        # a caller may catch the error and go on with its turn.
        for username in by_user:
            stored = self.user(username)
            if stored is None or stored.removed:
                raise UnknownUser(username)
        replaced, errors = [], []
        for username, new in by_user.items():
            olds, refused = rules.judge_additions(
                username, self.restrictions(username), new, per_user=per_user, now=self.now
            )
            replaced += olds
            errors += [error for _, error in refused]
        if errors:
            raise min(errors, key=_error_order)
        for old in replaced:
            self.remove_restriction(old.id)
            self._replaced.add(old.id)
        for username, new in by_user.items():
            both = [*self.restrictions(username), *new]
            self._restrictions[username] = tuple(sorted(both, key=_restriction_order))
            for restriction in new:
                self._owners[restriction.id] = username
        return len(self._staged)

    def orphaned_deletions(self) -> tuple[PendingRequest, ...]:
        usernames = sorted({restriction.username for restriction in self._staged})
        return tuple(
            request
            for username in usernames
            for request in self.pending_requests(username)
            if request.restriction_id in self._replaced
        )

    def append(
        self,
        action: Action,
        *,
        actor: str | None,
        actor_address: str | None = None,
        username: str | None = None,
        account_id: str | None = None,
        detail: Mapping[str, str] = NO_DETAIL,
        touches: frozenset[str] | Touched = frozenset(),
    ) -> Change:
        self._check()
        change = Change(
            revision=self.head + 1,
            at=self.now,
            actor=actor,
            actor_address=actor_address,
            action=action,
            username=username,
            detail=dict(detail),
            account_id=account_id,
        )
        self.rows.append(Row(change, new_token(), touches))
        return change

    def put_users(self, users: dict[str, User]) -> None:
        """Add or update users, and append the one row that says so."""
        added, updated = [], []
        for username, user in users.items():
            stored = self.user(username)
            if stored is None or stored.removed:
                added.append(user)
            elif stored.user != user:
                updated.append(user)
        for user in (*added, *updated):
            self._users[user.username] = StoredUser(user=user)
        # A login asks only whether a user is known: a new name or account decides nothing.
        counts = audit.detail(added=len(added), updated=len(updated))
        self._append_users(Action.PUT_USERS, [*added, *updated], added, counts)

    def remove_users(self, usernames: set[str]) -> None:
        """Remove the registered users among `usernames`, and append the one row that says so."""
        removed = []
        for username in sorted(usernames):
            stored = self.user(username)
            if stored is None or stored.removed:
                continue
            removed.append(stored.user)
            self._users[username] = StoredUser(user=stored.user, removed=True)
            for request in self.pending_requests(username):
                closed = attrs.evolve(request, state=rules.after(request.state, Step.CANCEL))
                kept = self._requests.rows[request.id]
                self.save_request(attrs.evolve(kept, request=closed))
        self._append_users(
            Action.REMOVE_USERS, removed, removed, audit.detail(removed=len(removed))
        )

    def _append_users(
        self, action: Action, concerned: list[User], touched: list[User], detail: Mapping[str, str]
    ) -> None:
        if not concerned:
            return
        one = concerned[0] if len(concerned) == 1 else None
        names = frozenset(user.username for user in touched)
        self.append(
            action,
            actor=None,
            username=one.username if one else None,
            account_id=one.account_id if one else None,
            detail=detail,
            touches=names if len(names) <= NAMED_AT_MOST else EVERYBODY,
        )


def new_token() -> str:
    return secrets.token_hex(8)


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
        return check_time("clock", self._clock())

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
    def snapshot(self) -> Iterator[Snapshot]:
        """Open a snapshot for look-ups."""
        turn = Turn(self._snapshot(), self.now(), ())
        turn.over = True  # it refuses to write
        yield turn

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
        check_whole("limit", limit, 1)
        accounts = check_accounts(accounts)
        state, now, wanted = self._snapshot(), self.now(), rules.Search.of(search)
        found = sorted(
            name
            for name, stored in state.users.items()
            if (after is None or name > after)
            and rules.is_visible(
                accounts,
                stored.user.account_id,
                removed=stored.removed,
                restricted=name in state.restrictions,
            )
            and wanted.matches(stored.user, state.restrictions.get(name, ()))
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
        check_whole("limit", limit, 1)
        accounts = check_accounts(accounts)
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


def _logged(turn: Turn) -> int:
    for row in turn.rows:
        log_change(row.change)
    return turn.head


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
