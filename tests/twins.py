"""A plain guard and a preloaded one over the same store, and the events that both see."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import strategies as st

from tests.guards import ELSEWHERE, HOME, OFFICE, World


class Twins:
    """A plain guard and a preloaded one over the same store."""

    names = ("ann", "Bob", "cid")

    def __init__(self, world: World, *, deny: bool, capacity: int) -> None:
        users: Any = "deny" if deny else "allow"
        self.world = world
        self.plain = world.guard(unknown_users=users)
        self.table = world.guard(unknown_users=users, preload=True, capacity=capacity)

    def agree(self) -> None:
        self.plain.sync()
        self.table._lease.sync()
        for name in self.names:
            for address in (HOME, OFFICE, ELSEWHERE, "2001:db8::1"):
                expected = self.plain.check(name, address)
                assert self.table.check(name, address) == expected
                assert self.table.is_allowed(name, address) is expected.allowed


WHO = st.sampled_from(["ann", "bob", "cid"])
WHERE = st.sampled_from([HOME, OFFICE, "2001:db8::/64", "203.0.113.0/24"])
ACTS = st.one_of(
    st.tuples(st.just("restrict"), WHO, WHERE, st.sampled_from([None, 2.0, 6.0])),
    st.tuples(st.sampled_from(["lift_all", "register", "remove", "touch"]), WHO),
    st.tuples(st.sampled_from(["everybody", "wrong_guess", "sync", "fill", "read_again"])),
    st.tuples(st.just("pass_time"), st.sampled_from([0.5, 3.0])),
)


def act_on(twins: Twins, step: tuple[Any, ...]) -> None:
    world, guard = twins.world, twins.table
    assert guard._preload is not None
    match step:
        case ("restrict", who, where, lasts):
            world.restrict(who, where, expires_in=lasts)
        case ("lift_all" | "register" | "touch", who):
            getattr(world, step[0])(who)
        case ("remove", who):
            world.inner.remove_users([who])
        case ("everybody",):
            world.touch()
        case ("pass_time", seconds):
            world.pass_time(seconds)
        case ("wrong_guess",):
            world.wrong_guess()
        case ("sync",):
            guard.sync()
        case ("fill",):
            guard._preload.fill(threading.Event())
        case _:
            guard._preload.read_again(float("inf"))


STEPS = st.lists(st.tuples(ACTS, st.booleans(), st.lists(ACTS, max_size=2)), max_size=8)
"""What happens; whether both are compared after it; and what happens while a snapshot streams."""


def compare(
    world: World, steps: list[tuple[Any, bool, list[Any]]], *, deny: bool, capacity: int
) -> None:
    """Let everything happen, and assert that both guards decide alike."""
    twins = Twins(world, deny=deny, capacity=capacity)
    for step, logins, meanwhile in steps:
        for late in meanwhile:
            held = world.store.in_stream if logins else world.store.before_stream
            held.append(lambda late=late: act_on(twins, late))  # type: ignore[misc]
        act_on(twins, step)
        if logins:
            twins.agree()
    twins.agree()
