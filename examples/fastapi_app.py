"""A FastAPI application with a sign-in, open sessions and the page.

    uvicorn --no-proxy-headers --port 8002 fastapi_app:app    # then http://127.0.0.1:8002/

jsmith, mlee and the administrator rjones sign in with "correct horse". Mails are printed.
"""

import hashlib
import os
import secrets
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.sessions import SessionMiddleware

import ipguard.mail
from ipguard.contrib.fastapi import IPGuard

# ------------------------------------------------------------------ settings and templates

URL = os.environ.get("IPGUARD_URL", "sqlite:///ipguard.db")
KEY = os.environ.get("IPGUARD_KEY", secrets.token_hex(32)).encode()  # all servers share it
SECRET_KEY = os.environ.get("SECRET_KEY", secrets.token_hex(32))  # of the sessions, likewise
PROXY: dict[str, Any] = {
    "proxies": os.environ.get("PROXIES", "").split(),
    "unix_socket": "UNIX_SOCKET" in os.environ,
}

LOGIN = """<!doctype html><title>Sign in</title><h1>Sign in</h1><p>{}<form method="post">
<label>Username <input name="username"></label>
<label>Password <input name="password" type="password"></label><button>Sign in</button></form>"""
HOME = """<!doctype html><title>Home</title><h1>Welcome, {}</h1>
<a href="ip-restrictions/">IP restrictions</a><form method="post" action="logout">
<button>Sign out</button></form>"""
TEXTS = {
    401: "The username or the password is wrong, or you may not log in from where you are.",
    503: "Nobody can be signed in at the moment. Please try again in a few seconds.",
}

# ------------------------------------------------------------------ the application

ACCOUNTS = {"rjones": {"U1234567"}}  # the accounts that a user administers
USERS = {
    name: {"username": name, "full_name": full_name, "account_id": "U1234567"}
    for name, full_name in (("jsmith", "John Smith"), ("mlee", "Mei Lee"), ("rjones", "Rita Jones"))
}


def hashed(password: str, salt: bytes = secrets.token_bytes(16)) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=5)


def current_user(request: Request) -> str | None:
    return name if (name := request.session.get("username")) in USERS else None


def signed_in(name: Annotated[str | None, Depends(current_user)]) -> str:
    if name is None:
        raise HTTPException(401)
    return name


def actor(name: Annotated[str, Depends(signed_in)]) -> object:
    if name not in ACCOUNTS:
        raise HTTPException(403)
    return ipguard.Actor(username=name, email=f"{name}@example.com", manages=ACCOUNTS[name])


PASSWORD = hashed("correct horse")  # of every user, in this example
store = ipguard.open_store(URL)
store.sync_users(USERS.values())
flow = ipguard.Workflow(store, ipguard.mail.ConsoleNotifier(), key=KEY)
ips = IPGuard(ipguard.Guard(store), flow, ipguard.ClientAddress(**PROXY))
app = FastAPI(dependencies=[Depends(ips.each_request(current_user))], openapi_url=None)
app.add_middleware(SessionMiddleware, secret_key=SECRET_KEY)
app.include_router(ips.router(actor, home_url="/"), prefix="/ip-restrictions")
app.add_exception_handler(401, lambda *_: RedirectResponse("/login", 303))


@app.get("/")
def home(name: Annotated[str, Depends(signed_in)]) -> Response:
    return HTMLResponse(HOME.format(name))


@app.get("/login")
def login_form() -> Response:
    return HTMLResponse(LOGIN.format(""))


@app.post("/login")
async def login(
    request: Request, username: Annotated[str, Form()], password: Annotated[str, Form()]
) -> Response:
    user = USERS.get(username.casefold())
    right = secrets.compare_digest(await run_in_threadpool(hashed, password), PASSWORD)
    # The record's username, after the password: both are checked in every case.
    name = user["username"] if user else username
    decision = await ips.check(request, name, password_is_right=bool(user and right))
    status = {"allow": 200, "refuse": 401, "retry": 503}[decision.outcome]
    if status == 200 and user and right:
        request.session.update(username=name)
        return RedirectResponse("/", 303)
    status = 401 if status == 200 else status
    return HTMLResponse(LOGIN.format(TEXTS[status]), status)


@app.post("/logout")
def logout(request: Request) -> Response:
    request.session.clear()
    return RedirectResponse("/login", 303)
