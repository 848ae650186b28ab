"""The detail of an audit entry: a mapping, and the only writer and reader of its stored text.

The text is `name=value` pairs, separated by spaces. A value that could be mistaken for more than
one, or that would break the line, is written as JSON, so that no text from outside can forge a
pair.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from ipguard.model import Change

__all__ = ["decode", "detail", "encode"]

_log = logging.getLogger("ipguard.audit")

_PAIR: Final = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |\Z)')


def detail(**pairs: object) -> dict[str, str]:
    """Make the detail of an entry; values that are None, False or empty are left out.

    Args:
        pairs: The particulars. True becomes `true`, a datetime its ISO 8601 text.
    """
    return {
        name: _text(value)
        for name, value in pairs.items()
        if not (value is None or value is False or value == "")
    }


def encode(detail: Mapping[str, str]) -> str:
    """Return the stored text of a detail, on one line."""
    return " ".join(f"{name}={_quoted(value)}" if name else value for name, value in detail.items())


def decode(text: str) -> dict[str, str]:
    """Read the stored text of a detail.

    Returns:
        The pairs. Text that this version cannot read as pairs is returned whole, under the name
        "", and `encode` writes it unchanged.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        if pair is None or pair[1] in found:
            return {"": text}
        value = pair[2]
        try:
            found[pair[1]] = json.loads(value) if value.startswith('"') else value
        except ValueError:
            return {"": text}
        at = pair.end()
    return found


def log_change(change: Change) -> None:
    """Write one line for a committed change to the logger `ipguard.audit`.

    The record has the values as `ipguard_action`, `ipguard_actor` and so on, and `ipguard_detail`.
    The workflow does this for its changes, a store for `put_users` and `remove_users`.
    """
    entry = {
        "revision": change.revision,
        "at": change.at.isoformat(),
        "action": change.action,
        "actor": change.actor,
        "address": change.actor_address,
        "username": change.username,
        "account": change.account_id,
    }
    text = " ".join(filter(None, (encode(detail(**entry)), encode(change.detail))))
    fields = {**entry, "detail": dict(change.detail)}
    _log.info("%s", text, extra={f"ipguard_{name}": value for name, value in fields.items()})


def _text(value: object) -> str:
    if value is True:
        return "true"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _quoted(value: str) -> str:
    if value and value.isprintable() and not any(c in ' "=\\' for c in value):
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())
