"""Strict text to addresses: `AddressRange`, `AddressSet`, and a login's address.

There are two readers. What people write (a restriction: `_grammar.py`) is validated by netaddr and
refused with a reason and, where it is obvious, with what was perhaps meant. What a login brings
(`login_address`) goes through the C library and gets no explanation. The tests prove that the two
accept the same addresses. Both unwrap IPv4-mapped IPv6 (`::ffff:0:0/96`, RFC 4291 section 2.5.5.2)
and nothing else: 6to4, NAT64 and `::1.2.3.4` stay the IPv6 addresses that they are.

Inputs that other parsers read in different ways are refused throughout. Octal, hexadecimal and
short IPv4 were CVE-2021-29921, CVE-2021-28918, CVE-2021-29923 and CVE-2021-29922.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import final

import attrs

from ipguard.addresses import _grammar, _text
from ipguard.addresses._grammar import BITS, MAX
from ipguard.addresses._refusals import more_than_one, why
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

_VERSIONS = {4: 4, 16: 6}  # by the number of bytes
_LONGEST_TYPED = 2 * _text.LONGEST


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
        if type(version) is not int or version not in MAX:
            raise AddressError(version, "the version is 4 or 6")
        if type(first) is not int or type(last) is not int:
            raise AddressError(first, "the ends of a range are integers")
        if not 0 <= first <= last <= MAX[version]:
            raise AddressError(first, "the ends of a range are in order and within its version")
        if version == 6 and _grammar.splits_mapped(first, last):
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
        found = _grammar.read(exact)
        if found is None:
            raise AddressError(exact, *why(exact, _accepted))
        unfit = _grammar.unfit(*found)
        if unfit is not None:
            raise AddressError(exact, unfit)
        return _range(*found)

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
        length = BITS[self.version] // 8
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
        return f"{first}/{BITS[self.version] - span.bit_length()}"

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
            for version in BITS
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
    if _grammar.read(exact) is not None:
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
    if exact is None:
        return AddressRange.parse(text)
    exact = exact.strip(_text.BLANKS)
    if len(exact) > _text.LONGEST and (several := more_than_one(exact, _accepted)):
        raise AddressError(exact, several)
    return AddressRange.parse(exact)


def _ends(item: object) -> tuple[int, int, int]:
    if type(item) is AddressRange:  # isinstance would ask the item itself
        return item.version, item.first, item.last
    version, value = login_address(item) or (0, 0)
    return version, value, value


def _accepted(text: str) -> str | None:
    """Give the canonical text of a restriction that would be accepted; None for anything else."""
    found = _grammar.read(text)
    return None if found is None or _grammar.unfit(*found) else str(_range(*found))


def _range(version: int, first: int, last: int) -> AddressRange:
    return AddressRange(version=version, first=first, last=last)
