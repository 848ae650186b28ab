"""What `doctor` looks at in PostgreSQL: what wakes guards, the pooler, and what the role may do."""

from __future__ import annotations

import logging
import time
from typing import Final

from ipguard.cli.doctor import Finding, Findings
from ipguard.errors import StoreError
from ipguard.store import RestrictionStore
from ipguard.stores.postgres import Examination, examine

_PATIENCE: Final = 5.0
_GRANTS: Final = "ipguard migrate --sql --reader ROLE --writer ROLE prints what roles need"


def look(url: str, store: RestrictionStore, head: int) -> Findings:
    """Examine a PostgreSQL store over a separate connection."""
    found = examine(url)
    if found.recovering:
        yield Finding(
            "server",
            "warn",
            "is in recovery: its data may be of any age",
            "name the primary",
        )
    between = "there is one between; nothing is prepared" if found.pooled else "none between"
    yield Finding("pooler", "ok", between)
    yield _role(found)
    yield from _row_security(found)
    yield _listener(store, head, listens=found.listens)


def explain(url: str) -> Findings:
    """Find why a server that can be reached refuses to answer."""
    yield from _row_security(examine(url))


def _row_security(found: Examination) -> Findings:
    if not found.row_security:
        return
    hidden = [table for table, hides in found.row_security.items() if hides]
    off = f"ALTER TABLE {found.schema}. … DISABLE ROW LEVEL SECURITY"
    if hidden:
        hides = (
            f"hides rows of {', '.join(hidden)} from {found.role}: every read of them is refused"
        )
        todo = f"{off}, or ALTER ROLE {found.role} BYPASSRLS"
        yield Finding("row security", "fail", hides, todo)
    else:
        tables = ", ".join(found.row_security)
        on = f"is on for {tables}: it does not apply to {found.role}, but may to other roles"
        yield Finding("row security", "warn", on, off)


def _role(found: Examination) -> Finding:
    role = found.role
    if found.rights == "owner":
        return Finding("role", "warn", f"{role} may change the trail, as the owner may", _GRANTS)
    if found.rights == "none":
        return Finding("role", "fail", f"{role} may not read the restrictions", _GRANTS)
    if found.rights == "reader":
        return Finding("role", "ok", f"{role} is a reader: for login servers, not to administer")
    if not found.temporary:
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


def _listener(store: RestrictionStore, head: int, *, listens: bool) -> Finding:
    if not listens:
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
