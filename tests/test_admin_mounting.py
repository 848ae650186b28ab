"""The page in its hosts: under a prefix, with the host's own sign-in."""

import asyncio
import base64
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
import werkzeug.test
import werkzeug.wrappers
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Mount
from werkzeug.exceptions import abort
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.utils import redirect

import ipguard
from ipguard import InvalidValue, admin
from ipguard.admin import _wsgi, asgi_app, wsgi_app
from ipguard.admin._asgi import split_path
from ipguard.admin._http import BODY_LIMIT, POLICY
from ipguard.admin._site import ROUTES
from ipguard.aio import AsyncWorkflow
from tests.browser_world import serving
from tests.flows import ALICE, OFFICE
from tests.pages import CLIENT, Browser, Office, query
from tests.pages import each_office as each_office  # noqa: PLC0414 - a fixture
from tests.pages import office as office  # noqa: PLC0414 - a fixture
from tests.test_docs import table

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MOUNT = "/ip-restrictions"


# -- the examples


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def make_example() -> tuple[Office, Any]:
    """Make the application of the example, with a user whom its administrator manages."""
    office = Office(None, "asgi")
    trader = ipguard.User(username="trader", full_name="T. Rader", account_id="U1234567")
    office.store.put_users([trader])
    return office, load("page_starlette").create_app(office.flow, office.guard)


def sign_in(browser: Browser, password: str = "correct horse") -> None:
    basic = base64.b64encode(f"rjones:{password}".encode()).decode()
    browser.headers["Authorization"] = f"Basic {basic}"
    browser.open(f"{MOUNT}/")


@pytest.mark.slow
def test_the_example():
    """Visitors are sent to the host's own sign-in; after it the page works."""
    office, app = make_example()
    browser = Browser(app)
    browser.open(f"{MOUNT}/")
    assert browser.answer.status_code == 401
    for password in ("wrong", "correct horse"):
        assert "T. Rader" not in browser.answer.text
        sign_in(browser, password)
    assert browser.address == f"{MOUNT}/"
    browser.follow("Add IP Address Restriction")
    browser.press("Submit", user="trader", addresses=OFFICE)
    assert browser.address.startswith(f"{MOUNT}/confirm?")
    browser.press("Submit", number=office.outbox.number_for(query(browser.address)["request"]))
    assert office.held("trader") == [OFFICE]
    browser.follow("Delete")
    browser.press("Delete", open="accept")
    assert office.held("trader") == []
    assert {row.actor for row in office.rows() if row.actor} == {"rjones"}
    assert office.rows()[0].actor_address == CLIENT
    assert browser.send("GET", f"{MOUNT}/{style_sheet(browser)}").status_code == 200


def style_sheet(browser: Browser) -> str:
    return str(browser.page.one("[rel=stylesheet]")["href"]).removeprefix("./")


# -- mounts


def make_mounted(office: Office, where: str) -> Browser:
    """Mount the page as each kind of host does."""
    app = office.app(ALICE)
    if office.adapter == "asgi":
        for part in reversed([part for part in where.split("/") if part]):
            app = Starlette(routes=[Mount(f"/{part}", app)])
    else:
        app = DispatcherMiddleware(lambda e, s: [], {where: app})
    return Browser(app, office.adapter)


@pytest.mark.parametrize("where", ["/ip", "/bank/administration/ip"])
def test_under_a_prefix(each_office: Office, where: str):
    """Links, forms, redirects and files stay below the mount, however deep it is."""
    browser = make_mounted(each_office, where)
    browser.open(where)
    assert browser.answer.status_code == 200
    assert browser.address == f"{where}/"
    for link in ("Add IP Address Restriction", "IP Restrictions", "History"):
        browser.follow(link)
        assert browser.answer.status_code == 200
        assert browser.address.startswith(f"{where}/")
    browser.open(f"{where}/add")
    browser.press("Submit", user="jsmith", addresses=OFFICE)
    assert browser.address.startswith(f"{where}/confirm?")
    browser.open(f"{where}/some/where/else")
    assert browser.answer.status_code == 404
    assert style_sheet(browser).startswith("../../static/")
    browser.follow("Go to the list")
    assert browser.answer.status_code == 200


def test_the_mount_without_its_slash(each_office: Office):
    """The mount without a slash redirects to itself with one, which relative links need."""
    browser = make_mounted(each_office, "/bank/i p")
    if each_office.adapter == "asgi":  # without Starlette, whose mounts redirect themselves
        app = each_office.app(ALICE)
        browser = Browser(lambda scope, *more: app({**scope, "root_path": "/bank/i p"}, *more))
    answer = browser.send("GET", "/bank/i%20p")
    assert (answer.status_code, answer.headers["location"]) == (303, "i%20p/")


@pytest.mark.parametrize(
    ("path", "prefix", "found"),
    [
        ("/add", "", "/add"),
        ("/ip/add", "/ip/", "/add"),
        ("/ip//add", "/ip/", "/add"),  # uvicorn --root-path /ip/
        ("/ip", "/ip", ""),
        ("/ipx/add", "/ip", "/ipx/add"),
        ("/add", "/ip", "/add"),  # removed by a proxy
        ("/ip/ip/add", "/ip", "/add"),  # added by a server to a path that had it
        ("/add/add", "/add", "/add"),
        ("/ip/add", "/api/ip", "/add"),  # the mount's part alone is there
        ("/ip", "/api/ip", ""),
        ("/add", "/a/add", "/add"),
    ],
)
def test_split_path(path: str, prefix: str, found: str):
    """The page is found whatever a server, a mount and a proxy did to the path."""
    assert split_path({"path": path, "root_path": prefix}) == (prefix.rstrip("/"), found)


@pytest.mark.parametrize("known", ["/api", "/api/", "/bank/ip"])
@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("where", ["/ip", ""])
def test_a_configured_prefix(each_office: Office, known: str, stripped: bool, where: str):
    """Behind a proxy, pages open whether or not the path contains the configured prefix."""
    office = each_office
    host = make_mounted(office, where).app if where else office.app(ALICE)
    told = known.rstrip("/")

    async def asgi_host(scope: Any, receive: Any, send: Any) -> None:
        # FastAPI(root_path=...) has the path as it came; uvicorn --root-path puts the prefix there.
        path = scope["path"] if stripped else told + scope["path"]
        await host({**scope, "root_path": told, "path": path}, receive, send)

    def wsgi_host(environ: dict[str, Any], start_response: Any) -> Any:
        # PATH_INFO has the prefix too if a server is told SCRIPT_NAME by its settings alone.
        path = environ["PATH_INFO"] if stripped or where else told + environ["PATH_INFO"]
        return host({**environ, "SCRIPT_NAME": known, "PATH_INFO": path}, start_response)

    alice = Browser(asgi_host if office.adapter == "asgi" else wsgi_host, office.adapter)
    for path in ("/", "/history", "/user?user=jsmith", "/add"):
        alice.open(where + path)
        assert alice.answer.status_code == 200, path
    assert alice.send("GET", f"{where}/{style_sheet(alice)}").status_code == 200
    alice.press("Submit", user="jsmith", addresses="10.0.0.0/33", label="kept")
    assert alice.page.value("label") == "kept"
    alice.press("Submit", addresses=OFFICE)
    assert alice.address.startswith(f"{where}/confirm?")
    alice.open(f"{where}/nothing")
    assert alice.answer.status_code == 404


@pytest.mark.parametrize("root", ["/api", "/api/"])
def test_uvicorn_with_a_root_path(office: Office, root: str):
    """`uvicorn --root-path` behind a proxy that removes the prefix, mounted or not."""
    page = office.app(ALICE)
    for app, where in ((page, ""), (Starlette(routes=[Mount("/ip", page)]), "/ip")):
        with serving(app, root_path=root) as base:
            for path in ("/", "/add", "/history"):
                assert httpx.get(f"{base}{where}{path}").status_code == 200, where + path


# -- the client's address


def test_no_client_address():
    """Unix sockets and test clients have none."""
    actor_for = load("page_sample").actor_for
    for peer in (None, "", "testclient", "unix:", "<local>", "localhost", "fe80::1%eth0", "@"):
        assert actor_for("rjones", peer).address is None


@pytest.mark.slow
def test_the_example_without_a_client_address():
    _, app = make_example()

    async def asgi_socket(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "client": None}, receive, send)

    browser = Browser(asgi_socket)
    sign_in(browser)
    assert browser.answer.status_code == 200
    assert "Signed in as rjones" in browser.text


# -- authentication


def test_authenticate_gets_the_frameworks_request(each_office: Office):
    office = each_office
    asked: list[Any] = []

    def who(request: Any) -> ipguard.Actor:
        asked.append(request)
        return ALICE

    office.browser(who, "/user?user=jsmith")
    kind = "starlette.requests" if office.adapter == "asgi" else "werkzeug.wrappers"
    assert type(asked[-1]).__module__.startswith(kind)
    assert str(asked[-1].url).endswith("/user?user=jsmith")


def test_static_files_are_public(each_office: Office):
    """Static files need no actor; nothing else is public."""
    stranger = each_office.browser(None)
    assert stranger.answer.status_code == 401
    links = stranger.page.select("link, script")
    hrefs = [str(each.get("href") or each["src"]) for each in links]
    assert len(hrefs) == 3
    for href in hrefs:
        answer = stranger.send("GET", href.removeprefix("."))
        assert answer.status_code == 200
        assert answer.headers.get("cache-control", "") == "public, max-age=31536000, immutable"
        assert "nosniff" in answer.headers.get("x-content-type-options", "")
        kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
        assert answer.headers.get("content-type", "").startswith(kind[href.rpartition(".")[2]])
        assert stranger.send("POST", href.removeprefix(".")).status_code == 404
    for path in ("/static/page.css", "/static/", "/static/../_site.py", "/static/page.0.css"):
        assert stranger.send("GET", path).status_code in (401, 404)


def test_authenticate_may_be_a_coroutine_function(office: Office):

    async def who(request: Any) -> ipguard.Actor:
        return ALICE

    class Who:
        async def __call__(self, request: Any) -> ipguard.Actor:
            return ALICE

    for each in (who, Who(), lambda _: ALICE):
        assert "John Smith" in office.browser(each).text


def test_a_response_of_the_host(each_office: Office):
    office = each_office

    def elsewhere(request: Any) -> Any:
        if office.adapter == "asgi":
            return RedirectResponse("/sign-in", 307)
        return redirect("/sign-in", 307)

    answer = office.stranger(elsewhere).send("POST", "/delete", b"x")
    assert (answer.status_code, answer.headers.get("location", "")) == (307, "/sign-in")


def test_exceptions_of_authenticate(each_office: Office):
    """An exception propagates to the host; Werkzeug's HTTP exceptions are responses."""
    office = each_office
    if office.adapter == "wsgi":
        answer = office.stranger(lambda _: abort(403)).send("GET", "/")
        assert answer.status_code == 403
        with pytest.raises(LookupError):
            office.stranger(raising(LookupError())).send("GET", "/")
        return
    page = asgi_app(office.flow, office.guard, authenticate=raising(LookupError()))
    app = Starlette(
        routes=[Mount("/ip", page)],
        exception_handlers={LookupError: lambda r, e: PlainTextResponse("sign in", 418)},  # type: ignore[dict-item]
    )
    assert Browser(app).send("GET", "/ip/").status_code == 418
    page = asgi_app(
        office.flow, office.guard, authenticate=raising(StarletteHTTPException(403, "no"))
    )
    app = Starlette(routes=[Mount("/ip", page)])
    assert Browser(app).send("GET", "/ip/").status_code == 403


def raising(error: Exception) -> Any:
    def authenticate(request: Any) -> None:
        raise error

    return authenticate


@pytest.mark.parametrize("make", [asgi_app, wsgi_app])
def test_invalid_arguments(office: Office, make: Any):
    for flow, guard, brand in (
        (None, office.guard, "x"),
        (AsyncWorkflow(office.flow), office.guard, "x"),
        (office.flow, None, "x"),
        (office.flow, office.guard, ""),
        (office.flow, office.guard, "x" * 101),
        (office.flow, office.guard, "a\nb"),
        (office.flow, office.guard, None),
    ):
        with pytest.raises(InvalidValue):
            make(flow, guard, authenticate=lambda _: ALICE, brand=brand)
    with pytest.raises(InvalidValue):
        make(office.flow, office.guard, authenticate=None)


# -- packaging and documentation


@pytest.mark.slow
def test_without_the_extra():
    """The message says what to install; each adapter imports only its own framework."""
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import ipguard
from ipguard.testing import Outbox
try:
    from ipguard.admin import asgi_app, wsgi_app
    store = ipguard.open_store("memory://")
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    print("starlette" in sys.modules, "werkzeug" in sys.modules)
    for make in (asgi_app, wsgi_app):
        try:
            make(flow, ipguard.Guard(store), authenticate=lambda _: None)
            print("made")
        except ModuleNotFoundError as missing:
            print(missing)
except ModuleNotFoundError as missing:
    print(missing)
"""
    needed = 'the administration page needs its extra: pip install "ipguard[admin]"'
    for missing, said in (
        ("jinja2", [needed]),
        ("starlette", ["False False", needed, "made"]),
        ("werkzeug", ["False False", "made", needed]),
    ):
        found = subprocess.run(
            [sys.executable, "-c", script, missing], capture_output=True, text=True, check=True
        )
        assert found.stdout.splitlines() == said


def test_the_docstring_and_the_guide_list_the_routes():
    """The guide also quotes the Content-Security-Policy and the limit of forms."""
    promised = set(re.findall(r"(GET|POST) +(/\w*)", admin.__doc__ or ""))
    assert promised == {(method, path) for path, views in ROUTES.items() for method in views}
    assert [row[0] for row in table("docs/admin.md", "path")] == list(ROUTES)
    guide = " ".join((ROOT / "docs" / "admin.md").read_text().split())
    assert f"Content-Security-Policy: {POLICY}" in guide
    assert f"{BODY_LIMIT // 1024} KiB" in guide


# -- servers


def test_events_of_servers(office: Office):
    """Without a host, the page handles lifespan events, and queries that no client may send."""
    page = office.app(ALICE)

    def run(scope: dict[str, Any], *received: str) -> list[Any]:
        waiting, sent = list(received), []

        async def receive() -> dict[str, Any]:
            return {"type": waiting.pop(0)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("status", message["type"]))

        asyncio.run(page(scope, receive, send))
        return sent

    told = run({"type": "lifespan"}, "lifespan.startup", "lifespan.shutdown")
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert run({"type": "websocket", "path": "/"}, "websocket.connect") == ["websocket.close"]
    http = {"type": "http", "headers": [], "scheme": "http", "server": ("h", 80)}
    # A client that disconnects before its form arrives gets no response.
    form = {**http, "method": "POST", "path": "/cancel", "query_string": b""}
    assert run(form, "http.disconnect") == []
    # A query that is neither ASCII nor UTF-8.
    odd = {**http, "method": "GET", "path": "/", "query_string": b"after=\xff"}
    assert run(odd, "http.request")[0] == 200


def test_a_body_that_is_cut_off():
    """The rest of a form whose client disconnected is dropped."""
    environ = werkzeug.test.create_environ(method="POST", data=b"token=x")
    environ["CONTENT_LENGTH"] = "70"
    assert _wsgi.read_body(werkzeug.wrappers.Request(environ)) == b""
