"""The registry of objects that a fork would leave unusable: locks, threads, connections.

`os.fork()` runs the hooks below. Servers that fork in C run none (uWSGI without
`--py-call-osafterfork`), so whoever takes a lock, a connection or a thread calls `check` first: in
a process that has not been repaired, it does what the child's hook would have done.

The fast path of a guard takes none of these and does not call it. What it reads in a new child, a
dict and a deadline, was consistent at every moment, and the deadline ends it.
"""

from __future__ import annotations

import os
import threading
import weakref

from ipguard._locks import ReentrantLock


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
_repairs: dict[int, threading.RLock] = {}


def register(forkable: Forkable) -> None:
    """Call an object around each fork, for as long as it lives."""
    _objects[forkable] = None


def check() -> None:
    """Repair all registered objects if this process was forked without running the hooks."""
    if os.getpid() != _pid:
        _repair()


def _registered() -> list[Forkable]:
    found = (reference() for reference in _objects.keyrefs())
    return [forkable for forkable in found if forkable is not None]


def _repair() -> None:
    global _pid, _forking  # noqa: PLW0603
    pid = os.getpid()
    # Several threads of the child may come here at once. A lock of the parent's may be held by a
    # thread that does not exist here, so this one is the process's own.
    with _repairs.setdefault(pid, threading.RLock()):
        for forkable in _registered():
            if _pid == pid:  # another thread was faster, or a signal handler in between
                return
            forkable._after_fork_in_child()  # noqa: SLF001
        _forking = ReentrantLock()
        _pid = pid


def _before() -> None:
    _forking.acquire()
    for forkable in _registered():
        forkable._before_fork()  # noqa: SLF001


def _after_in_parent() -> None:
    for forkable in reversed(_registered()):
        forkable._after_fork_in_parent()  # noqa: SLF001
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_repair)
