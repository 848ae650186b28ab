"""The administration page, an application to mount into the host's own web application.

    app = asgi_app(flow, guard, authenticate=authenticate)     # Starlette, FastAPI
    app = wsgi_app(flow, guard, authenticate=authenticate)     # Flask, Django, any WSGI server

`_asgi` and `_wsgi` translate the framework's requests and responses, `_site` finds the view, and
the views call the workflow and the guard, which own the rules.

Tests and scripts of hosts may rely on the following. The paths, below the mount::

    GET  /                            the list; ?after=USERNAME, ?only=FILTER, ?search=SIGNED TEXT
    POST /search                      search
    GET  /user?user=                  one user: restrictions and pending requests
    GET  /add[?user=]     POST /add          user users addresses label expires_at
    GET  /change?user=&restriction=  POST /change  user restriction addresses label expires_at
    POST /understood                  addresses; returns JSON to the script
    GET  /confirm?user=&request=  POST /confirm   user request number
    POST /approve                     user request
    POST /resend                      user request
    POST /cancel                      user request
    GET  /delete?user=&restriction=  POST /delete  user restriction reason open
    GET  /check?user=     POST /check        user address
    GET  /history[?user=&action=&since=&until=&before=]  POST /history  user action since until
    GET  /export[?user=&action=&since=&until=&before=]   the same as CSV

`addresses` holds one or several, on lines of their own or between commas; so does `users`, for more
traders than `user`. Every form is answered with a redirect. A refused form redirects to a page with
`again=`, which shows the form with the submitted values.

Each form also carries `token`, the CSRF token, and some carry `seen`, the version that they showed.
The fields' ids are their names (`#user`, `#addresses`, `#number`, ...), the error of a field is
`#NAME-problem`, all errors together are `#problems`, the message after a change is `#note`, what
will hold afterwards is `#afterwards`. Labels: "Trader", "IP Address", "Label", "Expires",
"Confirmation Number"; links of the list: "Add IP Address Restriction", "Confirm", "Cancel",
"Change", "Delete". The names of buttons that send a form to request or confirm begin with
"Submit", for those who look for the button of the original page.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ipguard.guard import Guard
from ipguard.workflow import Workflow

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from starlette.types import ASGIApp

__all__ = ["asgi_app", "wsgi_app"]


def _load(name: str) -> Any:
    try:
        return import_module(f"ipguard.admin.{name}")
    except ModuleNotFoundError as missing:
        text = 'the administration page needs its extra: pip install "ipguard[admin]"'
        raise ModuleNotFoundError(text, name=missing.name) from missing


_Site = _load("_site").Site


def asgi_app(
    flow: Workflow,
    guard: Guard,
    *,
    authenticate: Callable[[Any], Any],
    brand: str = "Account Administration",
    check_actor: bool = True,
    home_url: str | None = None,
    sign_out_url: str | None = None,
) -> ASGIApp:
    """Make the page for an ASGI server or framework.

    Args:
        flow: The workflow.
        guard: The guard, for `check_actor` and "Check an address".
        authenticate: Called as `authenticate(request)` with Starlette's request: a coroutine
            function, or a plain function, which runs on a thread. It returns the signed-in `Actor`;
            or None, which is answered with 401; or a response of the host's own, such as a
            redirect. Its exceptions propagate to the host.
        brand: The text at the top of each page, up to 100 characters.
        check_actor: Ask the guard about the actor's own username and address on each request. A
            refused actor gets a 403 page, and 503 while the store does not answer. An actor without
            an address is refused if it has restrictions.
        home_url: What the brand links to.
        sign_out_url: What the link "Sign out" leads to; without it there is none.

    Returns:
        The application. It calls the workflow and the guard on threads.

    Raises:
        InvalidValue: An argument is invalid.
        ModuleNotFoundError: The extra `admin` is not installed.
    """
    options = {"brand": brand, "home_url": home_url, "sign_out_url": sign_out_url}
    site = _Site(flow, guard, authenticate, check_actor=check_actor, **options)
    app: ASGIApp = _load("_asgi").make_app(site)
    return app


def wsgi_app(
    flow: Workflow,
    guard: Guard,
    *,
    authenticate: Callable[[Any], Any],
    brand: str = "Account Administration",
    check_actor: bool = True,
    home_url: str | None = None,
    sign_out_url: str | None = None,
) -> WSGIApplication:
    """Make the page for a WSGI server or framework.

    The arguments and errors are those of `asgi_app`, except that `authenticate`, a plain function,
    gets Werkzeug's request. Werkzeug's HTTP exceptions, such as those of `abort`, are responses.
    """
    options = {"brand": brand, "home_url": home_url, "sign_out_url": sign_out_url}
    site = _Site(flow, guard, authenticate, check_actor=check_actor, **options)
    app: WSGIApplication = _load("_wsgi").make_app(site)
    return app
