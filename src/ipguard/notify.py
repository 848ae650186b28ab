"""The contract of a notifier, which sends confirmation numbers and notices to people."""

from __future__ import annotations

from typing import Protocol

from ipguard.model import Actor, Change, PendingRequest, Sighting, User

__all__ = ["Notifier", "RefusalNotifier"]


class Notifier(Protocol):
    """Sends the messages of a `Workflow`.

    The workflow calls it after the commit, on the caller's thread and without a lock. An
    implementation must be thread-safe and must bound its time.
    """

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Send the confirmation number to the actor.

        Args:
            request: The request. The message must show it: the user, the addresses, the requester,
                the requester's address, and the time (OWASP Transaction Authorization 1.1).
            number: The number, formatted for people. It is a secret until the request is closed:
                never log it.
            actor: The requester. `actor.email` is the address at the time of the request; the
                actor's present one may differ.

        Raises:
            Exception: Any exception becomes `DeliveryError`; the request stays pending.
        """

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Notify the actor and the user concerned of a change (OWASP ASVS 5.0 6.3.7).

        Also called for a request that waits or needs approvals, and for an approval: nothing has
        changed yet then. A call for one more person has the address of that person as
        `actor.email`: of a requester, or of one of several users.

        Args:
            change: The audit entry of the change; if it is of several users, its detail `users`
                names them.
            actor: The actor.
            user: The user concerned; None for a bulk change or a user who is not registered.

        Raises:
            Exception: Any exception is logged and counted; the change stays in force.
        """


class RefusalNotifier(Notifier, Protocol):
    """A notifier that also tells users about refused logins; the method is optional."""

    def login_refused(self, sighting: Sighting, user: User) -> None:
        """Tell a user that a login with the right password was refused (OWASP ASVS 5.0 6.3.5).

        Args:
            sighting: Where from, when, and how often.
            user: The user, who has an e-mail address.

        Raises:
            Exception: Any exception is logged and counted.
        """
