"""Where traders log in from, in a real browser: suggestions, refused logins, and what is lost."""

import pytest

from tests.browser import SEND
from tests.flows import HOME, OFFICE

pytestmark = pytest.mark.slow

SIX = "2001:db8:1234:5678:9abc:def0:1234:5678"
NETWORK = "2001:db8:1234:5678::/64"


def test_suggestions_fill_in_the_form(walk, world):
    """One click on the trader's page opens the form; a click there adds another address."""
    world.log_in(HOME, 9)
    world.log_in(SIX, 2)
    walk.open("user?user=jsmith")
    walk.sees("Used in the Last 90 Days", HOME, SIX)
    walk.press(f"Add {HOME}")
    assert walk.field("IP Address").input_value() == HOME
    assert walk.field("Trader").input_value() == "jsmith"
    suggestion = walk.page.get_by_role("button", name=f"Use {NETWORK}")
    if walk.way.scripts:
        suggestion.click()
        walk.waits_for(f"Understood as {HOME}: 1 address; {NETWORK}: ")
    else:
        walk.go(suggestion)
    assert walk.field("IP Address").input_value().split() == [HOME, NETWORK]
    walk.submit_addresses()
    walk.sees("Confirm the restriction", "This would have refused none of 11 recent logins.")
    assert world.pending() == [HOME, NETWORK]


def test_a_refused_login_is_requested(walk, world):
    """The page says why it was refused, and what the change would have refused."""
    world.add(OFFICE)
    world.log_in(OFFICE, 4)
    world.log_in(SIX, 0, 3)
    walk.open("user?user=jsmith")
    walk.sees("Refused With the Right Password", "3 times, last on")
    walk.sees("It comes over IPv6, and only IPv4 is listed.")
    walk.press(f"Request this address {SIX}")
    walk.submit_addresses()
    walk.sees("Confirm the restriction", NETWORK)
    assert world.pending() == [NETWORK]


def test_what_would_be_lost_is_shown_before_the_change(walk, world):
    """On the review, and on the page for the number."""
    world.log_in(HOME, 3)
    world.log_in(OFFICE, 9)
    walk.open("add?user=jsmith")
    walk.fill("IP Address", "203.0.113.0/29")
    if not walk.way.scripts:
        walk.press(SEND)
        walk.sees("Is this what you mean?", "This would have refused 3 of 12 recent logins.")
    else:
        walk.waits_for("Understood as")
    walk.press(SEND)
    walk.sees("Confirm the restriction", "This would have refused 3 of 12 recent logins.")
    walk.sees(f"They came from {HOME}")
