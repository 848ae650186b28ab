"""A Flask application with a sign-in, open sessions and the page.

    flask --app flask_app run --port 8003    # then http://127.0.0.1:8003/

jsmith, mlee and the administrator rjones sign in with "correct horse". Mails are printed.
"""

import os
import secrets
from typing import Any

from flask import Flask, abort, redirect, render_template_string, request, session
from werkzeug.security import check_password_hash, generate_password_hash

import ipguard.mail
from ipguard.contrib.flask import IPGuard

# ------------------------------------------------------------------ settings and templates

URL = os.environ.get("IPGUARD_URL", "sqlite:///ipguard.db")
KEY = os.environ.get("IPGUARD_KEY", secrets.token_hex(32)).encode()  # all servers share it
SECRET_KEY = os.environ.get("SECRET_KEY", secrets.token_hex(32))  # of the sessions, likewise
PROXY: dict[str, Any] = {
    "proxies": os.environ.get("PROXIES", "").split(),
    "unix_socket": "UNIX_SOCKET" in os.environ,
}

LOGIN = """<!doctype html><title>Sign in</title><h1>Sign in</h1><p>{{ text }}<form method="post">
<label>Username <input name="username"></label>
<label>Password <input name="password" type="password"></label><button>Sign in</button></form>"""
HOME = """<!doctype html><title>Home</title><h1>Welcome, {{ name }}</h1>
<a href="ip-restrictions/">IP restrictions</a><form method="post" action="logout">
<button>Sign out</button></form>"""
TEXTS = {
    401: "The username or the password is wrong, or you may not log in from where you are.",
    503: "Nobody can be signed in at the moment. Please try again in a few seconds.",
}

# ------------------------------------------------------------------ the application

app = Flask(__name__)
app.secret_key = SECRET_KEY
app.config.update(SESSION_COOKIE_SAMESITE="Lax")

PASSWORD = generate_password_hash("correct horse")  # of every user, in this example
ACCOUNTS = {"rjones": {"U1234567"}}  # the accounts that a user administers
USERS = {
    name: {"username": name, "full_name": full_name, "account_id": "U1234567"}
    for name, full_name in (("jsmith", "John Smith"), ("mlee", "Mei Lee"), ("rjones", "Rita Jones"))
}


def username() -> str | None:
    return name if (name := session.get("username")) in USERS else None


def actor() -> Any:
    name = username() or abort(401)
    manages = ACCOUNTS.get(name) or abort(403)
    return ipguard.Actor(username=name, email=f"{name}@example.com", manages=manages)


store = ipguard.open_store(URL)
store.sync_users(USERS.values())
flow = ipguard.Workflow(store, ipguard.mail.ConsoleNotifier(), key=KEY)
guard, client = ipguard.Guard(store), ipguard.ClientAddress(**PROXY)
ips = IPGuard(app, guard=guard, workflow=flow, client=client, user=username, actor=actor)
app.register_blueprint(ips.blueprint(home_url="/"), url_prefix="/ip-restrictions")


@app.get("/")
def home() -> Any:
    return render_template_string(HOME, name=username() or abort(401))


@app.get("/login")
def login_form() -> Any:
    return render_template_string(LOGIN)


@app.post("/login")
def login() -> Any:
    typed = request.form.get("username", "")
    user = USERS.get(typed.casefold())
    right = check_password_hash(PASSWORD, request.form.get("password", ""))
    # The record's username, after the password: both are checked in every case.
    name = user["username"] if user else typed
    outcome = ips.allow_login(name, password_is_right=bool(user and right))
    status = {"allow": 200, "refuse": 401, "retry": 503}[outcome]
    if status == 200 and user and right:
        session.clear()
        session["username"] = name
        return redirect("/", 303)
    status = 401 if status == 200 else status
    return render_template_string(LOGIN, text=TEXTS[status]), status


@app.post("/logout")
def logout() -> Any:
    session.clear()
    return redirect("/login", 303)


@app.errorhandler(401)
def sign_in(_: Exception) -> Any:
    return redirect("/login", 303)
