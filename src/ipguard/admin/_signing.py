"""What the page signs: CSRF tokens, short-lived cookies, and state that it keeps in URLs.

The keys are derived from the workflow's, so every server behind a balancer accepts what any of them
signed, and keys can be rotated.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import secrets
from collections.abc import Sequence
from typing import Final

_MAC: Final = 32
_LONGEST: Final = 8_192
PURPOSE: Final = "ipguard.admin"


def random_text() -> str:
    """Return 128 random bits as text."""
    return secrets.token_urlsafe(16)


class Signer:
    """Signs and verifies.

    Args:
        keys: The first signs, all verify.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)

    def __repr__(self) -> str:
        return f"<Signer of {len(self._keys)} keys>"

    def sign(self, purpose: str, value: bytes, *bound: str) -> str:
        """Return a text that holds a value and the proof that this page made it.

        Args:
            purpose: What it is for.
            value: What it says; not hidden from whoever has the text.
            bound: What must be the same again when it is verified: the actor, the browser.
        """
        mac = _mac(self._keys[0], purpose, value, bound)
        return _text(mac + value)

    def verify(self, purpose: str, text: str, *bound: str) -> bytes | None:
        """Return the value of a text that `sign` made with these very arguments, else None."""
        given, value = _split(text)
        right = [hmac.compare_digest(given, _mac(key, purpose, value, bound)) for key in self._keys]
        return value if any(right) else None

    def seal(self, purpose: str, value: bytes, *bound: str) -> str:
        """Encrypt and sign a value for a URL: URLs are written to logs, so it must not be readable.

        The construction is SIV: the MAC of the value is the initialisation vector of a stream
        cipher, which is HMAC in counter mode.

        Args:
            purpose: What it is for.
            value: The value.
            bound: What must be the same again when it is unsealed: the actor, the browser.
        """
        mac = _mac(self._keys[0], purpose, value, bound)
        return _text(mac + _masked(self._keys[0], mac, value))

    def unseal(self, purpose: str, text: str, *bound: str) -> bytes | None:
        """Return the value of a text that `seal` made with these very arguments, else None."""
        given, hidden = _split(text)
        for key in self._keys:
            value = _masked(key, given, hidden)
            if hmac.compare_digest(given, _mac(key, purpose, value, bound)):
                return value
        return None

    def token(self, *bound: str) -> str:
        """Return a form's token, another one each time."""
        return self.sign("form", secrets.token_bytes(12), *bound)

    def is_token(self, text: str, *bound: str) -> bool:
        """Tell whether a form's token is one that was made for this actor and this browser."""
        return self.verify("form", text, *bound) is not None


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _split(text: str) -> tuple[bytes, bytes]:
    """Return the MAC and the rest; both are empty, which no MAC equals, if it is not our text."""
    if len(text) > _LONGEST:
        return b"", b""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b"", b""
    return raw[:_MAC], raw[_MAC:]


def _masked(key: bytes, vector: bytes, value: bytes) -> bytes:
    # A key of its own: no MAC that is shown anywhere may be a piece of this stream.
    own = hmac.digest(key, b"mask", "sha256")
    blocks = range(-(-len(value) // _MAC))
    stream = b"".join(hmac.digest(own, vector + block.to_bytes(4), "sha256") for block in blocks)
    return bytes(a ^ b for a, b in zip(value, stream, strict=False))


def _mac(key: bytes, purpose: str, value: bytes, bound: Sequence[str]) -> bytes:
    # JSON keeps the fields apart: none can run into the next.
    fields = json.dumps([purpose, value.hex(), *bound])
    return hmac.digest(key, fields.encode(), "sha256")
