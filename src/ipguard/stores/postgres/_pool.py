"""The connections of the PostgreSQL store: opened by who needs one, lent, kept out of children.

There is a thread nowhere in here. Whoever finds no idle connection opens one, within its own
deadline, and is told at once when the server refuses: a login must not wait for a background
thread's next attempt.

A connection is looked at when it is new (`_postgres_schema.greet`): a server in recovery, or a
schema that this library may not use, gives no connection at all.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

import psycopg
from psycopg import errors, pq, waiting
from psycopg.abc import PQGenConn
from psycopg.pq.abc import PGconn
from psycopg.types.numeric import Int8BinaryDumper

from ipguard import _fork
from ipguard._fork import ReentrantLock
from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores._sql import Row
from ipguard.stores._sql.policies import UNFINISHED
from ipguard.stores.postgres._connection import (
    NEVER,
    Connection,
    ServerClock,
    Session,
    error_of,
    located,
    quoted,
)
from ipguard.stores.postgres._options import Options
from ipguard.stores.postgres._schema import STATE, Greeting, check_version, greet, prepare

_IDLE_SECONDS: Final = 300.0
_RECOUNT: Final = 0.1


class _Slot:
    """One place in a pool, which is free again when nothing refers to its slot any more.

    A counter would keep the places of calls that a signal handler ended between two bytecodes.
    """

    __slots__ = ("__weakref__",)


class Pool(_fork.Forkable):
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
        self._after_fork_in_child()
        _fork.register(self)

    def _after_fork_in_child(self) -> None:
        """Start over: what was inherited belongs to the parent."""
        self._lock = ReentrantLock()
        self._idle: deque[Connection] = deque()
        self._slots: weakref.WeakSet[_Slot] = weakref.WeakSet()  # idle, lent, or being opened
        self._waiting: deque[threading.Lock] = deque()  # each is released once there is a chance

    @property
    def _open(self) -> int:
        return len(self._slots)

    # ------------------------------------------------------------------------- lending

    def take(self, deadline: float) -> Session:
        """Lend a connection to this thread.

        Args:
            deadline: On the clock of `time.monotonic`; it holds for what is done with it, too.

        Raises:
            StoreUnavailable: The store is closed, or there is no connection in time.
        """
        _fork.check()
        slot = _Slot()
        try:
            connection = self._reserve(slot, deadline)
            if connection is None:
                session = self._opened(deadline)
                session.connection.slot = slot
                return session
        except BaseException:
            self._gone(slot)
            raise
        connection.deadline = deadline
        return Session(connection, self.options.schema)

    def _reserve(self, slot: _Slot, deadline: float) -> Connection | None:
        """Return an idle connection, or None once `slot` has a place in the pool."""
        while True:
            waiter = threading.Lock()
            with self._lock:
                if self._closed:
                    raise StoreUnavailable("the store is closed")
                if self._idle:
                    return self._idle.pop()
                if len(self._slots) < self.options.pool_size:
                    self._slots.add(slot)
                    return None
                waiter.acquire()
                self._waiting.append(waiter)
            left = deadline - time.monotonic()
            if left <= 0:
                raise StoreUnavailable("PostgreSQL: every connection is in use")
            # Not the whole time at once: a slot that was lost wakes nobody.
            waiter.acquire(timeout=min(left, _RECOUNT))

    def _wake(self) -> None:
        while self._waiting:
            with suppress(IndexError):  # another thread was faster
                self._waiting.popleft().release()

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
        with self._lock:
            if not self._closed:
                connection.used_at = now
                connection.deadline = NEVER
                self._idle.append(connection)
                # The one that was used least, if that was long ago: a firewall may have cut it.
                if self._idle[0].used_at < now - _IDLE_SECONDS:
                    old = self._idle.popleft()
            else:
                old = connection
        if old is not None:
            self._close(old)
        self._wake()

    def discard(self, session: Session) -> None:
        """Close a connection; in a child that inherited it, leave it alone."""
        if session.connection.pid != os.getpid():
            return
        self._close(session.connection)

    def _close(self, connection: Connection) -> None:
        connection.close()
        slot, connection.slot = connection.slot, None
        self._gone(slot)

    def _gone(self, slot: object) -> None:
        if isinstance(slot, _Slot):
            self._slots.discard(slot)
        self._wake()

    def forget(self) -> None:
        """Close what is idle: the server was gone, or missed a deadline."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return
            self._close(connection)

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
        _fork.check()
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
    while pgconn.status != pq.ConnStatus.BAD:
        _sockets.opened[pgconn] = _inode(pgconn)
        status = pgconn.connect_poll()
        _sockets.opened[pgconn] = _inode(pgconn)  # another address has another socket
        if status == pq.PollingStatus.OK:
            pgconn.nonblocking = 1
            return pgconn
        if status == pq.PollingStatus.FAILED:
            break
        reading = status == pq.PollingStatus.READING
        while not (yield pgconn.socket, waiting.Wait.R if reading else waiting.Wait.W):
            pass
    raise psycopg.OperationalError(f"connection failed: {pgconn.get_error_message()}")


def _inode(pgconn: PGconn) -> int:
    try:
        return os.fstat(pgconn.socket).st_ino
    except (OSError, psycopg.Error):  # it has none yet, or none any more
        return 0


class _Sockets(_fork.Forkable):
    """The connections of this process, by which socket each has."""

    def __init__(self) -> None:
        self.opened: weakref.WeakKeyDictionary[PGconn, int] = weakref.WeakKeyDictionary()

    def _after_fork_in_child(self) -> None:
        """Let go of the parent's sockets.

        They are not closed by libpq, which would end the parent's sessions. Nor are they kept: a
        session lives as long as its socket is open anywhere, even that of a parent that was killed
        in its writer's turn.
        """
        nowhere = os.open(os.devnull, os.O_RDWR)
        for pgconn, inode in tuple(self.opened.items()):
            # Long after a fork without hooks, the number may be another file's.
            if pgconn.status != pq.ConnStatus.BAD and inode and _inode(pgconn) == inode:
                os.dup2(nowhere, pgconn.socket, inheritable=False)
        self.opened.clear()
        os.close(nowhere)


_sockets = _Sockets()
_fork.register(_sockets)


_log = logging.getLogger("ipguard.stores.postgres")
T = TypeVar("T")

_SNAPSHOT: Final = f"""
BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SELECT {STATE}, m.id FROM (SELECT 1) s LEFT JOIN zz_restore_marker m ON m.id = 1
"""


class Client:
    """The connections of one store, and what is asked over them.

    Args:
        options: Where the database is.

    Attributes:
        options: The same.
        pool: The connections.
        clock: What the server's clock said.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.clock = ServerClock()
        self.pool = Pool(options, self._greet)

    def open(self, *, migrate: bool | None) -> None:
        """Look at the database once, and see to its schema.

        Raises:
            SchemaVersionError: The schema may not be used.
            StoreConfigError: The database cannot be used.
            StoreUnavailable: It does not answer, and `migrate` is True; else that is only logged.
        """

        def first(session: Session) -> None:
            self._note(prepare(session, self.options, migrate=migrate))

        self.pool.check = first
        try:
            with self.pool.session(self.deadline()):
                pass
        except StoreUnavailable as exc:
            if migrate is True:
                raise
            _log.warning("%s: not there at opening: %s", self.options.place, exc)
        finally:
            # Never again later: in a schema made anew nobody would be restricted.
            self.pool.check = self._greet
        self.pool.forget()  # a fork then has nothing to inherit

    def _greet(self, session: Session) -> None:
        try:
            greeting = greet(session, self.options)
        except StoreUnavailable:
            raise
        except StoreError as exc:
            raise StoreUnavailable(f"{self.options.place}: {exc}") from exc
        self._note(greeting)
        check_version(greeting.version, greeting.oldest)

    def _note(self, greeting: Greeting) -> None:
        self.clock.set(greeting.micros, greeting.asked_at)

    def deadline(self) -> float:
        """Return until when a call that begins now may take."""
        return time.monotonic() + self.options.timeout

    def refuse(self, session: Session, recovering: object, complete: object) -> None:
        """Refuse an answer by the columns of `STATE`.

        An answer of a server in recovery may be of any age. No new connection leads to one, but
        behind a pooler the server may change.
        """
        if recovering and not self.options.replica:
            session.connection.spoilt = True  # a new connection may find the primary
            raise StoreUnavailable(f"{self.options.place}: the server is in recovery")
        if not complete:
            raise StoreUnavailable(f"{self.options.place}: {UNFINISHED}")

    # ------------------------------------------------------------------------- asking

    def read(self, reading: Callable[[Session], T], *, deadline: float | None = None) -> T:
        """Run a read. If a connection from the pool fails, repeat it on a new one."""
        session, found = self._asked(reading, deadline or self.deadline())
        self.pool.give(session)
        return found

    def _asked(self, ask: Callable[[Session], T], deadline: float) -> tuple[Session, T]:
        """Lend a connection on which a first question was answered."""
        pool = self.pool
        while True:
            session = pool.take(deadline)
            new = session.new
            try:
                return session, ask(session)
            except BaseException as exc:
                failed = not session.connection.usable
                self.give_up(session)
                # The server may have closed it while it was idle, or its session may be outdated:
                # a new connection may succeed.
                again = failed and not new and isinstance(exc, StoreError)
                if not again or time.monotonic() >= deadline:
                    raise

    @contextmanager
    def snapshot(self, settings: str = "", *, patience: float | None = None) -> Iterator[Session]:
        """Run the block's statements against one committed state.

        Args:
            settings: Further statements to begin with, in the same round trip.
            patience: How many seconds each of the block's statements may take; None: the store's
                timeout is for all statements together.
        """
        deadline = self.deadline()
        begin = located(_SNAPSHOT, quoted(self.options.schema))
        with self.begun(f"{begin}; {settings}", deadline=deadline) as (session, found):
            recovering, indexed, marker = found[1][0]
            self.refuse(session, recovering, indexed and marker)
            session.share(deadline - time.monotonic())
            session.patience = patience
            yield session
            session.script("COMMIT")

    @contextmanager
    def begun(
        self, begin: str, *, deadline: float | None = None
    ) -> Iterator[tuple[Session, list[list[Row]]]]:
        """Lend a connection in a transaction.

        Args:
            begin: The statements that begin it, for one round trip.
            deadline: Until when they may take.

        Returns:
            The connection, and the rows of each of those statements.
        """
        session, found = self._asked(lambda it: it.begin(begin), deadline or self.deadline())
        try:
            yield session, found
        except BaseException:
            self.give_up(session)
            raise
        if not session.connection.usable:
            self.pool.forget()
        self.pool.give(session)

    def give_up(self, session: Session) -> None:
        """Undo what a connection was in the middle of, and give it back if it is whole."""
        connection = session.connection
        if connection.pid == os.getpid():
            if not connection.usable:
                self.pool.forget()  # the others may have the same fault, or hang
            elif not connection.idle:
                if session.patience is not None:  # else it has what is left of the deadline
                    session.patience = self.options.timeout
                with suppress(StoreError):  # then the pool closes it, which undoes the same
                    session.script("ROLLBACK")
        self.pool.give(session)
