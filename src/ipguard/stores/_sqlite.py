"""One connection of the SQLite store, and how long and in which words it fails."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from json import dumps
from typing import NamedTuple

from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores._sql import Params, Row

FileId = tuple[int, int]  # device and inode


class Files(NamedTuple):
    """The identities of the database file, its log and its index."""

    main: FileId
    wal: FileId | None
    shm: FileId | None


def file_id(path: str) -> FileId:
    """Return the device and inode of a file.

    Raises:
        StoreUnavailable: It does not exist, or may not be read.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - on the way of every sync
    except OSError as exc:
        raise StoreUnavailable(f"{path}: {exc.strerror}") from exc
    return found.st_dev, found.st_ino


def files_at(path: str) -> Files:
    """Return the identities of the three files of a database.

    Raises:
        StoreUnavailable: The database file does not exist, or may not be read.
    """
    main, wal, shm = file_id(path), None, None
    with suppress(StoreUnavailable):
        wal = file_id(path + "-wal")
    with suppress(StoreUnavailable):
        shm = file_id(path + "-shm")
    return Files(main, wal, shm)


class Session:
    """One connection, lent to one thread at a time. It is the `Executor` of SQLite.

    Args:
        connection: The connection, in autocommit.
        path: Its file, for messages.
        files: The files that it has open.
        patience: How long its statements may wait for locks, all together, in seconds.

    Attributes:
        broken: Whether a statement has failed, or the connection is being closed. It is not used
            again.
        busy: Whether a statement is in progress, or was interrupted.
    """

    __slots__ = (
        "__weakref__",
        "broken",
        "busy",
        "connection",
        "cursor",
        "files",
        "path",
        "patience",
        "pid",
        "thread",
        "unwritable",
    )

    def __init__(
        self, connection: sqlite3.Connection, path: str, files: Files, patience: float
    ) -> None:
        self.connection = connection
        self.cursor = connection.cursor()  # a new one for each statement is slower
        self.path = path
        self.files = files
        self.patience = patience
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.broken = False  # failed, or being closed
        self.busy = False
        self.unwritable = False  # opened while the files were read-only, or failed to use them

    def __del__(self) -> None:
        if self.pid == os.getpid():
            self.connection.close()

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        self.busy = True
        try:
            found = self.cursor.execute(sql, params).fetchall()
        except sqlite3.Error as exc:
            if not _is_busy(exc):
                raise self._failure(exc) from exc
        else:
            self.busy = False
            return found
        return self._patiently(sql, params)

    def run(self, sql: str, params: Params = ()) -> None:
        self.rows(sql, params)

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        marks = ", ".join("?" * len(columns.split(",")))
        try:
            # A cursor of its own: `rows` may come from queries on this connection.
            self.connection.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    def among(self, column: str) -> str:
        return f"{column} IN (SELECT value FROM json_each(?))"

    def each(self) -> str:
        return "json_each(?) j"

    def texts(self, values: Iterable[str]) -> object:
        # A hundred thousand account ids are written sooner like this, where nothing is to escape.
        texts = list(values)
        joined = '","'.join(texts)
        if "\\" in joined or not joined.isprintable() or joined.count('"') != 2 * len(texts) - 2:
            return dumps(texts, ensure_ascii=False)
        return f'["{joined}"]'

    def stream(self, sql: str) -> Generator[Row, None, None]:
        """Run a query and give its rows as they are read."""
        try:
            yield from self.cursor.execute(sql)
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    def _patiently(self, sql: str, params: Params) -> list[Row]:
        """Retry a statement while the database is locked, within the session's patience.

        SQLite's own busy handler is off: it sleeps up to 100 ms at a time, some statements ignore
        it, and it gives each statement the whole timeout again.
        """
        deadline = time.monotonic() + self.patience
        longest = 0.001
        try:
            while (left := deadline - time.monotonic()) > 0:
                jitter = random.uniform(0.2, 1)  # noqa: S311 - no secret
                time.sleep(min(jitter * longest, left))
                longest = min(longest * 2, 0.01)
                try:
                    found = self.cursor.execute(sql, params).fetchall()
                except sqlite3.OperationalError as exc:
                    if not _is_busy(exc):
                        raise self._failure(exc) from exc
                else:
                    self.busy = False
                    return found
        finally:
            self.patience = max(0.0, deadline - time.monotonic())
        self.broken = True
        raise StoreUnavailable(f"{self.path}: locked by others for too long")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Run the block's statements against one committed state."""
        self.run("BEGIN")
        yield
        # Not after an exception: the pool then closes the connection, which ends it as well.
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
    """Return the library's error for a driver's."""
    if isinstance(exc, sqlite3.IntegrityError):
        return StoreError(f"{path}: the change contradicts what is stored: {exc}")
    if _is_busy(exc):
        return StoreUnavailable(f"{path}: locked by others for too long")
    return StoreUnavailable(f"{path}: {exc}")
