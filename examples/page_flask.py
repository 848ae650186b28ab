#!/usr/bin/env python3
"""The page mounted next to a Flask application, with its sessions. Needs flask.

python examples/page_flask.py    # then http://127.0.0.1:8003/ip-restrictions/
"""

from __future__ import annotations

import hmac
import secrets
from typing import Any

from flask import Flask, redirect, request, session
from page_sample import ADMINISTRATOR, CLIENT, PASSWORD, actor_for, open_sample
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple
from werkzeug.wrappers import Request

import ipguard
from ipguard.admin import wsgi_app

FORM = """<!doctype html><title>Sign in</title><form method="post">
<label>Username <input name="username"></label>
<label>Password <input name="password" type="password"></label><button>Sign in</button></form>"""


def create_app(flow: ipguard.Workflow, guard: ipguard.Guard) -> Flask:
    app = Flask(__name__)
    app.secret_key = secrets.token_bytes(32)
    app.config.update(SESSION_COOKIE_SAMESITE="Lax")

    def authenticate(asked: Request) -> Any:
        # The page runs outside Flask, so open its session for this request.
        with app.request_context(asked.environ):
            username = session.get("username")
        if username is None:
            return redirect("/login")
        return actor_for(username, CLIENT.wsgi(asked.environ))

    page = wsgi_app(flow, guard, authenticate=authenticate, brand="Example Bank")
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/ip-restrictions": page})  # type: ignore[method-assign]

    @app.route("/login", methods=["GET", "POST"])
    def login() -> Any:
        password = request.form.get("password", "").encode()
        right = hmac.compare_digest(password, PASSWORD.encode())
        if request.form.get("username") != ADMINISTRATOR or not right:
            return FORM, 200 if request.method == "GET" else 401
        session["username"] = ADMINISTRATOR
        return redirect("/ip-restrictions/", 303)

    return app


if __name__ == "__main__":
    print(f"http://127.0.0.1:8003/ip-restrictions/ as {ADMINISTRATOR}, {PASSWORD!r}", flush=True)
    run_simple("127.0.0.1", 8003, create_app(*open_sample()), threaded=True)
