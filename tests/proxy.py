"""A TCP proxy before a server: it counts round trips, loses answers, or goes silent."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class Proxy:
    """Passes bytes on between clients and a server, each connection on two threads.

    Attributes:
        round_trips: How often a client had to wait: how often bytes of a client followed bytes of
            the server.
        lose: Bytes after which, once the server was sent them, nothing of its answer is passed on:
            the connection is cut as soon as the answer is there. None: nothing is lost.
        lost: How many connections were cut so.
        cut_at: The round trip that is not to come to its end, counted from when this is set; and
        cut_sent: whether the server is still sent it. Each connection after it works again.
        silent: Whether nothing is passed on at all, while connections stay open.
    """

    def __init__(self, port: int) -> None:
        self.round_trips = 0
        self.connections = 0
        self.lose: bytes | None = None
        self.lost = 0
        self.cut_at = 0
        self.cut_sent = False
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
                server = socket.create_connection(("127.0.0.1", self._server))
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

    def start(self) -> None:
        threading.Thread(target=self._ask, daemon=True).start()
        threading.Thread(target=self._answer, daemon=True).start()

    def _ask(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.client.recv(65536):
                if self.answered:
                    self.proxy.round_trips += 1
                    self.proxy.cut_at -= 1
                    if self.proxy.cut_at == 0:
                        if not self.proxy.cut_sent:
                            break
                        self.doomed = True
                self.answered = False
                if self.proxy.lose is not None and self.proxy.lose in data:
                    self.doomed = True
                if not self.proxy.silent:
                    self.server.sendall(data)
        self._end()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.server.recv(65536):
                self.answered = True
                if self.doomed:
                    self.proxy.lost += 1
                    break
                if not self.proxy.silent:
                    self.client.sendall(data)
        self._end()

    def _end(self) -> None:
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
