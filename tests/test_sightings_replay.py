"""Previews over a replayed log of logins, against an independent recomputation.

A real guard judges the logins and records them; each user's preview is then compared with what the
standard library's `ipaddress` makes of the log.
"""

from __future__ import annotations

import ipaddress
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from ipguard import Guard, Impact, Restriction, User, Workflow, open_store
from ipguard.store import RestrictionStore
from ipguard.testing import Outbox
from tests.flows import BOSS, KEY
from tests.guards import comes_true
from tests.postgres import Given, Server, fresh_schema

AT_ONCE = 50  # users of one guard
LISTED = (
    *(f"198.51.100.{n}" for n in range(4)),
    *("198.51.100.0/30", "198.51.100.2/31", "198.51.100.0-198.51.100.2", "203.0.113.0/24"),
    *("2001:db8::1", "2001:db8::/126", "2001:db8::/64", "2001:db8::2-2001:db8::5"),
)
SPELLINGS = {
    "198.51.100.1": ("::ffff:198.51.100.1", "::FFFF:C633:6401"),
    "2001:db8::1": ("2001:DB8:0:0:0:0:0:1",),
}
CLIENTS = (
    *(f"198.51.100.{n}" for n in range(5)),
    *("203.0.113.9", "192.0.2.1", *(f"2001:db8::{n}" for n in range(1, 6)), "2001:db8:1::1"),
)

Bounds = tuple[int, int, int]  # version, first, last


@attrs.define
class Case:
    """A user, the logins of the user, and the change that is previewed."""

    name: str
    held: list[tuple[str, int | None]]
    logins: list[str]
    adds: list[str]
    expires: int | None
    only: bool
    replaces: set[int]
    log: list[tuple[str, bool]] = attrs.Factory(list)


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RestrictionStore]:
    """An empty store of each kind."""
    if request.param == "postgresql":
        server: Server | Given = request.getfixturevalue("postgres")
        url = server.url(schema=fresh_schema(), timeout=20)
    else:
        url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'log.db'}"
    with open_store(url) as opened:
        yield opened


def new_case(choose: random.Random, name: str) -> Case:
    hours = (None, None, 24, 48)
    texts = choose.sample(LISTED, choose.choice((0, 1, 2, 4)))
    held = [(text, choose.choice(hours)) for text in texts]
    adds = choose.sample([text for text in LISTED if text not in dict(held)], choose.randint(0, 2))
    replaces = {n for n in range(len(held)) if choose.random() < 0.4}
    only = choose.random() < 0.2
    if not (adds or replaces or only):
        adds = ["192.0.2.0/24"]
    clients = choose.sample(CLIENTS, choose.randint(0, 8))
    logins = [choose.choice((each, *SPELLINGS.get(each, ()))) for each in clients]
    logins = [choose.choice(logins) for _ in range(choose.randint(0, 30)) if logins]
    return Case(name, held, logins, adds, choose.choice(hours), only, replaces)


def bounds(text: str) -> Bounds:
    """Read a restriction with the standard library."""
    first, _, last = text.partition("-")
    if last:
        low, high = ipaddress.ip_address(first), ipaddress.ip_address(last)
        return low.version, int(low), int(high)
    network = ipaddress.ip_network(text)
    return network.version, int(network[0]), int(network[-1])


def canonical(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def allowed(address: str, restrictions: list[tuple[str, int | None]], hour: int) -> bool:
    """Return whether a login is allowed in so many hours."""
    found = canonical(address)
    if not restrictions:
        return True
    return any(
        version == found.version and first <= int(found) <= last
        for version, first, last in (
            bounds(text) for text, hours in restrictions if hours is None or hour < hours
        )
    )


def test_previews_agree_with_a_recomputation(
    store: RestrictionStore, rounds: Callable[[int, int], int]
) -> None:
    """Each preview names exactly the logins that the change would refuse, and counts them."""
    count = rounds(100, 1_000)
    choose = random.Random(7)
    cases = [new_case(choose, f"user{n:05}") for n in range(count)]
    flow = Workflow(store, Outbox(), key=KEY)
    store.put_users(User(username=c.name, full_name="", account_id="U1") for c in cases)
    # One time for all, so that restrictions end together, or hours apart.
    began = store.now()
    for case in cases:
        restrict(flow, began, case)
    for start in range(0, count, AT_ONCE):
        replay(store, cases[start : start + AT_ONCE], choose)
    different = []
    lost = 0
    for case in cases:
        found, expected = preview(flow, began, case), recompute(case)
        lost += len(expected[0])
        if (as_counts(found), found.seen_summary) != expected:
            different.append((case, found, expected))
    assert different == []
    assert lost > count / 2, "the changes would refuse hardly anything"


def restrict(flow: Workflow, began: datetime, case: Case) -> None:
    for text, hours in case.held:
        until = None if hours is None else began + timedelta(hours=hours)
        flow.impose(BOSS, case.name, text, reason="a test", expires_at=until)


def replay(store: RestrictionStore, cases: list[Case], choose: random.Random) -> None:
    """Let a guard judge and record the logins of several users, in a random order."""
    todo = [(case, address) for case in cases for address in case.logins]
    choose.shuffle(todo)
    with Guard(store) as guard:
        for case, address in todo:
            decision = guard.check(case.name.upper(), address)
            guard.saw(case.name.upper(), address, decision)
            case.log.append((address, decision.allowed))
    comes_true(lambda: guard.stats().sightings_waiting == 0)
    assert guard.stats().sightings_lost == 0
    assert guard.stats().sightings_written == len(todo)


def preview(flow: Workflow, began: datetime, case: Case) -> Impact:
    held: tuple[Restriction, ...] = flow.user(BOSS, case.name).restrictions
    ids = [{str(each.addresses): each.id for each in held}[text] for text, _ in case.held]
    more: dict[str, Any] = {}
    if case.adds and case.expires is not None:
        more["expires_at"] = began + timedelta(hours=case.expires)
    replaces = [] if case.only else [ids[n] for n in sorted(case.replaces)]
    adds = case.adds or None
    return flow.preview(BOSS, case.name, adds, replaces, only=case.only, **more)


def as_counts(impact: Impact) -> dict[str, tuple[int, int]]:
    return {each.address: (each.allowed, each.refused) for each in impact.seen_lost}


def recompute(case: Case) -> tuple[dict[str, tuple[int, int]], str]:
    """Return the logins that the change would refuse, by address, and the sentence about them."""
    gone = set(range(len(case.held))) if case.only else case.replaces
    afterwards = [each for n, each in enumerate(case.held) if n not in gone]
    afterwards += [(text, case.expires) for text in case.adds]
    hours = (0, 24, 48)  # at which something ends
    let_in, refused = Counter[str](), Counter[str]()
    for address, was_allowed in case.log:
        assert was_allowed is allowed(address, case.held, 0), (case, address)
        (let_in if was_allowed else refused)[str(canonical(address))] += 1
    lost = {
        text: (let_in[text], refused[text])
        for text in let_in | refused
        if any(allowed(text, case.held, h) and not allowed(text, afterwards, h) for h in hours)
    }
    total, count = sum(let_in.values()), sum(each for each, _ in lost.values())
    takes_away = any(
        allowed(text, case.held, h) and not allowed(text, afterwards, h)
        for text in EVERYWHERE
        for h in hours
    )
    if not (total and takes_away):
        return lost, ""
    return lost, f"This would have refused {count or 'none'} of {total} recent logins."


def around(text: str) -> Iterator[str]:
    version, first, last = bounds(text)
    kind = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    for number in (first - 1, first, first + 1, last - 1, last, last + 1):
        yield str(kind(number))


EVERYWHERE = sorted({each for text in (*LISTED, "192.0.2.0/24") for each in around(text)})
"""Addresses of which every change takes one away, if it takes any."""
