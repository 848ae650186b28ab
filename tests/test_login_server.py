"""The example of a login server: what it tells, and what it gives away, which is nothing."""

import asyncio
import hashlib
import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
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
    sys.modules[spec.name] = module  # where its annotations are looked up
    spec.loader.exec_module(module)
    return module


example = load()
# Tests are about what is done, not about how long an attacker would need.
example.SCRYPT.update(n=16, p=1)
ACCOUNTS = [example.Account.new(name, f"{name}'s own") for name in ("jsmith", "mlee")]


class Server:
    """The application in this process, over a store that tests can take away."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = ipguard.open_store("memory://", clock=self.clock)
        self.store.put_users(
            ipguard.User(username=account.username, full_name="N", account_id="U1")
            for account in ACCOUNTS
        )
        flow = ipguard.Workflow(self.store, Outbox(), key=b"k" * 32)
        flow.impose(OPERATOR, "jsmith", "203.0.113.0/29", reason="test")
        self.asked: list[tuple[object, object, ipguard.Decision]] = []
        self.guard = ipguard.Guard(
            self.store,
            monotonic=self.clock.monotonic,
            observer=lambda *asked: self.asked.append(asked),
        )
        self.app = example.create_app(self.guard, ACCOUNTS)

    def post(self, address: str, **what: Any) -> httpx.Response:
        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=(address, 50000))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/login", **what)

        return asyncio.run(post())

    def login(
        self, username: object, password: object, address: str = OFFICE, **headers: str
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Try to log in, and return everything that the client gets to see."""
        attempt = {"username": username, "password": password}
        answer = self.post(address, json=attempt, headers=headers)
        return answer.status_code, sorted(answer.headers.items()), answer.content


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with made.store:
        yield made


@pytest.fixture
def refused(server: Server) -> Any:
    """What a wrong password for an unrestricted user gets to see."""
    answer = server.login("mlee", "wrong")
    assert answer[0] == 401
    return answer


def test_right_password_from_the_right_address(server):
    """The right password gets in from a listed address, and from anywhere without restrictions."""
    assert server.login("jsmith", "jsmith's own")[0] == 200
    status, _, body = server.login("mlee", "mlee's own", ELSEWHERE)
    assert (status, body) == (200, b'{"username":"mlee"}')


@pytest.mark.parametrize(
    ("username", "password", "address"),
    [
        ("jsmith", "jsmith's own", ELSEWHERE),
        ("jsmith", "wrong", OFFICE),
        ("jsmith", "wrong", ELSEWHERE),
        ("jsmith", "", OFFICE),
        ("nobody", "jsmith's own", OFFICE),
        ("nobody", "wrong", ELSEWHERE),
        ("", "", OFFICE),
        ("a\0b", "x", OFFICE),
        ("mlee", "mlee's own", "not an address"),
        ("mlee", "mlee's own", ""),
        ("mlee", "mlee's own", "203.0.113.05"),
        ("jsmith", "jsmith's own", "203.0.113.5%eth0"),
    ],
)
def test_every_refusal_is_the_same_to_the_byte(server, refused, username, password, address):
    """Status, headers and body of a refusal are the same, whatever it was that was wrong."""
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
    """Each attempt costs one hash with the same figures and one question to the guard."""
    hashes = []
    scrypt = hashlib.scrypt

    def counted(*args, **figures):
        hashes.append({name: value for name, value in figures.items() if name != "salt"})
        return scrypt(*args, **figures)

    monkeypatch.setattr(hashlib, "scrypt", counted)
    loads = server.guard.stats().loads
    server.login(username, password, address)
    assert hashes == [example.SCRYPT]
    assert len(server.asked) == 1
    assert server.guard.stats().loads == loads + 1


@pytest.mark.parametrize("username", ["JSmith", "JSMITH", "j\u017fmith"])
def test_spelling_does_not_step_around_a_restriction(server, refused, username):
    """However the name is typed, it is the record's restrictions that hold."""
    assert server.login(username, "jsmith's own", ELSEWHERE) == refused
    assert server.login(username, "jsmith's own", OFFICE)[0] == 200
    assert {asked[0] for asked in server.asked if asked[0] != "mlee"} == {"jsmith"}


def test_mapped_address_is_the_ipv4_address(server, refused):
    """On a socket for both versions an IPv4 client shows as a mapped address, and is itself."""
    assert server.login("jsmith", "jsmith's own", f"::ffff:{OFFICE}")[0] == 200
    assert server.login("jsmith", "jsmith's own", f"::ffff:{ELSEWHERE}") == refused


def test_headers_of_the_client_are_not_believed(server, refused):
    """What a client says of its own address changes nothing."""
    claims = {
        "X-Forwarded-For": OFFICE,
        "X-Real-IP": OFFICE,
        "Forwarded": f"for={OFFICE}",
        "True-Client-IP": OFFICE,
    }
    assert server.login("jsmith", "jsmith's own", ELSEWHERE, **claims) == refused


def test_outage_tells_nothing(server):
    """While the store is down the answer is one, whatever the password and the address."""
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


def test_outage_denies_those_who_were_in_memory(server):
    """What the guard remembers lets nobody in once its lease is over."""
    assert server.login("mlee", "mlee's own")[0] == 200
    server.store.close()
    assert server.login("mlee", "mlee's own")[0] == 200
    server.clock.advance(timedelta(seconds=6))
    assert server.login("mlee", "mlee's own")[0] == 503
    assert server.login("mlee", "wrong")[0] == 503


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"username": "mlee"}',
        b'{"username": 1, "password": "s3cret"}',
        rb'{"username": "mlee", "password": "\ud800s3cret"}',
        b'{"username": "mlee", "password": "s3cret' + b"x" * 2000 + b'"}',
        b'{"username": "mlee\xff", "password": "s3cret"}',
    ],
)
def test_what_cannot_be_read_is_not_repeated(server, body):
    """A body that is no login is refused without a word of what it held."""
    answer = server.post(OFFICE, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.status_code == 400 or answer.json() == {"detail": example.UNREADABLE}
    assert b"s3cret" not in answer.content


def test_refresher_runs_with_the_application(server):
    """The guard's refresher runs while the application does, and ends with it."""

    async def run() -> str:
        async with server.app.router.lifespan_context(server.app):
            return str(server.guard.stats().woken_by)

    assert server.guard.stats().woken_by == "callers"
    assert asyncio.run(run()) == "refresher"
    assert server.guard.stats().woken_by == "callers"


def test_nothing_shows_a_password():
    """The records and the attempt keep passwords, salts and digests out of their repr."""
    assert repr(ACCOUNTS[0]) == "Account(username='jsmith')"
    assert "s3cret" not in repr(example.Login(username="a", password="s3cret"))


# ------------------------------------------------------------------ as it is run


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, str]]:
    """The example as a process of its own, on a database file."""
    url = f"sqlite:///{tmp_path_factory.mktemp('login')}/ipguard.db"
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
                yield client, url
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode in (0, -15)


def seen(client: httpx.Client, username: str, password: str, **headers: str) -> Any:
    answer = client.post(
        "/login", json={"username": username, "password": password}, headers=headers
    )
    shown = sorted((k, v) for k, v in answer.headers.items() if k != "date")
    return answer.status_code, shown, answer.content


def test_real_server(running):
    """Over a real socket: who may, gets in; all who may not see the same; headers do not help."""
    client, _ = running
    assert seen(client, "mlee", example.PASSWORD)[0] == 200
    assert seen(client, "JSmith", example.PASSWORD)[0] == 200
    refused = seen(client, "mlee", "wrong")
    assert refused[0] == 401
    assert seen(client, "rjones", example.PASSWORD) == refused
    assert seen(client, "nobody", example.PASSWORD) == refused
    assert seen(client, "rjones", example.PASSWORD, **{"X-Forwarded-For": OFFICE}) == refused


def test_real_server_follows_a_change(running):
    """A restriction lifted in another process lets the user in at that server."""
    client, url = running
    with ipguard.open_store(url) as store:
        flow = ipguard.Workflow(store, Outbox(), key=b"k" * 32)
        (rjones,) = flow.overview(OPERATOR, search="rjones")
        assert seen(client, "rjones", example.PASSWORD)[0] == 401
        flow.lift(OPERATOR, rjones.restrictions[0].id, reason="test")
        until = time.monotonic() + 30
        while seen(client, "rjones", example.PASSWORD)[0] != 200:
            assert time.monotonic() < until
