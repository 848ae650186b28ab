"""What attackers may send any amount of, and what it costs all others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.measure import Calls, Part, Subject
from benchmarks.parts.growth import resident
from benchmarks.scale import Scale
from benchmarks.work import (
    ROAMER,
    WIDE4,
    WIDE6,
    Newcomers,
    Pair,
    Rows,
    at_random,
    fill,
    home,
    homes,
    name,
)
from ipguard import Guard

CALM = "others, the flood goes to another guard"
GROWN = ": resident memory, four times the capacity sent ÷ once"


def malformed() -> Iterator[Pair]:
    for number in itertools.count():
        yield name(number % 1000), f"203.0.113.{number}.{number % 7}"


def one_network() -> Iterator[Pair]:
    """A user's own /64, address by address."""
    newcomers = Newcomers(6)
    while True:
        yield from newcomers.pairs(1000)


def invented() -> Iterator[Pair]:
    for number in itertools.count():
        yield f"nobody{number}", home(number % 1_000_000)


FLOODS: dict[str, Callable[[], Iterator[Pair]]] = {
    "malformed addresses": malformed,
    "one user's IPv6 network": one_network,
    "invented usernames": invented,
}


class World:
    """A guard that remembers real users, and has room for some more."""

    def __init__(self, capacity: int) -> None:
        self.others = capacity // 2
        self.rows = Rows({ROAMER: [WIDE4, WIDE6]}, count=self.others)
        self.guard = Guard(self.rows, capacity=capacity)  # type: ignore[arg-type]
        fill(self.guard, self.others)
        self.guard.is_allowed(ROAMER, "10.0.0.1")

    def flood(self, pairs: Iterator[Pair], count: int) -> None:
        ask = self.guard.is_allowed
        for user, ip in itertools.islice(pairs, count):
            ask(user, ip)


def floods(scale: Scale) -> Part:
    """Other users' warm checks, between the waves of a flood."""
    wave = max(50, scale.flood // 10)

    def others(flood: Callable[[], Iterator[Pair]] | None) -> Calls:
        world = World(scale.flood)
        # Without a flood here it goes to another guard: what else a processor does in between takes
        # its caches away from everybody, and is not what is asked.
        flooded = world if flood else World(scale.flood)
        pairs = flood() if flood else invented()
        flooded.flood(pairs, 3 * scale.flood)

        def asked(loops: int) -> list[Pair]:
            flooded.flood(pairs, wave)
            return at_random(world.others, loops)

        return Calls(world.guard.is_allowed, asked)

    def facts() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for told, flood in FLOODS.items():
            world, pairs = World(scale.flood), flood()
            world.flood(pairs, scale.flood)
            full = resident()
            world.flood(pairs, 3 * scale.flood)
            found[f"{told}{GROWN}"] = resident() / full
            loads = world.rows.loads
            for user, ip in homes(world.others):
                world.guard.is_allowed(user, ip)
            found[f"{told}: others forgotten"] = world.rows.loads - loads
        return found

    return Part(
        title=f"Floods: other users' warm checks, room for {scale.flood:,} users",
        subjects=[
            Subject(name=CALM, kind="floor", make=lambda: others(None)),
            *(
                Subject(name=f"others, {told}", make=partial(others, flood))
                for told, flood in FLOODS.items()
            ),
        ],
        facts=facts,
    )
