"""The record: what held at a time, whether it is whole, and reports for reviews."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import StrEnum
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, Final

from typer import Argument, Option

from ipguard import rules
from ipguard._csv import safe_cell
from ipguard.cli._context import READER, Context, command
from ipguard.cli._output import Cell, Exit, Problem, pages, plain
from ipguard.cli._times import parse_length, parse_time
from ipguard.model import AccessLine, Action, Change
from ipguard.workflow import Workflow

_RESTRICTION: Final = ("id", "addresses", "label", "expires_at", "created_at", "created_by")


@command(name="as-of")
def as_of(
    context: Context,
    username: Annotated[str, Argument(help="The user, by the name of that time.")],
    *,
    at: Annotated[
        str | None,
        Option("--at", metavar="WHEN", help="The time: 2027-01-31T18:00Z; or 12h, 30d ago."),
    ] = None,
    revision: Annotated[
        int | None, Option("--revision", metavar="REVISION", help="Or the revision.")
    ] = None,
) -> None:
    """Show from where a user could log in at a time, or after a revision.

    Example: ipguard as-of jsmith --at 2026-11-05T14:30Z
    """
    if (at is None) is (revision is None):
        raise Problem(Exit.USAGE, "give --at or --revision")
    with context.workflow(mails=False) as (_, flow):
        moment = None if at is None else parse_time(at, flow.now(), past=True)
        found = flow.as_of(READER, username, at=moment, revision=revision)
        then = moment or _time_of(flow, found.revision) or flow.now()
    summary = rules.summarise(found.restrictions, then)
    context.out.data(
        {
            "username": username,
            "revision": found.revision,
            "at": then,
            "summary": summary,
            "restrictions": found.restrictions,
            "known": found.known,
        }
    )
    context.out.line(f"{then:%Y-%m-%d %H:%M:%S} UTC, revision {found.revision}: {summary}")
    if found.restrictions:
        context.out.table(_RESTRICTION, map(attrgetter(*_RESTRICTION), found.restrictions))
    elif not (found.known or context.out.as_json):
        context.out.note("no such user is registered today: was it another name?")


def _time_of(flow: Workflow, revision: int) -> datetime | None:
    """Return the time of an entry, or None if it was pruned."""
    entries = flow.history(READER, before=revision + 1, limit=1).items if revision else ()
    return entries[0].at if entries and entries[0].revision == revision else None


# -- verify and prune ------------------------------------------------------------------------------


@command()
def verify(
    context: Context,
    *,
    expect: Annotated[
        str | None,
        Option(
            "--expect", metavar="REVISION:TOKEN", help="A head that was noted outside of the store."
        ),
    ] = None,
) -> int:
    """Check that the audit log and the restrictions are as they were written.

    The exit code is 1 if anything is damaged. Note the head that is printed in another place, and
    give it as --expect later: only that shows that the whole log was not rewritten.

    Example: ipguard verify --expect 4711:9f2c...
    """
    wanted = None if expect is None else _read_head(expect)
    with context.store() as store:
        found = store.verify(expect=wanted)
    damage = [each._asdict() for each in found.damage]
    context.out.data(plain(found) | {"damage": damage})
    if damage:
        context.out.table(("revision", "damage"), found.damage)
    not_covered = f", {found.uncovered:,} of them not covered" if found.uncovered else ""
    context.out.line(
        f"{'DAMAGED' if damage else 'whole'}: revisions {found.first} to {found.head},"
        f" {found.entries:,} entries, {found.restrictions:,} restrictions{not_covered}",
        "red" if damage else "green",
    )
    context.out.line(f"head: {found.head}:{found.token}")
    return Exit.NOT_ALLOWED if damage else Exit.OK


def _read_head(text: str) -> tuple[int, str]:
    revision, _, token = text.partition(":")
    if not (revision.isascii() and revision.isdigit() and len(revision) < 20 and token):
        raise Problem(Exit.USAGE, "--expect needs REVISION:TOKEN, as `ipguard verify` prints it")
    return int(revision), token


@command()
def prune(
    context: Context,
    *,
    before: Annotated[
        str, Option("--before", metavar="WHEN", help="2027-01-31T18:00Z; or 2000d ago.")
    ],
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete old audit entries, and the restrictions that had ended by then.

    For the owner of the database. An entry is appended, the anchor, at which `verify` begins.

    Example: ipguard prune --before 2000d
    """
    with context.workflow(mails=False) as (store, flow):
        limit = parse_time(before, flow.now(), past=True)
        delete: Any = getattr(store, "prune", None)
        if delete is None:
            raise Problem(Exit.CONFIG, "this store cannot be pruned")
        if not yes:
            text = f"the audit entries before {limit:%Y-%m-%d %H:%M:%S} UTC will be deleted"
            context.out.confirm(text, "--yes")
        count = delete(limit)
        anchor = _last_anchor(flow)
    context.out.data({"before": limit, "deleted": count, "anchor": anchor})
    if not count:
        context.out.line("there was nothing to delete")
    if anchor is not None:
        context.out.line(f"the record begins at revision {anchor.detail.get('kept_from')}", "green")
        pairs = " ".join(f"{name}={text}" for name, text in anchor.detail.items())
        context.out.line(f"anchor: revision {anchor.revision}, {pairs}")


def _last_anchor(flow: Workflow) -> Change | None:
    entries = pages(partial(flow.history, READER), "before")
    return next((each for each in entries if each.action is Action.PRUNE), None)


# -- report ----------------------------------------------------------------------------------------


class ReportFormat(StrEnum):
    """Formats of a report."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


_REPORTED: Final = (
    *("username", "full_name", "account_id", "removed", "state", "addresses", "label"),
    *("restriction", "since", "by", "expires_at", "last_used"),
    *("change", "changed_at", "changed_by", "action", "direction"),
)
_SHOWN: Final = (
    *("username", "account_id", "state", "addresses", "label", "since", "by", "last_used"),
    *("direction", "changed_at", "changed_by"),
)


@command()
def report(
    context: Context,
    *,
    unused: Annotated[
        str | None,
        Option("--unused", metavar="LENGTH", help="Only what was not used for so long: 90d."),
    ] = None,
    kind: Annotated[
        ReportFormat, Option("--format", help="A table, CSV for a spreadsheet, or JSON.")
    ] = ReportFormat.TABLE,
) -> None:
    """List for an access review each user's restrictions, since when, by whom, and last used.

    A user without restrictions has one line, with the state `open`: every address is allowed. The
    last columns are of the last change of this user by name; imports name no user.

    Example: ipguard report --format csv > review.csv
    """
    length = None if unused is None else parse_length(unused)
    with context.workflow(mails=False) as (_, flow):
        now = flow.now()
        lines = flow.report(READER, unused=length)
        if context.out.as_json or kind is ReportFormat.JSON:
            shown = (plain(each) | {"state": _state(each, now)} for each in lines)
            context.out.array("lines", shown, lambda: {"at": now})
        elif kind is ReportFormat.CSV:
            _write_csv(_cells(each, now) for each in lines)
        else:
            rows = (_cells(each, now) for each in lines)
            context.out.table(_SHOWN, (tuple(row[name] for name in _SHOWN) for row in rows))


def _write_csv(rows: Iterable[dict[str, Cell]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_REPORTED)
    for row in rows:
        writer.writerow(_texts(row.values()))


def _texts(cells: Iterable[Cell]) -> Iterator[str]:
    for cell in cells:
        if isinstance(cell, bool):
            yield "yes" if cell else "no"
        else:
            yield safe_cell(cell.isoformat() if isinstance(cell, datetime) else cell)


def _state(line: AccessLine, now: datetime) -> str:
    if line.restriction is None:
        return "open"
    return "expired" if line.restriction.expired(now) else "in force"


def _cells(line: AccessLine, now: datetime) -> dict[str, Cell]:
    user, restriction, change = line.user, line.restriction, line.changed
    found: dict[str, Cell] = dict.fromkeys(_REPORTED)
    found |= {
        "username": user.spelling,
        "full_name": user.full_name,
        "account_id": user.account_id,
        "removed": line.removed,
        "state": _state(line, now),
        "last_used": line.last_used,
    }
    if restriction is None:
        found["addresses"] = "every address"
    else:
        found |= {
            "addresses": restriction.addresses,
            "label": restriction.label,
            "restriction": restriction.id,
            "since": restriction.created_at,
            "by": restriction.created_by,
            "expires_at": restriction.expires_at,
        }
    if change is not None:
        found |= {
            "change": change.revision,
            "changed_at": change.at,
            "changed_by": change.actor,
            "action": str(change.action),
            "direction": change.detail.get("direction"),
        }
    return found
