"""Decide whether a user may log in from an address, from memory if possible.

How a decision is made::

    is_allowed ── user remembered ──▶ `_fast_path`: the deadline, two look-ups, the clock
        └── otherwise ──▶ check ──▶ `_slow_path`: canonical username, strict address, the rules
                                      ├─▶ `_lease`: one sync if the lease is over
                                      ├─▶ `_table`: rows, position, deadline, and their lock
                                      └─▶ `_slow_path.SingleFlight`: one read for all who miss
    saw ──▶ `_sightings`: a queue, and a thread that gives it to the store
    start / with ──▶ `_refresher`: syncs before the lease ends
                       └─▶ `_preload`: reads all restricted users, and keeps them current
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal, Self

import attrs

from ipguard import _fork
from ipguard._checks import check_callable, check_seconds, check_switch, check_whole
from ipguard.addresses import parse_address
from ipguard.errors import (
    AddressError,
    InvalidValue,
    StoreUnavailable,
    UsernameError,
    shorten,
)
from ipguard.guard._backlog import Backlog, Callback
from ipguard.guard._denials import DenialLog
from ipguard.guard._fast_path import Tally, bind
from ipguard.guard._lease import Lease, time_asleep
from ipguard.guard._preload import Preload
from ipguard.guard._refresher import Followers, Refresher
from ipguard.guard._sightings import Recorder, RefusalCallback, RefusalFollowers
from ipguard.guard._slow_path import SingleFlight, SlowPath
from ipguard.guard._table import Table
from ipguard.model import Decision, Explanation, Outcome, Reason, Refusal
from ipguard.rules import decide, refusals, summarise
from ipguard.store import Closing, RestrictionStore
from ipguard.usernames import canonical_username

__all__ = ["Guard", "GuardStats"]

_log = logging.getLogger("ipguard.guard")

_ALLOWING: Final = (Reason.UNRESTRICTED, Reason.LISTED)

Observer = Callable[[object, object, Decision], object]


@attrs.frozen(kw_only=True)
class GuardStats:
    """The state of a guard. Allowed logins are counted only on request: `Guard.count_allows`.

    Attributes:
        revision: The store's revision that all remembered users are current to.
        lease_remaining: For how many seconds it may answer without the store; 0.0 if the lease is
            over.
        last_sync_age: Seconds since the read that last renewed the lease began; None before the
            first.
        error: The store's last failure; None while it answers.
        failures: How many attempts have failed in a row.
        woken_by: `refresher` if that thread runs, else `callers`: their checks sync.
        users: How many users are remembered.
        preloaded: With `preload`: how many restricted users are held, including those that are
            being read again; None until the snapshot is complete.
        loads: How many policies were read from the store.
        store_errors: How many calls to the store have failed.
        evictions: How many users were evicted to make room.
        denials: How many logins were denied, by reason; with `report_only`, would have been.
        decisions: How many logins were decided, by outcome and reason. The reasons that allow are
            missing unless allowed logins are counted.
        ready: Whether it can answer from memory.
        sightings_written: How many logins that `saw` was called for were given to the store.
        sightings_lost: How many were not, because there were too many or the store failed.
        sightings_waiting: How many are not written yet; most of them for up to an hour.
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
    store_errors: int
    evictions: int
    denials: Mapping[Reason, int]
    decisions: Mapping[tuple[Outcome, Reason], int]
    ready: bool
    sightings_written: int
    sightings_lost: int
    sightings_waiting: int


@attrs.define(kw_only=True)
class Internals:
    """The parts of a guard that `ipguard.aio` runs on an event loop. Not public.

    Attributes:
        fast_path: Answers from a remembered row, else returns None; None if all calls must be
            checked.
        recall: Decides without I/O; see `SlowPath.recall`. Raises nothing.
        answer: Decides with I/O. Raises nothing.
        report: Counts a decision, calls the observer, and returns what the caller gets.
        denied: Makes a denial that rests on no policy.
        patience: How long to wait for another call to the store, in seconds.
        backlog: Makes a queue of bounded size for a follower.
        add_follower: Does what `Guard.follow` does, without I/O.
    """

    fast_path: Callable[[str, str], bool | None] | None
    recall: Callable[..., Decision | None]
    answer: Callable[[str, str, int | None], Decision]
    report: Callable[[str, str, Decision], Decision]
    denied: Callable[[Reason], Decision]
    patience: float
    backlog: Callable[[], Backlog]
    add_follower: Callable[[Callback], Callable[[], None]]


class Guard(Closing, _fork.Forkable):
    """Decides whether users may log in, from memory if possible.

    No decision rests on a state of the store older than `max_staleness`, whatever fails.
    Thread-safe, and survives `fork()`. Reads nothing and starts no thread before the first check,
    `start()` or `follow`.

    Args:
        store: The store to read policies from.
        max_staleness: The maximum age, in seconds, of the state that a decision rests on.
        outage_grace: For how many more seconds remembered users are still answered if the store
            does not answer; such decisions are `stale`. With it, a deleted restriction may keep
            allowing logins for that long during an outage.
        capacity: How many users to remember. Each takes about 400 bytes with three restrictions.
        preload: Hold every restricted user in memory, at about 150 bytes plus the username each, so
            that no login waits for the store. The refresher reads them, or `sync` if it does not
            run; until then, users are read singly.
        unknown_users: `"allow"`: an unregistered user without restrictions may log in from any
            address. `"deny"`, recommended once the host keeps its users registered: it may not.
        report_only: Allow every login; `reason` stays what it would have been, and is logged and
            passed to the observer. For trying ipguard out before it is enforced.
        observer: Called as `observer(username, address, decision)` for each decision, on the
            caller's thread. Its exceptions are logged and change nothing. It makes `is_allowed`
            slower: each call then takes the slow path.
        monotonic: The clock for ages, in seconds. For tests.

    Raises:
        InvalidValue: A setting is not valid.
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
        check_seconds("max_staleness", max_staleness, above=0)
        check_seconds("outage_grace", outage_grace, least=0)
        if not hasattr(store, "load_policy"):
            raise InvalidValue("store", "is not a restriction store; open_store opens one")
        check_switch("preload", preload)
        check_switch("report_only", report_only)
        for name, function in (("observer", observer), ("monotonic", monotonic)):
            if function is not None:
                check_callable(name, function)
        check_whole("capacity", capacity, 1)
        if unknown_users not in ("allow", "deny"):
            raise InvalidValue("unknown_users", 'must be "allow" or "deny"')
        clock = monotonic or time.monotonic
        deny_unknown = unknown_users == "deny"
        self._store = store
        self._deny_unknown = deny_unknown
        self._report_only = report_only
        self._outage_grace = outage_grace
        self._observer = observer
        self._monotonic = clock
        self._table = Table(
            capacity=capacity, max_staleness=max_staleness, deny_unknown=deny_unknown
        )
        self._lease = Lease(
            store,
            self._table,
            max_staleness=max_staleness,
            monotonic=clock,
            # An injected clock does not depend on whether the machine sleeps.
            asleep=time_asleep if monotonic is None else lambda: 0.0,
        )
        self._loads = SingleFlight(
            store, self._table, self._lease, max_staleness=max_staleness, monotonic=clock
        )
        self._slow_path = SlowPath(
            store,
            self._table,
            self._lease,
            self._loads,
            outage_grace=outage_grace,
            monotonic=clock,
        )
        self._preload = Preload(store, self._table, self._lease, self._loads) if preload else None
        self._followers = Followers(self._table)
        self._refresher = Refresher(
            weakref.ref(self),
            self._table,
            self._lease,
            self._preload,
            weakref.ref(self._followers),
            max_staleness=max_staleness,
        )
        self._refusals = RefusalFollowers()
        self._sightings = Recorder(self, store, self._table, weakref.ref(self._refusals), clock)
        self._tally = Tally()
        self._denial_log = DenialLog(self._table, clock, report_only=report_only)
        self._counts_allows = False
        fast_path = self._fast_path(
            lambda username, address: (
                self._report(username, address, self._answer(username, address, None)).allowed
            )
        )
        if fast_path is None:
            self._counts_allows = True
        else:
            # Override the method on this instance, so that guards without an observer skip its
            # cost.
            fast_path.__doc__ = Guard.is_allowed.__doc__
            self.__dict__["is_allowed"] = fast_path
        self._parts = Internals(
            fast_path=self._fast_path(lambda _username, _address: None),
            recall=self._recall,
            answer=self._answer,
            report=self._report,
            denied=self._slow_path.denied,
            patience=self._lease.patience,
            backlog=partial(Backlog, None),
            add_follower=self._followers.add,
        )
        _fork.register(self)

    def is_allowed(self, username: str, address: str) -> bool:
        """Return whether a user may log in from an address, now.

        Args:
            username: The username of the host's user record, after the host has authenticated the
                user; not the text that was typed.
            address: The client's address: the peer's, or from the header of a trusted proxy.

        Returns:
            Whether the login may go on. Client input never raises: anything but a valid address as
            str is not allowed. Nothing is allowed while the store does not answer.
        """
        return self.check(username, address).allowed

    def _fast_path(
        self, otherwise: Callable[[str, str], bool | None]
    ) -> Callable[[str, str], bool | None] | None:
        """Return the fast path, or None if each call must go through `check`."""
        kind = type(self)
        overridden = not (kind.is_allowed is Guard.is_allowed and kind.check is Guard.check)
        if overridden or self._report_only or self._observer is not None:
            return None
        preload = self._preload is not None
        return bind(self._table, self._monotonic, self._deny, otherwise, preload=preload)

    def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        """Decide whether a user may log in from an address, now, and say why.

        Args:
            username: As for `is_allowed`.
            address: As for `is_allowed`.
            at_least: A revision that the decision must rest on, such as `Applied.revision`. If one
                sync does not reach it, the decision is `STORE_UNAVAILABLE`; `wait_for` waits. A
                revision from before a restored backup or a failover that lost commits has no
                meaning afterwards, and this cannot be detected: discard it.

        Returns:
            The decision. Client input never raises.
        """
        decision = self._recall(username, address, at_least, refuse=False)
        if decision is None:
            decision = self._answer(username, address, at_least)
        return self._report(username, address, decision)

    def _recall(
        self, username: str, address: str, at_least: int | None, *, refuse: bool | None = None
    ) -> Decision | None:
        """Decide from memory as `SlowPath.recall` does, and raise nothing."""
        try:
            return self._slow_path.recall(username, address, at_least, refuse=refuse)
        except Exception:
            _log.debug("the remembered row could not be used", exc_info=True)
            return None

    def _answer(self, username: str, address: str, at_least: int | None) -> Decision:
        """Decide, with I/O if necessary, and raise nothing."""
        try:
            self._revive()
            return self._slow_path.answer(username, address, at_least)
        except Exception:
            # A defect, here or in a store. It must not become an allow, nor fail the login server's
            # request with an error that a client can provoke.
            _log.exception("a check failed; the login is not allowed")
            return self._slow_path.denied(Reason.STORE_UNAVAILABLE)

    def _report(self, username: str, address: str, decision: Decision) -> Decision:
        """Count a decision, log it, call the observer, and return what the caller gets."""
        if not decision.allowed:
            self._deny(username, address, decision.reason, decision.revision)
        elif self._counts_allows:
            self._tally.add(decision.reason)
        if self._report_only:
            decision = attrs.evolve(decision, allowed=True)
        if self._observer is not None:
            try:
                self._observer(username, address, decision)
            except Exception:
                _log.exception("the observer failed")
        return decision

    def _deny(
        self, username: str, address: str, reason: Reason, revision: int | None = None
    ) -> None:
        """Count and log a denial."""
        self._tally.add(reason)
        self._denial_log.write(username, address, reason, revision)

    def explain(self, username: str, address: str) -> Explanation:
        """Explain to an operator how a check is decided and why. Always reads the store.

        Args:
            username: As for `check`.
            address: As for `check`.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        now = self._store.now()
        try:
            client = parse_address(address)
        except AddressError:
            client = None
        shown = None if client is None else str(client)
        try:
            name = canonical_username(username)
        except UsernameError as exc:
            return Explanation(
                username=str(exc.text),
                address=shown,
                decision=self._slow_path.denied(Reason.BAD_USERNAME),
                restrictions=(),
                known=False,
                at=now,
                summary=str(exc),
            )
        try:
            policy = self._store.load_policy(name)
        except StoreUnavailable:
            raise
        except Exception as exc:
            raise StoreUnavailable(f"the store does not answer: {exc}") from exc
        decision = decide(policy, client, now, deny_unknown=self._deny_unknown)
        refused: tuple[Refusal, ...] = ()
        with contextlib.suppress(Exception):  # an explanation without them is better than none
            refused = refusals(self._store.sightings(name), policy.restrictions, now)
        return Explanation(
            username=name,
            address=shown,
            decision=decision,
            restrictions=policy.restrictions,
            known=policy.known,
            at=now,
            summary=(
                f"{name} from {shown or shorten(address)}: "
                f"{'allowed' if decision else 'not allowed'} ({decision.reason}). "
                f"{'Registered' if policy.known else 'Not registered'}; "
                f"restricted to: {summarise(policy.restrictions, now)}."
            ),
            refused=refused,
        )

    def sync(self) -> int:
        """Read what has changed, now. Calling it is optional: checks do when the lease is over.

        Without a refresher, it also reads the preloaded users that are missing, and calls the
        callbacks of `follow`.

        Returns:
            The guard's revision.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._revive()
        self._lease.sync()
        if not self._refresher.running:
            if self._preload is not None:
                self._preload.fill(threading.Event())
                self._preload.read_again(math.inf)
            self._followers.deliver(math.inf)
        return self.revision

    def wait_for(self, revision: int, timeout: float) -> bool:
        """Wait until every decision of this guard rests on a revision or a later one.

        Args:
            revision: Such as `Applied.revision`; as for `at_least` of `check`.
            timeout: The maximum time to wait, in seconds, even if the store hangs. With 0 or less,
                start a sync and do not wait for it.

        Returns:
            Whether the guard has reached the revision; False at the timeout.

        Raises:
            InvalidValue: The timeout is not a number of seconds.
        """
        check_seconds("timeout", timeout)
        until = time.monotonic() + timeout
        woken = False
        while (before := self.revision) < revision:
            if not self._lease.breaker.is_open():
                self._lease.sync_within(until - time.monotonic())
            left = until - time.monotonic()
            if self.revision >= revision or left <= 0:
                break
            if woken and self.revision == before:
                # A store that wakes the caller for nothing must not make it spin.
                threading.Event().wait(min(left, 0.01))
            woken = self._lease.wait(min(left, 0.1))
        return self.revision >= revision

    def healthy(self, timeout: float = 1.0) -> bool:
        """Return whether an answer is possible now, for readiness probes.

        It renews a lease that is over, and in a forked child it starts the refresher again if it
        ran in the parent. `GuardStats.ready` does neither.

        Args:
            timeout: The maximum time to wait for the store, in seconds, even if it hangs.

        Returns:
            Whether the lease runs; or `outage_grace` does, in which remembered users are answered.

        Raises:
            InvalidValue: The timeout is not a number of seconds.
        """
        check_seconds("timeout", timeout)
        self._revive()
        if not (self._lease.is_running() or self._lease.breaker.is_open()):
            self._lease.sync_within(timeout)
        return self._monotonic() < self._table.deadline + self._outage_grace

    def follow(self, callback: Callback) -> Callable[[], None]:
        """Call a function after each sync that dropped users, to check open sessions again.

        The refresher calls it on its thread, in the order of the syncs; a guard without a
        refresher calls it in `sync`, and never in a check. A check of such a user, by the callback
        or later, rests on the new state. No change after this call is left out: if the guard has
        not synced yet, this call does so, and if the store does not answer, the first sync is
        `EVERYBODY`.

        Args:
            callback: Called as `callback(usernames, revision)`, with the canonical usernames of
                those whose policy may have changed, as a frozenset or as `ipguard.EVERYBODY`, and
                the guard's revision. It is called at least once for each change. Its exceptions are
                logged. While it runs, the refresher waits: a change may be seen later, at the
                latest when the lease ends. If more than 1,000 usernames are waiting, they become
                one `EVERYBODY`.

        Returns:
            A function that ends it.

        Raises:
            InvalidValue: The callback cannot be called.
        """
        check_callable("callback", callback)
        if self._table.position.token is None:
            self._lease.ensure(0)
        return self._followers.add(callback)

    def saw(self, username: str, address: str, decision: object) -> None:
        """Record that a user gave the right password, whether the login was allowed or not.

        Call it after the password, and every other step of the login, was right. Never call it
        before: then anybody could make up where a user logs in from. It takes about a microsecond,
        raises nothing, and waits for nothing. A thread, started by the first call, writes to the
        store in batches: a user and address at once when it is new, later at most once an hour.
        What the store does not take is lost, and counted in `stats()`; what waits when the process
        ends is lost unless `close` is called. Users who are not registered are left out.

        Args:
            username: As for `check`.
            address: As for `check`.
            decision: The decision of `check`, or anything that is true if the login was allowed. A
                decision with `STORE_UNAVAILABLE` or the outcome `RETRY` is not recorded.
        """
        self._sightings.add(username, address, decision)

    def follow_refusals(self, callback: RefusalCallback) -> Callable[[], None]:
        """Call a function when a login with the right password was refused, to tell its user.

        That is at most once a day for each user and address, on all servers together. Logins go on
        being recorded between two calls; if more than 1,000 wait, the oldest are left out.

        Args:
            callback: Called as `callback(sighting)` on the thread of `saw`, such as
                `Workflow.tell_refused`. Its exceptions are logged.

        Returns:
            A function that ends it.

        Raises:
            InvalidValue: The callback cannot be called.
        """
        check_callable("callback", callback)
        key, followers = object(), self._refusals
        followers[key] = callback

        def end() -> None:
            followers.pop(key, None)

        return end

    @property
    def revision(self) -> int:
        """The store's revision that all remembered users are current to; 0 before a sync."""
        return self._table.position.revision

    def stats(self) -> GuardStats:
        """Return the state of the guard, without I/O."""
        table, breaker, now = self._table, self._lease.breaker, self._monotonic()
        with table.lock:  # all figures are of one moment
            users, preloaded = table.count()
            remaining = max(0.0, table.deadline - now)
            synced_at, error = table.synced_at, breaker.error
            counts = self._tally.counts()
            return GuardStats(
                revision=self.revision,
                lease_remaining=remaining,
                last_sync_age=None if synced_at is None else now - synced_at,
                error=None if error is None else f"{type(error).__name__}: {error}",
                failures=breaker.failures,
                woken_by="refresher" if self._refresher.running else "callers",
                users=users,
                preloaded=preloaded,
                loads=self._loads.count,
                store_errors=breaker.errors,
                evictions=table.evictions,
                denials={each: count for each, count in counts.items() if each not in _ALLOWING},
                decisions={
                    (self._outcome(reason), reason): counts[reason]
                    for reason in Reason
                    if self._counts_allows or reason not in _ALLOWING
                },
                ready=remaining > 0,
                sightings_written=self._sightings.written,
                sightings_lost=self._sightings.lost,
                sightings_waiting=self._sightings.waiting(),
            )

    def _outcome(self, reason: Reason) -> Outcome:
        """Return what hosts do with this guard's decisions for a reason."""
        allowed = self._report_only or reason in _ALLOWING
        return Decision(allowed=allowed, reason=reason, revision=0).outcome

    def count_allows(self) -> None:
        """Count allowed logins too, from now on; see `GuardStats.decisions`.

        The fast path does not count what it allows. So `is_allowed` then takes as long as `check`,
        some microseconds. Functions that were taken from the guard before
        (`allowed = guard.is_allowed`) go on without counting. A guard with an observer or
        `report_only` counts in any case.
        """
        self._counts_allows = True
        self.__dict__.pop("is_allowed", None)
        self._parts.fast_path = None

    def start(self) -> None:
        """Start the refresher, a daemon thread that renews the lease. May be called repeatedly."""
        _fork.check()
        self._refresher.start()

    def close(self) -> None:
        """Stop the refresher, and write what `saw` was called for, within two seconds.

        The host closes the store, afterwards.
        """
        self._refresher.stop()
        self._sightings.stop()

    def _revive(self) -> None:
        _fork.check()
        thread = self._refresher.thread
        if not self._refresher.wanted or (thread is not None and thread.is_alive()):
            return
        try:
            self._refresher.revive()
        except RuntimeError:
            # No thread can be started now. Checks need none: they sync, and try again.
            _log.debug("the refresher could not be started", exc_info=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def _before_fork(self) -> None:
        # No thread may be in the middle of writing what the child inherits.
        self._table.lock.acquire()

    def _after_fork_in_parent(self) -> None:
        with contextlib.suppress(RuntimeError):  # `_before_fork` was interrupted
            self._table.lock.release()

    def _after_fork_in_child(self) -> None:
        self._table.after_fork()
        self._lease.after_fork()
        self._loads.after_fork()
        self._tally.renew_lock()
        self._denial_log.renew_lock()
        self._followers.after_fork()
        self._refresher.after_fork()
        self._sightings.after_fork()
        if self._preload is not None:
            self._preload.after_fork()


def internals(guard: Guard) -> Internals:
    """Return the parts of a guard that `ipguard.aio` runs on an event loop."""
    return guard._parts  # noqa: SLF001 - the one opening for another room
