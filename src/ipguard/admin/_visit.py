"""One request of one actor: what the views work with."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any, Final, Literal, Protocol

import attrs

from ipguard.admin import _http
from ipguard.admin._http import Request, Response
from ipguard.admin._render import Templates
from ipguard.admin._signing import Signer, random_text
from ipguard.guard import Guard
from ipguard.model import Actor, UserOverview
from ipguard.workflow import Workflow

Level = Literal["done", "note", "problem"]

_SESSION: Final = re.compile(r"[A-Za-z0-9_-]{22}")
_NOTE_SECONDS: Final = 120
_DRAFT_SECONDS: Final = 3_600
_DRAFT_BYTES: Final = 2_048  # sealed 2.8 KB: gunicorn takes request lines of 4 KB
_PATIENCE: Final = 2.0
_ID: Final = 64  # more characters than any id has


class Missing(Exception):
    """What was asked for does not exist, for this actor at least."""


@attrs.frozen(kw_only=True)
class Draft:
    """A form that was sent but not carried out, as the next page shows it.

    Attributes:
        values: What was typed, by field. Never a confirmation number.
        problems: What is wrong, by field; "" is the form as a whole.
        step: "review" to have a range confirmed, "changed" to show what others changed, or "".
    """

    values: dict[str, str] = attrs.Factory(dict)
    problems: dict[str, str] = attrs.Factory(dict)
    step: str = ""


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

    def id_field(self, name: str) -> str:
        """Return a field that holds an id, short enough for a URL.

        Raises:
            Missing: It is too long to be an id.
        """
        text = self.field(name)
        if len(text) > _ID:
            raise Missing
        return text

    def draft(self) -> Draft:
        """Return what a form that was sent left for this page; an empty draft if there is none."""
        asked = self.request.asked()
        text = asked.pop("again", "")
        where = _http.link("", self.request.path[1:], **asked)
        found = self._site.signer.unseal("draft", text, where, self.session, self.actor.username)
        if found is None:
            return Draft()
        until, values, problems, step = json.loads(found)
        return (
            Draft(values=values, problems=problems, step=step) if time.time() < until else Draft()
        )

    # -- answers

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        """Answer with a page; a message left by the request before is shown once."""
        note = self.recall("note")
        here = _http.link("", self.request.path[1:], **self.request.asked())
        if note and note["to"] != here:
            note = None  # another tab's page is about to show it
        else:
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

    def go(self, name: str, note: str = "", level: Level = "done", /, **query: object) -> Response:
        """Send the browser on to another page, with a message for it to show."""
        if note:
            to = _http.link("", name, **query)
            self.remember("note", {"text": note, "level": level, "to": to}, _NOTE_SECONDS)
        return _http.redirect(_http.link(self.request.base, name, **query), self._headers())

    def again(self, name: str, draft: Draft, /, **query: object) -> Response:
        """Send the browser on to a form that it sent, with what was typed and what is wrong.

        A page that answered the POST itself would send the form again on each reload. The draft
        goes into the URL, so tabs do not share it; it is sealed, so logs do not show it.
        """
        values = dict(draft.values)
        until = int(time.time()) + _DRAFT_SECONDS
        while True:
            kept = json.dumps([until, values, draft.problems, draft.step], ensure_ascii=False)
            raw = kept.encode("utf-8", "replace")
            longest = max(values, key=lambda name: len(values[name]), default="")
            if len(raw) <= _DRAFT_BYTES or not values.get(longest):
                break
            values[longest] = values[longest][: len(values[longest]) // 2]
        where = _http.link("", name, **query)
        sealed = self._site.signer.seal("draft", raw, where, self.session, self.actor.username)
        return self.go(name, **query, again=sealed)

    def seal_search(self, text: str) -> str:
        """Return a search's text as it stands in URLs."""
        return self._site.signer.seal("search", text.encode(), self.actor.username)

    def unseal_search(self, text: str) -> str:
        """Return the text of a search from a URL, empty if this page did not make it."""
        found = self._site.signer.unseal("search", text, self.actor.username)
        return "" if found is None else found.decode()

    # -- what the workflow shows this actor

    def person(self, username: str) -> UserOverview:
        """Return one user of this actor's.

        Raises:
            UnknownUser: There is none, for this actor.
        """
        return self.flow.user(self.actor, username)

    def caught_up(self, revision: int) -> bool:
        """Wait until this server's guard knows of a change; tell whether it does."""
        return self.guard.wait_for(revision, _PATIENCE)
