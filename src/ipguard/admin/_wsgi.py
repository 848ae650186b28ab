"""The WSGI adapter, on Werkzeug."""

from __future__ import annotations

from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import attrs
from werkzeug import wrappers
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

from ipguard.admin._http import BODY_LIMIT, Request, Response
from ipguard.admin._site import Site, find_page
from ipguard.model import Actor


def make_app(site: Site) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        http_request = wrappers.Request(environ)
        request = _read_request(http_request)
        response = site.respond_to_anyone(request)
        if response is None:
            try:
                actor = site.authenticate(http_request)
            except HTTPException as raised:  # such as by abort(): it is a response itself
                actor = raised
            if actor is None:
                response = site.refuse_stranger(request)
            elif isinstance(actor, Actor):
                request = attrs.evolve(request, body=read_body(http_request))
                response = site.respond(request, actor)
            else:  # the host's own response, such as a redirect
                own: Iterable[bytes] = actor(environ, start_response)
                return own
        return _make_response(response)(environ, start_response)

    return app


def _read_request(request: wrappers.Request) -> Request:
    prefix = request.root_path.rstrip("/")
    path = request.environ.get("PATH_INFO", "") and request.path
    return Request(
        method=request.method,
        prefix=prefix,
        path=find_page(path, path, prefix),
        query=request.query_string.decode("latin-1"),
        headers={name.lower(): value for name, value in request.headers.items()},
        cookies=request.cookies,
        https=request.is_secure,
    )


def read_body(request: wrappers.Request) -> bytes | None:
    """Return the body; None if it exceeds the limit, empty if the client went away."""
    request.max_content_length = BODY_LIMIT
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        return None
    except ClientDisconnected:
        return b""


def _make_response(response: Response) -> wrappers.Response:
    made = wrappers.Response(response.body, response.status)
    made.headers.remove("Content-Type")
    for name, value in response.headers:
        made.headers.add(name, value)
    return made
