"""The question that login servers ask: may this user log in from this address, now?

How an answer comes about::

    is_allowed ──of a remembered user──▶ `_fast_path.py`: the deadline, two look-ups, the clock
        └──all else──▶ check ──▶ an answer        `_answers.py`: from all these, in their order
                             ├─▶ the lease        `_lease.py`: sync, one moment, one position
                             ├─▶ the cache        `_cache.py`: bounded, by spelling
                             ├─▶ the table        `_table.py`: with `preload`, all restricted users
                             └─▶ a shared load    `_loads.py`: one read for all who miss
    start / with ──▶ `_refresher.py`: calls sync before anybody has to
                             └─▶ `_preload.py`: streams the table in, reads again who changed

Readers take no lock; `_fast_path.py` says what makes that safe.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal, Self

import attrs

from ipguard import _fork
from ipguard._checks import check_seconds
from ipguard.errors import shorten
from ipguard.guard._answers import Answers
from ipguard.guard._cache import Cache
from ipguard.guard._explain import explain
from ipguard.guard._fast_path import bind
from ipguard.guard._lease import Lease, time_asleep
from ipguard.guard._loads import Loads
from ipguard.guard._preload import Preload
from ipguard.guard._refresher import Refresher
from ipguard.guard._settings import check_settings
from ipguard.guard._stats import GuardStats, Tally
from ipguard.guard._table import Table
from ipguard.model import Decision, Explanation, Reason
from ipguard.store import Closing, RestrictionStore

__all__ = ["Guard", "GuardStats"]

_log = logging.getLogger("ipguard.guard")

Observer = Callable[[object, object, Decision], object]


class Guard(Closing, _fork.Forkable):
    """Answers whether a user may log in from an address, from memory where it can.

    No answer rests on a state of the store older than `max_staleness`, whatever has failed.
    Thread-safe, survives `fork()`. Nothing is read and no thread is started before the first
    question or `start()`.

    Args:
        store: Where policies are read.
        max_staleness: How old, in seconds, the state that an answer rests on may be.
        outage_grace: For how many seconds more, when the store does not answer, users remembered
            are still answered; such decisions are `stale`. An explicit choice: deleted restrictions
            may still let in meanwhile.
        capacity: How many users are remembered. Each costs about 1 kB plus its restrictions.
        preload: Whether to hold every restricted user, at about 150 bytes each beside the name, so
            that no login waits for the store. They are streamed in by the refresher, or by `sync`
            where there is none; until then, users are read singly.
        unknown_users: `"allow"`: a user that is not registered and has no restrictions may log in
            from anywhere. `"deny"`, recommended once the host keeps its users registered: it may
            not.
        report_only: Every answer allows; `reason` stays what it would have been, which the log and
            the observer are told. For trying ipguard out before it holds.
        observer: Called as `observer(username, address, decision)` for each decision, on the
            caller's thread. What it raises is logged and changes nothing. It takes `is_allowed` off
            the fast path.
        monotonic: The clock for ages, in seconds. For tests.

    Raises:
        InvalidValue: A setting makes no sense.
    """

    def __init__(
        self,
        store: RestrictionStore,
        *,
        max_staleness: float = 5.0,
        outage_grace: float = 0.0,
        capacity: int = 100_000,
        preload: bool = False,
        unknown_users: Literal["allow", "deny"] = "allow",
        report_only: bool = False,
        observer: Observer | None = None,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        check_settings(
            store,
            max_staleness=max_staleness,
            outage_grace=outage_grace,
            capacity=capacity,
            switches={"preload": preload, "report_only": report_only},
            unknown_users=unknown_users,
            functions={"observer": observer, "monotonic": monotonic},
        )
        self._store = store
        self._max_staleness = max_staleness
        self._deny_unknown = unknown_users == "deny"
        self._report_only = report_only
        self._observer = observer
        self._monotonic = monotonic or time.monotonic
        table = Table(deny_unknown=self._deny_unknown) if preload else None
        self._cache = Cache(capacity, deny_unknown=self._deny_unknown, table=table)
        self._lease = Lease(
            store,
            self._cache,
            max_staleness=max_staleness,
            monotonic=self._monotonic,
            # An injected clock keeps its own time, whatever the machine does.
            asleep=time_asleep if monotonic is None else lambda: 0.0,
        )
        self._loads = Loads(
            store,
            self._cache,
            self._lease,
            max_staleness=max_staleness,
            monotonic=self._monotonic,
        )
        self._answers = Answers(
            store,
            self._cache,
            self._lease,
            self._loads,
            outage_grace=outage_grace,
            deny_unknown=self._deny_unknown,
            monotonic=self._monotonic,
        )
        self._preload = None if table is None else Preload(store, table, self._lease, self._loads)
        self._tally = Tally()
        self._refreshing = False
        self._refresher: Refresher | None = None
        hot = self._bind_is_allowed(lambda username, address: self.check(username, address).allowed)
        if hot is not None:
            # Shadows the method for this guard: what others pay for an observer, it does not.
            hot.__doc__ = Guard.is_allowed.__doc__
            self.__dict__["is_allowed"] = hot
        _fork.register(self)

    def is_allowed(self, username: str, address: str) -> bool:
        """Tell whether a user may log in from an address, now.

        Args:
            username: Of the host's user record, after it has authenticated the user; not as typed.
            address: Of the client: the peer's, or from the header of a proxy that is trusted.

        Returns:
            Whether the login may go on. It never raises for what a client sent: anything but a
            valid address as str is not allowed, and neither is anything while the store does not
            answer.
        """
        return self.check(username, address).allowed

    def _bind_is_allowed(
        self, otherwise: Callable[[str, str], bool | None]
    ) -> Callable[[str, str], bool | None] | None:
        """Return the hot path, or None where each question has to go through `check`."""
        kind = type(self)
        overridden = not (kind.is_allowed is Guard.is_allowed and kind.check is Guard.check)
        if overridden or self._report_only or self._observer is not None:
            return None
        users = self._cache.by_spelling
        return bind(self._lease, users, self._monotonic, self._tally, otherwise)

    def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        """Decide whether a user may log in from an address, now, and say why.

        Args:
            username: Of the host's user record, after it has authenticated the user; not as typed.
            address: Of the client: the peer's, or from the header of a proxy that is trusted.
            at_least: A revision that the answer has to rest on, such as `Applied.revision`. If one
                sync does not bring the guard there, the answer is `STORE_UNAVAILABLE`; `wait_for`
                waits. A revision from before a restored backup or a failover that lost commits
                means nothing afterwards, and this cannot be noticed: discard it.

        Returns:
            The decision. It never raises for what a client sent.
        """
        return self._tell(username, address, self._judge(username, address, at_least))

    def _judge(self, username: str, address: str, at_least: int | None) -> Decision:
        """Decide, and raise nothing. Nobody is told yet, and `report_only` changes nothing yet."""
        try:
            self._revive()
            return self._answers.answer(username, address, at_least)
        except Exception:
            # A defect, here or in a store. It must not become an allow, nor end the login server's
            # request with something that a client can provoke.
            _log.exception("a check failed; the login is not allowed")
            return self._answers.denied(Reason.STORE_UNAVAILABLE)

    def _tell(self, username: str, address: str, decision: Decision) -> Decision:
        """Count a decision, tell the log and the observer, and return what the host is given."""
        if not decision.allowed:
            self._tally.add(decision.reason)
            if self._report_only:
                self._report(username, address, decision)
        if self._report_only:
            decision = attrs.evolve(decision, allowed=True)
        if self._observer is not None:
            try:
                self._observer(username, address, decision)
            except Exception:
                _log.exception("the observer failed")
        return decision

    def _report(self, username: object, address: object, decision: Decision) -> None:
        # Whatever it is that has to be shown: its own methods may do anything.
        with contextlib.suppress(Exception):
            _log.warning(
                "report only: %s would not be allowed from %s: %s",
                shorten(username),
                shorten(address),
                decision.reason,
            )

    def explain(self, username: str, address: str) -> Explanation:
        """Tell an operator how a question is answered and why. Always reads the store.

        Args:
            username: As for `check`.
            address: As for `check`.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        return explain(
            self._store,
            username,
            address,
            deny_unknown=self._deny_unknown,
            revision=self._lease.revision,
        )

    def sync(self) -> int:
        """Read what has changed, now. Nobody has to call it: the guard does when its lease is over.

        With `preload` and no refresher it also streams in, or reads again, what is missing: nobody
        else does.

        Returns:
            The revision that the guard is at.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._revive()
        self._lease.sync()
        if self._preload is not None and not self._running():
            self._preload.fill(threading.Event())
            self._preload.read_again(math.inf)
        return self._lease.revision

    def wait_for(self, revision: int, timeout: float) -> bool:
        """Wait until every answer of this guard rests on a revision or a later one.

        Args:
            revision: Such as `Applied.revision`; as for `at_least` of `check`.
            timeout: How long to wait at most, in seconds, even if the store hangs. With 0 or less,
                a sync is started and not waited for.

        Returns:
            Whether the guard is there; False at the timeout.

        Raises:
            InvalidValue: The timeout is no number of seconds.
        """
        check_seconds("timeout", timeout)
        until = time.monotonic() + timeout
        woken = False
        while (before := self._lease.revision) < revision:
            if not self._lease.health.resting():
                self._lease.sync_within(until - time.monotonic())
            left = until - time.monotonic()
            if self._lease.revision >= revision or left <= 0:
                break
            if woken and self._lease.revision == before:
                # A wake-up that brings nothing must not spin.
                threading.Event().wait(min(left, 0.01))
            woken = self._lease.wait(min(left, 0.1))
        return self._lease.revision >= revision

    @property
    def revision(self) -> int:
        """The store's revision that all remembered is current to; 0 before the first sync."""
        return self._lease.revision

    def stats(self) -> GuardStats:
        """Return how the guard is doing, without I/O."""
        now = self._monotonic()
        with self._lease.lock:
            synced_at, health = self._lease.synced_at, self._lease.health
            remaining = max(0.0, self._lease.deadline - now)
            error = health.error
            table = self._cache.table
            return GuardStats(
                revision=self._lease.revision,
                lease_remaining=remaining,
                last_sync_age=None if synced_at is None else now - synced_at,
                error=None if error is None else f"{type(error).__name__}: {error}",
                failures=health.failures,
                woken_by="refresher" if self._running() else "callers",
                users=len(self._cache),
                preloaded=None if table is None or not table.whole else len(table),
                loads=self._loads.count,
                evictions=self._cache.evictions,
                denials=self._tally.counts(),
                ready=remaining > 0,
            )

    def start(self) -> None:
        """Start the refresher, a daemon thread that keeps the lease running. Twice is no error."""
        self._refreshing = True
        self._keep_refreshing()

    def close(self) -> None:
        """Stop the refresher. The store is the host's to close."""
        self._refreshing = False
        refresher = self._refresher
        if refresher is not None:
            refresher.stop()
            self._refresher = None

    def _running(self) -> bool:
        return self._refresher is not None and self._refresher.running

    def _keep_refreshing(self) -> None:
        """Start the refresher if it should run and does not, as in a forked child."""
        _fork.check()
        if self._refreshing and not self._running() and not self._lease.entered():
            with self._lease.lock:
                if self._refreshing and not self._running():
                    guard = weakref.ref(self)
                    self._refresher = Refresher(
                        self._lease,
                        lambda refresher: getattr(guard(), "_refresher", None) is refresher,
                        max_staleness=self._max_staleness,
                        preload=self._preload,
                    )
                    self._refresher.start()

    def _revive(self) -> None:
        try:
            self._keep_refreshing()
        except RuntimeError:
            # No thread is to be had now. Answers need none: who asks syncs, and tries again.
            _log.debug("the refresher could not be started", exc_info=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def _before_fork(self) -> None:
        """Keep other threads from writing what the child will remember."""
        self._lease.lock.acquire()

    def _after_fork_in_parent(self) -> None:
        """Let other threads write again."""
        with contextlib.suppress(RuntimeError):  # `_before_fork` was interrupted
            self._lease.lock.release()

    def _after_fork_in_child(self) -> None:
        """Keep what is remembered, and replace what belongs to the parent's threads."""
        self._lease.after_fork_in_child()
        self._loads.forget()
        self._tally.renew_lock()
        if self._preload is not None:
            self._preload.forget()
        self._refresher = None
