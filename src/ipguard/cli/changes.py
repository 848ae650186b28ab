"""Change restrictions: in two phases as an administrator, or at once as an operator.

An administrator's commands are `request`, `confirm`, `cancel`, `resend` and `delete`; an operator's
are `impose`, `lift` and `unlock`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Final, TypeVar

from typer import Argument, Option

from ipguard.cli._codes import Exit, Problem
from ipguard.cli._context import ACTOR, ADMINISTRATOR, OPERATOR, SETTINGS, Context, command
from ipguard.cli._output import plain
from ipguard.cli._secrets import HOW_TO_GIVE_NUMBER, read_number
from ipguard.errors import LockoutRisk, UnknownRestriction, UnknownUser, shorten
from ipguard.model import Actor, Applied, PendingRequest
from ipguard.rules import shifted, without
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow

T = TypeVar("T")
UserArgument = Annotated[str, Argument(help="The user to restrict.")]
AddressesArgument = Annotated[
    str, Argument(help="203.0.113.7, 203.0.113.0/29, 203.0.113.5-203.0.113.9, or IPv6.")
]
RequestArgument = Annotated[str, Argument(metavar="REQUEST", help="The request's id.")]
RestrictionArgument = Annotated[str, Argument(metavar="RESTRICTION", help="The restriction's id.")]
LabelOption = Annotated[str, Option("--label", help="A name for the restriction.")]
ExpiresOption = Annotated[
    str | None,
    Option(
        "--expires", metavar="WHEN", help="When it expires: 2027-01-31T18:00Z; or 90m, 12h, 30d."
    ),
]
ReasonOption = Annotated[str, Option("--reason", help="Why; recorded in the audit log and mailed.")]
OpenOption = Annotated[
    bool, Option("--allow-open", help="Accept that this opens the user to every address.")
]
LockoutOption = Annotated[
    bool, Option("--allow-lockout", help="Accept that this may lock somebody out.")
]
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


# -- administrators ------------------------------------------------------------------------------


@command(ADMINISTRATOR)
def request(
    context: Context,
    username: UserArgument,
    addresses: AddressesArgument,
    *,
    label: LabelOption = "",
    expires: ExpiresOption = None,
    allow_lockout: LockoutOption = False,
) -> None:
    """Request a restriction; its confirmation number is mailed to you.

    Example: ipguard request jsmith 203.0.113.0/29 --label office --expires 30d
    """
    actor = context.actor()
    with context.workflow(numbers=True) as (_, flow):
        until = parse_expiry(expires, flow.now())
        _confirm_expiry(context, flow, actor, username, until, allowed=allow_lockout)
        change = partial(flow.request, actor, username, addresses, label=label, expires_at=until)
        made = _confirm_lockout(context, change, allowed=allow_lockout)
    _show_request(context, made, _mailed(actor, made))


@command(ADMINISTRATOR)
def confirm(
    context: Context,
    request: RequestArgument,
    number: Annotated[list[str] | None, Argument(hidden=True)] = None,
    *,
    allow_lockout: LockoutOption = False,
    allow_open: OpenOption = False,
) -> None:
    """Apply a request, given its number.

    The number is typed when asked for, or read from standard input; it is never an argument.

    Example: ipguard confirm 3f1c9a0be2d47756
    """
    if number:
        message = "every user of this machine can read a number in the arguments"
        raise Problem(Exit.USAGE, message, HOW_TO_GIVE_NUMBER)
    actor = context.actor()
    with context.workflow(numbers=True) as (_, flow):
        opens, deletes = allow_open, flow.own_request(actor, request).restriction_id
        if deletes is not None:
            opens = _confirm_removal(
                context, flow, actor, deletes, opens=opens, shuts=allow_lockout
            )
        change = partial(flow.confirm, actor, request, read_number(), allow_opening=opens)
        applied = _confirm_lockout(context, change, allowed=allow_lockout)
    _show_applied(context, applied)


@command(ACTOR, SETTINGS)
def cancel(context: Context, request: RequestArgument) -> None:
    """Cancel a request."""
    actor = context.actor(mailed=False)
    with context.workflow(mails=False) as (_, flow):
        cancelled = flow.cancel(actor, request)
    _show_request(context, cancelled)


@command(ADMINISTRATOR)
def resend(context: Context, request: RequestArgument) -> None:
    """Mail a new number for a request; the old one stops working."""
    actor = context.actor(mailed=False)  # the mail goes where the first number went
    with context.workflow(numbers=True) as (_, flow):
        made = flow.resend(actor, request)
    _show_request(context, made, "A new number was mailed to the address of the first one")


@command(ADMINISTRATOR)
def delete(
    context: Context,
    restriction: RestrictionArgument,
    *,
    reason: Annotated[str, Option("--reason", help="Why.")] = "",
    allow_open: OpenOption = False,
    allow_lockout: LockoutOption = False,
) -> None:
    """Delete a restriction, at once or by a mailed number.

    If `confirm_deletes` in the settings demands it, a number is mailed as for a request.
    """
    actor = context.actor()
    with context.workflow(numbers=True) as (_, flow):
        opens = _confirm_removal(
            context, flow, actor, restriction, opens=allow_open, shuts=allow_lockout
        )
        change = partial(flow.delete, actor, restriction, reason, allow_opening=opens)
        outcome = _confirm_lockout(context, change, allowed=allow_lockout)
    if isinstance(outcome, Applied):
        _show_applied(context, outcome)
    else:
        _show_request(context, outcome, _mailed(actor, outcome))


# -- operators -----------------------------------------------------------------------------------


@command(OPERATOR)
def impose(
    context: Context,
    username: UserArgument,
    addresses: AddressesArgument,
    *,
    reason: ReasonOption,
    label: LabelOption = "",
    expires: ExpiresOption = None,
    allow_lockout: LockoutOption = False,
) -> None:
    """Restrict a user at once, without a number. The user is told by mail.

    Example: ipguard impose jsmith 203.0.113.7 --reason "ticket 4713"
    """
    actor = context.actor()
    with context.workflow() as (_, flow):
        until = parse_expiry(expires, flow.now())
        _confirm_expiry(context, flow, actor, username, until, allowed=allow_lockout)
        applied = flow.impose(
            actor, username, addresses, reason=reason, label=label, expires_at=until
        )
    _show_applied(context, applied)


@command(OPERATOR)
def lift(
    context: Context,
    restriction: RestrictionArgument,
    *,
    reason: ReasonOption,
    allow_open: OpenOption = False,
    allow_lockout: LockoutOption = False,
) -> None:
    """Delete a restriction at once, without a number. The user is told by mail."""
    actor = context.actor()
    with context.workflow() as (_, flow):
        opens = _confirm_removal(
            context, flow, actor, restriction, opens=allow_open, shuts=allow_lockout
        )
        applied = flow.lift(actor, restriction, reason=reason, allow_opening=opens)
    _show_applied(context, applied)


@command(OPERATOR)
def unlock(
    context: Context,
    username: Annotated[str, Argument(help="The administrator who failed too often.")],
    *,
    reason: ReasonOption,
) -> None:
    """Accept numbers again after too many wrong ones."""
    actor = context.actor()
    name = canonical_username(username)
    with context.workflow() as (store, flow):
        # An administrator who is not registered has failures to reset; otherwise it is a typo.
        if not flow.failures(actor, name) and not store.load_policy(name).known:
            raise Problem(
                Exit.UNKNOWN,
                f"no user {shorten(name)} is registered or gave a wrong number",
                kind="UnknownUser",
                details={"username": name},
            )
        flow.unlock(actor, name, reason=reason)
    failed = context.report_failures()
    if context.out.as_json:
        context.out.data({"username": username, "notices_failed": failed})
    else:
        context.out.line("unlocked: numbers are accepted again", "green")


# -- what they share -----------------------------------------------------------------------------


def parse_expiry(text: str | None, now: datetime) -> datetime | None:
    """Read an expiry: a time with its zone, or a length of time from now."""
    if text is None:
        return None
    length = re.fullmatch(r"([0-9]{1,5})([mhd])", text)
    if length is not None:
        return shifted(now, timedelta(**{_UNITS[length[2]]: int(length[1])}))
    try:
        found = datetime.fromisoformat(text)
        if found.utcoffset() is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise Problem(
        Exit.USAGE,
        "write a time with its zone, such as 2027-01-31T18:00Z, or a length: 90m, 12h, 30d",
    )


def _confirm_removal(
    context: Context, flow: Workflow, actor: Actor, restriction_id: str, *, opens: bool, shuts: bool
) -> bool:
    """Ask before a removal that leaves the user no restriction, or only expired ones.

    Returns:
        Whether the removal may open the user to every address, by the option or the answer. If not,
        the workflow refuses to remove a restriction that has become the last one.
    """
    try:
        found = flow.restriction(actor, restriction_id)
        held = flow.user(actor, found.username).restrictions
    except (UnknownRestriction, UnknownUser):
        return opens  # the workflow reports the error
    remainder = without(held, found.id, flow.now())
    name = f"without {found.addresses}, {found.username}"
    if remainder.opens and not opens:
        context.out.confirm(f"{name} can log in from every address", "--allow-open")
        return True
    if remainder.shuts and not (shuts or found.expired(flow.now())):
        context.out.confirm(
            f"{name} can log in from no address: the other restrictions have expired",
            "--allow-lockout",
        )
    return opens


def _confirm_expiry(
    context: Context,
    flow: Workflow,
    actor: Actor,
    username: str,
    until: datetime | None,
    *,
    allowed: bool,
) -> None:
    """Ask before a user is left with temporary restrictions only: expiry does not lift them."""
    if until is None or allowed:
        return
    try:
        found = flow.user(actor, username)
    except UnknownUser:
        return  # the workflow reports the error
    if not found.removed and all(r.expires_at is not None for r in found.restrictions):
        name = found.user.username
        context.out.confirm(
            f"{name} has no permanent restriction: once this one has expired,"
            f" {name} can log in from no address",
            "--allow-lockout",
        )


def _confirm_lockout(context: Context, change: Callable[..., T], *, allowed: bool) -> T:
    """Make a change; if it would lock its actor out, ask and then make it with consent."""
    try:
        return change(allow_lockout=allowed)
    except LockoutRisk as exc:
        if allowed:
            raise
        context.out.confirm(str(exc), "--allow-lockout")
        return change(allow_lockout=True)


def _mailed(actor: Actor, made: PendingRequest) -> str:
    return f"A number was mailed to {actor.email}; ipguard confirm {made.id}"


def _show_applied(context: Context, applied: Applied) -> None:
    """Show an applied change, and how many of its notices failed."""
    failed = context.report_failures()
    restriction = applied.restriction
    if context.out.as_json:
        context.out.data(plain(applied) | {"notices_failed": failed})
        return
    if restriction is not None:
        context.out.line(
            f"done, revision {applied.revision}: {restriction.username} {restriction.addresses}"
            f" [{restriction.id}]",
            "green",
        )
    if applied.unrestricted:
        text = "No restriction is left: the user can log in from every address."
        context.out.line(text, "yellow")


def _show_request(context: Context, made: PendingRequest, next_step: str = "") -> None:
    """Show a request, and what to do next."""
    if context.out.as_json:
        context.out.data(made)
        return
    context.out.line(
        f"request {made.id} is {made.state.value}: {made.kind.value} {made.addresses}"
        f" for {made.username}",
        "green",
    )
    if next_step:
        context.out.line(next_step)
