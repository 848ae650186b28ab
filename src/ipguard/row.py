"""What decides about one user, in few bytes: pack a policy, and decide logins by it.

A row has, in this order:

* one byte of flags: 1 registered, 2 no restrictions, 4 temporary restrictions at the end;
* the numbers of permanent IPv4 and IPv6 restrictions, 2 bytes each;
* their first and last addresses: 4 bytes each for IPv4, then 16 bytes each for IPv6;
* their ids in UTF-8, separated by zero bytes;
* for temporary restrictions a zero byte, then for each: the length of an address, the first and the
  last address, the expiry (8 signed bytes, microseconds since 1970-01-01 UTC), the length of the id
  (2 bytes), the id.

Within each part IPv4 comes before IPv6, and the older restriction before the newer. Numbers and
addresses are in network order, in which addresses compare as bytes. A zero byte within an id is
written as C0 80, which UTF-8 never uses. Fields that affect no login, such as the label, are left
out.

`rules.decide` is the same decision for values that people look at; a test compares the two.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from struct import Struct, error
from typing import Final, final

from ipguard.addresses import AddressRange, AddressSet
from ipguard.model import Policy, Reason

__all__ = ["Column", "pack", "pack_columns"]

Column = tuple[str, bytes, bytes, int | None]
"""A restriction's id, first and last address, and expiry in microseconds since 1970 or None."""

# Looking a member up in its enumeration takes longer than comparing an address.
_LISTED, _NOT_LISTED = Reason.LISTED, Reason.NOT_LISTED
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_REGISTERED, _OPEN, _UNKNOWN, _PENDING = 1, 2, 8, 16
TEMPORARY: Final = 4
"""The flag, in the first byte, of temporary restrictions: the decision may need the time."""
_HEADER: Final = Struct(">BHH")
_START: Final = _HEADER.size
_FEW: Final = 8
"""Up to how many restrictions of a kind are compared one by one: sorting them would not pay."""


def checked(data: bytes, *, deny_unknown: bool = False) -> bytes:
    """Return the row of packed bytes.

    Args:
        data: From `pack`.
        deny_unknown: Whether to refuse users who are not registered.

    Returns:
        The same bytes, `UNKNOWN`, or a `LongRow`.

    Raises:
        ValueError: The bytes are not from `pack`.
    """
    if len(data) < _START or data[0] > _REGISTERED | _OPEN | TEMPORARY:
        raise ValueError("packed by something else")
    flags, ipv4, ipv6 = _HEADER.unpack_from(data)
    if deny_unknown and not flags & _REGISTERED:
        return UNKNOWN
    if len(data) < _START + 8 * ipv4 + 32 * ipv6:
        raise ValueError("packed by something else")
    return data if ipv4 <= _FEW and ipv6 <= _FEW else LongRow(data)


def is_registered(row: bytes) -> bool:
    """Return whether the user is registered."""
    return bool(row[0] & _REGISTERED)


def is_restricted(row: bytes) -> bool:
    """Return whether the user has restrictions."""
    return not row[0] & (_OPEN | _UNKNOWN)


def lists(row: bytes, address: bytes) -> bool:
    """Return whether a permanent restriction lists an address.

    Args:
        row: From `checked`.
        address: The 4 or 16 bytes of `pack_address`.
    """
    if type(row) is LongRow:
        return row.lists(address)
    # Written out: a login waits for this. Up to `_FEW`, the low byte is the whole number.
    if len(address) == 4:
        at, end = _START, _START + 8 * row[2]
        while at < end:
            if row[at : at + 4] <= address <= row[at + 4 : at + 8]:
                return True
            at += 8
    else:
        at = _START + 8 * row[2]
        end = at + 32 * row[4]
        while at < end:
            if row[at : at + 16] <= address <= row[at + 16 : at + 32]:
                return True
            at += 32
    return False


def otherwise(row: bytes) -> Reason | None:
    """Return why an address is allowed or denied that no permanent restriction lists.

    None if that depends on the time, or if the row must be read again.
    """
    flags = row[0]
    if flags <= _REGISTERED:
        return _NOT_LISTED
    if flags & _OPEN:
        return Reason.UNRESTRICTED
    return Reason.UNKNOWN_USER if flags & _UNKNOWN else None


def decide(row: bytes, address: bytes, now: datetime | None) -> tuple[Reason, str | None]:
    """Decide, and find the restriction that lists the address.

    Permanent restrictions come before temporary ones, older before newer ones.

    Args:
        row: From `checked`.
        address: As for `lists`.
        now: The store's time. None only if the row is not `TEMPORARY`.

    Returns:
        The reason, and the id of the restriction or None.
    """
    _, ipv4, ipv6 = _HEADER.unpack_from(row)
    middle = _START + 8 * ipv4
    names = middle + 32 * ipv6
    size = len(address)
    at, end, index = (_START, middle, 0) if size == 4 else (middle, names, ipv4)
    if type(row) is LongRow and not row.lists(address):
        at = end
    while at < end:
        if row[at : at + size] <= address <= row[at + size : at + 2 * size]:
            return _LISTED, _decoded(row[names:].split(b"\0", index + 1)[index])
        at += 2 * size
        index += 1
    reason = otherwise(row)
    if reason is not None:
        return reason, None
    if now is None:
        raise ValueError("the time decides")
    temporary = row[names:].split(b"\0", max(1, ipv4 + ipv6))[-1]
    listed = _listed_until_later(temporary, address, (now - _EPOCH) // _MICROSECOND)
    return (_NOT_LISTED if listed is None else _LISTED), listed


def _listed_until_later(data: bytes, address: bytes, now: int) -> str | None:
    """Return the id of the oldest temporary restriction that lists an address, or None."""
    at = 0
    while at < len(data):
        size = data[at]
        middle = at + 1 + size
        expiry = middle + size
        start = expiry + 10
        end = start + int.from_bytes(data[expiry + 8 : start], "big")
        if (
            len(address) == size
            and data[at + 1 : middle] <= address <= data[middle:expiry]
            and int.from_bytes(data[expiry : expiry + 8], "big", signed=True) > now
        ):
            return _decoded(data[start:end])
        at = end
    return None


@final
class LongRow(bytes):
    """The row of a user with many restrictions, which keeps sorted bounds beside the bytes."""

    def __init__(self, data: bytes) -> None:  # noqa: ARG002 - the bytes are set already
        _, ipv4, ipv6 = _HEADER.unpack_from(self)
        middle = _START + 8 * ipv4
        self._bounds = {
            4: self._sorted(_START, middle, 4),
            16: self._sorted(middle, middle + 32 * ipv6, 16),
        }

    def _sorted(self, start: int, end: int, size: int) -> tuple[int, ...]:
        ranges = AddressSet(
            AddressRange.from_packed(self[at : at + size], self[at + size : at + 2 * size])
            for at in range(start, end, 2 * size)
        )
        return ranges.bounds(4 if size == 4 else 6)

    def lists(self, address: bytes) -> bool:
        """Return whether a permanent restriction lists an address."""
        value = int.from_bytes(address, "big")
        return bisect_right(self._bounds[len(address)], value) & 1 == 1


def _encoded(restriction_id: str) -> bytes:
    return restriction_id.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogatepass")


def pack_columns(registered: bool, columns: Iterable[Column]) -> bytes:  # noqa: FBT001 - a flag
    """Pack a user's restrictions.

    Args:
        registered: Whether the user is registered.
        columns: The restrictions, oldest first.

    Raises:
        ValueError: An address has another length than 4 or 16 bytes, or there are more than 65,535
            restrictions of one kind.
    """
    addresses: dict[int, list[bytes]] = {4: [], 16: []}
    ids: dict[int, list[str]] = {4: [], 16: []}
    temporary: dict[int, list[bytes]] = {4: [], 16: []}
    for restriction_id, first, last, expiry in columns:
        size = len(first)
        if len(last) != size or size not in ids:
            raise ValueError("an address has 4 or 16 bytes")
        if expiry is None:
            ids[size].append(restriction_id)
            addresses[size] += (first, last)
        else:
            name = _encoded(restriction_id)
            temporary[size] += (
                bytes((size,)),
                first,
                last,
                expiry.to_bytes(8, "big", signed=True),
                len(name).to_bytes(2, "big"),
                name,
            )
    flags = _REGISTERED if registered else 0
    tail = temporary[4] + temporary[16]
    if tail:
        flags |= TEMPORARY
        tail.insert(0, b"\0")
    permanent = ids[4] + ids[16]
    if not (permanent or tail):
        flags |= _OPEN
    try:
        header = _HEADER.pack(flags, len(ids[4]), len(ids[16]))
    except error:
        raise ValueError("more than 65,535 restrictions of one kind") from None
    names = "\0".join(permanent).encode("utf-8", "surrogatepass")
    if names.count(b"\0") >= max(1, len(permanent)):  # within an id
        names = b"\0".join(map(_encoded, permanent))
    return b"".join((header, *addresses[4], *addresses[16], names, *tail))


def pack(policy: Policy) -> bytes:
    """Pack a policy, without its revision.

    Raises:
        TypeError: The restrictions are not a tuple: None would read as unrestricted.
        ValueError: As for `pack_columns`.
    """
    if not isinstance(policy.restrictions, tuple):
        raise TypeError("restrictions must be a tuple: None would read as unrestricted")
    return pack_columns(
        policy.known,
        (
            (
                each.id,
                *each.addresses.packed,
                None if each.expires_at is None else (each.expires_at - _EPOCH) // _MICROSECOND,
            )
            for each in policy.restrictions
        ),
    )


OPEN: Final = _HEADER.pack(_OPEN, 0, 0)
"""The row of a user without restrictions."""
UNKNOWN: Final = _HEADER.pack(_UNKNOWN, 0, 0)
"""The row of a user who is refused because nobody registered them."""
PENDING: Final = _HEADER.pack(_PENDING, 0, 0)
"""The row of a user whose policy must be read again."""
