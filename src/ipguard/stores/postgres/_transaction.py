"""The write transaction of the PostgreSQL store: how it is begun, batched and committed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Final

from psycopg.sql import Literal

from ipguard import _fork
from ipguard._fork import acquire
from ipguard.errors import StoreUnavailable
from ipguard.stores._sql import UNFINISHED, Executor, Params, Row, check_open_schema, moment
from ipguard.stores._sql.bulk import BulkRestrictions
from ipguard.stores._sql.store import WriteTransaction
from ipguard.stores.postgres._connection import BEGIN, Connection, quoted, ticks
from ipguard.stores.postgres._pool import Pool
from ipguard.stores.postgres._schema import MICROS

_USERS_LOCK: Final = 0x49504755  # "IPGU"; with the schema's name it makes the lock's number
_TABLES: Final = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+(\w+)")


@lru_cache(maxsize=512)
def _tables(sql: str) -> frozenset[str]:
    """Return the tables that a portable statement names."""
    return frozenset(_TABLES.findall(sql))


class Batch:
    """The `Executor` of a write transaction, which sends its writes together.

    A write waits for a query about the same tables, or for the commit, and goes out in one round
    trip with all other writes.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: list[tuple[str, Params]] = []
        self.among, self.each, self.texts = connection.among, connection.each, connection.texts

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        read = _tables(sql)
        if not all(read.isdisjoint(_tables(text)) for text, _ in self._waiting):
            self._send()
        # Not in one batch with the writes: the driver would end it with a Flush, after which the
        # server no longer ends an idle transaction, so a client that vanished would keep its locks.
        return self._connection.rows(sql, params)

    def run(self, sql: str, params: Params = ()) -> None:
        self._waiting.append((sql, params))

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        self._send()
        self._connection.insert_many(table, columns, rows)

    def commit(self, touching: int | None) -> None:
        """Commit, and wake the guards if a policy was touched.

        Raises:
            StoreUnavailable: It is not known whether it was committed; or the server rolled back.
        """
        if touching is not None:
            # The channel has the schema's name; the commit itself sends the notification.
            self.run("SELECT pg_notify(?, ?)", (self._connection.schema, str(touching)))
        self.run("COMMIT")
        if self._send() != "COMMIT":
            raise StoreUnavailable("PostgreSQL rolled the transaction back")

    def _send(self) -> str | None:
        """Send the waiting writes, and return the last command's tag."""
        statements, self._waiting = self._waiting, []
        return self._connection.run_batch(statements) if statements else None


class Writer(_fork.Forkable):
    """Begins write transactions, one at a time in this process and in the database.

    Args:
        pool: The connections.
        clock: Returns the current time; None: the server's clock decides.
        touched: Called with a revision that touched a policy, once it is committed.
    """

    def __init__(
        self,
        pool: Pool,
        clock: Callable[[], datetime] | None,
        touched: Callable[[int], None],
    ) -> None:
        self._pool = pool
        self._options = pool.options
        self._clock = clock
        self._touched = touched
        self._after_fork_in_child()
        _fork.register(self)

    def _after_fork_in_child(self) -> None:
        """Replace the locks, which threads of the parent may hold."""
        self._queue = threading.Lock()
        self._inside: set[int] = set()  # the threads in a transaction
        # However many threads stage rows, one connection is left for logins.
        self._bulk_slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(max(1, self._options.pool_size - 1)):
            self._bulk_slots.put(None)
        self._users = threading.Lock()

    def refuse_nested(self) -> None:
        """Raise RuntimeError if this thread is in a write transaction: it would deadlock."""
        _fork.check()
        if threading.get_ident() in self._inside:
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def write(
        self, *, users: bool, deadline: float | None
    ) -> Iterator[tuple[WriteTransaction, Executor]]:
        """Begin a write transaction. All its waits share one timeout.

        Args:
            users: Whether it adds or removes users; it then excludes others that do.
            deadline: When the waits end; the timeout from now by default.
        """
        pool, statement = self._pool, self._options.timeout
        deadline, queue = deadline or pool.deadline(), self._users if users else self._queue
        # Threads of one process queue here, so that waiting threads hold no connection. Bulk
        # writes have one already, and wait for the row lock alone.
        held: list[bool] = []
        try:
            if not acquire(queue, deadline - time.monotonic(), held):
                raise _kept_too_long()
            asked_at = ticks()
            first = self._lock_users_sql(deadline, statement) if users else ""
            begin = f"{BEGIN};{first}{self._lock_sql(deadline, statement)}"
            with pool.begun(begin, deadline=deadline) as (connection, found):
                connection.share(deadline - time.monotonic())
                with self._locked(connection, found, asked_at) as both:
                    yield both
        finally:
            if True in held:
                queue.release()

    @contextmanager
    def bulk(self) -> Iterator[Connection]:
        """Lend a connection for a transaction that first stages any number of rows.

        Temporary tables end with the transaction, so this works through a transaction pooler.
        """
        _fork.check()
        slots, held = self._bulk_slots, list[None]()
        try:
            try:
                held.extend(map(slots.get, (True,), (self._options.timeout,)))
            except Empty:
                raise StoreUnavailable("too many bulk changes at once") from None
            with self._pool.begun(f"{BEGIN}; SET LOCAL jit = off") as (connection, _):
                connection.patience = self._options.bulk_timeout
                yield connection
        finally:
            if held:
                slots.put(None)

    @contextmanager
    def lock_users(self, connection: Connection) -> Iterator[None]:
        """Keep others from adding and removing users, in the transaction that `bulk` began.

        Users are written under this lock before the writer's lock is acquired. Other writers do
        not wait for it.
        """
        patience, queue = self._options.bulk_timeout, self._users
        held: list[bool] = []
        try:
            if not acquire(queue, patience, held):
                raise _kept_too_long()
            connection.script(self._lock_users_sql(time.monotonic() + patience, patience))
            yield
        finally:
            if True in held:
                queue.release()

    @contextmanager
    def write_bulk(
        self, connection: Connection, restrictions: BulkRestrictions | None = None
    ) -> Iterator[tuple[WriteTransaction, Executor]]:
        """Acquire the writer's lock in the transaction that `bulk` began."""
        deadline, patience, asked_at = self._pool.deadline(), connection.patience, ticks()
        connection.patience, connection.deadline = None, deadline
        found = connection.script(self._lock_sql(deadline, self._options.bulk_timeout))
        connection.patience = patience
        with self._locked(connection, found, asked_at, restrictions) as both:
            yield both

    def _limits_sql(self, deadline: float, statement: float) -> str:
        """Return the server's own timeouts, in case this client vanishes and holds its locks.

        The server gives up on a lock before the client would, which keeps the connection.
        """
        seconds = {
            "lock_timeout": 0.8 * (deadline - time.monotonic()),
            "statement_timeout": statement,
            "idle_in_transaction_session_timeout": 2 * self._options.timeout,
        }
        # 0 would turn a timeout off.
        return "".join(
            f" SET LOCAL {name} = {max(1, int(limit * 1000))};" for name, limit in seconds.items()
        )

    def _lock_users_sql(self, deadline: float, statement: float) -> str:
        name = Literal(self._options.schema).as_string(None)
        return f"""{self._limits_sql(deadline, statement)}
        SELECT pg_advisory_xact_lock({_USERS_LOCK}::int, hashtext({name}::text));"""

    def _lock_sql(self, deadline: float, statement: float) -> str:
        """Return the statements that acquire the writer's lock, in one round trip."""
        place = quoted(self._options.schema)
        return f"""{self._limits_sql(deadline, statement)}
        SELECT set_config('synchronous_commit', 'on', true)
            WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');
        SELECT 1 FROM {place}.head WHERE id = 1 FOR UPDATE;
        SELECT h.revision, {MICROS}, pg_is_in_recovery(), v.version, v.oldest
            FROM {place}.head h JOIN {place}.schema_version v ON v.id = 1
            JOIN {place}.zz_restore_marker m ON m.id = 1 WHERE h.id = 1"""

    @contextmanager
    def _locked(
        self,
        connection: Connection,
        found: list[list[Row]],
        asked_at: float,
        restrictions: BulkRestrictions | None = None,
    ) -> Iterator[tuple[WriteTransaction, Executor]]:
        """Run the block with the transaction whose lock was acquired, then commit."""
        if not found[-1]:
            raise StoreUnavailable(f"{self._options.place}: {UNFINISHED}")
        revision, micros, recovering, version, oldest = found[-1][0]
        if recovering:
            connection.spoilt = True  # a new connection may find the primary
            raise StoreUnavailable(f"{self._options.place}: the server is in recovery")
        check_open_schema(version, oldest)
        self._pool.clock.set(micros, asked_at)
        now = moment(micros) if self._clock is None else self._clock()
        db = Batch(connection)
        tx = WriteTransaction(db, now, revision=revision, bulk=restrictions)
        inside, thread = self._inside, threading.get_ident()
        try:
            inside.add(thread)
            try:
                yield tx, db
                tx.withdraw()
                tx.check_process()
                db.commit(tx.touching)
            finally:
                tx.end()
        finally:
            # A signal handler may raise after any call, so this is the only one here.
            inside.discard(thread)
        if tx.touching is not None:
            self._touched(tx.touching)


def _kept_too_long() -> StoreUnavailable:
    return StoreUnavailable("another thread kept the writer's lock for too long")
