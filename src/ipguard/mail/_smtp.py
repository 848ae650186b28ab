"""An SMTP connection with a deadline that holds whatever the server does."""

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
_QUIT_SECONDS: Final = 1.0
_SHOWN: Final = 200


class Connection(smtplib.SMTP):
    """One SMTP connection, connected and greeted once constructed.

    A socket's timeout bounds a single read, which a server that sends a byte every few seconds
    satisfies for hours. Therefore the time left until the deadline is set before each read and
    write. Only the look-up of the host's name is exempt: the system's resolver has no timeout.
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
        # Without a name, smtplib asks the resolver for one.
        super().__init__(host, port, local_hostname=helo or "localhost")
        if helo is None:
            self.local_hostname = _literal(self._connected())

    def connect(
        self, host: str = "localhost", port: int = 0, _source: object = None
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
        """Read one reply, and bound the TLS handshake that may follow."""
        if self.file is None:
            self.file = io.BufferedReader(_Replies(self))
        reply = super().getreply()
        with contextlib.suppress(TimeoutError):  # the reply came in time
            self._connected().settimeout(self._left())
        return reply

    def send(self, s: Any) -> None:
        """Send all of it. A socket's timeout bounds the whole of `sendall`."""
        self._connected().settimeout(self._left())
        super().send(s)

    def say_goodbye(self) -> None:
        """Quit after the server has accepted the mail; failures no longer matter."""
        self._until = min(self._until, monotonic() + _QUIT_SECONDS)
        with contextlib.suppress(OSError):
            self.quit()

    def receive_into(self, buffer: Any) -> int:
        """Read what has arrived; wait for it until the deadline at most."""
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
    """The stream that `smtplib` reads replies from; `socket.makefile` would ignore the deadline."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._connection.receive_into(buffer)


def _literal(sock: socket.socket) -> str:
    """Return the client's address as its name (RFC 5321 4.1.3), which needs no look-up."""
    address = sock.getsockname()[0]
    return f"[IPv6:{address}]" if sock.family == socket.AF_INET6 else f"[{address}]"


class Failure(NamedTuple):
    """Why a mail was not sent; the cause is None if it contains a secret."""

    reason: str
    cause: Exception | None


def failure_of(error: Exception, secrets: Iterable[str]) -> Failure:
    """Describe why a mail was not sent, without secrets that the server may have repeated."""
    chain: list[BaseException] = [error]
    for link in chain:  # it grows
        chain += [each for each in (link.__cause__, link.__context__) if each and each not in chain]
    reason = _reason(error, chain)
    text = " ".join(repr(link.args) for link in chain) + reason
    if any(secret in text for secret in secrets):
        return Failure("the server refused; its reply contains a secret and is not shown", None)
    return Failure(reason, error)


def _reason(error: Exception, chain: Iterable[BaseException]) -> str:
    if any(isinstance(link, TimeoutError) for link in chain):
        return "the server did not answer in time"
    match error:
        case smtplib.SMTPRecipientsRefused():
            reason = f"the recipient was refused: {_reply(*next(iter(error.recipients.values())))}"
        case smtplib.SMTPNotSupportedError() if "SMTPUTF8" in str(error):
            reason = "the server does not offer SMTPUTF8, which the recipient's address needs"
        case smtplib.SMTPResponseException():
            what = "login" if isinstance(error, smtplib.SMTPAuthenticationError) else "mail"
            reason = f"the {what} was refused: {_reply(error.smtp_code, error.smtp_error)}"
        case ssl.SSLCertVerificationError():
            reason = f"the server's certificate was not accepted: {error.verify_message}"
        case ssl.SSLError():
            reason = f"no encrypted connection: {error.reason}"
        case OSError() if not isinstance(error, smtplib.SMTPException):
            reason = f"the server cannot be reached: {error.strerror or error}"
        case _:
            reason = str(error)
    return reason


def _reply(code: int, text: bytes | str) -> str:
    text = text if isinstance(text, str) else text.decode("ascii", "backslashreplace")
    return f"{code} {' '.join(text.split())[:_SHOWN]}"
