"""What the kits for web frameworks answer alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

from ipguard.model import Actor

TRY_AGAIN: Final = "Please try again in a few seconds."
"""The text of a 503 while the store does not answer."""

RETRY_AFTER: Final = 5
"""The value of its header `Retry-After`, in seconds."""


def with_address(found: Any, address: Callable[[], str]) -> Any:
    """Give an actor without an address that of the client; return anything else as it is."""
    if isinstance(found, Actor) and found.address is None:
        return attrs.evolve(found, address=address())
    return found
