"""How login servers are run: many processes, forked workers, greenlets, and upgrades under them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ipguard
from ipguard import Actor, Reason
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.conftest import rounds
from tests.logins import ALLOWED, ROOT, LoginServer
from tests.postgres import Given, Server, free_port, fresh_schema, until
from tests.test_aio import cancel_at_random_points

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
HOME, ELSEWHERE = "203.0.113.7", "198.51.100.9"


def user(name: str) -> ipguard.User:
    return ipguard.User(username=name, full_name="Some One", account_id="A1")


# ---------------------------------------------------------------------------- many processes


def test_a_change_holds_on_every_server(postgres: Server | Given) -> None:
    """What is confirmed or deleted by one process is what all of eight login servers answer by."""
    url = postgres.url(schema=fresh_schema())
    users = [f"user{n}" for n in range(rounds(20, 1_000))]
    outbox = Outbox()
    settings = ipguard.WorkflowSettings(requests_per_hour=10**6)
    with PostgresStore(url, listen="off") as store, ExitStack() as stack:
        flow = ipguard.Workflow(store, outbox, key=bytes(32), settings=settings)
        store.put_users(map(user, users))
        servers = [
            stack.enter_context(LoginServer(url, users, ELSEWHERE, pace=0.02)) for _ in range(8)
        ]

        def all_answer(reason: str) -> None:
            until(
                lambda: all(server.report().all(reason, users) for server in servers),
                f"all answer {reason}",
            )

        all_answer(ALLOWED)
        applied = []
        for name in users:
            request = flow.request(BOSS, name, HOME)
            applied.append(flow.confirm(BOSS, request.id, outbox.number_for(request.id)))
        all_answer(Reason.NOT_LISTED)
        for each in applied:
            assert each.restriction is not None
            flow.delete(BOSS, each.restriction.id)
        all_answer(ALLOWED)


# ------------------------------------------------------------------------------ fork


def sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open, by the names that the kernel gives them."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(each.readlink()))
    return {name for name in found if name.startswith("socket:")}


def to_server(port: int) -> set[str]:
    """Return the clients' ends of all connections to a local TCP port, by the same names."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if int(row[2].rpartition(":")[2], 16) == port}


def ask(port: int, username: str, address: str) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}/?username={username}&address={address}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


@contextmanager
def gunicorn(url: str, workers: int) -> Iterator[int]:
    """Run the application in forked workers, and give its port."""
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "gunicorn", "--preload", "--workers", str(workers),
            "--bind", f"127.0.0.1:{port}", "--no-control-socket", "tests.gunicorn_app:app",
        ],
        cwd=ROOT, stdin=subprocess.DEVNULL, env=os.environ | {"IPGUARD_TEST_STORE": url},
    )  # fmt: skip
    try:

        def answers() -> bool:
            assert process.poll() is None
            with contextlib.suppress(OSError):
                return bool(ask(port, "nobody", HOME))
            return False

        until(answers, "gunicorn answers")
        yield port
    finally:
        process.terminate()
        process.wait(60)


def test_gunicorn_with_preload(own_postgres: Server) -> None:
    """Workers forked from a master that listens share no connection, and each sees a change."""
    schema = fresh_schema()
    with PostgresStore(own_postgres.url(schema=schema), listen="off") as store:
        store.put_users([user("jsmith")])
        url = own_postgres.url(tcp=True, schema=schema, sslmode="disable", gssencmode="disable")
        with gunicorn(url, 4) as port:
            told: dict[int, dict[str, Any]] = {}

            def meet(reason: str) -> bool:
                answer = ask(port, "jsmith", ELSEWHERE)
                told[answer["worker"]] = answer
                return [each["reason"] for each in told.values()] == [reason] * 4

            until(lambda: meet(Reason.UNRESTRICTED), "each of four workers answers")
            applied = ipguard.Workflow(store, Outbox(), key=bytes(32)).impose(
                BOSS, "jsmith", HOME, reason="a test"
            )
            assert applied.restriction is not None
            until(lambda: meet(Reason.NOT_LISTED), "each has seen the change")
            (master,) = {answer["master"] for answer in told.values()}
            assert all(answer["first"] for answer in told.values())
            assert master not in told
            mine = {pid: sockets(pid) & to_server(own_postgres.port) for pid in (master, *told)}
            assert all(mine.values())  # every one of them is connected
            assert len(set.union(*mine.values())) == sum(map(len, mine.values()))


# --------------------------------------------------------------------------- asyncio, gevent


def test_cancelled_at_random_points_no_connection_is_left(postgres: Server | Given) -> None:
    """Calls cancelled anywhere leak no connection, here or on the server, and the pool is whole."""
    name = fresh_schema()
    ask = (
        "SELECT count(*), count(*) FILTER (WHERE state = 'idle') FROM pg_stat_activity"
        " WHERE application_name = %s"
    )
    with PostgresStore(postgres.url(schema=name, application_name=name), timeout=20.0) as store:
        cancel_at_random_points(store, rounds(200, 10_000))
        pool = store._client.pool
        until(lambda: len(pool._idle) == pool._open, "every connection is given back")
        assert 0 < pool._open <= store._options.pool_size
        most = pool._open + 1  # the one that listens
        until(
            lambda: postgres.execute(ask, name) in ([(pool._open, pool._open)], [(most, most)]),
            "the server has no others, and none in a transaction",
        )
        assert store._writer._queue.acquire(blocking=False)
        store._writer._queue.release()
    until(lambda: postgres.execute(ask, name) == [(0, 0)], "closing leaves none")


def test_gevent(postgres: Server | Given) -> None:
    """All patched, guard and workflow go on in greenlets, which a query does not hold up."""
    code = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent, ipguard, psycopg.waiting
from ipguard.aio import AsyncGuard, AsyncWorkflow
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
    ticks = 0
    def tick():
        global ticks
        while True:
            ticks += 1
            gevent.sleep(0.001)
    clock = gevent.spawn(tick)
    before = ticks
    store._client.read(lambda session: session.rows("SELECT pg_sleep(0.2)"))
    assert ticks > before + 10, "a query held up the other greenlets"
    for refused in (AsyncGuard, AsyncWorkflow):
        try:
            refused(guard if refused is AsyncGuard else flow)
        except ipguard.InvalidValue as exc:
            print(exc)
    clock.kill()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, postgres.url(schema=fresh_schema(), timeout=20.0)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is patched by gevent") == 2
