"""Tests, and a hook for those that fork while other threads log.

CPython gives a child new locks for its log handlers, but not for their streams. Pytest's handlers
write to a file, whose lock stays held in the child if another thread was writing at that moment.
"""

import logging
import os

_held: list[logging.Handler] = []


def _before_fork() -> None:
    for handler in logging.getLogger().handlers:
        handler.acquire()
        _held.append(handler)


def _after_fork() -> None:
    while _held:
        _held.pop().release()


# Registered before `ipguard`'s hooks, so it acquires the locks after them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_held.clear
    )
