"""How long after its commit a change holds on every login server, beside bare LISTEN and NOTIFY.

.venv/bin/python -m benchmarks.propagation [restrictions] [processes]

Each process has a guard with its refresher, and beside it a bare psycopg connection that listens.
Restrictions are confirmed and deleted one after another, each time followed by a bare durable
transaction with a NOTIFY. A time is counted from when the commit returned to who made it, until the
guard of a process has dropped what changed and moved its revision; or until the bare connection
there gave out the notification. Below 0: before the commit returned.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg

import ipguard
from ipguard.model import Restriction
from ipguard.store import Transaction
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.postgres import running_server

ROOT = Path(__file__).resolve().parent.parent
BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)
PAUSE = 0.01
GOALS = {"p50": 3e-3, "p99": 0.1, "max": 1.0}


class Noting(PostgresStore):
    """A store that notes when its last turn was committed, before anybody is mailed of it."""

    committed_at = 0.0

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        with super().transaction(staged=staged) as turn:
            yield turn
        self.committed_at = time.monotonic()


def listen(url: str, dsn: str) -> None:
    """Be one of the processes: note when what came, until standard input ends."""
    held: list[tuple[int, float]] = []
    heard: list[tuple[int, float]] = []
    ready = threading.Event()

    def hear() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("LISTEN bare")
            ready.set()
            heard.extend((int(it.payload), time.monotonic()) for it in connection.notifies())

    threading.Thread(target=hear, daemon=True).start()
    with PostgresStore(url) as store:
        guard = ipguard.Guard(store)
        sync = guard._lease.sync

        def timed() -> None:
            sync()
            held.append((guard._lease.revision, time.monotonic()))

        guard._lease.sync = timed  # type: ignore[method-assign]
        with guard:
            ready.wait()
            while store._listener._state != "listening for changes":
                time.sleep(0.01)
            print("ready", flush=True)
            sys.stdin.read()
        print(json.dumps([held, heard]), flush=True)
    os._exit(0)


def change(store: Noting, dsn: str, count: int) -> tuple[dict[int, float], dict[int, float]]:
    """Make the changes; return when each revision, and each bare notification, was committed."""
    outbox = Outbox()
    settings = ipguard.WorkflowSettings(requests_per_hour=10**9)
    flow = ipguard.Workflow(store, outbox, key=bytes(32), settings=settings)
    store.put_users(
        ipguard.User(username=f"user{n}", full_name="Some One", account_id="A1")
        for n in range(count)
    )
    committed: dict[int, float] = {}
    told: dict[int, float] = {}
    with psycopg.connect(dsn, autocommit=True) as bare:
        bare.execute("CREATE TABLE bare (number int)")

        def one(number: int) -> None:
            time.sleep(random.uniform(0.5, 1.5) * PAUSE)
            with bare.transaction():
                bare.execute("INSERT INTO bare VALUES (%s)", (number,))
                bare.execute("SELECT pg_notify('bare', %s)", (str(number),))
            told[number] = time.monotonic()
            time.sleep(random.uniform(0.5, 1.5) * PAUSE)

        for n in range(count):
            request = flow.request(BOSS, f"user{n}", "203.0.113.7")
            time.sleep(random.uniform(0.5, 1.5) * PAUSE)
            applied = flow.confirm(BOSS, request.id, outbox.number_for(request.id))
            committed[applied.revision] = store.committed_at
            one(2 * n)
            assert applied.restriction is not None
            deleted = flow.delete(BOSS, applied.restriction.id)
            assert isinstance(deleted, ipguard.Applied)
            committed[deleted.revision] = store.committed_at
            one(2 * n + 1)
    return committed, told


def after(committed: dict[int, float], held: Sequence[tuple[int, float]]) -> list[float]:
    """Return how long after each commit somebody was there, or past it."""
    times, at = [], 0
    for number, moment in sorted(committed.items()):
        while held[at][0] < number:
            at += 1
        times.append(held[at][1] - moment)
    return times


def tell(name: str, times: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    found = {"p50": cuts[49], "p99": cuts[98], "max": max(times)}
    print(f"{name:52}" + "".join(f"{key} {value * 1e3:8.2f} ms   " for key, value in found.items()))
    return found


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    print(f"{processes} processes, {count} restrictions, load {os.getloadavg()[0]:.1f}")
    with running_server() as server:
        # In one database a notification wakes every session that listens, whatever its channel.
        server.execute("CREATE DATABASE bare")
        url, dsn = server.url(schema="propagation"), server.url("bare")
        with Noting(url, listen="off") as store:
            listening = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.propagation", "--listen", url, dsn],
                    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
                for _ in range(processes)
            ]  # fmt: skip
            for process in listening:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            committed, told = change(store, dsn, count)
            time.sleep(1.5)  # whoever was not woken has synced
            answers = [json.loads(process.communicate()[0]) for process in listening]
    held = [after(committed, answer[0]) for answer in answers]
    heard = [after(told, answer[1]) for answer in answers]
    tell("bare NOTIFY to one process", [each for times in heard for each in times])
    tell("commit to held, in one process", [each for times in held for each in times])
    tell("bare NOTIFY to the last of all", [max(times) for times in zip(*heard, strict=True)])
    found = tell("commit to held, in all", [max(times) for times in zip(*held, strict=True)])
    missed = [f"{name} > {goal * 1e3:g} ms" for name, goal in GOALS.items() if found[name] > goal]
    print("goals:", ", ".join(missed) or "met")
    return bool(missed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--listen"]:
        listen(*sys.argv[2:])
    sys.exit(main())
