"""`import` and `export`: all restrictions, from and to CSV and JSON Lines."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from json import dumps
from typing import Annotated, Any, Final, TextIO

import typer

from ipguard.cli._app import OPERATOR, command
from ipguard.cli._bulk import progress, rewindable
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._files import BadRow, FileOption, format_of, holds_no, opened, rows
from ipguard.cli._judging import COLUMNS, judge, show, values
from ipguard.cli._output import plain
from ipguard.cli._results import ReasonOption
from ipguard.cli._who import NO_EMAIL
from ipguard.errors import InvalidValue, IPGuardError, StoreError
from ipguard.model import Actor, Restriction


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, OPERATOR, name="import")(import_)
    command(app)(export)


class _Stop(Exception):
    """A row of the file is bad: which ones are, is found out afterwards."""


def import_(
    call: Call,
    file: Annotated[str, typer.Argument(help="CSV or JSON Lines; - is standard input.")],
    *,
    reason: ReasonOption,
    kind: FileOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Skip rows that hold already, with the same label and expiry.",
        ),
    ] = False,
) -> None:
    """Impose the restrictions of a file: all or none.

    Columns: username, addresses, and optionally label and expires_at. One revision, one reason.
    Every bad row is reported with its line.
    """
    kind = format_of(file, kind)
    actor = Actor(username="-", email=NO_EMAIL, manages=Actor.EVERY_ACCOUNT)
    actor = actor if dry_run else call.operator()
    with opened(file) as given, rewindable(given) as stream, call.store() as store:
        flow = call.workflow(store, mails=not dry_run)
        if dry_run or skip_existing:
            with judge(
                call, store, flow, actor, stream, kind, file, skip_existing=skip_existing
            ) as judged:
                if dry_run:
                    show(call, judged)
                    return
                if judged.added:
                    revision = flow.impose_many(actor, judged.rows(), reason=reason).revision
                else:
                    revision = store.changes_since(None).head
            _show_imported(call, judged.added, revision, len(judged.skipped))
            return
        count = 0

        def wanted() -> Iterator[tuple[object, ...]]:
            nonlocal count
            for _, row in rows(stream, kind, COLUMNS, tell):
                if isinstance(row, BadRow):
                    raise _Stop
                count += 1
                yield values(row)
            if not count:
                raise holds_no(file, "restrictions")

        try:
            with progress(call.out, "restrictions", stream) as tell:
                applied = flow.impose_many(actor, wanted(), reason=reason)
        except (_Stop, IPGuardError) as exc:
            if isinstance(exc, StoreError) or (isinstance(exc, InvalidValue) and not count):
                raise
            # The first is known; the person wants to know all of them.
            stream.seek(0)
            with judge(call, store, flow, actor, stream, kind, file):
                raise exc from None
    _show_imported(call, count, applied.revision, 0)


def _show_imported(call: Call, count: int, revision: int, skipped: int) -> None:
    failed = call.tell_failures()
    if call.out.as_json:
        told = {"dry_run": False, "rows": count, "skipped": skipped, "revision": revision}
        call.out.data(told | {"notices_failed": failed})
        return
    call.out.line(f"{count:,} restrictions hold, revision {revision}", "green")
    if skipped:
        call.out.line(f"{skipped:,} rows were skipped: they hold already")


_EXPORTED: Final = (
    "username",
    "addresses",
    "label",
    "expires_at",
    "id",
    "created_at",
    "created_by",
)


def export(
    call: Call,
    *,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="A new file, 0600.")
    ] = None,
    kind: FileOption = None,
    excel: Annotated[
        bool,
        typer.Option("--excel", help="Begin CSV with a byte order mark: Excel then reads UTF-8."),
    ] = False,
) -> None:
    """Write every restriction: CSV, or JSON Lines, in UTF-8.

    They are of one moment. `ipguard import` reads them. Those that have expired are left out, as no
    import takes them.
    """
    kind = format_of(output or "", kind or ("jsonl" if call.out.as_json and not output else None))
    if excel and kind != "csv":
        raise Problem(Exit.USAGE, "--excel is for CSV")
    count = expired = nothing = 0
    with call.store() as store:
        revision, policies = store.load_all_policies()
        now = store.now()
        with closing(policies), _target(output) as target:  # type: ignore[type-var]
            if excel:
                target.write("\ufeff")
            write = _csv(target) if kind == "csv" else _lines(target)
            # In a terminal, rows on their way to it would run into the bar.
            shown = nullcontext(_nobody) if call.out.rich and not output else progress(call.out, "")
            with shown as tell:
                for _, policy in policies:
                    holding = [r for r in policy.restrictions if not r.expired(now)]
                    expired += len(policy.restrictions) - len(holding)
                    nothing += not holding
                    for restriction in holding:
                        write(restriction)
                        tell(0)
                        count += 1
    if output and call.out.as_json:
        told: dict[str, object] = {"file": os.path.abspath(output), "rows": count}  # noqa: PTH100
        told |= {"revision": revision, "expired": expired, "users_left_out": nothing}
        call.out.data(told)
        return
    if output:
        call.out.line(f"{count:,} restrictions of revision {revision}: {output}", "green")
    if expired:
        call.out.note(f"restrictions left out, as they have expired: {expired:,}")
    if nothing:
        call.out.note(
            f"users who have no other: {nothing:,}; they can log in from nowhere here, and from"
            " every address where only this is imported; `ipguard doctor` names them"
        )


def _nobody(_: int) -> None: ...


def _csv(target: TextIO) -> Any:
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(_EXPORTED)

    def write(restriction: Restriction) -> None:
        found = plain(restriction)
        writer.writerow(found[name] for name in _EXPORTED)

    return write


def _lines(target: TextIO) -> Any:
    return lambda restriction: target.write(dumps(plain(restriction)) + "\n")


@contextmanager
def _target(output: str | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    # Under another name until it is whole; never over what is there.
    part = f"{output}.part"
    if os.path.lexists(output):
        raise Problem(Exit.FILE, f"{output} is there already, and is not overwritten")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.link(part, output)
    finally:
        with suppress(OSError):
            os.unlink(part)  # noqa: PTH108
