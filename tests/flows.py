"""The `desk` fixture: a store with users, a clock, an outbox and a workflow."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import ipguard
from ipguard import (
    Actor,
    Applied,
    Change,
    PendingRequest,
    Sighting,
    User,
    Workflow,
    WorkflowSettings,
)
from ipguard.store import RestrictionStore
from ipguard.testing import FakeClock, Outbox

KEY = b"the desk's own key, of 32 bytes!"
OFFICE = "203.0.113.7"
HOME = "198.51.100.20"

BOSS = Actor(
    username="boss", email="boss@bank.example", manages=Actor.EVERY_ACCOUNT, address="192.0.2.1"
)
ALICE = Actor(
    username="alice", email="alice@firm.example", manages=frozenset({"U1"}), address=OFFICE
)
ADAM = Actor(username="adam", email="adam@firm.example", manages=frozenset({"U1"}))
CAROL = Actor(username="carol", email="carol@other.example", manages=frozenset({"U2"}))

JSMITH = User(
    username="jsmith", full_name="John Smith", account_id="U1", email="jsmith@firm.example"
)
PEOPLE = (
    JSMITH,
    User(username="mary", full_name="Mary Major", account_id="U1"),
    User(username="alice", full_name="Alice Adams", account_id="U1", email="alice@firm.example"),
    User(username="zed", full_name="Zed Zulu", account_id="U2", email="zed@other.example"),
)


class Desk:
    """A store with four users, a workflow on it, and shortcuts for common steps.

    Attributes:
        path: The SQLite file, or None for another store.
        url: The URL of the store.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        url: str = "memory://",
        clock: FakeClock | None = None,
    ) -> None:
        self.path = path
        self.clock = clock or FakeClock()
        self.url = url if path is None else f"sqlite:///{path}"
        self.store: RestrictionStore = ipguard.open_store(self.url, clock=self.clock)
        self.outbox = Outbox()
        self.flow = Workflow(self.store, self.outbox, key=KEY)
        self.store.put_users(PEOPLE)

    def use(self, **settings: Any) -> None:
        """Replace the workflow by one with other settings."""
        self.flow = self.workflow(**settings)

    def workflow(self, store: RestrictionStore | None = None, **settings: Any) -> Workflow:
        """Return another workflow on the same data."""
        return Workflow(
            store or self.store, self.outbox, key=KEY, settings=WorkflowSettings(**settings)
        )

    def wait(self, **length: float) -> None:
        """Advance the clock."""
        self.clock.advance(timedelta(**length))

    def later(self, **length: float) -> datetime:
        """Return a time in the future."""
        return self.clock() + timedelta(**length)

    def ask(
        self, addresses: str = OFFICE, username: str = "jsmith", actor: Actor = ALICE, **more: Any
    ) -> PendingRequest:
        """Request a restriction."""
        return self.flow.request(actor, username, addresses, **more)

    def number(self, request: PendingRequest) -> str:
        """Return the newest number that was mailed for a request."""
        return self.outbox.number_for(request.id)

    def wrong(self, request: PendingRequest) -> str:
        """Return a wrong number for a request."""
        right = self.number(request)
        return ("1" if right[0] == "0" else "0") + right[1:]

    def confirm(self, request: PendingRequest, actor: Actor = ALICE, **more: Any) -> Applied:
        """Confirm a request with its number."""
        applied = self.flow.confirm(actor, request.id, self.number(request), **more)
        assert isinstance(applied, Applied)
        return applied

    def guess(self, request: PendingRequest, actor: Actor = ALICE, times: int = 1) -> list[int]:
        """Confirm with wrong numbers; return the attempts left after each."""
        left = []
        for _ in range(times):
            with pytest.raises(ipguard.WrongNumber) as caught:
                self.flow.confirm(actor, request.id, self.wrong(request))
            left.append(caught.value.attempts_left)
        return left

    def add(
        self, addresses: str = OFFICE, username: str = "jsmith", **more: Any
    ) -> ipguard.Restriction:
        """Add a restriction without a request."""
        applied = self.flow.impose(BOSS, username, addresses, reason="a test", **more)
        assert applied.restriction is not None
        return applied.restriction

    def log_in(
        self, address: str, allowed: int = 1, refused: int = 0, username: str = "jsmith"
    ) -> Sighting:
        """Record logins with the right password, now, and return them."""
        now = self.clock()
        seen = Sighting(
            username=username,
            address=address,
            first_at=now,
            last_at=now,
            allowed=allowed,
            refused=refused,
        )
        self.store.record_sightings([seen])
        return seen

    def delete(
        self, restriction: ipguard.Restriction, actor: Actor = ALICE, **more: Any
    ) -> Applied:
        """Delete a restriction without a confirmation."""
        applied = self.flow.delete(actor, restriction.id, **more)
        assert isinstance(applied, Applied)
        return applied

    def ask_to_delete(
        self, restriction: ipguard.Restriction, actor: Actor = ALICE, **more: Any
    ) -> PendingRequest:
        """Request a deletion."""
        asked = self.flow.delete(actor, restriction.id, **more)
        assert isinstance(asked, PendingRequest)
        return asked

    def held(self, username: str = "jsmith") -> list[str]:
        """Return the addresses of a user's restrictions, as a guard reads them."""
        return [str(r.addresses) for r in self.store.load_policy(username).restrictions]

    def request(self, request: PendingRequest) -> PendingRequest:
        """Return the current state of a request."""
        with self.store.transaction() as turn:
            stored = turn.request(request.id)
        assert stored is not None
        return stored.request

    def failures(self, actor: Actor = ALICE) -> int:
        """Return an actor's count of consecutive wrong numbers."""
        with self.store.transaction() as turn:
            return turn.failures(actor.username)

    def rows(self) -> tuple[Change, ...]:
        """Return the audit log, newest first."""
        return self.store.history(Actor.EVERY_ACCOUNT, limit=100_000).items

    def dump(self) -> object:
        """Return the complete contents of the store."""
        if self.path is None:
            store: Any = self.store
            return store._state, tuple(store._entries)
        with closing(sqlite3.connect(self.path)) as connection:
            return list(connection.iterdump())

    def refuses(self, request: PendingRequest, state: str) -> None:
        """Fail unless every step of a request is refused by its state, and changes nothing."""
        for call in (
            lambda: self.confirm(request),
            lambda: self.flow.resend(ALICE, request.id),
            lambda: self.flow.cancel(ALICE, request.id),
        ):
            with self.unchanged(), pytest.raises(ipguard.RequestClosed) as caught:
                call()
            assert caught.value.state == state

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Fail if the block changes the store or sends mail."""
        before, mails = self.dump(), self.outbox.messages
        yield
        assert self.dump() == before
        assert self.outbox.messages == mails


@pytest.fixture(params=["memory", "sqlite"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    """A desk on the memory store and on SQLite."""
    it = Desk(tmp_path / "desk.db" if request.param == "sqlite" else None)
    with it.store:
        yield it
