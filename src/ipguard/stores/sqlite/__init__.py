"""The store in one SQLite file, for one machine: any number of threads and processes.

It relies on WAL mode, so that readers and the writer do not block each other; on
`synchronous=FULL`, so that a committed change survives a power cut; and on `BEGIN IMMEDIATE`, so
that there is one writer at a time. The file must be on a local disk, because WAL needs shared
memory.

What it does when its files are removed, replaced or locked is in docs/database-faults.md. Its
limits: a commit at the very moment in which the `-wal` file is removed can be lost although it was
acknowledged; a process that forks inside its own transaction, or while another thread stays in one
for longer than the timeout, has a child whose store is unavailable; a disk that hangs blocks the
call, because SQLite has no deadline for that.

Each thread inside a call has its own connection. Between calls connections wait in a pool, so that
a thread that ends leaves none behind.

Fork. SQLite forbids a child to use or close an inherited connection, and a child with an inherited
open connection cannot open a sound one either. SQLite keeps a table of locks per file and process,
so the child would believe that it holds its parent's locks. When the parent closed the file, it
would delete the log under the child, and the child's commits would be lost. So before a fork the
pool waits for calls to end and closes every connection. A connection that it cannot wait for, that
of the forking thread's own transaction, is abandoned in the child and never closed, and the child's
store refuses that file.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from json import dumps
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote

from ipguard import _fork
from ipguard._backoff import Backoff
from ipguard._checks import check_seconds, check_time
from ipguard._fork import acquire
from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.model import RESET, Changes, Policy
from ipguard.stores._sql import (
    ALL_POLICIES,
    CHANGES_SINCE,
    POLICY,
    SCHEMA_VERSION,
    Params,
    Row,
    changes_of,
    changes_params,
    check_open_schema,
    check_option,
    encodable,
    head,
    join_plain,
    marks,
    packed_row_of,
    packed_rows_of,
    policies_of,
    policy_of,
    schema_version,
    started,
    touching,
)
from ipguard.stores._sql import migrations as _migrations
from ipguard.stores._sql.bulk import BulkRestrictions
from ipguard.stores._sql.store import SqlStore, WriteTransaction
from ipguard.stores.sqlite import _schema as schema

__all__ = ["SCHEMA_VERSION", "SQLiteStore", "migrations"]

T = TypeVar("T")

_POLL: Final = 0.005
_LOGIN_WAIT: Final = 1.0  # seconds; readers wait only while another program locks the whole file
_BULK_CACHE: Final = 98_304
"""In KiB: an import of a million rows reads the same index pages again. SQLite takes as much once
more to sort."""
_POLICY: Final = POLICY % ("?", "NULL")

FileId = tuple[int, int]  # device and inode


class Files(NamedTuple):
    """The identities of the database file, its log and its index."""

    main: FileId
    wal: FileId | None
    shm: FileId | None


def file_id(path: str) -> FileId:
    try:
        found = os.stat(path)  # noqa: PTH116 - called by every sync
    except OSError as exc:
        raise StoreUnavailable(f"{path}: {exc.strerror}") from exc
    return found.st_dev, found.st_ino


def files_at(path: str) -> Files:
    main, wal, shm = file_id(path), None, None
    with suppress(StoreUnavailable):
        wal = file_id(path + "-wal")
    with suppress(StoreUnavailable):
        shm = file_id(path + "-shm")
    return Files(main, wal, shm)


class Connection:
    """One connection, lent to one thread at a time. It is the `Executor` of SQLite.

    Attributes:
        patience: How many seconds all its statements together may still wait for locks.
        broken: Whether to discard it, because a statement failed or it is being closed.
        busy: Whether a statement is in progress, or was interrupted.
        unwritable: Whether it was opened while the files were read-only, or failed to use them.
    """

    def __init__(
        self, driver: sqlite3.Connection, path: str, files: Files, patience: float
    ) -> None:
        self.driver = driver
        self.cursor = driver.cursor()  # a new one for each statement is slower
        self.path = path
        self.files = files
        self.patience = patience
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.broken = False
        self.busy = False
        self.unwritable = False

    def __del__(self) -> None:
        if self.pid == os.getpid():
            self.driver.close()

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        self.busy = True
        deadline, backoff = 0.0, None
        while True:
            try:
                found = self.cursor.execute(sql, params).fetchall()
            except sqlite3.Error as exc:
                if self.patience <= 0 or not _is_busy(exc):
                    raise self._failure(exc) from exc
            else:
                self.busy = False
                return found
            # SQLite's own busy handler is off: it sleeps up to 100 ms at a time, some statements
            # ignore it, and it allows each statement the whole timeout again.
            if backoff is None:
                deadline = time.monotonic() + self.patience
                backoff = Backoff(0.001, 0.01, jitter=0.8)
            time.sleep(min(backoff.next(), self.patience))
            self.patience = remaining(deadline)

    def run(self, sql: str, params: Params = ()) -> None:
        self.rows(sql, params)

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        statement = f"INSERT INTO {table} ({columns}) VALUES ({marks(columns)})"
        try:
            # A cursor of its own: `rows` may come from queries on this connection.
            self.driver.executemany(statement, rows)
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    def lock_table(self, table: str) -> None:
        """Do nothing: a write transaction excludes all others."""

    def among(self, column: str) -> str:
        return f"{column} IN (SELECT value FROM json_each(?))"

    def each(self) -> str:
        return "json_each(?) j"

    def texts(self, values: Iterable[str]) -> object:
        texts = list(values)
        joined = join_plain(texts)
        return dumps(texts, ensure_ascii=False) if joined is None else f"[{joined}]"

    def stream(self, sql: str) -> Generator[Row, None, None]:
        try:
            # A cursor of its own: other statements may run on this connection in between.
            yield from self.driver.cursor().execute(sql)
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Run the block's statements against one committed state."""
        self.run("BEGIN")
        yield
        # After an exception the pool closes the connection, which rolls back.
        self.run("COMMIT")

    def _failure(self, exc: sqlite3.Error) -> StoreError:
        self.busy = False
        self.broken = not isinstance(exc, sqlite3.IntegrityError)
        self.unwritable |= _code(exc) in _UNWRITABLE
        return error_of(self.path, exc)


_UNWRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)


def _code(exc: sqlite3.Error) -> int:
    # Errors that the sqlite3 module raises by itself have no code.
    return int(getattr(exc, "sqlite_errorcode", 0)) & 0xFF


def _is_busy(exc: sqlite3.Error) -> bool:
    return _code(exc) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def error_of(path: str, exc: sqlite3.Error) -> StoreError:
    if isinstance(exc, sqlite3.IntegrityError):
        return StoreError(f"{path}: the change contradicts what is stored: {exc}")
    if _is_busy(exc):
        return StoreUnavailable(f"{path}: locked by others for too long")
    return StoreUnavailable(f"{path}: {exc}")


_UNUSABLE: Final = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; may this user write to it and to its directory?",
    sqlite3.SQLITE_READONLY: "may not be written to by this user",
    sqlite3.SQLITE_PERM: "may not be used by this user",
}
_IDLE_AT_MOST: Final = 16
_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",  # a commit that was acknowledged survives a power cut
    "PRAGMA fullfsync = ON",  # the same on macOS
    "PRAGMA foreign_keys = ON",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA temp_store = FILE",  # staged rows may be many
)

# The lock of an SQLite reader, as a `struct flock`: type, whence, start, length, process.
_SHARED_LOCK: Final = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0x40000002, 510, 0)


class Pool(_fork.Forkable):
    """The connections to one file.

    Args:
        path: The file, absolute. Symbolic links are resolved when the file is opened: SQLite keeps
            the log and the index in the folder of the real file.

    Attributes:
        replaced: Whether the files were replaced since the last sync.
        writing: The lock of this process's writers.
        writer: The thread that holds `writing`.
        stirred: Set when waiting calls must return.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._given = path
        self.path = os.path.realpath(path)
        self.timeout = timeout
        self._check = schema.check
        self._files: Files | None = None  # the files of usable connections
        self.replaced = False
        self._closed = False
        self._begin()
        _fork.register(self)
        _pools[self] = None

    def _begin(self) -> None:
        self._idle: deque[Connection] = deque()
        # Idle or lent. A connection that is lost, because a signal handler raised, closes itself.
        self._open: weakref.WeakKeyDictionary[Connection, None] = weakref.WeakKeyDictionary()
        self._opening = threading.Lock()
        self.writing = threading.Lock()
        self.writer: int | None = None
        self._paused = False
        self._forking: list[bool] = []
        self.stirred = threading.Event()
        if self._closed:
            self.stirred.set()

    def take(self, patience: float | None = None) -> Connection:
        """Lend a connection to this thread.

        `patience` is how many seconds the call may wait, here and in all its statements; the pool's
        timeout by default.
        """
        _fork.check()
        deadline = time.monotonic() + (self.timeout if patience is None else patience)
        while True:
            if self._closed or self._paused:
                self._make_ready(deadline)
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._connect(deadline)
            connection.thread = threading.get_ident()
            if connection.files is self._files:
                connection.patience = remaining(deadline)
                return connection
            self.discard(connection)

    def give(self, connection: Connection) -> None:
        """Take a connection back; close it if it is not sound."""
        if connection.pid != os.getpid():
            return  # inherited, and abandoned already
        if connection.broken and connection.unwritable and connection.files is self._files:
            # Connections that were opened while the files were read-only stay read-only, and so
            # does the index, which all connections of a process share: replace them all.
            self._files = None
            self.forget()
        if (
            connection.broken
            or connection.busy
            or connection.driver.in_transaction
            or connection.files is not self._files
            or len(self._idle) >= _IDLE_AT_MOST
        ):
            self.discard(connection)
            return
        connection.thread = 0
        self._idle.append(connection)
        # Check again: `close` and `before_fork` set their flag first, and then empty the pool.
        if self._closed or self._paused:
            self.forget()

    def discard(self, connection: Connection) -> None:
        """Close a connection in any state, except in a forked child."""
        if connection.pid != os.getpid():
            return
        connection.broken = True
        with suppress(sqlite3.Error), _files_kept(connection):
            connection.driver.close()
        self._open.pop(connection, None)

    @contextmanager
    def connection(
        self, *, keep: bool = True, write: bool = False, patience: float | None = None
    ) -> Iterator[Connection]:
        """Lend a connection to the file that is at the path now, and `keep` it for later calls."""
        _fork.check()
        self.follow()
        connection = self.take(patience)
        if write and connection.unwritable:  # opened while the files were read-only
            connection.broken = True
            self.give(connection)
            connection = self.take(connection.patience)
        try:
            yield connection
        except BaseException as exc:
            # It may have been interrupted anywhere, in the middle of a query for example.
            keep = keep and isinstance(exc, Exception)
            raise
        finally:
            if keep:
                self.give(connection)
            else:
                self.discard(connection)

    def _make_ready(self, deadline: float) -> None:
        while self._paused and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._closed:
            raise StoreUnavailable(f"{self.path}: the store is closed")
        if self._paused:
            raise StoreUnavailable(f"{self.path}: a fork is taking too long")

    def recalled(self, connection: Connection) -> bool:
        """Return whether a long call must end, to return its connection.

        That is so before a fork, after `close`, and if other files are at the path.
        """
        return self._closed or self._paused or connection.files is not self._files

    def forget(self) -> None:
        """Close all idle connections, and drop their caches with them."""
        with suppress(IndexError):
            while True:
                self.discard(self._idle.pop())

    def close(self) -> None:
        """Close idle connections now, and lent ones as soon as they are returned."""
        self._closed = True
        self.stirred.set()
        _fork.check()
        self.forget()

    def open(self, *, migrate: bool) -> None:
        """Check the file, and create or migrate it if `migrate`; leave no connection open."""
        schema.check_file(self.path, migrate=migrate)
        self._check = partial(schema.prepare, migrate=migrate)
        try:
            with self.connection():
                self._check = schema.check
        except StoreUnavailable as exc:
            cause = exc.__cause__
            if isinstance(cause, sqlite3.Error) and _code(cause) in _UNUSABLE:
                raise StoreConfigError(f"{self.path}: {_UNUSABLE[_code(cause)]}") from cause
            raise
        self.forget()  # so that a fork inherits no connection

    def _connect(self, deadline: float) -> Connection:
        # One at a time, so that a fork can detect a half-open connection.
        opening, held = self._opening, list[bool]()
        try:
            if not acquire(opening, remaining(deadline), held):
                raise StoreUnavailable(f"{self.path}: could not be opened in time")
            if self._closed:
                raise StoreUnavailable(f"{self.path}: the store is closed")
            connection = self._opened(deadline)
            self._open[connection] = None
            return connection
        finally:
            if True in held:
                opening.release()

    def _opened(self, deadline: float) -> Connection:
        self.follow()
        self.path = os.path.realpath(self._given)
        main = file_id(self.path)
        if main in _inherited:
            raise StoreUnavailable(
                f"{self.path}: this process was forked while its parent was using the file"
            )
        self._release_old(main, deadline)
        writable = _make_writable(self.path)
        try:
            driver = sqlite3.connect(
                # Never create a file: an empty database restricts no user.
                f"file:{quote(self.path)}?mode=rw",
                uri=True,
                timeout=0,  # see `Connection.rows`
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as exc:
            raise error_of(self.path, exc) from exc
        try:
            connection = Connection(driver, self.path, Files(main, None, None), remaining(deadline))
            self._check(connection, self.path)
            for pragma in _PRAGMAS:
                connection.run(pragma)
            connection.files = self._files_of(main)
            connection.unwritable = not writable or any(
                s.unwritable for s in _fork.alive(self._open)
            )
        except BaseException:
            driver.close()
            raise
        self._files = connection.files
        return connection

    def _files_of(self, main: FileId) -> Files:
        """Return the files of a connection that was just opened."""
        found, known = files_at(self.path), self._files
        if found.main != main:
            raise StoreUnavailable(f"{self.path}: replaced while it was being opened")
        if known is not None and self._in_use(known):
            if found == known:
                return known
        elif _has_open(found.wal) and _has_open(found.shm):
            return found
        raise StoreUnavailable(
            f"{self.path}: this process still uses a -wal or -shm file that was removed"
        )

    def _in_use(self, files: Files) -> bool:
        return any(each.files is files and not each.broken for each in _fork.alive(self._open))

    def _release_old(self, main: FileId, deadline: float) -> None:
        """Wait until connections with other logs of the same database are closed.

        SQLite opens the index once per process: a new connection would share theirs, and would not
        see commits of other processes.
        """
        pools = _fork.alive(_pools)
        while sum(pool.holds_old(main) for pool in pools) and remaining(deadline):
            time.sleep(0.0005)

    def holds_old(self, main: FileId) -> bool:
        """Return whether other threads have open connections with another log of a database."""
        if self._files is not None and self._files.main == main:
            with suppress(StoreUnavailable):
                self.follow()
        if self._files is None:
            self.forget()
        me = threading.get_ident()
        return any(
            connection.files.main == main
            and connection.files is not self._files
            and connection.thread != me
            for connection in _fork.alive(self._open)
        )

    def follow(self) -> None:
        """Discard all connections if other files are at the path now.

        The log and the index count as well: if one of them was removed, SQLite keeps using its open
        file and does not see commits of other processes. If the database was replaced and the log
        of the old one is still there, the store is unavailable: SQLite would apply that log.
        """
        known = self._files
        if known is None:
            return
        found = files_at(self.path)
        if found == known and file_id(self._given) == known.main:
            return
        path = os.path.realpath(self._given)
        found = files_at(path)
        in_use = self._in_use(known)
        if found.main == known.main:
            # The last connection removes log and index when it closes; the next creates new ones.
            if not in_use:
                return
        elif in_use and (
            (found.wal is not None and found.wal == known.wal)
            or (found.shm is not None and found.shm == known.shm)
        ):
            # Open connections keep the inodes in use: equal inodes mean the same file.
            raise StoreUnavailable(
                f"{path}: replaced, but the -wal and -shm files beside it belong to the old"
                " database: remove both, as they would damage the new one"
            )
        if self._files is known:
            self._files = None
            self.replaced = True
            self.forget()

    def _before_fork(self) -> None:
        """Close every connection; wait for those that other threads are using."""
        self._paused = True
        self.stirred.set()
        me, deadline = threading.get_ident(), time.monotonic() + self.timeout
        self._forking = []
        acquire(self._opening, self.timeout, self._forking)
        self.forget()
        while any(s.thread != me for s in _fork.alive(self._open)) and time.monotonic() < deadline:
            time.sleep(0.0005)
            self.forget()

    def _after_fork_in_parent(self) -> None:
        """Let calls continue."""
        if not self._closed:
            self.stirred.clear()
        self._paused = False
        if True in self._forking:
            self._forking = []
            self._opening.release()

    def _after_fork_in_child(self) -> None:
        """Close or abandon the inherited connections, and start over."""
        for connection in _fork.alive(self._open):
            # Closing the last connection to a replaced file would remove the new file's log.
            there = False
            with suppress(StoreUnavailable):
                there = files_at(self.path) == connection.files
            used = connection.busy or connection.broken or connection.driver.in_transaction
            if there and not used:
                connection.cursor.close()
                connection.driver.close()
            else:
                _abandon(connection.driver, connection.cursor)
                _inherited.add(connection.files.main)
            self._open.pop(connection, None)
        if self._opening.locked() and True not in self._forking:  # a connection was half open
            with suppress(StoreUnavailable):
                _inherited.add(file_id(self.path))
        self._begin()


_pools: weakref.WeakKeyDictionary[Pool, None] = weakref.WeakKeyDictionary()
# Files to which this process inherited an open connection; see the module.
_inherited: set[FileId] = set()
_abandoned: list[object] = []


def remaining(deadline: float) -> float:
    """Return how many seconds are left, at least 0."""
    return max(0.0, deadline - time.monotonic())


@contextmanager
def _files_kept(connection: Connection) -> Iterator[None]:
    """Keep a stale connection from writing to the database and from removing a log on closing.

    The log at the path is another one, and may contain commits of a process that was killed. If the
    database file was replaced, SQLite detects that itself.
    """
    with ExitStack() as stack:
        with suppress(OSError, StoreUnavailable):
            found = files_at(connection.path)
            if found == connection.files or found.main != connection.files.main:
                pass
            elif sys.version_info >= (3, 12):
                connection.driver.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
            elif sys.platform == "linux":
                # SQLite writes and removes the log only if it can lock out all other users. A lock
                # on another open file description counts as one, even in this process. Closing that
                # file drops all locks of this process; only stale connections have any by now.
                file = stack.enter_context(open(connection.path, "rb"))  # noqa: PTH123
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _SHARED_LOCK)
        yield


def _make_writable(path: str) -> bool:
    """Return whether a database is writable, and give its log and index the same permissions.

    SQLite creates them with the permissions of the database file. If that was read-only then, they
    would stay read-only.
    """
    effective = os.access in os.supports_effective_ids
    if not os.access(path, os.W_OK, effective_ids=effective):
        return False
    for name in (path + "-wal", path + "-shm"):
        if os.path.exists(name) and not os.access(name, os.W_OK, effective_ids=effective):  # noqa: PTH110
            with suppress(OSError):
                os.chmod(name, stat.S_IMODE(os.stat(path).st_mode))  # noqa: PTH101, PTH116
    return True


def _has_open(file: FileId | None) -> bool:
    """Return whether this process has a file open, as far as the system shows it."""
    try:
        descriptors = os.listdir("/proc/self/fd")  # noqa: PTH208
    except OSError:
        return True
    for descriptor in descriptors:
        with suppress(OSError):
            found = os.fstat(int(descriptor))
            if (found.st_dev, found.st_ino) == file:
                return True
    return False


def _abandon(*objects: object) -> None:
    """Keep objects from ever being finalised, even at the interpreter's shutdown."""
    try:
        import ctypes  # noqa: PLC0415 - only a child with an inherited connection needs it

        for each in objects:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    except (ImportError, AttributeError):  # no ctypes, or another Python than CPython
        _abandoned.extend(objects)


def migrations() -> list[tuple[int, str]]:
    """Return the schema's SQL, for hosts that migrate their databases themselves.

    Returns:
        Version and SQL text, to be applied in this order, each text in one transaction. The store
        itself turns WAL mode on.
    """
    return _migrations("sqlite")


class SQLiteStore(SqlStore[Connection]):
    """A store in one SQLite file. See `ipguard.store.RestrictionStore` for its methods.

    Args:
        path: The file. If it does not exist, it is created and readable by its owner alone.
        timeout: How long a call may wait for locks, all its steps together, in seconds. The reads
            of the login path wait for at most one second of it.
        clock: Returns the current time as an aware datetime; the host's clock by default.
        migrate: Whether to bring the schema up to date. False only checks it, and creates no file.

    Raises:
        StoreConfigError: The file cannot be used: it belongs to another program, is a directory,
            not a database, or not writable.
        SchemaVersionError: The schema is not one that this library can use.
        StoreUnavailable: Other processes kept the file locked for longer than the timeout.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float = 5.0,
        clock: Callable[[], datetime] | None = None,
        migrate: bool | None = None,
    ) -> None:
        check_option(check_seconds, "timeout", timeout, above=0)
        self._path = _check_path(path)
        self._clock = clock
        self.timeout = timeout
        self._patience = min(timeout, _LOGIN_WAIT)
        self._pool = Pool(self._path, timeout)
        self._pool.open(migrate=migrate is not False)

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path}>"

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""
        return datetime.now(UTC) if self._clock is None else check_time("clock", self._clock())

    def close(self) -> None:
        """Wake all waiting threads and refuse every later call."""
        self._pool.close()

    def load_policy(self, username: str) -> Policy:
        """Load the policy of a user and the revision of the same snapshot."""
        return self._load(username, policy_of)

    def load_row(self, username: str) -> tuple[int, bytes]:
        """Load the packed policy of a user and the revision of the same snapshot."""
        return self._load(username, packed_row_of)

    def _load(self, username: str, decode: Callable[[str, list[Row]], T]) -> T:
        # Logins wait for this read, so it does without context managers.
        connection = self._pool.take(self._patience)
        try:
            loaded = decode(username, connection.rows(_POLICY, (username,) * 3))
        except BaseException:
            self._pool.discard(connection)
            raise
        self._pool.give(connection)
        return loaded

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision and the policies of all restricted users, from one snapshot."""
        return started(self._stream(policies_of))

    def load_all_rows(self) -> tuple[int, Iterator[tuple[str, bytes]]]:
        """Load the packed policies of all restricted users, from one snapshot."""
        return started(self._stream(packed_rows_of))

    def _stream(self, decode: Callable[[int, Iterator[Row]], Iterator[T]]) -> Iterator[int | T]:
        with self._pool.connection(patience=self._patience) as db, db.snapshot():
            revision, _ = head(db)
            yield revision
            with closing(db.stream(ALL_POLICIES)) as rows:
                for found in decode(revision, rows):
                    if self._pool.recalled(db):
                        raise StoreUnavailable(
                            f"{self._path}: forking, replaced, or the store is closed"
                        )
                    yield found

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return the store's position and the users whose policy changed since a revision."""
        with self._pool.connection(patience=self._patience) as db:
            _drop_cache(db)
            check_open_schema(*schema_version(db))
            rows = db.rows(CHANGES_SINCE, changes_params(cursor))
        found = changes_of(cursor, rows)
        replaced, self._pool.replaced = self._pool.replaced, False
        if cursor is not None and replaced:
            found = found._replace(usernames=RESET)
        if found.usernames is RESET:
            self._pool.forget()
        return found

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait for a change after `revision` that touches a policy; return whether there is one."""
        deadline = time.monotonic() + timeout
        pool = self._pool
        with pool.connection(patience=min(self._patience, max(0.0, timeout))) as db:
            version: object = None
            while True:
                # Read the version before the head: a commit in between is then seen next time.
                latest = db.rows("PRAGMA data_version")
                if latest != version and touching(db) > revision:
                    return True
                version = latest
                left = deadline - time.monotonic()
                # In each round: if the index is read-only, the version differs at every read.
                if left <= 0 or pool.recalled(db):
                    return False
                pool.stirred.wait(min(_POLL, left))

    @contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        with self._pool.connection() as connection, connection.snapshot():
            yield connection

    def _read(self, reading: Callable[[Connection], T], deadline: float) -> T:
        with self._pool.connection(patience=remaining(deadline)) as connection:
            return reading(connection)

    @contextmanager
    def _bulk(self) -> Iterator[Connection]:
        with self._pool.connection(keep=False, write=True) as connection:
            connection.run(f"PRAGMA cache_size = -{_BULK_CACHE}")
            yield connection

    def _step(self, connection: Connection) -> AbstractContextManager[None]:
        return connection.snapshot()

    def _refuse_nested(self) -> None:
        _fork.check()
        if self._pool.writer == threading.get_ident():
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def _write(
        self,
        *,
        users: bool = False,  # noqa: ARG002 - the lock excludes all writers
        deadline: float | None = None,
    ) -> Iterator[WriteTransaction]:
        patience = None if deadline is None else remaining(deadline)
        with (
            self._pool.connection(write=True, patience=patience) as connection,
            self._write_bulk(connection) as tx,
        ):
            yield tx

    @contextmanager
    def _write_bulk(
        self, connection: Connection, restrictions: BulkRestrictions | None = None
    ) -> Iterator[WriteTransaction]:
        # Threads of one process queue here, which is fairer and faster than polling the file.
        pool, began = self._pool, time.monotonic()
        lock, held = pool.writing, list[bool]()
        try:
            if not acquire(lock, connection.patience, held):
                raise StoreUnavailable(f"{pool.path}: no writer's lock within {pool.timeout:g} s")
            pool.writer = threading.get_ident()
            _drop_cache(connection)
            connection.patience = max(0.0, connection.patience - (time.monotonic() - began))
            connection.run("BEGIN IMMEDIATE")
            try:
                check_open_schema(*schema_version(connection))
                tx = WriteTransaction(connection, self.now(), head(connection), restrictions)
                try:
                    yield tx
                    tx.check_appended()
                    tx.check_process()
                    _commit(pool, connection)
                finally:
                    tx.over = True
            except BaseException:
                _roll_back(connection)
                raise
        finally:
            if True in held:
                if pool.writing is lock:  # a forked child has another
                    pool.writer = None
                lock.release()


def _drop_cache(connection: Connection) -> None:
    """Drop the connection's cache: SQLite does not notice a file copied over the database."""
    connection.run("PRAGMA shrink_memory")


def _commit(pool: Pool, connection: Connection) -> None:
    _check_files(pool, connection, "during the transaction")
    connection.run("COMMIT")
    _check_files(pool, connection, "during the commit, which may be lost")
    # Checkpoint: move the commit from the log to the database file. Afterwards it does no harm if
    # the log is lost or combined with another file. The commit holds even if this fails, for
    # example because of a reader.
    with suppress(sqlite3.Error):
        connection.cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _check_files(pool: Pool, connection: Connection, when: str) -> None:
    """Check that a commit goes to the files that other processes use."""
    if files_at(pool.path) != connection.files:
        connection.broken = True
        raise StoreUnavailable(f"{pool.path}: replaced {when}")


def _roll_back(connection: Connection) -> None:
    if connection.pid == os.getpid() and connection.driver.in_transaction:
        with suppress(StoreError):  # the pool then closes the connection, which rolls back too
            connection.run("ROLLBACK")


def _check_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or text.startswith(":memory:") or "\0" in text:
        raise StoreConfigError("SQLite needs the path of a file; for memory use memory://")
    if not encodable(text):
        raise StoreConfigError("SQLite needs the path of a file in UTF-8")
    # Absolute, so that it stays the same file when the process changes its directory.
    return os.path.abspath(text)  # noqa: PTH100 - must not resolve links
