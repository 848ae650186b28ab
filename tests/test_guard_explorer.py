"""Explore the schedules of the guard: no order of its steps breaks a promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import pytest

from tests.explored_guard import Explored, instrumented
from tests.explorer import Body, Lock, Outcome, Scenario, explore, step
from tests.guard_mutants import MUTANTS, Mutant
from tests.guard_scenarios import SCENARIOS, LoginAndSync, OvertakenRead

Rounds = Callable[[int, int], int]

# ---------------------------------------------------------------------------------- the explorer


class Counting(Scenario):
    """Two threads add one to a number, in two steps."""

    def __init__(self) -> None:
        self.number = 0

    def threads(self) -> Sequence[tuple[str, Body]]:
        return [("one", self.add), ("two", self.add)]

    def add(self) -> None:
        step("reads", reads=("number",))
        number = self.number
        step("writes", writes=("number",))
        self.number = number + 1

    def finish(self) -> None:
        assert self.number == 2, f"the number is {self.number}"


class CountingSafely(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()

    def add(self) -> None:
        with self.lock:
            super().add()


class LockingCrosswise(Scenario):
    def __init__(self) -> None:
        self.locks = Lock(), Lock()

    def threads(self) -> Sequence[tuple[str, Body]]:
        return [("one", lambda: self.take(0)), ("two", lambda: self.take(1))]

    def take(self, first: int) -> None:
        with self.locks[first], self.locks[1 - first]:
            step("works", writes=("work",))


def test_explorer_finds_a_lost_update() -> None:
    """It takes one forced switch; the steps that lead there are told."""
    assert explore(Counting, bound=0).failure is None
    found = explore(Counting, bound=1)
    assert found.failure == "afterwards: the number is 1"
    assert str(found).splitlines()[-1] == "  one: writes"
    assert explore(CountingSafely, bound=3).failure is None


def test_explorer_finds_a_deadlock() -> None:
    assert explore(LockingCrosswise, bound=0).failure is None
    failure = explore(LockingCrosswise, bound=1).failure
    assert failure == "no thread can run: one acquires, two acquires"


def test_explorer_reaches_every_state() -> None:
    """It leaves schedules out, but no order of dependent steps."""
    moves = ("a1", "a2", "a3", "b1", "b2", "b3")
    orders = {
        order
        for order in permutations(moves)
        if [m for m in order if m[0] == "a"] == ["a1", "a2", "a3"]
        and [m for m in order if m[0] == "b"] == ["b1", "b2", "b3"]
    }
    found: list[tuple[str, ...]] = []

    class Moving(Scenario):
        def __init__(self) -> None:
            self.order: list[str] = []

        def threads(self) -> Sequence[tuple[str, Body]]:
            return [("a", lambda: self.move("a")), ("b", lambda: self.move("b"))]

        def move(self, name: str) -> None:
            for number in "123":
                step("alone", writes=(name,))
                step("moves", writes=("order",))
                self.order.append(name + number)

        def finish(self) -> None:
            found.append(tuple(self.order))

    assert explore(Moving, bound=6).failure is None
    assert set(found) == orders
    assert len(found) < 3 * len(orders)
    found.clear()
    explore(Moving, bound=1)
    assert 2 < len(set(found)) < len(orders)


def test_waiter_that_gives_up() -> None:
    """A limited wait for a lock may end in vain, if the scenario says so."""
    had: set[bool] = set()

    class Waiting(Scenario):
        timeouts = True

        def __init__(self) -> None:
            self.lock = Lock()

        def threads(self) -> Sequence[tuple[str, Body]]:
            return [("one", self.wait), ("two", self.wait)]

        def wait(self) -> None:
            acquired = self.lock.acquire(True, 1.0)
            had.add(acquired)
            if acquired:
                step("works", writes=("work",))
                self.lock.release()

    assert explore(Waiting, bound=2).failure is None
    assert had == {True, False}


# ------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize(
    "scenario",
    [
        # It has many more schedules than the others.
        pytest.param(each, marks=[pytest.mark.slow] if each is OvertakenRead else [])
        for each in SCENARIOS
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_no_schedule_breaks_a_promise(scenario: type[Explored], rounds: Rounds) -> None:
    """All schedules with at most so many forced switches were run."""
    bound = rounds(*SCENARIOS[scenario])
    with instrumented():
        outcome = explore(scenario, bound=bound)
    print(f"{outcome.schedules} schedules with at most {bound} forced switches")
    assert outcome.failure is None, str(outcome)
    assert outcome.schedules > 20  # the threads do meet


def refute(mutant: Mutant) -> Outcome:
    """Explore with more and more forced switches, until a schedule breaks a promise."""
    outcome, count = Outcome(0, None, []), 0
    with instrumented(mutant.mutation()):
        for bound in range(4):
            if outcome.failure is None:
                outcome = explore(mutant.scenario, bound=bound)
                count += outcome.schedules
    return outcome._replace(schedules=count)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_mutant_is_refuted(mutant: Mutant) -> None:
    """A guard that is broken in one way gives a wrong answer, or never answers."""
    outcome = refute(mutant)
    print(f"{outcome.schedules} schedules: {outcome.failure}")
    assert outcome.failure is not None, f"{outcome.schedules} schedules show nothing"


def test_mutation_needs_its_fragment() -> None:
    """A mutant whose source has changed is noticed."""
    from tests.explored_guard import mutate

    with pytest.raises(AssertionError, match="no single"):
        mutate(LoginAndSync.sync, ("not there", ""))
