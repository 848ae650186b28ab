"""What a command shows: tables for people, lines for programs, or JSON; errors to stderr.

Nothing that comes from a store or a file reaches a terminal as it is: a name may hold what moves
the cursor, or turns the direction of the text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from itertools import chain, islice
from json import dumps
from typing import Any, Final, TypeVar

import attrs

from ipguard.addresses import AddressRange
from ipguard.cli._codes import Exit, Problem

T = TypeVar("T")
Cell = str | int | bool | datetime | None | Sequence[str]


def clean(text: str) -> str:
    """Return text on one line in which every character is one to be seen."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(value: Any) -> Any:
    """Return one of the library's values as JSON has it: attributes as they are called there."""
    for kind, write in _WRITTEN:
        if isinstance(value, kind):
            return write(value)
    if attrs.has(type(value)):
        names = (field.name for field in attrs.fields(type(value)))
        return {name: plain(getattr(value, name)) for name in names}
    return value


_WRITTEN: Final[tuple[tuple[Any, Callable[[Any], Any]], ...]] = (
    (AddressRange, str),
    (datetime, datetime.isoformat),
    (Enum, lambda member: member.value),
    (Mapping, lambda pairs: {name: plain(each) for name, each in pairs.items()}),
    ((tuple, list), lambda several: [plain(each) for each in several]),
)


class Output:
    """Where a command's results go.

    Args:
        as_json: Whether everything is JSON.

    Attributes:
        as_json: The same.
        rich: Whether a person looks at standard output.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.rich = not as_json and sys.stdout.isatty()

    # -- results ---------------------------------------------------------------------------------

    def data(self, value: Any) -> None:
        """Write one value as one line of JSON, in ASCII: it is safe on every terminal."""
        self.raw(dumps(plain(value)) + "\n")

    def raw(self, text: str) -> None:
        """Write text as it stands."""
        sys.stdout.write(text)

    @staticmethod
    def flush() -> None:
        """Let who reads see what has been written so far."""
        sys.stdout.flush()

    def line(self, text: str, style: str = "") -> None:
        """Write a sentence for people; nothing where JSON is asked for."""
        if self.as_json:
            return
        if self.rich and style:
            from rich.text import Text

            self._console().print(Text(clean(text), style))
        else:
            self.raw(clean(text) + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Write rows: a table in a terminal, else lines of cells with tabs between them.

        Args:
            columns: Their names, as in JSON.
            rows: As many cells each; several values in a cell are a sequence.
        """
        if not self.rich:
            self.raw("\t".join(columns) + "\n")
            for row in rows:
                self.raw("\t".join(clean(_written(cell, ", ")) for cell in row) + "\n")
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(name.replace("_", " ").capitalize(), overflow="fold")
        for row in rows:
            # Cleaned line by line: the breaks between several values are ours.
            texts = (_shown(cell).split("\n") for cell in row)
            table.add_row(*(Text("\n".join(map(clean, lines))) for lines in texts))
        self._console().print(table)

    def _console(self) -> Any:
        from rich.console import Console

        return Console(highlight=False, markup=False, emoji=False)

    # -- beside them -----------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Tell the person something that is no result."""
        self._err(f"ipguard: {clean(text)}\n")

    def fail(self, problem: Problem) -> Exit:
        """Say why the command ends, and return what with."""
        if self.as_json:
            told = {
                "type": problem.kind,
                "message": problem.message,
                "exit": int(problem.code),
                "hint": problem.hint,
                "details": problem.details,
            }
            text = dumps({"error": plain(told)}, default=str)
            if problem.rows is not None:
                self._err(text.removesuffix("}}") + ', "rows": [')
                for number, row in enumerate(problem.rows):
                    self._err((", " if number else "") + dumps(row), flush=False)
                text = "]}}"
            self._err(text + "\n")
        else:
            for row in problem.rows or ():
                self._err(f"line {row['line']}: {clean(row['reason'])}\n", flush=False)
            hint = f" ({problem.hint})" if problem.hint else ""
            self.note(problem.message + hint)
        return problem.code

    def ask(self, question: str) -> bool | None:
        """Ask the person yes or no; None where nobody is there to be asked."""
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return None
        self._err(f"{clean(question)} [y/N] ")
        sys.stderr.flush()  # the line is not over, so a terminal would not show it yet
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @staticmethod
    def _err(text: str, *, flush: bool = True) -> None:
        if flush:  # so that a terminal shows both in their order
            sys.stdout.flush()
        sys.stderr.write(text)


def begun(items: Iterable[T]) -> Iterator[T]:
    """Return an iterator whose first item is there: what fails, fails before anything is shown."""
    iterator = iter(items)
    return chain(list(islice(iterator, 1)), iterator)


def _written(cell: Cell, between: str) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, datetime):
        return cell.isoformat()
    if isinstance(cell, (str, int)):
        return str(cell)
    return between.join(cell)


def _shown(cell: Cell) -> str:
    if isinstance(cell, datetime):
        return f"{cell:%Y-%m-%d %H:%M:%S} UTC"
    if isinstance(cell, str):
        return clean(cell)
    if not isinstance(cell, (bool, int, type(None))):
        cell = [clean(each) for each in cell]
    return _written(cell, "\n")
