"""Conformance, part 2: what guards follow."""

from __future__ import annotations

from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, RESET, Action, Policy, Touched
from ipguard.store import NAMED_AT_MOST
from ipguard.testing._base import Call, Hooks, user


class ChangeTests(Hooks):
    """What `changes_since`, `wait` and the policies promise."""

    def test_beginning_names_nobody(self) -> None:
        """`changes_since(None)` says where the store is, and names nobody whatever went before."""
        self.touch("alice")
        self.touch("bob")
        head, token, names = self.store.changes_since(None)
        assert (head, names) == (2, frozenset())
        assert self.store.changes_since((head, token)) == (head, token, frozenset())

    def test_names_those_touched_after_the_cursor(self) -> None:
        """The cursor's own row is not named again; all those after it are, each once."""
        cursors = [self.cursor()]
        for touched in (("alice",), ("bob", "carol"), (), ("alice", "dora")):
            self.touch(*touched)
            cursors.append(self.cursor())
        expected = [
            {"alice", "bob", "carol", "dora"},
            {"alice", "bob", "carol", "dora"},
            {"alice", "dora"},
            {"alice", "dora"},
            set(),
        ]
        for cursor, names in zip(cursors, expected, strict=True):
            assert self.store.changes_since(cursor) == (*cursors[-1], frozenset(names))

    def test_a_row_that_touches_nobody_names_nobody(self) -> None:
        """A wrong guess moves the revision on and names no user."""
        before = self.cursor()
        with self.store.transaction() as turn:
            turn.append(Action.WRONG_NUMBER, actor="boss", username="alice", account_id="A1")
        after = self.store.changes_since(before)
        assert (after.head, after.usernames) == (1, frozenset())

    def test_everybody_outweighs_names(self) -> None:
        """One row after the cursor that says everybody makes the answer everybody."""
        start = self.cursor()
        self.touch("alice")
        with self.store.transaction() as turn:
            self.note(turn, EVERYBODY)
        middle = self.cursor()
        self.touch("bob")
        assert self.store.changes_since(start) == (*self.cursor(), EVERYBODY)
        assert self.store.changes_since(middle).usernames == frozenset({"bob"})

    def test_as_many_as_may_be_named_are_named(self) -> None:
        """A row can name `NAMED_AT_MOST` users, in whatever letters."""
        names = frozenset(f"user {n} ünïcode 漢字 𐐨" for n in range(NAMED_AT_MOST))
        before = self.cursor()
        self.touch(*names)
        assert self.store.changes_since(before).usernames == names

    def test_a_history_that_is_not_there_is_a_reset(self) -> None:
        """A wrong token, a revision to come, one below 0: RESET, with the store's own head."""
        self._resets((0, "not the token"), (1, self.cursor()[1]), (-1, self.cursor()[1]))
        old = self.cursor()
        self.touch("alice")
        self.touch("bob")
        token = self.cursor()[1]
        self._resets((0, token), (1, token), (1, ""), (2, old[1]), (3, token), (10**15, token))
        assert self.store.changes_since(old).usernames == frozenset({"alice", "bob"})

    def _resets(self, *cursors: tuple[int, str]) -> None:
        for cursor in cursors:
            assert self.store.changes_since(cursor) == (*self.cursor(), RESET)

    def test_the_cursor_of_another_store_is_a_reset(self) -> None:
        """A guard that was moved to another store with as many revisions finds out."""
        other = self.another()
        for store in (self.store, other):
            self.touch("alice", store=store)
        assert other.changes_since(self.cursor()).usernames is RESET

    def test_wait_returns_at_once_for_what_is_there(self) -> None:
        """A change after the revision that touches somebody is reported without waiting."""
        self.touch("alice")
        assert Call(lambda: self.store.wait(0, 3600.0)).result() is True
        with self.store.transaction() as turn:
            self.note(turn, EVERYBODY)
        assert Call(lambda: self.store.wait(1, 3600.0)).result() is True

    def test_wait_gives_up(self) -> None:
        """Without such a change the answer is False when the time is over."""
        self.touch("alice")
        assert self.store.wait(1, 0.0) is False
        assert self.store.wait(1, 0.02) is False
        assert self.store.wait(2, 0.0) is False

    def test_wait_is_not_woken_by_what_touches_nobody(self) -> None:
        """A row that touches nobody is no reason for a guard to wake."""
        self.touch("alice")
        self.touch()
        assert self.store.wait(1, 0.02) is False
        assert self.store.wait(0, 0.0) is True

    def test_wait_is_woken_by_a_commit(self) -> None:
        """A commit on another thread, or through another handle, wakes who waits."""
        for store in (self.store, self.second() or self.store):
            head = self.cursor()[0]
            call = Call(lambda: self.store.wait(head, 3600.0))  # noqa: B023 - it ends before
            self.touch(store=store)
            self.touch("alice", store=store)
            assert call.result() is True

    def test_users_put_wake_who_waits(self) -> None:
        """A user put for the first time is a change of its policy."""
        call = Call(lambda: self.store.wait(0, 3600.0))
        self.put("alice")
        assert call.result() is True

    def test_policies_of_all_with_restrictions(self) -> None:
        """`load_all_policies` gives whoever has a restriction, as `load_policy` does, by name."""
        self.put("alice", "bob", "carol")
        self.add(self.restriction("bob"), self.restriction("alice"), self.restriction("bob"))
        self.store.remove_users(["bob"])
        revision, policies = self.store.load_all_policies()
        found = dict(policies)
        assert revision == 3
        assert found == {name: self.store.load_policy(name) for name in ("alice", "bob")}
        assert list(found) == ["alice", "bob"]
        assert found["alice"].known
        assert not found["bob"].known
        assert {policy.revision for policy in found.values()} == {3}

    def test_the_policies_are_of_one_snapshot(self) -> None:
        """The iterator goes on with its snapshot while others commit, and none of them wait."""
        names = [f"user{n:03d}" for n in range(300)]
        self.put(*names)
        self.add(*(self.restriction(name) for name in names))
        revision, policies = self.store.load_all_policies()
        first = next(policies)

        def change() -> None:
            self.add(*(self.restriction(name) for name in names))

        Call(change).result()
        found = dict([first, *policies])
        assert sorted(found) == names
        assert {(len(p.restrictions), p.revision) for p in found.values()} == {(1, revision)}
        assert len(self.held("user000")) == 2

    def test_the_policies_can_be_left_half_read(self) -> None:
        """A closed iterator holds nothing: the same thread reads and writes on."""
        self.put("alice", "bob")
        self.add(self.restriction("alice"), self.restriction("bob"))
        _, policies = self.store.load_all_policies()
        next(policies)
        policies.close()  # type: ignore[attr-defined]
        assert self.touch("alice") == 3
        assert self.store.load_policy("alice").revision == 3

    def test_a_user_without_restrictions_has_a_policy(self) -> None:
        """No restrictions is an answer, of the current revision, known or not."""
        self.put("alice")
        self.touch("somebody")
        assert self.store.load_policy("alice") == Policy(revision=2, restrictions=(), known=True)
        assert self.store.load_policy("nobody") == Policy(revision=2, restrictions=(), known=False)
        assert self.store.load_policy("x" * 256).known is False

    def test_restrictions_come_in_their_order(self) -> None:
        """The oldest is first; of one moment, the one with the lower id."""
        self.put("alice")
        moment = self.clock()
        late = self.restriction(id="a", created_at=moment.replace(microsecond=999_999))
        early = [self.restriction(id=text, created_at=moment) for text in ("d", "b", "c")]
        self.add(late, *early)
        ids = [r.id for r in self.held()]
        assert ids == ["b", "c", "d", "a"]
        with self.store.transaction() as turn:
            assert [r.id for r in turn.restrictions("alice")] == ids
        assert [r.id for r in self.store.overview(frozenset({"A1"})).items[0].restrictions] == ids

    def test_removing_a_restriction(self) -> None:
        """A restriction removed is gone everywhere; one that is not there is no error."""
        self.put("alice")
        kept, gone = self.restriction(), self.restriction()
        self.add(kept, gone)
        with self.store.transaction() as turn:
            turn.remove_restriction(gone.id)
            turn.remove_restriction("no such restriction")
            self.note(turn, frozenset({"alice"}))
        assert self.held() == (kept,)
        with self.store.transaction() as turn:
            assert turn.restriction(gone.id) is None
            assert turn.restriction(kept.id) == kept
            turn.remove_restriction(kept.id)
            self.note(turn, frozenset({"alice"}))
        assert self.held() == ()
        assert list(self.store.load_all_policies()[1]) == []
        with self.store.transaction() as turn:
            assert turn.restriction(kept.id) is None
            assert turn.restrictions("alice") == ()

    def test_many_restrictions_of_one_user(self) -> None:
        """A user may have thousands of restrictions, and every one of them counts."""
        self.store.put_users([user("alice"), user("bob")])
        runs = [
            AddressRange(version=6, first=n << 32, last=(n << 32) + n) for n in range(1, self.many)
        ]
        many = [self.restriction(addresses=run) for run in runs]
        with self.store.transaction(staged=iter(many)) as turn:
            assert turn.add_staged(per_user=self.many) == len(many)
            self.note(turn, frozenset({"alice"}))
        assert self.held() == tuple(many)
        (line,) = self.store.overview(frozenset({"A1"}), search=str(runs[-1]).partition("-")[0])
        assert line.restrictions == tuple(many)

    def test_touched_is_one_of_three(self) -> None:
        """Names come as a frozenset, so that a guard can keep them."""
        before = self.cursor()
        self.touch("alice")
        names = self.store.changes_since(before).usernames
        assert not isinstance(names, Touched)
        assert isinstance(names, frozenset)
