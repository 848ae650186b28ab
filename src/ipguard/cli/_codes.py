"""The exit codes, and which of them an error is. docs/cli.md has both as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from enum import IntEnum
from typing import Any, Final

from ipguard import errors


class Exit(IntEnum):
    """What a process of ours ends with."""

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


# The first that fits.
ERRORS: Final[tuple[tuple[type[errors.IPGuardError], Exit], ...]] = (
    (errors.WrongNumber, Exit.NUMBER),
    (errors.NumberExpired, Exit.NUMBER),
    (errors.NumberFormatError, Exit.NUMBER),
    (errors.RequestClosed, Exit.NUMBER),
    (errors.TooManyAttempts, Exit.NUMBER),
    (errors.UnknownUser, Exit.UNKNOWN),
    (errors.UnknownRequest, Exit.UNKNOWN),
    (errors.UnknownRestriction, Exit.UNKNOWN),
    (errors.LockoutRisk, Exit.NOT_CONFIRMED),
    (errors.OpeningRisk, Exit.NOT_CONFIRMED),
    (errors.DeliveryError, Exit.MAIL),
    (errors.StoreConfigError, Exit.CONFIG),
    (errors.SchemaVersionError, Exit.CONFIG),
    (errors.StoreError, Exit.UNAVAILABLE),
    (errors.IPGuardError, Exit.REFUSED),
)


class Problem(Exception):
    """Something to end a command with: one line, and its exit code.

    Attributes:
        code: The exit code.
        kind: What it is called in JSON: the error's class, or a word of the command line's own.
        message: What is wrong.
        hint: What to do, or "".
        details: The error's own attributes, for JSON.
        rows: Which rows of a file are the matter, each with `line` and `reason`; None where none.
    """

    rows: Iterable[Mapping[str, Any]] | None = None

    def __init__(
        self,
        code: Exit,
        message: str,
        *,
        kind: str = "",
        hint: str = "",
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind or code.name.lower()
        self.message = message
        self.hint = hint
        self.details = details or {}


_IDS: Final = "ids are in brackets in `ipguard list` in a terminal, and in `ipguard list --json`"
_HINTS: Final[dict[type[Exception], str]] = {
    errors.NumberExpired: "`ipguard resend` sends a new number",
    errors.NumberFormatError: "run `ipguard confirm` again and type the number from the mail",
    errors.LockoutRisk: "--allow-lockout does it all the same",
    errors.OpeningRisk: "--allow-open does it all the same",
    errors.UnknownUser: "`ipguard users list --search` finds users",
    errors.UnknownRequest: _IDS,
    errors.UnknownRestriction: _IDS,
    errors.DeliveryError: "the request waits: `ipguard resend` once mail works",
}


def problem_of(error: errors.IPGuardError) -> Problem:
    """Translate one of the library's errors."""
    code = next(code for kind, code in ERRORS if isinstance(error, kind))
    hint = _HINTS.get(type(error), "")
    if isinstance(error, errors.SchemaVersionError):
        hint = "`ipguard init` makes a new store" if error.found is None else ""
        if error.found is not None and error.found < error.needed:
            hint = "`ipguard migrate` brings it up to date"
    if isinstance(error, errors.StoreConfigError) and "No such file" in str(error):
        hint = "`ipguard init` makes a new store"
    if isinstance(error, errors.StoreConfigError) and "permission denied" in str(error):
        hint = "`ipguard doctor` says what this role may; whatever shows names needs the writer's"
    details = {
        name: value.total_seconds() if isinstance(value, timedelta) else value
        for name, value in vars(error).items()
        if not name.startswith("_") and name not in ("reason", "hint")
    }
    return Problem(code, str(error), kind=type(error).__name__, hint=hint, details=details)
