"""Pack a policy into few bytes, for guards that hold every restricted user.

The first byte is 1 if the user is registered, else 0. Then, for each restriction, oldest first:

* one byte of flags: 1 for IPv6, 2 for an expiry;
* the first and the last address, 4 or 16 bytes each, in network order;
* the expiry, if there is one: 8 signed bytes, microseconds since 1970-01-01 UTC;
* the id in UTF-8, and a zero byte.

Fields that affect no login, such as the label, are left out.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from ipguard.addresses import AddressRange
from ipguard.model import Policy, Restriction

__all__ = ["pack", "unpack"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_IPV6: Final = 1
_EXPIRES: Final = 2


def pack(policy: Policy) -> bytes:
    """Pack a policy, without its revision.

    Raises:
        ValueError: An id has a NUL or a lone surrogate.
    """
    parts = [b"\1" if policy.known else b"\0"]
    for restriction in policy.restrictions:
        expires_at = restriction.expires_at
        flags = _IPV6 if restriction.addresses.version == 6 else 0
        if expires_at is not None:
            flags |= _EXPIRES
        parts.append(bytes((flags,)))
        parts += restriction.addresses.packed
        if expires_at is not None:
            since = (expires_at - _EPOCH) // _MICROSECOND
            parts.append(since.to_bytes(8, "big", signed=True))
        name = restriction.id.encode()
        if b"\0" in name:
            raise ValueError("an id with a NUL cannot be packed")
        parts.append(name + b"\0")
    return b"".join(parts)


def unpack(packed: bytes, username: str, revision: int) -> Policy:
    """Return a policy that decides like the packed one.

    Args:
        packed: The bytes from `pack`.
        username: The user, canonical.
        revision: The revision of the policy.

    Returns:
        The policy. Its restrictions have no label, creator or creation time.

    Raises:
        ValueError: The bytes are not from `pack`.
    """
    if packed[:1] not in (b"\0", b"\1"):
        raise ValueError("packed by something else")
    restrictions, at = [], 1
    while at < len(packed):
        flags = packed[at]
        if flags > _IPV6 | _EXPIRES:
            raise ValueError("packed by something else")
        length = 16 if flags & _IPV6 else 4
        first, last, rest = at + 1, at + 1 + length, at + 1 + 2 * length
        expires_at = None
        if flags & _EXPIRES:
            since = int.from_bytes(packed[rest : rest + 8], "big", signed=True)
            try:
                expires_at = _EPOCH + since * _MICROSECOND
            except OverflowError:
                raise ValueError("packed by something else") from None
            rest += 8
        end = packed.index(b"\0", rest)
        restrictions.append(
            Restriction(
                id=packed[rest:end].decode(),
                username=username,
                addresses=AddressRange.from_packed(
                    packed[first:last], packed[last : last + length]
                ),
                label="",
                created_at=_EPOCH,
                created_by="",
                expires_at=expires_at,
            )
        )
        at = end + 1
    return Policy(revision=revision, restrictions=tuple(restrictions), known=packed[:1] == b"\1")
