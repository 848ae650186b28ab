"""Compare the guard with a naive model of its rules."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from ipguard.addresses import parse_address
from ipguard.errors import AddressError
from ipguard.rules import decide
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock
from tests.guards import World

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Listed(NamedTuple):
    """A restriction of the model: its ends, and when it expires, if it does."""

    first: Address
    last: Address
    until: float | None


def four(number: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address("10.0.0.0") + number


def six(number: int) -> ipaddress.IPv6Address:
    return ipaddress.IPv6Address("2001:db8::") + number


def mapped(number: int) -> str:
    value = int(four(number))
    return f"::ffff:{value >> 16:x}:{value & 0xFFFF:x}"


NUMBERS = st.integers(0, 15)
RANGES = st.tuples(st.sampled_from([four, six]), st.tuples(NUMBERS, NUMBERS).map(sorted))
RESTRICTIONS = st.lists(
    st.tuples(RANGES, st.sampled_from([None, None, -1.0, 0.0, 1.0, 2.5, 7.0])), max_size=4
)
TEXTS = st.one_of(
    NUMBERS.map(lambda n: str(four(n))),
    NUMBERS.map(lambda n: f"::ffff:{four(n)}"),
    NUMBERS.map(mapped),
    NUMBERS.map(lambda n: str(six(n))),
    NUMBERS.map(lambda n: six(n).exploded.upper()),
    st.sampled_from(["", "10.0.0.01", "10.0.0", "10.0.0.1/32", "2001:db8::1%eth0", "::"]),
)
MOMENTS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 3.0]), TEXTS), min_size=1, max_size=12)


def naive(text: str, listed: list[Listed], known: bool, deny_unknown: bool, time: float) -> bool:
    """Return whether a login is allowed, by the documented rules alone."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if "%" in text:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if deny_unknown and not known:
        return False
    if not listed:
        return True
    for one in listed:
        same = one.first.version == address.version
        holds = same and int(one.first) <= int(address) <= int(one.last)
        if holds and (one.until is None or time < one.until):
            return True
    return False


@given(
    restrictions=RESTRICTIONS,
    known=st.booleans(),
    deny_unknown=st.booleans(),
    moments=MOMENTS,
    late=RESTRICTIONS,
)
def test_all_methods_agree_with_a_naive_model(
    restrictions: list[tuple[tuple[type, list[int]], float | None]],
    known: bool,
    deny_unknown: bool,
    moments: list[tuple[float, str]],
    late: list[tuple[tuple[type, list[int]], float | None]],
) -> None:
    """First check, remembered, `check`, `explain` and `rules.decide`, as time passes."""
    clock = FakeClock()
    world = World(MemoryStore(clock=clock), clock)
    listed: list[Listed] = []
    time = 0.0

    def add(given: list[tuple[tuple[type, list[int]], float | None]]) -> None:
        for (family, (first, last)), lasts in given:
            until = None if lasts is None else time + lasts
            listed.append(Listed(family(first), family(last), until))
            text = f"{family(first)}-{family(last)}" if first != last else str(family(first))
            world.restrict("jsmith", text, expires_in=lasts)
        world.register("jsmith")
        if not known:
            world.inner.remove_users(["jsmith"])

    add(restrictions)
    guard = world.guard(max_staleness=4, unknown_users="deny" if deny_unknown else "allow")
    for round_ in range(2):
        for passing, text in moments:
            world.pass_time(passing)
            time += passing
            expected = naive(text, listed, known, deny_unknown, time)
            assert guard.is_allowed("jsmith", text) is expected
            assert guard.is_allowed("jsmith", text) is expected
            assert guard.is_allowed("JSmith", text) is expected
            assert guard.check("jsmith", text).allowed is expected
            assert guard.explain("jsmith", text).decision.allowed is expected
            try:
                client = parse_address(text)
            except AddressError:
                client = None
            policy = world.inner.load_policy("jsmith")
            decision = decide(policy, client, clock(), deny_unknown=deny_unknown)
            assert decision.allowed is expected
        if not round_:
            add(late)
            guard.sync()
