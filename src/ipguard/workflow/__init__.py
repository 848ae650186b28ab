"""The two phases: a change is requested, its number is mailed, and typed in, the change holds.

Each call is one transaction, then one mail. Inside the transaction stands plain sequential code
(`_steps.py`): it holds the writer's turn, so nothing can come in between. It reads, asks
`ipguard.rules`, writes, and appends to the trail. Nobody is mailed before the commit, and no mail
is waited for inside.
"""

from ipguard.workflow._confirmations import Confirmations
from ipguard.workflow._operators import Operators
from ipguard.workflow._reading import Reading
from ipguard.workflow._requests import Requests
from ipguard.workflow._settings import WorkflowSettings

__all__ = ["Workflow", "WorkflowSettings"]


class Workflow(Requests, Confirmations, Operators, Reading):
    """Changes restrictions, and only as the actor may. Thread-safe, survives `fork()`.

    Who the actor is, the host has authenticated: a number sent by e-mail confirms a change, it is
    no authentication (NIST SP 800-63B-4 3.1.3.1). A user, request or restriction of an account that
    the actor does not manage does not exist for it: `UnknownUser`, `UnknownRequest`,
    `UnknownRestriction`.

    Args:
        store: Where everything is kept.
        notifier: How numbers and notices reach people.
        key: The secret that keys the digests of numbers, at least 32 bytes; or several, of which
            the first mints and all verify. All servers share it; it is never stored.
        settings: The figures.

    Attributes:
        settings: As given.
        notices_failed: How many notices after a change could not be sent.

    Raises:
        InvalidValue: The key is too short or not bytes, or the settings are none.
    """
