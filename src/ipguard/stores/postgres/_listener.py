"""Wake-ups: one connection that listens for notifications, shared by all waiters on a store.

A wake-up is only a hint: one that is lost, while reconnecting or in a pooler, costs time and
nothing else. So the listener may fail in any way; it logs that once, and tries again.

A background thread reads the connection and wakes the waiters.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ipguard import _fork
from ipguard._backoff import Backoff
from ipguard._fork import ReentrantLock
from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores._sql import TOUCHING
from ipguard.stores.postgres._connection import Connection, quoted
from ipguard.stores.postgres._options import Options
from ipguard.stores.postgres._pool import connect

_log = logging.getLogger("ipguard.stores.postgres")

_LONGEST_DELAY: Final = 1.0
_SLICE: Final = 0.2  # the longest single wait, and so the delay with which the thread ends
_HEARTBEAT: Final = 5.0  # a dead connection may stay silent
_PROBE: Final = 1.0
_PROBE_AGAIN: Final = 60.0
_IDLE_SECONDS: Final = 30.0  # without a waiter for this long, the thread ends


class Listener(_fork.Forkable):
    """Listens for changes that touch a policy, and records the latest one.

    Attributes:
        touching: The revision of the latest such change; None before anything is known.
        count: How often `touching` has changed.
        state: See `PostgresStore.wake_ups`.
    """

    def __init__(self, options: Options, notify: Callable[[str], None]) -> None:
        self._options = options
        self._notify = notify
        self._closed = False
        self.state = ""
        self._after_fork_in_child()
        _fork.register(self)
        if options.listen is None:
            self._log_state(logging.INFO, "polling: listen=off")

    def _after_fork_in_child(self) -> None:
        """Start over: the thread does not exist here, and its connection is the parent's."""
        self._lock = ReentrantLock()
        self._told = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._waited_at = time.monotonic()
        self.touching: int | None = None
        self.count = 0

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait for a change after `revision` that touched a policy; return whether one is known."""
        _fork.check()
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._options.listen is not None and timeout > 0:
                self._start()
            while not self._closed:
                if self.touching is not None and self.touching > revision:
                    return True
                self._waited_at = time.monotonic()
                left = deadline - self._waited_at
                if left <= 0:
                    break
                self._told.wait(min(left, _HEARTBEAT))
        return False

    def tell(self, touching: int, *, exactly: bool = False) -> None:
        """Record the revision of a change that touched a policy.

        With `exactly`, record even a lower one than before, as after a restore: it was read from
        the store, and nothing was recorded since.
        """
        _fork.check()
        with self._lock:
            new = self.touching is None or touching > self.touching
            if new or (exactly and touching != self.touching):
                self.touching = touching
                self.count += 1
                self._told.notify_all()

    def close(self) -> None:
        self._closed = True
        _fork.check()
        with self._lock:
            self._told.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5 * _SLICE)

    def _start(self) -> None:
        if not (self._thread and self._thread.is_alive()) and not self._closed:
            self._thread = threading.Thread(target=self._run, name="ipguard-listener", daemon=True)
            self._thread.start()

    def _must_end(self) -> bool:
        with self._lock:
            if self._closed or time.monotonic() - self._waited_at > _IDLE_SECONDS:
                self._thread = None
            # A new waiter may have started another thread.
            return self._thread is not threading.current_thread()

    def _run(self) -> None:
        backoff = Backoff(0.1, _LONGEST_DELAY)
        while not self._must_end():
            began = time.monotonic()
            try:
                arrives = self._listen()
            except Exception as exc:
                self._log_state(logging.WARNING, "polling: cannot listen (%s)", exc)
                arrives = True
            if time.monotonic() - began > _LONGEST_DELAY:
                backoff.reset()
            self._sleep(backoff.next() if arrives else _PROBE_AGAIN)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._must_end():
            time.sleep(min(_SLICE, max(0.0, until - time.monotonic())))

    def _log_state(self, level: int, message: str, *args: object) -> None:
        """Log how guards are woken, if that has changed."""
        state = message % args
        if state != self.state:
            self.state = state
            _log.log(level, "%s: %s", self._options.place, state)

    def _listen(self) -> bool:
        """Listen until the connection fails or the thread ends; return False if nothing arrives."""
        connection = self._connect()
        try:
            listen = f"LISTEN {quoted(self._options.schema)}"
            connection.script(listen)
            # From now on no notification is missed; read what happened before.
            ((touching,),) = connection.rows(TOUCHING)
            self.tell(touching)
            # Leaving its pipeline mode, the driver may send a Flush after the last Sync. A pooler
            # then keeps the server's session for this client until another statement ends, and the
            # probe would succeed. A second LISTEN has no other effect.
            connection.script(listen)
            if not self._arrives(connection):
                self._log_state(
                    logging.WARNING,
                    "polling: notifications do not arrive, as through a transaction pooler; give a"
                    " direct connection as listen=, or listen=off",
                )
                return False
            self._log_state(logging.INFO, "listening for changes")
            beat = time.monotonic()
            while not self._must_end():
                self._receive(connection, _SLICE)
                now = time.monotonic()
                if now - beat > _HEARTBEAT:
                    connection.deadline = now + self._options.timeout
                    ((touching,),) = connection.rows(TOUCHING)
                    self.tell(touching)
                    beat = now
        finally:
            connection.close()
        return True

    def _connect(self) -> Connection:
        failure: StoreError = StoreUnavailable("nothing to listen on")
        for server in self._options.listen or ():
            try:
                return connect(
                    server, time.monotonic() + self._options.timeout, self._options.schema
                )
            except StoreError as exc:
                failure = exc
        raise failure

    def _arrives(self, connection: Connection) -> bool:
        """Send a notification over the pool, and return whether it arrives here."""
        token = secrets.token_hex(8)
        self._notify(token)
        until = time.monotonic() + _PROBE
        while time.monotonic() < until and not self._must_end():
            if token in self._receive(connection, min(_SLICE, _PROBE)):
                return True
        return False

    def _receive(self, connection: Connection, seconds: float) -> list[str]:
        """Read the notifications that arrive within some seconds, and record their changes."""
        connection.deadline = time.monotonic() + seconds + self._options.timeout
        received = connection.received(seconds)
        for payload in received:
            with suppress(ValueError):
                if len(payload) < 20:
                    self.tell(int(payload))
        return received
