"""The context of one request: the actor, cookies, CSRF tokens, drafts, and how to respond."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Literal

import attrs
from itsdangerous import BadData, URLSafeSerializer
from jinja2 import Environment

from ipguard.admin import _http
from ipguard.admin._http import Request, Response
from ipguard.guard import Guard
from ipguard.model import Actor, UserOverview
from ipguard.workflow import Workflow

Level = Literal["done", "note", "problem"]

_SESSION: Final = re.compile(r"[A-Za-z0-9_-]{22}")
_NOTE_SECONDS: Final = 120
_DRAFT_SECONDS: Final = 3_600
_CUT: Final = "This is too long to be shown again, and was cut. Send it in several forms."
_DRAFT_LENGTH: Final = 2_800  # characters; gunicorn accepts request lines of 4 KB


class Signer:
    """Sign values and verify them: JSON, compressed and base64-encoded by itsdangerous.

    Signed values are not encrypted. All servers that share the workflow's keys accept them.

    Args:
        keys: The newest key first; it signs, and every key verifies.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys[::-1]  # itsdangerous expects the newest key last

    def _serializer(self, purpose: str, bound: Sequence[str]) -> URLSafeSerializer:
        # The salt selects a key of its own for each purpose, actor and browser. JSON delimits the
        # parts, so no two lists have the same salt.
        options = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
        salt = json.dumps([purpose, *bound])
        return URLSafeSerializer(self._keys, salt, signer_kwargs=options)

    def sign(self, purpose: str, value: object, *bound: str, seconds: int | None = None) -> str:
        """Return a JSON value as signed text.

        The text verifies only for the same purpose and the same `bound` values, such as the actor
        and the browser, and for `seconds`, if they are given.
        """
        # Not URLSafeTimedSerializer: it rejects the signatures of a server whose clock is ahead.
        until = None if seconds is None else int(time.time()) + seconds
        return self._serializer(purpose, bound).dumps([until, value])

    def verify(self, purpose: str, text: str, *bound: str) -> Any:
        """Return the value of a text that `sign` made with these arguments, or None."""
        try:
            until, value = self._serializer(purpose, bound).loads(text)
        except BadData:
            return None
        return value if until is None or time.time() < until else None


@attrs.frozen(kw_only=True)
class Draft:
    """A submitted form that was not carried out, for the next page to show again.

    Attributes:
        values: The submitted values by field, except confirmation numbers.
        problems: The error messages by field; "" is the form as a whole.
        step: "review" to confirm how a range was understood, "changed" to show concurrent changes,
            or "".
    """

    values: dict[str, str] = attrs.Factory(dict)
    problems: dict[str, str] = attrs.Factory(dict)
    step: str = ""


@attrs.frozen(kw_only=True)
class Services:
    flow: Workflow
    guard: Guard
    check_actor: bool
    brand: str
    home_url: str | None
    sign_out_url: str | None
    signer: Signer
    templates: Environment

    def render(self, template: str, request: Request, actor: Actor | None, **values: Any) -> str:
        """Render a page; `values` add to those that every page shows, or replace them."""
        shared: dict[str, Any] = {
            "actor": actor,
            "base": request.base,
            "brand": self.brand,
            "home_url": self.home_url,
            "sign_out_url": self.sign_out_url,
            "link": functools.partial(_http.build_link, request.base),
            "note": None,
            "now": None,
            "problems": {},
            "refused": False,
        }
        return self.templates.get_template(template).render(shared | values)


class Context:
    """One request of one actor; `form` has the submitted fields, and `now` is the store's time."""

    def __init__(self, services: Services, request: Request, actor: Actor) -> None:
        self._services = services
        self.sign, self.verify = services.signer.sign, services.signer.verify
        self.flow = services.flow
        self.guard = services.guard
        self.request = request
        self.actor = actor
        self.form: dict[str, str] = {}
        self.now: datetime = services.flow.now()
        self._cookies: dict[str, tuple[str, str]] = {}  # values, and their lifetimes
        session = self._cookie("form")
        if not _SESSION.fullmatch(session):
            session = secrets.token_urlsafe(16)
            self._cookies["form"] = (session, "")
        self._browser = (session, actor.username)

    def _cookie_name(self, name: str) -> str:
        # Browsers keep other hosts of the domain from setting cookies with this prefix.
        return f"{'__Host-' if self.request.https else ''}ipguard-{name}"

    def _cookie(self, name: str) -> str:
        return self.request.cookies.get(self._cookie_name(name), "")

    def _cookie_headers(self) -> list[tuple[str, str]]:
        secure = "; Secure" if self.request.https else ""
        attributes = f"Path=/; HttpOnly; SameSite=Lax{secure}"
        return [
            ("Set-Cookie", f"{self._cookie_name(name)}={value}; {attributes}{age}")
            for name, (value, age) in self._cookies.items()
        ]

    def has_valid_token(self) -> bool:
        """Return whether the form carries a CSRF token of this actor and this browser."""
        if self.request.is_cross_site():
            return False
        return self.verify("form", self.field("token"), *self._browser) is not None

    def field(self, name: str) -> str:
        return self.form.get(name, "")

    @functools.cached_property
    def draft(self) -> Draft:
        """The draft in the URL; an empty one if it is missing, expired or invalid."""
        query = self.request.parse_query()
        text = query.pop("again", "")
        page = _http.build_link("", self.request.path[1:], **query)
        found = self.verify("draft", text, page, *self._browser)
        return Draft() if found is None else Draft(**found)

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        """Respond with a page, which shows the draft's problems, and a pending message once."""
        note = self.verify("note", self._cookie("note"), *self._browser)
        here = _http.build_link("", self.request.path[1:], **self.request.parse_query())
        if note and note["to"] != here:
            note = None  # it is for the page that another tab is loading
        elif self._cookie("note"):
            self._cookies["note"] = ("", "; Max-Age=0")
        # A different token each time, so that compression does not reveal it (BREACH).
        token = self.sign("form", secrets.token_urlsafe(9), *self._browser)
        shared = {"note": note, "now": self.now, "problems": self.draft.problems, "token": token}
        html = self._services.render(template, self.request, self.actor, **(shared | values))
        return _http.respond(status, html, self._cookie_headers())

    def redirect(
        self, page: str, note: str = "", level: Level = "done", /, **query: object
    ) -> Response:
        """Redirect to a page, with a message for it to show."""
        if note:
            to = _http.build_link("", page, **query)
            value = {"text": note, "level": level, "to": to}
            text = self.sign("note", value, *self._browser, seconds=_NOTE_SECONDS)
            self._cookies["note"] = (text, f"; Max-Age={_NOTE_SECONDS}")
        location = _http.build_link(self.request.base, page, **query)
        return _http.redirect(location, self._cookie_headers())

    def redirect_to_draft(self, page: str, draft: Draft, /, **query: object) -> Response:
        """Redirect to the submitted form, with its values and problems.

        If the response to the POST were the form itself, each reload would submit it again. The
        draft is in the URL, so that tabs do not share it. Long values are cut until it fits, which
        is a problem of the form.
        """
        to, value = _http.build_link("", page, **query), attrs.asdict(draft)
        values, problems = value["values"], value["problems"]
        while True:
            signed = self.sign("draft", value, to, *self._browser, seconds=_DRAFT_SECONDS)
            longest = max(values, key=lambda name: len(values[name]), default="")
            if len(signed) <= _DRAFT_LENGTH or not values.get(longest):
                return self.redirect(page, **query, again=signed)
            values[longest] = values[longest][: len(values[longest]) // 2]
            problems.setdefault(longest, _CUT)
            values.pop("asked", None)  # show the form: a review would be incomplete
            value["step"] = "" if value["step"] == "review" else value["step"]

    def refuse_field(self, page: str, name: str, text: str, problem: str, **query: str) -> Response:
        """Redirect to a form of one field, with the submitted text and the problem, if any."""
        problems = {name: problem} if problem else {}
        return self.redirect_to_draft(page, Draft(values={name: text}, problems=problems), **query)

    def find_user(self, username: str) -> UserOverview:
        """Return a user of the actor's accounts, or raise UnknownUser."""
        return self.flow.user(self.actor, username)
