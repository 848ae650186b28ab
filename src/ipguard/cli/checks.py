"""Ask the guard: `check` for one login or a login log, `explain` for the reasons."""

from __future__ import annotations

import os
import pwd
from collections import Counter
from contextlib import suppress
from enum import StrEnum
from operator import attrgetter
from typing import Annotated, Final

from typer import Argument, Option

from ipguard.cli import _files
from ipguard.cli._context import Context, command
from ipguard.cli._files import BadRows, Columns, Format, FormatOption
from ipguard.cli._output import Exit, Problem
from ipguard.guard import Guard
from ipguard.model import Decision, Reason

_COLUMNS: Final = Columns(what="logins", required=("username", "address"), lenient=True)
_LISTED: Final = 100_000  # different refused logins; invented usernames could be endless
_LISTED_COLUMNS: Final = ("username", "address", "reason", "count", "first_line")


class UnknownUsers(StrEnum):
    """What a guard answers for unknown users."""

    ALLOW = "allow"
    DENY = "deny"


UnknownOption = Annotated[
    UnknownUsers, Option("--unknown-users", help="As in the guards of the login servers.")
]


@command()
def check(
    context: Context,
    username: Annotated[str | None, Argument(help="The user who logs in.")] = None,
    address: Annotated[str | None, Argument(help="The client's IP address.")] = None,
    *,
    file: Annotated[
        str | None,
        Option("--file", metavar="FILE", help="A login log to check; - is standard input."),
    ] = None,
    kind: FormatOption = None,
    pam: Annotated[
        bool, Option("--pam", help="Take the login from PAM_USER and PAM_RHOST, for pam_exec.")
    ] = False,
    unknown_users: UnknownOption = UnknownUsers.ALLOW,
) -> int:
    """Check whether a user may log in from an address.

    The exit code is 0 if the login is allowed now, and 1 if not. With --file, every login of the
    log (CSV or JSON Lines with username and address) is checked as of now, and the exit code is 1
    if any would be refused.

    Example: ipguard check jsmith 203.0.113.5
    """
    sources = (username is not None, file is not None, pam)
    if sources.count(True) != 1 or (address is None) != (username is None):
        raise Problem(Exit.USAGE, "give USERNAME and ADDRESS, or --file FILE, or --pam")
    if pam:
        username, address = _pam_login()
    with context.store() as store:
        guard = Guard(store, unknown_users=unknown_users.value)
        if file is not None:
            return _check_file(context, guard, file, kind)
        decision = _decide(guard, username or "", address or "")
    context.out.data({"username": username, "address": address, "decision": decision})
    by = f" by restriction {decision.restriction_id}" if decision.restriction_id else ""
    answer, style = ("allowed", "green") if decision else ("not allowed", "red")
    context.out.line(f"{answer}: {decision.reason.value}{by}", style)
    return Exit.OK if decision else Exit.NOT_ALLOWED


@command()
def explain(
    context: Context,
    username: Annotated[str, Argument(help="The user who logs in.")],
    address: Annotated[str, Argument(help="The client's IP address.")],
    *,
    unknown_users: UnknownOption = UnknownUsers.ALLOW,
) -> int:
    """Check a login, and show the reasons and the user's restrictions.

    The exit code is that of `check`.
    """
    with context.store() as store:
        found = Guard(store, unknown_users=unknown_users.value).explain(username, address)
    context.out.data(found)
    context.out.line(found.summary, "green" if found.decision else "red")
    if found.restrictions:
        names = ("id", "addresses", "label", "expires_at", "created_at", "created_by")
        context.out.table(names, map(attrgetter(*names), found.restrictions))
    if found.refused:
        refused = ("address", "last_at", "times", "hint")
        context.out.line("Refused logins with the right password:")
        context.out.table(refused, map(attrgetter(*refused), found.refused))
    return Exit.OK if found.decision else Exit.NOT_ALLOWED


def _pam_login() -> tuple[str, str]:
    """Return the user and the address of the login that pam_exec(8) was called for."""
    if "PAM_USER" not in os.environ:
        raise Problem(Exit.USAGE, "--pam needs PAM_USER and PAM_RHOST", "pam_exec sets them")
    name = os.environ["PAM_USER"]
    with suppress(KeyError):
        # The text that was typed may be another spelling of the name of the system's record.
        name = pwd.getpwnam(name).pw_name
    return name, os.environ.get("PAM_RHOST", "")


def _decide(guard: Guard, username: str, address: str) -> Decision:
    """Ask the guard; raise Problem if the store does not respond: that says nothing of the user."""
    decision = guard.check(username, address)
    if decision.reason is Reason.STORE_UNAVAILABLE:
        error = guard.stats().error or "it does not respond"
        raise Problem(Exit.UNAVAILABLE, f"the store: {error}", kind="StoreUnavailable")
    return decision


def _check_file(context: Context, guard: Guard, path: str, kind: Format | None) -> int:
    """Check every login of a file; report bad rows after the rest."""
    bad, allowed, unlisted = BadRows(path, "the others were checked"), 0, 0
    reasons: Counter[str] = Counter()
    logins: dict[tuple[str, str, str], list[int]] = {}  # refused ones: count and first line
    with _files.opened(path) as stream, _files.progress(context.out, "logins", stream) as advance:
        for line, row in _files.rows(stream, path, kind, _COLUMNS, bad.add, advance):
            username, address = row.get("username", ""), row.get("address", "")
            decision = _decide(guard, username, address)
            if decision:
                allowed += 1
                continue
            reasons[decision.reason.value] += 1
            login = (username, address, decision.reason.value)
            if login in logins or len(logins) < _LISTED:
                logins.setdefault(login, [0, line])[0] += 1
            else:
                unlisted += 1
    refused = reasons.total()
    listed = [(*login, count, line) for login, (count, line) in logins.items()]
    context.out.data(
        {
            "file": path,
            "logins": allowed + refused,
            "allowed": allowed,
            "refused": refused,
            "bad_rows": bad.count,
            "by_reason": dict(reasons.most_common()),
            "refused_logins": [dict(zip(_LISTED_COLUMNS, row, strict=True)) for row in listed],
            "not_listed_here": unlisted,
        }
    )
    if listed:
        context.out.table(_LISTED_COLUMNS, listed)
    if not context.out.as_json:
        why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        text = f"{allowed + refused:,} logins: {allowed:,} allowed, {refused:,} refused"
        context.out.note(f"{text} ({why})" if why else text)
        if unlisted:
            context.out.note(f"{unlisted:,} more refused logins are counted but not listed")
    bad.raise_if_any()
    return Exit.NOT_ALLOWED if reasons else Exit.OK
