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

from ipguard.aio._guard import AsyncGuard, GuardSettings
from ipguard.aio._workflow import AsyncWorkflow

__all__ = ["AsyncGuard", "AsyncWorkflow", "GuardSettings"]
