"""What the rules make of sightings: suggestions, unused restrictions, notices."""

from __future__ import annotations

import ipaddress
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.model import Restriction, Sighting
from ipguard.rules import is_unused, refusal_notice_due, suggest, would_refuse

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
HOME = "198.51.100.20"


def seen(address: str, allowed: int = 1, refused: int = 0, ago: timedelta = HOUR) -> Sighting:
    return Sighting(
        username="jsmith",
        address=address,
        first_at=NOW - ago,
        last_at=NOW - ago,
        allowed=allowed,
        refused=refused,
    )


def restriction(addresses: str, expires_at: datetime | None = None, age: int = 100) -> Restriction:
    return Restriction(
        id="r",
        username="jsmith",
        addresses=AddressRange.parse(addresses),
        label="",
        created_at=NOW - timedelta(days=age),
        created_by="boss",
        expires_at=expires_at,
    )


def suggested(sightings: list[Sighting], *held: Restriction, widest_ipv6: int = 48) -> list[str]:
    return [str(each) for each in suggest(held, sightings, NOW, widest_ipv6=widest_ipv6)]


# -- suggestions -------------------------------------------------------------------------------


def test_the_most_used_address_is_suggested_first() -> None:
    """Among equals, the one that was used last, then the lowest."""
    used = [
        seen("203.0.113.9", 2),
        seen("203.0.113.8", 2),
        seen("203.0.113.7", 3, ago=HOUR * 9),
        seen("203.0.113.6", 2, ago=HOUR / 2),
    ]
    expected = ["203.0.113.7", "203.0.113.6", "203.0.113.8", "203.0.113.9"]
    assert suggested(used) == expected
    assert suggested(used[::-1]) == expected


def test_refused_logins_suggest_nothing() -> None:
    """Somebody else may have the password."""
    assert suggested([seen("203.0.113.7", 0, 50), seen("203.0.113.8", 1, 50)]) == ["203.0.113.8"]


def test_an_ipv6_address_stands_for_its_network() -> None:
    """The logins from one /64 are added up; it is never wider than the settings allow."""
    used = [seen("2001:db8::7"), seen("2001:db8::a:0:0:1", 2), seen("2001:db8:0:1::1", 2)]
    assert suggested(used) == ["2001:db8::/64", "2001:db8:0:1::/64"]
    assert suggested(used, widest_ipv6=96)[0] == "2001:db8:0:0:a::/96"
    assert suggested(used, widest_ipv6=128) == [
        "2001:db8::a:0:0:1",
        "2001:db8:0:1::1",
        "2001:db8::7",
    ]


def test_what_a_restriction_allows_is_not_suggested() -> None:
    """One that has expired allows nothing."""
    used = [seen("203.0.113.7"), seen("2001:db8::7"), seen("2001:db8::8")]
    assert suggested(used, restriction("203.0.113.0/24"), restriction("2001:db8::7")) == [
        "2001:db8::/64"
    ]
    assert suggested(used[:1], restriction("203.0.113.0/24", NOW)) == ["203.0.113.7"]


@pytest.mark.parametrize("address", ["224.0.0.1", "ff02::1", "0.0.0.0", "255.255.255.255"])
def test_an_address_that_no_restriction_can_have_is_not_suggested(address: str) -> None:
    assert suggested([seen(address), seen("203.0.113.7")]) == ["203.0.113.7"]


addresses = st.one_of(
    st.integers(1, 40).map(lambda n: f"203.0.113.{n}"),
    st.tuples(st.integers(0, 3), st.integers(0, 9)).map(lambda n: f"2001:db8:0:{n[0]}::{n[1]:x}"),
    st.ip_addresses(v=6)
    .filter(lambda a: a.ipv4_mapped is None and not a.is_multicast and int(a))
    .map(str),
)


@given(
    st.dictionaries(addresses, st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=32),
    st.lists(addresses | st.sampled_from(["203.0.113.0/28", "2001:db8::/63"])),
    st.integers(32, 128),
)
def test_suggestions_agree_with_a_recomputation(
    logins: dict[str, tuple[int, int]], held: list[str], widest: int
) -> None:
    """Each allowed address that is not allowed yet is in one suggestion, the most used first."""
    networks = [ipaddress.ip_network(each) for each in held]
    counts: Counter[str] = Counter()
    for text, (allowed, _) in logins.items():
        address = ipaddress.ip_address(text)
        if allowed and not any(address in network for network in networks):
            prefix = 32 if address.version == 4 else max(64, widest)
            network = ipaddress.ip_network((address, prefix), strict=False)
            counts[str(network).removesuffix("/32").removesuffix("/128")] += allowed
    found = suggest(
        [restriction(each) for each in held],
        [seen(text, *each) for text, each in logins.items()],
        NOW,
        widest_ipv6=widest,
    )
    texts = [str(each) for each in found]
    assert sorted(texts) == sorted(counts)
    assert [counts[each] for each in texts] == sorted(counts.values(), reverse=True)


# -- what a change would have refused ----------------------------------------------------------


def test_how_many_logins_a_change_would_have_refused() -> None:
    """Logins that were refused anyhow do not count."""
    used = [seen("203.0.113.7", 9, 4), seen("203.0.113.8", 3, 5)]
    assert would_refuse(used[1:], used) == "This would have refused 3 of 12 recent logins."
    assert would_refuse([], used) == "This would have refused none of 12 recent logins."
    assert would_refuse([seen(HOME, 1_234)], [seen(HOME, 1_234)]) == (
        "This would have refused 1,234 of 1,234 recent logins."
    )
    assert would_refuse([], [seen("203.0.113.7", 0, 4)]) == ""
    assert would_refuse([], []) == ""


# -- unused restrictions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "used", "expected"),
    [(31, None, True), (30, None, True), (29, None, False), (90, 30, True), (90, 29, False)],
)
def test_a_restriction_is_unused(age: int, used: int | None, *, expected: bool) -> None:
    """It is at least as old, and did not let the user in for as long."""
    last_used = None if used is None else NOW - timedelta(days=used)
    held = restriction("203.0.113.7", age=age)
    assert is_unused(held, last_used, NOW - timedelta(days=30)) is expected


# -- notices -----------------------------------------------------------------------------------


def test_notices_about_refused_logins_are_limited() -> None:
    """After ten new addresses within a day there are no more; old and allowed ones do not count."""
    first = seen("198.51.100.7", 0, 1)
    others = [seen(f"203.0.113.{n}", 0, 1, ago=HOUR * 2) for n in range(10)]
    assert refusal_notice_due(first, [first])
    assert refusal_notice_due(first, [first, *others[:9]])
    assert not refusal_notice_due(first, [first, *others])
    older = [seen(each.address, 0, 1, ago=HOUR * 25) for each in others]
    assert refusal_notice_due(first, [first, *older])
    allowed = [seen(each.address, 1) for each in others]
    assert refusal_notice_due(first, [first, *allowed])
