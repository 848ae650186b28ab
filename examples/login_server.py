#!/usr/bin/env python3
"""A small login server that checks the address after the password. Needs fastapi and uvicorn.

    python examples/login_server.py [--store sqlite:///ipguard.db] [--port 8000]

    curl -i localhost:8000/login --json '{"username": "jsmith", "password": "correct horse"}'

A wrong address is refused in the same words and after the same work as a wrong password. The guard
checks the username of the user's record and the address of the connection, never typed text. While
the store is down, every login gets the same request to try again later.

Left out, because they do not concern addresses: a limit on attempts, sessions and TLS.
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

# 16 MiB and five rounds, from OWASP's Password Storage Cheat Sheet.
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
    """The outcome of a login: the record, if there is one, and both checks."""

    account: Account | None
    password_is_right: bool
    decision: ipguard.Decision

    @property
    def let_in(self) -> Account | None:
        return self.account if self.password_is_right and self.decision else None


class Door:
    """Check logins with the same work, whatever the outcome.

    Args:
        guard: The guard.
        accounts: The users.
    """

    def __init__(self, guard: ipguard.Guard, accounts: Iterable[Account]) -> None:
        self._guard = guard
        # Like a database with a case-insensitive collation.
        self._by_name = {account.username.casefold(): account for account in accounts}
        self._nobody = Account.new("", secrets.token_urlsafe())

    def look(self, username: str, password: str, address: str) -> Attempt:
        account = self._by_name.get(username.casefold())

        # An unknown user costs a hash too.
        known = account or self._nobody
        digest = hashed(password, known.salt)
        password_is_right = hmac.compare_digest(digest, known.digest) and account is not None

        # Check the username of the record: the typed text may differ from it in ways that the
        # database ignores. Without a record, check the typed text so that the guard does the same
        # work; that decision allows no login.
        asked = username if account is None else account.username
        decision = self._guard.check(asked, address)
        if password_is_right:
            self._guard.saw(asked, address, decision)
        return Attempt(account, password_is_right, decision)


class Login(BaseModel):
    username: Annotated[str, Field(max_length=256)]
    password: Annotated[str, Field(max_length=1024, repr=False)]


# One text for every reason: "wrong address" would reveal that the password is right.
REFUSED = "The username or the password is wrong, or you may not log in from where you are."
UNREADABLE = "Please send a username and a password, as text."
LATER = "Nobody can be logged in at the moment. Please try again in a few seconds."


# Behind a proxy, name it here: ClientAddress(proxies=["10.0.0.5"]). Do not read X-Forwarded-For
# yourself: the client chooses its leftmost entry.
CLIENT = ipguard.ClientAddress(proxies=[])


def create_app(guard: ipguard.Guard, accounts: Iterable[Account]) -> FastAPI:
    """Make the login server's application.

    Args:
        guard: The guard.
        accounts: The users.
    """
    door = Door(guard, accounts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with guard:  # start the refresher, which loads changes in the background
            yield

    # No API documentation: a login server need not describe itself.
    app = FastAPI(lifespan=lifespan, openapi_url=None)

    # FastAPI's own response repeats the input with the password, and fails on some input.
    @app.exception_handler(RequestValidationError)
    def unreadable(_: Request, __: RequestValidationError) -> Response:
        return JSONResponse({"detail": UNREADABLE}, 422)

    # `def`, not `async def`: hashing and, on a miss, the store must not block the event loop.
    # FastAPI runs a plain function on a thread.
    @app.post("/login")
    def login(attempt: Login, request: Request) -> Response:
        came = door.look(attempt.username, attempt.password, CLIENT.asgi(request.scope))

        # Before the password's outcome is used, so that an outage does not reveal it.
        if came.decision.outcome is ipguard.Outcome.RETRY:
            return JSONResponse({"detail": LATER}, 503, {"Retry-After": "5"})
        if came.let_in is None:
            return JSONResponse({"detail": REFUSED}, 401)
        return JSONResponse({"username": came.let_in.username})  # start a session here

    return app


# ------------------------------------------------------------------ to try it out

PASSWORD = "correct horse"
SAMPLES = {
    "mlee": (),  # no restrictions: from anywhere
    "jsmith": ("127.0.0.1", "::1"),  # from this machine
    "rjones": ("203.0.113.0/29",),  # from an office that this machine is not in
}


def fill(store: ipguard.RestrictionStore) -> None:
    """Register the sample users and restrict them, unless they are restricted already."""
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
    parser = argparse.ArgumentParser(description="A login server that uses ipguard.")
    parser.add_argument("--store", default="memory://", help="the store's URL (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (%(default)s)")
    options = parser.parse_args()

    with ipguard.open_store(options.store) as store:
        fill(store)
        app = create_app(ipguard.Guard(store), [Account.new(name, PASSWORD) for name in SAMPLES])
        print(f"The password of {', '.join(SAMPLES)} is {PASSWORD!r}.", flush=True)
        # By default, uvicorn trusts X-Forwarded-For from 127.0.0.1.
        uvicorn.run(app, host="127.0.0.1", port=options.port, proxy_headers=False)


if __name__ == "__main__":
    main()
