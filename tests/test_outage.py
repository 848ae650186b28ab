"""No allow rests on a state older than `max_staleness`, whatever fails.

Real servers and real login servers, in processes of their own; see `tests/outages.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import rounds
from tests.outages import (
    KINDS,
    STALENESS,
    TIMEOUT,
    Network,
    NoNetwork,
    Outage,
    Outcome,
    PacketsDropped,
    crash,
    run,
    server_in,
)
from tests.postgres import Server, own_server
from tests.requirements import missing

# Many processes, and a machine that others may be busy on.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(300, 3_600))]

USUAL = 5.0  # the default `max_staleness`, and
USUAL_TIMEOUT = 2.0  # the default `timeout`
SLACK = 30.0  # of a machine that stands still at times; a thread that hangs never returns


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that a test may damage."""
    with own_server() as server:
        yield server


@pytest.fixture
def network() -> Iterator[Network]:
    """A network in which packets can be dropped."""
    if os.geteuid() == 0 and not (shutil.which("iptables") and shutil.which("ip")):
        missing("iptables or ip", "iptables iproute2")
    try:
        network = Network()
    except NoNetwork as exc:
        pytest.skip(f"no packets can be dropped on this machine: {exc}")
    with network:
        yield network


def judge(outcome: Outcome) -> None:
    """Fail if a login was let in too late, or waited too long."""
    assert len(outcome.let_in) == len(outcome.held) >= 20
    assert outcome.blows
    assert max(outcome.let_in) <= STALENESS
    assert max(outcome.let_in_usual) <= USUAL
    # A sync and a load may each take the store's deadline.
    assert outcome.slowest < 2 * TIMEOUT + SLACK
    assert outcome.slowest_usual < 2 * USUAL_TIMEOUT + SLACK


@pytest.mark.parametrize("kind", KINDS)
def test_no_allow_is_older_than_the_lease(server: Server, kind: type[Outage]) -> None:
    """Deletions hold in time, although no notification arrives, or no sync succeeds."""
    judge(run(kind(server), rounds(1, 10), 20))


@pytest.mark.parametrize("kind", KINDS[rounds(3, 0) :])
def test_nor_is_one_with_preload(server: Server, kind: type[Outage]) -> None:
    """Deletions hold in time on a guard that holds every restricted user, too."""
    judge(run(kind(server), rounds(1, 10), 20, preload=True))


def test_no_allow_is_older_than_the_lease_when_packets_vanish(network: Network) -> None:
    """Deletions hold in time if both sides work, but no packet gets through."""
    with server_in(network) as server:
        judge(run(PacketsDropped(server, network), rounds(1, 10), 20))


def test_a_killed_server_lets_no_login_in(server: Server) -> None:
    """After kill -9, logins are denied once the lease has expired, and none hangs.

    Then it recovers by itself.
    """
    for _ in range(rounds(1, 10)):
        outcome = crash(server, threads=8, away=rounds(1, 5) * 0.5)
        assert outcome.let_in <= STALENESS
        assert outcome.denials
        assert outcome.slowest < 2 * USUAL_TIMEOUT + SLACK
