"""The lease: until when the table may answer, and the syncs that renew it.

A reader takes the table's deadline, looks up what it needs, then compares the clock with the
deadline that it took. A sync reads what changed and applies it to the table, which moves the
deadline last: a reader that sees the new deadline cannot see what the sync dropped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from ipguard._backoff import Backoff
from ipguard._fork import ReentrantLock, acquire
from ipguard.errors import StoreUnavailable
from ipguard.guard._table import EXPIRED, Table
from ipguard.store import RestrictionStore

_log = logging.getLogger("ipguard.guard")

_PATIENCE: Final = 2.0
_SLEEP_NOTICED: Final = 0.01


def time_asleep() -> float:
    """Return how many seconds this machine has slept since it booted, if the system says so."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    # In this order, a thread that is paused between the clocks reads too much, never too little.
    awake = time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - awake


class CircuitBreaker:
    """Opens for a while after each failure of the store, and closes after a success.

    It logs when the store stops or resumes answering, not each failure.

    Attributes:
        error: The last failure; None after a success.
        failures: How many calls have failed in a row.
        errors: How many calls have failed.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._backoff = Backoff(0.1, 1.0)
        self._pause = 0.0
        self._retry_at = EXPIRED
        self.error: Exception | None = None
        self.failures = 0
        self.errors = 0
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock, which a thread of the parent may hold in a forked child."""
        self._lock = ReentrantLock()

    def is_open(self) -> bool:
        """Return whether the last failure is so recent that the store must not be called."""
        return self._monotonic() < self._retry_at

    def record_failure(self, error: Exception) -> None:
        """Open after a call that failed."""
        with self._lock:
            before, self.error = self.error, error
            self.failures += 1
            self.errors += 1
            if not self.is_open():  # else this call began before the breaker opened
                self._pause = self._backoff.next()
            self._retry_at = self._monotonic() + self._pause
        if before is None:
            _log.warning("the store does not answer: %s: %s", type(error).__name__, error)

    def record_success(self) -> None:
        """Close after a call that succeeded."""
        if self.error is None:
            return
        with self._lock:
            failures, self.failures = self.failures, 0
            self.error = None
            self._backoff.reset()
            self._retry_at = EXPIRED
        _log.warning("the store answers again after %d failures", failures)


class Lease:
    """Renews the deadline of one guard's table.

    Attributes:
        breaker: The circuit breaker for all calls of this guard to the store.
        patience: How long others wait for one thread's call to the store, in seconds, so that no
            queue forms behind a store that hangs.
    """

    def __init__(
        self,
        store: RestrictionStore,
        table: Table,
        *,
        max_staleness: float,
        monotonic: Callable[[], float],
        asleep: Callable[[], float],
    ) -> None:
        self.breaker = CircuitBreaker(monotonic)
        self.patience = min(max_staleness / 2, _PATIENCE)
        self._store = store
        self._table = table
        self._monotonic = monotonic
        self._asleep = asleep
        self._slept = min(asleep(), asleep(), asleep())
        self._helper: threading.Thread | None = None
        self._renew_locks()

    def _renew_locks(self) -> None:
        self._turn = threading.Lock()
        self._turn_since: float | None = None
        self._turn_owner: int | None = None
        self._helper_lock = ReentrantLock()

    def after_fork(self) -> None:
        """Replace the locks, which threads of the parent may hold in a forked child."""
        self._renew_locks()
        self.breaker.renew_lock()

    def is_running(self) -> bool:
        """Return whether the deadline is in the future."""
        return self._monotonic() < self._table.deadline

    def _holds(self, revision: int) -> bool:
        return self.is_running() and self._table.position.revision >= revision

    def ensure(self, revision: int) -> bool:
        """Make the lease run at a revision or later, with at most one sync on this thread.

        Returns:
            Whether it does. If not, the store does not answer, or has not reached that revision.
        """
        if self._holds(revision):
            return True
        # A signal handler that runs in the middle of this thread's own sync must not wait for it.
        if self._turn_owner == threading.get_ident() or self.breaker.is_open():
            return False
        turn, held = self._turn, list[bool]()
        # Wait until the sync in progress has lasted `patience`, not for `patience` from each
        # arrival: behind one that hangs, later callers are answered at once.
        since = self._turn_since
        left = self.patience if since is None else since + self.patience - time.monotonic()
        try:
            if not acquire(turn, left, held):
                return False
            self._turn_since, self._turn_owner = time.monotonic(), threading.get_ident()
            # The thread that had the turn before may have renewed the lease, or found no store.
            if not self._holds(revision) and not self.breaker.is_open():
                self.sync()
            return self._holds(revision)
        except StoreUnavailable:
            return False
        finally:
            if True in held:
                self._turn_since = self._turn_owner = None
                turn.release()

    def sync(self) -> None:
        """Read what changed, apply it, and renew the lease from the moment when the read began.

        Raises:
            StoreUnavailable: The store did not answer; the lease is as it was.
        """
        if self._table.entered():
            raise StoreUnavailable("the guard was called again by the thread that is writing it")
        begun = self._monotonic()
        while True:
            cursor = self._table.position.cursor
            started = self._monotonic()
            slept = self.notice_sleep()
            try:
                changes = self._store.changes_since(cursor)
                has_slept = partial(self.slept_since, slept)
                applied = self._table.apply(cursor, changes, started, has_slept)
            except Exception as exc:
                self.breaker.record_failure(exc)
                raise StoreUnavailable(f"the store does not answer: {exc}") from exc
            self.breaker.record_success()
            if applied:
                return
            # Another sync moved the position during this read, or the machine slept, so that the
            # age of the read is unknown. Read again from the new position.
            if self._monotonic() - begun > self.patience:
                raise StoreUnavailable("no sync came to an end in time")

    def sync_within(self, seconds: float) -> None:
        """Sync on a helper thread, and wait for it for at most `seconds`.

        The store's own time limits may be longer. One helper runs at a time, so that no threads
        gather behind a store that hangs. A failure is recorded as that of any sync.
        """
        with self._helper_lock:
            if self._helper is None or not self._helper.is_alive():
                helper = threading.Thread(target=self.try_sync, name="ipguard-sync", daemon=True)
                try:
                    helper.start()
                except RuntimeError:
                    _log.debug("no thread to sync on", exc_info=True)
                    return
                self._helper = helper
            helper = self._helper
        helper.join(max(0.0, seconds))

    def try_sync(self) -> None:
        """Sync; the breaker has recorded and logged a failure."""
        with contextlib.suppress(StoreUnavailable):
            self.sync()

    def wait(self, seconds: float) -> bool:
        """Wait until the store has a newer change, and return whether it has.

        If the store cannot report changes, wait for the full time, so that loops do not spin.
        """
        until = time.monotonic() + seconds
        try:
            woken = self._store.wait(self._table.position.revision, seconds)
        except Exception:
            _log.debug("waiting for changes failed", exc_info=True)
            woken = False
        if not woken:
            threading.Event().wait(max(0.0, until - time.monotonic()))
        return woken

    def notice_sleep(self) -> float:
        """End the lease if the machine has slept: the monotonic clock stood still.

        Returns:
            How long the machine has slept since it booted, in seconds.
        """
        slept = self._asleep()
        if slept - self._slept > _SLEEP_NOTICED:
            # Unless the thread was paused between the clocks; the lowest of three counts.
            slept = min(slept, self._asleep(), self._asleep())
        if slept - self._slept > _SLEEP_NOTICED:
            self._table.expire()
            self._slept = slept
        return slept

    def slept_since(self, slept: float) -> bool:
        """Return whether the machine has slept since `notice_sleep` returned `slept`."""
        return self.notice_sleep() - slept > _SLEEP_NOTICED
