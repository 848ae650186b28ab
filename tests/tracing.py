"""Trace and profile functions that see the code under test alone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Hook = Callable[[FrameType, str, Any], Any]


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the cyclic garbage collector off.

    A collection inside the code under test runs the finalisers of what earlier tests left.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def traced(trace: Hook) -> Iterator[None]:
    """Trace this thread by opcodes; the function asks for them in each frame that it wants."""
    before = sys.gettrace()
    # Python 3.12 reports opcodes only if a frame asked for them before settrace().
    sys._getframe().f_trace_opcodes = True
    with no_collection():
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def profiled(profile: Hook) -> Iterator[None]:
    """Profile this thread."""
    before = sys.getprofile()
    with no_collection():
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(before)
