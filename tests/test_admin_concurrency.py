"""Concurrent administrators: a stale form is not applied, and shows the changes of others."""

from collections.abc import Callable
from typing import Any

import pytest

from ipguard import Workflow
from tests.flows import ADAM, ALICE, BOSS, HOME, OFFICE
from tests.pages import Office
from tests.pages import office as office  # noqa: PLC0414 - a fixture


def test_confirm_after_a_cancel(office: Office):
    """The page names the actor who cancelled the request, and when."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    office.browser(ADAM).press("Cancel")
    with office.unchanged():
        alice.press("Submit", number=number)
    assert alice.answer.status_code == 409
    assert "adam cancelled the request for 203.0.113.7 on 1 Jan 2030" in alice.page.part("over")


def test_cancel_after_a_confirm(office: Office):
    """The page names the actor who confirmed, and shows the restriction."""
    request = office.ask()
    adam = office.browser(ADAM)
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number=office.number(request))
    with office.unchanged():
        adam.press("Cancel")
    assert adam.answer.status_code == 409
    assert "alice confirmed 203.0.113.7" in adam.page.part("over")
    assert "Restrictions of John Smith now 203.0.113.7" in adam.text


@pytest.mark.parametrize("how", ["delete", "lift", "confirm", "replace"])
def test_delete_after_the_restriction_ended(office: Office, how: str):
    """The page names the actor who ended the restriction, however it ended."""
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
    assert adam.answer.status_code == 409
    assert words in adam.page.part("over")


def test_delete_of_what_became_the_last(office: Office):
    """A restriction that has become the last one is not deleted before the warning was shown."""
    first, second = office.add(OFFICE), office.add(HOME)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={first.id}")
    assert "Then from anywhere" not in adam.text
    office.delete(second)
    with office.unchanged():
        adam.press("Delete", reason="kept")
    assert adam.answer.status_code == 200
    assert "alice deleted 198.51.100.20" in adam.page.part("changed")
    assert "Then from anywhere" in adam.text
    assert adam.page.value("reason") == "kept"
    assert adam.page.one("[autofocus]")["id"] == "changed"
    adam.press("Delete", open="accept")
    assert office.held() == []


def test_confirm_after_another_change(office: Office):
    """The page first shows what others added; the number has to be typed again."""
    office.add("192.0.2.9")
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    office.add(HOME)
    alice.press("Submit", number=office.number(request))
    assert "boss imposed 198.51.100.20 without a number" in alice.page.part("changed")
    assert not alice.page.field("number").has_attr("value")
    assert OFFICE not in office.held()
    alice.press("Submit", number=office.number(request))
    assert OFFICE in office.held()


def test_confirm_what_would_now_do_more(office: Office):
    """A request that tightened and would now loosen is refused, with what to do; before the
    number is given, the page says so.
    """
    request = office.ask()
    office.add(HOME)
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    assert "withdraw the request and make a new one." in alice.page.part("obstacle")
    with office.unchanged():
        alice.press("Submit", number=office.number(request))
    assert "The restrictions of jsmith have changed" in alice.page.part("problems")
    alice.press("Withdraw request")
    assert office.request(request).state == "cancelled"
    assert office.held() == [HOME]


def test_a_request_whose_restriction_has_ended(office: Office):
    """If nothing of a request is left to do, the page says so."""
    office.use(confirm_deletes=True)
    both = [office.add(OFFICE), office.add("192.0.2.9")]
    office.add(HOME)
    request = office.flow.request(ALICE, "jsmith", replaces=[each.id for each in both])
    for each in both:
        office.flow.lift(BOSS, each.id, reason="x")
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    text = "The restriction that this is about has ended."
    assert text in alice.page.part("obstacle")
    alice.press("Submit", number=office.number(request))
    assert text in alice.page.part("problems")
    assert office.held() == [HOME]
    alice.press("Withdraw request")
    assert office.request(request).state == "cancelled"


def test_changes_that_do_not_matter(office: Office):
    """Wrong numbers and other requests do not make a form stale."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    office.guess(request)
    office.ask(HOME, actor=ADAM)
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


def test_a_change_that_this_actor_may_not_see(office: Office):
    """The page reports the change even if the audit entry is hidden from this actor."""
    first = office.add(OFFICE)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={first.id}")
    office.flow.impose_many(BOSS, [("jsmith", HOME)], reason="x")
    with office.unchanged():
        adam.press("Delete", open="accept")
    assert "The restrictions of this trader are not the same any more." in adam.page.part("changed")


@pytest.mark.parametrize("seen", ["", "x.y", "9" * 30 + ".x", "-1.x"])
def test_an_invalid_version(office: Office, seen: str):
    office.add(HOME)
    first = office.add(OFFICE)
    adam = office.browser(ADAM, f"/delete?user=jsmith&restriction={first.id}")
    with office.unchanged():
        adam.press("Delete", seen=seen)
    assert adam.page.part("changed")


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    office: Office,
    method: str,
    change: Callable[[Workflow], object],
) -> Any:
    """Let another server make a change just before a method of the workflow; return the method."""
    real = getattr(office.flow, method)

    def after(*args: Any, **more: Any) -> Any:
        change(office.workflow())
        return real(*args, **more)

    monkeypatch.setattr(office.flow, method, after)
    return real


@pytest.mark.parametrize("method", ["confirm", "cancel", "resend"])
def test_a_request_cancelled_in_between(office: Office, monkeypatch, method: str):
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    interrupt(monkeypatch, office, method, lambda flow: flow.cancel(ADAM, request.id))
    button = {"confirm": "Submit", "cancel": "Withdraw request", "resend": "Send a new number"}[
        method
    ]
    alice.press(button, **({"number": number} if method == "confirm" else {}))
    assert alice.answer.status_code == 409
    assert "adam cancelled the request" in alice.page.part("over")


def test_a_restriction_deleted_in_between(office: Office, monkeypatch):
    restriction = office.add(OFFICE)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    interrupt(monkeypatch, office, "delete", lambda flow: flow.delete(ADAM, restriction.id))
    alice.press("Delete", open="accept")
    assert alice.answer.status_code == 409
    assert "adam deleted 203.0.113.7" in alice.page.part("over")


def test_the_other_one_deleted_in_between(office: Office, monkeypatch):
    """If the other restriction is deleted in between, the warning about the last one is shown."""
    first, second = office.add(OFFICE), office.add(HOME)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={first.id}")
    real = interrupt(monkeypatch, office, "delete", lambda flow: flow.delete(ADAM, second.id))
    alice.press("Delete", reason="kept")
    assert alice.answer.status_code == 200
    assert "adam deleted 198.51.100.20" in alice.page.part("changed")
    assert "Then from anywhere" in alice.text
    assert alice.page.value("reason") == "kept"
    assert office.held() == [OFFICE]
    monkeypatch.setattr(office.flow, "delete", real)
    alice.press("Delete", open="accept")
    assert "has no restrictions now and can log in from any address." in alice.page.part("note")


def test_the_other_one_lifted_during_a_confirm(office: Office, monkeypatch):
    """A deletion that has become one of the last restriction is not confirmed."""
    office.use(confirm_deletes=True)
    first, second = office.add(OFFICE), office.add(HOME)
    request = office.ask_to_delete(first)
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    assert "Then from anywhere" not in alice.text
    real = interrupt(
        monkeypatch, office, "confirm", lambda flow: flow.lift(BOSS, second.id, reason="x")
    )
    alice.press("Submit", number=office.number(request))
    assert alice.answer.status_code == 200
    assert "withdraw the request and make a new one." in alice.page.part("problems")
    assert office.held() == [OFFICE]
    monkeypatch.setattr(office.flow, "confirm", real)
    alice.press("Submit", number=office.number(request))
    assert office.held() == [OFFICE]


def test_a_pending_deletion_cancelled_in_between(office: Office, monkeypatch):
    """If the pending deletion is closed in between, the user's page is shown."""
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
