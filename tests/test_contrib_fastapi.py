"""The kit for FastAPI: the login, the check on each request, and the page as a router."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.requests import HTTPConnection
from fastapi.responses import RedirectResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.sessions import SessionMiddleware

from ipguard import Actor, InvalidValue
from ipguard.aio import AsyncGuard, AsyncWorkflow
from ipguard.contrib.fastapi import Check, IPGuard
from tests.flows import ALICE, HOME, OFFICE
from tests.guards import Gate
from tests.hosts import CLIENT, PLACES, PROXY, Bench, change_on_the_page, come_from, serving, walk
from tests.hosts import bench as bench  # noqa: PLC0414 - a fixture
from tests.pages import Browser


def username(connection: HTTPConnection) -> str | None:
    found: str | None = connection.session.get("username")
    return found


async def alice(signed_in: Annotated[str | None, Depends(username)]) -> Actor | None:
    """Return the administrator without an address, as most hosts do."""
    if signed_in != "alice":
        return None
    return Actor(username="alice", email=ALICE.email, manages=ALICE.manages)


def make_app(
    bench: Bench, actor: Any = alice, user: Any = username, *, sightings: bool = True, **more: Any
) -> FastAPI:
    """Make an application with Starlette's sessions and a login without passwords."""
    ips = IPGuard(bench.guard, bench.flow, CLIENT, sightings=sightings)
    app = FastAPI(dependencies=[Depends(ips.each_request(user, **more))])
    app.add_middleware(SessionMiddleware, secret_key="the host's")
    app.include_router(ips.router(actor, brand="Test Bank"), prefix="/ip-restrictions")
    checked, person = Depends(ips), Depends(user)

    @app.get("/login/{name}")
    async def login(request: Request, name: str, password: str = "", check: Check = checked) -> Any:
        decision = await check(name, password_is_right=password == "right")
        assert await ips.check(request, name) == decision
        if decision:
            request.session.update(username=name)
        return decision.outcome

    @app.get("/")
    def home(signed_in: str | None = person) -> Any:
        return signed_in

    return app


def browse(app: Any, address: str | None = HOME, name: str = "") -> Browser:
    browser = Browser(app)
    come_from(browser, address)
    if name:
        assert browser.send("GET", f"/login/{name}").json() == "allow"
    return browser


def test_login(bench: Bench) -> None:
    bench.restrict("jsmith")
    browser = browse(make_app(bench))
    for name, address, outcome in (
        ("jsmith", OFFICE, "allow"),
        ("jsmith", HOME, "refuse"),
        ("JSmith", HOME, "refuse"),
        ("mary", HOME, "allow"),
        ("mary", None, "refuse"),  # the proxy sent no address
        ("jsmith", f"{OFFICE}, {HOME}", "refuse"),  # the client forged one
    ):
        come_from(browser, address)
        assert browser.send("GET", f"/login/{name}").json() == outcome, (name, address)
        browser.cookies.clear()
    bench.begin_outage()
    assert browser.send("GET", "/login/mary").json() == "retry"


def test_logins_with_the_right_password_are_recorded(bench: Bench) -> None:
    """The check of a session is not a login, and a wrong password does not count."""
    bench.restrict("jsmith")
    browser = browse(make_app(bench), OFFICE)
    assert browser.send("GET", "/login/jsmith?password=wrong").json() == "allow"
    assert browser.send("GET", "/").json() == "jsmith"
    bench.guard.close()
    assert bench.store.sightings("jsmith") == ()
    assert browser.send("GET", "/login/jsmith?password=right").json() == "allow"
    come_from(browser, HOME)
    assert browser.send("GET", "/login/jsmith?password=right").status_code == 401, "the session"
    assert browser.send("GET", "/login/jsmith?password=right").json() == "refuse"
    bench.guard.close()
    found = {each.address: (each.allowed, each.refused) for each in bench.store.sightings("jsmith")}
    assert found == {OFFICE: (1, 0), HOME: (0, 1)}
    (notice,) = (each for each in bench.outbox.messages if each.kind == "login_refused")
    assert notice.sighting is not None
    assert notice.sighting.address == HOME


def test_recording_can_be_turned_off(bench: Bench) -> None:
    browser = browse(make_app(bench, sightings=False), HOME)
    bench.restrict("jsmith")
    assert browser.send("GET", "/login/jsmith?password=right").json() == "refuse"
    bench.guard.saw("jsmith", HOME, False)
    bench.guard.close()
    (found,) = bench.store.sightings("jsmith")
    assert found.refused == 1
    assert all(each.kind != "login_refused" for each in bench.outbox.messages)
    with pytest.raises(InvalidValue, match="sightings"):
        make_app(bench, sightings="no")  # type: ignore[arg-type]


def test_a_restriction_ends_the_session_on_the_next_request(bench: Bench) -> None:
    """Endpoints do not run in that request. Other sessions go on."""
    app = make_app(bench)
    ran: list[str] = []
    app.add_api_route("/orders", lambda: ran.append("orders"), methods=["POST"])
    jsmith, mary = browse(app, HOME, "jsmith"), browse(app, HOME, "mary")
    bench.restrict("jsmith")
    answer = jsmith.send("POST", "/orders")
    assert (answer.status_code, ran) == (401, [])
    assert jsmith.send("GET", "/").json() is None
    assert jsmith.send("POST", "/orders").status_code == 200
    assert mary.send("GET", "/").json() == "mary"


def test_an_outage_signs_nobody_out(bench: Bench) -> None:
    browser = browse(make_app(bench), HOME, "mary")
    bench.begin_outage()
    answer = browser.send("GET", "/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert browse(browser.app).send("GET", "/").json() is None  # no user, no check
    bench.end_outage()
    assert browser.send("GET", "/").json() == "mary"


def test_end_session(bench: Bench) -> None:
    """A host whose sessions are not Starlette's."""
    sessions = {"token": "jsmith"}

    def user(request: Request) -> str | None:
        return sessions.get(request.headers.get("Authorization", ""))

    browser = browse(make_app(bench, user=user, end_session=lambda _: sessions.clear()))
    browser.headers["Authorization"] = "token"
    assert browser.send("GET", "/").json() == "jsmith"
    bench.restrict("jsmith")
    assert (browser.send("GET", "/").status_code, sessions) == (401, {})


def test_a_host_without_sessions(bench: Bench) -> None:
    """Such as one with bearer tokens: each request is refused."""
    ips = IPGuard(bench.guard, bench.flow, CLIENT)
    app = FastAPI(dependencies=[Depends(ips.each_request(lambda: "jsmith"))])
    app.add_api_route("/", lambda: "served")
    assert browse(app).send("GET", "/").json() == "served"
    bench.restrict("jsmith")
    for _ in range(2):
        assert browse(app).send("GET", "/").status_code == 401
    assert browse(app, OFFICE).send("GET", "/").json() == "served"


def test_websockets(bench: Bench) -> None:
    """One that is refused is closed before it is accepted."""

    def user(connection: HTTPConnection) -> str:
        return "jsmith"

    app = make_app(bench, user=user, end_session=lambda _: None)

    @app.websocket("/prices")
    async def prices(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close(1000)

    def connect() -> list[tuple[str, int | None]]:
        sent: list[tuple[str, int | None]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append((message["type"].partition(".")[2], message.get("code")))

        headers = [(b"x-forwarded-for", HOME.encode())]
        scope: dict[str, Any] = {"type": "websocket", "path": "/prices", "headers": headers}
        scope |= {"client": (PROXY, 1), "query_string": b"", "subprotocols": []}
        asyncio.run(app(scope, receive, send))
        return sent

    assert connect() == [("accept", None), ("close", 1000)]
    bench.begin_outage()
    assert connect() == [("close", 1013)]
    bench.end_outage()
    bench.restrict("jsmith")
    assert connect() == [("close", 1008)]


def test_lifespan(bench: Bench) -> None:
    """The page's router brings it; it joins the application's own."""
    app = make_app(bench)

    async def run() -> str:
        async with app.router.lifespan_context(app):
            return bench.guard.stats().woken_by

    for _ in range(2):
        assert bench.guard.stats().woken_by == "callers"
        assert asyncio.run(run()) == "refresher"
    assert bench.guard.stats().woken_by == "callers"


def test_the_event_loop_is_not_blocked(bench: Bench) -> None:
    """While the store hangs, for a login and for the page, other requests are served."""
    gate, other = Gate(), Gate()
    app = make_app(bench, lambda: ALICE)
    bench.guard.sync()
    bench.outer.before_load.extend([gate, other])

    async def ask(path: str) -> None:
        sent: list[Any] = []
        headers = [(b"x-forwarded-for", HOME.encode())]
        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "headers": headers}
        scope |= {"client": (PROXY, 1), "query_string": b""}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        assert sent[0]["status"] == 200, sent

    async def run() -> None:
        hanging = [asyncio.create_task(ask(path)) for path in ("/login/mary", "/ip-restrictions/")]
        await asyncio.to_thread(gate.reached)
        await ask("/")
        assert not hanging[0].done()
        gate.let_go()
        other.let_go()
        await asyncio.gather(*hanging)

    asyncio.run(run())


def test_parts_of_the_async_kind(bench: Bench) -> None:
    guard, flow = AsyncGuard(bench.guard), AsyncWorkflow(bench.flow)
    ips = IPGuard(guard, flow, CLIENT)
    app = FastAPI()
    app.include_router(ips.router(lambda: ALICE), prefix="/ip")
    assert "No restrictions" in browse(app).open("/ip/").text


def test_arguments_that_cannot_be_called(bench: Bench) -> None:
    ips = IPGuard(bench.guard, bench.flow, CLIENT)
    for make in (
        lambda: ips.each_request("jsmith"),
        lambda: ips.each_request(username, end_session="jsmith"),
        lambda: ips.router(ALICE),
    ):
        with pytest.raises(InvalidValue):
            make()


# -- the page


def test_the_page_is_a_router_of_the_host(bench: Bench) -> None:
    """Signed in by the host, inside its middleware: a restriction is requested, confirmed, deleted.

    The host reads each form before the page does, and adds a header.
    """
    app = make_app(bench)

    async def read(request: Request, call_next: Any) -> Any:
        await request.body()
        answer = await call_next(request)
        answer.headers["X-Host"] = "ours"
        return answer

    app.add_middleware(BaseHTTPMiddleware, dispatch=read)
    browser = browse(app, HOME)
    browser.open("/ip-restrictions/")
    assert browser.answer.status_code == 401
    browser = browse(app, HOME, "alice")
    browser.open("/ip-restrictions")
    assert browser.address == "/ip-restrictions/"
    assert "Test Bank" in browser.text
    change_on_the_page(browser, bench)
    assert browser.answer.headers["x-host"] == "ours"
    href = str(browser.page.one("[rel=stylesheet]")["href"]).removeprefix(".")
    assert browse(app).send("GET", f"/ip-restrictions{href}").status_code == 200
    for path in ("/nothing", "/static/nothing"):
        assert browser.send("GET", f"/ip-restrictions{path}").status_code == 404
    assert "/ip-restrictions" not in str(app.openapi()["paths"])
    assert app.url_path_for("ipguard", path="") == "/ip-restrictions/"


@pytest.mark.parametrize("prefix", ["/bank/{branch}/ip", "/bank/london/ip", "/i p"])
@pytest.mark.parametrize("root", ["", "/api"])
def test_any_prefix(bench: Bench, prefix: str, root: str) -> None:
    """Also behind a proxy that removes a prefix which the server knows."""
    ips = IPGuard(bench.guard, bench.flow, CLIENT)
    app = FastAPI()
    app.include_router(ips.router(lambda: ALICE), prefix=prefix)

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": root}, receive, send)

    browser = browse(server)
    path = prefix.replace("{branch}", "london").replace(" ", "%20")
    browser.open(f"{path}/add")
    browser.press("Submit", user="jsmith", addresses=OFFICE)
    assert browser.address.startswith(f"{path}/confirm?")


def test_a_refused_administrator_is_not_served(bench: Bench) -> None:
    """The session ends before the page. An actor that `user` does not name is checked as well."""
    app = make_app(bench)
    browser = browse(app, HOME, "alice")
    bench.restrict("alice")
    assert browser.send("GET", "/ip-restrictions/").status_code == 401
    assert browser.send("GET", "/").json() is None
    other = make_app(bench, lambda: ALICE)
    assert browse(other, HOME).send("GET", "/ip-restrictions/").status_code == 200
    other = make_app(bench, lambda: Actor(username="alice", email="a@b.example", manages={"U1"}))
    assert browse(other, HOME).send("GET", "/ip-restrictions/").status_code == 403


def test_the_host_may_answer_for_the_page(bench: Bench) -> None:
    def refuse() -> None:
        raise HTTPException(418)

    app = make_app(bench, lambda: RedirectResponse("/sign-in", 303))
    assert browse(app).send("GET", "/ip-restrictions/").headers["location"] == "/sign-in"
    assert browse(make_app(bench, refuse)).send("GET", "/ip-restrictions/").status_code == 418


# -- real servers


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("transport", "store"), PLACES)
def test_the_example_behind_nginx(transport: str, store: str, chromium: Any) -> None:
    """Forked workers, a real proxy, a real browser, and a database that goes away."""
    with serving("fastapi_app", f"uvicorn over {transport}", store, "--workers", "2") as site:
        walk(chromium, site)
