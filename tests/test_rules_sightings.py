"""What the rules make of sightings: suggestions, unused restrictions, notices."""

from __future__ import annotations

import ipaddress
from collections import Counter
from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.errors import InvalidValue
from ipguard.model import Restriction, Sighting
from ipguard.rules import (
    is_unused,
    last_used,
    refusal_hint,
    refusal_notice_due,
    refusals,
    sightings_kept,
    sightings_to_record,
    still_refused,
    suggest,
    whereabouts,
    would_refuse,
)

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


TRANSLATED = [
    ipaddress.ip_network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32")
]
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
            if any(address in network for network in TRANSLATED):
                prefix = 128
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


@given(
    st.lists(st.tuples(addresses, st.integers(0, 2), st.integers(0, 9)), max_size=20),
    st.lists(addresses | st.sampled_from(["203.0.113.0/28", "2001:db8::/63"]), max_size=6),
)
def test_the_last_use_agrees_with_a_recomputation(
    logins: list[tuple[str, int, int]], held: list[str]
) -> None:
    """Allowed logins count, from the time at which the restriction was made on."""
    sightings = [seen(text, allowed, ago=HOUR * ago) for text, allowed, ago in logins]
    restrictions = [
        attrs.evolve(restriction(text), id=f"r{n}", created_at=NOW - HOUR * n)
        for n, text in enumerate(held)
    ]
    expected: dict[str, datetime] = {}
    for n, text in enumerate(held):
        network = ipaddress.ip_network(text)
        for address, allowed, ago in logins:
            if allowed and ago <= n and ipaddress.ip_address(address) in network:
                at = NOW - HOUR * ago
                expected[f"r{n}"] = max(at, expected.get(f"r{n}", at))
    assert last_used(restrictions, sightings) == expected


def test_a_restriction_is_not_used_after_its_end() -> None:
    """Later logins from there were refused, or allowed by another restriction."""
    ended = restriction(HOME, expires_at=NOW - HOUR * 2)
    before, after = seen(HOME, 1, 0, ago=HOUR * 3), seen(HOME, 1, 1, ago=HOUR)
    both = attrs.evolve(after, first_at=before.first_at)
    assert last_used([ended], [before]) == {"r": before.last_at}
    assert last_used([ended], [both]) == {"r": ended.expires_at}
    assert last_used([ended], [after]) == {}
    assert last_used([ended], [seen(HOME, ago=HOUR * 2)]) == {}
    assert last_used([attrs.evolve(ended, expires_at=NOW)], [both]) == {"r": after.last_at}


# -- what a store keeps ------------------------------------------------------------------------


def test_sightings_are_checked_and_joined() -> None:
    """Spellings of one address are one; a clock that runs ahead moves nothing into the future."""
    early = seen("::ffff:198.51.100.20", 2, 1, ago=HOUR * 5)
    late = seen(HOME, 1, 2, ago=-HOUR)
    old = seen("203.0.113.7", ago=timedelta(days=90, microseconds=1))
    both = attrs.evolve(late, first_at=early.first_at, last_at=NOW, allowed=3, refused=3)
    for order in ([late, old, early], [early, late, old]):
        assert sightings_to_record(order, NOW) == [both]
    backwards = attrs.evolve(seen(HOME), first_at=NOW, last_at=NOW - HOUR)
    assert sightings_to_record([backwards], NOW)[0].first_at == NOW - HOUR


@pytest.mark.parametrize(
    "wrong",
    [[seen("203.0.113.0/24")], [seen(HOME, -1)], [seen(HOME, 1, -1)]],
    ids=["network", "allowed", "refused"],
)
def test_what_is_no_sighting_is_refused(wrong: list[Sighting]) -> None:
    with pytest.raises(InvalidValue, match=r"^seen: holds a sighting that is not one"):
        sightings_to_record(wrong, NOW)


def test_a_thousand_sightings_are_recorded_at_once() -> None:
    many = [seen(f"2001:db8::{n:x}", 0, 1, ago=timedelta(days=90)) for n in range(1001)]
    assert len(sightings_to_record(many[1:], NOW)) == 1000
    with pytest.raises(InvalidValue, match=r"^seen: must be at most 1,000 sightings"):
        sightings_to_record(many, NOW)


def test_the_newest_addresses_are_kept() -> None:
    """Among equals the lowest address; none longer than 90 days."""
    days = [seen(f"203.0.113.{n}", ago=timedelta(days=n)) for n in range(120)]
    kept = sightings_kept(days[::-1], NOW)
    assert kept == days[:32]
    assert sightings_kept(days[80:], NOW) == days[80:91]
    same = [seen(f"203.0.113.{n}") for n in range(40)]
    assert sightings_kept(same[::-1], NOW) == same[:32]


# -- refused logins ----------------------------------------------------------------------------


def test_refusals_are_those_with_refused_logins() -> None:
    found = refusals([seen(HOME, 3, 2), seen("203.0.113.7", 3)], [restriction("::1")], NOW)
    (refusal,) = found
    assert (refusal.address, refusal.times, refusal.last_at) == (HOME, 2, NOW - HOUR)
    assert refusal.hint == "It comes over IPv4, and only IPv6 is listed."
    (refusal,) = refusals([seen(HOME, 0, 1)], [restriction(HOME, expires_at=NOW)], NOW)
    assert refusal.hint == "A restriction that has expired listed it."


def test_what_is_allowed_now_is_not_refused_any_more() -> None:
    used = [seen(HOME, 3, 2), seen("203.0.113.7", 3), seen("203.0.113.8", 0, 1)]
    assert still_refused([], used, NOW) == []
    assert still_refused([restriction("203.0.113.8")], used, NOW) == used[:1]
    assert still_refused([restriction("203.0.113.8", NOW)], used, NOW) == [used[0], used[2]]


@pytest.mark.parametrize(
    ("address", "held", "hint"),
    [
        (HOME, [], ""),
        (HOME, ["198.51.100.0/24"], ""),
        (HOME, ["198.51.100.20 expired"], "A restriction that has expired listed it."),
        ("2001:db8::7", ["203.0.113.7"], "It comes over IPv6, and only IPv4 is listed."),
        (HOME, ["2001:db8::7"], "It comes over IPv4, and only IPv6 is listed."),
        (
            HOME,
            ["203.0.113.7", "198.51.100.21"],
            "It is in 198.51.100.0/24, as is 198.51.100.21, which is listed.",
        ),
        (
            "2001:db8::7",
            ["2001:db8:0:0:a::/80"],
            "It is in 2001:db8::/64, as is 2001:db8:0:0:a::/80, which is listed.",
        ),
        (
            HOME,
            ["198.51.100.255-198.51.101.7"],
            "It is in 198.51.100.0/24, as is 198.51.100.255-198.51.101.7, which is listed.",
        ),
        (
            HOME,
            ["198.51.99.7-198.51.100.0"],
            "It is in 198.51.100.0/24, as is 198.51.99.7-198.51.100.0, which is listed.",
        ),
        (HOME, ["198.51.101.20", "198.51.99.0-198.51.99.255", "2001:db8::7"], ""),
        (HOME, ["203.0.113.7 expired"], ""),
        ("192.168.1.5", ["192.168.2.0/24"], ""),
    ],
)
def test_a_hint_says_why_restrictions_do_not_fit(address: str, held: list[str], hint: str) -> None:
    restrictions = [
        restriction(each.removesuffix(" expired"), NOW if each.endswith(" expired") else None)
        for each in held
    ]
    assert refusal_hint(address, restrictions, NOW) == hint


def test_a_hint_at_wrong_proxy_settings() -> None:
    hint = refusal_hint("10.0.0.7", [restriction(HOME)], NOW)
    assert hint == (
        "It is a private address, which the internet never sees: the proxy settings of the login"
        " server may be wrong."
    )


# -- notices -----------------------------------------------------------------------------------


def test_notices_about_refused_logins_are_limited() -> None:
    """After ten new addresses within a day there are no more; old and allowed ones do not count."""
    first = seen("198.51.100.7", 0, 1)
    told = NOW - HOUR * 2
    others = [seen(f"203.0.113.{n}", 0, 1, ago=HOUR * 2) for n in range(10)]
    assert refusal_notice_due(first, [first], told)
    assert refusal_notice_due(first, [first, *others[:9]], told)
    assert not refusal_notice_due(first, [first, *others], told)
    older = [seen(each.address, 0, 1, ago=HOUR * 25) for each in others]
    assert refusal_notice_due(first, [first, *older], told)
    allowed = [seen(each.address, 1) for each in others]
    assert refusal_notice_due(first, [first, *allowed], told)


def test_one_notice_a_day_is_due_in_any_case() -> None:
    """Many addresses that are seen at once do not prevent all notices."""
    first = seen("198.51.100.7", 0, 1)
    every = [first, *(seen(f"203.0.113.{n}", 0, 1) for n in range(31))]
    assert refusal_notice_due(first, every, None)
    assert refusal_notice_due(first, every, first.last_at - HOUR * 24)
    assert not refusal_notice_due(first, every, first.last_at - HOUR * 23)
    assert not refusal_notice_due(first, every, first.last_at)


@pytest.mark.parametrize(
    ("address", "listed"),
    [
        ("64:ff9b::198.51.100.7", "64:ff9b::c633:6407"),
        ("64:ff9b:1:2::c633:6407", "64:ff9b:1:2::c633:6407"),
        ("2001:0:c633:6401::7", "2001:0:c633:6401::7"),
        ("64:ff9c::7", "64:ff9c::/64"),
        ("2001:1::7", "2001:1::/64"),
        ("2001:db8:0:1:a::7", "2001:db8:0:1::/64"),
    ],
)
def test_an_address_of_a_translator_stands_for_itself(address: str, listed: str) -> None:
    """The /64 of NAT64 has all of IPv4, and that of Teredo all clients of a server."""
    assert str(whereabouts(address, widest_ipv6=48)) == listed
    assert list(map(str, suggest([], [seen(address)], NOW, widest_ipv6=48))) == [listed]
