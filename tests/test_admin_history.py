"""The history: filters, links and CSV."""

import csv
import io
from typing import Any

import attrs
import pytest

from ipguard import Action, Actor
from ipguard.admin import _listing
from tests.flows import ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE
from tests.pages import Browser, Office
from tests.pages import office as office  # noqa: PLC0414 - a fixture


def fill(office: Office) -> None:
    """Write entries on three days, the first in 2030."""
    held = office.add(OFFICE, label="day 1")
    office.wait(days=1)
    office.guess(office.ask(HOME))
    office.wait(days=1)
    office.delete(held)


def shown(browser: Browser) -> list[str]:
    return browser.page.texts("td:nth-of-type(2)")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))


def test_users_and_the_record_in_words(office: Office):
    """Renamed and moved users, erased logins, and pruned entries, with their particulars."""
    office.add(OFFICE)
    office.log_in(HOME)
    office.store.rename_user("jsmith", "johns")
    office.store.put_users([attrs.evolve(JSMITH, username="johns", account_id="U2")])
    office.flow.forget_sightings(BOSS, "johns")
    anchor = {"kept_from": "3", "token": "ab", "restrictions": "cd", "deleted": "2"}
    with office.store.transaction() as tx:
        tx.append(Action.PRUNE, actor="boss", detail=anchor)
        tx.append(Action.RENAME_USER, actor=None, username="johns")  # without particulars
    boss = office.browser(BOSS, "/history")
    assert shown(boss)[:5] == [
        "What renamed to , with the restrictions",
        "What deleted the entries before 3",
        "What erased the recent logins (addresses: 1)",
        "What moved the user from account U1 to account U2",
        "What renamed jsmith to johns, with the restrictions",
    ]
    assert "entries deleted: 2" in boss.text
    assert "restrictions: cd" not in boss.text


def test_filters(office: Office):
    """The history can be filtered by trader, action and days, all at once."""
    fill(office)
    alice = office.browser(ALICE, "/history")
    every = shown(alice)
    deleted, wrong, asked = (
        f"What deleted {OFFICE}",
        f"What gave a wrong number for {HOME}",
        f"What asked for {HOME}",
    )
    for fields, found in (
        ({"since": "2030-01-02", "until": "2030-01-02"}, [wrong, asked]),
        ({"since": "2030-01-02"}, [deleted, wrong, asked]),
        ({"until": "2030-01-02"}, every[1:]),
        ({"action": "wrong_number"}, [wrong]),
        ({"action": "request", "since": "2030-01-03"}, []),
        ({"user": "jsmith", "action": "request", "until": "2030-01-02"}, [asked]),
        ({"until": "2029-12-31"}, []),
        ({"user": "mary"}, []),
    ):
        empty = dict.fromkeys(("user", "action", "since", "until"), "")
        alice.press("Show", **{**empty, **fields})
        assert shown(alice) == found, fields
        assert found or "Nothing is recorded" in alice.text
        for name, value in fields.items():
            assert name == "action" or alice.page.value(name) == value
        answer = alice.send("GET", alice.address.replace("/history", "/export"))
        assert [f"What {row['What']}" for row in table(answer.text)] == found
    alice.follow("Show all")
    assert shown(alice) == every
    alice.open("/history")
    alice.follow("jsmith")
    assert alice.address == "/user?user=jsmith"


@pytest.mark.parametrize("name", ["since", "until"])
@pytest.mark.parametrize("day", ["yesterday", "2030-02-30", "9999-12-31x"])
def test_an_invalid_day(office: Office, name: str, day: str):
    alice = office.browser(ALICE, "/history")
    alice.press("Show", **{name: day})
    assert "Write the day as 2030-12-31." in alice.page.part(f"{name}-problem")
    assert alice.page.value(name) == day
    alice.open(f"/history?{name}={day}")
    assert alice.answer.status_code == 400
    assert alice.send("GET", f"/export?{name}={day}").status_code == 400


def test_an_invalid_action(office: Office):
    alice = office.browser(ALICE, "/history")
    alice.press("Show", action="teleport")
    assert "Choose an action of the list." in alice.page.part("action-problem")


def test_a_filter_reads_a_bounded_number_of_entries(office: Office, monkeypatch: Any):
    """If a page would need too many reads, "Older" goes on from there; nothing is left out."""
    monkeypatch.setattr(_listing, "_READ_SIZE", 3)
    monkeypatch.setattr(_listing, "_READS", 2)
    monkeypatch.setattr(_listing, "_PAGE_SIZE", 2)
    for n in range(9):
        office.add(f"192.0.2.{n}")
    fill(office)
    reads: list[Any] = []
    history = office.flow.history

    def read(*given: Any, **more: Any) -> Any:
        reads.append(more)
        return history(*given, **more)

    monkeypatch.setattr(office.flow, "history", read)
    alice = office.browser(ALICE, "/history?action=impose")
    found = shown(alice)
    while alice.page.select("[rel=next]"):
        assert len(reads) <= 2
        reads.clear()
        alice.follow("Older")
        found += shown(alice)
    alice.open("/history?action=unlock")
    assert "“Older” searches on." in alice.text
    assert len(found) == len(set(found)) == 10


def test_the_csv_holds_no_formula(office: Office):
    """Cells that a spreadsheet would run begin with an apostrophe; the file is a download."""
    for text in ("=1+1", " +1", "-1", "@x", "\N{FULLWIDTH EQUALS SIGN}1"):
        held = office.add(HOME, label=text)
        office.delete(held, reason=text)
    evil = Actor(username="=cmd", email="x@x.example", manages=frozenset({"U1"}))
    office.flow.request(evil, "jsmith", OFFICE)
    answer = office.browser(ALICE).send("GET", "/export")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"].startswith("attachment; ")
    assert answer.headers["cache-control"] == "no-store"
    rows = table(answer.text)
    assert rows[0]["Actor"] == "'=cmd"
    assert rows[1]["Actor"] == "alice"
    assert rows[1]["Account ID"] == "U1"
    for row in rows:
        for cell in row.values():
            assert cell.lstrip()[:1] not in tuple("=+-@\N{FULLWIDTH EQUALS SIGN}")


def test_the_csv_of_other_accounts(office: Office):
    """The CSV has only what the actor may see, and goes on with `before`."""
    fill(office)
    assert table(office.browser(CAROL).send("GET", "/export?user=jsmith").text) == []
    boss = office.browser(BOSS)
    every = table(boss.send("GET", "/export").text)
    older = table(boss.send("GET", f"/export?before={every[2]['Revision']}").text)
    assert older == every[3:]
