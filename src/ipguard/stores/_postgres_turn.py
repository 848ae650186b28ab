"""The writer's turn on a connection: how it is taken, what it sends when, and how it commits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from ipguard.errors import StoreUnavailable
from ipguard.stores._postgres import Session, quoted
from ipguard.stores._postgres_schema import MICROS
from ipguard.stores._sql import Params, Row


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
        FROM {place}.head h CROSS JOIN {place}.schema_version v"""


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
