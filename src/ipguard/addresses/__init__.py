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
from typing import final

import attrs
from netaddr import INET_PTON, AddrFormatError, IPAddress  # type: ignore[import-untyped]

from ipguard.addresses import _text
from ipguard.addresses._refusals import why
from ipguard.addresses._text import login_address, strict_pton, written
from ipguard.errors import AddressError

__all__ = [
    "AddressRange",
    "AddressSet",
    "login_address",
    "parse_address",
    "strict_pton",
    "typed",
]

_BITS = {4: 32, 6: 128}
_VERSIONS = {4: 4, 16: 6}  # by the number of bytes
_MAX = {4: 2**32 - 1, 6: 2**128 - 1}
_MAPPED_FIRST, _MAPPED_LAST = 0xFFFF << 32, (0xFFFF << 32) + 2**32 - 1
_MULTICAST = {4: (0xE0 << 24, (0xF0 << 24) - 1), 6: (0xFF << 120, 2**128 - 1)}

_LONGEST_TYPED = 2 * _text.LONGEST
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_PREFIX = re.compile(r"0|[1-9][0-9]{0,2}")


@final
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
            raise AddressError(first, "it holds a part of ::ffff:0:0/96, whose addresses are IPv4")

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
        exact = _text.bounded(text)
        found = _read(exact)
        if found is None:
            raise AddressError(exact, *why(exact, _accepted))
        unfit = _unfit(found)
        if unfit is not None:
            raise AddressError(exact, unfit)
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
        version = _VERSIONS.get(len(first))
        if version is None:
            raise AddressError(first, "packed ends are 4 or 16 bytes long")
        lowest, highest = int.from_bytes(first, "big"), int.from_bytes(last, "big")
        return cls(version=version, first=lowest, last=highest)

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
        first = written(self.version, self.first)
        if self.first == self.last:
            return first
        span = self.first ^ self.last
        if span & (span + 1) or self.first & span:
            return f"{first}-{written(self.version, self.last)}"
        return f"{first}/{_BITS[self.version] - span.bit_length()}"

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
    exact = _text.bounded(text)
    if _read(exact) is not None:
        raise AddressError(exact, "it is a network or a range, not one address")
    reason, hint = why(exact, _accepted)
    raise AddressError(exact, reason, hint if login_address(hint) else None)


def typed(text: str) -> AddressRange:
    """Read a restriction as a person typed or pasted it: `AddressRange.parse` without the blanks.

    Args:
        text: What was typed. Only ASCII blanks at its ends are forgiven.

    Returns:
        The range.

    Raises:
        AddressError: As `AddressRange.parse`.
    """
    exact = _text.plain(text, _LONGEST_TYPED)
    return AddressRange.parse(text if exact is None else exact.strip(_text.BLANKS))


def _ends(item: object) -> tuple[int, int, int]:
    if type(item) is AddressRange:  # isinstance would ask the item itself
        return item.version, item.first, item.last
    version, value = login_address(item) or (0, 0)
    return version, value, value


def _splits_mapped(first: int, last: int) -> bool:
    covers = first <= _MAPPED_FIRST and last >= _MAPPED_LAST
    touches = first <= _MAPPED_LAST and last >= _MAPPED_FIRST
    return touches and (not covers or (first, last) == (_MAPPED_FIRST, _MAPPED_LAST))


# The whole grammar of restrictions is in the next four functions.


def _address(text: str) -> tuple[int, int] | None:
    """Read one address as it is written: an IPv4-mapped one is still IPv6 here."""
    if not _ADDRESS.fullmatch(text) or _text.LEADING_ZERO.search(text):
        return None
    version = 6 if ":" in text else 4
    try:
        return version, int(IPAddress(text, version, flags=INET_PTON))
    except AddrFormatError:
        return None


def _network(text: str) -> tuple[int, int, int] | None:
    head, _, prefix = text.partition("/")
    address = _address(head)
    if address is None or not _PREFIX.fullmatch(prefix) or int(prefix) > _BITS[address[0]]:
        return None
    version, first = address
    hosts = _MAX[version] >> int(prefix)
    return None if first & hosts else (version, first, first | hosts)


def _span(text: str) -> tuple[int, int, int] | None:
    head, dash, tail = text.partition("-")
    start = _address(head)
    end = _address(tail) if dash else start
    if start is None or end is None or start[0] != end[0] or start[1] > end[1]:
        return None
    return *start, end[1]


def _read(text: str) -> AddressRange | None:
    """Read an address, a network or a range, and unwrap what is IPv4-mapped."""
    found = _network(text) if "/" in text else _span(text)
    if found is None:
        return None
    version, first, last = found
    if version == 6 and first >= _MAPPED_FIRST and last <= _MAPPED_LAST:
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


def _accepted(text: str) -> str | None:
    """Give the canonical text of a restriction that would be accepted; None for anything else."""
    found = _read(text)
    return None if found is None or _unfit(found) else str(found)
