"""The page for WSGI hosts, on Werkzeug."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.wrappers import Request as Asked
from werkzeug.wrappers import Response as Answer

from ipguard.admin._http import BODY_LIMIT, Request, Response
from ipguard.admin._site import Site, below
from ipguard.model import Actor

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


def make(site: Site) -> Callable[[Environ, StartResponse], Iterable[bytes]]:
    """Make the application."""

    def page(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        asked = Asked(environ)
        request = _request(asked)
        answer = site.public(request)
        if answer is None:
            try:
                actor = site.authenticate(asked)
            except HTTPException as raised:  # `abort` and redirects: answers that are raised
                actor = raised
            if actor is None:
                answer = site.refuse(request)
            elif isinstance(actor, Actor):
                answer = site.answer(_request(asked, _body(asked)), actor)
            else:  # the host's own answer, a redirect perhaps
                own: Iterable[bytes] = actor(environ, start_response)
                return own
        return _sent(answer)(environ, start_response)

    return page


def _request(asked: Asked, body: bytes | None = b"") -> Request:
    prefix = asked.root_path.rstrip("/")
    path = asked.environ.get("PATH_INFO", "") and asked.path
    return Request(
        method=asked.method,
        prefix=prefix,
        path=below(path, path, prefix),
        query=asked.query_string.decode("latin-1"),
        headers={name.lower(): value for name, value in asked.headers.items()},
        cookies=asked.cookies,
        https=asked.is_secure,
        body=body,
    )


def _body(asked: Asked) -> bytes | None:
    """Read the body, or return None where it is too large."""
    asked.max_content_length = BODY_LIMIT
    try:
        return asked.get_data(cache=False)
    except RequestEntityTooLarge:
        return None
    except ClientDisconnected:
        return b""  # cut off; what is left of it is no form of ours


def _sent(answer: Response) -> Answer:
    sent = Answer(answer.body, answer.status)
    sent.headers.remove("Content-Type")
    for name, value in answer.headers:
        sent.headers.add(name, value)
    return sent
