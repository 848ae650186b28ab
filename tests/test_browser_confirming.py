"""Numbers, dangerous changes and concurrent administrators, in a real browser."""

import threading

import pytest

from tests.browser import WAYS, walking
from tests.flows import ADAM, HOME, OFFICE

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ numbers


def test_wrong_numbers(walk, world):
    """A wrong number shows the attempts left; the last one locks the request."""
    world.ask(OFFICE)
    number = world.number()
    wrong = ("1" if number[0] == "0" else "0") + number[1:]
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    walk.sees("5 attempts left")
    walk.expected.add(409)
    for left in ("4 attempts", "3 attempts", "2 attempts", "1 attempt"):
        walk.fill("Confirmation Number", wrong)
        walk.press("Submit")
        problem = walk.page.locator("#number-problem")
        walk.sees(f"This is not the number. {left} left", within=problem)
    walk.fill("Confirmation Number", wrong)
    walk.press("Submit")
    walk.sees("This request is locked, after too many wrong numbers")
    assert world.held() == []
    assert world.pending() == []
    walk.open()
    walk.sees("No restrictions", within=walk.row())
    walk.misses("Confirm", within=walk.row())


def test_reload_after_a_wrong_number(walk, world):
    """Reload, Back and Forward do not repeat a wrong number."""
    world.ask(OFFICE)
    number = world.number()
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
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    assert world.held() == [OFFICE]


# ------------------------------------------------------------------ dangerous changes


def test_delete_the_last(walk, world):
    """Deleting the last restriction requires a ticked box."""
    world.add(OFFICE)
    walk.open()
    walk.follow(f"Delete {OFFICE} of John Smith")
    walk.sees("this is the only restriction of John Smith", "can log in from any address")
    walk.press("Delete")
    walk.sees("Tick the box if you want this, or keep the restriction")
    assert world.held() == [OFFICE]
    walk.field("John Smith shall be able to log in from any address").check()
    walk.press("Delete")
    walk.sees("John Smith has no restrictions now and can log in from any address")
    assert world.held() == []
    assert world.guard.is_allowed("jsmith", HOME)


def test_lock_out(walk, world):
    """A change that would lock the actor out requires a ticked box, twice."""
    walk.open("add")
    walk.field("Trader").select_option("alice")
    walk.fill("IP Address", HOME)
    walk.press("Submit")
    assert walk.heading == "You would lock yourself out"
    walk.sees(f"you come from {OFFICE}")
    assert world.pending("alice") == []
    accept = f"I know that I may not be able to log in from {OFFICE} any more"
    walk.field(accept).check()
    walk.press("Submit")
    number = world.number()
    walk.fill("Confirmation Number", number)
    walk.press("Submit")
    assert walk.heading == "You would lock yourself out"
    assert world.held("alice") == []
    walk.field(accept).check()
    walk.fill("Confirmation Number", number)
    walk.press("Submit")
    assert world.held("alice") == [HOME]


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
