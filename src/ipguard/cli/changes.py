"""Change restrictions: in two phases as an administrator, or at once as an operator.

An administrator's commands are `request`, `preview`, `waiting`, `confirm`, `approve`, `cancel`,
`resend` and `delete`; an operator's are `impose`, `lift` and `unlock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final, TypeVar

import attrs
from typer import Argument, Option

from ipguard.cli._context import ACTOR, ADMINISTRATOR, MAIL, OPERATOR, SETTINGS, Context, command
from ipguard.cli._output import BATCH, Exit, Output, Problem, missing, plain
from ipguard.cli._secrets import HOW_TO_GIVE_NUMBER, read_number
from ipguard.cli._times import parse_time
from ipguard.errors import IPGuardError, LockoutRisk, OpeningRisk, shorten
from ipguard.model import Actor, Applied, Direction, Impact, PendingRequest, RequestState
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow

T = TypeVar("T")
UserArgument = Annotated[str, Argument(help="The user to restrict.")]
_FORMS: Final = "203.0.113.7, 203.0.113.0/29, 203.0.113.5-203.0.113.9, or IPv6."
AddressesArgument = Annotated[list[str], Argument(help=_FORMS)]
SomeAddressesArgument = Annotated[list[str] | None, Argument(help=_FORMS)]
ReplacesOption = Annotated[
    list[str] | None,
    Option("--replaces", metavar="RESTRICTION", help="A restriction that ends; may be repeated."),
]
OnlyOption = Annotated[
    bool, Option("--only", help="All other restrictions of the user end in the same change.")
]
RequestArgument = Annotated[str, Argument(metavar="REQUEST", help="The request's id.")]
RestrictionArgument = Annotated[str, Argument(metavar="RESTRICTION", help="The restriction's id.")]
LabelOption = Annotated[str, Option("--label", help="A name for the restrictions.")]
ExpiresOption = Annotated[
    str | None,
    Option(
        "--expires", metavar="WHEN", help="When it expires: 2027-01-31T18:00Z; or 90m, 12h, 30d."
    ),
]
WhyOption = Annotated[str, Option("--reason", help="Why.")]
ReasonOption = Annotated[str, Option("--reason", help="Why; recorded in the audit log and mailed.")]
OpenOption = Annotated[
    bool, Option("--allow-open", help="Accept that this opens the user to every address.")
]
LockoutOption = Annotated[
    bool, Option("--allow-lockout", help="Accept that this may lock somebody out.")
]


# -- administrators ------------------------------------------------------------------------------


@command(ADMINISTRATOR)
def request(
    context: Context,
    username: UserArgument,
    addresses: SomeAddressesArgument = None,
    *,
    replaces: ReplacesOption = None,
    also: Annotated[
        list[str] | None,
        Option("--also", metavar="USERNAME", help="Another user, by the same number; repeatable."),
    ] = None,
    label: LabelOption = "",
    expires: ExpiresOption = None,
    reason: WhyOption = "",
    allow_open: OpenOption = False,
    allow_lockout: LockoutOption = False,
) -> None:
    """Request a change of restrictions; its confirmation number is mailed to you.

    The addresses are added, and those of --replaces end, in one change. Without addresses, it only
    ends restrictions.

    Example: ipguard request jsmith 203.0.113.0/29 --label office --expires 30d
    """
    names, ids = [username, *(also or ())], replaces or ()
    if also and ids:
        raise Problem(Exit.USAGE, "--also and --replaces exclude each other")
    with _session(context, numbers=True) as session:
        until = parse_expiry(expires, session.flow.now())
        for name in () if allow_lockout else names:
            session.ask_before_end(name, addresses, ids, expires_at=until)
        more = {"label": label, "expires_at": until, "reason": reason}
        if also:
            change = partial(session.flow.request_many, session.actor, names, addresses or ())
            made = session.with_consent(partial(change, **more), lockout=allow_lockout)
        else:
            one = partial(session.flow.request, session.actor, username, addresses, replaces=ids)
            one = partial(one, **more)
            made = (session.with_consent(one, lockout=allow_lockout, opening=allow_open),)
        context.out.data({"requests": made} if also else made[0])
        _show_requests(context, made, session.flow.now(), mailed_to=session.actor)


@command(ACTOR, SETTINGS)
def preview(
    context: Context,
    username: UserArgument,
    addresses: SomeAddressesArgument = None,
    *,
    replaces: ReplacesOption = None,
    only: OnlyOption = False,
    expires: ExpiresOption = None,
) -> None:
    """Show what a change would do: its direction, and the addresses gained and lost.

    Example: ipguard preview jsmith 203.0.113.0/29 --only
    """
    with _session(context, mailed=False, mails=False) as session:
        until = parse_expiry(expires, session.flow.now())
        found = session.flow.preview(
            session.actor, username, addresses, replaces or (), expires_at=until, only=only
        )
    context.out.data(found)
    columns = ("direction", "gained", "lost", "afterwards")
    gained, lost = (list(map(str, each)) for each in (found.gained, found.lost))
    context.out.table(columns, [(found.direction.name.lower(), gained, lost, found.summary)])
    if found.seen_summary:
        context.out.line(found.seen_summary, "yellow" if found.seen_lost else "")


@command(ACTOR, SETTINGS)
def waiting(context: Context) -> None:
    """List what waits for you: your own requests, then those that you can approve."""
    with _session(context, mailed=False, mails=False) as session:
        found, now = session.flow.waiting(session.actor, BATCH), session.flow.now()
    context.out.data({"requests": found})
    columns = ("request", "username", "change", "requested_by", "afterwards", "missing")
    rows = (
        (
            *(each.id, each.spelling, each.change, each.requested_by),
            None if each.impact is None else each.impact.summary,
            missing(each, now),
        )
        for each in found
    )
    context.out.table(columns, rows)
    if not found:
        context.out.note("no request waits for you")


@command(ADMINISTRATOR)
def confirm(
    context: Context,
    request: RequestArgument,
    number: Annotated[list[str] | None, Argument(hidden=True)] = None,
    *,
    allow_lockout: LockoutOption = False,
    allow_open: OpenOption = False,
) -> None:
    """Apply a request, given its number if it needs one.

    The number is typed when asked for, or read from standard input; it is never an argument.

    Example: ipguard confirm 3f1c9a0be2d47756
    """
    if number:
        message = "every user of this machine can read a number in the arguments"
        raise Problem(Exit.USAGE, message, HOW_TO_GIVE_NUMBER)
    with _session(context, numbers=True) as session:
        found, now = session.flow.own_request(session.actor, request), session.flow.now()
        needed = found.state is RequestState.PENDING and found.ready_at <= now
        needed = needed and found.demand.number and not found.numbered
        given = read_number() if needed else ""
        change = partial(session.flow.confirm, session.actor, request, given)
        done = session.with_consent(change, lockout=allow_lockout, opening=allow_open)
        _show(context, done, session.flow.now())


@command(ACTOR, MAIL, SETTINGS)
def approve(
    context: Context,
    request: RequestArgument,
    *,
    allow_lockout: LockoutOption = False,
    allow_open: OpenOption = False,
) -> None:
    """Approve a request that somebody else made; `ipguard waiting` shows what it does."""
    with _session(context) as session:
        with suppress(IPGuardError):  # then the call below says why
            found = session.flow.preview_request(session.actor, request)
            if found.direction is Direction.OPENS and not allow_open:
                context.out.confirm(found.summary, "--allow-open")
        change = partial(session.flow.approve, session.actor, request)
        done = session.with_consent(change, lockout=allow_lockout)
        _show(context, done, session.flow.now())


@command(ACTOR, SETTINGS)
def cancel(context: Context, request: RequestArgument) -> None:
    """Cancel a request."""
    with _session(context, mailed=False, mails=False) as session:
        cancelled = session.flow.cancel(session.actor, request)
        _show(context, cancelled, session.flow.now())


@command(ADMINISTRATOR)
def resend(context: Context, request: RequestArgument) -> None:
    """Mail a new number for a request; the old one stops working.

    A request that had to wait gets its first number so.
    """
    # The mail goes where the first number went.
    with _session(context, mailed=False, numbers=True) as session:
        made = session.flow.resend(session.actor, request)
        _show(context, made, session.flow.now())
    context.out.line("A number was mailed to the address recorded at the request")


@command(ADMINISTRATOR)
def delete(
    context: Context,
    restriction: RestrictionArgument,
    *,
    reason: WhyOption = "",
    allow_open: OpenOption = False,
    allow_lockout: LockoutOption = False,
) -> None:
    """Delete a restriction, at once or by a request.

    If the settings demand anything, a request is made, as by `ipguard request`.
    """
    with _session(context, numbers=True) as session:
        session.ask_before_removal(restriction, allowed=allow_lockout)
        change = partial(session.flow.delete, session.actor, restriction, reason)
        done = session.with_consent(change, lockout=allow_lockout, opening=allow_open)
        _show(context, done, session.flow.now(), mailed_to=session.actor)


# -- operators -----------------------------------------------------------------------------------


@command(OPERATOR)
def impose(
    context: Context,
    username: UserArgument,
    addresses: AddressesArgument,
    *,
    reason: ReasonOption,
    only: OnlyOption = False,
    label: LabelOption = "",
    expires: ExpiresOption = None,
    allow_lockout: LockoutOption = False,
) -> None:
    """Restrict a user at once, without a number. The user is told by mail.

    Without --only, a restricted user may log in from these addresses too.

    Example: ipguard impose jsmith 203.0.113.7 --only --reason "ticket 4713: laptop stolen"
    """
    with _session(context) as session:
        until = parse_expiry(expires, session.flow.now())
        if not allow_lockout:
            session.ask_before_end(username, addresses, expires_at=until, only=only)
        applied = session.flow.impose(
            session.actor,
            username,
            addresses,
            reason=reason,
            label=label,
            expires_at=until,
            only=only,
        )
        _show(context, applied, session.flow.now())


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
        session.ask_before_removal(restriction, allowed=allow_lockout)
        change = partial(session.flow.lift, session.actor, restriction, reason=reason)
        applied = session.with_consent(change, opening=allow_open)
        _show(context, applied, session.flow.now())


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
    return None if text is None else parse_time(text, now)


@attrs.frozen
class _Session:
    """An open workflow and its actor, who is asked before a change with grave consequences."""

    out: Output
    store: RestrictionStore
    flow: Workflow
    actor: Actor

    def ask_before_end(
        self,
        username: str,
        addresses: list[str] | None,
        replaces: Iterable[str] = (),
        **options: Any,
    ) -> None:
        """Ask before a change that takes addresses away and leaves temporary restrictions only.

        Expiry does not lift them. If the change is refused, the call that makes it says why.
        """
        with suppress(IPGuardError):
            found = self.flow.preview(self.actor, username, addresses, replaces, **options)
            if not found.lost or found.ends is None:
                return
            at = f"after {found.ends:%Y-%m-%d %H:%M} UTC, " if found.ends > self.flow.now() else ""
            text = f"No permanent restriction is left: {at}{username} can log in from no address"
            self.out.confirm(f"{found.summary} {text}", "--allow-lockout")

    def ask_before_removal(self, restriction_id: str, *, allowed: bool) -> None:
        """Ask before the removal of a restriction, as `ask_before_end` does."""
        if not allowed:
            found = self.flow.restriction(self.actor, restriction_id)
            self.ask_before_end(found.username, None, [found.id])

    def with_consent(
        self, change: Callable[..., T], *, lockout: bool | None = None, opening: bool | None = None
    ) -> T:
        """Make a change; ask before a grave risk, and then make it with consent.

        Args:
            change: The call; it takes consent as `allow_lockout` and `allow_opening`.
            lockout: Whether its actor may be locked out; None if the call does not ask.
            opening: Whether the user may be opened to every address; None likewise.
        """
        allowed = {"allow_lockout": lockout, "allow_opening": opening}
        allowed = {name: value for name, value in allowed.items() if value is not None}
        while True:
            try:
                return change(**allowed)
            except (LockoutRisk, OpeningRisk) as exc:
                locks = isinstance(exc, LockoutRisk)
                name = "allow_lockout" if locks else "allow_opening"
                if allowed.get(name, True):
                    raise
                self.out.confirm(str(exc), "--allow-lockout" if locks else "--allow-open")
                allowed[name] = True


@contextmanager
def _session(context: Context, *, mailed: bool = True, **options: Any) -> Iterator[_Session]:
    actor = context.actor(mailed=mailed)
    with context.workflow(**options) as (store, flow):
        yield _Session(context.out, store, flow, actor)


def _show(
    context: Context,
    done: Applied | PendingRequest,
    now: datetime,
    mailed_to: Actor | None = None,
) -> None:
    if isinstance(done, PendingRequest):
        context.out.data(done)
        _show_requests(context, (done,), now, mailed_to)
        return
    shown = plain(done) | {"notices_failed": context.report_failures()}
    del shown["counts"]  # of a bulk change
    context.out.data(shown)
    for each in done.added or done.removed:
        text = f"done, revision {done.revision}: {each.username} {each.addresses} [{each.id}]"
        context.out.line(text, "green")
    _show_impact(context, done.impact, warn=done.unrestricted)


def _show_requests(
    context: Context,
    made: tuple[PendingRequest, ...],
    now: datetime,
    mailed_to: Actor | None = None,
) -> None:
    for each in made:
        revision = "" if each.revision is None else f", revision {each.revision}"
        text = f"request {each.id} is {each.state.value}{revision}: {each.change}"
        context.out.line(f"{text} for {each.username}", "green")
        _show_impact(context, each.impact)
    context.report_failures()
    first, hint = made[0], ""
    if first.state is not RequestState.PENDING:
        return
    if first.ready_at > now:
        hint = f"; then ipguard {'resend' if first.demand.number else 'confirm'} {first.id}"
    elif mailed_to is not None and first.attempts_left:
        hint = f", which was mailed to {mailed_to.email}; ipguard confirm {first.id}"
    elif first.demand.approvals:
        hint = f"; somebody else: ipguard approve {first.id}"
    context.out.line(f"It {', '.join(missing(first, now))}{hint}")


def _show_impact(context: Context, impact: Impact | None, *, warn: bool = False) -> None:
    if impact is not None:
        context.out.line(impact.summary, "yellow" if warn else "")
