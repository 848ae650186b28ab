"""ipguard in a Django project: the login, a check on each request, and the page.

    INSTALLED_APPS = [..., "ipguard.contrib.django"]
    MIDDLEWARE = [..., "ipguard.contrib.django.GuardMiddleware"]
    AUTHENTICATION_BACKENDS = ["ipguard.contrib.django.GuardBackend", ...]
    IPGUARD = {"URL": ..., "KEY_FILE": ..., "PROXIES": [...], "ACTOR": ...}
    path("ip-restrictions/", include("ipguard.contrib.django.urls"))

docs/django.md describes them. The other modules of this package are those that Django asks for.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.message import EmailMessage
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from wsgiref.types import WSGIApplication

import attrs

try:
    from django.conf import settings
except ModuleNotFoundError as missing:
    _TEXT = "ipguard.contrib.django needs Django: pip install django"
    raise ModuleNotFoundError(_TEXT, name=missing.name) from missing

from asgiref.sync import sync_to_async
from django.contrib import auth
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.debug import sensitive_variables

from ipguard._checks import check_switch
from ipguard.client_address import ClientAddress
from ipguard.confirmation import Keyring
from ipguard.contrib._answers import RETRY_AFTER, TRY_AGAIN, with_address
from ipguard.errors import (
    InvalidValue,
    IPGuardError,
    StoreError,
    StoreUnavailable,
    UsernameCollision,
)
from ipguard.guard import Guard
from ipguard.mail import ConsoleNotifier, EmailNotifier
from ipguard.model import Decision, Outcome, Sighting, User
from ipguard.notify import Notifier
from ipguard.stores import open_store
from ipguard.workflow import Workflow, WorkflowSettings

__all__ = ["GuardBackend", "GuardMiddleware", "Kit", "kit"]

_log = logging.getLogger(__name__)

_REQUIRED: Final = ("URL", "KEY_FILE", "ACTOR")
_CLIENT: Final = ("PROXIES", "HOPS", "HEADER", "UNIX_SOCKET")
_OPTIONAL: Final = (
    *_CLIENT,
    "USER",
    "MAIL",
    "MAIL_FROM",
    "PRODUCT",
    "GUARD",
    "WORKFLOW",
    "PAGE",
    "SIGHTINGS",
)
_NAME_LENGTH: Final = 256
_NOWHERE: Final = "::"  # the address of no client
_REFUSED: Final = "ipguard_refused"  # an attribute of requests
_REQUEST: Final = "ipguard.request"  # Django's request, in the WSGI environ of the page


# -- the settings


def _read_settings() -> dict[str, Any]:
    given = getattr(settings, "IPGUARD", None)
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured("there is no setting IPGUARD, a dictionary")
    for name in _REQUIRED:
        if name not in given:
            raise ImproperlyConfigured(f"{name} is missing")
    for name in given:
        if name not in _REQUIRED and name not in _OPTIONAL:
            raise ImproperlyConfigured(f"{name} is unknown")
    return dict(given)


def _make_client(given: Mapping[str, Any]) -> ClientAddress:
    return ClientAddress(**{name.lower(): given[name] for name in _CLIENT if name in given})


def _read_keys(given: Mapping[str, Any]) -> list[bytes]:
    keys = Path(given["KEY_FILE"]).read_bytes().split()
    Keyring(keys)
    return keys


def _read_switch(given: Mapping[str, Any]) -> bool:
    return check_switch("SIGHTINGS", given.get("SIGHTINGS", True))


def _load(name: str, given: Mapping[str, Any]) -> Any:
    """Return a setting that is an object, or the dotted path of one."""
    value = given[name]
    return import_string(value) if isinstance(value, str) else value


def _describe(user: Any) -> User | None:
    """Describe a Django user that has the attribute `account_id`, such as of a foreign key."""
    if not user.account_id:
        return None
    found = User(
        username=user.get_username(),
        full_name=user.get_full_name()[:_NAME_LENGTH],
        account_id=str(user.account_id),
    )
    # Django checks e-mail addresses in forms alone.
    with contextlib.suppress(InvalidValue):
        return attrs.evolve(found, email=getattr(user, user.get_email_field_name(), None))
    return found


def _load_function(name: str, given: Mapping[str, Any]) -> Callable[[Any], Any]:
    function = _load(name, {"USER": _describe, **given})
    if not callable(function):
        raise ImproperlyConfigured(f"{name} must be a function, or the dotted path of one")
    found: Callable[[Any], Any] = function
    return found


def _make_notifier(given: Mapping[str, Any]) -> Notifier:
    url = given.get("MAIL")
    more = {"product": given["PRODUCT"]} if "PRODUCT" in given else {}
    if url == "console":
        return ConsoleNotifier(**more)
    if url is None or (isinstance(url, str) and "://" in url):
        sender = given.get("MAIL_FROM", settings.DEFAULT_FROM_EMAIL)
        return EmailNotifier(_send_mail if url is None else url, sender=sender, **more)
    found: Notifier = _load("MAIL", given)
    return found


def _send_mail(message: EmailMessage) -> None:
    """Send a mail as the project sends its own."""
    plain, html = message.iter_parts()
    mail.EmailMultiAlternatives(
        message["Subject"],
        plain.get_content(),
        message["From"],
        [message["To"]],
        headers={"Auto-Submitted": message["Auto-Submitted"]},
        alternatives=[(html.get_content(), "text/html")],
    ).send()


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], object]]] = {
    "PROXIES, HOPS": _make_client,
    "KEY_FILE": _read_keys,
    "USER": partial(_load_function, "USER"),
    "ACTOR": partial(_load_function, "ACTOR"),
    "MAIL": _make_notifier,
    "SIGHTINGS": _read_switch,
    "WORKFLOW": lambda given: WorkflowSettings(**given.get("WORKFLOW", {})),
}


class Kit:
    """The project's store, guard and workflow, made from the setting `IPGUARD`.

    Attributes:
        store: The store.
        guard: The guard. The first check in a process starts its refresher, so that servers may
            fork before.
    """

    def __init__(self) -> None:
        self._given = _read_settings()
        self._client = _make_client(self._given)
        self._user = _load_function("USER", self._given)
        self._actor = _load_function("ACTOR", self._given)
        self._started = False
        self.store = open_store(self._given["URL"])
        self.guard = Guard(self.store, **self._given.get("GUARD", {}))
        self._sightings = _read_switch(self._given)
        if self._sightings:
            self.guard.follow_refusals(self._tell_refused)

    def close(self) -> None:
        """Stop the guard's refresher and close the store."""
        self.guard.close()
        self.store.close()

    @cached_property
    def workflow(self) -> Workflow:
        """The workflow. Its key file is read at the first use."""
        given = self._given
        limits = WorkflowSettings(**given.get("WORKFLOW", {}))
        keys = _read_keys(given)
        return Workflow(self.store, _make_notifier(given), key=keys, settings=limits)

    def _tell_refused(self, sighting: Sighting) -> None:
        self.workflow.tell_refused(sighting)

    @cached_property
    def page(self) -> WSGIApplication:
        """The administration page."""
        from ipguard.admin import wsgi_app

        more = self._given.get("PAGE", {})
        return wsgi_app(self.workflow, self.guard, authenticate=self._authenticate, **more)

    def address(self, request: HttpRequest) -> str:
        """Return the client's address; empty if it cannot be known."""
        return self._client.wsgi(request.META)

    def record(self, user: Any) -> User | None:
        """Return a Django user as the setting `USER` describes it, with its primary key as uid."""
        found: User | None = self._user(user)
        if found is None or found.uid is not None:
            return found
        return attrs.evolve(found, uid=str(user.pk))

    def check(self, request: HttpRequest | None, user: Any) -> Decision:
        """Decide whether a user may be signed in from where a request comes.

        Args:
            request: The request; None if there is none, as in `Client.login` of Django's tests.
                Then users who are restricted are refused.
            user: A Django user.

        Returns:
            The decision, by the username that the setting `USER` gives.
        """
        return self._ask(request, self._username(self.record(user), user))

    def check_login(
        self, request: HttpRequest | None, typed: str, user: Any
    ) -> tuple[Decision, str]:
        """Decide whether a user may log in, as `check` does, with the user registered as it is now.

        A rename without a signal, such as by `QuerySet.update`, must not open the user.

        Args:
            request: The request, or None.
            typed: The username as it was typed, so that unknown names cost the same work.
            user: The Django user, or None.

        Returns:
            The decision, and the username that it is about.
        """
        if user is None:
            return self._ask(request, typed), typed
        record = self.record(user)
        username = self._username(record, user)
        decision = self._ask(request, username)
        if record is None or decision.outcome is Outcome.RETRY:
            return decision, username
        revision = None
        with contextlib.suppress(StoreError):  # of a server that may only read, too
            revision = self.register(record)
        if revision is not None and revision > decision.revision:
            decision = self._ask(request, username, at_least=revision)
        return decision, username

    def saw(self, request: HttpRequest | None, username: str, decision: Decision) -> None:
        """Record that a user gave the right password, unless the setting `SIGHTINGS` is False.

        It calls no code of the host, whose time or errors would tell that the password was right.

        Args:
            request: The request; without one, it is not recorded.
            username: The username that `check_login` decided about.
            decision: The decision about the login.
        """
        if self._sightings and request is not None:
            self.guard.saw(username, self.address(request), decision)

    def register(self, record: User) -> int | None:
        """Add or update a user, renames included; return the store's revision.

        A username that another user has is logged and changes nothing; the result is then None.

        Raises:
            StoreError: The store does not answer, or may not be written to.
        """
        try:
            return self.store.put_users([record])
        except UsernameCollision as refused:
            _log.warning("a user was not registered: %s", refused)
            return None

    def _username(self, record: User | None, user: Any) -> str:
        # Restrictions hold for users that USER does not describe, too.
        return str(user.get_username()) if record is None else record.username

    def _ask(self, request: HttpRequest | None, username: str, **more: Any) -> Decision:
        if not self._started:
            self.guard.start()
            self._started = True
        address = _NOWHERE if request is None else self.address(request)
        return self.guard.check(username, address, **more)

    def _authenticate(self, asked: Any) -> Any:
        """Find the actor of a request to the page, which gets Werkzeug's request."""
        from werkzeug.utils import redirect

        request: HttpRequest = asked.environ[_REQUEST]
        found = with_address(self._actor(request), partial(self.address, request))
        if found is not None:
            return found
        if request.user.is_authenticated:
            raise PermissionDenied
        from django.contrib.auth.views import redirect_to_login

        # A form that was sent too late begins again at the list.
        back = request.get_full_path() if request.method == "GET" else f"{asked.root_path}/"
        return redirect(redirect_to_login(back).url)


_kits: Final[list[Kit]] = []
_lock: Final = threading.Lock()


def kit() -> Kit:
    """Return the kit of this process.

    Raises:
        ImproperlyConfigured: The setting `IPGUARD` is missing or incomplete.
        IPGuardError: A setting is invalid, or the store cannot be opened.
    """
    if not _kits:
        with _lock:
            if not _kits:
                _kits.append(Kit())
    return _kits[0]


def forget_kit(*, setting: str, **_: object) -> None:
    """Make the kit again after `override_settings(IPGUARD=...)`, as a receiver of its signal."""
    if setting == "IPGUARD":
        while _kits:
            _kits.pop().close()


# -- the login and each request


class GuardBackend:
    """Guards the authentication backends after it.

    A right password from an address that is refused ends as a wrong one does, and nothing after it
    is asked. The signal `user_login_failed` is not sent then. While the store does not answer, it
    raises `StoreUnavailable`, whatever the password; `GuardMiddleware` answers with 503.
    """

    @sensitive_variables("credentials")
    def authenticate(self, request: HttpRequest | None, **credentials: Any) -> Any:
        _mark(request, refused=False)
        model = auth.get_user_model()
        typed = credentials.get(model.USERNAME_FIELD, credentials.get("username"))
        known, username = _find(model, typed), ""
        decision: Decision | None = None
        # Before the password: the answer and its time must not depend on whether that is right.
        if typed is not None:
            decision, username = _decide(kit().check_login(request, str(typed), known))
        elif not kit().guard.healthy():
            raise StoreUnavailable
        user = self._ask_guarded(request, credentials)
        if user is not None and user != known:
            decision, username = _decide(kit().check_login(request, "", user))
        if user is not None and decision is not None:
            kit().saw(request, username, decision)
        if user is not None and decision:
            return user
        _mark(request, refused=user is not None)
        raise PermissionDenied

    @sensitive_variables("credentials")
    async def aauthenticate(self, request: HttpRequest | None, **credentials: Any) -> Any:
        return await sync_to_async(self.authenticate)(request, **credentials)

    def get_user(self, user_id: Any) -> Any:
        found = (backend.get_user(user_id) for backend in self._guarded())
        return next((user for user in found if user is not None), None)

    async def aget_user(self, user_id: Any) -> Any:
        return await sync_to_async(self.get_user)(user_id)

    def _guarded(self) -> list[Any]:
        backends: list[Any] = auth.get_backends()
        return backends[[type(each) for each in backends].index(type(self)) + 1 :]

    @sensitive_variables("credentials")
    def _ask_guarded(self, request: HttpRequest | None, credentials: Mapping[str, Any]) -> Any:
        """Ask the backends as `django.contrib.auth.authenticate` does."""
        for backend in self._guarded():
            try:
                inspect.signature(backend.authenticate).bind(request, **credentials)
            except TypeError:
                continue
            try:
                user = backend.authenticate(request, **credentials)
            except PermissionDenied:
                return None
            if user is not None:
                return user
        return None


def _find(model: Any, typed: object) -> Any:
    try:
        return None if typed is None else model._default_manager.get_by_natural_key(typed)  # noqa: SLF001
    except model.DoesNotExist:
        return None


def _decide(login: tuple[Decision, str]) -> tuple[Decision, str]:
    if login[0].outcome is Outcome.RETRY:
        raise StoreUnavailable
    return login


def _mark(request: HttpRequest | None, *, refused: bool) -> None:
    if request is not None:
        setattr(request, _REFUSED, refused)


def ignore_refusals(signal: Any) -> None:
    """Keep refused logins from the receivers of `user_login_failed`.

    Django sends it whenever no backend returns a user; a backend cannot prevent that.
    """
    send, asend = signal.send, signal.asend

    def send_failures(sender: Any, **named: Any) -> Any:
        return [] if getattr(named.get("request"), _REFUSED, False) else send(sender, **named)

    async def asend_failures(sender: Any, **named: Any) -> Any:
        refused = getattr(named.get("request"), _REFUSED, False)
        return [] if refused else await asend(sender, **named)

    signal.send, signal.asend = send_failures, asend_failures


class GuardMiddleware(MiddlewareMixin):
    """Checks the signed-in user of each request again; it stands after `AuthenticationMiddleware`.

    If the user may no longer be signed in from this address, it ends the session, and the request
    goes on as that of a visitor. While the store does not answer, it answers 503 and leaves the
    session as it is.
    """

    def process_request(self, request: HttpRequest) -> HttpResponse | None:
        if not request.user.is_authenticated:
            return None
        outcome = kit().check(request, request.user).outcome
        if outcome is Outcome.RETRY:
            return _unavailable()
        if outcome is Outcome.REFUSE:
            auth.logout(request)
            vars(request).pop("_acached_user", None)  # of `request.auser`
        return None

    def process_exception(self, _: HttpRequest, exception: Exception) -> HttpResponse | None:
        return _unavailable() if isinstance(exception, StoreUnavailable) else None


def _unavailable() -> HttpResponse:
    headers = {"Retry-After": str(RETRY_AFTER)}
    return HttpResponse(TRY_AGAIN, status=503, content_type="text/plain", headers=headers)


# -- the page


@csrf_exempt  # its forms have tokens of their own
def page(request: HttpRequest, path: str = "") -> HttpResponse:
    """Show the administration page, as a view."""
    mount = request.path_info.removesuffix(path).rstrip("/")
    script = request.META.get("SCRIPT_NAME", "") + mount
    environ = request.META | {
        "SCRIPT_NAME": script.encode().decode("latin-1"),
        "PATH_INFO": f"/{path}".encode().decode("latin-1"),
        "wsgi.url_scheme": request.scheme,
        "wsgi.input": request,  # whether or not the host has read the body before
        "wsgi.input_terminated": True,
        _REQUEST: request,
    }
    if request.content_type == "multipart/form-data":  # of Django's test client
        body = request.POST.urlencode().encode()
        environ |= {
            "CONTENT_TYPE": "application/x-www-form-urlencoded",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": BytesIO(body),
        }
    response = HttpResponse()
    del response["Content-Type"]

    def start_response(status: str, headers: list[tuple[str, str]], _: object = None) -> Any:
        response.status_code = int(status[:3])
        for name, value in headers:
            if name.lower() == "set-cookie":
                response.cookies.load(value)
            elif name.lower() == "cache-control":
                # The project's middleware may add a cookie: no shared cache may keep the response.
                response[name] = value.replace("public", "private")
            else:
                response[name] = value
        return response.write

    response.content = b"".join(kit().page(environ, start_response))
    if request.method == "POST":
        # The next request of this process sees the change.
        with contextlib.suppress(StoreUnavailable):
            kit().guard.sync()
    return response


# -- keeping users in step


def user_saved(instance: Any, using: str, *, raw: bool = False, **_: object) -> None:
    """Register a saved user once the transaction is committed; a receiver of `post_save`."""

    def register() -> None:
        record = kit().record(instance)
        if record is not None:
            kit().register(record)

    if not raw:
        transaction.on_commit(register, using=using, robust=True)


def user_deleted(instance: Any, using: str, **_: object) -> None:
    """Remove a deleted user; a receiver of `pre_delete`, before what belongs to the user goes."""
    try:
        record = kit().record(instance)
    except Exception:
        _log.exception("a deleted user was not removed; `ipguard_sync --remove-missing` does that")
        return
    if record is not None:
        remove = partial(kit().store.remove_users, [record.username])
        transaction.on_commit(remove, using=using, robust=True)


# -- system checks


def check_settings(**_: object) -> Iterable[checks.CheckMessage]:
    """Report each setting that is missing, invalid or out of order."""
    return [*_check_values(), *_check_places()]


def _check_values() -> Iterator[checks.CheckMessage]:
    try:
        given = _read_settings()
    except ImproperlyConfigured as error:
        yield checks.Error(f"IPGUARD: {error}", id="ipguard.E001")
        return
    for name, read in _READERS.items():
        try:
            read(given)
        except OSError as error:
            hint = "Create it once with: manage.py ipguard init"
            text = f"IPGUARD: {name}: {error}"
            yield checks.Warning(text, hint=hint, id="ipguard.W001")
        except (ImproperlyConfigured, ImportError, IPGuardError, TypeError, ValueError) as error:
            yield checks.Error(f"IPGUARD: {name}: {error}", id="ipguard.E001")


def _check_places() -> Iterator[checks.CheckMessage]:
    """Check the order of the middleware and of the backends."""
    from django.contrib.auth.middleware import AuthenticationMiddleware

    before, here = (
        _place(settings.MIDDLEWARE, each) for each in (AuthenticationMiddleware, GuardMiddleware)
    )
    if before is None or here is None or here < before:
        text = "GuardMiddleware must be in MIDDLEWARE, after AuthenticationMiddleware"
        yield checks.Error(f"ipguard: {text}", id="ipguard.E002")
    backends = settings.AUTHENTICATION_BACKENDS
    here = _place(backends, GuardBackend)
    # Those of django-axes authenticate no user.
    unguarded = [each for each in backends[:here] if not each.startswith("axes.")]
    if here is None or unguarded or here == len(backends) - 1:
        text = "GuardBackend must be in AUTHENTICATION_BACKENDS, before those that it guards"
        yield checks.Error(f"ipguard: {text}", id="ipguard.E003")


def _place(paths: list[str], kind: type) -> int | None:
    for place, path in enumerate(paths):
        found = import_string(path)
        if isinstance(found, type) and issubclass(found, kind):
            return place
    return None
