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


class Problem(Exception):
    """An error that ends the command with one line and an exit code.

    In JSON, `kind` is its type: the class of the library's error, or the name of the exit code.
    `details` are the attributes of the library's error.
    """

    rows: Iterable[Mapping[str, Any]] | None = None
    """The bad rows of a file, each with `line` and `reason`."""

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
            return "commands that list or change users need the writer role; see `ipguard doctor`"
    return _HINTS.get(type(error), "")
