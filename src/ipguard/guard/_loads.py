"""Reading policies: threads that miss on one user at the same moment share one read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ipguard._fork import acquire
from ipguard.guard._cache import Cache, Entry
from ipguard.guard._lease import Lease
from ipguard.guard._table import Table
from ipguard.model import Policy
from ipguard.store import RestrictionStore

_TRIES = 2


class _Load:
    """One read in progress; `done` is held until it ends. Positions are from its beginning."""

    __slots__ = (
        "_began",
        "done",
        "entry",
        "history",
        "leader",
        "revision",
        "slept",
        "started",
        "syncs",
    )

    def __init__(self, started: float, slept: float, lease: Lease) -> None:
        self.started = started
        self.slept = slept
        self.revision = lease.revision
        self.history = lease.history
        self.syncs = lease.syncs
        self.entry: Entry | None = None
        self.leader = threading.get_ident()
        self.done = threading.Lock()
        self.done.acquire()
        self._began = time.monotonic()

    def left(self, patience: float) -> float:
        """Return how long this read may still be waited for; a hanging one gathers no queue."""
        return max(0.0, self._began + patience - time.monotonic())

    def joinable(self, since: float) -> bool:
        """Return whether a caller may wait for this read, if it began after `since`.

        A read that has taken too long to answer anything is not waited for, nor one whose leader
        was interrupted, nor by its own thread: a signal handler may ask during the read.
        """
        leader = self.leader == threading.get_ident()
        return since < self.started and self.done.locked() and not leader

    def current(self, policy: Policy, syncs: int) -> bool:
        """Return whether the policy may be used after `syncs` readings have been applied.

        A policy read ahead of the guard's revision may be of a revision that a failover has lost
        since. A sync applied after the read began cannot name that revision, so it proves nothing
        about the policy.
        """
        return policy.revision <= self.revision or syncs <= self.syncs


class Loads:
    """The policy reads of one guard.

    Attributes:
        count: How many reads were made.
    """

    def __init__(
        self,
        store: RestrictionStore,
        cache: Cache,
        lease: Lease,
        *,
        max_staleness: float,
        monotonic: Callable[[], float],
    ) -> None:
        self.count = 0
        self._store = store
        self._cache = cache
        self._lease = lease
        self._max_staleness = max_staleness
        self._monotonic = monotonic
        self._under_way: dict[str, _Load] = {}

    def forget(self) -> None:
        """Forget the reads in progress: their threads do not exist in a forked child."""
        self._under_way.clear()

    def load(self, name: str, spelling: str, revision: int) -> tuple[Entry, float] | None:
        """Read a user's policy at `revision` or later.

        Args:
            name: The canonical username.
            spelling: How the client's server spelt it.
            revision: The guard's revision when the call began. A policy read before it may be
                older than an answer already given.

        Returns:
            What decides, and the moment from which it may not be used; or None where the store does
            not answer, or not with that revision.
        """
        if self._lease.entered():
            return None
        syncs = self._lease.syncs
        for _ in range(_TRIES):
            now, slept = self._monotonic(), self._lease.wake()
            led: list[_Load] = []
            try:
                with self._lease.lock:
                    # Another thread's read may have ended since the caller looked.
                    entry = self._cache.find(name, spelling, self._lease.revision)
                    if entry is not None and self._lease.revision >= revision:
                        return entry, self._lease.deadline
                    load = self._under_way.get(name)
                    if load is None or not load.joinable(now - self._max_staleness):
                        if self._lease.health.resting():
                            return None
                        load = _Load(now, slept, self._lease)
                        led.append(load)
                        self._under_way[name] = load
                        self.count += 1
                if led:
                    self._read(load, name, spelling)
                else:
                    self._wait(load)
            finally:
                if led:
                    led[0].done.release()
            entry = load.entry
            if entry is None:
                return None
            same_history = load.history == self._lease.history
            if (
                same_history
                and entry.policy.revision >= revision
                and load.current(entry.policy, syncs)
                and not self._lease.slept_since(load.slept)
            ):
                return entry, load.started + self._max_staleness
        return None

    def _wait(self, load: _Load) -> None:
        held: list[bool] = []
        try:
            acquire(load.done, load.left(self._lease.patience), held)
        finally:
            if True in held:
                load.done.release()

    def _read(self, load: _Load, name: str, spelling: str) -> None:
        try:
            policy = self._policy(name)
            entry = self._cache.entry(name, policy)
            self._lease.health.succeeded()
            with self._lease.lock:
                # A policy that the guard has moved past since it was read is not remembered:
                # nothing would ever drop it (the stale fill).
                known, history = self._lease.revision, self._lease.history
                if load.history == history and policy.revision >= known:
                    if load.current(policy, self._lease.syncs):
                        self._cache.put(entry, spelling, ahead=policy.revision > load.revision)
                    else:
                        self._cache.supersede(entry, ahead=True)
            load.entry = entry
        except Exception as exc:
            self._lease.health.failed(exc)
        finally:
            with self._lease.lock:
                if self._under_way.get(name) is load:
                    del self._under_way[name]

    def _policy(self, name: str) -> Policy:
        policy = self._store.load_policy(name)
        if not isinstance(policy.restrictions, tuple):
            raise TypeError("restrictions must be a tuple: None would read as unrestricted")
        return policy

    def read_again(self, name: str, table: Table) -> bool:
        """Read a user's policy for the table alone, and tell whether the store answered."""
        with self._lease.lock:
            revision, history = self._lease.revision, self._lease.history
            if self._lease.health.resting():
                return False
            self.count += 1
        try:
            policy = self._policy(name)
            self._lease.health.succeeded()
        except Exception as exc:
            self._lease.health.failed(exc)
            return False
        with self._lease.lock:
            # At the guard's revision, then as now: else it stays unknown, and is read once more.
            known = self._lease.revision, self._lease.history
            if known == (revision, history) and policy.revision == revision:
                table.put(name, policy, ahead=False)
        return True
