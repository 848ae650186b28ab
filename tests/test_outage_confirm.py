"""A confirm whose client or server is killed at each step is complete or undone, and never lost."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

import ipguard
from ipguard import RequestClosed, StoreUnavailable
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox
from tests.confirming import BOSS, KEY, client
from tests.conftest import rounds
from tests.postgres import Server, fresh_schema, own_server, until
from tests.proxy import Proxy, statements

# Many processes, and a machine that others may be busy on.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(300, 3_600))]

STEPS = 7  # round trips of a confirm; its writes go with the last
DIRECT = {"sslmode": "disable", "gssencmode": "disable"}
Cut = tuple[int, str | int]
ACKNOWLEDGED: Cut = (STEPS, "acknowledged")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that a test may damage."""
    with own_server() as server:
        yield server


class Bench:
    """Requests to confirm, and their outcomes.

    Attributes:
        proxy: The proxy through which they are confirmed.
        url: The URL through the proxy.
        store: A store that bypasses it.
    """

    def __init__(self, server: Server, proxy: Proxy) -> None:
        self.server, self.proxy, self.schema = server, proxy, fresh_schema()
        self.store = PostgresStore(server.url(schema=self.schema), listen="off", timeout=5.0)
        self.url = server.url(port=proxy.port, schema=self.schema, timeout=5.0, **DIRECT)
        self.store.put_users([ipguard.User(username="jo", full_name="Jo", account_id="A1")])
        self._outbox = Outbox()
        settings = ipguard.WorkflowSettings(requests_per_hour=10**6)
        self.flow = ipguard.Workflow(self.store, self._outbox, key=KEY, settings=settings)
        self._count = 0

    def request(self) -> tuple[str, str]:
        """Make a request; return it and its number."""
        self._count += 1
        address = f"10.{self._count >> 8}.{self._count & 255}.1"
        request = self.flow.request(BOSS, "jo", address)
        return request.id, self._outbox.number_for(request.id)

    def cuts(self) -> list[Cut]:
        """Return every step: before and after each round trip, and between the writes."""
        with PostgresStore(self.url, listen="off") as store:
            ipguard.Workflow(store, Outbox(), key=KEY).confirm(BOSS, *self.request())
            writes = len(statements(self.proxy.asked))
        assert writes >= 4  # the request, the restriction, the change, the commit
        found: list[Cut] = [(n, when) for n in range(1, STEPS + 1) for when in ("before", "after")]
        return [*found, *((STEPS, n) for n in range(1, writes + 1)), ACKNOWLEDGED]

    @contextmanager
    def cutting(self, cut: Cut, strike: Callable[[], object]) -> Iterator[None]:
        """Strike at one step of the block."""
        step, when = cut

        def after_a_moment() -> None:
            if isinstance(when, int):  # somewhere between this write and the next
                threading.Event().wait(random.uniform(0.0, 0.002))
            strike()

        proxy, before = self.proxy, self.proxy.struck
        proxy.strike = after_a_moment
        if cut != ACKNOWLEDGED:
            proxy.cut_when, proxy.cut_at = when, step  # type: ignore[assignment]
        yield
        if cut == ACKNOWLEDGED:
            strike()
        else:
            until(lambda: proxy.struck > before, "it struck")

    def confirmed(self, request_id: str) -> bool:
        """Return whether a request was confirmed; fail if it was confirmed by half."""
        with self.store.transaction() as turn:
            stored = turn.request(request_id)
        assert stored is not None
        confirmed = str(stored.request.state) == "confirmed"
        held = {r.addresses for r in self.store.load_policy("jo").restrictions}
        assert confirmed == (stored.request.adds[0] in held)
        rows = [
            change for change in self.flow.history(BOSS, username="jo", limit=100)
            if change.action == "confirm" and change.detail.get("request") == request_id
        ]  # fmt: skip
        assert len(rows) == int(confirmed)
        self._check_trail()
        return confirmed

    def _check_trail(self) -> None:
        (found,) = self.server.execute(
            f"SELECT h.revision, h.touching, h.token = (SELECT token FROM {self.schema}.changes c"
            f" WHERE c.revision = h.revision), (SELECT max(revision) FROM {self.schema}.changes"
            f" WHERE touched IS NOT NULL), (SELECT count(*) FROM {self.schema}.changes"
            f" WHERE revision > 0) FROM {self.schema}.head h"
        )
        revision, touching, token, last_touching, count = found
        assert (touching, token, count) == (last_touching, True, revision)

    def judge(self, cut: Cut, request_id: str, number: str, *, acknowledged: bool) -> None:
        """Fail if the confirm is incomplete, lost, or cannot be tried again."""
        until(self._answers, "the turn is free")
        confirmed = self.confirmed(request_id)
        assert confirmed or not acknowledged
        assert acknowledged == (cut == ACKNOWLEDGED)
        _, when = cut
        if when == "before" or cut[0] < STEPS:
            assert not confirmed
        elif cut == (STEPS, "after"):
            assert confirmed
        if confirmed:
            with pytest.raises(RequestClosed, match="confirmed"):
                self.flow.confirm(BOSS, request_id, number)
        else:
            self.flow.confirm(BOSS, request_id, number)
        assert self.confirmed(request_id)

    def _answers(self) -> bool:
        with suppress(StoreUnavailable), self.store.transaction():
            return True
        return False


@pytest.fixture
def bench(server: Server) -> Iterator[Bench]:
    with Proxy(server.port) as proxy:
        bench = Bench(server, proxy)
        with bench.store:
            yield bench


def test_a_client_killed_at_each_step(bench: Bench) -> None:
    """After kill -9 of the process that confirms, the next one finds all of it, or nothing."""
    for cut in bench.cuts() * rounds(1, 5):
        request_id, number = bench.request()
        process, line = client(bench.url, request_id, number)
        acknowledged = False

        def kill(pid: int | None = process.pid) -> None:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

        with bench.cutting(cut, kill):
            line.send("go")
            with suppress(EOFError):
                acknowledged = line.recv() == "acknowledged"
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        line.close()
        bench.judge(cut, request_id, number, acknowledged=acknowledged)


def test_a_server_killed_at_each_step(bench: Bench) -> None:
    """After kill -9 of the server, acknowledged confirms are there when it has recovered."""
    with PostgresStore(bench.url, listen="off") as store:
        flow = ipguard.Workflow(store, Outbox(), key=KEY)
        for cut in bench.cuts() * rounds(1, 5):
            request_id, number = bench.request()
            until(lambda: _loads(store), "a connection is there")
            with bench.cutting(cut, lambda: bench.server.stop(signal.SIGKILL)):
                try:
                    flow.confirm(BOSS, request_id, number)
                    acknowledged = True
                except StoreUnavailable:
                    acknowledged = False
            bench.server.start()
            bench.judge(cut, request_id, number, acknowledged=acknowledged)


def _loads(store: PostgresStore) -> bool:
    with suppress(StoreUnavailable):
        return store.load_policy("jo").known
    return False
