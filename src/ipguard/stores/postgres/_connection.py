"""One connection to PostgreSQL: its deadline, its SQL dialect, its errors, the server's clock."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count, islice
from typing import Any, Final

import psycopg
from psycopg import errors, waiting
from psycopg.pq import TransactionStatus
from psycopg.sql import Identifier, Literal

from ipguard.errors import StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import Params, Row, join_plain, moment

_NAMES: Final = re.compile(
    r"'(?P<index>\w+)'::regclass"
    r"|\b(?P<before>(?:FROM|JOIN|INTO|UPDATE)\s+)"
    r"(?P<table>head|changes|users|search_terms|restrictions|past_restrictions|imports|sightings"
    r"|requests|failures|schema_version|zz_restore_marker)\b"
)
_TEMPORARY: Final = re.compile(
    r"\b(FROM|JOIN|INTO|UPDATE|ON)(\s+)"
    r"((?:staged|sorted|replaced|changed|linked|missing|moved|kept)_(?:restrictions|users|names|terms|changes|sightings))\b"
)
_TABLES: Final = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+(\w+)")
_STATEMENT_FAILED: Final = (psycopg.IntegrityError, psycopg.DataError, errors.LockNotAvailable)
"""Errors after which a connection is used again. All others may come from its session."""
_STAGED_AT_ONCE: Final = 5_000
_FETCHED: Final = 5_000
_cursors = count()
NEVER: Final = float("inf")
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""Independent of the database's default: after a lock is acquired, its last holder's commit is
visible."""
SETTINGS: Final = {
    # Use PostgreSQL's own functions, operators and types, whatever else has their names.
    "search_path": "pg_catalog, pg_temp",
    # Make a policy that hides rows an error. Otherwise a user whose restrictions are hidden would
    # be unrestricted.
    "row_security": "off",
    # The driver's text format of bytes depends on it.
    "standard_conforming_strings": "on",
    # Reads outside of a transaction neither fail nor wait because of other transactions.
    "default_transaction_isolation": "read committed",
}
"""The settings that the queries depend on, whatever the role's, database's or server's defaults."""


class Connection(psycopg.Connection[Row]):
    """A connection whose every wait for the server ends at a deadline on the client's side.

    A server that is stopped keeps its connections open and outlives its own timeouts, so only the
    client can end a wait. A connection that missed its deadline is closed, because it may still
    receive the old answer. It is the `Executor` of PostgreSQL.

    Attributes:
        deadline: When all waits end, on the clock of `time.monotonic`.
        patience: How many seconds each statement may take from now on; None: all of them together
            may take until the deadline.
        waited: How many seconds it has waited for the server in all.
        new: Whether it was opened for the present loan.
        prepares: True if the queries of logins are prepared at their first use; None if the
            driver's `prepare_threshold` decides.
        settled: Whether `SETTINGS` hold for the whole session. Otherwise each transaction sets
            them: through a transaction pooler, a session's settings would reach other clients.
            None: the next transaction sets them for the session, if the connection is direct.
        pid: The process that opened it. A forked child never uses and never closes it.
        spoilt: Whether to discard it, after an error that a new connection may not have: a session
            keeps the defaults of its role and database, such as read-only, from when it began.
    """

    schema: str = ""
    deadline: float = NEVER
    patience: float | None = None
    waited: float = 0.0
    new: bool = True
    prepares: bool | None = None
    settled: bool | None = False
    pid: int = 0
    slot: object = None
    used_at: float = 0.0
    spoilt: bool = False
    _shared: float | None = None

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run a generator of the driver to its end, but no longer than the deadline."""
        if self.pid != os.getpid():
            raise StoreUnavailable("PostgreSQL: the connection belongs to the parent process")
        began = time.monotonic()
        left = max(0.0, self.deadline - began)
        own = timeout is None or left < timeout
        limit = (None if left == NEVER else left) if own else timeout
        try:
            return waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=limit)
        except errors._WaitTimeout:  # noqa: SLF001 - the driver has no public name for it
            if own:
                self.pgconn.finish()
            raise
        except BaseException as exc:
            # Interrupted, as by KeyboardInterrupt, in the middle of a statement: close the
            # connection, where the driver would cancel the statement and wait for that.
            if not isinstance(exc, Exception):
                self.pgconn.finish()
            raise
        finally:
            self.waited += time.monotonic() - began

    @property
    def usable(self) -> bool:
        """Whether it can be used again once its transaction has ended."""
        return not (self.closed or self.spoilt)

    @property
    def idle(self) -> bool:
        """Whether it is usable and not in a transaction."""
        return self.usable and self.info.transaction_status == TransactionStatus.IDLE

    def __del__(self, *_: object) -> None:
        # The parent class would warn; a forked child must not touch the connection.
        if self.pid == os.getpid() and not self.closed:
            self.pgconn.finish()

    def lend(self, deadline: float) -> None:
        self.deadline, self.patience, self._shared = deadline, None, None

    def share(self, seconds: float) -> None:
        """Set how many seconds further statements may wait together, without the caller's time."""
        self.patience, self._shared = None, self.waited + seconds

    def _start(self) -> None:
        if self.patience is not None:
            self.deadline = time.monotonic() + self.patience
        elif self._shared is not None:
            self.deadline = time.monotonic() + self._shared - self.waited

    def rows(self, sql: str, params: Params = (), *, login: bool = False) -> list[Row]:
        """Run a query and return all its rows; with `login`, prepare it early if possible."""
        self._start()
        text, prepare = dialect(sql, self.schema), self.prepares if login else None
        cursor = self.cursor(binary=True)
        if self.settled or not self.idle:
            with self._translated():
                cursor.execute(text, params, prepare=prepare)
        else:
            # A batch outside of a transaction is a transaction, and one round trip.
            with self._batch():
                self.execute(self._settings())
                cursor.execute(text, params, prepare=prepare)
        return cursor.fetchall() if cursor.description else []

    def run(self, sql: str, params: Params = ()) -> None:
        self.rows(sql, params)

    def stream(self, sql: str) -> Iterator[Row]:
        name = f"rows_{next(_cursors)}"
        self.run(f"DECLARE {name} NO SCROLL CURSOR FOR {sql}")
        while True:
            rows = self.rows(f"FETCH FORWARD {_FETCHED} FROM {name}")
            yield from rows
            if len(rows) < _FETCHED:
                return

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        # Use several COPYs: the rows may come slowly, or from queries on this connection.
        source, total = iter(rows), 0
        statement = f"COPY pg_temp.{table} ({columns}) FROM STDIN"
        while some := list(islice(source, _STAGED_AT_ONCE)):
            self._start()
            with self._translated(), self.cursor() as cursor, cursor.copy(statement) as copy:
                for row in some:
                    copy.write_row(row)
            total += len(some)
        if total > _STAGED_AT_ONCE:
            self.run(f"ANALYZE pg_temp.{table}")  # autovacuum skips temporary tables

    def lock_table(self, table: str) -> None:
        self.run(f"LOCK TABLE {quoted(self.schema)}.{table} IN SHARE ROW EXCLUSIVE MODE")

    def among(self, column: str) -> str:
        return f"{column} = ANY(?::text[])"

    def each(self) -> str:
        return "unnest(?::text[]) AS j (value)"

    def texts(self, values: Iterable[str]) -> object:
        # The driver takes 0.1 s to adapt 100,000 account ids.
        texts = list(values)
        joined = join_plain(texts)
        return texts if joined is None else f"{{{joined}}}"

    def received(self, seconds: float) -> list[str]:
        """Wait for notifications for some seconds; return their payloads."""
        with self._translated():
            found = list(self.notifies(timeout=seconds, stop_after=1))
        return [notification.payload for notification in found]

    def script(self, text: str) -> list[list[Row]]:
        """Run several statements without parameters in one round trip; return each one's rows."""
        self._start()
        with self._translated():
            cursor, found = self.execute(text, prepare=False), []
            while True:
                found.append(cursor.fetchall() if cursor.description else [])
                if not cursor.nextset():
                    return found

    def begin(self, text: str) -> list[list[Row]]:
        """Run a script whose first statement begins a transaction."""
        if self.settled:
            return self.script(text)
        begin, _, rest = text.partition(";")
        found = self.script(f"{begin}; {self._settings()}; {rest}")
        return [found[0], *found[2:]]

    def run_batch(self, statements: Sequence[tuple[str, Params]]) -> str | None:
        """Run statements in one round trip, and return the last one's command tag."""
        self._start()
        with self._batch():
            cursors = [
                self.execute(dialect(text, self.schema), params) for text, params in statements
            ]
        return cursors[-1].statusmessage

    def _settings(self) -> str:
        """Return the statement that applies `SETTINGS` to the transaction or to the session."""
        local = "true"
        if self.settled is None:  # a pooler reports a backend pid that it made up
            pid = self.info.backend_pid
            local = f"pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.<>) {pid}"
        settings = ", ".join(
            f"pg_catalog.set_config('{name}', '{value}', l.local)"
            for name, value in SETTINGS.items()
        )
        return f"SELECT {settings} FROM (SELECT {local} AS local) l"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise the library's errors instead of the driver's."""
        try:
            yield
        except psycopg.Error as exc:
            if not isinstance(exc, _STATEMENT_FAILED):
                self.spoilt = True
            raise error_of(exc) from exc

    @contextmanager
    def _batch(self) -> Iterator[None]:
        try:
            with self.pipeline():
                yield
        except psycopg.Error as exc:
            self.spoilt = True
            # If the connection broke, leaving the driver's pipeline mode fails as well, and that
            # error would hide the first one.
            first = exc.__context__ if isinstance(exc.__context__, psycopg.Error) else exc
            raise error_of(first) from first
        except BaseException:
            # Statements after the one that failed were not run, but the driver may take them for
            # prepared from now on.
            self.spoilt = True
            raise


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

    def stream(self, sql: str) -> Iterator[Row]:
        self._send()
        return self._connection.stream(sql)

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        self._send()
        self._connection.insert_many(table, columns, rows)

    def lock_table(self, table: str) -> None:
        self._send()
        self._connection.lock_table(table)

    def commit(self, touching: int | None) -> None:
        """Commit, and wake the guards if a policy was touched."""
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


@lru_cache(maxsize=512)
def _tables(sql: str) -> frozenset[str]:
    return frozenset(_TABLES.findall(sql))


@lru_cache(maxsize=512)
def dialect(text: str, schema: str) -> str:
    """Translate a portable statement for PostgreSQL and its driver.

    The tables get the schema's name, so that they do not depend on the search path.
    """
    place = quoted(schema).replace("%", "%%")
    text = text.replace("%", "%%").replace("?", "%s")
    if text.startswith("CREATE TEMPORARY TABLE"):
        # Sort by code point, like the columns of the store that these are compared with.
        text = text.replace(" TEXT", ' TEXT COLLATE "C"') + " ON COMMIT DROP"
        text = text.replace(" BLOB", " BYTEA").replace(" INTEGER", " BIGINT")
    text = _TEMPORARY.sub(r"\1\2pg_temp.\3", text)
    return qualified(text, place)


def qualified(text: str, place: str) -> str:
    """Put the name of a schema, quoted, before each table and index in a statement."""

    def qualify(found: re.Match[str]) -> str:
        if found["index"]:
            return f"{Literal(place + '.' + found['index']).as_string(None)}::regclass"
        return f"{found['before']}{place}.{found['table']}"

    # In one pass: the schema's name may itself look like a part of a statement.
    return _NAMES.sub(qualify, text)


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return Identifier(name).as_string(None)


def error_of(exc: psycopg.Error) -> StoreError:
    """Return the library's error for a driver's. The server's messages contain no password."""
    words = exc.diag.message_primary or str(exc).strip() or type(exc).__name__
    if isinstance(exc, errors._WaitTimeout):  # noqa: SLF001
        return StoreUnavailable("PostgreSQL did not answer in time")
    if exc.diag.source_function == "check_enable_rls":  # its SQLSTATE only says: not allowed
        return StoreUnavailable(f"PostgreSQL: {words}")
    if isinstance(exc, errors.InsufficientPrivilege):
        return StoreConfigError(f"PostgreSQL: {words}")
    if isinstance(exc, psycopg.IntegrityError):
        return StoreError(f"PostgreSQL: the change contradicts what is stored: {words}")
    if isinstance(exc, errors.LockNotAvailable):
        return StoreUnavailable("PostgreSQL: another writer kept the lock for too long")
    return StoreUnavailable(f"PostgreSQL: {words}")


def ticks() -> float:
    """Return the seconds of a monotonic clock that includes the time a machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class ServerClock:
    """The server's clock, read without asking the server.

    It is never behind the server's clock, except for the difference of the two clocks' rates, and
    ahead by at most the time of the round trip: temporary restrictions end early rather than late.
    Before the first reading it is the host's clock.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None

    def set(self, micros: int, asked_at: float) -> None:
        """Record a reading: the server's time, and the `ticks` before it was asked."""
        self._seen = micros, asked_at

    def now(self) -> datetime:
        seen = self._seen
        if seen is None:
            return datetime.now(UTC)
        return moment(seen[0] + int((ticks() - seen[1]) * 1_000_000))
