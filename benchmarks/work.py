"""The work that everything is measured on: users, their restrictions, where they log in from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache

from ipguard import AddressRange, Guard, Policy, Restriction
from ipguard.model import Changes

Pair = tuple[str, str]
Ask = Callable[[str, str], object]
Policies = dict[str, list[str]]

BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
SEED = 20260101

#: One user who may come from anywhere in two networks: whose every address can be a new one.
ROAMER = "roamer"
WIDE4, WIDE6 = "10.0.0.0/8", "2001:db8::/32"


def name(number: int) -> str:
    return f"user{number:07}"


def home(number: int) -> str:
    """Return the address that a user logs in from: inside its first restriction."""
    return dotted((10 << 24) + 8 * number + 1)


def dotted(value: int) -> str:
    return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"


def networks(number: int) -> list[str]:
    """Return a user's restrictions: a small IPv4 network and an IPv6 one."""
    return [
        f"{dotted((10 << 24) + 8 * number)}/29",
        f"2001:db8:{number >> 16:x}:{number & 65535:x}::/64",
    ]


def crowd(count: int) -> Policies:
    return {name(number): networks(number) for number in range(count)}


def at_random(count: int, calls: int) -> list[Pair]:
    """Return who asks, and from where; the very objects again where a user comes again."""
    return _random.choices(homes(count), k=calls)


_random = random.Random(SEED)


@lru_cache(maxsize=8)
def homes(count: int) -> list[Pair]:
    """Return everybody and their address: made once, the same objects each time."""
    return [(name(number), home(number)) for number in range(count)]


def from_the_wire(pairs: list[Pair]) -> list[Pair]:
    """Return equal texts that nobody has seen or hashed yet, as a server decodes them."""
    return [(user.encode().decode(), ip.encode().decode()) for user, ip in pairs]


class Newcomers:
    """Addresses of the roamer, each a new one."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._next = 0

    def pairs(self, count: int) -> list[Pair]:
        first = self._next
        self._next += count
        # By an odd step through the network, so that neighbours in time are none in the network.
        if self._version == 4:
            return [
                (ROAMER, dotted((10 << 24) + (n * 2_654_435 & 0xFFFFFF)))
                for n in range(first, first + count)
            ]
        return [
            (ROAMER, f"2001:db8:{n * 40_503 & 65535:x}:{n >> 16 & 65535:x}::{n & 65535:x}")
            for n in range(first, first + count)
        ]


def scattered(count: int) -> list[str]:
    """Return restrictions, one of them wide, in the middle of many small ones around it."""
    # Every second address, so that no two of them can be merged to one run.
    low = [dotted((1 << 24) + 2 * n) for n in range((count - 1) // 2)]
    high = [dotted((172 << 24) + 2 * n) for n in range(count - 1 - len(low))]
    return [*low, WIDE4, *high]


def _ranges(number: int) -> list[AddressRange]:
    """Return what `networks` says, without reading text: a million users are to come soon."""
    four = (10 << 24) + 8 * number
    six = (0x20010DB8 << 96) + ((number >> 16) << 80) + ((number & 65535) << 64)
    return [
        AddressRange(version=4, first=four, last=four + 7),
        AddressRange(version=6, first=six, last=six + 2**64 - 1),
    ]


def restriction(user: str, addresses: AddressRange, number: int) -> Restriction:
    return Restriction(
        id=f"{user}-{number}",
        username=user,
        addresses=addresses,
        label="",
        created_at=BEGUN,
        created_by="boss",
    )


class Rows:
    """A store that only answers: policies are made as they are asked for, of any number of users.

    What a guard remembers does not depend on where it was read. This reads fast, and a million
    users need not be written anywhere first.
    """

    def __init__(self, policies: Policies | None = None, count: int = 0) -> None:
        self._policies = policies or {}
        self._count = count
        self.loads = 0

    def now(self) -> datetime:
        return BEGUN

    def load_policy(self, username: str) -> Policy:
        self.loads += 1
        texts = self._policies.get(username)
        if texts is not None:
            ranges = [AddressRange.parse(text) for text in texts]
        elif username.startswith("user") and int(username[4:]) < self._count:
            ranges = _ranges(int(username[4:]))
        else:
            return Policy(revision=1, restrictions=(), known=False)
        held = [restriction(username, addresses, n) for n, addresses in enumerate(ranges)]
        return Policy(revision=1, restrictions=tuple(held), known=True)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        names = [*self._policies, *map(name, range(self._count))]
        return 1, ((user, self.load_policy(user)) for user in names)

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:  # noqa: ARG002
        return Changes(1, "token", frozenset())

    def wait(self, revision: int, timeout: float) -> bool:  # noqa: ARG002
        return False

    def close(self) -> None:
        pass


def guard_of(policies: Policies, **settings: object) -> Guard:
    return Guard(Rows(policies), **settings)  # type: ignore[arg-type]


def crowded(count: int, **settings: object) -> Guard:
    """Return a guard that remembers this many users and the address of each."""
    guard = Guard(Rows(count=count), capacity=count, **settings)  # type: ignore[arg-type]
    fill(guard, count)
    return guard


def fill(guard: Guard, count: int) -> None:
    for _ in range(2):  # the first answer of each comes from the store, the second is remembered
        for user, ip in homes(count):
            assert guard.is_allowed(user, ip)


def look_up(pairs: list[Pair]) -> Ask:
    """Return the floor of a warm check: a plain function that looks one pair up in a dict."""
    table = dict.fromkeys(pairs, True)

    def floor(user: str, ip: str) -> bool:
        return table[user, ip]

    return floor


def nothing(user: str, ip: str) -> bool:  # noqa: ARG001
    """What a call costs that asks nothing; the loop around it included."""
    return True
