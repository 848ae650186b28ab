"""List users with their restrictions, and register users from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final

import typer

from ipguard.cli import _files
from ipguard.cli._context import Context, app, command
from ipguard.cli._files import BadRows, Columns, FileArgument, FormatOption
from ipguard.cli._identity import READER
from ipguard.cli._output import BATCH, Cell, prefetched
from ipguard.errors import IPGuardError, shorten
from ipguard.model import Restriction, User, UserOverview
from ipguard.workflow import Workflow

SearchHelp: Final = "The start of a username, an account ID or a word of the full name"
AfterOption = Annotated[
    str | None, typer.Option("--after", metavar="USERNAME", help="Continue after this user.")
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="The largest number to list.")]
AllOption = Annotated[bool, typer.Option("--all", help="List all, without a limit.")]

_COLUMNS: Final = Columns(required=("username", "full_name", "account_id"), optional=("email",))
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
        for line, row in _files.rows(
            stream, _files.format_of(file, kind), _COLUMNS, bad.add, advance
        ):
            count += 1
            try:
                yield User(**row)
            except IPGuardError as exc:
                bad.add(line, exc)
        bad.raise_if_any()
        if not count:
            raise _files.without_rows(file, "users")

    with _files.opened(file) as stream, context.store() as store:
        before = store.changes_since(None).head
        with _files.progress(context.out, "users", stream) as advance:
            revision = store.put_users(users())
    if context.out.as_json:
        changed = revision != before
        context.out.data({"rows": count, "revision": revision, "changed": changed})
    elif revision == before:
        context.out.line(f"{count} rows: nothing to change")
    else:
        context.out.line(f"{count} rows registered, revision {revision}", "green")


@command(group=_group, name="list")
def list_users(
    context: Context,
    *,
    search: Annotated[str, typer.Option(help=f"{SearchHelp}.")] = "",
    after: AfterOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List the registered users."""
    with context.workflow(mails=False) as (_, flow):
        _list(
            context,
            flow,
            ("username", "full_name", "account_id", "email"),
            lambda each: (*_names(each), each.user.email),
            plain_value=lambda each: each.user,
            keep=lambda each: not each.removed,
            search=search,
            after=after,
            limit=None if everything else limit,
        )


@command(name="list")
def list_(
    context: Context,
    search: Annotated[
        str,
        typer.Argument(help=f"{SearchHelp}; or an IP address that a restriction contains."),
    ] = "",
    *,
    removed: Annotated[
        bool, typer.Option("--removed", help="List only removed users, whose restrictions hold.")
    ] = False,
    after: AfterOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List users with their restrictions and pending requests.

    Example: ipguard list 203.0.113.5
    """
    with context.workflow(mails=False) as (_, flow):
        _list(
            context,
            flow,
            ("username", "full_name", "account_id", "restrictions", "pending", "removed"),
            _terminal_cells if context.out.rich else _cells,
            plain_value=lambda each: each,
            keep=(lambda each: each.removed) if removed else (lambda _: True),
            found="removed user with restrictions" if removed else "user",
            search=search,
            after=after,
            limit=None if everything else limit,
        )


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


def _list(
    context: Context,
    flow: Workflow,
    columns: Sequence[str],
    cells: Callable[[UserOverview], Sequence[Cell]],
    *,
    plain_value: Callable[[UserOverview], Any],
    keep: Callable[[UserOverview], bool],
    search: str,
    after: str | None,
    limit: int | None,
    found: str = "user",
) -> None:
    """Write users as they are read, page by page, up to a limit."""
    last: str | None = None
    count = 0

    def kept() -> Iterator[UserOverview]:
        nonlocal last, count
        for each, more in _overview(flow, search, after, limit):
            if not keep(each):
                continue
            if count == limit:
                return
            count += 1
            last = each.user.username if more or count == limit else None
            yield each
        last = None

    listed = prefetched(kept())
    if context.out.as_json:
        context.out.array("users", map(plain_value, listed), lambda: {"next": last})
        return
    context.out.table(columns, map(cells, listed))
    if last is not None:
        context.out.note(f"there are more: --after {last}, or --all")
    if not count:
        where = f" for {shorten(search)}" if search.strip() else ""
        where += f" after {shorten(after)}" if after else ""
        advice = "" if where or found != "user" else "; `ipguard users import FILE` registers users"
        context.out.note(f"no {found} found{where}{advice}")


def _overview(
    flow: Workflow, search: str, after: str | None, limit: int | None
) -> Iterator[tuple[UserOverview, bool]]:
    """Yield users, each with whether another page follows."""
    size = BATCH if limit is None else min(BATCH, limit + 1)
    while True:
        page = flow.overview(READER, search=search, after=after, limit=size)
        yield from ((each, page.next is not None) for each in page)
        if page.next is None:
            return
        after = page.next
