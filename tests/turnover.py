"""A preloaded guard under logins, while all that it holds is turned over in its store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

import ipguard
from ipguard.guard import Guard
from ipguard.model import Reason
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.guards import HOME, OFFICE
from tests.postgres import until

BOSS = ipguard.Actor(username="boss", email="b@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)


class Logins:
    """Threads that log users in without end, and note each answer that cannot be right.

    Args:
        guard: Who is asked.
        users: How many; `user0`, `user1`, …
        imported: Returns the revision from which on all may log in from `HOME` alone, and when its
            commit had returned; None before.
    """

    def __init__(
        self, guard: Guard, users: int, imported: Callable[[], tuple[int, float] | None]
    ) -> None:
        self._guard = guard
        self._users = users
        self._imported = imported
        self._stop = threading.Event()
        self.wrong: list[object] = []
        self.answers = 0
        self.slowest = 0.0
        self.unavailable = 0
        self._threads = [threading.Thread(target=self._run, args=(at,)) for at in (0, 1)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, at: int) -> None:
        step = 7919
        while not self._stop.is_set():
            at = (at + step) % self._users
            self._judge(f"user{at}")

    def _judge(self, name: str) -> None:
        imported, began = self._imported(), time.monotonic()
        home = self._guard.check(name, HOME)
        office = self._guard.check(name, OFFICE)
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.answers += 2
        self.unavailable += (home.reason, office.reason).count(Reason.STORE_UNAVAILABLE)
        if not home and home.reason is not Reason.STORE_UNAVAILABLE:
            self.wrong.append(home)
        # An allow has to rest on what was so before the import, and that not too long ago.
        late = imported is not None and began > imported[1] + 5.0
        now = self._imported()
        if office and (late or (now is not None and office.revision >= now[0])):
            self.wrong.append(office)


def another_history(execute: Callable[..., object], schema: str) -> None:
    """Give the last change another token, as a restored backup with as many changes has it."""
    for table, where in (
        ("changes", f'revision = (SELECT revision FROM "{schema}".head)'),
        ("head", "id = 1"),
    ):
        execute(f"""UPDATE "{schema}".{table} SET token = 'another' WHERE {where}""")


def turned_over(
    store: PostgresStore, users: int, forge: Callable[[], object], *, patience: float = 60.0
) -> Logins:
    """Import a restriction for each user, then make another history of it, under logins."""
    flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
    store.put_users(
        ipguard.User(username=f"user{n}", full_name="U", account_id="A") for n in range(users)
    )
    done: list[tuple[int, float]] = []
    with (
        ipguard.Guard(store, preload=True, capacity=2_000) as guard,
        Logins(guard, users, lambda: done[0] if done else None) as logins,
    ):
        until(lambda: guard.stats().preloaded == 0, "an empty table", patience)
        applied = flow.impose_many(
            BOSS, ((f"user{n}", HOME) for n in range(users)), reason="import"
        )
        done.append((applied.revision, time.monotonic()))
        assert guard.wait_for(applied.revision, patience)
        until(lambda: guard.stats().preloaded == users, "all that was imported", patience)
        forge()
        until(
            lambda: guard.stats().error is None and guard.stats().preloaded is None,
            "a RESET",
            patience,
        )
        until(lambda: guard.stats().preloaded == users, "all of the other history", patience)
        seen = logins.answers
        until(lambda: logins.answers > seen + 200, "answers of that", patience)
    return logins
