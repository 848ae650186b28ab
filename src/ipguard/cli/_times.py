"""Read times and lengths of time from arguments."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

from ipguard.cli._output import Exit, Problem
from ipguard.rules import shifted

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def parse_length(text: str) -> timedelta:
    """Read a length of time such as 90m, 12h or 30d."""
    found = re.fullmatch(r"([0-9]{1,5})([mhd])", text)
    if found is None:
        raise Problem(Exit.USAGE, "write a length of time: 90m, 12h, 30d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def parse_time(text: str, now: datetime, *, past: bool = False) -> datetime:
    """Read a time with its zone, or a length of time from now; with `past`, before now."""
    with suppress(Problem):
        length = parse_length(text)
        return shifted(now, -length if past else length)
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(text)
        if found.utcoffset() is not None:
            return found.astimezone(UTC)
    hint = "write a time with its zone, such as 2027-01-31T18:00Z, or a length: 90m, 12h, 30d"
    raise Problem(Exit.USAGE, hint)
