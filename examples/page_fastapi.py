#!/usr/bin/env python3
"""The page in a FastAPI application with its own sessions. Needs fastapi and uvicorn.

python examples/page_fastapi.py    # then http://127.0.0.1:8002/ip-restrictions/
"""

from __future__ import annotations

import hmac
import secrets
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from page_sample import ADMINISTRATOR, CLIENT, PASSWORD, actor_for, open_sample

import ipguard
from ipguard.admin import asgi_app

FORM = """<!doctype html><title>Sign in</title><form method="post">
<label>Username <input name="username"></label>
<label>Password <input name="password" type="password"></label><button>Sign in</button></form>"""


def create_app(flow: ipguard.Workflow, guard: ipguard.Guard) -> FastAPI:
    app = FastAPI()
    sessions: dict[str, str] = {}  # in production: the host's session store

    # A plain function runs on a thread, so it may query a database. `async def` works too.
    def authenticate(request: Request) -> ipguard.Actor | Response:
        username = sessions.get(request.cookies.get("session", ""))
        if username is None:
            return RedirectResponse("/login", 303)
        return actor_for(username, CLIENT.asgi(request.scope))

    page = asgi_app(flow, guard, authenticate=authenticate, brand="Example Bank")
    app.mount("/ip-restrictions", page)

    @app.get("/login")
    def login_form() -> Response:
        return HTMLResponse(FORM)

    @app.post("/login")
    async def login(request: Request) -> Response:
        fields = parse_qs((await request.body()).decode())
        username, password = (fields.get(name, [""])[0] for name in ("username", "password"))
        right = hmac.compare_digest(password.encode(), PASSWORD.encode())
        if username != ADMINISTRATOR or not right:
            return HTMLResponse(FORM, 401)
        session = secrets.token_urlsafe()
        sessions[session] = username
        answer = RedirectResponse("/ip-restrictions/", 303)
        answer.set_cookie("session", session, httponly=True, samesite="lax")
        return answer

    return app


if __name__ == "__main__":
    print(f"http://127.0.0.1:8002/ip-restrictions/ as {ADMINISTRATOR}, {PASSWORD!r}", flush=True)
    uvicorn.run(create_app(*open_sample()), host="127.0.0.1", port=8002, proxy_headers=False)
