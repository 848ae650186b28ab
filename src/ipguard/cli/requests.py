"""`request`, `confirm`, `cancel`, `resend`, `delete`: the two phases, as an administrator."""

from __future__ import annotations

from typing import Annotated

import typer

from ipguard.cli._app import ACTOR, ADMINISTRATOR, SETTINGS, command
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._results import (
    ExpiresOption,
    LabelOption,
    LockoutOption,
    OpenOption,
    daring,
    ending_allowed,
    moment_of,
    removal_allowed,
    show_applied,
    show_request,
)
from ipguard.cli._secret import read_number
from ipguard.model import Applied

RequestArgument = Annotated[str, typer.Argument(metavar="REQUEST", help="Its id.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, ADMINISTRATOR)(request)
    command(app, ADMINISTRATOR)(confirm)
    command(app, ACTOR, SETTINGS)(cancel)
    command(app, ADMINISTRATOR)(resend)
    command(app, ADMINISTRATOR)(delete)


def request(
    call: Call,
    username: Annotated[str, typer.Argument(help="Who would be restricted.")],
    addresses: Annotated[str, typer.Argument(help="An address, a network, or first-last.")],
    *,
    label: LabelOption = "",
    expires: ExpiresOption = None,
    allow_lockout: LockoutOption = False,
) -> None:
    """Ask for a restriction; its number is mailed."""
    actor = call.actor()
    with call.store() as store:
        flow = call.workflow(store, numbers=True)
        until = moment_of(expires, store.now())
        ending_allowed(call, flow, actor, username, until, lockout=allow_lockout)
        asked = daring(
            call,
            lambda allowed: flow.request(
                actor, username, addresses, label=label, expires_at=until, allow_lockout=allowed
            ),
            allowed=allow_lockout,
        )
    show_request(call, asked, f"A number was mailed to {actor.email}; ipguard confirm {asked.id}")


def confirm(
    call: Call,
    request: RequestArgument,
    number: Annotated[
        list[str] | None, typer.Argument(hidden=True, help="Never here: it is asked for.")
    ] = None,
    *,
    allow_lockout: LockoutOption = False,
    allow_open: OpenOption = False,
) -> None:
    """Let a request hold, given its number.

    The number is asked for, or read from standard input; it is never an argument.
    """
    if number:
        raise Problem(
            Exit.USAGE,
            "a number in the arguments can be read by everybody on this machine",
            hint="type it when asked, or write it to standard input",
        )
    actor = call.actor()
    with call.store() as store:
        flow = call.workflow(store, numbers=True)
        deleted, opens = flow.own_request(actor, request).restriction_id, allow_open
        if deleted is not None:
            opens = removal_allowed(
                call, flow, actor, deleted, opens=allow_open, lockout=allow_lockout
            )
        given = read_number()
        applied = daring(
            call,
            lambda allowed: flow.confirm(
                actor, request, given, allow_lockout=allowed, allow_opening=opens
            ),
            allowed=allow_lockout,
        )
    show_applied(call, applied)


def cancel(call: Call, request: RequestArgument) -> None:
    """Withdraw a request."""
    actor = call.actor(mailed=False)
    with call.store() as store:
        cancelled = call.workflow(store, mails=False).cancel(actor, request)
    show_request(call, cancelled)


def resend(call: Call, request: RequestArgument) -> None:
    """Mail a new number; the old one is dead."""
    actor = call.actor(mailed=False)  # it goes to where the first one went
    with call.store() as store:
        asked = call.workflow(store, numbers=True).resend(actor, request)
    show_request(call, asked, "A new number was mailed to where the first one went")


def delete(
    call: Call,
    restriction: Annotated[str, typer.Argument(metavar="RESTRICTION", help="Its id.")],
    *,
    reason: Annotated[str, typer.Option("--reason", help="Why.")] = "",
    allow_open: OpenOption = False,
    allow_lockout: LockoutOption = False,
) -> None:
    """End a restriction; by a number, where so set.

    At once, or where the settings have `confirm_deletes`, by a number as for a request.
    """
    actor = call.actor()
    with call.store() as store:
        flow = call.workflow(store, numbers=True)
        opens = removal_allowed(
            call, flow, actor, restriction, opens=allow_open, lockout=allow_lockout
        )
        outcome = daring(
            call,
            lambda allowed: flow.delete(
                actor, restriction, reason, allow_lockout=allowed, allow_opening=opens
            ),
            allowed=allow_lockout,
        )
    if isinstance(outcome, Applied):
        show_applied(call, outcome)
    else:
        show_request(
            call, outcome, f"A number was mailed to {actor.email}; ipguard confirm {outcome.id}"
        )
