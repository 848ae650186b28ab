"""The ASGI adapter, on Starlette."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import cast

import attrs
from starlette import requests, responses
from starlette.concurrency import run_in_threadpool
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ipguard.admin._http import BODY_LIMIT, Request, Response, remove_prefix
from ipguard.admin._site import Site, find_page
from ipguard.model import Actor


def make_app(site: Site) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        http_request = requests.Request(scope, receive)
        request = _read_request(http_request)
        response = site.respond_to_anyone(request)
        if response is None:
            actor = await _authenticate(site, http_request)
            if actor is None:
                response = site.refuse_stranger(request)
            elif isinstance(actor, Actor):
                try:
                    request = attrs.evolve(request, body=await _read_body(http_request))
                except requests.ClientDisconnect:
                    return
                response = await run_in_threadpool(site.respond, request, actor)
            else:  # the host's own response, such as a redirect
                await cast("ASGIApp", actor)(scope, receive, send)
                return
        await _make_response(response)(scope, receive, send)

    # The router handles the server's lifespan events if the page is not mounted.
    return Router(default=app)


async def _authenticate(site: Site, request: requests.Request) -> object:
    if inspect.iscoroutinefunction(site.authenticate):
        return await site.authenticate(request)
    found = await run_in_threadpool(site.authenticate, request)
    return await cast("Awaitable[object]", found) if inspect.isawaitable(found) else found


def split_path(scope: Scope) -> tuple[str, str]:
    """Return the path of the mount and the path below it."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    path_below = remove_prefix(path, prefix)
    return prefix, find_page(path if path_below is None else path_below, path, prefix)


def _read_request(request: requests.Request) -> Request:
    prefix, path = split_path(request.scope)
    return Request(
        method=request.method,
        prefix=prefix,
        path=path,
        query=request.scope.get("query_string", b"").decode("latin-1"),
        headers=dict(request.headers.items()),
        cookies=request.cookies,
        https=request.scope.get("scheme") == "https",
    )


async def _read_body(request: requests.Request) -> bytes | None:
    """Return the body, or None as soon as it exceeds the limit."""
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > BODY_LIMIT:
            return None
    return bytes(read)


def _make_response(response: Response) -> responses.Response:
    made = responses.Response(response.body, response.status)
    for name, value in response.headers:
        made.headers.append(name, value)
    return made
