"""Shared by the tests of the kits: a desk whose guard's store can be down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ipguard import Applied, ClientAddress, Guard
from ipguard.errors import StoreUnavailable
from tests.flows import BOSS, OFFICE, Desk
from tests.guards import Held
from tests.pages import Browser

PROXY = "192.0.2.99"  # the peer of every request of `tests.pages`
CLIENT = ClientAddress(proxies=[PROXY])


class Bench(Desk):
    """A desk with a guard, whose store can be down."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Held(self.store)
        self.guard = Guard(self.outer, monotonic=self.clock.monotonic)

    def restrict(self, username: str, addresses: str = OFFICE) -> Applied:
        """Restrict a user, and let the guard know."""
        applied = self.flow.impose(BOSS, username, addresses, reason="a test")
        self.guard.sync()
        return applied

    def begin_outage(self) -> None:
        self.outer.down = StoreUnavailable("down")
        self.wait(seconds=6)

    def end_outage(self) -> None:
        self.outer.down = None
        self.wait(seconds=2)  # the longest back-off is over
        self.guard.sync()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.store:
        yield bench
        bench.guard.close()


def come_from(browser: Browser, address: str | None) -> None:
    """Let a proxy report an address, or none."""
    browser.headers.pop("X-Forwarded-For", None)
    if address is not None:
        browser.headers["X-Forwarded-For"] = address
