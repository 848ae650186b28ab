"""Conformance tests of a store's life: closing, a second handle, forks."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ipguard.errors import StoreUnavailable
from ipguard.testing._case import EVERY, PATIENCE, Call, StoreCase, everything, raises, user


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

    def test_two_handles_share_the_data(self) -> None:
        """What one handle commits, the other reads, even after the first is closed."""
        self.put("alice", "bob")
        self.add(self.restriction())
        request = self.request()
        self.save(request)
        self.store.remove_users(["bob"])
        other = self.second()
        if other is None:
            return
        assert everything(other) == everything(self.store)
        with other.transaction() as tx:
            assert tx.request(request.request.id) == request
            assert self.append(tx, frozenset({"alice"})) == 5
        assert self.touch("alice") == 6
        before = everything(self.store)
        assert everything(other) == before
        self.store.close()
        assert everything(other) == before
        assert other.put_users([user("bob")]) == 7

    def test_a_forked_child_answers_or_refuses(self) -> None:
        """After `fork()` a child gets the right answers or StoreUnavailable, but never hangs."""
        if not hasattr(os, "fork"):
            return
        self.put("alice")
        self.add(self.restriction())
        assert self._in_child() in ("right", "refused")
        with self.store.transaction() as tx:
            # In the child the lock is held by a thread that does not exist there.
            assert Call(self._in_child).result() in ("right", "refused")
            self.append(tx, frozenset({"alice"}))
        assert self.touch("alice") == 4
        assert len(self.held()) == 1

    def _in_child(self) -> object:
        fork = multiprocessing.get_context("fork")
        reader, writer = fork.Pipe(duplex=False)
        child = fork.Process(target=lambda: writer.send(self._answer()))
        with warnings.catch_warnings():
            # Python 3.12 warns about forks of processes with threads, which this test is about.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        writer.close()
        try:
            assert reader.poll(PATIENCE), "the child hangs"
            return reader.recv()
        finally:
            child.join(PATIENCE)
            child.kill()

    def _answer(self) -> str:
        try:
            policy = self.store.load_policy("alice")
            head = self.store.changes_since(None).head
            entries = len(self.store.history(EVERY))
        except StoreUnavailable:
            self.store.close()
            return "refused"
        right = (policy.revision, len(policy.restrictions), head, entries) == (2, 1, 2, 2)
        return "right" if right else "wrong"
