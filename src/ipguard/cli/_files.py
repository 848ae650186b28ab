"""Reading CSV and JSON Lines as they come from people: row by row, each problem with its line.

Nothing is held but one row, and no line is longer than 1 MiB.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import attrs
import typer

from ipguard.cli._codes import Exit, Problem
from ipguard.errors import shorten

FileOption = Annotated[
    str | None, typer.Option("--format", metavar="csv|jsonl", help="Of the file.")
]
FORMATS: Final = ("csv", "jsonl")
_LINE_AT_MOST: Final = 2**20
_SUFFIXES: Final = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}

Row = dict[str, str]


@attrs.frozen(kw_only=True)
class Columns:
    """What a row has.

    Attributes:
        needed: The columns that must be there.
        allowed: Those that may.
        ignored: Those that may, and are not looked at: an export has them.
        others: Whether any others may be there, and are not looked at.
    """

    needed: Sequence[str]
    allowed: Sequence[str] = ()
    ignored: Sequence[str] = ()
    others: bool = False

    def used(self, name: str) -> bool:
        """Tell whether a column is looked at."""
        return name in self.needed or name in self.allowed

    def wrong(self, names: Sequence[str]) -> str | None:
        """Say what is wrong with the names of a row, or None."""
        for name in self.needed:
            if name not in names:
                return f"there is no {name}"
        known = (*self.needed, *self.allowed, *self.ignored)
        for at, name in enumerate(names):
            if name not in known and not self.others:
                return f"{shorten(name)} is no column; there is {', '.join(known)}"
            if name in names[:at] and self.used(name):
                return f"{name} is there twice"
        return None


class BadRow:
    """A line that is no row.

    Attributes:
        reason: Why.
    """

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


def format_of(path: str, asked: str | None) -> str:
    """Return `csv` or `jsonl`: what was asked for, or what the file's name says."""
    if asked is not None and asked not in FORMATS:
        raise Problem(Exit.USAGE, f"--format is {' or '.join(FORMATS)}")
    return asked or _SUFFIXES.get(Path(path).suffix.lower(), "csv")


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading; `-` is standard input."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with Path(path).open("rb") as stream:
        yield stream


def holds_no(path: str, what: str) -> Problem:
    """Return what to end with where a file has no row: most likely it is not the one meant."""
    return Problem(Exit.FILE, f"{'standard input' if path == '-' else path} holds no {what}")


def rows(
    stream: BinaryIO,
    kind: str,
    columns: Columns,
    tell: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[int, Row | BadRow]]:
    """Read rows.

    Args:
        stream: The file.
        kind: `csv`, whose first line names the columns, or `jsonl`.
        columns: What a row has.
        tell: Is told how many bytes were read, line by line.

    Yields:
        The number of the line that a row begins on, and the row: text without what is empty; or why
        it is none.

    Raises:
        Problem: The file as a whole cannot be read: its columns are others.
    """
    lines = _Lines(stream, tell)
    read = _csv_rows if kind == "csv" else _json_rows
    return read(lines, columns)


class _Lines:
    """The lines of a file as text.

    Attributes:
        number: The line that was read last, from 1.
        bad: Why that line cannot be used, or None.
    """

    def __init__(self, stream: BinaryIO, tell: Callable[[int], object]) -> None:
        self._stream = stream
        self._tell = tell
        self.number = 0
        self.bad: str | None = None

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(_LINE_AT_MOST):
            self.number += 1
            size = len(line)
            if size == _LINE_AT_MOST and not line.endswith(b"\n"):
                self.bad = f"it has more than {_LINE_AT_MOST} bytes"
                while more := self._stream.readline(_LINE_AT_MOST):
                    size += len(more)
                    if more.endswith(b"\n"):
                        break
                line = b"\n"
            if self.number == 1:
                line = _begun(line)
            try:
                text = line.decode()
            except UnicodeDecodeError:
                self.bad = "it is not UTF-8"
                text = line.decode(errors="replace")
            self._tell(size)
            yield text

    def take_bad(self) -> str | None:
        """Return why the lines read since the last time cannot be used, or None."""
        bad, self.bad = self.bad, None
        return bad


def _begun(line: bytes) -> bytes:
    """Return the first line of a file without its byte order mark.

    Raises:
        Problem: The file is UTF-16 or UTF-32, as some programs save "Unicode text".
    """
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        raise Problem(
            Exit.FILE,
            "the file is not UTF-8 but UTF-16 or UTF-32",
            hint="save it as UTF-8; in Excel: CSV UTF-8 (comma delimited)",
        )
    return line.removeprefix(b"\xef\xbb\xbf")


def _csv_rows(lines: _Lines, columns: Columns) -> Iterator[tuple[int, Row | BadRow]]:
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
            yield start, BadRow(lines.take_bad() or f"it is not CSV: {exc}")
            continue
        bad = lines.take_bad()
        if bad is not None:
            yield start, BadRow(bad)
            continue
        if not any(cell.strip() for cell in cells):
            continue  # spreadsheets append rows of empty cells
        if not any(cells[count:]):
            del cells[count:]
        if len(cells) != count:
            yield start, BadRow(f"it has {len(cells)} columns, and the first line has {count}")
        elif any(cell and not name for name, cell in zip(names, cells, strict=True)):
            yield start, BadRow("it has a value in a column without a name")
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
    wrong = lines.take_bad() or columns.wrong([name for name in names if name])
    if wrong and len(names) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs")):
            if mark in names[0]:
                wrong = f"its columns are separated by {name}, not by commas"
    if wrong is not None:
        raise Problem(
            Exit.FILE,
            f"line 1: {wrong}",
            hint="the first line names the columns: "
            + ",".join((*columns.needed, *columns.allowed)),
        )
    return names


def _json_rows(lines: _Lines, columns: Columns) -> Iterator[tuple[int, Row | BadRow]]:
    for line in lines:
        bad = lines.take_bad()
        if bad is not None:
            yield lines.number, BadRow(bad)
        elif not line.isspace():
            yield lines.number, _object(line, columns)


class _Twice(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its members; readers of JSON differ in which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _object(line: str, columns: Columns) -> Row | BadRow:
    try:
        found: Any = json.loads(line, object_pairs_hook=_unambiguous)
    except _Twice as exc:
        return BadRow(f"{shorten(exc.name)} is there twice")
    except (ValueError, RecursionError) as exc:
        return BadRow(f"it is not JSON: {type(exc).__name__}")
    if not isinstance(found, dict):
        return BadRow("it is no JSON object")
    wrong = columns.wrong(list(found))
    if wrong is not None:
        return BadRow(wrong)
    row = {}
    for name, value in found.items():
        if not columns.used(name) or value is None or value == "":
            continue
        if not isinstance(value, str):
            return BadRow(f"its {name} is no text")
        row[name] = value
    return row
