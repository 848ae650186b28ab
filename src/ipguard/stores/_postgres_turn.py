"""The writer's turn on a connection: how it is taken, what it sends when, and how it commits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from ipguard.errors import StoreUnavailable
from ipguard.stores._postgres import Session, quoted
from ipguard.stores._postgres_client import Client
from ipguard.stores._postgres_clock import ticks
from ipguard.stores._postgres_schema import MICROS, check_version
from ipguard.stores._sql import Params, Row, moment
from ipguard.stores._sql_write import SqlTransaction


class Taken(NamedTuple):
    """What was read once the lock was had."""

    revision: int
    micros: int
    recovering: bool
    version: int
    oldest: int


def taking(schema: str, *, lock: float, statement: float, idle: float) -> str:
    """Return the statements that take the turn, all of one round trip, within a transaction.

    The server's own timeouts are for a client that is gone: nobody would release its lock.

    Args:
        schema: Where the tables are.
        lock: How many seconds to wait for the turn.
        statement: How many seconds a statement may run.
        idle: After how many seconds without a statement the server gives the turn to others.
    """
    place = quoted(schema)
    return f"""
    SET LOCAL lock_timeout = {_milliseconds(lock)};
    SET LOCAL statement_timeout = {_milliseconds(statement)};
    SET LOCAL idle_in_transaction_session_timeout = {_milliseconds(idle)};
    SELECT set_config('synchronous_commit', 'on', true)
        WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');
    SELECT 1 FROM {place}.head WHERE id = 1 FOR UPDATE;
    SELECT h.revision, {MICROS}, pg_is_in_recovery(), v.version, v.oldest
        FROM {place}.head h JOIN {place}.schema_version v ON v.id = 1 WHERE h.id = 1"""


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))  # 0 would mean for ever


class Turn:
    """The `Executor` of one turn.

    What is written waits here, and goes out with the next question or with the commit: one round
    trip for all of it. It is of no use when the turn is over, or in a forked child.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: list[tuple[str, Params]] = []
        self.over = False

    def check_process(self) -> None:
        """Refuse to go on in a child that was forked inside the turn."""
        if self._session.connection.pid != os.getpid():
            raise StoreUnavailable("the transaction is the parent process's")

    def _usable(self) -> Session:
        self.check_process()
        if self.over:
            raise RuntimeError("this transaction is over")
        return self._session

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        session = self._usable()
        if not self._waiting:
            return session.rows(sql, params)
        return self._send(session, (sql, params))[0]

    def run(self, sql: str, params: Params = ()) -> None:
        self._usable()
        self._waiting.append((sql, params))

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        session = self._usable()
        if self._waiting:
            self._send(session)
        session.insert_many(table, columns, rows)

    def among(self, column: str) -> str:
        return self._session.among(column)

    def texts(self, values: Iterable[str]) -> object:
        return self._session.texts(values)

    def commit(self, touching: int | None) -> None:
        """Commit, waking the guards if a policy was touched.

        Raises:
            StoreUnavailable: Whether it was committed is not known; or the server undid it.
        """
        session = self._usable()
        if touching is not None:
            # The schema's name is the channel's; the row is sent by the commit itself.
            self.run("SELECT pg_notify(?, ?)", (session.schema, str(touching)))
        _, tag = self._send(session, ("COMMIT", ()))
        if tag != "COMMIT":
            raise StoreUnavailable("PostgreSQL rolled the transaction back")

    def _send(self, session: Session, *last: tuple[str, Params]) -> tuple[list[Row], str | None]:
        statements, self._waiting = [*self._waiting, *last], []
        return session.pipelined(statements)


class Writer:
    """Takes turns, one at a time in this process and then in the database.

    Args:
        client: The connections.
        clock: Returns the current time; None: the server's own clock decides.
        touched: Called with a revision that touched a policy, once it is committed.
    """

    def __init__(
        self,
        client: Client,
        clock: Callable[[], datetime] | None,
        touched: Callable[[int], None],
    ) -> None:
        self._client = client
        self._clock = clock
        self._touched = touched
        client.pool.children.append(self.renew)
        self.renew()

    def renew(self) -> None:
        """Begin anew: at first, and in a forked child, where the locks may be held."""
        self._lock = threading.Lock()
        self._thread: int | None = None  # that holds the lock
        # Logins find a connection, however many threads stage.
        self._staging = threading.BoundedSemaphore(max(1, self._client.options.pool_size - 1))

    def refuse_nested(self) -> None:
        """Refuse a turn within a turn: it would wait for itself."""
        if self._thread == threading.get_ident():
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def staging(self) -> Iterator[Session]:
        """Lend a connection for a transaction that first reads any number of rows.

        What is staged goes with the transaction, so this works through a transaction pooler.
        """
        slots, options = self._staging, self._client.options
        if not slots.acquire(timeout=options.timeout):
            raise StoreUnavailable("too many bulk changes at once")
        try:
            with self._client.begun("BEGIN; SET LOCAL jit = off") as (session, _):
                session.patience = options.bulk_timeout
                yield session
        finally:
            slots.release()

    @contextmanager
    def turn(self, staged: Session | None = None) -> Iterator[tuple[SqlTransaction, Turn]]:
        """Take the writer's turn.

        Args:
            staged: The connection of `staging`, whose transaction becomes the turn's.
        """
        deadline = self._client.deadline()
        # Threads of one process queue here, and not each with a connection in hand.
        lock = self._lock
        if not lock.acquire(timeout=self._client.options.timeout):
            raise StoreUnavailable("another thread kept the writer's turn for too long")
        try:
            self._thread = threading.get_ident()
            with self._taken(staged, deadline) as both:
                yield both
        finally:
            if self._lock is lock:  # in a forked child it is another
                self._thread = None
            lock.release()

    @contextmanager
    def _taken(
        self, staged: Session | None, deadline: float
    ) -> Iterator[tuple[SqlTransaction, Turn]]:
        client, options, asked_at = self._client, self._client.options, ticks()
        patience = options.timeout if staged is None else options.bulk_timeout
        take = taking(
            options.schema,
            # The server gives up on the lock before the client would, which keeps the connection.
            lock=0.8 * (deadline - time.monotonic()),
            statement=patience,
            idle=2 * options.timeout,
        )
        if staged is None:
            with client.begun("BEGIN;" + take, deadline=deadline, writing=True) as (session, found):
                session.patience = patience
                with self._inside(session, found, asked_at, staged=False) as both:
                    yield both
        else:
            staged.patience, staged.connection.deadline = None, deadline
            found = staged.script(take)
            staged.patience = patience
            with self._inside(staged, found, asked_at, staged=True) as both:
                yield both

    @contextmanager
    def _inside(
        self, session: Session, found: list[list[Row]], asked_at: float, *, staged: bool
    ) -> Iterator[tuple[SqlTransaction, Turn]]:
        taken = Taken(*found[-1][0])
        if taken.recovering:
            raise StoreUnavailable(f"{self._client.options.place}: the server is in recovery")
        check_version(taken.version, taken.oldest)
        self._client.clock.set(taken.micros, asked_at)
        now = moment(taken.micros) if self._clock is None else self._clock()
        db = Turn(session)
        turn = SqlTransaction(db, now, revision=taken.revision, staged=staged)
        try:
            yield turn, db
            db.commit(turn.touching)
        finally:
            db.over = True
        if turn.touching is not None:
            self._touched(turn.touching)
