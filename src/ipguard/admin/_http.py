"""Requests and responses as plain values, with the limits and headers that every page shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import attrs

BODY_LIMIT: Final = 32_768
"""The largest body of a form in bytes: room for 100 usernames and 100 addresses."""
_FIELD_LIMIT: Final = 30

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
# `same-origin`, not `no-referrer`: with the latter, browsers send `Origin: null` with every form.
SAFE_HEADERS: Final = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


@attrs.define(eq=False, slots=False)
class PageError(Exception):
    """A request that is answered with an error page of this status, text and title."""

    status: int
    text: str
    title: str = "That did not work"
    headers: tuple[tuple[str, str], ...] = ()


class NotFound(PageError):
    """A page, user, request or restriction that does not exist, at least for this actor."""

    def __init__(self) -> None:
        text = "It may have been deleted or closed meanwhile. The list shows what there is."
        super().__init__(404, text, "Not found")


class ActorRefused(PageError):
    """The guard does not let the actor in, so no page is open to it."""


@attrs.frozen(kw_only=True)
class Request:
    """A request in the form that both adapters produce.

    Attributes:
        prefix: The path at which the page is mounted, without a slash at the end.
        path: The percent-decoded path below the mount; empty, or begins with a slash.
        query: The raw query string without the question mark.
        headers: The headers by lower-case name.
        https: Whether the request used TLS, according to the server.
        body: The body, or None if it was longer than `BODY_LIMIT`.
    """

    method: str
    prefix: str
    path: str
    query: str = attrs.field(repr=False)
    headers: Mapping[str, str] = attrs.field(repr=False)
    cookies: Mapping[str, str] = attrs.field(repr=False)
    https: bool
    body: bytes | None = attrs.field(default=b"", repr=False)

    def parse_query(self) -> dict[str, str]:
        """Return the fields of the query string, or raise PageError."""
        return _parse_fields(self.query)

    def parse_form(self) -> dict[str, str]:
        """Return the fields of the submitted form, or raise PageError."""
        if self.body is None:
            raise PageError(413, "That was more than this form takes.")
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            raise PageError(415, "That was not sent by a form of this page.")
        try:
            return _parse_fields(self.body.decode("ascii"))
        except UnicodeDecodeError:
            raise PageError(400, "That form cannot be read.") from None

    def is_cross_site(self) -> bool:
        """Return whether the browser reports that another site sent this request.

        Current browsers send `Sec-Fetch-Site`; without it, `Origin` is compared with `Host`. The
        scheme is ignored because a proxy that terminates TLS changes it.
        """
        site = self.headers.get("sec-fetch-site")
        if site is not None:
            return site not in ("same-origin", "none")
        origin = self.headers.get("origin")
        if origin is None:
            return False
        try:
            return urlsplit(origin).netloc.lower() != self.headers.get("host", "").lower()
        except ValueError:
            return True

    @property
    def base(self) -> str:
        """The relative path from this page to the mount: `./` except below unknown paths."""
        return "../" * max(0, self.path.count("/") - 1) or "./"


@attrs.frozen(kw_only=True)
class Response:
    """A response for an adapter to send; each of its headers is one line."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = attrs.field(repr=False)


def respond(
    status: int,
    body: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    kind: str = "text/html; charset=utf-8",
) -> Response:
    """Make a response that no cache may store."""
    return Response(
        status=status,
        headers=(("Content-Type", kind), ("Cache-Control", "no-store"), *SAFE_HEADERS, *headers),
        body=body.encode("utf-8", "replace"),
    )


def redirect(location: str, headers: Iterable[tuple[str, str]] = ()) -> Response:
    """Redirect the browser with a GET."""
    return respond(303, "", (("Location", location), *headers))


def build_link(base: str, page: str, **query: object) -> str:
    """Return a link to one of the pages; parameters that are None or empty are omitted."""
    text = urlencode({key: value for key, value in query.items() if value not in (None, "")})
    return f"{base}{page}{'?' if text else ''}{text}"


def remove_prefix(path: str, prefix: str) -> str | None:
    """Return the part of a path below a prefix, or None if the path is not below it."""
    if not prefix or not (path == prefix or path.startswith(f"{prefix}/")):
        return None
    rest = path[len(prefix) :]
    return rest and f"/{rest.lstrip('/')}"


def _parse_fields(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            text, keep_blank_values=True, max_num_fields=_FIELD_LIMIT, errors="strict"
        )
    except ValueError:
        raise PageError(400, "That cannot be read.") from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise PageError(400, "That cannot be read: a field is there twice.")
    return fields
