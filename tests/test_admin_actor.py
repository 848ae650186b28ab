"""The page asks the guard about the actor's own username and address, on each request."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from ipguard import Actor, Guard, InvalidValue, StoreUnavailable
from ipguard.admin import asgi_app, wsgi_app
from tests.flows import ALICE, BOSS, HOME, OFFICE
from tests.guards import Held
from tests.pages import Browser, Office
from tests.pages import each_office as each_office  # noqa: PLC0414
from tests.pages import office as office  # noqa: PLC0414

ELSEWHERE = attrs.evolve(ALICE, address=HOME)
NOWHERE = attrs.evolve(ALICE, address=None)


def visit(
    office: Office, actor: Actor | None, guard: Guard | None = None, **options: Any
) -> Browser:
    """Open the page."""
    make: Any = asgi_app if office.adapter == "asgi" else wsgi_app
    app = make(office.flow, guard or office.guard, authenticate=lambda _: actor, **options)
    browser = Browser(app, office.adapter)
    browser.open("/")
    return browser


def restrict(office: Office, addresses: str = OFFICE) -> None:
    office.flow.impose(BOSS, "alice", addresses, reason="a test")
    office.guard.sync()


def test_refused_actor_gets_no_page(each_office: Office):
    """It sees why, and can sign out."""
    office = each_office
    browser = visit(office, ELSEWHERE, sign_out_url="/bye")
    form = browser.open("/add").form("Submit")
    restrict(office)
    for path in ("/", "/add", "/history", "/nothing"):
        browser.open(path)
        assert browser.answer.status_code == 403
        assert f"not one of them: {HOME}." in browser.text
        assert "Mary Major" not in browser.text
        assert [href for _, href in browser.page.links] == ["#main", "/bye"]
    browser.post("/add", {**form.fields, "user": "mary", "addresses": OFFICE})
    assert browser.answer.status_code == 403
    assert not office.flow.user(BOSS, "mary").pending
    style = str(browser.page.one("[rel=stylesheet]")["href"]).removeprefix(".")
    assert browser.send("GET", style).status_code == 200


def test_allowed_actor_is_served(each_office: Office):
    """At a listed address; and anywhere, without restrictions or without the check."""
    office = each_office
    assert visit(office, ELSEWHERE).answer.status_code == 200
    restrict(office)
    assert visit(office, ALICE).answer.status_code == 200
    assert visit(office, ELSEWHERE, check_actor=False).answer.status_code == 200
    trial = Guard(office.store, report_only=True)
    assert visit(office, ELSEWHERE, trial).answer.status_code == 200


@pytest.mark.parametrize("addresses", [OFFICE, "0.0.0.0/0", "::/0"])
def test_actor_without_an_address(office: Office, addresses: str):
    """It is served as long as it has no restrictions, however wide they are."""
    office.use(widest_ipv4=0, widest_ipv6=0)
    browser = visit(office, NOWHERE)
    assert browser.answer.status_code == 200
    restrict(office, addresses)
    browser.open("/")
    assert browser.answer.status_code == 403
    assert "does not know the address" in browser.text


def test_actor_who_is_not_registered(office: Office):
    guard = Guard(office.store, unknown_users="deny")
    browser = visit(office, BOSS, guard)
    assert browser.answer.status_code == 403
    assert "boss is not registered" in browser.text
    assert visit(office, ALICE, guard).answer.status_code == 200


def test_outage_is_no_refusal(each_office: Office):
    """While the guard cannot answer: 503, and afterwards the page is back."""
    office = each_office
    store = Held(office.store)
    guard = Guard(store, monotonic=office.clock.monotonic)
    browser = visit(office, ALICE, guard)
    store.down = StoreUnavailable("down")
    office.wait(seconds=5)
    browser.open("/")
    assert browser.answer.status_code == 503
    assert browser.answer.headers["retry-after"] == "5"
    assert "Try again shortly." in browser.text
    store.down = None
    office.wait(seconds=1)
    browser.open("/")
    assert browser.answer.status_code == 200


def test_links_to_the_host(each_office: Office):
    """Without them there are no links; a stranger cannot sign out."""
    office = each_office
    assert "Sign out" not in visit(office, ALICE).text
    urls = {"home_url": "https://bank.example/?a=1&b=2", "sign_out_url": "../bye"}
    links = visit(office, ALICE, brand="Test Bank", **urls).page.links
    assert ("Test Bank", urls["home_url"]) in links
    assert ("Sign out", urls["sign_out_url"]) in links
    stranger = visit(office, None, **urls)
    assert stranger.answer.status_code == 401
    assert "Sign out" not in stranger.text


@pytest.mark.parametrize(
    "options",
    [
        {"check_actor": 1},
        {"home_url": ""},
        {"home_url": "javascript:alert(1)"},
        {"sign_out_url": "data:text/html,x"},
        {"sign_out_url": b"/bye"},
        {"sign_out_url": "/" + "x" * 500},
    ],
)
def test_invalid_options(office: Office, options: dict[str, Any]):
    with pytest.raises(InvalidValue):
        visit(office, ALICE, **options)
