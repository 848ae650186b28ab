"""A user who is not remembered: one read from the store, beside the driver's own read."""

from __future__ import annotations

import atexit
import cProfile
import gc
import itertools
import pstats
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Part, Subject, _each
from benchmarks.peers.databases import server
from benchmarks.scale import Scale
from benchmarks.work import Ask, Pair, homes, name, networks
from ipguard import Actor, Guard, RestrictionStore, User, Workflow, WorkflowSettings, open_store
from ipguard.testing import Outbox

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
SETTINGS = WorkflowSettings(requests_per_hour=10**9, restrictions_per_user=10**6)

SQLITE, SQLITE_RAW = "ipguard, SQLite", "sqlite3, the same rows"
POSTGRES, POSTGRES_RAW = "ipguard, PostgreSQL", "psycopg_pool, the same rows"
PLAIN = "SELECT id, first_ip, last_ip FROM restrictions WHERE username = "


class Strangers:
    """Questions about users who are not remembered, each of them once for each guard."""

    def __init__(self, store: RestrictionStore, count: int) -> None:
        self._store = store
        self._pairs = homes(count)
        assert all(itertools.starmap(self._guard(), self._pairs[:10]))

    def _guard(self) -> Ask:
        guard = Guard(self._store)
        guard.sync()
        return guard.is_allowed

    def ready(self, loops: int) -> None:
        self._turns: list[tuple[Ask, list[Pair]]] = []
        gc.collect()  # the guards of the turn before
        count = len(self._pairs)
        whole, rest = divmod(loops, count)
        self._turns = [(self._guard(), self._pairs) for _ in range(whole)]
        self._turns += [(self._guard(), self._pairs[:rest])] * bool(rest)

    def time(self, loops: int) -> float:  # noqa: ARG002
        took = 0.0
        for ask, pairs in self._turns:
            begun = time.perf_counter()
            for user, ip in pairs:
                ask(user, ip)
            took += time.perf_counter() - begun
        return took

    def singles(self, count: int) -> list[int]:
        return _each(self._guard(), self._pairs[:count])


def profile(store: RestrictionStore, count: int) -> dict[str, float]:
    """Return what share of a cold check each function has for itself, the largest first."""
    work, profiler = Strangers(store, count), cProfile.Profile()
    work.ready(count)
    profiler.runcall(work.time, count)
    own = {
        f"{Path(file).stem if file != '~' else 'C'}: {function}": times[2]
        for (file, _, function), times in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    }
    whole = sum(own.values())
    largest = sorted(own, key=own.__getitem__, reverse=True)[:12]
    return {f"share of a cold check on SQLite, {told}": own[told] / whole for told in largest}


class Reads:
    """The driver's own read of a user's rows."""

    def __init__(self, read: Callable[[str], object], count: int) -> None:
        self._read = read
        self._names = [name(number) for number in range(count)]

    def ready(self, loops: int) -> None:
        self._asked = list(itertools.islice(itertools.cycle(self._names), loops))

    def time(self, loops: int) -> float:  # noqa: ARG002
        read = self._read
        begun = time.perf_counter()
        for user in self._asked:
            read(user)
        return time.perf_counter() - begun

    def singles(self, count: int) -> list[int]:
        pairs: list[Pair] = [(user, "") for user in self._names[:count]]
        return _each(lambda user, _: self._read(user), pairs)


def filled(store: RestrictionStore, count: int) -> RestrictionStore:
    """Put the users and their restrictions into a store, if they are not there yet."""
    if store.changes_since(None).head == 0:
        store.put_users(
            User(username=name(n), full_name="Some One", account_id="U1") for n in range(count)
        )
        rows = [(name(n), text) for n in range(count) for text in networks(n)]
        flow = Workflow(store, Outbox(), key=bytes(32), settings=SETTINGS)
        flow.impose_many(BOSS, rows, reason="to measure")
    return store


def scratch() -> Path:
    """Return a folder that is gone when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="ipguard-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def cold(scale: Scale) -> Part:
    """The three stores and the two drivers."""
    from ipguard.stores import sqlite as sqlite_store  # noqa: PLC0415

    count, place = scale.cold, scratch() / "cold.db"

    def sqlite_file() -> Path:
        with open_store(f"sqlite:///{place}") as store:
            filled(store, count)
        return place

    def sqlite(statement: str, times: int) -> Reads:
        connection = sqlite3.connect(sqlite_file(), isolation_level=None)
        return Reads(lambda user: connection.execute(statement, (user,) * times).fetchall(), count)

    def postgres_raw(statement: str, times: int) -> Reads:
        from psycopg_pool import ConnectionPool  # noqa: PLC0415

        with open_store(server()) as store:
            filled(store, count)
        options = {"autocommit": True, "options": "-c search_path=ipguard"}
        pool = ConnectionPool(server(), kwargs=options, min_size=1, open=True)

        def read(user: str) -> object:
            with pool.connection() as connection:
                return connection.execute(statement, (user,) * times, prepare=True).fetchall()

        return Reads(read, count)

    def postgres_policy() -> Reads:
        from ipguard.stores import postgres  # noqa: PLC0415
        from ipguard.stores.postgres._connection import dialect  # noqa: PLC0415

        return postgres_raw(dialect(postgres._POLICY, "ipguard"), 3)

    return Part(
        title="Cold: a user who is not remembered, two restrictions",
        subjects=[
            Subject(
                name=SQLITE_RAW,
                kind="floor",
                make=lambda: sqlite(sqlite_store._POLICY, 3),
            ),
            Subject(
                name="ipguard, memory",
                make=lambda: Strangers(filled(open_store("memory://"), count), count),
            ),
            Subject(
                name=SQLITE,
                make=lambda: Strangers(open_store(f"sqlite:///{sqlite_file()}"), count),
            ),
            Subject(
                name="sqlite3, the restrictions alone",
                kind="aside",
                make=lambda: sqlite(PLAIN + "?", 1),
                note="no revision beside them, so no lease could rest on it",
            ),
            Subject(
                name=POSTGRES_RAW,
                kind="aside",
                make=postgres_policy,
                note="prepared, autocommit",
            ),
            Subject(
                name=POSTGRES,
                per=POSTGRES_RAW,
                make=lambda: Strangers(filled(open_store(server()), count), count),
            ),
            Subject(
                name="psycopg_pool, the restrictions alone",
                kind="aside",
                make=lambda: postgres_raw(PLAIN + "%s", 1),
            ),
        ],
        facts=lambda: profile(open_store(f"sqlite:///{sqlite_file()}"), count),
        slot=10.0,
    )
