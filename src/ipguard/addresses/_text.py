"""One address between text and number: a login's address is read, a canonical one written."""

from __future__ import annotations

import re
import socket
import sys
from socket import inet_pton
from typing import cast

from ipguard.errors import AddressError

LONGEST_ADDRESS = len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255")
LONGEST = 2 * LONGEST_ADDRESS + 1
BLANKS = " \t\n\r\v\f"

# Plain numbers: what the socket module has under these names takes longer to hand over.
_AF_INET, _AF_INET6 = int(socket.AF_INET), int(socket.AF_INET6)

#: Not every C library is strict here: some read a leading zero, as decimal or as octal.
LEADING_ZERO = re.compile(r"\.0[0-9]|(?:^|:)0[0-9]+\.")
_ZEROS = re.compile(r"\b0(?::0)+")


def plain(text: object, longest: int) -> str | None:
    """Give a real `str` of bounded length; a subclass's own methods are never asked."""
    if not issubclass(type(text), str) or str.__len__(cast(str, text)) > longest:
        return None
    return str.__str__(cast(str, text))


def bounded(text: object) -> str:
    """Give text that is worth parsing, or refuse it at once.

    Raises:
        AddressError: It is not text, or longer than any address, network or range.
    """
    if not issubclass(type(text), str):
        raise AddressError(text, "it is not text")
    start = str.__getitem__(cast(str, text), slice(LONGEST + 1))
    if len(start) > LONGEST:
        raise AddressError(start, "it is longer than any address, network or range")
    return start


def reads_leading_zeros() -> bool:
    """Tell whether this C library reads a leading zero, in either family."""
    for family, text in ((_AF_INET, "1.2.3.04"), (_AF_INET6, "::1.2.3.04")):
        try:
            inet_pton(family, text)
        except OSError:
            continue
        return True
    return False


#: Asked once: to look for a leading zero in each address would take as long as reading it.
LENIENT = reads_leading_zeros()


def _checked_pton(family: int, text: str) -> bytes:
    if LEADING_ZERO.search(text) or "%" in text:
        raise ValueError("no C library has to read this")
    return inet_pton(family, text)


#: `inet_pton(family, text)` that raises OSError or ValueError for all that `login_address` refuses,
#: for who has to be quicker than that; what is IPv4-mapped is still IPv6 here.
strict_pton = inet_pton if sys.platform == "linux" and not LENIENT else _checked_pton


def login_address(text: object) -> tuple[int, int] | None:
    """Read a login's address; never raise, whatever a client sent.

    Args:
        text: The client's address as `str`. Blanks, zones, ports and prefixes are no part of one.

    Returns:
        The version, 4 or 6, and the address as an integer, IPv4-mapped as IPv4;
        None where the text is anything but one valid address.
    """
    if type(text) is not str or len(text) > LONGEST_ADDRESS:
        exact = plain(text, LONGEST_ADDRESS)
        return None if exact is None else login_address(exact)
    if LENIENT and LEADING_ZERO.search(text):
        return None
    try:
        if ":" not in text:
            return 4, int.from_bytes(inet_pton(_AF_INET, text), "big")
        if "%" in text:  # macOS reads a zone; it names a link of a machine that is not this one
            return None
        value = int.from_bytes(inet_pton(_AF_INET6, text), "big")
    except (OSError, ValueError):  # ValueError: a NUL or a surrogate inside
        return None
    return (4, value & 0xFFFFFFFF) if value >> 32 == 0xFFFF else (6, value)


def written(version: int, value: int) -> str:
    """Write one address; IPv6 as RFC 5952 section 4 has it, the same on every platform."""
    if version == 4:
        return ".".join(str(byte) for byte in value.to_bytes(4, "big"))
    groups = ":".join(f"{value >> shift & 0xFFFF:x}" for shift in range(112, -16, -16))
    longest = max(_ZEROS.finditer(groups), key=lambda zeros: len(zeros[0]), default=None)
    if longest is None:
        return groups
    return f"{groups[: longest.start()].rstrip(':')}::{groups[longest.end() :].lstrip(':')}"
