"""A notifier for tests: it keeps what it is given."""

from __future__ import annotations

import threading
from typing import Literal

import attrs

from ipguard.model import Actor, Change, PendingRequest, User

__all__ = ["Message", "Outbox"]


@attrs.frozen(kw_only=True)
class Message:
    """What a notifier was asked to send.

    Attributes:
        kind: `number_issued` or `change_applied`, after the method called.
        to: The e-mail addresses that it goes to, each once, the actor's first.
        actor: Who acted.
        request: What is to be confirmed; None for a notice.
        number: The confirmation number as the person reads it; None for a notice. Never in a repr.
        change: What was done; None for a number.
        user: Whom the change concerns; None for a number, and where that is nobody registered.
    """

    kind: Literal["number_issued", "change_applied"]
    to: tuple[str, ...]
    actor: Actor
    request: PendingRequest | None = None
    number: str | None = attrs.field(default=None, repr=False)
    change: Change | None = None
    user: User | None = None


class Outbox:
    """A `Notifier` that sends nothing and keeps every message. Thread-safe.

    Attributes:
        fail: While it is True, nothing is kept and every call raises `OSError`, as when no mail
            server answers. A test sets it.
    """

    def __init__(self) -> None:
        self.fail = False
        self._messages: list[Message] = []
        self._lock = threading.Lock()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was sent so far, the oldest first."""
        with self._lock:
            return tuple(self._messages)

    def number_for(self, request_id: str) -> str:
        """Return the newest confirmation number of a request, as the person reads it.

        Args:
            request_id: The id of the request.

        Raises:
            KeyError: No number was sent for that request.
        """
        for message in reversed(self.messages):
            request = message.request
            if request is not None and message.number is not None and request.id == request_id:
                return message.number
        raise KeyError(request_id)

    def clear(self) -> None:
        """Forget every message."""
        with self._lock:
            self._messages.clear()

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Keep a confirmation number; see `ipguard.notify.Notifier`.

        Raises:
            OSError: `fail` is set.
        """
        self._keep(
            Message(
                kind="number_issued",
                to=(actor.email,),
                actor=actor,
                request=request,
                number=number,
            )
        )

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Keep a notice; see `ipguard.notify.Notifier`.

        Raises:
            OSError: `fail` is set.
        """
        concerned = user.email if user is not None else None
        addresses = dict.fromkeys(a for a in (actor.email, concerned) if a is not None)
        self._keep(
            Message(
                kind="change_applied", to=tuple(addresses), actor=actor, change=change, user=user
            )
        )

    def _keep(self, message: Message) -> None:
        if self.fail:
            raise OSError("the outbox was told to fail")
        with self._lock:
            self._messages.append(message)

    def __repr__(self) -> str:
        return f"<Outbox of {len(self.messages)}>"
