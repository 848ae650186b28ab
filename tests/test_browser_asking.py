"""The form for a restriction in a real browser: proposals, the meaning of a text, errors."""

from datetime import timedelta

import pytest

from tests.flows import ADAM, OFFICE

pytestmark = pytest.mark.slow

TWO_DAYS = timedelta(days=2)


def test_use_my_current_address(walk):
    """The button fills in the actor's address; for IPv6 its /64."""
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
    walk.become(ADAM.username)  # an actor without an address
    walk.open("add")
    walk.misses("Use my current address")


def test_what_was_understood(walk, world):
    """The page shows what a text means, while it is typed or on a page of its own."""
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
    """Each error is shown at its field, and the values stay."""
    walk.open("add")
    typed = {"IP Address": "203.0.113.3/29", "Label (optional)": "my “office”"}
    for label, text in typed.items():
        walk.fill(label, text)
    walk.fill("Expires (UTC, optional)", "2029-12-31T10:00")
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
