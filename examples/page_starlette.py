#!/usr/bin/env python3
"""The page in a Starlette application that signs people in by HTTP Basic. Needs uvicorn to run.

python examples/page_starlette.py    # then http://127.0.0.1:8001/ip-restrictions/
"""

from __future__ import annotations

import base64
import binascii
import hmac

import uvicorn
from page_sample import ADMINISTRATOR, CLIENT, PASSWORD, actor_for, open_sample
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount

import ipguard
from ipguard.admin import asgi_app


def given(request: Request) -> tuple[str, str]:
    """Return the username and password that the browser sends."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    try:
        name, _, password = base64.b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return (name, password) if scheme.lower() == "basic" else ("", "")


async def authenticate(request: Request) -> ipguard.Actor | Response:
    name, password = given(request)
    right = hmac.compare_digest(password.encode(), PASSWORD.encode())
    if name != ADMINISTRATOR or not right:
        return PlainTextResponse("Sign in.", 401, {"WWW-Authenticate": "Basic"})
    return actor_for(name, CLIENT.asgi(request.scope))


def create_app(flow: ipguard.Workflow, guard: ipguard.Guard) -> Starlette:
    page = asgi_app(flow, guard, authenticate=authenticate, brand="Example Bank")
    return Starlette(routes=[Mount("/ip-restrictions", page)])


if __name__ == "__main__":
    print(f"http://127.0.0.1:8001/ip-restrictions/ as {ADMINISTRATOR}, {PASSWORD!r}", flush=True)
    uvicorn.run(create_app(*open_sample()), host="127.0.0.1", port=8001, proxy_headers=False)
