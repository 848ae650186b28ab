"""List users with their restrictions, and register users from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Annotated, Any, BinaryIO, Final, get_args

import attrs
import typer
from typer import Argument, Option

from ipguard.cli import _files
from ipguard.cli._context import READER, Context, app, command
from ipguard.cli._files import UNCHANGED, BadRows, Columns, FileArgument, Format, FormatOption
from ipguard.cli._output import Cell, Exit, Problem, missing, pages
from ipguard.errors import IPGuardError, UsernameCollision, UsernameError, shorten
from ipguard.model import PendingRequest, Restriction, User, UserFilter, UserOverview, UserSync
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow

SearchHelp: Final = "The start of a username, an account ID or a word of the full name"
AfterOption = Annotated[
    str | None, Option("--after", metavar="USERNAME", help="Continue after this user.")
]
LimitOption = Annotated[int, Option("--limit", min=1, help="The largest number to list.")]
AllOption = Annotated[bool, Option("--all", help="List all, without a limit.")]

_COLUMNS: Final = Columns(
    what="users",
    required=("username", "full_name", "account_id"),
    optional=("email", "uid"),
)
_COUNTS: Final = ("added", "changed", "renamed", "moved", "removed")
_group = typer.Typer(rich_markup_mode=None)
app.add_typer(_group, name="users", help="Register users, and list them.")


@command(group=_group, name="import")
def import_users(
    context: Context,
    file: FileArgument,
    *,
    kind: FormatOption = None,
    sync: Annotated[
        bool, Option("--sync", help="Register the good rows and report the bad ones.")
    ] = False,
    remove_missing: Annotated[
        bool, Option("--remove-missing", help="With --sync: remove users that are not in the file.")
    ] = False,
) -> None:
    """Register or update the users of a file.

    All of its rows or none; with --sync, all good rows. Columns: username, full_name, account_id,
    and optionally email and uid, the host's own key of a user, which never changes. A row whose
    uid is stored with another username renames the user. Of several rows about one user, the last
    counts.

    Example: ipguard users import users.csv --sync --remove-missing
    """
    if remove_missing and not sync:
        raise Problem(Exit.USAGE, "--remove-missing needs --sync")
    with _files.opened(file, rewindable=True) as stream, context.store() as store:
        rows = _Rows(context, stream, file, kind, sync=sync, remove_missing=remove_missing)
        with rows.progress():
            if sync:
                _report(
                    context, rows, store.sync_users(rows.records(), remove_missing=remove_missing)
                )
                return
            before = store.changes_since(None).head
            try:
                revision = store.put_users(rows.users())
            except UsernameCollision as exc:
                rows.refuse(exc.refused)
                rows.raise_if_bad()
                raise
    changed, count = revision != before, rows.count
    context.out.data({"rows": count, "revision": revision, "changed": changed})
    if changed:
        context.out.line(f"{count} rows registered, revision {revision}", "green")
    else:
        context.out.line(f"{count} rows: nothing to change")


class _Rows:
    """The rows of a file of users, and which of them are bad."""

    def __init__(
        self,
        context: Context,
        stream: BinaryIO,
        path: str,
        kind: Format | None,
        *,
        sync: bool,
        remove_missing: bool,
    ) -> None:
        self._context = context
        self._source = stream, path, kind, attrs.evolve(_COLUMNS, partial=sync)
        self._bad = BadRows(path, "the other rows were registered" if sync else UNCHANGED)
        self._remove_missing = remove_missing
        self._advance: Callable[[int], object] = _ignore
        self.count = 0

    @contextmanager
    def progress(self) -> Iterator[None]:
        with _files.progress(self._context.out, "users", self._source[0]) as self._advance:
            yield

    def users(self) -> Iterator[User]:
        """Yield the users of all rows, or raise BadRows at the end."""
        for record in self.records():
            if isinstance(record, User):
                yield record
        self._bad.raise_if_any()

    def records(self) -> Iterator[User | _files.Row]:
        """Yield a user for each good row, and the values of each bad one."""
        read = 0
        for line, row in _files.rows(*self._source, self._bad.add, self._advance):
            self.count += 1
            try:
                yield User.of(row)
            except IPGuardError as exc:
                self._bad.add(line, exc)
                read += 1
                yield row  # so that its user stays registered
        if self._remove_missing and self._bad.count > read:
            self._bad.outcome = UNCHANGED
            self._bad.raise_if_any()

    def refuse(self, refused: Iterable[tuple[object, IPGuardError]]) -> int:
        """Add the rows that the store refused to the bad rows; return how many those are."""
        reasons = {record: str(error) for record, error in refused if isinstance(record, User)}
        if reasons:
            self._source[0].seek(0)
            for line, row in _files.rows(*self._source, _ignore, _ignore):
                with suppress(IPGuardError):
                    if reason := reasons.get(User.of(row)):
                        self._bad.add(line, reason)
        return self._bad.count

    def raise_if_bad(self) -> None:
        self._bad.raise_if_any()


def _ignore(*_: object) -> None:
    """Take anything and do nothing."""


def _report(context: Context, rows: _Rows, found: UserSync) -> None:
    counts = {name: getattr(found, name) for name in _COUNTS}
    refused = rows.refuse(found.refused)
    context.out.data(
        {
            "rows": rows.count,
            "revision": found.revision,
            "changed": any(counts.values()),
            "users": counts | {"refused": refused},
        }
    )
    shown = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    done = shown or "nothing to change"
    context.out.line(f"{rows.count} rows: {done}, revision {found.revision}", "green")
    rows.raise_if_bad()


@command(group=_group, name="rename")
def rename_user(
    context: Context,
    old: Annotated[str, Argument(help="The present username.")],
    new: Annotated[str, Argument(help="The new one, as the host spells it.")],
) -> None:
    """Rename a user. The restrictions follow, and pending requests are cancelled.

    Example: ipguard users rename jsmith jane.miller
    """
    with context.store() as store:
        revision = store.rename_user(old, new)
    context.out.data({"revision": revision})
    context.out.line(f"renamed, revision {revision}", "green")


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
        found = _after(flow, search, after, size)
        some = context.out.listing(
            "users",
            ("username", "full_name", "account_id", "email"),
            (each.user for each in found if not each.removed),
            lambda user: (user.spelling, user.full_name, user.account_id, user.email),
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
    only: Annotated[
        str | None,
        Option(
            "--only",
            metavar="|".join(get_args(UserFilter)),
            help="List only these users; `expiring`: a restriction expires within seven days.",
        ),
    ] = None,
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
        found = _after(flow, search, after, size, only)
        some = context.out.listing(
            "users",
            ("username", "full_name", "account_id", "restrictions", "pending", "removed"),
            (each for each in found if each.removed or not removed),
            partial(_terminal_cells, flow.now()) if context.out.rich else _cells,
            limit=size,
            option="--after",
        )
    kind = "removed user with restrictions" if removed else f"{only or ''} user".strip()
    _note_none(context, some, kind, search, after)


def _after(
    flow: Workflow, search: str, after: str | None, limit: int | None, only: Any = None
) -> Iterator[UserOverview]:
    """Yield the users after a username, in any spelling."""
    with suppress(UsernameError):
        after = None if after is None else canonical_username(after)
    return pages(partial(flow.overview, READER, search=search, only=only), "after", after, limit)


def _note_none(context: Context, some: object, kind: str, search: str, after: str | None) -> None:
    if not some:
        where = f" for {shorten(search)}" if search.strip() else ""
        where += f" after {shorten(after)}" if after else ""
        advice = "" if where or kind != "user" else "; `ipguard users import FILE` registers users"
        context.out.note(f"no {kind} found{where}{advice}")


def _names(each: UserOverview) -> tuple[Cell, ...]:
    return (each.user.spelling, each.user.full_name, each.user.account_id)


def _cells(each: UserOverview) -> Sequence[Cell]:
    pending = [one.change for one in each.pending]
    return (*_names(each), each.summary, pending, each.removed)


def _terminal_cells(now: datetime, each: UserOverview) -> Sequence[Cell]:
    used = each.last_used
    restrictions = [_described(one, used.get(one.id)) for one in each.restrictions]
    pending = [_requested(one, now) for one in each.pending]
    return (
        *_names(each),
        restrictions or [each.summary],
        pending,
        "removed" if each.removed else "",
    )


def _requested(request: PendingRequest, now: datetime) -> str:
    """Return a pending request on one line, with its author, what it needs, and its id."""
    needs = ", ".join(missing(request, now))
    return f"{request.change}, asked for by {request.requested_by}, {needs} [{request.id}]"


def _described(restriction: Restriction, used: datetime | None) -> str:
    """Return a restriction on one line, with its label, expiry, last use and id."""
    label = f" {restriction.label}" if restriction.label else ""
    until = restriction.expires_at
    end = "" if until is None else f" until {until:%Y-%m-%d %H:%M} UTC"
    seen = "" if used is None else f" last used {used:%Y-%m-%d}"
    return f"{restriction.addresses}{label}{end}{seen} [{restriction.id}]"
