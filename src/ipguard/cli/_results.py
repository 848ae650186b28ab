"""What the commands that change restrictions share."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, TypeVar

import typer

from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.errors import LockoutRisk
from ipguard.model import Actor, Applied, PendingRequest
from ipguard.rules import shifted
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username
from ipguard.workflow._steps import request_and_user

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
    call: Call,
    store: RestrictionStore,
    actor: Actor,
    restriction_id: str | None = None,
    *,
    request_id: str | None = None,
    opens: bool,
    lockout: bool,
) -> bool:
    """Ask the person before a restriction ends that is all that keeps others out, or lets one in.

    A restriction that is not there for this actor is the workflow's to refuse.

    Args:
        call: The call.
        store: The store.
        actor: Who acts.
        restriction_id: The restriction.
        request_id: Or the request to delete one.
        opens: Whether it may open a user to every address.
        lockout: Whether it may leave a user with no address.

    Returns:
        Whether it may open a user to every address: the person was asked, or had said so. Without
        that the workflow will refuse, should the restriction be the last by then.

    Raises:
        UnknownRequest: There is no such request of this actor's own: nobody need type a number.
    """
    with store.transaction() as turn:
        if request_id is not None:
            asked, _ = request_and_user(turn, actor, request_id, own=True)
            restriction_id = asked.request.restriction_id
        found = None if restriction_id is None else turn.restriction(restriction_id)
        user = None if found is None else turn.user(found.username)
        if found is None or user is None or user.user.account_id not in actor.manages:
            return opens
        left = [r for r in turn.restrictions(found.username) if r.id != restriction_id]
        now = turn.now
    if not left and not opens:
        confirmed(
            call,
            f"without {found.addresses}, {found.username} can log in from every address",
            "--allow-open",
        )
        return True
    if left and all(r.expired(now) for r in left) and not (lockout or found.expired(now)):
        confirmed(
            call,
            f"without {found.addresses}, {found.username} can log in from no address:"
            " the other restrictions have expired",
            "--allow-lockout",
        )
    return opens


def ending_allowed(
    call: Call,
    store: RestrictionStore,
    actor: Actor,
    username: str,
    until: datetime | None,
    *,
    lockout: bool,
) -> None:
    """Ask the person before a user is left with nothing but what ends.

    Time lifts no restriction: once all have ended, the user can log in from nowhere.

    Args:
        call: The call.
        store: The store.
        actor: Who acts.
        username: Who is restricted.
        until: When the new restriction ends, or None.
        lockout: Whether it may come to that.
    """
    if until is None or lockout:
        return
    name = canonical_username(username)
    with store.transaction() as turn:
        user = turn.user(name)
        if user is None or user.user.account_id not in actor.manages:
            return
        lasting = any(r.expires_at is None for r in turn.restrictions(name))
    if not lasting:
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
