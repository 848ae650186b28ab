"""Locks and a registry for code that must survive forks and signal handlers.

**Forks.** A child of `os.fork()` inherits locks and connections that it cannot use, and no threads
but the caller's. An object with such resources derives from `Forkable` and registers; the hooks
below call it around each fork. Servers that fork in C run no hooks (uWSGI without
`--py-call-osafterfork`), so code that is about to use such a resource calls `check` first, which
repairs a child that was not repaired yet.

The fast path of a guard uses no such resource and does not call `check`. It reads a dict and a
deadline, which are consistent at every moment, and the deadline ends what the child inherited.

**Signals.** A signal handler runs between two bytecodes of the main thread, may raise, and may call
the guard again. CPython (3.11 to 3.13) checks for signals after a call, at a backward jump and when
a function starts, but not between a C function and the block that it protects. So three forms
never leave a lock held:

* `with lock:`, if `__enter__` and `__exit__` are C functions. Those of `threading.Condition` and of
  `contextmanager` are not.
* `acquire` below, with a list that the caller creates before its `try`.
* A release that is the first call in its `finally` block.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_Base: Any = type(threading.RLock())


class ReentrantLock(_Base):  # type: ignore[misc]
    """A lock that its owner may take again, so that a signal handler cannot deadlock.

    Use it only in a `with` statement.
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
    """Acquire a lock within some seconds, append whether that worked to `held`, and return it.

    Both happen in one C call. The caller creates the empty list `held` before its `try`, and
    releases the lock in `finally` if True is in it.
    """
    held.extend(map(lock.acquire, (True,), (max(0.0, timeout),)))
    return held[-1]


class Forkable:
    """An object that takes part in forks once it is registered."""

    def _before_fork(self) -> None:
        """Prepare for a fork; other threads keep running."""

    def _after_fork_in_parent(self) -> None:
        """Undo `_before_fork`, which may have been interrupted."""

    def _after_fork_in_child(self) -> None:
        """Replace what belongs to the parent.

        It must not call `check`, must not rely on `_before_fork`, and may be repeated.
        """


_pid = os.getpid()
# In the order of registration: sockets are abandoned before the pools that refer to them.
_objects: weakref.WeakKeyDictionary[Forkable, None] = weakref.WeakKeyDictionary()
_forking = ReentrantLock()
_forks = 0
_repairs: dict[int, threading.RLock] = {}


def register(forkable: Forkable) -> None:
    """Call an object's hooks around each fork, for as long as the object exists."""
    _objects[forkable] = None


def check() -> None:
    """Repair all registered objects if this process was forked without running the hooks."""
    if os.getpid() != _pid:
        _repair()


def count() -> int:
    """Return how many forks this process and its ancestors have begun."""
    return _forks


def alive(objects: weakref.WeakKeyDictionary[T, None]) -> list[T]:
    """Return a copy of a weak set's objects: iterating fails if other threads change the set."""
    return [found for reference in objects.keyrefs() if (found := reference()) is not None]


def _repair() -> None:
    global _pid, _forking  # noqa: PLW0603
    pid = os.getpid()
    # Several threads of the child may arrive here at once. Locks of the parent may be held by
    # threads that do not exist here, so the child uses a new one.
    with _repairs.setdefault(pid, threading.RLock()):
        for forkable in alive(_objects):
            if _pid == pid:  # another thread, or a signal handler in this one, has repaired it
                return
            forkable._after_fork_in_child()  # noqa: SLF001
        _forking = ReentrantLock()
        _pid = pid


def _before() -> None:
    global _forks  # noqa: PLW0603
    _forking.acquire()
    _forks += 1
    for forkable in alive(_objects):
        forkable._before_fork()  # noqa: SLF001


def _after_in_parent() -> None:
    for forkable in reversed(alive(_objects)):
        forkable._after_fork_in_parent()  # noqa: SLF001
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_repair)
