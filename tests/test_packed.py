"""Packed policies: the bytes, the round trip, and damaged bytes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.model import Policy, Restriction
from ipguard.packed import pack, unpack

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TEXTS = ["203.0.113.7", "203.0.113.0/29", "0.0.0.0/0", "2001:db8::/32", "::/0", "2001:db8::1"]
MOMENTS = st.datetimes(timezones=st.just(UTC))
IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
RESTRICTIONS = st.builds(
    Restriction,
    id=IDS,
    username=st.just("jsmith"),
    addresses=st.sampled_from(TEXTS).map(AddressRange.parse)
    | st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)).map(
        lambda ends: AddressRange(version=4, first=min(ends), last=max(ends))
    ),
    label=st.text(max_size=5),
    created_at=MOMENTS,
    created_by=st.text(max_size=5),
    expires_at=st.none() | MOMENTS,
)


def restriction(text: str = "203.0.113.7", **changes: object) -> Restriction:
    plain = Restriction(
        id="a1",
        username="jsmith",
        addresses=AddressRange.parse(text),
        label="",
        created_at=EPOCH,
        created_by="",
    )
    return attrs.evolve(plain, **changes)


def policy(*restrictions: Restriction, known: bool = True) -> Policy:
    return Policy(revision=7, restrictions=restrictions, known=known)


@given(restrictions=st.lists(RESTRICTIONS, max_size=5), known=st.booleans())
def test_unpacking_restores_the_deciding_fields(
    restrictions: list[Restriction], known: bool
) -> None:
    """Addresses, ids, expiries, their order and whether the user is registered."""
    given_ = Policy(revision=3, restrictions=tuple(restrictions), known=known)
    expected = tuple(
        attrs.evolve(r, label="", created_at=EPOCH, created_by="") for r in restrictions
    )
    assert unpack(pack(given_), "jsmith", 9) == Policy(
        revision=9, restrictions=expected, known=known
    )


def test_the_bytes() -> None:
    """The format is fixed, because stores write it too."""
    moment = EPOCH + timedelta(seconds=1)
    early = EPOCH - timedelta(microseconds=1)
    assert pack(policy(known=False)) == b"\0"
    assert pack(policy(restriction("1.2.3.4"))) == b"\1\0\1\2\3\4\1\2\3\4a1\0"
    assert pack(policy(restriction("::1:0/112", expires_at=moment), restriction(id=""))) == (
        b"\1\3" + bytes(13) + b"\1\0\0" + bytes(13) + b"\1\xff\xff" + (10**6).to_bytes(8, "big")
        + b"a1\0" + b"\0" + bytes([203, 0, 113, 7]) * 2 + b"\0"
    )  # fmt: skip
    assert pack(policy(restriction("1.2.3.4", expires_at=early, id="é"))) == (
        b"\1\2\1\2\3\4\1\2\3\4" + b"\xff" * 8 + b"\xc3\xa9\0"
    )


def test_the_size_of_three_restrictions() -> None:
    """Three IPv4 restrictions with ids of the workflow take 79 bytes."""
    three = [restriction(id="0123456789abcdef") for _ in range(3)]
    assert len(pack(policy(*three))) == 79


@pytest.mark.parametrize("odd", ["a\0b", "\ud800", "\0"])
def test_ids_that_cannot_be_packed(odd: str) -> None:
    """Ids with a NUL or a surrogate are refused, not truncated."""
    with pytest.raises(ValueError, match=r"NUL|surrogates"):
        pack(policy(restriction(id=odd)))


GOOD = pack(policy(restriction()))


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\2" + GOOD[1:],
        b"\1\4" + GOOD[2:],
        GOOD[:-1],
        GOOD[:6],
        GOOD + b"\0",
        GOOD + b"\1",
        b"\1\0" + bytes([9, 0, 0, 0]) + bytes(4) + b"a1\0",
        b"\1\2" + bytes(8) + b"\x7f" + b"\xff" * 7 + b"a1\0",
        b"\1\0" + bytes(8) + b"\xff\0",
    ],
)
def test_damaged_bytes_are_refused(damaged: bytes) -> None:
    """A policy that lost a restriction could allow an address."""
    with pytest.raises(ValueError):
        unpack(damaged, "jsmith", 1)


def test_truncated_bytes_are_refused() -> None:
    """Every prefix with a part of a restriction is refused."""
    for end in range(2, len(GOOD)):
        with pytest.raises(ValueError):
            unpack(GOOD[:end], "jsmith", 1)
