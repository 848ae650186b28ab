"""Locks that survive a signal handler that raises, and one that asks the guard again.

A signal handler runs between two bytecodes of the main thread. CPython (3.11 to 3.13) looks for
signals after a call, at a backward jump and when a function starts, but not between a C function
and the block that it protects. So three forms are safe:

* `with lock:`, as long as `__enter__` and `__exit__` are C functions. Those of
  `threading.Condition` and of `contextmanager` are not.
* `acquire` below, with a list that the caller made before its `try`.
* A release that is the first call in its `finally` block.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

_Base: Any = type(threading.RLock())


class ReentrantLock(_Base):  # type: ignore[misc]
    """A lock that its own thread may take again, so that a signal handler cannot deadlock.

    Use it with `with` alone.
    """

    def owned(self) -> bool:
        """Return whether this thread holds the lock."""
        owned: bool = self._is_owned()
        return owned

    def locked(self) -> bool:
        """Return whether any thread holds the lock."""
        return self.owned() or "unlocked" not in repr(self)


class _Lock(Protocol):
    def acquire(self, blocking: bool, timeout: float, /) -> bool: ...  # noqa: FBT001


def acquire(lock: _Lock, timeout: float, held: list[bool]) -> bool:
    """Acquire a lock in a bounded time, recording that in the same C call.

    The caller makes `held` before its `try`, and releases the lock in `finally` if True is in it.

    Args:
        lock: A lock of the threading module.
        timeout: How long to wait, in seconds; not at all if it is not positive.
        held: An empty list; the result is appended to it.

    Returns:
        Whether the lock was acquired.
    """
    held.extend(map(lock.acquire, (True,), (max(0.0, timeout),)))
    return held[-1]
