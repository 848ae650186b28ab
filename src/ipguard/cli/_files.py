"""Read CSV and JSON Lines files row by row, report every bad row, and show progress.

Memory use does not depend on the size of the file: one row is held at a time, lines are limited to
1 MiB, and bad rows are spooled to disk.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Self, cast

import attrs
from typer import Argument, Option

from ipguard.cli._output import Exit, Output, Problem
from ipguard.errors import shorten


class Format(StrEnum):
    CSV = "csv"
    JSONL = "jsonl"


FormatOption = Annotated[
    Format | None, Option("--format", help="File format.  [default: by the file's name, else csv]")
]
FileArgument = Annotated[str, Argument(help="A CSV or JSON Lines file; - is standard input.")]
_LINE_LIMIT: Final = 2**20

Row = dict[str, str]
UNCHANGED: Final = "nothing was changed"


@attrs.frozen(kw_only=True)
class Columns:
    """The columns of a file.

    Attributes:
        what: What the rows of the file are.
        required: Columns that must have a value in each row.
        optional: Columns that may be missing or empty.
        ignored: Other columns that are accepted, because an export has them.
        lenient: Ignore any other column, and accept empty values in required ones.
        partial: Accept empty values in required columns.
    """

    what: str
    required: Sequence[str]
    optional: Sequence[str] = ()
    ignored: Sequence[str] = ()
    lenient: bool = False
    partial: bool = False

    def used(self, name: str) -> bool:
        return name in self.required or name in self.optional

    def fault(self, names: Sequence[str]) -> str | None:
        """Return why a row cannot have these column names, or None."""
        for name in self.required:
            if name not in names:
                return f"there is no {name}"
        known = (*self.required, *self.optional, *self.ignored)
        for at, name in enumerate(names):
            if name not in known and not self.lenient:
                return f"{shorten(name)} is not a column; the columns are {', '.join(known)}"
            if name in names[:at] and self.used(name):
                return f"{name} is there twice"
        return None


def format_of(path: str, given: Format | None) -> Format:
    """Return the given format, or else the one that the file's name implies."""
    json_names = (".jsonl", ".ndjson", ".json")
    return given or (Format.JSONL if path.lower().endswith(json_names) else Format.CSV)


@contextmanager
def opened(path: str, *, rewindable: bool = False) -> Iterator[BinaryIO]:
    """Open a file, or standard input for `-`; with `rewindable`, copy a pipe to a file first."""
    with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as stream:
        if not rewindable or stream.seekable():
            yield stream
            return
        import shutil
        import tempfile

        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            copy.seek(0)
            yield cast("BinaryIO", copy)


class Spool:
    """Rows in a temporary SQLite database on disk, in a table `rows` with these columns."""

    def __init__(self, columns: str) -> None:
        import sqlite3

        self._db = sqlite3.connect("", isolation_level=None)  # a nameless temporary file
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute(f"CREATE TABLE rows ({columns})")
        marks = ", ".join("?" * len(columns.split(",")))
        self._insert = f"INSERT INTO rows VALUES ({marks})"  # noqa: S608 - only marks
        self._db.execute("BEGIN")

    def add(self, row: tuple[object, ...]) -> None:
        self._db.execute(self._insert, row)

    def rows(self, query: str) -> Iterator[Any]:
        return iter(self._db.execute(query))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()


class BadRows(Problem):
    """The error that lists the bad rows of a file; `outcome` says what was done with the rest."""

    def __init__(self, path: str, outcome: str = UNCHANGED) -> None:
        super().__init__(Exit.FILE, "", kind="BadRows")
        self._path = path
        self.outcome = outcome
        self._spool: Spool | None = None
        self.count = 0

    def add(self, line: int, reason: object) -> None:
        """Add a bad row, which starts on this line, counted from 1."""
        if self._spool is None:
            self._spool = Spool("line INTEGER, reason TEXT")
        self.count += 1
        self._spool.add((line, str(reason).encode("utf-8", "backslashreplace").decode()))

    def raise_if_any(self) -> None:
        if self._spool is not None:
            rows = "row" if self.count == 1 else "rows"
            self.message = f"{self._path}: {self.count:,} bad {rows}; {self.outcome}"
            self.rows = self._read(self._spool)
            raise self

    @staticmethod
    def _read(spool: Spool) -> Iterator[Mapping[str, Any]]:
        with spool:
            for line, reason in spool.rows("SELECT line, reason FROM rows ORDER BY line, rowid"):
                yield {"line": line, "reason": reason}


def rows(
    stream: BinaryIO,
    path: str,
    kind: Format | None,
    columns: Columns,
    reject: Callable[[int, str], object],
    advance: Callable[[int], object],
) -> Iterator[tuple[int, Row]]:
    """Yield the line that each good row starts on, and its values that are not empty.

    Call `reject` for each bad row with its line and fault, and `advance` for each line with its
    size in bytes. Raise Problem if it is probably the wrong file: it has other columns, or no rows.
    """
    lines = _Lines(stream, advance)
    read = _csv_rows if format_of(path, kind) is Format.CSV else _json_rows
    empty = True
    for line, row in read(lines, columns):
        empty = False
        if isinstance(row, str):
            reject(line, row)
            continue
        missing = [name for name in columns.required if name not in row]
        if missing and not (columns.lenient or columns.partial):
            reject(line, f"{missing[0]}: is missing")
        else:
            yield line, row
    if empty:
        name = "standard input" if path == "-" else path
        raise Problem(Exit.FILE, f"{name} holds no {columns.what}")


class _Lines:
    """The lines of a file as text, numbered from 1."""

    def __init__(self, stream: BinaryIO, advance: Callable[[int], object]) -> None:
        self._stream = stream
        self._advance = advance
        self.number = 0
        self.fault: str | None = None  # of the lines since the last call of `take_fault`

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(_LINE_LIMIT):
            self.number += 1
            size = len(line)
            if size == _LINE_LIMIT and not line.endswith(b"\n"):
                self.fault = f"the line has more than {_LINE_LIMIT} bytes"
                while more := self._stream.readline(_LINE_LIMIT):
                    size += len(more)
                    if more.endswith(b"\n"):
                        break
                line = b"\n"
            if self.number == 1:
                line = _without_mark(line)
            try:
                text = line.decode()
            except UnicodeDecodeError:
                self.fault = "it is not UTF-8"
                text = line.decode(errors="replace")
            self._advance(size)
            yield text

    def take_fault(self) -> str | None:
        """Return and clear `fault`."""
        fault, self.fault = self.fault, None
        return fault


def _without_mark(line: bytes) -> bytes:
    """Remove the byte order mark from the first line; refuse UTF-16, called "Unicode text"."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        hint = "save it as UTF-8; in Excel: CSV UTF-8 (comma delimited)"
        raise Problem(Exit.FILE, "the file is not UTF-8 but UTF-16 or UTF-32", hint)
    return line.removeprefix(b"\xef\xbb\xbf")


# Both readers yield the line and either the row or its fault.
def _csv_rows(lines: _Lines, columns: Columns) -> Iterator[tuple[int, Row | str]]:
    reader = csv.reader(iter(lines), strict=True)
    names = _header(lines, reader, columns)
    count, used = len(names), [columns.used(name) for name in names]
    while True:
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            yield start, lines.take_fault() or f"it is not CSV: {exc}"
            continue
        if fault := lines.take_fault():
            yield start, fault
            continue
        if not any(cell.strip() for cell in cells):
            continue  # spreadsheets append rows of empty cells
        if not any(cells[count:]):
            del cells[count:]
        if len(cells) != count:
            yield start, f"it has {len(cells)} columns, and the first line has {count}"
        elif any(cell and not name for name, cell in zip(names, cells, strict=True)):
            yield start, "it has a value in a column without a name"
        else:
            named = zip(names, cells, used, strict=True)
            yield start, {name: cell for name, cell, use in named if cell and use}


def _header(lines: _Lines, reader: Iterator[list[str]], columns: Columns) -> list[str]:
    try:
        names = [name.strip().lower() for name in next(reader)]
    except StopIteration:
        raise Problem(Exit.FILE, "the file is empty") from None
    except csv.Error as exc:
        raise Problem(Exit.FILE, f"line 1: it is not CSV: {exc}") from None
    # Spreadsheets append empty columns too.
    fault = lines.take_fault() or columns.fault([name for name in names if name])
    if fault and len(names) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs")):
            if mark in names[0]:
                fault = f"its columns are separated by {name}, not by commas"
    if fault is not None:
        hint = "the first line names the columns: "
        hint += ",".join((*columns.required, *columns.optional))
        raise Problem(Exit.FILE, f"line 1: {fault}", hint)
    return names


def _json_rows(lines: _Lines, columns: Columns) -> Iterator[tuple[int, Row | str]]:
    for line in lines:
        if fault := lines.take_fault():
            yield lines.number, fault
        elif not line.isspace():
            yield lines.number, _json_row(line, columns)


def _json_row(line: str, columns: Columns) -> Row | str:
    try:
        found: Any = json.loads(line, object_pairs_hook=tuple)  # arrays are lists
    except (ValueError, RecursionError) as exc:
        return f"it is not JSON: {type(exc).__name__}"
    if not isinstance(found, tuple):
        return "it is not a JSON object"
    names = Counter(name for name, _ in found)
    if len(names) < len(found):  # JSON leaves open which value counts
        return f"{shorten(names.most_common(1)[0][0])} is there twice"
    if fault := columns.fault(list(names)):
        return fault
    row = {}
    for name, value in found:
        if not columns.used(name) or value is None or value == "":
            continue
        if not isinstance(value, str):
            return f"{name} is not text"
        row[name] = value
    return row


@contextmanager
def progress(
    out: Output, what: str, stream: BinaryIO | None = None, *, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show progress in a terminal; yield a function to call for each row with its size in bytes."""
    if hidden or out.as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    size = os.fstat(stream.fileno()).st_size if stream and stream.seekable() else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if size else ""),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=size, rows=0)
        done = rows = 0

        def advance(count: int) -> None:
            nonlocal done, rows
            done, rows = done + count, rows + 1
            if done == size:
                applying = f"{what}: file read, applying"
                bar.update(task, completed=done, rows=rows, description=applying)
            elif rows % 500 == 0:
                bar.update(task, completed=done, rows=rows)

        yield advance
        bar.update(task, completed=done, rows=rows)
