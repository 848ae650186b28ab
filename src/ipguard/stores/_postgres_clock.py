"""The server's clock, read without asking the server."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from ipguard.stores._sql import moment


def ticks() -> float:
    """Return the seconds of a clock that nobody sets, and that counts a machine's sleep as well."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class ServerClock:
    """What the server's clock said last, and how long ago that was.

    It is never behind the server's by more than the two clocks' rates differ, and ahead by no more
    than the answer took: what is temporary ends early rather than late. Before the first answer it
    is the host's.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None

    def set(self, micros: int, asked_at: float) -> None:
        """Take a reading.

        Args:
            micros: What the server said.
            asked_at: The `ticks` before it was asked.
        """
        self._seen = micros, asked_at

    def now(self) -> datetime:
        """Return the server's time."""
        seen = self._seen
        if seen is None:
            return datetime.now(UTC)
        return moment(seen[0] + int((ticks() - seen[1]) * 1_000_000))
