"""Several traders at once, changes, approvals, waits and the history, in a real browser."""

import csv
from datetime import timedelta

import pytest

from ipguard import Demand
from tests.browser import SEND
from tests.browser_world import World
from tests.flows import ADAM, HOME, OFFICE

pytestmark = pytest.mark.slow


@pytest.fixture
def world(world: World) -> World:
    """A host on which a change that loosens needs a wait and an approval."""
    world.use(loosens=Demand(wait=timedelta(hours=4), approvals=1))
    return world


def test_several_addresses_for_many_traders(walk, world):
    """One form, one review, one number: every trader has every address."""
    world.crowd(60)
    names = [f"trader{n:05}" for n in range(1, 61)]
    walk.open("add")
    walk.field("Trader").select_option("mary")
    walk.page.get_by_text("Add the same for several traders").click()
    walk.fill("More traders", "\n".join(names))
    walk.fill("IP Address", f"{OFFICE}\n198.51.100.0/29")
    if walk.way.scripts:
        walk.waits_for(f"Understood as {OFFICE}: 1 address; 198.51.100.0/29: 8 addresses")
    walk.press(SEND)
    assert walk.heading == "Is this what you mean?"
    walk.sees("61", f"Today from anywhere; then only from {OFFICE}, 198.51.100.0/29.", names[59])
    walk.press("Change it")
    assert walk.field("More traders").is_visible()
    walk.press(SEND)
    walk.press(SEND)
    walk.sees("One number confirms them all.")
    walk.fill("Confirmation Number", world.next_number())
    walk.press("Confirm restriction")
    walk.sees(f"{OFFICE}, 198.51.100.0/29 now hold. This was done for 61 traders.")
    for name in ("mary", *names):
        assert world.held(name) == [OFFICE, "198.51.100.0/29"]


def test_change_a_restriction(walk, world):
    """A label is edited by a number; new addresses also need a wait and an approval."""
    world.add(OFFICE, label="office")
    walk.open()
    walk.follow(f"Change {OFFICE} of John Smith")
    assert walk.field("IP Address").input_value() == OFFICE
    walk.fill("Label (optional)", "head office")
    walk.press(SEND)
    walk.sees("Confirm the change", "From the same addresses as today.")
    walk.fill("Confirmation Number", world.next_number())
    walk.press("Confirm change")
    walk.sees(f"{OFFICE} was changed.", "head office")

    walk.follow(f"Change {OFFICE} of John Smith")
    walk.fill("IP Address", "192.0.2.0/29")
    if walk.way.scripts:
        walk.waits_for("Understood as 192.0.2.0/29: 8 addresses")
    walk.press(SEND)
    if walk.heading == "Is this what you mean?":
        walk.sees("waits for 4 hours", "1 other administrator must approve it.")
        walk.press("Request it")
    walk.sees(f"Then also from 192.0.2.0/29; no longer from {OFFICE}.", "Missing: a wait")
    walk.misses("Confirmation Number (")
    where = walk.page.url.removeprefix(world.page_url)

    walk.become(ADAM.username)
    walk.open()
    walk.sees("Waiting for you", "Requested by alice; your approval is missing.")
    walk.sees("No restrictions", within=walk.row("mary"))
    walk.follow("Approve replace 203.0.113.7 by 192.0.2.0/29 for jsmith")
    walk.sees("A request of alice", f"no longer from {OFFICE}.")
    walk.press("Approve change")
    walk.sees("You have approved the request.", "1 of 1 (adam)")
    assert world.held() == [OFFICE]

    world.wait(hours=4)
    walk.become("alice")
    walk.open(where)
    walk.press(SEND)
    walk.sees("Done: a wait", "Done: approvals", "sent to a…e@firm.example")
    walk.fill("Confirmation Number", world.next_number())
    walk.press("Confirm change")
    walk.sees(f"192.0.2.0/29 now holds in place of {OFFICE}.")
    assert world.held() == ["192.0.2.0/29"]


def test_a_request_that_would_do_more(walk, world):
    """The changes of others are shown; a request that would now do more is not confirmed."""
    world.ask(OFFICE)
    number = world.next_number()
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    world.add(HOME)
    walk.fill("Confirmation Number", number)
    walk.press("Confirm restriction")
    walk.sees("This has changed since you opened the page", "boss imposed", "This cannot hold")
    walk.misses("What will hold afterwards")
    walk.fill("Confirmation Number", number)
    walk.press("Confirm restriction")
    walk.sees("There is a problem", "withdraw the request and make a new one")
    walk.page.reload()
    walk.sees("withdraw the request and make a new one")
    walk.press("Withdraw request")
    walk.sees("was cancelled")
    assert world.pending() == []
    assert world.held() == [HOME]


def test_a_form_that_was_stopped_by_a_warning(walk, world):
    """The warning of a lockout keeps the form, which can be sent again; "Go back" loses nothing."""
    walk.open("add")
    walk.field("Trader").select_option("alice")
    walk.fill("IP Address", HOME)
    walk.press(SEND)
    assert walk.heading == "You would lock yourself out"
    walk.press("Go back")
    assert walk.field("IP Address").input_value() == HOME
    walk.press(SEND)
    walk.page.get_by_role("checkbox").check()
    walk.press("Continue")
    walk.sees("Confirm the restriction")
    number = world.next_number()
    walk.fill("Confirmation Number", number)
    walk.press("Confirm restriction")
    walk.fill("Confirmation Number", number)
    walk.page.get_by_role("checkbox").check()
    walk.expected.add(403)  # the page is closed to alice now
    walk.press("Continue")
    assert world.held("alice") == [HOME]


def test_filter_the_list(walk, world):
    """The open state is marked by words and shape, and can be listed alone."""
    world.add(OFFICE)
    walk.open()
    walk.sees("Restricted 1", "Unrestricted 2")
    tag = walk.row("mary").get_by_text("No restrictions")
    assert tag.evaluate("e => getComputedStyle(e).borderStyle") == "dashed"
    walk.follow("Unrestricted 2")
    walk.misses("John Smith")
    walk.sees("No restrictions", within=walk.row("mary"))
    walk.follow("All 3")
    walk.sees("John Smith")


def test_filter_and_download_the_history(walk, world):
    """Trader, action and days; the download has what is shown."""
    world.add(OFFICE, label="=1+1")
    world.wait(days=1)
    world.add(HOME, "mary")
    walk.open("history")
    walk.fill("Trader", "jsmith")
    walk.field("Action").select_option("Impose")
    walk.fill("To", f"{world.clock():%Y-%m-%d}")
    walk.press("Show")
    walk.sees(f"imposed {OFFICE}")
    walk.misses(HOME)
    with walk.page.expect_download() as download:
        walk.page.get_by_role("link", name="Download as CSV").click()
    with download.value.path().open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["Trader"] == "jsmith"
    assert "label: =1+1" in row["Particulars"]
    walk.follow("jsmith")
    assert walk.heading == "John Smith"
