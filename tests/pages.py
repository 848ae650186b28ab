"""A browser without scripts for tests of the page: httpx sends, Beautiful Soup reads."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import attrs
import httpx
import pytest
from bs4 import BeautifulSoup, Tag

from ipguard import Actor, Guard, PendingRequest, Workflow
from ipguard.admin import asgi_app, wsgi_app
from tests.flows import Desk

ADAPTERS = ("asgi", "wsgi")
HOST = "bank.example"
CLIENT = "192.0.2.99"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_VOID = {"meta", "link", "input"}


@attrs.frozen
class Form:
    """A form as a browser would send it untouched by pressing one of its buttons."""

    action: str
    fields: dict[str, str]
    choices: dict[str, list[str]]


class Page:
    """A page: its text, and its elements by CSS selector or id."""

    def __init__(self, html: str) -> None:
        # Templates close what they open; Beautiful Soup would repair the rest silently.
        opened, closed = (Counter(re.findall(rf"<{mark}([a-z]\w*)", html)) for mark in ("", "/"))
        assert {tag: n for tag, n in opened.items() if tag not in _VOID} == closed
        self._soup = BeautifulSoup(html, "html.parser", multi_valued_attributes=None)
        ids = Counter(str(each["id"]) for each in self.select("[id]"))
        assert ids == Counter(set(ids)), "an id appears twice"
        self.ids = set(ids)

    def select(self, selector: str) -> list[Tag]:
        """Return the elements that a CSS selector matches."""
        return list(self._soup.select(selector))

    def one(self, selector: str) -> Tag:
        """Return the only element that a CSS selector matches."""
        (found,) = self.select(selector)
        return found

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the elements that a CSS selector matches."""
        return [text_of(each) for each in self.select(selector)]

    @property
    def text(self) -> str:
        return " ".join(self.texts("body"))

    def part(self, name: str) -> str:
        """Return the text of the element with an id, or ""."""
        return " ".join(self.texts(f"#{name}"))

    def field(self, name: str) -> Tag:
        """Return the field with an id, which is also its name."""
        return self.one(f"#{name}")

    def value(self, name: str) -> str:
        """Return the value of the field with an id."""
        field = self.field(name)
        # A browser drops a line break at the beginning.
        return field.get_text()[1:] if field.name == "textarea" else str(field["value"])

    @property
    def links(self) -> list[tuple[str, str]]:
        return [(text_of(each), str(each["href"])) for each in self.select("a")]

    @property
    def labels(self) -> dict[str, str]:
        return {text_of(each): str(each.get("for", "")) for each in self.select("label")}

    def form(self, button: str) -> Form:
        """Return the form whose button's text begins with `button`."""
        found = [each for each in self.select("form button") if text_of(each).startswith(button)]
        # A form may contain the same button twice, so that Enter in a field presses the right one.
        assert found, f"no button {button!r}"
        form = found[0].find_parent("form")
        assert form is not None
        assert {each.find_parent("form") for each in found} == {form}, f"many buttons {button!r}"
        assert form["method"] == "post"
        fields, choices = {}, {}
        for field in form.select("input[name]"):
            if field.get("type") != "checkbox" or field.has_attr("checked"):
                fields[str(field["name"])] = str(field.get("value", ""))
        for field in form.select("textarea"):
            fields[str(field["name"])] = field.get_text()[1:]
        for field in form.select("select"):
            options = [str(each["value"]) for each in field.select("option")]
            chosen = [str(each["value"]) for each in field.select("option[selected]")]
            name = str(field["name"])
            fields[name], choices[name] = (chosen + options)[0], options
        if found[0].has_attr("name"):
            fields[str(found[0]["name"])] = str(found[0]["value"])
        return Form(str(form["action"]), fields, choices)


def text_of(tag: Tag) -> str:
    """Return the text of an element with single spaces."""
    return " ".join(tag.get_text(" ").split())


class Browser:
    """Opens pages, follows links and submits forms, with cookies.

    Attributes:
        address: The path and query of the current page.
        answer: The last response.
        page: The current page.
        cookies: The cookies, by name.
        log: Every URL that was requested.
    """

    def __init__(self, app: Any, adapter: str = "asgi", *, https: bool = False) -> None:
        self._send = send_wsgi if adapter == "wsgi" else send_asgi
        self.app = app
        self.origin = f"{'https' if https else 'http'}://{HOST}"
        self.cookies: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.address = ""
        self.log: list[str] = []

    @property
    def text(self) -> str:
        return self.page.text

    def send(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """Send one request and keep its cookies; follow no redirect."""
        sent = {**self.headers, **(headers or {})}
        if self.cookies:
            sent.setdefault("Cookie", "; ".join(f"{k}={v}" for k, v in self.cookies.items()))
        self.log.append(path)
        request = httpx.Request(method, self.origin + path, content=body, headers=sent)
        answer = self._send(self.app, request)
        answer.read()
        for line in answer.headers.get_list("set-cookie"):
            for name, morsel in SimpleCookie(line).items():
                self.cookies[name] = morsel.value
                if morsel["max-age"] == "0":
                    del self.cookies[name]
        return answer

    def submit(self, path: str, fields: dict[str, str]) -> httpx.Response:
        """Send a form; follow no redirect."""
        return self.send("POST", path, urlencode(fields).encode(), FORM)

    def open(self, path: str = "/") -> Page:
        """Open a page, following redirects."""
        return self._arrive(path, self.send("GET", path))

    def post(self, action: str, fields: dict[str, str]) -> Page:
        """Submit a form to a path relative to the current page, following redirects."""
        path = urljoin(self.address, action)
        headers = {**FORM, "Origin": self.origin, "Sec-Fetch-Site": "same-origin"}
        return self._arrive(path, self.send("POST", path, urlencode(fields).encode(), headers))

    def _arrive(self, path: str, answer: httpx.Response) -> Page:
        for _ in range(5):
            if not answer.is_redirect:
                break
            where = urlsplit(urljoin(path, answer.headers["location"]))
            assert where.netloc in ("", HOST), where
            path = where._replace(scheme="", netloc="").geturl()
            answer = self.send("GET", path)
        self.address, self.answer = path, answer
        is_html = answer.headers.get("content-type", "").startswith("text/html")
        self.page = Page(answer.text if is_html else "")
        return self.page

    def follow(self, text: str) -> Page:
        """Follow the link whose text begins with `text`."""
        (href,) = {href for words, href in self.page.links if words.startswith(text)}
        return self.open(urljoin(self.address, href))

    def press(self, button: str, **fields: str) -> Page:
        """Fill in the form of a button and press it."""
        form = self.page.form(button)
        for name in fields:
            assert name in form.fields or self.page.field(name), f"no field {name}"
        return self.post(form.action, {**form.fields, **fields})


def send_wsgi(app: Any, request: httpx.Request) -> httpx.Response:
    """Send a request to a WSGI application."""
    return httpx.WSGITransport(app, remote_addr=CLIENT).handle_request(request)


def send_asgi(app: Any, request: httpx.Request) -> httpx.Response:
    """Send a request to an ASGI application."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(CLIENT, 4711))
        answer = await transport.handle_async_request(request)
        content = await answer.aread()
        return httpx.Response(answer.status_code, headers=answer.headers, content=content)

    return asyncio.run(send())


class Office(Desk):
    """A desk with a guard and the page."""

    def __init__(self, path: Path | None, adapter: str, *, url: str = "memory://") -> None:
        super().__init__(path, url=url)
        self.adapter = adapter
        self.guard = Guard(self.store, monotonic=self.clock.monotonic)

    def request_of(self, request_id: str) -> PendingRequest:
        """Return a request by its id."""
        with self.store.transaction() as tx:
            stored = tx.request(request_id)
        assert stored is not None
        return stored.request

    def app(self, who: Actor | Callable[[Any], Any] | None, flow: Workflow | None = None) -> Any:
        """Make the page for one actor."""
        make: Any = asgi_app if self.adapter == "asgi" else wsgi_app
        authenticate = who if callable(who) else lambda _: who
        return make(flow or self.flow, self.guard, authenticate=authenticate, brand="Test Bank")

    def stranger(
        self,
        who: Actor | Callable[[Any], Any] | None,
        flow: Workflow | None = None,
        **more: Any,
    ) -> Browser:
        """Return a browser that has opened no page yet; `flow` makes it another server's."""
        return Browser(self.app(who, flow), self.adapter, **more)

    def browser(
        self, who: Actor | Callable[[Any], Any] | None, path: str = "/", **more: Any
    ) -> Browser:
        """Return a new browser at a page."""
        browser = self.stranger(who, **more)
        browser.open(path)
        return browser


@pytest.fixture
def office() -> Iterator[Office]:
    """An office whose page is an ASGI application, over a store in memory."""
    office = Office(None, "asgi")
    with office.store:
        yield office


@pytest.fixture(params=ADAPTERS)
def each_office(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Office]:
    """An office for each adapter, over a SQLite file."""
    office = Office(tmp_path / "office.db", request.param)
    with office.store:
        yield office


def query(path: str) -> dict[str, str]:
    """Return the fields of a path's query."""
    return dict(parse_qsl(urlsplit(path).query))
