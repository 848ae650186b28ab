"""Refused forms: a redirect to a page that shows the submitted values and the problems."""

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urljoin

import pytest

from ipguard import Workflow
from ipguard.admin._context import Signer
from tests.flows import ADAM, ALICE, BOSS, HOME, KEY, OFFICE
from tests.pages import Browser, Office, query
from tests.pages import each_office as each_office  # noqa: PLC0414 - a fixture
from tests.pages import office as office  # noqa: PLC0414 - a fixture


def open_delete(office: Office) -> Browser:
    restriction = office.add(OFFICE)
    return office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")


def open_confirm(office: Office, username: str = "jsmith", addresses: str = OFFICE) -> Browser:
    request = office.ask(addresses, username, allow_lockout=True)
    return office.browser(ALICE, f"/confirm?user={username}&request={request.id}")


def open_lockout_warning(office: Office) -> Browser:
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="alice", addresses=HOME)
    return alice


Fields = dict[str, str]
REFUSED: dict[str, tuple[str | Callable[[Office], Browser], str, Fields, str, str]] = {
    "add": (
        "/add",
        "Submit",
        {"user": "jsmith", "addresses": "10.0.0.0/33", "label": "café"},
        "is not accepted",
        "addresses",
    ),
    "review": ("/add", "Submit", {"user": "jsmith", "addresses": "10.1.0.0/24"}, "It means", ""),
    "lockout": ("/add", "Submit", {"user": "alice", "addresses": HOME}, "lock yourself out", ""),
    "lockout not accepted": (open_lockout_warning, "Submit", {}, "Tick the box", ""),
    "current address": ("/add", "Use my", {"label": "here"}, "", "label"),
    "confirm": (open_confirm, "Submit", {"number": "11111-11111"}, "This is not the number.", ""),
    "not a number": (open_confirm, "Submit", {"number": "none"}, "No attempt was counted.", ""),
    "delete": (open_delete, "Delete", {"reason": "moved"}, "Tick the box", "reason"),
    "resend": (open_confirm, "Send a new number", {}, "Try again in 30 seconds", ""),
    "check": ("/check?user=jsmith", "Check", {"address": "::/0"}, "is not accepted", "address"),
    "search": ("/", "Search", {"search": "a\x00"}, "What you search for", "search"),
    "history": ("/history", "Show", {"user": "nobody"}, "nothing of such a trader", "user"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_form_redirects(each_office: Office, case: str):
    """The page of the redirect shows the values and the message; reloading it changes nothing."""
    start, button, fields, message, field = REFUSED[case]
    office = each_office
    browser = office.browser(ALICE, start) if isinstance(start, str) else start(office)
    form = browser.page.form(button)
    answer = browser.submit(urljoin(browser.address, form.action), {**form.fields, **fields})
    assert answer.status_code == 303
    browser.open(urljoin(browser.address, answer.headers["location"]))
    assert browser.answer.status_code == 200
    assert message in browser.text
    if field:
        assert browser.page.value(field) == fields[field]
    with office.unchanged():
        for _ in range(3):
            browser.open(browser.address)
            assert message in browser.text or case == "resend"  # a message is shown once
    for line in (browser.address, *browser.cookies.values()):
        for typed in fields.values():
            assert typed in ("jsmith", "alice", "here", "none") or typed not in line


@pytest.mark.parametrize("text", ["12345", "12345-6789x", "x" * 40, "12345 67890 1", "\u200b"])
def test_a_typing_error_costs_no_attempt(office: Office, text: str):
    """Text that cannot be a number is told apart from a wrong one."""
    alice = open_confirm(office)
    with office.unchanged():
        alice.press("Submit", number=text)
    assert "The confirmation number " in alice.page.part("number-problem")
    assert "No attempt was counted." in alice.page.part("number-problem")
    assert "5 attempts left." in alice.page.part("number-state")


def test_no_number_in_urls_and_cookies(office: Office, monkeypatch: Any):
    kept: list[str] = []
    alice = open_confirm(office, "alice", HOME)
    request = office.request_of(query(alice.address)["request"])
    numbers = [office.wrong(request), office.number(request)]
    sign = Signer.sign

    def record(*args: Any, **more: Any) -> str:
        kept.append(str(args))
        return sign(*args, **more)

    monkeypatch.setattr(Signer, "sign", record)
    for number in numbers:
        alice.press("Submit", number=number)  # the right one would lock the actor out
        assert number not in alice.answer.text
    assert "lock yourself out" in alice.text
    assert len(kept) > 2
    for number in numbers:
        for text in (number, number.replace("-", "")):
            assert not [line for line in (*alice.log, *kept) if text in line]


def test_an_invalid_draft_is_ignored(office: Office, monkeypatch: Any):
    """A draft that was altered, is old, or is of another page, actor or browser is ignored."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", addresses="10.0.0.0/33", label="kept")
    good = query(alice.address)["again"]
    assert alice.page.value("label") == "kept"
    flipped = good[:-3] + ("A" if good[-3] != "A" else "B") + good[-2:]
    for text in (flipped, good[:-4], good + "AAAA", "A" * 90, "", "=", "é", "..", "x" * 9_000):
        alice.open(f"/add?{urlencode({'again': text})}")
        assert alice.answer.status_code == 200
        assert alice.page.value("label") == ""
        assert "problems" not in alice.page.ids
    for path in (f"/history?again={good}", f"/?again={good}", f"/add?user=jsmith&again={good}"):
        alice.open(path)
        assert "problems" not in alice.page.ids, path
    for actor, cookies in ((ADAM, alice.cookies), (ALICE, {})):
        other = office.stranger(actor)
        other.cookies = dict(cookies)
        other.open(f"/add?again={good}")
        assert other.page.value("label") == ""
    now = time.time()
    for seconds, label in ((-60, "kept"), (3_601, "")):  # another server's clock may be behind
        monkeypatch.setattr(time, "time", lambda late=now + seconds: late)
        alice.open(f"/add?again={good}")
        assert alice.page.value("label") == label


def test_the_draft_of_another_server(office: Office):
    """Servers that share a key read each other's drafts and forms, also during key rotation."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", addresses="x", label="kept")
    for keys, label in (((b"n" * 32, KEY), "kept"), (b"n" * 32, "")):
        other = office.stranger(ALICE, Workflow(office.store, office.outbox, key=keys))
        other.cookies = alice.cookies
        other.open(alice.address)
        assert other.page.value("label") == label
        other.post("/add", alice.page.form("Submit").fields)
        assert (other.answer.status_code == 403) is (label == "")


@pytest.mark.parametrize("char", ["x", "ш", "漢", "😀", '"'])
def test_the_length_of_a_draft(office: Office, char: str):
    """URLs stay below what servers accept; as much of the values as fits is kept."""
    alice = office.browser(ALICE, "/add")
    noise = "".join(char if n % 3 else chr(0x4E00 + n * 7) for n in range(2_000))
    alice.press("Submit", addresses=char * 256, label=noise, expires_at="x" * 5_000)
    assert len(alice.address) < 3_000
    assert alice.page.part("label-problem")
    assert alice.page.value("addresses").startswith(char)
    office.add(HOME)
    alice = open_delete(office)
    alice.press("Delete", reason=char * 501)
    assert alice.page.value("reason") == char * 501


def test_a_form_that_is_submitted_twice(office: Office):
    """If the response was lost, the form can be submitted again: nothing is done twice."""
    alice = office.browser(ALICE, "/add")
    fields = {**alice.page.form("Submit").fields, "user": "jsmith", "addresses": OFFICE}
    alice.submit("/add", fields)  # its response is lost
    alice.post("/add", fields)
    assert "You have asked for this already." in alice.page.part("note")
    assert len(office.outbox.messages) == 1
    request = office.request_of(query(alice.address)["request"])
    resend = alice.page.form("Send a new number").fields
    alice.post("/resend", resend)
    # Times have no seconds, so "after 12:00 UTC" at 12:00 would be useless.
    assert alice.page.part("note").endswith("Try again in 30 seconds.")
    office.wait(minutes=1)
    alice.submit("/resend", resend)
    alice.post("/resend", resend)
    assert "A number was sent a moment ago." in alice.page.part("note")
    assert len(office.outbox.messages) == 2
    confirm = {**alice.page.form("Submit").fields, "number": office.number(request)}
    alice.submit("/confirm", confirm)
    alice.post("/confirm", confirm)
    assert f"You confirmed {OFFICE}" in alice.page.part("over")
    alice.open("/")
    alice.follow("Delete")
    delete = {**alice.page.form("Delete").fields, "open": "accept"}
    alice.submit("/delete", delete)
    alice.post("/delete", delete)
    assert f"You deleted {OFFICE}" in alice.page.part("over")
    assert [row.action for row in office.rows()].count("confirm") == 1


def test_a_ticked_box_stays_ticked(office: Office):
    """A ticked box is kept with the form unless its meaning has changed."""
    alice = open_delete(office)
    alice.press("Delete", open="accept", reason="x" * 501)
    assert "The reason has more than 500 characters." in alice.page.part("reason-problem")
    assert alice.page.field("open").has_attr("checked")
    other = office.add(HOME)
    alice.press("Delete", open="accept", reason="x")
    assert "boss imposed" in alice.page.part("changed")
    office.flow.lift(BOSS, other.id, reason="x")
    alice.press("Delete")
    assert "boss lifted" in alice.page.part("changed")
    assert not alice.page.field("open").has_attr("checked")


def test_a_user_removed_before_the_review(office: Office):
    """The review of a removed trader becomes the form, with the error."""
    boss = office.browser(BOSS, "/add")
    boss.press("Submit", user="mary", addresses="10.1.0.0/24")
    assert "It means" in boss.text
    office.store.remove_users(["mary"])
    boss.open(boss.address)
    assert "There is no such trader among yours." in boss.page.part("user-problem")
    assert boss.page.value("addresses") == "10.1.0.0/24"


@pytest.mark.parametrize("path", ["/confirm", "/resend", "/cancel", "/delete"])
def test_an_id_that_is_too_long(office: Office, path: str):
    """A long id does not get into a URL."""
    alice = office.browser(ALICE, "/add")
    token = alice.page.form("Submit").fields["token"]
    fields = {"token": token, "user": "jsmith", "request": "1" * 9_000, "restriction": "1" * 9_000}
    alice.post(path, fields)
    assert alice.answer.status_code == 404
    assert len(alice.address) < 200
