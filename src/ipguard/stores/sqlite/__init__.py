"""The store in one SQLite file, for one machine: any number of threads and processes.

It stands on SQLite's own promises: WAL, so that readers and the writer do not wait for each other;
`synchronous=FULL`, so that what was committed survives a power cut; `BEGIN IMMEDIATE`, so that
there is one writer at a time. The file has to be on a local disk, as WAL needs shared memory.

Limits, stated:

* A replaced database file, and a `-wal` or `-shm` file that was removed, is detected by the next
  `changes_since` or transaction. Until then policies are read from the old files; the lease of a
  guard bounds how long that is.
* Restore through SQLite's backup (`.restore`), or remove the `-wal` and `-shm` files together with
  the old file: SQLite applies a log that was left to the new file. A store that used the old file
  is unavailable until the log is gone. A store that is opened afterwards cannot detect it.
* A commit of the very moment in which the `-wal` file is removed can be lost although it was
  acknowledged.
* If the file vanished, the store is unavailable. A file is created on opening only, never later: a
  new empty database has no restrictions.
* A process that forks inside its own transaction, or while another thread stays in one for longer
  than the timeout, has a child whose store is unavailable.
* A disk that hangs hangs the call; SQLite has no deadline for that.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from datetime import UTC, datetime
from typing import Final

from ipguard import _fork
from ipguard._checks import check_time
from ipguard._fork import acquire
from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.model import (
    RESET,
    Accounts,
    Change,
    Changes,
    Page,
    Policy,
    Restriction,
    User,
    UserOverview,
)
from ipguard.store import Closing, Snapshot, Transaction, log_change
from ipguard.stores._sql import SCHEMA_VERSION, Params, Row, encodable
from ipguard.stores._sql import bulk as users_of
from ipguard.stores._sql import listing as pages
from ipguard.stores._sql import migrations as _migrations
from ipguard.stores._sql import policies as read
from ipguard.stores._sql.bulk import StagedRestrictions
from ipguard.stores._sql.transaction import SqlSnapshot, SqlTransaction, prune
from ipguard.stores.sqlite import _schema as schema
from ipguard.stores.sqlite._pool import Pool, Session, files_at
from ipguard.usernames import canonical_usernames

__all__ = ["SCHEMA_VERSION", "SQLiteStore", "migrations"]

_POLL: Final = 0.005
_LOGIN_WAIT: Final = 1.0  # seconds; readers wait only while another program locks the whole file
_BULK_CACHE: Final = (
    131_072  # KiB: the indexes' pages that an import of a million rows comes back to
)
_POLICY: Final = read.POLICY % ("?", "NULL")


def migrations() -> list[tuple[int, str]]:
    """Return the schema's SQL, for hosts that migrate their databases themselves.

    Returns:
        Version and SQL text, to be applied in this order, each text in one transaction. The store
        itself sees to WAL mode.
    """
    return _migrations("sqlite")


class SQLiteStore(Closing):
    """A store in one SQLite file. See `ipguard.store.RestrictionStore` for what each method does.

    Args:
        path: The file. It is made, readable by its owner alone, where it is not there.
        timeout: How long a call may wait for locks, all its steps together, in seconds. The reads
            of the login path wait for at most one second of it.
        clock: Returns the current time as an aware datetime; the host's clock without it.
        migrate: Whether to bring the schema up to date. False only checks, and makes no file.

    Raises:
        StoreConfigError: The file cannot be used: it is another program's, a directory, no
            database, or not to be written.
        SchemaVersionError: The schema is not one that this library may use.
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
        if not (math.isfinite(timeout) and timeout > 0):
            raise StoreConfigError("timeout must be a number of seconds above 0")
        self._path = _checked_path(path)
        self._clock = clock or (lambda: datetime.now(UTC))
        self._patience = min(timeout, _LOGIN_WAIT)
        self._pool = Pool(self._path, timeout, schema.check)
        schema.prepare(self._pool, migrate=migrate is not False)

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path}>"

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""
        return check_time("clock", self._clock())

    # -------------------------------------------------------------------------- reading

    def load_policy(self, username: str) -> Policy:
        """Return what decides about a user, and the revision of that very snapshot."""
        # The one read that logins wait for: written out, without context managers.
        session = self._pool.take(self._patience)
        try:
            rows = session.rows(_POLICY, (username,) * 3)
            policy = read.policy_of(username, rows)
        except BaseException:
            self._pool.discard(session)
            raise
        self._pool.give(session)
        return policy

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions, from one snapshot."""
        stream = self._stream()
        # Started here, so that the snapshot is of now, and closing the iterator always ends it.
        revision = next(stream)
        assert isinstance(revision, int)
        return revision, stream  # type: ignore[return-value]

    def _stream(self) -> Iterator[int | tuple[str, Policy]]:
        with self._pool.session(patience=self._patience) as session, session.snapshot():
            revision, _ = read.head(session)
            yield revision
            with closing(session.stream(read.ALL_POLICIES)) as rows:
                for found in read.policies_of(revision, rows):
                    if self._pool.recalled(session):
                        raise StoreUnavailable(
                            f"{self._path}: forking, replaced, or the store is closed"
                        )
                    yield found

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return where the store is, and whose policy changed since a revision."""
        with self._pool.session(patience=self._patience) as session:
            # A file copied over this one in place leaves no sign for SQLite: without its cache it
            # reads what is there, and the token tells.
            session.run("PRAGMA shrink_memory")
            schema.check_version(session)
            rows = session.rows(read.CHANGES_SINCE, read.changes_params(cursor))
        found = read.changes_of(cursor, rows)
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
        with pool.session(patience=min(self._patience, max(0.0, timeout))) as session:
            version: object = None
            while True:
                # Read the version before the head: a commit between the two is seen next time.
                latest = session.rows("PRAGMA data_version")
                if latest != version and read.touching(session) > revision:
                    return True
                version = latest
                left = deadline - time.monotonic()
                # Tested each time: if the index is read-only, each read has another version.
                if left <= 0 or pool.recalled(session):
                    return False
                pool.stirred.wait(min(_POLL, left))

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username."""
        now = self.now()
        with self._pool.session() as session, session.snapshot():
            return pages.overview(session, now, accounts, search=search, after=after, limit=limit)

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return changes, the newest first."""
        with self._pool.session() as session, session.snapshot():
            return pages.history(session, accounts, username=username, before=before, limit=limit)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Open a snapshot for look-ups."""
        with self._pool.session() as session, session.snapshot():
            yield SqlSnapshot(session, self.now())

    # -------------------------------------------------------------------------- writing

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        """Take the writer's turn."""
        refuse_nested(self._pool)
        if staged is None:
            with self._pool.session(write=True) as session, self._turn(session) as (turn, _):
                yield turn
            return
        with self._staging() as session:
            with session.snapshot():
                many = StagedRestrictions(session, staged)
                many.arrange(session)
            with session.snapshot():
                many.judge(session, self.now())
            with self._turn(session, many) as (turn, _):
                yield turn

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; what is already so appends nothing."""
        refuse_nested(self._pool)
        few, many = users_of.few(users)
        if few is not None:
            with self._pool.session(write=True) as session:
                revision, changed = few.compare(session)
                if not changed:
                    return revision
                with self._turn(session) as (turn, db):
                    change = few.apply(turn, db)
            return _told(turn, change)
        with self._staging() as session:
            with session.snapshot():
                put = users_of.StagedUsers(session, many)
            with session.snapshot():
                revision, changed = put.compare(session)
            if not changed:
                return revision
            with self._turn(session) as (turn, db):
                change = put.apply(turn, db)
        return _told(turn, change)

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change."""
        refuse_nested(self._pool)
        with self._staging() as session:
            with session.snapshot():
                users_of.stage_names(session, canonical_usernames(usernames))
            with self._turn(session) as (turn, db):
                change = users_of.remove_staged(turn, db)
        return _told(turn, change)

    def prune(self, before: datetime) -> int:
        """Delete the changes before a moment, and return how many.

        Only a beginning of the trail goes, and never its last row. A guard that has not synced
        since then starts over.
        """
        refuse_nested(self._pool)
        with self._pool.session(write=True) as session, self._turn(session) as (_, db):
            return prune(db, before)

    @contextmanager
    def _staging(self) -> Iterator[Session]:
        """Lend a connection for many rows at once; what was staged goes with it."""
        with self._pool.session(keep=False, write=True) as session:
            session.run(f"PRAGMA cache_size = -{_BULK_CACHE}")
            yield session

    def _turn(
        self, session: Session, staged: StagedRestrictions | None = None
    ) -> AbstractContextManager[tuple[SqlTransaction, Turn]]:
        return take_turn(self._pool, session, self.now, staged)

    # -------------------------------------------------------------------------- ending

    def close(self) -> None:
        """Let the waiting go and refuse every later call."""
        self._pool.close()


def _told(turn: SqlTransaction, change: Change | None) -> int:
    """Log a change that has been committed; return the revision."""
    if change is not None:
        log_change(change)
    return turn.revision


def _checked_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or text.startswith(":memory:") or "\0" in text:
        raise StoreConfigError("SQLite needs the path of a file; for memory use memory://")
    if not encodable(text):
        raise StoreConfigError("SQLite needs the path of a file in UTF-8")
    # Absolute, so that it stays the same file when the process changes its directory.
    return os.path.abspath(text)  # noqa: PTH100 - resolves no link, as wanted


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
