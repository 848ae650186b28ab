"""What the examples of the page share: two traders, an administrator, numbers printed."""

from __future__ import annotations

import secrets

import ipguard
from ipguard.mail import ConsoleNotifier

PASSWORD = "correct horse"
ADMINISTRATOR = "rjones"


def open_sample() -> tuple[ipguard.Workflow, ipguard.Guard]:
    """Open a store in memory. In earnest it is a database, and the key a secret of all servers."""
    store = ipguard.open_store("memory://")
    store.put_users(
        [
            ipguard.User(username="jsmith", full_name="John Smith", account_id="U1234567"),
            ipguard.User(username="mlee", full_name="Mei Lee", account_id="U1234567"),
        ]
    )
    flow = ipguard.Workflow(store, ConsoleNotifier(), key=secrets.token_bytes(32))
    return flow, ipguard.Guard(store)


def actor_for(username: str, peer: str | None) -> ipguard.Actor:
    """Return the actor of a request, from the host's own records.

    Args:
        username: Who is signed in.
        peer: The connection's peer, in the framework's spelling. It is no address on a Unix socket
            (None, "", "unix:", "<local>", "localhost") and in a test client ("testclient").
    """
    try:
        address = None if peer is None else str(ipguard.AddressRange.parse(peer))
    except ipguard.AddressError:
        address = None
    return ipguard.Actor(
        username=username,
        email=f"{username}@example.com",
        manages=frozenset({"U1234567"}),
        address=address,
    )
