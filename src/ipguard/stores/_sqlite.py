"""The connections of the SQLite store: how they are opened, lent, and kept out of forked children.

Each thread inside a call has a connection of its own; between calls they wait in a pool, so a thread
that ends leaves nothing behind.

Fork. SQLite forbids to use or close a connection in a child. It is worse than that: a child that
inherits an open connection cannot open a sound one either. SQLite keeps one table of locks for each
file in a process, the child inherits it, and takes locks for held that belong to its parent; when the
parent then closes, it deletes the log under the child, and what the child commits is lost. So there
is nothing to inherit: before a fork the pool waits for calls to end and closes every connection. What
cannot be waited for (the forking thread's own transaction) is abandoned in the child, never closed,
and the child's store refuses that file.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from json import dumps
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import Params, Row

T = TypeVar("T")
FileId = tuple[int, int]  # device and inode

_IDLE_AT_MOST: Final = 16
_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",  # a commit that was acknowledged survives a power cut
    "PRAGMA fullfsync = ON",  # the same on macOS
    "PRAGMA foreign_keys = ON",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA temp_store = FILE",  # what is staged may be large
)


class Session:
    """One connection, lent to one thread at a time. It is the `Executor` of SQLite."""

    __slots__ = ("connection", "cursor", "deadline_after", "file", "pid", "thread")

    def __init__(self, connection: sqlite3.Connection, file: FileId, timeout: float) -> None:
        self.connection = connection
        self.cursor = (
            connection.cursor()
        )  # making one for each statement costs a third of a look-up
        self.file = file
        self.deadline_after = timeout
        self.pid = os.getpid()
        self.thread = threading.get_ident()

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        try:
            return self.cursor.execute(sql, params).fetchall()
        except sqlite3.OperationalError as exc:
            if not is_busy(exc):
                raise
        return self._again(lambda: self.cursor.execute(sql, params).fetchall())

    def run(self, sql: str, params: Params = ()) -> None:
        self.rows(sql, params)

    def run_many(self, sql: str, rows: Iterable[Params]) -> None:
        # A cursor of its own: `rows` may come from queries on this connection.
        self.connection.executemany(sql, rows)

    def among(self, column: str) -> str:
        return f"{column} IN (SELECT value FROM json_each(?))"

    def texts(self, values: Iterable[str]) -> object:
        return dumps(list(values), ensure_ascii=False)

    def _again(self, attempt: Callable[[], T]) -> T:
        return patiently(attempt, self.deadline_after)

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """Run the block's statements against one committed state."""
        self.run("BEGIN")
        yield self
        # Without an exception only: after one the connection is closed, which ends it as well.
        self.run("COMMIT")


def is_busy(exc: sqlite3.Error) -> bool:
    """Tell whether another connection is in the way, so that trying again may help."""
    # Errors that the sqlite3 module raises by itself have no code.
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def patiently(attempt: Callable[[], T], timeout: float) -> T:
    """Try until nobody is in the way, for a bounded time.

    SQLite's own busy handler sleeps up to 100 ms at a time, and some statements ignore it.

    Args:
        attempt: What to try; nothing has happened when it raises that the database is busy.
        timeout: How long, in seconds.

    Raises:
        sqlite3.OperationalError: It still was busy at the end, or something else is wrong.
    """
    deadline = time.monotonic() + timeout
    longest = 0.001
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as exc:
            left = deadline - time.monotonic()
            if not is_busy(exc) or left <= 0:
                raise
        time.sleep(min(random.uniform(0.2, 1) * longest, left))  # noqa: S311 - no secret
        longest = min(longest * 2, 0.01)


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Let no exception of the driver out."""
    try:
        yield
    except sqlite3.Error as exc:
        raise error_of(path, exc) from exc


def error_of(path: str, exc: sqlite3.Error) -> StoreError:
    """Return the library's error for a driver's."""
    if isinstance(exc, sqlite3.IntegrityError):
        return StoreError(f"{path}: the change contradicts what is stored: {exc}")
    if is_busy(exc):
        return StoreUnavailable(f"{path}: locked by another writer for too long")
    return StoreUnavailable(f"{path}: {exc}")


# Files of which this process inherited an open connection through a fork; see the module.
_inherited: set[FileId] = set()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_abandoned: list[object] = []


class Pool:
    """The connections to one file.

    Args:
        path: The file, absolute.
        timeout: How long anything may wait, in seconds.
        check: Called with each new connection; raises where the file is not a database of ours.
    """

    def __init__(self, path: str, timeout: float, check: Callable[[Session], None]) -> None:
        self.path = path
        self.timeout = timeout
        self.check = check
        self._file: FileId | None = None
        self._logs: dict[str, FileId] = {}
        self._closed = False
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._idle: deque[Session] = deque()
        self._open: set[Session] = set()  # idle or lent
        self._opening = threading.Lock()
        self.writing = threading.Lock()
        self.writer: int | None = None
        self._paused = self._forking = False
        self.stirred = threading.Event()
        if self._closed:
            self.stirred.set()

    # ------------------------------------------------------------------------- lending

    def take(self) -> Session:
        """Lend a connection to this thread.

        Raises:
            StoreUnavailable: The store is closed, or the file cannot be opened.
        """
        while True:
            if self._closed or self._paused or self._pid != os.getpid():
                self._make_ready()
            try:
                session = self._idle.pop()
            except IndexError:
                return self._connect()
            session.thread = threading.get_ident()
            if session.file == self._file:
                return session
            self.discard(session)

    def give(self, session: Session) -> None:
        """Take a connection back that is in no transaction."""
        if session.pid != os.getpid():
            return  # inherited: abandoned already
        if session.file != self._file or len(self._idle) >= _IDLE_AT_MOST:
            self.discard(session)
            return
        session.thread = 0
        self._idle.append(session)
        # Tested afterwards: who closes or forks sets its mark first, and then empties the pool.
        if self._closed or self._paused:
            self._drain()

    def discard(self, session: Session) -> None:
        """Close a connection, whatever state it is in; in a child, leave it alone."""
        if session.pid != os.getpid():
            return
        with suppress(sqlite3.Error):
            session.connection.close()
        self._open.discard(session)

    @contextmanager
    def session(self, *, keep: bool = True) -> Iterator[Session]:
        """Lend a connection to the file that is at the path now; close it if the block raises.

        Args:
            keep: Whether it may be used again afterwards.
        """
        self.follow()
        session = self.take()
        try:
            with translated(self.path):
                yield session
        except BaseException:
            self.discard(session)
            raise
        if keep:
            self.give(session)
        else:
            self.discard(session)

    def _make_ready(self) -> None:
        if self._pid != os.getpid():
            self.after_fork_in_child()
        deadline = time.monotonic() + self.timeout
        while self._paused and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._closed:
            raise StoreUnavailable(f"{self.path}: the store is closed")
        if self._paused:
            raise StoreUnavailable(f"{self.path}: a fork is taking too long")

    def _drain(self) -> None:
        while True:
            try:
                session = self._idle.pop()
            except IndexError:
                return
            self.discard(session)

    @property
    def moving(self) -> bool:
        """Whether whoever waits with a connection in hand has to give it back now."""
        return self._closed or self._paused

    def forget(self) -> None:
        """Close what is idle: what those connections have cached is of no use any more."""
        self._drain()

    def close(self) -> None:
        """Close what is idle now, and what is lent as soon as it comes back."""
        self._closed = True
        self.stirred.set()
        if self._pid == os.getpid():
            self._drain()

    # ------------------------------------------------------------------------- opening

    def _connect(self) -> Session:
        # One at a time, so that a fork can tell whether a connection is half open.
        if not self._opening.acquire(timeout=self.timeout):
            raise StoreUnavailable(f"{self.path}: could not be opened within {self.timeout:g} s")
        try:
            if self._closed:
                raise StoreUnavailable(f"{self.path}: the store is closed")
            with translated(self.path):
                session = self._opened()
            self._open.add(session)
            return session
        finally:
            self._opening.release()

    def _opened(self) -> Session:
        self.follow()
        file = file_id(self.path)
        if file in _inherited:
            raise StoreUnavailable(
                f"{self.path}: this process was forked while its parent had the file open"
            )
        connection = sqlite3.connect(
            f"file:{quote(self.path)}?mode=rw",  # never makes a file: an empty one allows everybody
            uri=True,
            timeout=0,  # see `patiently`
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            session = Session(connection, file, self.timeout)
            self.check(session)
            for pragma in _PRAGMAS:
                session.run(pragma)
            if file_id(self.path) != file:
                raise StoreUnavailable(f"{self.path}: replaced while it was being opened")
        except BaseException:
            connection.close()
            raise
        self._file = file
        self._logs = self._find_logs()
        return session

    # ------------------------------------------------------------------------- replaced files

    def follow(self) -> bool:
        """Let go of the file that was at the path if another one is there now.

        Returns:
            Whether another one is.

        Raises:
            StoreUnavailable: Nothing is there, or the old file's log is: SQLite would apply it to the
                new file.
        """
        if self._file is None or file_id(self.path) == self._file:
            return False
        if self._pid == os.getpid() and self._open and self._left_over():
            raise StoreUnavailable(
                f"{self.path}: replaced, but the -wal and -shm files beside it belong to the old"
                " database; remove both"
            )
        self._file = None
        self._drain()
        return True

    def _find_logs(self) -> dict[str, FileId]:
        found = {}
        for suffix in ("-wal", "-shm"):
            with suppress(StoreUnavailable):
                found[suffix] = file_id(self.path + suffix)
        return found

    def _left_over(self) -> bool:
        # Our open connections keep these inodes from being used again, so equal means the same.
        now = self._find_logs()
        same = {suffix for suffix, file in now.items() if self._logs.get(suffix) == file}
        if "-wal" in same:
            return Path(self.path + "-wal").stat().st_size > 0
        return "-shm" in same

    # ------------------------------------------------------------------------- fork

    def before_fork(self) -> None:
        """Close every connection, waiting for those that other threads are using."""
        self._paused = True
        self.stirred.set()
        me, deadline = threading.get_ident(), time.monotonic() + self.timeout
        self._forking = self._opening.acquire(timeout=self.timeout)
        self._drain()
        while any(s.thread != me for s in tuple(self._open)) and time.monotonic() < deadline:
            time.sleep(0.0005)
            self._drain()

    def after_fork_in_parent(self) -> None:
        """Let calls go on."""
        if not self._closed:
            self.stirred.clear()
        self._paused = False
        if self._forking:
            self._forking = False
            self._opening.release()

    def after_fork_in_child(self) -> None:
        """Abandon what was inherited, for good, and begin anew."""
        for session in self._open:
            _abandon(session.connection, session.cursor)
            _inherited.add(session.file)
        if self._opening.locked() and not self._forking:  # a connection was half open
            with suppress(StoreUnavailable):
                _inherited.add(file_id(self.path))
        self._begin()


def file_id(path: str) -> FileId:
    """Return the device and inode of a file.

    Raises:
        StoreUnavailable: It is not there, or may not be seen.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - on the way of every sync
    except OSError as exc:
        raise StoreUnavailable(f"{path}: {exc.strerror}") from exc
    return found.st_dev, found.st_ino


# Making a file opens and closes it, and closing drops every lock that the process has on it: nobody
# may have opened it in between.
_making = threading.Lock()


def make_file(path: str) -> None:
    """Make an empty file that its owner alone can read, if nothing is there.

    Raises:
        StoreConfigError: It cannot be made.
    """
    with _making:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return
        except OSError as exc:
            raise StoreConfigError(f"{path}: cannot be made: {exc.strerror}") from exc


def _abandon(*objects: object) -> None:
    """See to it that objects are never finalised, not even at the interpreter's shutdown."""
    try:
        import ctypes  # noqa: PLC0415 - only children that inherited something need it

        for each in objects:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    except (ImportError, AttributeError):  # no ctypes, or not CPython
        _abandoned.extend(objects)


def _before() -> None:
    for pool in tuple(_pools):
        if pool._pid == os.getpid():
            pool.before_fork()


def _in_parent() -> None:
    for pool in tuple(_pools):
        if pool._pid == os.getpid():
            pool.after_fork_in_parent()


def _in_child() -> None:
    global _making  # noqa: PLW0603 - a thread that is not there any more may have held it
    _making = threading.Lock()
    for pool in tuple(_pools):
        if pool._pid != os.getpid():
            pool.after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
