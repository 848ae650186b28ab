"""Measure and publish; `python3 dev.py bench` prepares what this needs.

    python -m benchmarks [--quick | --tiny] [--only PART ...] [--out FOLDER]

The results go to docs/performance/. A part or a peer that fails is listed with its error and the
rest goes on; the exit code is 0 whatever the figures are. --tiny only shows that everything runs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import bulk, cold, listing, login, peers, propagation, report, sightings
from benchmarks.fixtures import DSN
from benchmarks.measure import ROOT, Part, Scale, measure, run

OUT = ROOT / "docs" / "performance"

PARTS: dict[str, Callable[[Scale], Part]] = {
    "warm": login.warm,
    "warm-many": login.warm_many,
    "first-ipv4": partial(login.first_sight, version=4),
    "first-ipv6": partial(login.first_sight, version=6),
    "preloaded": login.preloaded,
    "cold": cold.cold,
    "memory": cold.memory,
    "preload": cold.preload,
    "import": cold.imports,
    "growth": login.growth,
    "floods": login.floods,
    "threads": login.threads,
    "sightings": sightings.costs,
    "search": listing.searches,
    "propagation": propagation.propagation,
    "bulk": bulk.imports,
}

FULL = Scale(
    name="full", processes=3, rounds=30, slot=0.002, patience=1800.0, many=100_000,
    preloaded=1_000_000, listed=10_000, stored=5_000, flooded=20_000,
    imported=100_000, searched=(100_000, 1_000_000), changes=300, listeners=8,
)  # fmt: skip
QUICK = Scale(
    name="quick", processes=1, rounds=9, slot=0.002, patience=300.0, many=20_000,
    preloaded=50_000, listed=10_000, stored=1_000, flooded=2_000,
    imported=5_000, searched=(10_000,), changes=40, listeners=4,
)  # fmt: skip
TINY = Scale(
    name="tiny", processes=1, rounds=2, slot=0.0001, patience=60.0, many=50,
    preloaded=20_000, listed=20, stored=20, flooded=100,
    imported=50, searched=(200,), changes=10, listeners=2,
)  # fmt: skip
SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}


@contextmanager
def postgres() -> Iterator[None]:
    """Start a PostgreSQL server for all parts; without one they report why."""
    with ExitStack() as stack:
        try:
            from tests.postgres import running_server  # noqa: PLC0415 - it needs the driver

            os.environ[DSN] = stack.enter_context(running_server()).url()
        except Exception as exc:
            os.environ[f"{DSN}_ERROR"] = f"no PostgreSQL server: {exc}".splitlines()[0]
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    for scale in SCALES.values():
        size.add_argument(
            f"--{scale.name}", dest="scale", action="store_const", const=scale, default=FULL
        )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:  # a process of `measure.run`
        name, file = args.measure
        measure(PARTS[name](args.scale), args.scale, Path(file))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {name: PARTS[name](args.scale) for name in args.only}
    with postgres():
        peers.check_ours()
        given, about, measured = peers.ask_all(), report.machine(), {}
        for name, part in parts.items():
            begun = time.monotonic()
            measured[name] = run(name, part, args.scale)
            failed = "".join(f"\n    {it}: {why}" for it, why in measured[name].failed.items())
            print(f"{name:12} {time.monotonic() - begun:6.1f} s{failed}", flush=True)
    found = report.results(args.scale, parts, measured, given, about)
    report.write(found, args.out)
    print(report.page(found).partition("## Peers")[0])
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
