"""What `doctor` looks at in PostgreSQL: what wakes guards, the pooler, and what the role may do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ipguard.cli.doctor import Finding, Findings
from ipguard.errors import StoreError
from ipguard.store import RestrictionStore
from ipguard.stores.postgres._connection import Session, quoted
from ipguard.stores.postgres._options import Options
from ipguard.stores.postgres._pool import connect

_PATIENCE: Final = 5.0
_TABLES: Final = ("restrictions", "users", "requests", "changes")
_WHERE: Final = "SELECT pg_backend_pid(), current_user::text, pg_is_in_recovery()"
_SECURED: Final = """
SELECT c.relname::text, row_security_active(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ? AND c.relrowsecurity ORDER BY c.relname
"""
_GRANTS: Final = "ipguard migrate --sql --reader ROLE --writer ROLE prints what roles need"


def look(url: str, store: RestrictionStore, head: int) -> Findings:
    """Look at a PostgreSQL store, over a connection of its own."""
    options = Options.parse(url, {})
    with _connected(options) as session:
        ((backend, role, recovering),) = session.rows(_WHERE)
        if recovering:
            yield Finding(
                "server",
                "warn",
                "is in recovery: what it holds may be of any age",
                "name the primary",
            )
        between = backend != session.connection.info.backend_pid
        found = "there is one between; nothing is prepared" if between else "none between"
        yield Finding("pooler", "ok", found)
        yield _role(session, quoted(options.schema), role)
        yield from _row_security(session)
    yield _listener(store, head, options)


def explain(url: str) -> Findings:
    """Look for what makes a server that can be reached refuse to answer."""
    with _connected(Options.parse(url, {})) as session:
        yield from _row_security(session)


@contextmanager
def _connected(options: Options) -> Iterator[Session]:
    connection = connect(options.servers[0], time.monotonic() + options.timeout)
    try:
        session = Session(connection, options.schema)
        session.patience = options.timeout
        yield session
    finally:
        connection.close()


def _row_security(session: Session) -> Findings:
    secured = session.rows(_SECURED, (session.schema,))
    if not secured:
        return
    ((role,),) = session.rows("SELECT current_user::text")
    hidden = [table for table, active in secured if active]
    off = f"ALTER TABLE {quoted(session.schema)}. … DISABLE ROW LEVEL SECURITY"
    if hidden:
        found = f"hides rows of {', '.join(hidden)} from {role}: every read of them is refused"
        yield Finding("row security", "fail", found, f"{off}, or ALTER ROLE {role} BYPASSRLS")
    else:
        tables = ", ".join(table for table, _ in secured)
        found = f"is on for {tables}: it does not apply to {role}, but may to other roles"
        yield Finding("row security", "warn", found, off)


def _role(session: Session, schema: str, role: str) -> Finding:
    def may(what: str, table: str) -> bool:
        ((allowed,),) = session.rows(
            "SELECT has_table_privilege(?::text, ?::text)", (f"{schema}.{table}", what)
        )
        return bool(allowed)

    ((temporary,),) = session.rows("SELECT has_database_privilege(current_database(), 'TEMPORARY')")
    if may("DELETE", "changes") or may("UPDATE", "changes"):
        return Finding("role", "warn", f"{role} may change the trail, as the owner may", _GRANTS)
    if not may("SELECT", "restrictions"):
        return Finding("role", "fail", f"{role} may not read the restrictions", _GRANTS)
    if not all(may("INSERT", table) for table in _TABLES):
        return Finding("role", "ok", f"{role} is a reader: for login servers, not to administer")
    if not temporary:
        todo = f"GRANT TEMPORARY on the database to {role}"
        return Finding("role", "fail", f"{role} may not make temporary tables", todo)
    return Finding("role", "ok", f"{role} is a writer: it may administer")


class _Heard(logging.Handler):
    """What the store says of how guards are woken: its log is where it does."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        for word in ("listening for changes", "polling: "):
            if word in text:
                self.said = text[text.index(word) :]


def _listener(store: RestrictionStore, head: int, options: Options) -> Finding:
    if options.listen is None:
        return Finding("listener", "ok", "off: guards poll, a change takes up to a second")
    heard, logger = _Heard(), logging.getLogger("ipguard.stores.postgres")
    level = logger.level
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    try:
        until = time.monotonic() + _PATIENCE
        while not heard.said and time.monotonic() < until:
            try:
                store.wait(head, 0.05)
            except StoreError as exc:
                heard.said = f"polling: {exc}"
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
    if heard.said.startswith("listening"):
        return Finding("listener", "ok", "wakes guards within milliseconds")
    said = heard.said.removeprefix("polling: ") or "it says nothing"
    return Finding("listener", "warn", f"guards poll, a change takes up to a second: {said}")
