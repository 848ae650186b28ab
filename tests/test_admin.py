"""The page: the original's three procedures, and what its users would expect, on both adapters."""

import json
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import pytest

from ipguard import Actor, Decision, Explanation, Reason, User
from ipguard.admin import _texts
from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE
from tests.pages import Browser, Office, query
from tests.pages import office as office  # noqa: PLC0414 - a fixture


def asked(browser: Browser) -> str:
    """Return the id of the request whose number the page asks for."""
    assert browser.page.labels["Confirmation Number"] == "number"
    return query(browser.address)["request"]


# -- the original's procedures


def test_add_a_restriction(office: Office):
    """The link, the form, the number by mail; once it is entered the restriction holds."""
    alice = office.browser(ALICE, prefix="/ip")
    alice.follow("Add IP Address Restriction")
    assert alice.page.labels["Trader"] == "user"
    assert alice.page.labels["IP Address"] == "addresses"
    alice.press("Submit", user="jsmith", addresses=OFFICE, label="office")
    assert "You will receive an email" in alice.page.part("note")
    assert office.held() == []
    alice.press("Submit", number=office.outbox.number_for(asked(alice)))
    assert alice.answer.status == 200
    assert alice.page.part("note") == (
        f"{OFFICE} now holds. John Smith can log in only from: {OFFICE}."
    )
    assert office.held() == [OFFICE]
    assert office.guard.is_allowed("jsmith", OFFICE)
    assert not office.guard.is_allowed("jsmith", "203.0.113.8")


def test_delete_a_restriction(office: Office):
    """The Delete link beside an address; it holds no longer."""
    office.add("203.0.113.0/29")
    office.add(HOME, label="home")
    alice = office.browser(ALICE)
    alice.follow(f"Delete {HOME} of John Smith")
    alice.press("Delete", reason="moved")
    assert alice.page.part("note") == (
        f"{HOME} was deleted. John Smith can log in only from: 203.0.113.0/29."
    )
    assert office.held() == ["203.0.113.0/29"]
    assert office.rows()[0].detail["reason"] == "moved"


def test_cancel_a_request(office: Office):
    """The Cancel link beside a pending address."""
    request = office.ask()
    alice = office.browser(ALICE)
    alice.press(f"Cancel the request for {OFFICE} of John Smith")
    assert office.request(request).state == "cancelled"
    assert alice.page.part("note") == f"The request to add {OFFICE} was cancelled."


def test_confirm_from_the_list(office: Office):
    """The Confirm link beside a pending address."""
    request = office.ask()
    alice = office.browser(ALICE)
    alice.follow(f"Confirm {OFFICE} for John Smith")
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


# -- the list


def test_the_list(office: Office):
    """All users of the actor's accounts, with all that the original shows and in its words."""
    office.add("203.0.113.0/29", label="office")
    office.ask(HOME, username="mary")
    alice = office.browser(ALICE)
    heads = [words for tag, words in alice.page.headings if tag == "th"]
    assert heads[:4] == ["Trader", "Account ID", "Restrictions", "Pending Requests"]
    assert heads[4:] == ["Alice Adams alice", "John Smith jsmith", "Mary Major mary"]
    assert alice.text.count("No restrictions") == 2
    assert "203.0.113.0/29 office" in alice.text
    assert HOME in alice.text


def test_a_user_with_very_many(office: Office):
    """The list shows ten restrictions of a user and says how many more; the user's page all."""
    office.use(restrictions_per_user=1000)
    office.flow.impose_many(BOSS, [("jsmith", f"10.0.{n}.0/24") for n in range(200)], reason="x")
    alice = office.browser(ALICE)
    assert alice.text.count("Delete") == 10
    alice.follow("190 more of John Smith")
    assert alice.text.count("Delete") == 200
    request = office.ask(HOME)
    alice.open(f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number=office.number(request))
    assert "only from: the 201 restrictions listed here." in alice.page.part("note")


def test_what_has_expired_is_said(office: Office):
    """A user whose restrictions have all expired is restricted to nothing, and the pages say so."""
    office.add(OFFICE, expires_at=office.later(hours=1))
    alice = office.browser(ALICE)
    assert "Until " in alice.text
    assert "Expired" not in alice.text
    office.wait(hours=2)
    alice.open("/")
    assert "Expired " in alice.text
    assert "No address allowed (every restriction has expired)" in alice.text
    alice.open("/user?user=jsmith")
    assert "No address allowed" in alice.text
    alice.open("/check?user=jsmith")
    alice.press("Check", address=OFFICE)
    assert "not allowed" in alice.page.part("verdict-head")
    assert "Time never lifts a restriction" in alice.page.part("verdict")
    assert "Yes, but it has expired" in alice.text


def test_removed_users_are_marked(office: Office):
    """Actors of every account see a removed user with what holds, and may delete it."""
    office.add(OFFICE)
    office.store.remove_users(["jsmith"])
    assert "John Smith" not in office.browser(ALICE).text
    boss = office.browser(BOSS)
    assert "John Smith jsmith Removed" in boss.text
    boss.follow("John Smith")
    assert "This user was removed." in boss.text
    assert "Add IP Address Restriction" not in boss.text
    boss.follow("Delete")
    boss.press("Delete", open="accept")
    assert office.held() == []


def test_an_actor_without_users(office: Office):
    """Nobody to show is said."""
    nobody = Actor(username="new", email="n@x.example", manages=frozenset({"U9"}))
    assert "There are no traders in your accounts." in office.browser(nobody).text


def many(office: Office, count: int = 120) -> None:
    office.store.put_users(
        User(username=f"t{n:04}", full_name=f"Tom{n} Row", account_id="U1") for n in range(count)
    )


def test_paging(office: Office):
    """Each page goes on where the one before ended, and nobody is missing or twice."""
    many(office)
    alice = office.browser(ALICE)
    seen = []
    while True:
        rows = [w for tag, w in alice.page.headings if tag == "th"][4:]
        seen += [row.split()[-1] for row in rows]
        if not any(words == "Next page" for words, _ in alice.page.links):
            break
        alice.follow("Next page")
    assert seen == ["alice", "jsmith", "mary", *(f"t{n:04}" for n in range(120))]
    alice.follow("First page")
    assert "Alice Adams" in alice.text
    alice.open("/?after=t9999")
    assert "There are no more traders." in alice.text


@pytest.mark.parametrize(
    ("text", "found"),
    [("smi", ["jsmith"]), ("MARY", ["mary"]), ("u1", ["alice", "jsmith", "mary"]), ("zed", [])],
)
def test_search(office: Office, text: str, found: list[str]):
    """The start of a name, username or account finds its users, of the actor's own accounts."""
    alice = office.browser(ALICE)
    alice.press("Search", search=text)
    rows = [w.split()[-1] for tag, w in alice.page.headings if tag == "th"][4 if found else 0 :]
    assert rows == found
    assert alice.page.inputs["search"]["value"] == text
    assert found or f"No trader matches “{text}”." in alice.text
    alice.follow("Show all")
    assert alice.page.inputs["search"]["value"] == ""


def test_search_for_an_address_with_pages(office: Office):
    """Who lists an address is found, over pages; neither URL nor anything but a cookie has it."""
    many(office)
    rows = [(f"t{n:04}", "203.0.113.0/29") for n in range(120)]
    office.flow.impose_many(BOSS, rows, reason="x")
    alice = office.browser(ALICE)
    alice.press("Search", search=f" {OFFICE} ")
    pages = [alice.text.count("Row")]
    while any(words == "Next page" for words, _ in alice.page.links):
        alice.follow("Next page")
        assert f"Traders found for “{OFFICE}”" in alice.text
        pages.append(alice.text.count("Row"))
    assert sum(pages) >= 120
    alice.open(alice.address)  # reloading shows the same
    assert f"Traders found for “{OFFICE}”" in alice.text
    assert not any("203" in url or OFFICE in url for url in alice.log)


def test_searches_in_two_tabs(office: Office):
    """The URL holds the search: pages, Back and a reload stay with it, whatever other tabs do."""
    many(office)
    alice = office.browser(ALICE)
    alice.press("Search", search="tom")
    first = alice.address
    following = next(href for words, href in alice.page.links if words == "Next page")
    alice.press("Search", search="mary")
    for path, found in ((first, "Tom0"), (following.removeprefix("."), "Tom50")):
        alice.open(path)
        assert "Traders found for “tom”" in alice.text
        assert found in alice.text
        assert "Mary Major" not in alice.text
    elsewhere = office.stranger(ALICE)  # a bookmark, in a browser without cookies of ours
    elsewhere.open(first)
    assert "Traders found for “tom”" in elsewhere.text
    assert not any("tom" in url for url in alice.log)


def test_a_search_that_this_page_did_not_make(office: Office):
    """A search that was altered, made up or is another actor's shows all traders and says so."""
    adam = office.browser(ADAM)
    adam.press("Search", search="mary")
    stolen = query(adam.address)["search"]
    alice = office.browser(ALICE)
    for text in (stolen, stolen[:-2] + "AA", "smith", "A" * 9_000, "é"):
        alice.open(f"/?{urlencode({'search': text})}")
        assert "That search cannot be read." in alice.text
        assert "Alice Adams" in alice.text
    alice.press("Search", search="  ")
    assert alice.address == "/"


@pytest.mark.parametrize("text", ["x" * 257, "a\u202eb", "a\x00b"])
def test_a_search_that_makes_no_sense(office: Office, text: str):
    """It is refused beside the field, and what was typed is still there."""
    alice = office.browser(ALICE)
    alice.press("Search", search=text)
    assert alice.answer.status == 200
    assert alice.page.part("search-problem")
    assert alice.page.inputs["search"]["value"] == text


def test_no_telephone_links(office: Office):
    """iOS makes links of numbers and addresses unless a page, or a mail, says otherwise."""
    for path in ("/", "/add", "/history", "/nothing"):
        metas = [own for tag, own in office.browser(ALICE, path).page.elements if tag == "meta"]
        (found,) = (own for own in metas if own.get("name") == "format-detection")
        assert "telephone=no" in found["content"]


# -- asking


def test_what_a_range_was_understood_as(office: Office):
    """A range is shown as it was understood before it is asked for; then the number follows."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=" 203.0.113.5-203.0.113.9 ", label="desk <3>")
    assert alice.page.part("understood") == "203.0.113.5-203.0.113.9: 5 addresses"
    assert len(office.rows()) == 1
    alice.press("Submit")
    office.confirm(office.request_of(asked(alice)))
    assert office.held() == ["203.0.113.5-203.0.113.9"]
    assert office.store.load_policy("jsmith").restrictions[0].label == "desk <3>"


def test_back_from_the_review(office: Office):
    """Who meant something else comes back to the form as it was."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses="203.0.113.0/29", label="l")
    alice.press("Change it")
    assert alice.page.inputs["addresses"]["value"] == "203.0.113.0/29"
    assert alice.page.inputs["label"]["value"] == "l"
    assert alice.form("Submit")[0].fields["user"] == "jsmith"
    assert len(office.rows()) == 1


def test_another_text_after_the_review_is_reviewed_again(office: Office):
    """What was seen counts for that very range alone."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses="203.0.113.0/24", seen="203.0.113.0/29")
    assert alice.page.part("understood") == "203.0.113.0/24: 256 addresses"


def test_one_plain_address_needs_no_review(office: Office):
    """An address in its own canonical text can mean only itself; another spelling is shown."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=" 2001:db8::7 ")
    assert asked(alice)
    alice.open("/add")
    alice.press("Submit", user="jsmith", addresses="::ffff:203.0.113.9")
    assert alice.page.part("understood") == "203.0.113.9: 1 address"


@pytest.mark.parametrize(
    ("here", "proposed"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ],
)
def test_use_my_current_address(office: Office, here: str, proposed: str):
    """The button fills in where the actor is; for IPv6 the /64, and keeps what was typed."""
    actor = Actor(username="alice", email="a@x.example", manages={"U1"}, address=here)
    alice = office.browser(actor, "/add")
    alice.press("Use my current address", user="jsmith", label="here")
    assert alice.answer.status == 200
    assert alice.page.inputs["addresses"]["value"] == proposed
    assert alice.page.inputs["label"]["value"] == "here"
    assert alice.form("Submit")[0].fields["user"] == "jsmith"


def test_no_current_address(office: Office):
    """Where the host does not say where the actor is, nothing is proposed."""
    assert "Use my current address" not in office.browser(ADAM, "/add").text


WRONG = [
    ({"user": ""}, "user", "Choose a trader."),
    ({"user": "zed"}, "user", "There is no such trader among yours."),
    ({"user": "nobody"}, "user", "There is no such trader among yours."),
    ({"user": "a\x00"}, "user", "There is no such trader among yours."),
    ({"addresses": ""}, "addresses", "Type an IP address, a network or a first-last range."),
    ({"addresses": "203.0.113.05"}, "addresses", "octal to some programs"),
    (
        {"addresses": " 10.1.0.0/8"},
        "addresses",
        "'10.1.0.0/8' is not accepted: it has host bits set; the widest network allowed is a /16.",
    ),
    ({"addresses": "10.1.2.0/16"}, "addresses", "Did you mean 10.1.0.0/16?"),
    (
        {"addresses": "203.0.113.7 198.51.100.20"},
        "addresses",
        "it holds 2 addresses; enter them one at a time",
    ),
    (
        {"addresses": "203.0.113.7,198.51.100.20; 2001:db8::1"},
        "addresses",
        "it holds 3 addresses; enter them one at a time",
    ),
    ({"addresses": "10.0.0.0/8", "seen": "10.0.0.0/8"}, "addresses", "allowed is a /16."),
    ({"addresses": "224.0.0.1"}, "addresses", "'224.0.0.1' is not accepted: it is multicast"),
    ({"label": "x" * 101}, "label", "The label has more than 100 characters."),
    ({"label": "a\r\nBcc: x"}, "label", "The label must not hold control characters."),
    ({"expires_at": "tomorrow"}, "expires_at", "Write the time as"),
    ({"expires_at": "0001-01-01T00:00+14:00"}, "expires_at", "Write the time as"),
    ({"expires_at": "2001-01-01T00:00"}, "expires_at", "The time must be in the future."),
]


@pytest.mark.parametrize(("fields", "field", "text"), WRONG)
def test_errors_are_beside_their_field(office: Office, fields, field, text):
    """Each is tied to its field and in the summary; nothing typed is lost; nothing is changed."""
    typed = {"user": "jsmith", "addresses": "203.0.113.9", "label": "l", "expires_at": "", **fields}
    alice = office.browser(ALICE, "/add")
    action = alice.form("Submit")[0]
    with office.unchanged():
        alice.post(action.action, {**action.fields, **typed})
    assert alice.answer.status == 200
    assert text in alice.page.part(f"{field}-problem")
    assert text in alice.page.part("problems")
    described = alice.page.inputs[field]
    assert described["aria-invalid"] == "true"
    assert f"{field}-problem" in described["aria-describedby"].split()
    assert (f"#{field}") in [href for _, href in alice.page.links]
    for name in {"addresses", "label", "expires_at"} & set(typed):
        assert alice.page.inputs[name]["value"] == typed[name]
    assert alice.page.elements_with("autofocus")["id"] == "problems"
    title = next(words for tag, words in alice.page.headings if tag == "title")
    assert title.startswith("Error: ")


def test_a_trader_who_was_removed(office: Office):
    """Nobody can ask for a restriction of a user that the host removed."""
    office.add(HOME)
    boss = office.browser(BOSS, "/add")
    office.store.remove_users(["jsmith"])
    boss.press("Submit", user="jsmith", addresses=OFFICE)
    assert "There is no such trader among yours." in boss.page.part("user-problem")


def test_several_errors_at_once(office: Office):
    """All that is wrong is said at once."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", addresses="x", label="x" * 101, expires_at="x")
    problems = [n for n in alice.page.ids if n.endswith("-problem")]
    assert sorted(problems) == [
        "addresses-problem",
        "expires_at-problem",
        "label-problem",
        "user-problem",
    ]


def test_a_temporary_restriction(office: Office):
    """The time is UTC, and the pages say so."""
    until = office.later(days=3).replace(second=0, microsecond=0)
    alice = office.browser(ALICE, "/add")
    assert "Expires (UTC, optional)" in alice.page.labels
    alice.press("Submit", user="jsmith", addresses=OFFICE, expires_at=f"{until:%Y-%m-%dT%H:%M}")
    request = office.request_of(asked(alice))
    assert request.restriction_expires_at == until
    assert f"{until:%H:%M} UTC" in alice.text
    office.confirm(request)
    alice.open("/")
    assert "Until " in alice.text


def test_the_form_for_one_user(office: Office):
    """From a user's page the trader is chosen already; one that is not there is no page."""
    alice = office.browser(ALICE, "/user?user=JSmith")
    alice.follow("Add IP Address Restriction")
    assert alice.form("Submit")[0].fields["user"] == "jsmith"
    alice.open("/add?user=zed")
    assert alice.answer.status == 404


def test_many_traders_are_searched(office: Office):
    """Where a drop-down would be too long, a text is searched, and the choice is offered."""
    many(office)
    alice = office.browser(ALICE, "/add")
    assert alice.page.inputs["user"]["type"] == "text"
    alice.press("Submit", user="tom11", addresses=OFFICE, label="kept")
    assert alice.answer.status == 200
    form = alice.form("Submit")[0]
    assert form.choices["user"] == ["", "t0011", *(f"t{n:04}" for n in range(110, 120))]
    assert alice.page.inputs["addresses"]["value"] == OFFICE
    alice.press("Submit", user="")
    assert alice.page.inputs["user"]["type"] == "text"
    assert alice.page.inputs["label"]["value"] == "kept"
    alice.press("Submit", user="T0011")
    assert office.request_of(asked(alice)).username == "t0011"
    alice.open("/add?user=t0005")
    assert alice.form("Submit")[0].choices["user"] == ["t0005"]
    alice.press("Submit", addresses="x")
    assert alice.form("Submit")[0].choices["user"] == ["t0005"]
    alice.open("/add")
    alice.press("Submit", user="t\u202e", addresses="x")
    assert alice.page.inputs["user"]["value"] == "t\u202e"


def test_the_same_twice(office: Office):
    """A form that is sent twice leads to the one request; what somebody else asked is said."""
    alice = office.browser(ALICE, "/add")
    form = alice.form("Submit")[0]
    fields = {**form.fields, "user": "jsmith", "addresses": OFFICE}
    alice.post("/add", fields)
    first = asked(alice)
    mails = len(office.outbox.messages)
    alice.post("/add", fields)
    assert asked(alice) == first
    assert "You have asked for this already." in alice.page.part("note")
    assert len(office.outbox.messages) == mails
    adam = office.browser(ADAM, "/add")
    adam.press("Submit", user="jsmith", addresses=OFFICE)
    assert "A request to add 203.0.113.7" in adam.page.part("addresses-problem")
    office.confirm(office.request_of(first))
    alice.post("/add", fields)
    assert "jsmith already has 203.0.113.7" in alice.page.part("addresses-problem")


def test_too_many_requests(office: Office):
    """The limit is said with the time after which it works again."""
    office.use(requests_per_hour=1)
    office.ask(HOME)
    office.wait(minutes=20)
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "Try again in 40 minutes, after " in alice.page.part("problems")
    assert alice.page.inputs["addresses"]["value"] == OFFICE


def test_as_many_as_are_allowed(office: Office):
    """The limit of restrictions is said, and what to do."""
    office.use(restrictions_per_user=1)
    office.add(HOME)
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "Delete some first" in alice.page.part("addresses-problem")


def test_a_mail_that_fails(office: Office):
    """The request waits, which is said, and a new number can be sent."""
    office.outbox.fail = True
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "could not be sent. The request waits" in alice.page.part("note")
    request = office.request_of(asked(alice))
    alice.press("Send a new number")
    assert "could not be sent. The request waits" in alice.page.part("note")
    office.outbox.fail = False
    alice.press("Send a new number")
    assert "A new number was sent" in alice.page.part("note")
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


# -- the number


def confirming(office: Office, **more) -> tuple[Browser, object]:
    request = office.ask(**more)
    alice = office.browser(ALICE, f"/confirm?user={request.username}&request={request.id}")
    return alice, request


def test_the_number_page_says_what_is_confirmed(office: Office):
    """Trader, addresses, label, who asked, the time and attempts left are on the page."""
    alice, _ = confirming(office, addresses="203.0.113.0/29", label="office")
    for words in ("John Smith jsmith", "203.0.113.0/29: 8 addresses", "office", "by alice"):
        assert words in alice.text
    state = alice.page.part("number-state")
    assert "10 minutes left" in state
    assert "5 attempts left." in state
    office.wait(minutes=9, seconds=15)
    alice.open(alice.address)
    assert "45 seconds left" in alice.page.part("number-state")
    assert alice.page.inputs["number"]["autocomplete"] == "one-time-code"


def test_wrong_numbers(office: Office):
    """Each says how many attempts are left; after the last the request is over, and by whom."""
    alice, request = confirming(office)
    for left in (4, 3, 2, 1):
        alice.press("Submit", number=office.wrong(request))
        assert alice.answer.status == 200
        plural = "attempt" if left == 1 else "attempts"
        text = f"This is not the number. {left} {plural} left."
        assert text in alice.page.part("number-problem")
        assert f"{left} {plural} left" in alice.page.part("number-state")
        assert "value" not in alice.page.inputs["number"]
    alice.press("Submit", number=office.wrong(request))
    assert "This request is locked, after too many wrong numbers." in alice.page.part("over")
    assert office.held() == []


def test_an_empty_number_is_no_guess(office: Office):
    """Nothing typed costs no attempt."""
    alice, request = confirming(office)
    alice.press("Submit", number="  ")
    assert "Type the confirmation number" in alice.page.part("number-problem")
    assert office.request(request).attempts_left == 5


def test_an_expired_number(office: Office):
    """It is said, and a new one can be sent from there; the old one is dead."""
    alice, request = confirming(office)
    old = office.number(request)
    office.wait(minutes=11)
    alice.press("Submit", number=old)
    assert "This number has expired." in alice.page.part("number-problem")
    assert "This number has expired." in alice.page.part("number-state")
    alice.press("Send a new number")
    assert "The one before it is no longer valid." in alice.page.part("note")
    alice.press("Submit", number=old)
    assert "This is not the number." in alice.page.part("number-problem")
    alice.press("Submit", number=office.number(request).replace("-", " "))
    assert office.held() == [OFFICE]


def test_resending_too_soon(office: Office):
    """How long to wait is said."""
    alice, _ = confirming(office)
    alice.press("Send a new number")
    # A moment has no seconds: "after 12:00 UTC", told at 12:00, would help nobody.
    assert "Try again in 30 seconds." in alice.page.part("note")


def test_an_actor_who_failed_too_often(office: Office):
    """It is said that no number is judged any more, and who can help."""
    office.use(failures_per_actor=1)
    office.guess(office.ask(HOME))
    alice, request = confirming(office)
    alice.press("Submit", number=office.number(request))
    assert "until an operator allows you new attempts" in alice.page.part("number-problem")
    assert office.held() == []


def test_a_rule_that_came_meanwhile(office: Office):
    """A right number that a rule refuses is said with the rule; the request still waits."""
    until = office.later(minutes=5)
    alice, request = confirming(office, expires_at=until)
    office.wait(minutes=6)
    alice.press("Submit", number=office.number(request))
    assert "The time must be in the future." in alice.page.part("problems")
    assert office.request(request).state == "pending"


def test_somebody_elses_request(office: Office):
    """Who did not ask is told who can confirm, and can cancel."""
    request = office.ask()
    adam = office.browser(ADAM)
    assert "Requested by alice" in adam.text
    assert not [words for words, _ in adam.page.links if words.startswith("Confirm")]
    adam.open(f"/confirm?user=jsmith&request={request.id}")
    assert "Only alice, who was sent the number, can confirm this." in adam.text
    adam.press("Cancel this request")
    assert office.request(request).state == "cancelled"


# -- deleting


def test_a_delete_that_opens_to_every_address(office: Office):
    """A page says so, and asks for an explicit choice first."""
    office.add(OFFICE)
    alice = office.browser(ALICE)
    alice.follow("Delete")
    assert "can log in from any address" in alice.text
    with office.unchanged():
        alice.press("Delete", reason="kept")
    assert alice.answer.status == 200
    assert alice.page.part("open-problem")
    assert alice.page.inputs["reason"]["value"] == "kept"
    alice.press("Delete", open="accept")
    assert "has no restrictions now and can log in from any address." in alice.page.part("note")
    assert office.held() == []


def test_a_delete_that_leaves_only_what_has_expired(office: Office):
    """The page before it says that no address is left, and so does the one after."""
    office.add(HOME, expires_at=office.later(hours=1))
    office.add(OFFICE)
    office.wait(hours=2)
    alice = office.browser(ALICE)
    alice.follow(f"Delete {OFFICE}")
    assert "cannot log in from anywhere" in alice.text
    alice.press("Delete")
    assert "cannot log in from any address: what is left has expired." in alice.page.part("note")


def test_what_a_deletion_comes_to_stands_beside_its_number(office: Office):
    """Where what is left has expired by the time that the number is typed in, and before."""
    office.use(confirm_deletes=True)
    office.add(HOME, expires_at=office.later(hours=1))
    request = office.ask_to_delete(office.add(OFFICE))
    where = f"/confirm?user=jsmith&request={request.id}"
    assert "is temporary and ends on 1 Jan 2030, 13:00 UTC" in office.browser(ALICE, where).text
    office.wait(hours=2)
    assert "cannot log in from anywhere" in office.browser(ALICE, where).text
    added = office.ask("192.0.2.9")
    there = office.browser(ALICE, f"/confirm?user=jsmith&request={added.id}").text
    assert "cannot log in from anywhere" not in there


def test_who_has_no_full_name_is_called_by_the_username(office: Office):
    """In what the page warns of and says was done."""
    office.use(confirm_deletes=True)
    office.store.put_users([User(username="anon", full_name="", account_id="U1")])
    request = office.ask_to_delete(office.add(OFFICE, "anon"))
    alice = office.browser(ALICE, f"/confirm?user=anon&request={request.id}")
    assert "the only restriction of anon. Once it is deleted, anon can log in" in alice.text
    alice.press("Submit", number=office.number(request))
    assert "anon has no restrictions now" in alice.page.part("note")


def test_a_delete_that_leaves_only_what_ends(office: Office):
    """The page before it says when no address will be left."""
    office.add(HOME, expires_at=office.later(hours=1))
    office.add("192.0.2.9", expires_at=office.later(hours=3))
    office.add(OFFICE)
    alice = office.browser(ALICE)
    alice.follow(f"Delete {HOME}")
    assert "all that is left is temporary" not in alice.text
    alice.open("/")
    alice.follow(f"Delete {OFFICE}")
    assert "is temporary and ends on 1 Jan 2030, 15:00 UTC" in alice.text


@pytest.mark.parametrize(("setting", "first"), [("last", False), (True, True)])
def test_deletes_that_need_a_number(office: Office, setting, first: bool):
    """The page says that a number is needed, and asks for it; confirming deletes."""
    office.use(confirm_deletes=setting)
    office.add(HOME)
    office.add(OFFICE, label="office")
    alice = office.browser(ALICE)
    alice.follow(f"Delete {HOME}")
    assert ("You will receive an email" in alice.text) is first
    alice.press("Delete")
    if first:
        alice.press("Submit", number=office.outbox.number_for(asked(alice)))
    assert office.held() == [OFFICE]
    alice.follow("Delete")
    alice.press("Delete", open="accept", reason="<gone>")
    assert "This deletion needs a number." in alice.page.part("note")
    for words in ("Confirm the deletion", "any address", "<gone>", "To be deleted"):
        assert words in alice.text
    number = office.outbox.number_for(asked(alice))
    alice.open("/")
    assert "Delete 203.0.113.7" in alice.text
    alice.follow("Confirm")
    alice.press("Submit", number=number)
    assert "has no restrictions now" in alice.page.part("note")


def test_a_delete_that_waits_already(office: Office):
    """Asking twice leads to the request that waits, also somebody else's; a failed mail is said."""
    office.use(confirm_deletes=True)
    restriction = office.add(OFFICE)
    office.ask(HOME)
    office.outbox.fail = True
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    alice.press("Delete", open="accept")
    assert "could not be sent. The request waits" in alice.page.part("note")
    for actor in (ALICE, ADAM):
        other = office.browser(actor, f"/delete?user=jsmith&restriction={restriction.id}")
        other.press("Delete", open="accept")
        assert "It has been asked to delete this already." in other.page.part("note")
    assert office.held() == [OFFICE]


def test_a_reason_that_makes_no_sense(office: Office):
    """It is refused beside its field."""
    office.add(HOME)
    restriction = office.add(OFFICE)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    alice.press("Delete", reason="x" * 501)
    assert "The reason has more than 500 characters." in alice.page.part("reason-problem")
    assert len(office.held()) == 2


def test_deletes_asked_for_too_often(office: Office):
    """The limit is said on the form."""
    office.use(confirm_deletes=True, requests_per_hour=1)
    office.ask(HOME)
    restriction = office.add(OFFICE)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    alice.press("Delete", open="accept")
    assert "Try again in " in alice.page.part("problems")


# -- locking oneself out


def test_asking_for_what_would_lock_the_actor_out(office: Office):
    """A page says so and asks for an explicit choice, at the request and at the confirmation."""
    alice = office.browser(ALICE, "/add")
    with office.unchanged():
        alice.press("Submit", user="alice", addresses=HOME, label="kept")
        assert "You would lock yourself out" in alice.text
        assert OFFICE in alice.text
        alice.press("Submit")
        assert "Tick the box if you want this" in alice.page.part("lockout-problem")
    alice.press("Submit", lockout="accept")
    request = office.request_of(asked(alice))
    assert request.label == "kept"
    alice.press("Submit", number=office.number(request))
    assert "You would lock yourself out" in alice.text
    assert office.held("alice") == []
    assert office.request(request).attempts_left == 5
    number = office.number(request)
    alice.press("Submit", number=number)
    assert "Tick the box if you want this" in alice.page.part("lockout-problem")
    alice.press("Submit", number=office.wrong(request), lockout="accept")
    assert "This is not the number." in alice.page.part("number-problem")
    alice.press("Submit", number=number, lockout="accept")
    assert office.held("alice") == [HOME]


def test_deleting_what_would_lock_the_actor_out(office: Office):
    """The same for a deletion; going back changes nothing."""
    office.add(OFFICE, username="alice")
    office.add(HOME, username="alice")
    alice = office.browser(ALICE)
    alice.follow(f"Delete {OFFICE}")
    alice.press("Delete", reason="kept")
    assert "You would lock yourself out" in alice.text
    alice.follow("Go back")
    alice.press("Delete", reason="kept")
    alice.press("Submit", lockout="accept")
    assert office.held("alice") == [HOME]
    assert office.rows()[0].detail["reason"] == "kept"


# -- looking


@pytest.mark.parametrize(
    ("address", "allowed", "why"),
    [
        (OFFICE, "allowed", "A restriction of jsmith lists this address."),
        (f" {OFFICE} ", "allowed", "A restriction of jsmith lists this address."),
        (HOME, "not allowed", "No restriction of jsmith lists this address."),
    ],
)
def test_check_an_address(office: Office, address: str, allowed: str, why: str):
    """Whether a login would be let in, and why, as the store has it at that moment."""
    office.add("203.0.113.0/29", label="office")
    alice = office.browser(ALICE, "/user?user=jsmith")
    alice.follow("Check an address")
    alice.press("Check", address=address)
    assert alice.page.part("verdict-head") == f"{address.strip()}: {allowed}"
    assert why in alice.page.part("verdict")
    assert not any("203" in url or "198" in url for url in alice.log)


def test_check_without_restrictions(office: Office):
    """Who has no restrictions is let in from anywhere."""
    alice = office.browser(ALICE, "/check?user=mary")
    alice.press("Check", address=HOME)
    assert "mary has no restrictions: any address is let in." in alice.page.part("verdict")


@pytest.mark.parametrize("text", ["", "203.0.113.0/29", "203.0.113.05", "x" * 256])
def test_check_of_what_is_no_address(office: Office, text: str):
    """It is refused beside the field, and stays there."""
    alice = office.browser(ALICE, "/check?user=jsmith")
    alice.press("Check", address=text)
    assert alice.answer.status == 200
    assert alice.page.part("address-problem")
    assert alice.page.inputs["address"]["value"] == text


def test_what_a_check_can_say():
    """Every reason has its words."""
    said = set()
    for reason in Reason:
        decision = Decision(allowed=False, reason=reason, revision=1)
        found = Explanation(
            username="j",
            address="203.0.113.7",
            decision=decision,
            restrictions=(),
            known=True,
            at=datetime.now(UTC),
            summary="",
        )
        said.add(_texts.verdict(found))
    assert len(said) == len(Reason)


def test_history(office: Office):
    """Who did what, when, from where and to whom, the newest first, and of one trader alone."""
    restriction = office.add(HOME, label="a b")
    office.delete(restriction, reason="moved")
    office.guess(office.ask())
    office.add("192.0.2.0/24", username="mary", expires_at=office.later(days=1))
    alice = office.browser(ALICE)
    alice.follow("History")
    for words in (
        "imposed 198.51.100.20 without a number",
        "deleted 198.51.100.20",
        "reason: moved",
        "no restrictions left: any address",
        "label: a b",
        "asked for 203.0.113.7",
        "gave a wrong number for 203.0.113.7",
        "attempts left: 4",
        "alice from 203.0.113.7",
        "expires: ",
    ):
        assert words in alice.text, words
    whole = len(alice.page.headings)
    alice.press("Show", user="MARY")
    assert alice.address == "/history?user=mary"
    assert "jsmith" not in alice.text
    assert len(alice.page.headings) < whole
    alice.press("Show", user="")
    assert alice.address == "/history"
    for text in ("nobody", "zed", OFFICE, "a\x00"):
        alice.press("Show", user=text)
        assert alice.answer.status == 200
        assert alice.page.inputs["user"]["value"] == text
    assert not any(OFFICE in url for url in alice.log)


def test_history_of_nobody(office: Office):
    """Whom a link names, of whom there is nothing."""
    alice = office.browser(ALICE, "/history?user=jsmiht")
    assert "Nothing is recorded about “jsmiht”." in alice.text


def test_history_of_who_is_gone(office: Office):
    """A trader that was removed still has a history."""
    office.add(HOME)
    office.store.remove_users(["jsmith"])
    alice = office.browser(ALICE, "/history")
    alice.press("Show", user="jsmith")
    assert "removed users" in alice.text


@pytest.mark.parametrize(
    ("action", "detail", "shown"),
    [
        ("teleport", {"to": "the moon"}, 'did “teleport” on|to="the moon"'),
        ("unlock", {"": 'by="x'}, 'allowed new attempts|by="x'),
        ("impose", {"": "10.0.0.0/8 imposed"}, "imposed|10.0.0.0/8 imposed"),
        ("impose", {"addresses": "10.0.0.0/8", "expires_at": "soon"}, "10.0.0.0/8|expires: soon"),
    ],
)
def test_entries_of_a_newer_version_are_shown_as_they_are(
    office: Office, action: str, detail: dict[str, str], shown: str
):
    """An unknown action or an unreadable detail breaks no page."""
    with office.store.transaction() as tx:
        change = tx.append(action, actor="alice", username="jsmith", account_id="U1", detail=detail)
    alice = office.browser(ALICE, "/history")
    assert alice.answer.status == 200
    told = f"{_texts.told(change, 'bob')}|{alice.text}"
    for words in shown.split("|"):
        assert words in told


def test_pages_of_the_history(office: Office):
    """Older pages go on where the newer ended."""
    for n in range(60):
        office.delete(office.add(f"10.9.9.{n}"))
    alice = office.browser(ALICE, "/history")
    counts = [alice.text.count("10.9.9.")]
    while any(words == "Older" for words, _ in alice.page.links):
        alice.follow("Older")
        counts.append(alice.text.count("10.9.9."))
    assert counts == [50, 50, 20]
    alice.follow("Newest")
    assert alice.text.count("10.9.9.") == 50


@pytest.mark.parametrize("query", ["before=0", "before=x", "before=" + "9" * 40, "user=%00"])
def test_no_such_page_of_the_history(office: Office, query: str):
    """A link that was made up is a bad request."""
    assert office.browser(ALICE, f"/history?{query}").answer.status == 400


PROPOSALS = ["10.0.0.0/255.0.0.0", "10.*.*.*", "2001:db8::1/24", "203.0.113.9/24", "10.1.1.1/30"]


@pytest.mark.parametrize(
    ("widest_ipv4", "widest_ipv6"), [(16, 32), (32, 128), (24, 72), (31, 127), (8, 20), (0, 0)]
)
@pytest.mark.parametrize("here", ["2001:db8:1:2:a:b:c:d", "203.0.113.7"])
def test_the_page_proposes_what_its_settings_accept(
    office: Office, widest_ipv4: int, widest_ipv6: int, here: str
):
    """Neither 'Did you mean', nor 'Understood as', nor the current address is refused later."""
    office.use(widest_ipv4=widest_ipv4, widest_ipv6=widest_ipv6)
    actor = Actor(username="alice", email="a@x.example", manages={"U1"}, address=here)
    alice = office.browser(actor, "/add")
    token = alice.form("Submit")[0].fields["token"]
    proposed = {alice.page.elements_with("data-mine")["data-mine"]}
    if ".0/29" in alice.page.part("addresses-hint"):
        proposed |= {"203.0.113.0/29", "203.0.113.5-203.0.113.9"}
    for text in PROPOSALS:
        alice.press("Submit", user="jsmith", addresses=text)
        problem = alice.page.part("addresses-problem")
        found = re.search(r"Did you mean (.*)\?", problem)
        assert found or "the widest network allowed is a /" in problem
        alice.post("/understood", {"token": token, "addresses": text})
        assert json.loads(alice.answer.text)["problem"] in problem
        alice.open("/add")
        proposed |= {found[1]} if found else set()
    for text in sorted(proposed):
        alice.post("/understood", {"token": token, "addresses": text})
        assert json.loads(alice.answer.text)["canonical"]
        alice.open("/add")
        alice.press("Submit", user="mary", addresses=text, seen=text)
        assert asked(alice), text


def test_what_is_too_broad_is_not_called_understood(office: Office):
    """The script is told so while the text is typed, with or without a proposal."""
    alice = office.browser(ALICE, "/add")
    token = alice.form("Submit")[0].fields["token"]
    for text in ("10.0.0.0/15", "10.1.0.0/8", "10.0.0.0-10.200.0.0"):
        alice.post("/understood", {"token": token, "addresses": text})
        told = json.loads(alice.answer.text)
        assert told["canonical"] == ""
        assert "allowed is a /16." in told["problem"]


def test_what_the_script_is_told(office: Office):
    """The same words as without the script: what a text was understood as, or what is wrong."""
    office.use(widest_ipv4=8)
    alice = office.browser(ALICE, "/add")
    token = alice.form("Submit")[0].fields["token"]
    for text, expected in (
        ("203.0.113.5-203.0.113.9", "203.0.113.5-203.0.113.9: 5 addresses"),
        ("10.0.0.0/15", "10.0.0.0/15: 131,072 addresses"),
        ("2001:db8::/64", "2001:db8::/64: 2^64 addresses"),
        ("2001:db8::-2001:db8::1:0:0:0:0", "2001:db8::-2001:db8:0:1::: more than 2^64 addresses"),
    ):
        alice.post("/understood", {"token": token, "addresses": text})
        assert alice.answer.header("content-type") == "application/json"
        assert expected.replace(":::", "::") in alice.answer.text or expected in alice.answer.text
    alice.post("/understood", {"token": token, "addresses": "10.1.0.0/8"})
    assert "Did you mean 10.0.0.0/8?" in alice.answer.text


def test_the_guard_has_caught_up(office: Office):
    """After a change the page waits until this server's own guard knows of it."""
    request = office.ask()
    assert office.guard.is_allowed("jsmith", HOME)
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number=office.number(request))
    assert office.guard.revision == office.rows()[0].revision
    assert not office.guard.is_allowed("jsmith", HOME)


def test_a_guard_that_does_not_catch_up(office: Office, monkeypatch):
    """The change holds, and the page says that it takes a moment longer."""
    monkeypatch.setattr(office.guard, "wait_for", lambda revision, timeout: False)
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number=office.number(request))
    assert "Login servers will know of it within seconds." in alice.page.part("note")
    assert office.held() == [OFFICE]


def test_a_message_is_shown_once_and_not_for_long(office: Office):
    """It is gone with the next page, and after two minutes anyway."""
    office.ask()
    alice = office.browser(ALICE)
    alice.press("Cancel")
    assert alice.page.part("note")
    alice.open(alice.address)
    assert "note" not in alice.page.ids


def test_lengths_and_counts():
    """Lengths are rounded up in their largest unit."""
    for length, text in (
        (timedelta(0), "1 second"),
        (timedelta(milliseconds=30_200), "31 seconds"),
        (timedelta(minutes=1, seconds=1), "2 minutes"),
        (timedelta(minutes=10), "10 minutes"),
        (timedelta(hours=23, minutes=1), "24 hours"),
        (timedelta(days=2), "2 days"),
    ):
        assert _texts.length(length) == text
