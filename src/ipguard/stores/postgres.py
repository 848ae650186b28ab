"""The store in PostgreSQL, for any number of login servers. docs/postgresql.md tells how to deploy.

* A policy is one prepared statement, in autocommit: one round trip.
* The writer's turn is a row lock on `head`, so revisions are in commit order. What it writes is
  sent with its next question, or with the commit.
* A change that touches a policy notifies in its own transaction (`_postgres_listen`).
* Every wait for the server ends at a deadline of this side (`_postgres`).

Limits, stated: a name is resolved by the system's resolver, which has no deadline: write addresses,
or `hostaddr`. A server that was cut off from its successor, and does not know it, answers until it
is stopped: fencing is the cluster manager's work.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import Final, Self, TypeVar

from ipguard.errors import StoreError, StoreUnavailable
from ipguard.model import (
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
from ipguard.store import Transaction, log_change
from ipguard.stores import _postgres_schema as schema
from ipguard.stores import _sql_read as read
from ipguard.stores import _sql_users as users_of
from ipguard.stores._migrations import migrations as _migrations
from ipguard.stores._postgres import Session
from ipguard.stores._postgres_clock import ServerClock, ticks
from ipguard.stores._postgres_listen import Listener
from ipguard.stores._postgres_options import Options
from ipguard.stores._postgres_pool import Pool
from ipguard.stores._postgres_turn import Taken, Turn, taking
from ipguard.stores._sql import Row, moment
from ipguard.stores._sql_write import SqlTransaction, prune, stage_restrictions
from ipguard.usernames import canonical_username

__all__ = ["PostgresStore", "grants", "migrations"]

_log = logging.getLogger("ipguard.stores.postgres")
T = TypeVar("T")
_FETCHED: Final = 5_000

grants = schema.grants


def migrations() -> list[tuple[int, str]]:
    """Return the schema's SQL, for hosts that migrate their databases themselves.

    Returns:
        Version and SQL text, to be applied in this order, each text in one transaction, with the
        search path set to the schema that is to hold the tables.
    """
    return _migrations("postgresql")


class PostgresStore:
    """A store in PostgreSQL. See `ipguard.store.RestrictionStore` for what each method does.

    Each keyword below but the first two may be an option of the URL instead; what else the URL
    says (`sslmode`, …) is libpq's.

    Args:
        url: `postgresql://user@host:port/database?option=value`; several hosts are tried in turn.
        clock: Returns the current time as an aware datetime; the server's clock without it.
        migrate: Whether to bring the schema up to date on opening. None: where the role may.
            False: only check. True: raise where that cannot be.
        pool_size: How many connections this process may have; one for its writer and one that
            listens come to it; 5.
        timeout: How many seconds a read, or one step of a writer's turn, may take; 2.0. Keep it
            below the `max_staleness` of the guards.
        bulk_timeout: The same for a step with any number of rows; 300.0.
        schema: The schema that holds the tables; `ipguard`.
        prepare: `auto`: prepare statements unless there is a pooler between; `on`, `off`.
        prepare_threshold: After how many uses a statement is prepared.
        listen: A URL to listen on where `url` leads through a pooler; `off`: do not listen.
        replica: `allow`: let servers in recovery answer, whatever the age of what they hold;
            `refuse`.

    Raises:
        StoreConfigError: The URL or an option makes no sense, or the database cannot be used.
        SchemaVersionError: The schema is not one that this library may use.
        StoreUnavailable: With `migrate=True`: the server does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], datetime] | None = None,
        migrate: bool | None = None,
        pool_size: int | None = None,
        timeout: float | None = None,
        bulk_timeout: float | None = None,
        schema: str | None = None,
        prepare: str | None = None,
        prepare_threshold: int | None = None,
        listen: str | None = None,
        replica: str | None = None,
    ) -> None:
        keywords = {
            "pool_size": pool_size,
            "timeout": timeout,
            "bulk_timeout": bulk_timeout,
            "schema": schema,
            "prepare": prepare,
            "prepare_threshold": prepare_threshold,
            "listen": listen,
            "replica": replica,
        }
        self._options = Options.parse(url, keywords)
        self._clock = clock
        self._server_clock = ServerClock()
        self._pool = Pool(self._options, self._greet)
        self._listener = Listener(self._options, self._notify)
        self._pool.children.append(self._listener.renew)
        if self._options.replica:
            _log.warning(
                "%s: replica=allow: answers of a server in recovery count, whatever their age;"
                " nothing bounds how late a change takes effect",
                self._options.place,
            )
        self._open(migrate)

    def __repr__(self) -> str:
        return f"<PostgresStore {self._options.place}, schema {self._options.schema}>"

    # -------------------------------------------------------------------------- opening

    def _open(self, migrate: bool | None) -> None:
        def prepare(session: Session) -> None:
            self._note(schema.prepare(session, self._options, migrate=migrate))

        self._pool.check = prepare
        try:
            with self._pool.session(self._deadline()):
                pass
        except StoreUnavailable as exc:
            if migrate is True:
                raise
            _log.warning("%s: not there at opening, and tried again: %s", self._options.place, exc)
        finally:
            self._pool.check = self._greet
        self._pool.forget()  # a fork then has nothing to inherit

    def _greet(self, session: Session) -> None:
        """Look at a new connection."""
        try:
            greeting = schema.greet(session, self._options)
        except StoreUnavailable:
            raise
        except StoreError as exc:
            raise StoreUnavailable(f"{self._options.place}: {exc}") from exc
        self._note(greeting)
        schema.check_version(greeting.version, greeting.oldest)

    def _note(self, greeting: schema.Greeting) -> None:
        self._server_clock.set(greeting.micros, greeting.asked_at)

    def _deadline(self) -> float:
        return time.monotonic() + self._options.timeout

    # -------------------------------------------------------------------------- reading

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC, without I/O."""
        if self._clock is not None:
            return checked_time("clock", self._clock())
        return self._server_clock.now()

    def _read(self, reading: Callable[[Session], T]) -> T:
        """Run a read, once more on a new connection where the one from the pool was dead."""
        pool, deadline = self._pool, self._deadline()
        session = pool.take(deadline)
        try:
            found = reading(session)
        except StoreError as exc:
            dead = session.connection.closed
            if dead:
                pool.forget()
            pool.give(session)
            if not dead or time.monotonic() >= deadline:
                raise
            # Closed while it lay idle, as by a server that was restarted.
            _log.debug("%s: once more after: %s", self._options.place, exc)
        except BaseException:
            pool.discard(session)
            raise
        else:
            pool.give(session)
            return found
        with pool.session(deadline) as fresh:
            return reading(fresh)

    def load_policy(self, username: str) -> Policy:
        """Return what decides about a user, and the revision of that very snapshot."""
        rows = self._read(lambda session: session.prepared_rows(_POLICY, (username, username)))
        if rows[0][-1] and not self._options.replica:
            raise StoreUnavailable(f"{self._options.place}: the server is in recovery")
        return read.policy_of(username, rows)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions, from one snapshot."""
        stream = self._stream()
        # Started here, so that the snapshot is of now, and closing the iterator always ends it.
        revision = next(stream)
        assert isinstance(revision, int)
        return revision, stream  # type: ignore[return-value]

    def _stream(self) -> Iterator[int | tuple[str, Policy]]:
        with self._snapshot(self._options.bulk_timeout) as session:
            revision, _ = read.head(session)
            session.run(f"DECLARE policies NO SCROLL CURSOR FOR {read.ALL_POLICIES}")
            yield revision
            yield from read.policies_of(revision, _fetched(session))

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return where the store is, and whose policy changed since a revision."""
        told = self._listener.count
        params = read.changes_params(cursor)
        asked_at, rows = self._read(
            lambda session: (ticks(), session.prepared_rows(_CHANGES, params))
        )
        recovering, micros, version, oldest, touching = rows[0][-5:]
        if recovering and not self._options.replica:
            raise StoreUnavailable(f"{self._options.place}: the server is in recovery")
        schema.check_version(version, oldest)
        self._server_clock.set(micros, asked_at)
        found = read.changes_of(cursor, [row[:4] for row in rows])
        self._listener.tell(touching, exactly=told == self._listener.count)
        return found

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy, or the store is closed."""
        if self._pool.closed:
            raise StoreUnavailable("the store is closed")
        if self._listener.touching is None:
            self._listener.tell(self._read(read.touching))
        return self._listener.wait(revision, timeout)

    def _notify(self, payload: str) -> None:
        self._read(lambda session: session.rows(_NOTIFY, (self._options.schema, payload)))

    @contextmanager
    def _snapshot(self, patience: float) -> Iterator[Session]:
        """Run the block's statements against one committed state."""
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SELECT pg_is_in_recovery()"
        with self._begun(begin, self._deadline()) as (session, found):
            if found[-1][0][0] and not self._options.replica:
                raise StoreUnavailable(f"{self._options.place}: the server is in recovery")
            session.patience = patience
            yield session
            session.script("COMMIT")

    @contextmanager
    def _begun(
        self, begin: str, deadline: float, *, writing: bool = False
    ) -> Iterator[tuple[Session, list[list[Row]]]]:
        """Lend a connection in a transaction, and what its first statements returned."""
        pool = self._pool
        session = pool.take(deadline, writing=writing)
        try:
            try:
                found = session.script(begin)
            except StoreError:
                # Closed while it lay idle, as by a server that was restarted.
                if not session.connection.closed or time.monotonic() >= deadline:
                    raise
                pool.forget()
                pool.discard(session)
                session = pool.take(deadline, writing=writing)
                found = session.script(begin)
            yield session, found
        except BaseException:
            _roll_back(session, self._options.timeout)
            raise
        finally:
            if session.connection.closed:
                pool.forget()
            pool.give(session)

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username."""
        with self._snapshot(self._options.timeout) as session:
            return read.overview(
                session, self.now(), accounts, search=search, after=after, limit=limit
            )

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return changes, the newest first."""
        return self._read(
            lambda session: read.history(
                session, accounts, username=username, before=before, limit=limit
            )
        )

    # -------------------------------------------------------------------------- writing

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        """Take the writer's turn."""
        self._refuse_nested()
        if staged is None:
            with self._turn() as (turn, _):
                yield turn
            return
        with self._staging() as session:
            stage_restrictions(session, staged)
            with self._turn(session) as (turn, _):
                yield turn

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; what is already so appends nothing."""
        self._refuse_nested()
        with self._staging() as session:
            put = users_of.StagedUsers(session, users)
            revision, changed = put.compare(session)
            if not changed:
                session.script("ROLLBACK")
                return revision
            with self._turn(session) as (turn, db):
                change = put.apply(turn, db)
        return _told(turn, change)

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change."""
        self._refuse_nested()
        with self._staging() as session:
            users_of.stage_names(session, (canonical_username(name) for name in usernames))
            with self._turn(session) as (turn, db):
                change = users_of.remove_staged(turn, db)
        return _told(turn, change)

    def prune(self, before: datetime) -> int:
        """Delete the changes before a moment, for the schema's owner alone; return how many.

        Only a beginning of the trail goes, and never its last row. A guard that has not synced
        since then starts over.
        """
        with self._staging() as session:
            count = prune(session, before)
            session.script("COMMIT")
        return count

    def _refuse_nested(self) -> None:
        if self._pool.writer == threading.get_ident():
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def _staging(self) -> Iterator[Session]:
        """Lend a connection for a transaction that first reads any number of rows.

        What is staged goes with the transaction, so this works through a transaction pooler.
        """
        pool, deadline = self._pool, self._deadline()
        slot = pool.staging  # so that logins find a connection, however many stage
        if not slot.acquire(timeout=self._options.timeout):
            raise StoreUnavailable("too many bulk changes at once")
        try:
            with self._begun("BEGIN", deadline) as (session, _):
                session.patience = self._options.bulk_timeout
                yield session
        finally:
            slot.release()

    @contextmanager
    def _turn(self, staged: Session | None = None) -> Iterator[tuple[SqlTransaction, Turn]]:
        pool, deadline = self._pool, self._deadline()
        # Threads of one process queue here, and not each with a connection in hand.
        lock = pool.writing
        if not lock.acquire(timeout=self._options.timeout):
            raise StoreUnavailable("another thread kept the writer's turn for too long")
        try:
            pool.writer = threading.get_ident()
            asked_at = ticks()
            if staged is not None:
                staged.patience = None
                staged.connection.deadline = deadline
                found = staged.script(self._taking(deadline, self._options.bulk_timeout))
                staged.patience = self._options.bulk_timeout
                with self._taken(staged, found, asked_at, staged=True) as turn:
                    yield turn
            else:
                begin = "BEGIN;" + self._taking(deadline, self._options.timeout)
                with self._begun(begin, deadline, writing=True) as (session, found):
                    session.patience = self._options.timeout
                    with self._taken(session, found, asked_at, staged=False) as turn:
                        yield turn
        finally:
            if pool.writing is lock:  # in a forked child it is another
                pool.writer = None
            lock.release()

    def _taking(self, deadline: float, statement: float) -> str:
        # The server gives up on the lock before the client does, which then keeps the connection.
        left = deadline - time.monotonic()
        return taking(
            self._options.schema,
            lock=left * 0.8,
            statement=statement,
            idle=2 * self._options.timeout,
        )

    @contextmanager
    def _taken(
        self, session: Session, found: list[list[Row]], asked_at: float, *, staged: bool
    ) -> Iterator[tuple[SqlTransaction, Turn]]:
        taken = Taken(*found[-1][0])
        if taken.recovering:
            raise StoreUnavailable(f"{self._options.place}: the server is in recovery")
        schema.check_version(taken.version, taken.oldest)
        self._server_clock.set(taken.micros, asked_at)
        now = moment(taken.micros) if self._clock is None else self.now()
        db = Turn(session)
        try:
            turn = SqlTransaction(db, now, staged=staged, revision=taken.revision)
            yield turn, db
            db.commit(turn.touching)
        finally:
            db.over = True
        if turn.touching is not None:
            self._listener.tell(turn.touching)

    # -------------------------------------------------------------------------- ending

    def close(self) -> None:
        """Let the waiting go and refuse every later call."""
        self._pool.close()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_POLICY: Final = read.POLICY % "pg_is_in_recovery()"
_CHANGES: Final = f"""
SELECT f.*, pg_is_in_recovery(), {schema.MICROS}, v.version, v.oldest, s.touching
FROM ({read.CHANGES_SINCE}) f CROSS JOIN schema_version v CROSS JOIN head s
"""
_NOTIFY: Final = "SELECT pg_notify(?, ?)"


def _fetched(session: Session) -> Iterator[Row]:
    while True:
        rows = session.rows(f"FETCH FORWARD {_FETCHED} FROM policies")
        yield from rows
        if len(rows) < _FETCHED:
            return


def _told(turn: SqlTransaction, change: Change | None) -> int:
    """Log a change that has been committed; return the revision."""
    if change is not None:
        log_change(change)
    return turn.revision


def _roll_back(session: Session, patience: float) -> None:
    connection = session.connection
    if connection.pid == os.getpid() and not (connection.closed or connection.idle):
        session.patience = patience
        with suppress(StoreError):  # then the pool closes it, which undoes the same
            session.script("ROLLBACK")
