"""Import and export all restrictions as CSV or JSON Lines."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from json import dumps
from typing import Annotated, Final, TextIO

from typer import Option

from ipguard.cli import _files
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._context import OPERATOR, Context, command
from ipguard.cli._files import FileArgument, Format, FormatOption
from ipguard.cli._identity import READER
from ipguard.cli._import_check import COLUMNS, checked, values
from ipguard.cli._output import plain
from ipguard.cli.changes import ReasonOption
from ipguard.errors import InvalidValue, IPGuardError, StoreError
from ipguard.model import Restriction


class _BadRow(Exception):
    """End the import at a bad row; the caller then checks all rows."""


@command(OPERATOR, name="import")
def import_(
    context: Context,
    file: FileArgument,
    *,
    reason: ReasonOption,
    kind: FormatOption = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show what would change, and change nothing.")
    ] = False,
    skip_existing: Annotated[
        bool, Option("--skip-existing", help="Skip restrictions that exist unchanged.")
    ] = False,
) -> None:
    """Impose the restrictions of a file: all or none.

    Columns: username, addresses and optionally label and expires_at. The import is one revision
    with one reason. Every bad row is reported with its line.

    Example: ipguard import rows.csv --reason "ticket 4713" --dry-run
    """
    form = _files.format_of(file, kind)
    actor = READER if dry_run else context.actor()
    source = _files.opened(file, rewindable=True)
    with source as stream, context.workflow(mails=not dry_run) as (store, flow):
        if dry_run or skip_existing:
            with checked(
                context, store, flow, stream, form, file, skip_existing=skip_existing
            ) as found:
                if dry_run:
                    found.show(context.out)
                    return
                if found.added:
                    revision = flow.impose_many(actor, found.rows(), reason=reason).revision
                else:
                    revision = store.changes_since(None).head
            _show_imported(context, found.added, revision, len(found.skipped))
            return
        count = 0

        def wanted() -> Iterator[tuple[object, ...]]:
            nonlocal count
            for _, row in _files.rows(stream, form, COLUMNS, _stop, advance):
                count += 1
                yield values(row)
            if not count:
                raise _files.without_rows(file, "restrictions")

        try:
            with _files.progress(context.out, "restrictions", stream) as advance:
                applied = flow.impose_many(actor, wanted(), reason=reason)
        except (_BadRow, IPGuardError) as exc:
            if isinstance(exc, StoreError) or (isinstance(exc, InvalidValue) and not count):
                raise
            # Only the first bad row is known so far: check them all.
            stream.seek(0)
            with checked(context, store, flow, stream, form, file):
                raise exc from None
    _show_imported(context, count, applied.revision, 0)


def _stop(_: int, reason: str) -> None:
    raise _BadRow(reason)


def _show_imported(context: Context, count: int, revision: int, skipped: int) -> None:
    failed = context.report_failures()
    if context.out.as_json:
        done = {"dry_run": False, "rows": count, "skipped": skipped, "revision": revision}
        context.out.data(done | {"notices_failed": failed})
        return
    context.out.line(f"{count:,} restrictions imported, revision {revision}", "green")
    if skipped:
        context.out.line(f"{skipped:,} rows skipped: their restrictions exist already")


_EXPORTED: Final = (*COLUMNS.required, *COLUMNS.optional, *COLUMNS.ignored)


@command()
def export(
    context: Context,
    *,
    output: Annotated[
        str | None, Option("--output", "-o", metavar="FILE", help="A new file, with mode 0600.")
    ] = None,
    kind: FormatOption = None,
    excel: Annotated[
        bool, Option("--excel", help="Start CSV with a byte order mark, as Excel needs.")
    ] = False,
) -> None:
    """Write every restriction as CSV or JSON Lines, in UTF-8.

    They are one snapshot, and `ipguard import` reads them. Expired restrictions are left out,
    because imports refuse them.

    Example: ipguard export -o restrictions.csv
    """
    lines = kind is None and context.out.as_json and not output
    form = Format.JSONL if lines else _files.format_of(output or "", kind)
    if excel and form is not Format.CSV:
        raise Problem(Exit.USAGE, "--excel is for CSV")
    count = expired = left_out = 0
    with context.store() as store:
        revision, policies = store.load_all_policies()
        now = store.now()
        with closing(policies), _target(output) as target:  # type: ignore[type-var]
            if excel:
                target.write("\ufeff")
            write = _writer(target, form)
            # In a terminal, rows on standard output would run into the progress bar.
            hidden = context.out.rich and not output
            with _files.progress(context.out, "", hidden=hidden) as advance:
                for _, policy in policies:
                    holding = [r for r in policy.restrictions if not r.expired(now)]
                    expired += len(policy.restrictions) - len(holding)
                    left_out += not holding
                    for restriction in holding:
                        write(restriction)
                        advance(0)
                        count += 1
    if output and context.out.as_json:
        done = {"file": os.path.abspath(output), "rows": count, "revision": revision}  # noqa: PTH100
        context.out.data(done | {"expired": expired, "users_left_out": left_out})
        return
    if output:
        context.out.line(f"{count:,} restrictions of revision {revision}: {output}", "green")
    if expired:
        context.out.note(f"expired restrictions left out: {expired:,}")
    if left_out:
        context.out.note(
            f"users with expired restrictions only: {left_out:,}; they can log in from no address"
            " here, but from every address where only this export is imported; `ipguard doctor`"
            " names them"
        )


def _writer(target: TextIO, form: Format) -> Callable[[Restriction], object]:
    if form is Format.JSONL:
        return lambda restriction: target.write(dumps(plain(restriction)) + "\n")
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(_EXPORTED)

    def write(restriction: Restriction) -> None:
        found = plain(restriction)
        writer.writerow(found[name] for name in _EXPORTED)

    return write


@contextmanager
def _target(output: str | None) -> Iterator[TextIO]:
    """Open the output; a file appears under its name only once it is complete."""
    if output is None:
        yield sys.stdout
        return
    part = f"{output}.part"
    if os.path.lexists(output):
        raise Problem(Exit.FILE, f"{output} exists already and is not overwritten")
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
