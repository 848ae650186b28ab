"""What fork() must find in order: it copies memory as it is at that moment.

Each guard's lock is taken around a fork, so that no child begins with a cache that another thread
was half way through writing. In the child, where that thread does not exist, all locks are made
anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class _Forkable(Protocol):
    def before_fork(self) -> None:
        """Take what no thread may be half way through writing."""

    def after_fork_in_parent(self) -> None:
        """Let go of it."""

    def after_fork_in_child(self) -> None:
        """Begin anew."""


_lock = threading.Lock()
_all: weakref.WeakSet[_Forkable] = weakref.WeakSet()
_forking: list[_Forkable] = []


def register(forkable: _Forkable) -> None:
    """Have an object called around each fork, for as long as it lives."""
    with _lock:
        _all.add(forkable)


def _before() -> None:
    _lock.acquire()
    for forkable in tuple(_all):
        forkable.before_fork()
        _forking.append(forkable)


def _after_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()
    _lock.release()


def _after_in_child() -> None:
    while _forking:
        _forking.pop().after_fork_in_child()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
