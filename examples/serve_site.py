"""The site of `serve.py`: a sign-in, a home page, a mailbox, and ipguard's page mounted into it.

It is a host of ipguard: it knows the signed-in user (`authenticate`) and checks the guard after the
password. Unlike a real host, it lets users choose the client's address, and anyone can read the
mailbox and the log; its pages say so.

Left out: a limit on attempts, and TLS, without which the cookie cannot be `Secure`.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from demo_parts import Mailbox
from fastapi import FastAPI
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from login_server import CLIENT, LATER, PASSWORD, REFUSED, Account, Attempt, Door, create_app
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from ipguard import Actor, Guard, Outcome, Workflow
from ipguard.admin import asgi_app

PAGE = "/ip-restrictions"  # where ipguard's page is mounted
BRAND = "Example Trading"
COOKIE = "ipguard-demo"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A mail is shown as a mail program would: with its styles, and nothing else.
MAIL_HEADERS = HEADERS | {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'"
}
# The addresses to choose from, in networks reserved for examples (RFC 5737, RFC 3849).
PLACES = {
    "192.0.2.10": "head office",
    "203.0.113.5": "branch office",
    "203.0.113.20": "trading floor",
    "2001:db8:7::25": "home, IPv6",
    "198.51.100.7": "a café",
}
BODY_LIMIT = 10_000
SESSION_LIMIT = 1_000


@dataclass(frozen=True, kw_only=True)
class Person:
    """A person who can sign in; an administrator if `manages` is set."""

    username: str
    full_name: str
    role: str
    email: str = ""
    manages: Any = None

    def actor(self, address: str) -> Actor:
        return Actor(
            username=self.username, email=self.email, manages=self.manages, address=address
        )


@dataclass(frozen=True)
class SignedIn:
    """A session: the person and the chosen address."""

    person: Person
    address: str


@dataclass(frozen=True)
class Logged:
    """A line of the login server's log."""

    at: datetime
    username: str
    address: str
    let_in: bool
    why: str


class Site:
    """The pages and their state.

    Args:
        door: The login server's checks.
        mailbox: The received mails.
        people: The people who can sign in.
    """

    def __init__(self, door: Door, mailbox: Mailbox, people: Iterable[Person]) -> None:
        self.door = door
        self.mailbox = mailbox
        self.people = {person.username: person for person in people}
        self.sessions: OrderedDict[str, SignedIn] = OrderedDict()
        self.log: deque[Logged] = deque(maxlen=12)
        folder = Path(__file__).parent / "serve_pages"
        self.files = {
            name: (kind, (folder / name).read_bytes())
            for name, kind in (("style.css", "text/css"), ("icon.svg", "image/svg+xml"))
        }
        self.templates = Environment(
            loader=FileSystemLoader(folder),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def page(self, name: str, request: Request, *, status: int = 200, **what: Any) -> Response:
        text = self.templates.get_template(name).render(
            brand=BRAND, page=PAGE, session=self.session(request), path=request.url.path, **what
        )
        return HTMLResponse(text, status, HEADERS)

    def session(self, request: Request) -> SignedIn | None:
        return self.sessions.get(request.cookies.get(COOKIE, ""))

    def authenticate(self, request: Request) -> Actor | Response:
        """Return the acting person to ipguard's page."""
        session = self.session(request)
        if session is None:
            return RedirectResponse("/sign-in", 303, HEADERS)
        if session.person.manages is None:
            text = "Traders have nothing to administer. Sign in as rjones or operator for that."
            return self.message(request, 403, "This page is for administrators", text)
        return session.person.actor(session.address)

    def message(self, request: Request, status: int, title: str, text: str) -> Response:
        return self.page("message.html", request, status=status, title=title, text=text)

    # -- the pages

    def home(self, request: Request) -> Response:
        return self.page("home.html", request, people=self.people.values(), log=reversed(self.log))

    def sign_in_form(self, request: Request) -> Response:
        chosen = self.people.get(request.query_params.get("as", ""))
        return self.form(request, username=chosen.username if chosen else "", password=bool(chosen))

    def form(
        self, request: Request, *, status: int = 200, error: str = "", **typed: Any
    ) -> Response:
        return self.page(
            "sign-in.html",
            request,
            status=status,
            error=error,
            places=PLACES,
            peer=CLIENT.asgi(request.scope),
            sample=PASSWORD,
            typed={"username": "", "password": False, "place": "", "other": "", **typed},
        )

    async def sign_in(self, request: Request) -> Response:
        form = await read_form(request)
        if form is None:
            return refused_form()
        username, place = form.get("username", ""), form.get("place", "")
        other = form.get("other", "").strip()
        # A real login server uses the address of the connection, never a typed one.
        address = other or (place if place in PLACES else CLIENT.asgi(request.scope))
        # On a thread: hashing and, on a miss, the store take time.
        came = await run_in_threadpool(
            self.door.look, username[:256], form.get("password", "")[:1024], address
        )
        self.note(username, address, came)
        typed = {"username": username, "place": place, "other": other}
        if came.decision.outcome is Outcome.RETRY:
            return self.form(request, status=503, error=LATER, **typed)
        if came.let_in is None:
            return self.form(request, status=401, error=REFUSED, **typed)
        person = self.people[came.let_in.username]
        # A new session for each sign-in prevents session fixation.
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        token = secrets.token_urlsafe(32)
        self.sessions[token] = SignedIn(person, address)
        if len(self.sessions) > SESSION_LIMIT:
            self.sessions.popitem(last=False)
        answer = RedirectResponse("/" if person.manages is None else f"{PAGE}/", 303, HEADERS)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return answer

    async def sign_out(self, request: Request) -> Response:
        if await read_form(request) is None:
            return refused_form()
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        answer = RedirectResponse("/", 303, HEADERS)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    def mails(self, request: Request) -> Response:
        return self.page("mailbox.html", request, mails=self.mailbox.mails())

    def mail(self, request: Request) -> Response:
        for received in self.mailbox.mails():
            if str(received.id) == request.path_params["id"]:
                if request.path_params.get("html"):
                    return HTMLResponse(received.part("html"), headers=MAIL_HEADERS)
                return self.page("mail.html", request, received=received)
        return self.message(
            request, 404, "There is no such mail here", "Only the last 200 are kept."
        )

    def file(self, request: Request) -> Response:
        kind, content = self.files[request.url.path.removeprefix("/")]
        return Response(content, media_type=kind, headers=HEADERS)

    def note(self, username: str, address: str, came: Attempt) -> None:
        """Log the reason, which the person who tried never sees."""
        why = came.decision.reason.replace("_", " ")
        if not came.password_is_right:
            why = f"wrong username or password; address: {why}"
        self.log.append(
            Logged(datetime.now(UTC), username[:40], address[:45], came.let_in is not None, why)
        )


async def read_form(request: Request) -> dict[str, str] | None:
    """Return a form's fields, or None if another site sent it or it is too large."""
    origin = request.headers.get("origin")
    if origin is not None and origin != f"{request.url.scheme}://{request.url.netloc}":
        return None
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            return None
    # Invalid UTF-8 is replaced, which matches no username and no password.
    return {name: values[0] for name, values in parse_qs(body.decode("latin-1")).items()}


def refused_form() -> Response:
    return PlainTextResponse("This form is not from here.", 403, HEADERS)


def create_site(
    flow: Workflow, guard: Guard, mailbox: Mailbox, people: Iterable[Person]
) -> FastAPI:
    """Add the sample's pages and ipguard's page to the login server."""
    people = tuple(people)
    accounts = [Account.new(person.username, PASSWORD) for person in people]
    site = Site(Door(guard, accounts), mailbox, people)
    app = create_app(guard, accounts)
    # Reject other host names, which prevents DNS rebinding.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    routes: list[tuple[str, str, Callable[[Request], Any]]] = [
        ("/", "GET", site.home),
        ("/sign-in", "GET", site.sign_in_form),
        ("/sign-in", "POST", site.sign_in),
        ("/sign-out", "POST", site.sign_out),
        ("/mailbox", "GET", site.mails),
        ("/mailbox/{id}", "GET", site.mail),
        ("/mailbox/{id}/{html}", "GET", site.mail),
        ("/style.css", "GET", site.file),
        ("/icon.svg", "GET", site.file),
    ]
    for path, method, view in routes:
        app.add_route(path, view, methods=[method])
    app.mount(PAGE, asgi_app(flow, guard, authenticate=site.authenticate, brand=BRAND))
    return app
