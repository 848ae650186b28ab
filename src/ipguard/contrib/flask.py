"""The kit for Flask: the login, a check on each request, and the page.

The whole glue of a host::

    ips = IPGuard(app, guard=guard, workflow=flow, client=client, user=user, actor=actor)
    app.register_blueprint(ips.blueprint(), url_prefix="/ip-restrictions")

    outcome = ips.allow_login(username, password_is_right=right)  # in the login view
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, Flask, abort, current_app, request, session
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import ServiceUnavailable

from ipguard._checks import check_callable, check_switch
from ipguard.admin import wsgi_app
from ipguard.client_address import ClientAddress
from ipguard.contrib._answers import RETRY_AFTER, TRY_AGAIN, with_address
from ipguard.guard import Guard
from ipguard.model import Outcome
from ipguard.workflow import Workflow

__all__ = ["IPGuard"]


class IPGuard:
    """The guard of a Flask application.

    Before each request of a signed-in user it asks the guard again. If the user may no longer be
    logged in from this address, it ends the session and answers with Flask-Login's
    `unauthorized()`, or else with 401. While the store does not answer, it
    answers 503 and leaves the session as it is.

    The first request starts the guard's refresher, so that servers may fork before.

    Args:
        app: The application; without it, call `init_app`.
        guard: The guard.
        workflow: The workflow behind the page.
        client: Where each request comes from. A peer that `ProxyFix` replaced is found.
        user: Called in each request without arguments. It returns the username of the signed-in
            user, as the user's record has it, or None:
            `lambda: session.get("username")`, or with Flask-Login
            `lambda: current_user.username if current_user.is_authenticated else None`.
        actor: Called without arguments in requests of the page. It returns the signed-in
            administrator as an `Actor`, to which the kit adds the client's address unless it has
            one; or None, which is answered with 401; or a response, such as a redirect to your
            sign-in.
        end_session: Called without arguments to end the session, in place of clearing Flask's
            `session` and calling Flask-Login's `logout_user`.
        sightings: Whether to record where users log in from, and to tell them about refused logins
            with the right password; see `Guard.saw`.

    Raises:
        InvalidValue: `user`, `actor` or `end_session` cannot be called.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        guard: Guard,
        workflow: Workflow,
        client: ClientAddress,
        user: Callable[[], str | None],
        actor: Callable[[], Any],
        end_session: Callable[[], object] | None = None,
        sightings: bool = True,
    ) -> None:
        check_callable("user", user)
        check_callable("actor", actor)
        self._guard = guard
        self._workflow = workflow
        self._client = client
        self._user = user
        self._actor = actor
        self._end_session = _end_session if end_session is None else end_session
        check_callable("end_session", self._end_session)
        self._sightings = check_switch("sightings", sightings)
        if sightings:
            guard.follow_refusals(workflow.tell_refused)
        self._started = False
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Check each request of an application. `app.extensions["ipguard"]` is this object."""
        app.extensions["ipguard"] = self
        app.before_request(self._check_session)

    def address(self) -> str:
        """Return the client's address of the current request; empty if it cannot be known."""
        # `ProxyFix` keeps what it replaces. The peer is that of the connection.
        original = request.environ.get("werkzeug.proxy_fix.orig", {})
        return self._client.wsgi({**request.environ, **original})

    def allow_login(self, username: str, *, password_is_right: bool = False) -> Outcome:
        """Return whether a user may be logged in from where the current request comes.

        Args:
            username: The username of the user's record, after the password was checked.
            password_is_right: Whether the password, and every other step of the login, was right.
                Only then the login is recorded as a sighting.

        Returns:
            The outcome, of which only `ALLOW` is true. In case of `REFUSE` answer as to a wrong
            password, in case of `RETRY` with 503.
        """
        address = self.address()
        decision = self._guard.check(username, address)
        if password_is_right and self._sightings:
            self._guard.saw(username, address, decision)
        return decision.outcome

    def blueprint(self, name: str = "ipguard", **settings: Any) -> Blueprint:
        """Return the page as a blueprint, to register with a `url_prefix` of your choice.

        Args:
            name: The name of the blueprint; its endpoint is `page`.
            settings: The other arguments of `ipguard.admin.wsgi_app`, such as `brand`.

        Raises:
            InvalidValue: An argument is invalid.
        """
        page = wsgi_app(self._workflow, self._guard, authenticate=self._find_actor, **settings)
        blueprint = Blueprint(name, __name__)

        @blueprint.route("/", methods=["GET", "POST"], endpoint="page")
        @blueprint.route("/<path:path>", methods=["GET", "POST"], endpoint="page")
        def respond(**_: object) -> ResponseReturnValue:
            environ = dict(request.environ)
            depth = str(request.url_rule).count("/")
            *above, below = environ["PATH_INFO"].split("/", depth)
            environ |= {
                "SCRIPT_NAME": environ["SCRIPT_NAME"] + "/".join(above),
                "PATH_INFO": f"/{below}",
            }
            if request.form:  # whether or not the host has read the body before
                body = urlencode(list(request.form.items(multi=True))).encode()
                environ |= {"wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}
            return current_app.response_class.from_app(page, environ)

        return blueprint

    def _find_actor(self, _: object) -> Any:
        return with_address(self._actor(), self.address)

    def _check_session(self) -> ResponseReturnValue | None:
        if not self._started:
            self._guard.start()
            self._started = True
        username = self._user()
        if username is None:
            return None
        outcome = self.allow_login(username)
        if outcome is Outcome.RETRY:
            raise ServiceUnavailable(TRY_AGAIN, retry_after=RETRY_AFTER)
        if outcome is Outcome.REFUSE:
            self._end_session()
            return _unauthorized()
        return None


def _end_session() -> None:
    if not current_app.session_interface.is_null_session(session):
        session.clear()
    if hasattr(current_app, "login_manager"):
        import_module("flask_login").logout_user()  # also removes the cookie that remembers


def _unauthorized() -> ResponseReturnValue:
    # The user's session has ended, but the host may have read it for this request already.
    login_manager = getattr(current_app, "login_manager", None)
    if login_manager is None:
        abort(401)
    answer: ResponseReturnValue = login_manager.unauthorized()
    return answer
