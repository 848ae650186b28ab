"""The contract of a restriction store, for those who write one.

A store keeps users, restrictions, requests and changes. It owns no rule about who may do what: the
workflow asks `ipguard.rules`, a store reads and writes. It owns the order of things:

* **One writer at a time.** `transaction()` takes the writer's lock, across every process that
  uses the store, before it reads anything.
* **One total order.** Each change takes the next revision, 1, 2, 3, … without gaps, in commit
  order, and carries a random token: a store restored from a backup counts on from an old revision,
  and the token is how a guard finds out that revision 7 is no longer the revision 7 that it knew.
* **Snapshots.** Each read below is of one committed state of the store, and never waits for a
  writer.

`ipguard.testing.StoreConformance` is the full test of an implementation: subclass it, say how to
open an empty store, and run it with pytest.

Errors. A store that does not answer in bounded time, or cannot, raises `StoreUnavailable`; so does
a commit whose outcome is not known. No exception of a driver leaves a store. Stores are
thread-safe, context managers, and usable in a child after `fork()` (or raise `StoreUnavailable`
there).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from ipguard.model import (
    Accounts,
    Action,
    Change,
    Changes,
    Page,
    PendingRequest,
    Policy,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserOverview,
)
from ipguard.store._shared import Closing, checked_accounts, log_change, particulars

__all__ = [  # noqa: RUF022 - the order of the reference
    "RestrictionStore",
    "Transaction",
    "NAMED_AT_MOST",
    "Closing",
    "checked_accounts",
    "log_change",
    "particulars",
]

NAMED_AT_MOST = 100
"""A change that touches more users than this says `EVERYBODY` instead of naming them."""


class Transaction(Protocol):
    """A writer's turn. It sees its own writes; nobody else does before it has committed.

    Usernames are canonical. What is written here is undone as a whole when the block raises.
    """

    @property
    def now(self) -> datetime:
        """The store's time when the writer's lock was taken; the same all through the turn."""

    def user(self, username: str) -> StoredUser | None:
        """Return a user, removed ones included, or None."""

    def restriction(self, restriction_id: str) -> Restriction | None:
        """Return a restriction, or None."""

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        """Return a user's restrictions, expired ones included, by `created_at`, then `id`."""

    def request(self, request_id: str) -> StoredRequest | None:
        """Return a request in whatever state, or None."""

    def pending_requests(self, username: str) -> tuple[PendingRequest, ...]:
        """Return a user's requests whose state is `pending`, by `requested_at`, then `id`.

        Those whose time has passed are among them: expiry is judged by `rules.state_at`.
        """

    def request_times(self, requested_by: str, since: datetime) -> tuple[datetime, ...]:
        """Return when an actor made requests after `since`, oldest first, in whatever state."""

    def failures(self, actor: str) -> int:
        """Return how many wrong numbers in a row this actor has given."""

    def save_request(self, stored: StoredRequest) -> None:
        """Add a request, or replace the one with its id."""

    def set_failures(self, actor: str, count: int) -> None:
        """Set how many wrong numbers in a row this actor has given."""

    def add_restriction(self, restriction: Restriction) -> None:
        """Add a restriction.

        Raises:
            StoreError: Its id is not new.
        """

    def remove_restriction(self, restriction_id: str) -> None:
        """Remove a restriction; one that is not there is no error."""

    def add_staged(self, *, per_user: int) -> int:
        """Add the restrictions that `transaction(staged=...)` was given, all or none.

        An expired restriction to the same addresses is replaced. Of the errors below, the first
        that holds for any of them is raised, and then nothing is added.

        Args:
            per_user: How many restrictions a user may have, expired ones included.

        Returns:
            How many were added.

        Raises:
            UnknownUser: One is for a user that is not registered, or is removed.
            DuplicateRestriction: A user would have the same addresses twice; among those staged,
                expired ones are no exception.
            TooManyRestrictions: A user would have more than `per_user`.
        """

    def orphaned_deletions(self) -> tuple[PendingRequest, ...]:
        """Return the pending requests to delete a restriction that `add_staged` replaced.

        Those whose time has passed are among them.
        """

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
        """Append to the trail, under the next revision and a new random token, at `now`.

        A transaction that writes anything appends at least once.

        Args:
            action: What was done.
            actor: Who did it, or None for the host.
            actor_address: Where the actor came from.
            username: Whom it concerns, or None.
            account_id: That user's account now: who manages it may see the row later.
            detail: The particulars.
            touches: The users whose policy may differ from now on: at most `NAMED_AT_MOST` names,
                or `EVERYBODY`, or nobody. Only rows that touch somebody wake guards.
        """


class RestrictionStore(Protocol):
    """Where users, restrictions, requests and changes are kept. What holds for all: the module."""

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC, without I/O."""

    def load_policy(self, username: str) -> Policy:
        """Return what decides about a user, and the revision of that very snapshot.

        Args:
            username: Canonical. A user that was never registered has no restrictions and is not
                known.
        """

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions, from one snapshot.

        The users come in the order of their names, by code point. The iterator reads as it goes, so
        that a million users need not fit in memory twice. It is exhausted or closed by the caller,
        on the thread that called.

        It may have a method `packed()`, which gives each user with what `ipguard.packed.pack` makes
        of its policy instead: a guard that preloads asks for that where it is there.
        """

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return where the store is, and whose policy changed since a revision.

        Args:
            cursor: The revision and token that the caller last saw, or None to begin: then no user
                is named, only where the store is.

        Returns:
            The head, its token, and who was touched by the changes after the cursor. `RESET` where
            the cursor's own row is not there, was pruned, or has another token.
        """

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy.

        It is a hint: it may return early or late. It returns at once where that change is there.

        Args:
            revision: What the caller has seen.
            timeout: How long to wait at the most, in seconds.

        Returns:
            Whether there is such a change, as far as the store can tell.
        """

    def transaction(
        self, *, staged: Iterable[Restriction] | None = None
    ) -> AbstractContextManager[Transaction]:
        """Take the writer's turn.

        Leaving the block commits durably, and then wakes guards if a policy was touched. An
        exception inside undoes everything. Turns do not nest: `put_users` and `remove_users` take
        one too.

        Args:
            staged: Restrictions for `Transaction.add_staged`, any number. They are read to the end
                before the writer's lock is taken, so that a slow source holds nobody up.

        Raises:
            StoreUnavailable: The lock could not be had in time, or the outcome of the commit is
                lost.
            RuntimeError: This thread is inside a turn of this store already: it would wait for
                itself.
        """

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; what is already so appends nothing.

        Any iterable will do: it is read to the end before the writer's lock is taken. The last of
        several with one username counts. A removed user put again is registered again, and inherits
        the restrictions that went on holding.

        The change is a `PUT_USERS` by no actor, its detail `added=3 updated=1`, where registered
        again counts as added. It touches the users added; a new name, account or e-mail decides
        about no login. It names its user and the account where it is of exactly one user.

        Returns:
            The store's revision afterwards.
        """

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change: pending requests are cancelled, restrictions go on holding.

        Requests whose time has passed are among the pending ones here too. The change is a
        `REMOVE_USERS` by no actor, its detail `removed=2`, and it touches the users removed. It
        names its user and the account where it is of exactly one user.

        Args:
            usernames: In any spelling; those not registered are passed over.

        Returns:
            The store's revision afterwards.

        Raises:
            UsernameError: One has no canonical form; nothing is changed.
            TypeError: It is one text, whose characters would be taken for usernames.
        """

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username.

        The order is that of code points, whatever the language of the machine.

        Args:
            accounts: Whose users: a set of account ids, or `Actor.EVERY_ACCOUNT`. Only the latter
                includes removed users, those among them that have restrictions.
            search: The start of a username, an account id or any word of the full name, whatever
                the case (it may go on into the words that follow); or an address: users with a
                restriction that holds it, expired or not. Empty: everyone.
            after: The `next` of the page before.
            limit: How many users at the most, at least 1.

        Raises:
            InvalidValue: `limit` is below 1.
            TypeError: `accounts` is a str.
        """

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return changes, the newest first.

        Args:
            accounts: Rows of these account ids; rows without an account only for
                `Actor.EVERY_ACCOUNT`.
            username: Canonical; only rows that concern this user.
            before: The `next` of the page before: only revisions below it.
            limit: How many rows at the most, at least 1.

        Raises:
            InvalidValue: `limit` is below 1.
            TypeError: `accounts` is a str.
        """

    def close(self) -> None:
        """Give up every resource; closing twice is no error.

        Calls after it raise `StoreUnavailable`, `now()` excepted; who is in `wait` returns soon.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
