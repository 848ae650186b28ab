"""What the memory store keeps, and a writer's turn over it."""

from __future__ import annotations

import secrets
from bisect import bisect_right, insort
from collections.abc import Iterable
from datetime import datetime
from typing import Generic, NamedTuple, TypeVar

import attrs

from ipguard import rules
from ipguard.errors import (
    DuplicateRestriction,
    StoreError,
    TooManyRestrictions,
    UnknownUser,
    shortened,
)
from ipguard.model import (
    EVERYBODY,
    Action,
    Change,
    PendingRequest,
    Policy,
    RequestState,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
)
from ipguard.rules import Step
from ipguard.store import NAMED_AT_MOST

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
            raise StoreError(f"there is a restriction {shortened(restriction.id)} already")
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
        detail: str = "",
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
            detail=detail,
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
        counts = f"added={len(added)} updated={len(updated)}"
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
        self._append_users(Action.REMOVE_USERS, removed, removed, f"removed={len(removed)}")

    def _append_users(
        self, action: Action, concerned: list[User], touched: list[User], detail: str
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
