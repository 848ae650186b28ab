"""The time from the commit of a change until it holds on every login server."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.fixtures import BOSS, in_schema, server, workflow_of
from benchmarks.measure import Fact, Part, Row, Scale
from ipguard import Guard, RestrictionStore, User, open_store

PAUSE = 0.01
WARM_UP = 20


class Noting:
    """A store that notes the moment of its last commit, and when its guard held which revision.

    After a sync a guard's refresher waits for changes after the revision that it now holds.
    """

    def __init__(self, store: RestrictionStore) -> None:
        self._store = store
        self.committed_at = 0.0
        self.held: list[tuple[int, float]] = []

    @contextmanager
    def transaction(self, **options: Any) -> Iterator[Any]:
        with self._store.transaction(**options) as transaction:
            yield transaction
        self.committed_at = time.monotonic()

    def wait(self, revision: int, timeout: float) -> bool:
        self.held.append((revision, time.monotonic()))
        return self._store.wait(revision, timeout)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._store, attribute)


def propagation(scale: Scale) -> Part:
    """Impose and lift restrictions while processes with guards wait, in turns with bare NOTIFY."""
    kinds = {"p50": (3e-3, "half"), "p99": (0.1, "99 %"), "max": (1.0, "all")}
    return Part(
        title="Propagation",
        rows=[
            Row(
                f"{share} of the changes hold on {scale.listeners} login servers within",
                "bare NOTIFY reaches as many processes",
                kind,
                limit,
                judged="ours",
            )
            for kind, (limit, share) in kinds.items()
        ],
        facts=lambda: propagated(scale.changes, scale.listeners),
        processes=1,
    )


def propagated(count: int, listeners: int) -> Iterator[Fact]:
    """Yield percentiles of the time until the last of the listeners holds a change."""
    import psycopg  # noqa: PLC0415

    url = in_schema("propagation")
    # In one database a notification wakes every session that listens, on any channel.
    with psycopg.connect(server(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE bare")
        bare = psycopg.conninfo.make_conninfo(server(), dbname="bare")
    context = multiprocessing.get_context("spawn")
    with open_store(f"{url}&listen=off") as store:
        pipes = []
        for _ in range(listeners):
            ours, theirs = context.Pipe()
            context.Process(target=listen, args=(url, bare, theirs), daemon=True).start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        committed, notified = change(Noting(store), bare, count)
        time.sleep(1.5)  # a guard that was not woken has synced by itself
        for pipe in pipes:
            pipe.send("report")
        answers = [pipe.recv() for pipe in pipes]
    held = [delays(committed, answer[0]) for answer in answers]
    heard = [delays(notified, answer[1]) for answer in answers]
    last, last_heard = (list(map(max, zip(*it, strict=True))) for it in (held, heard))
    for kind, at in (("p50", 49), ("p99", 98)):
        yield (
            kind,
            *(statistics.quantiles(it, n=100, method="inclusive")[at] for it in (last, last_heard)),
        )
    yield "max", max(last), max(last_heard)


def listen(url: str, bare: str, pipe: Any) -> None:
    """Be a login server: note when its guard holds which revision, and when NOTIFY arrives."""
    import psycopg  # noqa: PLC0415

    heard: list[tuple[int, float]] = []
    listening = threading.Event()

    def hear() -> None:
        with psycopg.connect(bare, autocommit=True) as connection:
            connection.execute("LISTEN bare")
            listening.set()
            heard.extend((int(it.payload), time.monotonic()) for it in connection.notifies())

    threading.Thread(target=hear, daemon=True).start()
    store = Noting(open_store(url))
    with Guard(store):  # type: ignore[arg-type]
        listening.wait()
        pipe.send("ready")
        pipe.recv()
        pipe.send((store.held, heard))


def change(store: Noting, bare: str, count: int) -> tuple[dict[int, float], dict[int, float]]:
    """Make changes and bare notifications in turns; return when each was committed."""
    import psycopg  # noqa: PLC0415

    store.put_users([User(username="user", full_name="Some One", account_id="A1")])
    flow = workflow_of(store)
    committed: dict[int, float] = {}
    notified: dict[int, float] = {}

    def note(revision: int) -> None:
        committed[revision] = store.committed_at
        time.sleep(random.uniform(0.5, 1.5) * PAUSE)
        with connection.transaction():
            connection.execute("INSERT INTO bare VALUES (1)")
            connection.execute("SELECT pg_notify('bare', %s)", (str(revision),))
        notified[revision] = time.monotonic()
        time.sleep(random.uniform(0.5, 1.5) * PAUSE)

    with psycopg.connect(bare, autocommit=True) as connection:
        connection.execute("CREATE TABLE bare (number int)")
        for n in range(WARM_UP + count):
            if n == WARM_UP:  # by now every process listens
                committed.clear()
                notified.clear()
            applied = flow.impose(BOSS, "user", "203.0.113.7", reason="benchmark")
            note(applied.revision)
            assert applied.restriction is not None
            note(flow.lift(BOSS, applied.restriction.id, reason="benchmark").revision)
    return committed, notified


def delays(committed: dict[int, float], held: list[tuple[int, float]]) -> list[float]:
    """Return how long after each commit its revision, or a later one, was held."""
    return [held[bisect_left(held, (number,))][1] - at for number, at in committed.items()]
