"""Counting decisions: what is always counted, and what only on request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ipguard import Outcome, Reason
from ipguard.aio import AsyncGuard
from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from tests.guards import HOME, OFFICE, World, new_world

LISTED, FREE = (Outcome.ALLOW, Reason.LISTED), (Outcome.ALLOW, Reason.UNRESTRICTED)
NOT_LISTED = (Outcome.REFUSE, Reason.NOT_LISTED)


@pytest.fixture
def world() -> World:
    world = new_world()
    world.restrict("jsmith", HOME)
    return world


def counted(guard: Guard) -> dict[Any, int]:
    return {key: count for key, count in guard.stats().decisions.items() if count}


def log_in(guard: Guard) -> None:
    """Decide six logins, three of them from memory."""
    for _ in range(2):
        assert guard.is_allowed("jsmith", HOME)
        assert guard.is_allowed("mlee", HOME)
        assert not guard.is_allowed("jsmith", OFFICE)


@pytest.mark.parametrize("preload", [False, True])
def test_allows_are_counted_on_request(world: World, preload: bool) -> None:
    """Before it they are left out: a figure without those of the fast path would mislead."""
    guard = world.guard(preload=preload)
    guard.sync()
    log_in(guard)
    assert guard.check("jsmith", HOME)
    assert counted(guard) == {NOT_LISTED: 2}
    assert not {LISTED, FREE} & guard.stats().decisions.keys()
    for _ in range(2):  # may be called again
        guard.count_allows()
    log_in(guard)
    assert guard.check("jsmith", HOME)
    assert counted(guard) == {LISTED: 3, FREE: 2, NOT_LISTED: 4}
    assert guard.stats().denials == {Reason.NOT_LISTED: 4}


def test_every_reason_has_a_figure(world: World) -> None:
    """Zeros included, so that rates can be computed from the beginning."""
    guard = world.guard()
    guard.count_allows()
    assert {reason for _, reason in guard.stats().decisions} == set(Reason)


def test_an_observer_counts_allows_without_a_request(world: World) -> None:
    guard = world.guard(observer=lambda *_: None)
    log_in(guard)
    assert counted(guard) == {LISTED: 2, FREE: 2, NOT_LISTED: 2}


def test_report_only_allows_all_that_is_counted(world: World) -> None:
    """The reason is that of the refusal which did not happen."""
    guard = world.guard(report_only=True)
    assert guard.is_allowed("jsmith", OFFICE)
    assert guard.is_allowed("jsmith", HOME)
    assert counted(guard) == {LISTED: 1, (Outcome.ALLOW, Reason.NOT_LISTED): 1}
    assert guard.stats().denials == {Reason.NOT_LISTED: 1}


@pytest.mark.parametrize("asked", ["the guard", "the async guard"])
def test_async_guards_count_too(world: World, asked: str) -> None:
    """Also if they were created before, and whichever of the two was asked to count."""
    guard = world.guard()
    other = AsyncGuard(guard)

    async def log_in() -> None:
        for _ in range(3):
            assert await other.is_allowed("jsmith", HOME)
        (guard if asked == "the guard" else other).count_allows()
        for _ in range(3):
            assert await other.is_allowed("jsmith", HOME)
        await other.close()

    asyncio.run(log_in())
    assert counted(guard) == {LISTED: 3}


def test_store_errors_are_counted(world: World) -> None:
    """Unlike `failures`, they are not reset by a success."""
    guard = world.guard()
    for _ in range(2):
        world.store.down = StoreUnavailable("down")
        world.pass_time(5)
        assert guard.check("jsmith", HOME).outcome is Outcome.RETRY
        world.store.down = None
        world.pass_time(1)
        assert guard.check("jsmith", HOME)
    assert (guard.stats().failures, guard.stats().store_errors) == (0, 2)
    assert counted(guard) == {(Outcome.RETRY, Reason.STORE_UNAVAILABLE): 2}
