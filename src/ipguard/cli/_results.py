"""What the commands that change restrictions share."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, TypeVar

import typer

from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.errors import LockoutRisk, UnknownRestriction, UnknownUser
from ipguard.model import Actor, Applied, PendingRequest
from ipguard.rules import shifted, without
from ipguard.workflow import Workflow

LabelOption = Annotated[str, typer.Option("--label", help="What to call it.")]
ExpiresOption = Annotated[
    str | None,
    typer.Option(
        "--expires",
        metavar="WHEN",
        help="Until when its addresses are let in: 2027-01-31T18:00Z, or 12h, 30d from now.",
    ),
]
OpenOption = Annotated[
    bool, typer.Option("--allow-open", help="Also where that opens the user to every address.")
]
LockoutOption = Annotated[
    bool, typer.Option("--allow-lockout", help="Also where that keeps somebody out.")
]
ReasonOption = Annotated[
    str, typer.Option("--reason", help="Why: it goes into the trail and the mails. Required.")
]
T = TypeVar("T")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def moment_of(text: str | None, now: datetime) -> datetime | None:
    """Read when something ends: a time with its zone, or how long from now."""
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
        "a time is written 2027-01-31T18:00Z, with its zone, or as a length: 90m, 12h, 30d",
    )


def removal_allowed(
    call: Call, flow: Workflow, actor: Actor, restriction_id: str, *, opens: bool, lockout: bool
) -> bool:
    """Ask before a removal that leaves a user no restriction, or only expired ones.

    If the restriction does not exist for this actor, leave the error to the workflow.

    Args:
        call: The call.
        flow: The workflow.
        actor: Who acts.
        restriction_id: The restriction.
        opens: Whether the removal may open the user to every address.
        lockout: Whether it may leave the user with no address.

    Returns:
        Whether the removal may open the user to every address: the person was asked, or had said
        so. If not, the workflow refuses should the restriction be the last by then.
    """
    try:
        found = flow.restriction(actor, restriction_id)
        held = flow.user(actor, found.username).restrictions
    except (UnknownRestriction, UnknownUser):
        return opens
    remainder = without(held, found.id, flow.now())
    if remainder.opens and not opens:
        confirmed(
            call,
            f"without {found.addresses}, {found.username} can log in from every address",
            "--allow-open",
        )
        return True
    if remainder.shuts and not (lockout or found.expired(flow.now())):
        confirmed(
            call,
            f"without {found.addresses}, {found.username} can log in from no address:"
            " the other restrictions have expired",
            "--allow-lockout",
        )
    return opens


def ending_allowed(
    call: Call,
    flow: Workflow,
    actor: Actor,
    username: str,
    until: datetime | None,
    *,
    lockout: bool,
) -> None:
    """Ask before a user is left with temporary restrictions only.

    Expiry lifts no restriction: once all have expired, the user can log in from no address.

    Args:
        call: The call.
        flow: The workflow.
        actor: Who acts.
        username: Who is restricted.
        until: When the new restriction ends, or None.
        lockout: Whether it may come to that.
    """
    if until is None or lockout:
        return
    try:
        line = flow.user(actor, username)
    except UnknownUser:
        return
    name = line.user.username
    if not line.removed and all(r.expires_at is not None for r in line.restrictions):
        confirmed(
            call,
            f"{name} has nothing that lasts: once this has ended, {name} can log in from nowhere",
            "--allow-lockout",
        )


def daring(call: Call, change: Callable[[bool], T], *, allowed: bool) -> T:
    """Make a change; where it would keep its actor out, ask the person and make it all the same."""
    try:
        return change(allowed)
    except LockoutRisk as exc:
        if allowed:
            raise
        confirmed(call, str(exc), "--allow-lockout")
        return change(True)  # noqa: FBT003 - a lambda has no keywords


def confirmed(call: Call, what: str, option: str) -> None:
    """Ask whether to do what has such an outcome; end the command where that is not a yes.

    Raises:
        Problem: The person said no, or there is nobody to ask.
    """
    answer = call.out.ask(f"{what}. Go on?")
    if answer is None:
        raise Problem(
            Exit.NOT_CONFIRMED, what, kind="NotConfirmed", hint=f"{option} does it all the same"
        )
    if not answer:
        raise Problem(Exit.NOT_CONFIRMED, "nothing was changed", kind="NotConfirmed")


def show_applied(call: Call, applied: Applied) -> None:
    """Show a change that holds, and which notices of it were not sent."""
    failed = call.tell_failures()
    restriction = applied.restriction
    if call.out.as_json:
        call.out.data(
            {
                "revision": applied.revision,
                "restriction": restriction,
                "unrestricted": applied.unrestricted,
                "notices_failed": failed,
            }
        )
        return
    if restriction is not None:
        call.out.line(
            f"done, revision {applied.revision}: {restriction.username} {restriction.addresses}"
            f" [{restriction.id}]",
            "green",
        )
    if applied.unrestricted:
        call.out.line("No restriction is left: the user can log in from every address.", "yellow")


def show_request(call: Call, request: PendingRequest, following: str = "") -> None:
    """Show a request, and what comes next."""
    if call.out.as_json:
        call.out.data(request)
        return
    call.out.line(
        f"request {request.id} is {request.state.value}: {request.kind.value}"
        f" {request.addresses} for {request.username}",
        "green",
    )
    if following:
        call.out.line(following)
