"""The figures of a guard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from ipguard.model import Reason


@attrs.frozen(kw_only=True)
class GuardStats:
    """How a guard is doing. It counts what leaves the hot path; hits are not counted.

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
