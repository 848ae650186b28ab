"""What the page signs: the token of each form, and what it keeps in cookies for a moment.

The keys are derived from the workflow's, so that every server behind a balancer accepts what any
of them signed, and keys can be changed in turn.
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
        return base64.urlsafe_b64encode(mac + value).decode().rstrip("=")

    def verify(self, purpose: str, text: str, *bound: str) -> bytes | None:
        """Return the value of a text that `sign` made with these very arguments, else None."""
        if len(text) > _LONGEST:
            return None
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        given, value = raw[:_MAC], raw[_MAC:]
        right = [hmac.compare_digest(given, _mac(key, purpose, value, bound)) for key in self._keys]
        return value if any(right) else None

    def token(self, *bound: str) -> str:
        """Return a form's token, another one each time."""
        return self.sign("form", secrets.token_bytes(12), *bound)

    def is_token(self, text: str, *bound: str) -> bool:
        """Tell whether a form's token is one that was made for this actor and this browser."""
        return self.verify("form", text, *bound) is not None


def _mac(key: bytes, purpose: str, value: bytes, bound: Sequence[str]) -> bytes:
    # JSON keeps the fields apart: none can run into the next.
    fields = json.dumps([purpose, value.hex(), *bound])
    return hmac.digest(key, fields.encode(), "sha256")
