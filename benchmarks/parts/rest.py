"""asyncio, confirmations, the import, and memory."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from benchmarks.measure import Part, Subject
from benchmarks.parts.cold import BOSS, SETTINGS, Strangers, filled, scratch
from benchmarks.parts.growth import preloaded_guard, resident
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.databases import server
from benchmarks.scale import Scale
from benchmarks.work import (
    Pair,
    Rows,
    at_random,
    crowd,
    crowded,
    dotted,
    homes,
)
from ipguard import Guard, RestrictionStore, User, Workflow, open_store
from ipguard.aio import AsyncGuard
from ipguard.testing import Outbox

AsyncAsk = Callable[[str, str], Awaitable[object]]


class Awaited:
    """A question that is awaited, one after another, on one event loop."""

    def __init__(self, fresh: Callable[[], AsyncAsk], pairs: Callable[[int], list[Pair]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._fresh = fresh
        self._source = pairs

    def ready(self, loops: int) -> None:
        self._pairs = self._source(loops)
        self._ask = self._fresh()

    def time(self, loops: int) -> float:
        async def all_of_them() -> float:
            ask, took = self._ask, 0.0
            begun = time.perf_counter()
            for user, ip in self._pairs:
                await ask(user, ip)
            took = time.perf_counter() - begun
            return took * loops / len(self._pairs)

        return self._loop.run_until_complete(all_of_them())

    def singles(self, count: int) -> list[int]:
        self.ready(count)

        async def each() -> list[int]:
            clock, ask, took = time.perf_counter_ns, self._ask, []
            for user, ip in self._pairs:
                begun = clock()
                await ask(user, ip)
                took.append(clock() - begun)
            return took

        return self._loop.run_until_complete(each())


def in_asyncio(scale: Scale) -> Part:
    """A hit never leaves the event loop; a miss goes to a thread and comes back."""
    users = min(1_000, scale.many)
    count = scale.cold
    place = scratch() / "aio.db"

    def store() -> RestrictionStore:
        return filled(open_store(f"sqlite:///{place}"), count)

    def same(loops: int) -> list[Pair]:
        return at_random(users, loops)

    def strangers(loops: int) -> list[Pair]:
        return homes(count)[:loops]

    def floor() -> Awaited:
        table = dict.fromkeys(homes(users), True)

        async def ask(user: str, ip: str) -> bool:
            return table[user, ip]

        return Awaited(lambda: ask, same)

    def hit() -> Awaited:
        guard = AsyncGuard(crowded(users))
        return Awaited(lambda: guard.is_allowed, same)

    def miss() -> Awaited:
        asked = store()

        def fresh() -> AsyncAsk:
            guard = Guard(asked)
            guard.sync()
            return AsyncGuard(guard).is_allowed

        return Awaited(fresh, strangers)

    return Part(
        title="asyncio",
        subjects=[
            Subject(name="floor: a coroutine with one dict look-up", kind="floor", make=floor),
            Subject(name="AsyncGuard, hit", make=hit),
            Subject(name="Guard, miss on SQLite", make=lambda: Strangers(store(), count)),
            Subject(name="AsyncGuard, miss on SQLite", per="Guard, miss on SQLite", make=miss),
        ],
    )


class Confirms:
    """Confirmations, one after another, each durable when it returns."""

    def __init__(self, store: RestrictionStore) -> None:
        # Another one in each of the benchmark's processes: those share the server.
        self._user = f"trader{os.getpid()}"
        store.put_users([User(username=self._user, full_name="John Smith", account_id="U1")])
        self._outbox = Outbox()
        self._flow = Workflow(store, self._outbox, key=bytes(32), settings=SETTINGS)
        self._next = itertools.count(1)

    def ready(self, loops: int) -> None:
        asked = [
            self._flow.request(BOSS, self._user, dotted((10 << 24) + 2 * next(self._next)))
            for _ in range(loops)
        ]
        self._ids = [(request.id, self._outbox.number_for(request.id)) for request in asked]

    def time(self, loops: int) -> float:  # noqa: ARG002
        confirm = self._flow.confirm
        begun = time.perf_counter()
        for request, number in self._ids:
            confirm(BOSS, request, number)
        return time.perf_counter() - begun

    def singles(self, count: int) -> list[int]:  # noqa: ARG002
        return []


class Commits:
    """One row, written and committed durably, as often as wanted."""

    def __init__(self, insert: Callable[[], object]) -> None:
        self._insert = insert

    def ready(self, loops: int) -> None:
        pass

    def time(self, loops: int) -> float:
        insert = self._insert
        begun = time.perf_counter()
        for _ in range(loops):
            insert()
        return time.perf_counter() - begun

    def singles(self, count: int) -> list[int]:  # noqa: ARG002
        return []


def confirms(scale: Scale) -> Part:  # noqa: ARG001
    """What a confirmation costs beside a durable commit of one row."""
    folder = scratch()

    def sqlite_commit() -> Commits:
        connection = sqlite3.connect(folder / "raw.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
        return Commits(lambda: connection.execute("INSERT INTO rows (text) VALUES ('a row')"))

    def postgres_commit() -> Commits:
        import psycopg  # noqa: PLC0415

        connection = psycopg.connect(server(), autocommit=True)
        connection.execute("CREATE TABLE IF NOT EXISTS bench_rows (id serial, text text)")
        return Commits(
            lambda: connection.execute(
                "INSERT INTO bench_rows (text) VALUES ('a row')", prepare=True
            )
        )

    return Part(
        title="Confirmations, durable",
        subjects=[
            Subject(name="sqlite3, one row", kind="floor", make=sqlite_commit),
            Subject(
                name="confirm on SQLite",
                make=lambda: Confirms(open_store(f"sqlite:///{folder / 'confirms.db'}")),
            ),
            Subject(name="psycopg, one row", kind="aside", make=postgres_commit),
            Subject(
                name="confirm on PostgreSQL",
                per="psycopg, one row",
                make=lambda: Confirms(open_store(server())),
            ),
        ],
        a_second="commits",
        slot=25.0,
        rounds=12,
    )


class Imports:
    """An import, in a fresh interpreter each time."""

    def __init__(self, modules: str) -> None:
        self._code = (
            f"import time; begun = time.perf_counter(); import {modules};"
            " print(time.perf_counter() - begun)"
        )

    def ready(self, loops: int) -> None:
        pass

    def time(self, loops: int) -> float:
        command = [sys.executable, "-I", "-c", self._code]
        return sum(float(subprocess.check_output(command)) for _ in range(loops))

    def singles(self, count: int) -> list[int]:  # noqa: ARG002
        return []


def imports(scale: Scale) -> Part:  # noqa: ARG001
    """What `import ipguard` adds to what it is built on."""
    return Part(
        title="Import, in a fresh interpreter",
        subjects=[
            Subject(
                name="import attrs, netaddr, cachetools",
                kind="floor",
                make=lambda: Imports("attrs, netaddr, cachetools"),
            ),
            Subject(name="import ipguard", make=lambda: Imports("ipguard")),
        ],
        rounds=12,
    )


class Fill:
    """How long a user takes to be remembered."""

    def __init__(self, remember: Callable[[int], object]) -> None:
        self._remember = remember

    def ready(self, loops: int) -> None:  # noqa: ARG002
        self._kept: object = None  # what was filled before is gone

    def time(self, loops: int) -> float:
        begun = time.perf_counter()
        self._kept = self._remember(loops)
        return time.perf_counter() - begun

    def singles(self, count: int) -> list[int]:  # noqa: ARG002
        return []


def _table(count: int) -> object:
    return dict.fromkeys(homes(count), True)


def _remembered(count: int) -> object:
    return crowded(count)


def _preloaded(count: int) -> object:
    return preloaded_guard(Rows(count=count), count)


def _peer(peer: Peer, count: int) -> object:
    return peer.load(crowd(count))


FILLS: dict[str, Callable[[int], object]] = {
    "floor: a dict of (user, address)": _table,
    "ipguard, remembered": _remembered,
    "ipguard, preloaded": _preloaded,
    **{peer.name: partial(_peer, peer) for peer in PEERS},
}


def memory(scale: Scale) -> Part:
    """How fast users come into memory, and what each costs there."""
    ours = list(FILLS)[:3]

    def facts() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for told in FILLS:
            count = scale.many // 5 if told in ours else min(scale.many // 5, 10 * scale.linear)
            command = [sys.executable, "-m", "benchmarks.parts.rest", told, str(max(count, 10))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found[f"bytes a user: {told}"] = float(done.stdout) if done.stdout.strip() else None
        return found

    return Part(
        title="Into memory: two restrictions and one address each",
        subjects=[
            Subject(
                name=told,
                kind="floor" if told == ours[0] else "ours",
                make=partial(Fill, FILLS[told]),
            )
            for told in ours
        ],
        facts=facts,
        slot=10.0,
        fewer=3,
        rounds=12,
    )


if __name__ == "__main__":
    fill, count = FILLS[sys.argv[1]], int(sys.argv[2])
    fill(10)  # what it imports and makes once
    before = resident()
    kept = fill(count)
    print((resident() - before) / count)
