"""The overview, the history, visibility, and the audit log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

import ipguard
from ipguard import (
    Action,
    Actor,
    Demand,
    Direction,
    InvalidValue,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
    audit,
)
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk

NOBODY = Actor(username="nobody", email="nobody@x.example", manages=frozenset())


def _names(page: ipguard.Page[ipguard.UserOverview]) -> list[str]:
    return [line.user.username for line in page]


# -- the overview ------------------------------------------------------------------------------


def test_the_overview_of_an_account(desk: Desk) -> None:
    """Each user of the accounts has one line, with restrictions and pending requests."""
    office = desk.add(OFFICE)
    request = desk.ask(HOME)
    page = desk.flow.overview(ALICE)
    assert _names(page) == ["alice", "jsmith", "mary"]
    assert page.next is None
    line = page.items[1]
    assert line == ipguard.UserOverview(
        user=JSMITH, restrictions=(office,), pending=(request,), summary=OFFICE
    )
    assert {page.items[n].summary for n in (0, 2)} == {"No restrictions"}


def test_searching(desk: Desk) -> None:
    """Surrounding white space is ignored; names and addresses are found."""
    desk.add(HOME, "mary")
    for search in (f" {HOME}", "Major", " ma "):
        assert _names(desk.flow.overview(BOSS, search=search)) == ["mary"]


# -- what is outside does not exist ------------------------------------------------------------


@pytest.mark.parametrize("actor", [CAROL, NOBODY])
def test_other_accounts_do_not_exist(desk: Desk, actor: Actor) -> None:
    """Errors for another account's objects equal those for invented ones."""
    restriction, request = desk.add(HOME), desk.ask()
    flow = desk.flow
    cases: list[tuple[Callable[[str], object], str, type[ipguard.IPGuardError]]] = [
        (lambda name: flow.request(actor, name, "192.0.2.9"), "jsmith", UnknownUser),
        (lambda key: flow.cancel(actor, key), request.id, UnknownRequest),
        (lambda key: flow.resend(actor, key), request.id, UnknownRequest),
        (lambda key: flow.confirm(actor, key, desk.number(request)), request.id, UnknownRequest),
        (lambda key: flow.delete(actor, key), restriction.id, UnknownRestriction),
    ]
    for call, real, error in cases:
        messages = []
        for name in (real, "0" * 16):
            with desk.unchanged(), pytest.raises(error) as caught:
                call(name)
            assert type(caught.value) is error
            messages.append(str(caught.value).replace(name, "?"))
        assert messages[0] == messages[1]


def test_requests_reveal_nothing_about_other_accounts(desk: Desk) -> None:
    desk.add(OFFICE, "zed")
    desk.flow.request(CAROL, "zed", HOME)
    for addresses in (OFFICE, HOME):
        with desk.unchanged(), pytest.raises(UnknownUser):
            desk.flow.request(ALICE, "zed", addresses)


# -- the history -------------------------------------------------------------------------------


def test_the_audit_entry_of_a_request(desk: Desk) -> None:
    """An entry has the actor, its address, the action, the user and the details."""
    request = desk.ask("203.0.113.9", label="a b=c")
    desk.flow.cancel(ADAM, request.id)
    cancelled, asked, _ = desk.flow.history(BOSS)
    assert (asked.actor, asked.actor_address, asked.username, asked.account_id, asked.at) == (
        "alice",
        OFFICE,
        "jsmith",
        "U1",
        request.requested_at,
    )
    assert asked.detail == {
        "kind": "add",
        "addresses": "203.0.113.9",
        "label": "a b=c",
        "request": request.id,
        "direction": "tightens",
        "afterwards": "Today from anywhere; then only from 203.0.113.9.",
    }
    assert (cancelled.actor, cancelled.actor_address) == ("adam", None)


def test_the_detail_of_a_confirmation(desk: Desk) -> None:
    expires = desk.later(days=1)
    request = desk.ask(label="office", expires_at=expires)
    applied = desk.confirm(request)
    assert applied.restriction is not None
    assert desk.rows()[0].detail == {
        "addresses": OFFICE,
        "label": "office",
        "expires_at": expires.isoformat(),
        "restriction": applied.restriction.id,
        "request": request.id,
        "direction": "tightens",
        "lost": "0.0.0.0/0, ::/0",
        "afterwards": f"Today from anywhere; then only from {OFFICE} (until 2030-01-02 12:00 UTC).",
    }


def test_the_history_of_one_user(desk: Desk) -> None:
    desk.add(OFFICE)
    desk.add(HOME, "mary")
    rows = desk.flow.history(ALICE, username="JSmith")
    assert [row.username for row in rows] == ["jsmith"]
    assert len(desk.flow.history(ALICE, username="never")) == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("limit", [0, -1, 1001, True, 1.0, "5", None, 10**30]),
        ("search", [None, 5, b"x", "x" * 257, "a\nb", "\0", "\ud800", "\u202e"]),
        ("after", [5, True, b"x", ["x"], 1.5]),
        ("before", [0, -1, True, "5", 1.5, 2**63, 10**30, [1]]),
    ],
)
def test_invalid_pages(desk: Desk, name: str, values: list[Any]) -> None:
    """Limits are 1 to 1,000, searches a short line, and `before` is a revision."""
    overview, history = desk.flow.overview, desk.flow.history
    calls: dict[str, list[Any]] = {"limit": [overview, history], "before": [history]}
    for call, value in product(calls.get(name, [overview]), values):
        with pytest.raises(InvalidValue) as caught:
            call(BOSS, **{name: value})
        assert caught.value.name == name
    assert len(overview(BOSS, limit=1000)) == 4
    assert len(history(BOSS, before=2**63 - 1)) == 1


# -- the audit log -----------------------------------------------------------------------------


def test_every_change_is_audited_and_logged_once(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """Each change is logged once, in order; refused calls are not."""
    caplog.set_level(logging.INFO, "ipguard.audit")
    caplog.clear()
    start = desk.rows()[0].revision
    desk.use(confirm_deletes="last")
    flow = desk.flow
    request = desk.ask()
    desk.guess(request, times=2)
    desk.wait(seconds=30)
    desk.outbox.fail = True
    with pytest.raises(ipguard.DeliveryError):
        flow.resend(ALICE, request.id)
    desk.outbox.fail = False
    flow.resend(ALICE, request.id)
    desk.confirm(request)
    with pytest.raises(ipguard.RequestClosed):
        desk.confirm(request)
    with pytest.raises(UnknownUser):
        flow.request(ALICE, "zed", HOME)
    (restriction,) = desk.store.load_policy("jsmith").restrictions
    flow.cancel(ALICE, desk.ask_to_delete(restriction).id)
    flow.lift(BOSS, restriction.id, reason="x")
    desk.add()
    flow.impose_many(BOSS, [("zed", HOME)], reason="x")
    flow.unlock(BOSS, "alice", reason="x")
    desk.store.remove_users(["mary"])
    rows = [row for row in reversed(desk.rows()) if row.revision > start]
    lines = [r.getMessage() for r in caplog.records if r.name == "ipguard.audit"]
    assert len(lines) == len(rows)
    assert [row.revision for row in rows] == list(range(start + 1, start + 1 + len(rows)))
    assert [row.action for row in rows] == [
        Action.REQUEST,
        *[Action.WRONG_NUMBER] * 2,
        *[Action.RESEND, Action.DELIVERY_FAILED, Action.RESEND],
        *[Action.CONFIRM, Action.REQUEST, Action.CANCEL, Action.LIFT],
        *[Action.IMPOSE, Action.IMPOSE_MANY, Action.UNLOCK, Action.REMOVE_USERS],
    ]
    for row, line in zip(rows, lines, strict=True):
        assert line.startswith(f"revision={row.revision} at={row.at.isoformat()} ")
        actor = f" actor={row.actor}" if row.actor is not None else ""
        assert f" action={row.action}{actor} " in line
        assert line.endswith(audit.encode(row.detail))
        assert "\n" not in line


def test_a_username_cannot_forge_a_line_of_the_audit_log(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ipguard.audit")
    odd = "x action=lift\u2028y"
    desk.store.put_users([ipguard.User(username=odd, full_name="", account_id="U1")])
    caplog.clear()
    desk.flow.impose(BOSS, odd, OFFICE, reason="x")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "ipguard.audit"]
    assert ' username="x action=lift\\u2028y" account=U1 ' in line
    assert len(line.splitlines()) == 1


# -- a pending request, as things are now ------------------------------------------------------


def test_preview_a_request(desk: Desk) -> None:
    """The impact is that of now, and what `confirm` would refuse is refused."""
    first = desk.ask(OFFICE)
    assert desk.flow.preview_request(ADAM, first.id).direction is Direction.TIGHTENS
    other = desk.add(HOME)
    with pytest.raises(ipguard.DirectionChanged):
        desk.flow.preview_request(ADAM, first.id)
    second = desk.ask("192.0.2.9", replaces=[other.id])
    assert "no longer from 198.51.100.20" in desk.flow.preview_request(ADAM, second.id).summary
    for request_id in (second.id, "none"):
        with pytest.raises(UnknownRequest):
            desk.flow.preview_request(CAROL, request_id)


def test_requests_about_the_actor(desk: Desk) -> None:
    """A user is shown what it was told about: pending, and with a wait or approvals."""
    john = Actor(username="jsmith", email="jsmith@firm.example", manages=frozenset())
    desk.ask(HOME)
    desk.use(add=Demand(approvals=1))
    told = desk.ask(OFFICE)
    desk.ask(OFFICE, "mary")
    assert desk.flow.concerning(john) == (told,)
    assert desk.flow.concerning(NOBODY) == ()
    desk.wait(hours=25)
    assert desk.flow.concerning(john) == ()
    desk.store.remove_users(["jsmith"])
    assert desk.flow.concerning(john) == ()


def test_the_demand_of_a_request(desk: Desk) -> None:
    """Settings that are stricter than those of the request apply to it, looser ones do not."""
    request = desk.ask(OFFICE)
    assert desk.flow.demand_of(request) == Demand(number=True)
    desk.use(add=Demand(approvals=1))
    assert desk.flow.demand_of(request) == Demand(number=True, approvals=1)


def test_filters_and_counts(desk: Desk) -> None:
    """An actor sees and counts the users of its own accounts."""
    desk.add(OFFICE, "jsmith", expires_at=desk.later(days=7))
    desk.add(OFFICE, "zed")
    desk.ask(username="mary")
    found: dict[Any, list[str]] = {
        "restricted": ["jsmith"],
        "unrestricted": ["alice", "mary"],
        "pending": ["mary"],
        "expiring": ["jsmith"],
    }
    for only, names in found.items():
        page = desk.flow.overview(ALICE, only=only)
        assert [line.user.username for line in page] == names
    counts = desk.flow.counts(ALICE)
    assert counts == (3, 1, 2, 1, 1, frozenset())
    assert (desk.flow.counts(BOSS).users, desk.flow.counts(BOSS).text("users")) == (4, "4")
    for only in ("expired", "", 7):
        with pytest.raises(InvalidValue):
            desk.flow.overview(ALICE, only=only)  # type: ignore[arg-type]
