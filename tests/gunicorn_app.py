"""A login server for `gunicorn --preload`, which imports it before it forks the workers.

The guard has answered a login, and its refresher and listener run, when the master forks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import ipguard

store = ipguard.open_store(os.environ["IPGUARD_TEST_STORE"])
guard = ipguard.Guard(store)
guard.start()
master = os.getpid()
first = guard.is_allowed("jsmith", "203.0.113.7")


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer `?username=...&address=...` with the decision and the process ids."""
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    decision = guard.check(query["username"], query["address"])
    start_response("200 OK", [("Content-Type", "application/json")])
    answer = {"worker": os.getpid(), "master": master, "first": first, "reason": decision.reason}
    return [json.dumps(answer).encode()]
