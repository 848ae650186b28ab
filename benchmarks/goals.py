"""The goals, in one table: what is wanted, and where among the figures it is found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from benchmarks.measure import Figures
from benchmarks.parts import floods, growth, hot, threads
from benchmarks.parts.cold import POSTGRES, SQLITE
from benchmarks.peers import PEERS
from benchmarks.scale import Scale

Told = Mapping[str, Figures]
AHEAD = {
    "warm": "warm, one user",
    "warm-many": "warm, many users",
    "first-ipv4": "first sight, IPv4",
    "first-ipv6": "first sight, IPv6",
}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One goal.

    Attributes:
        text: What is compared with what.
        limit: How much it may be, or has to be.
        measure: Returns the figure of each round; their median counts.
        least: Whether the limit is the least that is wanted, not the most.
        about: Returns what has to be said of the figure.
    """

    text: str
    limit: float
    measure: Callable[[Told], Iterable[float]]
    least: bool = False
    about: Callable[[Told], str] = lambda _: ""

    def wanted(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.limit:g}"

    def measured(self, told: Told) -> float | None:
        """Return the median, or None where it was not measured."""
        try:
            values = list(self.measure(told))
        except KeyError:
            return None
        return statistics.median(values) if values else None

    def reached(self, measured: float | None) -> bool | None:
        if measured is None:
            return None
        return measured >= self.limit if self.least else measured <= self.limit


def _ratio(part: str, subject: str) -> Callable[[Told], list[float]]:
    """Return what a subject costs in units of what its part judges it by."""
    return lambda told: list(told[part].over_its_own(subject).values())


def _inverse(part: str, subject: str) -> Callable[[Told], list[float]]:
    return lambda told: [1 / ratio for ratio in told[part].over_its_own(subject).values()]


def _grown(kind: str, few: int, many: int) -> Callable[[Told], list[float]]:
    """Return how (cost / floor) grew, round by round."""

    def measure(told: Told) -> list[float]:
        before, after = (
            told["users"].over_its_own(growth.crowd_name(kind, count)) for count in (few, many)
        )
        return [after[turn] / before[turn] for turn in before.keys() & after.keys()]

    return measure


def _flooded(told: Told) -> list[float]:
    """Return how resident memory grew after the first capacity, the worst flood of each process."""
    return [
        max(value for key, value in facts.items() if key.endswith(floods.GROWN))
        for facts in told["floods"].facts
    ]


def ahead(told: Told, part: str) -> dict[str, float]:
    """Return for each peer how ipguard's cost relates to its own: below 1, ipguard is faster."""
    found = {peer.name: told[part].ratios(hot.OURS, peer.name) for peer in PEERS}
    return {peer: statistics.median(ratios) for peer, ratios in found.items() if ratios}


def _fastest(part: str) -> Callable[[Told], list[float]]:
    return lambda told: [max(ahead(told, part).values())] if ahead(told, part) else []


def _who_is_fastest(part: str) -> Callable[[Told], str]:
    def about(told: Told) -> str:
        others = ahead(told, part) if part in told else {}
        return f"the fastest is {max(others, key=others.__getitem__)}" if others else ""

    return about


def goals(scale: Scale) -> list[Goal]:
    """Return all of them, for the numbers that were measured with."""
    few, many = scale.lengths[0], scale.lengths[-1]
    small, large = scale.crowds[0], scale.crowds[-1]
    one, most = scale.threads[0], scale.threads[-1]
    return [
        Goal(
            text="warm, one user ÷ one dict look-up",
            limit=1.9,
            measure=_ratio("warm", hot.OURS),
        ),
        Goal(
            text=f"warm, {scale.many:,} users at random ÷ one dict look-up",
            limit=1.9,
            measure=_ratio("warm-many", hot.OURS),
        ),
        *(
            Goal(
                text=f"first sight of an IPv{version} address ÷ inet_pton and one bisect",
                limit=3.0,
                measure=_ratio(f"first-ipv{version}", hot.OURS),
            )
            for version in (4, 6)
        ),
        Goal(
            text="cold user on SQLite ÷ sqlite3 reading the same rows",
            limit=2.5,
            measure=_ratio("cold", SQLITE),
        ),
        Goal(
            text="cold user on PostgreSQL ÷ psycopg_pool reading the same rows",
            limit=1.5,
            measure=_ratio("cold", POSTGRES),
        ),
        *(
            Goal(
                text=f"{kind}, {many:,} restrictions ÷ with {few:,}",
                limit=limit,
                measure=_ratio("restrictions", growth.length_name(kind, many)),
            )
            for kind, limit in (("warm", 1.1), ("first sight", 1.5))
        ),
        *(
            Goal(
                text=f"cost ÷ floor with {large:,} users {kind} ÷ with {small:,}",
                limit=1.2,
                measure=_grown(kind, small, large),
            )
            for kind in ("remembered", "preloaded")
        ),
        *(
            Goal(
                text=f"throughput of {threads.crowd_name(most, writer=writer)} ÷ of {one} thread",
                limit=limit,
                measure=_inverse("threads", threads.crowd_name(most, writer=writer)),
                least=True,
            )
            for writer, limit in ((False, 0.9), (True, 0.8))
        ),
        *(
            Goal(
                text=f"other users under a flood of {flood} ÷ without one",
                limit=1.2,
                measure=_ratio("floods", f"others, {flood}"),
            )
            for flood in floods.FLOODS
        ),
        Goal(
            text="resident memory, four times the capacity sent ÷ once (worst flood)",
            limit=1.02,
            measure=_flooded,
        ),
        *(
            Goal(
                text=f"{what}: ipguard ÷ the fastest of the others",
                limit=1.0,
                measure=_fastest(part),
                about=_who_is_fastest(part),
            )
            for part, what in AHEAD.items()
        ),
        Goal(
            text="import ipguard ÷ import attrs, netaddr, cachetools",
            limit=1.5,
            measure=_ratio("import", "import ipguard"),
        ),
    ]
