"""The memory store beyond the conformance suite: waiting, forking, ended transactions."""

import os
import threading
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone

import pytest

from ipguard.errors import InvalidValue, StoreUnavailable
from ipguard.model import Action, Actor, User
from ipguard.stores.memory import MemoryStore
from ipguard.testing._case import Call, happens
from tests.test_guard_fork import in_child


def _user(name: str) -> User:
    return User(username=name, full_name="", account_id="A1")


class TestTurns:
    def test_a_writer_gives_up_after_its_timeout(self):
        store = MemoryStore(timeout=0.01)
        with store.transaction() as turn:
            with pytest.raises(StoreUnavailable, match=r"within 0\.01 s"):
                Call(lambda: store.put_users([_user("bob")])).result()
            turn.append(Action.UNLOCK, actor="boss")
        assert store.put_users([_user("bob")]) == 2

    def test_an_ended_transaction_refuses_writes(self):
        """Writing after the block raises; it would be lost, or change a committed state."""
        store = MemoryStore()
        with store.transaction() as turn:
            turn.set_failures("boss", 1)
            turn.append(Action.UNLOCK, actor="boss")
        with pytest.raises(RuntimeError, match="over"):
            turn.set_failures("boss", 2)
        with pytest.raises(RuntimeError, match="over"):
            turn.append(Action.UNLOCK, actor="boss")
        with store.transaction() as turn:
            assert turn.failures("boss") == 1

    def test_closing_during_a_transaction_undoes_it(self):
        store = MemoryStore()
        with pytest.raises(StoreUnavailable), store.transaction() as turn:  # noqa: PT012
            turn.append(Action.UNLOCK, actor="boss")
            store.close()
        assert store._state.head == 0

    def test_closing_refuses_a_writer_that_waits(self):
        store = MemoryStore()
        waiting = threading.Event()

        def write() -> None:
            waiting.set()
            store.put_users([_user("bob")])

        with pytest.raises(StoreUnavailable), store.transaction():  # noqa: PT012
            call = Call(write)
            happens(waiting)
            store.close()
        with pytest.raises(StoreUnavailable):
            call.result()


class TestClock:
    def test_without_a_clock_it_is_the_hosts(self):
        before = datetime.now(UTC)
        assert before <= MemoryStore().now() <= datetime.now(UTC)

    def test_a_clock_of_another_zone_is_converted(self):
        """A store's time is in UTC, whatever the zone of its clock."""
        zone = timezone(timedelta(hours=-5))
        store = MemoryStore(clock=lambda: datetime(2030, 1, 1, 8, tzinfo=zone))
        assert store.now() == datetime(2030, 1, 1, 13, tzinfo=UTC)
        assert store.now().utcoffset() == timedelta()

    def test_a_naive_clock_is_refused(self):
        """A clock without a zone is refused, and the writer's lock is released."""
        store = MemoryStore(clock=lambda: datetime(2030, 1, 1))  # noqa: DTZ001
        for _ in range(2):
            with pytest.raises(InvalidValue), store.transaction():
                pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def test_a_child_is_refused(self):
        """The copy in a forked child would diverge from its parent unnoticed."""
        store = MemoryStore()
        store.put_users([_user("alice")])

        def ask() -> int:
            refused = 0
            for call in (
                lambda: store.load_policy("alice"),
                store.load_all_policies,
                lambda: store.changes_since(None),
                lambda: store.wait(0, 60.0),
                lambda: store.put_users([]),
                lambda: store.remove_users([]),
                lambda: store.transaction().__enter__(),
                lambda: store.overview(Actor.EVERY_ACCOUNT),
                lambda: store.history(Actor.EVERY_ACCOUNT),
                lambda: store.policy_at("alice", 0),
                lambda: store.revision_at(datetime.now(UTC)),
                lambda: store.restrictions_changed(1),
                lambda: store.last_changes([]),
                lambda: store.passed_on("alice", 0),
                store.verify,
            ):
                try:
                    call()
                except StoreUnavailable:
                    refused += 1
            store.close()
            return refused

        assert in_child(ask) == 15
        assert store.load_policy("alice").known

    def test_a_child_never_waits_for_a_lock_of_its_parent(self):
        """Locks held at the fork are never released in the child, which does not touch them."""
        store = MemoryStore()

        def ask() -> str:
            store.close()
            try:
                store.wait(0, 60.0)
            except StoreUnavailable:
                return "refused"
            return "waited"

        with store._touched, store._writing:
            assert in_child(ask) == "refused"


class TestSize:
    def test_a_change_copies_the_tables_that_it_writes(self):
        """A change of the failures does not copy the users, of which there may be many."""
        store = MemoryStore()
        store.put_users([_user("alice")])
        before = store._state
        with store.transaction() as turn:
            turn.set_failures("boss", 1)
            turn.append(Action.UNLOCK, actor="boss")
        after = store._state
        assert after.users is before.users
        assert (before.failures, after.failures) == ({}, {"boss": 1})

    def test_old_states_are_freed(self):
        """A replaced state is not kept: a store grows with its contents only."""
        store = MemoryStore()
        store.put_users(_user(f"user{n}") for n in range(5_000))

        def change() -> None:
            for _ in range(50):
                with store.transaction() as turn:
                    turn.set_failures("boss", turn.failures("boss") + 1)
                    turn.append(Action.UNLOCK, actor="boss")

        change()
        tracemalloc.start()
        try:
            change()
            assert tracemalloc.get_traced_memory()[0] < 200_000
        finally:
            tracemalloc.stop()
