"""Logins that are answered from memory: their cost, its growth, floods and threads."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import fixtures as fx
from benchmarks.measure import Fact, Part, Row, Scale, Subject, Work, resident
from benchmarks.peers import PEERS, Peer
from ipguard import Guard

OURS = "ipguard"
LOOK_UP = "a function with one dict look-up"
PARSE = "`inet_pton`, `int.from_bytes` and one bisect"
COMPARED = ("warm", "warm-many", "first-ipv4", "first-ipv6")
"""The parts that time the peers as well."""

Source = Callable[[int], list[fx.Pair]]


def warm(scale: Scale) -> Part:  # noqa: ARG001
    """One user and an address that was allowed before."""
    pair = fx.name(0), fx.home(0)

    def pairs(loops: int) -> list[fx.Pair]:
        return [pair] * loops

    return Part(
        title="Warm, one user",
        rows=[Row("warm, one user", LOOK_UP, OURS, 1.6)],
        subjects=[
            Subject("floor", lambda: fx.asking(fx.look_up([pair]), pairs)),
            Subject(OURS, lambda: fx.asking(fx.remembering(1).is_allowed, pairs)),
            *_peers(lambda: fx.crowd(1), lambda: pairs),
        ],
    )


def warm_many(scale: Scale) -> Part:
    """Many users at random, each from an address that was allowed before."""
    count, pairs = scale.many, fx.at_random(scale.many)
    return Part(
        title=f"Warm, {count:,} users at random",
        rows=[Row(f"warm, {count:,} users at random", f"{LOOK_UP}, over as many", OURS, 1.5)],
        subjects=[
            Subject("floor", lambda: fx.asking(fx.look_up(fx.homes(count)), pairs)),
            Subject(OURS, lambda: fx.asking(fx.remembering(count).is_allowed, pairs)),
            *_peers(lambda: fx.crowd(count), lambda: pairs),
        ],
        processes=1,
    )


def first_sight(scale: Scale, version: int) -> Part:  # noqa: ARG001
    """A new address of a remembered user."""
    policies = {fx.ROAMER: [fx.WIDE4, fx.WIDE6]}
    figure = f"first sight of an IPv{version} address"

    def ours() -> Work:
        guard = fx.guard_of(policies)
        guard.is_allowed(fx.ROAMER, "10.0.0.1")
        return fx.asking(guard.is_allowed, fx.newcomers(version))

    return Part(
        title=f"New IPv{version} address",
        rows=[Row(figure, PARSE, OURS, 2.5)],
        subjects=[
            Subject("floor", lambda: fx.asking(parse_and_bisect(version), fx.newcomers(version))),
            Subject(OURS, ours),
            *_peers(lambda: policies, lambda: fx.newcomers(version)),
        ],
    )


def parse_and_bisect(version: int) -> fx.Ask:
    """Return the floor of a first sight: the C library reads the text, then one bisect."""
    family = int(socket.AF_INET if version == 4 else socket.AF_INET6)
    inet_pton, from_bytes = socket.inet_pton, int.from_bytes
    bounds = (10 << 24, 11 << 24) if version == 4 else (0x20010DB8 << 96, 0x20010DB9 << 96)

    def floor(user: str, ip: str) -> bool:  # noqa: ARG001
        return bisect_right(bounds, from_bytes(inet_pton(family, ip), "big")) & 1 == 1

    return floor


def _peers(policies: Callable[[], fx.Policies], source: Callable[[], Source]) -> list[Subject]:
    """Return the peers as subjects, each timed back to back with ipguard on allowed logins."""

    def make(peer: Peer) -> Work:
        ask, pairs = peer.load(policies()), source()
        for user, ip in pairs(10):
            if not ask(user, ip):
                raise RuntimeError(f"it refuses {user} from {ip}")
        return fx.asking(ask, pairs)

    return [Subject(peer.name, partial(make, peer), OURS) for peer in PEERS]


def preloaded(scale: Scale) -> Part:
    """The first question about each user of a preloaded guard."""
    count = scale.preloaded
    figure = f"first question about a preloaded user, {count:,} at random"

    def ours() -> Work:
        guard = fx.guard_of(count=count, preload=True)
        guard.sync()
        if guard.stats().preloaded != count:
            raise RuntimeError(f"{guard.stats().preloaded} of {count:,} users were preloaded")
        return fx.asking(guard.is_allowed, fx.once(count))

    return Part(
        title="Preloaded, first question",
        rows=[Row(figure, f"{LOOK_UP}, over as many", OURS, 3)],
        subjects=[
            Subject("floor", lambda: fx.asking(fx.look_up(fx.homes(count)), fx.at_random(count))),
            Subject(OURS, ours),
        ],
        processes=1,
    )


def growth(scale: Scale) -> Part:
    """A user with one restriction, and one with thousands."""
    many = scale.listed

    def again(loops: int) -> list[fx.Pair]:
        return [(fx.ROAMER, "10.1.2.3")] * loops

    def ask(count: int, pairs: Source) -> Work:
        guard = fx.guard_of({fx.ROAMER: scattered(count)})
        for user, ip in again(2):
            guard.is_allowed(user, ip)
        return fx.asking(guard.is_allowed, pairs)

    return Part(
        title="Restrictions of one user",
        rows=[
            Row(f"warm, {many:,} restrictions", "with one", "warm", 1.1),
            Row(f"first sight, {many:,} restrictions", "with one", "first sight", 1.5),
        ],
        subjects=[
            Subject("warm, one", lambda: ask(1, again)),
            Subject("warm", lambda: ask(many, again)),
            Subject("first sight, one", lambda: ask(1, fx.newcomers(4))),
            Subject("first sight", lambda: ask(many, fx.newcomers(4)), "first sight, one"),
        ],
    )


def scattered(count: int) -> list[str]:
    """Return a wide restriction between many small ones that cannot be merged."""
    low = [fx.dotted((1 << 24) + 2 * n) for n in range((count - 1) // 2)]
    high = [fx.dotted((172 << 24) + 2 * n) for n in range(count - 1 - len(low))]
    return [*low, fx.WIDE4, *high]


# ------------------------------------------------------------------------ under load


def malformed() -> Iterator[fx.Pair]:
    for number in itertools.count():
        yield fx.name(number % 1000), f"203.0.113.{number}.{number % 7}"


def one_network() -> Iterator[fx.Pair]:
    """Yield the addresses of a user's own IPv6 network."""
    source = fx.newcomers(6)
    while True:
        yield from source(1000)


def invented() -> Iterator[fx.Pair]:
    for number in itertools.count():
        yield f"invented{number}", fx.home(number % 1_000_000)


FLOODS: dict[str, Callable[[], Iterator[fx.Pair]]] = {
    "malformed addresses": malformed,
    "one user's IPv6 network": one_network,
    "invented usernames": invented,
}


def floods(scale: Scale) -> Part:
    """Warm checks of other users between the waves of a flood, and the guard's memory."""
    others = scale.flooded // 2

    def guard() -> Guard:
        made = fx.guard_of({fx.ROAMER: [fx.WIDE4, fx.WIDE6]}, others, capacity=scale.flooded)
        fx.fill(made, others)
        made.is_allowed(fx.ROAMER, "10.0.0.1")
        return made

    def send(flooded: Guard, pairs: Iterator[fx.Pair], count: int) -> None:
        for user, ip in itertools.islice(pairs, count):
            flooded.is_allowed(user, ip)

    def between(flood: Callable[[], Iterator[fx.Pair]] | None) -> Work:
        asked = guard()
        # The floor has its flood on another guard, so that both find the processor's caches
        # emptied by it.
        flooded, pairs = (asked, flood()) if flood else (guard(), invented())
        send(flooded, pairs, 3 * scale.flooded)
        source = fx.at_random(others)

        def waves(loops: int) -> list[fx.Pair]:
            send(flooded, pairs, max(50, scale.flooded // 10))
            return source(loops)

        return fx.asking(asked.is_allowed, waves)

    def facts() -> Iterator[Fact]:
        worst, dropped = (0, 1), 0
        for flood in FLOODS.values():
            flooded, pairs = guard(), flood()
            send(flooded, pairs, scale.flooded)
            full = resident()
            send(flooded, pairs, 3 * scale.flooded)
            worst = max(worst, (resident(), full), key=lambda it: it[0] / it[1])
            loads = flooded.stats().loads
            send(flooded, iter(fx.homes(others)), others)
            dropped = max(dropped, flooded.stats().loads - loads)
        yield "memory", *worst
        yield "dropped", dropped, None

    rows = [
        Row(f"other users, warm, under a flood of {flood}", "without the flood", flood, 1.2)
        for flood in FLOODS
    ]
    rows += [
        Row("other users dropped by a flood", "", "dropped", 0, judged="ours", unit=""),
        Row("memory, four times the capacity sent", "once", "memory", 1.02, unit="B"),
    ]
    subjects = [Subject(told, partial(between, flood)) for told, flood in FLOODS.items()]
    floor = Subject("floor", lambda: between(None))
    return Part(title="Floods", rows=rows, subjects=[floor, *subjects], facts=facts)


def threads(scale: Scale) -> Part:
    """The throughput of threads that share a guard, as the time of one answer of them all."""
    users = min(1_000, scale.many)

    def work(count: int) -> Work:
        ask, source = fx.remembering(users).is_allowed, fx.at_random(users)

        def crowd(loops: int) -> float:
            pairs, start = source(loops), threading.Barrier(count + 1)

            def run(share: list[fx.Pair]) -> None:
                start.wait()
                for user, ip in share:
                    ask(user, ip)

            workers = [threading.Thread(target=run, args=(pairs[n::count],)) for n in range(count)]
            for worker in workers:
                worker.start()
            start.wait()
            begun = time.perf_counter()
            for worker in workers:
                worker.join()
            return time.perf_counter() - begun

        return crowd

    return Part(
        title="Threads",
        rows=[Row("throughput of 8 threads", "one thread", "8", 0.9, judged="speed")],
        subjects=[Subject("1", lambda: work(1)), Subject("8", lambda: work(8))],
        slot=50.0,
        rounds=12,
    )
