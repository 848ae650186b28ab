"""Parse addresses strictly: `AddressRange`, `AddressSet`, and the address of a login.

There are two readers. `AddressRange.parse` reads restrictions that people write: netaddr validates
them, and a refusal carries a reason and, if it is obvious, a hint. `login_address` reads the
client's address of a login with the C library and explains nothing. The tests show that both accept
the same addresses. Both convert IPv4-mapped IPv6 (`::ffff:0:0/96`, RFC 4291 section 2.5.5.2) to
IPv4, and nothing else: 6to4, NAT64 and `::1.2.3.4` stay IPv6.

Input that other parsers read differently is refused. Octal, hexadecimal and short IPv4 were
CVE-2021-29921, CVE-2021-28918, CVE-2021-29923 and CVE-2021-29922.
"""

from __future__ import annotations

import re
import socket
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_network
from socket import inet_pton
from typing import Final, cast, final

import attrs
from netaddr import INET_PTON, AddrFormatError, IPAddress  # type: ignore[import-untyped]

from ipguard.errors import AddressError

__all__ = ["AddressRange", "AddressSet", "login_address", "parse_address"]

_LONGEST_ADDRESS: Final = len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255")
_LONGEST: Final = 2 * _LONGEST_ADDRESS + 1
_BLANKS: Final = " \t\n\r\v\f"
_BITS: Final = {4: 32, 6: 128}
_MAX: Final = {4: 2**32 - 1, 6: 2**128 - 1}
_VERSIONS: Final = {4: 4, 16: 6}  # by the number of bytes
_MAPPED: Final = bytes(10) + b"\xff\xff"
_MAPPED_FIRST, _MAPPED_LAST = 0xFFFF << 32, (0xFFFF << 32) + 2**32 - 1
_MULTICAST: Final = {4: (0xE0 << 24, (0xF0 << 24) - 1), 6: (0xFF << 120, 2**128 - 1)}
# Plain integers: the members of the socket module's enum are slower to pass.
_AF_INET, _AF_INET6 = int(socket.AF_INET), int(socket.AF_INET6)

_Ends = tuple[int, int, int]  # version, first and last

# Some C libraries accept a leading zero, as decimal or as octal.
_LEADING_ZERO: Final = re.compile(r"\.0[0-9]|(?:^|:)0[0-9]+\.")
_ZEROS: Final = re.compile(r"\b0(?::0)+")


def _reads_leading_zeros() -> bool:
    """Return whether this C library accepts a leading zero, in either family."""
    for family, text in ((_AF_INET, "1.2.3.04"), (_AF_INET6, "::1.2.3.04")):
        try:
            inet_pton(family, text)
        except OSError:
            continue
        return True
    return False


def _checked_pton(family: int, text: str) -> bytes:
    # macOS accepts a zone such as %en0, which names a network interface of the client's machine.
    if _LEADING_ZERO.search(text) or "%" in text:
        raise ValueError("C libraries may differ about this text")
    return inet_pton(family, text)


# Test the library once: searching each address for a leading zero would take as long as parsing.
strict_pton = inet_pton if sys.platform == "linux" and not _reads_leading_zeros() else _checked_pton


def pack_address(text: object) -> bytes | None:
    """Read the client's address of a login; never raise, whatever the client sent.

    Args:
        text: The address as `str`, without blanks, zone, port or prefix.

    Returns:
        The address in network byte order: 4 bytes for IPv4 and IPv4-mapped IPv6, else 16. None if
        the text is not exactly one valid address.
    """
    if type(text) is not str or len(text) > _LONGEST_ADDRESS:
        exact = _plain(text, _LONGEST_ADDRESS)
        return None if exact is None else pack_address(exact)
    try:
        if ":" not in text:
            return strict_pton(_AF_INET, text)
        packed = strict_pton(_AF_INET6, text)
    except (OSError, ValueError):  # ValueError: a NUL or a surrogate inside
        return None
    return packed if packed[0] or not packed.startswith(_MAPPED) else packed[12:]


def login_address(text: object) -> tuple[int, int] | None:
    """Read the client's address of a login, as `pack_address` does.

    Returns:
        The version, 4 or 6, and the address as an integer; None if it is not valid.
    """
    packed = pack_address(text)
    return None if packed is None else (_VERSIONS[len(packed)], int.from_bytes(packed, "big"))


def canonical_address(text: str) -> str:
    """Return the canonical text of an address that a login can come from, else empty text."""
    found = login_address(text)
    return "" if found is None or _unfit(*found, found[1]) else _written(*found)


def _plain(text: object, longest: int) -> str | None:
    """Return an exact `str` of bounded length, without calling a subclass's own methods."""
    if not issubclass(type(text), str) or str.__len__(cast("str", text)) > longest:
        return None
    return str.__str__(cast("str", text))


def _bounded(text: object) -> str:
    """Return an exact `str` that is short enough to parse, or raise AddressError."""
    if not issubclass(type(text), str):
        raise AddressError(text, "it is not text")
    start = str.__getitem__(cast("str", text), slice(_LONGEST + 1))
    if len(start) > _LONGEST:
        raise AddressError(start, "it is longer than any address, network or range")
    return start


def _written(version: int, value: int) -> str:
    """Write one address; IPv6 by RFC 5952 section 4, the same on every platform."""
    if version == 4:
        return ".".join(str(byte) for byte in value.to_bytes(4, "big"))
    groups = ":".join(f"{value >> shift & 0xFFFF:x}" for shift in range(112, -16, -16))
    longest = max(_ZEROS.finditer(groups), key=lambda zeros: len(zeros[0]), default=None)
    if longest is None:
        return groups
    return f"{groups[: longest.start()].rstrip(':')}::{groups[longest.end() :].lstrip(':')}"


@final
@attrs.frozen(kw_only=True, repr=False, str=False)
class AddressRange:
    """One contiguous run of addresses: an address, a network, or `first-last`.

    A value: comparable, hashable, immutable. An IPv6 range holds the whole IPv4-mapped block or
    none of it, because a mapped address is an IPv4 address.

    Attributes:
        version: 4 or 6.
        first: The lowest address, as an integer.
        last: The highest address, as an integer; included.

    Raises:
        AddressError: The values are not a range, or they split the IPv4-mapped block.
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
        stripped, guessed or completed. IPv4-mapped text becomes IPv4: `::ffff:203.0.113.0/120` is
        `203.0.113.0/24`.

        Args:
            text: At most 45 characters for one address, 49 for a network, 91 for a range.

        Returns:
            The range; `parse(str(range))` returns an equal range.

        Raises:
            AddressError: The text is anything else, or no login can come from its addresses: they
                are all multicast, or exactly the unspecified or the broadcast address.
        """
        exact = _bounded(text)
        found = _read(exact)
        if found is None:
            raise AddressError(exact, *_why(exact))
        unfit = _unfit(*found)
        if unfit is not None:
            raise AddressError(exact, unfit)
        return _range(*found)

    @classmethod
    def from_packed(cls, first: bytes, last: bytes) -> AddressRange:
        """Make a range from the two values of `packed`.

        Args:
            first: The lowest address in network byte order: 4 or 16 bytes, which give the version.
            last: The highest address, of the same length.

        Raises:
            AddressError: The bytes are not a range, so ipguard did not store them.
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
        """The first and the last address in network byte order.

        Within one version, these bytes sort as the addresses do.
        """
        length = _BITS[self.version] // 8
        return self.first.to_bytes(length, "big"), self.last.to_bytes(length, "big")

    @property
    def size(self) -> int:
        """The number of addresses, at least 1."""
        return self.last - self.first + 1

    def __contains__(self, item: object) -> bool:
        """Return whether an address (text, as for `login_address`) or a whole range is inside.

        Anything else, malformed text included, is not in; nothing raises.
        """
        version, first, last = _ends(item)
        return version == self.version and self.first <= first and last <= self.last

    def __str__(self) -> str:
        """The canonical shortest text: the address, the network, or `first-last`."""
        first = _written(self.version, self.first)
        if self.first == self.last:
            return first
        span = self.first ^ self.last
        if span & (span + 1) or self.first & span:
            return f"{first}-{_written(self.version, self.last)}"
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

    A value: two sets of the same addresses are equal, however they were written.

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

    def __or__(self, other: AddressSet) -> AddressSet:
        """Return the addresses of either set."""
        return AddressSet((*self, *other)) if self and other else self or other

    def __sub__(self, other: AddressSet) -> AddressSet:
        """Return the addresses of this set that are not in the other."""
        if not (self and other):
            return self
        left: list[AddressRange] = []
        for version in _BITS:
            mine, theirs = self.bounds(version), other.bounds(version)
            for first, end in zip(mine[::2], mine[1::2], strict=True):
                # Before their bounds, one is outside their set and inside it by turns.
                at = bisect_right(theirs, first)
                edges = (*theirs[at : bisect_left(theirs, end)], end)
                edges = edges if at % 2 else (first, *edges)
                left += (
                    _range(version, a, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=False)
                )
        return AddressSet(left)

    def bounds(self, version: int) -> tuple[int, ...]:
        """Return the sorted bounds `(first0, last0 + 1, first1, last1 + 1, ...)` of one version.

        An address is in the set exactly when `bisect_right(bounds, address)` is odd.

        Args:
            version: 4 or 6.
        """
        return self._bounds[version]

    def __contains__(self, item: object) -> bool:
        """Return whether an address (text) or a whole range is in the set."""
        version, first, last = _ends(item)
        bounds = self._bounds.get(version, ())
        at = bisect_right(bounds, first)
        return at % 2 == 1 and last < bounds[at]

    def __iter__(self) -> Iterator[AddressRange]:
        """Yield the merged ranges, IPv4 before IPv6, each version in order."""
        return iter(self._ranges)

    def __len__(self) -> int:
        """The number of merged ranges, not of addresses."""
        return len(self._ranges)

    def __repr__(self) -> str:
        return f"<AddressSet {', '.join(map(str, self._ranges)) or 'empty'}>"


def parse_address(text: str) -> AddressRange:
    """Read one client's address, with an explanation if it is refused.

    Args:
        text: The address, as for `login_address`.

    Returns:
        A range of that one address.

    Raises:
        AddressError: The text is not exactly one valid address.
    """
    found = login_address(text)
    if found is not None:
        return AddressRange(version=found[0], first=found[1], last=found[1])
    exact = _bounded(text)
    if _read(exact) is not None:
        raise AddressError(exact, "it is a network or a range, not one address")
    reason, hint = _why(exact)
    raise AddressError(exact, reason, hint if login_address(hint) else None)


def parse_typed(text: str) -> AddressRange:
    """Read a restriction as a person typed or pasted it: ASCII blanks at its ends are ignored.

    Raises:
        AddressError: As `AddressRange.parse`.
    """
    exact = _plain(text, 2 * _LONGEST)
    if exact is None:
        return AddressRange.parse(text)
    exact = exact.strip(_BLANKS)
    if len(exact) > _LONGEST and (several := _more_than_one(exact)):
        raise AddressError(exact, several)
    return AddressRange.parse(exact)


def is_private(addresses: AddressRange) -> bool:
    """Return whether all are of a private network, which the internet never sees as a source.

    RFC 1918, RFC 6598 (shared by a carrier's customers) and RFC 4193.
    """
    return any(
        each.version == addresses.version
        and each.first <= addresses.first
        and addresses.last <= each.last
        for each in _PRIVATE
    )


def _ends(item: object) -> _Ends:
    if type(item) is AddressRange:  # isinstance would call the item's own `__class__`
        return item.version, item.first, item.last
    version, value = login_address(item) or (0, 0)
    return version, value, value


def _range(version: int, first: int, last: int) -> AddressRange:
    return AddressRange(version=version, first=first, last=last)


# -- the grammar of restrictions ------------------------------------------------------------------

_ADDRESS: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_PREFIX: Final = re.compile(r"0|[1-9][0-9]{0,2}")


def _read(text: str) -> _Ends | None:
    """Read an address, a network or a range, IPv4-mapped ones as IPv4; None if it is malformed."""
    found = _read_network(text) if "/" in text else _read_run(text)
    if found is None:
        return None
    version, first, last = found
    if version == 6 and first >= _MAPPED_FIRST and last <= _MAPPED_LAST:
        return 4, first & _MAX[4], last & _MAX[4]
    return None if version == 6 and _splits_mapped(first, last) else found


def _read_network(text: str) -> _Ends | None:
    head, _, prefix = text.partition("/")
    address = _read_address(head)
    if address is None or not _PREFIX.fullmatch(prefix) or int(prefix) > _BITS[address[0]]:
        return None
    version, first = address
    hosts = _MAX[version] >> int(prefix)
    return None if first & hosts else (version, first, first | hosts)


def _read_run(text: str) -> _Ends | None:
    head, dash, tail = text.partition("-")
    start = _read_address(head)
    end = _read_address(tail) if dash else start
    if start is None or end is None or start[0] != end[0] or start[1] > end[1]:
        return None
    return *start, end[1]


def _read_address(text: str) -> tuple[int, int] | None:
    """Return the version and value of one address, IPv4-mapped ones as IPv6; None if malformed."""
    if not _ADDRESS.fullmatch(text) or _LEADING_ZERO.search(text):
        return None
    version = 6 if ":" in text else 4
    try:
        return version, int(IPAddress(text, version, flags=INET_PTON))
    except AddrFormatError:
        return None


def _splits_mapped(first: int, last: int) -> bool:
    """Return whether a run of IPv6 holds a part of the mapped block, or exactly that block."""
    covers = first <= _MAPPED_FIRST and last >= _MAPPED_LAST
    touches = first <= _MAPPED_LAST and last >= _MAPPED_FIRST
    return touches and (not covers or (first, last) == (_MAPPED_FIRST, _MAPPED_LAST))


def _unfit(version: int, first: int, last: int) -> str | None:
    """Return why no login can come from these addresses, or None."""
    lowest, highest = _MULTICAST[version]
    if lowest <= first and last <= highest:
        return "it is multicast, and no login comes from there"
    if last == 0:
        return "it is the unspecified address, and no login comes from there"
    if version == 4 and first == _MAX[4]:
        return "it is the broadcast address, and no login comes from there"
    return None


_PRIVATE: Final = tuple(
    map(
        AddressRange.parse,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)


# -- reasons and hints ----------------------------------------------------------------------------
# Nothing below decides what is accepted. A hint is always text that the strict reader accepts, so
# the lenient `ipaddress` may help to find it.

_Refusal = tuple[str, str | None]

_NEITHER: Final = "it is not an address, a network or a first-last range"
_AROUND: Final = re.compile(rf"[{_BLANKS}]*([-/])[{_BLANKS}]*")
_BETWEEN: Final = re.compile(rf"[{_BLANKS},;]+")


def _wildcard(text: str) -> str:
    known = re.findall(r"[0-9]+", text)
    return f"{'.'.join([*known, '0', '0', '0'][:4])}/{8 * len(known)}"


# Notations that are refused wherever they occur: the pattern, the reason, and the text without it.
# A leading zero has no such text: it may be octal.
_NOTATIONS: Final[tuple[tuple[re.Pattern[str], str, Callable[[str], str]], ...]] = (
    (
        re.compile(f"[{_BLANKS}]"),
        "it has a blank at an end or inside",
        lambda text: _AROUND.sub(r"\1", text.strip(_BLANKS)),
    ),
    (
        re.compile(r"[^\x21-\x7e]"),
        "it has characters that do not belong in an address",
        lambda text: text.replace("\N{EN DASH}", "-"),
    ),
    (
        re.compile(r"%"),
        "a zone has a meaning on one machine only",
        lambda text: re.sub(r"%[^-/]*", "", text),
    ),
    (
        re.compile(r"^\[[^]]*\](?::[0-9]+)?$|^[0-9.]+:[0-9]+$"),
        "brackets and ports are not part of an address",
        lambda text: text[1:].partition("]")[0] if text[0] == "[" else text.partition(":")[0],
    ),
    (
        re.compile(r"^(?:[0-9]+\.){1,3}\*(?:\.\*)*$"),
        "wildcards are not accepted; use a prefix length",
        _wildcard,
    ),
    (
        _LEADING_ZERO,
        "a number with a leading zero is octal to some programs and decimal to others",
        lambda _: "",
    ),
)


def _why(text: str) -> _Refusal:
    """Return the reason why a text of bounded length was refused, and the hint or None."""
    if several := _more_than_one(text):
        return several, None
    for pattern, reason, without in _NOTATIONS:
        if pattern.search(text):
            return reason, _accepted(without(text))
    if "/" in text:
        return _why_not_network(text)
    if "-" in text:
        return _why_not_run(text)
    if re.fullmatch(r"[0-9.]+", text):
        return "an IPv4 address is four numbers from 0 to 255", None
    return _NEITHER, None


def _accepted(text: str) -> str | None:
    """Return the canonical text of a restriction that is accepted; None for anything else."""
    found = _read(text)
    return None if found is None or _unfit(*found) else str(_range(*found))


def _more_than_one(text: str) -> str | None:
    """Return the reason if the text is several addresses, as pasted from a column or a list."""
    parts = [part for part in _BETWEEN.split(text) if part]
    # An address followed by its netmask is one network, in a notation that is refused.
    if len(parts) < 2 or parts[1].startswith("255.") or not all(map(_accepted, parts)):
        return None
    return f"it holds {len(parts)} addresses; enter them one at a time"


def _why_not_network(text: str) -> _Refusal:
    head, _, prefix = text.partition("/")
    address, mask, bits = login_address(head), login_address(prefix), 128 if ":" in head else 32
    if address is None:
        return _why_not_part(head), None
    if mask is not None:
        # All zeros and all ones have opposite meanings as a netmask and as a hostmask.
        clear = mask[1] not in (0, 2**32 - 1)
        hint = _accepted(_lenient_network(head, prefix)) if clear else None
        return "masks are not accepted; use a prefix length", hint
    if not _PREFIX.fullmatch(prefix) or int(prefix) > bits:
        return f"its prefix length is not a decimal number from 0 to {bits}", None
    if bits == 128 and address[0] == 4 and int(prefix) < 96:
        hint = _accepted(f"{_written(*address)}/{prefix}")
        return "the prefix length of an IPv4-mapped network is 96 or more", hint
    return "it has host bits set", _accepted(_lenient_network(head, prefix))


def _lenient_network(head: str, prefix: str) -> str:
    try:
        return str(ip_network(f"{head}/{prefix}", strict=False))
    except ValueError:
        return ""


def _why_not_run(text: str) -> _Refusal:
    start, _, end = text.partition("-")
    first, last = login_address(start), login_address(end)
    if first is None:
        return _why_not_part(start), None
    if last is None and re.fullmatch(r"[0-9]+", end):
        whole = f"{start.rpartition('.')[0]}.{end}"
        return "the end of a range is a whole address", _accepted(f"{start}-{whole}")
    if last is None:
        return _why_not_part(end), None
    if (":" in start) != (":" in end):
        hint = _accepted(f"{_written(*first)}-{_written(*last)}")
        return "its ends are of different versions", hint
    if first[0] != last[0]:
        return "one of its ends is IPv4-mapped, the other is not", None
    return "it runs backwards", _accepted(f"{end}-{start}")


def _why_not_part(text: str) -> str:
    """Explain one side of a slash or a hyphen, which should be one address and is not."""
    return _why(text)[0] if text and not re.search("[-/]", text) else _NEITHER
