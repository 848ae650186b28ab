"""Forms that are refused: a redirect to a page that shows what was typed and what is wrong."""

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urljoin

import pytest

from ipguard import Workflow
from ipguard.admin._signing import PURPOSE, Signer
from tests.flows import ADAM, ALICE, BOSS, HOME, KEY, OFFICE
from tests.pages import Answer, Browser, Office, query
from tests.pages import office as office  # noqa: PLC0414 - a fixture

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def refuse(browser: Browser, button: str, **fields: str) -> Answer:
    """Send the form of a button and return the answer itself; the browser follows the redirect."""
    form, more = browser.form(button)
    body = urlencode({**form.fields, **fields, **more}).encode()
    answer = browser.send("POST", urljoin(browser.address, form.action), body, FORM)
    browser.open(urljoin(browser.address, answer.header("location")))
    return answer


def adding(office: Office) -> Browser:
    return office.browser(ALICE, "/add")


def deleting(office: Office) -> Browser:
    restriction = office.add(OFFICE)
    return office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")


def confirming(office: Office, username: str = "jsmith", addresses: str = OFFICE) -> Browser:
    request = office.ask(addresses, username, allow_lockout=True)
    return office.browser(ALICE, f"/confirm?user={username}&request={request.id}")


def locked_out(office: Office) -> Browser:
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="alice", addresses=HOME)
    return alice


def checking(office: Office) -> Browser:
    return office.browser(ALICE, "/check?user=jsmith")


Fields = dict[str, str]
REFUSED: dict[str, tuple[Callable[[Office], Browser], str, Fields, str, str]] = {
    "add": (
        adding,
        "Submit",
        {"user": "jsmith", "addresses": "10.0.0.0/33", "label": "café"},
        "is not accepted",
        "addresses",
    ),
    "review": (adding, "Submit", {"user": "jsmith", "addresses": "10.1.0.0/24"}, "It means", ""),
    "lockout": (adding, "Submit", {"user": "alice", "addresses": HOME}, "lock yourself out", ""),
    "lockout not accepted": (locked_out, "Submit", {}, "Tick the box", ""),
    "current address": (adding, "Use my", {"label": "here"}, "", "label"),
    "confirm": (confirming, "Submit", {"number": "11111-11111"}, "This is not the number.", ""),
    "not a number": (confirming, "Submit", {"number": "none"}, "No attempt was counted.", ""),
    "delete": (deleting, "Delete", {"reason": "moved"}, "Tick the box", "reason"),
    "resend": (confirming, "Send a new number", {}, "Try again in 30 seconds", ""),
    "check": (checking, "Check", {"address": "10.0.0.0/8"}, "is not accepted", "address"),
    "search": (
        lambda office: office.browser(ALICE),
        "Search",
        {"search": "a\x00"},
        "What you search for",
        "search",
    ),
    "history": (
        lambda office: office.browser(ALICE, "/history"),
        "Show",
        {"user": "nobody"},
        "nothing of such a trader",
        "user",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_form_is_answered_by_a_redirect(office: Office, case: str):
    """What was typed and the message are on the page of a GET; reloading it changes nothing."""
    start, button, fields, message, field = REFUSED[case]
    browser = start(office)
    answer = refuse(browser, button, **fields)
    assert answer.status == 303
    assert browser.answer.status == 200
    assert message in browser.text
    if field:
        assert browser.page.inputs[field]["value"] == fields[field]
    with office.unchanged():
        for _ in range(3):
            browser.open(browser.address)
            assert message in browser.text or case == "resend"  # a message, which is shown once
    for line in (browser.address, *browser.cookies.values()):
        for typed in fields.values():
            assert typed in ("jsmith", "alice", "here", "none") or typed not in line


def test_reloading_after_a_wrong_number_is_no_guess(office: Office):
    """One wrong number costs one attempt, however often its page is loaded again."""
    alice = confirming(office)
    alice.press("Submit", number="11111-11111")
    for _ in range(6):
        alice.open(alice.address)
        assert "4 attempts left." in alice.page.part("number-state")
        assert "This is not the number." in alice.page.part("number-problem")


@pytest.mark.parametrize(
    "text", ["12345", "12345-6789x", "١٢٣", "x" * 40, "12345 67890 1", "\u200b"]
)
def test_a_typing_error_costs_no_attempt(office: Office, text: str):
    """Text that cannot be a number is told apart from a wrong one; both can be tried again."""
    alice = confirming(office)
    with office.unchanged():
        alice.press("Submit", number=text)
    assert "The confirmation number " in alice.page.part("number-problem")
    assert "No attempt was counted." in alice.page.part("number-problem")
    assert "5 attempts left." in alice.page.part("number-state")


def test_a_number_is_in_no_url_and_no_cookie(office: Office):
    """Neither a wrong nor a right one, refused for whatever reason, nor what a page shows."""
    alice = confirming(office, "alice", HOME)
    request = office.request_of(query(alice.address)["request"])
    numbers = [office.wrong(request), office.number(request)]
    for number in numbers:
        alice.press("Submit", number=number)  # the right one would lock the actor out
        assert number not in alice.answer.text
    assert "lock yourself out" in alice.text
    draft = unsealed(office, alice)
    for number in numbers:
        for text in (number, number.replace("-", "")):
            assert not [url for url in alice.log if text in url]
            assert text not in str(draft)
            assert text not in str(alice.cookies)


def unsealed(office: Office, browser: Browser) -> bytes:
    """Return what the URL of a page holds, as its server reads it."""
    signer = Signer(office.flow._derived_keys(PURPOSE))
    asked = query(browser.address)
    where = browser.address.removeprefix("/").partition("&again=")[0]
    session = browser.cookies["ipguard-form"]
    found = signer.unseal("draft", asked["again"], where, session, "alice")
    assert found is not None
    return found


def test_two_tabs_keep_their_own_forms(office: Office):
    """What one tab typed and was told is not in the other."""
    alice = adding(office)
    alice.press("Submit", addresses="10.0.0.0/33", label="first")
    first = alice.address
    alice.open("/add")
    alice.press("Submit", addresses="10.0.0.0/34", label="second")
    second = alice.address
    for path, label in ((first, "first"), (second, "second"), (first, "first")):
        alice.open(path)
        assert alice.page.inputs["label"]["value"] == label


def test_a_draft_that_is_not_this_pages(office: Office, monkeypatch: Any):
    """One that was altered, is old, or is of another form, actor or browser is ignored."""
    alice = adding(office)
    alice.press("Submit", addresses="10.0.0.0/33", label="kept")
    good = query(alice.address)["again"]
    assert alice.page.inputs["label"]["value"] == "kept"
    flipped = good[:-3] + ("A" if good[-3] != "A" else "B") + good[-2:]
    for text in (flipped, good[:-4], good + "AAAA", "A" * 90, "", "=", "é", "x" * 9_000):
        alice.open(f"/add?{urlencode({'again': text})}")
        assert alice.answer.status == 200
        assert alice.page.inputs["label"]["value"] == ""
        assert "problems" not in alice.page.ids
    for path in (f"/history?again={good}", f"/?again={good}", f"/add?user=jsmith&again={good}"):
        alice.open(path)
        assert "problems" not in alice.page.ids, path
    for actor, cookies in ((ADAM, alice.cookies), (ALICE, {})):
        other = office.stranger(actor)
        other.cookies = dict(cookies)
        other.open(f"/add?again={good}")
        assert other.page.inputs["label"]["value"] == ""
    late = time.time() + 3_601
    monkeypatch.setattr(time, "time", lambda: late)
    alice.open(f"/add?again={good}")
    assert alice.page.inputs["label"]["value"] == ""


def test_a_draft_of_another_server(office: Office):
    """The servers behind a balancer read what any of them wrote, also while keys are rotated."""
    alice = adding(office)
    alice.press("Submit", addresses="x", label="kept")
    newer = office.stranger(ALICE, Workflow(office.store, office.outbox, key=(b"n" * 32, KEY)))
    newer.cookies = alice.cookies
    newer.open(alice.address)
    assert newer.page.inputs["label"]["value"] == "kept"
    foreign = office.stranger(ALICE, Workflow(office.store, office.outbox, key=b"n" * 32))
    foreign.cookies = alice.cookies
    foreign.open(alice.address)
    assert foreign.page.inputs["label"]["value"] == ""


@pytest.mark.parametrize("char", ["x", "ш", "漢", "😀", '"'])
def test_a_draft_is_bounded(office: Office, char: str):
    """URLs stay below what servers accept; as much of what was typed is kept as fits."""
    alice = adding(office)
    alice.press("Submit", addresses=char * 256, label=char * 1_500, expires_at="x" * 5_000)
    assert len(alice.address) < 3_000
    assert alice.page.part("label-problem")
    assert alice.page.inputs["addresses"]["value"].startswith(char)
    # A reason of the greatest length, refused for its sake alone, is there in full.
    office.add(HOME)
    alice = deleting(office)
    alice.press("Delete", reason=char * 501)
    assert alice.page.inputs["reason"]["value"].startswith(char * (501 if char < "漢" else 250))


def test_a_form_that_is_sent_twice(office: Office):
    """A form whose answer never came can be sent again: nothing is done twice, each is said."""
    alice = adding(office)
    form, _ = alice.form("Submit")
    fields = {**form.fields, "user": "jsmith", "addresses": OFFICE}
    alice.send("POST", "/add", urlencode(fields).encode(), FORM)  # the answer is lost
    alice.post("/add", fields)
    assert "You have asked for this already." in alice.page.part("note")
    request = office.request_of(query(alice.address)["request"])
    resend = alice.form("Send a new number")[0].fields
    office.wait(minutes=1)
    mails = len(office.outbox.messages)
    alice.send("POST", "/resend", urlencode(resend).encode(), FORM)
    alice.post("/resend", resend)
    assert "A number was sent a moment ago." in alice.page.part("note")
    assert len(office.outbox.messages) == mails + 1
    confirm = {**alice.form("Submit")[0].fields, "number": office.number(request)}
    alice.send("POST", "/confirm", urlencode(confirm).encode(), FORM)
    alice.post("/confirm", confirm)
    assert f"You confirmed {OFFICE}" in alice.page.part("over")
    alice.open("/")
    alice.follow("Delete")
    delete = {**alice.form("Delete")[0].fields, "open": "accept"}
    alice.send("POST", "/delete", urlencode(delete).encode(), FORM)
    alice.post("/delete", delete)
    assert f"You deleted {OFFICE}" in alice.page.part("over")
    assert [row.action for row in office.rows()].count("confirm") == 1


def test_a_delete_that_was_ticked_stays_ticked(office: Office):
    """An explicit choice is kept with the rest of the form, unless its meaning has changed."""
    alice = deleting(office)
    alice.press("Delete", open="accept", reason="x" * 501)
    assert "checked" in alice.page.inputs["open"]
    other = office.add(HOME)
    alice.press("Delete", open="accept", reason="x")
    assert "boss imposed" in alice.page.part("changed")
    office.flow.lift(BOSS, other.id, reason="x")
    alice.press("Delete", open="accept") if "open" in alice.page.inputs else alice.press("Delete")
    assert "boss lifted" in alice.page.part("changed")
    assert "checked" not in alice.page.inputs["open"]


def test_a_user_who_goes_between_the_pages(office: Office):
    """The review of a trader that was removed since becomes the form, which says so."""
    boss = office.browser(BOSS, "/add")
    boss.press("Submit", user="mary", addresses="10.1.0.0/24")
    assert "It means" in boss.text
    office.store.remove_users(["mary"])
    boss.open(boss.address)
    assert "There is no such trader among yours." in boss.page.part("user-problem")
    assert boss.page.inputs["addresses"]["value"] == "10.1.0.0/24"


@pytest.mark.parametrize("path", ["/confirm", "/resend", "/cancel", "/delete"])
def test_an_id_that_is_far_too_long(office: Office, path: str):
    """It goes into no URL."""
    alice = adding(office)
    token = alice.form("Submit")[0].fields["token"]
    body = {"token": token, "user": "jsmith", "request": "1" * 9_000, "restriction": "1" * 9_000}
    assert alice.send("POST", path, urlencode(body).encode(), FORM).status == 404
