"""Numbers, changes that are dangerous, and two administrators at once, in a real browser."""

import re
import threading

import pytest

from tests.browser import WAYS, settings, walking
from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ numbers


def test_wrong_numbers(walk, world):
    """A wrong number is told with what is left; the last one locks the request, and says so."""
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


def test_wrong_then_right(walk, world):
    """After a wrong number the right one still confirms."""
    world.ask(OFFICE)
    number = world.number()
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    for typed in ("", "not a number", number[:-1]):
        walk.fill("Confirmation Number", typed)
        walk.press("Submit")
    walk.fill("Confirmation Number", number)
    walk.press("Submit")
    assert world.held() == [OFFICE]


def test_reload_after_a_wrong_number(walk, world):
    """Loading the page again, going back and forth: none of it repeats the guess."""
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
    """A form whose sending was stopped can be sent again, and asks for nothing twice."""
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
    again = walk.page.evaluate("performance.now() + 1000")  # two clicks in a second are one
    walk.page.wait_for_function("again => performance.now() > again", arg=again)
    walk.go(button)
    assert walk.heading == "Confirm the restriction"
    assert world.pending() == [OFFICE]
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    assert world.held() == [OFFICE]


def test_new_number(walk, world):
    """A new number replaces the old one; too soon, the page says how long to wait."""
    world.ask(OFFICE)
    old = world.number()
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    walk.press("Send a new number")
    walk.sees("Try again in 30 seconds")
    world.wait(seconds=31)
    walk.press("Send a new number")
    walk.sees("A new number was sent by email")
    new = world.number()
    walk.fill("Confirmation Number", old)
    walk.press("Submit")
    walk.sees("This is not the number. 4 attempts left")
    walk.fill("Confirmation Number", new)
    walk.press("Submit")
    assert world.held() == [OFFICE]


def test_number_that_is_too_old(walk, world):
    """After ten minutes the number is no good, the request still is."""
    world.ask(OFFICE)
    number = world.number()
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    walk.sees("Valid until 1 Jan 2030, 12:10 UTC", "10 minutes left")
    world.wait(minutes=11)
    walk.fill("Confirmation Number", number)
    walk.press("Submit")
    walk.sees("This number has expired", within=walk.page.locator("#number-problem"))
    walk.press("Send a new number")
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    assert world.held() == [OFFICE]


def test_request_that_is_too_old(walk, world):
    """After a day nobody can confirm the request, and the page says what happened."""
    world.ask(OFFICE)
    number = world.number()
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    world.wait(hours=25)
    walk.fill("Confirmation Number", number)
    walk.expected.add(409)
    walk.press("Submit")
    walk.sees("nobody confirmed it in time")
    assert world.held() == []


def test_mail_that_fails(walk, world):
    """The mail server refuses: the page says so, and the request can have a new number."""
    refused = world.mails.refuse
    world.mails.refuse = {ALICE.email}
    try:
        walk.open("add")
        walk.field("Trader").select_option("jsmith")
        walk.fill("IP Address", OFFICE)
        walk.press("Submit")
        walk.sees("could not be sent")
    finally:
        world.mails.refuse = refused
    walk.press("Send a new number")
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    assert world.held() == [OFFICE]


# ------------------------------------------------------------------ what is dangerous


def test_delete_the_last(walk, world):
    """Before the user is opened to every address, the page says that, and wants to hear it."""
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


@settings(confirm_deletes="last")
def test_delete_the_last_by_a_number(walk, world):
    """Where the host wants it, the last one goes only by a number."""
    world.add(OFFICE)
    walk.open()
    walk.follow(f"Delete {OFFICE} of John Smith")
    walk.sees("You will receive an email with a confirmation number")
    walk.field("John Smith shall be able to log in from any address").check()
    walk.press("Delete")
    assert world.held() == [OFFICE]
    walk.sees("Confirm the deletion", "this is the only restriction of John Smith")
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    walk.sees("John Smith has no restrictions now")
    assert world.held() == []


def test_lock_out(walk, world):
    """Who would lock out themselves is asked first, at the request and at the confirmation."""
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


def test_lock_out_avoided(walk, world):
    """Who goes back from there has changed nothing."""
    world.add(OFFICE, "alice")
    world.add(HOME, "alice")
    walk.open()
    walk.follow(f"Delete {OFFICE} of Alice Adams")
    walk.press("Delete")
    assert walk.heading == "You would lock yourself out"
    walk.follow("Go back")
    walk.follow("Keep it")
    assert set(world.held("alice")) == {OFFICE, HOME}


# ------------------------------------------------------------------ two at once


def test_two_administrators_delete(windows, walk, world):
    """The second one learns who was faster, and nothing happens twice."""
    world.add(OFFICE)
    world.add(HOME)
    with walking(windows.get_one(walk.way, 2), world, walk.way, ADAM.username) as other:
        for each in (walk, other):
            each.open()
            each.follow(f"Delete {OFFICE} of John Smith")
        walk.press("Delete")
        walk.sees(f"{OFFICE} was deleted")
        other.expected.add(409)
        other.press("Delete")
        other.sees("This restriction does not hold any more", f"alice deleted {OFFICE}")
    assert world.held() == [HOME]


def test_two_administrators_and_the_last(windows, walk, world):
    """What has become the last one meanwhile is not deleted by a page that did not say so."""
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


def test_two_administrators_and_a_request(windows, walk, world):
    """A request that somebody else cancelled cannot be confirmed, and the page says who it was."""
    world.ask(OFFICE)
    number = world.number()
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    with walking(windows.get_one(walk.way, 2), world, walk.way, ADAM.username) as other:
        other.open()
        other.sees("Requested by alice", within=other.row())
        other.press(f"Cancel the request for {OFFICE} of John Smith")
    walk.expected.add(409)
    walk.fill("Confirmation Number", number)
    walk.press("Submit")
    walk.sees("This request is not pending any more", f"adam cancelled the request for {OFFICE}")
    assert world.held() == []


def test_only_the_requester_confirms(walk, world):
    """Another administrator sees the request and may cancel it, but is shown no Confirm."""
    world.ask(OFFICE)
    walk.become(ADAM.username)
    walk.open()
    assert walk.row().get_by_role("link", name=re.compile("^Confirm")).count() == 0
    walk.sees("Cancel", within=walk.row())


def test_accounts_of_others_are_not_there(walk, world):
    """An administrator sees the users of its own accounts, an operator all."""
    walk.open()
    walk.misses("zed")
    walk.become(BOSS.username)
    walk.open()
    walk.sees("zed", "U2")
