"""Find the client's address behind trusted proxies. Pure: text in, text out.

Each proxy appends the peer that it saw to the right of a header, and whatever the client sent is on
the left. So the search begins at the connection's peer, reads the header from the right, and stops
at the first address that is not a trusted proxy. Nothing on the left of that is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import attrs

from ipguard._checks import check_switch, check_whole
from ipguard.addresses import AddressRange, AddressSet, canonical_address
from ipguard.errors import AddressError, InvalidValue

__all__ = ["ClientAddress", "Hop"]

_LONGEST: Final = 4096  # how much of a header is read, from the right; a client may send megabytes
_MOST_HOPS: Final = 50
_UNIX: Final = "unix:"  # how nginx writes the peer of a Unix socket
_NAME: Final = re.compile(r"[A-Za-z0-9-]+")
# One address, or one in brackets or with a port; RFC 7239 section 6 also has obfuscated ports.
_NODE: Final = re.compile(
    r"(?:\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]|([0-9.]+))(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?"
    r"|([0-9A-Fa-f:.]+)"
)
# With the lookbehind, a run of backslashes is scanned once.
_MARK: Final = re.compile(r'(?<!\\)(\\*)"|[,;]')
_EVERYWHERE: Final = frozenset(map(AddressRange.parse, ("0.0.0.0/0", "::/0")))


@attrs.frozen
class Hop:
    """One step of the search: the connection's peer, or one entry of the header.

    Attributes:
        text: The step as received.
        address: Its canonical address; empty if it is not an address.
        trusted: Whether the search goes on to the left. Otherwise `address` is the result.
        reason: Why, in a few words.
    """

    text: str
    address: str
    trusted: bool
    reason: str


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidValue("header", "must be the name of a header: letters, digits and hyphens")
    return value


def _proxies(value: Iterable[str] | None) -> AddressSet | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise InvalidValue("proxies", "must be a list of addresses or networks, not one text")
    found = AddressSet(map(AddressRange.parse, value))
    for run in found:  # merged: two halves of all addresses are found, too
        if run in _EVERYWHERE:
            raise AddressError(str(run), "every client would be a trusted proxy")
    return found


def _hops(value: int | None) -> int | None:
    return None if value is None else check_whole("hops", value, 0, _MOST_HOPS)


@attrs.frozen(kw_only=True)
class ClientAddress:
    """Where a request comes from, as your trusted proxies report it.

    Give either `proxies` or `hops`. Prefer `proxies`: a count is wrong for a client that can reach
    an inner proxy, or the server itself, directly.

    Attributes:
        header: The header that the proxies write: `X-Forwarded-For`, `Forwarded` (RFC 7239), or
            one with a single value such as `X-Real-IP`, whose last value counts. Your proxies must
            append to it or replace it.
        proxies: The addresses and networks of the trusted proxies, written as a restriction is.
            None of your users may come from them. Without any, the peer is the client.
        hops: The number of proxies, from 0 to 50, each of which must write the header.
        unix_socket: Whether the peer of a Unix socket is a trusted proxy. Servers report it as
            `None`, empty text or `unix:`.

    Raises:
        AddressError: A proxy is not an address or a network, or the proxies are all addresses.
        InvalidValue: Another argument makes no sense.
    """

    header: str = attrs.field(default="X-Forwarded-For", converter=_name)
    proxies: AddressSet | None = attrs.field(default=None, converter=_proxies)
    hops: int | None = attrs.field(default=None, converter=_hops)
    unix_socket: bool = False

    def __attrs_post_init__(self) -> None:
        check_switch("unix_socket", self.unix_socket)
        if (self.proxies is None) == (self.hops is None):
            raise InvalidValue("proxies", "must be given, or else hops, but not both")

    def of(self, peer: str | None, values: Iterable[str]) -> str:
        """Return the client's canonical address.

        Args:
            peer: The connection's peer as the server reports it, before any middleware or option
                of the server has replaced it.
            values: The header's values in order; empty if there is none.

        Returns:
            The address, or `""`, which no guard lets in, if it cannot be known.
        """
        *_, last = self._search(peer, values)
        return "" if last.trusted else last.address

    def explain(self, peer: str | None, values: Iterable[str]) -> tuple[Hop, ...]:
        """Return each step of the search that `of` makes.

        If the last hop is trusted, the header names no client, and `of` returns `""`.
        """
        return tuple(self._search(peer, values))

    def asgi(self, scope: Mapping[str, Any]) -> str:
        """Return the client's address of an ASGI connection scope, as `of` does."""
        wanted = self.header.lower().encode()
        headers = scope.get("headers", ())
        values = [value.decode("latin-1") for name, value in headers if name.lower() == wanted]
        return self.of((scope.get("client") or (None,))[0], values)

    def wsgi(self, environ: Mapping[str, Any]) -> str:
        """Return the client's address of a WSGI environ (Django: `request.META`), as `of` does."""
        value = environ.get(f"HTTP_{self.header.upper().replace('-', '_')}")
        return self.of(environ.get("REMOTE_ADDR"), () if value is None else (value,))

    def _search(self, peer: str | None, values: Iterable[str]) -> Iterator[Hop]:
        values = [values] if isinstance(values, str) else list(values)
        entries, start = _entries(values), 1
        if self.header.lower() == "forwarded":
            entries = map(_forwarded_for, entries)
        elif self.header.lower() != "x-forwarded-for":  # one value: what the last proxy wrote
            entries, start = islice(entries, 1), self.hops or 1
        hop = self._judge(_UNIX if peer is None or peer == "" else peer, 0)
        yield hop
        for place, text in enumerate(entries, start):
            if not hop.trusted:
                return
            hop = self._judge(text, place)
            yield hop

    def _judge(self, text: object, place: int) -> Hop:
        """Judge one step; the peer has the place 0, the rightmost entry 1."""
        if not isinstance(text, str):
            return Hop(type(text).__name__, "", trusted=False, reason="not an address")
        counted = self.hops is not None and place < self.hops
        if text == _UNIX and (counted or self.proxies is not None):
            why = "a trusted Unix socket" if self.unix_socket else "an untrusted Unix socket"
            return Hop(text, "", trusted=self.unix_socket, reason=why)
        address = _address(text)
        if not address:
            return Hop(text, "", trusted=False, reason="not an address")
        if self.proxies is None:
            why = f"proxy {place + 1} of {self.hops}" if counted else "the client, by the count"
            return Hop(text, address, trusted=counted, reason=why)
        trusted = address in self.proxies
        why = "a trusted proxy" if trusted else "the client, as it is not a trusted proxy"
        return Hop(text, address, trusted=trusted, reason=why)


def _address(text: str) -> str:
    """Return the canonical address of an entry, without its port and brackets, or empty text."""
    found = _NODE.fullmatch(text)
    if found is None:
        return ""
    return canonical_address(next(filter(None, found.groups())))


def _entries(values: list[str]) -> Iterator[str]:
    """Yield a header's entries from right to left, as far as `_LONGEST` characters reach."""
    left = _LONGEST
    for value in reversed(values):
        entries = _split(value[-left:], ",")
        if len(value) > left:
            entries.pop()  # its beginning was cut off
        for entry in entries:
            yield entry.strip(" \t")
        left -= len(value) + 1
        if left <= 0:
            return


def _split(text: str, separator: str) -> list[str]:
    """Split outside of quoted strings, the rightmost part first.

    Quotes are paired from the right: a client that sends a single quote on the left must not hide
    the entries of the proxies in a quoted string. X-Forwarded-For has no quoted strings; there an
    entry with a quote is not an address, and ends the search.
    """
    parts, end, inside = [], len(text), False
    for mark in reversed(list(_MARK.finditer(text))):
        if mark[1] is not None:
            inside ^= len(mark[1]) % 2 == 0  # after an odd number of backslashes it is escaped
        elif mark[0] == separator and not inside:
            parts.append(text[mark.end() : end])
            end = mark.start()
    return [*parts, text[:end]]


def _forwarded_for(entry: str) -> str:
    """Return the `for` of an element of Forwarded; empty text if there is none, or several."""
    pairs = (part.strip(" \t").partition("=") for part in _split(entry, ";"))
    found = [value for name, _, value in pairs if name.lower() == "for"]
    if len(found) != 1:
        return ""
    quoted = re.fullmatch(r'"([^"\\]*)"', found[0])
    return quoted[1] if quoted else found[0]
