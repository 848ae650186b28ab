"""What the page's users expect beyond the three procedures, in a real browser."""

import re
from datetime import timedelta

from tests.browser import settings, walking
from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE

TWO_DAYS = timedelta(days=2)


# ------------------------------------------------------------------ finding


def test_paging(walk, world):
    """The list comes in pages of 50, one after the other, and back to the first."""
    world.crowd(60)
    walk.open()
    assert walk.page.get_by_role("row").count() == 51  # with the heads
    walk.sees("alice", "trader00047")
    walk.follow("Next page")
    walk.sees("trader00048", "trader00060")
    walk.misses("trader00047", "Next page")
    walk.follow("First page")
    walk.sees("trader00001")


def test_search(walk, world):
    """A name, a word of it or an address that is listed finds the users; the URL says neither."""
    world.crowd(60)
    world.add("203.0.113.8/30")
    walk.open()
    for text, found in (
        ("trader00058", "trader00058"),
        ("number00059", "trader00059"),
        ("203.0.113.9", "jsmith"),
    ):
        walk.fill("Search", text)
        walk.press("Search")
        assert walk.page.get_by_role("row").count() == 2
        walk.sees(found, f"Traders found for “{text}”")
        assert text not in walk.page.url
        assert walk.field("Search").input_value() == text
    walk.fill("Search", "<b>nobody</b>")
    walk.press("Search")
    walk.sees("No trader matches “<b>nobody</b>”")
    walk.follow("Show all")
    walk.sees("Next page")


def test_an_account_without_users(walk, world):
    """An empty list says that it is empty."""
    world.store.remove_users(["jsmith", "mary", "alice"])
    walk.open()
    walk.sees("There are no traders in your accounts")


def test_drop_down_becomes_a_search(walk, world):
    """With more traders than a drop-down should hold, one is typed, or searched for and chosen."""
    world.crowd(120)
    walk.open("add")
    walk.fill("Trader", "number0011")
    walk.fill("IP Address", OFFICE)
    walk.fill("Label (optional)", "desk")
    walk.expected.add(422)
    walk.press("Submit")
    walk.sees("Choose the trader that you mean")
    assert walk.field("IP Address").input_value() == OFFICE
    options = walk.field("Trader").locator("option").all_inner_texts()
    assert len([text for text in options if "trader0011" in text]) == 10
    walk.field("Trader").select_option("trader00114")
    walk.press("Submit")
    walk.sees("Confirm the restriction", "trader00114", "desk")

    walk.open("add")
    walk.fill("Trader", "trader00077")
    walk.fill("IP Address", OFFICE)
    walk.press("Submit")
    walk.sees("Confirm the restriction", "trader00077")


# ------------------------------------------------------------------ asking


def test_use_my_current_address(walk):
    """The actor's own address is filled in; of IPv6 its /64, as privacy addresses change in it."""
    for who, proposed, meaning in (
        ("alice", OFFICE, f"{OFFICE}: 1 address"),
        ("iris", "2001:db8:7:1::/64", "2^64 addresses"),
    ):
        walk.become(who)
        walk.open("add")
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
    walk.become(ADAM.username)  # of whom the host knows no address
    walk.open("add")
    walk.misses("Use my current address")


def test_label_and_expiry(walk, world):
    """A label and an end are kept, shown, and the end is not what lifts the restriction."""
    until = world.clock() + TWO_DAYS
    walk.open("add")
    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", OFFICE)
    walk.fill("Label (optional)", "two <weeks> & more")
    walk.fill("Expires (UTC, optional)", until.strftime("%Y-%m-%dT%H:%M"))
    walk.press("Submit")
    walk.sees("two <weeks> & more", "3 Jan 2030, 12:00 UTC")
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    (restriction,) = world.store.load_policy("jsmith").restrictions
    assert (restriction.label, restriction.expires_at) == ("two <weeks> & more", until)
    walk.open()
    walk.sees("two <weeks> & more", "Until 3 Jan 2030, 12:00 UTC", within=walk.row())
    world.wait(days=3)
    walk.open()
    walk.sees("Expired 3 Jan 2030, 12:00 UTC", within=walk.row())
    walk.misses("No restrictions", within=walk.row())
    assert not world.guard.is_allowed("jsmith", OFFICE)


def test_what_was_understood(walk, world):
    """Before anything is asked for, the page says what the text means: while typing, or apart."""
    walk.open("add")
    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", " 203.0.113.5-203.0.113.9 ")
    if walk.way.scripts:
        walk.waits_for("Understood as 203.0.113.5-203.0.113.9: 5 addresses")
        walk.press("Submit")
    else:
        walk.press("Submit")
        assert walk.heading == "Is this what you mean?"
        walk.sees("203.0.113.5-203.0.113.9: 5 addresses")
        assert world.pending() == []
        walk.press("Change it")
        assert walk.field("IP Address").input_value().strip() == "203.0.113.5-203.0.113.9"
        walk.press("Submit")
        walk.press("Submit")
    walk.sees("Confirm the restriction", "203.0.113.5-203.0.113.9: 5 addresses")
    assert world.pending() == ["203.0.113.5-203.0.113.9"]


def test_errors_stand_beside_their_fields(walk, world):
    """All that is wrong is said at once, each beside its field, and nothing typed is lost."""
    walk.open("add")
    typed = {"IP Address": "203.0.113.3/29", "Label (optional)": "my “office”"}
    for label, text in typed.items():
        walk.fill(label, text)
    walk.fill("Expires (UTC, optional)", "2029-12-31T10:00")
    walk.expected.add(422)
    walk.press("Submit")
    assert walk.page.title().startswith("Error: ")
    walk.sees("There is a problem", "Choose a trader")
    walk.sees("Did you mean 203.0.113.0/29?", within=walk.page.locator("#addresses-problem"))
    for label, text in typed.items():
        assert walk.field(label).input_value() == text
    assert walk.field("Expires (UTC, optional)").input_value() == "2029-12-31T10:00"
    assert walk.field("IP Address").get_attribute("aria-invalid") == "true"
    assert "addresses-problem" in (walk.field("IP Address").get_attribute("aria-describedby") or "")
    walk.page.locator("#problems a[href='#addresses']").click()
    assert walk.page.evaluate("document.activeElement.id") == "addresses"

    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", "203.0.113.0/29")
    walk.submit_addresses()
    walk.sees("The time", within=walk.page.locator("#expires_at-problem"))
    walk.misses("Choose a trader")
    assert walk.field("Trader").input_value() == "jsmith"
    assert walk.field("Label (optional)").input_value() == "my “office”"
    assert world.pending() == []


def test_addresses_that_are_refused(walk):
    """Whatever is wrong with an address is said beside it, in words."""
    walk.open("add")
    walk.expected.add(422)
    for text, told in (
        ("", "Type an IP address"),
        ("010.8.8.8", "leading zero"),
        ("10.0.0.0/8", "The widest network allowed is a /16"),
        ("224.0.0.1", "multicast"),
    ):
        walk.field("Trader").select_option("jsmith")
        walk.fill("IP Address", text)
        walk.submit_addresses()
        walk.sees(told, within=walk.page.locator("#addresses-problem"))
        assert walk.field("IP Address").input_value() == text


def test_asked_for_twice(walk, world):
    """Who asks for the same again is taken to the request that waits."""
    world.ask(OFFICE)
    walk.open("add")
    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", OFFICE)
    walk.press("Submit")
    walk.sees("You have asked for this already")
    assert world.pending() == [OFFICE]
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    assert world.held() == [OFFICE]


# ------------------------------------------------------------------ numbers


def test_wrong_numbers(walk, world):
    """A wrong number is told with what is left; the last one locks the request, and says so."""
    world.ask(OFFICE)
    number = world.number()
    wrong = ("1" if number[0] == "0" else "0") + number[1:]
    walk.open()
    walk.follow(f"Confirm {OFFICE} for John Smith")
    walk.sees("5 attempts left")
    walk.expected |= {422, 409}
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
    walk.expected.add(422)
    for typed in ("", "not a number", number[:-1]):
        walk.fill("Confirmation Number", typed)
        walk.press("Submit")
    walk.fill("Confirmation Number", number)
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
    walk.sees("A new number was sent by e-mail")
    new = world.number()
    walk.expected.add(422)
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
    walk.expected.add(422)
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
    walk.expected.add(422)
    walk.press("Delete")
    walk.sees("Say that you want this, or go back")
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
    walk.fill("Confirmation Number", world.number())
    walk.press("Submit")
    assert walk.heading == "You would lock yourself out"
    assert world.held("alice") == []
    walk.field(accept).check()
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


# ------------------------------------------------------------------ looking


def test_check_an_address(walk, world):
    """Could a trader log in from there, and why."""
    world.add("203.0.113.0/29", label="office")
    walk.open()
    walk.follow("John Smith")
    walk.follow("Check an address")
    for typed, answer, why in (
        ("203.0.113.5", "203.0.113.5: allowed", "A restriction of jsmith lists this address"),
        (HOME, f"{HOME}: not allowed", "No restriction of jsmith lists this address"),
    ):
        walk.fill("IP Address", typed)
        walk.press("Check")
        walk.sees(answer, why, "203.0.113.0/29", "office")
        assert typed not in walk.page.url
    walk.expected.add(422)
    walk.fill("IP Address", "203.0.113.05")
    walk.press("Check")
    walk.sees("leading zero", within=walk.page.locator("#address-problem"))


def test_history(walk, world):
    """What was done, by whom, the newest first; of one trader where one is named."""
    world.add(OFFICE, "jsmith")
    world.add(HOME, "mary")
    walk.open()
    walk.follow("History")
    rows = walk.page.get_by_role("row")
    walk.sees("mary", HOME, BOSS.username, within=rows.nth(1))
    walk.sees("jsmith", OFFICE, within=rows.nth(2))
    walk.fill("Trader", "jsmith")
    walk.press("Show")
    walk.sees("History of jsmith", OFFICE)
    walk.misses("mary", HOME)
    walk.follow("Show all")
    walk.sees("mary")
    walk.expected.add(422)
    walk.fill("Trader", "nobody")
    walk.press("Show")
    walk.sees("nothing of such a trader", within=walk.page.locator("#user-problem"))


def test_history_in_pages(walk, world):
    """A long history comes in pages."""
    for number in range(60):
        world.add(f"203.0.113.{number}", "jsmith")
    walk.open("history")
    walk.sees("203.0.113.59")
    walk.misses("203.0.113.9 ")
    walk.follow("Older")
    walk.sees("203.0.113.0")
    walk.follow("Newest")
    walk.sees("203.0.113.59")


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
        other.expected.add(409)
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
