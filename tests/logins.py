"""Login servers in processes of their own, which record every answer of their guards.

    python -m tests.logins

A login server reads its settings as one line of JSON, then checks all users all the time, until it
is killed. Each thread or task writes `histories.RECORD`s to a file that is mapped into memory: no
answer costs a system call, and what was written stays when the process is killed. Its times are of
CLOCK_MONOTONIC, which all processes of a Linux machine share, and which its guard uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any, Final, Self

import attrs

import ipguard
from ipguard import Decision, Guard, Reason
from ipguard.aio import AsyncGuard
from ipguard.model import RESET
from tests.histories import (
    BOOL,
    NO_RESTRICTION,
    NOTHING,
    RAISED,
    REASONS,
    RECORD,
    STORE_UNAVAILABLE,
    STRANGER,
    Answer,
)

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
CAPACITY: Final = 4_000_000
"""How many answers a file has room for; one that has none is sparse."""

# ----------------------------------------------------------------------------- what was told last


class Word:
    """The last commit, in a file that other processes read: its history, user and revision.

    One aligned number of 64 bits, so that no reader sees half of it.
    """

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._number = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")

    def tell(self, history: int, user: int, revision: int) -> None:
        """Write it. The commit must be over: others will ask for this revision."""
        self._number[0] = history << 48 | user << 32 | revision

    def get(self) -> tuple[int, int, int]:
        number = self._number[0]
        return number >> 48, number >> 32 & 0xFFFF, number & 0xFFFFFFFF


# ------------------------------------------------------------------------------- asking and noting


class Log:
    """The answers of one thread or task, in a file."""

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._at = 0

    def note(self, *fields: Any) -> None:
        """Write an `Answer`."""
        RECORD.pack_into(self._map, self._at, *fields)
        self._at += RECORD.size


@attrs.frozen
class Question:
    """What to ask the guard.

    Attributes:
        user: The number of the user, and
        name: Its name.
        address: The number of the address, and
        text: Its text.
        wanted: The `at_least`, or NOTHING, and
        history: Its history.
        plain: Whether to call `is_allowed`.
    """

    user: int
    name: str
    address: int
    text: str
    wanted: int
    history: int
    plain: bool


def questions(
    users: Sequence[str], addresses: Sequence[str], word: Word | None, number: int
) -> Iterator[Question]:
    """Yield questions: each user in turn, the user of the last commit, and users not seen before.

    The last commit is also what `at_least` demands.
    """
    address = number
    for turn in count():
        for user, name in enumerate(users):
            address = (address + 1) % len(addresses)
            plain = (turn + user) % 4 == 0
            yield Question(user, name, address, addresses[address], NOTHING, 0, plain)
            if word is not None and user % 4 == 0:
                history, latest, revision = word.get()
                wanted = revision if user % 8 == 0 else NOTHING
                text = addresses[address]
                yield Question(latest, users[latest], address, text, wanted, history, False)
        text = addresses[address]
        yield Question(STRANGER, f"newcomer-{number}-{turn}", address, text, NOTHING, 0, False)


_CODES: Final = {Reason(text): REASONS.index(text) for text in REASONS[STORE_UNAVAILABLE:]}


def note(
    log: Log,
    question: Question,
    guard: Guard | AsyncGuard,
    asked: tuple[int, int],
    answer: Decision | bool | None,
) -> None:
    """Record an answer; None if the guard raised.

    Args:
        log: The record.
        question: The question.
        guard: The guard.
        asked: Its revision before the call, and when the call began.
        answer: The answer.
    """
    ended = time.monotonic_ns()
    position, began = asked
    if isinstance(answer, Decision):
        reason = _CODES[answer.reason]
        revision, allowed = answer.revision, answer.allowed
        restriction = (answer.restriction_id or "").encode()
    else:
        reason = RAISED if answer is None else BOOL
        revision, allowed, restriction = guard.revision, bool(answer), NO_RESTRICTION
    log.note(
        began, ended, question.wanted, position, revision, question.user, question.address,
        question.history, allowed, restriction, reason,
    )  # fmt: skip


BURST: Final = 200


def ask(guard: Guard, log: Log, asked: Iterator[Question], pace: float) -> None:
    """Ask one guard all questions, on a thread of its own."""
    never, clock = threading.Event(), time.monotonic_ns
    for question, turn in zip(asked, range(CAPACITY - 1), strict=False):
        before = guard.revision, clock()
        answer: Decision | bool | None = None
        with contextlib.suppress(Exception):
            if question.plain:
                answer = guard.is_allowed(question.name, question.text)
            else:
                wanted = None if question.wanted == NOTHING else question.wanted
                answer = guard.check(question.name, question.text, wanted)
        note(log, question, guard, before, answer)
        if pace and turn % BURST == 0:
            never.wait(pace)


async def ask_async(guard: AsyncGuard, log: Log, asked: Iterator[Question], pace: float) -> None:
    """Do the same as a task."""
    clock = time.monotonic_ns
    for question, turn in zip(asked, range(CAPACITY - 1), strict=False):
        before = guard.revision, clock()
        answer: Decision | bool | None = None
        with contextlib.suppress(Exception):
            if question.plain:
                answer = await guard.is_allowed(question.name, question.text)
            else:
                wanted = None if question.wanted == NOTHING else question.wanted
                answer = await guard.check(question.name, question.text, wanted)
        note(log, question, guard, before, answer)
        if turn % BURST == 0:
            await asyncio.sleep(pace)


# --------------------------------------------------------------------------------- broken guards


class _Store:
    """A store whose reads a broken guard sees otherwise."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class _NothingDropped(_Store):
    def changes_since(self, cursor: Any) -> Any:
        return self.store.changes_since(cursor)._replace(usernames=frozenset())


class _NoTokenCompared(_Store):
    def changes_since(self, cursor: Any) -> Any:
        changes = self.store.changes_since(cursor)
        return changes._replace(usernames=frozenset()) if changes.usernames is RESET else changes


class _StaleFill(_Store):
    """Each policy is that of the read before, in the name of the revision of this one."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self._before: dict[str, Any] = {}

    def load_policy(self, name: str) -> Any:
        policy = self.store.load_policy(name)
        before = self._before.get(name, policy)
        self._before[name] = policy
        return attrs.evolve(before, revision=policy.revision)


class _DemandIgnored(Guard):
    def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        return super().check(username, address)


class _DefectAllows(Guard):
    def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
        decision = super().check(username, address, at_least)
        if decision.reason is Reason.STORE_UNAVAILABLE:
            return attrs.evolve(decision, allowed=True)
        return decision


def _endless(store: Any, **settings: Any) -> Guard:
    """The lease never ends: the clock of the guard stands still."""
    return Guard(store, monotonic=lambda: 0.0, **settings)


BROKEN: Final[dict[str, Callable[..., Guard]]] = {
    "": Guard,
    "endless lease": _endless,
    "nothing dropped": lambda store, **settings: Guard(_NothingDropped(store), **settings),
    "no token compared": lambda store, **settings: Guard(_NoTokenCompared(store), **settings),
    "stale fill": lambda store, **settings: Guard(_StaleFill(store), **settings),
    "at_least ignored": _DemandIgnored,
    "outage allows": _DefectAllows,
}
"""How guards can be made, by what is broken about them."""


# ---------------------------------------------------------------------------------- the process


def serve() -> None:
    """Run the login server that standard input describes."""
    spec = json.loads(sys.stdin.readline())
    word = Word(spec["word"]) if spec["word"] else None
    store = ipguard.open_store(spec["url"])
    guards = [BROKEN[broken](store, **spec["guard"]) for broken in spec["broken"] or [""]]
    if spec["refresher"]:
        for guard in guards:
            guard.start()
    sessions = [
        (Log(path), questions(spec["users"], spec["addresses"], word, number), spec["pace"])
        for number, path in enumerate(spec["files"])
    ]
    if spec["tasks"]:
        asyncio.run(_serve_async(AsyncGuard(guards[0]), sessions))
        return
    for guard, session in zip(cycle(guards), sessions, strict=False):
        threading.Thread(target=ask, args=(guard, *session)).start()


async def _serve_async(guard: AsyncGuard, sessions: Sequence[Any]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for session in sessions:
            tasks.create_task(ask_async(guard, *session))


@attrs.frozen(kw_only=True)
class Login:
    """How a login server is set up.

    Attributes:
        guard: The settings of its guard.
        refresher: Whether the refresher runs.
        threads: How many threads ask.
        tasks: Whether they are tasks of an `AsyncGuard` instead.
        broken: What is broken, if anything: it has one guard of each, and a thread for each.
        pace: How long each thread pauses after each `BURST` of answers, in seconds.
    """

    guard: dict[str, Any] = attrs.field(factory=dict)
    refresher: bool = True
    threads: int = 1
    tasks: bool = False
    broken: tuple[str, ...] = ()
    pace: float = 0.02

    @property
    def max_staleness(self) -> float:
        return float(self.guard.get("max_staleness", 5.0))


class Session:
    """The answers of a thread, in order, as plain tuples with the fields of an `Answer`."""

    def __init__(self, records: memoryview) -> None:
        self._records = records

    def __iter__(self) -> Iterator[Any]:
        return RECORD.iter_unpack(self._records)


class LoginServer:
    """Runs a login server, and reads its records.

    Args:
        url: The store.
        users: The users to check.
        addresses: The clients' addresses.
        login: How it is set up.
        enter: A command that runs the rest of its command line, such as in its own network.
        word: The path of the `Word`; empty: there is none.
    """

    def __init__(
        self,
        url: str,
        users: Sequence[str],
        addresses: Sequence[str],
        login: Login = Login(),
        *,
        enter: Sequence[str] = (),
        word: str = "",
    ) -> None:
        self.login = login
        self._maps: list[mmap.mmap] = []
        self._lengths = [0] * login.threads
        files = []
        for _ in range(login.threads):
            with tempfile.NamedTemporaryFile(prefix="ipguard-log-", delete=False) as file:
                file.truncate(CAPACITY * RECORD.size)
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                files.append(file.name)
        self._files = files
        self._users = list(users)
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-m", "tests.logins"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            text=True,
        )
        spec = {
            "url": url, "users": self._users, "addresses": list(addresses), "files": files,
            "word": word,
        } | attrs.asdict(login)  # fmt: skip
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(json.dumps(spec) + "\n")

    def lengths(self) -> list[int]:
        """Return how many answers each thread has recorded."""
        for n, records in enumerate(self._maps):
            low, high = self._lengths[n], CAPACITY
            while low < high:  # the first record without a reason
                middle = (low + high) // 2
                if records[middle * RECORD.size + RECORD.size - 1]:
                    low = middle + 1
                else:
                    high = middle
            self._lengths[n] = low
        return self._lengths

    def sessions(self) -> list[Session]:
        """Return the answers of each thread."""
        return [
            Session(memoryview(records)[: length * RECORD.size])
            for records, length in zip(self._maps, self.lengths(), strict=True)
        ]

    def reasons(self) -> dict[str, str]:
        """Return the last reason for each user."""
        # At least every other turn asks for one.
        answers = self.latest(3 * (len(self._users) + 1))
        return {
            self._users[answer.user]: REASONS[answer.reason]
            for answer in answers
            if answer.user != STRANGER and answer.reason != BOOL
        }

    def latest(self, number: int = 1) -> list[Answer]:
        """Return the last answers of each thread."""
        return [
            Answer(*RECORD.unpack_from(records, (length - n) * RECORD.size))
            for records, length in zip(self._maps, self.lengths(), strict=True)
            for n in range(min(number, length), 0, -1)
        ]

    def kill(self) -> None:
        """End it with `kill -9`."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it, and wait until each of its threads stands still."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def proceed(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        for file in self._files:
            Path(file).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    serve()
