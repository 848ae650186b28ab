"""An SMTP connection that ends in bounded time, whatever the server does."""

from __future__ import annotations

import contextlib
import io
import smtplib
import socket
import ssl
from collections.abc import Iterable
from time import monotonic
from typing import Any, Final, NamedTuple

_MOST_REPLY_BYTES: Final = 64 * 1024
_PARTING: Final = 1.0
_SHOWN: Final = 200


class Session(smtplib.SMTP):
    """One connection, open and greeted once constructed.

    A socket's timeout bounds one read. A server that sends a byte every few seconds satisfies it
    for hours, so what is left until the deadline is set anew before each read and write. Only the
    look-up of the host's name is outside of it: the system's resolver takes no timeout.

    Args:
        host: The server's name or address.
        port: Its port.
        helo: How the client names itself; None for the address that it connects from.
        timeout: How long one operation on the socket may take, in seconds.
        deadline: How long all of them together may take, in seconds.
        tls: Speak TLS from the first byte; None to begin in the clear.

    Raises:
        OSError: The server cannot be reached, or does not greet (`smtplib` and `ssl` errors are
            among these).
        UnicodeError: The host's name cannot be looked up.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        helo: str | None,
        timeout: float,
        deadline: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._each = timeout
        self._until = monotonic() + deadline
        self._tls = tls
        self._reply_bytes = 0
        # Given no name, smtplib asks the resolver for one.
        super().__init__(host, port, local_hostname=helo or "localhost")
        if helo is None:
            self.local_hostname = _literal(self._connected())

    def connect(
        self,
        host: str = "localhost",
        port: int = 0,
        source_address: object = None,  # noqa: ARG002
    ) -> tuple[int, bytes]:
        """Connect to the first address of the host that answers, and read the greeting."""
        failure = OSError("the host has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self._left())
                sock.connect(address)
                if self._tls is not None:
                    sock.settimeout(self._left())
                    sock = self._tls.wrap_socket(sock, server_hostname=host)
            except OSError as exc:
                sock.close()
                failure = exc
            else:
                self.sock = sock
                return self.getreply()
        raise failure

    def getreply(self) -> tuple[int, bytes]:
        """Read one reply; a TLS handshake that follows is bounded too."""
        if self.file is None:
            self.file = io.BufferedReader(_Replies(self))
        reply = super().getreply()
        with contextlib.suppress(TimeoutError):  # what was answered in time stays answered
            self._connected().settimeout(self._left())
        return reply

    def send(self, s: Any) -> None:
        """Send all of it. Python bounds a whole `sendall`, not only each part of it."""
        self._connected().settimeout(self._left())
        super().send(s)

    def part(self) -> None:
        """Say goodbye to a server that has accepted the mail: nothing it does matters any more."""
        self._until = min(self._until, monotonic() + _PARTING)
        with contextlib.suppress(OSError):
            self.quit()

    def receive_into(self, buffer: Any) -> int:
        """Read what there is, at most until the deadline."""
        sock = self._connected()
        sock.settimeout(self._left())
        count = sock.recv_into(buffer)
        self._reply_bytes += count
        if self._reply_bytes > _MOST_REPLY_BYTES:
            raise OSError("the server's replies do not end")
        return count

    def _left(self) -> float:
        left = self._until - monotonic()
        if left <= 0:
            raise TimeoutError("the mail's deadline has passed")
        return min(left, self._each)

    def _connected(self) -> socket.socket:
        if self.sock is None:
            raise smtplib.SMTPServerDisconnected("the connection is closed")
        return self.sock


class _Replies(io.RawIOBase):
    """What `smtplib` reads replies from; `socket.makefile` would know nothing of the deadline."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._session.receive_into(buffer)


def _literal(sock: socket.socket) -> str:
    """Name the client by its address (RFC 5321 4.1.3), which needs no look-up."""
    address = sock.getsockname()[0]
    return f"[IPv6:{address}]" if sock.family == socket.AF_INET6 else f"[{address}]"


class Failure(NamedTuple):
    """Why a mail was not sent.

    Attributes:
        reason: In a few words.
        cause: The error, or None where it holds a secret.
    """

    reason: str
    cause: Exception | None


def failure_of(error: Exception, secrets: Iterable[str]) -> Failure:
    """Say why a mail was not sent, without a secret that the server may have repeated.

    Args:
        error: What was raised.
        secrets: What nobody may see: the number, the password, each as it travels.
    """
    chain: list[BaseException] = [error]
    for link in chain:  # it grows
        chain += [each for each in (link.__cause__, link.__context__) if each and each not in chain]
    told = " ".join(repr(link.args) for link in chain) + _reason(error, chain)
    if any(secret in told for secret in secrets):
        return Failure("the server refused, in words that are not shown here", None)
    return Failure(_reason(error, chain), error)


def _reason(error: Exception, chain: Iterable[BaseException]) -> str:
    if any(isinstance(link, TimeoutError) for link in chain):
        return "the server did not answer in time"
    match error:
        case smtplib.SMTPRecipientsRefused():
            reason = f"the recipient was refused: {_reply(*next(iter(error.recipients.values())))}"
        case smtplib.SMTPNotSupportedError() if "SMTPUTF8" in str(error):
            reason = "the server does not offer SMTPUTF8, which the recipient's address needs"
        case smtplib.SMTPAuthenticationError():
            reason = f"the login was refused: {_reply(error.smtp_code, error.smtp_error)}"
        case smtplib.SMTPResponseException():
            reason = f"the mail was refused: {_reply(error.smtp_code, error.smtp_error)}"
        case ssl.SSLCertVerificationError():
            reason = f"the server's certificate was not accepted: {error.verify_message}"
        case ssl.SSLError():
            reason = f"no encrypted connection: {error.reason}"
        case OSError() if not isinstance(error, smtplib.SMTPException):
            reason = f"the server cannot be reached: {error.strerror or error}"
        case _:
            reason = str(error)
    return reason


def _reply(code: int, said: bytes | str) -> str:
    text = said if isinstance(said, str) else said.decode("ascii", "backslashreplace")
    return f"{code} {' '.join(text.split())[:_SHOWN]}"
