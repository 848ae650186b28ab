"""The lease: until when a guard may answer from what it remembers, and how that is renewed.

The lease is one moment of a monotonic clock. A reader takes it, looks up what it needs, then tests
the clock against the moment that it took. A renewal drops what has changed, then moves the
revision, then the moment. In that order, whoever sees the new moment cannot see what was dropped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from ipguard import _fork
from ipguard._fork import ReentrantLock, acquire
from ipguard.errors import StoreUnavailable
from ipguard.guard._cache import Cache
from ipguard.model import RESET, Changes, Touched
from ipguard.store import RestrictionStore

_log = logging.getLogger("ipguard.guard")

_OVER: Final = float("-inf")
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
_PATIENCE: Final = 2.0
_SLEEP_NOTICED: Final = 0.01
_DIVERGED: Final = (
    "the store's history is not the one known up to revision %d (a restored backup, a failover "
    "that lost commits, or pruned changes): everything remembered is dropped, and revision %d "
    "taken over"
)


def time_asleep() -> float:
    """Return how many seconds this machine has slept since it booted, where the system tells."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    # A thread that is paused between the two clocks sees too little; the most of three is right.
    return max(
        time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
        for _ in range(3)
    )


class Health:
    """How the store has been doing: after a failure, no attempt for a while.

    Logged when it changes, not at each failure: an outage is one line, not one a second.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._pause = 0.0
        self._retry_at = _OVER
        self.error: Exception | None = None
        self.failures = 0
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock, as `Lease.renew_locks` does."""
        self._lock = ReentrantLock()

    def resting(self) -> bool:
        """Tell whether the last failure is so recent that another attempt would only queue."""
        return self._monotonic() < self._retry_at

    def failed(self, error: Exception) -> None:
        """Note a failure; the pause doubles from 100 ms to 1 s."""
        with self._lock:
            before, self.error = self.error, error
            self.failures += 1
            if not self.resting():  # else it was under way together with one that failed already
                self._pause = min(self._pause * 2 or _FIRST_PAUSE, _LONGEST_PAUSE)
            self._retry_at = self._monotonic() + self._pause
        if before is None:
            _log.warning("the store does not answer: %s: %s", type(error).__name__, error)

    def succeeded(self) -> None:
        """Note that the store answered."""
        if self.error is None:
            return
        with self._lock:
            failures, self.failures = self.failures, 0
            self.error = None
            self._pause = 0.0
            self._retry_at = _OVER
        _log.warning("the store answers again after %d failures", failures)


class Lease:
    """The lease of one guard, and the position in the store's history that it stands on.

    Attributes:
        deadline: The moment, on the guard's monotonic clock, from which nothing remembered may be
            used.
        revision: The revision up to which everything remembered is known to be current.
        history: A number that changes when the store turns out to have another history: a policy
            that was being read meanwhile may be of the old one.
        syncs: How many readings have been applied. A reading names the changes after the guard's
            revision only, so it cannot name a revision ahead of it that a failover has lost.
        synced_at: When the read that last renewed the lease began.
    """

    def __init__(
        self,
        store: RestrictionStore,
        cache: Cache,
        *,
        max_staleness: float,
        monotonic: Callable[[], float],
        asleep: Callable[[], float],
    ) -> None:
        self.deadline = _OVER
        self.revision = 0
        self.history = 0
        self.syncs = 0
        self.synced_at: float | None = None
        self.health = Health(monotonic)
        # Others wait for a sync no longer than this, so a hanging store does not gather a queue.
        self.patience = min(max_staleness / 2, _PATIENCE)
        self._token: str | None = None
        self._store = store
        self._cache = cache
        self._max_staleness = max_staleness
        self._monotonic = monotonic
        self._asleep = asleep
        self._slept = asleep()
        self._helper: threading.Thread | None = None
        self.renew_locks()

    @property
    def lock(self) -> ReentrantLock:
        """The guard's lock, held while the cache or the lease is written, and never during I/O."""
        _fork.check()
        return self._lock

    def renew_locks(self) -> None:
        """Replace the locks, which threads of the parent may hold in a forked child."""
        self._lock = ReentrantLock()
        self._turn = threading.Lock()
        self._turn_since: float | None = None
        self._turn_owner: int | None = None
        self.health.renew_lock()

    def after_fork_in_child(self) -> None:
        """Replace the locks; forget everything if the parent was in the middle of writing it."""
        if not self._lock.acquire(blocking=False):
            self.deadline = _OVER
            self._token = None
            self._cache.clear()
        self.renew_locks()

    def entered(self) -> bool:
        """Return whether this thread holds the lock.

        Then a signal handler, a finalizer or a logging handler asks the guard while the same thread
        is writing what the guard remembers. It must not write in between, nor wait for itself.
        """
        return self._lock.owned()

    def hold(self, revision: int) -> bool:
        """Make sure that the lease runs and stands at a revision, with one inline sync at the most.

        Returns:
            Whether it does. Where not, the store does not answer, or is not there itself.
        """
        if self._holds(revision):
            return True
        if self.entered() or self._turn_owner == threading.get_ident() or self.health.resting():
            return False
        turn, held = self._turn, list[bool]()
        # A sync in progress is waited for until it has lasted `patience`, not for as long from each
        # arrival: behind one that hangs, later callers are answered at once.
        since = self._turn_since
        left = self.patience if since is None else since + self.patience - time.monotonic()
        try:
            if not acquire(turn, left, held):
                return False
            self._turn_since, self._turn_owner = time.monotonic(), threading.get_ident()
            # Whoever had the turn before may have renewed the lease, or found the store down.
            if not self._holds(revision) and not self.health.resting():
                self.sync()
        except StoreUnavailable:
            return False
        finally:
            if True in held:
                self._turn_since = self._turn_owner = None
                turn.release()
        return self._holds(revision)

    def runs(self) -> bool:
        """Tell whether the lease has not ended."""
        return self._monotonic() < self.deadline

    def _holds(self, revision: int) -> bool:
        return self.runs() and self.revision >= revision

    def sync(self) -> None:
        """Read what changed, drop it, and renew the lease from the moment at which the read began.

        Raises:
            StoreUnavailable: The store did not answer; the lease is as it was.
        """
        if self.entered():
            raise StoreUnavailable("the guard was called again by the thread that is writing it")
        begun = self._monotonic()
        while True:
            cursor = self._cursor()
            started = self._monotonic()
            slept = self.wake()
            try:
                changes = self._store.changes_since(cursor)
                applied = self._apply(cursor, changes, started, slept)
            except Exception as exc:
                self.health.failed(exc)
                raise StoreUnavailable(f"the store does not answer: {exc}") from exc
            if applied:
                return
            # Another sync moved the position while this one read. What lies between is not known to
            # be one history, so this reading is not used; the next begins where the other ended.
            # Or the machine slept, and how old the reading is by now nobody can tell.
            if self._monotonic() - begun > self.patience:
                raise StoreUnavailable("no sync came to an end in time")

    def sync_within(self, seconds: float) -> None:
        """Sync on a helper thread, and wait for it for at most `seconds`.

        The store's own time limits may be longer than the caller's. One helper runs at a time: a
        store that hangs gathers no threads. A failure is counted and logged as that of any sync.
        """
        with self.lock:
            if self._helper is None or not self._helper.is_alive():
                helper = threading.Thread(target=self._try_sync, name="ipguard-sync", daemon=True)
                try:
                    helper.start()
                except RuntimeError:
                    _log.debug("no thread to sync on", exc_info=True)
                    return
                self._helper = helper
            helper = self._helper
        helper.join(max(0.0, seconds))

    def _try_sync(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            self.sync()

    def wait(self, seconds: float) -> bool:
        """Wait until the store has a change that the guard has not, and tell whether it has.

        A store that cannot tell is waited for all the same: whoever asks in a loop must not spin.
        """
        until = time.monotonic() + seconds
        try:
            woken = self._store.wait(self.revision, seconds)
        except Exception:
            _log.debug("waiting for changes failed", exc_info=True)
            woken = False
        if not woken:
            threading.Event().wait(max(0.0, until - time.monotonic()))
        return woken

    def _cursor(self) -> tuple[int, str] | None:
        with self.lock:
            return self._position()

    def _position(self) -> tuple[int, str] | None:
        return None if self._token is None else (self.revision, self._token)

    def wake(self) -> float:
        """End the lease if the machine has slept: the monotonic clock stood still meanwhile.

        Returns:
            How long the machine has slept since it booted, in seconds.
        """
        slept = self._asleep()
        if slept - self._slept > _SLEEP_NOTICED:
            with self.lock:
                self.deadline = _OVER
            self._slept = slept
        return slept

    def slept_since(self, slept: float) -> bool:
        """Return whether the machine has slept since `wake` returned `slept`."""
        return self.wake() - slept > _SLEEP_NOTICED

    def _apply(
        self, cursor: tuple[int, str] | None, changes: Changes, started: float, slept: float
    ) -> bool:
        """Take a reading over, and tell whether it was of use."""
        head, token, usernames = changes
        diverged = False
        with self.lock:
            known, position = self.revision, self._position()
            # The first reading of all tells of no changes: what was read before it, such as a
            # snapshot at a revision that happened to be the guard's, is of unknown age.
            if usernames is RESET or position is None:
                self._cache.clear()
                self.history += 1
            if position not in {cursor, (head, token)}:
                # Another sync moved the position meanwhile. An older reading has nothing to add; a
                # newer one tells of changes since a row that may be of another history.
                return head < known and usernames is not RESET
            if usernames is RESET:
                diverged = position == cursor is not None
            elif head < known:
                raise StoreUnavailable(f"the store is at revision {head}, behind {known}")
            elif isinstance(usernames, Touched):
                self._cache.clear()
            else:
                self._cache.drop(usernames)
                self._cache.drop_ahead()
            self.syncs += 1
            self.revision, self._token = head, token
            slept_meanwhile = self._asleep() - slept > _SLEEP_NOTICED
            if slept_meanwhile:
                self.deadline = _OVER
            elif started + self._max_staleness > self.deadline:
                self.deadline = started + self._max_staleness
                self.synced_at = started
        if diverged:
            _log.error(_DIVERGED, known, head)
        self.health.succeeded()
        return not slept_meanwhile
