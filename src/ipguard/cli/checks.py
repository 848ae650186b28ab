"""Ask the guard: `check` for one login or a login log, `explain` for the reasons."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated, Final

import attrs
import typer

from ipguard.cli._codes import Exit, Problem
from ipguard.cli._context import Context, command
from ipguard.cli._files import (
    BadRows,
    Columns,
    Format,
    FormatOption,
    format_of,
    opened,
    progress,
    rows,
    without_rows,
)
from ipguard.guard import Guard
from ipguard.model import Reason

_COLUMNS: Final = Columns(required=("username", "address"), lenient=True)
_LISTED: Final = 100_000  # different refused logins; invented usernames could be endless


class UnknownUsers(StrEnum):
    """What a guard answers for unknown users."""

    ALLOW = "allow"
    DENY = "deny"


UnknownOption = Annotated[
    UnknownUsers, typer.Option("--unknown-users", help="As in the guards of the login servers.")
]


@command()
def check(
    context: Context,
    username: Annotated[str | None, typer.Argument(help="The user who logs in.")] = None,
    address: Annotated[str | None, typer.Argument(help="The client's IP address.")] = None,
    *,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Check a login log instead: CSV or JSON Lines with username and address; - is"
            " standard input.",
        ),
    ] = None,
    kind: FormatOption = None,
    unknown_users: UnknownOption = UnknownUsers.ALLOW,
) -> int:
    """Check whether a user may log in from an address.

    The exit code is 0 if the login is allowed now, and 1 if not. With --file, every login of the
    log is checked as of now, and the exit code is 1 if any would be refused.

    Example: ipguard check jsmith 203.0.113.5
    """
    if (file is None) == (username is None) or (address is None) != (username is None):
        usage = "give USERNAME and ADDRESS, or --file FILE"
        raise Problem(Exit.USAGE, usage)
    with context.store() as store:
        guard = Guard(store, unknown_users=unknown_users.value)
        if file is not None:
            return _check_file(context, guard, file, format_of(file, kind))
        decision = guard.check(username or "", address or "")
        if decision.reason is Reason.STORE_UNAVAILABLE:
            raise _unavailable(guard)
    if context.out.as_json:
        context.out.data({"username": username, "address": address, "decision": decision})
    else:
        by = f" by restriction {decision.restriction_id}" if decision.restriction_id else ""
        answer, style = ("allowed", "green") if decision else ("not allowed", "red")
        context.out.line(f"{answer}: {decision.reason.value}{by}", style)
    return Exit.OK if decision else Exit.NOT_ALLOWED


@command()
def explain(
    context: Context,
    username: Annotated[str, typer.Argument(help="The user who logs in.")],
    address: Annotated[str, typer.Argument(help="The client's IP address.")],
    *,
    unknown_users: UnknownOption = UnknownUsers.ALLOW,
) -> int:
    """Check a login, and show the reasons and the user's restrictions.

    The exit code is that of `check`.
    """
    with context.store() as store:
        found = Guard(store, unknown_users=unknown_users.value).explain(username, address)
    if context.out.as_json:
        context.out.data(found)
    else:
        context.out.line(found.summary, "green" if found.decision else "red")
        if found.restrictions:
            context.out.table(
                ("id", "addresses", "label", "expires_at", "created_at", "created_by"),
                (
                    (r.id, str(r.addresses), r.label, r.expires_at, r.created_at, r.created_by)
                    for r in found.restrictions
                ),
            )
    return Exit.OK if found.decision else Exit.NOT_ALLOWED


def _unavailable(guard: Guard) -> Problem:
    """Return the error for a store that does not respond: that is no answer about a user."""
    error = guard.stats().error or "it does not respond"
    return Problem(Exit.UNAVAILABLE, f"the store: {error}", kind="StoreUnavailable")


# -- a login log ---------------------------------------------------------------------------------


@attrs.define
class Refused:
    """A login that would be refused.

    Attributes:
        username: As in the log.
        address: As in the log.
        reason: Why.
        first_line: The line of its first occurrence.
        count: How often it occurs.
    """

    username: str
    address: str
    reason: str
    first_line: int
    count: int = 0


@attrs.define
class _LogReport:
    """What a login log would lead to."""

    allowed: int = 0
    reasons: Counter[str] = attrs.field(factory=Counter)
    refused: dict[tuple[str, str, str], Refused] = attrs.field(factory=dict)
    unlisted: int = 0

    def refuse(self, login: tuple[str, str, str], line: int) -> None:
        """Count a refused login."""
        self.reasons[login[2]] += 1
        if login not in self.refused and len(self.refused) < _LISTED:
            self.refused[login] = Refused(*login, line)
        if login in self.refused:
            self.refused[login].count += 1
        else:
            self.unlisted += 1


def _check_file(context: Context, guard: Guard, path: str, kind: Format) -> int:
    """Check every login of a file; report bad rows after the rest."""
    bad, report = BadRows(path, "the others were checked"), _LogReport()
    with opened(path) as stream, progress(context.out, "logins", stream) as advance:
        for line, row in rows(stream, kind, _COLUMNS, bad.add, advance):
            username, address = row.get("username", ""), row.get("address", "")
            decision = guard.check(username, address)
            if decision.reason is Reason.STORE_UNAVAILABLE:
                raise _unavailable(guard)
            if decision:
                report.allowed += 1
            else:
                report.refuse((username, address, decision.reason.value), line)
    if not (report.allowed or report.reasons or bad.count):
        raise without_rows(path, "logins")
    _show_report(context, path, report, bad.count)
    bad.raise_if_any()
    return Exit.NOT_ALLOWED if report.reasons else Exit.OK


def _show_report(context: Context, path: str, report: _LogReport, bad: int) -> None:
    refused, total = list(report.refused.values()), report.reasons.total()
    if context.out.as_json:
        context.out.data(
            {
                "file": path,
                "logins": report.allowed + total,
                "allowed": report.allowed,
                "refused": total,
                "bad_rows": bad,
                "by_reason": dict(sorted(report.reasons.items())),
                "refused_logins": refused,
                "not_listed_here": report.unlisted,
            }
        )
        return
    if refused:
        context.out.table(
            ("username", "address", "reason", "count", "first_line"),
            ((r.username, r.address, r.reason, r.count, r.first_line) for r in refused),
        )
    why = ", ".join(f"{reason} {count:,}" for reason, count in report.reasons.most_common())
    context.out.note(
        f"{report.allowed + total:,} logins: {report.allowed:,} allowed, {total:,} refused"
        + (f" ({why})" if why else "")
    )
    if report.unlisted:
        context.out.note(f"{report.unlisted:,} more refused logins are counted but not listed")
