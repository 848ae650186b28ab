"""The figures of a guard, and how its denials are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal

import attrs

from ipguard import _fork
from ipguard._fork import ReentrantLock
from ipguard.model import Reason

_UNCOUNTED: Final = 1_000


@attrs.frozen(kw_only=True)
class GuardStats:
    """How a guard is doing. It counts denials and what leaves the hot path; hits are not counted.

    Attributes:
        revision: The store's revision that everything remembered is current to.
        lease_remaining: For how many seconds it may answer without the store; 0.0 when the lease is
            over.
        last_sync_age: Seconds since the read that last renewed the lease began, or None before the
            first.
        error: What the store's last failure was, or None while it answers.
        failures: How many attempts have failed in a row.
        woken_by: `refresher` where that thread runs, else `callers`: syncs are made by those who
            ask.
        users: How many users are remembered.
        preloaded: With `preload`: how many users are held in the table of all that are restricted,
            those included that are being read again; None while it is not whole.
        loads: How many policies were read from the store.
        evictions: How many users were forgotten to make room.
        denials: How many answers denied, by reason.
        ready: Whether it can answer from what it remembers.
    """

    revision: int
    lease_remaining: float
    last_sync_age: float | None
    error: str | None
    failures: int
    woken_by: Literal["refresher", "callers"]
    users: int
    preloaded: int | None
    loads: int
    evictions: int
    denials: Mapping[Reason, int]
    ready: bool


class Tally:
    """Counts denials by reason, each of them, and takes a lock only once in a thousand.

    Each is one item more in a list, which needs no lock: `append` is atomic. Now and then, under a
    lock, as many items as a list has are taken off its front and added to the count; what others
    append meanwhile stays behind those.
    """

    def __init__(self) -> None:
        self._uncounted: dict[Reason, list[None]] = {reason: [] for reason in Reason}
        self._counts: Counter[Reason] = Counter()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock: in a forked child it may be held by a thread of the parent."""
        self._lock = ReentrantLock()

    def add(self, reason: Reason) -> None:
        """Count one denial."""
        uncounted = self._uncounted[reason]
        uncounted.append(None)
        if len(uncounted) >= _UNCOUNTED:
            self.counts()

    def counts(self) -> dict[Reason, int]:
        """Return how many denials there have been for each reason that there was."""
        _fork.check()
        again = self._lock.owned()  # a signal handler, in the middle of the loop below
        with self._lock:
            for reason, uncounted in self._uncounted.items():
                count = len(uncounted)
                if count and not again:
                    self._counts[reason] += count
                    del uncounted[:count]
            return dict(self._counts)
