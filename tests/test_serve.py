"""`dev.py demo --serve` as a process, over HTTP."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path

import httpx
import pytest

import ipguard
from tests.pages import Page

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SERVE = ROOT / "examples" / "serve.py"
PASSWORD = "correct horse"
PAGE = "/ip-restrictions/"


class Served:
    """The running demo: its process and its output."""

    def __init__(self, process: subprocess.Popen[str], tmp: Path) -> None:
        self.process = process
        self.tmp = tmp
        assert process.stdout is not None
        self.printed = ""
        for line in process.stdout:
            self.printed += line
            if "tnovak" in line:
                break
        found = re.search(r"begin here +(http://127\.0\.0\.1:\d+)/$", self.printed, re.MULTILINE)
        assert found, self.printed
        self.base = found[1]

    def browser(self) -> httpx.Client:
        """Return a client with its own cookies, which follows redirects."""
        return httpx.Client(base_url=self.base, follow_redirects=True, timeout=60, trust_env=False)

    def folders(self) -> list[Path]:
        return list(self.tmp.iterdir())


@contextmanager
def serving(tmp: Path, *args: str, by: tuple[str | Path, ...] = (SERVE,)) -> Iterator[Served]:
    """Start the demo; kill it at the end."""
    with subprocess.Popen(
        [sys.executable, "-u", *by, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp)},
    ) as process:
        try:
            yield Served(process, tmp)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One demo for all tests that leave it running."""
    with serving(tmp_path_factory.mktemp("serve")) as it:
        yield it


@pytest.fixture
def browser(served: Served) -> Iterator[httpx.Client]:
    """A client without a session."""
    with served.browser() as client:
        yield client


def sign_in(
    browser: httpx.Client, username: str, place: str = "192.0.2.10", **more: str
) -> httpx.Response:
    form = {"username": username, "password": PASSWORD, "place": place, "other": ""}
    return browser.post("/sign-in", data=form | more)


def press(browser: httpx.Client, page: httpx.Response, **fields: str) -> httpx.Response:
    """Fill in the form of a page's Submit button and press it."""
    form = Page(page.text).form("Submit")
    return browser.post(page.url.join(form.action), data=form.fields | fields)


def words(page: httpx.Response) -> str:
    """Return a page's text without its markup."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page.text)))


def follow(browser: httpx.Client, page: httpx.Response, pattern: str) -> httpx.Response:
    """Follow the first link whose URL matches."""
    found = re.search(f'href="([^"]*{pattern}[^"]*)"', page.text)
    assert found, f"no link like {pattern}"
    return browser.get(page.url.join(unescape(found[1])))


# ------------------------------------------------------------------ pages


def test_home_links_everything(browser):
    """The home page links the sign-in, the page and the mailbox; all its links work."""
    home = browser.get("/")
    for href in ("/sign-in", PAGE, "/mailbox", "/sign-in?as=rjones"):
        assert f'href="{href}"' in home.text
    for href in re.findall(r'href="(/[^"]*)"', home.text):
        assert browser.get(unescape(href)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/sign-in", "/mailbox/1"])
def test_security_headers(browser, path):
    """No page of the sample allows scripts, framing, caching, or another host name."""
    headers = browser.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["cache-control"] == "no-store"
    mail = browser.get("/mailbox/1/html").headers["content-security-policy"]
    assert mail.startswith("sandbox; default-src 'none'")
    assert browser.get(path, headers={"Host": "evil.example"}).status_code == 400


# ------------------------------------------------------------------ signing in


@pytest.mark.parametrize(
    ("username", "place", "lets_in", "why"),
    [
        ("jsmith", "203.0.113.5", True, "listed"),
        ("jsmith", "198.51.100.7", False, "not listed"),
        ("tnovak", "203.0.113.20", True, "listed"),
        ("JSmith", "198.51.100.7", False, "not listed"),
    ],
)
def test_a_trader_signs_in(browser, username, place, lets_in, why):
    """Traders can sign in only from their addresses; only the log shows the reason."""
    answer = sign_in(browser, username, place)
    if lets_in:
        assert answer.status_code == 200
        assert f"from {place}" in words(answer)
    else:
        assert answer.status_code == 401
        assert "The username or the password is wrong, or you may not log in" in words(answer)
        assert why not in words(answer)
        assert "Set-Cookie" not in answer.headers
    newest = re.search(r"<tbody>(?!.*<tbody>).*?</tr>", browser.get("/").text, re.DOTALL)
    assert newest
    for text in (username, place, "let in" if lets_in else "refused", why):
        assert f">{text}<" in newest[0]


def test_a_typed_address(browser):
    """A typed address takes precedence over a chosen one; malformed text is refused."""
    assert sign_in(browser, "jsmith", other="203.0.113.6").status_code == 200
    assert sign_in(browser, "mlee", other="203.0.113.06").status_code == 401
    assert "from 127.0.0.1" in words(sign_in(browser, "mlee", place="connection"))
    assert "so that you can see a refusal" in words(browser.get("/sign-in"))


def test_cookies(browser, served):
    """The session cookie is strict, new at each sign-in, and invalid after signing out."""
    cookies = []
    with httpx.Client(base_url=served.base, timeout=60, trust_env=False) as plain:
        for _ in range(2):
            cookie = sign_in(plain, "rjones").headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=strict" in cookie
            cookies.append(cookie.partition(";")[0])
        assert cookies[0] != cookies[1]
        assert plain.get(PAGE, headers={"Cookie": cookies[1]}).status_code == 200
        assert plain.get(PAGE, headers={"Cookie": cookies[0]}).status_code == 303
        plain.post("/sign-out", headers={"Cookie": cookies[1]})
        plain.cookies.clear()
        assert plain.get(PAGE, headers={"Cookie": cookies[1]}).status_code == 303


@pytest.mark.parametrize("path", ["/sign-in", "/sign-out"])
def test_cross_site_forms_are_refused(browser, path):
    """Forms of other sites and too large forms are refused."""
    sign_in(browser, "rjones")
    assert browser.post(path, headers={"Origin": "http://evil.example"}).status_code == 403
    assert browser.post(path, headers={"Origin": "null"}).status_code == 403
    assert browser.post(path, content=b"x" * 100_000).status_code == 403
    assert browser.get(PAGE).url.path == PAGE


def test_who_sees_the_page(browser):
    """Visitors are sent to the sign-in, traders get 403, administrators see their accounts."""
    assert browser.get(PAGE).url.path == "/sign-in"
    sign_in(browser, "mlee")
    assert browser.get(PAGE).status_code == 403
    assert "for administrators" in words(browser.get(PAGE))
    shown = words(sign_in(browser, "rjones"))
    assert "John Smith" in shown
    assert "Emi Satō" not in shown
    assert "Emi Satō" in words(sign_in(browser, "operator"))


def test_from_the_request_to_the_refusal(served):
    """The steps on the home page work, with the number from the mailbox."""
    with served.browser() as admin, served.browser() as trader:
        before = len(re.findall(r"<li><a href=\"/mailbox/\d+\"", admin.get("/mailbox").text))
        sign_in(admin, "rjones")
        form = follow(admin, admin.get(PAGE), "add")
        asked = press(admin, form, user="mlee", addresses="203.0.113.5")
        assert "You will receive an email" in words(asked)
        assert sign_in(trader, "mlee", "198.51.100.7").status_code == 200

        mailbox = admin.get("/mailbox")
        assert len(re.findall(r"<li><a href=\"/mailbox/\d+\"", mailbox.text)) == before + 1
        mail = follow(admin, mailbox, r"/mailbox/\d")
        assert "203.0.113.5" in mail.text
        number = re.search(r"^ +([\d-]{11})$", mail.text, re.MULTILINE)
        assert number
        done = press(admin, asked, number=number[1])
        assert "203.0.113.5 now holds" in words(done)
        assert sign_in(trader, "mlee", "203.0.113.5").status_code == 200
        assert sign_in(trader, "mlee", "198.51.100.7").status_code == 401


# ------------------------------------------------------------------ start and end


def ended(served: Served, sent: signal.Signals) -> tuple[int, str]:
    """Stop the demo by a signal; return its exit status and remaining output."""
    served.process.send_signal(sent)
    assert served.process.stdout is not None
    rest = served.process.stdout.read()
    return served.process.wait(timeout=60), rest


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(tmp_path, sent):
    """SIGINT and SIGTERM stop it with status 0; no files are left."""
    with serving(tmp_path) as served, served.browser() as browser:
        sign_in(browser, "rjones")  # a connection that is still open
        assert served.folders()
        assert ended(served, sent) == (0, "\n")
    assert served.folders() == []


def test_it_is_started_by_one_command(tmp_path, monkeypatch):
    """`dev.py demo --serve` replaces itself by the server, from any folder."""
    monkeypatch.chdir(tmp_path)
    dev = runpy.run_path(str(ROOT / "dev.py"))
    if not (dev["STAMP"].exists() and dev["STAMP"].read_text() == dev["wanted"]()):
        pytest.skip("dev.py would set its environment up first")
    with serving(tmp_path, by=(ROOT / "dev.py", "demo", "--serve")) as served:
        with served.browser() as browser:
            assert browser.get("/").status_code == 200
        assert ended(served, signal.SIGINT) == (0, "\n")


def test_keep_and_port(tmp_path):
    """`--keep` keeps the database and prints its path; `--port` sets the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(tmp_path, "--keep", "--port", str(port)) as served:
        assert served.base == f"http://127.0.0.1:{port}"
        code, rest = ended(served, signal.SIGINT)
    assert code == 0
    found = re.search(r"^The database is kept: (.+)$", rest, re.MULTILINE)
    assert found
    with ipguard.open_store(f"sqlite:///{found[1]}") as store:
        assert [str(r.addresses) for r in store.load_policy("tnovak").restrictions] == [
            "203.0.113.16-203.0.113.25"
        ]


def test_a_port_that_is_taken(tmp_path):
    """A port in use is reported with exit status 1; no files are left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tried = subprocess.run(
            [sys.executable, SERVE, "--port", str(taken.getsockname()[1])],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            timeout=60,
            check=False,
        )
    assert tried.returncode == 1
    assert re.fullmatch(r"port \d+ of 127\.0\.0\.1 cannot be opened: .+\n", tried.stderr)
    assert list(tmp_path.iterdir()) == []
