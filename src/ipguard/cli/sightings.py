"""Show where users log in from, suggest addresses, and erase what is kept."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated

from typer import Argument

from ipguard.cli._context import READER, SETTINGS, Context, command
from ipguard.cli._ocsf import EventOption, sighting_events
from ipguard.cli._output import dumps
from ipguard.errors import shorten

UserArgument = Annotated[str, Argument(help="The user.")]


@command(SETTINGS)
def suggest(context: Context, username: UserArgument) -> None:
    """Suggest addresses: those that the user logs in from and has no restriction to.

    The most used come first.

    Example: ipguard suggest jsmith
    """
    with context.workflow(mails=False) as (_, flow):
        found = flow.suggest(READER, username)
    context.out.data({"username": username, "suggestions": found})
    for each in found:
        context.out.line(str(each))
    if not (found or context.out.as_json):
        context.out.note(f"no addresses to suggest for {shorten(username)}")


@command()
def sightings(context: Context, username: UserArgument, *, kind: EventOption = None) -> None:
    """Show where a user gave the right password, in the last 90 days.

    Example: ipguard sightings jsmith
    """
    with context.workflow(mails=False) as (_, flow):
        found = flow.sightings(READER, username)
    if kind is not None:
        for sighting in found:
            for event in sighting_events(sighting):
                context.out.raw(dumps(event) + "\n")
        return
    context.out.data({"username": username, "sightings": found})
    columns = ("address", "last_at", "first_at", "allowed", "refused")
    context.out.table(columns, map(attrgetter(*columns), found))
    if not (found or context.out.as_json):
        context.out.note(f"nothing is known about logins of {shorten(username)}")


@command()
def forget(
    context: Context,
    username: Annotated[str, Argument(help="The user; need not be registered any more.")],
) -> None:
    """Erase where a user logged in from. The audit log records that it was done.

    Example: ipguard forget jsmith
    """
    with context.workflow(mails=False) as (_, flow):
        count = flow.forget_sightings(context.actor(mailed=False), username)
    context.out.data({"username": username, "forgotten": count})
    context.out.line(f"{count} addresses of {username} were forgotten", "green")
