"""What is to stay the same as restrictions and users grow."""

from __future__ import annotations

from functools import partial

from benchmarks.measure import Calls, Part, Subject
from benchmarks.parts.hot import FLOOR, FLOOR_FIRST, parse_and_bisect
from benchmarks.peers import PEERS, Peer
from benchmarks.scale import Scale
from benchmarks.work import (
    ROAMER,
    Ask,
    Newcomers,
    Pair,
    Policies,
    Rows,
    at_random,
    crowded,
    guard_of,
    homes,
    look_up,
    scattered,
)
from ipguard import Guard


def _again(loops: int) -> list[Pair]:
    return [(ROAMER, "10.1.2.3")] * loops


def of_length(count: int) -> Policies:
    return {ROAMER: scattered(count)}


def restrictions(scale: Scale) -> Part:
    """A user with more and more restrictions."""

    def guard(count: int) -> Ask:
        made = guard_of(of_length(count))
        for _ in range(2):
            assert made.is_allowed(ROAMER, "10.1.2.3")
        return made.is_allowed

    def warm(count: int) -> Calls:
        return Calls(guard(count), _again)

    def first(count: int) -> Calls:
        return Calls(guard(count), Newcomers(4).pairs)

    floor = look_up([(ROAMER, "10.1.2.3")])
    subjects = [Subject(name=FLOOR, kind="floor", make=lambda: Calls(floor, _again))]
    for kind, make in (("warm", warm), ("first sight", first)):
        fewest = length_name(kind, scale.lengths[0])
        for count in scale.lengths:
            told = length_name(kind, count)
            per = None if told == fewest else fewest
            subjects += [Subject(name=told, make=partial(make, count), per=per)]
    subjects.append(
        Subject(
            name=FLOOR_FIRST,
            kind="aside",
            make=lambda: Calls(parse_and_bisect(4), Newcomers(4).pairs),
        )
    )
    return Part(title="Restrictions of one user", subjects=subjects)


def length_name(kind: str, count: int) -> str:
    return f"{kind}, {count:,} restriction{'s' if count > 1 else ''}"


def restrictions_of_peers(scale: Scale) -> Part:
    """The same for what ipguard is compared with: a new address each time."""

    def ours(count: int) -> Calls:
        return Calls(guard_of(of_length(count)).is_allowed, Newcomers(4).pairs)

    def make(peer: Peer, count: int) -> Calls:
        ask = peer.load(of_length(count))
        if not ask(ROAMER, "10.1.2.3"):
            raise RuntimeError("it refuses a listed address")
        return Calls(ask, Newcomers(4).pairs)

    subjects = [
        Subject(
            name=FLOOR_FIRST,
            kind="floor",
            make=lambda: Calls(parse_and_bisect(4), Newcomers(4).pairs),
        )
    ]
    for count in scale.lengths_of_peers:
        subjects += [Subject(name=f"ipguard, {count:,}", make=partial(ours, count))]
        subjects += [
            Subject(name=f"{peer.name}, {count:,}", kind="peer", make=partial(make, peer, count))
            for peer in PEERS
        ]
    return Part(
        title="First sight of an IPv4 address, by restrictions of the user",
        subjects=subjects,
        slot=2.0,
        fewer=3,
        rounds=3,
        singles=False,
    )


def users(scale: Scale) -> Part:
    """More and more users, remembered as they came, or all from the start."""
    held: dict[str, float] = {}

    def floor(count: int) -> Calls:
        return Calls(look_up(homes(count)), lambda loops: at_random(count, loops))

    def remembered(count: int) -> Calls:
        homes(count)  # everybody's texts are there before, for the floor as well
        before = resident()
        guard = crowded(count)
        held[f"bytes a user, {count:,} remembered"] = (resident() - before) / count
        return Calls(guard.is_allowed, lambda loops: at_random(count, loops))

    def preloaded(count: int) -> Calls:
        homes(count)
        before = resident()
        guard = preloaded_guard(Rows(count=count), count)
        held[f"bytes a user, {count:,} preloaded"] = (resident() - before) / count
        for user, ip in homes(count):
            guard.is_allowed(user, ip)
        return Calls(guard.is_allowed, lambda loops: at_random(count, loops))

    subjects: list[Subject] = []
    for count in scale.crowds:
        subjects.append(
            Subject(
                name=crowd_name("floor", count),
                kind="aside" if subjects else "floor",
                make=partial(floor, count),
            )
        )
        for kind, make in (("remembered", remembered), ("preloaded", preloaded)):
            subjects.append(
                Subject(
                    name=crowd_name(kind, count),
                    make=partial(make, count),
                    per=crowd_name("floor", count),
                )
            )
    return Part(
        title="Users in memory, asked about at random",
        subjects=subjects,
        facts=lambda: dict(held),
        slot=2.0,
        fewer=2,
    )


def crowd_name(kind: str, count: int) -> str:
    return f"{kind}, {count:,} users"


def preloaded_guard(rows: Rows, count: int) -> Guard:
    """Return a guard that holds everybody before anybody has asked."""
    guard = Guard(rows, preload=True)  # type: ignore[arg-type]
    guard.sync()
    held = guard.stats().preloaded
    if held != count:
        raise RuntimeError(f"{held} of {count:,} users were preloaded")
    return guard


def resident() -> int:
    """Return how many bytes of memory this process holds now."""
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * 4096
