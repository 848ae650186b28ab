"""Measure subjects side by side, in rounds, in processes of their own.

The cores of a shared machine are noisy, so times of different moments cannot be compared. A sample
is therefore a pair: a subject and its floor, timed back to back in slots of a few milliseconds. In
a round every subject has its turn; the order rotates. The medians and quartiles over all rounds of
all processes are published.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent

Work = Callable[[int], float]
"""Makes this many calls and returns how many seconds they took, without their preparation."""
Fact = tuple[str, float, float | None]
"""The name of a figure, the figure, and the same of its floor if it has one."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    name: str  # the option of the command line
    processes: int  # how many processes measure each part, one after another
    rounds: int  # in each process
    slot: float  # the shortest time of one turn, in seconds
    patience: float  # when to give up a process, in seconds
    many: int  # users that a guard remembers
    preloaded: int  # users that a guard preloads
    listed: int  # restrictions of the user who has the most
    stored: int  # users of a store that is asked about users who are not remembered
    flooded: int  # capacity of a guard that is flooded
    imported: int  # rows of the bulk import
    searched: tuple[int, ...]  # users of the stores that are searched
    changes: int  # changes whose propagation is timed
    listeners: int  # processes that wait for them


@dataclass(frozen=True)
class Subject:
    """One thing that is timed."""

    name: str
    make: Callable[[], Work]  # called in the process that measures
    per: str | None = None  # the subject that is its floor; None: the first of the part


@dataclass(frozen=True)
class Row:
    """One row of the table of goals."""

    figure: str
    floor: str  # the other side of the comparison; empty if there is none
    of: str  # the subject or fact that gives the samples
    limit: float | None
    # What the limit is for: ours / floor, floor / ours (then it is a minimum), or ours alone.
    judged: Literal["ratio", "speed", "ours"] = "ratio"
    unit: str = "s"  # or "B", or empty for a plain number


@dataclass(frozen=True, kw_only=True)
class Part:
    """Subjects and facts that are measured in the same processes."""

    title: str
    rows: list[Row]
    subjects: list[Subject] = field(default_factory=list)  # the first is the others' floor
    facts: Callable[[], Iterable[Fact]] = tuple  # figures that are not times of calls
    slot: float = 1.0  # how much longer a turn is than the scale says
    processes: int = 3  # at most
    rounds: int = 1000  # at most


@dataclass
class Samples:
    """Pairs of a figure and its floor's from the processes of a part, and their errors."""

    pairs: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def read(self, path: Path) -> None:
        """Add the lines that a process wrote."""
        for line in path.read_text().splitlines() if path.exists() else ():
            name, ours, floor, failure = json.loads(line)
            if failure:
                self.failed[name] = failure
            else:
                self.pairs.setdefault(name, []).append((ours, floor))

    def ratios(self, name: str) -> list[float]:
        """Return its ratio to its floor, sample by sample."""
        return [ours / floor for ours, floor in self.pairs.get(name, ()) if floor and floor > 0]


def run(name: str, part: Part, scale: Scale) -> Samples:
    """Measure the part of that name in processes of its own."""
    samples = Samples()
    for _ in range(min(part.processes, scale.processes)):
        with tempfile.TemporaryDirectory(prefix="ipguard-bench-") as folder:
            out = Path(folder) / "samples.jsonl"
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks", f"--{scale.name}", "--measure", name, out],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, said = process.communicate(timeout=scale.patience)
                if process.returncode:
                    samples.failed["the part"] = (said.strip() or "no output").splitlines()[-1]
            except subprocess.TimeoutExpired:
                samples.failed["the part"] = f"given up after {scale.patience:g} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # processes that it left behind, too
                process.wait()
            samples.read(out)
    return samples


def measure(part: Part, scale: Scale, out: Path) -> None:
    """Measure a part in this process, and append each sample to a file."""

    def write(name: str, ours: float = 0.0, floor: float | None = None, failure: str = "") -> None:
        with out.open("a") as file:
            file.write(json.dumps([name, ours, floor, failure]) + "\n")

    @contextmanager
    def noting(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            works.pop(name, None)
            traceback.print_exc(file=sys.stderr)
            write(name, failure=f"{type(exc).__name__}: {exc}".splitlines()[0][:300])

    works: dict[str, Work] = {}
    loops: dict[str, int] = {}
    for subject in part.subjects:
        with noting(subject.name):
            work = subject.make()
            loops[subject.name] = calibrate(work, scale.slot * part.slot)
            works[subject.name] = work
    gc.collect()
    gc.freeze()  # later collections must not visit these objects again and again
    for number in range(min(part.rounds, scale.rounds)):
        alive = [subject for subject in part.subjects if subject.name in works]
        start = number % max(1, len(alive))
        for subject in alive[start:] + alive[:start]:
            floor = subject.per or part.subjects[0].name
            pair = [it for it in dict.fromkeys((subject.name, floor)) if it in works]
            with noting(subject.name):
                took = {it: works[it](loops[it]) / loops[it] for it in pair[:: (-1) ** number]}
                beside = took.get(floor) if floor != subject.name else None
                write(subject.name, took[subject.name], beside)
    with noting("facts"):
        for fact in part.facts():
            write(*fact)


def calibrate(work: Work, slot: float) -> int:
    """Return how many calls fill a slot, and warm the subject up by that."""
    loops = 1
    while (took := work(loops)) < slot:
        # In steps, because the first calls of some subjects take a thousand times as long.
        loops = max(loops + 1, int(min(slot / max(took / loops, 1e-9) * 1.2, loops * 16)))
    return loops


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh interpreter and return what it returns."""
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415
    from multiprocessing import get_context  # noqa: PLC0415

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident() -> int:
    """Return how many bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
