"""Filling the table of a preloaded guard, and keeping it full.

A snapshot is taken over only if it is of the guard's own revision at the moment at which it was
asked for. From that moment the syncs of the guard note who changes, so at its end the snapshot,
less those users, is as good as if each had been read singly just now. One that is older or newer
is refused: what happened between the two could not be told, and a backup restored between them
would not be noticed. `EVERYBODY` and `RESET` make it worthless while it comes.

Until the table is whole, and for users that are marked unknown, policies are read singly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from ipguard._fork import acquire
from ipguard.errors import StoreError
from ipguard.guard._lease import Lease
from ipguard.guard._loads import Loads
from ipguard.guard._table import Filling, Row, Table, row_of
from ipguard.store import RestrictionStore

_log = logging.getLogger("ipguard.guard")

_TRIES: Final = 10
_AT_ONCE: Final = 1_000
_TOLD_EACH: Final = 5.0
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0


class Preload:
    """What keeps a table full: a thread of its own while a snapshot streams in."""

    def __init__(self, store: RestrictionStore, table: Table, lease: Lease, loads: Loads) -> None:
        self._store = store
        self._table = table
        self._lease = lease
        self._loads = loads
        self._failures = 0
        self.forget()

    def forget(self) -> None:
        """Forget the snapshot in progress: its thread does not exist in a forked child."""
        self._table.filling = None
        self._filling = threading.Lock()
        self._retry_at = 0.0
        self._stop = threading.Event()

    def tend(self, seconds: float) -> None:
        """See to what has to be seen to; called by the refresher after each round.

        Args:
            seconds: How long it may take; a snapshot takes its time on a thread of its own.
        """
        if self._table.whole:
            self.read_again(time.monotonic() + seconds)
        elif (
            not self._filling.locked() and time.monotonic() >= self._retry_at and self._lease.runs()
        ):
            stop = self._stop = threading.Event()
            name = "ipguard-preload"
            try:
                threading.Thread(target=self.fill, args=(stop,), name=name, daemon=True).start()
            except RuntimeError:
                _log.debug("no thread to preload on", exc_info=True)

    def stop(self) -> None:
        """Give up the snapshot under way."""
        self._stop.set()

    def read_again(self, until: float) -> None:
        """Read the users that are marked unknown, singly, as far as time and store allow."""
        with self._lease.lock:
            names = tuple(self._table.unknown)
        for name in names:
            if time.monotonic() >= until or not self._loads.read_again(name, self._table):
                return

    def fill(self, stop: threading.Event) -> None:
        """Stream a snapshot into the table on this thread, unless that is being done already.

        It raises nothing. What keeps it from coming to its end is logged, and it is tried again
        later.

        Args:
            stop: What is set when nobody wants the table any more.
        """
        filling, held = self._filling, list[bool]()
        try:
            if acquire(filling, 0, held):
                self._fill(stop)
        finally:
            if True in held:
                filling.release()

    def _fill(self, stop: threading.Event) -> None:
        if self._table.whole:
            return
        began = time.monotonic()
        try:
            for _ in range(_TRIES):
                if self._filled(stop):
                    self._failures = 0
                    _log.info(
                        "preloaded %d restricted users in %.1f s",
                        len(self._table),
                        time.monotonic() - began,
                    )
                    return
                if stop.is_set():
                    return
                self._lease.sync()
            self._pause("no snapshot was of its revision")
        except Exception as exc:
            self._pause(f"{type(exc).__name__}: {exc}")
        finally:
            with self._lease.lock:
                self._table.filling = None

    def _pause(self, why: str) -> None:
        pause = min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
        self._retry_at = time.monotonic() + pause
        if not self._failures:
            _log.warning("preloading failed, users are loaded singly meanwhile: %s", why)
        self._failures += 1

    def _filled(self, stop: threading.Event) -> bool:
        with self._lease.lock:
            waste, self._table.waste = self._table.waste, {}
            filling = self._table.begin(self._lease.revision)
        _empty(waste)
        revision, policies = self._store.load_all_policies()
        try:
            if revision == filling.revision and self._stream(filling, policies, stop):
                with self._lease.lock:
                    return self._table.install(filling)
        finally:
            getattr(policies, "close", _nothing_to_close)()
        _empty(filling.rows)
        return False

    def _stream(self, filling: Filling, policies: Any, stop: threading.Event) -> bool:
        """Take in a snapshot, and tell whether it came to its end."""
        rows, count = _rows(policies), 0
        tell_at = time.monotonic() + _TOLD_EACH
        while not stop.is_set() and self._table.filling is filling:
            some = list(islice(rows, _AT_ONCE))
            if not some:
                return True
            filling.rows.update(some)
            count += len(some)
            if len(filling.rows) != count:
                raise StoreError("the store gave the policy of one user in several parts")
            if time.monotonic() >= tell_at:
                tell_at += _TOLD_EACH
                _log.info("preloading: %d restricted users so far", count)
        return False


def _rows(policies: Any) -> Iterator[tuple[str, Row]]:
    """Give the rows of a snapshot, packed by the store where it can."""
    packed = getattr(policies, "packed", None)
    if packed is not None:
        rows: Iterator[tuple[str, Row]] = packed()
        return rows
    return ((name, row_of(policy)) for name, policy in policies)


def _nothing_to_close() -> None:
    pass


def _empty(rows: dict[str, Row]) -> None:
    """Let go of many rows one by one: all at once would hold up every other thread."""
    while rows:
        rows.popitem()
