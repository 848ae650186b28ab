"""What the page knows of HTTP: a request and a response as values, forms, headers, limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import attrs

BODY_LIMIT: Final = 32_768
"""How many bytes a form may have. The longest text that can be right takes half of it."""
_FIELDS: Final = 30

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
# `same-origin` and not `no-referrer`: with that browsers send `Origin: null` with each form.
SAFE_HEADERS: Final = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


class BadRequest(Exception):
    """A request that no form of this page makes.

    Attributes:
        status: The HTTP status, 400 to 415.
        text: What to tell whoever sent it.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


@attrs.frozen(kw_only=True)
class Request:
    """A request as the adapters hand it over.

    Attributes:
        method: In capitals.
        prefix: Where the page is mounted, without a slash at its end.
        path: Below where the page is mounted, percent-decoded; begins with a slash, or is empty.
        query: As it was sent, without the question mark.
        headers: By their names in lower case.
        cookies: By their names.
        https: Whether it came by TLS, as far as the server knows.
        body: What was sent, or None where it was more than `BODY_LIMIT`.
    """

    method: str
    prefix: str
    path: str
    query: str = attrs.field(repr=False)
    headers: Mapping[str, str] = attrs.field(repr=False)
    cookies: Mapping[str, str] = attrs.field(repr=False)
    https: bool
    body: bytes | None = attrs.field(default=b"", repr=False)

    def asked(self) -> dict[str, str]:
        """Return the query's fields.

        Raises:
            BadRequest: It is none that this page's links have.
        """
        return _fields(self.query)

    def form(self) -> dict[str, str]:
        """Return the form's fields.

        Raises:
            BadRequest: It is too large, or not a form as browsers send it.
        """
        if self.body is None:
            raise BadRequest(413, "That was more than this form takes.")
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            raise BadRequest(415, "That was not sent by a form of this page.")
        try:
            return _fields(self.body.decode("ascii"))
        except UnicodeDecodeError:
            raise BadRequest(400, "That form cannot be read.") from None

    def from_elsewhere(self) -> bool:
        """Tell whether a browser says that another site's page sent this.

        `Sec-Fetch-Site` is what current browsers say; `Origin` is compared where it is missing.
        The scheme is left out: a proxy that ends TLS changes it on the way.
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
        """How links lead from here to where the page is mounted: `./` but for odd paths."""
        return "../" * max(0, self.path.count("/") - 1) or "./"


@attrs.frozen(kw_only=True)
class Response:
    """A response for an adapter to send.

    Attributes:
        status: The HTTP status.
        headers: Names and values, one pair for each line.
        body: The bytes.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = attrs.field(repr=False)


def page(status: int, html: str, more: Iterable[tuple[str, str]] = ()) -> Response:
    """Make a page that nobody keeps."""
    return Response(
        status=status,
        headers=(
            ("Content-Type", "text/html; charset=utf-8"),
            ("Cache-Control", "no-store"),
            *SAFE_HEADERS,
            *more,
        ),
        body=html.encode("utf-8", "replace"),
    )


def redirect(where: str, more: Iterable[tuple[str, str]] = ()) -> Response:
    """Send the browser on with a GET."""
    return Response(
        status=303,
        headers=(("Location", where), ("Cache-Control", "no-store"), *SAFE_HEADERS, *more),
        body=b"",
    )


def link(base: str, name: str, **query: object) -> str:
    """Make a link within the page; what is None or empty stays out of the query.

    No address and no confirmation number ever goes in here: URLs are written to logs.
    """
    text = urlencode({key: value for key, value in query.items() if value not in (None, "")})
    return f"{base}{name}{'?' if text else ''}{text}"


def _fields(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            text, keep_blank_values=True, max_num_fields=_FIELDS, errors="strict", separator="&"
        )
    except ValueError:
        raise BadRequest(400, "That cannot be read.") from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise BadRequest(400, "That cannot be read: a field is there twice.")
    return fields
