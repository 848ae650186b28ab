"""Why a text was refused, and what was perhaps meant.

Nothing here decides what is accepted: whatever is proposed goes through the strict reader again,
so a hint is always text that would be accepted. That is why the lenient `ipaddress` may help.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_network

from ipguard.addresses._text import BLANKS, LEADING_ZERO, login_address, written

#: Gives the canonical text of what would be accepted, None for anything else.
Accepted = Callable[[str], str | None]
Refusal = tuple[str, str | None]

_NEITHER = "it is no address, network or first-last range"
_AROUND = re.compile(rf"[{BLANKS}]*([-/])[{BLANKS}]*")
_BETWEEN = re.compile(rf"[{BLANKS},;]+")
_PREFIX = re.compile(r"0|[1-9][0-9]{0,2}")


def _wildcard(text: str) -> str:
    known = re.findall(r"[0-9]+", text)
    return f"{'.'.join([*known, '0', '0', '0'][:4])}/{8 * len(known)}"


# Habits of writing that are refused wherever they occur: how one is known, what is wrong with it,
# and how the text reads without it. A leading zero has no such reading: it may be octal, or not.
_HABITS: tuple[tuple[re.Pattern[str], str, Callable[[str], str]], ...] = (
    (
        re.compile(f"[{BLANKS}]"),
        "it has a blank at an end or inside",
        lambda text: _AROUND.sub(r"\1", text.strip(BLANKS)),
    ),
    (
        re.compile(r"[^\x21-\x7e]"),
        "it has characters that no address has",
        lambda text: text.replace("\N{EN DASH}", "-"),
    ),
    (
        re.compile(r"%"),
        "a zone means something on one machine only",
        lambda text: re.sub(r"%[^-/]*", "", text),
    ),
    (
        re.compile(r"^\[[^]]*\](?::[0-9]+)?$|^[0-9.]+:[0-9]+$"),
        "brackets and a port are no part of an address",
        lambda text: text[1:].partition("]")[0] if text[0] == "[" else text.partition(":")[0],
    ),
    (
        re.compile(r"^(?:[0-9]+\.){1,3}\*(?:\.\*)*$"),
        "a wildcard is not read; use a prefix length",
        _wildcard,
    ),
    (
        LEADING_ZERO,
        "a number with a leading zero is octal to some programs and decimal to others",
        lambda _: "",
    ),
)


def why(text: str, accepted: Accepted) -> Refusal:
    """Explain a text of bounded length that was refused: the reason, and the hint or None."""
    if several := more_than_one(text, accepted):
        return several, None
    for habit, reason, without in _HABITS:
        if habit.search(text):
            return reason, accepted(without(text))
    if "/" in text:
        return _no_network(text, accepted)
    if "-" in text:
        return _no_range(text, accepted)
    if re.fullmatch(r"[0-9.]+", text):
        return "an IPv4 address is four numbers from 0 to 255", None
    return _NEITHER, None


def more_than_one(text: str, accepted: Accepted) -> str | None:
    """Return the reason for a text of several addresses, as from a column or a list; else None."""
    parts = [part for part in _BETWEEN.split(text) if part]
    # An address and its netmask are one network, in a notation that is not read.
    if len(parts) < 2 or parts[1].startswith("255.") or not all(map(accepted, parts)):
        return None
    return f"it holds {len(parts)} addresses; enter them one at a time"


def _no_network(text: str, accepted: Accepted) -> Refusal:
    head, _, prefix = text.partition("/")
    address, mask, bits = login_address(head), login_address(prefix), 128 if ":" in head else 32
    if address is None:
        return _no_part(head, accepted), None
    if mask is not None:
        # All zeros and all ones mean the opposite as a netmask and as a hostmask.
        clear = mask[1] not in (0, 2**32 - 1)
        hint = accepted(_network(head, prefix)) if clear else None
        return "a mask is not read; use a prefix length", hint
    if not _PREFIX.fullmatch(prefix) or int(prefix) > bits:
        return f"its prefix length is not a decimal number from 0 to {bits}", None
    if bits == 128 and address[0] == 4 and int(prefix) < 96:
        hint = accepted(f"{written(*address)}/{prefix}")
        return "the prefix length of an IPv4-mapped network is 96 or more", hint
    return "it has host bits set", accepted(_network(head, prefix))


def _network(head: str, prefix: str) -> str:
    try:
        return str(ip_network(f"{head}/{prefix}", strict=False))
    except ValueError:
        return ""


def _no_range(text: str, accepted: Accepted) -> Refusal:
    start, _, end = text.partition("-")
    first, last = login_address(start), login_address(end)
    if first is None:
        return _no_part(start, accepted), None
    if last is None and re.fullmatch(r"[0-9]+", end):
        whole = f"{start.rpartition('.')[0]}.{end}"
        return "the end of a range is a whole address", accepted(f"{start}-{whole}")
    if last is None:
        return _no_part(end, accepted), None
    if (":" in start) != (":" in end):
        hint = accepted(f"{written(*first)}-{written(*last)}")
        return "its ends are of different versions", hint
    if first[0] != last[0]:
        return "one of its ends is IPv4-mapped, the other is not", None
    return "it runs backwards", accepted(f"{end}-{start}")


def _no_part(text: str, accepted: Accepted) -> str:
    """Explain one side of a slash or a hyphen, which should be one address and is not."""
    return why(text, accepted)[0] if text and not re.search("[-/]", text) else _NEITHER
