"""The kit for Flask: the login, the check on each request, and the page as a blueprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
import flask_login  # type: ignore[import-not-found,import-untyped]
import pytest
from werkzeug.middleware.proxy_fix import ProxyFix

from ipguard import Actor, InvalidValue, Outcome
from ipguard.contrib.flask import IPGuard
from tests.flows import ALICE, HOME, OFFICE
from tests.hosts import CLIENT, PLACES, Bench, change_on_the_page, come_from, serving, walk
from tests.hosts import bench as bench  # noqa: PLC0414 - a fixture
from tests.pages import Browser

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def alice() -> Actor | None:
    """Return the administrator without an address, as most hosts do."""
    if flask.session.get("username") != "alice":
        return None
    return Actor(username="alice", email=ALICE.email, manages=ALICE.manages)


def make_app(bench: Bench, actor: Callable[[], Any] = alice, **more: Any) -> flask.Flask:
    """Make an application with plain sessions and a login without passwords."""
    app = flask.Flask("host")
    app.secret_key = "the host's"
    parts: dict[str, Any] = {"guard": bench.guard, "workflow": bench.flow, "client": CLIENT}
    parts |= {"user": lambda: flask.session.get("username"), "actor": actor}
    ips = IPGuard(app, **(parts | more))
    app.register_blueprint(ips.blueprint(brand="Test Bank"), url_prefix="/ip-restrictions")

    @app.get("/login/<username>")
    def login(username: str) -> Any:
        right = flask.request.args.get("password") == "right"
        outcome = ips.allow_login(username, password_is_right=right)
        if outcome:
            flask.session.update(username=username, theme="dark")
        return outcome.value

    @app.get("/")
    def home() -> Any:
        return flask.session.get("username", "signed out")

    return app


def browse(app: Any, address: str | None = HOME, username: str = "") -> Browser:
    browser = Browser(app, "wsgi")
    come_from(browser, address)
    if username:
        assert browser.send("GET", f"/login/{username}").text == "allow"
    return browser


def test_login(bench: Bench) -> None:
    bench.restrict("jsmith")
    browser = browse(make_app(bench))
    for username, address, outcome in (
        ("jsmith", OFFICE, "allow"),
        ("jsmith", HOME, "refuse"),
        ("JSmith", HOME, "refuse"),
        ("mary", HOME, "allow"),
        ("mary", None, "refuse"),  # the proxy sent no address
        ("jsmith", f"{OFFICE}, {HOME}", "refuse"),  # the client forged one
    ):
        come_from(browser, address)
        assert browser.send("GET", f"/login/{username}").text == outcome, (username, address)
        browser.cookies.clear()
    bench.begin_outage()
    assert browser.send("GET", "/login/mary").text == "retry"


def test_logins_with_the_right_password_are_recorded(bench: Bench) -> None:
    """The check of a session is not a login, and a wrong password does not count."""
    bench.restrict("jsmith")
    browser = browse(make_app(bench), OFFICE)
    assert browser.send("GET", "/login/jsmith?password=wrong").text == "allow"
    assert browser.send("GET", "/").text == "jsmith"
    bench.guard.close()
    assert bench.store.sightings("jsmith") == ()
    assert browser.send("GET", "/login/jsmith?password=right").text == "allow"
    come_from(browser, HOME)
    browser.cookies.clear()
    assert browser.send("GET", "/login/jsmith?password=right").text == "refuse"
    bench.guard.close()
    found = {each.address: (each.allowed, each.refused) for each in bench.store.sightings("jsmith")}
    assert found == {OFFICE: (1, 0), HOME: (0, 1)}
    (notice,) = (each for each in bench.outbox.messages if each.kind == "login_refused")
    assert notice.sighting is not None
    assert notice.sighting.address == HOME


def test_recording_can_be_turned_off(bench: Bench) -> None:
    browser = browse(make_app(bench, sightings=False), HOME)
    bench.restrict("jsmith")
    assert browser.send("GET", "/login/jsmith?password=right").text == "refuse"
    bench.guard.saw("jsmith", HOME, False)
    bench.guard.close()
    (found,) = bench.store.sightings("jsmith")
    assert found.refused == 1
    assert all(each.kind != "login_refused" for each in bench.outbox.messages)
    with pytest.raises(InvalidValue, match="sightings"):
        make_app(bench, sightings="no")


def test_a_restriction_ends_the_session_on_the_next_request(bench: Bench) -> None:
    """Views do not run in that request: they may have cached the user. Other sessions go on."""
    app = make_app(bench)
    ran: list[str] = []

    @app.post("/orders")
    def orders() -> str:
        ran.append("orders")
        return "done"

    jsmith, mary = browse(app, HOME, "jsmith"), browse(app, HOME, "mary")
    bench.restrict("jsmith")
    answer = jsmith.send("POST", "/orders")
    assert (answer.status_code, ran) == (401, [])
    assert jsmith.send("GET", "/").text == "signed out"
    assert jsmith.send("POST", "/orders").status_code == 200
    assert mary.send("GET", "/").text == "mary"


def test_moving_to_another_address_ends_the_session(bench: Bench) -> None:
    bench.restrict("jsmith")
    browser = browse(make_app(bench), OFFICE, "jsmith")
    assert browser.send("GET", "/").text == "jsmith"
    come_from(browser, HOME)
    assert browser.send("GET", "/").status_code == 401


def test_an_outage_signs_nobody_out(bench: Bench) -> None:
    browser = browse(make_app(bench), HOME, "mary")
    bench.begin_outage()
    answer = browser.send("GET", "/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert browse(browser.app).send("GET", "/").text == "signed out"  # no user, no check
    bench.end_outage()
    assert browser.send("GET", "/").text == "mary"


def test_the_first_request_starts_the_refresher(bench: Bench) -> None:
    app = make_app(bench)
    assert bench.guard.stats().woken_by == "callers"
    browse(app).send("GET", "/")
    assert bench.guard.stats().woken_by == "refresher"
    bench.guard.close()
    browse(app).send("GET", "/")  # later requests leave it as the host wants it
    assert bench.guard.stats().woken_by == "callers"


def test_init_app_and_end_session(bench: Bench) -> None:
    """An application factory, and a host whose sessions are not Flask's."""
    sessions = {"token": "jsmith"}
    ips = IPGuard(
        guard=bench.guard,
        workflow=bench.flow,
        client=CLIENT,
        user=lambda: sessions.get(flask.request.headers.get("Authorization", "")),
        actor=alice,
        end_session=sessions.clear,
    )
    app = flask.Flask("host")
    ips.init_app(app)
    assert app.extensions["ipguard"] is ips
    app.add_url_rule("/", view_func=lambda: "served")
    browser = browse(app)
    browser.headers["Authorization"] = "token"
    assert browser.send("GET", "/").text == "served"
    bench.restrict("jsmith")
    assert (browser.send("GET", "/").status_code, sessions) == (401, {})


def test_a_host_without_sessions(bench: Bench) -> None:
    """Such as one with bearer tokens: each request is refused."""
    app = flask.Flask("host")
    parts: dict[str, Any] = {"guard": bench.guard, "workflow": bench.flow, "client": CLIENT}
    IPGuard(app, user=lambda: "jsmith", actor=alice, **parts)
    app.add_url_rule("/", view_func=lambda: "served")
    assert browse(app).send("GET", "/").text == "served"
    bench.restrict("jsmith")
    for _ in range(2):
        assert browse(app).send("GET", "/").status_code == 401
    assert browse(app, OFFICE).send("GET", "/").text == "served"


@pytest.mark.parametrize("name", ["user", "actor", "end_session"])
def test_arguments_that_cannot_be_called(bench: Bench, name: str) -> None:
    parts: dict[str, Any] = {"user": alice, "actor": alice, "end_session": alice, name: "jsmith"}
    with pytest.raises(InvalidValue, match=name):
        IPGuard(guard=bench.guard, workflow=bench.flow, client=CLIENT, **parts)


# -- where the client is


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_peer_behind_proxy_fix(bench: Bench, count: int) -> None:
    """`ProxyFix` replaces the peer, perhaps by what the client sent. The kit reads the peer."""
    bench.restrict("jsmith")
    app: Any = make_app(bench)
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=count, x_proto=1)
    for address in (HOME, f"{OFFICE}, {HOME}", f"{OFFICE}, {OFFICE}, {HOME}"):
        assert browse(app, address).send("GET", "/login/jsmith").text == "refuse"
    assert browse(app, OFFICE).send("GET", "/login/jsmith").text == "allow"


# -- Flask-Login


class Person(flask_login.UserMixin):  # type: ignore[misc]
    def __init__(self, number: str) -> None:
        self.id = number
        self.username = {"1": "jsmith", "2": "alice"}[number]


def make_flask_login(bench: Bench) -> flask.Flask:
    app = flask.Flask("host")
    app.secret_key = "the host's"
    manager = flask_login.LoginManager(app)
    manager.login_view = "login"
    manager.user_loader(Person)

    def user() -> str | None:
        person = flask_login.current_user
        return person.username if person.is_authenticated else None

    def actor() -> Any:
        if user() is None:
            return manager.unauthorized()
        return Actor(username=user(), email=ALICE.email, manages=ALICE.manages)

    ips = IPGuard(
        app, guard=bench.guard, workflow=bench.flow, client=CLIENT, user=user, actor=actor
    )
    app.register_blueprint(ips.blueprint(), url_prefix="/ip-restrictions")

    @app.get("/login")
    def login() -> Any:
        return "please sign in"

    @app.get("/login/<number>")
    def log_in(number: str) -> Any:
        person = Person(number)
        if ips.allow_login(person.username):
            flask_login.login_user(person, remember=True)
        return "done"

    @app.get("/")
    @flask_login.login_required
    def home() -> Any:
        return flask_login.current_user.username

    return app


@pytest.mark.parametrize("remembered", [False, True])
def test_flask_login(bench: Bench, remembered: bool) -> None:
    """The session ends, and with it the cookie that remembers; the answer is the login view."""
    browser = browse(make_flask_login(bench))
    browser.send("GET", "/login/1")
    assert browser.send("GET", "/").text == "jsmith"
    if remembered:
        del browser.cookies["session"]
    bench.begin_outage()
    assert browser.send("GET", "/").status_code == 503
    bench.end_outage()
    assert browser.send("GET", "/").text == "jsmith"
    bench.restrict("jsmith")
    answer = browser.send("GET", "/")
    assert answer.headers["location"].startswith("/login?next=")
    assert "remember_token" not in browser.cookies
    come_from(browser, OFFICE)
    assert browser.send("GET", "/").status_code == 302


def test_the_page_with_flask_login(bench: Bench) -> None:
    browser = browse(make_flask_login(bench), OFFICE)
    browser.open("/ip-restrictions/")
    assert browser.address.startswith("/login?next=")
    browser.send("GET", "/login/2")
    browser.open("/ip-restrictions/")
    assert "Signed in as alice" in browser.text


# -- the page


def test_the_page_is_a_view_of_the_host(bench: Bench) -> None:
    """Signed in by the host, inside its hooks: a restriction is requested, confirmed and deleted.

    The host reads each form before the page does, as CSRF protection may, and adds a header.
    """
    app = make_app(bench)
    app.config.update(SESSION_REFRESH_EACH_REQUEST=True)
    app.before_request(lambda: flask.request.form.get("token") and None)
    app.after_request(lambda answer: answer.headers.update({"X-Host": "ours"}) or answer)
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
    assert app.test_client().get("/ip-restrictions/%ff").status_code == 401
    with app.test_request_context():
        assert flask.url_for("ipguard.page") == "/ip-restrictions/"


@pytest.mark.parametrize("size", [33_000, 600_000])
def test_a_body_that_is_too_long(bench: Bench, size: int) -> None:
    browser = browse(make_app(bench), HOME, "alice")
    answer = browser.send("POST", "/ip-restrictions/add", b"a=" + b"b" * size, FORM)
    assert answer.status_code == 413


@pytest.mark.parametrize("prefix", ["/bank/<branch>/ip", "/bank/london/ip", "/i p", None])
def test_any_prefix(bench: Bench, prefix: str | None) -> None:
    app = make_app(bench)
    ips = app.extensions["ipguard"]
    app.register_blueprint(ips.blueprint("other"), url_prefix=prefix)
    browser = browse(app, HOME, "alice")
    path = (prefix or "").replace("<branch>", "london").replace(" ", "%20")
    browser.open(f"{path}/add")
    browser.press("Submit", user="jsmith", addresses=OFFICE)
    assert browser.address.startswith(f"{path}/confirm?")


def test_a_refused_administrator_is_not_served(bench: Bench) -> None:
    """The session ends before the page. An actor that `user` does not name is checked as well."""
    app = make_app(bench)
    browser = browse(app, HOME, "alice")
    bench.restrict("alice")
    assert browser.send("GET", "/ip-restrictions/").status_code == 401
    assert browser.send("GET", "/").text == "signed out"
    other = make_app(bench, lambda: ALICE, user=lambda: None)
    assert browse(other, HOME).send("GET", "/ip-restrictions/").status_code == 200
    other = make_app(bench, lambda: Actor(username="alice", email="a@b.example", manages={"U1"}))
    assert browse(other, HOME).send("GET", "/ip-restrictions/").status_code == 403


def test_the_host_may_answer_for_the_page(bench: Bench) -> None:
    app = make_app(bench, lambda: flask.redirect("/sign-in"))
    assert browse(app).send("GET", "/ip-restrictions/").headers["location"] == "/sign-in"
    app = make_app(bench, lambda: flask.abort(418))
    assert browse(app).send("GET", "/ip-restrictions/").status_code == 418


def test_only_allow_is_true() -> None:
    """`if ips.allow_login(...)` refuses what the guard refuses."""
    assert [outcome for outcome in Outcome if outcome] == [Outcome.ALLOW]


# -- real servers


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("transport", "store"), PLACES)
def test_the_example_behind_nginx(transport: str, store: str, chromium: Any) -> None:
    """Forked workers, a real proxy, a real browser, and a database that goes away."""
    with serving(
        "flask_app",
        f"gunicorn over {transport}",
        store,
        "--workers",
        "3",
        "--preload",
        "--no-control-socket",
    ) as site:
        walk(chromium, site)
