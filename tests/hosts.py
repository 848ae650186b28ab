"""Shared by the tests of the kits: a desk for quick tests, and a walk on real servers.

In the walk, a real browser is in front of a real nginx, which passes its requests on to an example
under its real server, with a database that can be away.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import httpx
import pytest
import trustme

from ipguard import Applied, ClientAddress, Guard
from ipguard.errors import StoreUnavailable
from tests.browser_world import NUMBER
from tests.conftest import LONG
from tests.flows import BOSS, HOME, OFFICE, Desk
from tests.guards import Held
from tests.logins import ROOT
from tests.pages import Browser, query
from tests.postgres import free_port, own_server, until
from tests.test_behind_a_proxy import nginx, section

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page

PROXY = "192.0.2.99"  # the peer of every request of `tests.pages`
CLIENT = ClientAddress(proxies=[PROXY])

#: How nginx reaches the examples, and their stores. The long run has every combination.
PLACES = [("TCP", "postgres"), ("a Unix socket", "sqlite")]
if LONG:
    PLACES += [("TCP", "sqlite"), ("a Unix socket", "postgres")]


class Bench(Desk):
    """A desk with a guard, whose store can be down."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Held(self.store)
        self.guard = Guard(self.outer, monotonic=self.clock.monotonic)

    def restrict(self, username: str, addresses: str = OFFICE) -> Applied:
        """Restrict a user, and let the guard know."""
        applied = self.flow.impose(BOSS, username, addresses, reason="a test")
        self.guard.sync()
        return applied

    def begin_outage(self) -> None:
        self.outer.down = StoreUnavailable("down")
        self.wait(seconds=6)

    def end_outage(self) -> None:
        self.outer.down = None
        self.wait(seconds=2)  # the longest back-off is over
        self.guard.sync()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.store:
        yield bench
        bench.guard.close()


def come_from(browser: Browser, address: str | None) -> None:
    """Let a proxy report an address, or none."""
    browser.headers.pop("X-Forwarded-For", None)
    if address is not None:
        browser.headers["X-Forwarded-For"] = address


def change_on_the_page(browser: Browser, bench: Bench) -> None:
    """Request, confirm and delete a restriction, signed in as Alice from HOME."""
    browser.follow("Add IP Address Restriction")
    browser.press("Submit", user="jsmith", addresses=OFFICE)
    number = bench.outbox.number_for(query(browser.address)["request"])
    browser.press("Submit", number=number)
    assert bench.held("jsmith") == [OFFICE]
    assert {change.actor_address for change in bench.rows() if change.actor} == {HOME}
    browser.follow("Delete")
    browser.press("Delete", open="accept")
    assert bench.held("jsmith") == []


# -- real servers

FORGED = {
    "X-Forwarded-For": OFFICE,
    "X-Real-IP": OFFICE,
    "Forwarded": f"for={OFFICE}",
    "True-Client-IP": OFFICE,
}
PASSWORD = "correct horse"
REFUSED = "The username or the password is wrong, or you may not log in from where you are."


@attrs.frozen
class Site:
    """An example that is served.

    Attributes:
        url: The URL of nginx.
        output: What the server prints, mails included.
        begin_outage: Makes the database unavailable.
        end_outage: Makes it available again, with its data.
    """

    url: str
    output: Path
    begin_outage: Callable[[], object]
    end_outage: Callable[[], object]

    def number(self) -> str:
        """Return the confirmation number that was mailed last."""
        found: list[str] = []

        def arrived() -> bool:
            found[:] = NUMBER.findall(self.output.read_text())
            return bool(found)

        until(arrived, "a number is mailed")
        return found[-1]


@contextmanager
def database(
    kind: str, folder: Path
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Yield the URL of a database, and functions that take it away and bring it back."""
    if kind == "sqlite":
        file, away = folder / "ipguard.db", folder / "away.db"
        yield f"sqlite:///{file}", lambda: file.rename(away), lambda: away.rename(file)
        return
    with own_server(fsync=False) as server:
        yield server.url(tcp=True, sslmode="disable"), server.stop, server.start


@contextmanager
def serving(
    example: str,
    server: str,
    store: str,
    *extra: str,
    prepare: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Iterator[Site]:
    """Serve an example behind nginx, as docs/behind-a-proxy.md says.

    Args:
        example: The application, `module:name`, or the module whose `app` it is.
        server: The section of the page, such as "gunicorn over TCP".
        store: `sqlite` or `postgres`.
        extra: More options of the server.
        prepare: A command to run before.
        settings: More of the environment of both.
    """
    web, port, unix = free_port(), free_port(), server.endswith("socket")
    folder = Path(tempfile.mkdtemp(prefix="ipguard-"))  # short: the path of a socket is limited
    backend = f"unix:{folder}/app.sock" if unix else f"127.0.0.1:{port}"
    # The proxy has another address than the browser.
    (block,) = section("nginx", "nginx")
    block = re.sub(r"server 10\.0\.0\.9:8000;.*", f"server {backend};", block)
    block = block.replace("listen 443", f"listen 127.0.0.1:{web}").replace("/etc/ssl", str(folder))
    block = block.replace("$host;", "$http_host;")  # with the port, which is not 443
    if not unix:
        block = block.replace("proxy_pass", "proxy_bind 127.0.0.2;\n        proxy_pass")
    (line,) = section(server, "sh")
    line = line.replace("10.0.0.9:8000", backend).replace(
        "10.0.0.9 --port 8000", f"127.0.0.1 --port {port}"
    )
    line = line.replace("10.0.0.5", "127.0.0.2").replace("/run/login", str(folder))
    tool, *options = shlex.split(line)
    kind = options.pop().partition(":")[2]
    assert kind in ("wsgi", "asgi")
    secrets = {"IPGUARD_KEY": "k" * 32, "SECRET_KEY": "s" * 32, "PYTHONUNBUFFERED": "1"}
    env = {"UNIX_SOCKET": "1"} if unix else {"PROXIES": "127.0.0.2"}
    certificate = trustme.CA().issue_cert("bank.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "bank.pem")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url, begin, end = stack.enter_context(database(store, folder))
        env |= secrets | {"IPGUARD_URL": url, "BANK_DATA": str(folder), **(settings or {})}
        output = folder / "output"
        if prepare:
            subprocess.run(prepare, env=os.environ | env, check=True, stdout=subprocess.DEVNULL)
        stack.enter_context(process(nginx(block, folder), output, {}))
        application = example if ":" in example else f"{example}:app"
        command = [sys.executable, "-m", tool, *options, *extra, application]
        stack.enter_context(process(command, output, env))
        site = Site(f"https://127.0.0.1:{web}/", output, begin, end)

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{site.url}login", verify=False, follow_redirects=True)
                return answer.status_code == 200
            return False

        try:
            until(answers, f"{example} answers")
            yield site
        except BaseException:
            print(output.read_text())
            raise


@contextmanager
def process(command: list[str], output: Path, env: dict[str, str]) -> Iterator[None]:
    with output.open("ab") as file:
        started = subprocess.Popen(
            command,
            cwd=ROOT / "examples",
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        started.terminate()
        started.wait(30)


class Person:
    """Somebody with a browser of their own."""

    def __init__(self, chromium: Chromium, site: Site, username: str, **headers: str) -> None:
        self.site, self.username = site, username
        context = chromium.new_context(ignore_https_errors=True, extra_http_headers=headers)
        self.page: Page = context.new_page()

    def sign_in(self, password: str = PASSWORD) -> tuple[int, str]:
        """Send the form of the sign-in; return the status and the text of the answer.

        A worker that has not noticed a change or an outage may have let the person in before: then
        there would be no form.
        """
        self.page.context.clear_cookies()
        self.page.goto(f"{self.site.url}login")
        self.page.get_by_label("Username").fill(self.username)
        self.page.get_by_label("Password").fill(password)
        with self.page.expect_navigation() as answer:
            self.page.get_by_role("button", name="Sign in").click()
        return answer.value.status, self.text

    def look(self, path: str = "") -> int:
        """Open a page; return its status."""
        answer = self.page.goto(self.site.url + path)
        assert answer is not None
        return answer.status

    @property
    def text(self) -> str:
        return self.page.locator("body").inner_text()

    @property
    def welcome(self) -> bool:
        return f"Welcome, {self.username}" in self.text

    def restrict(self, username: str, addresses: str) -> None:
        """Request a restriction on the page, and confirm it with the number of the mail."""
        page = self.page
        self.look("")
        page.get_by_role("link", name="IP restrictions").click()
        page.get_by_role("link", name="Add IP Address Restriction").first.click()
        page.get_by_label("Trader", exact=True).select_option(username)
        page.get_by_label("IP Address", exact=True).fill(addresses)
        page.get_by_role("button", name="Submit").click()
        page.get_by_label("Confirmation Number").fill(self.site.number())
        page.get_by_role("button", name="Submit").click()
        page.locator("#note").wait_for()


def is_retried(person: Person, password: str) -> bool:
    return person.sign_in(password)[0] == 503


def walk(chromium: Chromium, site: Site, status: int = 401, words: str = REFUSED) -> None:
    """Sign in, restrict a user on the page, and take the database away.

    Args:
        chromium: The browser.
        site: The host.
        status: The status of a login with a wrong password.
        words: The text of its answer.
    """
    rjones, jsmith, mlee = (Person(chromium, site, name) for name in ("rjones", "jsmith", "mlee"))
    for person in (rjones, jsmith, mlee):
        assert person.sign_in()[0] == 200
        assert person.welcome

    # The browser's address is 127.0.0.1. Each worker follows the change by itself.
    rjones.restrict("mlee", "127.0.0.1")
    rjones.restrict("jsmith", OFFICE)
    until(lambda: jsmith.look() == 200 and not jsmith.welcome, "the session ends")
    assert jsmith.page.url.startswith(f"{site.url}login")
    assert mlee.look() == 200
    assert mlee.welcome
    until(lambda: words in jsmith.sign_in()[1], "jsmith is refused")
    refused = status, jsmith.text
    assert jsmith.sign_in("wrong") == refused
    forger = Person(chromium, site, "jsmith", **FORGED)
    until(lambda: forger.sign_in() == refused, "a forger is refused")

    # While the store is unavailable, logins fail and open sessions stay.
    site.begin_outage()

    def is_out() -> bool:
        status = mlee.look()
        assert status == 503 or mlee.welcome, mlee.text
        return status == 503

    until(is_out, "the store is unavailable")
    until(lambda: rjones.look("ip-restrictions/") == 503, "the page is unavailable")
    for person in (jsmith, Person(chromium, site, "mlee")):
        for password in (PASSWORD, "wrong"):
            until(partial(is_retried, person, password), "the login is to be tried again")
            assert "Please try again in a few seconds." in person.text
            is_out()
    site.end_outage()
    until(lambda: not is_out(), "the store answers again")
    until(lambda: rjones.look("ip-restrictions/") == 200, "the page answers again")
    until(lambda: jsmith.sign_in() == refused, "logins are decided again")
