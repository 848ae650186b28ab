"""What stores, and who uses them, have in common: how a change is written, whose rows, the end."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from types import TracebackType
from typing import Self

from ipguard.model import Accounts, Actor, Change

_audit = logging.getLogger("ipguard.audit")


def particulars(**pairs: object) -> str:
    """Write `name=value` pairs on one line; those that are None, empty or False are left out.

    A value that could be taken for more than one, or would break the line, is written as JSON: what
    people named themselves forges no entry of the trail.
    """
    return " ".join(
        f"{name}={_value(value)}"
        for name, value in pairs.items()
        if not (value is None or value is False or value == "")
    )


def _value(value: object) -> str:
    if value is True:
        return "true"
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    if text.isprintable() and not any(c in ' "=\\' for c in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def log_change(change: Change) -> None:
    """Write one line for a change to the log `ipguard.audit`, once it has been committed.

    The workflow does this for what it changes; a store does it for `put_users` and `remove_users`.
    """
    _audit.info(
        "%s",
        particulars(
            revision=change.revision,
            at=change.at,
            action=change.action,
            actor=change.actor,
            address=change.actor_address,
            username=change.username,
            account=change.account_id,
        )
        + (f" {change.detail}" if change.detail else ""),
    )


def checked_accounts(accounts: Accounts) -> Accounts:
    """Return whose rows are asked for; a store does this first in `overview` and `history`.

    Raises:
        TypeError: It is one text: `"U1" in "xU1"` holds, and a substring would become a right.
    """
    if accounts is Actor.EVERY_ACCOUNT:
        return accounts
    if isinstance(accounts, (str, bytes)):
        raise TypeError("accounts must be a set of account ids, or Actor.EVERY_ACCOUNT")
    return frozenset(accounts)


class Closing:
    """What has a `close`, and is closed by leaving its `with` block."""

    def close(self) -> None:
        """Give up every resource."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
