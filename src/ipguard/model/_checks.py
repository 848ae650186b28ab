"""Text and times from outside: what may be stored, mailed and shown."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import Final

from ipguard.errors import InvalidValue

LABEL_LIMIT: Final = 100
REASON_LIMIT: Final = 500
# Line and paragraph separators break lines; the bidirectional controls can make "allow 1.2.3.4"
# read as something else on a page or in a mail.
_FORBIDDEN_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDI_CONTROLS: Final = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def checked_text(name: str, value: object, limit: int, *, required: bool = False) -> str:
    """Return `value` when it is a line of text that may be stored, mailed and shown.

    Args:
        name: What it is called, for the message.
        value: The text.
        limit: How many characters it may have.
        required: Whether it must hold more than blanks.

    Raises:
        InvalidValue: It is not a str, too long, empty though required, or holds a control
            character.
    """
    if not isinstance(value, str):
        raise InvalidValue(name, f"must be text, not {type(value).__name__}")
    if len(value) > limit:
        raise InvalidValue(name, f"has more than {limit} characters")
    if required and not value.strip():
        raise InvalidValue(name, "must not be empty")
    # In ASCII what is not printable is just what is refused, and that is found out at once.
    plain = value.isascii() and value.isprintable()
    if not plain and any(
        c in _BIDI_CONTROLS or unicodedata.category(c) in _FORBIDDEN_CATEGORIES for c in value
    ):
        raise InvalidValue(name, "must not hold control characters")
    return value


def checked_time(name: str, value: object) -> datetime:
    """Return `value` in UTC.

    Raises:
        InvalidValue: It is not a datetime, or is naive: a naive time means another moment on each
            host.
    """
    if not isinstance(value, datetime):
        raise InvalidValue(name, f"must be a datetime, not {type(value).__name__}")
    try:
        if value.utcoffset() is None:
            raise InvalidValue(name, "must be an aware datetime")
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidValue(name, "is beyond what a time in UTC can be") from None
    except InvalidValue:
        raise
    except Exception as exc:  # a tzinfo of the caller's own may raise anything
        raise InvalidValue(name, f"has a time zone that fails: {type(exc).__name__}") from exc
