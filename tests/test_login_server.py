"""Tests of examples/login_server.py: its answers, and that refusals reveal nothing."""

import asyncio
import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

import ipguard
from ipguard.testing import FakeClock, Outbox

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "login_server.py"
OFFICE = "203.0.113.5"
ELSEWHERE = "198.51.100.7"
OPERATOR = ipguard.Actor(
    username="operator", email="operator@example.com", manages=ipguard.Actor.EVERY_ACCOUNT
)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("login_server_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # FastAPI resolves annotations there
    spec.loader.exec_module(module)
    return module


example = load()
# Fast parameters: the tests need no resistance to brute force.
example.SCRYPT.update(n=16, p=1)
ACCOUNTS = [example.Account.new(name, f"{name}'s own") for name in ("jsmith", "mlee")]


class Server:
    """The application in this process, on a memory store."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = ipguard.open_store("memory://", clock=self.clock)
        self.store.put_users(
            ipguard.User(username=account.username, full_name="N", account_id="U1")
            for account in ACCOUNTS
        )
        flow = ipguard.Workflow(self.store, Outbox(), key=b"k" * 32)
        flow.impose(OPERATOR, "jsmith", "203.0.113.0/29", reason="test")
        self.decisions: list[tuple[object, object, ipguard.Decision]] = []
        self.guard = ipguard.Guard(
            self.store,
            monotonic=self.clock.monotonic,
            observer=lambda *decision: self.decisions.append(decision),
        )
        self.app = example.create_app(self.guard, ACCOUNTS)

    def post(self, address: str, **body: Any) -> httpx.Response:
        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=(address, 50000))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/login", **body)

        return asyncio.run(post())

    def login(
        self, username: object, password: object, address: str = OFFICE, **headers: str
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Try to log in; return the status, the headers and the body."""
        attempt = {"username": username, "password": password}
        answer = self.post(address, json=attempt, headers=headers)
        return answer.status_code, sorted(answer.headers.items()), answer.content


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.store:
        yield server


@pytest.fixture
def refused(server: Server) -> Any:
    """The answer to a wrong password of a user without restrictions."""
    answer = server.login("mlee", "wrong")
    assert answer[0] == 401
    return answer


def test_logins_that_succeed(server):
    """A right password works from a listed address, or anywhere without restrictions."""
    assert server.login("jsmith", "jsmith's own")[0] == 200
    status, _, body = server.login("mlee", "mlee's own", ELSEWHERE)
    assert (status, body) == (200, b'{"username":"mlee"}')


@pytest.mark.parametrize(
    ("username", "password", "address"),
    [
        ("jsmith", "jsmith's own", ELSEWHERE),
        ("jsmith", "wrong", OFFICE),
        ("jsmith", "", OFFICE),
        ("nobody", "jsmith's own", OFFICE),
        ("a\0b", "x", OFFICE),
        ("mlee", "mlee's own", "not an address"),
        ("mlee", "mlee's own", "203.0.113.05"),
        ("jsmith", "jsmith's own", "203.0.113.5%eth0"),
    ],
)
def test_refusals_are_identical(server, refused, username, password, address):
    assert server.login(username, password, address) == refused


@pytest.mark.parametrize(
    ("username", "password", "address"),
    [
        ("jsmith", "jsmith's own", OFFICE),
        ("jsmith", "jsmith's own", ELSEWHERE),
        ("jsmith", "wrong", OFFICE),
        ("nobody", "wrong", OFFICE),
    ],
)
def test_every_attempt_costs_the_same_work(server, monkeypatch, username, password, address):
    """Each attempt computes one hash with the same parameters and asks the guard once."""
    hashes = []
    scrypt = hashlib.scrypt

    def counted(*args, **parameters):
        hashes.append({name: value for name, value in parameters.items() if name != "salt"})
        return scrypt(*args, **parameters)

    monkeypatch.setattr(hashlib, "scrypt", counted)
    loads = server.guard.stats().loads
    server.login(username, password, address)
    assert hashes == [example.SCRYPT]
    assert len(server.decisions) == 1
    assert server.guard.stats().loads == loads + 1


@pytest.mark.parametrize("username", ["JSmith", "JSMITH", "j\u017fmith"])
def test_other_spellings_of_a_username(server, refused, username):
    """Whatever spelling is typed, the restrictions of the user record apply."""
    assert server.login(username, "jsmith's own", ELSEWHERE) == refused
    assert server.login(username, "jsmith's own", OFFICE)[0] == 200
    assert {username for username, *_ in server.decisions if username != "mlee"} == {"jsmith"}


def test_address_headers_are_ignored(server, refused):
    claims = {
        "X-Forwarded-For": OFFICE,
        "X-Real-IP": OFFICE,
        "Forwarded": f"for={OFFICE}",
        "True-Client-IP": OFFICE,
    }
    assert server.login("jsmith", "jsmith's own", ELSEWHERE, **claims) == refused


def test_outage_answers_are_identical(server):
    server.store.close()
    answers = {
        repr(server.login(username, password, address))
        for username in ("jsmith", "JSmith", "mlee", "nobody")
        for password in ("jsmith's own", "mlee's own", "wrong")
        for address in (OFFICE, ELSEWHERE)
    }
    (answer,) = answers
    assert answer.startswith("(503, ")
    assert "('retry-after', '5')" in answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"username": 1, "password": "s3cret"}',
        rb'{"username": "mlee", "password": "\ud800s3cret"}',
        b'{"username": "mlee", "password": "s3cret' + b"x" * 2000 + b'"}',
        b'{"username": "mlee\xff", "password": "s3cret"}',
    ],
)
def test_malformed_bodies(server, body):
    """A malformed body is refused without repeating any of it."""
    answer = server.post(OFFICE, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.status_code == 400 or answer.json() == {"detail": example.UNREADABLE}
    assert b"s3cret" not in answer.content


def test_refresher_runs_with_the_application(server):

    async def run() -> str:
        async with server.app.router.lifespan_context(server.app):
            return str(server.guard.stats().woken_by)

    assert server.guard.stats().woken_by == "callers"
    assert asyncio.run(run()) == "refresher"
    assert server.guard.stats().woken_by == "callers"


def test_reprs_hide_passwords():
    """Accounts and login attempts show no password, salt or digest in their repr."""
    assert repr(ACCOUNTS[0]) == "Account(username='jsmith')"
    assert "s3cret" not in repr(example.Login(username="a", password="s3cret"))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[httpx.Client]:
    """The example as a process, on a database file."""
    url = f"sqlite:///{tmp_path}/ipguard.db"
    command = [sys.executable, "-u", EXAMPLE, "--store", url, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                found = re.search(rb"running on (http://127\.0\.0\.1:\d+)", line)
                if found:
                    break
            else:
                pytest.fail("the server did not start")
            with httpx.Client(base_url=found[1].decode(), timeout=60, trust_env=False) as client:
                yield client
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode in (0, -15)


@pytest.mark.slow
def test_real_server(running):
    """Over a socket: allowed users get in, refusals are identical, address headers are ignored."""

    def log_in(username: str, password: str = example.PASSWORD, **headers: str) -> Any:
        attempt = {"username": username, "password": password}
        answer = running.post("/login", json=attempt, headers=headers)
        received = sorted((k, v) for k, v in answer.headers.items() if k != "date")
        return answer.status_code, received, answer.content

    assert log_in("mlee")[0] == 200
    assert log_in("JSmith")[0] == 200
    refused = log_in("mlee", "wrong")
    assert refused[0] == 401
    assert log_in("rjones") == refused
    assert log_in("nobody") == refused
    assert log_in("rjones", **{"X-Forwarded-For": OFFICE}) == refused
