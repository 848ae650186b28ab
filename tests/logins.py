"""A login server in its own process: a guard that checks all users all the time.

    python -m tests.logins

It reads its settings as one line of JSON, then answers each further line with a report. Its times
are of CLOCK_MONOTONIC, which all processes of a Linux machine share.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

import ipguard
from ipguard import Reason

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
ALLOWED = "allowed"


@attrs.frozen(kw_only=True)
class Seen:
    """The answers about one user.

    Attributes:
        reason: The last answer.
        since: When the answers began to be that one.
        allowed_at: When the last check began that allowed; 0.0 if there was none.
    """

    reason: str
    since: float
    allowed_at: float


@attrs.frozen(kw_only=True)
class Report:
    """The answers of a login server since it started, of all its threads.

    Attributes:
        seen: By user. Of several threads, the latest of each figure counts.
        slowest: The slowest answer, in seconds.
        asked: The number of answers.
    """

    seen: dict[str, Seen]
    slowest: float
    asked: int

    def all(self, reason: str, users: Iterable[str]) -> bool:
        """Return whether the last answer about each of these users has this reason."""
        return all(user in self.seen and self.seen[user].reason == reason for user in users)


class Asker(threading.Thread):
    """A thread that checks some users in turn, and a new user after each round."""

    def __init__(
        self, guard: ipguard.Guard, users: Sequence[str], address: str, pace: float, number: int
    ) -> None:
        super().__init__(daemon=True)
        self._guard, self._users, self._address, self._pace = guard, users, address, pace
        self._number = number
        self.seen: dict[str, tuple[str, float, float]] = {}
        self.slowest = 0.0
        self.denials = array("d")
        self.asked = 0
        self._never = threading.Event()

    def run(self) -> None:
        is_allowed, address, clock = self._guard.is_allowed, self._address, time.monotonic
        turns = 0
        while True:
            turns += 1
            for user in self._users:
                began = clock()
                allowed = is_allowed(user, address)
                ended = clock()
                self._note(user, began, ended, allowed)
            began = clock()
            is_allowed(f"newcomer-{self._number}-{turns}", address)
            self.slowest = max(self.slowest, clock() - began)
            self.asked += len(self._users) + 1
            if self._pace:
                self._never.wait(self._pace)

    def _note(self, user: str, began: float, ended: float, allowed: bool) -> None:
        self.slowest = max(self.slowest, ended - began)
        before, since, allowed_at = self.seen.get(user, ("", 0.0, 0.0))
        if allowed:
            reason, allowed_at = ALLOWED, began
        else:
            reason = before
            if before in {"", ALLOWED, Reason.STORE_UNAVAILABLE}:
                reason = str(self._guard.check(user, self._address).reason)
            if reason == Reason.STORE_UNAVAILABLE:
                self.denials.append(ended - began)
        self.seen[user] = (reason, since if reason == before else ended, allowed_at)


def serve() -> None:
    """Run the login server that standard input describes."""
    spec = json.loads(sys.stdin.readline())
    store = ipguard.open_store(spec["url"])
    with store, ipguard.Guard(store, **spec["guard"]) as guard:
        askers = [
            Asker(guard, spec["users"], spec["address"], spec["pace"], number)
            for number in range(spec["threads"])
        ]
        for asker in askers:
            asker.start()
        for line in sys.stdin:
            if line == "denials\n":
                # As bytes: formatting numbers would slow the threads that are being timed.
                report: object = [asker.denials.tobytes().hex() for asker in askers]
            else:
                report = {
                    "seen": [asker.seen.copy() for asker in askers],
                    "slowest": max(asker.slowest for asker in askers),
                    "asked": sum(asker.asked for asker in askers),
                    "alive": sum(asker.is_alive() for asker in askers),
                }
            print(json.dumps(report), flush=True)


class LoginServer:
    """Runs a login server, and requests its reports.

    Args:
        url: The store.
        users: The users to check.
        address: The clients' address.
        guard: The settings of its guard.
        threads: The number of threads that check.
        pace: How long each of them pauses after each round, in seconds.
        enter: A command that runs the rest of its command line, such as in its own network.
    """

    def __init__(
        self,
        url: str,
        users: Sequence[str],
        address: str,
        *,
        threads: int = 1,
        pace: float = 0.001,
        enter: Sequence[str] = (),
        **guard: Any,
    ) -> None:
        self._threads = threads
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-m", "tests.logins"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        spec = {
            "url": url, "users": list(users), "address": address,
            "guard": guard, "threads": threads, "pace": pace,
        }  # fmt: skip
        self._tell(json.dumps(spec))

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _ask(self, line: str) -> Any:
        assert self.process.stdout is not None
        self._tell(line)
        return json.loads(self.process.stdout.readline())

    def denials(self) -> list[float]:
        """Return how long each denial as `STORE_UNAVAILABLE` took, in seconds."""
        found = array("d")
        for text in self._ask("denials"):
            found.frombytes(bytes.fromhex(text))
        return found.tolist()

    def report(self) -> Report:
        """Return its report, after checking that all its threads are alive."""
        told = self._ask("report")
        assert told["alive"] == self._threads
        seen: dict[str, Seen] = {}
        for each in told["seen"]:
            for user, (reason, since, allowed_at) in each.items():
                old = seen.get(user, Seen(reason=reason, since=since, allowed_at=allowed_at))
                seen[user] = Seen(
                    reason=reason if since >= old.since else old.reason,
                    since=max(since, old.since),
                    allowed_at=max(allowed_at, old.allowed_at),
                )
        return Report(seen=seen, slowest=told["slowest"], asked=told["asked"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    serve()
