"""The refresher: a thread that renews a lease before it ends, and when something has changed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

from ipguard.errors import StoreUnavailable
from ipguard.guard._lease import Lease
from ipguard.guard._preload import Preload

_INTERVAL: Final = 1.0
# How long one wait for a wake-up may last: this is how promptly the thread stops.
_SLICE: Final = 0.1


class Refresher:
    """One daemon thread that syncs at least each second, and at once when the store wakes it.

    A wake-up that is lost costs time, never correctness.

    Args:
        lease: What it renews.
        wanted: Called with the refresher; returns whether it is still the guard's own. False once
            the guard is closed or was garbage-collected.
        max_staleness: Of the guard.
        preload: What it keeps full, where the guard is preloaded.
    """

    def __init__(
        self,
        lease: Lease,
        wanted: Callable[[Refresher], bool],
        *,
        max_staleness: float,
        preload: Preload | None = None,
    ) -> None:
        self._lease = lease
        self._preload = preload
        self._wanted = wanted
        self._interval = min(_INTERVAL, max_staleness / 3)
        self._slice = min(_SLICE, self._interval)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ipguard-refresher", daemon=True)

    def start(self) -> None:
        """Start the thread; the guard knows the refresher already, so that none is lost."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread runs; it does not in a forked child."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop the thread, waiting for it only as long as one wait lasts."""
        self._stop.set()
        if self._preload is not None:
            self._preload.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(10 * _SLICE)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set() and self._wanted(self):
            before = self._lease.revision  # a login may sync as well, between the wait and here
            woken = self._lease.wait(self._slice)
            if woken or time.monotonic() >= due:
                due = time.monotonic() + self._interval
                with contextlib.suppress(StoreUnavailable):  # counted and logged by the lease
                    self._lease.sync()
                if woken and self._lease.revision == before:
                    # A store that calls for a sync that brings nothing must not make the thread
                    # spin.
                    self._stop.wait(self._slice)
            if self._preload is not None:
                self._preload.tend(self._slice)
        if self._preload is not None:
            self._preload.stop()
