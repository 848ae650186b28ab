"""Conformance tests of a store's life: closing, a second handle, forks."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ipguard.errors import StoreUnavailable
from ipguard.store import RestrictionStore
from ipguard.testing._case import EVERY, Call, StoreCase, raises, user


class LifecycleTests(StoreCase):
    """Tests of `close()`, of stores on the same data, and of forked children."""

    def test_a_closed_store_refuses_every_call(self) -> None:
        """After `close()`, which may be called twice, every call raises StoreUnavailable."""
        self.put("alice")
        store = self.store
        calls: list[Callable[[], Any]] = [
            lambda: store.load_policy("alice"),
            lambda: list(store.load_all_policies()[1]),
            lambda: store.changes_since(None),
            lambda: store.wait(10**6, 0.0),
            lambda: store.transaction().__enter__(),
            lambda: store.put_users([user("bob")]),
            lambda: store.remove_users(["alice"]),
            lambda: store.overview(EVERY),
            lambda: store.history(EVERY),
        ]
        with store.transaction():
            pass
        store.close()
        store.close()
        for call in calls:
            with raises(StoreUnavailable):
                call()
            with raises(StoreUnavailable):
                Call(call).result()

    def test_close_ends_wait(self) -> None:
        """A thread in `wait` returns False or raises StoreUnavailable when the store is closed."""
        self.touch("alice")

        def wait() -> bool:
            with suppress(StoreUnavailable):
                return self.store.wait(1, 3600.0)
            return False

        call = Call(wait)
        self.store.close()
        assert call.result() is False

    def test_a_store_is_a_context_manager(self) -> None:
        """The block gets the store; leaving it closes the store and hides no error."""
        with raises(ZeroDivisionError), self.store as store:
            assert store is self.store
            self.touch("alice")
            raise ZeroDivisionError
        with raises(StoreUnavailable):
            self.store.load_policy("alice")

    def test_a_second_handle_sees_the_same_data(self) -> None:
        """What one handle commits, the other reads."""
        self.put("alice", "bob")
        self.add(self.restriction())
        request = self.request()
        self.save(request)
        self.store.remove_users(["bob"])
        other = self.second()
        if other is None:
            return
        assert _everything(other) == _everything(self.store)
        with other.transaction() as tx:
            assert tx.request(request.request.id) == request
            assert self.append(tx, frozenset({"alice"})) == 5
        assert _everything(other) == _everything(self.store)
        assert self.touch("alice") == 6
        assert other.changes_since(None).head == 6

    def test_closing_one_handle_keeps_the_data(self) -> None:
        """After one handle is closed, the other still reads and writes everything."""
        self.put("alice")
        self.add(self.restriction())
        other = self.second()
        if other is None:
            return
        before = _everything(self.store)
        self.store.close()
        assert _everything(other) == before
        assert other.put_users([user("bob")]) == 3

    def test_two_handles_are_two_writers(self) -> None:
        """A transaction of one handle waits for that of the other."""
        other = self.second()
        if other is None:
            return
        with self.store.transaction() as tx:
            tx.set_failures("boss", 1)
            self.append(tx)
            call = Call(lambda: self._failures(other))
        assert call.result() == 1

    def _failures(self, store: RestrictionStore) -> int:
        with store.transaction() as tx:
            return tx.failures("boss")

    def test_a_forked_child_answers_or_refuses(self) -> None:
        """After `fork()` a child gets the right answers or StoreUnavailable, but never hangs."""
        if not hasattr(os, "fork"):
            return
        self.put("alice")
        self.add(self.restriction())
        assert self._in_child() in (b"right", b"refused")
        with self.store.transaction() as tx:
            # In the child the lock is held by a thread that does not exist there.
            assert Call(self._in_child).result() in (b"right", b"refused")
            self.append(tx, frozenset({"alice"}))
        assert self.touch("alice") == 4
        assert len(self.held()) == 1

    def _in_child(self) -> bytes:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns about forks of processes with threads, which this test is about.
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
            entries = len(self.store.history(EVERY))
        except StoreUnavailable:
            with raises(StoreUnavailable):
                self.store.put_users([user("bob")])
            self.store.close()
            return b"refused"
        right = (policy.revision, len(policy.restrictions), head, entries) == (2, 1, 2, 2)
        return b"right" if right else b"wrong"


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
    """Write the child's answer and end the child, without running the rest of the test."""
    try:
        signal.alarm(10)  # kills a child that hangs; the parent then reads an empty answer
        os.write(writer, ask())
    except BaseException as error:
        os.write(writer, repr(error).encode())
    finally:
        sys.stdout.flush()
        os._exit(0)
