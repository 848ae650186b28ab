"""The workflow, to await."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from ipguard.aio._closing import AsyncClosing
from ipguard.aio._executor import Executor, check_threads
from ipguard.errors import InvalidValue
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore
from ipguard.workflow import Workflow, WorkflowSettings

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _awaited(
    method: Callable[Concatenate[Workflow, _P], _T],
) -> Callable[Concatenate[AsyncWorkflow, _P], Coroutine[Any, Any, _T]]:
    """Make the method that calls a workflow's on a thread. It is documented as that one is."""

    @functools.wraps(method)
    async def call(self: AsyncWorkflow, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        bound = cast("Callable[_P, _T]", getattr(self.flow, method.__name__))
        return await self._executor.run(bound, *args, **kwargs)

    return call


class AsyncWorkflow(AsyncClosing):
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
    check_row = _awaited(Workflow.check_row)
    user = _awaited(Workflow.user)
    restriction = _awaited(Workflow.restriction)
    own_request = _awaited(Workflow.own_request)
    failures = _awaited(Workflow.failures)
    now = _awaited(Workflow.now)

    async def close(self) -> None:
        """Let idle threads end. The store is the host's to close."""
        self._executor.retire()
