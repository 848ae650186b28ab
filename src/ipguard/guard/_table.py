"""What a guard remembers, in one object: the rows, their position, the deadline, and the lock.

Readers take no lock. They look a canonical username up in `rows`, and compare the clock with a
deadline that they read before. Every write is one operation of `Table`, which locks inside and does
no I/O. Operations that drop rows do so before they move the position, and move the deadline last;
each step is safe to interrupt, as a signal handler that raises does, and to repeat.

Dropping a row only removes it from `rows`. A reader that still holds it may write to its entry, but
no later reader finds that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple, final

from cachetools import FIFOCache

from ipguard import _fork
from ipguard.errors import StoreUnavailable
from ipguard.guard._backlog import Backlog
from ipguard.model import EVERYBODY, RESET, Changes, Touched
from ipguard.row import OPEN, PENDING, is_registered, is_restricted

_log = logging.getLogger("ipguard.guard")

EXPIRED: Final = float("-inf")
_DIVERGED: Final = (
    "the store's history is not the one known up to revision %d (a restored backup, a failover "
    "that lost commits, or pruned changes): everything remembered is dropped, and revision %d "
    "taken over"
)


@final
class Entry:
    """A row, and the address that was allowed last.

    One address only: a client may own 2**64, and most users come from one.

    Attributes:
        row: What decides.
        text: The text of the address that the row listed last, without the time; or None.
    """

    __slots__ = ("row", "text")

    def __init__(self, row: bytes) -> None:
        self.row = row
        self.text: str | None = None


Found = Entry | bytes
"""What a table holds of a user.

Preloaded rows stand there alone: the garbage collector would track each object of a class of ours.
"""

Rows = dict[str, Found]
"""What a table holds, by canonical username."""


def _known(row: bytes) -> bool:
    return is_registered(row) or is_restricted(row)


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
        changed: The users that syncs have named since the read began, or that logins have read
            ahead of the position.
        strangers: Those read ahead who were neither registered nor restricted. They may be any
            number; only those that have a row in the snapshot are read again.
    """

    __slots__ = ("changed", "revision", "rows", "strangers")

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.rows = Rows()
        self.changed: set[str] = set()
        self.strangers: set[str] = set()


class Table:
    """The rows, and everything that is written together with them.

    At most `capacity` users are remembered, but for restricted users of a complete table, which are
    all there. Users are evicted in the order in which they came, since hits do not pass here. Users
    that are neither registered nor restricted are evicted first, so that invented usernames cannot
    push out real ones.

    In a complete table, a user without a row is unrestricted, so a row must never be dropped: it is
    replaced by `PENDING` until the policy was read again.

    Attributes:
        rows: By canonical username. Replaced as a whole, or written under the lock.
        complete: The same dict if every restricted user has a row, so that a user without one is
            unrestricted; else None.
        position: Where the rows stand in the store's history; read with one attribute access.
        deadline: The moment, on the guard's monotonic clock, from which no row may be used.
        synced_at: When the read began that last moved the deadline; None before the first.
        evictions: How many users were evicted.
        pending: The users of a complete table whose policies must be read again.
        snapshot: The snapshot that is being read.
        discarded: The rows of a table that became invalid. The next reader of a snapshot empties
            it in small steps: freeing a million rows at once would stop every thread.
        backlog: The users that syncs dropped, for followers; written under the lock.
    """

    def __init__(self, *, capacity: int, max_staleness: float, deny_unknown: bool) -> None:
        self.rows = Rows()
        self.complete: Rows | None = None
        self.position = Position()
        self.deadline = EXPIRED
        self.synced_at: float | None = None
        self.evictions = 0
        self.snapshot: Snapshot | None = None
        self.discarded = Rows()
        self.backlog = Backlog()
        self.deny_unknown = deny_unknown
        self._capacity = capacity
        self._max_staleness = max_staleness
        self._lock = _fork.ReentrantLock()
        self._clear()

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

    def find(self, name: str) -> bytes | None:
        """Return a user's row, or None if the policy must be read."""
        rows = self.rows
        found = rows.get(name)
        if type(found) is Entry:
            return found.row
        if found is None:
            # In this order: rows that are no longer complete are emptied later.
            return OPEN if rows is self.complete and not self.deny_unknown else None
        return None if found is PENDING else found

    def look(self, name: str) -> tuple[float, int, int, bytes | None]:
        """Look a user up.

        Returns:
            The deadline, the table's revision, the revision that the row rests on, and the row. The
            row was in the table at that revision, and before that deadline.
        """
        while True:
            until, position = self.deadline, self.position
            row = self.find(name)
            held = position.revision
            if self._ahead:
                held = self.revision_of(name, held)
            # Every sync makes a new position, and a row that is ahead is put in after its revision.
            # So if another thread has changed either, read them again.
            if self.position is position and self.find(name) is row:
                return until, position.revision, held, row

    def note(self, name: str, row: bytes, address: str) -> None:
        """Note an address that a user's row lists at any time, for the fast path."""
        entry = self.rows.get(name)
        # A subclass of str may compare as it likes.
        if type(entry) is Entry and entry.row is row and type(address) is str:
            entry.text = address

    def revision_of(self, name: str, revision: int) -> int:
        """Return the revision that a user's row rests on, if the table was at `revision`."""
        return max(revision, self._ahead.get(name, 0))

    def remember(self, name: str, row: bytes, revision: int, began: Position) -> None:
        """Keep a row that was read at `revision`, since the table was at the position `began`.

        It is not kept if a sync has moved the position past it (the stale fill), or if it may be of
        a history that was lost. If it is ahead of `began`, the next sync drops it. The reads of one
        user must come in the order in which they began.
        """
        with self.lock:
            position = self.position
            if began.history == position.history and revision >= position.revision:
                self._drop(name)
                kept = began.covers(revision, position.syncs)
                if revision > began.revision:
                    self._note_ahead(name, row, revision, kept=kept)
                else:
                    self._ahead.pop(name, None)
                if kept:
                    self._keep(name, row)

    def refresh(self, name: str, row: bytes, revision: int, began: Position, rows: Rows) -> None:
        """Replace a pending row, if the new one is of the table's own revision.

        Not if a login was answered ahead of it: its next answer must not be an older one. Of users
        who are not pending that may be forgotten, and it is forgotten if other rows than `rows`,
        those when the read began, were swapped in.
        """
        with self.lock:
            now = self.position
            same = (now.revision, now.history) == (began.revision, began.history)
            same = same and self.rows is rows
            wanted = name in self.pending and name not in self._ahead
            if same and revision == now.revision and wanted:
                self._drop(name)
                self._keep(name, row)

    def _note_ahead(self, name: str, row: bytes, revision: int, *, kept: bool) -> None:
        if kept or name in self.pending:
            self._ahead[name] = revision
        if self.snapshot is not None:  # it is older
            (self.snapshot.changed if _known(row) else self.snapshot.strangers).add(name)

    def _keep(self, name: str, row: bytes) -> None:
        complete = self.complete is not None
        self.pending.discard(name)
        if complete and is_restricted(row):
            self.rows[name] = row
        elif complete and not self.deny_unknown and name not in self._ahead:
            self.rows.pop(name, None)
        else:
            self._keep_bounded(name, row)

    def _keep_bounded(self, name: str, row: bytes) -> None:
        try:
            (self._users if _known(row) else self._strangers)[name] = None
            self.rows[name] = Entry(row)
            while len(self._users) + len(self._strangers) > self._capacity:
                oldest, _ = (self._strangers or self._users).popitem()
                self._drop(oldest)
                self.evictions += 1
        except BaseException:
            self._clear()  # a signal handler raised: cachetools may be inconsistent
            raise

    def _drop_changed(self, usernames: frozenset[str]) -> None:
        if self.snapshot is not None:
            self.snapshot.changed.update(usernames)
        # A row that was read ahead of the position goes too. The store names what changed since the
        # position; it cannot tell that the later revision is still in its history.
        for name in (*usernames, *self._ahead):
            self._drop(name)
        self._ahead.clear()

    def _drop(self, name: str) -> None:
        bounded = type(self.rows.get(name)) is Entry
        if self.complete is None or (bounded and self.deny_unknown):
            self.rows.pop(name, None)  # an absent user is loaded
        else:
            self.pending.add(name)
            self.rows[name] = PENDING
        if bounded:
            try:
                self._users.pop(name, None)
                self._strangers.pop(name, None)
            except BaseException:
                self._clear()  # as in `_keep_bounded`
                raise
        if name not in self.pending:  # else `refresh` needs to know, after an eviction
            self._ahead.pop(name, None)

    def _clear(self) -> None:
        """Drop all rows, and abandon a snapshot that is being read."""
        self.snapshot = None
        if self.complete is not None:
            self.discarded, self.complete = self.complete, None
        self.rows = Rows()
        self.pending: set[str] = set()
        self._ahead: dict[str, int] = {}
        self._users: FIFOCache[str, None] = FIFOCache(self._capacity + 1)
        self._strangers: FIFOCache[str, None] = FIFOCache(self._capacity + 1)

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
                self._drop_changed(usernames)
            # A first sync names no users; some may have changed since the followers were added.
            self.backlog.add(EVERYBODY if known.token is None else usernames, head)
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

    # --------------------------------------------------------------------------- the complete table

    def count(self) -> tuple[int, int | None]:
        """Return how many users have a row, and how many of them were preloaded."""
        rows = self.rows
        loaded = len(self._users) + len(self._strangers)
        return len(rows), None if self.complete is None else len(rows) - loaded

    def begin_snapshot(self) -> tuple[Snapshot, Rows]:
        """Begin a snapshot, in which syncs record who changes; return it and discarded rows."""
        with self.lock:
            discarded, self.discarded = self.discarded, Rows()
            self.snapshot = snapshot = Snapshot(self.position.revision)
        return snapshot, discarded

    def swap_snapshot(self, snapshot: Snapshot) -> bool:
        """Replace all rows by a snapshot that was read to its end, if it is still valid."""
        with self.lock:
            if self.snapshot is not snapshot:
                return False
            rows = snapshot.rows
            snapshot.changed |= rows.keys() & snapshot.strangers
            for name in snapshot.changed:
                rows[name] = PENDING
            self._clear()
            self.pending = snapshot.changed
            self.rows = self.complete = rows
        return True

    def abandon_snapshot(self) -> None:
        """Forget the snapshot that is being read, if there is one."""
        with self.lock:
            self.snapshot = None

    # ------------------------------------------------------------------------------------- fork

    def after_fork(self) -> None:
        """In a forked child, replace the lock; drop everything if the parent was writing."""
        if not self._lock.acquire(blocking=False):
            self.deadline = EXPIRED
            self.position = self.position._replace(token=None)
            self._clear()
        self._lock = _fork.ReentrantLock()
