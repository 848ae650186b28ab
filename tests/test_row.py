"""Tests of rows: their bytes, damaged ones, and the same decisions as from objects."""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import rules
from ipguard.addresses import AddressRange, pack_address
from ipguard.model import Policy, Reason, Restriction
from ipguard.row import (
    OPEN,
    PENDING,
    TEMPORARY,
    UNKNOWN,
    checked,
    decide,
    is_registered,
    is_restricted,
    lists,
    otherwise,
    pack,
    pack_columns,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NOW = datetime(2030, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def restriction(addresses: str | AddressRange = "203.0.113.7", **changes: Any) -> Restriction:
    plain = Restriction(
        id="a1",
        username="jsmith",
        addresses=addresses
        if isinstance(addresses, AddressRange)
        else AddressRange.parse(addresses),
        label="",
        created_at=EPOCH,
        created_by="",
    )
    return attrs.evolve(plain, **changes)


def policy(*restrictions: Restriction, known: bool = True) -> Policy:
    return Policy(revision=7, restrictions=restrictions, known=known)


def packed(address: AddressRange) -> bytes:
    return address.packed[0]


# ---------------------------------------------------------------------------------- the bytes


def test_the_bytes() -> None:
    """The format is fixed, because stores write it too."""
    moment = EPOCH + SECOND
    early = EPOCH - timedelta(microseconds=1)
    assert pack(policy(known=False)) == b"\2\0\0\0\0"
    assert pack(policy()) == b"\3\0\0\0\0"
    assert pack(policy(restriction("1.2.3.4"))) == b"\1\0\1\0\0\1\2\3\4\1\2\3\4a1"
    assert pack(
        policy(
            restriction("::1:0/112", expires_at=moment),
            restriction("::1", id="six"),
            restriction(id=""),
            restriction("1.2.3.4", expires_at=early, id="é"),
        )
    ) == (
        b"\5\0\1\0\1" + bytes([203, 0, 113, 7]) * 2 + (bytes(15) + b"\1") * 2 + b"\0six\0"
        + b"\4\1\2\3\4\1\2\3\4" + b"\xff" * 8 + b"\0\2\xc3\xa9"
        + b"\x10" + bytes(13) + b"\1\0\0" + bytes(13) + b"\1\xff\xff"
        + (10**6).to_bytes(8, "big") + b"\0\2a1"
    )  # fmt: skip


def test_the_size_of_three_restrictions() -> None:
    """Three IPv4 restrictions with ids of the workflow take 79 bytes."""
    three = [restriction(id="0123456789abcdef") for _ in range(3)]
    assert len(pack(policy(*three))) == 79


@pytest.mark.parametrize(
    "restriction_id", ["", "a\0b", "\ud800", "\0", "é\0", "\xc0\x80", "x" * 300]
)
@pytest.mark.parametrize("expires_at", [None, NOW + SECOND])
def test_any_id_is_restored(restriction_id: str, expires_at: datetime | None) -> None:
    row = checked(pack(policy(restriction(id=restriction_id, expires_at=expires_at))))
    assert decide(row, bytes([203, 0, 113, 7]), NOW) == (Reason.LISTED, restriction_id)


@pytest.mark.parametrize(
    ("first", "last"), [(b"", b""), (b"123", b"123"), (b"1234", b"12345"), (b"1234", b"1" * 16)]
)
def test_ends_of_other_lengths_are_refused(first: bytes, last: bytes) -> None:
    with pytest.raises(ValueError, match="4 or 16"):
        pack_columns(True, [("a", first, last, None)])


@pytest.mark.parametrize("size", [4, 16])
def test_number_of_restrictions_is_bounded(size: int) -> None:
    column = ("", bytes(size), bytes(size), None)
    row = checked(pack_columns(True, [column] * 65_535))
    assert decide(row, bytes(size), None) == (Reason.LISTED, "")
    with pytest.raises(ValueError, match="65,535"):
        pack_columns(True, [column] * 65_536)


def test_none_is_not_taken_for_no_restrictions() -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match="tuple"):
        pack(policy(restriction()).__class__(revision=1, restrictions=nothing, known=True))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("text", ["203.0.113.7", "2001:db8::7"])
def test_no_id_is_taken_for_a_range(text: str, count: int) -> None:
    """The bytes after the ranges would be a range from low to high addresses."""
    addresses = AddressRange.parse(text)
    size = len(packed(addresses))
    name = "\1" * size + "\x7e" * size
    row = checked(pack(policy(*(restriction(addresses, id=name * 2) for _ in range(count)))))
    client = b"\x40" * size
    assert not lists(row, client)
    assert decide(row, client, NOW) == (Reason.NOT_LISTED, None)


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("text", ["203.0.113.7", "2001:db8::7"])
def test_a_row_without_all_of_its_ranges_is_refused(text: str, count: int) -> None:
    whole = pack(policy(*(restriction(text, id="") for _ in range(count))))
    size = 5 + count * 2 * len(packed(AddressRange.parse(text)))
    checked(whole[:size])
    for length in range(size):
        with pytest.raises(ValueError, match="packed by something else"):
            checked(whole[:length])


GOOD = pack(policy(restriction(), restriction("2001:db8::/32", expires_at=NOW)))


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\1\0\1\0", b"\x08" + bytes(4), b"\x10" + bytes(4), b"\xff" + GOOD[1:], GOOD[:12]],
)
def test_damaged_bytes_are_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="something else"):
        checked(damaged)


def test_truncated_bytes_allow_no_other_address() -> None:
    """Whatever is lost at the end, an address that was not listed is not allowed."""
    for end in range(len(GOOD)):
        try:
            row = checked(GOOD[:end])
            reasons = {decide(row, address, NOW)[0] for address in (b"1234", b"1" * 16)}
        except (ValueError, IndexError):
            continue
        assert reasons == {Reason.NOT_LISTED}


# ------------------------------------------------------------------------------- the properties


def properties(row: bytes) -> tuple[bool, bool, bool]:
    return is_registered(row), is_restricted(row), bool(row[0] & TEMPORARY)


def test_properties_of_a_row() -> None:
    stranger = checked(pack(policy(known=False)))
    assert properties(stranger) == (False, False, False)
    assert decide(stranger, b"1234", None) == (Reason.UNRESTRICTED, None)
    user = checked(pack(policy()), deny_unknown=True)
    assert properties(user) == (True, False, False)
    listed = checked(pack(policy(restriction(), known=False)))
    assert properties(listed) == (False, True, False)
    expiring = checked(pack(policy(restriction(expires_at=NOW))))
    assert properties(expiring) == (True, True, True)
    assert otherwise(expiring) is None
    with pytest.raises(ValueError, match="the time decides"):
        decide(expiring, b"1234", None)


@pytest.mark.parametrize("restrictions", [[], [restriction()], [restriction(expires_at=NOW)]])
def test_unknown_user_is_denied_if_that_is_wanted(restrictions: list[Restriction]) -> None:
    row = checked(pack(policy(*restrictions, known=False)), deny_unknown=True)
    assert row is UNKNOWN
    assert not is_restricted(row)
    assert decide(row, bytes([203, 0, 113, 7]), NOW) == (Reason.UNKNOWN_USER, None)


def test_constants() -> None:
    assert pack(policy(known=False)) == OPEN
    assert otherwise(OPEN) is Reason.UNRESTRICTED
    assert otherwise(PENDING) is None
    assert not lists(PENDING, b"1234")
    assert otherwise(UNKNOWN) is Reason.UNKNOWN_USER


# -------------------------------------------------------- the same decisions as from other sources


def same(held: list[Restriction], address: AddressRange, *, known: bool, deny: bool) -> None:
    """Compare the decision from bytes with the one from objects."""
    whole = policy(*held, known=known)
    expected = rules.decide(whole, address, NOW, deny_unknown=deny)
    row = checked(pack(whole), deny_unknown=deny)
    assert decide(row, packed(address), NOW) == (expected.reason, expected.restriction_id)
    quick = Reason.LISTED if lists(row, packed(address)) else otherwise(row)
    assert quick is expected.reason or (quick is None and row[0] & TEMPORARY)


def small_ranges() -> list[AddressRange]:
    """Return all ranges of a family of 16 addresses, 192.0.2.0 to 192.0.2.15."""
    base = 0xC0000200
    return [
        AddressRange(version=4, first=base + first, last=base + last)
        for first in range(16)
        for last in range(first, 16)
    ]


def test_all_lists_of_two_small_ranges(rounds: Any) -> None:
    """All lists of at most two ranges, permanent, temporary or expired, and all 16 addresses."""
    ranges = small_ranges()
    singles = [AddressRange(version=4, first=n, last=n) for n in range(0xC0000200, 0xC0000210)]
    expiries = (None, NOW, NOW + SECOND)
    one = [restriction(r, id="one", expires_at=e) for r in ranges for e in expiries]
    two = [restriction(r, id="two", expires_at=e) for r in ranges for e in expiries]
    chosen: Iterator[tuple[Restriction, ...]] = itertools.chain(
        [()], ((r,) for r in one), itertools.product(one, two)
    )
    compared = 0
    for held in itertools.islice(chosen, 0, None, rounds(31, 1)):
        whole = policy(*held)
        row = checked(pack(whole))
        for address in singles:
            expected = rules.decide(whole, address, NOW)
            found = decide(row, packed(address), NOW)
            assert found == (expected.reason, expected.restriction_id), (held, address)
            compared += 1
    assert compared > 16 * len(one) * len(two) // rounds(31, 1)


ENDS = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**32 - 1, 0xC0000200])
# An address of the IPv4-mapped block is an IPv4 address, and no bound of an IPv6 range.
IPV6 = st.integers(0, 2**128 - 1).filter(lambda value: value >> 32 != 0xFFFF)
RANGES = st.one_of(
    st.tuples(ENDS, ENDS).map(lambda it: AddressRange(version=4, first=min(it), last=max(it))),
    st.tuples(IPV6, IPV6)
    .map(lambda it: (min(it), max(it)))
    .map(lambda it: AddressRange(version=6, first=it[0], last=it[1])),
    st.sampled_from(small_ranges()),
)
HELD = st.lists(
    st.tuples(RANGES, st.sampled_from([None, NOW, NOW + SECOND, EPOCH, EPOCH - SECOND])),
    max_size=20,
).map(lambda drawn: [restriction(r, id=f"r{n}", expires_at=e) for n, (r, e) in enumerate(drawn)])


@given(
    held=HELD,
    sent=st.one_of(
        ENDS.map(lambda n: AddressRange(version=4, first=n, last=n)),
        IPV6.map(lambda n: AddressRange(version=6, first=n, last=n)),
    ),
    known=st.booleans(),
    deny=st.booleans(),
)
def test_any_list(held: list[Restriction], sent: AddressRange, known: bool, deny: bool) -> None:
    same(held, sent, known=known, deny=deny)
    for one in held[:3]:  # addresses at the edges decide most
        for value in {one.addresses.first, one.addresses.last}:
            edge = AddressRange(version=one.addresses.version, first=value, last=value)
            same(held, edge, known=known, deny=deny)


def test_random_networks_against_the_standard_library(rounds: Any) -> None:
    """`ipaddress` says which networks hold an address; nothing of ipguard takes part."""
    drawn, compared = random.Random(7), 0
    for _ in range(rounds(400, 100_000)):
        networks: list[Any] = []
        for _ in range(drawn.randrange(1, 14)):
            size, kind = drawn.choice([(32, ipaddress.IPv4Network), (128, ipaddress.IPv6Network)])
            prefix = drawn.randrange(size + 1)
            networks.append(kind((drawn.getrandbits(size), prefix), strict=False))
        columns = [
            (f"n{number}", net.network_address.packed, net.broadcast_address.packed, None)
            for number, net in enumerate(networks)
        ]
        row = checked(pack_columns(True, columns))
        for _ in range(100):
            address = _near(drawn, drawn.choice(networks))
            holding = [
                f"n{n}"
                for n, net in enumerate(networks)
                if net.version == address.version and address in net
            ]
            sent = pack_address(str(address))
            if address.version == 6 and address.ipv4_mapped is not None:
                continue  # it is an IPv4 address to ipguard
            assert sent == address.packed
            expected = (Reason.LISTED, holding[0]) if holding else (Reason.NOT_LISTED, None)
            assert decide(row, address.packed, None) == expected
            assert lists(row, address.packed) is bool(holding)
            compared += 1
    assert compared > rounds(400, 100_000) * 90


def _near(drawn: random.Random, net: Any) -> Any:
    """Return an address of a network, at its edges, beside it, or anywhere."""
    first, last = int(net.network_address), int(net.broadcast_address)
    size = net.max_prefixlen
    value = drawn.choice(
        [first, last, first - 1, last + 1, drawn.randint(first, last), drawn.getrandbits(size)]
    )
    kind = ipaddress.IPv4Address if size == 32 else ipaddress.IPv6Address
    return kind(min(max(value, 0), 2**size - 1))
