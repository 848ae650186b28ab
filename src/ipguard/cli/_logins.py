"""A whole login log, asked of a guard: who would have been refused, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import attrs

from ipguard.cli._bulk import BadRows, progress
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._files import BadRow, Columns, format_of, holds_no, opened, rows
from ipguard.guard import Guard
from ipguard.model import Reason

_COLUMNS: Final = Columns(needed=("username", "address"), others=True)
_KEPT: Final = 100_000  # different refused logins; a log full of invented names has no end


@attrs.define
class Refused:
    """A login that would be refused, however often it was tried.

    Attributes:
        username: As in the log.
        address: As in the log.
        reason: Why.
        first_line: Where it is for the first time.
        count: How often it is there.
    """

    username: str
    address: str
    reason: str
    first_line: int
    count: int = 0


def check_file(call: Call, guard: Guard, path: str, kind: str | None) -> int:
    """Check each row of a file, and show who would be refused.

    Returns:
        The exit code.

    Raises:
        BadRows: Some rows are none; it is raised after the rest has been shown.
        Problem: There is no row at all: a log in which nobody logged in is most likely not the log.
    """
    kind, bad = format_of(path, kind), BadRows(path, "the others were checked")
    reasons: Counter[str] = Counter()
    refused: dict[tuple[str, str, str], Refused] = {}
    more = allowed = 0
    with opened(path) as stream, progress(call.out, "logins", stream) as tell:
        for line, row in rows(stream, kind, _COLUMNS, tell):
            if isinstance(row, BadRow):
                bad.add(line, row.reason)
                continue
            username, address = row.get("username", ""), row.get("address", "")
            decision = guard.check(username, address)
            if decision:
                allowed += 1
                continue
            reason = decision.reason
            if reason is Reason.STORE_UNAVAILABLE:
                raise unavailable(guard)
            reasons[reason.value] += 1
            key = (username, address, reason.value)
            if key not in refused and len(refused) < _KEPT:
                refused[key] = Refused(*key, line)
            if key in refused:
                refused[key].count += 1
            else:
                more += 1
    if not (allowed or reasons or bad.count):
        raise holds_no(path, "logins")
    _show(call, path, allowed, reasons, refused.values(), more, bad.count)
    bad.raise_if_any()
    return Exit.NOT_ALLOWED if reasons else Exit.OK


def unavailable(guard: Guard) -> Problem:
    """Return what to end with where the store does not answer: that says nothing about a user."""
    error = guard.stats().error or "it does not answer"
    return Problem(Exit.UNAVAILABLE, f"the store: {error}", kind="StoreUnavailable")


def _show(
    call: Call,
    path: str,
    allowed: int,
    reasons: Counter[str],
    refused: Any,
    more: int,
    bad: int,
) -> None:
    total = sum(reasons.values())
    if call.out.as_json:
        call.out.data(
            {
                "file": path,
                "logins": allowed + total,
                "allowed": allowed,
                "refused": total,
                "bad_rows": bad,
                "by_reason": dict(sorted(reasons.items())),
                "refused_logins": list(refused),
                "not_listed_here": more,
            }
        )
        return
    if refused:
        call.out.table(
            ("username", "address", "reason", "count", "first_line"),
            ((r.username, r.address, r.reason, r.count, r.first_line) for r in refused),
        )
    why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    said = f"{allowed + total:,} logins: {allowed:,} allowed, {total:,} refused"
    call.out.note(f"{said} ({why})" if why else said)
    if more:
        call.out.note(f"{more:,} further refused logins are counted and not listed")
