"""Conformance, part 8: opened again, forked, closed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from ipguard.errors import StoreUnavailable
from ipguard.model import Actor
from ipguard.store import RestrictionStore
from ipguard.testing._base import Call, Hooks, raises, user

EVERY = Actor.EVERY_ACCOUNT


class LifeTests(Hooks):
    """What a store promises from its opening to its end."""

    def _calls(self) -> dict[str, Callable[[], Any]]:
        store = self.store

        def turn() -> None:
            with store.transaction():
                pass

        return {
            "load_policy": lambda: store.load_policy("alice"),
            "load_all_policies": lambda: list(store.load_all_policies()[1]),
            "changes_since": lambda: store.changes_since(None),
            "wait": lambda: store.wait(10**6, 0.0),
            "transaction": turn,
            "put_users": lambda: store.put_users([user("bob")]),
            "remove_users": lambda: store.remove_users(["alice"]),
            "overview": lambda: store.overview(EVERY),
            "history": lambda: store.history(EVERY),
        }

    def test_a_closed_store_refuses(self) -> None:
        """After `close()`, which may be called twice, every call raises StoreUnavailable."""
        self.put("alice")
        calls = self._calls()
        for call in calls.values():
            call()
        self.store.close()
        self.store.close()
        for call in calls.values():
            with raises(StoreUnavailable):
                call()
            with raises(StoreUnavailable):
                Call(call).result()

    def test_a_closed_store_lets_the_waiting_go(self) -> None:
        """Who is in `wait` while the store is closed returns, or is told that it is closed."""
        self.touch("alice")

        def wait() -> bool:
            with suppress(StoreUnavailable):
                return self.store.wait(1, 3600.0)
            return False

        call = Call(wait)
        self.store.close()
        assert call.result() is False

    def test_a_store_is_a_context_manager(self) -> None:
        """The block gets the store itself, and leaving it closes the store."""
        with self.store as store:
            assert store is self.store
            self.touch("alice")
        with raises(StoreUnavailable):
            self.store.load_policy("alice")

    def test_leaving_the_block_hides_no_error(self) -> None:
        """An error in the block comes out of it, and the store is closed."""
        with raises(ZeroDivisionError), self.store:
            raise ZeroDivisionError
        with raises(StoreUnavailable):
            self.store.changes_since(None)

    def test_a_second_handle_sees_the_same_store(self) -> None:
        """What one handle commits, another opened on the same data reads, all of it."""
        self.put("alice", "bob")
        self.add(self.restriction())
        request = self.request()
        self.save(request)
        self.store.remove_users(["bob"])
        other = self.second()
        if other is None:
            return
        assert _everything(other) == _everything(self.store)
        with other.transaction() as turn:
            assert turn.request(request.request.id) == request
            assert self.note(turn, frozenset({"alice"})) == 5
        assert _everything(other) == _everything(self.store)
        assert self.touch("alice") == 6
        assert other.changes_since(None).head == 6

    def test_what_was_committed_outlives_its_handle(self) -> None:
        """A handle closed takes nothing with it, and closes no other."""
        self.put("alice")
        self.add(self.restriction())
        other = self.second()
        if other is None:
            return
        before = _everything(self.store)
        self.store.close()
        assert _everything(other) == before
        assert other.put_users([user("bob")]) == 3

    def test_a_second_handle_waits_its_turn(self) -> None:
        """Two handles on the same data are two writers, and only one has its turn."""
        other = self.second()
        if other is None:
            return
        with self.store.transaction() as turn:
            turn.set_failures("boss", 1)
            self.note(turn)
            call = Call(lambda: self._failures(other))
        assert call.result() == 1

    def _failures(self, store: RestrictionStore) -> int:
        with store.transaction() as turn:
            return turn.failures("boss")

    def test_a_forked_child_answers_or_refuses(self) -> None:
        """After `fork()`, in a turn or not, a child gets right answers or StoreUnavailable."""
        if not hasattr(os, "fork"):
            return
        self.put("alice")
        self.add(self.restriction())
        assert self._in_child() in (b"right", b"refused")
        with self.store.transaction() as turn:
            # The lock of this turn is held in the child as well, by a thread that is not there.
            assert Call(self._in_child).result() in (b"right", b"refused")
            self.note(turn, frozenset({"alice"}))
        assert self.touch("alice") == 4
        assert len(self.held()) == 1

    def _in_child(self) -> bytes:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # From Python 3.12 on, forking with threads about warns: that is what is tested here.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _answer(writer, self._child)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return answer

    def _child(self) -> bytes:
        try:
            policy = self.store.load_policy("alice")
            head = self.store.changes_since(None).head
            rows = len(self.store.history(EVERY))
        except StoreUnavailable:
            with raises(StoreUnavailable):
                self.store.put_users([user("bob")])
            self.store.close()
            return b"refused"
        right = (policy.revision, len(policy.restrictions), head, rows) == (2, 1, 2, 2)
        return b"right" if right else b"wrong"

    def test_time_goes_on(self) -> None:
        """The store's clock is the one that it was opened with."""
        before = self.store.now()
        self.clock.advance(timedelta(days=1, microseconds=1))
        assert self.store.now() - before == timedelta(days=1, microseconds=1)


def _everything(store: RestrictionStore) -> object:
    revision, policies = store.load_all_policies()
    return (
        store.changes_since(None),
        revision,
        dict(policies),
        store.load_policy("alice"),
        store.overview(EVERY, limit=1000),
        store.history(EVERY, limit=1000),
    )


def _answer(writer: int, ask: Callable[[], bytes]) -> None:
    """Write what the child found out, and end it: nothing of the test may run on in there."""
    try:
        signal.alarm(10)  # a child that hangs is killed, and its silence is the answer
        os.write(writer, ask())
    except BaseException as error:
        os.write(writer, repr(error).encode())
    finally:
        sys.stdout.flush()
        os._exit(0)
