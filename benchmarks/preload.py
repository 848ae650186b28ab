"""What preloading costs, on PostgreSQL: memory, time beside bare psycopg, and a table turned over.

.venv/bin/python -m benchmarks.preload [users] [rounds]

Each load and each bare fetch runs in a process of its own, in turns.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psycopg

import ipguard
from ipguard.stores.postgres import PostgresStore
from tests.postgres import Given, Server, fresh_schema, running_server
from tests.turnover import another_history, turned_over

USERS = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 1_000_000
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 3
_ROWS = "SELECT username, first_ip, last_ip, id, expires_at FROM ipguard.restrictions"
_COPY = "COPY ipguard.restrictions (username, first_ip, last_ip, id, expires_at) TO STDOUT"


def stock(server: Server | Given, users: int) -> None:
    """Give each user three IPv4 restrictions, as the workflow would have written them."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("SET search_path = ipguard")
        connection.execute(
            "INSERT INTO users (username, full_name, account_id)"
            " SELECT 'user' || n, 'Some One', 'A1' FROM generate_series(1, %s) n",
            (users,),
        )
        connection.execute(
            "INSERT INTO restrictions"
            " SELECT 'user' || n, 1700000000000000 + k, substr(md5(n || '/' || k), 1, 16),"
            " int4send(n * 4 + k), int4send(n * 4 + k), '', 'admin', NULL"
            " FROM generate_series(1, %s) n, generate_series(1, 3) k",
            (users,),
        )
        connection.execute("VACUUM ANALYZE")


def resident(field: str = "VmRSS") -> int:
    """Return bytes of this process: resident now, or `VmHWM`, at the most so far."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def load(url: str) -> dict[str, float]:
    """Preload one guard, and return what it took."""
    with PostgresStore(url, listen="off") as store:
        guard = ipguard.Guard(store, preload=True)
        guard._lease.sync()
        gc.collect()
        before, began = resident(), time.perf_counter()
        assert guard._preload is not None
        guard._preload.fill(threading.Event())
        took = time.perf_counter() - began
        table = guard._cache.table
        assert table is not None
        assert table.whole
        names = sum(map(sys.getsizeof, table._rows))
        rows = sys.getsizeof(table._rows) + sum(map(sys.getsizeof, table._rows.values()))
        return {
            "took": took,
            "users": len(table),
            "names": names,
            "rows": rows,
            "held": resident() - before - names,
            "peak": resident("VmHWM") - before - names,
        }


def fetch(url: str) -> dict[str, float]:
    """Fetch the same rows with psycopg alone, in each of the ways that it has."""
    took = {}
    with psycopg.connect(url, autocommit=True) as connection:

        def all_at_once() -> int:
            return len(connection.cursor(binary=True).execute(_ROWS).fetchall())

        def without_the_collector() -> int:
            gc.disable()
            try:
                return all_at_once()
            finally:
                gc.enable()

        def in_batches() -> int:
            count = 0
            with connection.transaction(), connection.cursor("named", binary=True) as cursor:
                cursor.execute(_ROWS)
                while rows := cursor.fetchmany(5_000):
                    count += len(rows)
            return count

        def copied() -> int:
            with (
                connection.cursor() as cursor,
                cursor.copy(f"{_COPY} (FORMAT BINARY)") as copy,
            ):
                copy.set_types(["text", "bytea", "bytea", "text", "int8"])
                return sum(1 for _ in copy.rows())

        for way in (all_at_once, without_the_collector, in_batches, copied):
            began = time.perf_counter()
            count = way()
            took[way.__name__] = time.perf_counter() - began
            assert count == USERS * 3
    return took


def apart(what: Callable[[str], dict[str, float]], url: str) -> dict[str, float]:
    """Run one of the two in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.preload", str(USERS), "0", what.__name__, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def loads(url: str) -> None:
    """Tell what loading costs, beside psycopg alone."""
    ratios, told = [], []
    for _ in range(ROUNDS):
        bare, ours = apart(fetch, url), apart(load, url)
        assert ours["users"] == USERS
        fastest = min(bare, key=lambda way: bare[way])
        ratios.append(ours["took"] / bare[fastest])
        told.append(ours)
        ways = ", ".join(f"{way} {seconds:.2f}" for way, seconds in bare.items())
        print(f"psycopg alone (s): {ways}; preloading {ours['took']:.2f} s, {ratios[-1]:.2f} times")

    def each(key: str) -> float:
        return statistics.median(found[key] / USERS for found in told)

    print(f"bytes a user: the table's objects {each('rows'):.0f}, and {each('names'):.0f} its name")
    print(f"resident beyond names: {each('held'):.0f} held, {each('peak'):.0f} at the peak")
    print(f"loading: {statistics.median(ratios):.2f} times psycopg at its fastest")


def turn_over(server: Server | Given) -> None:
    """Tell how an import for all users and a RESET go by, under logins."""
    schema, began = fresh_schema(), time.perf_counter()
    with PostgresStore(server.url(), schema=schema) as store:
        logins = turned_over(
            store, USERS, lambda: another_history(server.execute, schema), patience=3_600.0
        )
    print(
        f"import of {USERS} rows and a RESET: {logins.answers} answers, {len(logins.wrong)} wrong, "
        f"{logins.unavailable} refused for the store, the slowest two {logins.slowest * 1e3:.0f} ms"
        f", in {time.perf_counter() - began:.0f} s"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"this process, which imported too: {peak:.0f} MB at the most")


def main() -> None:
    """Run one part in a child, or all of it."""
    if len(sys.argv) > 4:
        print(json.dumps({"fetch": fetch, "load": load}[sys.argv[3]](sys.argv[4])))
        return
    with running_server() as server:
        with PostgresStore(server.url(), listen="off"):
            pass
        stock(server, USERS)
        loads(server.url())
        turn_over(server)


if __name__ == "__main__":
    main()
