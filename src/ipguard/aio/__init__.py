"""The guard and the workflow for asyncio: the same methods, to await.

    async with AsyncGuard(store) as guard:
        if await guard.is_allowed("jsmith", "203.0.113.7"): ...

What a guard remembers is answered on the event loop: no thread, no I/O, no waiting. All else runs
on a few daemon threads of this module's own, so that a store which hangs cannot use up the threads
that the host needs for other things. Their number and their queue are bounded: there is no queue
behind a slow store, it denies.

A coroutine may be cancelled at any await. What has not begun is taken back; what has begun on a
thread goes on to its end there, gives its connection back, and frees its place.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

from ipguard.aio._executor import Executor, check_threads
from ipguard.errors import InvalidValue, StoreUnavailable
from ipguard.guard import Guard, GuardStats, Observer
from ipguard.guard._settings import check_seconds
from ipguard.model import Decision, Explanation, Reason
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore
from ipguard.workflow import Workflow, WorkflowSettings

__all__ = ["AsyncGuard", "AsyncWorkflow", "GuardSettings"]

_log = logging.getLogger("ipguard.aio")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class GuardSettings(TypedDict, total=False):
    """The keywords of `Guard`, which say what they mean."""

    max_staleness: float
    outage_grace: float
    capacity: int
    preload: bool
    unknown_users: Literal["allow", "deny"]
    report_only: bool
    observer: Observer | None
    monotonic: Callable[[], float] | None


class AsyncGuard:
    """A `Guard` whose methods are awaited.

    It is made as a `Guard` is, or from one. `is_allowed` and `check` are answered on the event loop
    wherever no I/O is needed: what is remembered, denials as well, text that is no address or no
    username, and everything while the store is known to be down. The rest goes to `threads`
    threads; `waiting` calls may wait for one. Beyond that it is as if the store were down: not
    allowed, `STORE_UNAVAILABLE`, at once (within `outage_grace`, remembered users are answered).
    `explain`, `sync` and `wait_for` have as many threads again, and take no login's place.

    The observer is called on the event loop, for each decision that a caller is given: it must not
    block.

    Args:
        store: Where policies are read; or a `Guard`, which may go on being used by threads.
        threads: How many calls may be at work in the store at once.
        waiting: How many more may wait for their turn.
        settings: What else `Guard` takes; nothing beside a `Guard`.

    Attributes:
        guard: The guard behind it. It shares everything remembered.

    Raises:
        InvalidValue: A setting makes no sense; the guard's class overrides `check` or
            `is_allowed`, which would not be called; or gevent has patched threads.
    """

    def __init__(
        self,
        store: RestrictionStore | Guard,
        *,
        threads: int = 4,
        waiting: int = 64,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_threads()
        if not isinstance(store, Guard):
            store = Guard(store, **settings)
        elif settings:
            raise InvalidValue(min(settings), "belongs to the guard, which is there already")
        kind = type(store)
        if not (kind.check is Guard.check and kind.is_allowed is Guard.is_allowed):
            raise InvalidValue("guard", "overrides check or is_allowed: override AsyncGuard's")
        self.guard: Guard = store
        self._answers = Executor(threads, waiting)
        self._others = Executor(threads, waiting)
        # By event loop and user: the first call about a user that is under way.
        self._asking: dict[tuple[object, str | int], asyncio.Future[Decision]] = {}
        self._hot = store._bind_is_allowed(_not_remembered) or _not_remembered

    async def is_allowed(self, username: str, address: str) -> bool:
        """Tell whether a user may log in from an address, now; see `Guard.is_allowed`."""
        allowed = self._hot(username, address)
        if allowed is None:
            allowed = (await self.check(username, address)).allowed
        return allowed

    async def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        """Decide whether a user may log in from an address, and say why; see `Guard.check`."""
        decision = self._recall(username, address, at_least, resting=None)
        if decision is None:
            decision = await self._asked(username, address, at_least)
        return self.guard._tell(username, address, decision)

    async def _asked(self, username: str, address: str, at_least: int | None) -> Decision:
        """Ask on a thread. Whoever misses on a user whom another one has asked about waits first.

        So that any number who miss on one user together take one place, not all there are.
        """
        # A str of a class of its own may hash and compare as it likes.
        key = asyncio.get_running_loop(), username if type(username) is str else id(username)
        while (other := self._asking.get(key)) is not None:
            await asyncio.wait((other,), timeout=self.guard._lease.patience)
            decision = self._recall(username, address, at_least, resting=None)
            if decision is not None:
                return decision
            if not other.cancelled():
                break  # it hangs, or what it found was not remembered
        try:
            asking = self._answers.begin(self.guard._judge, username, address, at_least)
        except StoreUnavailable:  # no place, or no thread: `_judge` raises nothing
            decision = self._recall(username, address, at_least, resting=True)
            return self.guard._denied(Reason.STORE_UNAVAILABLE) if decision is None else decision
        if self._asking.setdefault(key, asking) is asking:
            asking.add_done_callback(lambda _: self._asking.pop(key))
        return await asking

    def _recall(
        self, username: str, address: str, at_least: int | None, *, resting: bool | None
    ) -> Decision | None:
        try:
            return self.guard._recall(username, address, at_least, resting=resting)
        except Exception:
            _log.debug("what is remembered could not be used", exc_info=True)
            return None

    async def explain(self, username: str, address: str) -> Explanation:
        """Tell an operator how a question is answered and why; see `Guard.explain`.

        Raises:
            StoreUnavailable: The store does not answer, or too many calls wait for it.
        """
        return await self._others.run(self.guard.explain, username, address)

    async def sync(self) -> int:
        """Read what has changed, now, and return the revision; see `Guard.sync`.

        Raises:
            StoreUnavailable: The store does not answer, or too many calls wait for it.
        """
        return await self._others.run(self.guard.sync)

    async def wait_for(self, revision: int, timeout: float) -> bool:  # noqa: ASYNC109 - as Guard's
        """Wait until every answer rests on a revision or a later one; see `Guard.wait_for`.

        Returns:
            Whether the guard is there; False at the timeout, or at once where too many calls wait.

        Raises:
            InvalidValue: The timeout is no number of seconds.
        """
        check_seconds("timeout", timeout)
        if self.guard.revision >= revision:
            return True
        # The thread keeps the time itself. This holds for a call that does not come to its turn.
        patience = max(0.0, timeout) + self.guard._lease.patience
        try:
            async with asyncio.timeout(patience):
                return await self._others.run(self.guard.wait_for, revision, timeout)
        except (StoreUnavailable, TimeoutError):
            return self.guard.revision >= revision

    @property
    def revision(self) -> int:
        """The store's revision that all remembered is current to; 0 before the first sync."""
        return self.guard.revision

    def stats(self) -> GuardStats:
        """Return how the guard is doing, without I/O: nothing to await."""
        return self.guard.stats()

    async def start(self) -> None:
        """Start the refresher, a daemon thread that keeps the lease running."""
        self.guard.start()

    async def close(self) -> None:
        """Stop the refresher, and let idle threads end. The store is the host's to close."""
        self._answers.retire()
        self._others.retire()
        last = Executor(threads=1, waiting=0)
        try:
            await last.run(self.guard.close)  # it waits for the refresher's thread
        finally:
            last.retire()

    aclose = close

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _not_remembered(_username: str, _address: str) -> None:
    return None


def _awaited(
    method: Callable[Concatenate[Workflow, _P], _T],
) -> Callable[Concatenate[AsyncWorkflow, _P], Coroutine[Any, Any, _T]]:
    """Make the method that calls a workflow's on a thread. It is documented as that one is."""

    @functools.wraps(method)
    async def call(self: AsyncWorkflow, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        bound = cast("Callable[_P, _T]", getattr(self.flow, method.__name__))
        return await self._executor.run(bound, *args, **kwargs)

    return call


class AsyncWorkflow:
    """A `Workflow` whose methods are awaited: the same arguments, results and errors.

    It is made as a `Workflow` is, or from one. Each call runs on one of `threads` threads of its
    own; `waiting` calls may wait for one, and beyond that it is `StoreUnavailable`, with nothing
    changed. The rows of `impose_many` are read, and notifiers called, on that thread.

    Cancelling an await does not undo a change that is under way: the transaction commits or fails,
    whole either way, and nobody is there to be told. Trying again shows which, as after a lost
    connection: `RequestClosed("confirmed")`, `DuplicateRestriction`, `UnknownRestriction`. A call
    that still waits for a thread is taken back, and changes nothing.

    Args:
        store: Where everything is kept; or a `Workflow`, and then nothing of what it takes.
        notifier: As `Workflow` takes it.
        key: As `Workflow` takes it.
        settings: As `Workflow` takes it.
        threads: How many calls may be at work in the store at once.
        waiting: How many more may wait for their turn.

    Attributes:
        flow: The workflow behind it, with its `settings` and `notices_failed`.

    Raises:
        InvalidValue: What is given makes no sense, or gevent has patched threads.
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
        check_threads()
        if not isinstance(store, Workflow):
            # What is missing, the workflow refuses.
            key = () if key is None else key
            store = Workflow(store, cast("Notifier", notifier), key=key, settings=settings)
        elif any(each is not None for each in (notifier, key, settings)):
            raise InvalidValue("store", "is a workflow, which has its notifier, key and settings")
        self.flow: Workflow = store
        self._executor = Executor(threads, waiting)

    request = _awaited(Workflow.request)
    confirm = _awaited(Workflow.confirm)
    cancel = _awaited(Workflow.cancel)
    resend = _awaited(Workflow.resend)
    delete = _awaited(Workflow.delete)
    overview = _awaited(Workflow.overview)
    history = _awaited(Workflow.history)
    impose = _awaited(Workflow.impose)
    impose_many = _awaited(Workflow.impose_many)
    lift = _awaited(Workflow.lift)
    unlock = _awaited(Workflow.unlock)
    now = _awaited(Workflow.now)
    derived_keys = _awaited(Workflow.derived_keys)

    async def close(self) -> None:
        """Let idle threads end. The store is the host's to close."""
        self._executor.retire()

    aclose = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
