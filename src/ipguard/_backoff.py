"""Exponential back-off with jitter: how long to wait before the next attempt."""

from __future__ import annotations

from random import random


class Backoff:
    """Delays that double from `first` to `longest` seconds.

    Each is shortened at random, by up to the fraction `jitter`, so that callers that failed
    together do not retry together.
    """

    def __init__(self, first: float, longest: float, *, jitter: float = 0.2) -> None:
        self._first = self._delay = first
        self._longest = longest
        self._jitter = jitter

    def next(self) -> float:
        """Return how long to wait now, in seconds."""
        delay = self._delay
        self._delay = min(delay * 2, self._longest)
        return delay * (1 - self._jitter * random())  # noqa: S311 - not a secret

    def reset(self) -> None:
        """Start again with the first delay, after an attempt that succeeded."""
        self._delay = self._first
