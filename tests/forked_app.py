"""A WSGI login server whose store and guard exist before the server forks its workers.

The master has asked the guard, so a connection of the pool is open. With `IPGUARD_TEST_START` its
refresher and its listener run too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import ipguard

store = ipguard.open_store(os.environ["IPGUARD_TEST_STORE"])
guard = ipguard.Guard(store, max_staleness=1.0)
if os.environ["IPGUARD_TEST_START"]:
    guard.start()
master = os.getpid()
guard.is_allowed("user0", "203.0.113.7")


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer `?username=...&address=...` with the process that answered and its reason."""
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    decision = guard.check(query["username"], query["address"])
    start_response("200 OK", [("Content-Type", "application/json")])
    answer = {"worker": os.getpid(), "master": master, "reason": decision.reason}
    return [json.dumps(answer).encode()]
