"""Write results as tables, lines or JSON to stdout; write notes, questions and errors to stderr.

docs/cli.md lists the exit codes, and how errors map to them.

Text from a store or a file is escaped before it is shown: names could contain control characters
that move the cursor or reverse the direction of text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from enum import IntEnum
from functools import partial
from itertools import chain, islice
from typing import Any, Final, TypeVar

import attrs

from ipguard import errors
from ipguard.addresses import AddressRange, AddressSet
from ipguard.model import Direction, Page, PendingRequest

T = TypeVar("T")
Cell = str | int | bool | datetime | AddressRange | None | Sequence[str]
BATCH: Final = 1000
"""How many entries are read, or laid out as one table, at a time: the workflow's largest page."""


# -- errors --------------------------------------------------------------------------------------


class Exit(IntEnum):
    OK = 0
    NOT_ALLOWED = 1
    USAGE = 2
    REFUSED = 3
    UNKNOWN = 4
    NUMBER = 5
    UNAVAILABLE = 6
    CONFIG = 7
    MAIL = 8
    FILE = 9
    NOT_CONFIRMED = 10
    UNHEALTHY = 11
    DEFECT = 70
    INTERRUPTED = 130
    PIPE = 141


# The first line that matches decides.
ERRORS: Final[tuple[tuple[Exit, tuple[type[errors.IPGuardError], ...]], ...]] = (
    (Exit.NUMBER, (errors.WrongNumber, errors.NumberExpired, errors.NumberFormatError)),
    (Exit.NUMBER, (errors.RequestClosed, errors.TooManyAttempts)),
    (Exit.UNKNOWN, (errors.UnknownUser, errors.UnknownRequest, errors.UnknownRestriction)),
    (Exit.NOT_CONFIRMED, (errors.LockoutRisk, errors.OpeningRisk)),
    (Exit.MAIL, (errors.DeliveryError,)),
    (Exit.CONFIG, (errors.StoreConfigError, errors.SchemaVersionError)),
    (Exit.UNAVAILABLE, (errors.StoreError,)),
    (Exit.REFUSED, (errors.IPGuardError,)),
)


@attrs.define(eq=False, slots=False)
class Problem(Exception):
    """An error that ends the command with one line and an exit code.

    In JSON, `kind` is its type: the class of the library's error, or the name of the exit code.
    `details` are the attributes of the library's error. `rows` are the bad rows of a file, each
    with `line` and `reason`.
    """

    code: Exit
    message: str
    hint: str = ""
    kind: str = attrs.field(kw_only=True)
    details: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    rows: Iterable[Mapping[str, Any]] | None = attrs.field(default=None, init=False)

    @kind.default
    def _code_name(self) -> str:
        return self.code.name.lower()


_IDS: Final = "`ipguard list` shows ids, in a terminal or with --json"
_MAKE_STORE: Final = "`ipguard init` makes a new store"
_HINTS: Final[dict[type[Exception], str]] = {
    errors.NumberExpired: "`ipguard resend` sends a new number",
    errors.NumberFormatError: "run `ipguard confirm` again and type the number from the mail",
    errors.LockoutRisk: "--allow-lockout accepts that",
    errors.OpeningRisk: "--allow-open accepts that",
    errors.DirectionChanged: "`ipguard cancel` withdraws it",
    errors.TooSoon: "after that, `ipguard resend` mails a number if one is needed",
    errors.UnknownUser: "`ipguard users list --search` finds users",
    errors.UnknownRequest: _IDS,
    errors.UnknownRestriction: _IDS,
    errors.DeliveryError: "the request is pending: run `ipguard resend` once mail works",
}


def problem_of(error: errors.IPGuardError) -> Problem:
    details = {
        name: _field(value)
        for name, value in vars(error).items()
        if not name.startswith("_") and name not in ("reason", "hint")
    }
    code = next(code for code, kinds in ERRORS if isinstance(error, kinds))
    return Problem(code, str(error), kind=type(error).__name__, hint=_hint(error), details=details)


def _hint(error: errors.IPGuardError) -> str:
    if isinstance(error, errors.SchemaVersionError):
        if error.found is None:
            return _MAKE_STORE
        return "`ipguard migrate` updates it" if error.found < error.needed else ""
    if isinstance(error, errors.StoreConfigError):
        if "No such file" in str(error):
            return _MAKE_STORE
        if "permission denied" in str(error):
            return (
                "commands that list or change users need the writer role, and `prune` the owner's;"
                " see `ipguard doctor`"
            )
    if isinstance(error, errors.DuplicateRestriction) and error.differs:
        return "`ipguard request --replaces` edits it" if error.found == "restriction" else _IDS
    return _HINTS.get(type(error), "")


# -- output --------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Return text on one line, with all characters escaped that are not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(value: Any) -> Any:
    """Convert one of the library's values, but not those in it, to what JSON can hold."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, AddressSet):
        return list(value)
    if isinstance(value, AddressRange) or not attrs.has(type(value)):
        return str(value)
    found = {each.name: _field(getattr(value, each.name)) for each in attrs.fields(type(value))}
    if isinstance(value, PendingRequest):
        found |= {"ready_at": value.ready_at, "approvals": value.approved_by}
    return found


def _field(value: Any) -> Any:
    """Convert what JSON would write in another way: a direction in words, a duration in seconds."""
    if isinstance(value, Direction):
        return value.name.lower()
    return value.total_seconds() if isinstance(value, timedelta) else value


dumps: Final = partial(json.dumps, default=plain)


class Output:
    """The output of a command: JSON, or text for people."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.rich = not as_json and sys.stdout.isatty()  # a terminal that shows tables

    def data(self, value: Any) -> None:
        """Write a value as one line of JSON; omitted from text for people.

        It is in ASCII, which is safe on every terminal.
        """
        if self.as_json:
            self.raw(dumps(value) + "\n")

    def array(self, name: str, items: Iterable[Any], rest: Callable[[], dict[str, Any]]) -> None:
        """Write a JSON object with a streamed array and, once it has been written, the rest."""
        self.raw(f'{{"{name}": [')
        for number, item in enumerate(items):
            self.raw((", " if number else "") + dumps(item))
        self.raw(f"], {dumps(rest())[1:]}\n")

    def listing(
        self,
        name: str,
        columns: Sequence[str],
        items: Iterator[T],
        cells: Callable[[T], Sequence[Cell]],
        *,
        limit: int | None,
        option: str,
    ) -> bool:
        """Write items, as they are read, up to a limit; return whether there was one.

        `name` is that of the array in JSON. An item's first cell is the value of the `option` that
        continues a listing after it.
        """
        last: list[T] = []

        def shown() -> Iterator[T]:
            for item in islice(items, limit):
                last[:] = [item]
                yield item

        def following() -> object:
            return cells(last[0])[0] if last and next(items, None) is not None else None

        # Read the first item now, so that an error is raised before anything is written.
        iterator = shown()
        found = chain(list(islice(iterator, 1)), iterator)
        if self.as_json:
            self.array(name, found, lambda: {"next": following()})
            return True
        self.table(columns, map(cells, found))
        if (after := following()) is not None:
            self.note(f"there are more: {option} {after}, or --all")
        return bool(last)

    def raw(self, text: str) -> None:
        sys.stdout.write(text)

    def line(self, text: str, style: str = "") -> None:
        """Write a sentence for people; omitted from JSON output."""
        if self.as_json:
            return
        if self.rich and style:
            from rich.text import Text

            self._print(Text(clean(text), style))
        else:
            self.raw(clean(text) + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Write rows, as tables in a terminal, else separated by tabs; omitted from JSON output."""
        if self.as_json:
            return
        if not self.rich:
            self.raw("\t".join(columns) + "\n")
            for row in rows:
                self.raw("\t".join(clean(_text(cell, ", ")) for cell in row) + "\n")
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        # A table knows its widths only once it has all of its rows, so lay out a batch at a time.
        iterator = iter(rows)
        while some := list(islice(iterator, BATCH)):
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for name in columns:
                table.add_column(name.replace("_", " ").capitalize(), overflow="fold")
            for row in some:
                table.add_row(*(Text(_terminal_text(cell)) for cell in row))
            self._print(table)

    @staticmethod
    def _print(renderable: Any) -> None:
        from rich.console import Console

        Console(highlight=False, markup=False, emoji=False).print(renderable)

    def note(self, text: str) -> None:
        """Write a note that is not part of the result."""
        self._err(f"ipguard: {clean(text)}\n")

    def fail(self, problem: Problem) -> Exit:
        """Report the error that ends the command, and return its exit code."""
        if self.as_json:
            error = {
                "type": problem.kind,
                "message": problem.message,
                "exit": int(problem.code),
                "hint": problem.hint,
                "details": problem.details,
            }
            text = dumps({"error": error})
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

    def confirm(self, outcome: str, option: str) -> None:
        """Ask whether to accept the outcome of a change; abort unless the answer is yes.

        Without a terminal, abort with a hint at the option that accepts the outcome.
        """
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            hint = f"{option} accepts that"
            raise Problem(Exit.NOT_CONFIRMED, outcome, hint, kind="NotConfirmed")
        self._err(f"{clean(outcome).removesuffix('.')}. Continue? [y/N] ")
        sys.stderr.flush()  # the line has no end yet, so a terminal would not show it
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Problem(Exit.NOT_CONFIRMED, "nothing was changed", kind="NotConfirmed")

    @staticmethod
    def _err(text: str, *, flush: bool = True) -> None:
        if flush:  # a terminal then shows both streams in order
            sys.stdout.flush()
        sys.stderr.write(text)


def missing(request: PendingRequest, now: datetime) -> list[str]:
    """Return what a pending request still has to meet, in words."""
    demand, found = request.demand, []
    if request.ready_at > now:
        found.append(f"waits until {request.ready_at:%Y-%m-%d %H:%M:%S} UTC")
    if demand.approvals:
        found.append(f"has {len(request.approvals)} of {demand.approvals} approvals")
    if demand.number:
        found.append("its number was accepted" if request.numbered else "needs its number")
    return found


def pages(
    read: Callable[..., Page[T]], name: str, cursor: object = None, limit: int | None = None
) -> Iterator[T]:
    """Yield the items of page after page; `name` is the argument of `read` for the cursor."""
    size = BATCH if limit is None else min(BATCH, limit + 1)
    while True:
        page = read(limit=size, **{name: cursor})
        yield from page
        if page.next is None:
            return
        cursor = page.next


def _text(cell: Cell, separator: str) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return "yes" if cell else "no"
        case datetime():
            return cell.isoformat()
        case list() | tuple():
            return separator.join(cell)
        case _:
            return str(cell)


def _terminal_text(cell: Cell) -> str:
    if isinstance(cell, datetime):
        return f"{cell:%Y-%m-%d %H:%M:%S} UTC"
    if isinstance(cell, (list, tuple)):
        return "\n".join(map(clean, cell))
    return clean(_text(cell, ""))
