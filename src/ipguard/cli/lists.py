"""`list` and `history`: the page and the trail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from json import dumps
from typing import Annotated, Any

import typer

from ipguard import audit
from ipguard._checks import check_text
from ipguard.cli._app import command
from ipguard.cli._call import Call
from ipguard.cli._output import Cell, begun, plain
from ipguard.cli._who import NO_EMAIL
from ipguard.errors import shorten
from ipguard.model import Actor, Page, Restriction, UserOverview
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username

_AT_ONCE = 1000
_SEARCH_LIMIT = 256

AfterOption = Annotated[
    str | None, typer.Option("--after", metavar="USERNAME", help="Go on after this one.")
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="How many at the most.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, name="list")(list_)
    command(app)(history)


def list_(
    call: Call,
    search: Annotated[
        str,
        typer.Argument(
            help="Start of a username, an account ID or a word of the name; or an address:"
            " who has it in a restriction."
        ),
    ] = "",
    *,
    removed: Annotated[
        bool, typer.Option("--removed", help="Only those removed whose restrictions go on holding.")
    ] = False,
    after: AfterOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List users with restrictions and requests."""
    with call.store() as store:
        paged(
            call,
            store,
            "users",
            ("username", "full_name", "account_id", "restrictions", "pending", "removed"),
            _cells if call.out.rich else _line,
            as_json=lambda each: each,
            keep=(lambda each: each.removed) if removed else (lambda _: True),
            whom=" who was removed and has restrictions" if removed else "",
            search=search,
            after=after,
            limit=None if everything else limit,
        )


def _cells(each: UserOverview) -> Sequence[Cell]:
    restrictions = [described(one) for one in each.restrictions] or [each.summary]
    pending = [f"{one.kind} {one.addresses} [{one.id}]" for one in each.pending]
    user = each.user
    return (
        user.username,
        user.full_name,
        user.account_id,
        restrictions,
        pending,
        "removed" if each.removed else "",
    )


def _line(each: UserOverview) -> Sequence[Cell]:
    pending = [f"{one.kind} {one.addresses}" for one in each.pending]
    user = each.user
    return (user.username, user.full_name, user.account_id, each.summary, pending, each.removed)


def described(restriction: Restriction) -> str:
    """Return a restriction in a line: what, what it is called, until when, and its id."""
    label = f" {restriction.label}" if restriction.label else ""
    until = restriction.expires_at
    end = "" if until is None else f" until {until:%Y-%m-%d %H:%M} UTC"
    return f"{restriction.addresses}{label}{end} [{restriction.id}]"


def paged(
    call: Call,
    store: RestrictionStore,
    name: str,
    columns: Sequence[str],
    cells: Callable[[UserOverview], Sequence[Cell]],
    *,
    as_json: Callable[[UserOverview], Any],
    keep: Callable[[UserOverview], bool],
    search: str,
    after: str | None,
    limit: int | None,
    whom: str = "",
) -> None:
    """Show users as they are read, a page at a time, up to a limit or all of them."""
    check_text("search", search, _SEARCH_LIMIT)
    last: str | None = None
    count = 0

    def kept() -> Iterator[UserOverview]:
        nonlocal last, count
        for each, following in _overview(store, search.strip(), after, limit):
            if not keep(each):
                continue
            if count == limit:
                return
            count += 1
            last = each.user.username if following or count == limit else None
            yield each
        last = None

    found = begun(kept())
    if call.out.as_json:
        call.out.raw(f'{{"{name}": [')
        for number, each in enumerate(found):
            call.out.raw((", " if number else "") + dumps(plain(as_json(each))))
        call.out.raw(f'], "next": {dumps(last)}}}\n')
        return
    _table(call, columns, map(cells, found))
    if last is not None:
        call.out.note(f"there are more: --after {last}, or --all")
    if not count:
        call.out.note(_nobody(whom, search, after))


def _table(call: Call, columns: Sequence[str], cells: Iterator[Sequence[Cell]]) -> None:
    if not call.out.rich:
        call.out.table(columns, cells)
        return
    # A table knows its widths only when it has all of its rows: so many at a time.
    while some := [row for row, _ in zip(cells, range(_AT_ONCE), strict=False)]:
        call.out.table(columns, some)


def _nobody(whom: str, search: str, after: str | None) -> str:
    whom += f" for {shorten(search)}" if search.strip() else ""
    whom += f" after {shorten(after)}" if after else ""
    return f"found nobody{whom or '; `ipguard users import FILE` registers users'}"


def _overview(
    store: RestrictionStore, search: str, after: str | None, limit: int | None
) -> Iterator[tuple[UserOverview, bool]]:
    size = _AT_ONCE if limit is None else min(_AT_ONCE, limit + 1)
    while True:
        page: Page[UserOverview] = store.overview(
            Actor.EVERY_ACCOUNT, search=search, after=after, limit=size
        )
        yield from ((each, page.next is not None) for each in page)
        if page.next is None:
            return
        after = page.next


def history(
    call: Call,
    *,
    user: Annotated[
        str | None, typer.Option("--user", metavar="USERNAME", help="Only what concerns this user.")
    ] = None,
    before: Annotated[
        int | None, typer.Option("--before", metavar="REVISION", help="Go on below this one.")
    ] = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List what was done, the newest first."""
    with call.store() as store:
        flow = call.workflow(store, mails=False)
        # Any actor of every account will do: nothing is done in its name.
        actor = Actor(username="-", email=NO_EMAIL, manages=Actor.EVERY_ACCOUNT)
        left = None if everything else limit
        following = before
        count = 0

        def changes() -> Iterator[Any]:
            nonlocal left, following, count
            while left is None or left > 0:
                size = _AT_ONCE if left is None else min(_AT_ONCE, left)
                page = flow.history(actor, username=user, before=following, limit=size)
                count += len(page)
                yield from page
                following = page.next
                left = None if left is None else left - len(page)
                if following is None:
                    return

        found = begun(changes())
        if call.out.as_json:
            call.out.raw('{"changes": [')
            for number, each in enumerate(found):
                call.out.raw((", " if number else "") + dumps(plain(each)))
            call.out.raw(f'], "next": {dumps(following)}}}\n')
            return
        columns = ("revision", "at", "actor", "action", "username", "detail")
        cells = (
            (
                c.revision,
                c.at,
                c.actor or "",
                str(c.action),
                c.username or "",
                audit.encode(c.detail),
            )
            for c in found
        )
        _table(call, columns, cells)
        if following is not None:
            call.out.note(f"there are more: --before {following}, or --all")
        if not count:
            call.out.note(_nothing_done(store, user, before))


def _nothing_done(store: RestrictionStore, user: str | None, before: int | None) -> str:
    if user is not None and (wrong := unregistered(store, user)):
        return wrong
    about = "in this store" if user is None else f"about {shorten(user)}"
    return f"nothing was done {about} {'yet' if before is None else f'below revision {before}'}"


def unregistered(store: RestrictionStore, username: str) -> str:
    """Say that nobody of this name is registered, if so: most likely it was mistyped."""
    if store.load_policy(canonical_username(username)).known:
        return ""
    return (
        f"no user {shorten(username)} is registered, and nothing is shown of that name"
        " (`ipguard users list --search` finds users)"
    )
