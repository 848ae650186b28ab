"""Mail servers, a report and two listeners to the log."""

from __future__ import annotations

import asyncio
import email
import email.policy
import itertools
import logging
import os
import queue
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any, Self, cast

from aiosmtpd.smtp import SMTP, Envelope, Session

_PATIENCE = 10.0


class MailServer:
    """A real SMTP server on this machine that keeps the mails it accepts."""

    def __init__(self) -> None:
        self._mails: queue.Queue[EmailMessage] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.url = f"smtp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def receive(self) -> EmailMessage:
        """Wait for the next mail and return it."""
        try:
            return self._mails.get(timeout=_PATIENCE)
        except queue.Empty:
            raise TimeoutError("no mail arrived") from None

    def waiting(self) -> int:
        """Return how many mails are unread."""
        return self._mails.qsize()

    async def handle_DATA(self, _: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = cast(bytes, envelope.content)
        self._keep(email.message_from_bytes(content, policy=email.policy.default))
        return "250 accepted"

    def _keep(self, mail: EmailMessage) -> None:
        self._mails.put(mail)

    async def _listen(self) -> asyncio.Server:
        return await self._loop.create_server(self._protocol, "127.0.0.1", 0)

    def _protocol(self) -> SMTP:
        return SMTP(self, hostname="localhost", loop=self._loop)

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Received:
    """A mail in the mailbox, numbered from 1, with its time."""

    id: int
    at: datetime
    mail: EmailMessage

    def part(self, subtype: str) -> str:
        """Return the text of one of the alternatives, `plain` or `html`."""
        body = self.mail.get_body((subtype,))
        return "" if body is None else str(body.get_content()).replace("\r\n", "\n")


class Mailbox(MailServer):
    """A mail server that keeps its last mails."""

    def __init__(self, size: int = 200) -> None:
        super().__init__()
        self._kept: deque[Received] = deque(maxlen=size)
        self._ids = itertools.count(1)

    def mails(self) -> list[Received]:
        """Return the mails, newest first."""
        return list(self._kept)[::-1]

    def _keep(self, mail: EmailMessage) -> None:
        self._kept.append(Received(next(self._ids), datetime.now(UTC), mail))


class Report:
    """Print the steps, and count the expectations that were not met."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._steps = 0
        self._expected = 0
        self._failed: list[str] = []

    def step(self, title: str) -> None:
        self._steps += 1
        print("\n" + self._in("1", f"{self._steps}. {title}"))

    def line(self, text: str) -> None:
        print(textwrap.fill(text, 96, initial_indent="   ", subsequent_indent="   "))

    def quote(self, text: str) -> None:
        print(f"   | {text}".rstrip())

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print rows in columns that fit their content."""
        lines = [heads, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        for number, line in enumerate(lines):
            cells = zip(line, widths, strict=True)
            text = "  ".join(f"{cell:<{width}}" for cell, width in cells).rstrip()
            text = self._in("4", text) if number == 0 else self._coloured(text)
            print(f"   {text}")

    def expect(self, what: str, got: Any, wanted: Any) -> None:
        """Print whether an expectation was met."""
        if self.count(what, got, wanted):
            print(f"   {self._in('32', 'as expected:')} {what}")

    def count(self, what: str, got: Any, wanted: Any) -> bool:
        """Count an expectation; print it only if it was not met."""
        self._expected += 1
        if got == wanted:
            return True
        self._failed.append(what)
        print(f"   {self._in('31', 'NOT AS EXPECTED:')} {what}")
        print(f"      expected {wanted!r}\n      but got  {got!r}")
        return False

    def end(self) -> bool:
        """Print the sum; return whether all expectations were met."""
        if self._failed:
            print(
                "\n" + self._in("31", f"{len(self._failed)} of {self._expected} not as expected:")
            )
            for what in self._failed:
                self.line(what)
        else:
            print("\n" + self._in("32", f"All {self._expected} expectations were met."))
        return not self._failed

    def _coloured(self, text: str) -> str:
        if "  not allowed  " in text:
            return text.replace("  not allowed  ", f"  {self._in('31', 'not allowed')}  ")
        return text.replace("  allowed  ", f"  {self._in('32', 'allowed')}  ")

    def _in(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text


class _Listener(logging.Handler):
    """A handler of one logger during a `with` block."""

    def __init__(self, name: str, level: int) -> None:
        super().__init__(level)
        self._logger = logging.getLogger(name)

    def __enter__(self) -> Self:
        self._before = self._logger.level
        self._logger.setLevel(min(self.level, self._logger.getEffectiveLevel()))
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before)


class Troubles(_Listener):
    """Keep every warning and error that the library logs."""

    def __init__(self) -> None:
        super().__init__("ipguard", logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class Commits(_Listener):
    """Record when the last change was committed; its audit line is logged right after."""

    def __init__(self) -> None:
        super().__init__("ipguard.audit", logging.INFO)
        self.last = float("inf")

    def emit(self, _: logging.LogRecord) -> None:
        self.last = time.monotonic()
