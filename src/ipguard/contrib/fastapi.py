"""The kit for FastAPI: the login, a check on each request, and the page.

The whole glue of a host, whose dependencies `username` and `actor` are::

    ips = IPGuard(guard, workflow, client)
    app = FastAPI(dependencies=[Depends(ips.each_request(username))])
    app.include_router(ips.router(actor), prefix="/ip-restrictions")

    # in the login, with `check: Annotated[Check, Depends(ips)]`
    decision = await check(username, password_is_right=right)

The event loop is not blocked: the guard is an `AsyncGuard`, and the page runs on threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import WebSocketException
from fastapi.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ipguard._checks import check_callable, check_switch
from ipguard.admin import asgi_app
from ipguard.aio import AsyncGuard, AsyncWorkflow
from ipguard.client_address import ClientAddress
from ipguard.contrib._answers import RETRY_AFTER, TRY_AGAIN, with_address
from ipguard.guard import Guard
from ipguard.model import Decision, Outcome
from ipguard.workflow import Workflow

__all__ = ["Check", "IPGuard"]


class Check(Protocol):
    """What the dependency `IPGuard` gives: `IPGuard.check` for the current request."""

    def __call__(
        self, username: str, *, password_is_right: bool = False
    ) -> Coroutine[Any, Any, Decision]:
        """Decide whether a user may be logged in from where the request comes."""


_ACTOR = "ipguard.actor"  # in the scope


class IPGuard:
    """The guard of a FastAPI application; as a dependency, it gives a `Check`.

    Args:
        guard: The guard; from a `Guard`, an `AsyncGuard` is made.
        workflow: The workflow behind the page.
        client: Where each request comes from.
        sightings: Whether to record where users log in from, and to tell them about refused logins
            with the right password; see `Guard.saw`.

    Raises:
        InvalidValue: `sightings` is not a bool.
    """

    def __init__(
        self,
        guard: Guard | AsyncGuard,
        workflow: Workflow | AsyncWorkflow,
        client: ClientAddress,
        *,
        sightings: bool = True,
    ) -> None:
        self._guard = guard if isinstance(guard, AsyncGuard) else AsyncGuard(guard)
        self._workflow = workflow.flow if isinstance(workflow, AsyncWorkflow) else workflow
        self._client = client
        self._sightings = check_switch("sightings", sightings)
        if sightings:
            self._guard.follow_refusals(self._workflow.tell_refused)

    async def __call__(self, connection: HTTPConnection) -> Check:
        """Return the `Check` of a request or a WebSocket."""
        return partial(self.check, connection)

    async def check(
        self, connection: HTTPConnection, username: str, *, password_is_right: bool = False
    ) -> Decision:
        """Decide whether a user may be logged in from where a request comes.

        Args:
            connection: The request, or a WebSocket.
            username: The username of the user's record, after the password was checked.
            password_is_right: Whether the password, and every other step of the login, was right.
                Only then the login is recorded as a sighting.

        Returns:
            The decision. If its outcome is `REFUSE`, answer as to a wrong password; if it is
            `RETRY`, answer 503.
        """
        address = self._client.asgi(connection.scope)
        decision = await self._guard.check(username, address)
        if password_is_right and self._sightings:
            await self._guard.saw(username, address, decision)
        return decision

    def each_request(
        self,
        user: Callable[..., Any],
        *,
        end_session: Callable[[HTTPConnection], object] | None = None,
    ) -> Callable[..., Any]:
        """Return a dependency that checks the signed-in user of each request again.

        If the user may no longer be logged in from this address, it ends the session and raises
        HTTPException 401; while the store does not answer, it raises 503 and leaves the session as
        it is. It closes a WebSocket with the codes 1008 and 1013.

        Args:
            user: A dependency of yours. It gives the username of the signed-in user, as the user's
                record has it, or None.
            end_session: Called with the request, or WebSocket, to end the session. Without it, the
                session of Starlette's `SessionMiddleware` is cleared, if there is one.

        Raises:
            InvalidValue: `user` or `end_session` cannot be called.
        """
        check_callable("user", user)
        end = _end_session if end_session is None else end_session
        check_callable("end_session", end)
        signed_in = Depends(user)

        async def check_session(
            connection: HTTPConnection, username: str | None = signed_in
        ) -> None:
            if username is None:
                return
            outcome = (await self.check(connection, username)).outcome
            if outcome is Outcome.ALLOW:
                return
            retry = outcome is Outcome.RETRY
            if not retry:
                end(connection)
            if connection.scope["type"] == "websocket":
                raise WebSocketException(1013 if retry else 1008)
            if retry:
                raise HTTPException(503, TRY_AGAIN, headers={"Retry-After": str(RETRY_AFTER)})
            raise HTTPException(401, "Please sign in.")

        return check_session

    def router(self, actor: Callable[..., Any], **settings: Any) -> APIRouter:
        """Return the page as a router, to include with a `prefix` of your choice.

        Its lifespan is `lifespan`.

        Args:
            actor: A dependency of yours. It gives the signed-in administrator as an `Actor`, to
                which the kit adds the client's address unless it has one; or None, which is
                answered with 401; or a response, such as a redirect to your sign-in.
            settings: The other arguments of `ipguard.admin.asgi_app`, such as `brand`.

        Raises:
            InvalidValue: An argument is invalid.
        """
        check_callable("actor", actor)
        page = asgi_app(self._workflow, self._guard.guard, authenticate=_find_actor, **settings)
        router = APIRouter(lifespan=self.lifespan, include_in_schema=False)
        signed_in = Depends(actor)

        @router.api_route("/{path:path}", methods=["GET", "HEAD", "POST"], name="ipguard")
        async def respond(request: Request, path: str, found: Any = signed_in) -> Response:
            found = with_address(found, partial(self._client.asgi, request.scope))
            mount = request.scope["path"].removesuffix(path).rstrip("/")
            return _Page(page, {"root_path": mount, _ACTOR: found})

        return router

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start and stop the guard's refresher with the application.

        `router` does this; without the page, pass it to `FastAPI(lifespan=...)`.
        """
        async with self._guard:
            yield


def _end_session(connection: HTTPConnection) -> None:
    connection.scope.get("session", {}).clear()


async def _find_actor(request: Request) -> Any:
    return request.scope[_ACTOR]


class _Page(Response):
    """A response that the page's application sends."""

    def __init__(self, page: ASGIApp, scope: dict[str, Any]) -> None:
        super().__init__()
        self._page = page
        self._scope = scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._page({**scope, **self._scope}, receive, send)
