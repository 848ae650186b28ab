"""The slow path: decide from the table, else after one sync and one read, each bounded in time.

Threads that miss on the same user share one read of its policy (single flight).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Literal

import attrs

from ipguard import _fork
from ipguard.addresses import pack_address
from ipguard.errors import UsernameError
from ipguard.guard._lease import Lease
from ipguard.guard._table import Position, Table
from ipguard.model import Decision, Reason
from ipguard.row import TEMPORARY, checked, decide
from ipguard.store import RestrictionStore, row_loader
from ipguard.usernames import canonical_username

_TRIES: Final = 2
_UNRESTRICTED: Final = Reason.UNRESTRICTED  # a look-up in the enumeration takes longer


class SlowPath:
    """Decides what the fast path leaves open, for one guard."""

    def __init__(
        self,
        store: RestrictionStore,
        table: Table,
        lease: Lease,
        loads: SingleFlight,
        *,
        outage_grace: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._table = table
        self._lease = lease
        self._loads = loads
        self._outage_grace = outage_grace
        self._monotonic = monotonic

    def _parse(
        self, username: str, address: str
    ) -> tuple[str, bytes] | Literal[Reason.BAD_USERNAME, Reason.BAD_ADDRESS]:
        """Return the canonical username and the packed address; or why not."""
        if type(username) is str and username in self._table.rows:
            name = username
        else:
            try:
                name = canonical_username(username)
            except UsernameError:
                return Reason.BAD_USERNAME
        client = pack_address(address)
        return Reason.BAD_ADDRESS if client is None else (name, client)

    def recall(
        self, username: str, address: str, at_least: int | None, *, refuse: bool | None = None
    ) -> Decision | None:
        """Decide without I/O and without waiting, as for an event loop.

        Args:
            username: As for `Guard.check`.
            address: As for `Guard.check`.
            at_least: As for `Guard.check`.
            refuse: Deny what takes a sync or a read. None: if the circuit breaker is open.

        Returns:
            The decision, or None if it takes a sync or a read, and those are not refused.
        """
        parsed = self._parse(username, address)
        if not isinstance(parsed, tuple):
            return self.denied(parsed)
        name, client = parsed
        wanted = 0 if at_least is None else at_least
        until, revision, held, row = self._table.look(name)
        if row is not None and revision >= wanted:
            decision = self._decide(row, client, until, held)
            if decision is not None:
                return decision
        if self._lease.breaker.is_open() if refuse is None else refuse:
            return self._in_grace(name, client, wanted)
        return None

    def answer(self, username: str, address: str, at_least: int | None) -> Decision:
        """Decide, with at most one sync and one read if something is missing."""
        if self._table.entered():  # a signal handler, while this thread is writing the table
            return self.recall(username, address, at_least, refuse=True)  # type: ignore[return-value]
        parsed = self._parse(username, address)
        if not isinstance(parsed, tuple):
            return self.denied(parsed)
        name, client = parsed
        wanted = 0 if at_least is None else at_least
        for _ in range(_TRIES):
            if not self._lease.ensure(wanted):
                return self._in_grace(name, client, wanted)
            until, revision, held, row = self._table.look(name)
            if revision < wanted:
                break  # the guard has just adopted another history
            if row is None:
                loaded = self._loads.load(name, revision)
                if loaded is None:
                    break
                row, until, held = loaded
            decision = self._decide(row, client, until, held)
            if decision is not None:
                if decision.allowed and not row[0] & TEMPORARY:
                    self._table.note(name, row, address)
                return decision
        return self.denied(Reason.STORE_UNAVAILABLE)

    def _decide(self, row: bytes, client: bytes, until: float, revision: int) -> Decision | None:
        """Decide by a row that was found after `until` was read; None if that is over by now."""
        reason, listed_by = decide(row, client, self._store.now() if row[0] & TEMPORARY else None)
        if self._monotonic() >= until:
            return None
        return Decision(
            allowed=listed_by is not None or reason is _UNRESTRICTED,
            reason=reason,
            revision=revision,
            restriction_id=listed_by,
        )

    def _in_grace(self, name: str, client: bytes, wanted: int) -> Decision:
        """Decide from the table within `outage_grace` seconds after the deadline."""
        until, revision, held, row = self._table.look(name)
        if row is None or revision < wanted:
            return self.denied(Reason.STORE_UNAVAILABLE)
        decision = self._decide(row, client, until + self._outage_grace, held)
        if decision is None:
            return self.denied(Reason.STORE_UNAVAILABLE)
        # Another thread may have renewed the lease by now: the decision is not stale then.
        return attrs.evolve(decision, stale=self._monotonic() >= until)

    def denied(self, reason: Reason) -> Decision:
        """Return a denial that rests on no policy."""
        return Decision(allowed=False, reason=reason, revision=self._table.position.revision)


class _Load:
    """One read in progress; `done` is locked until it ends."""

    __slots__ = ("_began", "done", "leader", "position", "revision", "row", "slept", "started")

    def __init__(self, started: float, slept: float, position: Position) -> None:
        self.started = started
        self.slept = slept
        self.position = position
        self.row: bytes | None = None
        self.revision = 0
        self.leader = threading.get_ident()
        self.done = threading.Lock()
        self.done.acquire()
        self._began = time.monotonic()

    def left(self, patience: float) -> float:
        """Return how long to wait for this read, in seconds, so that no queue forms behind it."""
        return max(0.0, self._began + patience - time.monotonic())

    def joinable(self, since: float) -> bool:
        """Return whether a caller may wait for this read, if it began after `since`.

        Not if it has taken too long to be of use, if its leader was interrupted, or if its leader
        is this thread: a signal handler may call the guard during the read.
        """
        own = self.leader == threading.get_ident()
        return since < self.started and self.done.locked() and not own


class SingleFlight:
    """Reads policies; threads that miss on the same user share one read.

    The reads in flight are written under the table's lock, so that a miss looks at both at once.

    Attributes:
        count: How many reads were made.
    """

    def __init__(
        self,
        store: RestrictionStore,
        table: Table,
        lease: Lease,
        *,
        max_staleness: float,
        monotonic: Callable[[], float],
    ) -> None:
        self.count = 0
        self._load_row = row_loader(store)
        self._table = table
        self._lease = lease
        self._max_staleness = max_staleness
        self._monotonic = monotonic
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the reads in progress, whose threads do not exist in a forked child."""
        self._in_flight: dict[str, _Load] = {}

    def load(self, name: str, revision: int) -> tuple[bytes, float, int] | None:
        """Read a user's policy at `revision` or later.

        Args:
            name: The canonical username.
            revision: The table's revision when the call began. A policy from before it may be
                older than an answer that was already given.

        Returns:
            The row, the moment from which it may not be used, and its revision; or None if the
            store does not answer, or not with that revision.
        """
        syncs = self._table.position.syncs
        for _ in range(_TRIES):
            now, slept = self._monotonic(), self._lease.notice_sleep()
            led: list[_Load] = []
            try:
                with self._table.lock:
                    # Another thread's read may have ended since the caller looked.
                    row, held = self._table.find(name), self._table.position.revision
                    if row is not None and held >= revision:
                        held = self._table.revision_of(name, held)
                        return row, self._table.deadline, held
                    load = self._in_flight.get(name)
                    if load is None or not load.joinable(now - self._max_staleness):
                        if self._lease.breaker.is_open():
                            return None
                        load = _Load(now, slept, self._table.position)
                        led.append(load)
                        self._in_flight[name] = load
                        self.count += 1
                if led:
                    self._read(load, name)
                else:
                    self._wait(load)
            finally:
                if led:
                    led[0].done.release()
            row = load.row
            if row is None:
                return None
            if (
                load.position.history == self._table.position.history
                and load.revision >= revision
                and load.position.covers(load.revision, syncs)
                and not self._lease.slept_since(load.slept)
            ):
                return row, load.started + self._max_staleness, load.revision
        return None

    def _wait(self, load: _Load) -> None:
        held: list[bool] = []
        try:
            _fork.acquire(load.done, load.left(self._lease.patience), held)
        finally:
            if True in held:
                load.done.release()

    def _read(self, load: _Load, name: str) -> None:
        try:
            row, load.revision = self._row(name)
            with self._table.lock:
                # Else a younger read has begun, and a newer answer may have been given by now.
                if self._in_flight.get(name) is load:
                    self._table.remember(name, row, load.revision, load.position)
            load.row = row
        except Exception as exc:
            self._lease.breaker.record_failure(exc)
        finally:
            with self._table.lock:
                if self._in_flight.get(name) is load:
                    del self._in_flight[name]

    def _row(self, name: str) -> tuple[bytes, int]:
        revision, data = self._load_row(name)
        row = checked(data, deny_unknown=self._table.deny_unknown)
        self._lease.breaker.record_success()
        return row, revision

    def read_again(self, name: str) -> bool:
        """Read the policy of a pending user, and return whether the store answered."""
        began, rows = self._table.position, self._table.rows
        if self._lease.breaker.is_open():
            return False
        with self._table.lock:
            self.count += 1
        try:
            row, revision = self._row(name)
        except Exception as exc:
            self._lease.breaker.record_failure(exc)
            return False
        # If the revision has moved, the user stays pending and is read once more.
        self._table.refresh(name, row, revision, began, rows)
        return True
