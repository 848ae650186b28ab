"""The page over each store: the same everywhere, whoever the users are called."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipguard import Actor, UnknownUser, User, UsernameError, canonical_username
from ipguard.admin._http import Request
from ipguard.admin._site import Site
from ipguard.admin._visit import Visit
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, OFFICE
from tests.pages import Office, query
from tests.postgres import fresh_schema


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def office(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Office]:
    """An office over each store."""
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        it = Office(None, "asgi", url=server.url(schema=fresh_schema()))
    else:
        it = Office(tmp_path / "office.db" if request.param == "sqlite" else None, "asgi")
    with it.store:
        yield it


def test_the_whole_way(office: Office):
    """List, search, request, number, check, delete and history."""
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


def test_the_last_two_deleted_by_two_at_once(office: Office, rounds: Any, monkeypatch: Any):
    """Two administrators at one instant: one restriction goes, and who sent the other is asked."""
    met, real = threading.Barrier(2, timeout=60), office.flow.delete

    def delete(*args: Any, **more: Any) -> Any:
        met.wait()  # by now each form was found to be as its sender saw it
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
            browser.open(browser.address)  # once both are there
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


def visit(office: Office, actor: Actor) -> Visit:
    request = Request(
        method="GET", prefix="", path="/", query="", headers={}, cookies={}, https=False
    )
    return Visit(Site(office.flow, office.guard, "x", lambda _: None), request, actor)


def test_one_user_is_found_among_all(office: Office, rounds: Any):
    """A user is found by its name in any spelling, exactly, and only by who manages it."""
    names: set[str] = set()
    odd = "ab\u00e9\u0131\ud7ff\ufffd\U0001f600 ~!"

    @settings(
        max_examples=rounds(25, 500),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.text(odd, min_size=1, max_size=6), st.booleans())
    def found(text: str, own: bool) -> None:
        try:
            name = canonical_username(text)
        except UsernameError:
            with pytest.raises(UnknownUser):
                visit(office, BOSS).person(text)
            return
        if name not in names:
            with pytest.raises(UnknownUser):
                visit(office, BOSS).person(text)
            office.store.put_users(
                [User(username=name, full_name="N", account_id="U1" if own else "U2")]
            )
            names.add(name)
        line = visit(office, BOSS).person(text)
        assert line.user.username == name
        actor, other = (ALICE, CAROL) if line.user.account_id == "U1" else (CAROL, ALICE)
        assert visit(office, actor).person(text) == line
        with pytest.raises(UnknownUser):
            visit(office, other).person(text)

    found()
    assert names
