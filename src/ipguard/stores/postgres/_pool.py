"""The connections of the PostgreSQL store: opened on demand, lent, and kept out of forked children.

There is no background thread. A call that finds no idle connection opens one within its own
deadline, and fails at once if the server refuses: a login must not wait for the next attempt of a
background thread.

Each new connection is checked (`greet`): a server in recovery, or a schema that this
library cannot use, yields no connection.
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
from functools import partial
from typing import Final, TypeVar

import psycopg
from psycopg import errors, pq, waiting
from psycopg.abc import PQGenConn
from psycopg.pq.abc import PGconn
from psycopg.types.numeric import Int8BinaryDumper

from ipguard import _fork
from ipguard._fork import ReentrantLock
from ipguard.errors import SchemaVersionError, StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import SCHEMA_VERSION, UNFINISHED, Row, check_schema, migrations
from ipguard.stores.postgres._connection import (
    BEGIN,
    NEVER,
    Connection,
    ServerClock,
    error_of,
    qualified,
    quoted,
    ticks,
)
from ipguard.stores.postgres._options import Options

_log = logging.getLogger("ipguard.stores.postgres")
T = TypeVar("T")

_IDLE_SECONDS: Final = 300.0
_RECOUNT: Final = 0.1
MICROS: Final = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
"""The server's time, as times are stored."""
STATE: Final = (
    "pg_is_in_recovery(), 'changes_pkey'::regclass IS NOT NULL"
    " AND 'head_pkey'::regclass IS NOT NULL"
    " AND 'restrictions_pkey'::regclass IS NOT NULL"
    " AND 'users_pkey'::regclass IS NOT NULL"
)
"""Whether the server is in recovery, and whether the tables have their indexes.

`pg_restore --jobs` may restore the restore marker before it has filled other tables, but it creates
the indexes of a table only after that. The name of a missing index is an error when the statement
is parsed, so a prepared statement does not pay for the check.
"""
RESTORE: Final = "m.tableoid::bigint || '.' || m.xmin::text"
"""Which restore created the tables: the marker `m` is written once, in its own transaction."""
_PREPARED_AFTER: Final = 5
_GREETING: Final = f"""
SELECT pg_backend_pid(), pg_is_in_recovery(), current_setting('server_encoding'), {MICROS},
    v.version, v.oldest, t.hidden, t.other, current_setting('zero_damaged_pages') = 'on'
FROM schema_version v CROSS JOIN (
    SELECT string_agg(c.relname::text, ', ') FILTER (WHERE row_security_active(c.oid)) AS hidden,
        string_agg(c.relname::text, ', ') FILTER (WHERE c.relkind NOT IN ('r', 'p')) AS other
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = ? AND c.relname IN ('changes', 'head', 'restrictions', 'users')
) t WHERE v.id = 1
"""
_MISSING: Final = (errors.UndefinedTable, errors.InvalidSchemaName)
_NOT_ALLOWED: Final = (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction)
_LOCK: Final = 0x49504764  # "IPGd"; with the schema's name it makes the advisory lock's number
_SNAPSHOT: Final = f"""
BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SELECT {STATE}, m.id FROM (SELECT 1) s LEFT JOIN zz_restore_marker m ON m.id = 1
"""


class _Slot:
    """One place in a pool; it is free again as soon as this object is garbage-collected.

    A counter would leak the places of calls that a signal handler ended between two bytecodes.
    """


class Pool(_fork.Forkable):
    """The connections of one store, and the server's clock."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.clock = ServerClock()
        self.closed = False
        self._check: Callable[[Connection, Options, ServerClock], None] = check
        self._first = 0  # the server that responded last
        self._after_fork_in_child()
        _fork.register(self)

    def _after_fork_in_child(self) -> None:
        """Start over: the inherited connections belong to the parent."""
        self._lock = ReentrantLock()
        self._idle: deque[Connection] = deque()
        self._slots: weakref.WeakSet[_Slot] = weakref.WeakSet()  # idle, lent, or being opened
        self._waiting: deque[threading.Lock] = deque()  # each is released to try again

    def deadline(self) -> float:
        """Return when the waits of a call that begins now must end."""
        return time.monotonic() + self.options.timeout

    def take(self, deadline: float) -> Connection:
        """Lend a connection to this thread. All its waits end at `deadline` too."""
        _fork.check()
        slot = _Slot()
        try:
            connection = self._reserve(slot, deadline)
            if connection is None:
                connection = self._connect(deadline)
                connection.slot = slot
            else:
                connection.new = False
        except BaseException:
            self._free(slot)
            raise
        connection.lend(deadline)
        return connection

    def _reserve(self, slot: _Slot, deadline: float) -> Connection | None:
        """Return an idle connection, or None once `slot` has a place in the pool."""
        while True:
            waiter = threading.Lock()
            with self._lock:
                if self.closed:
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
            # Check again from time to time: a lost slot wakes no waiter.
            waiter.acquire(timeout=min(left, _RECOUNT))

    def _wake(self) -> None:
        while self._waiting:
            with suppress(IndexError):  # another thread was faster
                self._waiting.popleft().release()

    def give(self, connection: Connection) -> None:
        """Take a connection back; close it if it is not idle."""
        if connection.pid != os.getpid():
            return  # inherited, and abandoned already
        if not connection.idle:
            self._close(connection)
            return
        connection.used_at, connection.deadline = time.monotonic(), NEVER
        self._idle.append(connection)
        # Close the least recently used one if it is old: a firewall may have cut it.
        old: Connection | None = None
        with self._lock, suppress(IndexError):
            if self._idle[0].used_at < connection.used_at - _IDLE_SECONDS:
                old = self._idle.popleft()
        if old is not None:
            self._close(old)
        # Check again: `close` sets its flag first, and then empties the pool.
        if self.closed:
            self.forget()
        self._wake()

    def _close(self, connection: Connection) -> None:
        connection.close()
        slot, connection.slot = connection.slot, None
        self._free(slot)

    def _free(self, slot: object) -> None:
        if isinstance(slot, _Slot):
            self._slots.discard(slot)
        self._wake()

    def forget(self) -> None:
        """Close all idle connections: the server was gone, or missed a deadline."""
        with suppress(IndexError):
            while True:
                self._close(self._idle.pop())

    def close(self) -> None:
        """Close idle connections now, and lent ones as soon as they are returned."""
        self.closed = True
        _fork.check()
        self.forget()

    def open(self, *, migrate: bool | None) -> None:
        """Connect once, to check the schema or bring it up to date.

        A server that does not respond is an error if `migrate` is True, and else only logged.
        """
        self._check = partial(prepare, migrate=migrate)
        try:
            self.give(self.take(self.deadline()))
        except StoreUnavailable as exc:
            if migrate is True:
                raise
            _log.warning("%s: not there at opening: %s", self.options.place, exc)
        finally:
            # Never migrate later: a newly created schema has no restrictions.
            self._check = check
        self.forget()  # so that a fork inherits no connection

    def _connect(self, deadline: float) -> Connection:
        servers = self.options.servers
        failure: StoreUnavailable | None = None
        for tried in range(len(servers)):
            at = (self._first + tried) % len(servers)
            # Each server gets its share of the time, so that one that hangs leaves some to others.
            left = max(0.0, deadline - time.monotonic())
            until = deadline - left * (1 - 1 / (len(servers) - tried))
            connection = None
            try:
                connection = connect(servers[at], until, self.options.schema)
                self._check(connection, self.options, self.clock)
            except BaseException as exc:
                if connection is not None:
                    connection.close()
                if not isinstance(exc, StoreUnavailable):
                    raise
                failure = exc
            else:
                self._first = at
                return connection
        assert failure is not None
        raise failure

    def read(self, reading: Callable[[Connection], T], *, deadline: float | None = None) -> T:
        """Return the result of a read. If an idle connection fails, repeat it on a new one."""
        connection, found = self._try(reading, deadline or self.deadline())
        self.give(connection)
        return found

    def _try(self, ask: Callable[[Connection], T], deadline: float) -> tuple[Connection, T]:
        """Lend a connection on which a first query succeeded; return both it and the result."""
        while True:
            connection = self.take(deadline)
            new = connection.new
            try:
                return connection, ask(connection)
            except BaseException as exc:
                failed = not connection.usable
                self._give_up(connection)
                # The server may have closed it while it was idle, or its session may be outdated:
                # a new connection may succeed.
                again = failed and not new and isinstance(exc, StoreError)
                if not again or time.monotonic() >= deadline:
                    raise

    @contextmanager
    def snapshot(
        self, settings: str = "", *, patience: float | None = None
    ) -> Iterator[Connection]:
        """Run the block's statements against one committed state, after some `settings`.

        `patience` is how many seconds each of them may take; None: the store's timeout is for all.
        """
        deadline = self.deadline()
        begin = qualified(_SNAPSHOT, quoted(self.options.schema))
        with self.begun(f"{begin}; {settings}", deadline=deadline) as (connection, found):
            recovering, indexed, marker = found[1][0]
            self.refuse(connection, recovering, indexed and marker)
            connection.share(deadline - time.monotonic())
            connection.patience = patience
            yield connection
            connection.script("COMMIT")

    @contextmanager
    def begun(
        self, begin: str, *, deadline: float | None = None
    ) -> Iterator[tuple[Connection, list[list[Row]]]]:
        """Lend a connection in a transaction, with its first rows; roll back what is left open."""
        connection, found = self._try(lambda it: it.begin(begin), deadline or self.deadline())
        try:
            yield connection, found
        finally:
            self._give_up(connection)

    def _give_up(self, connection: Connection) -> None:
        """Roll back what a connection has not finished, and take it back if it is sound."""
        if connection.pid == os.getpid():
            if not connection.usable:
                self.forget()  # the others may have the same fault, or hang
            elif not connection.idle:
                if connection.patience is not None:  # else it has what is left of the deadline
                    connection.patience = self.options.timeout
                with suppress(StoreError):  # closing the connection rolls back as well
                    connection.script("ROLLBACK")
        self.give(connection)

    def refuse(self, connection: Connection, recovering: object, complete: object) -> None:
        """Refuse an answer by the columns of `STATE`.

        A server in recovery may be arbitrarily far behind. No new connection leads to one, but
        behind a pooler the server may change.
        """
        if recovering and not self.options.replica:
            connection.spoilt = True  # a new connection may find the primary
            raise StoreUnavailable(f"{self.options.place}: the server is in recovery")
        if not complete:
            raise StoreUnavailable(f"{self.options.place}: {UNFINISHED}")


def greet(connection: Connection, options: Options, clock: ServerClock) -> tuple[int, int]:
    """Check what a new connection leads to, and whether statements can be prepared on it.

    Set the clock, and return the version of the schema and the oldest version compatible with it.
    """
    auto = options.prepare == -1
    connection.prepare_threshold = None if auto else options.prepare
    connection.settled = False if options.prepare is None else None
    asked_at = ticks()
    try:
        rows = connection.rows(_GREETING, (options.schema,))
    except StoreError as exc:
        if isinstance(exc.__cause__, _MISSING):
            raise SchemaVersionError(None, SCHEMA_VERSION) from exc.__cause__
        raise
    if not rows:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    backend, recovering, encoding, micros, version, oldest, hidden, other, zeroed = rows[0]
    _check_encoding(encoding)
    if recovering and not options.replica:
        raise StoreUnavailable(
            f"{options.place}: the server is in recovery; its data may be of any age"
        )
    if hidden:
        raise StoreUnavailable(
            f"{options.place}: row-level security hides rows of {hidden} from this role"
        )
    if zeroed:  # only a superuser could turn it off for this session
        raise StoreUnavailable(f"{options.place}: zero_damaged_pages is on, which drops rows")
    if other:  # a view, for example, may show fewer rows
        raise StoreUnavailable(f"{options.place}: {other} must be a table")
    # A pooler reports a backend pid that it made up. Behind it, the next transaction may be in
    # another session, so nothing is prepared, and settings do not last.
    direct = backend == connection.info.backend_pid
    connection.settled = direct and options.prepare is not None
    if auto and direct:
        connection.prepare_threshold, connection.prepares = _PREPARED_AFTER, True
    clock.set(micros, asked_at)
    return version, oldest


def _check_encoding(encoding: str) -> None:
    if encoding != "UTF8":
        raise StoreConfigError(f"the database's encoding is {encoding}; ipguard needs UTF8")


def check(connection: Connection, options: Options, clock: ServerClock) -> None:
    """Raise StoreUnavailable unless a new connection leads to a database that can be used."""
    try:
        check_schema(*greet(connection, options, clock))
    except StoreUnavailable:
        raise
    except StoreError as exc:
        raise StoreUnavailable(f"{options.place}: {exc}") from exc


def prepare(
    connection: Connection, options: Options, clock: ServerClock, *, migrate: bool | None
) -> None:
    """Check the first connection of a store, and create or migrate the schema.

    With `migrate` True, that must be possible. None: if the role may. False: only check.
    """
    oldest = 0
    try:
        version, oldest = greet(connection, options, clock)
        check_schema(version, oldest)
    except SchemaVersionError as exc:
        if migrate is False or oldest > SCHEMA_VERSION:
            raise
        try:
            _migrate(connection, options)
        except StoreError as failure:
            if migrate is None and isinstance(failure.__cause__, _NOT_ALLOWED):
                raise exc from failure
            if isinstance(failure.__cause__, errors.DuplicateTable):
                raise StoreConfigError(
                    f"the schema {options.schema} has tables of another program"
                ) from failure.__cause__
            raise
        check_schema(*greet(connection, options, clock))


def _migrate(connection: Connection, options: Options) -> None:
    """Bring the schema up to date, in one transaction, one process at a time."""
    schema, milliseconds = quoted(options.schema), int(options.bulk_timeout * 1000)
    connection.patience = options.bulk_timeout
    connection.begin(
        f"{BEGIN}; SET LOCAL lock_timeout = {milliseconds};"
        f" SET LOCAL statement_timeout = {milliseconds}"
    )
    connection.rows(
        f"SELECT pg_advisory_xact_lock({_LOCK}::int, hashtext(?::text))", (options.schema,)
    )
    # CREATE SCHEMA IF NOT EXISTS needs more rights even if the schema exists.
    ((there, encoding),) = connection.rows(
        "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = ?),"
        " current_setting('server_encoding')",
        (options.schema,),
    )
    _check_encoding(encoding)
    if not there:
        connection.script(f"CREATE SCHEMA {schema}")
    connection.script(f"SET LOCAL search_path TO {schema}, pg_temp")
    ((version,),) = connection.rows(
        "SELECT COALESCE((SELECT c.oid::bigint FROM pg_class c WHERE c.oid ="
        " to_regclass('schema_version')), 0)"
    )
    if version:
        found = connection.rows("SELECT version FROM schema_version WHERE id = 1")
        if not found:
            raise StoreUnavailable(f"{options.place}: {UNFINISHED}")
        ((version,),) = found
    for number, text in migrations("postgresql"):
        if number > version:
            connection.script(text)
            _log.info("%s: schema brought to version %d", options.place, number)
    connection.script("COMMIT")


def connect(conninfo: str, deadline: float, schema: str) -> Connection:
    """Open a connection to one server, in autocommit mode; all its waits end at `deadline`."""
    left = max(0.0, deadline - time.monotonic())
    try:
        # The driver's own `connect` takes whole seconds, and at least two.
        pgconn = waiting.wait_conn(_open_socket(conninfo), interval=0.1, timeout=left)
    except errors._WaitTimeout as exc:  # noqa: SLF001
        raise StoreUnavailable("PostgreSQL cannot be reached in time") from exc
    except psycopg.Error as exc:
        raise error_of(exc) from exc
    connection = Connection(pgconn)
    connection.pid = os.getpid()
    connection.schema = schema
    connection.deadline = deadline
    # Send all integers in one size, else each statement would be prepared several times.
    connection.adapters.register_dumper(int, Int8BinaryDumper)
    connection.autocommit = True
    connection.prepare_threshold = None  # see `greet`
    return connection


def _open_socket(conninfo: str) -> PQGenConn[PGconn]:
    """Open a connection and register its socket; the driver's own generator shows it too late."""
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
    except (OSError, psycopg.Error):  # not open yet, or closed
        return 0


class _Sockets(_fork.Forkable):
    def __init__(self) -> None:
        self.opened: weakref.WeakKeyDictionary[PGconn, int] = weakref.WeakKeyDictionary()

    def _after_fork_in_child(self) -> None:
        """Let go of the parent's sockets.

        libpq must not close them, because that would end the parent's sessions. They are not kept
        either: a session lives as long as its socket is open anywhere, even that of a parent that
        was killed in its write transaction.
        """
        nowhere = os.open(os.devnull, os.O_RDWR)
        for pgconn, inode in tuple(self.opened.items()):
            # Long after a fork without hooks, the descriptor may belong to another file.
            if pgconn.status != pq.ConnStatus.BAD and inode and _inode(pgconn) == inode:
                os.dup2(nowhere, pgconn.socket, inheritable=False)
        self.opened.clear()
        os.close(nowhere)


_sockets = _Sockets()
_fork.register(_sockets)
