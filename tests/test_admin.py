"""The page: the three procedures of the original page, and everything around them."""

import json
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import pytest

from ipguard import Actor, Decision, Explanation, Reason, TooManyRequests, User
from ipguard.admin import _messages
from ipguard.cli.changes import parse_expiry
from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE
from tests.pages import Browser, Office, query
from tests.pages import each_office as each_office  # noqa: PLC0414 - a fixture
from tests.pages import office as office  # noqa: PLC0414 - a fixture


def request_id(browser: Browser) -> str:
    """Return the id of the request whose number the page asks for."""
    assert browser.page.labels["Confirmation Number"] == "number"
    return query(browser.address)["request"]


# -- the procedures of the original page


def test_add_a_restriction(each_office: Office):
    """The link, the form and the number from the mail: then the restriction holds."""
    office = each_office
    alice = office.browser(ALICE)
    alice.follow("Add IP Address Restriction")
    assert alice.page.labels["Trader"] == "user"
    assert alice.page.labels["IP Address"] == "addresses"
    alice.press("Submit", user="jsmith", addresses=OFFICE, label="office")
    assert "You will receive an email" in alice.page.part("note")
    assert office.held() == []
    assert office.guard.is_allowed("jsmith", HOME)
    alice.press("Submit", number=office.outbox.number_for(request_id(alice)))
    assert alice.answer.status_code == 200
    assert alice.page.part("note") == (
        f"{OFFICE} now holds. John Smith can log in only from: {OFFICE}."
    )
    assert office.held() == [OFFICE]
    assert office.guard.is_allowed("jsmith", OFFICE)
    assert not office.guard.is_allowed("jsmith", HOME)  # the page waited for this guard


# -- the list


def test_the_list(office: Office):
    """The list has the columns of the original page and all users of the actor's accounts."""
    office.add("203.0.113.0/29", label="office")
    office.ask(HOME, username="mary")
    alice = office.browser(ALICE)
    heads = alice.page.texts("th")
    assert heads[:4] == ["Trader", "Account ID", "Restrictions", "Pending Requests"]
    assert heads[4:] == ["Alice Adams alice", "John Smith jsmith", "Mary Major mary"]
    assert alice.text.count("No restrictions") == 2
    assert "203.0.113.0/29 office" in alice.text
    assert HOME in alice.text


def test_a_user_with_many_restrictions(office: Office):
    """The list shows ten restrictions of a user and counts the rest; the user's page shows all."""
    office.flow.impose_many(BOSS, [("jsmith", f"10.0.{n}.0/24") for n in range(200)], reason="x")
    alice = office.browser(ALICE)
    assert alice.text.count("Delete") == 10
    alice.follow("190 more of John Smith")
    assert alice.text.count("Delete") == 200
    request = office.ask(HOME)
    alice.open(f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number=office.number(request))
    assert "only from: the 201 restrictions listed here." in alice.page.part("note")


def test_expired_restrictions(office: Office):
    """A user whose restrictions have all expired stays restricted, and the pages say so."""
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


def test_removed_users(office: Office):
    """Actors of every account see removed users with restrictions, and may delete these."""
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
    actor = Actor(username="new", email="n@x.example", manages=frozenset({"U9"}))
    assert "There are no traders in your accounts." in office.browser(actor).text


def add_users(office: Office, count: int = 120) -> None:
    office.store.put_users(
        User(username=f"t{n:04}", full_name=f"Tom{n} Row", account_id="U1") for n in range(count)
    )


def test_paging(office: Office):
    """Each page continues after the previous one, without gaps or repetitions."""
    add_users(office)
    alice = office.browser(ALICE)
    shown = []
    while True:
        shown += [row.split()[-1] for row in alice.page.texts("th")[4:]]
        if not alice.page.select("[rel=next]"):
            break
        alice.follow("Next page")
    assert shown == ["alice", "jsmith", "mary", *(f"t{n:04}" for n in range(120))]
    alice.follow("First page")
    assert "Alice Adams" in alice.text
    alice.open("/?after=t9999")
    assert "There are no more traders." in alice.text


@pytest.mark.parametrize(
    ("text", "found"),
    [("smi", ["jsmith"]), ("MARY", ["mary"]), ("u1", ["alice", "jsmith", "mary"]), ("zed", [])],
)
def test_search(office: Office, text: str, found: list[str]):
    """A search finds users of the actor's accounts by the start of a name, username or account."""
    alice = office.browser(ALICE)
    alice.press("Search", search=text)
    assert [row.split()[-1] for row in alice.page.texts("tbody th")] == found
    assert alice.page.value("search") == text
    assert found or f"No trader matches “{text}”." in alice.text
    alice.follow("Show all")
    assert alice.page.value("search") == ""


def test_search_for_an_address(office: Office):
    """A search for an address finds the users who list it, over pages; no URL shows the address."""
    add_users(office)
    rows = [(f"t{n:04}", "203.0.113.0/29") for n in range(120)]
    office.flow.impose_many(BOSS, rows, reason="x")
    alice = office.browser(ALICE)
    alice.press("Search", search=f" {OFFICE} ")
    count = len(alice.page.select("tbody tr"))
    while alice.page.select("[rel=next]"):
        alice.follow("Next page")
        assert f"Traders found for “{OFFICE}”" in alice.text
        count += len(alice.page.select("tbody tr"))
    assert count == 120
    alice.open(alice.address)
    assert f"Traders found for “{OFFICE}”" in alice.text
    assert not any(OFFICE in url for url in alice.log)


def test_filters(office: Office):
    """The list can be limited, also with a search; the counts are of all users."""
    office.add(OFFICE, "mary")
    office.add(HOME, "jsmith", expires_at=office.later(days=2))
    office.ask("192.0.2.9", "alice", allow_lockout=True)
    alice = office.browser(ALICE)
    shown = alice.page.texts(".only a")
    assert shown == [
        *("All 3", "Restricted 2", "Unrestricted 1", "Pending 1", "Expiring within 7 days 1"),
    ]
    for words, names in (
        ("Restricted", ["jsmith", "mary"]),
        ("Unrestricted", ["alice"]),
        ("Pending", ["alice"]),
        ("Expiring", ["jsmith"]),
        ("All", ["alice", "jsmith", "mary"]),
    ):
        alice.follow(words)
        assert [row.split()[-1] for row in alice.page.texts("tbody th")] == names
        assert alice.page.texts(".only [aria-current]")[0].startswith(words)
    alice.press("Search", search="ma")
    assert alice.page.texts(".only a")[0] == "All"
    alice.follow("Unrestricted")
    assert "No trader matches “ma”." in alice.text
    alice.open("/?only=nonsense")
    assert len(alice.page.texts("tbody th")) == 3
    add_users(office)
    alice.open("/?only=unrestricted")
    alice.follow("Next page")
    alice.follow("Next page")
    assert alice.address.startswith("/?only=unrestricted&")
    assert len(alice.page.texts("tbody th")) == 21
    alice.follow("First page")
    assert alice.address == "/?only=unrestricted"


def test_searches_in_two_tabs(office: Office):
    """The URL holds the search, so paging and reloading do not depend on other tabs."""
    add_users(office)
    alice = office.browser(ALICE)
    alice.press("Search", search="tom")
    first, following = alice.address, str(alice.page.one("[rel=next]")["href"])
    alice.press("Search", search="mary")
    for path, found in ((first, "Tom0"), (following.removeprefix("."), "Tom50")):
        alice.open(path)
        assert "Traders found for “tom”" in alice.text
        assert found in alice.text
        assert "Mary Major" not in alice.text
    elsewhere = office.stranger(ALICE)  # such as a bookmark in a browser without our cookies
    elsewhere.open(first)
    assert "Traders found for “tom”" in elsewhere.text
    assert not any("tom" in url for url in alice.log)


def test_a_search_with_an_invalid_signature(office: Office):
    """A search that was altered, made up or signed for another actor lists all traders."""
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


def test_no_telephone_links(office: Office):
    for path in ("/", "/nothing"):
        meta = office.browser(ALICE, path).page.one("meta[name=format-detection]")
        assert "telephone=no" in meta["content"]


# -- requests


def test_the_review_of_a_range(office: Office):
    """A range is shown as it was understood before it is requested."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=" 203.0.113.5-203.0.113.9 ", label="desk <3>")
    assert alice.page.part("understood") == "203.0.113.5-203.0.113.9: 5 addresses"
    alice.press("Submit", addresses="203.0.113.0/24")  # the review was of another range
    assert alice.page.part("understood") == "203.0.113.0/24: 256 addresses"
    alice.press("Change it", addresses="203.0.113.5-203.0.113.9")
    assert alice.page.value("addresses") == "203.0.113.5-203.0.113.9"
    assert alice.page.value("label") == "desk <3>"
    assert alice.page.form("Submit").fields["user"] == "jsmith"
    assert len(office.rows()) == 1
    alice.press("Submit")
    alice.press("Submit")
    office.confirm(office.request_of(request_id(alice)))
    assert office.held() == ["203.0.113.5-203.0.113.9"]
    assert office.store.load_policy("jsmith").restrictions[0].label == "desk <3>"


def test_a_canonical_address_needs_no_review(office: Office):
    """A single address in canonical form is requested at once; another spelling is reviewed."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=" 2001:db8::7 ")
    assert request_id(alice)
    alice.open("/add")
    alice.press("Submit", user="jsmith", addresses="::ffff:203.0.113.9")
    assert alice.page.part("understood") == "203.0.113.9: 1 address"


WRONG = [
    ({"user": ""}, "user", "Choose a trader."),
    ({"user": "zed"}, "user", "There is no such trader among yours."),
    ({"user": "a\x00"}, "user", "There is no such trader among yours."),
    ({"addresses": ""}, "addresses", "Type an IP address, a network or a first-last range."),
    ({"addresses": "203.0.113.05"}, "addresses", "octal to some programs"),
    (
        {"addresses": " 10.1.0.0/8"},
        "addresses",
        "'10.1.0.0/8' is not accepted: it has host bits set; the widest network allowed is a /16.",
    ),
    (
        {"addresses": "192.0.2.9, 203.0.113.7 198.51.100.20"},
        "addresses",
        "it holds 2 addresses; enter them one at a time",
    ),
    ({"addresses": "\n".join(f"10.0.0.{n}" for n in range(101))}, "addresses", "up to 100"),
    ({"users": "mary\nzed, nobody"}, "users", "no such trader among yours: zed, nobody."),
    ({"users": "\n".join(map(str, range(101)))}, "users", "up to 100 traders"),
    ({"user": "", "users": "zed"}, "users", "no such trader among yours: zed."),
    ({"label": "x" * 101}, "label", "The label has more than 100 characters."),
    ({"label": "a\r\nBcc: x"}, "label", "The label must not hold control characters."),
    ({"expires_at": "tomorrow"}, "expires_at", "Write the time as"),
    ({"expires_at": "0001-01-01T00:00+14:00"}, "expires_at", "Write the time as"),
    ({"expires_at": "2001-01-01T00:00"}, "expires_at", "The time must be in the future."),
]


@pytest.mark.parametrize(("fields", "field", "text"), WRONG)
def test_errors_are_shown_at_their_field(office: Office, fields, field, text):
    """An error is tied to its field and listed at the top; the values stay; nothing changes."""
    typed = {
        "user": "jsmith",
        "addresses": "203.0.113.9",
        "label": "l",
        "expires_at": "",
        "users": "",
        **fields,
    }
    alice = office.browser(ALICE, "/add")
    form = alice.page.form("Submit")
    with office.unchanged():
        alice.post(form.action, {**form.fields, **typed})
    assert alice.answer.status_code == 200
    assert text in alice.page.part(f"{field}-problem")
    assert text in alice.page.part("problems")
    described = alice.page.field(field)
    assert described["aria-invalid"] == "true"
    assert f"{field}-problem" in str(described["aria-describedby"]).split()
    assert f"#{field}" in [href for _, href in alice.page.links]
    for name in ("addresses", "label", "expires_at", "users"):
        assert alice.page.value(name) == typed[name]
    assert alice.page.one("[autofocus]")["id"] == "problems"
    assert alice.page.texts("title")[0].startswith("Error: ")


def test_several_errors_at_once(office: Office):
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", addresses="x", label="x" * 101, expires_at="x")
    problems = {name for name in alice.page.ids if name.endswith("-problem")}
    assert problems == {f"{name}-problem" for name in ("user", "addresses", "label", "expires_at")}


def test_a_temporary_restriction(office: Office):
    """The expiry is read as UTC, and the pages say so."""
    until = office.later(days=3).replace(second=0, microsecond=0)
    alice = office.browser(ALICE, "/add")
    assert "Expires (UTC, optional)" in alice.page.labels
    alice.press("Submit", user="jsmith", addresses=OFFICE, expires_at=f"{until:%Y-%m-%dT%H:%M}")
    request = office.request_of(request_id(alice))
    assert request.restriction_expires_at == until
    assert f"{until:%H:%M} UTC" in alice.text
    office.confirm(request)
    alice.open("/")
    assert "Until " in alice.text


def test_the_form_for_one_user(office: Office):
    """The link on a user's page selects the user; an unknown user gets 404."""
    alice = office.browser(ALICE, "/user?user=JSmith")
    alice.follow("Add IP Address Restriction")
    assert alice.page.form("Submit").fields["user"] == "jsmith"
    alice.open("/add?user=zed")
    assert alice.answer.status_code == 404


def test_many_traders_are_searched(office: Office):
    """With too many traders for a drop-down, the form searches and offers the matches."""
    add_users(office)
    alice = office.browser(ALICE, "/add")
    assert alice.page.field("user")["type"] == "text"
    alice.press("Submit", user="tom11", addresses=OFFICE, label="kept")
    assert alice.answer.status_code == 200
    choices = alice.page.form("Submit").choices["user"]
    assert choices == ["", "t0011", *(f"t{n:04}" for n in range(110, 120))]
    assert alice.page.value("addresses") == OFFICE
    alice.press("Submit", user="")
    assert alice.page.field("user")["type"] == "text"
    assert alice.page.value("label") == "kept"
    alice.press("Submit", user="T0011")
    assert office.request_of(request_id(alice)).username == "t0011"
    alice.open("/add?user=t0005")
    assert alice.page.form("Submit").choices["user"] == ["t0005"]
    alice.press("Submit", addresses="x")
    assert alice.page.form("Submit").choices["user"] == ["t0005"]
    alice.open("/add")
    alice.press("Submit", user="t\u202e", addresses="x")
    assert alice.page.value("user") == "t\u202e"


def test_a_duplicate_request(office: Office):
    """The form names the pending request of another actor, or the restriction that exists."""
    request = office.ask()
    adam = office.browser(ADAM, "/add")
    adam.press("Submit", user="jsmith", addresses=OFFICE)
    assert "A request to add 203.0.113.7" in adam.page.part("addresses-problem")
    office.confirm(request)
    adam.press("Submit")
    assert "jsmith already has 203.0.113.7" in adam.page.part("addresses-problem")


def test_too_many_requests(office: Office):
    """The limit is shown with the time after which the actor can try again."""
    office.use(requests_per_hour=1)
    office.ask(HOME)
    office.wait(minutes=20)
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "Try again in 40 minutes, after " in alice.page.part("problems")
    assert alice.page.value("addresses") == OFFICE


def test_too_many_restrictions(office: Office):
    office.use(restrictions_per_user=1)
    office.add(HOME)
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "Delete some first" in alice.page.part("addresses-problem")


def test_a_mail_that_fails(office: Office):
    """If the mail fails, the request stays pending and a new number can be sent."""
    office.outbox.fail = True
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "could not be sent. The request waits" in alice.page.part("note")
    request = office.request_of(request_id(alice))
    alice.press("Send a new number")
    assert "could not be sent. The request waits" in alice.page.part("note")
    office.outbox.fail = False
    alice.press("Send a new number")
    assert "A new number was sent" in alice.page.part("note")
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


# -- the number


def open_confirm(office: Office, **more) -> tuple[Browser, object]:
    request = office.ask(**more)
    alice = office.browser(ALICE, f"/confirm?user={request.username}&request={request.id}")
    return alice, request


def test_the_form_for_the_number(office: Office):
    """The form shows what is confirmed, how long the number is valid and the attempts left."""
    alice, _ = open_confirm(office, addresses="203.0.113.0/29", label="office")
    for words in ("John Smith jsmith", "203.0.113.0/29: 8 addresses", "office", "by alice"):
        assert words in alice.text
    state = alice.page.part("number-state")
    assert "10 minutes left" in state
    assert "5 attempts left." in state
    office.wait(minutes=9, seconds=15)
    alice.open(alice.address)
    assert "45 seconds left" in alice.page.part("number-state")
    assert alice.page.field("number")["autocomplete"] == "one-time-code"


def test_wrong_numbers(office: Office):
    """Each wrong number shows how many attempts are left; the last one locks the request."""
    alice, request = open_confirm(office)
    alice.press("Submit", number="  ")  # a typing error, not a guess
    assert "Type the confirmation number" in alice.page.part("number-problem")
    for left in ("4 attempts", "3 attempts", "2 attempts", "1 attempt"):
        alice.press("Submit", number=office.wrong(request))
        assert alice.answer.status_code == 200
        problem = alice.page.part("number-problem")
        assert f"This is not the number. {left} left." in problem
        assert f"{left} left" in alice.page.part("number-state")
        assert not alice.page.field("number").has_attr("value")
    alice.press("Submit", number=office.wrong(request))
    assert "This request is locked, after too many wrong numbers." in alice.page.part("over")
    assert office.held() == []


def test_an_expired_number(office: Office):
    """An expired number is refused; a new one can be sent, which invalidates it."""
    alice, request = open_confirm(office)
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


def test_an_actor_who_failed_too_often(office: Office):
    office.use(failures_per_actor=1)
    office.guess(office.ask(HOME))
    alice, request = open_confirm(office)
    alice.press("Submit", number=office.number(request))
    assert "until an operator allows you new attempts" in alice.page.part("number-problem")
    assert office.held() == []


def test_a_right_number_that_a_rule_refuses(office: Office):
    """The rule is shown, and the request stays pending."""
    until = office.later(minutes=5)
    alice, request = open_confirm(office, expires_at=until)
    office.wait(minutes=6)
    alice.press("Submit", number=office.number(request))
    assert "The time must be in the future." in alice.page.part("problems")
    assert office.request(request).state == "pending"


def test_the_request_of_another_actor(office: Office):
    """Another actor sees who can confirm the request, and can cancel it."""
    request = office.ask()
    adam = office.browser(ADAM)
    assert "Requested by alice" in adam.text
    assert not [words for words, _ in adam.page.links if words.startswith("Confirm")]
    adam.open(f"/confirm?user=jsmith&request={request.id}")
    assert "Only alice can confirm this." in adam.text
    adam.press("Reject request")
    assert office.request(request).state == "cancelled"


# -- deletions


def test_a_deletion_that_leaves_only_expired_restrictions(office: Office):
    office.add(HOME, expires_at=office.later(hours=1))
    office.add(OFFICE)
    office.wait(hours=2)
    alice = office.browser(ALICE)
    alice.follow(f"Delete {OFFICE}")
    assert "Then from nowhere: every restriction that is left has expired." in alice.text
    alice.press("Delete")
    assert "cannot log in from any address: what is left has expired." in alice.page.part("note")


def test_the_form_for_the_number_shows_what_a_deletion_leaves(office: Office):
    """What will hold afterwards is judged at the time of the form."""
    office.use(confirm_deletes=True)
    office.add(HOME, expires_at=office.later(hours=1))
    request = office.ask_to_delete(office.add(OFFICE))
    where = f"/confirm?user=jsmith&request={request.id}"
    assert "is temporary and ends on 1 Jan 2030, 13:00 UTC" in office.browser(ALICE, where).text
    office.wait(hours=2)
    assert "Then from nowhere" in office.browser(ALICE, where).text
    added = office.ask("192.0.2.9")
    there = office.browser(ALICE, f"/confirm?user=jsmith&request={added.id}").text
    assert "Then also from 192.0.2.9." in there


def test_a_user_without_a_full_name(office: Office):
    """Warnings and messages use the username instead."""
    office.use(confirm_deletes=True)
    office.store.put_users([User(username="anon", full_name="", account_id="U1")])
    request = office.ask_to_delete(office.add(OFFICE, "anon"))
    alice = office.browser(ALICE, f"/confirm?user=anon&request={request.id}")
    assert "Logins of anon: Then from anywhere: no restriction is left." in alice.text
    alice.press("Submit", number=office.number(request))
    assert "anon has no restrictions now" in alice.page.part("note")


def test_usernames_as_the_host_spells_them(office: Office):
    """The list, the user and the confirmation show the spelling; links have the username."""
    office.store.put_users([User(username="Anne.O", full_name="Anne", account_id="U1")])
    request = office.ask(HOME, username="anne.o")
    alice = office.browser(ALICE)
    alice.follow("Anne")
    for path in ("/", "/user?user=anne.o", f"/confirm?user=anne.o&request={request.id}"):
        assert "Anne.O" in office.browser(ALICE, path).text


def test_a_deletion_that_leaves_only_temporary_restrictions(office: Office):
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
def test_deletions_that_need_a_number(office: Office, setting, first: bool):
    """The page says that a number is needed and asks for it; confirming deletes."""
    office.use(confirm_deletes=setting)
    office.add(HOME)
    office.add(OFFICE, label="office")
    alice = office.browser(ALICE)
    alice.follow(f"Delete {HOME}")
    assert ("You will receive an email" in alice.text) is first
    alice.press("Delete")
    if first:
        alice.press("Submit", number=office.outbox.number_for(request_id(alice)))
    assert office.held() == [OFFICE]
    alice.follow("Delete")
    alice.press("Delete", open="accept", reason="<gone>")
    assert "You will receive an email" in alice.page.part("note")
    for words in ("Confirm the deletion", "Then from anywhere", "<gone>", "To be deleted"):
        assert words in alice.text
    number = office.outbox.number_for(request_id(alice))
    alice.open("/")
    assert "Delete 203.0.113.7" in alice.text
    alice.follow("Confirm")
    alice.press("Submit", number=number)
    assert "has no restrictions now" in alice.page.part("note")


def test_a_deletion_that_is_pending_already(office: Office):
    """A second deletion leads to the pending request, also of another actor."""
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


def test_too_many_requests_to_delete(office: Office):
    office.use(confirm_deletes=True, requests_per_hour=1)
    office.ask(HOME)
    restriction = office.add(OFFICE)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    alice.press("Delete", open="accept")
    assert "Try again in " in alice.page.part("problems")


# -- lockout


def test_a_request_that_would_lock_the_actor_out(office: Office):
    """The page warns and requires a ticked box, at the request and at the confirmation."""
    alice = office.browser(ALICE, "/add")
    with office.unchanged():
        alice.press("Submit", user="alice", addresses=HOME, label="kept")
        assert "You would lock yourself out" in alice.text
        assert OFFICE in alice.text
        alice.press("Submit")
        assert "Tick the box if you want this" in alice.page.part("lockout-problem")
    alice.press("Submit", lockout="accept")
    request = office.request_of(request_id(alice))
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


def test_a_deletion_that_would_lock_the_actor_out(office: Office):
    """The page warns of a deletion that locks its actor out; "Go back" changes nothing."""
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
    assert alice.answer.status_code == 403
    assert "reason: kept" in office.browser(BOSS, "/history").text


# -- checks and the history


@pytest.mark.parametrize(
    ("address", "allowed", "why"),
    [
        (f" {OFFICE} ", "allowed", "A restriction of jsmith lists this address."),
        (HOME, "not allowed", "No restriction of jsmith lists this address."),
    ],
)
def test_check_an_address(office: Office, address: str, allowed: str, why: str):
    """The page shows whether and why a login would be allowed; no URL shows the address."""
    office.add("203.0.113.0/29", label="office")
    alice = office.browser(ALICE, "/user?user=jsmith")
    alice.follow("Check an address")
    alice.press("Check", address=address)
    assert alice.page.part("verdict-head") == f"{address.strip()}: {allowed}"
    assert why in alice.page.part("verdict")
    assert not any(address.strip() in url for url in alice.log)


def test_every_reason_is_explained():
    texts = set()
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
        texts.add(_messages.explain_decision(found))
    assert len(texts) == len(Reason)


def test_history(office: Office):
    """The history shows who did what, when and from where, newest first; also of one trader."""
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
    whole = len(alice.page.select("tr"))
    alice.press("Show", user="MARY")
    assert alice.address == "/history?user=mary"
    assert "jsmith" not in alice.text
    assert len(alice.page.select("tr")) < whole
    alice.press("Show", user="")
    assert alice.address == "/history"
    for text in ("unknown", "zed", OFFICE, "a\x00"):
        alice.press("Show", user=text)
        assert alice.answer.status_code == 200
        assert alice.page.value("user") == text
    assert not any(OFFICE in url for url in alice.log)


def test_history_of_unknown_and_removed_users(office: Office):
    """An unknown trader has an empty history, a removed one still has a history."""
    alice = office.browser(ALICE, "/history?user=jsmiht")
    assert "Nothing is recorded about “jsmiht”." in alice.text
    office.add(HOME)
    office.store.remove_users(["jsmith"])
    alice.open("/history")
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
    assert alice.answer.status_code == 200
    text = f"{_messages.describe(change, 'bob')}|{alice.text}"
    for words in shown.split("|"):
        assert words in text


@pytest.mark.parametrize("query", ["before=0", "before=x", "before=" + "9" * 40, "user=%00"])
def test_an_invalid_page_of_the_history(office: Office, query: str):
    """A made-up link is a bad request."""
    assert office.browser(ALICE, f"/history?{query}").answer.status_code == 400


# -- proposals


@pytest.mark.parametrize(
    ("widest_ipv4", "widest_ipv6", "here"),
    [
        (16, 32, "203.0.113.7"),
        (32, 128, "2001:db8:1:2:a:b:c:d"),
        (24, 72, "2001:db8:1:2:a:b:c:d"),
        (0, 0, "203.0.113.7"),
    ],
)
def test_the_page_proposes_what_its_settings_accept(
    office: Office, widest_ipv4: int, widest_ipv6: int, here: str
):
    """Hints, examples, "Understood as" and the current address are accepted when submitted."""
    office.use(widest_ipv4=widest_ipv4, widest_ipv6=widest_ipv6)
    actor = Actor(username="alice", email="a@x.example", manages={"U1"}, address=here)
    alice = office.browser(actor, "/add")
    assert alice.page.part("addresses-here") == f"The address that we see you at is {here}."
    proposed = {str(alice.page.one("[data-mine]")["data-mine"])}
    if ".0/29" in alice.page.part("addresses-hint"):
        proposed |= {"203.0.113.0/29", "203.0.113.5-203.0.113.9"}
    for text in ("10.0.0.0/255.0.0.0", "10.*.*.*", "2001:db8::1/24", "10.1.1.1/30"):
        alice.press("Submit", user="jsmith", addresses=text)
        problem = alice.page.part("addresses-problem")
        found = re.search(r"Did you mean (.*)\?", problem)
        assert found or "the widest network allowed is a /" in problem
        told = understand(alice, text)
        assert (told["canonical"], told["problem"] in problem) == ("", True)
        assert told["problem"]
        alice.open("/add")
        proposed |= {found[1]} if found else set()
    for text in sorted(proposed):
        assert understand(alice, text)["canonical"]
        alice.press("Submit", user="mary", addresses=text, seen=text)
        assert request_id(alice), text
        alice.open("/add")


def understand(browser: Browser, text: str) -> dict[str, str]:
    """Return what the script is told about a text."""
    fields = {"token": browser.page.form("Submit").fields["token"], "addresses": text}
    answer = browser.submit("/understood", fields)
    assert answer.headers["content-type"] == "application/json"
    told: dict[str, str] = json.loads(answer.text)
    return told


def test_the_script_gets_the_same_words(office: Office):
    """While a text is typed, the script gets its meaning or the problem, in the page's words."""
    office.use(widest_ipv4=8)
    alice = office.browser(ALICE, "/add")
    for text, expected in (
        ("203.0.113.5-203.0.113.9", "203.0.113.5-203.0.113.9: 5 addresses"),
        ("10.0.0.0/15", "10.0.0.0/15: 131,072 addresses"),
        ("2001:db8::/64", "2001:db8::/64: 2^64 addresses"),
        ("2001:db8::-2001:db8::1:0:0:0:0", "2001:db8::-2001:db8:0:1::: more than 2^64 addresses"),
    ):
        assert understand(alice, text)["understood"] == expected
    assert "Did you mean 10.0.0.0/8?" in understand(alice, "10.1.0.0/8")["problem"]


def test_a_guard_that_does_not_catch_up(office: Office, monkeypatch):
    """The change holds, and the message says that login servers are not up to date yet."""
    monkeypatch.setattr(office.guard, "wait_for", lambda revision, timeout: False)
    alice, request = open_confirm(office)
    alice.press("Submit", number=office.number(request))
    assert "Login servers will know of it within seconds." in alice.page.part("note")
    assert office.held() == [OFFICE]


def test_durations():
    """Durations are rounded up in their largest unit."""
    for duration, text in (
        (timedelta(0), "1 second"),
        (timedelta(milliseconds=30_200), "31 seconds"),
        (timedelta(minutes=1, seconds=1), "2 minutes"),
        (timedelta(minutes=10), "10 minutes"),
        (timedelta(hours=23, minutes=1), "24 hours"),
        (timedelta(days=2), "2 days"),
    ):
        assert _messages.format_duration(duration) == text
    # Neither the page nor the command line goes beyond the last possible time.
    last = datetime(9999, 12, 31, 23, 59, tzinfo=UTC)
    retry = TooManyRequests(timedelta(hours=1))
    assert "31 Dec 9999, 23:59 UTC" in _messages.format_retry(retry, last)
    assert parse_expiry("2h", last) == datetime.max.replace(tzinfo=UTC)
