"""Wake-ups: one connection of its own that listens, shared by all who wait on a store.

It is a hint and no more: what is lost while it reconnects, or on the way through a pooler, costs
time. So it may fail in any way; what it does then is to say so in the log once, and try again.

A thread sees to the connection. While it is good, one of those who wait reads from it and tells the
others: so that what it hears it acts upon, without a change of threads in between.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ipguard import _fork
from ipguard._fork import ReentrantLock, acquire
from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores._sql.policies import TOUCHING
from ipguard.stores.postgres._connection import Connection, Session, quoted, translated
from ipguard.stores.postgres._options import Options
from ipguard.stores.postgres._pool import connect

_log = logging.getLogger("ipguard.stores.postgres")

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
_SLICE: Final = 0.2  # how promptly the thread ends
_HEARTBEAT: Final = 5.0  # a connection that is dead may be silent for ever
_PROBE: Final = 1.0
_PROBE_AGAIN: Final = 60.0
_LONELY: Final = 30.0  # with nobody waiting for so long, the thread ends


class Listener(_fork.Forkable):
    """Knows the last change that touched a policy, as far as it has been told.

    Args:
        options: What to listen on.
        notify: Sends a notification with this payload over the store's pool.
    """

    def __init__(self, options: Options, notify: Callable[[str], None]) -> None:
        self._options = options
        self._notify = notify
        self._closed = False
        self._state = ""
        self._after_fork_in_child()
        _fork.register(self)
        if options.listen is None:
            self._say(logging.INFO, "polling: listen=off")

    def _after_fork_in_child(self) -> None:
        """Start over: the thread does not exist here, and its connection is the parent's."""
        self._lock = ReentrantLock()
        self._told = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._waited_at = time.monotonic()
        self._source: Connection | None = None  # what those who wait may read from
        self._reading = threading.Lock()
        self._failure: Exception | None = None  # of the one who read
        self.touching: int | None = None
        self.count = 0  # how often it was told

    # ------------------------------------------------------------------------- the waiting

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after a revision touches a policy, as far as can be told."""
        _fork.check()
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._options.listen is not None and timeout > 0:
                self._start()
        while not self._closed:
            with self._lock:
                if self.touching is not None and self.touching > revision:
                    return True
                self._waited_at = time.monotonic()
                left = deadline - self._waited_at
                if left <= 0:
                    self._told.notify()  # who was told to read on may be this one
                    return False
                source = self._source
                if source is None or self._reading.locked():
                    self._told.wait(left)
                    continue
            self._read(source, min(left, _SLICE))
        return False

    def _read(self, source: Connection, seconds: float) -> None:
        """Read for all who wait, unless another thread began to do so."""
        reading, held = self._reading, list[bool]()
        try:
            if acquire(reading, 0, held) and source is self._source:
                self._hear(source, seconds)
        except StoreError as exc:  # the thread says so, and sees to it
            self._source, self._failure = None, exc
        except BaseException as exc:  # not of the connection: as from the handler of a signal
            failure = StoreUnavailable(f"{type(exc).__name__} ended a wait")
            self._source, self._failure = None, failure
            raise
        finally:
            if True in held:
                reading.release()
            with self._lock:
                self._told.notify()  # another one reads on

    def tell(self, touching: int, *, exactly: bool = False) -> None:
        """Note a change that touched a policy.

        Args:
            touching: Its revision.
            exactly: There is none after it: the store has read it so, and nothing came since.
        """
        _fork.check()
        with self._lock:
            new = self.touching is None or touching > self.touching
            if new or (exactly and touching != self.touching):
                self.touching = touching
                self.count += 1
                self._told.notify_all()

    def close(self) -> None:
        """Let the waiting go, and end the thread."""
        self._closed = True
        _fork.check()
        with self._lock:
            self._told.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5 * _SLICE)

    # ------------------------------------------------------------------------- the thread

    def _start(self) -> None:
        if not (self._thread and self._thread.is_alive()) and not self._closed:
            self._thread = threading.Thread(target=self._run, name="ipguard-listener", daemon=True)
            self._thread.start()

    def _over(self) -> bool:
        with self._lock:
            if self._closed or time.monotonic() - self._waited_at > _LONELY:
                self._thread = None
            # Whoever waits meanwhile may have started another.
            return self._thread is not threading.current_thread()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._over():
            began = time.monotonic()
            try:
                heard = self._listen()
            except Exception as exc:
                self._say(logging.WARNING, "polling: cannot listen (%s)", exc)
                heard = True
            if not heard:
                pause = _PROBE_AGAIN
            elif time.monotonic() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            self._rest(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._over():
            time.sleep(min(_SLICE, max(0.0, until - time.monotonic())))

    def _say(self, level: int, message: str, *args: object) -> None:
        """Log what wakes guards, when that changes."""
        state = message % args
        if state != self._state:
            self._state = state
            _log.log(level, "%s: %s", self._options.place, state)

    def _listen(self) -> bool:
        """Listen until the connection fails or the thread is to end; False if nothing arrives."""
        connection = self._connected()
        try:
            session = Session(connection, self._options.schema)
            session.script(f"LISTEN {quoted(self._options.schema)}")
            # After that nothing is missed; what came before it is read.
            ((touching,),) = session.rows(TOUCHING)
            self.tell(touching)
            if not self._arrives(connection):
                self._say(
                    logging.WARNING,
                    "polling: notifications do not arrive, as through a transaction pooler; give a"
                    " direct connection as listen=, or listen=off",
                )
                return False
            self._failure = None
            self._lend(connection)
            self._say(logging.INFO, "listening for changes")
            beat = time.monotonic()
            while not self._over():
                time.sleep(_SLICE)
                now = time.monotonic()
                if self._failure is not None:
                    raise self._failure
                if now - beat > _HEARTBEAT:
                    with self._to_itself(connection):
                        connection.deadline = now + self._options.timeout
                        ((touching,),) = session.rows(TOUCHING)
                    self.tell(touching)
                    beat = now
                elif now - self._waited_at > 2 * _SLICE:  # nobody reads what has come
                    with self._to_itself(connection):
                        self._hear(connection, 0)
        finally:
            with self._to_itself(None):
                connection.close()
        return True

    def _lend(self, connection: Connection | None) -> None:
        with self._lock:
            self._source = connection
            self._told.notify_all()

    @contextmanager
    def _to_itself(self, connection: Connection | None) -> Iterator[None]:
        """Let nobody else read for the block; after it they read from this connection."""
        self._source = None
        with self._reading:
            yield
        self._lend(connection)

    def _connected(self) -> Connection:
        failure: StoreError = StoreUnavailable("nothing to listen on")
        for server in self._options.listen or ():
            try:
                return connect(server, time.monotonic() + self._options.timeout)
            except StoreError as exc:
                failure = exc
        raise failure

    def _arrives(self, connection: Connection) -> bool:
        """Send a notification over the pool, and tell whether it is heard here."""
        token = secrets.token_hex(8)
        self._notify(token)
        until = time.monotonic() + _PROBE
        while time.monotonic() < until and not self._over():
            if token in self._hear(connection, min(_SLICE, _PROBE)):
                return True
        return False

    def _hear(self, connection: Connection, seconds: float) -> list[str]:
        heard: list[str] = []
        connection.deadline = time.monotonic() + seconds + self._options.timeout
        with translated():
            heard += [
                notification.payload
                for notification in connection.notifies(timeout=seconds, stop_after=1)
            ]
        for payload in heard:
            with suppress(ValueError):
                if len(payload) < 20:
                    self.tell(int(payload))
        return heard
