"""The page: where a trader logged in from, suggestions, refused logins, and what would be lost."""

from tests.flows import ALICE, BOSS, CAROL, HOME, OFFICE
from tests.pages import Office, query
from tests.pages import each_office as each_office  # noqa: PLC0414 - a fixture
from tests.pages import office as office  # noqa: PLC0414 - a fixture

ELSEWHERE = "192.0.2.66"
SIX = "2001:db8::7"


def test_where_a_trader_logged_in_from(each_office: Office):
    """Each address with its logins; each restriction with its last use."""
    office = each_office
    office.add(ELSEWHERE)
    office.wait(days=90)
    office.add(HOME)
    office.wait(seconds=1)
    office.add(OFFICE)
    office.log_in(HOME, 7, 1)
    page = office.browser(ALICE, "/user?user=jsmith").page
    (line,) = page.texts("section[aria-labelledby=seen] li")
    assert line == f"{HOME} 7 allowed, 1 refused, last on 1 Apr 2030, 12:00 UTC"
    used = page.texts("section[aria-labelledby=restrictions] .by")
    assert used == [
        "Not used in the last 90 days",
        "Last used 1 Apr 2030, 12:00 UTC",
        "Not used yet",
    ]


def test_without_sightings_the_page_says_nothing_of_them(office: Office):
    """The host may not report logins at all: "not used" would be a guess."""
    office.add(HOME)
    page = office.browser(ALICE, "/user?user=jsmith").page
    assert {"seen", "refused"} & page.ids == set()
    assert "used" not in page.text


def test_sightings_of_other_accounts_are_not_shown(office: Office):
    office.log_in(HOME, username="zed")
    assert office.browser(ALICE, "/user?user=zed").answer.status_code == 404
    assert HOME in office.browser(CAROL, "/user?user=zed").text


def test_a_suggestion_fills_in_the_form(each_office: Office):
    """One click on the trader's page; a second address by a click on the form."""
    office = each_office
    office.log_in(SIX, 9)
    office.log_in(HOME, 5)
    office.log_in(OFFICE, 1)
    office.add(OFFICE)
    alice = office.browser(ALICE, "/user?user=jsmith")
    assert alice.page.texts("#seen ~ form button") == ["Add 2001:db8::/64", f"Add {HOME}"]
    alice.press(f"Add {HOME}")
    assert alice.page.value("addresses") == HOME
    assert alice.page.one("option[selected]")["value"] == "jsmith"
    alice.press("Use 2001:db8::/64", label="home")
    assert alice.page.value("addresses") == f"{HOME}\n2001:db8::/64"
    assert alice.page.value("label") == "home"
    alice.press("Use 2001:db8::/64")
    assert alice.page.value("addresses") == f"{HOME}\n2001:db8::/64"
    alice.press("Submit")
    assert "2001:db8::/64" in alice.page.part("understood")
    assert numbers(office) == 0


def numbers(office: Office) -> int:
    return sum(mail.kind == "number_issued" for mail in office.outbox.messages)


def test_suggestions_on_the_form_for_a_change(office: Office):
    office.log_in(HOME, 5)
    held = office.add(OFFICE)
    alice = office.browser(ALICE, f"/change?user=jsmith&restriction={held.id}")
    alice.press(f"Use {HOME}")
    assert alice.page.value("addresses") == f"{OFFICE}\n{HOME}"
    assert alice.address.startswith("/change")


def test_suggestions_need_a_trader(office: Office):
    """Another button than those on the form does not bypass the rules for addresses."""
    office.log_in(HOME, 5)
    alice = office.browser(ALICE, "/add")
    assert "addresses-used" not in alice.page.ids
    form = alice.page.form("Submit")
    alice.post(form.action, {**form.fields, "user": "jsmith", "do": "use <b>nonsense"})
    assert alice.page.value("addresses") == "<b>nonsense"
    assert "addresses-used" in alice.page.ids
    alice.press("Submit")
    assert "is not accepted" in alice.page.part("addresses-problem")


def test_a_refused_login_is_requested_with_one_click(each_office: Office):
    office = each_office
    office.log_in(SIX, 0, 1)
    office.wait(seconds=1)
    office.log_in(ELSEWHERE, 0, 3)
    office.log_in(HOME, 4, 2)
    office.add(HOME)
    alice = office.browser(ALICE, "/user?user=jsmith")
    shown = alice.page.texts("#refused ~ ul .entry")
    assert shown == [
        f"{ELSEWHERE} 3 times, last on 1 Jan 2030, 12:00 UTC",
        f"{SIX} 1 Jan 2030, 12:00 UTC It comes over IPv6, and only IPv4 is listed.",
    ]
    assert ("History", "./history") in alice.page.links
    alice.press(f"Request this address {SIX}")
    assert alice.page.value("addresses") == "2001:db8::/64"
    alice.open("/user?user=jsmith")
    alice.press(f"Request this address {ELSEWHERE}")
    alice.press("Submit")
    alice.press("Submit", number=office.outbox.number_for(query(alice.address)["request"]))
    assert ELSEWHERE in office.held()
    alice.open("/user?user=jsmith")
    assert ELSEWHERE not in " ".join(alice.page.texts("#refused ~ ul .entry"))


def test_addresses_of_removed_traders_cannot_be_requested(office: Office):
    office.log_in(ELSEWHERE, 1, 3)
    office.add(HOME)
    office.store.remove_users(["jsmith"])
    page = office.browser(BOSS, "/user?user=jsmith").page
    assert ELSEWHERE in page.text
    assert page.texts("form button") == []


def test_what_a_change_would_have_refused_is_shown_before_it_is_confirmed(each_office: Office):
    """On the review, on the request that waits for its number, and before a deletion."""
    office = each_office
    office.log_in(HOME, 3)
    office.log_in(OFFICE, 9)
    alice = office.browser(ALICE, "/add?user=jsmith")
    alice.press("Submit", addresses="203.0.113.0/29")
    expected = "This would have refused 3 of 12 recent logins. They came from 198.51.100.20"
    assert expected in alice.page.part("afterwards")
    alice.press("Submit")
    assert expected in alice.page.part("afterwards")
    alice.press("Submit", number=office.outbox.number_for(query(alice.address)["request"]))
    other = office.add("192.0.2.9")
    alice.open(f"/delete?user=jsmith&restriction={other.id}")
    assert "would have refused none of 12 recent logins." in alice.page.part("afterwards")
    (held,) = [r for r in office.store.load_policy("jsmith").restrictions if r.id != other.id]
    alice.open(f"/delete?user=jsmith&restriction={held.id}")
    assert "would have refused 9 of 12 recent logins." in alice.page.part("afterwards")


def test_many_addresses_that_would_be_lost_are_counted(office: Office):
    for n in range(1, 9):
        office.log_in(f"198.51.100.{n}")
    alice = office.browser(ALICE, "/add?user=jsmith")
    alice.press("Submit", addresses="203.0.113.0/29")
    assert "refused 8 of 8 recent logins." in alice.page.part("afterwards")
    assert "and 3 other addresses." in alice.page.part("afterwards")


def test_what_a_change_of_several_traders_would_have_refused(office: Office):
    """Each trader has logins of its own."""
    office.log_in(HOME, 3)
    office.log_in(OFFICE, 9, username="mary")
    office.log_in(HOME, 2, username="alice")
    alice = office.browser(ALICE, "/add")
    alice.press("Submit", user="jsmith", users="mary, alice", addresses=OFFICE)
    assert alice.page.texts("#seen li") == [
        "John Smith: This would have refused 3 of 3 recent logins.",
        "Alice Adams: This would have refused 2 of 2 recent logins.",
    ]
    assert "recent logins" not in alice.page.part("afterwards-1")
