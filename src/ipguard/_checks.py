"""Check the arguments of public calls: one function for each kind of value.

Each raises `InvalidValue` with the name of the argument. All but `check_callable` return the value.
"""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Final

from ipguard.errors import InvalidValue

_LONGEST: Final = 1e9  # seconds; some systems cannot wait longer for a lock
_LONGEST_DURATION: Final = timedelta(days=366)
# Line and paragraph separators break lines; the bidirectional controls can make "allow 1.2.3.4"
# read as something else on a page or in a mail.
_FORBIDDEN_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDI_CONTROLS: Final = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def check_text(name: str, value: object, limit: int, *, required: bool = False) -> str:
    """Check a line of text that is stored, mailed and shown; `limit` is in characters.

    Control characters are refused; with `required`, so is text that is empty or blank.
    """
    if not isinstance(value, str):
        raise InvalidValue(name, f"must be text, not {type(value).__name__}")
    if len(value) > limit:
        raise InvalidValue(name, f"has more than {limit} characters")
    if required and not value.strip():
        raise InvalidValue(name, "must not be empty")
    # Fast path: the unprintable characters of ASCII are exactly its control characters.
    plain = value.isascii() and value.isprintable()
    if not plain and any(
        c in _BIDI_CONTROLS or unicodedata.category(c) in _FORBIDDEN_CATEGORIES for c in value
    ):
        raise InvalidValue(name, "must not hold control characters")
    return value


def check_time(name: str, value: object) -> datetime:
    """Check an aware datetime and return it in UTC. A naive one is another moment on each host."""
    if not isinstance(value, datetime):
        raise InvalidValue(name, f"must be a datetime, not {type(value).__name__}")
    try:
        if value.utcoffset() is None:
            raise InvalidValue(name, "must be an aware datetime")
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidValue(name, "is outside the range of times in UTC") from None
    except InvalidValue:
        raise
    except Exception as exc:  # a custom tzinfo may raise anything
        raise InvalidValue(name, f"has a time zone that fails: {type(exc).__name__}") from exc


def check_duration(name: str, value: object, *, zero: bool = False) -> timedelta:
    """Check a timedelta from 0 to 366 days; 0 itself is accepted only with `zero`."""
    if not isinstance(value, timedelta):
        raise InvalidValue(name, "must be a timedelta")
    if not timedelta(0) <= value <= _LONGEST_DURATION or not (zero or value):
        least = "0" if zero else "more than 0"
        raise InvalidValue(name, f"must be {least} to {_LONGEST_DURATION.days} days")
    return value


def check_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """Check a whole number from `least` to `most`, both included."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if not (number and least <= value and (most is None or value <= most)):  # type: ignore[operator]
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidValue(name, f"must be a whole number {limits}")
    return value  # type: ignore[return-value]


def check_seconds(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = _LONGEST,
) -> float:
    """Check a finite number of seconds: more than `above`, at least `least`, at most `most`."""
    # A positive range check: every comparison with NaN is false.
    if not (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -_LONGEST < value < _LONGEST
    ):
        raise InvalidValue(name, "must be a finite number of seconds")
    if above is not None and value <= above:
        raise InvalidValue(name, f"must be more than {above} seconds")
    if least is not None and value < least:
        raise InvalidValue(name, f"must be at least {least} seconds")
    if value > most:
        raise InvalidValue(name, f"must be at most {most} seconds")
    return value


def check_switch(name: str, value: object) -> bool:
    """Check a bool. Text is refused, because every non-empty text is true, "false" included."""
    if not isinstance(value, bool):
        raise InvalidValue(name, "must be True or False")
    return value


def check_callable(name: str, value: object) -> None:
    """Check a function, or any other object that can be called."""
    if not callable(value):
        raise InvalidValue(name, "must be callable")
