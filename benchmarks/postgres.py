"""Figures of the PostgreSQL store, each beside what the bare driver does in the same run.

.venv/bin/python -m benchmarks.postgres [rounds]
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable

import psycopg
import psycopg_pool

import ipguard
from ipguard.model import Action
from ipguard.stores.postgres import _POLICY, PostgresStore
from ipguard.stores.postgres._connection import dialect
from ipguard.testing import Outbox
from tests.postgres import running_server

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 3_000
BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)


def micros(call: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Return how long each of many calls took, in microseconds."""
    for _ in range(100):
        call()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e6)
    return took


def tell(name: str, took: list[float]) -> float:
    cuts = statistics.quantiles(took, n=100)
    print(f"{name:44} p50 {cuts[49]:9.1f} us   p99 {cuts[98]:9.1f} us")
    return cuts[49]


def loads(store: PostgresStore, dsn: str) -> None:
    statement = dialect(_POLICY, "ipguard")
    ours: list[float] = []
    raw: list[float] = []
    with psycopg_pool.ConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1) as pool:

        def fetch() -> None:
            with pool.connection() as connection:
                connection.execute(statement, ("jsmith",) * 3, prepare=True).fetchall()

        for _ in range(5):  # in turns, so that a busy moment of the machine hits both
            raw += micros(fetch, ROUNDS // 5)
            ours += micros(lambda: store.load_policy("jsmith"), ROUNDS // 5)
    base = tell("psycopg, prepared, autocommit, its pool", raw)
    mine = tell("load_policy", ours)
    print(f"{'':44} {mine / base:.2f} times the bare driver")


def confirms(store: PostgresStore) -> None:
    outbox = Outbox()
    settings = ipguard.WorkflowSettings(requests_per_hour=10**9)
    flow = ipguard.Workflow(store, outbox, key=bytes(32), settings=settings)
    asked = [flow.request(BOSS, f"user{n}", "10.0.0.1") for n in range(ROUNDS // 10)]
    numbers = [outbox.number_for(request.id) for request in asked]
    began = time.perf_counter()
    for request, number in zip(asked, numbers, strict=True):
        flow.confirm(BOSS, request.id, number)
    took = time.perf_counter() - began
    print(f"{'confirms, one after another, durable':44} {len(asked) / took:9.0f} a second")


def wakes(store: PostgresStore, writer: PostgresStore, dsn: str) -> None:
    while store.wait(10**9, 0.05) or store._listener._state != "listening for changes":
        pass
    woken: list[float] = []
    ready, done = threading.Barrier(2), threading.Barrier(2)

    def wait() -> None:
        revision = writer.changes_since(None).head
        for _ in range(ROUNDS // 10):
            ready.wait()
            while not store.wait(revision, 5.0):
                pass
            woken.append(time.perf_counter())
            revision = store._listener.touching or 0
            done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    took = []
    for _ in range(ROUNDS // 10):
        ready.wait()
        time.sleep(0.002)  # whoever waits, waits
        with writer.transaction() as turn:
            turn.append(Action.IMPOSE, actor=None, touches=frozenset({"jsmith"}))
        committed = time.perf_counter()
        done.wait()
        took.append((woken[-1] - committed) * 1e6)
    thread.join()
    tell("commit returned to another store's wait", took)
    raw = []
    with (
        psycopg.connect(dsn, autocommit=True) as listener,
        psycopg.connect(dsn, autocommit=True) as sender,
    ):
        listener.execute("LISTEN bare")
        for _ in range(ROUNDS // 10):
            heard: list[float] = []

            def hear(heard: list[float] = heard) -> None:
                heard.extend(time.perf_counter() for _ in listener.notifies(stop_after=1))

            thread = threading.Thread(target=hear)
            thread.start()
            time.sleep(0.002)
            sender.execute("NOTIFY bare")
            sent = time.perf_counter()
            thread.join()
            raw.append((heard[0] - sent) * 1e6)
    tell("bare NOTIFY returned to bare LISTEN", raw)


def main() -> None:
    with running_server() as server:
        dsn = server.url()
        with PostgresStore(dsn) as store, PostgresStore(dsn, listen="off") as writer:
            names = ["jsmith", *(f"user{n}" for n in range(ROUNDS // 10))]
            store.put_users(
                [
                    ipguard.User(username=name, full_name="John Smith", account_id="U1")
                    for name in names
                ]
            )
            flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
            for n in range(3):
                flow.impose(BOSS, "jsmith", f"203.0.113.{n}", reason="to have some")
            loads(store, dsn)
            confirms(store)
            wakes(store, writer, dsn)


if __name__ == "__main__":
    main()
