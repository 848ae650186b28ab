"""What the administration page costs its server, beside what the store's own `overview` does.

.venv/bin/python -m benchmarks.page [users]

As many users in one account, and as many more who each have an account of their own: one actor
manages the one, another all of the others. Each figure is the median of some calls in milliseconds:
the time that processors worked on it, this process and PostgreSQL's together, so that a busy
machine says the same as an idle one. The calls of a line take turns in one run. A page is asked for
as a server's adapter does it, and read to its end; nothing is sent over a network.
"""

from __future__ import annotations

import asyncio
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipguard
from benchmarks.listing import Meter, World
from ipguard.admin import asgi_app, wsgi_app
from ipguard.model import EVERYBODY, Accounts, Action
from ipguard.store import RestrictionStore
from ipguard.testing import Outbox
from tests.pages import HOST, Browser
from tests.postgres import running_server

GOAL = 50.0
"""Milliseconds that no page should take."""
ENOUGH = 0.5  # seconds that are spent on one line, about
SEARCHES = (
    "username",
    "name, common",
    "name, rare",
    "name, nobody",
    "address, one",
    "address, early",
)


class Half(World):
    """So many users of one account, and as many of one account each."""

    def account(self, n: int) -> str:
        return f"U{n:07d}" if n % 2 else "BIG"

    def fill(self, store: RestrictionStore) -> None:
        store.put_users(self.people())
        with store.transaction(staged=self.restrictions()) as turn:
            turn.add_staged(per_user=1000)
            turn.append(Action.IMPOSE_MANY, actor="boss", touches=EVERYBODY)

    def actors(self) -> dict[str, Accounts]:
        own = frozenset(self.account(n) for n in range(1, self.users, 2))
        return {"one account": frozenset({"BIG"}), f"{len(own):,} accounts": own}


def asgi(app: Any, loop: asyncio.AbstractEventLoop, path: str, cookie: str) -> Callable[[], None]:
    """Return what asks for a page as an ASGI server does."""
    plain, _, query = path.partition("?")
    headers = [(b"host", HOST.encode()), (b"cookie", cookie.encode())]
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"}
    scope |= {"method": "GET", "scheme": "http", "path": plain, "raw_path": plain.encode()}
    scope |= {"query_string": query.encode(), "root_path": "", "headers": headers}
    scope |= {"client": ("192.0.2.9", 1), "server": (HOST, 80)}
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    def ask() -> None:
        loop.run_until_complete(app(dict(scope), receive, send))
        assert statuses.pop() == 200

    return ask


def wsgi(app: Any, path: str, cookie: str) -> Callable[[], None]:
    """Return what asks for a page as a WSGI server does."""
    plain, _, query = path.partition("?")
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": plain}
    environ |= {"QUERY_STRING": query, "HTTP_HOST": HOST, "HTTP_COOKIE": cookie}
    environ |= {"SERVER_NAME": HOST, "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1"}
    environ |= {"REMOTE_ADDR": "192.0.2.9", "wsgi.url_scheme": "http", "wsgi.version": (1, 0)}
    environ |= {"wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": False}
    environ["wsgi.run_once"] = False
    statuses: list[str] = []

    def start(status: str, *_: object) -> None:
        statuses.append(status)

    def ask() -> None:
        body = app({**environ, "wsgi.input": io.BytesIO()}, start)
        assert b"".join(body)
        assert statuses.pop().startswith("200 ")

    return ask


def medians(meter: Meter, calls: list[Callable[[], object]]) -> list[float]:
    """Return the median of each call, made in turns."""
    took: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    began = time.perf_counter()
    while len(took[0]) < 5 or time.perf_counter() - began < ENOUGH:
        for call, figures in zip(calls, took, strict=True):
            figures.append(meter.seconds(call) * 1000)
    return [statistics.median(figures) for figures in took]


def measure(store: RestrictionStore, world: Half, meter: Meter) -> list[float]:
    """Print a line for each page, and return what each took over both adapters."""
    flow = ipguard.Workflow(store, Outbox(), key=b"k" * 32)
    guard, loop = ipguard.Guard(store), asyncio.new_event_loop()
    terms = {"": ""} | {name: world.searches()[name] for name in SEARCHES}
    pages: list[float] = []
    print("                              overview      ASGI      WSGI")
    for who, accounts in world.actors().items():
        actor = ipguard.Actor(username="alice", email="alice@example.com", manages=accounts)
        apps = [
            make(flow, guard, authenticate=lambda _: actor)  # noqa: B023 - asked at once
            for make in (asgi_app, wsgi_app)
        ]
        print(f"  {who}")
        for name, term in terms.items():
            browser = Browser(apps[1], "wsgi")
            browser.open("/")
            if term:
                browser.press("Search", search=term)
            cookie = "; ".join(f"{key}={value}" for key, value in browser.cookies.items())
            figures = medians(
                meter,
                [
                    lambda: store.overview(accounts, search=term),  # noqa: B023
                    asgi(apps[0], loop, browser.address, cookie),
                    wsgi(apps[1], browser.address, cookie),
                ],
            )
            shown = "".join(f"{each:10.1f}" for each in figures)
            print(f"    {name or 'the list, first page':24}{shown}", flush=True)
            pages += figures[1:]
    loop.close()
    return pages


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        for name, url in {
            "SQLite": f"sqlite:///{Path(folder)}/page.db",
            "PostgreSQL": server.url(schema="page", bulk_timeout=3600),
        }.items():
            print(f"{name}, {size:,} users of one account and {size:,} of one each", flush=True)
            with ipguard.open_store(url) as store:
                world = Half(2 * size)
                world.fill(store)
                took = measure(store, world, Meter(server if name == "PostgreSQL" else None))
            above = sum(each > GOAL for each in took)
            print(f"  pages above {GOAL:.0f} ms: {above} of {len(took)}")


if __name__ == "__main__":
    main()
