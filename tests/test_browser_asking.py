"""The forms in a real browser: proposals, the meaning of a text, and a form that is sent again."""

import threading

import pytest

from tests.browser import SEND, WAYS
from tests.browser_world import ACTORS
from tests.flows import ADAM, OFFICE

pytestmark = pytest.mark.slow


def test_use_my_current_address(walk):
    """The form shows the actor's address, and the button fills it in; for IPv6 its /64."""
    for who, proposed, meaning in (
        ("alice", OFFICE, f"{OFFICE}: 1 address"),
        ("iris", "2001:db8:7:1::/64", "2^64 addresses"),
    ):
        walk.become(who)
        walk.open("add")
        walk.sees(f"The address that we see you at is {ACTORS[who].address}.")
        walk.field("Trader").select_option("jsmith")
        mine = walk.page.get_by_role("button", name="Use my current address")
        if walk.way.scripts:
            mine.click()
            walk.waits_for(f"Understood as {proposed}: ")
        else:
            walk.go(mine)
        assert walk.field("IP Address").input_value() == proposed
        assert walk.field("Trader").input_value() == "jsmith"
        walk.submit_addresses()
        walk.sees("Confirm the restriction", meaning)
    walk.become(ADAM.username)  # an actor without an address
    walk.open("add")
    walk.sees("We cannot see your address.")
    walk.misses("Use my current address")


def test_what_was_understood(walk, world):
    """The page shows what a text means, while it is typed or on a page of its own."""
    walk.open("add")
    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", " 203.0.113.5-203.0.113.9 ")
    if walk.way.scripts:
        walk.waits_for("Understood as 203.0.113.5-203.0.113.9: 5 addresses")
        walk.press(SEND)
    else:
        walk.press(SEND)
        assert walk.heading == "Is this what you mean?"
        walk.sees("203.0.113.5-203.0.113.9: 5 addresses")
        assert world.pending() == []
        walk.press("Change it")
        assert walk.field("IP Address").input_value().strip() == "203.0.113.5-203.0.113.9"
        walk.press(SEND)
        walk.press(SEND)
    walk.sees("Confirm the restriction", "203.0.113.5-203.0.113.9: 5 addresses")
    assert world.pending() == ["203.0.113.5-203.0.113.9"]


def test_reload_after_a_wrong_number(walk, world):
    """Reload, Back and Forward do not repeat a wrong number."""
    world.ask(OFFICE)
    number = world.next_number()
    wrong = ("1" if number[0] == "0" else "0") + number[1:]
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    walk.fill("Confirmation Number", wrong)
    walk.press("Confirm restriction")
    for step in (walk.page.reload, walk.page.reload, walk.page.go_back, walk.page.go_forward):
        step()
        walk.sees("4 attempts left")
    walk.sees("This is not the number")
    walk.fill("Confirmation Number", number)
    walk.press("Confirm restriction")
    assert world.held() == [OFFICE]


@pytest.mark.parametrize("way", [way for way in WAYS if way.scripts], ids=str)
def test_stopped_and_sent_again(walk, world, monkeypatch):
    """A form whose submission was stopped can be submitted again; there is one request."""
    go_on = threading.Event()
    issued = world.notifier.number_issued

    def slow(*given):
        go_on.wait(30)
        issued(*given)

    monkeypatch.setattr(world.notifier, "number_issued", slow)
    walk.open("add")
    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", OFFICE)
    button = walk.page.get_by_role("button", name="Submit: Send confirmation number", exact=True)
    walk.page.evaluate(
        "addEventListener('submit', () => setTimeout(() => window.stop(), 500), {once: true})"
    )
    with walk.page.expect_event("requestfailed"):
        button.click(no_wait_after=True)
    go_on.set()
    again = walk.page.evaluate("performance.now() + 1000")  # clicks within a second count as one
    walk.page.wait_for_function("again => performance.now() > again", arg=again)
    walk.go(button)
    assert walk.heading == "Confirm the restriction"
    assert world.pending() == [OFFICE]
    walk.fill("Confirmation Number", world.next_number())
    walk.press("Confirm restriction")
    assert world.held() == [OFFICE]
