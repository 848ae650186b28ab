"""The refresher: a thread that renews the lease before it ends, and when the store has a change."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Final

from ipguard._fork import ReentrantLock
from ipguard.guard._lease import Lease
from ipguard.guard._preload import Preload
from ipguard.guard._table import Table

_INTERVAL: Final = 1.0
_SLICE: Final = 0.1  # the longest single wait, and so the delay with which the thread stops


class Refresher:
    """A daemon thread that syncs at least once a second, and at once when the store wakes it.

    A wake-up that is lost costs time, never correctness. The thread does not keep its owner alive,
    and ends when that was garbage-collected.

    Attributes:
        wanted: Whether the thread should run.
        thread: The last thread that was started in this process.
    """

    def __init__(
        self,
        owner: weakref.ref[object],
        table: Table,
        lease: Lease,
        preload: Preload | None,
        *,
        max_staleness: float,
    ) -> None:
        self._owner = owner
        self._table = table
        self._lease = lease
        self._preload = preload
        self._interval = min(_INTERVAL, max_staleness / 3)
        self._slice = min(_SLICE, self._interval)
        self.wanted = False
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the thread, which does not exist in a forked child."""
        self._lock = ReentrantLock()
        self.thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self.thread is not None and self.thread.is_alive()

    def start(self) -> None:
        """Start the thread, and let `revive` start it again in forked children."""
        self.wanted = True
        self.revive()

    def revive(self) -> None:
        """Start the thread if it should run and does not.

        Raises:
            RuntimeError: No thread can be started.
        """
        # A signal handler may call the guard while this thread is in here, or writes the table.
        if self.running or not self.wanted or self._lock.owned() or self._table.entered():
            return
        with self._lock:
            if self.wanted and not self.running:
                stop = self._stop = threading.Event()
                # Assigned before the start: if that is interrupted, `revive` starts another.
                name = "ipguard-refresher"
                thread = threading.Thread(target=self._run, args=(stop,), name=name, daemon=True)
                self.thread = thread
                thread.start()

    def stop(self) -> None:
        """Stop the thread, waiting no longer for it than a few of its waits last."""
        self.wanted = False
        self._stop.set()
        if self._preload is not None:
            self._preload.stop()
        thread, self.thread = self.thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(10 * _SLICE)

    def _run(self, stop: threading.Event) -> None:
        due = time.monotonic()
        while not stop.is_set() and self._owner() is not None:
            before = self._table.position  # read here: a login may sync during the wait as well
            woken = self._lease.wait(self._slice)
            if woken or time.monotonic() >= due:
                due = time.monotonic() + self._interval
                self._lease.try_sync()
                if woken and self._table.position.revision == before.revision:
                    # A store that wakes the thread for nothing must not make it spin.
                    stop.wait(self._slice)
            if self._preload is not None:
                self._preload.tend(self._slice)
        if self._preload is not None:
            self._preload.stop()
