"""Import and export all restrictions as CSV or JSON Lines.

For `--dry-run`, and to report every bad row, an import judges its rows user by user. The workflow
judges them again when it applies them, and alone decides.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import Annotated, Any, BinaryIO, Final, TextIO

import attrs
from typer import Option

from ipguard import errors, rules
from ipguard.addresses import AddressRange
from ipguard.cli import _files
from ipguard.cli._context import OPERATOR, READER, Context, command
from ipguard.cli._files import BadRows, Columns, FileArgument, Format, FormatOption, Row, Spool
from ipguard.cli._output import Exit, Output, Problem, dumps, pages, plain
from ipguard.cli.changes import ReasonOption
from ipguard.model import Actor, Policy, Restriction
from ipguard.store import RestrictionStore
from ipguard.workflow import Workflow

_COLUMNS: Final = Columns(
    what="restrictions",
    required=("username", "addresses"),
    optional=("label", "expires_at"),
    ignored=("id", "created_at", "created_by"),
)
_EXPORTED: Final = (*_COLUMNS.required, *_COLUMNS.optional, *_COLUMNS.ignored)
_EFFECTS: Final = ("username", "direction", "gained", "lost", "afterwards")
_SELECT: Final = "SELECT username, line, first, last, label, expires FROM rows"
_FEW: Final = 5_000  # up to this many users are looked up one by one
_SHOWN: Final = 50


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
    replace: Annotated[
        bool,
        Option("--replace", help="The file is the whole list of its users: all others end."),
    ] = False,
    skip_existing: Annotated[
        bool, Option("--skip-existing", help="Skip addresses that the user has already.")
    ] = False,
) -> None:
    """Impose the restrictions of a file: all or none.

    Columns: username, addresses and optionally label and expires_at. The import is one revision
    with one reason. Every bad row is reported with its line.

    Example: ipguard import rows.csv --reason "ticket 4713" --dry-run
    """
    if replace and skip_existing:
        raise Problem(Exit.USAGE, "--replace and --skip-existing exclude each other")
    modes = {"replace": replace, "skip_existing": skip_existing}
    actor = READER if dry_run else context.actor()
    source = _files.opened(file, rewindable=True)
    with source as stream, context.workflow(mails=not dry_run) as (store, flow):
        check = partial(_checked, context, store, flow, stream, file, kind, modes)
        if dry_run:
            with check(effects=True) as found:
                found.show(context.out)
            return
        count = 0

        def wanted() -> Iterator[tuple[object, ...]]:
            nonlocal count
            for _, row in _files.rows(stream, file, kind, _COLUMNS, _stop, advance):
                count += 1
                yield _values(row)

        try:
            with _files.progress(context.out, "restrictions", stream) as advance:
                applied = flow.impose_many(actor, wanted(), reason=reason, **modes)
        except errors.IPGuardError as exc:
            if isinstance(exc, errors.StoreError) or (
                isinstance(exc, errors.InvalidValue) and not count
            ):
                raise
            # Only the first bad row is known so far: check them all.
            stream.seek(0)
            with check():
                raise exc from None
    counts = applied.counts
    assert counts is not None
    done = {"dry_run": False, "rows": counts.added, "skipped": counts.kept, "ended": counts.ended}
    done |= {"revision": applied.revision, "notices_failed": context.report_failures()}
    context.out.data(done)
    text = f"{counts.added:,} restrictions imported, revision {applied.revision}"
    context.out.line(text, "green")
    if counts.kept:
        context.out.line(f"{counts.kept:,} rows skipped: their restrictions exist already")
    if counts.ended:
        context.out.line(f"{counts.ended:,} restrictions ended")


def _stop(_: int, reason: str) -> None:
    """End the import at a bad row; the caller then checks all rows."""
    raise errors.IPGuardError(reason)


def _values(row: Row) -> tuple[object, ...]:
    """Return a row in the form that the workflow takes."""
    try:
        expires_at = _time(row.get("expires_at"))
    except ValueError:
        reason = "is not a time; write 2027-01-31T18:00Z"
        raise errors.InvalidValue("expires_at", reason) from None
    return (row["username"], row["addresses"], row.get("label", ""), expires_at)


@attrs.define
class _Check:
    """The check of an import, and its result.

    Attributes:
        added: How many restrictions would be added; `skipped` rows exist already.
        ended: How many present restrictions would end.
        users: How many users the rows are about, of whom `newly` have no restriction now.
    """

    _bad: BadRows
    _modes: Mapping[str, bool]
    _effects: Spool | None
    added: int = 0
    skipped: int = 0
    ended: int = 0
    users: int = 0
    newly: int = 0

    def compare(self, store: RestrictionStore, flow: Workflow, spool: Spool) -> None:
        """Judge the rows of each user, and note what they would do."""
        now, per_user = flow.now(), flow.settings.restrictions_per_user
        for username, policy, rows in _by_user(store, spool):
            wanted = [_restriction(row, now) for row in rows]
            if not policy.known:
                for each in wanted:
                    self._bad.add(int(each.id), errors.UnknownUser(username))
                continue
            present = policy.restrictions
            judged = rules.judge_additions(
                username, present, wanted, per_user=per_user, now=now, **self._modes
            )
            self.users += 1
            self.newly += not present
            self.added += len(judged.adds)
            self.skipped += len(judged.kept)
            self.ended += len(judged.ends)
            lines = {each.addresses: each.id for each in reversed(wanted)}  # the first of each
            for each, error in judged.refused:
                twice = isinstance(error, errors.DuplicateRestriction) and error.found == "row"
                where = f", first on line {lines[each.addresses]}" if twice else ""
                self._bad.add(int(each.id), f"{error}{where}")
            if self._effects is not None:
                gone = {each.id for each in judged.ends}
                left = [*(each for each in present if each.id not in gone), *judged.adds]
                found = rules.impact(present, left, now)
                changed = (", ".join(map(str, each)) for each in (found.gained, found.lost))
                direction = found.direction.name.lower()
                self._effects.add((username, direction, *changed, found.summary))

    def show(self, out: Output) -> None:
        """Show what the rows would do to each user."""
        assert self._effects is not None
        effects = self._effects.rows("SELECT * FROM rows ORDER BY username")
        if out.as_json:
            counts = ("added", "skipped", "ended", "users", "newly")
            rest = {"dry_run": True, **{name: getattr(self, name) for name in counts}}
            out.array("effects", map(_effect, effects), lambda: rest)
            return
        limit = _SHOWN if out.rich else self.users
        out.table(_EFFECTS, islice(effects, limit))
        if limit < self.users:
            out.note(f"and {self.users - limit:,} more; pipe the output to see all of them")
        out.note(
            f"would add {self.added:,} restrictions to {self.users:,} users, of whom"
            f" {self.newly:,} are not restricted now; {self.ended:,} present ones would end;"
            f" {self.skipped:,} rows exist already; nothing was changed"
        )


def _effect(row: tuple[str, ...]) -> dict[str, object]:
    username, direction, gained, lost, summary = row
    several = {"gained": gained, "lost": lost}
    return {
        "username": username,
        "direction": direction,
        **{name: text.split(", ") if text else [] for name, text in several.items()},
        "summary": summary,
    }


@contextmanager
def _checked(
    context: Context,
    store: RestrictionStore,
    flow: Workflow,
    stream: BinaryIO,
    path: str,
    kind: Format | None,
    modes: Mapping[str, bool],
    *,
    effects: bool = False,
) -> Iterator[_Check]:
    """Check every row of a file, or raise `BadRows`; with `effects`, find what they would do."""
    bad = BadRows(path)
    columns = "username TEXT, line INTEGER, first BLOB, last BLOB, label TEXT, expires"
    with Spool(columns) as spool, Spool(", ".join(_EFFECTS)) as found:
        with _files.progress(context.out, "checking", stream) as advance:
            for line, row in _files.rows(stream, path, kind, _COLUMNS, bad.add, advance):
                try:
                    wanted = flow.check_row(READER, _values(row))
                except errors.IPGuardError as exc:
                    bad.add(line, exc)
                    continue
                end = None if wanted.expires_at is None else wanted.expires_at.isoformat()
                spool.add((wanted.username, line, *wanted.addresses.packed, wanted.label, end))
        result = _Check(bad, modes, found if effects else None)
        result.compare(store, flow, spool)
        bad.raise_if_any()
        yield result


def _by_user(store: RestrictionStore, spool: Spool) -> Iterator[tuple[str, Policy, Iterator[Any]]]:
    """Yield each username of the rows, in order, with its policy and its rows."""
    spool.rows("CREATE INDEX by_name ON rows (username, line)")
    ((count,),) = spool.rows("SELECT count(DISTINCT username) FROM rows")
    names = (name for (name,) in spool.rows("SELECT DISTINCT username FROM rows ORDER BY username"))
    policies = map(store.load_policy, names) if count <= _FEW else _policies(store, names)
    rows = spool.rows(f"{_SELECT} ORDER BY username, line")
    for username, of_user in groupby(rows, lambda row: row[0]):
        yield username, next(policies), of_user


def _restriction(row: tuple[Any, ...], now: datetime) -> Restriction:
    """Return the restriction of a spooled row; its id is the line."""
    username, line, first, last, label, expires = row
    return Restriction(
        id=str(line),
        username=username,
        addresses=AddressRange.from_packed(first, last),
        label=label,
        created_at=now,
        created_by="",
        expires_at=_time(expires),
    )


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _policies(store: RestrictionStore, names: Iterator[str]) -> Iterator[Policy]:
    """Yield the policy of each user, in one walk over the store; the names are in order."""
    users = pages(partial(store.overview, Actor.EVERY_ACCOUNT), "after")
    found = next(users, None)
    for name in names:
        while found is not None and found.user.username < name:
            found = next(users, None)
        if found is not None and found.user.username == name:
            held, known = found.restrictions, not found.removed
        else:
            held, known = (), False
        yield Policy(revision=0, restrictions=held, known=known)


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
    if output:
        done = {"file": os.path.abspath(output), "rows": count, "revision": revision}  # noqa: PTH100
        context.out.data(done | {"expired": expired, "users_left_out": left_out})
        context.out.line(f"{count:,} restrictions of revision {revision}: {output}", "green")
        if context.out.as_json:
            return
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
        return lambda restriction: target.write(dumps(restriction) + "\n")
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(_EXPORTED)
    cells = attrgetter(*_EXPORTED)
    return lambda restriction: writer.writerow(
        "" if cell is None else plain(cell) for cell in cells(restriction)
    )


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
