"""The store in memory: the reference that every other store is tested against.

It is plain rather than fast. A committed state is never modified: a write transaction copies each
table before its first write to it, and committing replaces one reference. So a reader has a
snapshot without a lock, and a transaction that raises changes nothing.

The store lasts as long as its process. A forked child would have a copy that diverges from the
parent's without notice, and possibly a lock that is never released; so every call in a child is
refused.
"""

from __future__ import annotations

import os
import secrets
import threading
from bisect import insort
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, NamedTuple, get_args

import attrs

from ipguard import errors, rules
from ipguard._checks import check_time, check_whole
from ipguard._fork import ReentrantLock, acquire
from ipguard.audit import (
    RecordedEntry,
    check_expected,
    digest_of,
    entry_columns,
    log_change,
    micros,
    new_salt,
    next_token,
)
from ipguard.audit import verify as verify_entries
from ipguard.model import (
    EVERYBODY,
    RESET,
    Accounts,
    Action,
    Actor,
    BulkCounts,
    Change,
    Changes,
    Damage,
    Page,
    PendingRequest,
    Policy,
    RequestState,
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
from ipguard.rules import UserHeld, UserPlan, UserRecord, plan_users
from ipguard.store import (
    UNAPPENDED,
    Closing,
    Snapshot,
    Transaction,
    Unread,
    append_forgotten,
    carry_out,
    read_records,
    refuse_all,
)
from ipguard.usernames import canonical_username, canonical_usernames

__all__ = ["MemoryStore"]


class Entry(NamedTuple):
    """One entry of the audit log."""

    change: Change
    token: str
    touches: frozenset[str] | Touched
    salt: str
    restrictions: str
    changed: tuple[tuple[Restriction, bool], ...]  # each, and whether it was added


class Recorded(NamedTuple):
    """A restriction and the revisions at which it came into force and ended."""

    restriction: Restriction
    began: int
    ended: int | None = None

    @property
    def row(self) -> tuple[Any, ...]:
        """The columns of `ipguard.audit.ChangedRestrictions.add`."""
        held = self.restriction
        expires = None if held.expires_at is None else micros(held.expires_at)
        made = (held.label, micros(held.created_at), held.created_by)
        return (held.id, held.username, *held.addresses.packed, *made, expires)


class Seen(NamedTuple):
    """A sighting, and when the user was last told about refused logins."""

    sighting: Sighting
    told_at: datetime | None


@attrs.define(kw_only=True)
class State:
    """The tables and the position of the store, committed or not."""

    head: int = 0
    token: str
    touching: int = 0  # the last revision that touched a policy
    users: dict[str, StoredUser] = attrs.field(factory=dict)
    restrictions: dict[str, tuple[Restriction, ...]] = attrs.field(factory=dict)
    uids: dict[str, str] = attrs.field(factory=dict)  # uid -> username
    owners: dict[str, str] = attrs.field(factory=dict)  # restriction id -> username
    began: dict[str, int] = attrs.field(factory=dict)  # restriction id -> revision
    past: dict[str, tuple[Recorded, ...]] = attrs.field(factory=dict)  # username -> ended ones
    requests: dict[str, StoredRequest] = attrs.field(factory=dict)
    failures: dict[str, int] = attrs.field(factory=dict)
    sightings: dict[str, dict[str, Seen]] = attrs.field(factory=dict)  # by user, by address
    cleaned_at: datetime | None = None  # when sightings that were too old were dropped last

    def policy(self, username: str) -> Policy:
        stored = self.users.get(username)
        return Policy(
            revision=self.head,
            restrictions=self.restrictions.get(username, ()),
            known=_is_registered(stored),
        )

    def seen(self, username: str, now: datetime) -> tuple[Sighting, ...]:
        held = self.sightings.get(username, {}).values()
        return tuple(rules.sightings_kept((each.sighting for each in held), now))

    def record(self, username: str) -> Iterator[Recorded]:
        """Yield the restrictions that a user has or had."""
        yield from self.past.get(username, ())
        for held in self.restrictions.get(username, ()):
            yield Recorded(held, self.began[held.id])

    def whole_record(self) -> Iterator[Recorded]:
        """Yield the restrictions that all users have or had."""
        for username in self.past.keys() | self.restrictions.keys():
            yield from self.record(username)

    def pending(self, username: str) -> tuple[PendingRequest, ...]:
        found = (
            stored.request
            for stored in self.requests.values()
            if stored.request.username == username and stored.request.state is RequestState.PENDING
        )
        return tuple(sorted(found, key=lambda request: (request.requested_at, request.id)))

    def live(self, username: str, now: datetime) -> tuple[PendingRequest, ...]:
        """Return the pending requests of a user that have not expired."""
        return tuple(
            request
            for request in self.pending(username)
            if rules.state_at(request, now) is RequestState.PENDING
        )

    def visible(self, accounts: Accounts, only: UserFilter | None, now: datetime) -> Iterator[str]:
        """Yield the users that a list for these accounts has."""
        pending = {
            stored.request.username
            for stored in self.requests.values()
            if rules.state_at(stored.request, now) is RequestState.PENDING
        }
        for name, stored in self.users.items():
            held = self.restrictions.get(name, ())
            if rules.is_visible(
                accounts, stored.user.account_id, removed=stored.removed, restricted=bool(held)
            ) and rules.is_listed(only, held, pending=name in pending, now=now):
                yield name


def _error_order(error: errors.DuplicateRestriction | errors.TooManyRestrictions) -> int:
    return 2 if isinstance(error, errors.TooManyRestrictions) else int(error.found != "row")


class WriteTransaction:
    """A write transaction, until it is `over`; see `ipguard.store.Transaction` for its methods."""

    def __init__(self, base: State, now: datetime, staged: tuple[Restriction, ...]) -> None:
        self.now = now
        self.state = attrs.evolve(base)
        self.entries: list[Entry] = []
        self.over = False
        self._staged = staged
        self._copied: set[str] = set()
        # The restrictions that began and ended since the last entry.
        self._begun: dict[str, Recorded] = {}
        self._ended: list[Recorded] = []

    def _table(self, name: str) -> dict[str, Any]:
        """Return a table to write to; the first time, copy it."""
        self._check()
        if name not in self._copied:
            setattr(self.state, name, dict(getattr(self.state, name)))
            self._copied.add(name)
        table: dict[str, Any] = getattr(self.state, name)
        return table

    def _check(self) -> None:
        # The state may be committed by now.
        if self.over:
            raise RuntimeError("this transaction is over")

    def user(self, username: str) -> StoredUser | None:
        return self.state.users.get(username)

    def restriction(self, restriction_id: str) -> Restriction | None:
        owner = self.state.owners.get(restriction_id)
        held = () if owner is None else self.state.restrictions[owner]
        return next((r for r in held if r.id == restriction_id), None)

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        return self.state.restrictions.get(username, ())

    def request(self, request_id: str) -> StoredRequest | None:
        return self.state.requests.get(request_id)

    def batch(self, batch_id: str) -> tuple[StoredRequest, ...]:
        found = (each for each in self.state.requests.values() if each.request.batch == batch_id)
        return tuple(sorted(found, key=lambda each: (each.request.requested_at, each.request.id)))

    def pending_requests(self, username: str) -> tuple[PendingRequest, ...]:
        return self.state.pending(username)

    def request_times(self, requested_by: str, since: datetime) -> tuple[datetime, ...]:
        found = (
            stored.request.requested_at
            for stored in self.state.requests.values()
            if stored.request.requested_by == requested_by
            and stored.request.batch in (None, stored.request.id)
        )
        return tuple(sorted(at for at in found if at > since))

    def failures(self, actor: str) -> int:
        return self.state.failures.get(actor, 0)

    def save_request(self, stored: StoredRequest) -> None:
        self._table("requests")[stored.request.id] = stored

    def set_failures(self, actor: str, count: int) -> None:
        self._table("failures")[actor] = count

    def add_restriction(self, restriction: Restriction) -> None:
        owners = self._table("owners")
        if restriction.id in owners:
            raise errors.StoreError(
                f"there is a restriction {errors.shorten(restriction.id)} already"
            )
        held = list(self.restrictions(restriction.username))
        insort(held, restriction, key=lambda each: (each.created_at, each.id))
        self._table("restrictions")[restriction.username] = tuple(held)
        owners[restriction.id] = restriction.username
        self._table("began")[restriction.id] = began = self.state.head + 1
        self._begun[restriction.id] = Recorded(restriction, began)

    def remove_restriction(self, restriction_id: str) -> None:
        owner = self._table("owners").pop(restriction_id, None)
        if owner is None:
            return
        table = self._table("restrictions")
        (old,) = (r for r in table[owner] if r.id == restriction_id)
        table[owner] = tuple(r for r in table[owner] if r is not old)
        if not table[owner]:
            del table[owner]
        began = self._table("began").pop(restriction_id)
        if self._begun.pop(restriction_id, None) is None:  # else it was never in force
            self._ended.append(Recorded(old, began, self.state.head + 1))

    def add_staged(
        self, *, per_user: int, replace: bool = False, skip_existing: bool = False
    ) -> BulkCounts:
        self._check()
        rules.check_bulk_options(replace=replace, skip_existing=skip_existing)
        by_user: dict[str, list[Restriction]] = {}
        for restriction in self._staged:
            by_user.setdefault(restriction.username, []).append(restriction)
        # Check everything before writing anything, and each error for all users before the next: a
        # caller may catch the error and continue.
        for username in by_user:
            stored = self.user(username)
            if stored is None or stored.removed:
                raise errors.UnknownUser(username)
        judged = [
            rules.judge_additions(
                username,
                self.restrictions(username),
                new,
                per_user=per_user,
                now=self.now,
                replace=replace,
                skip_existing=skip_existing,
            )
            for username, new in by_user.items()
        ]
        reasons = [error for found in judged for _, error in found.refused]
        if reasons:
            raise min(reasons, key=_error_order)
        for found in judged:
            for old in found.ends:
                self.remove_restriction(old.id)
                self._cancel_deletions(old)
            for new in found.adds:
                self.add_restriction(new)
        return BulkCounts(
            added=sum(len(found.adds) for found in judged),
            kept=sum(len(found.kept) for found in judged),
            ended=sum(len(found.ends) for found in judged),
        )

    def _cancel_deletions(self, old: Restriction) -> None:
        for stored in list(self.state.requests.values()):
            request = stored.request
            pending = rules.state_at(request, self.now) is RequestState.PENDING
            if pending and request.ends_alone and request.removes[0] == old.id:
                state = rules.after(request.state, rules.Step.CANCEL)
                self.save_request(attrs.evolve(stored, request=attrs.evolve(request, state=state)))

    def append(
        self, action: Action, *, touches: frozenset[str] | Touched = frozenset(), **fields: Any
    ) -> Change:
        self._check()
        change = Change(revision=self.state.head + 1, at=self.now, action=action, **fields)
        digest = digest_of(
            (each.row for each in self._begun.values()), (each.row[:2] for each in self._ended)
        )
        salt = new_salt()
        token = next_token(self.state.token, entry_columns(change, touches), digest, salt)
        ended = ((each.restriction, False) for each in self._ended)
        added = ((each.restriction, True) for each in self._begun.values())
        entry = Entry(change, token, touches, salt, digest, (*ended, *added))
        self.entries.append(entry)
        for each in self._ended:
            past, owner = self._table("past"), each.restriction.username
            past[owner] = (*past.get(owner, ()), each)
        self._begun, self._ended = {}, []
        self.state.head, self.state.token = change.revision, entry.token
        if touches:
            self.state.touching = change.revision
        return change

    def check_appended(self) -> None:
        """Raise StoreError if restrictions were changed after the last entry."""
        if self._begun or self._ended:
            raise errors.StoreError(UNAPPENDED)

    def _held(self, username: str, kept: Container[tuple[str | None, str | None]]) -> UserHeld:
        stored, restricted = self.user(username), username in self.state.restrictions
        if stored is None:
            return UserHeld(None, restricted=restricted)
        user = stored.user
        spared = (username, None) in kept or (None, user.uid) in kept
        return UserHeld(user, stored.removed, restricted, kept=spared)

    def plan(
        self,
        records: Collection[UserRecord],
        *,
        kept: Container[tuple[str | None, str | None]] = (),
        remove_missing: bool = False,
    ) -> UserPlan:
        """Plan what the records change.

        With `remove_missing`, users with a username or a uid in `kept` stay: each is
        `(username, None)` or `(None, uid)`.
        """
        names = {record.user.username for record in records}
        if remove_missing:
            names.update(self.state.users)
        names.update(record.renames for record in records if record.renames is not None)
        uids = self.state.uids
        names.update(uids[r.user.uid] for r in records if r.user.uid in uids)
        held = {name: self._held(name, kept) for name in names}
        return plan_users(records, held, remove_missing=remove_missing)

    def save_users(self, users: Sequence[StoredUser]) -> None:
        table, uids = self._table("users"), self._table("uids")
        for stored in users:
            name, uid = stored.user.username, stored.user.uid
            before = table.get(name)
            if before is not None and before.user.uid is not None:
                del uids[before.user.uid]
            table[name] = stored
            if uid is not None:
                uids[uid] = name

    def move_sightings(self, renamed: Mapping[str, str], fresh: Collection[str]) -> None:
        table = self._table("sightings")
        moved = {
            new: {
                address: Seen(attrs.evolve(sighting, username=new), told_at)
                for address, (sighting, told_at) in table[old].items()
            }
            for old, new in renamed.items()
            if old in table
        }
        for name in {*renamed, *renamed.values(), *fresh}:
            table.pop(name, None)
        table.update(moved)

    def forget_sightings(self, username: str) -> int:
        return len(self._table("sightings").pop(username, ()))

    def clean_sightings(self) -> None:
        """Once a day, drop the sightings of all users that are too old."""
        cleaned_at, since = self.state.cleaned_at, rules.seen_since(self.now)
        if cleaned_at is None or self.now - cleaned_at >= timedelta(days=1):
            table = self._table("sightings")
            for name, held in list(table.items()):
                kept = {key: each for key, each in held.items() if each.sighting.last_at >= since}
                table[name] = kept
                if not kept:
                    del table[name]
            self.state.cleaned_at = self.now

    def record_sightings(self, seen: Sequence[Sighting]) -> Iterator[Sighting]:
        """Add sightings; yield those to tell their users about, as they are now."""
        table = self._table("sightings")
        known = [each for each in seen if _is_registered(self.user(each.username))]
        every: dict[str, dict[str, Seen]] = {}
        for each in known:
            name = each.username
            kept = self.state.seen(name, self.now)
            held = every.setdefault(name, {it.address: table[name][it.address] for it in kept})
            before, told_at = held.get(each.address, Seen(each, None))
            after = each if before is each else rules.joined(before, each)
            held[each.address] = Seen(after, told_at)
        for name, held in every.items():
            left = rules.sightings_kept((there.sighting for there in held.values()), self.now)
            table[name] = {each.address: held[each.address] for each in left}
        for each in known:
            there = table[each.username].get(each.address)
            if each.refused and there is not None:
                due = there.told_at is None or there.told_at <= rules.told_until(self.now)
                if due:
                    table[each.username][each.address] = Seen(there.sighting, self.now)
                    yield there.sighting


def _is_registered(stored: StoredUser | None) -> bool:
    return stored is not None and not stored.removed


class MemoryStore(Closing):
    """A store that ends with its process. See `ipguard.store.RestrictionStore` for its methods.

    Args:
        clock: Returns the current time as an aware datetime; the host's clock by default.
        timeout: How many seconds a writer waits for the writer's lock.
    """

    def __init__(
        self, *, clock: Callable[[], datetime] | None = None, timeout: float = 5.0
    ) -> None:
        self._clock = clock or (lambda: datetime.now(UTC))
        self._timeout = timeout
        self._pid = os.getpid()
        self._closed = False
        self._origin = secrets.token_hex(8)  # of revision 0, which differs between stores
        self._state = State(token=self._origin)
        # All states share this list, which only grows: the first `head` entries belong to a state.
        self._entries: list[Entry] = []
        self._writing = threading.Lock()
        self._writer: int | None = None
        self._lock = ReentrantLock()
        self._touched = threading.Condition(self._lock)

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""
        return check_time("clock", self._clock())

    def load_policy(self, username: str) -> Policy:
        """Load the policy of a user and the revision of the same snapshot."""
        return self._committed().policy(username)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision and the policies of all restricted users, from one snapshot."""
        state = self._committed()
        return state.head, ((name, state.policy(name)) for name in sorted(state.restrictions))

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return the store's position and the users whose policy changed since a revision."""
        state = self._committed()
        if cursor is None:
            return Changes(state.head, state.token, frozenset())
        revision, token = cursor
        if not 0 <= revision <= state.head or token != self._token_of(revision):
            return Changes(state.head, state.token, RESET)
        names: set[str] = set()
        for entry in self._entries[revision : state.head]:
            if isinstance(entry.touches, Touched):
                return Changes(state.head, state.token, EVERYBODY)
            names |= entry.touches
        return Changes(state.head, state.token, frozenset(names))

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait for a change after `revision` that touches a policy; return whether there is one."""
        self._committed()
        with self._lock:
            self._touched.wait_for(lambda: self._closed or self._state.touching > revision, timeout)
            return self._state.touching > revision

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Open a snapshot for look-ups, which waits for no writer."""
        tx = WriteTransaction(self._committed(), self.now(), ())
        tx.over = True  # refuse writes
        yield tx

    def transaction(
        self, *, staged: Iterable[Restriction] | None = None
    ) -> AbstractContextManager[Transaction]:
        """Begin a write transaction."""
        return self._write(tuple(staged or ()))

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users in one change, if any of them differs; return the revision."""
        given = list(users)
        with self._write() as tx:
            plan = tx.plan([UserRecord(seq, user) for seq, user in enumerate(given)])
            refuse_all((given[seq], error) for seq, error in plan.refused)
            carry_out(tx, plan)
        return _log(tx)

    def sync_users(
        self, records: Iterable[User | Mapping[str, Any]], *, remove_missing: bool = False
    ) -> UserSync:
        """Make the users as the host has them; return what has changed."""
        unread: list[Unread] = []
        read = list(read_records(records, unread))
        if remove_missing and not read:
            raise errors.InvalidValue("records", "holds no user, and all would be removed")
        kept = {key for each in unread for key in ((each.keys[0], None), (None, each.keys[1]))}
        kept.discard((None, None))  # else it would keep the users without a uid
        with self._write() as tx:
            plan = tx.plan([r for r, _ in read], kept=kept, remove_missing=remove_missing)
            carry_out(tx, plan)
        givens = {record.seq: given for record, given in read}
        unread += (Unread(seq, givens[seq], error) for seq, error in plan.refused)
        return UserSync(
            revision=_log(tx),
            added=sum(step.added for step in plan.steps),
            changed=sum(step.changed for step in plan.steps),
            renamed=sum(step.old is not None for step in plan.steps),
            moved=sum(step.moved for step in plan.steps),
            removed=len(plan.removed),
            refused=tuple((given, error) for _, given, error in sorted(unread, key=itemgetter(0))),
        )

    def rename_user(self, old: str, new: str) -> int:
        """Rename a user, with the restrictions; return the revision."""
        name = canonical_username(old)
        with self._write() as tx:
            stored = tx.user(name)
            if stored is None or stored.removed:
                raise errors.UnknownUser(name)
            record = UserRecord(0, attrs.evolve(stored.user, username=new), name)
            plan = tx.plan([record])
            refuse_all((record.user, error) for _, error in plan.refused)
            carry_out(tx, plan)
        return _log(tx)

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users in one change; return the revision."""
        names = set(canonical_usernames(usernames))
        with self._write() as tx:
            found = (tx.user(name) for name in sorted(names))
            removed = [stored.user for stored in found if stored and not stored.removed]
            carry_out(tx, UserPlan([], removed, []))
        return _log(tx)

    def overview(
        self,
        accounts: Accounts,
        *,
        search: str = "",
        after: str | None = None,
        limit: int = 50,
        only: UserFilter | None = None,
    ) -> Page[UserOverview]:
        """Return users with their restrictions and pending requests, by username."""
        check_whole("limit", limit, 1)
        rules.check_filter(only)
        state, now, wanted = self._committed(), self.now(), rules.Search.of(search)
        found = sorted(
            name
            for name in state.visible(check_accounts(accounts), only, now)
            if (after is None or name > after)
            and wanted.matches(state.users[name].user, state.restrictions.get(name, ()))
        )
        items = tuple(_overview(state, name, now) for name in found[:limit])
        return Page(items=items, next=found[limit - 1] if len(found) > limit else None)

    def counts(self, accounts: Accounts) -> UserCounts:
        """Count the users of each filter, however many there are."""
        state, now, given = self._committed(), self.now(), check_accounts(accounts)
        filters: tuple[UserFilter | None, ...] = (None, *get_args(UserFilter))
        return UserCounts._make(
            (*(sum(1 for _ in state.visible(given, each, now)) for each in filters), frozenset())
        )

    def open_requests(
        self, accounts: Accounts, *, requested_by: str, limit: int = 100
    ) -> tuple[tuple[StoredRequest, User], ...]:
        """Return the live pending requests of an actor, then those that demand approvals."""
        check_whole("limit", limit, 1)
        accounts = check_accounts(accounts)
        state, now, found = self._committed(), self.now(), []
        for stored in state.requests.values():
            request, there = stored.request, state.users.get(stored.request.username)
            if (
                there is not None
                and rules.state_at(request, now) is RequestState.PENDING
                and (request.requested_by == requested_by or request.demand.approvals)
                and rules.is_visible(
                    accounts, there.user.account_id, removed=there.removed, restricted=True
                )
            ):
                found.append((stored, there.user))
        found.sort(
            key=lambda each: (each[0].request.requested_at, each[0].request.id), reverse=True
        )
        found.sort(key=lambda each: each[0].request.requested_by != requested_by)
        return tuple(found[:limit])

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return audit entries, newest first."""
        check_whole("limit", limit, 1)
        accounts = check_accounts(accounts)
        head = self._committed().head
        found = []
        for revision in range(head if before is None else min(head, before - 1), 0, -1):
            change = self._entries[revision - 1].change
            if change.account_id in accounts and username in (None, change.username):
                found.append(change)
            if len(found) > limit:
                break
        items = tuple(found[:limit])
        return Page(items=items, next=items[-1].revision if len(found) > limit else None)

    def record_sightings(self, seen: Sequence[Sighting]) -> tuple[Sighting, ...]:
        """Add logins to what is kept; return those to tell their users about."""
        with self._write() as tx:
            tx.clean_sightings()
            return tuple(tx.record_sightings(rules.sightings_to_record(seen, tx.now)))

    def sightings(self, username: str) -> tuple[Sighting, ...]:
        """Return where a user was seen, newest first."""
        return self._committed().seen(username, self.now())

    def forget_sightings(self, username: str, *, actor: Actor | None = None) -> int:
        """Delete a user's sightings; return how many there were."""
        name = canonical_username(username)
        with self._write() as tx:
            count = tx.forget_sightings(name)
            append_forgotten(tx, name, count, actor)
        _log(tx)
        return count

    def policy_at(self, username: str, revision: int) -> Policy:
        """Return a user's policy as it was after a revision."""
        state = self._committed()
        rules.check_revision(revision, 0, state.head)
        found = (
            each.restriction
            for each in state.record(username)
            if each.began <= revision and (each.ended is None or revision < each.ended)
        )
        held = tuple(sorted(found, key=lambda each: (each.created_at, each.id)))
        known = state.policy(username).known
        return Policy(revision=revision, restrictions=held, known=known)

    def revision_at(self, at: datetime) -> int:
        """Return the revision of the last entry at or before a time."""
        check_time("at", at)
        entries = (entry.change for entry in self._entries[: self._committed().head])
        found = ((change.at, change.revision) for change in entries if change.at <= at)
        return max(found, default=(at, 0))[1]

    def restrictions_changed(
        self, revision: int, *, after: str | None = None, limit: int = 100
    ) -> Page[tuple[Restriction, bool]]:
        """Return the restrictions that an entry added or ended."""
        check_whole("limit", limit, 1)
        if not 0 < revision <= self._committed().head:
            return Page(items=(), next=None)
        changed = self._entries[revision - 1].changed
        found = [each for each in changed if after is None or each[0].id > after]
        found.sort(key=lambda each: (each[0].id, each[1]))
        ids = list(dict.fromkeys(restriction.id for restriction, _ in found))
        if len(ids) <= limit:
            return Page(items=tuple(found), next=None)
        last = ids[limit - 1]
        return Page(items=tuple(each for each in found if each[0].id <= last), next=last)

    def last_changes(self, usernames: Iterable[str]) -> Mapping[str, Change]:
        """Return the last entry that names each user and touches the policy."""
        names, head = set(usernames), self._committed().head
        return {
            entry.change.username: entry.change
            for entry in self._entries[:head]
            if entry.touches and entry.change.username in names
        }

    def passed_on(self, username: str, revision: int) -> bool:
        """Return whether a username may be another user's since a revision."""
        check_whole("revision", revision, 0)
        return any(
            entry.change.action in (Action.PUT_USERS, Action.REMOVE_USERS, Action.RENAME_USER)
            and entry.change.username != username
            and (isinstance(entry.touches, Touched) or username in entry.touches)
            for entry in self._entries[revision : self._committed().head]
        )

    def verify(self, *, expect: tuple[int, str] | None = None) -> Verification:
        """Check the chain of tokens and the record of restrictions."""
        state, damage = self._committed(), list[Damage]()
        entries = [
            RecordedEntry(
                entry_columns(each.change, each.touches), each.token, each.salt, each.restrictions
            )
            for each in self._entries[: state.head]
        ]
        record = list(state.whole_record())
        count, restrictions = verify_entries(
            entries,
            sorted((each.began, *each.row) for each in record),
            sorted((each.ended, *each.row[:2]) for each in record if each.ended is not None),
            before=(0, self._origin),
            head=(state.head, state.token),
            damage=damage,
        )
        if expect is not None:
            known = 0 <= expect[0] <= state.head
            check_expected(expect, self._token_of(expect[0]) if known else None, damage)
        return Verification(
            first=1,
            head=state.head,
            token=state.token,
            entries=count,
            restrictions=restrictions,
            uncovered=0,
            damage=tuple(damage),
        )

    def close(self) -> None:
        """Wake all waiting threads and refuse every later call."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._touched.notify_all()

    def _committed(self) -> State:
        # Before any lock: in a forked child, nothing releases a lock that the parent held.
        if os.getpid() != self._pid:
            raise errors.StoreUnavailable("a memory store does not outlive a fork")
        if self._closed:
            raise errors.StoreUnavailable("the store is closed")
        return self._state

    def _token_of(self, revision: int) -> str:
        return self._entries[revision - 1].token if revision else self._origin

    @contextmanager
    def _write(self, staged: tuple[Restriction, ...] = ()) -> Iterator[WriteTransaction]:
        self._committed()
        if self._writer == threading.get_ident():
            raise RuntimeError("this thread is in a transaction of this store already")
        held: list[bool] = []
        try:
            if not acquire(self._writing, self._timeout, held):
                raise errors.StoreUnavailable(f"no writer's lock within {self._timeout:g} s")
            self._writer = threading.get_ident()
            tx = WriteTransaction(self._committed(), self.now(), staged)
            try:
                yield tx
                tx.check_appended()
                self._commit(tx)
            finally:
                tx.over = True
        finally:
            if True in held:
                self._writer = None
                self._writing.release()

    def _commit(self, tx: WriteTransaction) -> None:
        base = self._committed()
        self._entries[base.head :] = tx.entries
        with self._lock:
            self._state = tx.state
            if tx.state.touching > base.touching:
                self._touched.notify_all()


def _log(tx: WriteTransaction) -> int:
    for entry in tx.entries:
        log_change(entry.change)
    return tx.state.head


def _overview(state: State, username: str, now: datetime) -> UserOverview:
    stored = state.users[username]
    restrictions = state.restrictions.get(username, ())
    return UserOverview(
        user=stored.user,
        restrictions=restrictions,
        pending=state.live(username, now),
        summary=rules.summarise(restrictions, now),
        removed=stored.removed,
        last_used=rules.last_used(restrictions, state.seen(username, now)),
    )
