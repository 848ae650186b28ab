"""What the commands with whole files share: all bad rows are named, and progress is shown."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from json import dumps, loads
from typing import IO, Any, BinaryIO

from ipguard.cli._codes import Exit, Problem
from ipguard.cli._output import Output


class BadRows(Problem):
    """Rows that cannot be used, however many: they are kept in a file, not in memory.

    Attributes:
        count: How many.
    """

    def __init__(self, path: str) -> None:
        super().__init__(Exit.FILE, "", kind="BadRows")
        self._path = path
        self._file: IO[str] | None = None
        self.count = 0

    def add(self, line: int, reason: object) -> None:
        """Note a line, counted from 1, and why it cannot be used."""
        if self._file is None:
            self._file = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 - see _read
        self.count += 1
        self._file.write(dumps({"line": line, "reason": str(reason)}) + "\n")

    def raise_if_any(self) -> None:
        """Raise this, if there is any."""
        if self._file is not None:
            rows = "row" if self.count == 1 else "rows"
            self.message = f"{self._path}: {self.count:,} bad {rows}; nothing was changed"
            self.rows = self._read(self._file)
            raise self

    @staticmethod
    def _read(file: IO[str]) -> Iterator[Mapping[str, Any]]:
        with file:
            file.seek(0)
            yield from map(loads, file)


@contextmanager
def progress(out: Output, what: str, stream: BinaryIO) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how much of a file has been read.

    Yields:
        What to tell the number of bytes that were read.
    """
    if out.as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    size = _size(stream)
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

        def tell(count: int) -> None:
            nonlocal done, rows
            done, rows = done + count, rows + 1
            if rows % 500 == 0:
                bar.update(task, completed=done, rows=rows)

        yield tell
        bar.update(task, completed=done, rows=rows)


def _size(stream: BinaryIO) -> int | None:
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
