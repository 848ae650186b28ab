"""One connection of the PostgreSQL store: its deadline, its dialect, and how it fails."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import psycopg
from psycopg import errors, waiting
from psycopg.pq import TransactionStatus
from psycopg.sql import Identifier

from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import Params, Row

_TABLES: Final = re.compile(
    r"\b(FROM|JOIN|INTO|UPDATE)(\s+)"
    r"(head|changes|users|search_blocks|search_terms|restrictions|requests|failures"
    r"|schema_version)\b"
)
_STAGED_AT_ONCE: Final = 5_000
NEVER: Final = float("inf")
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""Whatever the database's default is: once a lock is had, all that its last holder did is seen."""


class Connection(psycopg.Connection[Row]):
    """A connection whose every wait for the server ends at a deadline of this side.

    A server that is stopped keeps its connections open and outlives its own timeouts, so only the
    client can end a wait. A connection that missed its deadline is closed: nobody knows what the
    server will still answer on it.

    Attributes:
        deadline: On the clock of `time.monotonic`.
        prepares: True where what logins wait for is prepared at its first use; None where the
            driver's `prepare_threshold` says when, or never.
        pid: The process that opened it; in a forked child it is never used and never closed.
        used_at: When it was last given back.
        spoilt: Whether it is not to be used again.
    """

    deadline: float = NEVER
    prepares: bool | None = None
    pid: int = 0
    used_at: float = 0.0
    spoilt: bool = False

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run a generator of the driver to its end, but no longer than the deadline."""
        left = max(0.0, self.deadline - time.monotonic())
        own = timeout is None or left < timeout
        limit = (None if left == NEVER else left) if own else timeout
        try:
            return waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=limit)
        except errors._WaitTimeout:  # noqa: SLF001 - the driver has no other name for it
            if own:
                self.pgconn.finish()
            raise
        except BaseException as exc:
            if not isinstance(exc, Exception):  # interrupted; the driver would wait for a cancel
                self.pgconn.finish()
            raise

    @property
    def idle(self) -> bool:
        """Whether it is whole and in no transaction."""
        if self.closed or self.spoilt:
            return False
        return self.info.transaction_status == TransactionStatus.IDLE

    def __del__(self, *_: object) -> None:
        # The parent class warns, and a child that was forked has nothing to be warned of.
        if self.pid == os.getpid() and not self.closed:
            self.pgconn.finish()


class Session:
    """A connection lent to one thread. It is the `Executor` of PostgreSQL.

    Attributes:
        connection: The connection.
        schema: The schema that holds the tables.
        patience: How many seconds each statement may take from now on; None: all of them together
            may take until the connection's deadline.
        new: Whether the connection was opened for this.
    """

    __slots__ = ("connection", "new", "patience", "schema")

    def __init__(self, connection: Connection, schema: str, *, new: bool = False) -> None:
        self.connection = connection
        self.schema = schema
        self.new = new
        self.patience: float | None = None

    def _begin(self) -> None:
        if self.patience is not None:
            self.connection.deadline = time.monotonic() + self.patience

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        self._begin()
        with translated():
            cursor = self.connection.cursor(binary=True)
            cursor.execute(dialect(sql, self.schema), params)
            return cursor.fetchall() if cursor.description else []

    def prepared_rows(self, sql: str, params: Params) -> list[Row]:
        """Run one of the queries that logins wait for."""
        with translated():
            cursor = self.connection.cursor(binary=True)
            cursor.execute(dialect(sql, self.schema), params, prepare=self.connection.prepares)
            return cursor.fetchall()

    def run(self, sql: str, params: Params = ()) -> None:
        self.rows(sql, params)

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        # A COPY for each so many rows: they may come slowly, or from queries on this connection.
        source, total = iter(rows), 0
        statement = f"COPY {table} ({columns}) FROM STDIN"
        while some := list(islice(source, _STAGED_AT_ONCE)):
            self._begin()
            with translated(), self.connection.cursor() as cursor, cursor.copy(statement) as copy:
                for row in some:
                    copy.write_row(row)
            total += len(some)
        if total > _STAGED_AT_ONCE:
            self.run(f"ANALYZE {table}")  # nobody else does so with a temporary table

    def among(self, column: str) -> str:
        return f"{column} = ANY(?::text[])"

    def each(self) -> str:
        return "unnest(?::text[]) AS j (value)"

    def texts(self, values: Iterable[str]) -> object:
        # A hundred thousand account ids take the driver a tenth of a second.
        texts = list(values)
        joined = '","'.join(texts)
        if "\\" in joined or joined.count('"') != 2 * len(texts) - 2:
            return texts
        return f'{{"{joined}"}}'

    def script(self, text: str) -> list[list[Row]]:
        """Run several statements without parameters in one round trip; return each one's rows."""
        self._begin()
        with translated():
            cursor, found = self.connection.execute(text, prepare=False), []
            while True:
                found.append(cursor.fetchall() if cursor.description else [])
                if not cursor.nextset():
                    return found

    def pipelined(self, statements: Sequence[tuple[str, Params]]) -> str | None:
        """Run statements in one round trip, and return the last one's command tag."""
        self._begin()
        try:
            with translated():
                with self.connection.pipeline():
                    cursors = [
                        self.connection.execute(dialect(text, self.schema), params)
                        for text, params in statements
                    ]
                return cursors[-1].statusmessage
        except BaseException:
            # What follows the statement that failed was not run, but the driver may take it for
            # prepared, now and for as long as the connection lives.
            self.connection.spoilt = True
            raise


@lru_cache(maxsize=512)
def dialect(text: str, schema: str) -> str:
    """Return a portable statement as PostgreSQL and its driver take it.

    The tables carry the schema's name, because a search path set on a connection does not survive
    a transaction pooler.
    """
    text = text.replace("%", "%%").replace("?", "%s")
    if text.startswith("CREATE TEMPORARY TABLE"):
        # The order of code points, as in the tables that these are compared with.
        text = text.replace(" TEXT", ' TEXT COLLATE "C"') + " ON COMMIT DROP"
        text = text.replace(" BLOB", " BYTEA").replace(" INTEGER", " BIGINT")
    return _TABLES.sub(lambda found: f"{found[1]}{found[2]}{quoted(schema)}.{found[3]}", text)


def quoted(name: str) -> str:
    """Return a name as an identifier."""
    return Identifier(name).as_string(None)


@contextmanager
def translated() -> Iterator[None]:
    """Let no exception of the driver out."""
    try:
        yield
    except psycopg.Error as exc:
        raise error_of(exc) from exc


def error_of(exc: psycopg.Error) -> StoreError:
    """Return the library's error for a driver's. The server's words hold no password."""
    words = exc.diag.message_primary or str(exc).strip() or type(exc).__name__
    if isinstance(exc, errors._WaitTimeout):  # noqa: SLF001
        return StoreUnavailable("PostgreSQL did not answer in time")
    if isinstance(exc, errors.InsufficientPrivilege):
        return StoreConfigError(f"PostgreSQL: {words}")
    if isinstance(exc, psycopg.IntegrityError):
        return StoreError(f"PostgreSQL: the change contradicts what is stored: {words}")
    if isinstance(exc, errors.LockNotAvailable):
        return StoreUnavailable("PostgreSQL: another writer kept its turn for too long")
    return StoreUnavailable(f"PostgreSQL: {words}")
