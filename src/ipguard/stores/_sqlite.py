"""One connection of the SQLite store, and how long and in which words it fails."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from json import dumps
from typing import TypeVar

from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores._sql import Params, Row

T = TypeVar("T")
FileId = tuple[int, int]  # device and inode


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


class Session:
    """One connection, lent to one thread at a time. It is the `Executor` of SQLite.

    Args:
        connection: The connection, in autocommit.
        path: Its file, for messages.
        file: Which file that is.
        timeout: How long a statement may wait, in seconds.
    """

    __slots__ = ("broken", "connection", "cursor", "file", "path", "pid", "thread", "timeout")

    def __init__(
        self, connection: sqlite3.Connection, path: str, file: FileId, timeout: float
    ) -> None:
        self.connection = connection
        self.cursor = connection.cursor()  # a new one for each statement is slower
        self.path = path
        self.file = file
        self.timeout = timeout
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.broken = False

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        try:
            return self.cursor.execute(sql, params).fetchall()
        except sqlite3.Error as exc:
            if not _is_busy(exc):
                raise self._failure(exc) from exc
        return self.patiently(sql, params, self.timeout)

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

    def patiently(self, sql: str, params: Params, timeout: float) -> list[Row]:
        """Run a statement until nobody is in the way, for a bounded time.

        SQLite's own busy handler is off: it sleeps up to 100 ms at a time, and some statements
        ignore it.
        """
        try:
            return patiently(lambda: self.cursor.execute(sql, params).fetchall(), timeout)
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Run the block's statements against one committed state."""
        self.run("BEGIN")
        yield
        # Not after an exception: the pool then closes the connection, which ends it as well.
        self.run("COMMIT")

    def _failure(self, exc: sqlite3.Error) -> StoreError:
        self.broken = not isinstance(exc, sqlite3.IntegrityError)
        return error_of(self.path, exc)


def patiently(attempt: Callable[[], T], timeout: float) -> T:
    """Try until nobody is in the way, for a bounded time.

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
            if not _is_busy(exc) or left <= 0:
                raise
        time.sleep(min(random.uniform(0.2, 1) * longest, left))  # noqa: S311 - no secret
        longest = min(longest * 2, 0.01)


def _is_busy(exc: sqlite3.Error) -> bool:
    # Errors that the sqlite3 module raises by itself have no code.
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def error_of(path: str, exc: sqlite3.Error) -> StoreError:
    """Return the library's error for a driver's."""
    if isinstance(exc, sqlite3.IntegrityError):
        return StoreError(f"{path}: the change contradicts what is stored: {exc}")
    if _is_busy(exc):
        return StoreUnavailable(f"{path}: locked by others for too long")
    return StoreUnavailable(f"{path}: {exc}")
