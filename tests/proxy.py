"""A TCP proxy in front of a server: it counts round trips, cuts connections, or goes silent."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Literal, Self


class Proxy:
    """Forwards bytes between clients and a server, with two threads for each connection.

    Attributes:
        round_trips: How often a client had to wait: how often bytes of a client followed bytes of
            the server.
        cut_at: The round trip to interrupt, counted from when this is set; and
        cut_when: `before` the server gets it; `after` it has answered, but before the client gets
            the answer; or a number: when the server has got so many of its statements. Later
            connections work again.
        strike: Called at that moment, before the connection is cut.
        struck: How often it was called.
        asked: The bytes sent in the last round trip.
        silent: Whether to forward nothing, while connections stay open.
    """

    def __init__(self, port: int) -> None:
        self.round_trips = 0
        self.connections = 0
        self.cut_at = 0
        self.cut_when: Literal["before", "after"] | int = "before"
        self.strike: Callable[[], object] = lambda: None
        self.struck = 0
        self.asked = b""
        self.silent = False
        self._server = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(("127.0.0.1", self._server))
                except OSError:
                    client.close()
                    continue
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open += [client, server]
                Link(self, client, server).start()

    def cut(self) -> None:
        """Cut every connection."""
        while self._open:
            each = self._open.pop()
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()


class Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.answered = True
        self.doomed = False
        self.left: int | None = None  # how many more statements the server is sent

    def start(self) -> None:
        threading.Thread(target=self._ask, daemon=True).start()
        threading.Thread(target=self._answer, daemon=True).start()

    def _ask(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.client.recv(65536):
                proxy = self.proxy
                if self.answered:
                    proxy.round_trips += 1
                    proxy.cut_at -= 1
                    proxy.asked = b""
                    if proxy.cut_at == 0:
                        if proxy.cut_when == "before":
                            self._strike()
                            break
                        self.doomed = proxy.cut_when == "after"
                        self.left = None if self.doomed else int(proxy.cut_when)
                self.answered = False
                proxy.asked += data
                if self.left is not None:
                    some = statements(data)[: self.left]
                    self.left -= len(some)
                    self.server.sendall(b"".join(some) if not self.left else data)
                    if not self.left:
                        self._strike()
                        break
                    continue
                if not proxy.silent:
                    self.server.sendall(data)
        self._end()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.server.recv(65536):
                self.answered = True
                if self.doomed:
                    self._strike()
                    break
                if not self.proxy.silent:
                    self.client.sendall(data)
        self._end()

    def _strike(self) -> None:
        self.proxy.strike()
        self.proxy.struck += 1

    def _end(self) -> None:
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def statements(data: bytes) -> list[bytes]:
    """Split a client's messages after each `Execute`, and drop the rest."""
    found, begin, at = [], 0, 0
    while at < len(data):
        kind = data[at : at + 1]
        at += 1 + int.from_bytes(data[at + 1 : at + 5], "big")
        if kind == b"E":
            found.append(data[begin:at])
            begin = at
    return found
