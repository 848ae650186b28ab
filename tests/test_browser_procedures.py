"""The three procedures of an IP restrictions page, in a real browser, in every combination."""

import re

import pytest


def test_add_a_restriction(walk, world):
    """The link, the drop-down, the address, Submit and the number: the restriction holds."""
    walk.open()
    assert walk.heading == "IP Restrictions"
    row = walk.row("jsmith")
    walk.sees("John Smith", "jsmith", "U1", "No restrictions", within=row)

    walk.follow("Add IP Address Restriction")
    walk.field("Trader").select_option("jsmith")
    walk.fill("IP Address", "203.0.113.7")
    walk.press("Send confirmation number")
    walk.sees("You will receive an email with a confirmation number", "203.0.113.7: 1 address")
    assert world.held() == []

    number = world.next_number()
    walk.sees("Logins of John Smith: Today from anywhere; then only from 203.0.113.7.")
    walk.sees("sent to a…e@firm.example")
    walk.fill("Confirmation Number", number)
    walk.press("Confirm restriction")
    walk.sees("203.0.113.7 now holds", "John Smith can log in only from: 203.0.113.7")
    assert world.held() == ["203.0.113.7"]
    assert world.guard.is_allowed("jsmith", "203.0.113.7")
    assert not world.guard.is_allowed("jsmith", "203.0.113.8")
    assert world.notices() == 2  # to the requester and the user
    assert number not in walk.page.url

    walk.open()
    walk.sees("203.0.113.7", "Delete", within=walk.row("jsmith"))
    walk.misses("No restrictions", "Confirm", within=walk.row("jsmith"))


@pytest.mark.slow
def test_delete_a_restriction(walk, world):
    """The Delete link of an address ends its restriction."""
    world.add("203.0.113.7")
    world.add("198.51.100.0/29", label="office")
    walk.open()
    row = walk.row("jsmith")
    walk.sees("203.0.113.7", "198.51.100.0/29", "office", within=row)
    assert row.get_by_role("link", name=re.compile("^Delete ")).count() == 2

    walk.follow("Delete 203.0.113.7 of John Smith")
    walk.sees("203.0.113.7: 1 address", "198.51.100.0/29")
    walk.fill("Reason (optional)", "moved")
    walk.press("Delete restriction")
    walk.sees("203.0.113.7 was deleted", "John Smith can log in only from: 198.51.100.0/29")
    assert world.held() == ["198.51.100.0/29"]
    assert not world.guard.is_allowed("jsmith", "203.0.113.7")

    walk.open()
    walk.misses("203.0.113.7", within=walk.row("jsmith"))


@pytest.mark.slow
def test_confirm_or_cancel_a_pending_request(walk, world):
    """The column Pending Requests has Confirm and Cancel for each address, and they work."""
    world.ask("203.0.113.7")
    number = world.next_number()
    world.ask("198.51.100.7")
    walk.open()
    row = walk.row("jsmith")
    walk.sees("No restrictions", "203.0.113.7", "198.51.100.7", "Confirm", "Cancel", within=row)

    walk.follow("Confirm 203.0.113.7 for John Smith")
    walk.fill("Confirmation Number", number.replace("-", " "))
    walk.press("Confirm restriction")
    assert world.held() == ["203.0.113.7"]
    assert world.pending() == ["198.51.100.7"]

    walk.open()
    walk.press("Cancel the request for 198.51.100.7 of John Smith")
    walk.sees("The request to add 198.51.100.7 was cancelled")
    assert world.pending() == []
    walk.open()
    walk.misses("198.51.100.7", "Confirm", within=walk.row("jsmith"))
    assert world.held() == ["203.0.113.7"]
