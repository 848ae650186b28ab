"""What the tests of the page share: a browser without a screen, over both adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import attrs
import httpx
import pytest
import werkzeug.test

from ipguard import Actor, Guard, PendingRequest, Workflow
from ipguard.admin import asgi_app, wsgi_app
from tests.flows import Desk

ADAPTERS = ("asgi", "wsgi")
HOST = "bank.example"
CLIENT = "192.0.2.99"
_VOID = {"meta", "link", "input", "br", "hr", "img"}


@attrs.frozen
class Answer:
    """What came back."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        """Return a header, empty where it is missing."""
        return next((v for key, v in self.headers if key.lower() == name.lower()), "")

    @property
    def text(self) -> str:
        return self.body.decode()


@attrs.define
class Form:
    """A form as a browser would send it untouched."""

    action: str
    method: str
    fields: dict[str, str] = attrs.Factory(dict)
    choices: dict[str, list[str]] = attrs.Factory(dict)
    buttons: list[tuple[str, dict[str, str]]] = attrs.Factory(list)


class Page(HTMLParser):
    """What is on a page: its words, links, forms, ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self.links: list[tuple[str, str]] = []
        self.labels: dict[str, str] = {}
        self.headings: list[tuple[str, str]] = []
        self.ids: dict[str, list[str]] = {}
        self.inputs: dict[str, dict[str, str]] = {}
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self._form: Form | None = None
        self._select = ""
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        """Everything that can be read, blanks made one."""
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        assert len(found) == len(attributes), f"an attribute twice: {attributes}"
        self.elements.append((tag, found))
        if tag == "form":
            self._form = Form(found.get("action", ""), found.get("method", "get"))
            self.forms.append(self._form)
        if tag == "input":
            self.inputs[found.get("id") or found.get("name", "")] = found
            kept = found.get("type") != "checkbox" or "checked" in found
            if self._form is not None and kept:
                self._form.fields[found["name"]] = found.get("value", "")
        if tag == "select":
            self._select = found["name"]
            self.inputs[found["id"]] = found
        if tag == "option" and self._form is not None:
            choices = self._form.choices.setdefault(self._select, [])
            if not choices or "selected" in found:
                self._form.fields[self._select] = found["value"]
            choices.append(found["value"])
        if tag not in _VOID:
            self._open.append((tag, found, []))
        if "id" in found:
            assert found["id"] not in self.ids, f"an id twice: {found['id']}"
            self.ids[found["id"]] = self._open[-1][2] if tag not in _VOID else []

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] in ("title", "script", "style"):
            self._open[-1][2].append(data)
            return
        self.words.append(data)
        for _, _, words in self._open:
            words.append(data)

    def handle_endtag(self, tag: str) -> None:
        opened, found, parts = self._open.pop()
        assert opened == tag, f"{opened} is closed by {tag}"
        words = " ".join(" ".join(parts).split())
        if tag == "a":
            self.links.append((words, found["href"]))
        if tag == "label":
            self.labels[words] = found.get("for", "")  # a host's own may be around its field
        if tag in ("h1", "h2", "h3", "th", "title"):
            self.headings.append((tag, words))
        if tag == "button" and self._form is not None:
            more = {found["name"]: found["value"]} if "name" in found else {}
            self._form.buttons.append((words, more))
        if tag == "form":
            self._form = None

    def elements_with(self, attribute: str) -> dict[str, str]:
        """Return the attributes of the one element that has an attribute."""
        (found,) = (own for _, own in self.elements if attribute in own)
        return found

    def part(self, name: str) -> str:
        """Return the words of the element with an id, empty where there is none."""
        return " ".join(" ".join(self.ids.get(name, [])).split())


class Browser:
    """Opens pages, follows links and sends forms, with cookies, as a person does without scripts.

    Attributes:
        address: Where it is, as a path with its query.
        answer: What came back last.
        page: What is on it.
        log: Every URL that was asked for.
    """

    def __init__(
        self, app: Any, adapter: str = "asgi", *, prefix: str = "", https: bool = False
    ) -> None:
        self.app = app
        self.adapter = adapter
        self.prefix = prefix
        self.https = https
        self.cookies: dict[str, str] = {}
        self.address = ""
        self.log: list[str] = []

    @property
    def text(self) -> str:
        return self.page.text

    # -- what goes over the wire

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send one request as it is, below the prefix, and keep the cookies that come back."""
        sent = {"Host": HOST, **(headers or {})}
        if self.cookies:
            sent.setdefault("Cookie", "; ".join(f"{k}={v}" for k, v in self.cookies.items()))
        self.log.append(path)
        call = asgi if self.adapter == "asgi" else wsgi
        answer = call(self.app, method, path, body, sent, prefix=self.prefix, https=self.https)
        for name, value in answer.headers:
            if name.lower() == "set-cookie":
                self._keep(value)
        return answer

    def _keep(self, line: str) -> None:
        for name, morsel in SimpleCookie(line).items():
            if morsel["max-age"] == "0":
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = morsel.value

    # -- what a person does

    def open(self, path: str = "/") -> Page:
        """Go to a page, wherever it leads."""
        return self._arrive("GET", path)

    def _arrive(self, method: str, path: str, body: bytes = b"") -> Page:
        headers = {}
        if method == "POST":
            headers = {
                "Content-Type": "application/x-www-form-urlencoded",
                "Origin": f"{'https' if self.https else 'http'}://{HOST}",
                "Sec-Fetch-Site": "same-origin",
            }
        self.answer = self.send(method, path, body, headers)
        self.address = path
        for _ in range(5):
            if self.answer.status not in (302, 303, 307):
                break
            where = urlsplit(urljoin(self.address, self.answer.header("location")))
            assert where.netloc in ("", HOST), where
            self.address = where._replace(scheme="", netloc="").geturl()
            self.answer = self.send("GET", self.address)
        kind = self.answer.header("content-type")
        self.page = Page(self.answer.text if kind.startswith("text/html") else "")
        return self.page

    def follow(self, text: str) -> Page:
        """Follow the one link whose words begin with a text."""
        found = {href for words, href in self.page.links if words.startswith(text)}
        assert len(found) == 1, f"{len(found)} links {text!r} among {self.page.links}"
        return self.open(urljoin(self.address, found.pop()))

    def form(self, button: str) -> tuple[Form, dict[str, str]]:
        """Find the one form with a button whose words begin with a text."""
        found = [
            (form, more)
            for form in self.page.forms
            for words, more in form.buttons
            if words.startswith(button)
        ]
        # A form may have a button twice, for who presses Enter in a field.
        alike = all(each == found[0] for each in found)
        assert found, f"no button {button!r}: {self.page.forms}"
        assert alike, f"{len(found)} buttons {button!r}: {self.page.forms}"
        return found[0]

    def press(self, button: str, **fields: str) -> Page:
        """Fill in the form of a button, by the names of its fields, and press it."""
        form, more = self.form(button)
        assert form.method == "post"
        for name in fields:
            offered = name in form.fields or name in self.page.inputs
            assert offered, f"no field {name}: {form.fields}"
        return self.post(form.action, {**form.fields, **fields, **more})

    def post(self, action: str, fields: dict[str, str]) -> Page:
        """Send a form, to where its action leads from here."""
        return self._arrive("POST", urljoin(self.address, action), urlencode(fields).encode())


class Office(Desk):
    """A desk, over a file as a rule, with a guard and browsers of one adapter."""

    def __init__(self, path: Path | None, adapter: str, *, url: str = "memory://") -> None:
        super().__init__(path, url=url)
        self.adapter = adapter
        self.guard = Guard(self.store, monotonic=self.clock.monotonic)

    def request_of(self, request_id: str) -> PendingRequest:
        """Return a request by its id."""
        with self.store.transaction() as turn:
            stored = turn.request(request_id)
        assert stored is not None
        return stored.request

    def browser(
        self, who: Actor | Callable[[Any], Any] | None, path: str = "/", **more: Any
    ) -> Browser:
        """Return a new browser of somebody, at a page."""
        browser = self.stranger(who, **more)
        browser.open(path)
        return browser

    def stranger(
        self,
        who: Actor | Callable[[Any], Any] | None,
        flow: Workflow | None = None,
        **more: Any,
    ) -> Browser:
        """Return a browser that has not been anywhere, perhaps of another server."""
        make = asgi_app if self.adapter == "asgi" else wsgi_app
        known = who if callable(who) else lambda _: who
        app = make(flow or self.flow, self.guard, authenticate=known, brand="Test Bank")
        return Browser(app, self.adapter, **more)


@pytest.fixture(params=ADAPTERS)
def office(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Office]:
    """An office of each adapter."""
    it = Office(tmp_path / "office.db", request.param)
    with it.store:
        yield it


def asgi(
    app: Any,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    *,
    prefix: str = "",
    https: bool = False,
) -> Answer:
    """Send a request to an ASGI application."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=prefix, client=(CLIENT, 4711))
        base = f"{'https' if https else 'http'}://{HOST}"
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, prefix + path, content=body, headers=headers)

    answer = asyncio.run(send())
    return Answer(answer.status_code, answer.headers.multi_items(), answer.content)


def wsgi(
    app: Any,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    *,
    prefix: str = "",
    https: bool = False,
) -> Answer:
    """Send a request to a WSGI application."""
    parts = urlsplit(path)
    client = werkzeug.test.Client(app, use_cookies=False)
    with client.open(
        parts.path,
        method=method,
        query_string=parts.query,
        data=body,
        headers=headers,
        environ_overrides={"REMOTE_ADDR": CLIENT},
        base_url=f"{'https' if https else 'http'}://{HOST}{prefix}",
    ) as answer:
        return Answer(answer.status_code, list(answer.headers), answer.get_data())


def query(path: str) -> dict[str, str]:
    """Return the fields of a path's query."""
    return dict(parse_qsl(urlsplit(path).query))
