"""Tests of gunicorn and uWSGI with the guard created before or after the fork."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ipguard
from ipguard import Actor, Reason
from ipguard.testing import Outbox
from tests.conftest import rounds
from tests.logins import ROOT
from tests.postgres import Server, free_port, fresh_schema, until
from tests.test_deployment import clients_of, sockets

# Each test starts servers, and the machine may be busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(300, 3_600))]

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
HOME, ELSEWHERE = "203.0.113.7", "198.51.100.9"
USERS = 200
WORKERS = 4

GUNICORN = [sys.executable, "-m", "gunicorn", "--no-control-socket", "--workers", str(WORKERS)]
UWSGI = [
    str(Path(sys.executable).with_name("uwsgi")), "--master", "--processes", str(WORKERS),
    "--enable-threads", "--die-on-term", "--disable-logging", "--virtualenv", sys.prefix,
]  # fmt: skip
# uWSGI forks in C. Without --py-call-osafterfork it runs no hook of os.register_at_fork. With and
# without it, a worker hangs in CPython, before any Python code runs, if another thread of the
# master holds the GIL at that moment. So the guard is started after the fork, as
# docs/postgresql-setup.md says.
SERVERS = {
    "gunicorn": (GUNICORN, "--bind", True),
    "gunicorn-preload": ([*GUNICORN, "--preload"], "--bind", True),
    "uwsgi": (UWSGI, "--http-socket", False),
    "uwsgi-hooks": ([*UWSGI, "--py-call-osafterfork"], "--http-socket", False),
}


def ask(port: int, username: str, address: str) -> dict[str, Any]:
    """Return the answer of one of the workers."""
    url = f"http://127.0.0.1:{port}/?username={username}&address={address}"
    with urllib.request.urlopen(url, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@contextmanager
def running(name: str, url: str) -> Iterator[int]:
    """Run a server with forked workers; yield its port."""
    command, bind, start = SERVERS[name]
    port = free_port()
    module = (
        ["tests.forked_app:app"] if "gunicorn" in name else ["--module", "tests.forked_app:app"]
    )
    process = subprocess.Popen(
        [*command, bind, f"127.0.0.1:{port}", *module],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"IPGUARD_TEST_STORE": url, "IPGUARD_TEST_START": "1" if start else ""},
    )
    try:

        def answers() -> bool:
            assert process.poll() is None, f"{name} ended"
            with contextlib.suppress(OSError):
                return bool(ask(port, "user0", HOME))
            return False

        until(answers, f"{name} answers")
        yield port
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()  # its workers then end by themselves


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ipguard.db"
    server: Server = request.getfixturevalue("own_postgres")
    return server.url(tcp=True, schema=fresh_schema(), sslmode="disable", gssencmode="disable")


@pytest.mark.parametrize("name", SERVERS)
def test_forked_workers(name: str, url: str, request: pytest.FixtureRequest) -> None:
    """Workers share no connection, answer about the right user, and recover after the fork."""
    names = [f"user{n}" for n in range(USERS)]
    with ipguard.open_store(url) as store:
        store.put_users(
            ipguard.User(username=name, full_name="", account_id="A1") for name in names
        )
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        flow.impose_many(BOSS, [(name, HOME) for name in names[::2]], reason="every other user")
        for start in range(rounds(1, 10)):
            with running(name, url) as port:
                _check_start(name, port, request if "postgresql" in url else None)
                newly = names[2 * start + 1]
                flow.impose(BOSS, newly, HOME, reason="a change under running workers")
                until(
                    partial(_all_answer, port, newly, Reason.NOT_LISTED),
                    "each worker has seen the change",
                )
                names[2 * start + 1] = names[0]  # restricted from here on


def _check_start(name: str, port: int, request: pytest.FixtureRequest | None) -> None:
    def outcome(number: int) -> str:
        reason: str = ask(port, f"user{number}", ELSEWHERE)["reason"]
        if reason == Reason.STORE_UNAVAILABLE:
            return "unavailable"
        # Odd users are restricted one by one, one in each start, and are not in `numbers`.
        return "right" if (reason == Reason.NOT_LISTED) == (number % 2 == 0) else "wrong"

    numbers = [n for n in range(USERS) if n % 2 == 0 or n > 20]
    with ThreadPoolExecutor(16) as clients:
        outcomes = Counter(clients.map(outcome, numbers * 3))
    assert outcomes["wrong"] == 0, outcomes
    assert outcomes["right"] > 0, outcomes
    until(lambda: _all_answer(port, "user0", Reason.NOT_LISTED), "each worker answers")
    if request is not None:
        server: Server = request.getfixturevalue("own_postgres")
        answers = [ask(port, "user0", ELSEWHERE) for _ in range(40)]
        masters = {answer["master"] for answer in answers} - {
            answer["worker"] for answer in answers
        }
        pids = {answer["worker"] for answer in answers} | masters
        held = [sockets(pid) & clients_of(server.port) for pid in pids]
        used = [each for pid, each in zip(pids, held, strict=True) if pid not in masters]
        assert all(used), "each worker has a connection of its own"
        if name != "uwsgi":  # without hooks a worker keeps inherited sockets open
            assert len(set.union(*held)) == sum(map(len, held))


def _all_answer(port: int, username: str, reason: Reason) -> bool:
    answers = [ask(port, username, ELSEWHERE) for _ in range(8 * WORKERS)]
    return {answer["reason"] for answer in answers} == {reason} and len(
        {answer["worker"] for answer in answers}
    ) == WORKERS
