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
from ipguard.addresses import AddressRange, login_address
from ipguard.errors import UsernameError
from ipguard.guard._lease import Lease
from ipguard.guard._table import Position, Row, Table
from ipguard.model import Decision, Policy, Reason
from ipguard.rules import decide
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username

_TRIES: Final = 2


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
        deny_unknown: bool,
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._table = table
        self._lease = lease
        self._loads = loads
        self._outage_grace = outage_grace
        self._deny_unknown = deny_unknown
        self._monotonic = monotonic

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
        parsed = _parse(username, address)
        if not isinstance(parsed, tuple):
            return self.denied(parsed)
        name, spelling, client = parsed
        wanted = 0 if at_least is None else at_least
        until, revision = self._table.deadline, self._table.position.revision  # as in `answer`
        row = self._table.find(name, spelling)
        if row is not None and revision >= wanted:
            decision = self._decide(row, client, until, revision)
            if decision is not None:
                return decision
        if self._lease.breaker.is_open() if refuse is None else refuse:
            return self._in_grace(name, spelling, client, wanted)
        return None

    def answer(self, username: str, address: str, at_least: int | None) -> Decision:
        """Decide, with at most one sync and one read if something is missing."""
        if self._table.entered():  # a signal handler, while this thread is writing the table
            return self.recall(username, address, at_least, refuse=True)  # type: ignore[return-value]
        parsed = _parse(username, address)
        if not isinstance(parsed, tuple):
            return self.denied(parsed)
        name, spelling, client = parsed
        wanted = 0 if at_least is None else at_least
        for _ in range(_TRIES):
            if not self._lease.ensure(wanted):
                return self._in_grace(name, spelling, client, wanted)
            # In this order: a row that is found after the revision was read is current to it.
            until, revision = self._table.deadline, self._table.position.revision
            if revision < wanted:
                break  # the guard has just adopted another history
            row = self._table.find(name, spelling)
            if row is None:
                loaded = self._loads.load(name, spelling, revision)
                if loaded is None:
                    break
                row, until = loaded
            decision = self._decide(row, client, until, revision)
            if decision is not None:
                return decision
        return self.denied(Reason.STORE_UNAVAILABLE)

    def _decide(
        self, row: Row, client: AddressRange, until: float, revision: int
    ) -> Decision | None:
        """Decide by a row that was found after `until` was read; None if that is over by now."""
        decision = decide(row.policy, client, self._store.now(), deny_unknown=self._deny_unknown)
        if self._monotonic() < until:
            return attrs.evolve(decision, revision=max(decision.revision, revision))
        return None

    def _in_grace(self, name: str, spelling: str, client: AddressRange, wanted: int) -> Decision:
        """Decide from the table within `outage_grace` seconds after the deadline."""
        until, revision = self._table.deadline, self._table.position.revision
        row = self._table.find(name, spelling)
        if row is None or revision < wanted:
            return self.denied(Reason.STORE_UNAVAILABLE)
        decision = self._decide(row, client, until + self._outage_grace, revision)
        if decision is None:
            return self.denied(Reason.STORE_UNAVAILABLE)
        # Another thread may have renewed the lease by now: the decision is not stale then.
        return attrs.evolve(decision, stale=self._monotonic() >= until)

    def denied(self, reason: Reason) -> Decision:
        """Return a denial that rests on no policy."""
        return Decision(allowed=False, reason=reason, revision=self._table.position.revision)


def _parse(
    username: str, address: str
) -> tuple[str, str, AddressRange] | Literal[Reason.BAD_USERNAME, Reason.BAD_ADDRESS]:
    """Return the canonical username, the spelling to index, and the address; or why not."""
    try:
        name = canonical_username(username)
    except UsernameError:
        return Reason.BAD_USERNAME
    found = login_address(address)
    if found is None:
        return Reason.BAD_ADDRESS
    version, value = found
    client = AddressRange(version=version, first=value, last=value)
    # A subclass of str may hash and compare differently, so it must not be a key.
    return name, username if type(username) is str else name, client


class _Load:
    """One read in progress; `done` is locked until it ends."""

    __slots__ = ("_began", "done", "leader", "position", "row", "slept", "started")

    def __init__(self, started: float, slept: float, position: Position) -> None:
        self.started = started
        self.slept = slept
        self.position = position
        self.row: Row | None = None
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
        self._store = store
        self._table = table
        self._lease = lease
        self._max_staleness = max_staleness
        self._monotonic = monotonic
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the reads in progress, whose threads do not exist in a forked child."""
        self._in_flight: dict[str, _Load] = {}

    def load(self, name: str, spelling: str, revision: int) -> tuple[Row, float] | None:
        """Read a user's policy at `revision` or later.

        Args:
            name: The canonical username.
            spelling: The username as the host spelt it.
            revision: The table's revision when the call began. A policy from before it may be
                older than an answer that was already given.

        Returns:
            The row and the moment from which it may not be used; or None if the store does not
            answer, or not with that revision.
        """
        syncs = self._table.position.syncs
        for _ in range(_TRIES):
            now, slept = self._monotonic(), self._lease.notice_sleep()
            led: list[_Load] = []
            try:
                with self._table.lock:
                    # Another thread's read may have ended since the caller looked.
                    row = self._table.lookup(name, spelling)
                    if row is not None and self._table.position.revision >= revision:
                        return row, self._table.deadline
                    load = self._in_flight.get(name)
                    if load is None or not load.joinable(now - self._max_staleness):
                        if self._lease.breaker.is_open():
                            return None
                        load = _Load(now, slept, self._table.position)
                        led.append(load)
                        self._in_flight[name] = load
                        self.count += 1
                if led:
                    self._read(load, name, spelling)
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
                and row.policy.revision >= revision
                and load.position.covers(row.policy.revision, syncs)
                and not self._lease.slept_since(load.slept)
            ):
                return row, load.started + self._max_staleness
        return None

    def _wait(self, load: _Load) -> None:
        held: list[bool] = []
        try:
            _fork.acquire(load.done, load.left(self._lease.patience), held)
        finally:
            if True in held:
                load.done.release()

    def _read(self, load: _Load, name: str, spelling: str) -> None:
        try:
            policy = self._policy(name)
            load.row = self._table.remember(name, spelling, policy, load.position)
        except Exception as exc:
            self._lease.breaker.record_failure(exc)
        finally:
            with self._table.lock:
                if self._in_flight.get(name) is load:
                    del self._in_flight[name]

    def _policy(self, name: str) -> Policy:
        policy = self._store.load_policy(name)
        if not isinstance(policy.restrictions, tuple):
            raise TypeError("restrictions must be a tuple: None would read as unrestricted")
        self._lease.breaker.record_success()
        return policy

    def read_again(self, name: str) -> bool:
        """Read a preloaded user's policy, and return whether the store answered."""
        began = self._table.position
        if self._lease.breaker.is_open():
            return False
        with self._table.lock:
            self.count += 1
        try:
            policy = self._policy(name)
        except Exception as exc:
            self._lease.breaker.record_failure(exc)
            return False
        # If the revision has moved, the user stays unknown and is read once more.
        self._table.refresh(name, policy, began)
        return True
