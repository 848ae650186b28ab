"""What login servers answer while PostgreSQL fails: how long after a commit anybody is let in.

.venv/bin/python -m benchmarks.outage [deletions of each kind]

For each way to fail, restrictions are deleted while it lasts. `let in`: when the last question was
asked that was still answered with yes, after the commit, by a login server of `max_staleness=0.5`.
`holds`: when the change held on one with the default settings; where the store was out of reach, it
waits for the end of that, and no figure is given. `waited`: the longest that anybody waited for an
answer, on both. Last, `kill -9` of the server under logins as fast as they come.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence

from tests.outages import (
    KINDS,
    STALENESS,
    Crash,
    Network,
    NoNetwork,
    Outage,
    Outcome,
    PacketsDropped,
    crash,
    run,
    server_in,
)
from tests.postgres import own_server

SIZE = 20
BATCHES = max(1, int(sys.argv[1]) // SIZE) if len(sys.argv) > 1 else 10
CRASHES = 3
FALLBACK, BACK, DENIAL = 1.5, 2.0, 0.01

missed: list[str] = []


def goal(name: str, found: float, most: float) -> None:
    if found > most:
        missed.append(f"{name}: {found:.3f} s, more than {most:g}")


def spread(times: Sequence[float]) -> str:
    return f"p50 {statistics.median(times) * 1e3:7.1f}  max {max(times) * 1e3:7.1f} ms"


def tell(outage: Outage, outcome: Outcome) -> None:
    name = type(outage).__name__
    holds = "" if outage.cut else f"holds {spread(outcome.held)}"
    print(
        f"{name:20} let in {spread(outcome.let_in)}   {holds:39}"
        f"   waited {outcome.slowest:.2f} and {outcome.slowest_usual:.2f} s",
        flush=True,
    )
    goal(f"{name}, let in", max(outcome.let_in), STALENESS)
    if not outage.cut:
        goal(f"{name}, holds", max(outcome.held), FALLBACK)


def tell_crash(threads: int, outcome: Crash) -> None:
    cuts = statistics.quantiles(outcome.denials, n=100)
    print(
        f"kill -9, {threads} threads    let in max {outcome.let_in * 1e3:.1f} ms   "
        f"{len(outcome.denials)} denials: p50 {cuts[49] * 1e6:.1f} us, p99 {cuts[98] * 1e3:.3f} ms"
        f"   waited {outcome.slowest:.2f} s   back after {outcome.back:.2f} s",
        flush=True,
    )
    goal("kill -9, let in", outcome.let_in, STALENESS)
    goal("kill -9, denials", cuts[98], DENIAL)
    goal("kill -9, back", outcome.back, BACK)


def main() -> int:
    print(f"{BATCHES * SIZE} deletions of each kind, load {os.getloadavg()[0]:.1f}")
    with own_server() as server:
        for kind in (Outage, *KINDS):
            outage = kind(server)
            tell(outage, run(outage, BATCHES, SIZE))
        for threads in (1, 8):
            for _ in range(CRASHES):
                tell_crash(threads, crash(server, threads=threads, away=3.0))
    try:
        with Network() as network, server_in(network) as server:
            outage = PacketsDropped(server, network)
            tell(outage, run(outage, BATCHES, SIZE))
    except NoNetwork as exc:
        print(f"PacketsDropped: not on this machine: {exc}")
    print("goals:", "; ".join(missed) or "met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
