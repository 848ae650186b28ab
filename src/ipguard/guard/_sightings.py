"""Record where users log in from, off the login's thread.

A login only appends to a queue. Every half second a thread takes the logins from the queue, adds
them up for each user and address, and gives them to the store in one batch. A user and address that
were just written are not written again for an hour; the logins of that hour are added up.

Queue and memory are bounded, and a login that does not fit is counted as lost. Half of the room is
for users whose remembered row says that they are registered, so that a flood of invented usernames
does not displace real ones.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Final

from ipguard import _fork
from ipguard.addresses import canonical_address
from ipguard.errors import UsernameError
from ipguard.guard._table import Table
from ipguard.model import Outcome, Reason, Sighting
from ipguard.row import is_registered
from ipguard.rules import SIGHTINGS_AT_ONCE, SIGHTINGS_KEPT
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username

_log = logging.getLogger("ipguard.guard")

_QUEUED: Final = 20_000
_ADMITTED: Final = 8
_WAITING: Final = 10_000
_REMEMBERED: Final = 50_000
"""Of so many users, addresses and outcomes it is remembered when they were written."""
_LONGEST: Final = 256
"""Longer texts are neither usernames nor addresses, and would take too much room in the queue."""
_PAUSE: Final = 0.5
_PAUSE_AFTER_FAILURE: Final = 5.0
_AGAIN: Final = 3600.0
_LOOK: Final = 60.0
"""How often the thread looks for logins that were added up for an hour, without other work."""
_FLUSH: Final = 2.0
_LOGGED_EVERY: Final = 60.0
_NOTICES: Final = 1_000
_STOP: Final = object()

RefusalCallback = Callable[[Sighting], object]
_Key = tuple[str, str]  # the canonical username and address


class RefusalFollowers(dict[object, RefusalCallback]):
    """The callbacks of `Guard.follow_refusals`; the guard owns them, as they may refer to it."""


class _Logins:
    """Logins of one user from one address, added up.

    Attributes:
        due: When they are written, on the guard's clock, if others were written before.
    """

    __slots__ = ("allowed", "due", "first_at", "last_at", "refused")

    def __init__(self, at: datetime) -> None:
        self.first_at = self.last_at = at
        self.allowed = self.refused = 0
        self.due = 0.0

    @property
    def count(self) -> int:
        return self.allowed + self.refused

    def add(self, at: datetime, *, allowed: int, refused: int) -> None:
        if not self.count:
            self.first_at = at
        self.last_at = at
        self.allowed += allowed
        self.refused += refused

    def join(self, other: _Logins) -> None:
        first_at = min(self.first_at, other.first_at)
        self.add(max(self.last_at, other.last_at), allowed=other.allowed, refused=other.refused)
        self.first_at = first_at


class Recorder:
    """The sightings of one guard, on their way to the store.

    The thread ends when the guard was garbage-collected.

    Attributes:
        written: How many logins were given to the store.
        lost: How many were not, because there was no room or the store failed.
    """

    def __init__(
        self,
        owner: object,
        store: RestrictionStore,
        table: Table,
        followers: weakref.ref[RefusalFollowers],
        monotonic: Callable[[], float],
    ) -> None:
        self._owner = weakref.ref(owner, self._end)
        self._store = store
        self._table = table
        self._followers = followers
        self._monotonic = monotonic
        self.written = 0
        self.lost = 0
        self._failed_at: float | None = None  # when a failure was logged last
        self.after_fork()

    def after_fork(self) -> None:
        """Begin with an empty queue: the parent writes what it was given."""
        self._lock = _fork.ReentrantLock()
        # Its methods are reentrant, so that a signal handler may call the guard.
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._admitted: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        # The rest belongs to the thread.
        self._waiting: dict[_Key, _Logins] = {}
        self._addresses: Counter[str] = Counter()  # how many of a user are waiting
        self._remembered: OrderedDict[tuple[str, str, bool], _Logins] = OrderedDict()
        self._gathered = 0  # logins in `_remembered`
        self._held = 0  # logins in `_waiting`, and in the batch that is being written
        self._write_at = 0.0
        self._notices: deque[Sighting] = deque(maxlen=_NOTICES)

    def waiting(self) -> int:
        """Return how many logins are not written yet."""
        return self._queue.qsize() + self._held + self._gathered

    def add(self, username: str, address: str, decision: object) -> None:
        """Queue a login. Raises nothing, and waits for nothing."""
        try:
            _fork.check()
            if len(username) > _LONGEST or len(address) > _LONGEST:
                return
            queue = self._queue
            size = queue.qsize()
            if size >= _QUEUED // 2 and not (size < _QUEUED and self._is_admitted(username)):
                self._lose(1)
                return
            queue.put((username, address, decision))
            if self._thread is None or not self._thread.is_alive():
                self._start()
        except Exception:
            _log.debug("a login could not be recorded", exc_info=True)

    def _is_admitted(self, username: str) -> bool:
        """Return whether a user may use the second half of the queue, which is for known users.

        Of each user a few logins are admitted there until the thread has emptied the queue, so that
        a thief with the right password of one user does not displace the others.
        """
        admitted = self._admitted
        try:
            name = canonical_username(username)
        except UsernameError:
            return False
        if not self._is_known(name) or admitted[name] >= _ADMITTED:
            return False
        admitted[name] += 1
        return True

    def _is_known(self, name: str) -> bool:
        """Return whether a remembered row says that a user is registered."""
        row = self._table.find(name)
        return row is not None and is_registered(row)

    def _lose(self, count: int) -> None:
        with self._lock:
            self.lost += count

    def _start(self) -> None:
        # Not again in a signal handler that interrupts this very method.
        if self._lock.owned():
            return
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._stopping = threading.Event()
                # Assigned before the start: if that is interrupted, the next login starts another.
                self._thread = threading.Thread(
                    target=self._run, name="ipguard-sightings", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Write what is waiting, but wait no longer than two seconds for it."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._stopping.set()
            self._queue.put(_STOP)
            if thread is not threading.current_thread():
                thread.join(_FLUSH)

    def _end(self, _: object) -> None:
        self._queue.put(_STOP)

    def _run(self) -> None:
        ended = False
        while not ended:
            try:
                ended = self._work()
            except Exception:
                _log.exception("recording logins failed")
                ended = self._stopping.wait(_PAUSE)

    def _work(self) -> bool:
        """Take what is queued, and write one batch; return whether the thread is to end."""
        if not self._notices:
            self._stopping.wait(max(0.0, self._write_at - time.monotonic()))
        self._release()
        ended = self._take()
        if ended:
            self._release(everything=True)
        if self._waiting and (ended or time.monotonic() >= self._write_at):
            self._write()
        while ended and self._waiting:
            self._write()
        for _ in range(len(self._notices) if ended else min(1, len(self._notices))):
            self._tell(self._notices.popleft())
        return ended

    def _take(self) -> bool:
        """Add up what is queued, and wait for it if there is nothing else to do."""
        queue, found = self._queue, list[Any]()
        with suppress(Empty):
            if not (self._waiting or self._notices):
                found.append(queue.get(timeout=_LOOK if self._gathered else None))
            found.extend(queue.get_nowait() for _ in range(queue.qsize()))
        self._admitted = Counter()
        logins = [item for item in found if item is not _STOP]
        try:
            at = self._store.now()
        except Exception as exc:
            self._lose(len(logins))
            self._log_failure(exc)
            return _STOP in found
        for login in logins:
            try:
                self._note(login, at)
            except Exception:
                # The texts and the decision may be any objects.
                _log.debug("a login could not be recorded", exc_info=True)
        return _STOP in found

    def _note(self, login: tuple[str, str, object], at: datetime) -> None:
        username, address, decision = login
        if decision is Outcome.RETRY or (
            getattr(decision, "reason", None) is Reason.STORE_UNAVAILABLE
        ):
            return  # neither allowed nor refused: the user is to try again
        allowed = bool(decision)
        name, where = canonical_username(username), canonical_address(address)
        if not where:
            return
        remembered = self._remembered.get((name, where, allowed))
        if remembered is not None and (name, where) not in self._waiting:
            remembered.add(at, allowed=int(allowed), refused=int(not allowed))
            self._gathered += 1
            return
        logins = _Logins(at)
        logins.add(at, allowed=int(allowed), refused=int(not allowed))
        self._wait(name, where, logins)

    def _wait(self, name: str, address: str, logins: _Logins) -> None:
        """Keep logins until they are written, if there is room."""
        there = self._waiting.get((name, address))
        if there is not None:
            there.join(logins)
        elif self._has_room(name):
            self._waiting[name, address] = logins
            self._addresses[name] += 1
        else:
            self._lose(logins.count)
            return
        self._held += logins.count

    def _has_room(self, name: str) -> bool:
        size = len(self._waiting)
        if self._addresses[name] >= SIGHTINGS_KEPT or size >= _WAITING:
            return False
        return size < _WAITING // 2 or self._is_known(name)

    def _release(self, *, everything: bool = False) -> None:
        """Let logins wait to be written that were added up for an hour."""
        now = self._monotonic()
        while self._remembered:
            key, logins = next(iter(self._remembered.items()))
            kept = logins.due > now and len(self._remembered) <= _REMEMBERED
            if kept and not everything:
                return
            del self._remembered[key]
            self._gathered -= logins.count
            if logins.count:
                self._wait(*key[:2], logins)

    def _write(self) -> None:
        """Give a batch to the store."""
        batch = dict(islice(self._waiting.items(), SIGHTINGS_AT_ONCE))
        count = sum(logins.count for logins in batch.values())
        for name, address in batch:
            del self._waiting[name, address]
            self._addresses[name] -= 1
            if not self._addresses[name]:
                del self._addresses[name]
        try:
            told = self._store.record_sightings(
                [
                    Sighting(
                        username=name,
                        address=address,
                        first_at=logins.first_at,
                        last_at=logins.last_at,
                        allowed=logins.allowed,
                        refused=logins.refused,
                    )
                    for (name, address), logins in batch.items()
                ]
            )
        except Exception as exc:
            self._write_at = time.monotonic() + _PAUSE_AFTER_FAILURE
            self._lose(count)
            self._held -= count
            self._log_failure(exc)
            return
        self._write_at = time.monotonic() + _PAUSE
        self.written += count
        self._held -= count
        for key, logins in batch.items():
            self._remember(key, logins)
        if self._followers():
            self._notices += told

    def _log_failure(self, error: Exception) -> None:
        now = time.monotonic()
        if self._failed_at is None or now - self._failed_at >= _LOGGED_EVERY:
            self._failed_at = now
            _log.warning(
                "the store does not take sightings, and some are lost: %s: %s",
                type(error).__name__,
                error,
            )

    def _remember(self, key: _Key, written: _Logins) -> None:
        """Add the logins of the next hour up, of outcomes that were just written."""
        due = self._monotonic() + _AGAIN
        for allowed, count in ((True, written.allowed), (False, written.refused)):
            if count:
                logins = self._remembered.pop((*key, allowed), None) or _Logins(written.last_at)
                logins.due = due
                self._remembered[(*key, allowed)] = logins

    def _tell(self, sighting: Sighting) -> None:
        for callback in list((self._followers() or {}).values()):
            try:
                callback(sighting)
            except Exception:
                _log.exception("a callback of follow_refusals failed")
