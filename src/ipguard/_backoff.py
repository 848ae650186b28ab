"""Exponential back-off with jitter: how long to wait before the next attempt."""

from __future__ import annotations

from random import random
from typing import Final

_JITTER: Final = 0.2


class Backoff:
    """Delays that double from `first` to `longest` seconds.

    Each is shortened by up to a fifth at random, so that servers that failed together do not retry
    together.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = self._delay = first
        self._longest = longest

    def next(self) -> float:
        """Return how long to wait now, in seconds."""
        delay = self._delay
        self._delay = min(delay * 2, self._longest)
        return delay * (1 - _JITTER * random())  # noqa: S311 - not a secret

    def reset(self) -> None:
        """Start again with the first delay, after an attempt that succeeded."""
        self._delay = self._first
