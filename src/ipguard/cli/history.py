"""Show the audit log: `history` lists entries, and `watch` shows new ones as they happen."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, takewhile
from operator import attrgetter
from typing import Annotated, Final

from typer import Option

from ipguard import audit
from ipguard.cli._context import READER, Context, command
from ipguard.cli._ocsf import EventFormat, EventOption, change_event
from ipguard.cli._output import Cell, Exit, Problem, clean, dumps, pages
from ipguard.cli.users import AllOption, LimitOption
from ipguard.errors import StoreUnavailable, shorten
from ipguard.model import RESET, Change, Restriction
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow

_INTERVAL: Final = 1.0  # seconds; entries that touch no policy do not end `store.wait`

UserOption = Annotated[
    str | None, Option("--user", metavar="USERNAME", help="Only entries about this user.")
]


@command()
def history(
    context: Context,
    *,
    user: UserOption = None,
    before: Annotated[
        int | None,
        Option("--before", metavar="REVISION", help="Only entries before this revision."),
    ] = None,
    since: Annotated[
        int | None,
        Option("--since", metavar="REVISION", help="Only entries after this revision."),
    ] = None,
    revision: Annotated[
        int | None, Option("--revision", metavar="REVISION", help="Only this entry.")
    ] = None,
    restrictions: Annotated[
        bool,
        Option("--restrictions", help="With --revision: the restrictions it added and ended."),
    ] = False,
    kind: EventOption = None,
    limit: LimitOption = 50,
    everything: AllOption = False,
) -> None:
    """List the audit log, newest entries first.

    Example: ipguard history --user jsmith
    """
    if restrictions and (revision is None or kind is not None):
        raise Problem(Exit.USAGE, "--restrictions needs --revision, and has no --format")
    if revision is not None:
        if before is not None or since is not None:
            raise Problem(Exit.USAGE, "--revision excludes --before and --since")
        before, since = revision + 1, revision - 1
    with context.workflow(mails=False) as (store, flow):
        if restrictions and revision is not None:
            _show_restrictions(context, flow, revision)
            return
        size = None if everything else limit
        entries = _entries(flow, user, before, size)
        if since is not None:
            entries = takewhile(lambda change: change.revision > since, entries)
        if kind is not None:
            for change in islice(entries, size):
                context.out.raw(dumps(change_event(change)) + "\n")
            return
        found = context.out.listing(
            "changes",
            ("revision", "at", "actor", "action", "username", "detail"),
            entries,
            partial(_cells, brief=context.out.rich),
            limit=size,
            option="--before",
        )
        if not found:
            about = "" if user is None else f" about {shorten(user)}"
            if revision is not None:
                about += f" with revision {revision}"
            else:
                about += "" if before is None else f" before revision {before}"
                about += "" if since is None else f" after revision {since}"
            unknown = "" if user is None else _unregistered(store, user)
            context.out.note(unknown or f"the audit log has no entries{about}")


def _show_restrictions(context: Context, flow: Workflow, revision: int) -> None:
    """Show what an entry did to restrictions: all of an import, read in pages."""
    read = partial(flow.restrictions_changed, READER, revision)
    found: Iterator[tuple[Restriction, bool]] = pages(read, "after")
    found = chain(list(islice(found, 1)), found)  # an error is raised before the first line
    if context.out.as_json:
        rows = ({"added": added, "restriction": each} for each, added in found)
        context.out.array("restrictions", rows, lambda: {"revision": revision})
        return
    names = ("username", "addresses", "label", "expires_at", "created_at", "created_by", "id")
    cells = attrgetter(*names)
    shown = (("added" if added else "ended", *cells(each)) for each, added in found)
    context.out.table(("change", *names), shown)


def _entries(
    flow: Workflow, user: str | None, before: int | None = None, limit: int | None = None
) -> Iterator[Change]:
    return pages(partial(flow.history, READER, username=user), "before", before, limit)


def _cells(change: Change, *, brief: bool) -> tuple[Cell, ...]:
    """Return an entry; if brief, without the lists that its `afterwards` sums up."""
    left_out = ("gained", "lost") if brief and "afterwards" in change.detail else ()
    shown = {name: text for name, text in change.detail.items() if name not in left_out}
    detail = audit.encode(shown)
    return (change.revision, change.at, change.actor, str(change.action), change.username, detail)


def _unregistered(store: RestrictionStore, username: str) -> str:
    """Return a note if no such user is registered, which is most likely a typing error."""
    if store.load_policy(canonical_username(username)).known:
        return ""
    return (
        f"no user {shorten(username)} is registered, and there are no entries about that name"
        " (`ipguard users list --search` finds users)"
    )


@command()
def watch(
    context: Context,
    *,
    user: UserOption = None,
    since: Annotated[
        int | None,
        Option("--since", metavar="REVISION", help="Start after this revision, not now."),
    ] = None,
    kind: EventOption = None,
) -> int:
    """Show audit entries as they happen, until Ctrl-C.

    With --json, each entry is one object on a line.
    """
    name = None if user is None else canonical_username(user)
    with context.workflow(mails=False) as (store, flow):
        head, token, _ = store.changes_since(None)
        cursor, seen = (head, token), head if since is None else since
        if seen > head:
            context.out.note(
                f"revision {seen} belongs to another history (a restored backup, or another"
                f" store): this store is at revision {head}"
            )
            seen = head
        if name is not None and (unknown := _unregistered(store, name)):
            context.out.note(unknown)
        context.out.note(f"watching from revision {seen}; Ctrl-C stops")
        down = False
        try:
            while True:
                try:
                    seen, cursor = _show_new(context, store, flow, name, kind, seen, cursor)
                    if down:
                        context.out.note("the store responds again")
                    down = False
                    store.wait(seen, _INTERVAL)
                except StoreUnavailable as exc:
                    if not down:
                        context.out.note(f"the store does not respond, retrying: {exc}")
                    down = True
                    time.sleep(_INTERVAL)
        except KeyboardInterrupt:
            return Exit.OK


def _show_new(
    context: Context,
    store: RestrictionStore,
    flow: Workflow,
    name: str | None,
    kind: EventFormat | None,
    seen: int,
    cursor: tuple[int, str],
) -> tuple[int, tuple[int, str]]:
    """Show the entries after a revision; return the new revision and cursor."""
    head, token, usernames = store.changes_since(cursor)
    if usernames is RESET:
        context.out.note(f"the store has another history now, at revision {head}")
        return head, (head, token)
    new: list[Change] = []
    if head > seen:
        new = list(takewhile(lambda c: c.revision > seen, _entries(flow, name)))
    for change in reversed(new):
        _show(context, change, kind)
    sys.stdout.flush()
    return max([head, *(change.revision for change in new[:1])]), (head, token)


def _show(context: Context, change: Change, kind: EventFormat | None) -> None:
    if kind is not None:
        context.out.raw(dumps(change_event(change)) + "\n")
        return
    if context.out.as_json:
        context.out.data(change)
        return
    at = f"{change.at:%Y-%m-%d %H:%M:%S}" if context.out.rich else change.at.isoformat()
    cells = [str(cell or "") for cell in _cells(change, brief=context.out.rich)]
    cells[1] = at
    context.out.raw(("  " if context.out.rich else "\t").join(map(clean, cells)) + "\n")
