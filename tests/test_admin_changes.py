"""The page: several addresses and traders, changes of a restriction, approvals and waits."""

import hashlib
from datetime import timedelta

import pytest

from ipguard import Actor, Demand, User
from ipguard.addresses import AddressRange
from ipguard.admin import _messages
from ipguard.model import RequestKind
from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE
from tests.pages import Browser, Office, query
from tests.pages import each_office as each_office  # noqa: PLC0414 - a fixture
from tests.pages import office as office  # noqa: PLC0414 - a fixture

DAY = timedelta(days=1)


def crowd(office: Office, count: int) -> list[str]:
    """Register traders; return their usernames."""
    names = [f"trader{n:03}" for n in range(count)]
    office.store.put_users(
        User(username=name, full_name=name.title(), account_id="U1") for name in names
    )
    return names


def confirm(browser: Browser, office: Office) -> None:
    """Give the number of the request that the page shows."""
    browser.press("Submit", number=office.outbox.number_for(query(browser.address)["request"]))


def numbers(office: Office) -> int:
    """Return how many numbers were mailed."""
    return sum(mail.kind == "number_issued" for mail in office.outbox.messages)


# -- several addresses and traders


def test_sixty_traders_get_two_addresses_by_one_number(each_office: Office):
    """One form, one review with the effect on each trader, one number: all are restricted."""
    office = each_office
    names = crowd(office, 60)
    office.add("192.0.2.9", names[7])
    alice = office.browser(ALICE, "/add")
    users = "\r\n".join(names[1:30]) + "\r\n" + ", ".join(names[30:])
    alice.press("Submit", user=names[0], users=users, addresses=f"{OFFICE}\r\n{HOME}")
    assert alice.page.texts("dd")[0] == "60"
    assert alice.page.part("understood") == f"{OFFICE}: 1 address; {HOME}: 1 address"
    first, second = alice.page.part("afterwards-1"), alice.page.part("afterwards-2")
    assert f"then only from {OFFICE}, {HOME}" in first
    assert names[59] in first
    assert f"Logins of {names[7]}: Then also from" in second
    assert numbers(office) == 0
    alice.press("Submit")
    assert numbers(office) == 1
    assert "One number confirms them all." in alice.text
    confirm(alice, office)
    assert alice.page.part("note").endswith("now hold. This was done for 60 traders.")
    for name in names:
        assert {OFFICE, HOME} <= set(office.held(name))


def test_a_username_with_a_comma(office: Office):
    """A line that is a username as a whole is not taken apart."""
    for name in ("doe, jane", "doe", "jane"):
        office.store.put_users([User(username=name, full_name=name, account_id="U1")])
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="mary", users="Doe, Jane\njsmith, alice", addresses="192.0.2.9")
    shown = alice.page.part("afterwards-1")
    assert "Logins of mary, doe, jane, jsmith, alice:" in shown
    assert alice.page.texts("dd")[0] == "4"


def test_a_list_that_is_too_long_for_a_draft_is_not_reviewed(office: Office):
    """A list that was cut is shown as a problem, and neither reviewed nor requested."""
    names = [hashlib.sha256(bytes([n])).hexdigest() for n in range(100)]
    office.store.put_users(User(username=n, full_name=n, account_id="U1") for n in names)
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user=names[0], users="\n".join(names), addresses=OFFICE, label="l" * 100)
    assert "was cut" in alice.page.part("users-problem")
    assert "understood" not in alice.page.ids
    assert alice.page.value("users")


def test_one_of_many_is_refused(office: Office):
    """An error names the trader whom it is about, and nothing is requested for the others."""
    office.add(OFFICE, "mary")
    alice = office.browser(ALICE, "/add")
    with office.unchanged():
        alice.press("Submit", user="jsmith", users="mary", addresses=OFFICE)
    assert "mary already has 203.0.113.7" in alice.page.part("addresses-problem")


def test_a_lockout_among_many(office: Office):
    """The warning of a lockout keeps all traders and addresses."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", users="alice", addresses=f"{HOME}, 192.0.2.9")
    alice.press("Submit")
    assert f"add {HOME}, 192.0.2.9 for 2 traders" in alice.text
    alice.press("Submit", lockout="accept")
    number = office.outbox.number_for(query(alice.address)["request"])
    alice.press("Submit", number=number)
    assert "You would lock yourself out" in alice.text
    alice.press("Submit", number=number, lockout="accept")
    assert office.held("alice") == office.held("jsmith") == [HOME, "192.0.2.9"]


def test_a_review_holds_for_what_it_showed(office: Office):
    """If something else would hold by now, or the form was altered, it is shown again."""
    office.use(add=Demand())
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)  # nothing is demanded: always reviewed
    assert "Today from anywhere; then only from 203.0.113.7." in alice.page.part("afterwards")
    held = office.add(HOME)
    alice.press("Submit")
    assert "Then also from 203.0.113.7." in alice.page.part("afterwards")
    alice.press("Submit", label="other")
    assert "other" in alice.page.texts("dd")
    assert office.held() == [HOME]
    office.flow.lift(BOSS, held.id, reason="x")
    alice.press("Submit")
    alice.press("Submit")
    note = f"{OFFICE} now holds. John Smith can log in only from: {OFFICE}."
    assert alice.page.part("note") == note
    assert numbers(office) == 0


# -- changes


def test_replace_a_restriction(each_office: Office):
    """The office moves: one request, one number, and the trader is never open."""
    office = each_office
    held = office.add(OFFICE, label="office")
    alice = office.browser(ALICE)
    alice.follow(f"Change {OFFICE}")
    assert alice.page.value("addresses") == OFFICE
    assert alice.page.value("label") == "office"
    alice.press("Submit", addresses="192.0.2.0/29")
    shown = alice.page.part("afterwards")
    assert f"Then also from 192.0.2.0/29; no longer from {OFFICE}." in shown
    alice.press("Change it", addresses="192.0.2.0/30")
    alice.press("Submit")
    alice.press("Submit")
    assert office.held() == [OFFICE]
    for words in ("Confirm the change", "In place of", "192.0.2.0/30: 4 addresses"):
        assert words in alice.text
    confirm(alice, office)
    note = alice.page.part("note")
    assert note.startswith(f"192.0.2.0/30 now holds in place of {OFFICE}.")
    assert office.held() == ["192.0.2.0/30"]
    alice.open(f"/change?user=jsmith&restriction={held.id}")
    assert alice.answer.status_code == 409
    assert "You replaced a restriction by 192.0.2.0/30" in alice.page.part("over")
    token = alice.open("/add").form("Submit").fields["token"]
    alice.post("/change", {"token": token, "user": "jsmith", "restriction": held.id})
    assert alice.answer.status_code == 409


def test_edit_the_label_and_the_expiry(office: Office):
    """The same addresses with another label or expiry; an untouched expiry stays exact."""
    until = office.later(days=3, seconds=7, microseconds=5)
    held = office.add(OFFICE, expires_at=until)
    where = f"/change?user=jsmith&restriction={held.id}"
    alice = office.browser(ALICE, where)
    with office.unchanged():
        alice.press("Submit")
    assert "Nothing is different" in alice.page.part("problems")
    alice.press("Submit", label="hotel")
    confirm(alice, office)
    assert alice.page.part("note").startswith(f"{OFFICE} was changed.")
    (now,) = office.store.load_policy("jsmith").restrictions
    assert (now.label, now.expires_at) == ("hotel", until)
    alice.follow("Change")
    alice.press("Submit", expires_at="2031-01-01T00:00")
    assert "For longer than today from 203.0.113.7." in alice.page.part("afterwards")
    confirm(alice, office)
    alice.follow("Change")
    alice.press("Submit", expires_at="")
    confirm(alice, office)
    (now,) = office.store.load_policy("jsmith").restrictions
    assert (now.label, now.expires_at) == ("hotel", None)
    assert "hotel" in alice.text


def test_a_change_that_is_submitted_twice(office: Office):
    held = office.add(OFFICE)
    alice = office.browser(ALICE, f"/change?user=jsmith&restriction={held.id}")
    fields = {**alice.page.form("Submit").fields, "addresses": "192.0.2.9"}
    alice.submit("/change", fields)  # its response is lost
    alice.post("/change", fields)
    assert "You have asked for this already." in alice.page.part("note")
    assert numbers(office) == 1


def test_a_change_that_would_lock_the_actor_out(office: Office):
    held = office.add(OFFICE, "alice")
    alice = office.browser(ALICE, f"/change?user=alice&restriction={held.id}")
    alice.press("Submit", addresses=HOME, label="kept")
    assert "replace 203.0.113.7 by 198.51.100.20 for Alice Adams" in alice.text
    alice.press("Go back")
    assert alice.page.value("label") == "kept"
    alice.press("Submit")
    alice.press("Submit", lockout="accept")
    assert "Confirm the change" in alice.text
    assert "kept" in alice.text


def test_a_restriction_that_differs_can_be_changed(office: Office):
    """If the restriction exists with another label, the error leads to "Change"."""
    office.add(OFFICE, label="office")
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE, label="other")
    problem = alice.page.part("addresses-problem")
    assert problem.endswith("Use its link “Change” to change it.")
    assert "office" in problem


# -- approvals and waits


def test_a_request_that_needs_an_approval(each_office: Office):
    """The page says what is missing; the requester gives the number, another one approves."""
    office = each_office
    office.use(add=Demand(number=True, approvals=1))
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "1 other administrator must approve it." in alice.page.part("note")
    assert "Missing: approvals by other administrators, 0 of 1" in alice.text
    assert not [each for each in alice.page.texts("button") if each.startswith("Approve")]
    confirm(alice, office)
    assert "You have confirmed the request." in alice.page.part("note")
    assert "Done: alice has given the confirmation number" in alice.text
    assert "You have done your part." in alice.text
    assert office.held() == []
    adam = office.browser(ADAM)
    adam.follow(f"Approve {OFFICE} for John Smith")
    assert "then only from 203.0.113.7." in adam.page.part("afterwards")
    adam.press("Approve")
    assert adam.page.part("note").startswith(f"{OFFICE} now holds.")
    assert office.held() == [OFFICE]


def test_an_approval_before_the_number(office: Office):
    office.use(add=Demand(number=True, approvals=1))
    request = office.ask()
    adam = office.browser(ADAM, f"/confirm?user=jsmith&request={request.id}")
    form = adam.page.form("Approve")
    adam.press("Approve")
    assert "You have approved the request." in adam.page.part("note")
    assert "0 of 1" not in adam.text
    assert "You have approved this request." in adam.text
    assert "Approve" not in adam.open("/").texts("table a")
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    assert "1 of 1 (adam)" in alice.text
    confirm(alice, office)
    assert office.held() == [OFFICE]
    adam.post("/approve", form.fields)
    assert adam.answer.status_code == 409


@pytest.mark.parametrize("email", ["alice@firm.example", "ALICE@firm.example"])
def test_one_person_in_two_roles(office: Office, email: str):
    """The workflow's refusal is shown, whatever button was pressed."""
    office.use(add=Demand(number=True, approvals=1))
    request = office.ask()
    twin = Actor(username="twin", email=email, manages=frozenset({"U1"}))
    browser = office.browser(twin, f"/confirm?user=jsmith&request={request.id}")
    with office.unchanged():
        browser.press("Approve")
    problem = "You cannot approve this request: its requester has your e-mail address."
    assert problem in browser.page.part("problems")


def test_an_approval_after_another_change(office: Office):
    """An approver sees the changes of others first; a request that would do more is refused."""
    office.use(add=Demand(approvals=1))
    request = office.ask()
    adam = office.browser(ADAM, f"/confirm?user=jsmith&request={request.id}")
    office.add(HOME)
    adam.press("Approve")
    assert "boss imposed" in adam.page.part("changed")
    adam.press("Approve")
    assert "withdraw the request and make a new one" in adam.page.part("problems")
    assert office.held() == [HOME]
    adam.press("Reject request")
    assert office.request(request).state == "cancelled"


def test_an_approval_that_would_lock_the_approver_out(office: Office):
    """The user concerned may approve; the page warns of the lockout first."""
    office.use(add=Demand(approvals=2))
    request = office.ask(HOME, "alice", ADAM)
    other = Actor(username="olga", email="olga@x.example", manages=frozenset({"U1"}))
    office.browser(other, f"/confirm?user=alice&request={request.id}").press("Approve")
    alice = office.browser(ALICE, f"/confirm?user=alice&request={request.id}")
    alice.press("Approve")
    assert "You would lock yourself out" in alice.text
    assert "number" not in alice.page.ids
    alice.press("Submit")
    assert "Tick the box" in alice.page.part("lockout-problem")
    assert office.held("alice") == []
    alice.press("Submit", lockout="accept")
    assert office.held("alice") == [HOME]


def test_a_request_that_waits(each_office: Office):
    """No number is sent before the wait is over; then the requester has it sent."""
    office = each_office
    office.use(add=Demand(number=True, wait=DAY))
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=OFFICE)
    assert "The change waits for 24 hours" in alice.page.part("note")
    assert "Missing: a wait until 2 Jan 2030, 12:00 UTC ( 24 hours left )" in alice.text
    assert "number" not in alice.page.ids
    where, request = alice.address, office.request_of(query(alice.address)["request"])
    assert numbers(office) == 0
    early = {**alice.page.form("Withdraw request").fields, "number": "1111111111"}
    for path in ("/resend", "/confirm"):
        seen = {"seen": office_version(office)}
        with office.unchanged():
            alice.post(path, early | seen)
        assert "has to wait until 2030-01-02 12:00:00 UTC." in alice.text
    office.wait(hours=24)
    alice.open(where)
    assert "Done: a wait" in alice.text
    alice.press("Send confirmation number")
    assert "You will receive an email with a confirmation number." in alice.page.part("note")
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


def office_version(office: Office) -> str:
    from ipguard.admin._changes import digest_restrictions

    return f"0.{digest_restrictions(office.flow.user(ALICE, 'jsmith'))}"


def test_a_request_that_only_waits(office: Office):
    """Without a number, the requester confirms by a button after the wait."""
    office.use(delete=Demand(wait=DAY))
    held = office.add(OFFICE)
    office.add(HOME)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={held.id}")
    assert "The change waits for 24 hours before it can hold." in alice.text
    alice.press("Delete")
    assert "Open this page again after the wait, and confirm." in alice.text
    office.wait(hours=24)
    alice.open(alice.address)
    alice.press("Submit")
    assert alice.page.part("note").startswith(f"{OFFICE} was deleted.")
    assert office.held() == [HOME]


# -- what waits for the actor


def test_waiting_for_you(office: Office):
    """The list begins with the actor's numbers and the requests that it may approve."""
    alice = office.browser(ALICE)
    assert "Waiting for you" not in alice.text
    crowd(office, 5)
    names = [f"trader{n:03}" for n in range(5)]
    office.flow.request_many(ALICE, names, OFFICE)
    slow = office.workflow(add=Demand(number=True, approvals=1, wait=timedelta(hours=2)))
    mine = slow.request(ALICE, "mary", HOME)
    theirs = slow.request(ADAM, "jsmith", HOME)

    def waiting() -> list[str]:
        return alice.open("/").texts(".waiting li .entry")

    many = f"Add {OFFICE} for trader000, trader001, trader002 and 2 more"
    assert sorted(waiting()) == [
        f"Add {HOME} for jsmith Requested by adam; your approval is missing.",
        f"Add {HOME} for mary It waits until 1 Jan 2030, 14:00 UTC.",
        f"{many} Enter the number. It is valid until 1 Jan 2030, 12:10 UTC.",
    ]
    office.wait(hours=2)
    assert f"{many} The number has expired: send a new one." in waiting()
    assert f"Add {HOME} for mary The wait is over: have the number sent." in waiting()
    office.flow.resend(ALICE, mine.id)
    office.flow.confirm(ALICE, mine.id, office.number(mine))
    assert f"Add {HOME} for mary It waits for the approval of another administrator." in waiting()
    alice.follow(f"Approve add {HOME} for jsmith")
    alice.press("Approve")
    assert not [each for each in waiting() if "jsmith" in each]
    alice.follow("Confirm add 203.0.113.7")
    assert "One number confirms them all." in alice.text
    assert "the requests for trader" in alice.text
    adam = office.browser(ADAM)
    assert any(f"Add {HOME} for mary Requested by alice" in e for e in adam.page.texts(".entry"))
    adam.press("Search", search="jsmith")
    assert "Waiting for you" not in adam.text
    office.flow.cancel(ADAM, theirs.id)


def test_the_user_concerned_cancels(office: Office):
    """A user who manages no account sees requests about itself that wait, and cancels them."""
    john = Actor(username="jsmith", email="jsmith@firm.example", manages=frozenset())
    office.ask(HOME)  # the user is told of it when it holds
    slow = office.workflow(add=Demand(number=True, wait=timedelta(hours=2)))
    request, other = slow.request(ALICE, "jsmith", OFFICE), slow.request(ALICE, "mary", OFFICE)
    browser = office.browser(john)
    shown = browser.page.texts(".entry")
    assert len(shown) == 1
    assert f"Add {OFFICE} Requested by alice." in shown[0]
    assert "then only from 203.0.113.7" in shown[0]
    fields = browser.page.form("Cancel").fields
    with office.unchanged():
        for one in (other, None):
            forged = {**fields, "request": getattr(one, "id", "x"), "user": "mary"}
            browser.post("/cancel", forged)
            assert browser.answer.status_code == 404
    browser.open("/")
    browser.press("Cancel")
    assert f"The request to add {OFFICE} was cancelled." in browser.page.part("note")
    assert office.request(request).state == "cancelled"
    assert "About your own" not in browser.text
    browser.post("/cancel", fields)
    assert browser.answer.status_code == 404


def test_a_request_that_only_has_to_be_confirmed(office: Office):
    office.use(delete=Demand(wait=timedelta(hours=2)))
    held = office.add(OFFICE)
    office.add(HOME)
    office.flow.delete(ALICE, held.id)
    office.wait(hours=2)
    assert f"Delete {OFFICE} for jsmith Confirm it." in office.browser(ALICE).text


# -- words


def test_the_address_of_the_mail_is_masked(office: Office):
    request = office.ask()
    text = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}").text
    assert "sent to a…e@firm.example" in text
    for email, masked in (("ab@x.org", "a…@x.org"), ("a@x.org", "a…@x.org")):
        assert _messages.mask_email(email) == masked


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("192.168.1.20", "192.168.1.20 is an address inside your office or home"),
        (f"{OFFICE}, 10.0.0.0/24", "10.0.0.0/24 are addresses inside your office or home"),
    ],
)
def test_private_addresses(office: Office, typed: str, hint: str):
    """The page warns of addresses that the internet never sees, unless it sees such ones itself."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", addresses=typed)
    assert hint in alice.page.part("private")
    alice.press("Submit")
    assert hint in alice.text
    inside = Actor(
        username="ines", email="i@x.example", manages=frozenset({"U1"}), address="10.1.2.3"
    )
    ines = office.browser(inside, "/add")
    ines.press("Submit", user="mary", addresses=typed)
    assert "inside your office" not in ines.text


def test_use_my_current_address(office: Office):
    """The button adds the actor's address to those that were typed, once."""
    alice = office.browser(ALICE, "/add")
    for _ in range(2):
        alice.press("Use my current address", addresses=alice.page.value("addresses") or HOME)
        assert alice.page.value("addresses") == f"{HOME}\n{OFFICE}"


def test_the_suggestion_is_a_button(office: Office):
    """The likely correction replaces the refused address, and no other."""
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", addresses=f"{HOME}, 10.1.1.1/30")
    assert "Did you mean 10.1.1.0/30?" in alice.page.part("addresses-problem")
    alice.press("Use 10.1.1.0/30", label="kept")
    assert alice.page.value("addresses") == f"{HOME}\n10.1.1.0/30"
    assert alice.page.value("label") == "kept"
    alice.press("Submit", addresses="nonsense")
    assert not [each for each in alice.page.texts("button") if each.startswith("Use n")]
    form = alice.page.form("Submit")
    alice.post("/add", {**form.fields, "do": "fix"})
    assert alice.page.value("addresses") == "nonsense"


def test_what_was_done_in_words():
    one, two = map(AddressRange.parse, (OFFICE, HOME))
    many = [AddressRange.parse(f"10.0.{n}.0/24") for n in range(30)]
    for kind, adds, removed, text in (
        (RequestKind.ADD, [one, two], [], f"{OFFICE}, {HOME} now hold."),
        (RequestKind.DELETE, [], [one, two], f"{OFFICE}, {HOME} were deleted."),
        (RequestKind.REPLACE, [one, two], [two, one], f"{OFFICE}, {HOME} were changed."),
        (RequestKind.ADD, many, [], "30 restrictions now hold."),
    ):
        assert _messages.describe_done(kind, adds, removed) == text
