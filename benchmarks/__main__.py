"""Measure everything and write it down; `python3 dev.py bench` prepares what this needs.

    python -m benchmarks [--quick | --tiny] [--only PART ...] [--out FOLDER]

The table, the JSON and the plots go to docs/performance/. A part or a peer that fails is written
down as that, and the rest goes on; the exit code is 0 whatever the figures are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import plots, report
from benchmarks.measure import Figures
from benchmarks.parts import PARTS
from benchmarks.peers import common
from benchmarks.peers.databases import DSN
from benchmarks.scale import FULL, QUICK, TINY, Scale

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "performance"


@contextlib.contextmanager
def postgres() -> Iterator[None]:
    """Start a PostgreSQL server for all parts, or let them say why there is none."""
    with contextlib.ExitStack() as stack:
        try:
            from tests.postgres import running_server  # noqa: PLC0415 - it needs the driver

            os.environ[DSN] = stack.enter_context(running_server()).url()
        except Exception as exc:
            os.environ[f"{DSN}_ERROR"] = f"no PostgreSQL server: {exc}".splitlines()[0]
        yield


def measure(part: str, scale: Scale) -> Figures:
    """Measure one part, in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="ipguard-bench-") as folder:
        told = Path(folder) / "told.jsonl"
        what = PARTS[part](scale)
        processes = max(1, scale.processes // what.fewer)
        command = [sys.executable, "-m", "benchmarks.measure", part, "--scale", scale.name]
        command += ["--told", str(told), "--copy-env", "--quiet", "--warmups", "1"]
        command += ["--processes", str(processes), "--values", str(min(what.rounds, scale.rounds))]
        command += ["--min-time", str(scale.slot * what.slot)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        failure = ""
        try:
            _, said = process.communicate(timeout=scale.patience)
            if process.returncode:
                failure = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
        except subprocess.TimeoutExpired:
            failure = f"given up after {scale.patience:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started and did not end
            process.wait()
        figures = Figures.read(told)
    if failure:
        figures.failed["the part"] = failure
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="scale", action="store_const", const=QUICK, default=FULL)
    size.add_argument("--tiny", dest="scale", action="store_const", const=TINY)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    begun, told = time.monotonic(), {}
    with postgres():
        common.ours_is_right()
        answers = common.ask_all()
        machine = report.machine()
        for part in args.only:
            since = time.monotonic()
            print(f"{part:20}", end="", flush=True)
            told[part] = measure(part, args.scale)
            failed = "".join(f"\n    {who}: {why}" for who, why in told[part].failed.items())
            print(f"{time.monotonic() - since:6.1f} s{failed}", flush=True)
    results = report.results(args.scale, told, answers, machine, time.monotonic() - begun)
    report.write(results, args.out)
    print(plots.draw(results, args.out))
    print(report.goals_as_text(results))
    print(f"{time.monotonic() - begun:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
