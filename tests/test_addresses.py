"""Addresses: accepted and refused text, hints, membership, ranges and sets as values."""

import copy
import ipaddress
import pickle
import re
import socket
import sys
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import attrs
import netaddr  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipguard import addresses
from ipguard.addresses import (
    AddressRange,
    AddressSet,
    canonical_address,
    is_private,
    login_address,
    parse_address,
    parse_typed,
)
from ipguard.errors import AddressError, shorten

parse = AddressRange.parse


def number(text: str) -> int:
    return int(ipaddress.ip_address(text))


def attempt(read: Callable[[Any], AddressRange], text: object) -> AddressRange | AddressError:
    """Return the range or the error of a reader."""
    try:
        return read(text)
    except AddressError as error:
        return error


def refusal(text: object) -> AddressError:
    """Return the error for a restriction."""
    with pytest.raises(AddressError) as caught:
        parse(text)  # type: ignore[arg-type]
    return caught.value


# ---- restrictions --------------------------------------------------------------------------------

LONGEST_ADDRESS = "2001:0db8:2001:0db8:2001:0db8:203.100.113.107"

ACCEPTED = [
    # text, version, first, last, canonical text
    ("203.0.113.7", 4, "203.0.113.7", "203.0.113.7", "203.0.113.7"),
    ("203.0.113.0/29", 4, "203.0.113.0", "203.0.113.7", "203.0.113.0/29"),
    ("203.0.113.7/32", 4, "203.0.113.7", "203.0.113.7", "203.0.113.7"),
    ("203.0.113.5-203.0.113.9", 4, "203.0.113.5", "203.0.113.9", "203.0.113.5-203.0.113.9"),
    ("203.0.113.7-203.0.113.7", 4, "203.0.113.7", "203.0.113.7", "203.0.113.7"),
    ("203.0.113.0-203.0.113.7", 4, "203.0.113.0", "203.0.113.7", "203.0.113.0/29"),
    ("0.0.0.0/0", 4, "0.0.0.0", "255.255.255.255", "0.0.0.0/0"),
    ("0.0.0.0/31", 4, "0.0.0.0", "0.0.0.1", "0.0.0.0/31"),
    ("0.0.0.1", 4, "0.0.0.1", "0.0.0.1", "0.0.0.1"),
    ("255.255.255.254", 4, "255.255.255.254", "255.255.255.254", "255.255.255.254"),
    ("2001:DB8:0::0/32", 6, "2001:db8::", "2001:db8:ffff:" + "ffff:" * 4 + "ffff", "2001:db8::/32"),
    ("2001:db8::/128", 6, "2001:db8::", "2001:db8::", "2001:db8::"),
    ("2001:db8::5-2001:db8::9", 6, "2001:db8::5", "2001:db8::9", "2001:db8::5-2001:db8::9"),
    ("::/0", 6, "::", "ffff:" * 7 + "ffff", "::/0"),
    ("::-::1", 6, "::", "::1", "::/127"),
    ("::1", 6, "::1", "::1", "::1"),
    # Only ::ffff:0:0/96 is unwrapped: neither the old compatible form, nor 6to4, nor NAT64.
    ("::1.2.3.4", 6, "::1.2.3.4", "::1.2.3.4", "::102:304"),
    ("::fffe:1.2.3.4", 6, "::fffe:102:304", "::fffe:102:304", "::fffe:102:304"),
    ("::1:ffff:1.2.3.4", 6, "::1:ffff:102:304", "::1:ffff:102:304", "::1:ffff:102:304"),
    ("2002:102:304::", 6, "2002:102:304::", "2002:102:304::", "2002:102:304::"),
    ("64:ff9b::1.2.3.4", 6, "64:ff9b::102:304", "64:ff9b::102:304", "64:ff9b::102:304"),
    ("::ffff:1.2.3.4", 4, "1.2.3.4", "1.2.3.4", "1.2.3.4"),
    ("::FFFF:102:304", 4, "1.2.3.4", "1.2.3.4", "1.2.3.4"),
    ("::ffff:1.2.3.0/120", 4, "1.2.3.0", "1.2.3.255", "1.2.3.0/24"),
    ("::ffff:1.2.3.4-::ffff:1.2.3.9", 4, "1.2.3.4", "1.2.3.9", "1.2.3.4-1.2.3.9"),
    ("::ffff:0:0-::ffff:ffff:ffff", 4, "0.0.0.0", "255.255.255.255", "0.0.0.0/0"),
    # Ranges that cover the whole mapped block, or none of it, are IPv6.
    ("::fffe:0:0/95", 6, "::fffe:0:0", "::ffff:ffff:ffff", "::fffe:0:0/95"),
    ("::5-::1:0:0:0", 6, "::5", "::1:0:0:0", "::5-::1:0:0:0"),
    ("::1:0:0:0-::1:0:0:6", 6, "::1:0:0:0", "::1:0:0:6", "::1:0:0:0-::1:0:0:6"),
    # Ranges that hold multicast addresses and others.
    ("223.255.255.255-224.0.0.9", 4, "223.255.255.255", "224.0.0.9", "223.255.255.255-224.0.0.9"),
    ("239.255.255.255-240.0.0.0", 4, "239.255.255.255", "240.0.0.0", "239.255.255.255-240.0.0.0"),
    ("223.255.255.255", 4, "223.255.255.255", "223.255.255.255", "223.255.255.255"),
    ("240.0.0.0", 4, "240.0.0.0", "240.0.0.0", "240.0.0.0"),
    ("fe00::/7", 6, "fe00::", "ffff:" * 7 + "ffff", "fe00::/7"),
    ("feff:ffff::1", 6, "feff:ffff::1", "feff:ffff::1", "feff:ffff::1"),
    # The longest address and the longest range: 45 and 91 characters.
    (LONGEST_ADDRESS, 6, LONGEST_ADDRESS, LONGEST_ADDRESS, "2001:db8:2001:db8:2001:db8:cb64:716b"),
    (
        LONGEST_ADDRESS + "-" + LONGEST_ADDRESS.replace("107", "108"),
        6,
        LONGEST_ADDRESS,
        LONGEST_ADDRESS.replace("107", "108"),
        "2001:db8:2001:db8:2001:db8:cb64:716b-2001:db8:2001:db8:2001:db8:cb64:716c",
    ),
]


@pytest.mark.parametrize(("text", "version", "first", "last", "canonical"), ACCEPTED)
def test_accepted(text, version, first, last, canonical):
    """Addresses, networks and ranges of both versions have one canonical, shortest text."""
    found = parse(text)
    assert found == AddressRange(version=version, first=number(first), last=number(last))
    assert str(found) == canonical
    assert parse(canonical) == found
    assert found.size == number(last) - number(first) + 1
    assert found.packed == tuple(ipaddress.ip_address(end).packed for end in (first, last))


WHERE = "no login comes from there"
UNFIT = MULTICAST, UNSPECIFIED, BROADCAST = [
    f"it is {kind}, and {WHERE}"
    for kind in ("multicast", "the unspecified address", "the broadcast address")
]
LATER = "a number with a leading zero"
CHARACTERS = "it has characters that do not belong in an address"
NUMBERS = "an IPv4 address is four numbers"
NEITHER = "it is not an address, a network or a first-last range"
BLANK = "it has a blank"
PREFIX4, PREFIX6 = (f"its prefix length is not a decimal number from 0 to {n}" for n in (32, 128))
MASK = "masks are not accepted; use a prefix length"
HOSTS = "it has host bits set"
PORT = "brackets and ports"
ZONE = "a zone"
VERSIONS = "its ends are of different versions"
MAPPED_END = "one of its ends is IPv4-mapped, the other is not"

REFUSED = [
    # text, start of the reason, hint: each class of bad input that other parsers accept.
    # Octal, hexadecimal, short: CVE-2021-29921. No hint: the meaning is ambiguous.
    ("010.8.8.8", LATER, None),
    ("10.0.0.00/8", LATER, None),
    ("::ffff:01.2.3.4", LATER, None),
    ("127.1", NUMBERS, None),
    ("1.2.3.4.5", NUMBERS, None),
    ("1.2.3.256", NUMBERS, None),
    ("2130706433", NUMBERS, None),
    ("0x7f.1", NEITHER, None),
    # Only `parse_typed` ignores blanks, and only at the ends.
    ("1.2.3.4\n", BLANK, "1.2.3.4"),
    ("\t2001:db8::/32\v\f\r", BLANK, "2001:db8::/32"),
    ("1.2.3.4 - 1.2.3.9", BLANK, "1.2.3.4-1.2.3.9"),
    ("10.0.0.0 /8", BLANK, "10.0.0.0/8"),
    ("1.2.3.4 foo", BLANK, None),
    ("", NEITHER, None),
    # Digits of other scripts, and characters that C strings cannot hold.
    ("\uff11.2.3.4", CHARACTERS, None),
    ("10.0.0.0/\u0668", CHARACTERS, None),
    ("1.2.3.4\0.5", CHARACTERS, None),
    ("\ud800", CHARACTERS, None),
    ("1.2.3.4\u00a0", CHARACTERS, None),
    ("1.2.3.4\u20131.2.3.9", CHARACTERS, "1.2.3.4-1.2.3.9"),
    ("1.2.3.1_0", NEITHER, None),
    # Zones.
    ("fe80::1%eth0", ZONE, "fe80::1"),
    ("::ffff:1.2.3.4%x", ZONE, "1.2.3.4"),
    ("fe80::%eth0/64", ZONE, "fe80::/64"),
    ("fe80::1%a-fe80::9%b", ZONE, "fe80::1-fe80::9"),
    ("%", ZONE, None),
    # Prefix lengths that `int()` would read.
    ("10.0.0.0/+8", PREFIX4, None),
    ("10.0.0.0/08", PREFIX4, None),
    ("10.0.0.0/", PREFIX4, None),
    ("10.0.0.0/33", PREFIX4, None),
    ("10.0.0.0/8/8", PREFIX4, None),
    ("::/129", PREFIX6, None),
    ("/8", NEITHER, None),
    # Netmasks and hostmasks. All zeros is /0 to some and /32 to others.
    ("127.0.0.1/0.0.0.255", MASK, "127.0.0.0/24"),
    ("192.0.2.65/255.255.254.0", MASK, "192.0.2.0/23"),
    ("10.0.0.0/0.0.0.0", MASK, None),
    ("10.0.0.0/255.255.255.255", MASK, None),
    ("10.0.0.0/255.0.255.0", MASK, None),
    ("2001:db8::/ffff:ffff::", MASK, None),
    # Host bits.
    ("10.1.0.0/0", HOSTS, "0.0.0.0/0"),
    ("2001:db8::1/32", HOSTS, "2001:db8::/32"),
    ("::ffff:1.2.3.4/120", HOSTS, "1.2.3.0/24"),
    ("::ffff:1.2.3.4/96", HOSTS, "0.0.0.0/0"),
    ("1.2.3.4-1.2.3.9/32", NEITHER, None),
    ("224.0.0.1/4", HOSTS, None),
    # IPv4-mapped networks with a prefix length of IPv4, and ranges that mean two things.
    ("::ffff:1.2.3.0/24", "the prefix length of an IPv4-mapped network", "1.2.3.0/24"),
    ("::ffff:1.2.3.4/24", "the prefix length of an IPv4-mapped network", None),
    ("::ffff:1.2.3.4-1.2.3.9", VERSIONS, "1.2.3.4-1.2.3.9"),
    ("1.2.3.4-::ffff:1.2.3.9", VERSIONS, "1.2.3.4-1.2.3.9"),
    ("1.2.3.4-2001:db8::1", VERSIONS, None),
    ("::1-::ffff:1.2.3.4", MAPPED_END, None),
    ("::5-::ffff:ffff:fffe", MAPPED_END, None),
    # Ranges.
    ("1.2.3.9-1.2.3.4", "it runs backwards", "1.2.3.4-1.2.3.9"),
    ("239.0.0.1-224.0.0.1", "it runs backwards", None),
    ("2001:DB8::9-2001:db8::0", "it runs backwards", "2001:db8::-2001:db8::9"),
    ("1.2.3.4-9", "the end of a range is a whole address", "1.2.3.4-1.2.3.9"),
    ("1.2.3.4-3", "the end of a range is a whole address", None),
    ("1.2.3.4-256", "the end of a range is a whole address", None),
    ("::1-9", "the end of a range is a whole address", None),
    ("1.2.3.4-3.9", NUMBERS, None),
    ("1.2.3.4-", NEITHER, None),
    ("1.2.3.4-1.2.3.5-1.2.3.6", NEITHER, None),
    ("1.2.3.0-1.2.3.128/25", NEITHER, None),
    # Ports, brackets, wildcards, names.
    ("1.2.3.4:443", PORT, "1.2.3.4"),
    ("[::1]:443", PORT, "::1"),
    ("[::1]", PORT, "::1"),
    ("[2001:db8::]:x", NEITHER, None),
    ("[x]:443", PORT, None),
    ("1.2.3.*", "wildcards are not accepted", "1.2.3.0/24"),
    ("1.2.*.*", "wildcards are not accepted", "1.2.0.0/16"),
    ("10.*", "wildcards are not accepted", "10.0.0.0/8"),
    ("1.2.3.4.*", NEITHER, None),
    ("*", NEITHER, None),
    ("1.2.3.*-1.2.4.*", "wildcards are not accepted", None),
    ("1.2.3.*/24", "wildcards are not accepted", None),
    ("example.com", NEITHER, None),
    ("1.2.3.4,1.2.3.5", "it holds 2 addresses; enter them one at a time", None),
    ("1:2:3:4:5:6:7:8:9", NEITHER, None),
    # Addresses that no login comes from.
    ("224.0.0.0", MULTICAST, None),
    ("239.255.255.255", MULTICAST, None),
    ("::ffff:224.0.0.1", MULTICAST, None),
    ("ff00::/8", MULTICAST, None),
    ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", MULTICAST, None),
    ("0.0.0.0", UNSPECIFIED, None),
    ("::ffff:0.0.0.0", UNSPECIFIED, None),
    ("::", UNSPECIFIED, None),
    ("255.255.255.255", BROADCAST, None),
]


@pytest.mark.parametrize(("text", "reason", "hint"), REFUSED)
def test_refused(text, reason, hint):
    """Each class of bad input has its reason, and a hint if the correction is likely."""
    error = refusal(text)
    assert error.reason.startswith(reason)
    assert error.hint == hint
    assert error.text == ascii(text)
    assert ascii(text) in str(error)
    assert (hint is None) == ("did you mean" not in str(error))


@pytest.mark.parametrize("text", [text for text, reason, _ in REFUSED if reason not in UNFIT])
def test_refused_as_a_login_too(text):
    """A malformed restriction is not a login's address either, and in no range or set."""
    assert login_address(text) is None
    with pytest.raises(AddressError):
        parse_address(text)
    assert text not in parse("0.0.0.0/0")
    assert text not in parse("::/0")
    assert text not in AddressSet([parse("0.0.0.0/0"), parse("::/0")])


@pytest.mark.parametrize(
    "thing",
    [0, 1, True, 3232235777, b"1.2.3.4", bytearray(b"::1"), None, 1.5, ["1.2.3.4"], object(), str],
)
def test_only_text_is_an_address(thing):
    """Other types are refused, and in no range or set."""
    assert refusal(thing).reason == "it is not text"
    assert refusal(thing).text == f"{type(thing).__name__} object"
    for read in (parse_address, parse_typed):
        with pytest.raises(AddressError, match="it is not text"):
            read(thing)
    assert login_address(thing) is None
    assert thing not in parse("0.0.0.0/0")
    assert thing not in AddressSet([parse("0.0.0.0/0")])


@pytest.mark.parametrize(
    "text", ["1" * 92, "1" * 10**6, ":" * 10**6, "1.2.3.4-" * 10**5, "٣" * 10**6, " " * 10**6]
)
def test_over_long_text_is_not_parsed(text, monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("over-long text was parsed")

    for holder, name in [
        (addresses, "_read"),
        (addresses, "_why"),
        (addresses, "strict_pton"),
        (addresses, "_LEADING_ZERO"),
    ]:
        monkeypatch.setattr(holder, name, reached)
    for read in (parse, parse_address, parse_typed):
        with pytest.raises(AddressError, match="it is longer than any") as caught:
            read(text)
        assert len(caught.value.text) < 400
        assert len(caught.value.args[0]) == len(caught.value.text)
    assert login_address(text) is None
    assert text not in AddressRange(version=4, first=0, last=9)
    assert text not in AddressSet([AddressRange(version=4, first=0, last=9)])


@pytest.mark.parametrize("text", ["1" * 46, LONGEST_ADDRESS + "0", "1" * 91])
def test_one_address_has_45_characters(text, monkeypatch):
    """Text too long for one address reaches no library."""

    def bounded(read: Callable[..., object]) -> Callable[..., object]:
        def reading(*args: object, **kwargs: object) -> object:
            assert all(len(arg) <= 45 for arg in args if isinstance(arg, str))
            return read(*args, **kwargs)

        return reading

    monkeypatch.setattr(addresses, "IPAddress", bounded(netaddr.IPAddress))
    monkeypatch.setattr(addresses, "strict_pton", bounded(socket.inet_pton))
    assert refusal("1" * 91).reason.startswith(NUMBERS)  # 92 characters are not looked at
    for whole in (text, f"{text}/8"[:91], f"::1-{text}"[:91], f"{text}-::1"[:91]):
        assert isinstance(attempt(parse, whole), AddressError)
        assert isinstance(attempt(parse_address, whole), AddressError)
    assert login_address(text) is None


@pytest.mark.parametrize(
    "text",
    ["1.2.3.4", " 1.2.3.4", "1.2.3.4\n", "\t\n\r\v\f 1.2.3.4 \f\v\r\n\t", " " * 175 + "1.2.3.4"],
)
def test_typed_text_may_have_blanks_at_the_ends(text):
    """Only ASCII blanks are ignored."""
    assert parse_typed(text) == parse("1.2.3.4")


@pytest.mark.parametrize(
    "text",
    ["\u00a01.2.3.4", "1.2.3.4\u2003", "1.2.3.4\x1f", "\x1c1.2.3.4", "1.2.3.4\0", "1. 2.3.4"],
)
def test_other_typed_characters_are_refused(text):
    with pytest.raises(AddressError):
        parse_typed(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("203.0.113.7 203.0.113.8", 2),
        ("203.0.113.7\n203.0.113.8\n203.0.113.9", 3),
        ("203.0.113.7;203.0.113.0/29", 2),
        ("203.0.113.5-203.0.113.9\t198.51.100.1", 2),
        (" ".join(f"203.0.113.{n}" for n in range(12)), 12),  # longer than any one address
    ],
)
def test_several_addresses_have_their_own_reason(text, count):
    """Two addresses pasted into one field are not reported as a blank."""
    for read in (parse_typed, AddressRange.parse) if len(text) < 90 else (parse_typed,):
        with pytest.raises(AddressError) as raised:
            read(text)
        assert raised.value.reason == f"it holds {count} addresses; enter them one at a time"
        assert raised.value.hint is None


@pytest.mark.parametrize(
    "text", ["203.0.113.0 255.255.255.0", "203.0.113.7 office", "203.0.113. 7", "1" * 100, ",", ""]
)
def test_other_text_is_not_several_addresses(text):
    """An address and a netmask, or a word, have other reasons."""
    with pytest.raises(AddressError) as raised:
        parse_typed(text)
    assert "one at a time" not in raised.value.reason


def test_blanks_count_towards_the_length_of_typed_text():
    for text in (" " * 176 + "1.2.3.4", " " * 183):
        with pytest.raises(AddressError, match="longer"):
            parse_typed(text)


class Hostile(str):
    """Text whose methods return something else."""

    __slots__ = ()

    def __len__(self) -> int:
        return 7

    def __contains__(self, item: object) -> bool:
        raise AssertionError("called")

    def __getitem__(self, item: object) -> str:
        raise AssertionError("called")

    def __iter__(self):
        raise AssertionError("called")

    def __str__(self) -> str:
        return "1.2.3.4"

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]
    partition = strip = split = encode = isascii = replace = __iter__  # type: ignore[assignment]


def test_methods_of_a_str_subclass_are_not_called():
    assert login_address(Hostile("9.9.9.9")) == (4, number("9.9.9.9"))
    assert parse(Hostile("9.9.9.0/24")) == parse("9.9.9.0/24")
    assert parse_address(Hostile("::1")) == parse("::1")
    assert parse_typed(Hostile(" 9.9.9.9 ")) == parse("9.9.9.9")
    assert Hostile("9.9.9.9") not in parse("1.2.3.4")
    for bad in ("1" * 1000, "nonsense", "9.9.9.9%x", "::\0"):
        assert login_address(Hostile(bad)) is None
        for read in (parse, parse_address, parse_typed):
            with pytest.raises(AddressError) as caught:
                read(Hostile(bad))
            assert caught.value.text.startswith(f"'{ascii(bad)[1:10]}")


class Impostor:
    """An object with a false `__class__`."""

    def __init__(self, claimed: object) -> None:
        self.claimed = claimed

    @property  # type: ignore[misc]
    def __class__(self):
        if isinstance(self.claimed, Exception):
            raise self.claimed
        return self.claimed

    version, first, last = 4, 0, 0


@pytest.mark.parametrize("claimed", [str, AddressRange, RuntimeError("called")])
def test_a_false_class_is_not_an_address(claimed):
    assert login_address(Impostor(claimed)) is None
    assert Impostor(claimed) not in parse("0.0.0.0/0")
    assert Impostor(claimed) not in AddressSet([parse("0.0.0.0/0")])


# ---- one address: the two readers ---------------------------------------------------------------


def by_netaddr(text: str) -> tuple[int, int] | None:
    try:
        address = netaddr.IPAddress(text, flags=netaddr.INET_PTON)
    except (netaddr.AddrFormatError, ValueError):
        return None
    if address.version == 6 and address.is_ipv4_mapped():
        address = address.ipv4()
    return address.version, int(address)


ALPHABET = "0123456789abcdefABCDEFx:./-%*[]+_, \t\n\r\v\f\0\x1f\x7f\u0663\uff11\u2013\u00a0\ud800"
ADDRESSES = st.one_of(
    st.ip_addresses().map(str),
    st.ip_addresses(v=6).map(lambda address: address.exploded.upper()),
    st.ip_addresses(v=4).map(lambda address: f"::ffff:{address}"),
    st.ip_addresses(v=4).map(lambda address: f"::{address}"),
    st.sampled_from([text for text, *_ in ACCEPTED if not re.search("[-/]", text)]),
)
VALID = st.one_of(
    ADDRESSES,
    st.builds("{}/{}".format, ADDRESSES, st.integers(0, 129)),
    st.builds("{}-{}".format, ADDRESSES, ADDRESSES),
    st.builds("{}/{}".format, ADDRESSES, ADDRESSES),
    st.sampled_from([text for text, *_ in (*ACCEPTED, *REFUSED)]),
)


@st.composite
def nearly_valid(draw, valid=VALID):
    """Valid text with up to three characters inserted, removed or replaced."""
    text = draw(valid)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", *ALPHABET])) + text[at + draw(st.booleans()) :]
    return text


ANY_TEXT = st.one_of(
    st.text(st.characters()), st.text(st.sampled_from(ALPHABET), max_size=95), nearly_valid()
)


@given(st.one_of(ANY_TEXT, nearly_valid(ADDRESSES)))
@example("1.2.3.4\0")
@example("\ud800")
@example("::ffff:1.2.3.4")
@example("224.0.0.1")
@example("0.0.0.0")
def test_both_readers_accept_the_same_addresses(text):
    """login_address, parse_address, AddressRange.parse and netaddr agree."""
    expected = by_netaddr(text)
    found = login_address(text)
    assert found == expected
    client = attempt(parse_address, text)
    if isinstance(client, AddressRange):
        assert (client.version, client.first) == (client.version, client.last) == found
    else:
        assert found is None
    restriction = attempt(parse, text)
    if isinstance(restriction, AddressError):
        assert found is None or restriction.reason.endswith(WHERE)
    elif "-" not in text and "/" not in text:
        assert restriction == client


@given(ANY_TEXT)
@example("::%0/00/80")
def test_parsing_raises_only_address_errors(text):
    """Any text is parsed to a range with a canonical text, or refused with AddressError."""
    for read in (parse, parse_address, parse_typed):
        found = attempt(read, text)
        again = parse_address if read is parse_address else parse
        if isinstance(found, AddressRange):
            assert again(str(found)) == found
        elif found.hint is not None:
            assert str(again(found.hint)) == found.hint


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("1.2.3.0/24", "it is a network or a range, not one address", None),
        ("1.2.3.4-1.2.3.9", "it is a network or a range, not one address", None),
        ("1.2.3.4:443", PORT, "1.2.3.4"),
        ("fe80::1%eth0", ZONE, "fe80::1"),
        ("1.2.3.*", "wildcards are not accepted", None),
        ("10.1.0.0/0", HOSTS, None),
        ("127.1", NUMBERS, None),
    ],
)
def test_a_client_address_is_one_address(text, reason, hint):
    """Networks are refused, and never hinted at."""
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert caught.value.reason.startswith(reason)
    assert caught.value.hint == hint
    assert caught.value.text == ascii(text)


def lenient_inet_pton(family, text):
    """A C library that accepts zones, leading zeros and short forms."""
    text = text.split("%")[0]
    if family == socket.AF_INET:
        return socket.inet_aton(text)
    head, colon, quad = text.rpartition(":")
    if "." in quad:
        text = f"{head}{colon}{'.'.join(str(int(part)) for part in quad.split('.'))}"
    return socket.inet_pton(family, text)


@pytest.mark.parametrize(
    "text",
    [
        "010.8.8.8",
        "fe80::1%lo0",
        "::ffff:01.2.3.4",
        "::ffff:1.2.3.4%x",
    ],
)
def test_strict_on_a_lenient_platform(text, monkeypatch):
    """Zones and leading zeros are refused even if the C library accepts them."""
    for module in (addresses, netaddr.strategy.ipv4, netaddr.strategy.ipv6):
        name = "inet_pton" if module is addresses else "_inet_pton"
        assert getattr(module, name) is socket.inet_pton
        monkeypatch.setattr(module, name, lenient_inet_pton)
    assert addresses._reads_leading_zeros()
    monkeypatch.setattr(addresses, "strict_pton", addresses._checked_pton)
    assert login_address("::ffff:10.20.30.40") == (4, number("10.20.30.40"))
    assert login_address(text) is None
    assert isinstance(refusal(text), AddressError)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_c_library_that_is_lenient_in_one_family(family, monkeypatch):
    assert not addresses._reads_leading_zeros()

    def half_lenient(asked, text):
        return (lenient_inet_pton if asked == family else socket.inet_pton)(asked, text)

    monkeypatch.setattr(addresses, "inet_pton", half_lenient)
    assert addresses._reads_leading_zeros()


def test_strict_pton_refuses_what_login_address_refuses(monkeypatch):
    """`strict_pton` is the C library's function if that is strict."""
    assert addresses.strict_pton is (
        socket.inet_pton if sys.platform == "linux" else addresses._checked_pton
    )
    monkeypatch.setattr(addresses, "inet_pton", lenient_inet_pton)
    for text in ("1.2.3.04", "::1.2.3.04", "fe80::1%lo", "fe80::1%1"):
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        with pytest.raises(ValueError, match="C libraries may differ"):
            addresses._checked_pton(family, text)
    assert addresses._checked_pton(socket.AF_INET, "1.2.3.4") == bytes([1, 2, 3, 4])
    assert addresses._checked_pton(socket.AF_INET6, "::1.2.3.4") == bytes([*[0] * 12, 1, 2, 3, 4])


# ---- ranges as values ----------------------------------------------------------------------------

MAPPED = 0xFFFF << 32


BAD_VERSION = "the version is 4 or 6"
BAD_INTEGER = "the ends of a range are integers"
BAD_ORDER = "the ends of a range are in order and within its version"
SPLIT = "it holds a part of ::ffff:0:0/96, whose addresses are IPv4"


@pytest.mark.parametrize(
    ("version", "first", "last", "reason"),
    [
        (5, 0, 0, BAD_VERSION),
        (True, 0, 0, BAD_VERSION),
        (4.0, 0, 0, BAD_VERSION),
        (None, 0, 0, BAD_VERSION),
        (4, 0, True, BAD_INTEGER),
        (4, 0.0, 1, BAD_INTEGER),
        (4, "0", "1", BAD_INTEGER),
        (4, -1, 0, BAD_ORDER),
        (4, 1, 0, BAD_ORDER),
        (4, 0, 2**32, BAD_ORDER),
        (6, 0, 2**128, BAD_ORDER),
        (6, MAPPED, MAPPED, SPLIT),
        (6, MAPPED, MAPPED + 2**32 - 1, SPLIT),
        (6, MAPPED - 1, MAPPED, SPLIT),
        (6, 0, MAPPED + 2**32 - 2, SPLIT),
        (6, MAPPED + 2**32 - 1, MAPPED + 2**32, SPLIT),
    ],
)
def test_invalid_ranges(version, first, last, reason):
    """Wrong types, a wrong order, or a part of the mapped block are refused at construction."""
    with pytest.raises(AddressError) as caught:
        AddressRange(version=version, first=first, last=last)
    assert caught.value.reason == reason
    culprit = version if reason == BAD_VERSION else first
    assert caught.value.text == shorten(culprit)


@pytest.mark.parametrize(
    ("version", "first", "last"),
    [
        (4, 2**32 - 1, 2**32 - 1),
        (4, 0, 2**32 - 1),
        (6, 0, 2**128 - 1),
        (6, MAPPED - 1, MAPPED - 1),
        (6, MAPPED + 2**32, MAPPED + 2**32),
        (6, MAPPED - 1, MAPPED + 2**32 - 1),
        (6, MAPPED, MAPPED + 2**32),
    ],
)
def test_the_edges_of_ranges(version, first, last):
    """Extreme ranges are valid, and equal after packing."""
    made = AddressRange(version=version, first=first, last=last)
    assert AddressRange.from_packed(*made.packed) == made
    assert AddressRange.from_packed(*made.packed) in made
    assert made.size == last - first + 1
    if first <= MAPPED + 2**32 and first < last:
        assert parse(str(made)) == made


BAD_PAIR = "packed ends are bytes, and of one length"
BAD_LENGTH = "packed ends are 4 or 16 bytes long"


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        (b"", b"", BAD_LENGTH),
        (b"\1\2\3\4\5", b"\1\2\3\4\5", BAD_LENGTH),
        (b"\0" * 17, b"\0" * 17, BAD_LENGTH),
        (b"\1\2\3\4", b"\1\2\3\3", BAD_ORDER),
        (b"\1\2\3\4", b"\1" * 16, BAD_PAIR),
        (b"\1" * 16, b"\1\2\3\4", BAD_PAIR),
        (b"\0" * 10 + b"\xff\xff\1\2\3\4", b"\0" * 10 + b"\xff\xff\1\2\3\4", SPLIT),
        ("1234", "1234", BAD_PAIR),
        (b"1234", "1234", BAD_PAIR),
        ("1234", b"1234", BAD_PAIR),
        (bytearray(4), bytearray(4), BAD_PAIR),
    ],
)
def test_corrupt_packed_bytes(first, last, reason):
    """Bytes of a wrong length, order or type, or IPv4-mapped ones, are refused."""
    with pytest.raises(AddressError) as caught:
        AddressRange.from_packed(first, last)
    assert caught.value.reason == reason
    if reason in (BAD_PAIR, BAD_LENGTH):
        assert caught.value.text == shorten(first)


def test_a_range_is_a_value():
    """Ranges are equal by their addresses, hashable, immutable, slotted and keyword-only."""
    one, same = parse("1.2.3.0/24"), parse("1.2.3.0-1.2.3.255")
    assert one == same
    assert hash(one) == hash(same)
    assert one != parse("1.2.3.0/25")
    assert AddressRange(version=4, first=1, last=1) != AddressRange(version=6, first=1, last=1)
    assert repr(one) == "<AddressRange 1.2.3.0/24>"
    assert not hasattr(one, "__dict__")
    for copied in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied == one
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.first = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        AddressRange(4, 1, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        iter(one)  # type: ignore[call-overload]


@given(st.ip_addresses(), st.data())
def test_text_agrees_with_the_standard_library(address, data):
    """Addresses and networks have the same text as in `ipaddress`, which follows RFC 5952."""
    if address.version == 6:
        mask = data.draw(st.lists(st.sampled_from([0, 0xFFFF, 0xF0]), min_size=8, max_size=8))
        sparse = int.from_bytes(b"".join(group.to_bytes(2, "big") for group in mask), "big")
        address = ipaddress.IPv6Address(int(address) & sparse)
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    assert str(parse_address(address.exploded)) == address.compressed
    bits = address.max_prefixlen
    prefix = data.draw(st.integers(0, bits - 1))
    network = ipaddress.ip_network((int(address) >> (bits - prefix) << (bits - prefix), prefix))
    if network.version != address.version:  # a small number, which `ip_network` takes for IPv4
        network = ipaddress.IPv6Network(
            (int(address) >> (bits - prefix) << (bits - prefix), prefix)
        )
    made = AddressRange(
        version=network.version,
        first=int(network.network_address),
        last=int(network.broadcast_address),
    )
    assert str(made) == network.compressed
    again = attempt(parse, network.compressed)
    assert again == made or (isinstance(again, AddressError) and again.reason.endswith(WHERE))


def between(version, ends):
    return AddressRange(version=version, first=min(ends), last=max(ends))


RANGES = st.builds(
    between,
    st.just(4),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
) | st.builds(
    between,
    st.just(6),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1)).filter(
        lambda ends: not any(MAPPED <= end < MAPPED + 2**32 for end in ends)
    ),
)


@given(RANGES, RANGES)
def test_ranges_survive_text_and_packing(one, other):
    """Text and packed bytes give an equal range, and packed bytes sort as addresses do."""
    again = attempt(parse, str(one))
    assert again == one or (isinstance(again, AddressError) and again.reason.endswith(WHERE))
    assert AddressRange.from_packed(*one.packed) == one
    if one.version == other.version:
        assert (one.packed < other.packed) == ((one.first, one.last) < (other.first, other.last))
    within = other.version == one.version and one.first <= other.first and other.last <= one.last
    assert (other in one) == within
    assert (other in AddressSet([one])) == within


# ---- sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "merged"),
    [
        ([], []),
        (["1.2.3.5", "1.2.3.4"], ["1.2.3.4/31"]),
        (["1.2.3.4", "1.2.3.6"], ["1.2.3.4", "1.2.3.6"]),
        (["1.2.3.0/24", "1.2.3.7"], ["1.2.3.0/24"]),
        (["1.2.3.1-1.2.3.9", "1.2.3.5-1.2.3.20"], ["1.2.3.1-1.2.3.20"]),
        (["1.2.3.0/25", "1.2.3.128/25"], ["1.2.3.0/24"]),
        (["::1", "0.0.0.2", "0.0.0.1", "::2"], ["0.0.0.1-0.0.0.2", "::1-::2"]),
        (["::/0", "::ffff:1.2.3.4"], ["1.2.3.4", "::/0"]),
        (["::fffe:0:0/95", "::fffd:ffff:ffff"], ["::fffd:ffff:ffff-::ffff:ffff:ffff"]),
        (["::fffe:ffff:ffff", "::1:0:0:0"], ["::fffe:ffff:ffff", "::1:0:0:0"]),
    ],
)
def test_a_set_merges_its_ranges(texts, merged):
    """Ranges that overlap or touch become one; IPv4 comes before IPv6."""
    united = AddressSet(parse(text) for text in texts)
    assert [str(r) for r in united] == merged
    assert all(parse(str(r)) == r for r in united)
    assert len(united) == len(merged)
    assert bool(united) == bool(merged)
    assert united == AddressSet(united)
    assert hash(united) == hash(AddressSet(united))
    assert all(parse(text) in united for text in texts)


def test_a_set_is_a_value():
    """Sets of the same addresses are equal; a set is immutable and slotted."""
    united = AddressSet([parse("1.2.3.0/24"), parse("::1")])
    assert united == AddressSet([parse("::1"), parse("1.2.3.128/25"), parse("1.2.3.0/25")])
    assert united != AddressSet([parse("1.2.3.0/24")])
    assert repr(united) == "<AddressSet 1.2.3.0/24, ::1>"
    assert repr(AddressSet()) == repr(AddressSet([])) == "<AddressSet empty>"
    assert pickle.loads(pickle.dumps(united)) == united
    assert not hasattr(united, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        united._ranges = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("item", "inside"),
    [
        ("1.2.3.4", True),
        ("::ffff:1.2.3.4", True),
        ("::1.2.3.4", False),
        ("1.2.3.0/30", False),
        (" 1.2.3.4", False),
        ("2001:db8::1", True),
        (AddressRange.parse("1.2.3.4-1.2.3.9"), True),
        (AddressRange.parse("1.2.3.4-1.2.3.10"), False),
        (AddressRange.parse("1.2.3.4-1.2.3.20"), False),
        (AddressRange.parse("1.2.3.20"), True),
        (AddressRange.parse("::102:304"), False),
    ],
)
def test_inside_a_set(item, inside):
    """A range is in a set if one run holds all of it."""
    united = AddressSet(map(parse, ["1.2.3.4-1.2.3.9", "1.2.3.20", "2001:db8::/32"]))
    assert (item in united) is inside
    assert any(item in r for r in united) is inside


#: Short ranges, so that several of one version do not touch.
FEW = st.lists(
    st.builds(
        lambda version, first, length: between(version, (first, first + length)),
        st.sampled_from([4, 6]),
        st.integers(0, 20),
        st.integers(0, 3),
    ),
    max_size=6,
)


@given(FEW, FEW)
def test_sets_are_joined_and_subtracted(one, other):
    def members(ranges):
        return {(r.version, value) for r in ranges for value in range(r.first, r.last + 1)}

    first, second = AddressSet(one), AddressSet(other)
    assert members(first - second) == members(one) - members(other)
    assert members(first | second) == members(one) | members(other)
    for united in (first - second, first | second):
        assert united == AddressSet(united)


@given(st.lists(RANGES, max_size=8), RANGES)
def test_a_set_holds_what_its_ranges_hold(ranges, probe):
    """Ranges and their set hold the addresses between the ends, in sorted, separate runs."""
    united = AddressSet(ranges)
    edges = [(r.version, end) for r in (*ranges, probe) for end in (r.first, r.last)]
    for version, edge in edges:
        make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
        for value in (edge - 1, edge, edge + 1):
            held = [r.version == version and r.first <= value <= r.last for r in ranges]
            assert bisect_right(united.bounds(version), value) % 2 == any(held)
            if value in range(2 ** make(0).max_prefixlen) and value >> 32 != 0xFFFF:
                text = str(make(value))
                assert [text in r for r in ranges] == held
                assert (text in united) == any(held)
                if version == 4:
                    assert (f"::ffff:{text}" in united) == any(held)
    for version in (4, 6):
        bounds = united.bounds(version)
        assert list(bounds) == sorted(set(bounds))
    if any(probe in r for r in ranges):
        assert probe in united
    assert (probe in united) == any(probe in r for r in united)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::FFFF:203.0.113.7", "203.0.113.7"),
        ("2001:DB8:0:0::7", "2001:db8::7"),
        ("255.255.255.254", "255.255.255.254"),
        ("203.0.113.0/24", ""),
        ("203.0.113.7 ", ""),
        ("fe80::1%eth0", ""),
        ("0.0.0.0", ""),
        ("::", ""),
        ("255.255.255.255", ""),
        ("224.0.0.1", ""),
        ("ff02::1", ""),
        ("", ""),
    ],
)
def test_an_address_that_a_login_can_come_from(text, canonical):
    """Malformed text and addresses that no client has give empty text."""
    assert canonical_address(text) == canonical


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("10.0.0.0", True),
        ("192.168.1.20", True),
        ("172.31.255.255", True),
        ("172.32.0.0", False),
        ("100.64.0.0/10", True),
        ("100.127.255.255-100.128.0.0", False),
        ("::ffff:10.0.0.1", True),
        ("fdff::/16", True),
        ("fe00::", False),
        ("203.0.113.7", False),
        ("0.0.0.0/0", False),
    ],
)
def test_private_networks(text: str, private: bool):
    """A range is private if all of it is in one of the private networks."""
    assert is_private(AddressRange.parse(text)) is private
