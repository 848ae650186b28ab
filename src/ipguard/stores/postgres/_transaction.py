"""The writer's turn on a connection: how it is taken, what it sends when, and how it commits."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple

from psycopg.sql import Literal

from ipguard import _fork
from ipguard._fork import acquire
from ipguard.errors import StoreUnavailable
from ipguard.stores._sql import Params, Row, moment
from ipguard.stores._sql.bulk import StagedRestrictions
from ipguard.stores._sql.policies import UNFINISHED
from ipguard.stores._sql.transaction import SqlTransaction
from ipguard.stores.postgres._connection import BEGIN, Session, quoted, ticks
from ipguard.stores.postgres._pool import Client
from ipguard.stores.postgres._schema import MICROS, check_version


class Taken(NamedTuple):
    """What was read once the lock was had."""

    revision: int
    micros: int
    recovering: bool
    version: int
    oldest: int


def taking(schema: str, *, lock: float, statement: float, idle: float) -> str:
    """Return the statements that take the turn, all of one round trip, within a transaction.

    Args:
        schema: Where the tables are.
        lock: How many seconds to wait for the turn.
        statement: How many seconds a statement may run.
        idle: After how many seconds without a statement the server gives the turn to others.
    """
    place = quoted(schema)
    return f"""{_limits(lock=lock, statement=statement, idle=idle)}
    SELECT set_config('synchronous_commit', 'on', true)
        WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');
    SELECT 1 FROM {place}.head WHERE id = 1 FOR UPDATE;
    SELECT h.revision, {MICROS}, pg_is_in_recovery(), v.version, v.oldest
        FROM {place}.head h JOIN {place}.schema_version v ON v.id = 1
        JOIN {place}.zz_restore_marker m ON m.id = 1 WHERE h.id = 1"""


def _limits(*, lock: float, statement: float, idle: float) -> str:
    """Return the server's own timeouts, for a client that is gone: nobody would free its lock."""
    return f"""
    SET LOCAL lock_timeout = {_milliseconds(lock)};
    SET LOCAL statement_timeout = {_milliseconds(statement)};
    SET LOCAL idle_in_transaction_session_timeout = {_milliseconds(idle)};"""


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))  # 0 would mean for ever


_USERS_LOCK: Final = 0x49504755  # "IPGU"; with the schema's name it makes the number
_TABLES: Final = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+(\w+)")


@lru_cache(maxsize=512)
def tables(sql: str) -> frozenset[str]:
    """Return the tables that a statement of ours names."""
    return frozenset(_TABLES.findall(sql))


class Turn:
    """The `Executor` of one turn.

    What is written waits here until a question about the same tables, or the commit, and goes out
    in one round trip. It is of no use when the turn is over, or in a forked child.
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
        asked = tables(sql)
        if not all(asked.isdisjoint(tables(text)) for text, _ in self._waiting):
            self._send(session)
        # Not together with what was waiting: the driver ends such a batch with a Flush, which turns
        # off the server's timeout for a client that is idle in a transaction, and then vanishes.
        return session.rows(sql, params)

    def run(self, sql: str, params: Params = ()) -> None:
        self._usable()
        self._waiting.append((sql, params))

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        session = self._usable()
        self._send(session)
        session.insert_many(table, columns, rows)

    def among(self, column: str) -> str:
        return self._session.among(column)

    def each(self) -> str:
        return self._session.each()

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
        self.run("COMMIT")
        if self._send(session) != "COMMIT":
            raise StoreUnavailable("PostgreSQL rolled the transaction back")

    def _send(self, session: Session) -> str | None:
        """Send what is waiting, if anything is, and return the last command's tag."""
        statements, self._waiting = self._waiting, []
        return session.pipelined(statements) if statements else None


class Writer(_fork.Forkable):
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
        self._after_fork_in_child()
        _fork.register(self)

    def _after_fork_in_child(self) -> None:
        """Replace the locks, which threads of the parent may hold."""
        self._queue = threading.Lock()
        self._inside: set[int] = set()  # the threads in a turn
        # Logins find a connection, however many threads stage.
        self._staging: SimpleQueue[None] = SimpleQueue()
        for _ in range(max(1, self._client.options.pool_size - 1)):
            self._staging.put(None)
        self._users = threading.Lock()

    def refuse_nested(self) -> None:
        """Refuse a turn within a turn: it would wait for itself."""
        _fork.check()
        if threading.get_ident() in self._inside:
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def staging(self) -> Iterator[Session]:
        """Lend a connection for a transaction that first reads any number of rows.

        What is staged goes with the transaction, so this works through a transaction pooler.
        """
        _fork.check()
        options, slots, held = self._client.options, self._staging, list[None]()
        try:
            try:
                held.extend(map(slots.get, (True,), (options.timeout,)))
            except Empty:
                raise StoreUnavailable("too many bulk changes at once") from None
            with self._client.begun(f"{BEGIN}; SET LOCAL jit = off") as (session, _):
                session.patience = options.bulk_timeout
                yield session
        finally:
            if held:
                slots.put(None)

    @contextmanager
    def turn(
        self, *, users: bool = False, deadline: float | None = None
    ) -> Iterator[tuple[SqlTransaction, Turn]]:
        """Take the writer's turn. All its waits, for the turn and in it, share one timeout.

        Args:
            users: Whether it adds or removes users; then it excludes others that do.
            deadline: Until when to wait, if a part of the timeout is used already.
        """
        client, patience = self._client, self._client.options.timeout
        deadline, queue = deadline or client.deadline(), self._users if users else self._queue
        # Threads of one process queue here, and not each with a connection in hand. Who has staged
        # has one, and goes straight for the row: whoever holds that needs nothing more.
        held: list[bool] = []
        try:
            if not acquire(queue, deadline - time.monotonic(), held):
                raise _kept_too_long()
            asked_at = ticks()
            first = self._taking_users(deadline, patience) if users else ""
            begin = f"{BEGIN};{first}{self._taking(deadline, patience)}"
            with client.begun(begin, deadline=deadline) as (session, found):
                session.share(deadline - time.monotonic())
                with self._taken(session, found, asked_at) as both:
                    yield both
        finally:
            if True in held:
                queue.release()

    @contextmanager
    def users(self, session: Session) -> Iterator[None]:
        """Keep others from putting and removing users, in the transaction that `staging` began.

        So users are written ahead of the turn: whoever has the turn waits for nothing that was
        written so, and whoever neither puts nor removes users does not wait for this.
        """
        patience, queue = self._client.options.bulk_timeout, self._users
        held: list[bool] = []
        try:
            if not acquire(queue, patience, held):
                raise _kept_too_long()
            session.script(self._taking_users(time.monotonic() + patience, patience))
            yield
        finally:
            if True in held:
                queue.release()

    def _taking_users(self, deadline: float, patience: float) -> str:
        options = self._client.options
        name = Literal(options.schema).as_string(None)
        lock, idle = 0.8 * (deadline - time.monotonic()), 2 * options.timeout
        return f"""{_limits(lock=lock, statement=patience, idle=idle)}
        SELECT pg_advisory_xact_lock({_USERS_LOCK}::int, hashtext({name}::text));"""

    @contextmanager
    def staged_turn(
        self, session: Session, staged: StagedRestrictions | None = None
    ) -> Iterator[tuple[SqlTransaction, Turn]]:
        """Take the writer's turn, in the transaction that `staging` began."""
        deadline, patience, asked_at = self._client.deadline(), session.patience, ticks()
        session.patience, session.connection.deadline = None, deadline
        found = session.script(self._taking(deadline, self._client.options.bulk_timeout))
        session.patience = patience
        with self._taken(session, found, asked_at, staged) as both:
            yield both

    def _taking(self, deadline: float, patience: float) -> str:
        options = self._client.options
        return taking(
            options.schema,
            # The server gives up on the lock before the client would, which keeps the connection.
            lock=0.8 * (deadline - time.monotonic()),
            statement=patience,
            idle=2 * options.timeout,
        )

    @contextmanager
    def _taken(
        self,
        session: Session,
        found: list[list[Row]],
        asked_at: float,
        staged: StagedRestrictions | None = None,
    ) -> Iterator[tuple[SqlTransaction, Turn]]:
        if not found[-1]:
            raise StoreUnavailable(f"{self._client.options.place}: {UNFINISHED}")
        taken = Taken(*found[-1][0])
        if taken.recovering:
            session.connection.spoilt = True  # a new connection may find the primary
            raise StoreUnavailable(f"{self._client.options.place}: the server is in recovery")
        check_version(taken.version, taken.oldest)
        self._client.clock.set(taken.micros, asked_at)
        now = moment(taken.micros) if self._clock is None else self._clock()
        db = Turn(session)
        turn = SqlTransaction(db, now, revision=taken.revision, staged=staged)
        inside, thread = self._inside, threading.get_ident()
        try:
            inside.add(thread)
            yield turn, db
            turn.withdraw()
            db.commit(turn.touching)
        finally:
            db.over = True
            inside.discard(thread)
        if turn.touching is not None:
            self._touched(turn.touching)


def _kept_too_long() -> StoreUnavailable:
    return StoreUnavailable("another thread kept the writer's turn for too long")
