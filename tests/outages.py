"""Outages of PostgreSQL, and the answers of login servers during them.

The users of an `Office` may come from `HOME` and `OFFICE`; then `HOME` is deleted, one user after
another, during an outage. Which logins from `HOME` still succeed, and how long after the commit?
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import attrs
import psycopg

import ipguard
from ipguard import Reason
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.logins import ALLOWED, LoginServer, Report
from tests.postgres import Server, fresh_schema, until

HOME, OFFICE = "203.0.113.7", "198.51.100.9"
BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)
STALENESS = 0.5
TIMEOUT = 0.2
AFTERWARDS = 0.5
"""For how long, past the last moment at which anybody may be let in, it is looked whether anybody
is, in seconds."""


class Office:
    """Deletes restrictions, in a process that the outage does not affect."""

    def __init__(self, server: Server, count: int) -> None:
        self.schema = fresh_schema()
        self.users = [f"user{n}" for n in range(count)]
        url = server.url(schema=self.schema, application_name="office")
        self.store = PostgresStore(url, listen="off", timeout=20.0)
        self._flow = ipguard.Workflow(self.store, Outbox(), key=bytes(32))
        self.store.put_users(
            ipguard.User(username=user, full_name="Some One", account_id="A1")
            for user in self.users
        )
        rows = [(user, address) for user in self.users for address in (HOME, OFFICE)]
        self._flow.impose_many(BOSS, rows, reason="to have some")
        self._doomed = {
            username: restriction.id
            for username, policy in self.store.load_all_policies()[1]
            for restriction in policy.restrictions
            if str(restriction.addresses) == HOME
        }
        self.committed: dict[str, float] = {}

    def delete(self, users: Sequence[str]) -> None:
        """Delete the restriction to HOME of each user, recording the time of the commit."""
        for user in users:
            self._flow.delete(BOSS, self._doomed[user])
            self.committed[user] = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()


# --------------------------------------------------------------------------------- what fails


class Outage:
    """The base class of outages, which breaks nothing by itself.

    Attributes:
        cut: Whether no login server can reach the store: then no change arrives, and an expired
            lease lets no login in.
    """

    cut: ClassVar[bool] = False

    def __init__(self, server: Server) -> None:
        self.server = server
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.blows = 0  # how often it struck
        self._watch = psycopg.connect(server.url(application_name="watch"), autocommit=True)

    def enter(self) -> Sequence[str]:
        """Return the command that runs login servers."""
        return ()

    def url(self, schema: str, **options: object) -> str:
        """Return the URL of the store for login servers."""
        return self.server.url(schema=schema, **options)

    def begin(self) -> None:
        """Begin the outage, before the changes are made."""

    def complete(self) -> None:
        """Complete the outage, after the changes are committed."""

    def end(self) -> None:
        """End the outage."""

    def close(self) -> None:
        self._watch.close()

    def _repeat(self, blow: Callable[[], None], every: float) -> None:
        self._over.clear()

        def strike() -> None:
            while not self._over.is_set():
                blow()
                self._over.wait(every)

        self._thread = threading.Thread(target=strike)
        self._thread.start()

    def _stop_repeating(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _listeners(self) -> list[tuple[int, str]]:
        """Return each listening backend and its state."""
        return self._watch.execute(
            "SELECT pid, state FROM pg_stat_activity WHERE application_name = 'ipguard listener'"
        ).fetchall()


class ListenerTerminated(Outage):
    """The listening backends are terminated ten times a second."""

    def begin(self) -> None:
        self._repeat(self._blow, 0.1)

    def _blow(self) -> None:
        for pid, _ in self._listeners():
            self._watch.execute("SELECT pg_terminate_backend(%s)", (pid,))
            self.blows += 1

    def end(self) -> None:
        self._stop_repeating()


class ListenerStopped(Outage):
    """The listening backends are stopped, and so are their successors."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._stopped: set[int] = set()

    def begin(self) -> None:
        self._blow()
        self._repeat(self._blow, 0.02)

    def _blow(self) -> None:
        for pid, state in self._listeners():
            if state == "idle" and pid not in self._stopped:
                _send([pid], signal.SIGSTOP)
                self._stopped.add(pid)
                self.blows += 1

    def end(self) -> None:
        self._stop_repeating()
        _send(self._stopped, signal.SIGCONT)
        self._stopped.clear()


class NotifyLost(Outage):
    """Login servers listen in another database, which gets no notification."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._elsewhere = fresh_schema()
        server.execute(f"CREATE DATABASE {self._elsewhere}")

    def url(self, schema: str, **options: object) -> str:
        elsewhere = self.server.url(self._elsewhere, schema=schema)
        PostgresStore(elsewhere).close()
        self.blows += 1
        return self.server.url(schema=schema, listen=self.server.url(self._elsewhere), **options)


class ServerStopped(Outage):
    """The whole server is stopped, just after a commit that no login server has received.

    So the backends of login servers are stopped first, then the process that would start more of
    them, and the one that commits last.
    """

    cut = True

    def begin(self) -> None:
        ask = (
            "SELECT pid, state FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND application_name NOT IN ('office', 'watch')"
        )
        os.kill(self.server.pid, signal.SIGSTOP)
        while True:
            pids = [pid for pid, _ in self._watch.execute(ask)]
            _send(pids, signal.SIGSTOP)
            if all(state == "idle" for _, state in self._watch.execute(ask)):
                break
            # One is in the middle of something, and may hold what the commit needs.
            _send(pids, signal.SIGCONT)
        self.blows += 1

    def complete(self) -> None:
        self.server.send(signal.SIGSTOP)

    def end(self) -> None:
        self.server.send(signal.SIGCONT)


class PacketsDropped(Outage):
    """Packets between login servers and the server are dropped; commits use a Unix socket.

    The server is one of `Network.server`.
    """

    cut = True

    def __init__(self, server: Server, network: Network) -> None:
        super().__init__(server)
        self._network = network

    def enter(self) -> Sequence[str]:
        return self._network.enter

    def url(self, schema: str, **options: object) -> str:
        return self.server.url(schema=schema, tcp=True, **options)

    def begin(self) -> None:
        self._network.run("iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP")
        self.blows += 1

    def end(self) -> None:
        self._network.run("iptables", "-F", "INPUT")


KINDS = (ListenerTerminated, ListenerStopped, NotifyLost, ServerStopped)
"""What a server alone can be made to suffer; packets are dropped in a network."""


def _send(pids: Iterator[int] | Sequence[int] | set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# ---------------------------------------------------------------------------------- a network


class NoNetwork(Exception):
    """This machine allows no network namespace; the text says why."""


class Network:
    """A network namespace with its own loopback, which ends with its process.

    Raises:
        NoNetwork: It cannot be created.
    """

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise NoNetwork("a network namespace can be made by root alone")
        try:
            # It lives as long as the process that holds it, and that until we close its input.
            self._holder = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo; exec cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as exc:
            raise NoNetwork(str(exc)) from exc
        assert self._holder.stdout is not None
        try:
            if not self._holder.stdout.readline():
                raise NoNetwork(self._ended())
            self.namespace = f"--net=/proc/{self._holder.pid}/ns/net"
            self.enter = ("nsenter", self.namespace, "--")
            self.run("ip", "link", "set", "lo", "up")
            self.run("iptables", "-L", "INPUT")
        except BaseException:
            self.close()
            raise

    def _ended(self) -> str:
        _, words = self._holder.communicate()
        return words.decode().strip()

    def run(self, *command: str) -> None:
        """Run a command inside."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoNetwork(f"{command[0]}: {done.stderr.strip()}")

    def close(self) -> None:
        self._holder.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------ running


@attrs.frozen(kw_only=True)
class Outcome:
    """The outcome of the deletions, in seconds after the commit of each.

    Attributes:
        let_in: The last login from a deleted address, on a login server with `max_staleness`
            STALENESS; below 0: before the commit.
        let_in_usual: The same on one with the default settings.
        held: When the change held on that one.
        slowest: The slowest answer of either, during the outage or before.
        blows: How often the outage struck.
    """

    let_in: list[float]
    let_in_usual: list[float]
    held: list[float]
    slowest: float
    slowest_usual: float
    blows: int


def run(outage: Outage, batches: int, size: int, **guard: Any) -> Outcome:
    """Delete a restriction of `batches * size` users during an outage.

    Args:
        outage: The outage.
        batches: How often it strikes.
        size: The number of users each time.
        guard: Settings of the login server with `max_staleness` STALENESS.
    """
    with (
        contextlib.closing(outage),
        Office(outage.server, batches * size) as office,
        LoginServer(
            outage.url(office.schema, timeout=TIMEOUT), office.users, HOME,
            threads=2, enter=outage.enter(), max_staleness=STALENESS, **guard,
        ) as quick,
        LoginServer(
            outage.url(office.schema), office.users, HOME, enter=outage.enter()
        ) as usual,
    ):  # fmt: skip
        for at in range(batches):
            _one_batch(outage, office, quick, usual, office.users[at * size : (at + 1) * size])
        seen, seen_usual = quick.report(), usual.report()
    return Outcome(
        let_in=_after(office, seen, "allowed_at"),
        let_in_usual=_after(office, seen_usual, "allowed_at"),
        held=_after(office, seen_usual, "since"),
        slowest=seen.slowest,
        slowest_usual=seen_usual.slowest,
        blows=outage.blows,
    )


def _after(office: Office, report: Report, what: str) -> list[float]:
    return [
        getattr(report.seen[user], what) - committed for user, committed in office.committed.items()
    ]


def _one_batch(
    outage: Outage, office: Office, quick: LoginServer, usual: LoginServer, users: Sequence[str]
) -> None:
    def all_are(reason: str, *servers: LoginServer) -> Callable[[], bool]:
        return lambda: all(server.report().all(reason, users) for server in servers)

    until(all_are(ALLOWED, quick, usual), "all are let in at first")
    try:
        outage.begin()
        office.delete(users)
        outage.complete()
        over = time.monotonic() + STALENESS + AFTERWARDS
        until(lambda: time.monotonic() > over, "time passes")
        if outage.cut:
            until(all_are(Reason.STORE_UNAVAILABLE, quick), "the store is out of reach")
        else:
            until(all_are(Reason.NOT_LISTED, quick, usual), "the changes hold")
    finally:
        outage.end()
    until(all_are(Reason.NOT_LISTED, quick, usual), "the changes hold once it works again")


@contextlib.contextmanager
def server_in(network: Network) -> Iterator[Server]:
    """Start a server inside a network; its socket file is reached from everywhere."""
    server = Server()
    try:
        server.make()
        server.start(inside=network.namespace)
        yield server
    finally:
        server.remove()


# ------------------------------------------------------------------------------------ a crash


@attrs.frozen(kw_only=True)
class Crash:
    """The answers of login servers around `kill -9` of the server, in seconds.

    Attributes:
        let_in: The last login after the end of the server's last process.
        denials: How long each denial took while the server was down.
        slowest: The slowest answer.
        back: When all logins succeeded again, after the server was up.
    """

    let_in: float
    denials: list[float]
    slowest: float
    back: float


def crash(server: Server, *, threads: int, away: float) -> Crash:
    """Kill the server while logins come as fast as they can, and start it again.

    Args:
        server: The server.
        threads: How many threads of one process log in at once.
        away: For how many seconds it stays down after all logins are denied.
    """
    with (
        Office(server, 20) as office,
        LoginServer(
            server.url(schema=office.schema), office.users, HOME,
            threads=threads, pace=0.0, max_staleness=STALENESS,
        ) as logins,
    ):  # fmt: skip

        def all_are(reason: str) -> Callable[[], bool]:
            return lambda: logins.report().all(reason, office.users)

        until(all_are(ALLOWED), "all are let in at first")
        server.stop(signal.SIGKILL)
        killed = time.monotonic()
        until(all_are(Reason.STORE_UNAVAILABLE), "nobody is let in any more")
        over = time.monotonic() + away
        until(lambda: time.monotonic() > over, "time passes")
        let_in = max(each.allowed_at for each in logins.report().seen.values()) - killed
        denials = logins.denials()
        server.start()
        answers = time.monotonic()
        until(all_are(ALLOWED), "all are let in again")
        seen = logins.report()
    return Crash(
        let_in=let_in,
        denials=denials,
        slowest=seen.slowest,
        back=max(each.since for each in seen.seen.values()) - answers,
    )
