"""Searching the users of a store, as the administration page does.

A figure is the time that processors worked for one question, the client's and the server's
together, so that a busy machine shows the same as an idle one.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from benchmarks.fixtures import BOSS, in_schema, scratch, server, workflow_of
from benchmarks.measure import Fact, Part, Row, Scale
from ipguard import Actor, User, Workflow, open_store

FIRST = ("John", "Mary", "Wei", "Ana", "Ivan", "Fatima", "Olu", "Priya", "Jürgen", "Zoë")
STORES = ("SQLite", "PostgreSQL")
QUESTIONS = {
    "every": '"j", an actor of every account',
    "few": '"j", an actor of 100 accounts',
    "worst": "the slowest of 32 questions",
}
PAGE = "SELECT username, full_name, account_id FROM users ORDER BY username LIMIT 51"
BACKENDS = """
SELECT pid FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


def searches(scale: Scale) -> Part:
    """The page's search, by number of users."""
    return Part(
        title="Search",
        rows=[
            Row(
                f"search: {text}, {size:,} users, {store}",
                "the driver fetches a page of users by key",
                f"{store} {size} {question}",
                0.05 if size <= 100_000 else 0.5,
                judged="ours",
            )
            for size in scale.searched
            for store in STORES
            for question, text in QUESTIONS.items()
        ],
        facts=lambda: facts(scale.searched),
        processes=1,
    )


def facts(sizes: tuple[int, ...]) -> Iterator[Fact]:
    """Yield for each size and store what each of QUESTIONS takes, and what the driver does."""
    import psycopg  # noqa: PLC0415

    with psycopg.connect(server(), autocommit=True) as watch:
        meter = Meter(watch)
        for size, name in itertools.product(sizes, STORES):
            path, schema = scratch() / "listing.db", f"listing{size}"
            urls = f"sqlite:///{path}", in_schema(schema, bulk_timeout=3600)
            with open_store(urls[name != "SQLite"]) as store:
                fill(store, size)
                found = answers(workflow_of(store), size, meter)
            driver: Any = sqlite3.connect(path)
            if name == "PostgreSQL":
                driver = psycopg.connect(server(), options=f"-c search_path={schema}")
            with closing(driver):
                floor = meter(lambda: driver.execute(PAGE).fetchall())  # noqa: B023
            for question, took in found.items():
                yield f"{name} {size} {question}", took, floor


def fill(store: Any, size: int) -> None:
    """Write users and their restrictions: common words, rare ones, a large account."""
    store.put_users(people(size))
    rows = ((f"user{n:07d}", text) for n in range(size) for text in lists(n, size))
    workflow_of(store).impose_many(BOSS, rows, reason="benchmark")


def account(n: int) -> str:
    """Return a user's account: a tenth of them share one."""
    return "BIG" if n % 10 == 0 else f"U{n:07d}"


def people(size: int) -> Iterator[User]:
    chance = random.Random(size)
    for n in range(size):
        words = [FIRST[n % 7 + n % 3], f"Last{chance.randrange(1000)}", f"Zone{n * 10 // size}"]
        words += ["Outsider"] * (n % 10 == 3) + ["Xerxes"] * (n == size // 2)
        yield User(username=f"user{n:07d}", full_name=" ".join(words), account_id=account(n))


def lists(n: int, size: int) -> Iterator[str]:
    """Yield a user's restrictions; some of them are shared by many users."""
    yield f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"
    if n % 3 == 0:
        yield f"2001:db8:{n >> 16:x}:{n & 65535:x}::/64"
    if n % 10 == 5:
        yield "198.51.100.0/24"
    if n >= size // 2:
        yield "203.0.113.1-203.0.113.9"


def answers(flow: Workflow, size: int, meter: Meter) -> dict[str, float]:
    """Return how long each of QUESTIONS takes, in seconds."""
    few = frozenset(account(n) for n in range(1, size, max(2, size // 100 | 1)))
    manages: dict[str, Any] = {"every": Actor.EVERY_ACCOUNT, "few": few}
    middle = f"{size // 2:07d}"[:-2]
    terms = [
        "", f"user{middle}", "user", f"U{middle}", "U0", "john", "zone9", "outsider", "z", "xerx",
        "no such name", "john last77", "10.0.0.3", "198.51.100.7", "203.0.113.7", "j"
    ]  # fmt: skip
    took = {}
    for who, accounts in manages.items():
        actor = Actor(username="boss", email="b@example.com", manages=accounts)
        for term in terms:
            took[who, term] = meter(lambda: flow.overview(actor, search=term))  # noqa: B023
    return {who: took[who, "j"] for who in manages} | {"worst": max(took.values())}


class Meter:
    """Measures the processor time of calls, in this process and in PostgreSQL's."""

    def __init__(self, watch: Any) -> None:
        self._watch = watch  # a connection of its own, which is not counted

    def _servers(self) -> float:
        spent = 0
        for (pid,) in self._watch.execute(BACKENDS).fetchall():
            with suppress(OSError):
                spent += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
        return spent / 1e9

    def __call__(self, call: Callable[[], object]) -> float:
        """Return the median of several calls, in seconds."""
        took: list[float] = []
        for _ in range(6):
            server, own = self._servers(), time.process_time()
            call()
            own = time.process_time() - own  # before the server is asked for its time
            took.append(own + self._servers() - server)
        return statistics.median(took[1:])
