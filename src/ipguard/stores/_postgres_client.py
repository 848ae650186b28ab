"""How the PostgreSQL store asks: with a deadline, and again if a pooled connection failed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

from ipguard.errors import StoreError, StoreUnavailable
from ipguard.stores._postgres import Session, located, quoted
from ipguard.stores._postgres_clock import ServerClock
from ipguard.stores._postgres_options import Options
from ipguard.stores._postgres_pool import Pool
from ipguard.stores._postgres_schema import STATE, Greeting, check_version, greet, prepare
from ipguard.stores._sql import Row
from ipguard.stores._sql_read import UNFINISHED

_log = logging.getLogger("ipguard.stores.postgres")
T = TypeVar("T")

_SNAPSHOT: Final = f"""
BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SELECT {STATE}, m.id FROM (SELECT 1) s LEFT JOIN zz_restore_marker m ON m.id = 1
"""


class Client:
    """The connections of one store, and what is asked over them.

    Args:
        options: Where the database is.

    Attributes:
        options: The same.
        pool: The connections.
        clock: What the server's clock said.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.clock = ServerClock()
        self.pool = Pool(options, self._greet)

    def open(self, *, migrate: bool | None) -> None:
        """Look at the database once, and see to its schema.

        Raises:
            SchemaVersionError: The schema may not be used.
            StoreConfigError: The database cannot be used.
            StoreUnavailable: It does not answer, and `migrate` is True; else that is only logged.
        """

        def first(session: Session) -> None:
            self._note(prepare(session, self.options, migrate=migrate))

        self.pool.check = first
        try:
            with self.pool.session(self.deadline()):
                pass
        except StoreUnavailable as exc:
            if migrate is True:
                raise
            _log.warning("%s: not there at opening: %s", self.options.place, exc)
        finally:
            # Never again later: in a schema made anew nobody would be restricted.
            self.pool.check = self._greet
        self.pool.forget()  # a fork then has nothing to inherit

    def _greet(self, session: Session) -> None:
        try:
            greeting = greet(session, self.options)
        except StoreUnavailable:
            raise
        except StoreError as exc:
            raise StoreUnavailable(f"{self.options.place}: {exc}") from exc
        self._note(greeting)
        check_version(greeting.version, greeting.oldest)

    def _note(self, greeting: Greeting) -> None:
        self.clock.set(greeting.micros, greeting.asked_at)

    def deadline(self) -> float:
        """Return until when a call that begins now may take."""
        return time.monotonic() + self.options.timeout

    def refuse(self, session: Session, recovering: object, complete: object) -> None:
        """Refuse an answer by the columns of `STATE`.

        An answer of a server in recovery may be of any age. No new connection leads to one, but
        behind a pooler the server may change.
        """
        if recovering and not self.options.replica:
            session.connection.spoilt = True  # a new connection may find the primary
            raise StoreUnavailable(f"{self.options.place}: the server is in recovery")
        if not complete:
            raise StoreUnavailable(f"{self.options.place}: {UNFINISHED}")

    # ------------------------------------------------------------------------- asking

    def read(self, reading: Callable[[Session], T], *, deadline: float | None = None) -> T:
        """Run a read. If a connection from the pool fails, repeat it on a new one."""
        session, found = self._asked(reading, deadline or self.deadline())
        self.pool.give(session)
        return found

    def _asked(self, ask: Callable[[Session], T], deadline: float) -> tuple[Session, T]:
        """Lend a connection on which a first question was answered."""
        pool = self.pool
        while True:
            session = pool.take(deadline)
            new = session.new
            try:
                return session, ask(session)
            except BaseException as exc:
                failed = not session.connection.usable
                self.give_up(session)
                # The server may have closed it while it was idle, or its session may be outdated:
                # a new connection may succeed.
                again = failed and not new and isinstance(exc, StoreError)
                if not again or time.monotonic() >= deadline:
                    raise

    @contextmanager
    def snapshot(self, settings: str = "", *, patience: float | None = None) -> Iterator[Session]:
        """Run the block's statements against one committed state.

        Args:
            settings: Further statements to begin with, in the same round trip.
            patience: How many seconds each of the block's statements may take; None: the store's
                timeout is for all statements together.
        """
        deadline = self.deadline()
        begin = located(_SNAPSHOT, quoted(self.options.schema))
        with self.begun(f"{begin}; {settings}", deadline=deadline) as (session, found):
            recovering, indexed, marker = found[1][0]
            self.refuse(session, recovering, indexed and marker)
            session.share(deadline - time.monotonic())
            session.patience = patience
            yield session
            session.script("COMMIT")

    @contextmanager
    def begun(
        self, begin: str, *, deadline: float | None = None
    ) -> Iterator[tuple[Session, list[list[Row]]]]:
        """Lend a connection in a transaction.

        Args:
            begin: The statements that begin it, for one round trip.
            deadline: Until when they may take.

        Returns:
            The connection, and the rows of each of those statements.
        """
        session, found = self._asked(lambda it: it.begin(begin), deadline or self.deadline())
        try:
            yield session, found
        except BaseException:
            self.give_up(session)
            raise
        if not session.connection.usable:
            self.pool.forget()
        self.pool.give(session)

    def give_up(self, session: Session) -> None:
        """Undo what a connection was in the middle of, and give it back if it is whole."""
        connection = session.connection
        if connection.pid == os.getpid():
            if not connection.usable:
                self.pool.forget()  # the others may have the same fault, or hang
            elif not connection.idle:
                if session.patience is not None:  # else it has what is left of the deadline
                    session.patience = self.options.timeout
                with suppress(StoreError):  # then the pool closes it, which undoes the same
                    session.script("ROLLBACK")
        self.pool.give(session)
