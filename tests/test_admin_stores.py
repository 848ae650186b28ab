"""The page over each store: its pages and concurrent deletions."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows import ADAM, ALICE, HOME, OFFICE
from tests.pages import Office, query
from tests.postgres import fresh_schema


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def office(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Office]:
    """An office for each store."""
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        it = Office(None, "asgi", url=server.url(schema=fresh_schema()))
    else:
        it = Office(tmp_path / "office.db" if request.param == "sqlite" else None, "asgi")
    with it.store:
        yield it


def test_all_pages(office: Office):
    """List, search, request, confirm, check, delete and history."""
    alice = office.browser(ALICE)
    alice.follow("Add IP Address Restriction")
    alice.press("Submit", user="jsmith", addresses="203.0.113.0/29", label="office")
    alice.press("Submit")
    alice.press("Submit", number=office.outbox.number_for(query(alice.address)["request"]))
    assert "now holds" in alice.page.part("note")
    alice.open("/")
    alice.press("Search", search=OFFICE)
    assert "John Smith" in alice.text
    assert "Mary" not in alice.text
    alice.follow("John Smith")
    alice.follow("Check an address")
    alice.press("Check", address=HOME)
    assert "not allowed" in alice.page.part("verdict-head")
    alice.open("/user?user=jsmith")
    alice.follow("Delete")
    alice.press("Delete", open="accept", reason="moved")
    assert office.held() == []
    alice.open("/history?user=jsmith")
    assert "reason: moved" in alice.text


def test_two_concurrent_deletions_of_the_last_two(office: Office, rounds: Any, monkeypatch: Any):
    """One of two concurrent deletions succeeds; the other one gets the warning."""
    met, real = threading.Barrier(2, timeout=60), office.flow.delete

    def delete(*args: Any, **more: Any) -> Any:
        met.wait()  # both forms have passed the check of their versions
        return real(*args, **more)

    for _ in range(rounds(5, 200)):
        monkeypatch.setattr(office.flow, "delete", real)
        for restriction in office.store.load_policy("jsmith").restrictions:
            office.delete(restriction)
        browsers = [
            office.browser(who, f"/delete?user=jsmith&restriction={office.add(what).id}")
            for who, what in ((ALICE, OFFICE), (ADAM, HOME))
        ]
        for browser in browsers:
            browser.open(browser.address)  # now that both restrictions exist
        monkeypatch.setattr(office.flow, "delete", delete)
        threads = [threading.Thread(target=b.press, args=("Delete",)) for b in browsers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(office.held()) == 1
        (asked,) = (b for b in browsers if b.page.part("changed"))
        assert "Every address" in asked.text
        assert "deleted" in asked.page.part("changed")
