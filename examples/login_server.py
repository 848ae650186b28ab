#!/usr/bin/env python3
"""A small login server that asks ipguard after the password. It needs fastapi and uvicorn.

    python examples/login_server.py [--store sqlite:///ipguard.db] [--port 8000]

    curl -i localhost:8000/login --json '{"username": "jsmith", "password": "correct horse"}'

What it shows: a wrong address is refused in the same words and after the same work as a wrong
password; the guard is asked about the user's record and the connection's address, never about what
somebody typed; and while the store is down, everybody is told to come back later.

Left out, as it is no matter of addresses: a limit on attempts, the session, and TLS.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

import ipguard
from ipguard.testing import Outbox

# 16 MiB and five rounds, as OWASP's Password Storage Cheat Sheet has it.
SCRYPT = {"n": 2**14, "r": 8, "p": 5}


@dataclass(frozen=True)
class Account:
    """The host's own record of a user."""

    username: str
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def new(cls, username: str, password: str) -> Account:
        salt = secrets.token_bytes(16)
        return cls(username, salt, hashed(password, salt))


def hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **SCRYPT)


@dataclass(frozen=True)
class Attempt:
    """What came of a login: the record, if there is one, and the two outcomes."""

    account: Account | None
    password_is_right: bool
    decision: ipguard.Decision

    @property
    def let_in(self) -> Account | None:
        return self.account if self.password_is_right and self.decision else None


class Door:
    """Looks at who wants to come in: the same work, whatever will come of it.

    Args:
        guard: Who may log in from where.
        accounts: The users.
    """

    def __init__(self, guard: ipguard.Guard, accounts: Iterable[Account]) -> None:
        self._guard = guard
        # As a database with a case-insensitive collation finds them.
        self._by_name = {account.username.casefold(): account for account in accounts}
        self._nobody = Account.new("", secrets.token_urlsafe())

    def look(self, username: str, password: str, address: str) -> Attempt:
        account = self._by_name.get(username.casefold())

        # A user who does not exist costs a hash as well.
        known = account or self._nobody
        digest = hashed(password, known.salt)
        password_is_right = hmac.compare_digest(digest, known.digest) and account is not None

        # The record's own name: what was typed may differ from it in ways that the database
        # forgives. Only where there is no record is the typed text asked about, so that both take
        # the same way through the guard; that answer lets nobody in.
        asked = username if account is None else account.username
        return Attempt(account, password_is_right, self._guard.check(asked, address))


class Login(BaseModel):
    username: Annotated[str, Field(max_length=256)]
    password: Annotated[str, Field(max_length=1024, repr=False)]


# One text each, whatever the reason: "wrong address" would tell a thief that the password is right.
REFUSED = "The username or the password is wrong, or you may not log in from where you are."
UNREADABLE = "Please send a username and a password, as text."
LATER = "Nobody can be logged in at the moment. Please try again in a few seconds."


def create_app(guard: ipguard.Guard, accounts: Iterable[Account]) -> FastAPI:
    """Make the login server's application.

    Args:
        guard: Who may log in from where.
        accounts: The users.
    """
    door = Door(guard, accounts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with guard:  # its refresher: changes are known before anybody asks
            yield

    # Without the pages that describe it: a login server need not tell the world how it works.
    app = FastAPI(lifespan=lifespan, openapi_url=None)

    # FastAPI's own answer repeats what was sent, the password with it, and fails over some of it.
    @app.exception_handler(RequestValidationError)
    def unreadable(_: Request, __: RequestValidationError) -> Response:
        return JSONResponse({"detail": UNREADABLE}, 422)

    # `def`, not `async def`: hashing and, for a user not in memory, the store both take time, and
    # must not hold up the event loop. FastAPI runs such an endpoint on a thread.
    @app.post("/login")
    def login(attempt: Login, request: Request) -> Response:
        # The connection's peer. Behind a proxy let uvicorn replace it, and only for that proxy:
        #     uvicorn ... --proxy-headers --forwarded-allow-ips=10.0.0.5
        # Do not read X-Forwarded-For here: its leftmost entry is the client's to choose.
        address = request.client.host if request.client else ""
        came = door.look(attempt.username, attempt.password, address)

        # Before the password's outcome is looked at, so that an outage does not give it away.
        if came.decision.reason is ipguard.Reason.STORE_UNAVAILABLE:
            return JSONResponse({"detail": LATER}, 503, {"Retry-After": "5"})
        if came.let_in is None:
            return JSONResponse({"detail": REFUSED}, 401)
        return JSONResponse({"username": came.let_in.username})  # a session would begin here

    return app


# ------------------------------------------------------------------ to try it out

PASSWORD = "correct horse"
SAMPLES = {
    "mlee": (),  # no restrictions: from anywhere
    "jsmith": ("127.0.0.1", "::1"),  # from this machine
    "rjones": ("203.0.113.0/29",),  # from an office that this machine is not in
}


def fill(store: ipguard.RestrictionStore) -> None:
    """Register the samples and restrict them, where that was not done before."""
    store.put_users(
        ipguard.User(username=name, full_name=name.title(), account_id="U1") for name in SAMPLES
    )
    flow = ipguard.Workflow(store, Outbox(), key=secrets.token_bytes(32))
    operator = ipguard.Actor(
        username="operator", email="operator@example.com", manages=ipguard.Actor.EVERY_ACCOUNT
    )
    for user in flow.overview(operator):
        if not user.restrictions:
            for addresses in SAMPLES.get(user.user.username, ()):
                flow.impose(operator, user.user.username, addresses, reason="a sample")


def main() -> None:
    parser = argparse.ArgumentParser(description="A login server that asks ipguard.")
    parser.add_argument("--store", default="memory://", help="the store's URL (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (%(default)s)")
    options = parser.parse_args()

    with ipguard.open_store(options.store) as store:
        fill(store)
        app = create_app(ipguard.Guard(store), [Account.new(name, PASSWORD) for name in SAMPLES])
        print(f"The password of {', '.join(SAMPLES)} is {PASSWORD!r}.", flush=True)
        # Unless told otherwise, uvicorn believes X-Forwarded-For from 127.0.0.1.
        uvicorn.run(app, host="127.0.0.1", port=options.port, proxy_headers=False)


if __name__ == "__main__":
    main()
