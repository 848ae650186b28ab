"""A host that serves the page to a real browser.

The store is a database file, mails go to a real mail server, and the clock is a fake.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipguard import Actor, Guard, Restriction, User, Workflow, WorkflowSettings
from ipguard.mail import EmailNotifier
from ipguard.store import RestrictionStore
from ipguard.testing import FakeClock
from tests.flows import ADAM, ALICE, BOSS, KEY, OFFICE, Desk
from tests.smtp_server import MailServer

PREFIX = "/accounts/ip-restrictions"
BRAND = "Harbour Street"
IRIS = Actor(
    username="iris",
    email="iris@firm.example",
    manages=frozenset({"U1"}),
    address="2001:db8:7:1:a:b:c:d",
)
ACTORS = {actor.username: actor for actor in (ALICE, ADAM, BOSS, IRIS)}
NUMBER = re.compile(r"^ {4}([\d-]{11})$", re.MULTILINE)


class World(Desk):
    """A desk on a SQLite file with a mail server, a guard and the page.

    Args:
        folder: The folder of the database.
        mails: The mail server.
        clock: The clock of the store and the guard.
        settings: The settings of the workflow.

    Attributes:
        quiet: A workflow on the same store that sends no mails, to prepare tests.
        page_url: The URL of the page while it is served.
        options: The page's other arguments.
    """

    def __init__(
        self, folder: Path, mails: MailServer, *, clock: FakeClock | None = None, **settings: Any
    ) -> None:
        super().__init__(folder / "world.db", clock=clock)
        self.quiet = self.flow
        self.mails = mails
        self._seen = len(mails.mails)
        self.notifier = EmailNotifier(mails.url, sender="Brokers <no-reply@brokers.example>")
        self.use(**settings)
        self.guard = Guard(self.store, monotonic=self.clock.monotonic)
        self.page_url = ""
        self.options: dict[str, Any] = {"brand": BRAND}

    def workflow(self, store: RestrictionStore | None = None, **settings: Any) -> Workflow:
        """Return another workflow on the same data, which sends real mails."""
        return Workflow(
            store or self.store, self.notifier, key=KEY, settings=WorkflowSettings(**settings)
        )

    # -- preparation and checks

    def add(self, addresses: str = OFFICE, username: str = "jsmith", **more: Any) -> Restriction:
        """Add a restriction."""
        applied = self.quiet.impose(BOSS, username, addresses, reason="a test", **more)
        assert applied.restriction is not None
        return applied.restriction

    def remove(self, restriction_id: str) -> None:
        """Remove a restriction."""
        self.quiet.lift(BOSS, restriction_id, reason="a test")

    def crowd(self, size: int, account_id: str = "U1") -> None:
        """Register more users: trader00001 and so on."""
        self.store.put_users(
            User(
                username=f"trader{number:05}",
                full_name=f"Trader Number{number:05}",
                account_id=account_id,
            )
            for number in range(1, size + 1)
        )

    def pending(self, username: str = "jsmith") -> list[str]:
        """Return the addresses of a user's pending requests."""
        (line,) = (x for x in self.flow.overview(BOSS) if x.user.username == username)
        return [str(each) for request in line.pending for each in request.adds or request.removed]

    def next_number(self, recipient: str = ALICE.email) -> str:
        """Return the number in the next mail that contains one."""
        while True:
            mail = self.mails.wait_for(self._seen + 1)[self._seen]
            self._seen += 1
            found = NUMBER.search(mail.part("plain"))
            if found:
                assert mail.recipients == (recipient,)
                return found[1]

    def notices(self) -> int:
        """Return how many mails have arrived since the last one that was read."""
        return len(self.mails.mails) - self._seen


def authenticate(request: Any) -> Actor | None:
    """Return the signed-in actor; in these tests a cookie names it."""
    return ACTORS.get(request.cookies.get("who", ""))


@contextlib.contextmanager
def serving(app: Any, **settings: Any) -> Iterator[str]:
    """Serve an ASGI application by uvicorn; yield its URL."""
    import uvicorn

    config = uvicorn.Config(
        app, lifespan="off", log_level="error", timeout_graceful_shutdown=5, **settings
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def asgi(world: World) -> Iterator[str]:
    """Serve the page in a Starlette application; yield its URL."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from ipguard.admin import asgi_app

    page = asgi_app(world.flow, world.guard, authenticate=authenticate, **world.options)
    host = Starlette(routes=[Mount(PREFIX, page)])
    with serving(host, proxy_headers=False) as base:
        yield f"{base}{PREFIX}/"


@contextlib.contextmanager
def wsgi(world: World) -> Iterator[str]:
    """Serve the page below another WSGI application by Werkzeug; yield its URL."""
    from werkzeug.exceptions import NotFound
    from werkzeug.middleware.dispatcher import DispatcherMiddleware
    from werkzeug.serving import WSGIRequestHandler, make_server

    from ipguard.admin import wsgi_app

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None:
            pass

    page = wsgi_app(world.flow, world.guard, authenticate=authenticate, **world.options)
    host = DispatcherMiddleware(NotFound(), {PREFIX: page})
    server = make_server("127.0.0.1", 0, host, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


HOSTS = {"asgi": asgi, "wsgi": wsgi}
