"""The administration page, to be mounted into the host's own web application.

    app = asgi_app(flow, guard, authenticate=who)     # Starlette, FastAPI
    app = wsgi_app(flow, guard, authenticate=who)     # Flask, Django, any WSGI server

Both answer with the same pages: thin adapters (`_asgi`, `_wsgi`) turn the framework's request into
a value and the views' value into the framework's response; `_site` finds the view. Every rule is
the workflow's and the guard's.

What stays as it is, for tests and scripts of adopters. Below where the page is mounted::

    GET  /                            the list; ?after=USERNAME, ?search=SEALED TEXT
    POST /search                      search
    GET  /user?user=                  one user: what holds, what waits
    GET  /add[?user=]     POST /add          user addresses label expires_at
    POST /understood                  addresses; answers in JSON, for the script
    GET  /confirm?user=&request=  POST /confirm   user request number
    POST /resend                      user request
    POST /cancel                      user request
    GET  /delete?user=&restriction=  POST /delete  user restriction reason open
    GET  /check?user=     POST /check        user address
    GET  /history[?user=&before=]     POST /history   user

Every POST but that of the script is answered by a redirect; a refused form's goes to a page with
`again=`, which shows the form with what was typed.

Each form also carries `token`, and some `seen`: what its sender had seen. The fields' ids are their
names (`#user`, `#addresses`, `#number`, ...), a field's error is `#NAME-problem`, all errors
together `#problems`, the message after a change `#note`. Labels: "Trader", "IP Address", "Label",
"Expires", "Confirmation Number"; buttons and links: "Add IP Address Restriction", "Submit",
"Confirm", "Cancel", "Delete".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from importlib import import_module
from typing import Any

from ipguard.guard import Guard
from ipguard.workflow import Workflow

__all__ = ["asgi_app", "wsgi_app"]

_MISSING = 'the administration page needs its extra: pip install "ipguard[admin]"'

try:
    from ipguard.admin._site import Site
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(_MISSING, name=missing.name) from missing

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]
WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def asgi_app(
    flow: Workflow,
    guard: Guard,
    *,
    authenticate: Callable[[Any], Any],
    brand: str = "Account Administration",
) -> ASGIApp:
    """Make the page for an ASGI server or framework.

    Args:
        flow: What changes restrictions.
        guard: What logins are answered by; "Check an address" asks it.
        authenticate: Called as `authenticate(request)` with Starlette's request; a coroutine
            function, or a plain one, which runs on a thread. It returns the `Actor` whom the host
            has signed in; or None: the answer is then 401; or a response of the host's own, such as
            a redirect. What it raises is the host's to handle.
        brand: What stands at the top of each page, up to 100 characters.

    Returns:
        The application. What takes time runs on threads.

    Raises:
        InvalidValue: An argument makes no sense.
        ModuleNotFoundError: The extra `admin` is not installed.
    """
    app: ASGIApp = _adapter("_asgi").make(Site(flow, guard, brand, authenticate))
    return app


def wsgi_app(
    flow: Workflow,
    guard: Guard,
    *,
    authenticate: Callable[[Any], Any],
    brand: str = "Account Administration",
) -> WSGIApp:
    """Make the page for a WSGI server or framework.

    Args:
        flow: As for `asgi_app`.
        guard: As for `asgi_app`.
        authenticate: Called as `authenticate(request)` with Werkzeug's request. It returns what it
            does for `asgi_app`; Werkzeug's HTTP exceptions, such as `abort` raises, are answers.
        brand: As for `asgi_app`.

    Returns:
        The application.

    Raises:
        InvalidValue: An argument makes no sense.
        ModuleNotFoundError: The extra `admin` is not installed.
    """
    app: WSGIApp = _adapter("_wsgi").make(Site(flow, guard, brand, authenticate))
    return app


def _adapter(name: str) -> Any:
    try:
        return import_module(f"ipguard.admin.{name}")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(_MISSING, name=missing.name) from missing
