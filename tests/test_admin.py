"""The page: the original's three procedures, and what its users would expect, on both adapters."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipguard import Guard
from tests.flows import ALICE, OFFICE, Desk
from tests.pages import ADAPTERS, Browser, query


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    it = Desk(tmp_path / "desk.db")
    with it.store:
        yield it


@pytest.fixture
def guard(desk: Desk) -> Guard:
    return Guard(desk.store, monotonic=desk.clock.monotonic)


@pytest.fixture(params=ADAPTERS)
def alice(request: pytest.FixtureRequest, desk: Desk, guard: Guard) -> Browser:
    """The browser of an administrator of account U1, at the list."""
    browser = Browser(desk.flow, guard, ALICE, request.param, prefix="/ip")
    browser.open("/")
    return browser


def test_add_a_restriction(alice: Browser, desk: Desk, guard: Guard):
    """The original's first procedure: the link, the form, the number by mail; then it holds."""
    alice.follow("Add IP Address Restriction")
    assert alice.page.labels["Trader"] == "user"
    assert alice.page.labels["IP Address"] == "addresses"
    alice.press("Submit", user="jsmith", addresses=OFFICE, label="office")
    assert "You will receive an email" in alice.page.part("note")
    assert alice.page.labels["Confirmation Number"] == "number"
    assert desk.held() == []
    number = desk.outbox.number_for(query(alice.address)["request"])
    alice.press("Submit", number=number)
    assert alice.answer.status == 200
    assert f"{OFFICE} now holds." in alice.page.part("note")
    assert "John Smith can log in only from: 203.0.113.7." in alice.page.part("note")
    assert desk.held() == [OFFICE]
    assert guard.is_allowed("jsmith", OFFICE)
    assert not guard.is_allowed("jsmith", "203.0.113.8")


def test_delete_a_restriction(alice: Browser, desk: Desk):
    """The original's second procedure: the Delete link beside an address; it holds no longer."""
    desk.add("203.0.113.0/29")
    desk.add("198.51.100.7", label="home")
    alice.open("/")
    alice.follow("Delete 198.51.100.7 of John Smith")
    alice.press("Delete", reason="moved")
    assert "198.51.100.7 was deleted." in alice.page.part("note")
    assert desk.held() == ["203.0.113.0/29"]
    assert "reason=moved" in desk.rows()[0].detail


def test_cancel_a_request(alice: Browser, desk: Desk):
    """The original's third procedure: the Cancel link beside a pending address."""
    request = desk.ask()
    alice.open("/")
    alice.press(f"Cancel the request for {OFFICE} of John Smith")
    assert desk.request(request).state == "cancelled"
    assert "The request to add 203.0.113.7 was cancelled." in alice.page.part("note")


def test_confirm_from_the_list(alice: Browser, desk: Desk):
    """The original's third procedure: the Confirm link beside a pending address."""
    request = desk.ask()
    alice.open("/")
    alice.follow(f"Confirm {OFFICE} for John Smith")
    alice.press("Submit", number=desk.number(request))
    assert desk.held() == [OFFICE]


def test_the_list(alice: Browser, desk: Desk):
    """All users of the actor's accounts, with all that the original shows and in its words."""
    desk.add("203.0.113.0/29")
    desk.ask("198.51.100.7", username="mary")
    alice.open("/")
    heads = [words for tag, words in alice.page.headings if tag == "th"]
    assert heads[:4] == ["Trader", "Account ID", "Restrictions", "Pending Requests"]
    for words in ("John Smith jsmith", "Mary Major mary", "Alice Adams alice"):
        assert words in heads
    assert "Zed" not in alice.text
    assert "U1" in alice.text
    assert alice.text.count("No restrictions") == 2
    assert "203.0.113.0/29" in alice.text
    assert "198.51.100.7" in alice.text
