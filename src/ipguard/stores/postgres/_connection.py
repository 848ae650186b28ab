"""One connection of the PostgreSQL store: its deadline, its dialect, and how it fails."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import psycopg
from psycopg import errors, waiting
from psycopg.pq import TransactionStatus
from psycopg.sql import Identifier, Literal

from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import Params, Row, moment

_TABLES: Final = re.compile(
    r"\b(FROM|JOIN|INTO|UPDATE)(\s+)"
    r"(head|changes|users|search_terms|restrictions|requests|failures|schema_version"
    r"|zz_restore_marker)\b"
)
_TEMPORARY: Final = re.compile(
    r"\b(FROM|JOIN|INTO|UPDATE|ON)(\s+)"
    r"((?:staged|sorted|replaced|changed)_(?:restrictions|users|names|terms))\b"
)
_STATEMENT_FAILED: Final = (psycopg.IntegrityError, psycopg.DataError, errors.LockNotAvailable)
"""The errors after which a connection is used again. The others may come from its session."""
_CLASSES: Final = re.compile(r"'(\w+)'::regclass")
_STAGED_AT_ONCE: Final = 5_000
NEVER: Final = float("inf")
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""Whatever the database's default is: once a lock is had, all that its last holder did is seen."""
SETTINGS: Final = {
    # Functions, operators and types are those of PostgreSQL, whatever else has their names.
    "search_path": "pg_catalog, pg_temp",
    # A policy that hides rows makes a query fail. Without this, a user whose restrictions are
    # hidden would be unrestricted.
    "row_security": "off",
    # The driver's text form of bytes depends on it.
    "standard_conforming_strings": "on",
    # A read outside of a transaction neither fails nor waits because of other transactions.
    "default_transaction_isolation": "read committed",
}
"""What the queries depend on, whatever the role, the database or the server has as its default."""


class Connection(psycopg.Connection[Row]):
    """A connection whose every wait for the server ends at a deadline of this side.

    A server that is stopped keeps its connections open and outlives its own timeouts, so only the
    client can end a wait. A connection that missed its deadline is closed: nobody knows what the
    server will still answer on it.

    Attributes:
        deadline: On the clock of `time.monotonic`.
        waited: How many seconds it has waited for the server in all.
        prepares: True where what logins wait for is prepared at its first use; None where the
            driver's `prepare_threshold` says when, or never.
        settled: Whether `SETTINGS` hold for the whole session. Otherwise each transaction sets
            them: through a transaction pooler, a session's settings would reach other clients.
            None: the next transaction makes them last, if the connection is direct.
        pid: The process that opened it; in a forked child it is never used and never closed.
        slot: Its place in a pool.
        used_at: When it was last given back.
        spoilt: Whether it is not to be used again: after an error that a new connection may not
            have. A session keeps the defaults of its role and database, such as read-only, from
            when it began.
    """

    deadline: float = NEVER
    waited: float = 0.0
    prepares: bool | None = None
    settled: bool | None = False
    pid: int = 0
    slot: object = None
    used_at: float = 0.0
    spoilt: bool = False

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run a generator of the driver to its end, but no longer than the deadline."""
        if self.pid != os.getpid():
            raise StoreUnavailable("PostgreSQL: this connection is the parent process's")
        began = time.monotonic()
        left = max(0.0, self.deadline - began)
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
        finally:
            self.waited += time.monotonic() - began

    @property
    def usable(self) -> bool:
        """Whether it may be used again, once its transaction has ended."""
        return not (self.closed or self.spoilt)

    @property
    def idle(self) -> bool:
        """Whether it is usable and in no transaction."""
        return self.usable and self.info.transaction_status == TransactionStatus.IDLE

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

    __slots__ = ("_shared", "connection", "new", "patience", "schema")

    def __init__(self, connection: Connection, schema: str, *, new: bool = False) -> None:
        self.connection = connection
        self.schema = schema
        self.new = new
        self.patience: float | None = None
        self._shared: float | None = None

    def share(self, seconds: float) -> None:
        """Let all further statements together wait for so many seconds.

        The time between the statements, which is the caller's, does not count.
        """
        self.patience, self._shared = None, self.connection.waited + seconds

    def _begin(self) -> None:
        if self.patience is not None:
            self.connection.deadline = time.monotonic() + self.patience
        elif self._shared is not None:
            left = self._shared - self.connection.waited
            self.connection.deadline = time.monotonic() + left

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        self._begin()
        return self._rows(sql, params)

    def prepared_rows(self, sql: str, params: Params) -> list[Row]:
        """Run one of the queries that logins wait for."""
        return self._rows(sql, params, prepare=self.connection.prepares)

    def _rows(self, sql: str, params: Params, *, prepare: bool | None = None) -> list[Row]:
        connection = self.connection
        text = dialect(sql, self.schema)
        cursor = connection.cursor(binary=True)
        if connection.settled or not connection.idle:
            with self._translated():
                cursor.execute(text, params, prepare=prepare)
        else:
            # A batch outside of a transaction is a transaction, and one round trip.
            with self._pipeline():
                connection.execute(self._settings())
                cursor.execute(text, params, prepare=prepare)
        return cursor.fetchall() if cursor.description else []

    def _settings(self) -> str:
        """Return the statement that sets `SETTINGS`, for the transaction or for the session."""
        local = "true"
        if self.connection.settled is None:  # a pooler reports a process number that it made up
            pid = self.connection.info.backend_pid
            local = f"pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.<>) {pid}"
        settings = ", ".join(
            f"pg_catalog.set_config('{name}', '{value}', l.local)"
            for name, value in SETTINGS.items()
        )
        return f"SELECT {settings} FROM (SELECT {local} AS local) l"

    def run(self, sql: str, params: Params = ()) -> None:
        self.rows(sql, params)

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        # A COPY for each so many rows: they may come slowly, or from queries on this connection.
        source, total = iter(rows), 0
        statement = f"COPY pg_temp.{table} ({columns}) FROM STDIN"
        while some := list(islice(source, _STAGED_AT_ONCE)):
            self._begin()
            with (
                self._translated(),
                self.connection.cursor() as cursor,
                cursor.copy(statement) as copy,
            ):
                for row in some:
                    copy.write_row(row)
            total += len(some)
        if total > _STAGED_AT_ONCE:
            self.run(f"ANALYZE pg_temp.{table}")  # autovacuum skips temporary tables

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
        with self._translated():
            cursor, found = self.connection.execute(text, prepare=False), []
            while True:
                found.append(cursor.fetchall() if cursor.description else [])
                if not cursor.nextset():
                    return found

    def begin(self, text: str) -> list[list[Row]]:
        """Run a script whose first statement begins a transaction."""
        if self.connection.settled:
            return self.script(text)
        begin, _, rest = text.partition(";")
        found = self.script(f"{begin}; {self._settings()}; {rest}")
        return [found[0], *found[2:]]

    def pipelined(self, statements: Sequence[tuple[str, Params]]) -> str | None:
        """Run statements in one round trip, and return the last one's command tag."""
        self._begin()
        with self._pipeline():
            cursors = [
                self.connection.execute(dialect(text, self.schema), params)
                for text, params in statements
            ]
        return cursors[-1].statusmessage

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translated():
                yield
        except StoreError as exc:
            if not isinstance(exc.__cause__, _STATEMENT_FAILED):
                self.connection.spoilt = True
            raise

    @contextmanager
    def _pipeline(self) -> Iterator[None]:
        try:
            with translated(), self.connection.pipeline():
                yield
        except BaseException:
            # What follows the statement that failed was not run, but the driver may take it for
            # prepared, now and for as long as the connection lives.
            self.connection.spoilt = True
            raise


@lru_cache(maxsize=512)
def dialect(text: str, schema: str) -> str:
    """Return a portable statement as PostgreSQL and its driver take it.

    The tables carry the schema's name, so that no search path decides which tables are meant.
    """
    place = quoted(schema).replace("%", "%%")
    text = text.replace("%", "%%").replace("?", "%s")
    if text.startswith("CREATE TEMPORARY TABLE"):
        # The order of code points, as in the tables that these are compared with.
        text = text.replace(" TEXT", ' TEXT COLLATE "C"') + " ON COMMIT DROP"
        text = text.replace(" BLOB", " BYTEA").replace(" INTEGER", " BIGINT")
    text = _TEMPORARY.sub(r"\1\2pg_temp.\3", text)
    return located(text, place)


def located(text: str, place: str) -> str:
    """Return a statement with the schema's name before each table.

    Args:
        text: The statement.
        place: The schema, quoted.
    """

    def constant(found: re.Match[str]) -> str:
        return f"{Literal(f'{place}.{found[1]}').as_string(None)}::regclass"

    text = _CLASSES.sub(constant, text)
    return _TABLES.sub(lambda found: f"{found[1]}{found[2]}{place}.{found[3]}", text)


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
    if exc.diag.source_function == "check_enable_rls":  # its SQLSTATE says only: not allowed
        return StoreUnavailable(f"PostgreSQL: {words}")
    if isinstance(exc, errors.InsufficientPrivilege):
        return StoreConfigError(f"PostgreSQL: {words}")
    if isinstance(exc, psycopg.IntegrityError):
        return StoreError(f"PostgreSQL: the change contradicts what is stored: {words}")
    if isinstance(exc, errors.LockNotAvailable):
        return StoreUnavailable("PostgreSQL: another writer kept its turn for too long")
    return StoreUnavailable(f"PostgreSQL: {words}")


def ticks() -> float:
    """Return the seconds of a clock that nobody sets, and that counts a machine's sleep as well."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class ServerClock:
    """What the server's clock said last, and how long ago that was.

    It is never behind the server's by more than the two clocks' rates differ, and ahead by no more
    than the answer took: what is temporary ends early rather than late. Before the first answer it
    is the host's.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None

    def set(self, micros: int, asked_at: float) -> None:
        """Take a reading.

        Args:
            micros: What the server said.
            asked_at: The `ticks` before it was asked.
        """
        self._seen = micros, asked_at

    def now(self) -> datetime:
        """Return the server's time."""
        seen = self._seen
        if seen is None:
            return datetime.now(UTC)
        return moment(seen[0] + int((ticks() - seen[1]) * 1_000_000))
