"""What a login costs that is answered from memory: asked before, or a new address of a user."""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Callable

from benchmarks.measure import Calls, Part, Subject
from benchmarks.peers import PEERS, Peer
from benchmarks.scale import Scale
from benchmarks.work import (
    ROAMER,
    WIDE4,
    WIDE6,
    Ask,
    Newcomers,
    Pair,
    Policies,
    at_random,
    crowd,
    crowded,
    fill,
    from_the_wire,
    guard_of,
    home,
    homes,
    look_up,
    name,
    nothing,
)

FLOOR = "floor: one dict look-up"
FLOOR_FIRST = "floor: inet_pton and bisect"
LOOP = "a function that does nothing"
OURS = "ipguard"
CHECK = "ipguard check()"


def warm(scale: Scale) -> Part:  # noqa: ARG001
    """One user, and one address that was allowed before."""
    pair = name(0), home(0)

    def pairs(loops: int) -> list[Pair]:
        return [pair] * loops

    def ours() -> Calls:
        guard = guard_of(crowd(1))
        fill(guard, 1)
        return Calls(guard.is_allowed, pairs)

    def check() -> Calls:
        return Calls(guard_of(crowd(1)).check, pairs)

    return Part(
        title="Warm: one user, the same address again",
        subjects=[
            Subject(name=FLOOR, kind="floor", make=lambda: Calls(look_up([pair]), pairs)),
            Subject(name=OURS, make=ours),
            Subject(name=CHECK, kind="aside", make=check, note="gives a reason; no fast path"),
            Subject(name=LOOP, kind="aside", make=lambda: Calls(nothing, pairs)),
            *(_peer(peer, crowd(1), pairs) for peer in PEERS),
        ],
    )


def warm_many(scale: Scale) -> Part:
    """Many users, one after another at random."""
    count = scale.many

    def same(loops: int) -> list[Pair]:
        return at_random(count, loops)

    def fresh(loops: int) -> list[Pair]:
        return from_the_wire(at_random(count, loops))

    # One for both ways of asking; made where it is needed first.
    made: list[Ask] = []

    def floor() -> Ask:
        return look_up(homes(count))

    def ours() -> Ask:
        if not made:
            made.append(crowded(count).is_allowed)
        return made[0]

    wire = "floor, texts fresh from the wire"
    subjects = [
        Subject(name=FLOOR, kind="floor", make=lambda: Calls(floor(), same)),
        Subject(name=OURS, make=lambda: Calls(ours(), same)),
        Subject(name=wire, kind="aside", make=lambda: Calls(floor(), fresh)),
        Subject(
            name=f"{OURS}, texts fresh from the wire", per=wire, make=lambda: Calls(ours(), fresh)
        ),
        Subject(name=LOOP, kind="aside", make=lambda: Calls(nothing, same)),
    ]
    for peer in PEERS:
        users = min(count, scale.linear) if peer.linear else count
        subjects.append(
            _peer(
                peer,
                crowd(users),
                same if users == count else lambda loops: at_random(scale.linear, loops),
                note="" if users == count else f"asked about {users:,} users only",
            )
        )
    return Part(title=f"Warm: {count:,} users at random", subjects=subjects, fewer=2)


def first_ipv4(scale: Scale) -> Part:  # noqa: ARG001
    """A new IPv4 address of a user who is remembered."""
    return _first_sight(4)


def first_ipv6(scale: Scale) -> Part:  # noqa: ARG001
    """A new IPv6 address of a user who is remembered."""
    return _first_sight(6)


def _first_sight(version: int) -> Part:
    policies = {ROAMER: [WIDE4, WIDE6]}

    def ours() -> Calls:
        guard = guard_of(policies)
        guard.is_allowed(ROAMER, "10.0.0.1")
        return Calls(guard.is_allowed, Newcomers(version).pairs)

    return Part(
        title=f"First sight of an IPv{version} address of a remembered user",
        subjects=[
            Subject(
                name=FLOOR_FIRST,
                kind="floor",
                make=lambda: Calls(parse_and_bisect(version), Newcomers(version).pairs),
            ),
            Subject(name=OURS, make=ours),
            *(_peer(peer, policies, version=version) for peer in PEERS),
        ],
    )


def parse_and_bisect(version: int) -> Ask:
    """Return the floor of a first sight: the text read by the C library, and one bisect."""
    family = int(socket.AF_INET if version == 4 else socket.AF_INET6)
    inet_pton, from_bytes = socket.inet_pton, int.from_bytes
    first, last = (10 << 24, 11 << 24) if version == 4 else (0x20010DB8 << 96, 0x20010DB9 << 96)
    bounds = (first, last)

    def floor(user: str, ip: str) -> bool:  # noqa: ARG001
        return bisect_right(bounds, from_bytes(inet_pton(family, ip), "big")) & 1 == 1

    return floor


def _peer(
    peer: Peer,
    policies: Policies,
    pairs: Callable[[int], list[Pair]] | None = None,
    *,
    version: int = 4,
    note: str = "",
) -> Subject:
    def make() -> Calls:
        source = pairs or Newcomers(version).pairs
        ask = peer.load(policies)
        for user, ip in source(10):
            if not ask(user, ip):  # what is timed is to be the right answer
                raise RuntimeError(f"it refuses {user} from {ip}")
        return Calls(ask, source)

    return Subject(name=peer.name, kind="peer", make=make, note=note)
