"""Tests of login servers: many processes, forked workers, greenlets, and schema upgrades."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import ipguard
from ipguard import Actor, Reason
from ipguard.stores._sql import SCHEMA_VERSION
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import FakeClock, Outbox
from tests.conftest import rounds
from tests.logins import Login, LoginServer
from tests.postgres import Given, Server, fresh_schema, until
from tests.proxy import Proxy
from tests.test_aio import cancel_at_random_points
from tests.test_guard_fork import in_child

# The tests start many processes, and the machine may be busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(300, 3_600))]

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
HOME, ELSEWHERE = "203.0.113.7", "198.51.100.9"


def user(name: str) -> ipguard.User:
    return ipguard.User(username=name, full_name="Some One", account_id="A1")


def test_a_flood_of_unknown_users() -> None:
    """Invented usernames neither exceed the memory bound nor evict real users."""
    clock = FakeClock()
    store = ipguard.open_store("memory://", clock=clock)
    real = [f"user{n}" for n in range(rounds(500, 10_000))]
    flood, capacity = rounds(10_000, 1_000_000), rounds(1_500, 100_000)
    store.put_users(map(user, real))
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    flow.impose_many(BOSS, [(name, HOME) for name in real], reason="to have some")
    tracemalloc.start()
    try:
        guard = ipguard.Guard(store, capacity=capacity, monotonic=clock.monotonic)
        assert all(guard.is_allowed(name, HOME) for name in real)
        for n in range(flood):
            guard.is_allowed(f"an-invented-username-{n}", ELSEWHERE)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stats = guard.stats()
    assert (stats.users, stats.loads) == (capacity, len(real) + flood)
    # The documented bound: about 1 kB for each user, plus the restrictions.
    assert taken < capacity * 1_000 + len(real) * 1_000
    assert all(guard.is_allowed(name, HOME) for name in real)
    assert guard.stats().loads == stats.loads  # no real user was evicted


# ------------------------------------------------------------------------------ fork


def sockets(pid: int) -> set[str]:
    """Return the open sockets of a process, by their names in /proc."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(each.readlink()))
    return {name for name in found if name.startswith("socket:")}


def clients_of(port: int) -> set[str]:
    """Return the client sockets of all connections to a local TCP port, by the same names."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if int(row[2].rpartition(":")[2], 16) == port}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_closes_inherited_sockets(own_postgres: Server) -> None:
    """A forked child closes sockets that were idle, in use or being opened."""
    with Proxy(own_postgres.port) as proxy:
        url = own_postgres.url(
            port=proxy.port, schema=fresh_schema(), sslmode="disable", gssencmode="disable"
        )
        with PostgresStore(url, listen="off", timeout=20.0) as store:

            def own_sockets() -> set[str]:
                return sockets(os.getpid()) & clients_of(proxy.port)

            with store.transaction() as turn:
                store.load_policy("jsmith")
                assert turn.user("jsmith") is None
                store._pool.forget()
                proxy.silent = True
                load = threading.Thread(target=_try, args=(lambda: store.load_policy("jsmith"),))
                load.start()
                until(
                    lambda: len(own_sockets()) == 2, "one connection is in use, one is being opened"
                )
                assert in_child(lambda: len(own_sockets())) == 0
                proxy.silent = False
                assert len(own_sockets()) == 2
                assert turn.failures("jsmith") == 0  # the parent's session still works
            proxy.cut()
            load.join(60)
            assert not load.is_alive()
            assert store.load_policy("jsmith").revision == 0


def _try(call: Callable[[], object]) -> None:
    with contextlib.suppress(ipguard.StoreUnavailable):
        call()


# --------------------------------------------------------------------------- asyncio, gevent


def test_cancelled_calls_leak_no_connection(postgres: Server | Given) -> None:
    """Calls that are cancelled at random points leak no connection, here or on the server."""
    name = fresh_schema()
    ask = (
        "SELECT count(*), count(*) FILTER (WHERE state = 'idle') FROM pg_stat_activity"
        " WHERE application_name = %s"
    )
    with PostgresStore(postgres.url(schema=name, application_name=name), timeout=20.0) as store:
        cancel_at_random_points(store, rounds(200, 10_000))
        pool = store._pool
        until(lambda: len(pool._idle) == len(pool._slots), "every connection is returned")
        assert 0 < len(pool._slots) <= store._options.pool_size
        few, most = len(pool._slots), len(pool._slots) + 1  # one is the listener
        until(
            lambda: postgres.execute(ask, name) in ([(few, few)], [(most, most)]),
            "the server has no other connection and none in a transaction",
        )
        assert store._queue.acquire(blocking=False)
        store._queue.release()
    until(
        lambda: postgres.execute(ask, name) == [(0, 0)], "closing the store closes all connections"
    )


GEVENT = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent, ipguard
from ipguard.aio import AsyncGuard
from ipguard.testing import Outbox
boss = ipguard.Actor(username="boss", email="b@x.example", manages=ipguard.Actor.EVERY_ACCOUNT)
names = [f"user{n}" for n in range(50)]
with ipguard.open_store(sys.argv[1]) as store, ipguard.Guard(store) as guard:
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    store.put_users(
        [ipguard.User(username=name, full_name="X", account_id="U1") for name in names]
    )
    def one(name):
        applied = flow.impose(boss, name, "203.0.113.7", reason="x")
        assert guard.wait_for(applied.revision, 60)
        return guard.is_allowed(name, "203.0.113.7"), guard.is_allowed(name, "203.0.113.8")
    jobs = [gevent.spawn(one, name) for name in names]
    gevent.joinall(jobs, timeout=90)
    assert [job.value for job in jobs] == [(True, False)] * 50
    assert guard.stats().woken_by == "refresher"
    if sys.argv[1].startswith("postgresql"):
        ticks = 0
        def tick():
            global ticks
            while True:
                ticks += 1
                gevent.sleep(0.001)
        clock = gevent.spawn(tick)
        store._pool.read(lambda session: session.rows("SELECT pg_sleep(0.2)"))
        assert ticks > 10, "a query blocked the other greenlets"
        clock.kill()
    try:
        AsyncGuard(guard)
    except ipguard.InvalidValue as exc:
        print(exc)
"""


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgres"])
def test_gevent(kind: str, postgres: Server | Given, tmp_path: Path) -> None:
    """With gevent, guard and workflow run in greenlets, and a query does not block the others."""
    url = {
        "memory": "memory://",
        "sqlite": f"sqlite:///{tmp_path}/gevent.db",
        "postgres": postgres.url(schema=fresh_schema(), timeout=20.0),
    }[kind]
    command = [sys.executable, "-c", GEVENT, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "is patched by gevent" in done.stdout


# ------------------------------------------------------------------------------ upgrades


class Library:
    """A copy of the library with additional migrations.

    Args:
        folder: The folder of the copy.
        dialect: The dialect of the migrations, `sqlite` or `postgresql`.
    """

    def __init__(self, folder: Path, dialect: str) -> None:
        self._folder, self.version = folder, SCHEMA_VERSION
        self._package = shutil.copytree(Path(ipguard.__file__).parent, folder / "ipguard")
        self._migrations = self._package / "stores" / "migrations" / dialect

    def add(self, *statements: str) -> None:
        """Add a migration."""
        self.version += 1
        statements = (*statements, f"UPDATE schema_version SET version = {self.version}")
        text = "".join(f"{statement};\n" for statement in statements)
        (self._migrations / f"{self.version:04}_next.sql").write_text(text)
        module = self._package / "stores" / "_sql" / "__init__.py"
        changed, count = re.subn(
            r"(?m)^(SCHEMA_VERSION: Final) = \d+$", rf"\1 = {self.version}", module.read_text()
        )
        assert count == 1
        module.write_text(changed)

    def run(self, code: str, url: str) -> None:
        """Run code with this library in another process."""
        found = f"assert ipguard.__file__.startswith({str(self._package)!r})"
        code = f"import ipguard, sys\n{found}\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", code, url],
            cwd=self._folder, env=os.environ | {"PYTHONPATH": str(self._folder)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


class Administration:
    """A thread that imposes and lifts restrictions to HOME until the store refuses."""

    def __init__(self, flow: ipguard.Workflow, users: Sequence[str]) -> None:
        self._flow, self._users = flow, users
        self.count = 0
        self.refused: ipguard.StoreUnavailable | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self.refused is None:
            try:
                for user in self._users:
                    applied = self._flow.impose(BOSS, user, HOME, reason="on")
                    assert applied.restriction is not None
                    self._flow.lift(BOSS, applied.restriction.id, reason="off")
                    self.count += 1
            except ipguard.StoreUnavailable as exc:
                self.refused = exc

    def proceed(self) -> None:
        """Wait for more changes."""
        wanted = self.count + 5
        until(
            lambda: self.count >= wanted or not self._thread.is_alive(),
            "the thread makes more changes",
        )
        assert self.refused is None
        assert self._thread.is_alive()

    def refusal(self) -> str:
        """Wait until the store refuses; return the message."""
        self._thread.join(60)
        return str(self.refused)


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_a_newer_schema_under_a_running_library(
    request: pytest.FixtureRequest, dialect: str, tmp_path: Path
) -> None:
    """This library works on a newer schema until the schema requires a newer library."""
    if dialect == "sqlite":
        url = f"sqlite:///{tmp_path / 'upgrade.db'}"
    else:
        url = request.getfixturevalue("postgres").url(schema=fresh_schema(), timeout=20.0)
    newer = Library(tmp_path, dialect)
    with ipguard.open_store(url) as store:
        users = [f"user{n}" for n in range(5)]
        everybody = [*users, "jsmith", "mary"]
        store.put_users(map(user, everybody))
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        login = Login(guard={"max_staleness": 1.0})
        with LoginServer(url, everybody, [ELSEWHERE], login) as logins:
            work = Administration(flow, users)
            work.proceed()
            newer.add(
                "ALTER TABLE restrictions ADD COLUMN remark TEXT NOT NULL DEFAULT 'none'",
                "ALTER TABLE changes ADD COLUMN origin TEXT",
                "CREATE TABLE remarks (username TEXT NOT NULL PRIMARY KEY, text TEXT)",
                "CREATE INDEX restrictions_by_remark ON restrictions (remark, username)",
            )
            newer.run(NEXT, url)
            until(
                lambda: logins.reasons().get("jsmith") == Reason.NOT_LISTED,
                "a change by the newer library takes effect on a login server",
            )
            work.proceed()
            ipguard.open_store(url).close()  # this library can still open it

            oldest = newer.version + 1
            newer.add(f"UPDATE schema_version SET oldest = {oldest}")
            newer.run(NEXT.replace(HOME, "203.0.113.8"), url)
            assert f"this library needs {oldest}" in work.refusal()
            until(
                lambda: logins.reasons().get("mary") == Reason.STORE_UNAVAILABLE,
                "login servers refuse all logins",
            )
            with pytest.raises(ipguard.SchemaVersionError):
                ipguard.open_store(url)


NEXT = f"""
boss = ipguard.Actor(username="boss", email="b@x.example", manages=ipguard.Actor.EVERY_ACCOUNT)
from ipguard.testing import FakeClock, Outbox
with ipguard.open_store(sys.argv[1]) as store, ipguard.Guard(store) as guard:
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    applied = flow.impose(boss, "jsmith", "{HOME}", reason="newer library")
    assert guard.check("jsmith", "{HOME}", at_least=applied.revision)
"""
