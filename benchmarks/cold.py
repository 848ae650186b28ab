"""Users who are not remembered, on real stores, and the costs before the first login.

The floor of a read is the database driver reading the same rows.
"""

from __future__ import annotations

import gc
import itertools
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import fixtures as fx
from benchmarks.measure import Fact, Part, Row, Scale, Subject, Work, in_child, resident
from ipguard import Guard, RestrictionStore, open_store

ROWS = """
SELECT h.revision, u.removed, r.id, r.first_ip, r.last_ip, r.label, r.created_at, r.created_by,
       r.expires_at
FROM head h
LEFT JOIN users u ON u.username = {0}
LEFT JOIN restrictions r ON r.username = {0}
WHERE h.id = 1
ORDER BY r.created_at, r.id
"""
"""A policy and its revision in one statement: without the revision no lease could rest on it."""

SQLITE, POSTGRES = "`sqlite3` reading the same rows", "psycopg, prepared, autocommit, in its pool"


def cold(scale: Scale) -> Part:
    """One read of each store, and a check of a remembered user."""
    count, url = scale.stored, f"sqlite:///{fx.scratch() / 'cold.db'}"

    def sqlite_raw() -> Work:
        fx.filled(url, count).close()
        database, rows = sqlite3.connect(url[10:], isolation_level=None), ROWS.format("?")
        return reading(lambda user, _: database.execute(rows, (user, user)).fetchall(), count)

    def postgres_raw() -> Work:
        from psycopg_pool import ConnectionPool  # noqa: PLC0415

        fx.filled(fx.in_schema("cold"), count).close()
        options = {"autocommit": True, "options": "-c search_path=cold"}
        pool, rows = ConnectionPool(fx.server(), kwargs=options, min_size=1), ROWS.format("%s")

        def read(user: str, _: str) -> object:
            with pool.connection() as connection:
                return connection.execute(rows, (user, user), prepare=True).fetchall()

        return reading(read, count)

    return Part(
        title="Cold, three restrictions",
        rows=[
            Row("cold user, SQLite", SQLITE, "SQLite", 2.2),
            Row("cold user, PostgreSQL", POSTGRES, "PostgreSQL", 1.3),
            Row("`check()` of a remembered user", SQLITE, "check", 0.25),
        ],
        subjects=[
            Subject("sqlite3", sqlite_raw),
            Subject("SQLite", lambda: strangers(fx.filled(url, count), count)),
            Subject("psycopg", postgres_raw),
            Subject(
                "PostgreSQL",
                lambda: strangers(fx.filled(fx.in_schema("cold"), count), count),
                "psycopg",
            ),
            Subject("check", lambda: fx.asking(fx.remembering(count).check, fx.at_random(count))),
        ],
        slot=10.0,
    )


def strangers(store: RestrictionStore, count: int) -> Work:
    """Return the work of asking about users who are not remembered, each once for each guard."""
    pairs = fx.homes(count)

    def work(loops: int) -> float:
        took = 0.0
        gc.collect()  # the guards of the last turn
        for first in range(0, loops, count):
            guard = Guard(store)
            guard.sync()
            todo = pairs[: loops - first]
            took += fx.asking(guard.is_allowed, lambda _: todo)(0)  # noqa: B023
        return took

    if not all(itertools.starmap(Guard(store).is_allowed, pairs[:10])):
        raise RuntimeError("a listed user is refused")
    return work


def reading(read: fx.Ask, count: int) -> Work:
    """Return the work of reading users' rows with the driver alone."""
    pairs = itertools.cycle(fx.homes(count))
    return fx.asking(read, lambda loops: list(itertools.islice(pairs, loops)))


# ---------------------------------------------------------------- before the first login


def memory(scale: Scale) -> Part:
    """What a remembered user takes."""
    figure = "memory of a remembered user, 3 restrictions and one address, without its name"
    return Part(
        title="Memory",
        rows=[Row(figure, "", "bytes", 400, judged="ours", unit="B")],
        facts=lambda: [("bytes", remembered_bytes(scale.many), None)],
    )


def remembered_bytes(count: int) -> float:
    """Return how many bytes a guard holds for each user it remembers, without the name."""

    def ask(guard: Guard, users: int) -> None:
        for _ in range(2):
            for n in range(users):
                # Texts of their own, as a server decodes them: the guard alone keeps them alive.
                guard.is_allowed(fx.name(n), fx.home(n))
        gc.collect()

    guard = fx.guard_of(count=count, capacity=count)
    ask(fx.guard_of(count=10), 10)  # allocations that happen only once
    before = resident()
    ask(guard, count)
    return (resident() - before) / count - sys.getsizeof(fx.name(0))


def preload(scale: Scale) -> Part:
    """Preloading from PostgreSQL in turns with psycopg fetching the same rows."""
    count = scale.preloaded

    def facts() -> Iterator[Fact]:
        fx.filled(fx.in_schema("preload", bulk_timeout=3600), count).close()
        analyze()
        for _ in range(min(3, scale.rounds)):
            bare = in_child(fetch_rows, count)
            took, held = in_child(preload_users, count)
            yield "time", took, bare
            yield "held", held, None

    figure = f"preloading {count:,} users with 3 restrictions, PostgreSQL"
    held = "memory of a preloaded user, 3 IPv4 restrictions, without its name"
    return Part(
        title="Preload",
        rows=[
            Row(figure, "psycopg fetching the same rows in the faster of two ways", "time", 1.5),
            Row(held, "", "held", 150, judged="ours", unit="B"),
        ],
        facts=facts,
        processes=1,
    )


def analyze() -> None:
    """Give the planner statistics, as a server does by itself a minute after such an import."""
    import psycopg  # noqa: PLC0415

    with psycopg.connect(fx.server(), autocommit=True) as connection:
        connection.execute("ANALYZE preload.restrictions, preload.users")


def preload_users(count: int) -> tuple[float, float]:
    """Preload a guard; return the seconds and the bytes held for each user without the name."""
    with open_store(fx.in_schema("preload", listen="off")) as store:
        guard = Guard(store, preload=True)
        store.changes_since(None)  # connects, and imports the driver
        gc.collect()
        before = resident()
        begun = time.perf_counter()
        guard.sync()
        took = time.perf_counter() - begun
        if guard.stats().preloaded != count:
            raise RuntimeError(f"{guard.stats().preloaded} of {count:,} users were preloaded")
        return took, (resident() - before) / count - sys.getsizeof(fx.name(0))


def fetch_rows(count: int) -> float:
    """Fetch the same rows with psycopg; return the seconds of the faster of two ways."""
    import psycopg  # noqa: PLC0415

    columns = "username, first_ip, last_ip, id, expires_at"
    statement = f"SELECT {columns} FROM preload.restrictions"

    def at_once(connection: Any) -> int:
        return len(connection.cursor(binary=True).execute(statement).fetchall())

    def copied(connection: Any) -> int:
        out = f"COPY preload.restrictions ({columns}) TO STDOUT (FORMAT BINARY)"
        with connection.cursor() as cursor, cursor.copy(out) as copy:
            copy.set_types(["text", "bytea", "bytea", "text", "int8"])
            return sum(1 for _ in copy.rows())

    took = []
    with psycopg.connect(fx.server(), autocommit=True) as connection:
        gc.disable()  # fetching all rows at once is faster without it
        for way in (at_once, copied):
            begun = time.perf_counter()
            fetched = way(connection)
            took.append(time.perf_counter() - begun)
            if fetched != 3 * count:
                raise RuntimeError(f"{fetched:,} of {3 * count:,} rows were fetched")
    return min(took)


def imports(scale: Scale) -> Part:  # noqa: ARG001
    """Importing ipguard, in a fresh interpreter each time."""

    def importing(modules: str) -> Work:
        code = f"import time; b = time.perf_counter(); import {modules}"
        command = [sys.executable, "-I", "-c", f"{code}; print(time.perf_counter() - b)"]
        return lambda loops: sum(float(subprocess.check_output(command)) for _ in range(loops))

    floor = "attrs, netaddr, cachetools"
    return Part(
        title="Import",
        rows=[Row("`import ipguard`", f"`import {floor}`", "ipguard", 1.5)],
        subjects=[
            Subject("floor", lambda: importing(floor)),
            Subject("ipguard", lambda: importing("ipguard")),
        ],
        rounds=20,
    )
