"""`Guard` and `Workflow` for asyncio: the same methods, to await.

    async with AsyncGuard(store) as guard:
        if await guard.is_allowed("jsmith", "203.0.113.7"): ...

A remembered user is answered on the event loop: no thread, no I/O, no waiting. Other calls run on
daemon threads of this module, so that a store that hangs cannot use up the threads that the host
needs. The threads and their queue are bounded: if both are full, logins are denied.

A coroutine may be cancelled at any await. A call that still waits for a thread is withdrawn; a call
that runs on a thread runs to its end there, and then frees the thread.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from datetime import timedelta
from itertools import islice
from typing import (
    Any,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

from ipguard._checks import check_seconds
from ipguard.aio._executor import Executor
from ipguard.errors import InvalidValue, StoreUnavailable
from ipguard.guard import Guard, GuardStats, Observer, internals
from ipguard.model import AccessLine, Actor, Decision, Explanation, Reason, Sighting, Touched
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore
from ipguard.workflow import Workflow, WorkflowSettings

__all__ = ["AsyncGuard", "AsyncWorkflow", "GuardSettings"]

_log = logging.getLogger("ipguard.aio")

_P = ParamSpec("_P")
_T = TypeVar("_T")

_GRACE: Final = 0.05  # seconds
_LINES: Final = 1000  # of a report, read at once


class GuardSettings(TypedDict, total=False):
    """The keyword arguments of `Guard`; see there."""

    max_staleness: float
    outage_grace: float
    capacity: int
    preload: bool
    unknown_users: Literal["allow", "deny"]
    report_only: bool
    observer: Observer | None
    monotonic: Callable[[], float] | None


class _AsyncClosing(ABC):
    @abstractmethod
    async def close(self) -> None:
        """Let all threads end."""

    async def aclose(self) -> None:
        """Call `close`, under the name that `contextlib.aclosing` uses."""
        await self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncGuard(_AsyncClosing):
    """A `Guard` whose methods are awaited.

    Create it with the arguments of a `Guard`, or from one. `is_allowed` and `check` answer on the
    event loop if they need no I/O: for remembered users, for malformed addresses and usernames, and
    for all calls while the circuit breaker is open. Other calls go to `threads` threads, and up to
    `waiting` calls wait for one. Beyond that, logins are denied at once with `STORE_UNAVAILABLE`
    (within `outage_grace`, remembered users are answered). `explain`, `sync` and `wait_for` use
    `threads` other threads, so that they do not delay logins; if too many calls wait for these,
    `explain` and `sync` raise `StoreUnavailable`, as if the store does not answer.

    The observer is called on the event loop, for each decision: it must not block.

    Args:
        store: The store to read policies from; or a `Guard`, which other threads may keep using.
        threads: How many calls to the store may run at once.
        waiting: How many more calls may wait for a thread.
        settings: The other arguments of `Guard`; none if `store` is a `Guard`.

    Attributes:
        guard: The guard behind this one; both remember the same users.

    Raises:
        InvalidValue: A setting is not valid; the guard's class overrides `check` or `is_allowed`,
            which would not be called; or gevent has patched threads.
    """

    def __init__(
        self,
        store: RestrictionStore | Guard,
        *,
        threads: int = 4,
        waiting: int = 64,
        **settings: Unpack[GuardSettings],
    ) -> None:
        self._logins = Executor(threads, waiting)
        self._others = Executor(threads, waiting)
        if not isinstance(store, Guard):
            store = Guard(store, **settings)
        elif settings:
            raise InvalidValue(min(settings), "is a setting of the guard that was passed")
        kind = type(store)
        if not (kind.check is Guard.check and kind.is_allowed is Guard.is_allowed):
            raise InvalidValue("guard", "overrides check or is_allowed: override AsyncGuard's")
        self.guard: Guard = store
        self._parts = internals(store)
        # By event loop and user: the first call about that user that is in progress. The references
        # are weak, because a loop that was closed runs no callback to remove its calls.
        self._asking: weakref.WeakValueDictionary[tuple[int, str | int], asyncio.Future[Decision]]
        self._asking = weakref.WeakValueDictionary()

    async def is_allowed(self, username: str, address: str) -> bool:
        """Return whether a user may log in from an address, now; see `Guard.is_allowed`."""
        fast_path = self._parts.fast_path
        allowed = None if fast_path is None else fast_path(username, address)
        if allowed is None:
            allowed = (await self.check(username, address)).allowed
        return allowed

    async def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        """Decide whether a user may log in from an address, and say why; see `Guard.check`."""
        decision = self._parts.recall(username, address, at_least)
        if decision is None:
            decision = await self._ask(username, address, at_least)
        return self._parts.report(username, address, decision)

    async def _ask(self, username: str, address: str, at_least: int | None) -> Decision:
        """Return the decision of a thread.

        Calls about the same user wait for the first of them, so they take one thread together.
        """
        # Calls in progress refer to their loop, so no other loop can have its id meanwhile.
        loop = id(asyncio.get_running_loop())
        # A subclass of str may hash and compare differently.
        key = loop, username if type(username) is str else id(username)
        while (other := self._asking.get(key)) is not None:
            await asyncio.wait((other,), timeout=self._parts.patience)
            decision = self._parts.recall(username, address, at_least)
            if decision is not None:
                return decision
            if not other.cancelled():
                break  # the first call hangs, or its result was not remembered
        try:
            asking = self._logins.begin(self._parts.answer, username, address, at_least)
        except StoreUnavailable:  # no thread is free; `answer` raises nothing
            refused = self._parts.recall(username, address, at_least, refuse=True)
            return self._parts.denied(Reason.STORE_UNAVAILABLE) if refused is None else refused
        if self._asking.setdefault(key, asking) is asking:
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asking

    async def saw(self, username: str, address: str, decision: object) -> None:
        """Record that a user gave the right password; see `Guard.saw`.

        It waits for nothing and stays on the event loop.
        """
        self.guard.saw(username, address, decision)

    def follow_refusals(self, callback: Callable[[Sighting], object]) -> Callable[[], None]:
        """Call a function when a login with the right password was refused.

        The function is called on a thread, as by `Guard.follow_refusals`. The `tell_refused` of the
        `Workflow` behind an `AsyncWorkflow` is such a function: `flow.flow.tell_refused`.
        """
        return self.guard.follow_refusals(callback)

    async def explain(self, username: str, address: str) -> Explanation:
        """Explain to an operator how a check is decided and why; see `Guard.explain`."""
        return await self._others.run(self.guard.explain, username, address)

    async def sync(self) -> int:
        """Read what has changed, now, and return the revision; see `Guard.sync`."""
        return await self._others.run(self.guard.sync)

    async def wait_for(self, revision: int, timeout: float) -> bool:  # noqa: ASYNC109 - as Guard's
        """Wait until every decision rests on a revision or a later one; see `Guard.wait_for`.

        Returns False at the timeout, or at once if too many calls wait for a thread.
        """
        check_seconds("timeout", timeout)
        if self.guard.revision >= revision:
            return True
        # The thread has the same timeout; this one is for a call that gets no thread.
        try:
            async with asyncio.timeout(max(0.0, timeout) + _GRACE):
                return await self._others.run(self.guard.wait_for, revision, timeout)
        except (StoreUnavailable, TimeoutError):
            return self.guard.revision >= revision

    async def healthy(self, timeout: float = 1.0) -> bool:  # noqa: ASYNC109 - as Guard's
        """Return whether an answer is possible now; see `Guard.healthy`.

        If too many calls wait for a thread, return whether the lease runs.
        """
        check_seconds("timeout", timeout)
        try:
            async with asyncio.timeout(max(0.0, timeout) + _GRACE):
                return await self._others.run(self.guard.healthy, timeout)
        except (StoreUnavailable, TimeoutError):
            return self.guard.stats().ready

    def follow(self) -> AsyncGenerator[tuple[frozenset[str] | Touched, int]]:
        """Iterate over what syncs drop: `async for usernames, revision in guard.follow()`.

        See `Guard.follow`, whose callback gets the same; but this call does no I/O, so if the guard
        has not synced yet, its first sync is `EVERYBODY`. It ends when the iterator is closed or no
        longer used.

        Raises:
            RuntimeError: No event loop is running.
        """
        loop, changed, backlog = asyncio.get_running_loop(), asyncio.Event(), self._parts.backlog()

        def add(usernames: frozenset[str] | Touched, revision: int) -> None:
            backlog.add(usernames, revision)
            changed.set()

        def tell(usernames: frozenset[str] | Touched, revision: int) -> None:
            try:
                loop.call_soon_threadsafe(add, usernames, revision)
            except RuntimeError:  # the loop was closed
                end()

        async def iterate() -> AsyncGenerator[tuple[frozenset[str] | Touched, int]]:
            while await changed.wait():
                while (item := backlog.first()) is not None:
                    backlog.remove(item)
                    yield item
                changed.clear()

        end, iterator = self._parts.add_follower(tell), iterate()
        weakref.finalize(iterator, end).atexit = False
        return iterator

    @property
    def revision(self) -> int:
        """The store's revision that all remembered users are current to; 0 before a sync."""
        return self.guard.revision

    def stats(self) -> GuardStats:
        """Return the state of the guard, without I/O, so there is nothing to await."""
        return self.guard.stats()

    def count_allows(self) -> None:
        """Count allowed logins too, from now on; see `Guard.count_allows`."""
        self.guard.count_allows()

    async def start(self) -> None:
        """Start the refresher, a daemon thread that renews the lease."""
        self.guard.start()

    async def close(self) -> None:
        """Stop the guard as `Guard.close` does, and let idle threads end."""
        self._logins.retire()
        self._others.retire()
        last = Executor(threads=1, waiting=0)
        try:
            await last.run(self.guard.close)  # it waits for the refresher's thread
        finally:
            last.retire()

    async def __aenter__(self) -> Self:
        await self.start()
        return self


def _awaited(
    method: Callable[Concatenate[Workflow, _P], _T],
) -> Callable[Concatenate[AsyncWorkflow, _P], Coroutine[Any, Any, _T]]:
    """Create the method that calls a workflow's method on a thread, with its documentation."""

    @functools.wraps(method)
    async def call(self: AsyncWorkflow, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        bound = cast("Callable[_P, _T]", getattr(self.flow, method.__name__))
        return await self._executor.run(bound, *args, **kwargs)

    return call


class AsyncWorkflow(_AsyncClosing):
    """A `Workflow` whose methods are awaited: the same arguments, results and errors.

    Create it with the arguments of a `Workflow`, or from one. Each call runs on one of `threads`
    threads, and up to `waiting` calls wait for one. Beyond that, calls raise `StoreUnavailable` and
    change nothing. The rows of `impose_many` are read, and notifiers called, on that thread.

    Cancelling an await does not undo a change in progress: the transaction commits or fails as a
    whole, and its outcome is lost. Trying again shows it, as after a lost connection:
    `RequestClosed("confirmed")`, `DuplicateRestriction`, `UnknownRestriction`. A call that still
    waits for a thread is withdrawn and changes nothing.

    Args:
        store: The store; or a `Workflow`, and then none of its arguments.
        notifier, key, settings: As for `Workflow`.
        threads: How many calls to the store may run at once.
        waiting: How many more calls may wait for a thread.

    Attributes:
        flow: The workflow behind this one, with its `settings` and `notices_failed`.

    Raises:
        InvalidValue: An argument is not valid, or gevent has patched threads.
    """

    def __init__(
        self,
        store: RestrictionStore | Workflow,
        notifier: Notifier | None = None,
        *,
        key: bytes | Sequence[bytes] | None = None,
        settings: WorkflowSettings | None = None,
        threads: int = 4,
        waiting: int = 64,
    ) -> None:
        self._executor = Executor(threads, waiting)
        if not isinstance(store, Workflow):
            # The workflow refuses what is missing.
            key = () if key is None else key
            store = Workflow(store, cast("Notifier", notifier), key=key, settings=settings)
        elif any(each is not None for each in (notifier, key, settings)):
            raise InvalidValue("store", "is a workflow, which has its notifier, key and settings")
        self.flow: Workflow = store

    request = _awaited(Workflow.request)
    request_many = _awaited(Workflow.request_many)
    preview = _awaited(Workflow.preview)
    demanded = _awaited(Workflow.demanded)
    demand_of = _awaited(Workflow.demand_of)
    preview_request = _awaited(Workflow.preview_request)
    confirm = _awaited(Workflow.confirm)
    approve = _awaited(Workflow.approve)
    cancel = _awaited(Workflow.cancel)
    resend = _awaited(Workflow.resend)
    delete = _awaited(Workflow.delete)
    overview = _awaited(Workflow.overview)
    counts = _awaited(Workflow.counts)
    concerning = _awaited(Workflow.concerning)
    waiting = _awaited(Workflow.waiting)
    history = _awaited(Workflow.history)
    impose = _awaited(Workflow.impose)
    impose_many = _awaited(Workflow.impose_many)
    lift = _awaited(Workflow.lift)
    unlock = _awaited(Workflow.unlock)
    check_row = _awaited(Workflow.check_row)
    user = _awaited(Workflow.user)
    restriction = _awaited(Workflow.restriction)
    own_request = _awaited(Workflow.own_request)
    failures = _awaited(Workflow.failures)
    sightings = _awaited(Workflow.sightings)
    suggest = _awaited(Workflow.suggest)
    refusals = _awaited(Workflow.refusals)
    forget_sightings = _awaited(Workflow.forget_sightings)
    tell_refused = _awaited(Workflow.tell_refused)
    as_of = _awaited(Workflow.as_of)
    restrictions_changed = _awaited(Workflow.restrictions_changed)
    now = _awaited(Workflow.now)

    async def report(
        self, actor: Actor, *, unused: timedelta | None = None
    ) -> AsyncGenerator[AccessLine]:
        """Iterate over the lines of an access review: `async for line in flow.report(actor)`.

        See `Workflow.report`. The lines are read on a thread, many at once.
        """
        lines = self.flow.report(actor, unused=unused)
        while several := await self._executor.run(lambda: list(islice(lines, _LINES))):
            for line in several:
                yield line

    async def close(self) -> None:
        """Let idle threads end. The host closes the store."""
        self._executor.retire()
