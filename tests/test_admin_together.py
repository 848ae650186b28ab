"""Two administrators on the same page at once: the second is told what changed, by whom."""

import threading

import pytest

from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE
from tests.pages import Office
from tests.pages import office as office  # noqa: PLC0414 - a fixture


def test_a_confirm_of_what_somebody_cancelled(office: Office):
    """Who confirms is told who cancelled and when."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    office.browser(ADAM).press("Cancel")
    with office.unchanged():
        alice.press("Submit", number=number)
    assert alice.answer.status == 409
    assert "adam cancelled the request for 203.0.113.7 on 1 Jan 2030" in alice.page.part("over")


def test_a_cancel_of_what_somebody_confirmed(office: Office):
    """Who cancels is told that it holds already, and sees it."""
    request = office.ask()
    adam = office.browser(ADAM)
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number=office.number(request))
    with office.unchanged():
        adam.press("Cancel")
    assert adam.answer.status == 409
    assert "alice confirmed 203.0.113.7" in adam.page.part("over")
    assert "Restrictions of John Smith now 203.0.113.7" in adam.text


@pytest.mark.parametrize("how", ["delete", "lift", "confirm", "replace"])
def test_a_delete_of_what_is_gone(office: Office, how: str):
    """Who deletes is told who did, however it was done."""
    until = office.later(hours=1) if how == "replace" else None
    restriction = office.add(OFFICE, expires_at=until)
    office.add(HOME)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={restriction.id}")
    words = "alice deleted 203.0.113.7"
    if how == "delete":
        office.delete(restriction)
    elif how == "lift":
        office.flow.lift(BOSS, restriction.id, reason="x")
        words = "boss lifted 203.0.113.7 without a number"
    elif how == "replace":
        office.wait(hours=2)
        office.confirm(office.ask(OFFICE))
        words = "alice confirmed 203.0.113.7"
    else:
        office.use(confirm_deletes=True)
        office.confirm(office.ask_to_delete(restriction))
        words = "alice confirmed the deletion of 203.0.113.7"
    with office.unchanged():
        adam.press("Delete")
    assert adam.answer.status == 409
    assert words in adam.page.part("over")


def test_a_delete_that_became_the_last(office: Office):
    """What was one of two is the last now: nothing is deleted before that has been seen."""
    first, second = office.add(OFFICE), office.add(HOME)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={first.id}")
    assert "Every address" not in adam.text
    office.delete(second)
    with office.unchanged():
        adam.press("Delete", reason="kept")
    assert adam.answer.status == 200
    assert "alice deleted 198.51.100.20" in adam.page.part("changed")
    assert "Every address" in adam.text
    assert adam.page.inputs["reason"]["value"] == "kept"
    assert adam.page.elements_with("autofocus")["id"] == "changed"
    adam.press("Delete", open="accept")
    assert office.held() == []


def test_a_confirm_after_others_changed_something(office: Office):
    """The page first shows what others added; the number, which is kept nowhere, is typed again."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    office.add(HOME)
    alice.press("Submit", number=office.number(request))
    assert "boss imposed 198.51.100.20 without a number" in alice.page.part("changed")
    assert "value" not in alice.page.inputs["number"]
    assert office.held() == [HOME]
    alice.press("Submit", number=office.number(request))
    assert sorted(office.held()) == sorted([HOME, OFFICE])


def test_what_concerns_nobody_is_not_told(office: Office):
    """Wrong guesses, new numbers and other requests do not get in the way."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    office.guess(request)
    office.ask(HOME, actor=ADAM)
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


def test_a_change_that_this_actor_may_not_see(office: Office):
    """That something changed is said also where the trail does not tell this actor what."""
    first = office.add(OFFICE)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={first.id}")
    office.flow.impose_many(BOSS, [("jsmith", HOME)], reason="x")
    with office.unchanged():
        adam.press("Delete", open="accept")
    assert "The restrictions of this trader are not the same any more." in adam.page.part("changed")


@pytest.mark.parametrize("seen", ["", "x.y", "9" * 30 + ".x", "-1.x"])
def test_what_was_seen_is_no_secret_and_no_right(office: Office, seen: str):
    """A form that says something else was seen shows the page again, no more."""
    office.add(HOME)
    first = office.add(OFFICE)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={first.id}")
    with office.unchanged():
        adam.press("Delete", seen=seen)
    assert adam.page.part("changed")


@pytest.mark.parametrize("method", ["confirm", "cancel", "resend"])
def test_somebody_in_between(office: Office, monkeypatch, method: str):
    """A change between the page's look and the workflow's turn is told just the same."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    real = getattr(office.flow, method)

    def after(*args, **more):
        office.workflow().cancel(ADAM, request.id)
        return real(*args, **more)

    monkeypatch.setattr(office.flow, method, after)
    button = {"confirm": "Submit", "cancel": "Cancel", "resend": "Send a new number"}[method]
    alice.press(button, **({"number": number} if method == "confirm" else {}))
    assert alice.answer.status == 409
    assert "adam cancelled the request" in alice.page.part("over")


def test_a_delete_in_between(office: Office, monkeypatch):
    """The same for a deletion."""
    restriction = office.add(OFFICE)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    real = office.flow.delete

    def after(*args, **more):
        office.workflow().delete(ADAM, restriction.id)
        return real(*args, **more)

    monkeypatch.setattr(office.flow, "delete", after)
    alice.press("Delete", open="accept")
    assert alice.answer.status == 409
    assert "adam deleted 203.0.113.7" in alice.page.part("over")


def test_the_last_two_in_the_same_moment(office: Office, monkeypatch):
    """Who deletes one of two, while another goes at that moment, is asked whether to go on."""
    first, second = office.add(OFFICE), office.add(HOME)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={first.id}")
    real = office.flow.delete

    def after(*args, **more):
        office.workflow().delete(ADAM, second.id)
        return real(*args, **more)

    monkeypatch.setattr(office.flow, "delete", after)
    alice.press("Delete", reason="kept")
    assert alice.answer.status == 200
    assert "adam deleted 198.51.100.20" in alice.page.part("changed")
    assert "Every address" in alice.text
    assert alice.page.inputs["reason"]["value"] == "kept"
    assert office.held() == [OFFICE]
    monkeypatch.setattr(office.flow, "delete", real)
    alice.press("Delete", open="accept")
    assert "has no restrictions now and can log in from any address." in alice.page.part("note")


def test_the_last_two_confirmed_in_the_same_moment(office: Office, monkeypatch):
    """The same where each deletion needs a number: the number stays good for the second answer."""
    office.use(confirm_deletes=True)
    first, second = office.add(OFFICE), office.add(HOME)
    request = office.ask_to_delete(first)
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    assert "Every address" not in alice.text
    real = office.flow.confirm

    def after(*args, **more):
        office.workflow().lift(BOSS, second.id, reason="x")
        return real(*args, **more)

    monkeypatch.setattr(office.flow, "confirm", after)
    alice.press("Submit", number=office.number(request))
    assert alice.answer.status == 200
    assert "Every address" in alice.text
    assert office.held() == [OFFICE]
    monkeypatch.setattr(office.flow, "confirm", real)
    alice.press("Submit", number=office.number(request))
    assert office.held() == []


def test_a_deletion_asked_for_and_closed_in_between(office: Office, monkeypatch):
    """Where the request that stood in the way is over already, the user's page is shown."""
    office.use(confirm_deletes=True)
    restriction = office.add(OFFICE)
    request = office.ask_to_delete(restriction)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    real = office.flow.delete

    def before(*args, **more):
        try:
            return real(*args, **more)
        finally:
            office.workflow().cancel(ADAM, request.id)

    monkeypatch.setattr(office.flow, "delete", before)
    alice.press("Delete", open="accept")
    assert "It has been asked to delete this already." in alice.page.part("note")
    assert alice.address.startswith("/user?")


def test_many_send_the_same_form(office: Office):
    """One number, sent by many at once: it holds once, and everybody gets a page that says so."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    sent = {**alice.form("Submit")[0].fields, "number": office.number(request)}
    browsers = []
    for _ in range(6):
        other = office.stranger(ALICE)
        other.cookies = dict(alice.cookies)
        browsers.append(other)
    threads = [threading.Thread(target=b.post, args=("/confirm", sent)) for b in browsers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert office.held() == [OFFICE]
    confirms = [row for row in office.rows() if row.action == "confirm"]
    assert len(confirms) == 1
    assert sorted(b.answer.status for b in browsers) == [200, 409, 409, 409, 409, 409]
