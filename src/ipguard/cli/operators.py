"""`impose`, `lift`, `unlock`: what operators do at once, with a reason."""

from __future__ import annotations

from typing import Annotated

import typer

from ipguard.cli._app import OPERATOR, command
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._results import (
    ExpiresOption,
    LabelOption,
    LockoutOption,
    OpenOption,
    ReasonOption,
    ending_allowed,
    moment_of,
    removal_allowed,
    show_applied,
)
from ipguard.errors import shorten
from ipguard.usernames import canonical_username


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for function in (impose, lift, unlock):
        command(app, OPERATOR)(function)


def impose(
    call: Call,
    username: Annotated[str, typer.Argument(help="Who is restricted.")],
    addresses: Annotated[str, typer.Argument(help="An address, a network, or first-last.")],
    *,
    reason: ReasonOption,
    label: LabelOption = "",
    expires: ExpiresOption = None,
    allow_lockout: LockoutOption = False,
) -> None:
    """Restrict a user at once, without a number. The user is told by mail."""
    actor = call.operator()
    with call.store() as store:
        flow = call.workflow(store)
        until = moment_of(expires, store.now())
        ending_allowed(call, flow, actor, username, until, lockout=allow_lockout)
        applied = flow.impose(
            actor, username, addresses, reason=reason, label=label, expires_at=until
        )
    show_applied(call, applied)


def lift(
    call: Call,
    restriction: Annotated[str, typer.Argument(metavar="RESTRICTION", help="Its id.")],
    *,
    reason: ReasonOption,
    allow_open: OpenOption = False,
    allow_lockout: LockoutOption = False,
) -> None:
    """End a restriction at once, without a number. The user is told by mail."""
    actor = call.operator()
    with call.store() as store:
        flow = call.workflow(store)
        opens = removal_allowed(
            call, flow, actor, restriction, opens=allow_open, lockout=allow_lockout
        )
        applied = flow.lift(actor, restriction, reason=reason, allow_opening=opens)
    show_applied(call, applied)


def unlock(
    call: Call,
    username: Annotated[str, typer.Argument(help="The administrator who failed too often.")],
    *,
    reason: ReasonOption,
) -> None:
    """Accept numbers again after too many wrong ones."""
    actor = call.operator()
    name = canonical_username(username)
    with call.store() as store:
        flow = call.workflow(store)
        # An administrator who is not registered has failures to reset; otherwise it is a typo.
        if not flow.failures(actor, name) and not store.load_policy(name).known:
            raise Problem(
                Exit.UNKNOWN,
                f"no user {shorten(name)}, and nobody of that name gave a wrong number",
                kind="UnknownUser",
                details={"username": name},
            )
        flow.unlock(actor, name, reason=reason)
    failed = call.tell_failures()
    if call.out.as_json:
        call.out.data({"username": username, "notices_failed": failed})
    else:
        call.out.line("unlocked: numbers are accepted again", "green")
