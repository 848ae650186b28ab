"""The store in one SQLite file, for one machine: any number of threads and processes.

It stands on SQLite's own promises: WAL, so that readers and the writer do not wait for each other;
`synchronous=FULL`, so that what was committed survives a power cut; `BEGIN IMMEDIATE`, so that there
is one writer at a time. The file has to be on a local disk: WAL needs memory that all processes share.

Limits, stated:

* A file put in the place of the store's file is found by the next `changes_since`; until then reads
  are answered from the old one, and a guard's lease bounds how long that is. Take the `-wal` and
  `-shm` files away together with the old file, or restore through SQLite's backup (`.restore`): a log
  that was left is applied to the new file by SQLite itself. Where the store sees that it would be, it
  is unavailable until the log is gone.
* The file vanished: the store is unavailable. It is made on opening only, never later: a new empty
  database would have no restrictions.
* A disk that hangs hangs the call; SQLite has no deadline for that.
"""

from __future__ import annotations

import math
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from ipguard.errors import SchemaVersionError, StoreConfigError, StoreUnavailable
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
    checked_time,
)
from ipguard.store import Transaction
from ipguard.stores import _sql_read as read
from ipguard.stores import _sql_write as write
from ipguard.stores._migrations import SCHEMA_VERSION, check_schema
from ipguard.stores._migrations import migrations as _migrations
from ipguard.stores._sql import Params, Row
from ipguard.stores._sqlite import Pool, Session, error_of, make_file, patiently, translated
from ipguard.usernames import canonical_username

__all__ = ["SQLiteStore", "migrations"]

APPLICATION_ID: Final = 0x49504764
_POLL: Final = 0.005


def migrations() -> list[tuple[int, str]]:
    """Return the schema's SQL, for hosts that migrate their databases themselves.

    Returns:
        Version and SQL text, to be applied in this order, each text in one transaction. The database
        has to be in WAL mode, which the store sees to.
    """
    return _migrations("sqlite")


class SQLiteStore:
    """A store in one SQLite file. See `ipguard.store.RestrictionStore` for what each method does.

    Args:
        path: The file. It is made, readable by its owner alone, where it is not there.
        timeout: How long a call may wait for other writers, in seconds.
        clock: Returns the current time as an aware datetime; the host's clock without it.
        migrate: Whether to bring the schema up to date. False only checks, and makes no file.

    Raises:
        StoreConfigError: The file cannot be used: it is another program's, a directory, no database,
            or not to be written.
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
        self._timeout = timeout
        self._pool = Pool(self._path, timeout, _check)
        _open(self._pool, migrate=migrate is not False)

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path}>"

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""
        return checked_time("clock", self._clock())

    # -------------------------------------------------------------------------- reading

    def load_policy(self, username: str) -> Policy:
        """Return what decides about a user, and the revision of that very snapshot."""
        # The one read that logins wait for: written out, without context managers.
        session = self._pool.take()
        try:
            rows = session.rows(read.POLICY, (username, username))
        except BaseException as exc:
            self._pool.discard(session)
            if isinstance(exc, sqlite3.Error):
                raise error_of(self._path, exc) from exc
            raise
        self._pool.give(session)
        return read.policy_of(username, rows)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions, from one snapshot."""
        stream = self._stream()
        # Started here, so that the snapshot is of now, and closing the iterator always ends it.
        revision = next(stream)
        assert isinstance(revision, int)
        return revision, stream  # type: ignore[return-value]

    def _stream(self) -> Iterator[int | tuple[str, Policy]]:
        with self._pool.session() as session, session.snapshot():
            revision, _ = read.head(session)
            yield revision
            with closing(session.connection.execute(read.ALL_POLICIES)) as rows:
                yield from read.policies_of(revision, rows)

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return where the store is, and whose policy changed since a revision."""
        replaced = self._pool.follow()
        with self._pool.session() as session:
            # A file copied over this one in place leaves no sign for SQLite: without its cache it
            # reads what is there, and the token tells.
            session.run("PRAGMA shrink_memory")
            found = read.changes_since(session, cursor)
        if cursor is not None and replaced:
            found = found._replace(usernames=RESET)
        if found.usernames is RESET:
            self._pool.forget()
        return found

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy, or the store is closed."""
        deadline = time.monotonic() + timeout
        pool = self._pool
        with pool.session() as session:
            while True:
                # The version before the head: a commit between the two is seen next time round.
                version = session.rows("PRAGMA data_version")
                if read.touching(session) > revision:
                    return True
                while session.rows("PRAGMA data_version") == version:
                    left = deadline - time.monotonic()
                    if left <= 0 or pool.moving:
                        return False
                    pool.stirred.wait(min(_POLL, left))

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username."""
        now = self.now()
        with self._pool.session() as session, session.snapshot():
            return read.overview(session, now, accounts, search=search, after=after, limit=limit)

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
            return read.history(session, accounts, username=username, before=before, limit=limit)

    # -------------------------------------------------------------------------- writing

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        """Take the writer's turn."""
        if staged is None:
            with self._pool.session() as session, self._turn(session) as (turn, _):
                yield turn
            return
        with self._staging() as session:
            with session.snapshot():
                write.stage_restrictions(session, staged)
            with self._turn(session, staged=True) as (turn, _):
                yield turn

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; what is already so appends nothing."""
        with self._staging() as session:
            with session.snapshot():
                put = write.StagedUsers(session, users)
            with session.snapshot():
                revision, changed = put.compare(session)
            if not changed:
                return revision
            with self._turn(session) as (turn, db):
                put.apply(turn, db)
                return turn.revision

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change."""
        with self._staging() as session:
            with session.snapshot():
                write.stage_names(session, (canonical_username(name) for name in usernames))
            with self._turn(session) as (turn, db):
                write.remove_staged(turn, db)
                return turn.revision

    @contextmanager
    def _staging(self) -> Iterator[Session]:
        """Lend a connection that is closed at the end, and its temporary tables with it."""
        self._refuse_nested()
        with self._pool.session(keep=False) as session:
            yield session

    def _refuse_nested(self) -> None:
        if self._pool.writer == threading.get_ident():
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def _turn(
        self, session: Session, *, staged: bool = False
    ) -> Iterator[tuple[write.SqlTransaction, _Turn]]:
        self._refuse_nested()
        pool, deadline = self._pool, time.monotonic() + self._timeout
        # Threads of one process queue here, which is fairer and faster than polling the file's lock.
        lock = pool.writing
        if not lock.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"{self._path}: no writer's turn within {self._timeout:g} s")
        try:
            pool.writer = threading.get_ident()
            session.run("PRAGMA shrink_memory")  # see `changes_since`
            left = max(0.0, deadline - time.monotonic())
            patiently(lambda: session.cursor.execute("BEGIN IMMEDIATE"), left)
            db = _Turn(session, self._path)
            try:
                turn = write.SqlTransaction(db, self.now(), staged=staged)
                yield turn, db
                self._commit(session, db)
            except BaseException:
                _roll_back(session)
                raise
            finally:
                db.over = True
        finally:
            if pool.writing is lock:
                pool.writer = None
            lock.release()

    def _commit(self, session: Session, db: _Turn) -> None:
        db.check_process()
        if self._pool.follow():
            raise StoreUnavailable(f"{self._path}: replaced during the transaction")
        patiently(lambda: session.cursor.execute("COMMIT"), self._timeout)
        if self._pool.follow():
            raise StoreUnavailable(f"{self._path}: replaced during the commit, which may be lost")

    # -------------------------------------------------------------------------- ending

    def close(self) -> None:
        """Let the waiting go and refuse every later call."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Turn:
    """The `Executor` of one transaction: of no use when that is over, or in a forked child."""

    def __init__(self, session: Session, path: str) -> None:
        self._session = session
        self._path = path
        self.over = False

    def check_process(self) -> None:
        if self._session.pid != os.getpid():
            raise StoreUnavailable(f"{self._path}: the transaction belongs to the parent process")

    def _usable(self) -> Session:
        self.check_process()
        if self.over:
            raise RuntimeError("this transaction is over")
        return self._session

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        with translated(self._path):
            return self._usable().rows(sql, params)

    def run(self, sql: str, params: Params = ()) -> None:
        with translated(self._path):
            self._usable().run(sql, params)

    def run_many(self, sql: str, rows: Iterable[Params]) -> None:
        with translated(self._path):
            self._usable().run_many(sql, rows)

    def among(self, column: str) -> str:
        return self._session.among(column)

    def texts(self, values: Iterable[str]) -> object:
        return self._session.texts(values)


def _roll_back(session: Session) -> None:
    if session.pid == os.getpid() and session.connection.in_transaction:
        with suppress(sqlite3.Error):
            session.cursor.execute("ROLLBACK")


# ------------------------------------------------------------------------------- opening

_UNUSABLE: Final = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: is its directory there, and may this user write to it?",
    sqlite3.SQLITE_READONLY: "may not be written to by this user",
    sqlite3.SQLITE_PERM: "may not be used by this user",
}


def _checked_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or text.startswith(":memory:") or "\0" in text:
        raise StoreConfigError("SQLite needs the path of a file; for memory use memory://")
    # Absolute, so that it stays the same file when the process changes its directory.
    return os.path.abspath(text)  # noqa: PTH100 - resolves no link, as wanted


def _open(pool: Pool, *, migrate: bool) -> None:
    """Make the file and its schema as far as may be, else say what is wrong; keep nothing open."""
    path = pool.path
    if migrate:
        make_file(path)
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError as exc:
        raise StoreConfigError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISREG(mode):
        raise StoreConfigError(f"{path}: is not a file")
    pool.check = lambda session: _prepare(session, path, migrate=migrate)
    try:
        with pool.session():
            pool.check = _check
    except StoreUnavailable as exc:
        code = getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF
        if code not in _UNUSABLE:
            raise
        raise StoreConfigError(f"{path}: {_UNUSABLE[code]}") from exc.__cause__
    pool.forget()  # so that a fork has nothing to close


def _prepare(session: Session, path: str, *, migrate: bool) -> None:
    with session.snapshot():
        found = _found_schema(session, path)
    if migrate and (found is None or found[0] < SCHEMA_VERSION):
        _use_wal(session)
        session.run("BEGIN IMMEDIATE")
        found = _found_schema(session, path)  # another process may have been faster
        version = found[0] if found else 0
        for number, text in migrations():
            if number > version:
                for statement in _statements(text):
                    session.run(statement)
        session.run("COMMIT")
        found = _found_schema(session, path)
    if found is None:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    check_schema(*found)
    _check(session)


def _found_schema(session: Session, path: str) -> tuple[int, int] | None:
    """Return the schema's version and the oldest one to know for using it; None for no schema."""
    ((application,),) = session.rows("PRAGMA application_id")
    ((tables,),) = session.rows("SELECT count(*) FROM sqlite_master")
    if application == 0 and tables == 0:
        return None
    if application != APPLICATION_ID:
        raise StoreConfigError(f"{path}: is the database of another program")
    ((version, oldest),) = session.rows(_VERSION)
    return version, oldest


_VERSION: Final = "SELECT version, oldest FROM schema_version WHERE id = 1"


def _statements(text: str) -> Iterator[str]:
    """Split a script; `executescript` would commit the transaction that it has to run in."""
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _check(session: Session) -> None:
    """See that a new connection is to a database that may be used; run for each."""
    if session.rows("PRAGMA application_id") != [(APPLICATION_ID,)]:
        raise StoreUnavailable("the file holds no ipguard database")
    _use_wal(session)  # a property of the file, which a restored copy may have lost
    ((version, oldest),) = session.rows(_VERSION)
    try:
        check_schema(version, oldest)
    except SchemaVersionError as exc:
        raise StoreUnavailable(str(exc)) from exc


def _use_wal(session: Session) -> None:
    ((mode,),) = session.rows("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StoreConfigError("this file system cannot hold the store: SQLite has no WAL there")
