"""`check` and `explain`: the question, as a login server asks it, and why."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ipguard.cli._app import command
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._files import FileOption
from ipguard.cli._logins import check_file, unavailable
from ipguard.guard import Guard
from ipguard.model import Decision, Reason

UnknownOption = Annotated[
    str,
    typer.Option(
        "--unknown-users", metavar="allow|deny", help="As the login servers' guards have it."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app)(check)
    command(app)(explain)


def check(
    call: Call,
    username: Annotated[str | None, typer.Argument(help="Who wants to log in.")] = None,
    address: Annotated[str | None, typer.Argument(help="From where.")] = None,
    *,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="A login log instead, CSV or JSON Lines, with username and address; - is standard"
            " input.",
        ),
    ] = None,
    kind: FileOption = None,
    unknown_users: UnknownOption = "allow",
) -> int:
    """Ask whether a user may log in from an address.

    The exit code is 0 where that is allowed now, 1 where it is not. With a file, every login in it
    is asked as of now, and it is 1 where any would be refused.
    """
    if file is not None and username is None:
        with call.store() as store:
            return check_file(call, Guard(store, unknown_users=_unknown(unknown_users)), file, kind)
    if username is None or address is None or file is not None:
        raise Problem(
            Exit.USAGE, "who, and from where? ipguard check USERNAME ADDRESS, or --file FILE"
        )
    with call.store() as store:
        guard = Guard(store, unknown_users=_unknown(unknown_users))
        decision = guard.check(username, address)
        if decision.reason is Reason.STORE_UNAVAILABLE:
            raise unavailable(guard)
    if call.out.as_json:
        call.out.data({"username": username, "address": address, "decision": decision})
    else:
        call.out.line(_told(decision), "green" if decision else "red")
    return Exit.OK if decision else Exit.NOT_ALLOWED


def _told(decision: Decision) -> str:
    by = f" by restriction {decision.restriction_id}" if decision.restriction_id else ""
    return f"{'allowed' if decision else 'not allowed'}: {decision.reason.value}{by}"


def _unknown(given: str) -> Literal["allow", "deny"]:
    if given not in ("allow", "deny"):
        raise Problem(Exit.USAGE, "--unknown-users is allow or deny")
    return "deny" if given == "deny" else "allow"


def explain(
    call: Call,
    username: Annotated[str, typer.Argument(help="Who wants to log in.")],
    address: Annotated[str, typer.Argument(help="From where.")],
    *,
    unknown_users: UnknownOption = "allow",
) -> int:
    """Answer likewise, with the reasons.

    The answer in a sentence, and each restriction of the user. The exit code is as for `check`.
    """
    with call.store() as store:
        told = Guard(store, unknown_users=_unknown(unknown_users)).explain(username, address)
    if call.out.as_json:
        call.out.data(told)
    else:
        call.out.line(told.summary, "green" if told.decision else "red")
        if told.restrictions:
            call.out.table(
                ("id", "addresses", "label", "expires_at", "created_at", "created_by"),
                (
                    (r.id, str(r.addresses), r.label, r.expires_at, r.created_at, r.created_by)
                    for r in told.restrictions
                ),
            )
    return Exit.OK if told.decision else Exit.NOT_ALLOWED
