"""`rules.impact` against an independent recomputation, exhaustive over small address families.

The recomputation knows no ranges and no spans of time: at each moment at which something expires
it asks for each address whether it is allowed. Addresses outside of the family are alike below and
above it, so that one of each is enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import combinations, combinations_with_replacement, pairwise, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ipguard.addresses import AddressRange, AddressSet
from ipguard.model import Direction, Impact, Restriction
from ipguard.rules import impact

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
PAST, SOON, LATER = (NOW + timedelta(hours=hours) for hours in (-1, 1, 2))
LASTS = {None: 3, PAST: 0, SOON: 1, LATER: 2}
"""For each expiry, at how many of the moments `NOW`, `SOON` and `LATER` it allows."""

BASE = {4: 10 << 24, 6: 0x20010DB8 << 96}
END = {4: 2**32, 6: 2**128}

Policy = tuple[Restriction, ...]


def restriction(addresses: AddressRange | str, expires_at: datetime | None = None) -> Restriction:
    text = isinstance(addresses, str)
    return Restriction(
        id="r",
        username="jsmith",
        addresses=AddressRange.parse(addresses) if text else addresses,  # type: ignore[arg-type]
        label="",
        created_at=PAST,
        created_by="boss",
        expires_at=expires_at,
    )


def policy(*texts: str) -> Policy:
    """Return restrictions, each written as its addresses and how many hours are left."""
    found = []
    for text in texts:
        addresses, _, hours = text.partition(" ")
        found.append(restriction(addresses, NOW + timedelta(hours=int(hours)) if hours else None))
    return tuple(found)


class Family:
    """The first addresses of a network of some versions, and sets of addresses as bit masks."""

    def __init__(self, bits: int, *versions: int) -> None:
        size = 1 << bits
        self.ranges = [
            AddressRange(version=version, first=BASE[version] + first, last=BASE[version] + last)
            for version in versions
            for first in range(size)
            for last in range(first, size)
        ]
        # Below, in, and above the family, and the exact ends of ranges.
        self.points = [
            (version, point)
            for version in (4, 6)
            for point in (
                range(BASE[version] - 1, BASE[version] + size + 1) if version in versions else (0,)
            )
        ]
        self.bounds = {(v, n) for v, n in self.points if n} | set(END.items())
        self.bounds |= {(v, 0) for v in END}
        self.everything = (1 << len(self.points)) - 1
        self._known: dict[AddressRange, int] = {}

    def mask(self, ranges: Iterable[AddressRange]) -> int:
        found = 0
        for each in ranges:
            known = self._known.get(each)
            if known is None:
                version, first, last = each.version, each.first, each.last
                assert {(version, first), (version, last + 1)} <= self.bounds
                known = self._known[each] = sum(
                    1 << n
                    for n, (v, point) in enumerate(self.points)
                    if v == version and first <= point <= last
                )
            found |= known
        return found

    def allowed(self, restrictions: Policy) -> tuple[int, int, int]:
        """Return what is allowed at each moment."""
        found = [0, 0, 0] if restrictions else [self.everything] * 3
        for each in restrictions:
            mask = self.mask((each.addresses,))
            for moment in range(LASTS[each.expires_at]):
                found[moment] |= mask
        return found[0], found[1], found[2]

    def lists(
        self, most: int, expiries: Iterable[datetime | None] = tuple(LASTS)
    ) -> list[tuple[Policy, tuple[int, int, int]]]:
        """Return all lists of at most so many restrictions, and what each allows."""
        each = [restriction(addresses, at) for at in expiries for addresses in self.ranges]
        found: list[Policy] = [()]
        for size in range(1, most + 1):
            found += combinations_with_replacement(each, size)
        return [(policy, self.allowed(policy)) for policy in found]


Known = tuple[Policy, tuple[int, int, int]]


def judge(family: Family, before: Known, afterwards: Known) -> None:
    """Fail unless the impact of a change agrees with the sets of addresses."""
    (was, had), (will, has) = before, afterwards
    found = impact(was, will, NOW)
    gained = (has[0] & ~had[0]) | (has[1] & ~had[1]) | (has[2] & ~had[2])
    lost = (had[0] & ~has[0]) | (had[1] & ~has[1]) | (had[2] & ~has[2])
    if was and not will:
        direction = Direction.OPENS
    elif gained:
        direction = Direction.LOOSENS
    elif lost or (will and not was):
        direction = Direction.TIGHTENS
    else:
        direction = Direction.NEUTRAL
    right = (direction, gained, lost)
    if (found.direction, family.mask(found.gained), family.mask(found.lost)) != right:
        pytest.fail(f"{was} -> {will}: {found}, not {right}")


def judge_all(family: Family, many: list[Known], few: list[Known]) -> int:
    """Judge all changes between lists, both ways; return how many."""
    for one in many:
        for other in few:
            judge(family, one, other)
            judge(family, other, one)
    return 2 * len(many) * len(few)


@pytest.mark.slow
def test_all_changes_of_a_2_bit_family() -> None:
    """All lists of at most two restrictions, to and from all of at most one."""
    family = Family(2, 4)
    assert judge_all(family, family.lists(2), family.lists(1)) == 2 * 861 * 41


@pytest.mark.parametrize("version", [4, 6])
def test_all_changes_of_a_1_bit_family(version: int) -> None:
    """All pairs of lists of at most two restrictions."""
    family = Family(1, version)
    for one in family.lists(2):
        for other in family.lists(2):
            judge(family, one, other)


def test_all_changes_of_both_versions() -> None:
    family = Family(1, 4, 6)
    assert judge_all(family, family.lists(2), family.lists(1)) == 2 * 325 * 25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "expiries", "most"), [(2, tuple(LASTS), 2), (3, tuple(LASTS), 1), (4, (None,), 1)]
)
def test_all_changes_of_larger_families(
    bits: int, expiries: tuple[datetime | None, ...], most: int, *, long: bool
) -> None:
    """All lists of at most two restrictions, to and from all of at most `most`."""
    if not long:
        pytest.skip("takes minutes")
    family = Family(bits, 4)
    judge_all(family, family.lists(2, expiries), family.lists(most, expiries))


def orders() -> list[tuple[AddressRange, ...]]:
    """Return four ranges for each order in which the eight bounds of four ranges can be.

    The rules compare bounds, and nothing else: two changes whose bounds are in the same order
    differ in nothing that matters. So these stand for all changes between lists of two ranges of a
    family of any size.
    """
    runs = list(combinations(range(8), 2))
    found = (
        four
        for four in product(runs, repeat=4)
        if (used := {bound for run in four for bound in run}) == set(range(len(used)))
    )
    base = BASE[4]
    return [
        tuple(AddressRange(version=4, first=base + a, last=base + b - 1) for a, b in four)
        for four in found
    ]


def test_all_orders_of_four_ranges(rounds: Callable[[int, int], int]) -> None:
    """All pairs of lists of two ranges with expiries, up to the order of bounds.

    In the long run all of them; otherwise some.
    """
    family, chance = Family(3, 4), random.Random(1)
    ends = list(product(LASTS, repeat=2))
    every = orders()
    judged = 0
    for one, two, three, four in chance.sample(every, rounds(20, len(every))):
        if (one.first, one.last) > (two.first, two.last):
            continue
        if (three.first, three.last) > (four.first, four.last):
            continue
        lists = []
        for left, right in ((one, two), (three, four)):
            both = [(restriction(left, a), restriction(right, b)) for a, b in ends]
            lists.append([(policy, family.allowed(policy)) for policy in both])
        for before, afterwards in product(*lists):
            judge(family, before, afterwards)
            judged += 1
    assert judged > rounds(100, 1_000_000)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(seed: int, rounds: Callable[[int, int], int]) -> None:
    """Changes of up to four restrictions of both versions; 10,000,000 in the long run."""
    chance = random.Random(seed)
    family = Family(4, 4, 6)
    pool = [restriction(addresses, at) for addresses in family.ranges for at in LASTS]
    for _ in range(rounds(500, 2_500_000)):
        few = chance.choices(pool, k=chance.randrange(5))
        # A change keeps most restrictions.
        kept = [each for each in few if chance.random() < 0.5]
        other = (*kept, *chance.choices(pool, k=chance.randrange(3)))
        before, afterwards = tuple(few), tuple(other)
        if chance.random() < 0.5:
            before, afterwards = afterwards, before
        judge(family, (before, family.allowed(before)), (afterwards, family.allowed(afterwards)))


# ------------------------------------------------------------------------- ranges of any size

versions = st.sampled_from([4, 6])


@st.composite
def address_ranges(draw: st.DrawFn) -> AddressRange:
    version = draw(versions)
    anywhere = st.integers(0, END[version] - 1)
    near = st.integers(BASE[version] - 3, BASE[version] + 3)
    edge = st.sampled_from([0, 1, END[version] - 2, END[version] - 1])
    ends = st.one_of(near, near, anywhere, edge)
    first, last = sorted((draw(ends), draw(ends)))
    lowest, highest = 0xFFFF << 32, (0xFFFF << 32) + 2**32 - 1  # IPv4-mapped: all of it, or none
    apart = version == 4 or last < lowest or highest < first
    assume(apart or (first <= lowest and highest <= last))
    return AddressRange(version=version, first=first, last=last)


expiries = st.sampled_from(list(LASTS))
restrictions = st.builds(restriction, address_ranges(), expiries)
policies = st.lists(restrictions, max_size=5).map(tuple)
sets = st.lists(address_ranges(), max_size=6).map(AddressSet)


def pieces(*ranges: Iterable[AddressRange]) -> Iterator[tuple[int, int]]:
    """Yield an address of each piece between two bounds of ranges."""
    for version, end in END.items():
        bounds = {0, end}
        for each in (each for some in ranges for each in some if each.version == version):
            bounds |= {each.first, each.last + 1}
        for first, _ in pairwise(sorted(bounds)):
            yield version, first


def holds(ranges: Iterable[AddressRange], piece: tuple[int, int]) -> bool:
    return any((r.version, True) == (piece[0], r.first <= piece[1] <= r.last) for r in ranges)


@given(sets, sets)
def test_sets_are_sets(one: AddressSet, other: AddressSet) -> None:
    """Union and difference are those of sets, in as few ranges as there can be."""
    union, rest = one | other, one - other
    for piece in pieces(one, other, union, rest):
        assert holds(union, piece) is (holds(one, piece) or holds(other, piece))
        assert holds(rest, piece) is (holds(one, piece) and not holds(other, piece))
    for found in (union, rest):
        for left, right in pairwise(found):
            assert (left.version, left.last + 1) < (right.version, right.first)
        assert found == AddressSet(found)
        assert bool(found) is any(holds(found, piece) for piece in pieces(found))


def until(restrictions: Policy, piece: tuple[int, int]) -> int:
    """Return at how many of the moments an address is allowed."""
    held = [LASTS[r.expires_at] for r in restrictions if holds([r.addresses], piece)]
    return max(held, default=0) if restrictions else 3


@given(policies, policies)
def test_impact_of_any_ranges(before: Policy, afterwards: Policy) -> None:
    """An address is gained if it is allowed for longer, and lost if it is for less long."""
    found = impact(before, afterwards, NOW)
    gained = lost = False
    ranges = ([r.addresses for r in (*before, *afterwards)], found.gained, found.lost)
    for piece in pieces(*ranges):
        was, will = until(before, piece), until(afterwards, piece)
        assert holds(found.gained, piece) is (will > was)
        assert holds(found.lost, piece) is (will < was)
        gained, lost = gained or will > was, lost or will < was
    if before and not afterwards:
        assert found.direction is Direction.OPENS
    elif gained:
        assert found.direction is Direction.LOOSENS
    else:
        fewer = lost or bool(before) != bool(afterwards)
        assert found.direction is (Direction.TIGHTENS if fewer else Direction.NEUTRAL)


@given(policies, policies)
def test_there_and_back(before: Policy, afterwards: Policy) -> None:
    """What a change gains, its reversal loses; no address is both."""
    there, back = impact(before, afterwards, NOW), impact(afterwards, before, NOW)
    assert (there.gained, there.lost) == (back.lost, back.gained)
    assert there.gained - there.lost == there.gained
    assert impact(before, before, NOW).direction is Direction.NEUTRAL


def test_the_moment_of_expiry() -> None:
    """A restriction allows nothing any more at the moment at which it expires."""
    gone = (restriction("10.0.0.1", NOW),)
    last = (restriction("10.0.0.1", NOW + timedelta.resolution),)
    assert impact(gone, last, NOW).direction is Direction.LOOSENS
    assert impact(last, gone, NOW).direction is Direction.TIGHTENS


# -------------------------------------------------------------------- what will hold afterwards


@pytest.mark.parametrize(
    ("before", "afterwards", "direction", "summary"),
    [
        ((), (), "NEUTRAL", "From anywhere, as today."),
        (("10.0.0.1",), (), "OPENS", "Then from anywhere: no restriction is left."),
        (("10.0.0.1 -1",), (), "OPENS", "Then from anywhere: no restriction is left."),
        (
            (),
            ("10.0.0.1", "10.0.0.0/24 2"),
            "TIGHTENS",
            (
                "Today from anywhere; then only from 10.0.0.1, "
                "10.0.0.0/24 (until 2030-01-01 14:00 UTC)."
            ),
        ),
        (
            (),
            ("0.0.0.0/0", "::/0"),
            "TIGHTENS",
            "Today from anywhere; then only from 0.0.0.0/0, ::/0.",
        ),
        (
            ("10.0.0.1", "10.0.0.2 -1"),
            ("10.0.0.2 -1",),
            "TIGHTENS",
            "Then from nowhere: every restriction that is left has expired.",
        ),
        (
            ("10.0.0.2 -1",),
            ("10.0.0.2 -2",),
            "NEUTRAL",
            "Then from nowhere: every restriction that is left has expired.",
        ),
        (("10.0.0.1",), ("10.0.0.1",), "NEUTRAL", "From the same addresses as today."),
        (
            ("10.0.0.0/31",),
            ("10.0.0.0", "10.0.0.1"),
            "NEUTRAL",
            "From the same addresses as today.",
        ),
        (("10.0.0.1",), ("10.0.0.1", "2001:db8::/64"), "LOOSENS", "Then also from 2001:db8::/64."),
        (
            ("10.0.0.1",),
            ("10.0.0.2",),
            "LOOSENS",
            "Then also from 10.0.0.2; no longer from 10.0.0.1.",
        ),
        (("10.0.0.0/30",), ("10.0.0.1",), "TIGHTENS", "No longer from 10.0.0.0, 10.0.0.2/31."),
        (("10.0.0.1 1",), ("10.0.0.1",), "LOOSENS", "For longer than today from 10.0.0.1."),
        (
            ("10.0.0.1 2",),
            ("10.0.0.1 1",),
            "TIGHTENS",
            "For a shorter time than today from 10.0.0.1.",
        ),
        (
            ("10.0.0.1 1", "10.0.0.2"),
            ("10.0.0.0/30 2",),
            "LOOSENS",
            (
                "Then also from 10.0.0.0, 10.0.0.3; for longer than today from 10.0.0.1; "
                "for a shorter time than today from 10.0.0.2."
            ),
        ),
    ],
)
def test_summaries(
    before: tuple[str, ...], afterwards: tuple[str, ...], direction: str, summary: str
) -> None:
    found = impact(policy(*before), policy(*afterwards), NOW)
    assert (found.direction.name, found.summary) == (direction, summary)


def test_a_long_summary_says_how_many_others_there_are() -> None:
    many = policy(*(f"10.0.{n}.1" for n in range(22)))
    assert impact(many[:1], many, NOW).summary.endswith("10.0.20.1 and 1 more.")
    assert impact(many[:2], many, NOW).summary.endswith(", 10.0.21.1.")


@given(policies, policies)
def test_a_summary_says_what_the_impact_shows(before: Policy, afterwards: Policy) -> None:
    """The words of a summary occur exactly when there is something of the kind."""
    found = impact(before, afterwards, NOW)
    text = found.summary.lower()
    live = any(r.expires_at != PAST for r in afterwards)
    assert ("no restriction is left" in text) is (found.direction is Direction.OPENS)
    assert ("today from anywhere; then only from" in text) is (not before and live)
    assert ("from nowhere" in text) is (bool(afterwards) and not live)
    assert ("as today" in text) is (
        found.direction is Direction.NEUTRAL and (live or not afterwards)
    )
    if before and live:
        assert ("also from" in text or "for longer" in text) is bool(found.gained)
        assert ("no longer from" in text or "shorter" in text) is bool(found.lost)


def test_the_words_of_an_impact_are_no_part_of_its_value() -> None:
    """Stores compare what a request does, not how this version of the library says it."""
    found = impact((), policy("10.0.0.1"), NOW)
    assert found == Impact(direction=found.direction, gained=found.gained, lost=found.lost)
