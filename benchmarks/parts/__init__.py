"""What is measured, part by part; each is a function of the scale that says what is in it."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.measure import Part
from benchmarks.parts import cold, floods, growth, hot, rest, steps, threads
from benchmarks.scale import Scale

PARTS: dict[str, Callable[[Scale], Part]] = {
    "warm": hot.warm,
    "warm-many": hot.warm_many,
    "first-ipv4": hot.first_ipv4,
    "first-ipv6": hot.first_ipv6,
    "steps": steps.steps,
    "cold": cold.cold,
    "restrictions": growth.restrictions,
    "restrictions-peers": growth.restrictions_of_peers,
    "users": growth.users,
    "threads": threads.threads,
    "asyncio": rest.in_asyncio,
    "confirms": rest.confirms,
    "import": rest.imports,
    "memory": rest.memory,
    "floods": floods.floods,
}
