"""How things are measured side by side: pyperf's processes, and in each of them rounds.

    python -m benchmarks.measure PART --scale quick --told FILE     (what benchmarks/__main__ runs)

pyperf finds out how many calls of the floor make one turn, and starts the processes one after
another. In each, every round gives everything of the part its turn, in an order that moves on, so a
busy moment of the machine hits all alike. A ratio is of two figures of one round; for what is ours
the other one is measured once more, right before or right after it. What pyperf has no place for,
the figures of everything but the floor, is told line by line in FILE.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyperf

from benchmarks.scale import SCALES, Scale
from benchmarks.work import Ask, Pair, nothing

#: For how many seconds calls of one subject are timed one by one.
_SINGLES_FOR = 0.2


#: A process and one of its rounds.
Turn = tuple[int, int]


class Work(Protocol):
    """What one call is, and how it is timed."""

    def ready(self, loops: int) -> None:
        """Prepare this many calls; it is not timed."""

    def time(self, loops: int) -> float:
        """Make the calls, and return how many seconds they took."""

    def singles(self, count: int) -> list[int]:
        """Time this many calls one by one, in nanoseconds; none where that says nothing."""


class Calls:
    """A question, asked in a plain loop.

    Args:
        ask: What is asked.
        pairs: Returns who asks, so many times.
        fresh: Makes `ask` anew for each turn, where the question can be asked once only.
    """

    def __init__(
        self,
        ask: Ask | None,
        pairs: Callable[[int], list[Pair]],
        fresh: Callable[[], Ask] | None = None,
    ) -> None:
        self._ask = ask
        self._source = pairs
        self._fresh = fresh

    def ready(self, loops: int) -> None:
        self._pairs = self._source(loops)
        if self._fresh is not None:
            self._ask = self._fresh()

    def time(self, loops: int) -> float:  # noqa: ARG002
        ask, pairs = self._ask, self._pairs
        assert ask is not None
        begun = time.perf_counter()
        for user, ip in pairs:
            ask(user, ip)
        return time.perf_counter() - begun

    def singles(self, count: int) -> list[int]:
        self.ready(count)
        assert self._ask is not None
        clock = statistics.median(_each(nothing, self._pairs[:1000]))
        return [max(0, int(took - clock)) for took in _each(self._ask, self._pairs)]


def _each(ask: Ask, pairs: Iterable[Pair]) -> list[int]:
    clock, took = time.perf_counter_ns, []
    for user, ip in pairs:
        begun = clock()
        ask(user, ip)
        took.append(clock() - begun)
    return took


@dataclass(kw_only=True)
class Subject:
    """One thing that is measured.

    Attributes:
        name: What it is called; unique in its part.
        make: Returns its work; called in the process that measures.
        kind: `floor`, `ours`, `peer`, or `aside` for what only helps to understand the others.
        per: The name of the subject that it is a ratio to; None: the part's floor.
        note: What has to be known beside the figure.
    """

    name: str
    make: Callable[[], Work]
    kind: str = "ours"
    per: str | None = None
    note: str = ""


@dataclass(kw_only=True)
class Part:
    """What is measured together, in the same processes.

    Attributes:
        title: What it is, for the table.
        subjects: The first is the floor.
        facts: Figures that are no times: name to number; asked for last.
        slot: How many times longer a turn is than the scale says.
        fewer: By what the number of processes is divided.
        rounds: How many rounds are enough, however many the scale says.
        singles: Whether calls are timed one by one as well.
        a_second: What there are so many of in a second, where that is asked.
    """

    title: str
    subjects: list[Subject]
    facts: Callable[[], dict[str, Any]] = dict
    slot: float = 1.0
    fewer: int = 1
    rounds: int = 1000
    singles: bool = True
    a_second: str = ""


class Rounds:
    """What one process measures."""

    def __init__(self, part: Part, scale: Scale, told: Path) -> None:
        self._part = part
        self._scale = scale
        self._told = told
        self._slot = scale.slot * part.slot
        self._works: dict[str, Work] = {}
        self._loops: dict[str, int] = {}
        self._round = 0

    @property
    def floor(self) -> Subject:
        return self._part.subjects[0]

    def calibrate(self, loops: int) -> float:
        """Time the floor alone, for pyperf to see how many calls fill a turn."""
        work = self._works.get(self.floor.name) or self._works.setdefault(
            self.floor.name, self.floor.make()
        )
        work.ready(loops)
        return work.time(loops)

    def warm_up(self, loops: int) -> float:
        """Make everything, and find out how many calls of each fill its turn."""
        for subject in self._part.subjects:
            try:
                work = self._works.get(subject.name) or subject.make()
                self._loops[subject.name] = self._enough(work, loops)
                self._works[subject.name] = work
            except Exception as exc:
                self._failed(subject.name, exc)
        gc.collect()
        gc.freeze()  # what is there now stays; collecting it over and over is not what is measured
        return self.calibrate(loops)

    def _enough(self, work: Work, most: int) -> int:
        loops = 1
        while True:
            work.ready(loops)
            took = work.time(loops)
            if took >= self._slot or loops >= most:
                return loops
            # Not beyond what is needed: some of these take a thousand times as long as others.
            needed = self._slot / max(took / loops, 1e-9)
            loops = min(most, max(loops + 1, int(min(needed * 1.2, loops * 16))))

    def one(self, loops: int) -> float:
        """Make one round, tell it, and return what the floor took."""
        subjects = [s for s in self._part.subjects if s.name in self._works]
        start = self._round % len(subjects)
        self._loops[self.floor.name] = loops
        told: dict[str, float] = {}
        beside: dict[str, float] = {}
        for subject in subjects[start:] + subjects[:start]:
            per = subject.per or self.floor.name
            pair = [subject.name]
            if subject.kind == "ours" and per in self._works and per != subject.name:
                pair.insert(self._round % 2, per)
            try:
                for name in pair:
                    took = self._turn(name)
                    if name == subject.name:
                        told[name] = took
                    else:
                        beside[subject.name] = took
            except Exception as exc:
                self._failed(subject.name, exc)
                del self._works[subject.name]
        self._tell(round=self._round, seconds=told, beside=beside)
        self._round += 1
        return told[self.floor.name] * loops

    def _turn(self, name: str) -> float:
        work, loops = self._works[name], self._loops[name]
        work.ready(loops)
        return work.time(loops) / loops

    def last(self) -> None:
        """Time single calls, and ask for what is no time."""
        for name, work in self._works.items() if self._part.singles else ():
            try:
                each = self._slot / self._loops[name]
                took = sorted(
                    work.singles(min(self._scale.singles, max(1, int(_SINGLES_FOR / each))))
                )
                if took:
                    self._tell(singles={name: {"count": len(took), **_percentiles(took)}})
            except Exception as exc:
                self._failed(name, exc)
        try:
            self._tell(facts=self._part.facts())
        except Exception as exc:
            self._failed("facts", exc)

    def _failed(self, name: str, exc: Exception) -> None:
        traceback.print_exc(file=sys.stderr)
        self._tell(failed={name: f"{type(exc).__name__}: {exc}".splitlines()[0][:300]})

    def _tell(self, **what: object) -> None:
        with self._told.open("a") as out:
            out.write(json.dumps({"process": os.getpid()} | what) + "\n")


def _percentiles(took: list[int]) -> dict[str, int]:
    """Return the percentiles that so many calls can tell."""
    found = {"p50": took[len(took) // 2]}
    if len(took) >= 100:
        found["p99"] = took[len(took) * 99 // 100]
    if len(took) >= 1000:
        found["p999"] = took[len(took) * 999 // 1000]
    return found


@dataclass
class Figures:
    """What the processes of a part told.

    Attributes:
        seconds: For each subject, what a call took, by process and round.
        beside: What it is a ratio to took right beside it; only for what is ours.
        singles: For each subject, the percentiles of single calls, one set of each process.
        facts: One of each process.
        failed: Why a subject has no figures.
    """

    seconds: dict[str, dict[Turn, float]] = field(default_factory=dict)
    beside: dict[str, dict[Turn, float]] = field(default_factory=dict)
    singles: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    facts: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, told: Path) -> Figures:
        figures = cls()
        for line in told.read_text().splitlines() if told.exists() else ():
            it = json.loads(line)
            for kind, by_turn in (("seconds", figures.seconds), ("beside", figures.beside)):
                for subject, seconds in it.get(kind, {}).items():
                    by_turn.setdefault(subject, {})[it["process"], it["round"]] = seconds
            for subject, singles in it.get("singles", {}).items():
                figures.singles.setdefault(subject, []).append(singles)
            if "facts" in it:
                figures.facts.append(it["facts"])
            figures.failed |= it.get("failed", {})
        return figures

    def over_its_own(self, subject: str) -> dict[Turn, float]:
        """Return the ratio of a subject of ours to what it is judged by, round by round."""
        mine, other = self.seconds.get(subject, {}), self.beside.get(subject, {})
        return {turn: seconds / other[turn] for turn, seconds in mine.items() if turn in other}

    def ratios(self, subject: str, per: str) -> list[float]:
        """Return the ratio of any two subjects in each round that has both."""
        mine, other = self.seconds.get(subject, {}), self.seconds.get(per, {})
        return [seconds / other[turn] for turn, seconds in mine.items() if turn in other]


def main() -> None:
    from benchmarks.parts import PARTS  # noqa: PLC0415 - they import this module

    runner = pyperf.Runner(program_args=("-m", "benchmarks.measure"), add_cmdline_args=_pass_on)
    runner.argparser.add_argument("part")
    runner.argparser.add_argument("--scale", choices=SCALES, default="quick")
    runner.argparser.add_argument("--told", type=Path, required=True)
    args = runner.parse_args()
    scale = SCALES[args.scale]
    rounds = Rounds(PARTS[args.part](scale), scale, args.told)

    def turn(loops: int) -> float:
        if args.calibrate_loops or args.recalibrate_loops:
            return rounds.calibrate(loops)
        if not rounds._loops:
            return rounds.warm_up(loops)
        took = rounds.one(loops)
        if rounds._round == args.values:
            rounds.last()
        return took

    runner.bench_time_func(args.part, turn)


def _pass_on(command: list[str], args: Any) -> None:
    command += [args.part, "--scale", args.scale, "--told", str(args.told)]


if __name__ == "__main__":
    main()
