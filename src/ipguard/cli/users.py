"""`users import` and `users list`: whom the host has registered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from ipguard.cli._app import command
from ipguard.cli._bulk import BadRows, progress
from ipguard.cli._call import Call
from ipguard.cli._files import BadRow, Columns, FileOption, format_of, holds_no, opened, rows
from ipguard.cli.lists import AfterOption, AllOption, LimitOption, paged
from ipguard.errors import IPGuardError
from ipguard.model import User

_COLUMNS = Columns(needed=("username", "full_name", "account_id"), allowed=("email",))


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(rich_markup_mode=None)
    app.add_typer(group, name="users", help="Register users, and list them.")
    command(group, name="import")(import_users)
    command(group, name="list")(list_users)


def import_users(
    call: Call,
    file: Annotated[str, typer.Argument(help="CSV or JSON Lines; - is standard input.")],
    *,
    kind: FileOption = None,
) -> None:
    """Register users, or update those that are: all rows of the file, or none.

    Columns: username, full_name, account_id, and if wanted email. Users that the file does not name
    stay as they are; of several rows with one username the last counts.
    """
    kind, bad, count = format_of(file, kind), BadRows(file), 0

    def users() -> Iterator[User]:
        nonlocal count
        for line, row in rows(stream, kind, _COLUMNS, tell):
            try:
                if isinstance(row, BadRow):
                    bad.add(line, row.reason)
                    continue
                lacking = [name for name in _COLUMNS.needed if name not in row]
                if lacking:
                    bad.add(line, f"there is no {', '.join(lacking)}")
                    continue
                count += 1
                yield User(**row)
            except IPGuardError as exc:
                bad.add(line, exc)
        bad.raise_if_any()
        if not count:
            raise holds_no(file, "users")

    with opened(file) as stream, call.store() as store:
        before = store.changes_since(None).head
        with progress(call.out, "users", stream) as tell:
            revision = store.put_users(users())
    if call.out.as_json:
        call.out.data({"rows": count, "revision": revision, "changed": revision != before})
    elif revision == before:
        call.out.line(f"{count} rows: all of them were registered so already")
    else:
        call.out.line(f"{count} rows registered, revision {revision}", "green")


def list_users(
    call: Call,
    *,
    search: Annotated[
        str, typer.Option(help="Start of a username, an account ID or a word of the name.")
    ] = "",
    after: AfterOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List the users that are registered."""
    with call.store() as store:
        paged(
            call,
            store,
            "users",
            ("username", "full_name", "account_id", "email"),
            lambda each: (
                each.user.username,
                each.user.full_name,
                each.user.account_id,
                each.user.email,
            ),
            as_json=lambda each: each.user,
            keep=lambda each: not each.removed,
            search=search,
            after=after,
            limit=None if everything else limit,
        )
