"""The contract of a notifier: how confirmation numbers and notices reach people."""

from __future__ import annotations

from typing import Protocol

from ipguard.model import Actor, Change, PendingRequest, User


class Notifier(Protocol):
    """What a `Workflow` tells people through.

    The workflow calls it after the transaction has committed, on the caller's thread and without
    any lock, so an implementation must bound the time that it takes and must be thread-safe.
    """

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Send the confirmation number to the actor.

        Args:
            request: What is to be confirmed; the message has to show it: the user, the addresses,
                who asked, from where, and when (OWASP Transaction Authorization 1.1).
            number: The number as a person reads it. It is a secret until the request is closed:
                never log it.
            actor: Who asked. `actor.email` is the address recorded when the request was made, which
                need not be the one that the actor has now.

        Raises:
            Exception: Whatever it raises becomes `DeliveryError`; the request stays pending.
        """

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Tell the actor and the affected user that a change holds (OWASP ASVS 5.0 6.3.7).

        Args:
            change: What was done.
            actor: Who did it.
            user: Whom it concerns; None where that is nobody registered, or a bulk change.

        Raises:
            Exception: Whatever it raises is logged and counted; the change holds.
        """
