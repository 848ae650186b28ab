"""The exit codes, and how errors map to them. docs/cli.md lists both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from enum import IntEnum
from typing import Any, Final

from ipguard import errors


class Exit(IntEnum):
    """The exit codes of the process."""

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


# The first class that matches decides.
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
    """An error that ends the command with one line and an exit code.

    Attributes:
        code: The exit code.
        kind: Its type in JSON: the class of the library's error, or the name of the exit code.
        message: The error message.
        hint: What to do, or "".
        details: The attributes of the library's error, for JSON.
        rows: The bad rows of a file, each with `line` and `reason`; None if it is not about rows.
    """

    rows: Iterable[Mapping[str, Any]] | None = None

    def __init__(
        self,
        code: Exit,
        message: str,
        hint: str = "",
        *,
        kind: str = "",
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind or code.name.lower()
        self.message = message
        self.hint = hint
        self.details = details or {}


_IDS: Final = "`ipguard list` shows ids, in a terminal or with --json"
_MAKE_STORE: Final = "`ipguard init` makes a new store"
_HINTS: Final[dict[type[Exception], str]] = {
    errors.NumberExpired: "`ipguard resend` sends a new number",
    errors.NumberFormatError: "run `ipguard confirm` again and type the number from the mail",
    errors.LockoutRisk: "--allow-lockout accepts that",
    errors.OpeningRisk: "--allow-open accepts that",
    errors.UnknownUser: "`ipguard users list --search` finds users",
    errors.UnknownRequest: _IDS,
    errors.UnknownRestriction: _IDS,
    errors.DeliveryError: "the request is pending: run `ipguard resend` once mail works",
}


def problem_of(error: errors.IPGuardError) -> Problem:
    """Translate one of the library's errors."""
    details = {
        name: value.total_seconds() if isinstance(value, timedelta) else value
        for name, value in vars(error).items()
        if not name.startswith("_") and name not in ("reason", "hint")
    }
    code = next(code for kind, code in ERRORS if isinstance(error, kind))
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
            return "commands that list or change users need the writer role; see `ipguard doctor`"
    return _HINTS.get(type(error), "")
