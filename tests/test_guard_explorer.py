"""Run every order of some events around a load: no answer may outlive `max_staleness`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.guards import HOME, Call, Gate, Restorable

MAX_STALENESS = 5.0
TICK = 3.0

EVENTS = ("lift", "read", "restore", "remember", "sync", "tick", "tick")
"""A failover loses the commit that lifted the restriction; a load reads before or after it."""

RESET_EVENTS = ("lift", "read", "restore", "commit", "remember", "sync", "tick")
"""Then the surviving server commits something else under the revision that was lost."""


def schedules(events: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield each order in which the events can happen."""
    for order in sorted(set(itertools.permutations(events))):
        at = {event: index for index, event in enumerate(order)}
        if at["lift"] < at["restore"] < at.get("commit", 99) and at["read"] < at["remember"]:
            yield order


class Run:
    """One guard and one store, taken through a schedule."""

    def __init__(self, *, preload: bool) -> None:
        self.world = world = Restorable(None)
        world.restrict("jsmith")
        self.put_back = world.back_up()
        self.guard = world.guard(max_staleness=MAX_STALENESS, preload=preload)
        self.guard.sync()
        if preload:  # the snapshot is complete, and the user is unknown
            with self.guard._table.lock:
                self.guard._table.preloaded.mark(("jsmith",))
                self.guard._table._drop("jsmith")
        self.held = Gate()
        self.load: Call[object] | None = None
        self.opened: float | None = None
        self.closed: float | None = None

    def lift(self) -> None:
        self.world.lift_all("jsmith")
        self.opened = self.world.clock.monotonic()

    def restore(self) -> None:
        self.put_back()
        self.closed = self.world.clock.monotonic()

    def commit(self) -> None:
        self.world.touch("adoe")

    def read(self) -> None:
        self.world.store.after_load.append(self.held)
        guard = self.guard
        self.load = Call(lambda: guard._loads.load("jsmith", "jsmith", guard.revision))
        self.held.reached()

    def remember(self) -> None:
        assert self.load is not None
        self.held.let_go()
        self.load.result()

    def sync(self) -> None:
        self.guard._lease.sync()

    def tick(self) -> None:
        self.world.pass_time(TICK)

    def truths(self) -> set[bool]:
        """Return the answers that the store gave within the last `max_staleness` seconds."""
        oldest = self.world.clock.monotonic() - MAX_STALENESS
        truths = set()
        if self.opened is None or self.closed is not None or self.opened > oldest:
            truths.add(False)
        if self.opened is not None and (self.closed is None or self.closed > oldest):
            truths.add(True)
        return truths

    def answer(self) -> bool | None:
        """Return the guard's answer from memory, or None if it must read the store."""
        decision = self.guard._slow_path.recall("jsmith", HOME, None)
        return None if decision is None else decision.allowed


@pytest.mark.parametrize("preload", [False, True], ids=["cache", "table"])
@pytest.mark.parametrize("events", [EVENTS, RESET_EVENTS], ids=["lost commit", "replaced commit"])
def test_no_order_of_events_keeps_an_answer_too_long(
    events: tuple[str, ...], preload: bool
) -> None:
    remembered = 0
    for schedule in schedules(events):
        run = Run(preload=preload)
        try:
            for index, event in enumerate(schedule):
                getattr(run, event)()
                answer = run.answer()
                remembered += answer is not None
                assert answer is None or answer in run.truths(), schedule[: index + 1]
        finally:
            run.held.let_go()
    assert remembered > 100  # the schedules do use remembered rows
