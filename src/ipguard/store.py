"""The contract of a restriction store, for authors of stores.

A store keeps users, restrictions, requests and changes. It owns no rule about who may do what: the
workflow asks `ipguard.rules`, a store reads and writes. A store guarantees:

* **One writer at a time.** `transaction()` acquires the writer's lock, across all processes that
  use the store, before it reads anything.
* **One total order.** Each change takes the next revision, 1, 2, 3, … without gaps, in commit
  order, and carries a token that no other history has. A store restored from a backup continues
  from an old revision; the token shows a guard that revision 7 has changed since it was read.
* **Snapshots.** Each read is of one committed state, and never waits for a writer.

`ipguard.testing.StoreConformance` tests an implementation completely: subclass it, open an empty
store in its fixture, and run it with pytest.

Errors. A store that cannot answer in bounded time raises `StoreUnavailable`, as does a commit whose
outcome is unknown. No exception of a driver leaves a store. Stores are thread-safe, context
managers, and usable in a child after `fork()` (or raise `StoreUnavailable` there).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol, Self, cast

import attrs

from ipguard import audit, errors
from ipguard.audit import log_change
from ipguard.model import (
    EVERYBODY,
    Accounts,
    Action,
    Actor,
    BulkCounts,
    Change,
    Changes,
    Page,
    PendingRequest,
    Policy,
    Restriction,
    Sighting,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserCounts,
    UserFilter,
    UserOverview,
    UserSync,
    Verification,
    check_accounts,
)
from ipguard.row import pack
from ipguard.rules import Step, UserPlan, UserRecord, after
from ipguard.usernames import canonical_username

__all__ = [
    "NAMED_AT_MOST",
    "RestrictionStore",
    "RowStore",
    "Snapshot",
    "Transaction",
    "Unread",
    "UserTransaction",
    "append_forgotten",
    "carry_out",
    "check_accounts",
    "log_change",
    "read_records",
    "refuse_all",
]

NAMED_AT_MOST = 100
"""A change that touches more users than this says `EVERYBODY` instead of naming them."""

UNAPPENDED: Final = "a transaction that changes restrictions appends an audit entry afterwards"
"""The message of the StoreError for one that does not."""

NO_DETAIL: Final[Mapping[str, str]] = MappingProxyType({})


class Snapshot(Protocol):
    """One committed state of the store, for look-ups. Usernames are canonical."""

    @property
    def now(self) -> datetime:
        """The store's time when the snapshot or transaction began; it stays the same."""

    def user(self, username: str) -> StoredUser | None:
        """Return a user, removed ones included, or None."""

    def restriction(self, restriction_id: str) -> Restriction | None:
        """Return a restriction, or None."""

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        """Return a user's restrictions, expired ones included, by `created_at`, then `id`."""

    def request(self, request_id: str) -> StoredRequest | None:
        """Return a request in any state, or None."""

    def pending_requests(self, username: str) -> tuple[PendingRequest, ...]:
        """Return a user's requests whose state is `pending`, by `requested_at`, then `id`.

        Requests past their time are included: `rules.state_at` judges expiry.
        """

    def batch(self, batch_id: str) -> tuple[StoredRequest, ...]:
        """Return the requests of a batch in any state, by `requested_at`, then `id`."""

    def request_times(self, requested_by: str, since: datetime) -> tuple[datetime, ...]:
        """Return the times of an actor's requests after `since`, oldest first, in any state.

        A batch counts once, by its first request.
        """

    def failures(self, actor: str) -> int:
        """Return how many wrong numbers in a row this actor has given."""


class Transaction(Snapshot, Protocol):
    """A write transaction. It sees its own writes; others see them once it has committed.

    If the block raises, all of its writes are undone.
    """

    def save_request(self, stored: StoredRequest) -> None:
        """Add a request, or replace the one with its id."""

    def set_failures(self, actor: str, count: int) -> None:
        """Set how many wrong numbers in a row this actor has given."""

    def add_restriction(self, restriction: Restriction) -> None:
        """Add a restriction.

        Raises:
            StoreError: Its id is already in use.
        """

    def remove_restriction(self, restriction_id: str) -> None:
        """Remove a restriction; do nothing if it does not exist."""

    def add_staged(
        self, *, per_user: int, replace: bool = False, skip_existing: bool = False
    ) -> BulkCounts:
        """Add the restrictions that were passed to `transaction(staged=...)`, all or none.

        `rules.judge_additions` decides for each user. Pending requests that would do nothing but
        end a restriction that ends are cancelled. The errors are checked in the order below, each
        for all users before the next, and nothing is changed if one is raised.

        Args:
            per_user: How many restrictions a user may have, expired ones included.
            replace: Whether the restrictions are the whole list of each of their users.
            skip_existing: Whether to leave out addresses that the user has already.

        Returns:
            How many were added, left out, and ended.

        Raises:
            InvalidValue: `replace` and `skip_existing` are both true.
            UnknownUser: A user is not registered, or is removed.
            DuplicateRestriction: A user would have the same addresses twice; among the staged
                restrictions, expired ones count too.
            TooManyRestrictions: A user would have more than `per_user`.
        """

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
        """Append an entry to the audit log, with the next revision and a new token, at `now`.

        A transaction that writes anything appends at least once. The restrictions that were added
        and removed since the previous entry begin and end at this one's revision. If there is no
        entry after them, the commit raises StoreError.

        Args:
            action: The action.
            actor: The username of the actor, or None for the host.
            actor_address: The actor's address.
            username: The user concerned, or None.
            account_id: The present account of that user; its managers may see the entry later.
            detail: The particulars, text by name; `ipguard.audit` converts them to one text.
            touches: The users whose policy may have changed: at most `NAMED_AT_MOST` names, or
                `EVERYBODY`, or an empty set. Only entries that touch a policy wake guards.
        """


class RestrictionStore(AbstractContextManager["RestrictionStore", None], Protocol):
    """A store of users, restrictions, requests and changes; see the module for its guarantees."""

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC, without I/O."""

    def load_policy(self, username: str) -> Policy:
        """Load the policy of a user, with the revision of the snapshot that it was read from.

        Args:
            username: Canonical. A user who was never registered has no restrictions and is not
                known.
        """

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions, from one snapshot.

        The users are sorted by name, by code point. The iterator reads as it goes, so that a
        million users need not fit in memory twice. The caller exhausts or closes it, on the
        calling thread.
        """

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return the store's revision, and the users whose policy changed since a revision.

        Args:
            cursor: The revision and token that the caller last saw; None returns the revision
                alone, with no users.

        Returns:
            The head, its token, and the users touched by the changes after the cursor. `RESET` if
            the cursor's own entry is missing, was pruned, or has another token.
        """

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy.

        The result is a hint: the call may return early or late. If such a change exists already,
        it returns at once.

        Args:
            revision: The revision that the caller has seen.
            timeout: The longest wait, in seconds.

        Returns:
            Whether there is such a change, as far as the store knows.
        """

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Open a snapshot for look-ups, which takes no writer's lock and waits for no writer.

        It is optional: without this method, the workflow looks things up in transactions.

        Raises:
            StoreUnavailable: The store does not answer in time.
        """

    def transaction(
        self, *, staged: Iterable[Restriction] | None = None
    ) -> AbstractContextManager[Transaction]:
        """Begin a write transaction.

        Leaving the block commits durably, and then wakes guards if a policy was touched. An
        exception inside undoes everything. Transactions do not nest: `put_users` and
        `remove_users` begin one too.

        Args:
            staged: Restrictions for `Transaction.add_staged`, any number. They are read to the end
                before the writer's lock is acquired, so that a slow source blocks no other writer.

        Raises:
            StoreUnavailable: The lock could not be acquired in time, or the outcome of the commit
                is unknown.
            RuntimeError: This thread is already inside a transaction of this store, and would wait
                for itself.
        """

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; a call that changes nothing appends nothing.

        Any iterable is read to the end before the writer's lock is acquired. `rules.plan_users`
        decides: which records are about one user, and which users are renamed or moved to another
        account. A removed user is registered again, and inherits the restrictions that stayed in
        force. A record without a uid leaves the stored one as it is.

        Each user that is renamed or moved gets an entry of its own, as from `user_entries`. What
        else has changed is a `PUT_USERS` without an actor; its detail has the counts `added`
        (registered again included) and `updated`. It touches the users added: a new name, account
        or e-mail affects no login. A change of exactly one user names the user and the account.

        Returns:
            The store's revision afterwards.

        Raises:
            UsernameCollision: A username would go to two users; `refused` has all such records.
                Nothing is changed.
        """

    def sync_users(
        self, records: Iterable[User | Mapping[str, Any]], *, remove_missing: bool = False
    ) -> UserSync:
        """Make the users as the host has them: `put_users` for a job that runs every night.

        A record that is refused is reported and stops no other. A call that changes nothing appends
        nothing.

        Args:
            records: Users, or mappings with the fields of one; any iterable.
            remove_missing: Whether to remove the registered users that no record is about, as
                `remove_users` does. A record that cannot be read still keeps the users with its
                username or uid.

        Returns:
            What has changed, and each record that was refused, as it was given.

        Raises:
            InvalidValue: `remove_missing` without any record that can be read.
        """

    def rename_user(self, old: str, new: str) -> int:
        """Rename a user, as one change; the restrictions follow.

        The pending requests of the user are cancelled: their mail named the old username. The entry
        is a `RENAME_USER` that touches both usernames.

        Args:
            old: The present username, in any spelling.
            new: The new one, as the host spells it. If only the spelling differs, the change is a
                `PUT_USERS`.

        Returns:
            The store's revision afterwards.

        Raises:
            UnknownUser: `old` is not registered.
            UsernameCollision: `new` belongs to another user, or to a removed one with restrictions.
            UsernameError: A username has no canonical form.
        """

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change: cancel their pending requests, keep their restrictions.

        Requests past their time are cancelled too. The change is a `REMOVE_USERS` without an
        actor; its detail has the count `removed`, and it touches the users removed. A change of
        exactly one user names the user and the account.

        Args:
            usernames: In any spelling; usernames that are not registered are skipped.

        Returns:
            The store's revision afterwards.

        Raises:
            UsernameError: A username has no canonical form; nothing is changed.
            TypeError: The argument is one str, whose characters would be taken for usernames.
        """

    def overview(
        self,
        accounts: Accounts,
        *,
        search: str = "",
        after: str | None = None,
        limit: int = 50,
        only: UserFilter | None = None,
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username.

        The order is by code point, independent of the machine's language.

        Args:
            accounts: A set of account ids, or `Actor.EVERY_ACCOUNT`. Only the latter includes
                removed users, if they have restrictions.
            search: The start of a username, an account id or any word of the full name, ignoring
                case (it may continue into the following words). Words end at punctuation such as
                hyphens and apostrophes too. A search of several words finds the users that each of
                the words finds. An address finds the users with a restriction that contains it,
                expired or not; a network or a range finds those with exactly that restriction.
                Empty: all users.
            after: The `next` of the previous page.
            limit: The maximum number of users, at least 1.
            only: Which of these users to list, as `rules.is_listed` says; None lists all.

        Raises:
            InvalidValue: `limit` is below 1, or `only` is not a `UserFilter`.
            TypeError: `accounts` is a str.
        """

    def counts(self, accounts: Accounts) -> UserCounts:
        """Count the users that `overview` lists, and those of each `UserFilter`.

        A store may look at the first 10,000 users alone: `more` then has the names of the numbers
        that are too low because of that.

        Raises:
            TypeError: `accounts` is a str.
        """

    def open_requests(
        self, accounts: Accounts, *, requested_by: str, limit: int = 100
    ) -> tuple[tuple[StoredRequest, User], ...]:
        """Return pending requests that have not expired, with their users.

        First those of one requester, then those of others that demand approvals; each newest first,
        by `requested_at`, then `id`.

        Args:
            accounts: Only requests for users of these account ids; only `Actor.EVERY_ACCOUNT`
                includes removed users.
            requested_by: The username of the requester, canonical.
            limit: The maximum number of requests, at least 1.

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
        """Return changes, newest first.

        Args:
            accounts: Only entries of these account ids; entries without an account only for
                `Actor.EVERY_ACCOUNT`.
            username: Canonical; only entries that concern this user.
            before: The `next` of the previous page: only revisions below it.
            limit: The maximum number of entries, at least 1.

        Raises:
            InvalidValue: `limit` is below 1.
            TypeError: `accounts` is a str.
        """

    def record_sightings(self, seen: Sequence[Sighting]) -> tuple[Sighting, ...]:
        """Add logins with the right password to the sightings of each user and address.

        The counts are added, `first_at` and `last_at` are joined. Sightings of users that are not
        registered, or removed, are left out. Of each user, 32 addresses are kept, those seen last,
        except those last seen more than 90 days ago. The audit log gets no entry.

        Args:
            seen: At most 1,000, each user and address once.

        Returns:
            The sightings, as they are now, of refused logins that their users are to be told
            about: those among `seen` with refused logins, unless this call returned the same user
            and address, to any server, within the last day.
        """

    def sightings(self, username: str) -> tuple[Sighting, ...]:
        """Return where a user was seen within the last 90 days, by `last_at`, newest first.

        Args:
            username: Canonical. Sightings follow a user who is renamed. A user who is registered,
                for the first time or again, has none.
        """

    def forget_sightings(self, username: str, *, actor: Actor | None = None) -> int:
        """Delete a user's sightings, and append a `FORGET_SIGHTINGS`.

        Args:
            username: In any spelling; need not be registered.
            actor: The actor, whom the entry names, or None for the host.

        Returns:
            How many addresses were deleted; if there were none, nothing is appended.
        """

    def policy_at(self, username: str, revision: int) -> Policy:
        """Return a user's policy as it was after a revision; ended restrictions are never lost.

        Args:
            username: Canonical, as it was then.
            revision: The revision; that of the policy returned. After a `prune`, the one before
                the first entry that was kept is the lowest.

        Returns:
            The restrictions that were in force then, expired ones included. `known` is whether the
            user is registered today: registrations are not part of the record.

        Raises:
            InvalidValue: The store has no such revision, or the record begins after it, because
                older entries were pruned or an older version of ipguard wrote them.
        """

    def revision_at(self, at: datetime) -> int:
        """Return the revision of the last entry at or before a time; 0 if there is none.

        If the clock was set back, the entries count in the order of their times.
        """

    def restrictions_changed(
        self, revision: int, *, after: str | None = None, limit: int = 100
    ) -> Page[tuple[Restriction, bool]]:
        """Return the restrictions that an entry added or ended, by `id`.

        Args:
            revision: The revision of the entry.
            after: The `next` of the previous page.
            limit: The maximum number of restrictions, at least 1.

        Returns:
            Each restriction, and whether it was added. One that was moved to another username is
            there twice, first the old one, and counts once.
        """

    def last_changes(self, usernames: Iterable[str]) -> Mapping[str, Change]:
        """Return for each of at most 1,000 users the last entry that names it and touches it."""

    def passed_on(self, username: str, revision: int) -> bool:
        """Return whether a username may be another user's since a revision.

        It may be after an entry of `put_users`, `remove_users` or `rename_user` that touches the
        username and does not name it: several users were registered or removed, or the user with
        this username got another one.

        Args:
            username: The canonical username.
            revision: The entries after this one count.
        """

    def verify(self, *, expect: tuple[int, str] | None = None) -> Verification:
        """Check the audit log's chain of tokens, and every restriction against its entry.

        Each token is the digest of the previous token, the entry, what it did to restrictions, and
        a random number (`ipguard.audit.next_token`).

        Args:
            expect: The revision and token of an entry, as noted earlier outside of the store.
        """

    def close(self) -> None:
        """Release every resource; closing twice is allowed.

        Later calls raise `StoreUnavailable`, except `now()`. Threads in `wait` return soon.
        """


def append_users(
    tx: Transaction,
    action: Action,
    counts: Mapping[str, int],
    users: Sequence[Sequence[str]],
    touched: Iterable[str],
) -> list[Change]:
    """Append the entry of `put_users` or `remove_users` if there are users, for authors of stores.

    Of the users concerned, with their accounts, two are enough, and of the users touched one more
    than `NAMED_AT_MOST`.
    """
    if not users:
        return []
    username, account_id = users[0] if len(users) == 1 else (None, None)
    names = frozenset(touched)
    change = tx.append(
        action,
        actor=None,
        username=username,
        account_id=account_id,
        detail={name: str(count) for name, count in counts.items()},
        touches=names if len(names) <= NAMED_AT_MOST else EVERYBODY,
    )
    return [change]


def user_entries(users: Iterable[tuple[str, str, str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the entries of users that were renamed or moved, for authors of stores.

    Args:
        users: For each user the username and the account, both before and after the change: old
            username, new username, old account, new account.

    Yields:
        The arguments of `Transaction.append`.
    """
    for old, new, account, other in users:
        entry: dict[str, Any] = {"actor": None, "username": new}
        if old != new:
            yield entry | {
                "action": Action.RENAME_USER,
                "account_id": account,
                "detail": {"old": old, "new": new},
                "touches": frozenset({old, new}),
            }
        if account != other:
            yield entry | {
                "action": Action.MOVE_USER,
                "account_id": other,
                "detail": {"old": account, "new": other},
            }


class UserTransaction(Transaction, Protocol):
    """A write transaction that `carry_out` can use."""

    def save_users(self, users: Sequence[StoredUser]) -> None:
        """Add users, or replace those with their usernames."""

    def move_sightings(self, renamed: Mapping[str, str], fresh: Collection[str]) -> None:
        """Let the sightings follow renamed users, before a username is given to somebody else.

        Args:
            renamed: The new usernames by the old ones. Sightings under a new username are deleted,
                unless they move too.
            fresh: The usernames that were registered, for the first time or again: sightings under
                them are deleted, as they may be of somebody else.
        """


def carry_out(tx: UserTransaction, plan: UserPlan) -> list[Change]:
    """Carry out a plan for users, and append its entries, for authors of stores.

    Returns:
        The entries.
    """
    steps, removed = plan.steps, plan.removed
    renamed = [(step.old, step.user.username) for step in steps if step.old is not None]
    left = [attrs.evolve(s.before, uid=None) for s in steps if s.before is not None and s.old]
    tx.save_users([StoredUser(user=user, removed=True) for user in (*removed, *left)])
    for name in dict.fromkeys((*(user.username for user in removed), *chain(*renamed))):
        for request in tx.pending_requests(name):
            stored = tx.request(request.id)
            closed = attrs.evolve(request, state=after(request.state, Step.CANCEL))
            if stored is not None:
                tx.save_request(attrs.evolve(stored, request=closed))
    held = {old: tx.restrictions(old) for old, _ in renamed}
    tx.save_users([StoredUser(user=step.user) for step in steps])
    gone = [(user.username, user.account_id) for user in removed]
    added = [(step.user.username, step.user.account_id) for step in steps if step.added]
    updated = [(step.user.username, step.user.account_id) for step in steps if step.changed]
    fresh = {name for name, _ in added}
    moves = {old: new for old, new in renamed if new not in fresh}
    tx.move_sightings(moves, {*fresh, *(old for old, _ in renamed if old not in moves)})
    changes = append_users(
        tx, Action.REMOVE_USERS, {"removed": len(gone)}, gone, (name for name, _ in gone)
    )
    for entry in user_entries(each for step in steps if (each := step.entry) is not None):
        # A user's restrictions move with the entry that names the user, for `restrictions_changed`.
        if entry["action"] is Action.RENAME_USER:
            for restriction in held[entry["detail"]["old"]]:
                tx.remove_restriction(restriction.id)
                tx.add_restriction(attrs.evolve(restriction, username=entry["username"]))
        changes.append(tx.append(**entry))
    counts = {"added": len(added), "updated": len(updated)}
    # Of these, only added users are touched: policies contain neither names nor accounts.
    changes += append_users(tx, Action.PUT_USERS, counts, [*added, *updated], fresh)
    return changes


def append_forgotten(
    tx: Transaction, username: str, count: int, actor: Actor | None
) -> list[Change]:
    """Append the entry of `forget_sightings` if any were deleted, for authors of stores."""
    if not count:
        return []
    stored = tx.user(username)
    change = tx.append(
        Action.FORGET_SIGHTINGS,
        actor=None if actor is None else actor.username,
        actor_address=None if actor is None else actor.address,
        username=username,
        account_id=None if stored is None else stored.user.account_id,
        detail=audit.detail(addresses=count, via=None if actor is None else actor.via),
    )
    return [change]


class Unread(NamedTuple):
    """A record of `sync_users` that cannot be read: its place, what was given, and the error."""

    seq: int
    given: Any
    error: errors.IPGuardError

    @property
    def keys(self) -> tuple[str | None, str | None]:
        """The canonical username and the uid that can be read, for users that stay registered."""
        fields = self.given if isinstance(self.given, Mapping) else {}
        uid = fields.get("uid")
        try:
            name = canonical_username(fields.get("username", ""))
        except errors.UsernameError:
            name = None
        return name, uid if isinstance(uid, str) else None


def read_records(
    records: Iterable[User | Mapping[str, Any]], unread: list[Unread]
) -> Iterator[tuple[UserRecord, Any]]:
    """Yield the records of `sync_users`, each with what was given, for authors of stores.

    Args:
        records: The records.
        unread: Gets the records that cannot be read.
    """
    for seq, given in enumerate(records):
        try:
            yield UserRecord(seq, User.of(given)), given
        except (errors.InvalidValue, errors.UsernameError) as exc:
            unread.append(Unread(seq, given, exc))


def refuse_all(refused: Iterable[tuple[User, errors.UsernameCollision]]) -> None:
    """Raise the error of `put_users` if records were refused, for authors of stores."""
    found = tuple(refused)
    if found:
        raise attrs.evolve(found[0][1], refused=found)


class RowStore(Protocol):
    """What a store may offer besides: policies as `ipguard.row.pack` writes them.

    Guards keep such rows. A store that makes them from its columns saves the values in between.
    """

    def load_row(self, username: str) -> tuple[int, bytes]:
        """Return the revision and the packed policy of a user, as of `load_policy`."""

    def load_all_rows(self) -> tuple[int, Iterator[tuple[str, bytes]]]:
        """Return the revision and the packed policies, as of `load_all_policies`."""


def row_loader(store: RestrictionStore) -> Callable[[str], tuple[int, bytes]]:
    """Return the `load_row` of a store; one that packs its policies if it has none."""
    if _offers(store, "load_row", "load_policy"):
        return cast("RowStore", store).load_row

    def load_row(username: str) -> tuple[int, bytes]:
        policy = store.load_policy(username)
        return policy.revision, pack(policy)

    return load_row


def rows_loader(store: RestrictionStore) -> Callable[[], tuple[int, Iterator[tuple[str, bytes]]]]:
    """Return the `load_all_rows` of a store; one that packs its policies if it has none."""
    if _offers(store, "load_all_rows", "load_all_policies"):
        return cast("RowStore", store).load_all_rows

    def load_all_rows() -> tuple[int, Iterator[tuple[str, bytes]]]:
        revision, policies = store.load_all_policies()
        return revision, _packed(policies)

    return load_all_rows


def _packed(policies: Iterator[tuple[str, Policy]]) -> Iterator[tuple[str, bytes]]:
    try:
        for name, policy in policies:
            yield name, pack(policy)
    finally:
        getattr(policies, "close", lambda: None)()


def _offers(store: object, method: str, instead_of: str) -> bool:
    """Return whether a store has a method that no subclass has bypassed by overriding another.

    What is set on the store itself counts. Attributes that a wrapper looks up by `__getattr__` do
    not: it may override the other.
    """
    namespaces = (getattr(store, "__dict__", {}), *(vars(kind) for kind in type(store).__mro__))
    return method in next((it for it in namespaces if method in it or instead_of in it), ())


class Closing:
    """A base class for objects with `close()`, which leaving the `with` block calls."""

    def close(self) -> None:
        """Release every resource."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
