"""Change restrictions: in two phases as an administrator, or at once as an operator.

An administrator's commands are `request`, `confirm`, `cancel`, `resend` and `delete`; an operator's
are `impose`, `lift` and `unlock`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, Final, TypeVar

import attrs
from typer import Argument, Option

from ipguard.cli._context import ACTOR, ADMINISTRATOR, OPERATOR, SETTINGS, Context, command
from ipguard.cli._output import Exit, Output, Problem, plain
from ipguard.cli._secrets import HOW_TO_GIVE_NUMBER, read_number
from ipguard.errors import LockoutRisk, UnknownRestriction, UnknownUser, shorten
from ipguard.model import Actor, Applied, PendingRequest
from ipguard.rules import shifted, without
from ipguard.store import RestrictionStore
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
    with _session(context, numbers=True) as session:
        until = session.confirm_expiry(username, expires, allowed=allow_lockout)
        change = partial(session.flow.request, session.actor, username, addresses)
        change = partial(change, label=label, expires_at=until)
        made = session.confirm_lockout(change, allowed=allow_lockout)
    _show_request(context, made, mailed_to=session.actor)


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
    with _session(context, numbers=True) as session:
        opens, deletes = allow_open, session.flow.own_request(session.actor, request).removes
        if deletes:
            opens = session.confirm_removal(deletes[0], opens=opens, shuts=allow_lockout)
        change = partial(
            session.flow.confirm, session.actor, request, read_number(), allow_opening=opens
        )
        applied = session.confirm_lockout(change, allowed=allow_lockout)
    assert isinstance(applied, Applied)
    _show_applied(context, applied)


@command(ACTOR, SETTINGS)
def cancel(context: Context, request: RequestArgument) -> None:
    """Cancel a request."""
    with _session(context, mailed=False, mails=False) as session:
        cancelled = session.flow.cancel(session.actor, request)
    _show_request(context, cancelled)


@command(ADMINISTRATOR)
def resend(context: Context, request: RequestArgument) -> None:
    """Mail a new number for a request; the old one stops working."""
    # The mail goes where the first number went.
    with _session(context, mailed=False, numbers=True) as session:
        made = session.flow.resend(session.actor, request)
    _show_request(context, made)
    context.out.line("A new number was mailed to the address of the first one")


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
    with _session(context, numbers=True) as session:
        opens = session.confirm_removal(restriction, opens=allow_open, shuts=allow_lockout)
        change = partial(
            session.flow.delete, session.actor, restriction, reason, allow_opening=opens
        )
        outcome = session.confirm_lockout(change, allowed=allow_lockout)
    if isinstance(outcome, Applied):
        _show_applied(context, outcome)
    else:
        _show_request(context, outcome, mailed_to=session.actor)


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
    with _session(context) as session:
        until = session.confirm_expiry(username, expires, allowed=allow_lockout)
        applied = session.flow.impose(
            session.actor, username, addresses, reason=reason, label=label, expires_at=until
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
    with _session(context) as session:
        opens = session.confirm_removal(restriction, opens=allow_open, shuts=allow_lockout)
        applied = session.flow.lift(session.actor, restriction, reason=reason, allow_opening=opens)
    _show_applied(context, applied)


@command(OPERATOR)
def unlock(
    context: Context,
    username: Annotated[str, Argument(help="The administrator who failed too often.")],
    *,
    reason: ReasonOption,
) -> None:
    """Accept numbers again after too many wrong ones."""
    name = canonical_username(username)
    with _session(context) as session:
        # An administrator who is not registered has failures to reset; otherwise it is a typo.
        if not (
            session.flow.failures(session.actor, name) or session.store.load_policy(name).known
        ):
            message = f"no user {shorten(name)} is registered or gave a wrong number"
            details = {"username": name}
            raise Problem(Exit.UNKNOWN, message, kind="UnknownUser", details=details)
        session.flow.unlock(session.actor, name, reason=reason)
    context.out.data({"username": username, "notices_failed": context.report_failures()})
    context.out.line("unlocked: numbers are accepted again", "green")


# -- what they share -----------------------------------------------------------------------------


def parse_expiry(text: str | None, now: datetime) -> datetime | None:
    """Read an expiry: a time with its zone, or a length of time from now."""
    if text is None:
        return None
    length = re.fullmatch(r"([0-9]{1,5})([mhd])", text)
    if length is not None:
        return shifted(now, timedelta(**{_UNITS[length[2]]: int(length[1])}))
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(text)
        if found.utcoffset() is not None:
            return found.astimezone(UTC)
    hint = "write a time with its zone, such as 2027-01-31T18:00Z, or a length: 90m, 12h, 30d"
    raise Problem(Exit.USAGE, hint)


@attrs.frozen
class _Session:
    """An open workflow and its actor, who is asked before a change with grave consequences.

    An unknown user or restriction leads to no question: the workflow reports it.
    """

    out: Output
    store: RestrictionStore
    flow: Workflow
    actor: Actor

    def confirm_removal(self, restriction_id: str, *, opens: bool, shuts: bool) -> bool:
        """Ask before a removal that leaves the user no restriction, or only expired ones.

        Return whether it may open the user to every address, by the option or the answer. If not,
        the workflow refuses to remove a restriction that has become the last one.
        """
        try:
            found = self.flow.restriction(self.actor, restriction_id)
            held = self.flow.user(self.actor, found.username).restrictions
        except (UnknownRestriction, UnknownUser):
            return opens
        remainder = without(held, found.id, self.flow.now())
        name = f"without {found.addresses}, {found.username}"
        if remainder.opens and not opens:
            self.out.confirm(f"{name} can log in from every address", "--allow-open")
            return True
        if remainder.shuts and not (shuts or found.expired(self.flow.now())):
            why = "the other restrictions have expired"
            self.out.confirm(f"{name} can log in from no address: {why}", "--allow-lockout")
        return opens

    def confirm_expiry(self, username: str, text: str | None, *, allowed: bool) -> datetime | None:
        """Read an expiry; ask before a user is left with temporary restrictions only.

        Expiry does not lift them.
        """
        until = parse_expiry(text, self.flow.now())
        if until is not None and not allowed:
            with suppress(UnknownUser):
                found = self.flow.user(self.actor, username)
                if not (found.removed or any(r.expires_at is None for r in found.restrictions)):
                    name = found.user.username
                    self.out.confirm(
                        f"{name} has no permanent restriction: once this one has expired,"
                        f" {name} can log in from no address",
                        "--allow-lockout",
                    )
        return until

    def confirm_lockout(self, change: Callable[..., T], *, allowed: bool) -> T:
        """Make a change; if it would lock its actor out, ask and then make it with consent."""
        try:
            return change(allow_lockout=allowed)
        except LockoutRisk as exc:
            if allowed:
                raise
            self.out.confirm(str(exc), "--allow-lockout")
            return change(allow_lockout=True)


@contextmanager
def _session(context: Context, *, mailed: bool = True, **options: Any) -> Iterator[_Session]:
    actor = context.actor(mailed=mailed)
    with context.workflow(**options) as (store, flow):
        yield _Session(context.out, store, flow, actor)


def _show_applied(context: Context, applied: Applied) -> None:
    context.out.data(plain(applied) | {"notices_failed": context.report_failures()})
    done = applied.restriction
    assert done is not None
    text = f"done, revision {applied.revision}: {done.username} {done.addresses} [{done.id}]"
    context.out.line(text, "green")
    if applied.unrestricted:
        text = "No restriction is left: the user can log in from every address."
        context.out.line(text, "yellow")


def _show_request(context: Context, made: PendingRequest, mailed_to: Actor | None = None) -> None:
    context.out.data(made)
    what = f"{made.change} for {made.username}"
    context.out.line(f"request {made.id} is {made.state.value}: {what}", "green")
    if mailed_to is not None:
        text = f"A number was mailed to {mailed_to.email}; ipguard confirm {made.id}"
        context.out.line(text)
