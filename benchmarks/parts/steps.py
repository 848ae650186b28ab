"""Where the time goes: the same check built up step by step, each step beside the one before."""

from __future__ import annotations

import socket
import time
from bisect import bisect_right
from collections.abc import Callable

from benchmarks.measure import Calls, Part, Subject
from benchmarks.scale import Scale
from benchmarks.work import (
    ROAMER,
    WIDE4,
    WIDE6,
    Ask,
    Newcomers,
    Pair,
    crowd,
    fill,
    guard_of,
    home,
    name,
    nothing,
)

WARM = (
    "warm: a call",
    "warm: + find the user",
    "warm: + the text among those allowed",
    "warm: + the lease's moment",
    "warm: + the clock",
    "warm: ipguard",
)
FIRST = (
    "first sight: a call",
    "first sight: + inet_pton",
    "first sight: + to a number",
    "first sight: + bisect",
    "first sight: + user, text, moment, clock",
    "first sight: ipguard",
)


class _Entry(set[str]):
    __slots__ = ("bounds",)
    bounds: tuple[int, ...]


class _Lease:
    def __init__(self) -> None:
        self.deadline = float("inf")


def _warm_steps() -> list[Ask]:
    user, ip = name(0), home(0)
    users, nobody, lease, clock = {user: _Entry({ip})}, _Entry(), _Lease(), time.monotonic
    find = users.get

    def finds(user: str, ip: str) -> bool:  # noqa: ARG001
        return find(user, nobody) is not nobody

    def contains(user: str, ip: str) -> bool:
        return ip in find(user, nobody)

    def reads(user: str, ip: str) -> bool:
        until = lease.deadline
        return ip in find(user, nobody) and until is not None

    def times(user: str, ip: str) -> bool:
        until = lease.deadline
        return ip in find(user, nobody) and clock() < until

    return [nothing, finds, contains, reads, times]


def _first_steps() -> list[Ask]:
    family, inet_pton, from_bytes = int(socket.AF_INET), socket.inet_pton, int.from_bytes
    entry = _Entry()
    entry.bounds = (10 << 24, 11 << 24)
    users, nobody, lease, clock = {ROAMER: entry}, _Entry(), _Lease(), time.monotonic
    find = users.get

    def reads(user: str, ip: str) -> bool:  # noqa: ARG001
        return inet_pton(family, ip) != b""

    def numbers(user: str, ip: str) -> bool:  # noqa: ARG001
        return from_bytes(inet_pton(family, ip), "big") != 0

    def bisects(user: str, ip: str) -> bool:  # noqa: ARG001
        return bisect_right(entry.bounds, from_bytes(inet_pton(family, ip), "big")) & 1 == 1

    def whole(user: str, ip: str) -> bool:
        until = lease.deadline
        found = find(user, nobody)
        if ip in found:
            return clock() < until
        inside = bisect_right(found.bounds, from_bytes(inet_pton(family, ip), "big")) & 1
        return inside == 1 and clock() < until

    return [nothing, reads, numbers, bisects, whole]


def steps(scale: Scale) -> Part:  # noqa: ARG001
    """A warm check and a first sight, built up from nothing."""

    def again(loops: int) -> list[Pair]:
        return [(name(0), home(0))] * loops

    def warm() -> Calls:
        guard = guard_of(crowd(1))
        fill(guard, 1)
        return Calls(guard.is_allowed, again)

    def first() -> Calls:
        guard = guard_of({ROAMER: [WIDE4, WIDE6]})
        guard.is_allowed(ROAMER, "10.0.0.1")
        return Calls(guard.is_allowed, Newcomers(4).pairs)

    def made(ask: Ask, pairs: Callable[[int], list[Pair]]) -> Callable[[], Calls]:
        return lambda: Calls(ask, pairs)

    makes = [made(ask, again) for ask in _warm_steps()] + [warm]
    makes += [made(ask, Newcomers(4).pairs) for ask in _first_steps()] + [first]
    return Part(
        title="Where the time goes, step by step",
        subjects=[
            Subject(
                name=told,
                make=make,
                kind="floor" if number == 0 else "ours" if told.endswith("ipguard") else "aside",
            )
            for number, (told, make) in enumerate(zip(WARM + FIRST, makes, strict=True))
        ],
    )
