"""From a request to the view that answers it; what goes wrong on the way becomes a page."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

from ipguard._checks import check_text
from ipguard.admin import _add, _confirm, _delete, _http, _list, _look
from ipguard.admin._http import BadRequest, Request, Response
from ipguard.admin._render import loaded
from ipguard.admin._signing import PURPOSE, Signer
from ipguard.admin._visit import Missing, Visit
from ipguard.errors import (
    InvalidValue,
    IPGuardError,
    StoreError,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
)
from ipguard.guard import Guard
from ipguard.model import Actor
from ipguard.workflow import Workflow

_log = logging.getLogger("ipguard.admin")

View = Callable[[Visit], Response]

ROUTES: Final[Mapping[str, Mapping[str, View]]] = {
    "/": {"GET": _list.show},
    "/search": {"POST": _list.search},
    "/user": {"GET": _look.user},
    "/add": {"GET": _add.show, "POST": _add.submit},
    "/understood": {"POST": _add.understood},
    "/confirm": {"GET": _confirm.show, "POST": _confirm.submit},
    "/resend": {"POST": _confirm.resend},
    "/cancel": {"POST": _confirm.cancel},
    "/delete": {"GET": _delete.show, "POST": _delete.submit},
    "/check": {"GET": _look.check, "POST": _look.checked},
    "/history": {"GET": _look.history, "POST": _look.find_history},
}
_UNKNOWN: Final = (Missing, UnknownUser, UnknownRequest, UnknownRestriction)
_STATIC: Final = "/static/"
_PATHS: Final = frozenset({"", *ROUTES})  # "" is the mount without its slash


def below(meant: str, path: str, prefix: str) -> str:
    """Return the path below where the page is mounted.

    Servers, frameworks and proxies disagree about what a prefix that they know does to the path: it
    is in the path, or a proxy has removed it, or it is there twice, or only the part that a
    framework's mount added is there. The first reading that leads to a page is taken.

    Args:
        meant: The path below the prefix, as the server's specification has it.
        path: The path that the server passed.
        prefix: The prefix that the server passed, without a slash at its end.
    """
    ends = (prefix[at:] for at, char in enumerate(prefix) if char == "/")
    readings = (meant, inside(meant, prefix), path, *(inside(path, end) for end in ends))
    found = (it for it in readings if it is not None and (it in _PATHS or it.startswith(_STATIC)))
    return next(found, meant)


def inside(path: str, prefix: str) -> str | None:
    """Return the part of a path below a prefix, or None if the path is not below it."""
    if not prefix or not (path == prefix or path.startswith(f"{prefix}/")):
        return None
    rest = path[len(prefix) :]
    return rest and f"/{rest.lstrip('/')}"


class Site:
    """The page: what the two adapters have in common. Thread-safe.

    Args:
        flow: What changes restrictions.
        guard: What a login would be answered.
        brand: What stands at the top of each page.
        authenticate: Who is signed in; the adapters ask it.

    Raises:
        InvalidValue: One of them is not what it should be.
    """

    def __init__(
        self, flow: Workflow, guard: Guard, brand: str, authenticate: Callable[[Any], Any]
    ) -> None:
        if not callable(authenticate):
            raise InvalidValue("authenticate", "must be callable")
        if not isinstance(flow, Workflow):
            raise InvalidValue("flow", "must be a Workflow; an AsyncWorkflow has one as .flow")
        if not isinstance(guard, Guard):
            raise InvalidValue("guard", "must be a Guard; an AsyncGuard has one as .guard")
        self.authenticate = authenticate
        self.flow = flow
        self.guard = guard
        self.brand = check_text("brand", brand, 100, required=True)
        # The page shares the workflow's keys, which are not part of its public interface.
        self.signer = Signer(flow._derived_keys(PURPOSE))  # noqa: SLF001
        self.assets, self.templates = loaded()

    def public(self, request: Request) -> Response | None:
        """Answer what everybody may have, without asking who it is; None for all else."""
        if not request.path:
            # Links are relative, so the slash matters.
            return _http.redirect(f"{quote(request.prefix.rpartition('/')[2])}/")
        if not request.path.startswith(_STATIC):
            return None
        found = self.assets.get(request.path.removeprefix(_STATIC))
        if found is None or request.method not in ("GET", "HEAD"):
            return _http.page(404, "Not found")
        return found

    def refuse(self, request: Request) -> Response:
        """Answer who is not signed in."""
        return self._error(
            request, None, 401, "You are not signed in", "Sign in, then open this page again."
        )

    def answer(self, request: Request, actor: Actor) -> Response:
        """Answer an actor. Nothing is raised."""
        try:
            return self._answer(request, actor)
        except BadRequest as wrong:
            return self._error(request, actor, wrong.status, "That did not work", wrong.text)
        except _UNKNOWN:
            return self._not_found(request, actor)
        except StoreError as failure:
            _log.error("the store does not answer: %s", type(failure).__name__)
            return self._unavailable(request, actor)
        except IPGuardError as refused:
            return self._error(request, actor, 409, "That did not work", str(refused))
        except Exception as failure:
            # Without its message: that may hold what was typed.
            _log.error(
                "a page failed: %s\n%s",
                type(failure).__name__,
                "".join(traceback.format_tb(failure.__traceback__)),
            )
            return self._error(
                request,
                actor,
                500,
                "Something went wrong",
                "It has been recorded. Go back to the list and see whether your change was made "
                "before you try again.",
            )

    def _answer(self, request: Request, actor: Actor) -> Response:
        views = ROUTES.get(request.path)
        if views is None:
            raise Missing
        method = "GET" if request.method == "HEAD" else request.method
        view = views.get(method)
        if view is None:
            allowed = ", ".join(views)
            return self._error(
                request,
                actor,
                405,
                "That did not work",
                "Go back to the list.",
                (("Allow", allowed),),
            )
        visit = Visit(self, request, actor)
        if method == "POST":
            visit.form = request.form()
            if not visit.is_ours():
                return self._error(
                    request,
                    actor,
                    403,
                    "This form is not one that you opened here",
                    "Nothing was changed. Perhaps you signed in anew since you opened it, or your "
                    "browser keeps no cookies. Open the page again, and send the form from there.",
                )
        return view(visit)

    def _not_found(self, request: Request, actor: Actor) -> Response:
        return self._error(
            request,
            actor,
            404,
            "Not found",
            "It may have been deleted or closed meanwhile. The list shows what there is.",
        )

    def _unavailable(self, request: Request, actor: Actor) -> Response:
        text = "The restrictions cannot be read or changed at the moment. Try again shortly."
        if request.method == "POST":
            text += " Look at the list before you repeat a change: it may have been made."
        return self._error(request, actor, 503, "Not available now", text, (("Retry-After", "5"),))

    def _error(
        self,
        request: Request,
        actor: Actor | None,
        status: int,
        title: str,
        text: str,
        more: tuple[tuple[str, str], ...] = (),
    ) -> Response:
        html = self.templates.render(
            "error.html",
            {
                "base": request.base,
                "brand": self.brand,
                "title": title,
                "text": text,
                "link": lambda name: _http.link(request.base, name),
                "status": status,
                "actor": actor,
                "now": None,  # it is the store's, which may not answer
                "note": None,
                "problems": {},
            },
        )
        return _http.page(status, html, more)
