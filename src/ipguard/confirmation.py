"""Mint, digest and compare confirmation numbers.

A number is short, so a plain hash could be inverted by trying all numbers. A store therefore keeps
an HMAC-SHA256 under a key that no store holds (OWASP ASVS 4.0.3 2.7.5). The digest covers the
change, so that the number of one change cannot confirm another (OWASP Transaction Authorization
2.6, 2.10).
"""

from __future__ import annotations

import hmac
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

from ipguard.errors import InvalidValue, NumberFormatError, shorten

__all__ = ["Keyring", "format_number", "mint", "parse_number"]

_KEY_BYTES: Final = 32
_GROUP: Final = 5
_LONGEST_TYPED: Final = 256
_IGNORED_CATEGORIES: Final = frozenset({"Cf", "Pd"})
# Dashes and invisible characters that Unicode puts in other categories: minus signs, the hyphen
# bullet, the long-vowel mark that a Japanese keyboard types for a hyphen; fillers, joiners,
# variation selectors, the blank Braille pattern.
_IGNORED: Final = frozenset(
    "\u02d7\u2043\u2212\u30fc\u034f\u115f\u1160\u2800" + "".join(map(chr, range(0xFE00, 0xFE10)))
)


def mint(digits: int) -> str:
    """Return a random number of `digits` digits, from the system's secure source.

    ASVS 5.0 6.5.4 requires 20 bits: 7 digits.
    """
    return f"{secrets.randbelow(10**digits):0{digits}d}"


def format_number(number: str) -> str:
    """Return the number in groups of five digits, for people: `49201-77340`."""
    return "-".join(number[i : i + _GROUP] for i in range(0, len(number), _GROUP))


def parse_number(text: str, digits: int) -> str:
    """Read a number as a person typed or pasted it.

    Spaces, dashes and invisible characters are ignored: mail programs and clipboards add them.
    Decimal digits of any script are accepted, such as the full-width digits of a Japanese keyboard.
    Any other text cannot be a mailed number, so it is a typing error and not a guess.

    Returns:
        ASCII digits, exactly as many as `digits`.

    Raises:
        NumberFormatError: The text cannot be a number of that length.
    """
    if len(text) > _LONGEST_TYPED:  # this runs under the writer's lock: bound the work
        raise NumberFormatError(digits, f"must have {digits} digits; this is far longer")
    read = ""
    for char in unicodedata.normalize("NFKC", text):
        if char.isspace() or char in _IGNORED or unicodedata.category(char) in _IGNORED_CATEGORIES:
            continue
        value = unicodedata.decimal(char, None)
        if value is None:
            raise NumberFormatError(
                digits, f"must have {digits} digits only; {shorten(char)} is not a digit"
            )
        read += str(value)
    if len(read) != digits:
        raise NumberFormatError(digits, f"must have {digits} digits, not {len(read)}")
    return read


class Keyring:
    """The keys of the digests: the first mints, all verify. They are never stored or shown.

    Args:
        keys: One key of at least 32 bytes, or several, newest first.

    Raises:
        InvalidValue: The keys are empty, not bytes, or too short.
    """

    def __init__(self, keys: bytes | Sequence[bytes]) -> None:
        ring = (keys,) if isinstance(keys, (bytes, bytearray, memoryview)) else tuple(keys)
        if not ring:
            raise InvalidValue("key", "there must be at least one key")
        for key in ring:
            if not isinstance(key, (bytes, bytearray, memoryview)):
                raise InvalidValue("key", f"must be bytes, not {type(key).__name__}")
            if len(bytes(key)) < _KEY_BYTES:
                raise InvalidValue("key", f"must have at least {_KEY_BYTES} bytes")
        # The store identifies a key by a digest, which distinguishes a number minted under a
        # withdrawn key from a wrong guess.
        self._keys = {_hmac(bytes(key), [b"ipguard key id"])[:8]: bytes(key) for key in ring}
        self.minting: bytes = next(iter(self._keys))

    def __repr__(self) -> str:
        return f"<Keyring of {len(self._keys)}>"

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._keys

    def derive(self, purpose: str) -> tuple[bytes, ...]:
        """Derive a key of 32 bytes for another purpose from each key of this ring, in order."""
        fields = [b"ipguard derived key", purpose.encode()]
        return tuple(_hmac(key, fields) for key in self._keys.values())

    def digest(self, key_id: bytes, number: str, subject: Iterable[str]) -> bytes:
        """Digest a number and the fields of the change that it confirms, to 32 bytes.

        Raises:
            KeyError: The key is not in this ring.
        """
        # The fields of a stored request may hold lone surrogates.
        fields = [text.encode("utf-8", "surrogatepass") for text in (number, *subject)]
        return _hmac(self._keys[key_id], fields)

    def matches(self, key_id: bytes, digest: bytes, number: str, subject: Iterable[str]) -> bool:
        """Return whether a number has a stored digest, in constant time; raise as `digest` does."""
        return hmac.compare_digest(digest, self.digest(key_id, number, subject))


def _hmac(key: bytes, fields: Iterable[bytes]) -> bytes:
    """HMAC-SHA256 over length-prefixed fields, so that their boundaries are unambiguous."""
    mac = hmac.new(key, digestmod="sha256")
    for field in fields:
        mac.update(len(field).to_bytes(8, "big"))
        mac.update(field)
    return mac.digest()
