"""A store that changes all the time, login servers that record their answers, and what fails.

A `World` runs them on real servers of PostgreSQL, in processes of their own. Its `Office` makes
the changes and records each state of the store; `tests/histories.py` judges the answers.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final, Self
from urllib.parse import urlencode

import attrs
import psycopg

import ipguard
from ipguard import IPGuardError, StoreUnavailable
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.histories import (
    BAD_ADDRESS,
    FOREVER,
    REASONS,
    STORE_UNAVAILABLE,
    Answer,
    Judge,
    Ledger,
    Listed,
    Policy,
    merged,
)
from tests.logins import Login, LoginServer, Word
from tests.postgres import Server, fresh_schema, until
from tests.proxy import Proxy

BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)
USERS: Final = [f"user{n}" for n in range(48)]
ADDRESSES: Final = (
    "203.0.113.7", "203.0.113.20", "198.51.100.9", "2001:db8::7", "::ffff:203.0.113.7",
    "192.0.2.66", "not an address",
)  # fmt: skip
RANGES: Final = (
    "203.0.113.7", "203.0.113.0/28", "203.0.113.5-203.0.113.21", "198.51.100.9", "2001:db8::/64",
    "192.0.2.64/30",
)  # fmt: skip
TIMEOUT: Final = 0.3  # of the stores of login servers, in seconds
SKEW: Final = 50_000_000
"""By how much the server's clock may drift from CLOCK_MONOTONIC during a run, in nanoseconds."""

clock = time.monotonic_ns


# ---------------------------------------------------------------------------------- the changes


class Office(threading.Thread):
    """Changes policies all the time, one change after another, and records each state.

    It has no outage of its own: where it cannot reach the store, nobody can. The states are read by
    plain SQL after each change. There is no other writer, so each is that of one revision.

    Args:
        url: The store.
        dsn: The same for the driver; it must lead to the server that accepts changes.
        word: What was committed last, for the login servers.
        seed: Of the choice of changes.

    Attributes:
        ledger: The states.
        tokens: The token of each revision, up to the last.
        between: Held during each change.
        died: A moment after the end of the primary server, if there was a failover; and
        lives: One before the other server was promoted.
    """

    def __init__(self, url: str, dsn: str, word: Word, seed: int) -> None:
        super().__init__(daemon=True)
        self._dsn, self._word, self._random = dsn, word, random.Random(seed)
        self._over = threading.Event()
        self.between = threading.Lock()
        self._connection: psycopg.Connection | None = None
        self.failed: BaseException | None = None
        self.died = self.lives = 0
        self._store = PostgresStore(url, listen="off", timeout=30.0, replica="refuse")
        self._outbox = Outbox()
        settings = ipguard.WorkflowSettings(requests_per_hour=10**6)
        self._flow = ipguard.Workflow(self._store, self._outbox, key=bytes(32), settings=settings)
        self._requests: list[str] = []
        self._store.put_users(map(_registered, USERS))
        self._flow.impose_many(BOSS, [(user, RANGES[0]) for user in USERS[::2]], reason="some")
        self._offset = min(time.time_ns() - clock() for _ in range(9))
        self.tokens = self._read_tokens(0)
        self._policies = self._read_policies()
        early = round(TIMEOUT * 1e9) + 2 * SKEW
        self.ledger = Ledger(max(self.tokens), clock(), self._policies, ADDRESSES, early)
        self._word.tell(0, 0, self.head)

    @property
    def head(self) -> int:
        """The last revision."""
        return self.ledger.now.head

    # --------------------------------------------------------------------------- by plain SQL

    def _rows(self, query: str, *params: object) -> list[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True)
        try:
            return self._connection.execute(query.encode(), params).fetchall()
        except psycopg.OperationalError:
            self._connection.close()
            self._connection = None
            raise

    def _read_tokens(self, since: int) -> dict[int, str]:
        return dict(self._rows("SELECT revision, token FROM changes WHERE revision >= %s", since))

    def _read_policies(self) -> dict[int, Policy]:
        known = {
            username for (username,) in self._rows("SELECT username FROM users WHERE removed = 0")
        }
        listed: dict[str, list[Listed]] = {user: [] for user in USERS}
        for username, name, first, last, expires in self._rows(
            "SELECT username, id, first_ip, last_ip, expires_at FROM restrictions"
            " ORDER BY username, created_at, id"
        ):
            ends = FOREVER if expires is None else expires * 1000 - self._offset + SKEW
            bounds = int.from_bytes(first), int.from_bytes(last)
            version = 4 if len(first) == 4 else 6
            listed[username].append(Listed(name.encode(), version, *bounds, ends))
        return {
            number: Policy(listed[user], known=user in known) for number, user in enumerate(USERS)
        }

    # ------------------------------------------------------------------------------- changing

    def run(self) -> None:
        try:
            while not self._over.is_set():
                with self.between:
                    before, after = clock(), None
                    with contextlib.suppress(StoreUnavailable):
                        with contextlib.suppress(IPGuardError):
                            self._change()
                        after = clock()
                    while not self._recorded(before, after):
                        self._over.wait(0.01)
                self._over.wait(0.004)
        except BaseException as error:
            self.failed = error

    def close(self) -> None:
        self._over.set()
        self.join()
        self._store.close()
        if self._connection is not None:
            self._connection.close()

    def _change(self) -> None:
        """Make one change, which may be refused."""
        chance, flow = self._random.random(), self._flow
        user, addresses = self._random.choice(USERS), self._random.choice(RANGES)
        held = [each.id.decode() for policy in self._policies.values() for each in policy.listed]
        if chance < 0.4 and len(held) > len(USERS) // 2:
            flow.delete(BOSS, self._random.choice(held))
        elif chance < 0.7:
            flow.impose(BOSS, user, addresses, reason="a change")
        elif chance < 0.8:
            soon = self._store.now() + timedelta(seconds=self._random.uniform(0.5, 2.0))
            flow.impose(BOSS, user, addresses, reason="for a while", expires_at=soon)
        elif chance < 0.9:
            if self._requests:
                request = self._requests.pop()
                flow.confirm(BOSS, request, self._outbox.number_for(request))
            else:
                self._requests.append(flow.request(BOSS, user, addresses).id)
        elif chance < 0.95:
            some = self._random.sample(USERS, 5)
            flow.impose_many(BOSS, [(each, addresses) for each in some], reason="an import")
        elif self._random.random() < 0.5:
            self._store.remove_users([user])
        else:
            self._store.put_users(map(_registered, USERS))

    def _recorded(self, before: int, after: int | None) -> bool:
        """Record the state after a change, if it was made; return False if nothing can be read."""
        try:
            tokens = self._read_tokens(self.head)
            if tokens.get(self.head) != self.tokens[self.head]:
                self._fork()
                tokens = self._read_tokens(self.head)
            policies = self._read_policies()
        except psycopg.OperationalError:
            return False
        if after is None:
            after = clock()
        head = max(tokens)
        if head > self.head:
            changed = {
                user: policy for user, policy in policies.items() if policy != self._policies[user]
            }
            self.ledger.commit(head, before, after, changed)
            self._policies |= changed
            users = list(changed) or [self._word.get()[1]]
            self._word.tell(len(self.ledger.histories) - 1, users[0], head)
        assert policies == self._policies
        self.tokens |= tokens
        return True

    def _fork(self) -> None:
        """Record that the store has lost its last commits."""
        tokens = self._read_tokens(0)
        shared = max(r for r, token in tokens.items() if token == self.tokens[r])
        assert self.died, "commits were lost without a failover"
        self.ledger.fork(shared, self.died, self.lives)
        self.tokens = {r: token for r, token in tokens.items() if r <= shared}
        self._policies = {n: self.ledger.now.policy(n, shared) for n in range(len(USERS))}
        self._requests.clear()


def _registered(user: str) -> ipguard.User:
    return ipguard.User(username=user, full_name="Some One", account_id="A1")


# ---------------------------------------------------------------------------------- a network


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


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


# -------------------------------------------------------------------------------- a partition


class PacketsDropped:
    """Cuts login servers off: packets are dropped in the network, which the others do not use.

    Attributes:
        enter: The command that runs those login servers.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.enter: Sequence[str] = network.enter

    def begin(self) -> None:
        self._network.run("iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP")

    def end(self) -> None:
        self._network.run("iptables", "-F", "INPUT")


class ProxySilent:
    """Does the same if no network can be made: their proxies forward nothing."""

    enter: Sequence[str] = ()

    def __init__(self, proxies: Sequence[Proxy]) -> None:
        self._proxies = proxies

    def begin(self) -> None:
        for proxy in self._proxies:
            proxy.silent = True

    def end(self) -> None:
        for proxy in self._proxies:
            proxy.cut()  # what was not forwarded is lost
            proxy.silent = False


# ------------------------------------------------------------------------------------ the world

QUICK: Final = {"max_staleness": 0.5}
LOGINS: Final = (
    Login(guard=QUICK, refresher=False),
    Login(guard=QUICK | {"preload": True}),
    Login(guard=QUICK | {"capacity": 8}, threads=3),
    Login(guard={"max_staleness": 1.0, "unknown_users": "deny"}),
    Login(guard=QUICK, threads=3, tasks=True),
    Login(guard={"max_staleness": 1.0, "preload": True, "unknown_users": "deny"}),
    Login(guard=QUICK | {"preload": True, "capacity": 8}, threads=2),
    Login(guard={"max_staleness": 1.0, "capacity": 20}, refresher=False, threads=2),
)
"""Every second one can be cut off."""
BROKEN: Final = {
    "endless lease": "stale",
    "nothing dropped": "disagrees",
    "no token compared": "disagrees",
    "stale fill": "disagrees",
    "at_least ignored": "at_least",
    "outage allows": "groundless",
}
"""What the answers of broken guards are, among other things; see `logins.BROKEN`."""


@attrs.define(kw_only=True)
class Finding:
    """The judgement about one guard.

    Attributes:
        login: How its login server is set up.
        broken: What is broken about it, if anything.
        wrong: The wrong answers, and what is wrong.
        reasons: How many answers it gave, by reason.
        oldest: By what failed: the age of the oldest state that an answer rested on, in seconds.
    """

    login: Login
    broken: str
    wrong: list[tuple[Answer, str]] = attrs.field(factory=list)
    reasons: Counter[str] = attrs.field(factory=Counter)
    oldest: dict[str, float] = attrs.field(factory=dict)


class World:
    """A primary server, its standby, an office, and login servers.

    Args:
        network: The network of the servers; None: a proxy partitions.
        seed: Of the choice of changes.

    Attributes:
        servers: The login servers that run.
        killed: Those that were killed.
        broken: One with broken guards.
    """

    def __init__(self, network: Network | None, seed: int) -> None:
        self._inside = None if network is None else network.namespace
        self._schema = fresh_schema()
        with contextlib.ExitStack() as stack:
            self.primary, self.standby = self._servers = [Server(fsync=False) for _ in range(2)]
            for server in self._servers:
                stack.callback(server.remove)
            self._partition: PacketsDropped | ProxySilent
            if network is None:
                proxies = [stack.enter_context(Proxy(server.port)) for server in self._servers]
                self._partition = ProxySilent(proxies)
                self._ports = [proxy.port for proxy in proxies]
            else:
                self._partition = PacketsDropped(network)
                self._ports = [server.port for server in self._servers]
            self.primary.make()
            self.primary.start(inside=self._inside)
            self._word = str(self.primary.folder / "word")
            with open(self._word, "wb") as file:  # noqa: PTH123
                file.truncate(8)
            self.office = Office(
                self._url(schema=self._schema, application_name="office"),
                self._url(
                    options=f"-csearch_path={self._schema}", target_session_attrs="read-write"
                ),
                Word(self._word),
                seed,
            )
            self.standby.follow(self.primary)
            self.standby.start(inside=self._inside)
            stack.callback(self.office.close)
            self.office.start()
            self._marks: list[tuple[float, str]] = []
            self.servers: list[LoginServer] = []
            self.killed: list[LoginServer] = []
            stack.callback(self._close_logins)
            for number in range(len(LOGINS)):
                self.servers.append(self._login(number))
            self.broken = stack.enter_context(
                LoginServer(
                    self._url(schema=self._schema, timeout=TIMEOUT), USERS, ADDRESSES,
                    Login(guard=QUICK, broken=tuple(BROKEN), threads=len(BROKEN), pace=0.2),
                    word=self._word,
                )
            )  # fmt: skip
            self._stack = stack.pop_all()

    def _close_logins(self) -> None:
        for server in self.servers + self.killed:
            server.close()

    def _url(self, *, cut: bool = False, **options: object) -> str:
        ports = [server.port for server in self._servers]
        hosts = [str(server.folder) for server in self._servers]
        if cut:
            ports, hosts = self._ports, ["127.0.0.1"] * 2
        given = {"host": ",".join(hosts), "port": ",".join(map(str, ports))} | options
        return f"postgresql://postgres@/postgres?{urlencode(given)}"

    def _login(self, number: int) -> LoginServer:
        cut = number % 2 == 1
        return LoginServer(
            self._url(cut=cut, schema=self._schema, timeout=TIMEOUT, pool_size=3),
            USERS, ADDRESSES, LOGINS[number],
            enter=self._partition.enter if cut else (), word=self._word,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ----------------------------------------------------------------------------- conditions

    def count(self) -> int:
        """Return how many answers there are, those of broken guards apart."""
        return sum(sum(each.lengths()) for each in self.servers + self.killed)

    def until(self, condition: Callable[[], object], what: str) -> None:
        def met() -> object:
            assert self.office.is_alive(), self.office.failed
            return condition()

        until(met, what)

    def await_commits(self, number: int) -> None:
        """Wait until the store has changed so often."""
        head, ledger = self.office.head, self.office.ledger.now
        self.until(
            lambda: self.office.ledger.now is ledger and self.office.head >= head + number,
            f"{number} commits",
        )

    def await_moment(self, moment: float) -> None:
        self.until(lambda: clock() >= moment, "time passes")

    def await_answers(self, servers: Iterable[LoginServer], since: int | None = None) -> None:
        """Wait until each thread has answered from a state of after now, or that moment."""
        since = clock() if since is None else since

        def answers(server: LoginServer) -> bool:
            recent = since + server.login.max_staleness * 1e9
            told = [
                answer.reason > BAD_ADDRESS and answer.began > recent for answer in server.latest(8)
            ]
            return bool(told) and all(any(told[at : at + 8]) for at in range(0, len(told), 8))

        waiting = list(servers)
        self.until(lambda: all(map(answers, waiting)), "all answer from the present state")

    def await_denials(self, servers: Iterable[LoginServer]) -> None:
        """Wait until no thread knows anything any more."""

        def denies(server: LoginServer) -> bool:
            told = [answer.reason for answer in server.latest(8)]
            return bool(told) and STORE_UNAVAILABLE in told and max(told) <= BAD_ADDRESS

        waiting = list(servers)
        self.until(lambda: all(map(denies, waiting)), "all deny")

    # ------------------------------------------------------------------------------ what fails

    def let_all_fail(self) -> None:
        """Let everything fail, one after another."""
        self.await_answers(self.servers)
        for what, fail in (
            ("`kill -9` of login servers", self.kill_logins),
            ("login servers stopped", self.stop_logins),
            ("the database stopped", self.stop_store),
            ("packets dropped", self.part),
            ("`kill -9` of the database", self.kill_store),
            ("listeners terminated", self.break_listeners),
            ("backends stopped", self.stop_backends),
            ("a failover that loses commits", self.fail_over),
        ):
            self._marks.append((clock(), what))
            fail()

    def kill_logins(self) -> None:
        """Kill some login servers, and start others in their place."""
        for number in (1, 4):
            self._replace(number)
        self.await_answers(self.servers)

    def _replace(self, number: int) -> None:
        self.servers[number].kill()
        self.killed.append(self.servers[number])
        self.servers[number] = self._login(number)

    def stop_logins(self) -> None:
        """Stop some login servers for longer than any lease, while policies change."""
        stopped = self.servers[::2]
        for server in stopped:
            server.stop()
        over = clock() + 1.2e9
        self.await_commits(20)
        self.await_moment(over)
        for server in stopped:
            server.proceed()
        self.await_answers(self.servers)

    def stop_store(self) -> None:
        """Stop every process of the store, and start a login server that then knows nothing."""
        self.primary.send(signal.SIGSTOP)
        self.until(self.primary.stopped, "all of the server stands still")
        since = clock()
        self._replace(0)
        self.await_denials(self.servers)
        self.office.ledger.absent(since, clock())
        self.primary.send(signal.SIGCONT)
        self.await_answers(self.servers)

    def kill_store(self) -> None:
        """Kill the store, and start it again."""
        self.primary.stop(signal.SIGKILL)
        since = clock()
        self.await_denials(self.servers)
        self.office.ledger.absent(since, clock())
        self.primary.start(inside=self._inside)
        self.await_answers(self.servers)

    def part(self) -> None:
        """Cut every second login server off, while policies change."""
        self._partition.begin()
        self.await_denials(self.servers[1::2])
        self.await_commits(20)
        self._partition.end()
        self.await_answers(self.servers)

    def break_listeners(self) -> None:
        """Terminate the backends that notify login servers, again and again."""
        done = self.office.head + 25
        with psycopg.connect(self.primary.url(), autocommit=True) as watch:

            def terminated() -> bool:
                watch.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'ipguard listener'"
                )
                return self.office.head >= done

            self.until(terminated, "25 commits")
        self.await_answers(self.servers)

    def stop_backends(self) -> None:
        """Stop the backends of login servers, while policies change."""
        idle = (
            "SELECT pid FROM pg_stat_activity"
            " WHERE application_name IN ('ipguard', 'ipguard listener') AND state = 'idle'"
        )
        with psycopg.connect(self.primary.url(), autocommit=True) as watch:
            stopped = [pid for (pid,) in watch.execute(idle)]
            _send(stopped, signal.SIGSTOP)
            still = [pid for (pid,) in watch.execute(idle)]
        # The others are in the middle of something, and may hold what a commit needs.
        _send(set(stopped) - set(still), signal.SIGCONT)
        try:
            self.await_commits(25)
            self.await_answers(self.servers)
        finally:
            _send(stopped, signal.SIGCONT)

    def fail_over(self) -> None:
        """Promote the standby, which has not received the last commits, and kill the primary.

        The standby is promoted when the leases of the lost history are over: until then, an
        `at_least` of the new history may be met by a revision that was lost.
        """
        self.standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        self.standby.execute("SELECT pg_reload_conf()")
        self.until(
            lambda: not self.standby.execute("SELECT 1 FROM pg_stat_wal_receiver"),
            "the standby is on its own",
        )
        self.await_commits(20)
        self.await_answers((*self.servers, self.broken))
        # A commit that is lost before the office knows of it would be a state without a record.
        with self.office.between:
            self.primary.stop(signal.SIGKILL)
            died = self.office.died = clock()
        self.await_moment(died + 1.05e9)
        self.office.lives = clock()
        self.standby.execute("SELECT pg_promote()")
        self.until(lambda: len(self.office.ledger.histories) == 2, "the other history began")
        lost, now = self.office.ledger.histories
        assert lost.head - now.shared >= 20
        self.await_answers(self.servers, self.office.lives)
        self.until(lambda: now.head > lost.head + 20, "the new history is longer than the lost")
        self.await_answers((*self.servers, self.broken))

    # ------------------------------------------------------------------------------- judging

    def close(self) -> Ledger:
        """End all processes, and return the states of the store."""
        for server in (*self.servers, self.broken):
            server.kill()
        self.office.close()
        assert self.office.failed is None, self.office.failed
        self.office.ledger.close()
        return self.office.ledger

    def findings(self) -> Iterator[Finding]:
        """Judge all answers; the world is closed."""
        for server in self.servers + self.killed:
            yield self._judged(server.sessions(), Finding(login=server.login, broken=""))
        for broken, session in zip(BROKEN, self.broken.sessions(), strict=True):
            yield self._judged([session], Finding(login=self.broken.login, broken=broken))

    def _judged(self, sessions: Iterable[Iterable[Answer]], found: Finding) -> Finding:
        judge = judge_of(self.office.ledger, found.login)
        marks = iter((*self._marks, (FOREVER, "")))
        what, (turn, then) = "nothing", next(marks)
        reasons = [0] * len(REASONS)
        for began, session, answer in merged(sessions):
            while began >= turn:
                found.oldest[what], judge.oldest = judge.oldest / 1e9, 0.0
                what, (turn, then) = then, next(marks)
            reasons[answer[10]] += 1
            fault = judge.judge(session, answer)
            if fault:
                found.wrong.append((Answer(*answer), fault))
        found.oldest[what] = judge.oldest / 1e9
        found.reasons = Counter(dict(zip(REASONS, reasons, strict=True)))
        return found


def judge_of(ledger: Ledger, login: Login) -> Judge:
    """Return the judge of a login server."""
    # A microsecond for the guard's clock, which is a float.
    lease = round(login.max_staleness * 1e9) + 1_000
    deny_unknown = login.guard.get("unknown_users") == "deny"
    return Judge(ledger, lease, deny_unknown=deny_unknown)
