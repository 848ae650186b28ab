"""List users with their restrictions, and register users from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Final

import typer
from typer import Argument, Option

from ipguard.cli import _files
from ipguard.cli._context import READER, Context, app, command
from ipguard.cli._files import BadRows, Columns, FileArgument, FormatOption
from ipguard.cli._output import Cell, pages
from ipguard.errors import IPGuardError, shorten
from ipguard.model import Restriction, User, UserOverview

SearchHelp: Final = "The start of a username, an account ID or a word of the full name"
AfterOption = Annotated[
    str | None, Option("--after", metavar="USERNAME", help="Continue after this user.")
]
LimitOption = Annotated[int, Option("--limit", min=1, help="The largest number to list.")]
AllOption = Annotated[bool, Option("--all", help="List all, without a limit.")]

_COLUMNS: Final = Columns(
    what="users", required=("username", "full_name", "account_id"), optional=("email",)
)
_group = typer.Typer(rich_markup_mode=None)
app.add_typer(_group, name="users", help="Register users, and list them.")


@command(group=_group, name="import")
def import_users(context: Context, file: FileArgument, *, kind: FormatOption = None) -> None:
    """Register or update the users of a file: all of its rows or none.

    Columns: username, full_name, account_id and optionally email. Users that are not in the file
    stay unchanged; of several rows with one username, the last one counts.

    Example: ipguard users import users.csv
    """
    bad, count = BadRows(file), 0

    def users() -> Iterator[User]:
        nonlocal count
        for line, row in _files.rows(stream, file, kind, _COLUMNS, bad.add, advance):
            count += 1
            try:
                yield User(**row)
            except IPGuardError as exc:
                bad.add(line, exc)
        bad.raise_if_any()

    with _files.opened(file) as stream, context.store() as store:
        before = store.changes_since(None).head
        with _files.progress(context.out, "users", stream) as advance:
            revision = store.put_users(users())
    changed = revision != before
    context.out.data({"rows": count, "revision": revision, "changed": changed})
    if changed:
        context.out.line(f"{count} rows registered, revision {revision}", "green")
    else:
        context.out.line(f"{count} rows: nothing to change")


@command(group=_group, name="list")
def list_users(
    context: Context,
    *,
    search: Annotated[str, Option(help=f"{SearchHelp}.")] = "",
    after: AfterOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List the registered users."""
    with context.workflow(mails=False) as (_, flow):
        size = None if everything else limit
        found = pages(partial(flow.overview, READER, search=search), "after", after, size)
        some = context.out.listing(
            "users",
            ("username", "full_name", "account_id", "email"),
            (each.user for each in found if not each.removed),
            lambda user: (user.username, user.full_name, user.account_id, user.email),
            limit=size,
            option="--after",
        )
    _note_none(context, some, "user", search, after)


@command(name="list")
def list_(
    context: Context,
    search: Annotated[
        str, Argument(help=f"{SearchHelp}; or an IP address that a restriction contains.")
    ] = "",
    *,
    removed: Annotated[
        bool, Option("--removed", help="List only removed users, whose restrictions hold.")
    ] = False,
    after: AfterOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List users with their restrictions and pending requests.

    Example: ipguard list 203.0.113.5
    """
    with context.workflow(mails=False) as (_, flow):
        size = None if everything else limit
        found = pages(partial(flow.overview, READER, search=search), "after", after, size)
        some = context.out.listing(
            "users",
            ("username", "full_name", "account_id", "restrictions", "pending", "removed"),
            (each for each in found if each.removed or not removed),
            _terminal_cells if context.out.rich else _cells,
            limit=size,
            option="--after",
        )
    kind = "removed user with restrictions" if removed else "user"
    _note_none(context, some, kind, search, after)


def _note_none(context: Context, some: object, kind: str, search: str, after: str | None) -> None:
    if not some:
        where = f" for {shorten(search)}" if search.strip() else ""
        where += f" after {shorten(after)}" if after else ""
        advice = "" if where or kind != "user" else "; `ipguard users import FILE` registers users"
        context.out.note(f"no {kind} found{where}{advice}")


def _names(each: UserOverview) -> tuple[Cell, ...]:
    return (each.user.username, each.user.full_name, each.user.account_id)


def _cells(each: UserOverview) -> Sequence[Cell]:
    pending = [f"{one.kind} {one.addresses}" for one in each.pending]
    return (*_names(each), each.summary, pending, each.removed)


def _terminal_cells(each: UserOverview) -> Sequence[Cell]:
    restrictions = [_described(one) for one in each.restrictions] or [each.summary]
    pending = [f"{one.kind} {one.addresses} [{one.id}]" for one in each.pending]
    return (*_names(each), restrictions, pending, "removed" if each.removed else "")


def _described(restriction: Restriction) -> str:
    """Return a restriction on one line, with its label, expiry and id."""
    label = f" {restriction.label}" if restriction.label else ""
    until = restriction.expires_at
    end = "" if until is None else f" until {until:%Y-%m-%d %H:%M} UTC"
    return f"{restriction.addresses}{label}{end} [{restriction.id}]"
