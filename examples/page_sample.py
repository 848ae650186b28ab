"""Sample data for the page's examples: two traders and an administrator."""

from __future__ import annotations

import secrets

import ipguard
from ipguard.mail import ConsoleNotifier

PASSWORD = "correct horse"
ADMINISTRATOR = "rjones"


def open_sample() -> tuple[ipguard.Workflow, ipguard.Guard]:
    """Open a store in memory. In production, use a database and a key that all servers share."""
    store = ipguard.open_store("memory://")
    store.put_users(
        [
            ipguard.User(username="jsmith", full_name="John Smith", account_id="U1234567"),
            ipguard.User(username="mlee", full_name="Mei Lee", account_id="U1234567"),
        ]
    )
    flow = ipguard.Workflow(store, ConsoleNotifier(), key=secrets.token_bytes(32))
    return flow, ipguard.Guard(store)


# Behind a proxy, name it here: ClientAddress(proxies=["10.0.0.5"]).
CLIENT = ipguard.ClientAddress(proxies=[])


def actor_for(username: str, address: str | None) -> ipguard.Actor:
    """Return the actor of a request from the host's records.

    Args:
        username: The username of the session.
        address: The client's address as `CLIENT` found it, or the peer of the connection.
    """
    return ipguard.Actor(
        username=username,
        email=f"{username}@example.com",
        manages=frozenset({"U1234567"}),
        address=CLIENT.of(address, ()),  # "" for a name, such as "testclient"
    )
