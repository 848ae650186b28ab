"""A few threads of one's own, with a bounded line: no queue grows behind a store that is slow.

`concurrent.futures` has an executor; its line has no bound, its threads keep the process from
exiting while one of them hangs, and a forked child cannot use it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from operator import methodcaller
from typing import Any, Final, ParamSpec, TypeVar

from ipguard import _fork
from ipguard._checks import check_whole
from ipguard._fork import ReentrantLock
from ipguard.errors import InvalidValue, StoreUnavailable

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LINGER: Final = 10.0  # seconds that a thread waits for more to do


class Executor(_fork.Forkable):
    """At most `threads` calls at work and `waiting` in line.

    Its threads are started when they are needed, end when they have had nothing to do for a while,
    and keep no process from exiting. A forked child begins with none, and with nothing in line.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._threads = check_whole("threads", threads, 1)
        self._waiting = check_whole("waiting", waiting, 0)
        self._after_fork_in_child()
        _fork.register(self)

    def begin(
        self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> asyncio.Future[_T]:
        """Have a function called on one of the threads, in the caller's context.

        Returns:
            What it will return, for the event loop that runs.

        Raises:
            StoreUnavailable: All threads are at work and the line is full.
        """
        context = contextvars.copy_context()
        return asyncio.wrap_future(
            self._submit(functools.partial(context.run, function, *args, **kwargs))
        )

    async def run(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function on one of the threads, as `begin` does, and wait for it."""
        return await self.begin(function, *args, **kwargs)

    def retire(self) -> None:
        """Let threads that have nothing to do end now."""
        with self._entered():
            self._retired = True
            self._stirred.notify_all()

    def _entered(self) -> ReentrantLock:
        _fork.check()
        return self._lock

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        with self._entered():
            if self._busy + len(self._line) >= self._threads + self._waiting:
                raise StoreUnavailable("too many calls are waiting for the store")
            self._retired = False
            self._line[future] = call
            # Less a thread whose start was interrupted.
            self._workers.intersection_update([each for each in self._workers if each.is_alive()])
            alive = len(self._workers)
            if len(self._line) > alive - self._busy and alive < self._threads:
                self._start_thread(future)
            self._stirred.notify()
        future.add_done_callback(self._withdraw)
        return future

    def _start_thread(self, future: Future[Any]) -> None:
        thread = threading.Thread(target=self._work, name="ipguard-aio", daemon=True)
        self._workers.add(thread)
        try:
            thread.start()
        except RuntimeError as exc:
            self._workers.discard(thread)
            if not self._workers:  # else one of the others takes the call
                del self._line[future]
                raise StoreUnavailable(f"no thread can be started: {exc}") from exc

    def _withdraw(self, future: Future[Any]) -> None:
        """Remove a cancelled call from the line."""
        with self._entered():
            self._line.pop(future, None)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            future, call = job
            outcome = _outcome(call) if future.set_running_or_notify_cancel() else None
            with self._lock:
                self._busy -= 1  # before anybody can know, and come with the next call
            if outcome is not None:
                outcome(future)
            del job, future, call, outcome  # an idle thread keeps nothing alive

    def _next(self) -> tuple[Future[Any], Callable[[], object]] | None:
        with self._lock:
            self._stirred.wait_for(lambda: self._line or self._retired, _LINGER)
            if not self._line:
                self._workers.discard(threading.current_thread())
                return None
            self._busy += 1
            return self._line.popitem(last=False)

    def _after_fork_in_child(self) -> None:
        """Start over, as a new executor does."""
        self._lock = ReentrantLock()
        self._stirred = threading.Condition(self._lock)
        self._line: OrderedDict[Future[Any], Callable[[], object]] = OrderedDict()
        self._workers: set[threading.Thread] = set()
        self._busy = 0
        self._retired = False


def _outcome(call: Callable[[], object]) -> Callable[[Future[Any]], None]:
    """Make the call, and return what tells a future how it went."""
    try:
        return methodcaller("set_result", call())
    except BaseException as exc:
        return methodcaller("set_exception", exc)


def check_threads() -> None:
    """Refuse threads that are none.

    Raises:
        InvalidValue: gevent has patched them: waiting for one would stop the event loop for good.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        raise InvalidValue(
            "threading", "is patched by gevent, and asyncio needs real threads: use Guard, Workflow"
        )
