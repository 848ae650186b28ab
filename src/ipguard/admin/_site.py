"""The site: routes, error pages, templates and static files, shared by both adapters."""

from __future__ import annotations

import functools
import hashlib
import logging
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ipguard import errors, rules
from ipguard._checks import check_callable, check_switch, check_text
from ipguard.admin import _add, _changes, _http, _listing, _messages
from ipguard.admin._context import Context, Services, Signer
from ipguard.admin._http import (
    SAFE_HEADERS,
    ActorRefused,
    NotFound,
    PageError,
    Request,
    Response,
)
from ipguard.guard import Guard
from ipguard.model import Actor, Outcome, Reason
from ipguard.workflow import Workflow

_log = logging.getLogger("ipguard.admin")

View = Callable[[Context], Response]

ROUTES: Final[Mapping[str, Mapping[str, View]]] = {
    "/": {"GET": _listing.show_list},
    "/search": {"POST": _listing.search},
    "/user": {"GET": _listing.show_user},
    "/add": {"GET": _add.show, "POST": _add.submit},
    "/change": {"GET": _add.show_change, "POST": _add.change},
    "/understood": {"POST": _add.describe_typed},
    "/confirm": {"GET": _changes.show_confirm, "POST": _changes.confirm},
    "/approve": {"POST": _changes.approve},
    "/resend": {"POST": _changes.resend},
    "/cancel": {"POST": _changes.cancel},
    "/delete": {"GET": _changes.show_delete, "POST": _changes.delete},
    "/check": {"GET": _listing.show_check, "POST": _listing.check},
    "/history": {"GET": _listing.show_history, "POST": _listing.find_history},
    "/export": {"GET": _listing.export_history},
}
PURPOSE: Final = "ipguard.admin"  # of the keys that are derived from the workflow's

_HERE: Final = Path(__file__).resolve().parent
_STATIC: Final = "/static/"
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_YEAR: Final = 31_536_000  # seconds
_URL_LIMIT: Final = 500


def find_page(path_below: str, path: str, prefix: str) -> str:
    """Return the path below the mount.

    Servers, frameworks and proxies treat a configured prefix differently: the path contains it, or
    a proxy removed it, or it is there twice, or the path contains only the part that a framework's
    mount added. Take the first interpretation that names a page. `path_below` follows the
    specification; `path` and `prefix` (without a slash at the end) come from the server.
    """
    suffixes = (prefix[at:] for at, char in enumerate(prefix) if char == "/")
    candidates = (
        path_below,
        _http.remove_prefix(path_below, prefix),
        path,
        *(_http.remove_prefix(path, suffix) for suffix in suffixes),
    )
    for found in candidates:
        # An empty path is the mount without its slash.
        if found is not None and (found in ROUTES or not found or found.startswith(_STATIC)):
            return found
    return path_below


class Site:
    """The page, independent of a framework; the adapters call `authenticate`. Thread-safe."""

    def __init__(
        self,
        flow: Workflow,
        guard: Guard,
        authenticate: Callable[[Any], Any],
        *,
        brand: str,
        check_actor: bool,
        home_url: str | None,
        sign_out_url: str | None,
    ) -> None:
        check_callable("authenticate", authenticate)
        if not isinstance(flow, Workflow):
            raise errors.InvalidValue(
                "flow", "must be a Workflow; an AsyncWorkflow has one as .flow"
            )
        if not isinstance(guard, Guard):
            raise errors.InvalidValue("guard", "must be a Guard; an AsyncGuard has one as .guard")
        self.authenticate = authenticate
        self._files, templates = _load_files()
        self.services = Services(
            flow=flow,
            guard=guard,
            check_actor=check_switch("check_actor", check_actor),
            home_url=_check_url("home_url", home_url),
            sign_out_url=_check_url("sign_out_url", sign_out_url),
            brand=check_text("brand", brand, 100, required=True),
            # The workflow's keys are not part of its public interface.
            signer=Signer(flow._derived_keys(PURPOSE)),  # noqa: SLF001
            templates=templates,
        )

    def respond_to_anyone(self, request: Request) -> Response | None:
        """Respond to a request that needs no actor; return None for any other."""
        if not request.path:
            # Links are relative, so the slash matters.
            return _http.redirect(f"{quote(request.prefix.rpartition('/')[2])}/")
        if not request.path.startswith(_STATIC):
            return None
        found = self._files.get(request.path.removeprefix(_STATIC))
        if found is None or request.method not in ("GET", "HEAD"):
            return _http.respond(404, "Not found")
        return found

    def refuse_stranger(self, request: Request) -> Response:
        text = "Sign in, then open this page again."
        return self._show_error(request, None, PageError(401, text, "You are not signed in"))

    def respond(self, request: Request, actor: Actor) -> Response:
        """Respond to an actor. Every exception becomes an error page."""
        try:
            if self.services.check_actor:
                self._check_actor(actor)
            return self._dispatch(request, actor)
        except Exception as error:
            return self._show_error(request, actor, _to_page_error(request, error))

    def _check_actor(self, actor: Actor) -> None:
        """Raise PageError unless the guard lets the actor in from its address."""
        # Without an address, ask for one that no client has: it is not restricted if that is let
        # in, except by a network that contains it.
        decision = self.services.guard.check(actor.username, actor.address or "::")
        if decision.outcome is Outcome.RETRY:
            raise _unavailable("It cannot be checked at the moment whether you may open this page.")
        restricted = actor.address is None and decision.reason is Reason.LISTED
        if restricted or decision.outcome is Outcome.REFUSE:
            raise ActorRefused(403, _messages.explain_refusal(actor, decision), "Access refused")

    def _dispatch(self, request: Request, actor: Actor) -> Response:
        views = ROUTES.get(request.path)
        if views is None:
            raise NotFound
        view = views.get("GET" if request.method == "HEAD" else request.method)
        if view is None:
            allow = ("Allow", ", ".join(views))
            raise PageError(405, "Go back to the list.", headers=(allow,))
        context = Context(self.services, request, actor)
        if request.method == "POST":
            context.form = request.parse_form()
            if not context.has_valid_token():
                raise PageError(
                    403,
                    "Nothing was changed. Perhaps you signed in anew since you opened it, or your "
                    "browser keeps no cookies. Open the page again, and send the form from there.",
                    "This form is not one that you opened here",
                )
        return view(context)

    def _show_error(self, request: Request, actor: Actor | None, error: PageError) -> Response:
        # Without the time: the store, whose time it is, may be unavailable.
        refused = isinstance(error, ActorRefused)
        html = self.services.render("error.html", request, actor, error=error, refused=refused)
        return _http.respond(error.status, html, error.headers)


def _to_page_error(request: Request, error: Exception) -> PageError:
    if isinstance(error, PageError):
        return error
    unknown = (errors.UnknownUser, errors.UnknownRequest, errors.UnknownRestriction)
    if isinstance(error, (*unknown, errors.UsernameError)):
        return NotFound()
    if isinstance(error, errors.StoreError):
        _log.error("the store is unavailable: %s", type(error).__name__)
        again = ""
        if request.method == "POST":
            again = "Look at the list before you repeat a change: it may have been made."
        return _unavailable("The restrictions cannot be read or changed at the moment.", again)
    if isinstance(error, errors.IPGuardError):
        return PageError(409, str(error))
    # Do not log the exception's message: it may contain what the actor typed.
    trace = "".join(traceback.format_tb(error.__traceback__))
    _log.error("a page failed: %s\n%s", type(error).__name__, trace)
    text = (
        "It has been recorded. Go back to the list and see whether your change was made "
        "before you try again."
    )
    return PageError(500, text, "Something went wrong")


def _unavailable(why: str, again: str = "") -> PageError:
    text = f"{why} Try again shortly. {again}".strip()
    return PageError(503, text, "Not available now", (("Retry-After", "5"),))


def _check_url(name: str, url: object) -> str | None:
    """Check the URL of a link, which must lead to a web page; None is no link."""
    if url is None:
        return None
    text = check_text(name, url, _URL_LIMIT, required=True)
    if urlsplit(text).scheme not in ("", "http", "https"):
        raise errors.InvalidValue(name, "must be a path or an http(s) URL")
    return text


@functools.cache
def _load_files() -> tuple[Mapping[str, Response], Environment]:
    """Return the static files by name in URLs, and the templates.

    A static file's name contains a digest of its content, so it may be cached for long.
    """
    names, files = {}, {}
    for path in sorted((_HERE / "static").iterdir()):
        content = path.read_bytes()
        name = f"{path.stem}.{hashlib.sha256(content).hexdigest()[:16]}{path.suffix}"
        names[path.name] = name
        headers = (
            ("Content-Type", f"{_TYPES[path.suffix]}; charset=utf-8"),
            ("Cache-Control", f"public, max-age={_YEAR}, immutable"),
            *SAFE_HEADERS,
        )
        files[name] = Response(status=200, headers=headers, body=content)
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    templates.globals.update(assets=names, days=rules.SEEN_FOR.days)
    templates.filters.update(
        when=_format_time_element,
        understood=_messages.format_range,
        meaning=_messages.format_ranges,
        demanded=_messages.describe_demand,
        lasting=_messages.format_duration,
        shut=rules.all_expired,
        attempts=_messages.format_attempts,
        done=_messages.describe_action,
        action=_messages.name_action,
        more=_messages.describe_particulars,
    )
    for name in templates.list_templates():
        templates.get_template(name)  # compile it now rather than for the first request
    return files, templates


def _format_time_element(at: datetime) -> Markup:
    return Markup('<time datetime="{}">{}</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"), _messages.format_time(at)
    )
