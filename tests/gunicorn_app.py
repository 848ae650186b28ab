"""A login server as gunicorn runs it: what `--preload` imports is there before the workers are.

Its master has asked the guard, and its refresher and its listener run, when it forks.
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
    """Answer `?username=...&address=...` with who answered, and how."""
    asked = dict(parse_qsl(environ["QUERY_STRING"]))
    decision = guard.check(asked["username"], asked["address"])
    start_response("200 OK", [("Content-Type", "application/json")])
    told = {"worker": os.getpid(), "master": master, "first": first, "reason": decision.reason}
    return [json.dumps(told).encode()]
