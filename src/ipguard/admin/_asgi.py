"""The page for ASGI hosts, on Starlette."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Asked
from starlette.responses import Response as Answer
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ipguard.admin._http import BODY_LIMIT, Request, Response
from ipguard.admin._site import Site, below, inside
from ipguard.model import Actor

Authenticate = Callable[[Asked], Any]


def make(site: Site) -> ASGIApp:
    """Make the application."""

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        asked = Asked(scope, receive)
        prefix, path = _place(scope)
        request = _request(asked, prefix, path)
        answer = site.public(request)
        if answer is None:
            actor = await _authenticated(site.authenticate, asked)
            if actor is None:
                answer = site.refuse(request)
            elif isinstance(actor, Actor):
                try:
                    body = await _body(asked)
                except ClientDisconnect:
                    return  # nobody is there to be answered
                request = _request(asked, prefix, path, body)
                answer = await run_in_threadpool(site.answer, request, actor)
            else:  # the host's own answer, a redirect perhaps
                await cast("ASGIApp", actor)(scope, receive, send)
                return
        await _sent(answer)(scope, receive, send)

    # It answers for the server's start and end where the page is not mounted into anything.
    return Router(default=page)


async def _authenticated(authenticate: Authenticate, asked: Asked) -> object:
    if inspect.iscoroutinefunction(authenticate):
        return await authenticate(asked)
    found = await run_in_threadpool(authenticate, asked)
    return await cast("Awaitable[object]", found) if inspect.isawaitable(found) else found


def _place(scope: Scope) -> tuple[str, str]:
    """Return where the page is mounted, and the path below that."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    meant = inside(path, prefix)
    return prefix, below(path if meant is None else meant, path, prefix)


def _request(asked: Asked, prefix: str, path: str, body: bytes | None = b"") -> Request:
    return Request(
        method=asked.method,
        prefix=prefix,
        path=path,
        query=asked.scope.get("query_string", b"").decode("latin-1"),
        headers=dict(asked.headers.items()),
        cookies=asked.cookies,
        https=asked.scope.get("scheme") == "https",
        body=body,
    )


async def _body(asked: Asked) -> bytes | None:
    """Read the body, or return None as soon as it is too large."""
    read = bytearray()
    async for chunk in asked.stream():
        read += chunk
        if len(read) > BODY_LIMIT:
            return None
    return bytes(read)


def _sent(answer: Response) -> Answer:
    sent = Answer(answer.body, answer.status)
    for name, value in answer.headers:
        sent.headers.append(name, value)
    return sent
