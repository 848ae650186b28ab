"""The users, addresses and stores that the benchmarks ask about."""

from __future__ import annotations

import atexit
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.measure import Work
from ipguard import Actor, AddressRange, Guard, Policy, RestrictionStore, User, open_store
from ipguard.model import Changes, Restriction
from ipguard.testing import Outbox
from ipguard.workflow import Workflow, WorkflowSettings

Pair = tuple[str, str]
"""A username and an address."""
Ask = Callable[[str, str], object]
Policies = dict[str, list[str]]

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
SETTINGS = WorkflowSettings(requests_per_hour=10**9, restrictions_per_user=65_535)
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
DSN = "IPGUARD_BENCH_POSTGRES"
"""The environment variable with the URL of the PostgreSQL server that `__main__` started."""

ROAMER = "roamer"
"""A user restricted to two wide networks, who comes from a new address each time."""
WIDE4, WIDE6 = "10.0.0.0/8", "2001:db8::/32"

_random = random.Random(20260101)


def name(number: int) -> str:
    """Return the name of a user."""
    return f"user{number:07}"


def dotted(value: int) -> str:
    """Write an IPv4 address."""
    return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"


def home(number: int) -> str:
    """Return the address that a user logs in from; it is in the first restriction."""
    return dotted((10 << 24) + 8 * number + 1)


def ranges(number: int) -> list[AddressRange]:
    """Return a user's three restrictions: networks of 8, 1 and 256 addresses."""
    firsts = (10 << 24) + 8 * number, (11 << 24) + number, (172 << 24) + 256 * number
    return [
        AddressRange(version=4, first=first, last=first + size - 1)
        for first, size in zip(firsts, (8, 1, 256), strict=True)
    ]


@lru_cache(maxsize=1)
def crowd(count: int) -> Policies:
    """Return the restrictions of many users as text."""
    return {name(number): [str(it) for it in ranges(number)] for number in range(count)}


@lru_cache(maxsize=4)
def homes(count: int) -> list[Pair]:
    """Return every user with their address: the same objects each time."""
    return [(name(number), home(number)) for number in range(count)]


def at_random(count: int) -> Callable[[int], list[Pair]]:
    """Return a source of users drawn at random."""
    return lambda calls: _random.choices(homes(count), k=calls)


def once(count: int) -> Callable[[int], list[Pair]]:
    """Return a source that gives each user once, in random order."""
    left = _random.sample(homes(count), count)
    return lambda calls: [left.pop() for _ in range(calls)]


def newcomers(version: int) -> Callable[[int], list[Pair]]:
    """Return a source of new addresses of the roamer."""
    numbers = iter(range(10**12))

    def address(n: int) -> str:
        # An odd step through the network, so that consecutive addresses are not neighbours.
        if version == 4:
            return dotted((10 << 24) + (n * 2_654_435 & 0xFFFFFF))
        return f"2001:db8:{n * 40_503 & 65535:x}:{n >> 16 & 65535:x}::{n & 65535:x}"

    return lambda calls: [(ROAMER, address(next(numbers))) for _ in range(calls)]


def asking(ask: Ask, pairs: Callable[[int], list[Pair]]) -> Work:
    """Return the work of asking in a plain loop."""

    def work(loops: int) -> float:
        todo = pairs(loops)
        begun = time.perf_counter()
        for user, ip in todo:
            ask(user, ip)
        return time.perf_counter() - begun

    return work


def look_up(pairs: list[Pair]) -> Ask:
    """Return the floor of a warm check: a function that looks the pair up in one dict."""
    table = dict.fromkeys(pairs, True)

    def floor(user: str, ip: str) -> bool:
        return table[user, ip]

    return floor


class Rows:
    """A store that makes policies on demand, so that a million users need no writing."""

    def __init__(self, policies: Policies | None = None, count: int = 0) -> None:
        self._policies = policies or {}
        self._count = count

    def now(self) -> datetime:
        return BEGUN

    def load_policy(self, username: str) -> Policy:
        if username in self._policies:
            listed = [AddressRange.parse(text) for text in self._policies[username]]
        elif username.startswith("user") and int(username[4:]) < self._count:
            listed = ranges(int(username[4:]))
        else:
            return Policy(revision=1, restrictions=(), known=False)
        common: dict[str, Any] = {"created_at": BEGUN, "created_by": "boss", "label": ""}
        held = tuple(
            Restriction(id=f"{username}-{number}", username=username, addresses=it, **common)
            for number, it in enumerate(listed)
        )
        return Policy(revision=1, restrictions=held, known=True)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        return 1, ((user, self.load_policy(user)) for user in map(name, range(self._count)))

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:  # noqa: ARG002
        return Changes(1, "token", frozenset())

    def wait(self, revision: int, timeout: float) -> bool:  # noqa: ARG002
        return False

    def close(self) -> None:
        pass


def guard_of(policies: Policies | None = None, count: int = 0, **settings: Any) -> Guard:
    """Return a guard of a store that makes its policies on demand."""
    return Guard(Rows(policies, count), **settings)  # type: ignore[arg-type]


def remembering(count: int) -> Guard:
    """Return a guard that remembers so many users and the address of each."""
    guard = guard_of(count=count, capacity=count)
    fill(guard, count)
    return guard


def fill(guard: Guard, count: int) -> None:
    """Let every user in twice: the first answer comes from the store, the second from memory."""
    for _ in range(2):
        for user, ip in homes(count):
            if not guard.is_allowed(user, ip):
                raise RuntimeError(f"{user} is refused from {ip}")


def filled(url: str, count: int) -> RestrictionStore:
    """Open a store and give it so many users with their restrictions, unless it has them."""
    store = open_store(url)
    if store.changes_since(None).head == 0:
        store.put_users(
            User(username=name(n), full_name="Some One", account_id="U1") for n in range(count)
        )
        rows = ((name(n), str(addresses)) for n in range(count) for addresses in ranges(n))
        workflow_of(store).impose_many(BOSS, rows, reason="benchmark")
    return store


def workflow_of(store: Any, outbox: Outbox | None = None) -> Workflow:
    """Return a workflow without limits on a boss's requests."""
    return Workflow(store, outbox or Outbox(), key=bytes(32), settings=SETTINGS)


def server() -> str:
    """Return the URL of the PostgreSQL server, or raise RuntimeError."""
    if DSN not in os.environ:
        raise RuntimeError(os.environ.get(f"{DSN}_ERROR", "no PostgreSQL server was started"))
    return os.environ[DSN]


def in_schema(schema: str, **options: object) -> str:
    """Return the server's URL for a schema of that name."""
    return f"{server()}&{urlencode({'schema': schema} | options)}"


def scratch() -> Path:
    """Return a folder that is removed when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="ipguard-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
