"""Strict text to addresses: `AddressRange`, `AddressSet`, and a login's address.

There are two readers. What people write (a restriction) is validated by netaddr and refused with a
reason and, where it is obvious, with what was perhaps meant. What a login brings (`login_address`)
goes through the C library and gets no explanation. The tests prove that the two accept the same
addresses. Both unwrap IPv4-mapped IPv6 (`::ffff:0:0/96`, RFC 4291 section 2.5.5.2) and nothing
else: 6to4, NAT64 and `::1.2.3.4` stay the IPv6 addresses that they are.

Inputs that other parsers read in different ways are refused throughout. Octal, hexadecimal and
short IPv4 were CVE-2021-29921, CVE-2021-28918, CVE-2021-29923 and CVE-2021-29922.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import cast

import attrs
from netaddr import INET_PTON, AddrFormatError, IPAddress

from ipguard.errors import AddressError

__all__ = ["AddressRange", "AddressSet", "login_address", "parse_address", "typed"]

_BITS = {4: 32, 6: 128}
_MAX = {4: 2**32 - 1, 6: 2**128 - 1}
_MAPPED_FIRST, _MAPPED_LAST = 0xFFFF << 32, (0xFFFF << 32) + 2**32 - 1
_MULTICAST = {4: (0xE0 << 24, (0xF0 << 24) - 1), 6: (0xFF << 120, 2**128 - 1)}

_LONGEST_ADDRESS = len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255")
_LONGEST = 2 * _LONGEST_ADDRESS + 1
_LONGEST_TYPED = 2 * _LONGEST
_BLANKS = " \t\n\r\v\f"

_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_PREFIX = re.compile(r"0|[1-9][0-9]{0,2}")
_AROUND = re.compile(rf"[{_BLANKS}]*([-/])[{_BLANKS}]*")
_WITH_PORT = re.compile(r"\[([^]]*)\](?::\d+)?|([\d.]+):\d+")
_ZEROS = re.compile(r"\b0(?::0)+\b")

_NEITHER = "it is no address, network or first-last range"
_SPLIT = "it holds a part of ::ffff:0:0/96, whose addresses are IPv4"


@attrs.frozen(kw_only=True, repr=False, str=False)
class AddressRange:
    """One contiguous run of addresses: one address, a network, or from a first to a last.

    It is a value: comparable, hashable, immutable. An IPv6 range holds all of the IPv4-mapped
    block or nothing of it, because a mapped address is an IPv4 address.

    Attributes:
        version: 4 or 6.
        first: The lowest address, as an integer.
        last: The highest address, as an integer; the range includes it.

    Raises:
        AddressError: The values make no range, or split the IPv4-mapped block.
    """

    version: int
    first: int
    last: int

    def __attrs_post_init__(self) -> None:
        version, first, last = self.version, self.first, self.last
        if type(version) is not int or version not in _MAX:
            raise AddressError(version, "the version is 4 or 6")
        if type(first) is not int or type(last) is not int:
            raise AddressError(first, "the ends of a range are integers")
        if not 0 <= first <= last <= _MAX[version]:
            raise AddressError(first, "the ends of a range are in order and within its version")
        if version == 6 and _splits_mapped(first, last):
            raise AddressError(first, _SPLIT)

    @classmethod
    def parse(cls, text: str) -> AddressRange:
        """Read a restriction: one address, a network, or `first-last`.

        `203.0.113.7`, `203.0.113.0/29`, `203.0.113.5-203.0.113.9`, and IPv6 alike. Nothing is
        stripped, guessed or completed. What is IPv4-mapped becomes IPv4: `::ffff:203.0.113.0/120`
        is `203.0.113.0/24`.

        Args:
            text: At most 45 characters for one address, 49 for a network, 91 for a range.

        Returns:
            The range; `parse(str(range))` is the same range again.

        Raises:
            AddressError: The text is anything else, or it names addresses that no login comes
                from: only multicast ones, exactly the unspecified or the broadcast address.
        """
        plain = _bounded(text)
        found = _read(plain)
        if found is None:
            raise AddressError(plain, *_why(plain))
        unfit = _unfit(found)
        if unfit is not None:
            raise AddressError(plain, unfit)
        return found

    @classmethod
    def from_packed(cls, first: bytes, last: bytes) -> AddressRange:
        """Make a range of what `packed` gave.

        Args:
            first: The lowest address in network byte order: 4 or 16 bytes, which tell the version.
            last: The highest address, of the same length.

        Returns:
            The range.

        Raises:
            AddressError: The bytes make no range: whoever stored them, it was not ipguard.
        """
        if type(first) is not bytes or type(last) is not bytes or len(first) != len(last):
            raise AddressError(first, "packed ends are bytes, and of one length")
        if len(first) not in (4, 16):
            raise AddressError(first, "packed ends are 4 or 16 bytes long")
        version = 4 if len(first) == 4 else 6
        return cls(
            version=version, first=int.from_bytes(first, "big"), last=int.from_bytes(last, "big")
        )

    @property
    def packed(self) -> tuple[bytes, bytes]:
        """First and last in network byte order: bytes of one version compare as addresses do."""
        length = _BITS[self.version] // 8
        return self.first.to_bytes(length, "big"), self.last.to_bytes(length, "big")

    @property
    def size(self) -> int:
        """The number of addresses, at least 1."""
        return self.last - self.first + 1

    def __contains__(self, item: object) -> bool:
        """Tell whether an address (text, as `login_address` takes it) or a whole range is inside.

        Anything else, malformed text included, is not in; nothing raises.
        """
        version, first, last = _ends(item)
        return version == self.version and self.first <= first and last <= self.last

    def __str__(self) -> str:
        """The canonical shortest text: the address, the network, or `first-last`."""
        prefix = _prefix(self.version, self.first, self.last)
        first = _text(self.version, self.first)
        if self.first == self.last:
            return first
        if prefix is not None:
            return f"{first}/{prefix}"
        return f"{first}-{_text(self.version, self.last)}"

    def __repr__(self) -> str:
        return f"<AddressRange {self}>"


def _merged(ranges: Iterable[AddressRange]) -> tuple[AddressRange, ...]:
    merged: list[AddressRange] = []
    for new in sorted(ranges, key=lambda r: (r.version, r.first)):
        if merged and new.version == merged[-1].version and new.first <= merged[-1].last + 1:
            last = max(merged[-1].last, new.last)
            merged[-1] = AddressRange(version=new.version, first=merged[-1].first, last=last)
        else:
            merged.append(new)
    return tuple(merged)


@attrs.frozen(repr=False)
class AddressSet:
    """Addresses of both versions as few disjoint ranges; a test takes O(log n).

    It is a value: two sets of the same addresses are equal, however they were written.

    Args:
        ranges: Any `AddressRange` values, in any order, overlapping or not.
    """

    _ranges: tuple[AddressRange, ...] = attrs.field(default=(), converter=_merged)
    _bounds: dict[int, tuple[int, ...]] = attrs.field(init=False, eq=False)

    @_bounds.default
    def _flatten(self) -> dict[int, tuple[int, ...]]:
        return {
            version: tuple(
                bound
                for run in self._ranges
                if run.version == version
                for bound in (run.first, run.last + 1)
            )
            for version in _BITS
        }

    def bounds(self, version: int) -> tuple[int, ...]:
        """Give the sorted bounds `(first0, last0 + 1, first1, last1 + 1, ...)` of one version.

        An address is in the set exactly when `bisect_right(bounds, address)` is odd.

        Args:
            version: 4 or 6.

        Returns:
            An even number of integers; none where the set has no address of that version.
        """
        return self._bounds[version]

    def __contains__(self, item: object) -> bool:
        """Tell whether an address (text) or a whole range is in the set, as `AddressRange` does."""
        version, first, last = _ends(item)
        bounds = self._bounds.get(version, ())
        at = bisect_right(bounds, first)
        return at % 2 == 1 and last < bounds[at]

    def __iter__(self) -> Iterator[AddressRange]:
        """Give the merged ranges, IPv4 before IPv6, each version in order."""
        return iter(self._ranges)

    def __len__(self) -> int:
        """The number of merged ranges, not of addresses."""
        return len(self._ranges)

    def __repr__(self) -> str:
        return f"<AddressSet {', '.join(map(str, self._ranges)) or 'empty'}>"


def login_address(text: object) -> tuple[int, int] | None:
    """Read a login's address; never raise, whatever a client sent.

    Args:
        text: The client's address as `str`. Blanks, zones, ports, networks are no part of one.

    Returns:
        The version, 4 or 6, and the address as an integer, IPv4-mapped as IPv4;
        None where the text is anything but one valid address.
    """
    if type(text) is not str or len(text) > _LONGEST_ADDRESS:
        plain = _plain(text, _LONGEST_ADDRESS)
        return None if plain is None else login_address(plain)
    try:
        if ":" not in text:
            return 4, _dotted(text)
        # macOS takes a zone, and looks up its interface; a zone names a link of another host.
        if "%" in text:
            return None
        value = int.from_bytes(inet_pton(AF_INET6, text), "big")
        if "." in text:
            _dotted(text.rpartition(":")[2])
    except (OSError, ValueError):  # ValueError: a NUL, a surrogate
        return None
    return (4, value & 0xFFFFFFFF) if value >> 32 == 0xFFFF else (6, value)


def _dotted(text: str) -> int:
    packed = inet_pton(AF_INET, text)
    # Some C libraries read leading zeros here, as decimal or as octal (CVE-2021-29921).
    if inet_ntop(AF_INET, packed) != text:
        raise ValueError
    return int.from_bytes(packed, "big")


def parse_address(text: str) -> AddressRange:
    """Read one client's address, for people-facing use; every valid address is accepted.

    Args:
        text: The address, as `login_address` takes it.

    Returns:
        A range of that one address.

    Raises:
        AddressError: The text is anything but one valid address.
    """
    found = login_address(text)
    if found is not None:
        return AddressRange(version=found[0], first=found[1], last=found[1])
    plain = _bounded(text)
    if _read(plain) is not None:
        raise AddressError(plain, "it is not one address but several")
    raise AddressError(plain, *_why(plain))


def typed(text: str) -> AddressRange:
    """Read a restriction as a person typed or pasted it: `AddressRange.parse` without the blanks.

    Args:
        text: What was typed. Only ASCII blanks at its ends are forgiven.

    Returns:
        The range.

    Raises:
        AddressError: As `AddressRange.parse`.
    """
    plain = _plain(text, _LONGEST_TYPED)
    return AddressRange.parse(text if plain is None else plain.strip(_BLANKS))


def _plain(text: object, longest: int) -> str | None:
    """Give a real `str` of bounded length; a subclass's own methods are never asked."""
    if not issubclass(type(text), str) or str.__len__(cast(str, text)) > longest:
        return None
    return str.__str__(cast(str, text))


def _ends(item: object) -> tuple[int, int, int]:
    if isinstance(item, AddressRange):
        return item.version, item.first, item.last
    version, value = login_address(item) or (0, 0)
    return version, value, value


def _bounded(text: object) -> str:
    plain = _plain(text, _LONGEST)
    if plain is not None:
        return plain
    if not issubclass(type(text), str):
        raise AddressError(text, "it is not text")
    start = str.__getitem__(cast(str, text), slice(_LONGEST))
    raise AddressError(start, "it is longer than any address, network or range")


def _splits_mapped(first: int, last: int) -> bool:
    covers = first <= _MAPPED_FIRST and last >= _MAPPED_LAST
    touches = first <= _MAPPED_LAST and last >= _MAPPED_FIRST
    return touches and (not covers or (first, last) == (_MAPPED_FIRST, _MAPPED_LAST))


def _prefix(version: int, first: int, last: int) -> int | None:
    """Give the prefix length where the range is exactly one network."""
    span = first ^ last
    return None if span & (span + 1) or first & span else _BITS[version] - span.bit_length()


def _text(version: int, value: int) -> str:
    """Write one address; IPv6 as RFC 5952 section 4 has it, on every platform alike."""
    if version == 4:
        return ".".join(str(byte) for byte in value.to_bytes(4, "big"))
    groups = ":".join(f"{value >> shift & 0xFFFF:x}" for shift in range(112, -16, -16))
    longest = max(_ZEROS.finditer(groups), key=lambda zeros: len(zeros[0]), default=None)
    if longest is None:
        return groups
    return f"{groups[: longest.start()].rstrip(':')}::{groups[longest.end() :].lstrip(':')}"


# What is accepted: the whole grammar of restrictions is in the next three functions.


def _address(text: str) -> tuple[int, int] | None:
    """Read one address as it is written: an IPv4-mapped one is still IPv6 here."""
    if not _ADDRESS.fullmatch(text):
        return None
    version = 6 if ":" in text else 4
    try:
        if version == 6 and "." in text:  # not every C library is strict about these four
            IPAddress(text.rpartition(":")[2], 4, flags=INET_PTON)
        return version, int(IPAddress(text, version, flags=INET_PTON))
    except AddrFormatError:
        return None


def _written(text: str) -> tuple[int, int, int] | None:
    """Read an address, a network or a range as it is written: version, first, last."""
    head, slash, prefix = text.partition("/")
    head, dash, tail = (head, "", "") if slash else head.partition("-")
    start = _address(head)
    end = _address(tail) if dash else start
    if start is None or end is None or start[0] != end[0] or start[1] > end[1]:
        return None
    if not slash:
        return *start, end[1]
    version, first = start
    if not _PREFIX.fullmatch(prefix) or int(prefix) > _BITS[version]:
        return None
    hosts = _MAX[version] >> int(prefix)
    return None if first & hosts else (version, first, first | hosts)


def _read(text: str) -> AddressRange | None:
    """Read an address, a network or a range, and unwrap what is IPv4-mapped."""
    found = _written(text)
    if found is None:
        return None
    version, first, last = found
    if version == 6 and _MAPPED_FIRST <= first and last <= _MAPPED_LAST:
        version, first, last = 4, first & _MAX[4], last & _MAX[4]
    elif version == 6 and _splits_mapped(first, last):
        return None
    return AddressRange(version=version, first=first, last=last)


def _unfit(found: AddressRange) -> str | None:
    """Say why no login comes from these addresses; None where one may."""
    lowest, highest = _MULTICAST[found.version]
    if lowest <= found.first and found.last <= highest:
        return "it is multicast, and no login comes from there"
    if found.last == 0:
        return "it is the unspecified address, and no login comes from there"
    if found.version == 4 and found.first == _MAX[4]:
        return "it is the broadcast address, and no login comes from there"
    return None


# What is refused: the reason, and a hint only where the hint itself would be accepted.


def _hint(*candidates: str) -> str | None:
    for candidate in candidates:
        found = _read(candidate)
        if found is not None and _unfit(found) is None:
            return str(found)
    return None


def _why(text: str) -> tuple[str, str | None]:
    """Explain why a text of bounded length was refused: the reason, and the hint or None."""
    if any(blank in text for blank in _BLANKS):
        return "it has a blank at an end or inside", _hint(_AROUND.sub(r"\1", text.strip(_BLANKS)))
    if not text.isascii():
        return "it has characters that are not ASCII", _hint(text.replace("\N{EN DASH}", "-"))
    if "%" in text:
        return "a zone has no meaning on another machine", _hint(re.sub("%[^-/]*", "", text))
    if with_port := _WITH_PORT.fullmatch(text):
        return "brackets and a port are no part of an address", _hint(with_port[1] or with_port[2])
    if "/" in text:
        return _why_no_network(*text.split("/", 1))
    if "-" in text:
        return _why_no_range(*text.split("-", 1))
    if "*" in text:
        known = text.split(".*")[0].split(".")
        network = f"{'.'.join([*known, '0', '0', '0'][:4])}/{8 * len(known)}"
        return "wildcards are not read; use a prefix length", _hint(network)
    if re.search(r"\b0\d+\.|\.0\d", text):
        return "a leading zero means octal to some programs and nothing to others", None
    if re.fullmatch(r"[\d.]+", text):
        return "an IPv4 address is four numbers from 0 to 255", None
    return _NEITHER, None


def _why_no_network(head: str, prefix: str) -> tuple[str, str | None]:
    start, mask = _address(head), _address(prefix)
    if start is None:
        return _why_no_part(head), None
    version, first = start
    every = _MAX[version]
    if mask is not None:  # all ones and all zeros mean the opposite as netmask and as hostmask
        meant = (n for n in range(1, _BITS[version]) if mask[1] in (every >> n, every ^ every >> n))
        hint = (_hint(f"{_text(version, first & ~(every >> n))}/{n}") for n in meant)
        return "it has a mask; use a prefix length", next(hint, None)
    if not _PREFIX.fullmatch(prefix) or int(prefix) > _BITS[version]:
        return f"the prefix length is not a decimal number from 0 to {_BITS[version]}", None
    if int(prefix) < 96 and version == 6 and first >> 32 == 0xFFFF:
        mapped = f"{_text(4, first & _MAX[4])}/{prefix}"
        return "the prefix length of an IPv4-mapped network is at least 96", _hint(mapped)
    network = f"{_text(version, first & ~(every >> int(prefix)))}/{prefix}"
    return "it has host bits set", _hint(network)


def _why_no_range(start: str, end: str) -> tuple[str, str | None]:
    first, last = _address(start), _address(end)
    if first is None:
        return _why_no_part(start), None
    if last is None and first[0] == 4 and re.fullmatch(r"\d+", end):
        return "write the end of the range in full", _hint(
            f"{start}-{start.rpartition('.')[0]}.{end}"
        )
    if last is None:
        return _why_no_part(end), None
    if first[0] != last[0]:
        unwrapped = [_text(*found) for found in map(login_address, (start, end)) if found]
        return "its ends are of different versions", _hint("-".join(unwrapped))
    if first > last:
        return "the range runs backwards", _hint(f"{end}-{start}")
    return _SPLIT, None


def _why_no_part(text: str) -> str:
    return _NEITHER if not text or _written(text) else _why(text)[0]
