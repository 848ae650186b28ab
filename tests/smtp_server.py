"""Real mail servers on a loopback port, for tests and demonstrations.

`MailServer` runs aiosmtpd and keeps the mails. `BadServer` sends raw bytes that break the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.policy
import logging
import ssl
import threading
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Literal, Self, TypeVar, cast
from urllib.parse import quote

import trustme
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

# It logs the mails it receives.
logging.getLogger("mail.log").setLevel(logging.WARNING)

T = TypeVar("T")
Security = Literal["plain", "starttls", "tls"]
_SCHEMES = {"plain": "smtp", "starttls": "smtp+starttls", "tls": "smtps"}


@dataclass(frozen=True, kw_only=True)
class Mail:
    """A received mail: the envelope, and the message as a mail client parses it."""

    sender: str
    recipients: tuple[str, ...]
    raw: bytes
    helo: str
    encrypted: bool
    user: str | None

    @property
    def message(self) -> EmailMessage:
        return email.message_from_bytes(self.raw, policy=email.policy.default)

    def part(self, subtype: Literal["plain", "html"]) -> str:
        """Return the text of one of the two alternatives, with Python line ends."""
        body = self.message.get_body((subtype,))
        assert body is not None
        return cast(str, body.get_content()).replace("\r\n", "\n")


class _Loop:
    """A server on an event loop of its own, in a thread."""

    host = "127.0.0.1"
    port = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        # Holds references to the waiting tasks, which the loop does not: without it the garbage
        # collector ends them.
        self._never = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _listen(self) -> asyncio.Server:
        raise NotImplementedError

    async def _close(self) -> None:
        self._server.close()
        for _ in range(20):  # a new connection becomes a task after some iterations
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)


class MailServer(_Loop):
    """A mail server that keeps what it accepts.

    Args:
        security: None; STARTTLS, which it then requires; or TLS from the first byte.
        login: The required user and password, or None.
        refuse: Unknown recipients.
        trouble: Faults by command: `hang`, `drop`, or a reply (for `AUTH` only a reply).
        utf8: Whether it offers SMTPUTF8.
    """

    def __init__(
        self,
        security: Security = "plain",
        *,
        login: tuple[str, str] | None = None,
        refuse: Collection[str] = (),
        trouble: Mapping[str, str] | None = None,
        utf8: bool = True,
    ) -> None:
        self.security = security
        self.login = login
        self.refuse = refuse
        self.trouble = dict(trouble or {})
        self.utf8 = utf8
        self.connections = 0
        self._mails: list[Mail] = []
        self._arrived = threading.Condition()
        self._tls: ssl.SSLContext | None = None
        self.client_tls: ssl.SSLContext | None = None
        if security != "plain":
            authority = trustme.CA()
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            authority.issue_cert("127.0.0.1", "localhost").configure_cert(self._tls)
            self.client_tls = ssl.create_default_context()
            authority.configure_trust(self.client_tls)

    @property
    def url(self) -> str:
        """The URL for `EmailNotifier`, with the login."""
        login = "" if self.login is None else "{}:{}@".format(*(quote(x, "") for x in self.login))
        return f"{_SCHEMES[self.security]}://{login}{self.host}:{self.port}"

    @property
    def mails(self) -> tuple[Mail, ...]:
        """The mails so far, the oldest first."""
        with self._arrived:
            return tuple(self._mails)

    def wait_for(self, count: int, timeout: float = 20.0) -> tuple[Mail, ...]:
        """Return the mails as soon as there are `count` of them, or raise TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self._mails) >= count, timeout):
                raise TimeoutError(f"{len(self._mails)} mails arrived instead of {count}")
            return tuple(self._mails)

    async def _listen(self) -> asyncio.Server:
        implicit = self._tls if self.security == "tls" else None
        return await self._loop.create_server(self._protocol, self.host, 0, ssl=implicit)

    def _protocol(self) -> SMTP:
        self.connections += 1
        return SMTP(
            self,
            hostname="mail.test",
            enable_SMTPUTF8=self.utf8,
            tls_context=self._tls if self.security == "starttls" else None,
            require_starttls=self.security == "starttls",
            authenticator=self._authenticate,
            auth_require_tls=False,
            auth_exclude_mechanism=() if self.login else ("LOGIN", "PLAIN"),
            loop=self._loop,
        )

    def _authenticate(
        self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: object
    ) -> AuthResult:
        given = isinstance(data, LoginPassword) and (data.login.decode(), data.password.decode())
        if "AUTH" in self.trouble:
            return AuthResult(success=False, handled=False, message=self.trouble["AUTH"])
        return AuthResult(success=given == self.login, handled=False, auth_data=data)

    async def _troubled(self, command: str, server: SMTP) -> str | None:
        trouble = self.trouble.get(command)
        if trouble == "hang":
            await self._never.wait()
        if trouble == "drop":
            cast(asyncio.Transport, server.transport).abort()
        return trouble

    async def handle_MAIL(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.login is not None and not session.authenticated:
            return "530 5.7.0 authentication required"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return await self._troubled("MAIL", server) or "250 2.1.0 OK"

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if address in self.refuse:
            return f"550 5.1.1 <{address}>: no such mailbox"
        envelope.rcpt_tos.append(address)
        return await self._troubled("RCPT", server) or "250 2.1.5 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        trouble = await self._troubled("DATA", server)
        if trouble is not None:
            return trouble
        assert server.transport is not None
        login = session.auth_data
        user = login.login.decode() if isinstance(login, LoginPassword) else None
        mail = Mail(
            sender=str(envelope.mail_from),
            recipients=tuple(envelope.rcpt_tos),
            raw=cast(bytes, envelope.content),
            helo=str(session.host_name),
            encrypted=server.transport.get_extra_info("ssl_object") is not None,
            user=user,
        )
        with self._arrived:
            self._mails.append(mail)
            self._arrived.notify_all()
        return "250 2.0.0 accepted"

    async def handle_QUIT(self, server: SMTP, _session: Session, _envelope: Envelope) -> str:  # noqa: N802
        return await self._troubled("QUIT", server) or "221 2.0.0 bye"


class BadServer(_Loop):
    """A server that never accepts a mail.

    Args:
        manner: `silent` sends nothing; `drop` closes the connection; `drip` sends an endless line
            byte by byte; `flood` sends endless greeting lines; `stall` agrees to TLS and stops.
    """

    def __init__(self, manner: Literal["silent", "drop", "drip", "flood", "stall"]) -> None:
        self.manner = manner

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._meet, self.host, 0)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.manner == "stall":
                writer.write(b"220 mail.test\r\n")
                await reader.readline()
                writer.write(b"250-mail.test\r\n250 STARTTLS\r\n")
                await reader.readline()
                writer.write(b"220 go ahead\r\n")
            if self.manner in ("silent", "stall"):
                await self._never.wait()
            while self.manner == "drip":
                writer.write(b"2")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._never.wait(), 0.02)
            while self.manner == "flood":
                writer.write(b"220-and there is more to come\r\n" * 100)
                await writer.drain()
        except ConnectionError:
            pass  # the client gave up
        finally:
            writer.transport.abort()
