"""`watch`: changes as they happen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from ipguard import audit
from ipguard.cli._app import command
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit
from ipguard.cli._output import clean
from ipguard.cli.lists import unregistered
from ipguard.errors import StoreUnavailable
from ipguard.model import RESET, Actor, Change
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username

_EACH: Final = 1.0  # rows that touch no policy wake nobody
_PAGE: Final = 500


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app)(watch)


def watch(
    call: Call,
    *,
    user: Annotated[
        str | None, typer.Option("--user", metavar="USERNAME", help="Only what concerns this user.")
    ] = None,
    since: Annotated[
        int | None,
        typer.Option("--since", metavar="REVISION", help="Begin after this one; else with now."),
    ] = None,
) -> int:
    """Show changes as they happen, until Ctrl-C.

    With --json each is one object on a line.
    """
    name = None if user is None else canonical_username(user)
    with call.store() as store:
        head, token, _ = store.changes_since(None)
        cursor, seen = (head, token), head if since is None else since
        if seen > head:
            call.out.note(
                f"revision {seen} belongs to another history (a restored backup, or another"
                f" store): this one is at revision {head}"
            )
            seen = head
        if name is not None and (wrong := unregistered(store, name)):
            call.out.note(wrong)
        call.out.note(f"watching from revision {seen}; Ctrl-C ends it")
        down = False
        try:
            while True:
                try:
                    seen, cursor = _step(call, store, name, seen, cursor)
                    if down:
                        call.out.note("the store answers again")
                    down = False
                    store.wait(seen, _EACH)
                except StoreUnavailable as exc:
                    if not down:
                        call.out.note(f"the store does not answer, trying again: {exc}")
                    down = True
                    time.sleep(_EACH)
        except KeyboardInterrupt:
            return Exit.OK


def _step(
    call: Call,
    store: RestrictionStore,
    name: str | None,
    seen: int,
    cursor: tuple[int, str],
) -> tuple[int, tuple[int, str]]:
    """Show what is new; return where that leads."""
    head, token, usernames = store.changes_since(cursor)
    if usernames is RESET:
        call.out.note(f"the store has another history now, at revision {head}")
        return head, (head, token)
    shown = seen
    for change in _after(store, name, seen):
        _show(call, change)
        shown = change.revision
    call.out.flush()
    return max(head, shown), (head, token)


def _after(store: RestrictionStore, name: str | None, seen: int) -> Iterator[Change]:
    """Return the changes after a revision, the oldest first."""
    found: list[Change] = []
    before: int | None = None
    while True:
        page = store.history(Actor.EVERY_ACCOUNT, username=name, before=before, limit=_PAGE)
        new = [change for change in page if change.revision > seen]
        found += new
        if page.next is None or len(new) < len(page):
            return reversed(found)
        before = page.next


def _show(call: Call, change: Change) -> None:
    if call.out.as_json:
        call.out.data(change)
        return
    cells = (
        str(change.revision),
        f"{change.at:%Y-%m-%d %H:%M:%S}" if call.out.rich else change.at.isoformat(),
        change.actor or "",
        change.action,
        change.username or "",
        audit.encode(change.detail),
    )
    call.out.raw(("  " if call.out.rich else "\t").join(map(clean, cells)) + "\n")
