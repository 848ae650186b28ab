"""A login server behind a proxy, for WSGI and ASGI: the address that it sees, and its answer.

`IPGUARD_TEST_SETUP` is Python code that makes the `ClientAddress` named `client`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import ipguard
from ipguard.testing import Outbox

#: The one address that jsmith may log in from.
OFFICE = "127.0.0.9"

setup: dict[str, Any] = {}
exec(os.environ["IPGUARD_TEST_SETUP"], setup)
client: ipguard.ClientAddress = setup["client"]
others = [eval(text, setup) for text in json.loads(os.environ["IPGUARD_TEST_OTHERS"])]

store = ipguard.open_store("memory://")
store.put_users([ipguard.User(username="jsmith", full_name="John Smith", account_id="U1")])
desk = ipguard.Actor(username="desk", email="d@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)
ipguard.Workflow(store, Outbox(), key=bytes(32)).impose(desk, "jsmith", OFFICE, reason="a test")
guard = ipguard.Guard(store)


def answer(address: str, more: list[str], peer: str | None, scheme: str | None) -> bytes:
    """Return the address, those of `others`, what the server reports, and the guard's answer."""
    shown = {"address": address, "others": more, "peer": peer, "scheme": scheme}
    return json.dumps(shown | {"allowed": guard.is_allowed("jsmith", address)}).encode()


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    more = [other.wsgi(environ) for other in others]
    start_response("200 OK", [("Content-Type", "application/json")])
    return [answer(client.wsgi(environ), more, environ["REMOTE_ADDR"], environ["wsgi.url_scheme"])]


async def respond(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    peer = scope["client"] and scope["client"][0]
    more = [other.asgi(scope) for other in others]
    body = answer(client.asgi(scope), more, peer, scope["scheme"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


asgi = setup.get("always_https", lambda app: app)(respond)
