"""Several threads that ask one guard, with and without another process that changes things."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
import time
from functools import partial
from typing import IO, Any

from benchmarks.measure import Part, Subject, _each
from benchmarks.parts.cold import BOSS, SETTINGS, filled, scratch
from benchmarks.scale import Scale
from benchmarks.work import Pair, at_random, fill, name
from ipguard import Guard, RestrictionStore, Workflow, open_store
from ipguard.model import Changes
from ipguard.testing import Outbox

USERS = 1_000
COMMITS = 50  # a second


class Watched:
    """A store, and when it told a guard of which revision."""

    def __init__(self, store: RestrictionStore) -> None:
        self._store = store
        self.told: list[tuple[int, float]] = []

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        changes = self._store.changes_since(cursor)
        self.told.append((changes.head, time.monotonic()))
        return changes

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._store, attribute)


class Writer:
    """Another process, which changes a user's restrictions so many times a second while it may.

    Args:
        url: The store.
        users: How many users there are.
    """

    def __init__(self, url: str, users: int) -> None:
        command = [sys.executable, "-m", "benchmarks.parts.threads", url, str(users)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.commits: list[tuple[int, float]] = []

    def _say(self, word: str) -> list[tuple[int, float]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the writing process has ended")
        return [(revision, at) for revision, at in json.loads(line)]

    def go(self) -> None:
        """Let it write, and return once it has begun."""
        self._say("go")

    def stop(self) -> None:
        """Stop it, and take over what it has committed."""
        self.commits += self._say("stop")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def write(url: str, users: int, orders: IO[str]) -> None:
    """Be the writing process: `go` and `stop` come as lines, each is answered with one."""
    commits: list[tuple[int, float]] = []
    writing, due = False, 0.0
    held: str | None = None
    with open_store(url) as store:
        flow = Workflow(store, Outbox(), key=bytes(32), settings=SETTINGS)
        number = 0
        while True:
            left = max(0.0, due - time.monotonic()) if writing else None
            if select.select([orders], [], [], left)[0]:
                order = orders.readline().strip()
                if not order:
                    return
                writing, due = order == "go", time.monotonic()
                print(json.dumps(commits), flush=True)
                commits = []
                continue
            due += 1 / COMMITS
            number += 1
            if held is None:
                user = name(number % users)
                applied = flow.impose(BOSS, user, "192.0.2.1", reason="to measure")
                assert applied.restriction is not None
                held, revision = applied.restriction.id, applied.revision
            else:
                revision = flow.lift(BOSS, held, reason="to measure").revision
                held = None
            commits.append((revision, time.monotonic()))


class Crowd:
    """So many threads that ask one guard."""

    def __init__(self, guard: Guard, users: int, threads: int, writer: Writer | None) -> None:
        self._guard = guard
        self._users = users
        self._count = threads
        self._writer = writer

    def ready(self, loops: int) -> None:
        self._pairs = at_random(self._users, loops)

    def time(self, loops: int) -> float:  # noqa: ARG002
        def ask(pairs: list[Pair]) -> None:
            allowed = self._guard.is_allowed
            for user, ip in pairs:
                allowed(user, ip)

        return self._together(ask)

    def _together(self, work: Any) -> float:
        start = threading.Barrier(self._count + 1)

        def run(pairs: list[Pair]) -> None:
            start.wait()
            work(pairs)

        # Each has the same share; the last may have a few less.
        share = -(-len(self._pairs) // self._count)
        shares = [self._pairs[n * share : (n + 1) * share] for n in range(self._count)]
        threads = [threading.Thread(target=run, args=(pairs,), daemon=True) for pairs in shares]
        for thread in threads:
            thread.start()
        with self._writing():
            start.wait()
            begun = time.perf_counter()
            for thread in threads:
                thread.join()
            return time.perf_counter() - begun

    @contextlib.contextmanager
    def _writing(self) -> Any:
        if self._writer is None:
            yield
            return
        self._writer.go()
        try:
            yield
        finally:
            self._writer.stop()

    def singles(self, count: int) -> list[int]:
        self.ready(count)
        took: list[int] = []
        self._together(lambda pairs: took.extend(_each(self._guard.is_allowed, pairs)))
        return took


def crowd_name(threads: int, *, writer: bool) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}{', with a writer' if writer else ''}"


def threads(scale: Scale) -> Part:
    """Total throughput, as what one call costs all of them together."""
    users = min(USERS, scale.many)
    url = f"sqlite:///{scratch() / 'threads.db'}"
    made: list[tuple[Guard, Watched, Writer]] = []

    def world() -> tuple[Guard, Watched, Writer]:
        if not made:
            store = Watched(filled(open_store(url), users))
            guard = Guard(store)  # type: ignore[arg-type]
            fill(guard, users)
            guard.start()
            made.append((guard, store, Writer(url, users)))
        return made[0]

    def crowd(count: int, *, writer: bool) -> Crowd:
        guard, _, writing = world()
        return Crowd(guard, users, count, writing if writer else None)

    def facts() -> dict[str, Any]:
        guard, store, writer = world()
        latencies = sorted(
            next((at for head, at in store.told if head >= revision and at > committed - 1), 0.0)
            - committed
            for revision, committed in writer.commits[:-1]
        )
        heard = [late for late in latencies if late > -1]
        guard.close()
        writer.close()
        return {
            "commits": len(writer.commits),
            "sync latency p50, ms": 1e3 * heard[len(heard) // 2] if heard else None,
            "sync latency p99, ms": 1e3 * heard[len(heard) * 99 // 100] if heard else None,
            "users dropped and read again": guard.stats().loads - users,
        }

    names = [(count, writer) for count in scale.threads for writer in (False, True)]
    return Part(
        title=f"Threads that ask one guard about {users:,} users, SQLite",
        subjects=[
            Subject(
                name=crowd_name(count, writer=writer),
                kind="floor" if number == 0 else "ours",
                make=partial(crowd, count, writer=writer),
                per=None if not number else crowd_name(scale.threads[0], writer=False),
            )
            for number, (count, writer) in enumerate(names)
        ],
        facts=facts,
        a_second="answers",
        slot=50.0,
        rounds=8,
    )


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), sys.stdin)
