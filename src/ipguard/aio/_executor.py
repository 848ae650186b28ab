"""A bounded thread pool: no queue grows behind a slow store.

The executor of `concurrent.futures` has an unbounded queue, its threads keep the process from
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
from ipguard.errors import InvalidValue, StoreUnavailable

_P = ParamSpec("_P")
_T = TypeVar("_T")

_IDLE_TIMEOUT: Final = 10.0  # seconds


class Executor(_fork.Forkable):
    """Runs at most `threads` calls at once, with `waiting` more in its queue.

    Daemon threads are started on demand and end when idle. A forked child starts with no threads
    and an empty queue.

    Raises:
        InvalidValue: A number is not valid, or gevent has patched threads: waiting for one would
            stop the event loop for good.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        monkey = sys.modules.get("gevent.monkey")
        if monkey is not None and monkey.is_module_patched("threading"):
            raise InvalidValue(
                "threading",
                "is patched by gevent, and asyncio needs real threads: use Guard, Workflow",
            )
        self._threads = check_whole("threads", threads, 1)
        self._waiting = check_whole("waiting", waiting, 0)
        self._after_fork_in_child()
        _fork.register(self)

    def begin(
        self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> asyncio.Future[_T]:
        """Call a function on a thread, in the caller's context; return a future of its result.

        Raise StoreUnavailable if all threads are busy and the queue is full.
        """
        context = contextvars.copy_context()
        return asyncio.wrap_future(
            self._submit(functools.partial(context.run, function, *args, **kwargs))
        )

    async def run(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function on a thread, as `begin` does, and wait for its result."""
        return await self.begin(function, *args, **kwargs)

    def retire(self) -> None:
        """Let idle threads end now."""
        with self._entered():
            self._retired = True
            self._changed.notify_all()

    def _entered(self) -> _fork.ReentrantLock:
        _fork.check()
        return self._lock

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        with self._entered():
            if self._busy + len(self._queue) >= self._threads + self._waiting:
                raise StoreUnavailable("too many calls are waiting for the store")
            self._retired = False
            self._queue[future] = call
            # Remove threads whose start was interrupted.
            self._workers.intersection_update([each for each in self._workers if each.is_alive()])
            alive = len(self._workers)
            if len(self._queue) > alive - self._busy and alive < self._threads:
                self._start_thread(future)
            self._changed.notify()
        future.add_done_callback(self._withdraw)
        return future

    def _start_thread(self, future: Future[Any]) -> None:
        thread = threading.Thread(target=self._work, name="ipguard-aio", daemon=True)
        self._workers.add(thread)
        try:
            thread.start()
        except RuntimeError as exc:
            self._workers.discard(thread)
            if not self._workers:  # else another thread takes the call
                del self._queue[future]
                raise StoreUnavailable(f"no thread can be started: {exc}") from exc

    def _withdraw(self, future: Future[Any]) -> None:
        """Remove a cancelled call from the queue."""
        with self._entered():
            self._queue.pop(future, None)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            future, call = job
            outcome = _outcome(call) if future.set_running_or_notify_cancel() else None
            with self._lock:
                self._busy -= 1  # before the caller can see the result and submit again
            if outcome is not None:
                outcome(future)
            del job, future, call, outcome  # an idle thread keeps no object alive

    def _next(self) -> tuple[Future[Any], Callable[[], object]] | None:
        with self._lock:
            self._changed.wait_for(lambda: self._queue or self._retired, _IDLE_TIMEOUT)
            if not self._queue:
                self._workers.discard(threading.current_thread())
                return None
            self._busy += 1
            return self._queue.popitem(last=False)

    def _after_fork_in_child(self) -> None:
        self._lock = _fork.ReentrantLock()
        self._changed = threading.Condition(self._lock)
        self._queue: OrderedDict[Future[Any], Callable[[], object]] = OrderedDict()
        self._workers: set[threading.Thread] = set()
        self._busy = 0
        self._retired = False


def _outcome(call: Callable[[], object]) -> Callable[[Future[Any]], None]:
    """Make the call, and return a function that sets its result or exception on a future."""
    try:
        return methodcaller("set_result", call())
    except BaseException as exc:
        return methodcaller("set_exception", exc)
