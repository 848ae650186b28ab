"""The guard, to await."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Literal, Self, TypedDict, Unpack
from weakref import WeakValueDictionary

from ipguard._checks import check_seconds
from ipguard.aio._closing import AsyncClosing
from ipguard.aio._executor import Executor, check_threads
from ipguard.errors import InvalidValue, StoreUnavailable
from ipguard.guard import Guard, GuardStats, Observer
from ipguard.model import Decision, Explanation, Reason
from ipguard.store import RestrictionStore

_log = logging.getLogger("ipguard.aio")

_GRACE: Final = 0.05  # seconds


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


class AsyncGuard(AsyncClosing):
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
        # By event loop and user: the first call about a user that is in progress. Held weakly: a
        # loop that is closed meanwhile runs no callback that could remove its calls.
        self._asking: WeakValueDictionary[tuple[int, str | int], asyncio.Future[Decision]]
        self._asking = WeakValueDictionary()
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
        loop = id(asyncio.get_running_loop())  # which the calls in progress keep alive
        key = loop, username if type(username) is str else id(username)
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
            return (
                self.guard._answers.denied(Reason.STORE_UNAVAILABLE)
                if decision is None
                else decision
            )
        if self._asking.setdefault(key, asking) is asking:
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asking

    def _recall(
        self, username: str, address: str, at_least: int | None, *, resting: bool | None
    ) -> Decision | None:
        try:
            return self.guard._answers.recall(username, address, at_least, resting=resting)
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
        # The thread keeps the time itself; this is for a call that gets no thread.
        try:
            async with asyncio.timeout(max(0.0, timeout) + _GRACE):
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

    async def __aenter__(self) -> Self:
        await self.start()
        return self


def _not_remembered(_username: str, _address: str) -> None:
    return None
