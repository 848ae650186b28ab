"""Conformance tests of what guards read: `changes_since`, `wait` and the policies."""

from __future__ import annotations

from datetime import timedelta

from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, RESET, Policy
from ipguard.row import pack
from ipguard.store import NAMED_AT_MOST, row_loader, rows_loader
from ipguard.testing._case import A1, EVERY, Call, StoreCase


class GuardReadTests(StoreCase):
    def test_changes_after_the_cursor_are_named(self) -> None:
        """Users touched after the cursor are named; those touched by its own entry are not."""
        cursors = [self.cursor()]
        for touched in (("alice",), ("bob", "carol"), (), ("alice", "dora")):
            self.touch(*touched)
            cursors.append(self.cursor())
        everyone = {"alice", "bob", "carol", "dora"}
        expected = [everyone, everyone, {"alice", "dora"}, {"alice", "dora"}, set()]
        for cursor, names in zip(cursors, expected, strict=True):
            found = self.store.changes_since(cursor)
            assert type(found.usernames) is frozenset
            assert found == (*cursors[-1], frozenset(names))
        many = frozenset(f"user {n} ünïcode 漢字 𐐨" for n in range(NAMED_AT_MOST))
        self.touch(*many)
        assert self.store.changes_since(cursors[-1]).usernames == many
        # Without a cursor only the head and its token are returned.
        assert self.store.changes_since(None) == (*self.cursor(), frozenset())

    def test_everybody_outweighs_names(self) -> None:
        """One entry after the cursor that touches EVERYBODY decides."""
        start = self.cursor()
        self.touch("alice")
        with self.store.transaction() as tx:
            self.append(tx, EVERYBODY)
        middle = self.cursor()
        self.touch("bob")
        assert self.store.changes_since(start) == (*self.cursor(), EVERYBODY)
        assert self.store.changes_since(middle).usernames == frozenset({"bob"})

    def test_an_unknown_cursor_is_a_reset(self) -> None:
        """A wrong token or a revision that does not exist returns RESET with the real head."""
        self._resets((0, "not the token"), (1, self.cursor()[1]), (-1, self.cursor()[1]))
        old = self.cursor()
        self.touch("alice")
        self.touch("bob")
        token = self.cursor()[1]
        self._resets((0, token), (1, token), (1, ""), (2, old[1]), (3, token), (10**15, token))
        assert self.store.changes_since(old).usernames == frozenset({"alice", "bob"})
        other = self.another()
        for name in ("alice", "bob"):
            self.touch(name, store=other)
        assert other.changes_since(self.cursor()).usernames is RESET

    def _resets(self, *cursors: tuple[int, str]) -> None:
        for cursor in cursors:
            assert self.store.changes_since(cursor) == (*self.cursor(), RESET)

    def test_wait(self) -> None:
        """It returns True at once for a change of a policy, and False after its timeout."""
        self.touch("alice")
        before = self.cursor()
        self.touch(username="alice", account_id="A1")  # touches no policy
        assert self.store.changes_since(before) == (*self.cursor(), frozenset())
        assert Call(lambda: self.store.wait(0, 3600.0)).result() is True
        for revision, timeout in ((1, 0.0), (1, 0.02), (2, 0.0)):
            assert self.store.wait(revision, timeout) is False
        with self.store.transaction() as tx:
            self.append(tx, EVERYBODY)
        assert Call(lambda: self.store.wait(1, 3600.0)).result() is True

    def test_a_commit_wakes_wait(self) -> None:
        """A commit by another thread or another handle, or a new user, ends the wait."""
        for store in (self.store, self.second() or self.store):
            head = self.cursor()[0]
            call = Call(lambda: self.store.wait(head, 3600.0))  # noqa: B023 - it ends in this round
            self.touch(store=store)
            self.touch("alice", store=store)
            assert call.result() is True
        head = self.cursor()[0]
        call = Call(lambda: self.store.wait(head, 3600.0))
        self.put("alice")
        assert call.result() is True

    def test_load_all_policies(self) -> None:
        """The policies of restricted users are sorted by name; the iterator may be closed early."""
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
        _, policies = self.store.load_all_policies()
        next(policies)
        policies.close()  # type: ignore[attr-defined]
        assert self.touch("alice") == 4
        assert self.store.load_policy("alice").revision == 4

    def test_packed_policies(self) -> None:
        """`load_row` and `load_all_rows`, if the store has them, pack the policies."""
        later = self.clock() + timedelta(days=1)
        self.put("alice", "bob", "carol")
        self.add(
            self.restriction("alice", "2001:db8::/32"),
            self.restriction("alice", expires_at=later),
            self.restriction("alice", "2001:db8::1", id="é"),
            self.restriction("alice", "198.51.100.0/24"),
            self.restriction("alice", "::1-::9", expires_at=later),
            self.restriction("bob", expires_at=later),
        )
        self.store.remove_users(["bob"])
        load, expected = row_loader(self.store), dict[str, bytes]()
        for name in ("alice", "bob", "carol", "nobody"):
            policy = self.store.load_policy(name)
            assert load(name) == (policy.revision, pack(policy))
            expected[name] = pack(policy)
        revision, rows = rows_loader(self.store)()
        found = dict(rows)
        assert revision == 3
        assert found == {name: expected[name] for name in ("alice", "bob")}
        _, rows = rows_loader(self.store)()
        next(rows)
        rows.close()  # type: ignore[attr-defined]
        assert self.touch("alice") == 4

    def test_all_policies_are_of_one_snapshot(self) -> None:
        """The iterator keeps its snapshot while others commit, and does not block them."""
        names = [f"user{n:03d}" for n in range(300)]
        self.put(*names)
        self.add(*(self.restriction(name) for name in names))
        revision, policies = self.store.load_all_policies()
        first = next(policies)
        Call(lambda: self.add(*(self.restriction(name) for name in names))).result()
        found = dict([first, *policies])
        assert sorted(found) == names
        assert {(len(p.restrictions), p.revision) for p in found.values()} == {(1, revision)}
        assert len(self.held("user000")) == 2

    def test_a_policy_is_of_one_snapshot(self) -> None:
        """A policy's revision fits its restrictions while another thread commits."""
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

    def test_the_policy_of_a_user_without_restrictions(self) -> None:
        """The policy has the current revision and says whether the user is registered."""
        self.put("alice")
        self.touch("somebody")
        assert self.store.load_policy("alice") == Policy(revision=2, restrictions=(), known=True)
        assert self.store.load_policy("nobody") == Policy(revision=2, restrictions=(), known=False)
        assert self.store.load_policy("x" * 256).known is False

    def test_the_order_of_restrictions(self) -> None:
        """Restrictions are ordered by creation time, then by id."""
        self.put("alice")
        moment = self.clock()
        late = self.restriction(id="a", created_at=moment.replace(microsecond=999_999))
        early = [self.restriction(id=text, created_at=moment) for text in ("d", "b", "c")]
        self.add(late, *early)
        ids = [r.id for r in self.held()]
        assert ids == ["b", "c", "d", "a"]
        with self.store.transaction() as tx:
            assert [r.id for r in tx.restrictions("alice")] == ids
        assert [r.id for r in self.store.overview(A1).items[0].restrictions] == ids

    def test_many_restrictions_of_one_user(self) -> None:
        """A user may have thousands of restrictions."""
        self.put("alice", "bob")
        ranges = [
            AddressRange(version=6, first=n << 32, last=(n << 32) + n) for n in range(1, self.many)
        ]
        many = [self.restriction(addresses=each) for each in ranges]
        assert self.add_staged(iter(many), per_user=self.many) == len(many)
        assert self.held() == tuple(many)
        (line,) = self.store.overview(A1, search=str(ranges[-1]).partition("-")[0])
        assert line.restrictions == tuple(many)
