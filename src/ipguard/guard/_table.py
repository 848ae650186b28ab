"""What a guard remembers, in one object: the rows, their position, the deadline, and the lock.

Readers take no lock. They look a username up in `rows`, as the host spelt it, and compare the clock
with a deadline that they read before. Every write is one operation of `Table`, which locks inside
and does no I/O. Operations that drop rows do so before they move the position, and move the
deadline last; each step is safe to interrupt, as a signal handler that raises does, and to repeat.

Dropping a row only removes it from `rows`. A reader that still holds it may add to it, but no later
reader finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

import attrs
from cachetools import FIFOCache

from ipguard import _fork
from ipguard.errors import StoreUnavailable
from ipguard.model import RESET, Changes, Policy, Reason, Touched
from ipguard.packed import pack, unpack
from ipguard.rules import lasting

_log = logging.getLogger("ipguard.guard")

EXPIRED: Final = float("-inf")
_SPELLINGS: Final = 8
_ALL: Final = (0,)
_NONE: Final[tuple[int, ...]] = ()
_UNKNOWN: Final = b""
_DIVERGED: Final = (
    "the store's history is not the one known up to revision %d (a restored backup, a failover "
    "that lost commits, or pruned changes): everything remembered is dropped, and revision %d "
    "taken over"
)

PackedRow = bytes | Policy
"""A packed policy; or the policy itself if it cannot be packed."""


def pack_row(policy: Policy) -> PackedRow:
    """Return a policy as a preloaded table holds it."""
    try:
        return pack(policy)
    except ValueError:
        return policy


class Row(set[str]):
    """One user: the address texts allowed so far, and what decides about all others.

    Attributes:
        policy: The user's policy.
        ipv4: Flat sorted bounds of the IPv4 addresses that are allowed at any time: an address is
            allowed if `bisect_right` of them is odd.
        ipv6: The same for IPv6.
        otherwise: Why all other addresses are denied; None if that depends on the time.
        spellings: The keys of `Table.rows` that lead here; the first is the canonical username.
    """

    __slots__ = ("ipv4", "ipv6", "otherwise", "policy", "spellings")

    def __init__(self, name: str, policy: Policy, *, deny_unknown: bool) -> None:
        super().__init__()
        self.policy = policy
        self.spellings: tuple[str, ...] = (name,)
        self.ipv4: tuple[int, ...]
        self.ipv6: tuple[int, ...]
        self.otherwise: Reason | None = Reason.NOT_LISTED
        if deny_unknown and not policy.known:
            self.ipv4 = self.ipv6 = _NONE
            self.otherwise = Reason.UNKNOWN_USER
        elif not policy.restrictions:
            self.ipv4 = self.ipv6 = _ALL
        else:
            # Temporary restrictions are left out: they are decided by the store's clock each time.
            addresses = lasting(policy.restrictions)
            self.ipv4 = tuple(addresses.bounds(4))
            self.ipv6 = tuple(addresses.bounds(6))
            if any(r.expires_at is not None for r in policy.restrictions):
                self.otherwise = None


class Position(NamedTuple):
    """Where a table stands in the store's history.

    Attributes:
        revision: Everything remembered is current to this revision.
        token: The store's token of that revision; None before the first sync.
        history: A number that changes when the store turns out to have another history.
        syncs: How many syncs have been applied.
    """

    revision: int = 0
    token: str | None = None
    history: int = 0
    syncs: int = 0

    @property
    def cursor(self) -> tuple[int, str] | None:
        """The argument of `changes_since`."""
        return None if self.token is None else (self.revision, self.token)

    def covers(self, revision: int, syncs: int) -> bool:
        """Return whether a policy read since this position is usable after `syncs` syncs.

        A policy that was read ahead of the position may be of a revision that a failover has lost
        since. A sync that was applied after the read began cannot name that revision, so it proves
        nothing about the policy.
        """
        return revision <= self.revision or syncs <= self.syncs


class Snapshot:
    """A snapshot of the store's policies while it is being read.

    Attributes:
        revision: The table's revision when the read began; the snapshot must have the same.
        rows: The rows read so far; they belong to the thread that reads.
        changed: The users that syncs have named since the read began.
    """

    __slots__ = ("changed", "revision", "rows")

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.rows: dict[str, PackedRow] = {}
        self.changed: set[str] = set()


class Preloaded:
    """Every restricted user, in a few bytes each. `Table` locks each call.

    A user without a row is unrestricted, so a row must never be dropped. A user whose policy has
    changed is marked unknown until its policy was read again. Before the first snapshot is
    complete, all users are unknown. In a guard that does not preload, none ever is.

    Attributes:
        complete: Whether a snapshot was swapped in and is still valid.
        unknown: The users whose policies must be read again.
        snapshot: The snapshot that is being read.
        discarded: The rows of a table that became invalid. The next reader of a snapshot empties
            it in small steps: freeing a million rows at once would stop every thread.
    """

    def __init__(self, *, deny_unknown: bool) -> None:
        self._deny_unknown = deny_unknown
        self._rows: dict[str, PackedRow] = {}
        self.complete = False
        self.unknown: set[str] = set()
        self.snapshot: Snapshot | None = None
        self.discarded: dict[str, PackedRow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def policy(self, name: str, revision: int) -> Policy | None:
        """Return a user's policy at the table's revision, or None if it is unknown."""
        if not self.complete:
            return None
        row = self._rows.get(name)
        if row is None:
            # A snapshot does not say whether an unrestricted user is registered.
            unrestricted = Policy(revision=revision, restrictions=(), known=False)
            return None if self._deny_unknown else unrestricted
        if isinstance(row, Policy):
            return attrs.evolve(row, revision=revision)
        try:
            return unpack(row, name, revision)
        except ValueError:  # unknown, or a damaged row: read the store
            return None

    def put(self, name: str, policy: Policy, *, ahead: bool) -> None:
        """Replace a user's row; mark the user unknown if the policy is ahead of the position."""
        if ahead:
            # Not strangers: there may be any number.
            if policy.known or policy.restrictions or name in self._rows:
                self.mark((name,))
        elif self.complete:
            if policy.restrictions:
                self._rows[name] = pack_row(policy)
            else:
                self._rows.pop(name, None)
            self.unknown.discard(name)

    def mark(self, names: Collection[str]) -> None:
        """Mark users unknown."""
        if self.snapshot is not None:
            self.snapshot.changed.update(names)
        if self.complete:
            self.unknown.update(names)
            for name in names:
                self._rows[name] = _UNKNOWN

    def clear(self) -> None:
        """Mark all users unknown, and abandon a snapshot that is being read."""
        self.snapshot = None
        self.complete = False
        if self._rows:
            self.discarded, self._rows = self._rows, {}
        self.unknown.clear()

    def swap(self, snapshot: Snapshot) -> bool:
        """Replace all rows by a snapshot that was read to its end, if it is still valid."""
        if self.snapshot is not snapshot:
            return False
        self.snapshot = None
        for name in snapshot.changed:
            snapshot.rows[name] = _UNKNOWN
        self.unknown = snapshot.changed
        self._rows = snapshot.rows
        self.complete = True
        return True


class Table:
    """The rows of at most `capacity` users, and everything that is written together with them.

    Rows are evicted in the order in which they came, since hits do not pass here. Users that are
    neither registered nor restricted are evicted first, so that invented usernames cannot push out
    real ones.

    Attributes:
        rows: By spelling. Replaced never, written only under the lock.
        position: Where the rows stand in the store's history; read with one attribute access.
        deadline: The moment, on the guard's monotonic clock, from which no row may be used.
        synced_at: When the read began that last moved the deadline; None before the first.
        evictions: How many users were evicted.
        preloaded: All restricted users, if the guard preloads. Evicting a row leaves it unchanged.
    """

    def __init__(self, *, capacity: int, max_staleness: float, deny_unknown: bool) -> None:
        self.rows: dict[str, Row] = {}
        self.position = Position()
        self.deadline = EXPIRED
        self.synced_at: float | None = None
        self.evictions = 0
        self.preloaded = Preloaded(deny_unknown=deny_unknown)
        self._capacity = capacity
        self._max_staleness = max_staleness
        self._deny_unknown = deny_unknown
        self._lock = _fork.ReentrantLock()
        self._clear_rows()

    def __len__(self) -> int:
        return len(self._users) + len(self._strangers)

    @property
    def lock(self) -> _fork.ReentrantLock:
        """The lock for writing; also held by a fork, and for the reads in flight."""
        _fork.check()
        return self._lock

    def entered(self) -> bool:
        """Return whether this thread holds the lock.

        That is so if a signal handler, a finalizer or a logging handler calls the guard while the
        same thread is writing. Such a call must not write, nor wait for this thread.
        """
        return self._lock.owned()

    # ------------------------------------------------------------------------------------- rows

    def find(self, name: str, spelling: str) -> Row | None:
        """Return a user's row, from the preloaded users too, and index it by this spelling."""
        row = self.rows.get(name)
        settled = not self.preloaded.complete if row is None else spelling in row.spellings
        if settled or self.entered():
            return row
        with self.lock:
            return self.lookup(name, spelling)

    def lookup(self, name: str, spelling: str) -> Row | None:
        """Do what `find` does, for a caller that holds the lock."""
        row = self.rows.get(name)
        if row is not None:
            self._spell(row, spelling)
            return row
        policy = self.preloaded.policy(name, self.position.revision)
        if policy is not None:
            row = self._row(name, policy)
            self._keep(row, spelling)
        return row

    def remember(self, name: str, spelling: str, policy: Policy, began: Position) -> Row:
        """Keep a policy that was read since the position `began`, and return the user's row.

        The row is not kept if a sync has moved the position past it (the stale fill), or
        may be of a history that was lost. If it is ahead of `began`, the next sync drops it.
        """
        row = self._row(name, policy)
        ahead = policy.revision > began.revision
        with self.lock:
            position = self.position
            if began.history == position.history and policy.revision >= position.revision:
                self.preloaded.put(name, policy, ahead=ahead)
                self._drop(name)
                kept = began.covers(policy.revision, position.syncs)
                if ahead and (kept or name in self.preloaded.unknown):
                    self._ahead.add(name)
                if kept:
                    self._keep(row, spelling)
        return row

    def refresh(self, name: str, policy: Policy, began: Position) -> None:
        """Replace the row of a preloaded user, if the policy is of the table's own revision.

        Not if a login was answered ahead of it: its next answer must not be an older one.
        """
        with self.lock:
            now = self.position
            same = (now.revision, now.history) == (began.revision, began.history)
            if same and policy.revision == now.revision and name not in self._ahead:
                self.preloaded.put(name, policy, ahead=False)

    def _row(self, name: str, policy: Policy) -> Row:
        return Row(name, policy, deny_unknown=self._deny_unknown)

    def _keep(self, row: Row, spelling: str) -> None:
        name, policy = row.spellings[0], row.policy
        stranger = not policy.known and not policy.restrictions
        try:
            (self._strangers if stranger else self._users)[name] = None
            self.rows[name] = row
            self._spell(row, spelling)
            while len(self) > self._capacity:
                oldest, _ = (self._strangers or self._users).popitem()
                self._drop(oldest)
                self.evictions += 1
        except BaseException:
            self._clear_rows()  # a signal handler raised: cachetools may be inconsistent
            raise

    def _spell(self, row: Row, spelling: str) -> None:
        held = self.rows.get(row.spellings[0]) is row
        if held and spelling not in row.spellings and len(row.spellings) < _SPELLINGS:
            row.spellings += (spelling,)
            self.rows[spelling] = row

    def _drop(self, name: str) -> None:
        # The canonical spelling goes last: if this is interrupted, it leads to the others again.
        row = self.rows.get(name)
        if row is not None:  # not `if row`: a row without allowed texts is falsy
            for spelling in reversed(row.spellings):
                self.rows.pop(spelling, None)
        try:
            self._users.pop(name, None)
            self._strangers.pop(name, None)
        except BaseException:
            self._clear_rows()  # as in `_keep`
            raise
        if name not in self.preloaded.unknown:  # else `refresh` needs to know, after an eviction
            self._ahead.discard(name)

    def _clear_rows(self) -> None:
        self.rows.clear()
        self._users: FIFOCache[str, None] = FIFOCache(self._capacity + 1)
        self._strangers: FIFOCache[str, None] = FIFOCache(self._capacity + 1)
        self._ahead: set[str] = set()

    def _clear(self) -> None:
        self.preloaded.clear()
        self._clear_rows()

    # ------------------------------------------------------------------ the position and the lease

    def apply(
        self,
        cursor: tuple[int, str] | None,
        changes: Changes,
        started: float,
        slept: Callable[[], bool],
    ) -> bool:
        """Apply the changes since `cursor`: drop rows, move the position, move the deadline.

        Args:
            cursor: The position from which the changes were read.
            changes: The store's answer.
            started: When the read began, on the guard's monotonic clock.
            slept: Returns whether the machine has slept since then; asked last.

        Returns:
            Whether the deadline was moved. False if another sync has moved the position,
            or if the machine has slept.

        Raises:
            StoreUnavailable: The store is behind the table.
        """
        head, token, usernames = changes
        diverged = False
        with self.lock:
            known = self.position
            if usernames is RESET or known.token is None:
                # A first sync names no changes, so rows that were loaded before it are of unknown
                # age.
                self._clear()
                self.position = known._replace(history=known.history + 1)
            if known.cursor not in {cursor, (head, token)}:
                # An older read has nothing to add; a newer one tells of changes since a revision
                # that may be of another history.
                return head < known.revision and usernames is not RESET
            if usernames is RESET:
                diverged = known.cursor == cursor is not None
            elif head < known.revision:
                raise StoreUnavailable(f"the store is at revision {head}, behind {known.revision}")
            elif isinstance(usernames, Touched):
                self._clear()
            else:
                self.preloaded.mark(usernames)
                # A row that was read ahead of the position goes too. The store names what changed
                # since `cursor`; it cannot tell that the later revision is still in its history.
                for name in (*usernames, *self._ahead):
                    self._drop(name)
                self._ahead.clear()
            self.position = Position(head, token, self.position.history, known.syncs + 1)
            interrupted = slept()
            if interrupted:
                self.deadline = EXPIRED
            elif started + self._max_staleness > self.deadline:
                self.deadline = started + self._max_staleness
                self.synced_at = started
        if diverged:
            _log.error(_DIVERGED, known.revision, head)
        return not interrupted

    def expire(self) -> None:
        """End the lease."""
        with self.lock:
            self.deadline = EXPIRED

    # -------------------------------------------------------------------------- preloaded users

    def unknown(self) -> tuple[str, ...]:
        """Return the preloaded users whose policies must be read again."""
        with self.lock:
            return tuple(self.preloaded.unknown)

    def begin_snapshot(self) -> tuple[Snapshot, dict[str, PackedRow]]:
        """Begin a snapshot, in which syncs record who changes; return it and discarded rows."""
        with self.lock:
            discarded, self.preloaded.discarded = self.preloaded.discarded, {}
            self.preloaded.snapshot = snapshot = Snapshot(self.position.revision)
        return snapshot, discarded

    def swap_snapshot(self, snapshot: Snapshot) -> bool:
        """Replace the preloaded users by a complete snapshot, if it is still valid."""
        with self.lock:
            return self.preloaded.swap(snapshot)

    def abandon_snapshot(self) -> None:
        """Forget the snapshot that is being read, if there is one."""
        with self.lock:
            self.preloaded.snapshot = None

    # ------------------------------------------------------------------------------------- fork

    def after_fork(self) -> None:
        """In a forked child, replace the lock; drop everything if the parent was writing."""
        if not self._lock.acquire(blocking=False):
            self.deadline = EXPIRED
            self.position = self.position._replace(token=None)
            self._clear()
        self._lock = _fork.ReentrantLock()
