"""What the commands with whole files share: all bad rows are named, and progress is shown."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Self, cast

from ipguard.cli._codes import Exit, Problem
from ipguard.cli._output import Output


class BadRows(Problem):
    """Rows that cannot be used, however many: they are kept on disk, not in memory.

    Args:
        path: The file that they are in, for the message.
        outcome: What their being there means.

    Attributes:
        count: How many.
    """

    def __init__(self, path: str, outcome: str = "nothing was changed") -> None:
        super().__init__(Exit.FILE, "", kind="BadRows")
        self._path = path
        self._outcome = outcome
        self._kept: Spool | None = None
        self.count = 0

    def add(self, line: int, reason: object) -> None:
        """Note a line, counted from 1, and why it cannot be used."""
        if self._kept is None:
            self._kept = Spool("line INTEGER, reason TEXT")
        self.count += 1
        text = str(reason).encode("utf-8", "backslashreplace").decode()
        self._kept.add((line, text))

    def raise_if_any(self) -> None:
        """Raise this, if there is any."""
        if self._kept is not None:
            rows = "row" if self.count == 1 else "rows"
            self.message = f"{self._path}: {self.count:,} bad {rows}; {self._outcome}"
            self.rows = self._read(self._kept)
            raise self

    @staticmethod
    def _read(kept: Spool) -> Iterator[Mapping[str, Any]]:
        with kept:
            for line, reason in kept.rows("SELECT line, reason FROM rows ORDER BY line, rowid"):
                yield {"line": line, "reason": reason}


class Spool:
    """Rows of a file on the way, in a database of their own on disk that nobody else sees.

    Args:
        columns: Of its one table, `rows`.
    """

    def __init__(self, columns: str) -> None:
        import sqlite3

        self._db = sqlite3.connect("", isolation_level=None)  # a nameless temporary file
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute(f"CREATE TABLE rows ({columns})")
        marks = ", ".join("?" * len(columns.split(",")))
        self._insert = f"INSERT INTO rows VALUES ({marks})"  # noqa: S608 - marks alone
        self._db.execute("BEGIN")

    def add(self, row: tuple[object, ...]) -> None:
        """Add a row."""
        self._db.execute(self._insert, row)

    def rows(self, query: str) -> Iterator[Any]:
        """Run a query over `rows`."""
        return iter(self._db.execute(query))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()


@contextmanager
def rewindable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Return a stream that can be read twice: what comes through a pipe is kept on disk."""
    if stream.seekable():
        yield stream
        return
    import shutil
    import tempfile

    with tempfile.TemporaryFile() as kept:
        shutil.copyfileobj(stream, kept)
        kept.seek(0)
        yield cast("BinaryIO", kept)


@contextmanager
def progress(
    out: Output, what: str, stream: BinaryIO | None = None
) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how much of a file has been read, or how many rows were written.

    Yields:
        What to tell each row, as the number of bytes that were read for it.
    """
    if out.as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    size = None if stream is None else _size(stream)
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
            if done == size:
                bar.update(
                    task, completed=done, rows=rows, description=f"{what}: read, now applied"
                )
            elif rows % 500 == 0:
                bar.update(task, completed=done, rows=rows)

        yield tell
        bar.update(task, completed=done, rows=rows)


def _size(stream: BinaryIO) -> int | None:
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
