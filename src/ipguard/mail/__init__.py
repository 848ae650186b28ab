"""Notifiers: by mail over SMTP, or printed on a terminal.

`import ipguard` loads neither this module nor `smtplib` and `ssl`.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import ssl
import sys
import unicodedata
from collections.abc import Callable, Iterable
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
from ipguard.mail._messages import (
    Message,
    notices,
    number_message,
    refusal_message,
    trial_message,
)
from ipguard.mail._smtp import Connection, Failure, failure_of
from ipguard.model import Actor, Change, PendingRequest, Sighting, User

__all__ = ["ConsoleNotifier", "EmailNotifier"]

_log = logging.getLogger(__name__)

_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_LOOPBACK: Final = AddressSet(AddressRange.parse(text) for text in ("127.0.0.0/8", "::1"))
# Mailboxes that all parsers read alike, without quotes: some read `a:b@c` as `b@c`.
_LOCAL: Final = r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]"
_DOMAIN: Final = r"[A-Za-z0-9.-]"
_MAILBOX: Final = re.compile(rf"(?:{_LOCAL}|[^\x00-\x7f])+@(?:{_DOMAIN}|[^\x00-\x7f])+")
_SENDER: Final = re.compile(rf"(?:(?P<name>.+) <)?(?P<mailbox>{_LOCAL}+@{_DOMAIN}+)(?(name)>)")


class EmailNotifier:
    """Sends confirmation numbers and notices as mail; see `ipguard.notify.Notifier`. Thread-safe.

    Each mail has its own connection and one recipient, is sent on the caller's thread, and is
    either accepted by the server or an error: nothing is queued here.

    Args:
        url: The server: `smtp://host:port` (no encryption, port 25), `smtp+starttls://` (encrypted
            with STARTTLS, or not sent; port 587) or `smtps://` (port 465). With `user:password@`,
            both percent-encoded, it logs in; over plain `smtp://` only to a loopback address. The
            server's certificate is verified. Or a function that sends an
            `email.message.EmailMessage`, for hosts that send mail in a way of their own; if it
            raises, the mail was not sent. `timeout`, `deadline`, `tls` and `helo` are then unused.
        sender: The address that the mails come from, `no-reply@example.com` or
            `Example Trading <no-reply@example.com>`.
        timeout: The longest time of one socket operation, in seconds.
        deadline: The longest time of one mail, in seconds, without the look-up of the server's
            name. A notice is up to two mails.
        product: What the mails call the platform, in the middle of a sentence.
        tls: The TLS context, for your own certificate authority for example. The default is
            `ssl.create_default_context()`.
        helo: How the client names itself to the server. The default is the address that it connects
            from (RFC 5321 4.1.4), which servers that relay for known hosts accept.

    Raises:
        InvalidValue: A value is not valid, or a password would be sent without encryption. The
            message never shows the password.
    """

    def __init__(
        self,
        url: str | Callable[[EmailMessage], object],
        *,
        sender: str,
        timeout: float = 10.0,
        deadline: float = 30.0,
        product: str = "the trading platform",
        tls: ssl.SSLContext | None = None,
        helo: str | None = None,
    ) -> None:
        self._transport = url if callable(url) else None
        self._server = _Server("host", "", 0, None) if callable(url) else _server(url)
        self._sender, self._from = _sender(sender)
        self._timeout = check_seconds("timeout", timeout, above=0)
        self._deadline = check_seconds("deadline", deadline, above=0)
        self._product = check_text("product", product, 100, required=True)
        if self._server.scheme == "smtp" and tls is not None:
            raise InvalidValue("tls", "smtp:// does not use TLS; use smtp+starttls:// or smtps://")
        encrypted = self._server.scheme in ("smtps", "smtp+starttls")
        self._tls = (tls or ssl.create_default_context()) if encrypted else None
        if helo is not None and not re.fullmatch(r"[A-Za-z0-9.:\[\]-]{1,255}", helo):
            raise InvalidValue("helo", "must be a host name or an address in brackets")
        self._helo = helo

    def __repr__(self) -> str:
        if self._transport is not None:
            return "<EmailNotifier by the host>"
        return f"<EmailNotifier {self._server.scheme}://{self._server.host}:{self._server.port}>"

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Mail a confirmation number to the actor, with what it would confirm.

        Raises:
            DeliveryError: The server did not accept the mail, or not in time. The reason contains
                neither the number nor a password.
        """
        message = number_message(request, number, actor, self._product)
        self._deliver([message], request.id, number, number.replace("-", ""))

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Mail a notice to the actor, and another to the user if not the same person.

        Raises:
            DeliveryError: The server did not accept one of the mails; both were tried.
        """
        self._deliver(notices(change, actor, user, self._product))

    def login_refused(self, sighting: Sighting, user: User) -> None:
        """Mail a user that a login with the right password was refused.

        A user without an e-mail address gets no mail.

        Raises:
            DeliveryError: The server did not accept the mail, or not in time.
        """
        to = [user.email] if user.email else []
        self._deliver(refusal_message(sighting, user, each, self._product) for each in to)

    def send_test(self, to: str) -> None:
        """Send a test mail to an e-mail address, or raise DeliveryError if it is not accepted."""
        self._deliver([trial_message(to, self._product, datetime.now(UTC))])

    def _deliver(
        self, messages: Iterable[Message], request_id: str | None = None, *secrets: str
    ) -> None:
        """Send every message; raise DeliveryError if one of them failed, without the secrets."""
        failures = [failed for each in messages if (failed := self._failure(each, *secrets))]
        if failures:
            reason = "; ".join(failure.reason for failure in failures)
            raise DeliveryError(reason, request_id) from failures[0].cause

    def _failure(self, message: Message, *secrets: str) -> Failure | None:
        # Returned, not raised: an error raised inside `except` keeps the other one as its context.
        try:
            self._send(message)
        except Exception as exc:
            # smtplib's and ssl's own errors are OSErrors; a transport of the host has others.
            if self._transport is None and not isinstance(exc, (OSError, ValueError)):
                raise
            return failure_of(exc, (*self._server.secrets(), *secrets))
        return None

    def _send(self, message: Message) -> None:
        to, server = _deliverable(message.to), self._server
        mail = self._mail(message, to)
        if self._transport is not None:
            self._transport(mail)
            return
        connection = Connection(
            server.host,
            server.port,
            helo=self._helo,
            timeout=self._timeout,
            deadline=self._deadline,
            tls=self._tls if server.scheme == "smtps" else None,
        )
        try:
            if server.scheme == "smtp+starttls":
                connection.starttls(context=self._tls)
            if server.login is not None:
                connection.login(*server.login)
            connection.send_message(mail, self._sender, [to])
            _log.info("%s was accepted by %s:%d", mail["Message-ID"], server.host, server.port)
            connection.say_goodbye()
        finally:
            connection.close()

    def _mail(self, message: Message, to: str) -> EmailMessage:
        mail = EmailMessage(policy=SMTP)
        mail["From"], mail["To"] = self._from, _address(to)
        mail["Subject"] = message.subject
        mail["Date"] = datetime.now(UTC)
        mail["Message-ID"] = make_msgid(domain=self._from.domain)
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no automatic replies
        mail["X-Auto-Response-Suppress"] = "OOF, AutoReply"  # the same, for Exchange
        # Quoted-printable: every server accepts it, and its lines are short.
        mail.set_content(message.text(), cte="quoted-printable")
        mail.add_alternative(message.html(), subtype="html", cte="quoted-printable")
        return mail


class ConsoleNotifier:
    """Prints the mails instead of sending them; for demonstrations only, as it shows the number.

    Its methods raise `OSError` if the stream cannot be written to.

    Args:
        stream: Where to print; None for standard output as it is at the time of printing.
        product: What the mails call the platform, in the middle of a sentence.

    Raises:
        InvalidValue: The product's name is empty, too long, or contains control characters.
    """

    def __init__(
        self, stream: TextIO | None = None, *, product: str = "the trading platform"
    ) -> None:
        self._stream = stream
        self._product = check_text("product", product, 100, required=True)

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Print the mail with a confirmation number."""
        self._print(number_message(request, number, actor, self._product))

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Print the notices of a change."""
        for message in notices(change, actor, user, self._product):
            self._print(message)

    def login_refused(self, sighting: Sighting, user: User) -> None:
        """Print the notice about a refused login."""
        self._print(refusal_message(sighting, user, user.email or "-", self._product))

    def _print(self, message: Message) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        # One call, so that threads do not mix their mails.
        stream.write(f"To: {message.to}\nSubject: {message.subject}\n\n{message.text()}\n")
        stream.flush()


@attrs.frozen
class _Server:
    scheme: str
    host: str
    port: int
    login: tuple[str, str] | None = attrs.field(repr=False)

    def secrets(self) -> tuple[str, ...]:
        """Return the password in each form that is sent (RFC 4616): servers might repeat it."""
        if self.login is None:
            return ()
        user, password = self.login
        sent = (password, f"\0{user}\0{password}")
        return (password, *(base64.b64encode(text.encode()).decode() for text in sent))


def _server(url: object) -> _Server:
    """Parse a URL; no error message repeats a part of it."""
    if not isinstance(url, str) or not (url.isascii() and url.isprintable()) or " " in url:
        raise InvalidValue("url", "must be text in printable ASCII, without spaces")
    scheme, host, port, after = "", None, None, ""
    user = password = None
    with contextlib.suppress(ValueError):  # which would quote the URL, and become the context
        parts = urlsplit(url)
        host, port, after = parts.hostname, parts.port, parts.path + parts.query + parts.fragment
        scheme, user, password = parts.scheme, parts.username, parts.password
    if scheme not in _PORTS or not host or port == 0:
        raise InvalidValue("url", "must be smtp://, smtp+starttls:// or smtps://, and host:port")
    if after.removeprefix("/"):
        raise InvalidValue("url", "nothing may follow the port; percent-encode / ? # in a password")
    port = port or _PORTS[scheme]
    if user is None and password is None:
        return _Server(scheme, host, port, None)
    login = unquote(user or "", errors="replace"), unquote(password or "", errors="replace")
    # smtplib encodes both in ASCII, and its error would quote them.
    if not all(text and text.isascii() and text.isprintable() for text in login):
        raise InvalidValue("url", "needs both user and password, in printable ASCII")
    if scheme == "smtp" and host != "localhost" and host not in _LOOPBACK:
        raise InvalidValue("url", "a password needs TLS, except to this host")
    return _Server(scheme, host, port, login)


def _sender(text: str) -> tuple[str, Address]:
    found = _SENDER.fullmatch(check_text("sender", text, 320))
    if found is None or "=?" in text:
        raise InvalidValue("sender", "must be name@host or Name <name@host>, the address in ASCII")
    return found["mailbox"], _address(found["mailbox"], found["name"] or "")


def _deliverable(mailbox: str) -> str:
    """Return a mailbox with its domain in ASCII, as servers without SMTPUTF8 need it.

    The standard library implements IDNA 2003, which maps a few characters of IDNA 2008 to others
    (`ß` to `ss`) and thus to another domain. Domains that do not survive the round trip are
    refused: a confirmation number must not reach another person.

    Raises:
        ValueError: The mailbox cannot be written in a header, or its domain has no ASCII form.
    """
    if not _MAILBOX.fullmatch(mailbox) or "=?" in mailbox:
        raise ValueError("the recipient's address is not a plain address")
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
    return Address(name, *mailbox.rsplit("@", 1))
