"""The whole grammar of restrictions: an address, a network, or `first-last`."""

from __future__ import annotations

import re

from netaddr import INET_PTON, AddrFormatError, IPAddress  # type: ignore[import-untyped]

from ipguard.addresses._text import LEADING_ZERO

BITS = {4: 32, 6: 128}
MAX = {4: 2**32 - 1, 6: 2**128 - 1}
_MAPPED_FIRST, _MAPPED_LAST = 0xFFFF << 32, (0xFFFF << 32) + 2**32 - 1
_MULTICAST = {4: (0xE0 << 24, (0xF0 << 24) - 1), 6: (0xFF << 120, 2**128 - 1)}

_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_PREFIX = re.compile(r"0|[1-9][0-9]{0,2}")

Ends = tuple[int, int, int]
"""Version, first and last."""


def read(text: str) -> Ends | None:
    """Read an address, a network or a range, and unwrap what is IPv4-mapped."""
    found = _network(text) if "/" in text else _span(text)
    if found is None:
        return None
    version, first, last = found
    if version == 6 and first >= _MAPPED_FIRST and last <= _MAPPED_LAST:
        return 4, first & MAX[4], last & MAX[4]
    return None if version == 6 and splits_mapped(first, last) else found


def _network(text: str) -> Ends | None:
    head, _, prefix = text.partition("/")
    address = _address(head)
    if address is None or not _PREFIX.fullmatch(prefix) or int(prefix) > BITS[address[0]]:
        return None
    version, first = address
    hosts = MAX[version] >> int(prefix)
    return None if first & hosts else (version, first, first | hosts)


def _span(text: str) -> Ends | None:
    head, dash, tail = text.partition("-")
    start = _address(head)
    end = _address(tail) if dash else start
    if start is None or end is None or start[0] != end[0] or start[1] > end[1]:
        return None
    return *start, end[1]


def _address(text: str) -> tuple[int, int] | None:
    """Read one address as it is written: an IPv4-mapped one is still IPv6 here."""
    if not _ADDRESS.fullmatch(text) or LEADING_ZERO.search(text):
        return None
    version = 6 if ":" in text else 4
    try:
        return version, int(IPAddress(text, version, flags=INET_PTON))
    except AddrFormatError:
        return None


def splits_mapped(first: int, last: int) -> bool:
    """Tell whether a run of IPv6 holds a part of the IPv4-mapped block, or exactly that block."""
    covers = first <= _MAPPED_FIRST and last >= _MAPPED_LAST
    touches = first <= _MAPPED_LAST and last >= _MAPPED_FIRST
    return touches and (not covers or (first, last) == (_MAPPED_FIRST, _MAPPED_LAST))


def unfit(version: int, first: int, last: int) -> str | None:
    """Say why no login comes from these addresses; None where one may."""
    lowest, highest = _MULTICAST[version]
    if lowest <= first and last <= highest:
        return "it is multicast, and no login comes from there"
    if last == 0:
        return "it is the unspecified address, and no login comes from there"
    if version == 4 and first == MAX[4]:
        return "it is the broadcast address, and no login comes from there"
    return None
