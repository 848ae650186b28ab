"""Notifiers that reach people: by mail over SMTP, or on a terminal.

`import ipguard` loads neither this module nor `smtplib` and `ssl`: import it where you need it.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import ssl
import sys
import unicodedata
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import make_msgid
from typing import Final, TextIO
from urllib.parse import unquote, urlsplit

import attrs

from ipguard._checks import check_seconds, check_text
from ipguard.addresses import AddressRange, AddressSet
from ipguard.errors import DeliveryError, InvalidValue
from ipguard.mail._letters import Letter, notices, number_letter, trial_letter
from ipguard.mail._session import Failure, Session, failure_of
from ipguard.model import Actor, Change, PendingRequest, User

__all__ = ["ConsoleNotifier", "EmailNotifier"]

_log = logging.getLogger(__name__)

_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_LOOPBACK: Final = AddressSet(AddressRange.parse(text) for text in ("127.0.0.0/8", "::1"))
# What needs neither quotes nor a parser's judgement: `a:b@c` is a mailbox `b@c` to one of them.
_LOCAL: Final = r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]"
_DOMAIN: Final = r"[A-Za-z0-9.-]"
_MAILBOX: Final = re.compile(rf"(?:{_LOCAL}|[^\x00-\x7f])+@(?:{_DOMAIN}|[^\x00-\x7f])+")
_SENDER: Final = re.compile(rf"(?:(?P<name>.+) <)?(?P<mailbox>{_LOCAL}+@{_DOMAIN}+)(?(name)>)")


class EmailNotifier:
    """Sends confirmation numbers and notices as mail. It is a `Notifier`, and thread-safe.

    Each mail has a connection and one recipient of its own, is sent on the caller's thread, and is
    either accepted by the server or an error: nothing is queued here.

    Args:
        url: The server: `smtp://host:port` (no encryption, port 25), `smtp+starttls://` (encrypted
            before anything is said, or not sent; port 587) or `smtps://` (port 465). With
            `user:password@`, both percent-encoded, it logs in; over plain `smtp://` it does so only
            to a loopback address. The server's certificate is verified.
        sender: The address that the mails come from, `no-reply@example.com` or
            `Example Trading <no-reply@example.com>`.
        timeout: How long one operation on the socket may take, in seconds.
        deadline: How long one mail may take in all, in seconds, the look-up of the server's name
            excluded. A notice is up to two mails.
        product: What the mails call the platform, in the middle of a sentence.
        tls: How to do TLS: for an authority of your own, say. The default is
            `ssl.create_default_context()`.
        helo: How the client names itself to the server. The default is the address that it connects
            from (RFC 5321 4.1.4), which servers that relay for known hosts accept.

    Raises:
        InvalidValue: A value makes no sense, or a password would travel in the clear. The message
            never shows the password.
    """

    def __init__(
        self,
        url: str,
        *,
        sender: str,
        timeout: float = 10.0,
        deadline: float = 30.0,
        product: str = "the trading platform",
        tls: ssl.SSLContext | None = None,
        helo: str | None = None,
    ) -> None:
        self._server = _server(url)
        self._secrets = () if self._server.login is None else _secrets(*self._server.login)
        self._sender, self._from = _sender(sender)
        self._timeout = check_seconds("timeout", timeout, above=0)
        self._deadline = check_seconds("deadline", deadline, above=0)
        self._product = check_text("product", product, 100, required=True)
        if self._server.scheme == "smtp" and tls is not None:
            raise InvalidValue("tls", "smtp:// uses none: say smtp+starttls:// or smtps://")
        self._tls = tls
        if self._server.scheme != "smtp" and tls is None:
            self._tls = ssl.create_default_context()
        if helo is not None and not re.fullmatch(r"[A-Za-z0-9.:\[\]-]{1,255}", helo):
            raise InvalidValue("helo", "must be a host's name or an address in brackets")
        self._helo = helo

    def __repr__(self) -> str:
        return f"<EmailNotifier {self._server.scheme}://{self._server.host}:{self._server.port}>"

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Mail a confirmation number to the actor; see `ipguard.notify.Notifier`.

        Args:
            request: What would be confirmed, which the mail shows.
            number: The number in groups, as a person reads it.
            actor: Who gets it, at `actor.email`.

        Raises:
            DeliveryError: The server did not accept the mail, or not in time. The reason holds
                neither the number nor a password.
        """
        letter = number_letter(request, number, actor, self._product)
        failure = self._failure(letter, number, number.replace("-", ""))
        if failure is not None:
            raise DeliveryError(failure.reason, request.id) from failure.cause

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Mail a notice to the actor, and another to the user where that is somebody else.

        Args:
            change: What was done.
            actor: Who did it.
            user: Whom it concerns; without an address, or None, only the actor is told.

        Raises:
            DeliveryError: The server did not accept one of the mails; both were tried.
        """
        letters = notices(change, actor, user, self._product)
        failures = [failure for failure in map(self._failure, letters) if failure is not None]
        if failures:
            reason = "; ".join(failure.reason for failure in failures)
            raise DeliveryError(reason) from failures[0].cause

    def send_test(self, to: str) -> None:
        """Mail a test, which says that it is one.

        Args:
            to: One e-mail address.

        Raises:
            DeliveryError: The server did not accept it.
        """
        failure = self._failure(trial_letter(to, self._product, datetime.now(UTC)))
        if failure is not None:
            raise DeliveryError(failure.reason) from failure.cause

    def _failure(self, letter: Letter, *secrets: str) -> Failure | None:
        # Returned, not raised: an error raised inside `except` keeps the other one as its context.
        try:
            self._send(letter)
        except (OSError, ValueError) as exc:  # smtplib's and ssl's own errors are OSErrors
            return failure_of(exc, (*self._secrets, *secrets))
        return None

    def _send(self, letter: Letter) -> None:
        to, server = _deliverable(letter.to), self._server
        message = self._message(letter, to)
        session = Session(
            server.host,
            server.port,
            helo=self._helo,
            timeout=self._timeout,
            deadline=self._deadline,
            tls=self._tls if server.scheme == "smtps" else None,
        )
        try:
            if server.scheme == "smtp+starttls":
                session.starttls(context=self._tls)
            if server.login is not None:
                session.login(*server.login)
            # One recipient: all of it is refused, or none of it.
            session.send_message(message, self._sender, [to])
            _log.info("%s was accepted by %s:%d", message["Message-ID"], server.host, server.port)
            session.part()
        finally:
            session.close()

    def _message(self, letter: Letter, to: str) -> EmailMessage:
        message = EmailMessage(policy=SMTP)
        message["From"] = self._from
        message["To"] = _address(to)
        message["Subject"] = letter.subject
        message["Date"] = datetime.now(UTC)
        message["Message-ID"] = make_msgid(domain=self._from.domain)
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no answering machine answers it
        message["X-Auto-Response-Suppress"] = "OOF, AutoReply"  # the same, for Exchange
        # Quoted-printable: every server takes it, whatever the length of a line.
        message.set_content(letter.text(), cte="quoted-printable")
        message.add_alternative(letter.html(), subtype="html", cte="quoted-printable")
        return message


class ConsoleNotifier:
    """Prints the mails instead of sending them. For demonstrations only: it shows the number.

    Args:
        stream: Where to print; None for standard output as it is at the time of printing.
        product: What the mails call the platform, in the middle of a sentence.

    Raises:
        InvalidValue: The product's name is empty, too long, or holds control characters.
    """

    def __init__(
        self, stream: TextIO | None = None, *, product: str = "the trading platform"
    ) -> None:
        self._stream = stream
        self._product = check_text("product", product, 100, required=True)

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Print the mail with a confirmation number; see `ipguard.notify.Notifier`.

        Args:
            request: What would be confirmed.
            number: The number as a person reads it.
            actor: Who would get it.

        Raises:
            OSError: The stream cannot be written to.
        """
        self._print(number_letter(request, number, actor, self._product))

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Print the notices that would be sent; see `ipguard.notify.Notifier`.

        Args:
            change: What was done.
            actor: Who did it.
            user: Whom it concerns, or None.

        Raises:
            OSError: The stream cannot be written to.
        """
        for letter in notices(change, actor, user, self._product):
            self._print(letter)

    def _print(self, letter: Letter) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        # One call, so that the mails of two threads do not run into one another.
        stream.write(f"To: {letter.to}\nSubject: {letter.subject}\n\n{letter.text()}\n")
        stream.flush()


@attrs.frozen
class _Server:
    scheme: str
    host: str
    port: int
    login: tuple[str, str] | None = attrs.field(repr=False)


def _server(url: object) -> _Server:
    """Take a URL apart; whatever is wrong with it, no message repeats a part of it."""
    if not isinstance(url, str) or not (url.isascii() and url.isprintable()) or " " in url:
        raise InvalidValue("url", "must be text in printable ASCII, without blanks")
    scheme, host, port, after, login = "", None, None, "", None
    with contextlib.suppress(ValueError):  # which would quote the URL, and become the context
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
        after = parts.path.removeprefix("/") + parts.query + parts.fragment
        login = (parts.username, parts.password)
    if login is None or scheme not in _PORTS or not host or port == 0:
        raise InvalidValue("url", "must be smtp://, smtp+starttls:// or smtps://, and host:port")
    if after:
        raise InvalidValue("url", "nothing follows the port; percent-encode / ? # in a password")
    known = _login(*login)
    if known is not None and scheme == "smtp" and host != "localhost" and host not in _LOOPBACK:
        raise InvalidValue("url", "a password goes to another host only with TLS")
    return _Server(scheme, host, port or _PORTS[scheme], known)


def _login(user: str | None, password: str | None) -> tuple[str, str] | None:
    if user is None and password is None:
        return None
    known = tuple(unquote(text or "", errors="replace") for text in (user, password))
    # smtplib encodes both in ASCII, and its error would quote them.
    if not all(text and text.isascii() and text.isprintable() for text in known):
        raise InvalidValue("url", "user and password are both needed, in printable ASCII")
    return known[0], known[1]


def _secrets(user: str, password: str) -> tuple[str, ...]:
    """Return the password as it is and as it travels (RFC 4616): a server might repeat either."""
    plain = (password, f"\0{user}\0{password}")
    return (password, *(base64.b64encode(text.encode()).decode() for text in plain))


def _sender(text: str) -> tuple[str, Address]:
    found = _SENDER.fullmatch(check_text("sender", text, 320))
    if found is None or "=?" in text:
        raise InvalidValue("sender", "must be name@host or Name <name@host>, the address in ASCII")
    return found["mailbox"], _address(found["mailbox"], found["name"] or "")


def _deliverable(mailbox: str) -> str:
    """Return a mailbox with its domain in ASCII, as servers without SMTPUTF8 need it.

    The codec of the standard library follows IDNA 2003, which turns a few characters of IDNA 2008
    into others (`ß` into `ss`) and so names another domain. A domain that does not survive the
    round trip is refused: a confirmation number must not go to somebody else.

    Raises:
        ValueError: The mailbox cannot be written in a header, or its domain has no ASCII form.
    """
    if not _MAILBOX.fullmatch(mailbox) or "=?" in mailbox:
        raise ValueError("the recipient's address is not a plain one")
    local, _, domain = mailbox.rpartition("@")
    if domain.isascii():
        return mailbox
    wanted = unicodedata.normalize("NFKC", domain).lower().replace("\N{IDEOGRAPHIC FULL STOP}", ".")
    with contextlib.suppress(UnicodeError):
        encoded = wanted.encode("idna")
        if encoded.decode("idna") == wanted:
            return f"{local}@{encoded.decode()}"
    raise ValueError("the recipient's domain has no unambiguous ASCII form; use its xn-- form")


def _address(mailbox: str, name: str = "") -> Address:
    local, _, domain = mailbox.rpartition("@")
    return Address(name, local, domain)
