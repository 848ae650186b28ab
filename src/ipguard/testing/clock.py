"""A clock for tests: it stands still until it is told to move."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from ipguard._checks import check_time

__all__ = ["FakeClock"]


class FakeClock:
    """A clock that only moves when a test moves it. Thread-safe.

    Call it for the time, as a store does; its `monotonic` is for a guard, and moves with it:

        clock = FakeClock()
        store = open_store("memory://", clock=clock)
        guard = Guard(store, monotonic=clock.monotonic)
        clock.advance(timedelta(minutes=10))

    Args:
        start: The time it shows at first, aware; noon of the first day of 2030 in UTC without it.

    Raises:
        InvalidValue: `start` is not an aware datetime.
    """

    def __init__(self, start: datetime | None = None) -> None:
        self._now = check_time("start", start or datetime(2030, 1, 1, 12, tzinfo=UTC))
        # Not 0: a monotonic clock's zero means nothing, and code that takes 0 for "never" shows.
        self._elapsed = timedelta(hours=1)
        self._lock = threading.Lock()

    def __call__(self) -> datetime:
        """Return the current time, aware and in UTC."""
        with self._lock:
            return self._now

    def monotonic(self) -> float:
        """Return the reading of the monotonic clock, in seconds since no particular moment."""
        with self._lock:
            return self._elapsed.total_seconds()

    def advance(self, by: timedelta) -> None:
        """Let time pass: both the time of day and `monotonic` move.

        Args:
            by: How much, not less than nothing.

        Raises:
            ValueError: `by` is negative. What goes back in life is the time of day alone: `set`.
        """
        if by < timedelta():
            raise ValueError("time does not go back; set() moves the time of day alone")
        with self._lock:
            self._now += by
            self._elapsed += by

    def set(self, to: datetime) -> None:
        """Set the time of day, as an administrator or NTP does: `monotonic` stays where it is.

        Args:
            to: The new time, aware, earlier or later.

        Raises:
            InvalidValue: `to` is not an aware datetime.
        """
        moment = check_time("to", to)
        with self._lock:
            self._now = moment

    def __repr__(self) -> str:
        return f"<FakeClock {self().isoformat()}>"
