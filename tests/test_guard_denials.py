"""The log of denials, and what a host does with a decision."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from ipguard import Decision, Outcome, Reason
from ipguard.aio import AsyncGuard
from ipguard.errors import StoreUnavailable
from tests.guards import ELSEWHERE, HOME, OFFICE, Call, World, new_world


@pytest.fixture
def world(caplog: pytest.LogCaptureFixture) -> World:
    caplog.set_level(logging.INFO, "ipguard.guard")
    world = new_world()
    world.restrict("jsmith", HOME)
    return world


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name.startswith("ipguard_")}


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("allowed", [True, False])
def test_outcome(reason: Reason, allowed: bool) -> None:
    """With `report_only`, every reason is allowed."""
    outcome = Decision(allowed=allowed, reason=reason, revision=1).outcome
    if allowed:
        assert outcome is Outcome.ALLOW
    elif reason is Reason.STORE_UNAVAILABLE:
        assert outcome is Outcome.RETRY
    else:
        assert outcome is Outcome.REFUSE


def test_outage_is_retried_and_a_denial_refused(world: World) -> None:
    guard = world.guard()
    assert guard.check("jsmith", HOME).outcome is Outcome.ALLOW
    assert guard.check("jsmith", OFFICE).outcome is Outcome.REFUSE
    world.store.down = StoreUnavailable("down")
    world.pass_time(5)
    assert guard.check("jsmith", HOME).outcome is Outcome.RETRY


def test_denial_is_logged_with_fields(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """By the slow path and by the fast path alike."""
    guard = world.guard()
    assert guard.check("JSmith", HOME)
    for name in ("JSmith", "jsmith"):
        for ask in (guard.check, guard.is_allowed):
            caplog.clear()
            assert not ask(name, f"::ffff:{OFFICE}")
            (record,) = caplog.records
            assert (record.name, record.levelname) == ("ipguard.guard", "INFO")
            assert record.getMessage() == (
                f"'{name}' may not log in from '::ffff:{OFFICE}': not_listed"
            )
            assert fields(record) == {
                "ipguard_username": "jsmith",
                "ipguard_address": OFFICE,
                "ipguard_reason": Reason.NOT_LISTED,
                "ipguard_revision": guard.revision,
                "ipguard_dropped": 0,
            }


def test_logged_revision_is_that_of_the_decision(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the policy was read ahead of the guard's last sync."""
    guard = world.guard()
    guard.sync()
    revision = world.restrict("adoe", HOME)
    assert guard.check("adoe", OFFICE).revision == revision > guard.revision
    assert fields(caplog.records[-1])["ipguard_revision"] == revision


def test_malformed_input_is_logged_in_quotes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    guard = world.guard()
    guard.is_allowed("jsmith", "1.2.3.4.5")
    guard.is_allowed("", HOME)
    first, second = map(fields, caplog.records)
    assert (first["ipguard_username"], first["ipguard_address"]) == ("jsmith", "'1.2.3.4.5'")
    assert (second["ipguard_username"], second["ipguard_address"]) == ("''", HOME)


def test_denial_on_an_event_loop_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> list[object]:
        guard = AsyncGuard(world.guard())
        cold = await guard.check("jsmith", OFFICE)
        return [cold.outcome, await guard.is_allowed("jsmith", ELSEWHERE)]

    assert asyncio.run(ask()) == [Outcome.REFUSE, False]
    logged = [fields(record)["ipguard_address"] for record in caplog.records]
    assert logged == [OFFICE, ELSEWHERE]


@pytest.mark.parametrize(
    ("username", "address"),
    [
        ("jsmith\nroot", HOME),
        ("jsmith", "1.2.3.4\n" + "x" * 1000),
        (None, object()),
        ("\ud800", ""),
    ],
)
def test_client_input_is_quoted_and_shortened(
    world: World, caplog: pytest.LogCaptureFixture, username: Any, address: Any
) -> None:
    guard = world.guard()
    guard.check("jsmith", HOME)
    guard.is_allowed(username, address)
    (record,) = caplog.records
    shown = record.getMessage(), record.__dict__["ipguard_username"]
    for text in (*shown, record.__dict__["ipguard_address"]):
        assert text.isprintable()
        assert len(text) < 200


def test_at_most_ten_denials_a_second_are_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """In any second; the next line says how many were left out."""
    guard = world.guard(max_staleness=60)
    guard.check("jsmith", HOME)
    for _ in range(4):
        guard.is_allowed("jsmith", OFFICE)
    world.pass_time(0.75)
    for _ in range(30):
        guard.is_allowed("jsmith", OFFICE)
    assert len(caplog.records) == 10
    world.pass_time(0.25)  # a second after the first four
    for _ in range(30):
        guard.is_allowed("jsmith", OFFICE)
    assert len(caplog.records) == 14
    assert [fields(record)["ipguard_dropped"] for record in caplog.records[9:]] == [0, 24, 0, 0, 0]
    last = caplog.records[10].getMessage()
    assert last.endswith("not_listed (24 denials before this one were not logged)")
    assert guard.stats().denials == {Reason.NOT_LISTED: 64}
    assert guard.is_allowed("jsmith", HOME)
    assert len(caplog.records) == 14


def test_concurrent_denials_are_logged_or_counted(
    world: World, caplog: pytest.LogCaptureFixture, rounds: Any
) -> None:
    guard, each = world.guard(max_staleness=3600), rounds(300, 20_000)
    guard.check("jsmith", HOME)
    start = threading.Barrier(4)

    def deny() -> None:
        start.wait()
        for _ in range(each):
            guard.is_allowed("jsmith", OFFICE)

    for call in [Call(deny) for _ in range(4)]:
        call.result()
    assert len(caplog.records) == 10
    world.pass_time(1)
    guard.is_allowed("jsmith", OFFICE)
    assert fields(caplog.records[-1])["ipguard_dropped"] == 4 * each - 10


def test_each_denial_that_was_only_reported_is_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    guard = world.guard(report_only=True)
    for _ in range(30):
        assert guard.check("jsmith", OFFICE).outcome is Outcome.ALLOW
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 30
    assert fields(caplog.records[0])["ipguard_reason"] == "not_listed"


def test_failing_log_filter_changes_no_answer(world: World) -> None:
    def fail(_: logging.LogRecord) -> bool:
        raise RuntimeError

    guard, log = world.guard(), logging.getLogger("ipguard.guard")
    guard.check("jsmith", HOME)
    log.addFilter(fail)
    try:
        assert not guard.is_allowed("jsmith", OFFICE)
        assert guard.check("jsmith", OFFICE).reason is Reason.NOT_LISTED
    finally:
        log.removeFilter(fail)
    assert guard.stats().denials == {Reason.NOT_LISTED: 2}


def test_nothing_is_looked_at_if_the_level_is_off(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "ipguard.guard")
    guard = world.guard()
    for _ in range(30):
        guard.is_allowed("jsmith", OFFICE)
    caplog.set_level(logging.INFO, "ipguard.guard")
    guard.is_allowed("jsmith", OFFICE)
    assert fields(caplog.records[-1])["ipguard_dropped"] == 0
