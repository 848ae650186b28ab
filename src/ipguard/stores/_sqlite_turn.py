"""The writer's turn in SQLite: waited for, taken, and committed or undone as a whole."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from ipguard import _fork
from ipguard._locks import acquire
from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores import _sql_read as read
from ipguard.stores import _sqlite_schema as schema
from ipguard.stores._sql import Params, Row
from ipguard.stores._sql_staged import StagedRestrictions
from ipguard.stores._sql_write import SqlTransaction
from ipguard.stores._sqlite import Session, files_at
from ipguard.stores._sqlite_pool import Pool


class Turn:
    """The `Executor` of one transaction: of no use when that is over, or in a forked child."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.over = False

    def check_process(self) -> None:
        if self._session.pid != os.getpid():
            raise StoreUnavailable(f"{self._session.path}: the transaction is the parent process's")

    def _usable(self) -> Session:
        self.check_process()
        if self.over:
            raise RuntimeError("this transaction is over")
        return self._session

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        return self._usable().rows(sql, params)

    def run(self, sql: str, params: Params = ()) -> None:
        self._usable().run(sql, params)

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        self._usable().insert_many(table, columns, rows)

    def among(self, column: str) -> str:
        return self._session.among(column)

    def each(self) -> str:
        return self._session.each()

    def texts(self, values: Iterable[str]) -> object:
        return self._session.texts(values)


def refuse_nested(pool: Pool) -> None:
    """See that this thread is in no turn already: it would wait for itself.

    Raises:
        RuntimeError: It is in one.
    """
    _fork.check()
    if pool.writer == threading.get_ident():
        raise RuntimeError("this thread is in a transaction of this store already")


@contextmanager
def take_turn(
    pool: Pool,
    session: Session,
    now: Callable[[], datetime],
    staged: StagedRestrictions | None = None,
) -> Iterator[tuple[SqlTransaction, Turn]]:
    """Take the writer's turn for the block, which commits when it is left.

    Args:
        pool: Whose turn it is.
        session: A connection of this thread's.
        now: Asked for the store's time once the turn is taken.
        staged: The restrictions that wait in the connection to be added.

    Raises:
        StoreUnavailable: The turn could not be had in time, or the outcome of the commit is lost.
    """
    # Threads of one process queue here, which is fairer and faster than polling the file.
    began = time.monotonic()
    lock, held = pool.writing, list[bool]()
    try:
        if not acquire(lock, session.patience, held):
            raise StoreUnavailable(f"{pool.path}: no writer's turn within {pool.timeout:g} s")
        pool.writer = threading.get_ident()
        session.run("PRAGMA shrink_memory")  # see `SQLiteStore.changes_since`
        session.patience = max(0.0, session.patience - (time.monotonic() - began))
        session.run("BEGIN IMMEDIATE")
        db = Turn(session)
        try:
            schema.check_version(session)
            revision, _ = read.head(db)
            turn = SqlTransaction(db, now(), revision=revision, staged=staged)
            yield turn, db
            _commit(pool, session, db)
        except BaseException:
            _roll_back(session)
            raise
        finally:
            db.over = True
    finally:
        if True in held:
            if pool.writing is lock:  # a forked child has another
                pool.writer = None
            lock.release()


def _commit(pool: Pool, session: Session, db: Turn) -> None:
    db.check_process()
    _check_files(pool, session, "during the transaction")
    session.run("COMMIT")
    _check_files(pool, session, "during the commit, which may be lost")
    _empty_log(session)


def _check_files(pool: Pool, session: Session, when: str) -> None:
    """See that a commit goes to the files that other processes use."""
    if files_at(pool.path) != session.files:
        session.broken = True
        raise StoreUnavailable(f"{pool.path}: replaced {when}")


def _empty_log(session: Session) -> None:
    """Move what was committed into the database file, unless a reader is in the way.

    Afterwards a log that is lost, or left beside another file, does no harm.
    """
    with suppress(sqlite3.Error):  # the commit stands all the same
        session.cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _roll_back(session: Session) -> None:
    if session.pid == os.getpid() and session.connection.in_transaction:
        with suppress(StoreError):  # then the pool closes it, which undoes the same
            session.run("ROLLBACK")
