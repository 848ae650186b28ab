"""A real browser on the administration page: fixtures, and a walk that reports what goes wrong.

A test with a `walk` runs in four ways: with and without JavaScript, wide and narrow, on ASGI and
WSGI. In the short run there is one way only.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest

from tests.browser_world import HOSTS, World
from tests.flows import ALICE
from tests.requirements import missing
from tests.smtp_server import MailServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = {"wide": (1280, 900), "narrow": (390, 844)}
SEND = "Send confirmation number"
_PATIENCE = 20_000  # milliseconds


class Way(NamedTuple):
    """A combination of host, JavaScript and window size."""

    host: str
    scripts: bool
    width: str

    def __str__(self) -> str:
        return f"{self.host}-{'js' if self.scripts else 'nojs'}-{self.width}"


WAYS = (
    Way("asgi", True, "wide"),
    Way("wsgi", True, "narrow"),
    Way("asgi", False, "wide"),
    Way("wsgi", False, "narrow"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the ways in which a test with a `walk` runs."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "way" not in metafunc.fixturenames or "way" in given:
        return
    rest = [pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:]]
    metafunc.parametrize("way", [WAYS[0], *rest], ids=str)


# ------------------------------------------------------------------ the browser


def program() -> str:
    """Return the path of the browser. If it is missing, skip the test; on CI, fail it."""
    return next(filter(None, map(shutil.which, _NAMES)), None) or missing("Chromium", "chromium")


# One for each file: Playwright runs an event loop in this thread, and other files run their own.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser."""
    path = program()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def mails() -> Iterator[MailServer]:
    """The mail server; each world reads only the mails that arrived during its test."""
    with MailServer() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, mails: MailServer) -> Iterator[World]:
    """A host that is not served yet."""
    it = World(tmp_path, mails)
    with it.store, it.guard:
        yield it


@pytest.fixture(scope="module")
def windows(chromium: Browser) -> Callable[[Way], Page]:
    """The browser windows of a file's tests, opened once because opening takes long."""
    return functools.cache(functools.partial(window, chromium))


@pytest.fixture
def walk(windows: Callable[[Way], Page], world: World, way: Way) -> Iterator[Walk]:
    """Alice's browser at the page."""
    with HOSTS[way.host](world) as world.page_url, walking(windows(way), world, way) as it:
        yield it


# ------------------------------------------------------------------ the walk


class Walk:
    """One person's browser. Every error that the browser reports fails the walk at its end.

    Attributes:
        expected: The HTTP statuses from 400 on that the test expects of pages.
    """

    def __init__(self, page: Page, world: World, way: Way) -> None:
        self.page = page
        self.world = world
        self.way = way
        self.expected: set[int] = set()
        self.complaints: list[str] = []
        self._origin = "/".join(world.page_url.split("/")[:3]) + "/"
        self._listeners: dict[Any, Callable[[Any], None]] = {
            "pageerror": lambda error: self.complaints.append(f"script: {error}"),
            "requestfailed": self._failed,
            "response": self._answered,
            "console": self._said,
        }
        page.set_default_timeout(_PATIENCE)

    def __enter__(self) -> Self:
        for event, listener in self._listeners.items():
            self.page.on(event, listener)
        return self

    def __exit__(self, *_: object) -> None:
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)

    def _before(self, url: str) -> bool:
        """Return whether a URL belongs to the previous walk in this window, whose host is gone."""
        return url.startswith("http://127.0.0.1:") and not url.startswith(self._origin)

    def _failed(self, request: Any) -> None:
        # A navigation aborts pending requests of the previous page, which is not an error.
        if request.failure != "net::ERR_ABORTED" and not self._before(request.url):
            self.complaints.append(f"{request.method} {request.url}: {request.failure}")

    def _answered(self, response: Any) -> None:
        document = response.request.is_navigation_request()
        if response.status >= 400 and not (document and response.status in self.expected):
            self.complaints.append(f"{response.status} for {response.url}")

    def _said(self, message: Any) -> None:
        # The console also reports statuses from 400 on, which `_answered` checks.
        judged = "Failed to load resource" in message.text
        if message.type in ("error", "warning") and not judged:
            self.complaints.append(f"{message.type}: {message.text}")

    # -- actions

    def open(self, path: str = "") -> None:
        """Open a page by its path below the mount."""
        self.page.goto(self.world.page_url + path)
        self.look()

    def look(self) -> None:
        """Check a new page: one main heading, a title, no horizontal overflow."""
        title, headings, wide, room = self.page.evaluate(
            "[document.title, document.querySelectorAll('h1').length,"
            " document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert title.strip(), f"{self.page.url} has no title"
        assert headings == 1, f"{title}: not one main heading"
        assert wide <= room, f"{title}: {wide} pixels in a window of {room}"

    def follow(self, name: str, within: Locator | None = None) -> None:
        """Follow a link."""
        self.go((within or self.page).get_by_role("link", name=name, exact=True))

    def press(self, name: str, within: Locator | None = None) -> None:
        """Press a button that submits a form, by its visible text or by its whole name."""
        named = re.compile(rf"^(Submit: )?{re.escape(name)}$")
        self.go((within or self.page).get_by_role("button", name=named))

    def go(self, what: Locator) -> None:
        """Click an element that leads to another page."""
        with self.page.expect_navigation():
            what.click()
        self.look()

    def fill(self, label: str, text: str) -> None:
        """Fill in the field with a label."""
        self.field(label).fill(text)

    def submit_addresses(self) -> None:
        """Submit the form and, without scripts, the review."""
        self.press(SEND)
        if self.heading == "Is this what you mean?":
            self.press(SEND)

    def become(self, who: str) -> None:
        """Sign in as another person."""
        self.page.context.add_cookies([{"name": "who", "value": who, "url": self.world.page_url}])

    def field(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def row(self, username: str = "jsmith") -> Locator:
        """Return a user's row of the list."""
        return self.page.get_by_role("row").filter(has=self.page.get_by_text(username, exact=True))

    # -- checks

    def sees(self, *texts: str, within: Locator | None = None) -> None:
        """Fail unless each text is visible on the page."""
        shown = (within or self.page.locator("body")).inner_text()
        for text in texts:
            assert text in shown, f"{text!r} is not in:\n{shown}"

    def waits_for(self, text: str) -> None:
        """Wait for a text that a script adds."""
        self.page.get_by_text(text).wait_for()

    def misses(self, *texts: str, within: Locator | None = None) -> None:
        """Fail if one of the texts is visible on the page."""
        shown = (within or self.page.locator("body")).inner_text()
        for text in texts:
            assert text not in shown, f"{text!r} is in:\n{shown}"

    @property
    def heading(self) -> str:
        return self.page.locator("h1").inner_text()


def window(chromium: Browser, way: Way) -> Page:
    """Open a browser window with its own cookies."""
    width, height = WIDTHS[way.width]
    context = chromium.new_context(
        java_script_enabled=way.scripts,
        viewport={"width": width, "height": height},
        is_mobile=way.width == "narrow",
        has_touch=way.width == "narrow",
        reduced_motion="reduce",
        locale="en-GB",
    )
    return context.new_page()


@contextlib.contextmanager
def walking(page: Page, world: World, way: Way, who: str = ALICE.username) -> Iterator[Walk]:
    """Walk in a window as a signed-in person; `who` is empty for a visitor."""
    page.context.clear_cookies()
    page.emulate_media(color_scheme="light")
    with Walk(page, world, way) as it:
        if who:
            it.become(who)
        yield it
    assert not it.complaints, "\n".join(it.complaints)
