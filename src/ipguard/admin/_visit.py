"""One request of one actor: what the views work with."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any, Final, Literal, Protocol

from ipguard.admin import _http
from ipguard.admin._http import Request, Response
from ipguard.admin._render import Templates
from ipguard.admin._signing import Signer, random_text
from ipguard.errors import UnknownUser, UsernameError
from ipguard.guard import Guard
from ipguard.model import Actor, UserOverview
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow

Level = Literal["done", "note", "problem"]

_SESSION: Final = re.compile(r"[A-Za-z0-9_-]{22}")
_NOTE_SECONDS: Final = 120
_PATIENCE: Final = 2.0
_LAST_CHARACTER: Final = "\U0010ffff"  # assigned to nothing, so no username holds it


class Missing(Exception):
    """What was asked for does not exist, for this actor at least."""


class Parts(Protocol):
    """What all requests share: `ipguard.admin._site.Site`."""

    flow: Workflow
    guard: Guard
    brand: str
    signer: Signer
    templates: Templates


class Visit:
    """One request of one actor.

    Attributes:
        request: The request.
        actor: Who acts.
        form: The fields of the form; empty for a GET.
        now: The store's time.
        session: What the browser's own cookie holds; the tokens of forms are bound to it.
    """

    def __init__(self, site: Parts, request: Request, actor: Actor) -> None:
        self._site = site
        self.flow = site.flow
        self.guard = site.guard
        self.request = request
        self.actor = actor
        self.form: dict[str, str] = {}
        self.now: datetime = site.flow.now()
        self._cookies: dict[str, tuple[str, int | None]] = {}
        given = self._cookie("form")
        if _SESSION.fullmatch(given):
            self.session = given
        else:
            self.session = random_text()
            self._cookies["form"] = (self.session, None)

    # -- cookies: each is signed, or worth nothing without a signature

    def _name(self, name: str) -> str:
        # What browsers keep under this prefix, no other host of the domain can have set.
        return f"{'__Host-' if self.request.https else ''}ipguard-{name}"

    def _cookie(self, name: str) -> str:
        return self.request.cookies.get(self._name(name), "")

    def remember(self, name: str, value: object, seconds: int) -> None:
        """Keep something in the browser, for this actor and this browser alone."""
        kept = json.dumps([int(time.time()) + seconds, value], ensure_ascii=False).encode()
        text = self._site.signer.sign(name, kept, self.session, self.actor.username)
        self._cookies[name] = (text, seconds)

    def recall(self, name: str) -> Any:
        """Return what was kept, or None where it is not there, too old, or not ours."""
        kept = self._site.signer.verify(name, self._cookie(name), self.session, self.actor.username)
        if kept is None:
            return None
        until, value = json.loads(kept)
        return value if time.time() < until else None

    def forget(self, name: str) -> None:
        """Take back what was kept."""
        if self._cookie(name):
            self._cookies[name] = ("", 0)

    def _headers(self) -> list[tuple[str, str]]:
        secure = "; Secure" if self.request.https else ""
        return [
            (
                "Set-Cookie",
                f"{self._name(name)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}"
                + ("" if seconds is None else f"; Max-Age={seconds}"),
            )
            for name, (value, seconds) in self._cookies.items()
        ]

    # -- forms

    def is_ours(self) -> bool:
        """Tell whether a form was sent by a page that this actor got in this browser."""
        if self.request.from_elsewhere():
            return False
        return self._site.signer.is_token(
            self.form.get("token", ""), self.session, self.actor.username
        )

    def field(self, name: str) -> str:
        """Return a field of the form, empty where it is missing."""
        return self.form.get(name, "")

    # -- answers

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        """Answer with a page; a message left by the request before is shown once."""
        note = self.recall("note")
        self.forget("note")
        base = self.request.base

        def link(name: str, **query: object) -> str:
            return _http.link(base, name, **query)

        html = self._site.templates.render(
            template,
            {
                "actor": self.actor,
                "base": base,
                "brand": self._site.brand,
                "link": link,
                "note": note,
                "now": self.now,
                "token": self._site.signer.token(self.session, self.actor.username),
                "problems": {},
                **values,
            },
        )
        return _http.page(status, html, self._headers())

    def go(self, name: str, note: str = "", level: Level = "done", **query: object) -> Response:
        """Send the browser on to another page, with a message for it to show."""
        if note:
            self.remember("note", {"text": note, "level": level}, _NOTE_SECONDS)
        return _http.redirect(_http.link(self.request.base, name, **query), self._headers())

    # -- what the workflow shows this actor

    def person(self, username: str) -> UserOverview:
        """Return one user of this actor's.

        Raises:
            UnknownUser: There is none, for this actor.
        """
        try:
            name = canonical_username(username)
        except UsernameError:
            raise UnknownUser(username) from None
        # The list goes by code points: nobody stands between this text and the name.
        before = name[:-1] + chr(ord(name[-1]) - 1) + _LAST_CHARACTER
        for line in self.flow.overview(self.actor, after=before, limit=1):
            if line.user.username == name:
                return line
        raise UnknownUser(username)

    def caught_up(self, revision: int) -> bool:
        """Wait until this server's guard knows of a change; tell whether it does."""
        return self.guard.wait_for(revision, _PATIENCE)
