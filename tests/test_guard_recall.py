"""Tests of `recall`: decide as `check` does without I/O, or return None."""

from __future__ import annotations

from typing import Any

import pytest

from ipguard.guard import Guard
from ipguard.model import Decision, Reason
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock
from tests.guards import HOME, OFFICE, World


@pytest.fixture
def world() -> World:
    clock = FakeClock()
    it = World(MemoryStore(clock=clock), clock)
    it.restrict("jsmith", HOME)
    it.restrict("temp", HOME, expires_in=100)
    return it


def recall(guard: Guard, name: Any, address: Any = HOME, at_least: Any = None) -> Decision | None:
    return guard._slow_path.recall(name, address, at_least)


def test_same_decision_as_check_without_a_read(world: World) -> None:
    guard = world.guard()
    for new in ("jsmith", "temp", "stranger"):
        assert recall(guard, new) is None
        guard.check(new, HOME)
    reads = len(world.store.loads), len(world.store.syncs)
    asked: tuple[Any, ...] = ("jsmith", "JSmith", "temp", "stranger", "", None)
    for name in asked:
        for address in (HOME, OFFICE, "nonsense", 5):
            assert recall(guard, name, address) == guard.check(name, address)
    assert (len(world.store.loads), len(world.store.syncs)) == reads
    assert set(guard._table.rows) == {"jsmith", "temp", "stranger"}


def test_none_if_a_sync_or_load_is_needed(world: World) -> None:
    guard = world.guard()
    assert recall(guard, "jsmith") is None
    guard.check("jsmith", HOME)
    assert recall(guard, "adoe") is None
    assert recall(guard, "jsmith", at_least=guard.revision) == guard.check("jsmith", HOME)
    assert recall(guard, "jsmith", at_least=guard.revision + 1) is None
    world.pass_time(4.99)
    assert recall(guard, "jsmith")
    world.pass_time(0.01)
    assert recall(guard, "jsmith") is None


def test_store_at_revision_zero() -> None:
    clock = FakeClock()
    guard = World(MemoryStore(clock=clock), clock).guard()
    guard.check("jsmith", HOME)
    assert guard.revision == 0
    assert recall(guard, "jsmith")


@pytest.mark.parametrize("refuse", [False, True])
def test_preloaded_user_is_found_by_any_spelling(world: World, refuse: bool) -> None:
    """Without an entry for it."""
    guard = world.guard(preload=True, outage_grace=10.0)
    guard.sync()
    assert guard.stats().preloaded == 2
    before = dict(guard._table.rows)
    if refuse:
        world.pass_time(5)
    for spelling in ("jsmith", "JSmith", "\uff4asmith"):
        decision = guard._slow_path.recall(spelling, HOME, None, refuse=refuse)
        assert decision is not None
        assert (decision.reason, decision.stale) == (Reason.LISTED, refuse)
    assert guard._table.rows == before
    assert world.store.loads == []


@pytest.mark.parametrize("grace", [0.0, 10.0])
def test_open_circuit_breaker(world: World, grace: float) -> None:
    """Users are denied, or answered as stale within `outage_grace`."""
    guard = world.guard(outage_grace=grace)
    guard.check("jsmith", HOME)
    world.pass_time(5)
    assert recall(guard, "jsmith") is None
    said = guard._slow_path.recall("jsmith", HOME, None, refuse=True)
    world.store.down = OSError()
    expected = guard.check("jsmith", HOME)
    assert (expected.allowed, expected.stale) == (grace > 0, grace > 0)
    assert recall(guard, "jsmith") == said == expected
    assert guard._slow_path.recall("jsmith", HOME, None, refuse=False) is None
    for other in (recall(guard, "adoe"), recall(guard, "jsmith", at_least=guard.revision + 1)):
        assert other is not None
        assert other.reason is Reason.STORE_UNAVAILABLE
