"""The connections of the SQLite store: how they are opened, lent, and kept out of forked children.

Each thread inside a call has a connection of its own. Between calls they wait in a pool, so that a
thread that ends leaves nothing behind.

Fork. SQLite forbids to use or to close a connection in a child. It is worse than that: a child that
inherits an open connection cannot open a sound one either. SQLite keeps one table of locks for each
file in a process; the child inherits it, and takes locks for held that are its parent's. When the
parent then closes the file, it deletes the log under the child, and what the child commits is lost.
So there is nothing to inherit: before a fork the pool waits for calls to end and closes every
connection. What cannot be waited for (the forking thread's own transaction) is abandoned in the
child and never closed, and the child's store refuses that file.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import quote

from ipguard.errors import StoreConfigError, StoreUnavailable
from ipguard.stores._sqlite import FileId, Session, error_of, file_id

_IDLE_AT_MOST: Final = 16
_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",  # a commit that was acknowledged survives a power cut
    "PRAGMA fullfsync = ON",  # the same on macOS
    "PRAGMA foreign_keys = ON",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA temp_store = FILE",  # what is staged may be large
)


class Pool:
    """The connections to one file.

    Args:
        path: The file, absolute.
        timeout: How long anything may wait, in seconds.
        check: Called with each new connection; raises where the file is not to be used.
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
        self.pid = os.getpid()
        self._idle: deque[Session] = deque()
        self._open: set[Session] = set()  # idle or lent
        self._opening = threading.Lock()
        self.writing = threading.Lock()
        self.writer: int | None = None  # the thread that holds `writing`
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
            if self._closed or self._paused or self.pid != os.getpid():
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
        """Take a connection back; one that is not whole is closed."""
        if session.pid != os.getpid():
            return  # inherited: abandoned already
        if (
            session.broken
            or session.connection.in_transaction
            or session.file != self._file
            or len(self._idle) >= _IDLE_AT_MOST
        ):
            self.discard(session)
            return
        session.thread = 0
        self._idle.append(session)
        # Tested afterwards: who closes or forks sets its mark first, and then empties the pool.
        if self._closed or self._paused:
            self.forget()

    def discard(self, session: Session) -> None:
        """Close a connection, whatever state it is in; in a child, leave it alone."""
        if session.pid != os.getpid():
            return
        with suppress(sqlite3.Error):
            session.connection.close()
        self._open.discard(session)

    @contextmanager
    def session(self, *, keep: bool = True) -> Iterator[Session]:
        """Lend a connection to the file that is at the path now.

        Args:
            keep: Whether it may be used again afterwards.
        """
        self.follow()
        session = self.take()
        try:
            yield session
        except Exception:
            if keep:
                self.give(session)
            else:
                self.discard(session)
            raise
        except BaseException:
            # Interrupted anywhere, perhaps half way through a query.
            self.discard(session)
            raise
        if keep:
            self.give(session)
        else:
            self.discard(session)

    def _make_ready(self) -> None:
        if self.pid != os.getpid():
            self.after_fork_in_child()
        deadline = time.monotonic() + self.timeout
        while self._paused and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._closed:
            raise StoreUnavailable(f"{self.path}: the store is closed")
        if self._paused:
            raise StoreUnavailable(f"{self.path}: a fork is taking too long")

    @property
    def moving(self) -> bool:
        """Whether whoever waits with a connection in hand has to give it back now."""
        return self._closed or self._paused

    def forget(self) -> None:
        """Close what is idle, and with it what those connections have cached."""
        while True:
            try:
                session = self._idle.pop()
            except IndexError:
                return
            self.discard(session)

    def close(self) -> None:
        """Close what is idle now, and what is lent as soon as it comes back."""
        self._closed = True
        self.stirred.set()
        if self.pid == os.getpid():
            self.forget()

    # ------------------------------------------------------------------------- opening

    def _connect(self) -> Session:
        # One at a time, so that a fork can tell whether a connection is half open.
        if not self._opening.acquire(timeout=self.timeout):
            raise StoreUnavailable(f"{self.path}: could not be opened within {self.timeout:g} s")
        try:
            if self._closed:
                raise StoreUnavailable(f"{self.path}: the store is closed")
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
                f"{self.path}: this process was forked while its parent was using the file"
            )
        try:
            connection = sqlite3.connect(
                f"file:{quote(self.path)}?mode=rw",  # never a new file: an empty one allows all
                uri=True,
                timeout=0,  # see `Session.patiently`
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as exc:
            raise error_of(self.path, exc) from exc
        try:
            session = Session(connection, self.path, file, self.timeout)
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
            StoreUnavailable: Nothing is there, or the old file's log is: SQLite would apply it to
                the new file.
        """
        if self._file is None or file_id(self.path) == self._file:
            return False
        if self.pid == os.getpid() and self._open and self._left_over():
            raise StoreUnavailable(
                f"{self.path}: replaced, but the -wal and -shm files beside it belong to the old"
                " database: remove both, as they would damage the new one"
            )
        self._file = None
        self.forget()
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
            return os.stat(self.path + "-wal").st_size > 0  # noqa: PTH116
        return "-shm" in same

    # ------------------------------------------------------------------------- fork

    def before_fork(self) -> None:
        """Close every connection, waiting for those that other threads are using."""
        self._paused = True
        self.stirred.set()
        me, deadline = threading.get_ident(), time.monotonic() + self.timeout
        self._forking = self._opening.acquire(timeout=self.timeout)
        self.forget()
        while any(s.thread != me for s in tuple(self._open)) and time.monotonic() < deadline:
            time.sleep(0.0005)
            self.forget()

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


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
# Files of which this process inherited an open connection; see the module.
_inherited: set[FileId] = set()
_abandoned: list[object] = []
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
        import ctypes  # noqa: PLC0415 - only a child that inherited something needs it

        for each in objects:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    except (ImportError, AttributeError):  # no ctypes, or not CPython
        _abandoned.extend(objects)


def _before() -> None:
    for pool in tuple(_pools):
        if pool.pid == os.getpid():
            pool.before_fork()


def _in_parent() -> None:
    for pool in tuple(_pools):
        if pool.pid == os.getpid():
            pool.after_fork_in_parent()


def _in_child() -> None:
    global _making  # noqa: PLW0603 - a thread that is not there any more may have held it
    _making = threading.Lock()
    for pool in tuple(_pools):
        if pool.pid != os.getpid():
            pool.after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
