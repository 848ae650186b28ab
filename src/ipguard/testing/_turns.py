"""Conformance, part 1: one writer at a time, one order, whole or not at all."""

from __future__ import annotations

import threading
from datetime import timedelta

from ipguard.model import Action, Actor, Change, Policy
from ipguard.store import RestrictionStore
from ipguard.testing._base import Call, Hooks, Interrupted, happens, raises, together, user

EVERY = Actor.EVERY_ACCOUNT


class TurnTests(Hooks):
    """What `transaction()` and `append` promise."""

    def test_a_new_store_is_empty_at_revision_0(self) -> None:
        """An empty store is at revision 0, which has a token, and knows nobody."""
        head, token, names = self.store.changes_since(None)
        assert (head, names) == (0, frozenset())
        assert isinstance(token, str)
        assert token
        assert self.store.load_policy("alice") == Policy(revision=0, restrictions=(), known=False)
        revision, policies = self.store.load_all_policies()
        assert (revision, list(policies)) == (0, [])
        assert self.store.overview(EVERY).items == ()
        assert self.store.history(EVERY).items == ()

    def test_the_token_of_revision_0_is_random(self) -> None:
        """Two empty stores differ in the token of revision 0."""
        other = self.another().changes_since(None)
        assert self.cursor()[1] != other.token

    def test_every_revision_has_a_token_of_its_own(self) -> None:
        """Tokens are random: no two rows have the same."""
        tokens = {self.cursor()[1]}
        for _ in range(20):
            self.touch("alice")
            tokens.add(self.cursor()[1])
        assert len(tokens) == 21

    def test_append_returns_the_row_that_history_shows(self) -> None:
        """`append` returns the change under the next revision, at the turn's time, in full."""
        with self.store.transaction() as turn:
            first = turn.append(
                Action.WRONG_NUMBER,
                actor="boss",
                actor_address="2001:db8::1",
                username="alice",
                account_id="A1",
                detail={"request": "q1", "note": "two words"},
            )
            second = turn.append(Action.PUT_USERS, actor=None)
        assert first == Change(
            revision=1,
            at=self.clock(),
            actor="boss",
            actor_address="2001:db8::1",
            action=Action.WRONG_NUMBER,
            username="alice",
            account_id="A1",
            detail={"request": "q1", "note": "two words"},
        )
        assert second == Change(
            revision=2,
            at=self.clock(),
            actor=None,
            actor_address=None,
            action=Action.PUT_USERS,
            username=None,
            account_id=None,
            detail={},
        )
        assert self.store.history(EVERY).items == (second, first)

    def test_every_action_can_be_told_again(self) -> None:
        """Each action comes back as itself."""
        with self.store.transaction() as turn:
            for action in Action:
                turn.append(action, actor="boss")
        told = [change.action for change in self.store.history(EVERY)]
        assert told[::-1] == list(Action)
        assert all(isinstance(action, Action) for action in told)

    def test_time_stands_still_in_a_turn(self) -> None:
        """`now` and the rows' `at` are when the lock was taken, all through the turn."""
        before = self.clock()
        with self.store.transaction() as turn:
            assert turn.now == before
            self.clock.advance(timedelta(seconds=3))
            assert turn.now == before
            self.note(turn)
        assert self.store.history(EVERY).items[0].at == before
        assert self.store.now() == before + timedelta(seconds=3)
        with self.store.transaction() as turn:
            assert turn.now == self.clock()

    def test_a_turn_sees_its_own_writes(self) -> None:
        """Inside the block, what was written is there."""
        restriction, request = self.restriction(), self.request()
        self.put("alice")
        with self.store.transaction() as turn:
            turn.add_restriction(restriction)
            turn.save_request(request)
            turn.set_failures("boss", 3)
            self.note(turn)
            assert turn.restriction(restriction.id) == restriction
            assert turn.restrictions("alice") == (restriction,)
            assert turn.request(request.request.id) == request
            assert turn.pending_requests("alice") == (request.request,)
            assert turn.request_times("boss", self.clock() - timedelta(1)) == (self.clock(),)
            assert turn.failures("boss") == 3
            turn.remove_restriction(restriction.id)
            assert turn.restriction(restriction.id) is None
            assert turn.restrictions("alice") == ()

    def test_nobody_else_sees_or_waits_for_an_open_turn(self) -> None:
        """Before the commit every read answers at once, with the state before the turn."""
        self.put("alice")
        kept = self.restriction(addresses="203.0.113.7")
        self.add(kept)
        cursor = self.cursor()
        with self.store.transaction() as turn:
            turn.add_restriction(self.restriction(addresses="203.0.113.8"))
            turn.save_request(self.request())
            self.note(turn, frozenset({"alice"}))
            # If it waits for this turn to end it never returns, on this thread as on another.
            Call(lambda: self._is_as_before(kept, cursor)).result()
            self._is_as_before(kept, cursor)
        assert len(self.held()) == 2
        assert self.store.changes_since(cursor).usernames == frozenset({"alice"})

    def _is_as_before(self, kept: object, cursor: tuple[int, str]) -> None:
        revision, policies = self.store.load_all_policies()
        assert revision == 2
        assert [policy.restrictions for _, policy in policies] == [(kept,)]
        assert self.store.load_policy("alice").restrictions == (kept,)
        assert self.store.load_policy("alice").revision == 2
        assert self.store.changes_since(None)[:2] == cursor
        assert self.store.changes_since(cursor) == (*cursor, frozenset())
        assert not self.store.wait(2, 0.0)
        (line,) = self.store.overview(EVERY)
        assert (line.restrictions, line.pending) == ((kept,), ())
        assert self.store.overview(EVERY, search="203.0.113.8").items == ()
        assert len(self.store.history(EVERY)) == 2

    def _write_everything(self) -> None:
        with self.store.transaction(staged=[self.restriction(), self.restriction()]) as turn:
            for restriction in turn.restrictions("alice"):
                turn.remove_restriction(restriction.id)
            turn.add_restriction(self.restriction())
            assert turn.add_staged(per_user=10) == 2
            for pending in turn.pending_requests("alice"):
                turn.save_request(self.request(id=pending.id, label="changed"))
            turn.save_request(self.request())
            turn.set_failures("boss", 7)
            self.note(turn, frozenset({"alice"}))
            raise Interrupted

    def test_an_exception_undoes_everything(self) -> None:
        """What leaves the block as an exception, KeyboardInterrupt included, leaves no trace."""
        self.put("alice")
        restriction, request = self.restriction(), self.request()
        self.add(restriction)
        self.save(request)
        cursor = self.cursor()
        rows = self.store.history(EVERY)
        with raises(Interrupted):
            self._write_everything()
        assert self.store.changes_since(cursor) == (*cursor, frozenset())
        assert self.store.history(EVERY) == rows
        assert self.held() == (restriction,)
        assert not self.store.wait(cursor[0], 0.0)
        with self.store.transaction() as turn:
            assert turn.restrictions("alice") == (restriction,)
            assert turn.pending_requests("alice") == (request.request,)
            assert turn.request_times("boss", self.clock() - timedelta(1)) == (self.clock(),)
            assert turn.failures("boss") == 0

    def test_the_callers_exception_comes_out_as_it_is(self) -> None:
        """The store wraps or swallows nothing that the block raises."""
        error = ValueError("of the caller")
        with raises(ValueError) as raised, self.store.transaction():
            raise error
        assert raised.value is error

    def test_an_undone_turn_leaves_no_gap(self) -> None:
        """The revision that an exception undid is the next one's."""
        self.touch("alice")
        with raises(ZeroDivisionError), self.store.transaction() as turn:
            self.note(turn)
            raise ZeroDivisionError
        assert self.touch("alice") == 2
        assert [change.revision for change in self.store.history(EVERY)] == [2, 1]

    def test_a_turn_that_only_reads_is_no_change(self) -> None:
        """A block that writes nothing takes no revision."""
        before = self.cursor()
        with self.store.transaction() as turn:
            assert turn.user("alice") is None
        assert self.cursor() == before

    def test_turns_do_not_nest(self) -> None:
        """A thread that begins a second turn inside its first gets RuntimeError, not a deadlock."""
        with self.store.transaction() as turn:
            with raises(RuntimeError), self.store.transaction():
                raise AssertionError("two turns at once")
            with raises(RuntimeError):
                self.store.put_users([user("bob")])
            with raises(RuntimeError):
                self.store.remove_users(["bob"])
            self.note(turn, frozenset({"alice"}))
        assert self.cursor()[0] == 1
        assert self.put("bob") == 2

    def test_two_stores_are_two(self) -> None:
        """A turn in one store is no turn in another, not even on one thread."""
        other = self.another()
        with self.store.transaction() as turn:
            self.note(turn)
            assert other.put_users([user("bob")]) == 1
        assert self.store.load_policy("bob").known is False

    def test_a_waiting_writer_sees_what_the_one_before_wrote(self) -> None:
        """The next turn begins with all that the turn before it committed."""
        entered = threading.Event()

        def later() -> tuple[int, int]:
            happens(entered)
            with self.store.transaction() as turn:
                seen = turn.failures("boss")
                return seen, self.note(turn)

        call = Call(later)
        with self.store.transaction() as turn:
            entered.set()
            assert not call.over(within=0.05), "two writers at once, or one that does not wait"
            turn.set_failures("boss", 1)
            self.note(turn)
        assert call.result() == (1, 2)

    def test_writers_lose_nothing_and_leave_no_gaps(self) -> None:
        """Threads that count up one number lose no count, and revisions are the commits' order."""
        stores = [self.store, self.second() or self.store]
        threads, rounds = 6, 10

        def count(store: RestrictionStore) -> None:
            for _ in range(rounds):
                with store.transaction() as turn:
                    seen = turn.failures("boss")
                    turn.set_failures("boss", seen + 1)
                    assert self.note(turn, detail={"seen": str(seen)}) == seen + 1

        together(lambda s=stores[i % 2]: count(s) for i in range(threads))  # type: ignore[misc]
        rows = self.store.history(EVERY, limit=threads * rounds + 1).items
        total = threads * rounds
        assert [row.revision for row in rows] == list(range(total, 0, -1))
        assert [row.detail for row in rows] == [{"seen": str(n)} for n in range(total - 1, -1, -1)]

    def test_a_policy_is_of_one_snapshot(self) -> None:
        """A policy's revision is that of its restrictions, whatever is committed meanwhile."""
        self.put("alice", "bob")

        def write() -> None:
            for _ in range(30):
                self.add(self.restriction("alice"), self.restriction("bob"))

        writer = Call(write)
        for _ in range(60):
            policy = self.store.load_policy("alice")
            assert len(policy.restrictions) == policy.revision - 1
            revision, policies = self.store.load_all_policies()
            counts = {name: len(policy.restrictions) for name, policy in policies}
            assert counts == ({"alice": revision - 1, "bob": revision - 1} if counts else {})
            assert bool(counts) == (revision > 1)
            (line, _) = self.store.overview(EVERY)
            seen = len(line.restrictions)
            assert seen <= self.store.load_policy("alice").revision - 1
        writer.result()
        assert len(self.held()) == 30

    def test_every_thread_may_use_the_store(self) -> None:
        """Many threads that read and write at once meet no error but the order of turns."""
        self.put("alice")

        def use(number: int) -> None:
            name = f"user{number}"
            self.store.put_users([user(name)])
            self.add(self.restriction(name))
            assert len(self.store.load_policy(name).restrictions) == 1
            assert self.store.changes_since(None).head >= 2
            assert [line.user.username for line in self.store.overview(EVERY, search=name)] == [
                name
            ]
            assert len(self.store.history(EVERY, username=name)) >= 1
            self.store.remove_users([name])
            assert not self.store.load_policy(name).known

        together(lambda n=n: use(n) for n in range(10, 22))  # type: ignore[misc]
        assert self.cursor()[0] == 1 + 12 * 3
