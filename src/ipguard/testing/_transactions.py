"""Conformance tests of transactions, of restrictions staged for them, and of a store's life."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import attrs

from ipguard import errors
from ipguard.model import Action, Change, Policy, RequestKind, RequestState, Restriction
from ipguard.store import RestrictionStore
from ipguard.testing._case import (
    EVERY,
    EXTREMES,
    PATIENCE,
    TEXTS,
    Call,
    Interrupted,
    StoreCase,
    everything,
    happens,
    look_ups,
    raises,
    together,
    user,
)


class TransactionTests(StoreCase):
    def test_a_new_store_is_empty(self) -> None:
        """A new store is at revision 0, which has a token, and contains nothing."""
        head, token, names = self.store.changes_since(None)
        assert (head, names) == (0, frozenset())
        assert isinstance(token, str)
        assert token
        assert self.store.load_policy("alice") == Policy(revision=0, restrictions=(), known=False)
        revision, policies = self.store.load_all_policies()
        assert (revision, list(policies)) == (0, [])
        assert self.store.overview(EVERY).items == ()
        assert self.store.history(EVERY).items == ()
        assert self.store.open_requests(EVERY, requested_by="boss") == ()
        with self.store.transaction() as tx:  # which reads, and takes no revision
            found = (tx.user("nobody"), tx.restriction("none"), tx.request("none"))
            assert found == (None, None, None)
            assert (tx.restrictions("nobody"), tx.pending_requests("nobody")) == ((), ())
            assert tx.request_times("nobody", self.clock() - timedelta(1)) == ()
            assert tx.failures("nobody") == 0
        assert self.cursor() == (0, token)

    def test_every_revision_has_its_own_token(self) -> None:
        """Tokens are random, that of revision 0 included: no two are the same."""
        tokens = {self.cursor()[1], self.another().changes_since(None).token}
        for _ in range(20):
            self.touch("alice")
            tokens.add(self.cursor()[1])
        assert len(tokens) == 22

    def test_append_returns_the_entry_that_history_shows(self) -> None:
        """`append` returns the entry unchanged, with the next revision and the time of the lock."""
        given: dict[str, Any] = {
            "action": Action.WRONG_NUMBER,
            "actor": "bøss",
            "actor_address": "2001:db8::1",
            "username": "söhne",
            "account_id": "Übersee",
            "detail": {"reason": 'Ω漢字 \U0001f3e2 \\" %s=\n' * 40, "via": " a=b "},
        }
        with self.store.transaction() as tx:
            first = tx.append(**given)
            second = tx.append(Action.PUT_USERS, actor=None)
            every = [tx.append(action, actor="boss") for action in Action]
        assert first == Change(revision=1, at=self.clock(), **given)
        assert second == Change(revision=2, at=self.clock(), actor=None, action=Action.PUT_USERS)
        assert [change.action for change in every] == list(Action)
        found = self.store.history(EVERY).items
        assert found == (first, second, *every)[::-1]
        assert all(isinstance(change.action, Action) for change in found)
        assert {change.at.utcoffset() for change in found} == {timedelta()}

    def test_time_stands_still_in_a_transaction(self) -> None:
        """It is the given clock's, to the microsecond in UTC, at which the lock was taken."""
        self.clock.advance(timedelta(days=1, microseconds=1))
        before = self.clock()
        with self.store.transaction() as tx:
            assert tx.now == before
            self.clock.advance(timedelta(seconds=3))
            assert tx.now == before
            self.append(tx)
        assert self.last_change().at == before
        assert self.store.now() == before + timedelta(seconds=3)
        assert self.store.now().utcoffset() == timedelta()
        with self.store.transaction() as tx:
            assert tx.now == self.clock()

    def test_a_transaction_sees_its_own_writes(self) -> None:
        """Inside the block, reads return what it wrote; a later snapshot shows the same."""
        restriction, request = self.restriction(), self.request()
        self.put("alice")
        store: Any = self.store
        with store.transaction() as tx:
            tx.add_restriction(restriction)
            tx.save_request(request)
            tx.set_failures("boss", 3)
            self.append(tx)
            assert tx.restriction(restriction.id) == restriction
            assert tx.restrictions("alice") == (restriction,)
            assert tx.request(request.request.id) == request
            assert tx.pending_requests("alice") == (request.request,)
            assert tx.request_times("boss", self.clock() - timedelta(1)) == (self.clock(),)
            assert tx.failures("boss") == 3
            tx.remove_restriction(restriction.id)
            assert tx.restriction(restriction.id) is None
            assert tx.restrictions("alice") == ()
            tx.add_restriction(restriction)
            self.append(tx)
        if hasattr(store, "snapshot"):  # stores need not have it
            with store.snapshot() as snapshot, store.transaction() as tx:
                assert look_ups(snapshot) == look_ups(tx)

    def test_reads_neither_see_nor_wait_for_an_open_transaction(self) -> None:
        """Until the commit every read returns at once, with the state before the transaction."""
        self.put("alice")
        self.add(self.restriction(addresses="203.0.113.7"))
        before, cursor = everything(self.store), self.cursor()
        with self.store.transaction() as tx:
            tx.add_restriction(self.restriction(addresses="203.0.113.8"))
            tx.save_request(self.request())
            self.append(tx, frozenset({"alice"}))
            # On this thread as on another: a read that waited for the commit would never return.
            assert Call(lambda: everything(self.store)).result() == before
            assert everything(self.store) == before
            assert self.store.changes_since(cursor) == (*cursor, frozenset())
            assert not self.store.wait(2, 0.0)
        assert len(self.held()) == 2
        assert self.store.changes_since(cursor).usernames == frozenset({"alice"})

    def test_an_exception_undoes_everything(self) -> None:
        """An exception of the block is raised unchanged and undoes every write."""
        self.put("alice")
        self.add(self.restriction(), self.restriction("alice", "::7", expires_at=self.clock()))
        self.save(self.request())
        before, cursor = everything(self.store), self.cursor()
        with self.store.transaction() as tx:
            shown = look_ups(tx)
        for error in (Interrupted(), ValueError()):
            staged = [self.restriction(), self.restriction("alice", "::7")]  # replaces the other
            with raises(type(error)) as raised, self.store.transaction(staged=staged) as tx:
                assert tx.add_staged(per_user=10).added == 2
                assert len(tx.restrictions("alice")) == 3
                for restriction in tx.restrictions("alice"):
                    tx.remove_restriction(restriction.id)
                tx.add_restriction(self.restriction())
                for pending in tx.pending_requests("alice"):
                    tx.save_request(self.request(id=pending.id, label="changed"))
                tx.save_request(self.request())
                tx.set_failures("boss", 7)
                self.append(tx, frozenset({"alice"}))
                raise error
            assert raised.exception is error
        assert everything(self.store) == before
        assert not self.store.wait(cursor[0], 0.0)
        with self.store.transaction() as tx:
            assert look_ups(tx) == shown
        # The next transaction takes the revision that was undone.
        assert self.touch("alice") == cursor[0] + 1

    def test_transactions_do_not_nest(self) -> None:
        """A thread's second transaction of the same store raises RuntimeError, no deadlock."""
        other = self.another()
        with self.store.transaction() as tx:
            assert other.put_users([user("bob")]) == 1
            with raises(RuntimeError), self.store.transaction():
                raise AssertionError("two transactions at once")
            with raises(RuntimeError):
                self.store.put_users([user("bob")])
            with raises(RuntimeError):
                self.store.remove_users(["bob"])
            self.append(tx, frozenset({"alice"}))
        assert self.cursor()[0] == 1
        assert self.put("bob") == 2

    def test_a_writer_waits_for_the_one_before_it(self) -> None:
        """A transaction starts after the previous commit, and sees what it wrote."""
        entered = threading.Event()

        def later() -> tuple[int, int]:
            happens(entered)
            with self.store.transaction() as tx:
                seen = tx.failures("boss")
                return seen, self.append(tx)

        call = Call(later)
        with self.store.transaction() as tx:
            entered.set()
            assert not call.over(within=0.05), "two writers at once"
            tx.set_failures("boss", 1)
            self.append(tx)
        assert call.result() == (1, 2)

    def test_writers_lose_no_update_and_leave_no_gaps(self) -> None:
        """Threads that increment one number lose nothing; revisions are in commit order."""
        stores = [self.store, self.second() or self.store]
        threads, rounds = 6, 10

        def count(store: RestrictionStore) -> None:
            for _ in range(rounds):
                with store.transaction() as tx:
                    seen = tx.failures("boss")
                    tx.set_failures("boss", seen + 1)
                    assert self.append(tx, detail={"seen": str(seen)}) == seen + 1

        together(lambda s=stores[i % 2]: count(s) for i in range(threads))  # type: ignore[misc]
        total = threads * rounds
        found = self.store.history(EVERY, limit=total + 1)
        expected = [(n, {"seen": str(n - 1)}) for n in range(total, 0, -1)]
        assert [(change.revision, change.detail) for change in found] == expected

    def test_threads_may_share_the_store(self) -> None:
        """Threads that read and write at the same time get no errors and their own data."""

        def use(number: int) -> None:
            name = f"user{number}"
            self.store.put_users([user(name)])
            self.add(self.restriction(name))
            assert len(self.held(name)) == 1
            assert self.store.changes_since(None).head >= 2
            (line,) = self.store.overview(EVERY, search=name)
            assert line.user.username == name
            assert len(self.store.history(EVERY, username=name)) >= 1
            self.store.remove_users([name])
            assert not self.store.load_policy(name).known

        together(lambda n=n: use(n) for n in range(10, 22))  # type: ignore[misc]
        assert self.cursor()[0] == 12 * 3


class StagedTests(StoreCase):
    def _refused(
        self, kind: type[Any], staged: list[Restriction], per_user: int = 1000, **options: bool
    ) -> Any:
        """Fail unless all are refused and none is added, even if the transaction goes on."""
        before = {r.username: self.held(r.username) for r in staged}
        with self.store.transaction(staged=staged) as tx:
            with raises(kind) as raised:
                tx.add_staged(per_user=per_user, **options)
            self.append(tx)
        assert {name: self.held(name) for name in before} == before
        return raised.exception

    def test_staged_restrictions_are_added(self) -> None:
        """All staged restrictions are added with every field, and counted."""
        self.put("alice", "bob")
        old = self.restriction("alice")
        self.add(old)
        staged = [
            self.restriction(name, label=text, expires_at=self.clock() + timedelta(days=1))
            for text in TEXTS
            for name in ("alice", "bob")
        ]
        staged += [self.restriction("bob", addresses) for addresses in EXTREMES]
        assert self.add_staged(staged) == len(staged)
        assert self.held("alice") == (old, *(r for r in staged if r.username == "alice"))
        assert self.held("bob") == tuple(r for r in staged if r.username == "bob")
        with self.store.transaction() as tx:
            assert tx.restriction(staged[-1].id) == staged[-1]

    def test_earlier_writes_of_the_transaction_count(self) -> None:
        """Restrictions that the transaction added are checked like those committed before."""
        self.put("alice")
        staged = [self.restriction(addresses="203.0.113.7")]
        for per_user, addresses, kind in (
            (10, "203.0.113.7", errors.DuplicateRestriction),
            (1, "203.0.113.8", errors.TooManyRestrictions),
        ):
            with raises(Interrupted), self.store.transaction(staged=staged) as tx:
                tx.add_restriction(self.restriction(addresses=addresses))
                with raises(kind):
                    tx.add_staged(per_user=per_user)
                raise Interrupted
        assert self.add_staged(staged, per_user=1) == 1

    def test_staged_restrictions_last_for_one_transaction(self) -> None:
        """What a transaction does not add is discarded; without staged restrictions 0 are added."""
        self.put("alice")
        with self.store.transaction(staged=[self.restriction()]):
            pass
        with raises(Interrupted), self.store.transaction(staged=[self.restriction()]):
            raise Interrupted
        with self.store.transaction() as tx:
            assert tx.add_staged(per_user=10) == (0, 0, 0)
        assert self.held() == ()
        assert self.add_staged([]) == 0
        assert self.add_staged([self.restriction()]) == 1
        assert len(self.held()) == 1

    def test_an_unregistered_user_refuses_all(self) -> None:
        """A user that is unknown or removed is reported before duplicates, these before limits."""
        self.put("alice", "bob", "carol")
        self.store.remove_users(["carol"])
        same = [self.restriction("alice", "203.0.113.7") for _ in range(2)]
        many = [self.restriction("bob") for _ in range(3)]
        for name in ("carol", "nobody"):
            staged = [*many, *same, self.restriction(name)]
            assert self._refused(errors.UnknownUser, staged, per_user=2).username == name
        self._refused(errors.DuplicateRestriction, [*many, *same], per_user=2)
        self._refused(errors.TooManyRestrictions, many, per_user=2)

    def test_a_duplicate_refuses_all(self) -> None:
        """Addresses that a user already has, or that are staged twice, refuse all of them."""
        self.put("alice", "bob")
        self.add(self.restriction("alice", "203.0.113.0/24"))
        expired = self.restriction("bob", "2001:db8::/32", expires_at=self.clock())
        for name, text, duplicates in (
            ("alice", "203.0.113.0/24", [self.restriction("alice", "203.0.113.0/24")]),
            ("bob", "2001:db8::/32", [self.restriction("bob", "2001:db8::/32") for _ in "12"]),
            ("bob", "2001:db8::/32", [expired, self.restriction("bob", "2001:db8::/32")]),
        ):
            error = self._refused(errors.DuplicateRestriction, [self.restriction(), *duplicates])
            assert (error.username, error.addresses) == (name, text)
        near = [self.restriction("alice", t) for t in ("203.0.113.0/25", "203.0.113.0")]
        assert self.add_staged([*near, self.restriction("bob", "203.0.113.0/24")]) == 3

    def test_an_expired_duplicate_is_replaced(self) -> None:
        """An expired restriction to the same addresses is replaced; other expired ones stay."""
        self.put("alice")
        soon = self.clock() + timedelta(seconds=1)
        old = self.restriction("alice", "203.0.113.7", expires_at=soon)
        other = self.restriction("alice", "203.0.113.8", expires_at=soon)
        self.add(old, other)
        new = self.restriction("alice", "203.0.113.7", created_at=soon)
        self._refused(errors.DuplicateRestriction, [new])
        self.clock.advance(timedelta(seconds=1))
        assert self.add_staged([new]) == 1
        assert self.held() == (other, new)
        with self.store.transaction() as tx:
            assert tx.restriction(old.id) is None

    def test_the_limit_of_restrictions_per_user(self) -> None:
        """`per_user` counts expired restrictions too, but not those that are replaced."""
        self.put("alice", "bob")
        expired = self.restriction("alice", "203.0.113.7", expires_at=self.clock())
        self.add(expired, self.restriction(), self.restriction())
        bobs = self.restriction("bob")
        two = [self.restriction(), self.restriction()]
        error = self._refused(errors.TooManyRestrictions, [bobs, *two], per_user=4)
        assert (error.username, error.limit) == ("alice", 4)
        same = self.restriction("alice", "203.0.113.7")
        assert self.add_staged([bobs, two[0], same], per_user=4) == 3
        assert len(self.held()) == 4

    def test_a_list_that_is_replaced(self) -> None:
        """The rows are all that is left; equal ones stay as they are, and other users too."""
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        equal = self.restriction("alice", "203.0.113.7", label="office", expires_at=soon)
        labelled = self.restriction("alice", "203.0.113.8", label="office")
        longer = self.restriction("alice", "203.0.113.9", expires_at=soon)
        expired = self.restriction("alice", "::7", expires_at=self.clock(), label="office")
        others = self.restriction("bob", "203.0.113.7")
        self.add(equal, labelled, longer, expired, others, self.restriction("alice"))
        deletion = self.request(kind=RequestKind.DELETE, removes=(longer.id,), adds=(),
                                removed=(longer.addresses,))  # fmt: skip
        both = self.request(removes=(longer.id,), removed=(longer.addresses,))
        kept = self.request(kind=RequestKind.DELETE, removes=(equal.id,), adds=(),
                            removed=(equal.addresses,))  # fmt: skip
        self.save(deletion, both, kept)
        staged = [
            self.restriction("alice", "203.0.113.8", label="home"),
            self.restriction("alice", "203.0.113.7", label="office", expires_at=soon),
            self.restriction("alice", "203.0.113.9"),
            self.restriction("alice", "::7", expires_at=self.clock(), label="office"),
            self.restriction("alice", "10.0.0.0/8"),
        ]
        before = self.cursor()
        assert self.stage(staged, per_user=5, replace=True) == (4, 1, 4)
        new = [each for each in staged if each.addresses != equal.addresses]
        assert self.held() == (equal, *new)
        assert self.held("bob") == (others,)
        assert self.cursor()[0] == before[0] + 1
        with self.store.transaction() as tx:
            assert tx.pending_requests("alice") == (both.request, kept.request)
            cancelled = tx.request(deletion.request.id)
        assert cancelled is not None
        assert cancelled.request.state is RequestState.CANCELLED
        again = [attrs.evolve(each, id=f"again {each.id}") for each in staged if each is not new[2]]
        assert self.stage(again, per_user=1, replace=True) == (0, 4, 1)
        assert self.held() == (equal, *(each for each in new if each is not new[2]))

    def test_a_list_that_cannot_be_replaced(self) -> None:
        """Unknown users, rows that occur twice and too many rows refuse all; nothing ends."""
        self.put("alice", "bob")
        old = self.restriction("alice", "203.0.113.7")
        self.add(old, self.restriction("bob"))
        equal = self.restriction("alice", "203.0.113.7")
        more = [self.restriction("alice"), self.restriction("alice"), self.restriction("bob")]
        self._refused(errors.UnknownUser, [equal, self.restriction("nobody")], replace=True)
        self._refused(errors.DuplicateRestriction, [equal, equal], replace=True)
        error = self._refused(errors.TooManyRestrictions, [*more, equal], 2, replace=True)
        assert (error.username, error.limit) == ("alice", 2)
        assert self.stage([*more, equal], per_user=3, replace=True) == (3, 1, 1)
        with self.store.transaction(staged=[equal]) as tx:
            with raises(errors.InvalidValue):
                tx.add_staged(per_user=3, replace=True, skip_existing=True)
            self.append(tx)

    def test_rows_that_exist_are_skipped(self) -> None:
        """Addresses that a user has stay as they are; expired ones are replaced, others added."""
        self.put("alice", "bob")
        live = self.restriction("alice", "203.0.113.7", label="old")
        expired = self.restriction("alice", "203.0.113.8", expires_at=self.clock())
        self.add(live, expired)
        staged = [
            self.restriction("alice", "203.0.113.7", label="new"),
            self.restriction("alice", "203.0.113.8"),
            self.restriction("bob", "203.0.113.7"),
            self.restriction("alice", "203.0.113.9"),
        ]
        self._refused(errors.DuplicateRestriction, [*staged, staged[0]], skip_existing=True)
        self._refused(errors.UnknownUser, [self.restriction("x"), staged[0]], skip_existing=True)
        self._refused(errors.TooManyRestrictions, staged, 2, skip_existing=True)
        assert self.stage(staged, per_user=3, skip_existing=True) == (3, 1, 1)
        assert self.held() == (live, staged[1], staged[3])
        assert self.held("bob") == (staged[2],)
        again = [attrs.evolve(each, id=f"again {each.id}") for each in staged]
        # A user who has too many already is not refused for rows that are left out.
        assert self.stage(again, per_user=1, skip_existing=True) == (0, 4, 0)
        assert self.held() == (live, staged[1], staged[3])


class LifecycleTests(StoreCase):
    def test_a_closed_store_refuses_every_call(self) -> None:
        """After a `with` block or `close()`, `wait` ends and every call raises StoreUnavailable."""

        def wait() -> bool:
            with suppress(errors.StoreUnavailable):
                return store.wait(10**6, 3600.0)
            return False

        store = self.store
        waiting = Call(wait)
        with raises(ZeroDivisionError), store as entered:
            assert entered is store
            self.put("alice")
            raise ZeroDivisionError
        assert waiting.result() is False
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
            lambda: store.counts(EVERY),
            lambda: store.open_requests(EVERY, requested_by="boss"),
        ]
        store.close()
        for call in calls:
            with raises(errors.StoreUnavailable):
                call()
            with raises(errors.StoreUnavailable):
                Call(call).result()

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
        except errors.StoreUnavailable:
            self.store.close()
            return "refused"
        right = (policy.revision, len(policy.restrictions), head, entries) == (2, 1, 2, 2)
        return "right" if right else "wrong"
