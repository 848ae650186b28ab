"""Accessibility by axe on every page, in light and in dark, wide and narrow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

import ipguard
from tests.browser import SEND, Walk, Way
from tests.browser_world import World
from tests.flows import ADAM, ALICE, HOME, OFFICE

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Page

#: WCAG 2.2 AA and earlier, axe's best practices, and its experimental rules.
TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice", "experimental")
COLOURS = ("cat.color",)


def violations(page: Page, tags: tuple[str, ...] = TAGS) -> list[str]:
    """Return the violations that axe finds on the current page."""
    # Evaluated by the browser, so the Content-Security-Policy does not apply.
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found: dict[str, Any] = page.evaluate(
        "tags => axe.run(document, {runOnly: tags, resultTypes: ['violations']})", tags
    )
    assert found["passes"], "axe checked nothing"
    return [
        f"{each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]
    ]


@pytest.fixture
def world(world: World) -> World:
    """A host whose page links to the rest of its site."""
    world.options |= {"home_url": "/", "sign_out_url": "/sign-out"}
    return world


def adding(walk: Walk, world: World) -> Iterator[str]:
    world.add("203.0.113.0/29", label="office")
    world.add("2001:db8::/48", expires_at=world.clock().replace(year=2031))
    world.ask(HOME, label="home")
    world.ask("198.51.100.21", "mary")
    world.next_number()
    world.next_number()
    walk.open()
    yield "the list"
    walk.open("?only=unrestricted")
    yield "the list, filtered"
    walk.follow("Add IP Address Restriction")
    yield "add"
    walk.press(SEND)
    yield "add, with errors"
    walk.field("Trader").select_option("mary")
    walk.fill("IP Address", "198.51.100.0/28")
    walk.waits_for("Understood as")
    yield "add, understood"
    walk.page.route("**/understood", lambda route: route.abort())
    walk.open("add")
    walk.field("Trader").select_option("mary")
    walk.fill("IP Address", "198.51.100.0/28")
    walk.press(SEND)
    walk.page.unroute("**/understood")
    assert walk.heading == "Is this what you mean?"
    yield "review"
    walk.complaints.clear()  # about the aborted request
    walk.open("add")
    walk.field("Trader").select_option("alice")
    walk.fill("IP Address", HOME)
    walk.press(SEND)
    assert walk.heading == "You would lock yourself out"
    yield "lock-out"


def confirming(walk: Walk, world: World) -> Iterator[str]:
    walk.open()
    walk.follow(f"Confirm {HOME} for John Smith")
    yield "the number"
    walk.fill("Confirmation Number", "00000-00000")
    walk.press("Confirm restriction")
    yield "a wrong number"
    walk.press("Send a new number")
    yield "a new number, too soon"
    walk.press("Withdraw request")
    yield "one user, after a change"


def needing_more(walk: Walk, world: World) -> Iterator[str]:
    world.use(add=ipguard.Demand(number=True, approvals=2, wait=timedelta(hours=1)))
    waits = world.ask("192.0.2.7", "mary", ADAM)
    done = world.ask("192.0.2.8", "mary")
    world.use()
    walk.open(f"confirm?user=mary&request={waits.id}")
    yield "a request to approve"
    walk.press("Approve restriction")
    yield "approved"
    walk.open(f"confirm?user=mary&request={done.id}")
    yield "a request that waits"
    world.wait(hours=1)
    walk.open(f"confirm?user=mary&request={done.id}")
    yield "a number to be sent"
    world.add("192.0.2.9", "mary")
    walk.open(f"confirm?user=mary&request={done.id}")
    yield "a request that cannot hold"
    for request in (waits, done):
        world.flow.cancel(ALICE, request.id)
    (restriction,) = world.store.load_policy("mary").restrictions
    walk.open(f"change?user=mary&restriction={restriction.id}")
    yield "change"
    walk.fill("IP Address", "192.168.1.20")
    walk.press(SEND)
    yield "review of a change, with a private address"
    walk.open("add")
    walk.page.get_by_text("Add the same for several traders").click()
    walk.fill("More traders", "mary, jsmith, nobody")
    walk.fill("IP Address", "192.0.2.77")
    walk.press(SEND)
    yield "several traders, with errors"
    walk.fill("More traders", "mary, jsmith")
    walk.field("Trader").select_option("mary")
    walk.press(SEND)
    yield "review of several traders"
    world.remove(restriction.id)


def deleting(walk: Walk, world: World) -> Iterator[str]:
    walk.open()
    walk.follow("Delete 203.0.113.0/29 of John Smith")
    yield "delete"
    (restriction, *_) = world.store.load_policy("jsmith").restrictions
    world.remove(restriction.id)
    walk.expected.add(409)
    walk.press("Delete restriction")
    yield "deleted or changed by another actor"
    world.add(OFFICE, "mary")
    walk.open()
    walk.follow(f"Delete {OFFICE} of Mary Major")
    yield "delete the last"
    walk.press("Delete restriction")
    yield "delete the last, not accepted"


def seeing(walk: Walk, world: World) -> Iterator[str]:
    world.log_in(OFFICE, 1_234, 1, username="mary")
    world.log_in("2001:db8:1234:5678:9abc:def0:1234:5678", 3, 2, username="mary")
    world.log_in(HOME, 0, 2, username="mary")
    world.log_in(HOME, 7, username="alice")
    walk.open("user?user=mary")
    walk.sees("Refused With the Right Password", "Used in the Last 90 Days", "Last used")
    yield "one user, with logins"
    walk.press(f"Request this address {HOME}")
    yield "add, with suggestions"
    walk.page.get_by_text("Add the same for several traders").click()
    walk.fill("More traders", "alice")
    walk.fill("IP Address", "192.0.2.1")
    walk.press(SEND)
    walk.sees("Recent logins that this would have refused")
    yield "review of several traders, with logins"
    (restriction,) = world.store.load_policy("mary").restrictions
    walk.open(f"change?user=mary&restriction={restriction.id}")
    walk.fill("IP Address", "192.0.2.1")
    walk.press(SEND)
    walk.sees("Confirm the change", "This would have refused 1,234 of 1,237 recent logins.")
    yield "a request, with logins"
    walk.press("Withdraw request")


def looking(walk: Walk, world: World) -> Iterator[str]:
    walk.open("check?user=mary")
    yield "check"
    for typed in (OFFICE, HOME, "nonsense"):
        walk.fill("IP Address", typed)
        walk.press("Check")
        yield f"checked {typed}"
    walk.open("history")
    yield "history"
    walk.fill("Trader", "nobody")
    walk.fill("From", "2030-01-01")
    walk.press("Show")
    yield "history, with errors"
    walk.open()
    walk.fill("Search", "nobody")
    walk.press("Search")
    yield "nothing found"
    world.crowd(120)
    walk.open()
    yield "a long list"
    walk.open("add")
    yield "add, with a search"


def going_wrong(walk: Walk, world: World) -> Iterator[str]:
    walk.expected |= {401, 403, 404, 500, 503}
    walk.open("nothing-here")
    yield "404"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(world.flow, "overview", lambda *_, **__: 1 / 0)
        walk.open()
    yield "500"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(world.flow, "overview", unavailable)
        walk.open()
    yield "503"
    world.store.remove_users(["jsmith", "mary", "alice"])
    world.store.remove_users(f"trader{number:05}" for number in range(1, 121))
    walk.open()
    yield "removed users"
    world.store.put_users([ipguard.User(username="iris", full_name="Iris", account_id="U1")])
    world.add(HOME, "iris")
    world.guard.sync()
    walk.become("iris")
    walk.open()
    assert walk.heading == "Access refused"
    yield "403"
    walk.become("nobody")
    walk.open()
    yield "401"


def unavailable(*_: object, **__: object) -> None:
    raise ipguard.StoreUnavailable("not there")


@pytest.mark.parametrize("way", [Way("asgi", True, "wide"), Way("wsgi", True, "narrow")], ids=str)
@pytest.mark.timeout(600)  # many pages, twice each
def test_axe_finds_nothing(walk, world, long):
    """No page violates WCAG 2.2 AA or axe's best practices, in light or dark."""
    seen = {}
    visits = (adding, confirming, needing_more, deleting, seeing, looking, going_wrong)
    for name in itertools.chain.from_iterable(visit(walk, world) for visit in visits):
        # Light and dark differ only in colours, so a short run checks only these in dark.
        for scheme, tags in (("light", TAGS), ("dark", TAGS if long else COLOURS)):
            walk.page.emulate_media(color_scheme=scheme)
            seen[name, scheme] = violations(walk.page, tags)
        assert walk.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert len(seen) > 50
    assert {where: found for where, found in seen.items() if found} == {}
