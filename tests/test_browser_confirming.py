"""Numbers, dangerous changes and concurrent administrators, in a real browser."""

import threading

import pytest

from tests.browser import WAYS, walking
from tests.flows import ADAM, HOME, OFFICE

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ numbers


def test_reload_after_a_wrong_number(walk, world):
    """Reload, Back and Forward do not repeat a wrong number."""
    world.ask(OFFICE)
    number = world.next_number()
    wrong = ("1" if number[0] == "0" else "0") + number[1:]
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    walk.fill("Confirmation Number", wrong)
    walk.press("Submit")
    for step in (walk.page.reload, walk.page.reload, walk.page.go_back, walk.page.go_forward):
        step()
        walk.sees("4 attempts left")
    walk.sees("This is not the number")
    walk.fill("Confirmation Number", number)
    walk.press("Submit")
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
    button = walk.page.get_by_role("button", name="Submit", exact=True)
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
    walk.press("Submit")
    assert world.held() == [OFFICE]


# ------------------------------------------------------------------ dangerous changes


# ------------------------------------------------------------------ concurrency


def test_two_administrators_and_the_last(windows, walk, world):
    """A page that did not warn about the last restriction does not delete it."""
    world.add(OFFICE)
    world.add(HOME)
    with walking(windows.get_one(walk.way, 2), world, walk.way, ADAM.username) as other:
        other.open()
        other.follow(f"Delete {HOME} of John Smith")
        walk.open()
        walk.follow(f"Delete {OFFICE} of John Smith")
        walk.press("Delete")
        other.press("Delete")
        other.sees("This has changed since you opened the page", f"alice deleted {OFFICE}")
        other.sees("this is the only restriction of John Smith")
        assert world.held() == [HOME]
        other.field("John Smith shall be able to log in from any address").check()
        other.press("Delete")
    assert world.held() == []
