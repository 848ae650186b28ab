"""The refresher: a thread that renews the lease before it ends, and when the store has a change.

It also calls the callbacks of `Guard.follow`, after the deadline has moved and outside of all locks
but one of their own.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from ipguard._fork import ReentrantLock, acquire
from ipguard.guard._backlog import Callback, Dropped
from ipguard.guard._lease import Lease
from ipguard.guard._preload import Preload
from ipguard.guard._table import Table

_log = logging.getLogger("ipguard.guard")

_INTERVAL: Final = 1.0
_SLICE: Final = 0.1  # the longest single wait, and so the delay with which the thread stops


class Followers:
    """The callbacks of one guard."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._callbacks: dict[object, Callback] = {}
        self.after_fork()

    def after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may hold in a forked child."""
        self._turn = threading.Lock()

    def add(self, callback: Callback) -> Callable[[], None]:
        """Add a callback, and return a function that removes it."""
        key, backlog = object(), self._table.backlog
        self._callbacks[key] = callback
        backlog.readers.add(key)

        def end() -> None:
            # Without a lock: a finalizer may run on a thread that holds any lock.
            backlog.readers.discard(key)
            self._callbacks.pop(key, None)

        return end

    def deliver(self, seconds: float) -> None:
        """Call the callbacks for the backlog; after `seconds`, leave the rest to the next call."""
        until = time.monotonic() + seconds
        while self._table.backlog.first() is not None:
            turn, held = self._turn, list[bool]()
            try:
                # Not if another thread is in this loop, or a callback has called the guard.
                mine = acquire(turn, 0, held)
                if mine:
                    self._deliver_first()
            finally:
                if True in held:
                    turn.release()
            if not mine or time.monotonic() >= until:
                return

    def _deliver_first(self) -> None:
        backlog = self._table.backlog
        with self._table.lock:  # the sync that added it has dropped these users and ended
            item = backlog.first()
        if item is None:
            return
        try:
            for key, callback in self._callbacks.copy().items():
                if key in self._callbacks:  # else it was removed by another
                    _call(callback, item)
        finally:
            # Not before: a child that is forked during a call delivers it again.
            with self._table.lock:
                backlog.remove(item)


def _call(callback: Callback, item: Dropped) -> None:
    try:
        callback(*item)
    except Exception:
        _log.exception("a callback of follow failed")


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
        followers: weakref.ref[Followers],
        *,
        max_staleness: float,
    ) -> None:
        self._owner = owner
        self._table = table
        self._lease = lease
        self._preload = preload
        self._followers = followers
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
            self._deliver()
        if self._preload is not None:
            self._preload.stop()

    def _deliver(self) -> None:
        # Not in `_run`: a callback that refers to the owner must not keep it alive there.
        followers = self._followers()
        if followers is not None:
            followers.deliver(self._slice)
