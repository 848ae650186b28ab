"""Preload the table: read a snapshot of all restricted users, then keep it current.

A snapshot is swapped in only if it is of the revision that the table had when it was requested.
From then on, syncs record who changes; at the end those users are marked pending, and the others
are as current as if each had been read singly. A snapshot of another revision is rejected: what
changed between the two is unknown, and so is whether a backup was restored between them.
`EVERYBODY` and `RESET` make it invalid while it is being read.

Until the table is complete, and for pending users, policies are read singly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Final

from ipguard import _fork
from ipguard._backoff import Backoff
from ipguard._fork import acquire
from ipguard.errors import StoreError
from ipguard.guard._lease import Lease
from ipguard.guard._slow_path import SingleFlight
from ipguard.guard._table import Rows, Snapshot, Table
from ipguard.row import PENDING, checked
from ipguard.store import RestrictionStore, rows_loader

_log = logging.getLogger("ipguard.guard")

_TRIES: Final = 10
_CHUNK: Final = 1_000
_PROGRESS_INTERVAL: Final = 5.0


class Preload:
    """Keeps the preloaded users of one table complete."""

    def __init__(
        self, store: RestrictionStore, table: Table, lease: Lease, loads: SingleFlight
    ) -> None:
        self._load_all = rows_loader(store)
        self._table = table
        self._lease = lease
        self._loads = loads
        self._backoff = Backoff(1.0, 60.0)
        self._failing = False
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the snapshot in progress, whose thread does not exist in a forked child."""
        self._table.snapshot = None
        self._reading = threading.Lock()
        self._retry_at = 0.0
        self._stop = threading.Event()

    def tend(self, seconds: float) -> None:
        """Read pending users again for `seconds`, or start reading a snapshot on a thread."""
        if self._table.complete is not None:
            self.read_again(time.monotonic() + seconds)
        elif (
            not self._reading.locked()
            and time.monotonic() >= self._retry_at
            and self._lease.is_running()
        ):
            stop = self._stop = threading.Event()
            name = "ipguard-preload"
            try:
                threading.Thread(target=self.fill, args=(stop,), name=name, daemon=True).start()
            except RuntimeError:
                _log.debug("no thread to preload on", exc_info=True)

    def stop(self) -> None:
        """Stop reading the snapshot in progress."""
        self._stop.set()

    def read_again(self, until: float) -> None:
        """Read the pending users one by one, while time and store allow."""
        with self._table.lock:
            pending = tuple(self._table.pending)
        for name in pending:
            if time.monotonic() >= until or not self._loads.read_again(name):
                return

    def fill(self, stop: threading.Event) -> None:
        """Read a snapshot into the table on this thread, unless another thread is doing so.

        Failures are logged and not raised; `tend` tries again later. Setting `stop` ends it.
        """
        reading, held = self._reading, list[bool]()
        try:
            if acquire(reading, 0, held) and self._table.complete is None:
                self._fill(stop)
        finally:
            if True in held:
                reading.release()

    def _fill(self, stop: threading.Event) -> None:
        began, forks = time.monotonic(), _fork.count()
        try:
            for _ in range(_TRIES):
                if self._read(stop):
                    self._failing = False
                    self._backoff.reset()
                    _log.info(
                        "preloaded %d restricted users in %.1f s",
                        self._table.count()[1],
                        time.monotonic() - began,
                    )
                    return
                if stop.is_set():
                    return
                self._lease.sync()
            self._failed("no snapshot was of its revision")
        except Exception as exc:
            # SQLite recalls its connections before a fork; `tend` starts again at once. A message
            # logged now could meet the fork, and a child inherits the lock of the handler's stream
            # as it is: held by a thread that the child does not have.
            if _fork.count() == forks:
                self._failed(f"{type(exc).__name__}: {exc}")
        finally:
            self._table.abandon_snapshot()

    def _failed(self, why: str) -> None:
        self._retry_at = time.monotonic() + self._backoff.next()
        if not self._failing:
            _log.warning("preloading failed; users are loaded singly until it succeeds: %s", why)
        self._failing = True

    def _read(self, stop: threading.Event) -> bool:
        """Read a snapshot and swap it in; return whether that succeeded."""
        snapshot, discarded = self._table.begin_snapshot()
        _empty(discarded)
        revision, rows = self._load_all()
        try:
            if revision == snapshot.revision and self._stream(snapshot, rows, stop):
                return self._table.swap_snapshot(snapshot)
        finally:
            getattr(rows, "close", lambda: None)()
        _empty(snapshot.rows)
        return False

    def _stream(
        self, snapshot: Snapshot, rows: Iterator[tuple[str, bytes]], stop: threading.Event
    ) -> bool:
        """Read the rows of a snapshot, and return whether it was read to its end."""
        count = 0
        log_at = time.monotonic() + _PROGRESS_INTERVAL
        while not stop.is_set() and self._table.snapshot is snapshot:
            chunk = list(islice(rows, _CHUNK))
            if not chunk:
                return True
            snapshot.rows.update((name, self._row(data)) for name, data in chunk)
            count += len(chunk)
            if len(snapshot.rows) != count:
                raise StoreError("the store gave the policy of one user in several parts")
            if time.monotonic() >= log_at:
                log_at += _PROGRESS_INTERVAL
                _log.info("preloading: %d restricted users so far", count)
        return False

    def _row(self, data: bytes) -> bytes:
        try:
            return checked(data, deny_unknown=self._table.deny_unknown)
        except ValueError:  # damaged: each login of this user reads the store
            return PENDING


def _empty(rows: Rows) -> None:
    """Free many rows one by one: freeing them at once would stop every other thread."""
    while rows:
        rows.popitem()
