"""The store in one SQLite file, for one machine: any number of threads and processes.

It relies on WAL mode, so that readers and the writer do not block each other; on
`synchronous=FULL`, so that a committed change survives a power cut; and on `BEGIN IMMEDIATE`, so
that there is one writer at a time. The file must be on a local disk, because WAL needs shared
memory.

Known limits:

* A replaced database file, and a `-wal` or `-shm` file that was removed, is detected by the next
  `changes_since` or transaction. Until then policies are read from the old files; the lease of a
  guard bounds how long that is.
* Restore through SQLite's backup (`.restore`), or remove the `-wal` and `-shm` files together with
  the old file: SQLite applies a left-over log to the new file. A store that used the old file
  is unavailable until the log is removed. A store that is opened afterwards cannot detect it.
* A commit at the very moment in which the `-wal` file is removed can be lost although it was
  acknowledged.
* If the file vanished, the store is unavailable. A file is created on opening only, never later: a
  new empty database has no restrictions.
* A process that forks inside its own transaction, or while another thread stays in one for longer
  than the timeout, has a child whose store is unavailable.
* A disk that hangs blocks the call; SQLite has no deadline for that.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import Final, TypeVar

from ipguard import _fork
from ipguard._checks import check_seconds, check_time
from ipguard._fork import acquire
from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.model import RESET, Changes, Policy
from ipguard.stores._sql import (
    ALL_POLICIES,
    CHANGES_SINCE,
    POLICY,
    SCHEMA_VERSION,
    Executor,
    changes_of,
    changes_params,
    check_option,
    encodable,
    head,
    policies_of,
    policy_of,
    touching,
)
from ipguard.stores._sql import migrations as _migrations
from ipguard.stores._sql.bulk import BulkRestrictions
from ipguard.stores._sql.store import SqlStore, WriteTransaction
from ipguard.stores.sqlite import _schema as schema
from ipguard.stores.sqlite._pool import Connection, Pool, files_at, remaining

__all__ = ["SCHEMA_VERSION", "SQLiteStore", "migrations"]

T = TypeVar("T")

_POLL: Final = 0.005
_LOGIN_WAIT: Final = 1.0  # seconds; readers wait only while another program locks the whole file
_BULK_CACHE: Final = 131_072  # KiB: an import of a million rows reads the same index pages again
_POLICY: Final = POLICY % ("?", "NULL")


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

    _WRITES_AHEAD = False

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
        self._pool = Pool(self._path, timeout, schema.check)
        schema.prepare(self._pool, migrate=migrate is not False)

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path}>"

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""
        return datetime.now(UTC) if self._clock is None else check_time("clock", self._clock())

    def close(self) -> None:
        """Wake all waiting threads and refuse every later call."""
        self._pool.close()

    # ------------------------------------------------------------------------- the reads of guards

    def load_policy(self, username: str) -> Policy:
        """Load the policy of a user and the revision of the same snapshot."""
        # Logins wait for this read, so it does without context managers.
        connection = self._pool.take(self._patience)
        try:
            rows = connection.rows(_POLICY, (username,) * 3)
            policy = policy_of(username, rows)
        except BaseException:
            self._pool.discard(connection)
            raise
        self._pool.give(connection)
        return policy

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Load the policies of all restricted users, from one snapshot."""
        stream = self._stream()
        # Start it here, so that the snapshot is of now, and closing the iterator always ends it.
        revision = next(stream)
        assert isinstance(revision, int)
        return revision, stream  # type: ignore[return-value]

    def _stream(self) -> Iterator[int | tuple[str, Policy]]:
        with self._pool.connection(patience=self._patience) as db, db.snapshot():
            revision, _ = head(db)
            yield revision
            with closing(db.stream(ALL_POLICIES)) as rows:
                for found in policies_of(revision, rows):
                    if self._pool.recalled(db):
                        raise StoreUnavailable(
                            f"{self._path}: forking, replaced, or the store is closed"
                        )
                    yield found

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return the store's position and the users whose policy changed since a revision."""
        with self._pool.connection(patience=self._patience) as db:
            _drop_cache(db)
            db.check_schema()
            rows = db.rows(CHANGES_SINCE, changes_params(cursor))
        found = changes_of(cursor, rows)
        replaced, self._pool.replaced = self._pool.replaced, False
        if cursor is not None and replaced:
            found = found._replace(usernames=RESET)
        if found.usernames is RESET:
            self._pool.forget()
        return found

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy, or the store is closed."""
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
                # Check each time: with a read-only index, each read sees another version.
                if left <= 0 or pool.recalled(db):
                    return False
                pool.stirred.wait(min(_POLL, left))

    # ------------------------------------------------------------------------- connections

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

    def _lock_users(self, _db: Connection) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def _pruning(self) -> Iterator[Executor]:
        with self._write() as (_, db):
            yield db

    # ------------------------------------------------------------------------- write transactions

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
    ) -> Iterator[tuple[WriteTransaction, Executor]]:
        patience = None if deadline is None else remaining(deadline)
        with (
            self._pool.connection(write=True, patience=patience) as connection,
            self._write_bulk(connection) as both,
        ):
            yield both

    @contextmanager
    def _write_bulk(
        self, connection: Connection, restrictions: BulkRestrictions | None = None
    ) -> Iterator[tuple[WriteTransaction, Executor]]:
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
            tx = None
            try:
                connection.check_schema()
                revision, _ = head(connection)
                tx = WriteTransaction(connection, self.now(), revision=revision, bulk=restrictions)
                yield tx, connection
                tx.check_process()
                _commit(pool, connection)
            except BaseException:
                _roll_back(connection)
                raise
            finally:
                if tx is not None:
                    tx.end()
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
    # Move the commit into the database file, unless a reader is in the way: then a log that is
    # lost, or combined with another file, does no harm. The commit holds even if this fails.
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
