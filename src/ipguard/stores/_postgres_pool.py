"""The connections of the PostgreSQL store: opened by who needs one, lent, kept out of children.

There is a thread nowhere in here. Whoever finds no idle connection opens one, within its own
deadline, and is told at once when the server refuses: a login must not wait for a background
thread's next attempt.

A connection is looked at when it is new (`_postgres_schema.greet`): a server in recovery, or a
schema that this library may not use, gives no connection at all.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import errors, pq, waiting
from psycopg.abc import PQGenConn
from psycopg.pq.abc import PGconn
from psycopg.types.numeric import Int8BinaryDumper

from ipguard.errors import StoreUnavailable
from ipguard.stores._postgres import NEVER, Connection, Session, error_of
from ipguard.stores._postgres_options import Options

_IDLE_SECONDS: Final = 300.0


class Pool:
    """The connections to one database.

    Args:
        options: Where it is, and how many.
        check: Called with each new connection; raises where it is not to be used.
    """

    def __init__(self, options: Options, check: Callable[[Session], None]) -> None:
        self.options = options
        self.check = check
        self._closed = False
        self._first = 0  # the server that answered last
        self.children: list[Callable[[], None]] = []  # called in a forked child
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        self.pid = os.getpid()
        self._free = threading.Condition()
        self._idle: deque[Connection] = deque()
        self._open = 0  # idle, lent, or being opened

    # ------------------------------------------------------------------------- lending

    def take(self, deadline: float) -> Session:
        """Lend a connection to this thread.

        Args:
            deadline: On the clock of `time.monotonic`; it holds for what is done with it, too.

        Raises:
            StoreUnavailable: The store is closed, or there is no connection in time.
        """
        with self._free:
            while not self._closed and not self._idle and self._open >= self.options.pool_size:
                if not self._free.wait(deadline - time.monotonic()):
                    raise StoreUnavailable("PostgreSQL: every connection is in use")
            if self._closed:
                raise StoreUnavailable("the store is closed")
            connection = self._idle.pop() if self._idle else None
            if connection is None:
                self._open += 1
        if connection is None:
            try:
                return self._opened(deadline)
            except BaseException:
                self._gone()
                raise
        connection.deadline = deadline
        return Session(connection, self.options.schema)

    def give(self, session: Session) -> None:
        """Take a connection back; one that is not whole, or in a transaction, is closed."""
        connection = session.connection
        if connection.pid != os.getpid():
            return  # inherited: abandoned already
        if not connection.idle:
            self.discard(session)
            return
        now = time.monotonic()
        old: Connection | None = None
        with self._free:
            if not self._closed:
                connection.used_at = now
                self._idle.append(connection)
                # The one that was used least, if that was long ago: a firewall may have cut it.
                if self._idle[0].used_at < now - _IDLE_SECONDS:
                    old = self._idle.popleft()
                    self._open -= 1
                self._free.notify()
                connection.deadline = NEVER
            else:
                old = connection
                self._open -= 1
        if old is not None:
            old.close()

    def discard(self, session: Session) -> None:
        """Close a connection; in a child that inherited it, leave it alone."""
        if session.connection.pid != os.getpid():
            return
        session.connection.close()
        self._gone()

    def _gone(self) -> None:
        with self._free:
            self._open -= 1
            self._free.notify()

    def forget(self) -> None:
        """Close what is idle: the server was gone, or missed a deadline."""
        with self._free:
            idle = tuple(self._idle)
            self._idle.clear()
            self._open -= len(idle)
            self._free.notify_all()
        for connection in idle:
            connection.close()

    @contextmanager
    def session(self, deadline: float) -> Iterator[Session]:
        """Lend a connection for a block."""
        session = self.take(deadline)
        try:
            yield session
        finally:
            if not session.connection.usable:
                self.forget()
            self.give(session)

    def close(self) -> None:
        """Close what is idle now, and what is lent as soon as it comes back."""
        self._closed = True
        if self.pid == os.getpid():
            self.forget()

    @property
    def closed(self) -> bool:
        """Whether the store is closed."""
        return self._closed

    # ------------------------------------------------------------------------- opening

    def _opened(self, deadline: float) -> Session:
        servers = self.options.servers
        failure: StoreUnavailable | None = None
        for tried in range(len(servers)):
            at = (self._first + tried) % len(servers)
            # Each server gets its share of the time, so that one that hangs leaves some to others.
            left = max(0.0, deadline - time.monotonic())
            until = deadline - left * (1 - 1 / (len(servers) - tried))
            session = None
            try:
                session = Session(connect(servers[at], until), self.options.schema, new=True)
                self.check(session)
            except StoreUnavailable as exc:
                failure = exc
            except BaseException:
                if session is not None:
                    session.connection.close()
                raise
            else:
                self._first = at
                session.connection.deadline = deadline
                return session
            if session is not None:
                session.connection.close()
        assert failure is not None
        raise failure

    # ------------------------------------------------------------------------- fork

    def after_fork_in_child(self) -> None:
        """Abandon what was inherited, for good, and begin anew."""
        self._begin()
        for renew in self.children:
            renew()


def connect(conninfo: str, deadline: float) -> Connection:
    """Open a connection, in autocommit, that has the deadline.

    Raises:
        StoreUnavailable: The server refused, or did not answer in time.
    """
    left = max(0.0, deadline - time.monotonic())
    try:
        # The driver's own `connect` takes whole seconds, and no fewer than two.
        pgconn = waiting.wait_conn(_opening(conninfo), interval=0.1, timeout=left)
    except errors._WaitTimeout as exc:  # noqa: SLF001
        raise StoreUnavailable("PostgreSQL cannot be reached in time") from exc
    except psycopg.Error as exc:
        raise error_of(exc) from exc
    connection = Connection(pgconn)
    connection.pid = os.getpid()
    connection.deadline = deadline
    # All of one size: numbers sent in the size of their value would make each statement several.
    connection.adapters.register_dumper(int, Int8BinaryDumper)
    connection.autocommit = True
    connection.prepare_threshold = None  # see `greet`
    return connection


def _opening(conninfo: str) -> PQGenConn[PGconn]:
    """Open a connection; the driver's own generator would not show it to a child before the end."""
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    _opened.add(pgconn)
    while pgconn.status != pq.ConnStatus.BAD:
        status = pgconn.connect_poll()
        if status == pq.PollingStatus.OK:
            pgconn.nonblocking = 1
            return pgconn
        if status == pq.PollingStatus.FAILED:
            break
        reading = status == pq.PollingStatus.READING
        while not (yield pgconn.socket, waiting.Wait.R if reading else waiting.Wait.W):
            pass
    raise psycopg.OperationalError(f"connection failed: {pgconn.get_error_message()}")


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_opened: weakref.WeakSet[PGconn] = weakref.WeakSet()


def _in_child() -> None:
    try:
        _abandon()
    finally:
        for pool in tuple(_pools):
            pool.after_fork_in_child()


def _abandon() -> None:
    # Not closed, which would end the parent's sessions. Nor kept: a session lives as long as its
    # socket is open anywhere, so would that of a parent that was killed in its writer's turn.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for pgconn in tuple(_opened):
        if pgconn.status != pq.ConnStatus.BAD:
            os.dup2(nowhere, pgconn.socket, inheritable=False)
    _opened.clear()
    os.close(nowhere)


os.register_at_fork(after_in_child=_in_child)
