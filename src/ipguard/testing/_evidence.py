"""Conformance tests of the record: earlier policies, the effect of an entry, the tokens."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise

import attrs

from ipguard.errors import InvalidValue, StoreError
from ipguard.model import EVERYBODY, Action, Page, Restriction
from ipguard.testing._case import EXTREMES, TEXTS, StoreCase, raises, user


class EvidenceTests(StoreCase):
    def test_a_policy_is_read_as_of_every_revision(self) -> None:
        """Each change of restrictions holds from its own revision on, and nothing is lost."""
        self.put("alice", "bob")
        expected: dict[int, set[Restriction]] = {self.cursor()[0]: set()}
        mine = self.restriction()
        expected[self.add(mine)] = {mine}
        other = self.restriction(addresses="2001:db8::/32", expires_at=self.clock())
        expected[self.add(other, self.restriction("bob"))] = {mine, other}
        with self.store.transaction() as tx:
            tx.remove_restriction(mine.id)
            expected[self.append(tx)] = {other}
            again = attrs.evolve(mine, label="again")
            tx.add_restriction(again)
            expected[self.append(tx)] = {other, again}
        self.clock.advance(timedelta(days=1))
        new = self.restriction(created_at=self.clock())
        self.stage([new], replace=True)
        expected[self.cursor()[0]] = {new}
        for revision in range(self.cursor()[0] + 1):
            held = expected.get(revision, set())
            policy = self.store.policy_at("alice", revision)
            assert policy.revision == revision
            assert policy.restrictions == tuple(sorted(held, key=lambda r: (r.created_at, r.id)))
            assert policy.known
        assert self.store.policy_at("alice", self.cursor()[0]) == self.store.load_policy("alice")
        assert not self.store.policy_at("nobody", 1).known

    def test_a_revision_that_the_store_does_not_have_is_refused(self) -> None:
        """A revision above the head, or below 0, has no policy."""
        self.put("alice")
        for revision in (-1, 2, 2**63):
            with raises(InvalidValue):
                self.store.policy_at("alice", revision)

    def test_every_field_of_an_ended_restriction_comes_back(self) -> None:
        """An ended restriction is kept exactly, and so is the one with the same addresses later."""
        self.put("alice")
        given = [
            *(self.restriction(addresses=addresses) for addresses in EXTREMES),
            *(self.restriction(label=text, expires_at=self.clock()) for text in TEXTS),
        ]
        revision = self.add(*given)
        self.stage([], replace=True)
        with self.store.transaction() as tx:
            for each in given:
                tx.remove_restriction(each.id)
            ended = self.append(tx)
        assert self.held() == ()
        assert self.store.policy_at("alice", revision).restrictions == tuple(given)
        assert self.store.policy_at("alice", ended).restrictions == ()
        assert not self.store.verify().damage

    def test_what_begins_and_ends_in_one_change_was_never_in_force(self) -> None:
        """It is in no policy, and the entry did nothing; between two entries it was in force."""
        self.put("alice")
        brief, shown = self.restriction(), self.restriction()
        with self.store.transaction() as tx:
            tx.add_restriction(brief)
            tx.remove_restriction(brief.id)
            first = self.append(tx)
            tx.add_restriction(shown)
            second = self.append(tx)
            tx.remove_restriction(shown.id)
            third = self.append(tx)
        policies = [self.store.policy_at("alice", r).restrictions for r in (first, second, third)]
        assert policies == [(), (shown,), ()]
        found = [self.store.restrictions_changed(r).items for r in (first, second, third)]
        assert found == [(), ((shown, True),), ((shown, False),)]
        assert not self.store.verify().damage

    def test_restrictions_changed_without_an_entry_are_refused(self) -> None:
        """Every change of restrictions belongs to an entry; without one, all is undone."""
        self.put("alice")
        kept = self.restriction()
        self.add(kept)
        for staged in (None, [self.restriction()]):
            with raises(StoreError), self.store.transaction(staged=staged) as tx:
                self.append(tx)
                tx.remove_restriction(kept.id)
            with raises(StoreError), self.store.transaction(staged=staged) as tx:
                self.append(tx)
                tx.add_restriction(self.restriction())
            with raises(StoreError), self.store.transaction(staged=staged or []) as tx:
                tx.add_restriction(self.restriction())
                tx.add_staged(per_user=10)
        with raises(StoreError), self.store.transaction(staged=[self.restriction()]) as tx:
            tx.add_staged(per_user=10)
        with self.store.transaction(staged=[self.restriction()]) as tx:
            self.append(tx)  # staged restrictions that are not added are not written
        assert self.held() == (kept,)
        assert self.cursor()[0] == 3

    def test_an_import_is_in_the_record(self) -> None:
        """Each restriction that it added and ended is named, in pages, by id."""
        names = [f"user{n:05d}" for n in range(self.many)]
        self.put(*names)
        old = [self.restriction(name) for name in names]
        new = [self.restriction(name) for name in names]
        first = self.cursor()[0] + 1
        assert self.stage(old, per_user=1).added == self.many
        assert self.stage(new, per_user=1, replace=True).ended == self.many
        whole = self.store.restrictions_changed(first, limit=self.many)
        assert whole == Page(items=tuple((each, True) for each in old), next=None)
        found: list[tuple[Restriction, bool]] = []
        after: str | None = None
        while True:
            page = self.store.restrictions_changed(first + 1, after=after, limit=self.many // 3)
            assert len(page.items) <= self.many // 3
            found += page.items
            after = page.next
            if after is None:
                break
        assert found == [*((each, False) for each in old), *((each, True) for each in new)]
        with raises(InvalidValue):
            self.store.restrictions_changed(first, limit=0)
        for name, was, is_now in ((names[0], old[0], new[0]), (names[-1], old[-1], new[-1])):
            assert self.store.policy_at(name, first - 1).restrictions == ()
            assert self.store.policy_at(name, first).restrictions == (was,)
            assert self.store.policy_at(name, first + 1).restrictions == (is_now,)
        assert not self.store.verify().damage

    def test_an_import_that_keeps_rows_is_in_the_record(self) -> None:
        """Rows that are skipped, kept or written late begin with the change that added them."""
        self.put("alice", "bob")
        kept = self.restriction(addresses="203.0.113.7")
        expired = self.restriction(addresses="203.0.113.8", expires_at=self.clock())
        self.add(kept, expired)
        rows = [
            self.restriction(addresses="203.0.113.7"),
            self.restriction(addresses="203.0.113.8"),
            self.restriction("bob"),
        ]
        assert self.stage(rows, skip_existing=True) == (2, 1, 1)
        revision = self.cursor()[0]
        changed = [(expired, False), (rows[1], True), (rows[2], True)]
        assert list(self.store.restrictions_changed(revision).items) == changed
        assert self.stage([attrs.evolve(rows[1], id="new")], replace=True) == (0, 1, 1)
        assert self.store.restrictions_changed(revision + 1).items == ((kept, False),)
        assert not self.store.verify().damage

    def test_a_rename_moves_restrictions_with_its_own_entry(self) -> None:
        """Of users renamed at once, each entry has the restrictions of its own user."""
        self.store.put_users([user(name, uid=name) for name in ("a", "b", "c")])
        held = {name: self.restriction(name) for name in ("a", "b", "c")}
        before = self.add(*held.values())
        found = self.store.sync_users([user("b", uid="a"), user("a", uid="b"), user("c2", uid="c")])
        assert found.renamed == 3
        names = {"a": "b", "b": "a", "c": "c2"}
        entries = {}
        for revision in range(before + 1, self.cursor()[0] + 1):
            changed = self.store.restrictions_changed(revision).items
            if changed:
                (was, began), (moved, begins) = changed
                assert (began, begins) == (False, True)
                entries[was.username] = moved
        assert entries == {old: attrs.evolve(held[old], username=new) for old, new in names.items()}
        for old, new in names.items():
            assert self.store.policy_at(old, before).restrictions == (held[old],)
            assert self.held(new) == (attrs.evolve(held[old], username=new),)
            assert self.store.policy_at(new, self.cursor()[0]) == self.store.load_policy(new)
        self.store.rename_user("c2", "c3")
        page = self.store.restrictions_changed(self.cursor()[0], limit=1)
        assert page.items == (
            (attrs.evolve(held["c"], username="c2"), False),
            (attrs.evolve(held["c"], username="c3"), True),
        )
        assert page.next is None
        assert not self.store.verify().damage

    def test_many_renames_are_in_the_record(self) -> None:
        """However many users are renamed in one change, each entry moves its own restrictions."""
        names = [f"old{n:05d}" for n in range(self.many)]
        self.store.put_users([user(name, uid=name) for name in names])
        self.add_staged([self.restriction(name) for name in names])
        before = self.cursor()[0]
        self.store.sync_users([user(f"new{name}", uid=name) for name in names])
        moved: set[tuple[str, bool, int]] = set()
        for revision in range(before + 1, self.cursor()[0] + 1):
            changed = self.store.restrictions_changed(revision).items
            moved |= {(each.username, added, revision) for each, added in changed}
        assert len(moved) == 2 * self.many
        assert {name for name, added, _ in moved if not added} == set(names)
        last = names[-1]
        (ended,) = (revision for name, _, revision in moved if name == last)
        assert len(self.store.policy_at(last, ended - 1).restrictions) == 1
        assert self.store.policy_at(last, ended).restrictions == ()
        assert len(self.store.policy_at(f"new{last}", ended).restrictions) == 1
        assert self.store.policy_at(f"new{last}", ended - 1).restrictions == ()
        assert not self.store.verify().damage

    def test_the_revision_at_a_time(self) -> None:
        """If the clock was set back, entries count in the order of their times."""
        assert self.store.revision_at(self.clock()) == 0
        times = []
        for _ in range(3):
            self.clock.advance(timedelta(minutes=1))
            times.append(self.clock())
            with self.store.transaction() as tx:
                self.append(tx)
                self.append(tx)
        tick = timedelta(microseconds=1)
        assert [self.store.revision_at(at) for at in times] == [2, 4, 6]
        assert [self.store.revision_at(at - tick) for at in times] == [0, 2, 4]
        assert self.store.revision_at(times[-1] + timedelta(days=1)) == 6
        self.clock.set(self.clock() - timedelta(seconds=30))
        assert self.touch("alice") == 7
        assert self.store.revision_at(times[-1]) == 6
        assert self.store.revision_at(times[-1] - tick) == 7

    def test_the_last_change_of_each_user(self) -> None:
        """It is the last entry that names the user and touches a policy."""
        self.put("alice")
        self.touch("alice", username="alice")
        mine = self.touch("alice", username="alice", detail={"direction": "opens"})
        his = self.touch("bob", username="bob")
        with self.store.transaction() as tx:
            self.append(tx, username="alice")  # touches no policy
            self.append(tx, EVERYBODY)  # names no user
        found = self.store.last_changes(["alice", "bob", "nobody"])
        assert {name: change.revision for name, change in found.items()} == {
            "alice": mine,
            "bob": his,
        }
        assert found["alice"].detail == {"direction": "opens"}
        assert self.store.last_changes([]) == {}
        many = [f"user{n}" for n in range(998)]
        assert set(self.store.last_changes([*many, "bob", "alice"])) == {"alice", "bob"}

    def test_a_username_may_pass_to_another_user(self) -> None:
        """It may by an entry that touches the username and does not name it."""
        quoted = "o'neil"
        self.put("alice", "bob", quoted)
        first = self.cursor()[0]
        assert self.store.passed_on("alice", 0)
        assert self.store.passed_on(quoted, 0)
        assert not self.store.passed_on("ali", 0)
        self.put("carol")  # an entry that names her
        self.touch("alice", username="alice")
        self.touch("alice")  # not of a user
        for name in ("alice", "bob", "carol", quoted):
            assert not self.store.passed_on(name, first)
        renamed = self.store.rename_user("alice", "alicia")
        assert self.store.passed_on("alice", renamed - 1)
        assert not self.store.passed_on("alice", renamed)
        assert not self.store.passed_on("alicia", first)
        removed = self.store.remove_users(["bob", quoted])
        assert self.store.passed_on("bob", removed - 1)
        assert not self.store.passed_on("bob", 2**63)
        assert not self.store.passed_on("\ud800", first)
        with self.store.transaction() as tx:
            tx.append(Action.PUT_USERS, actor=None, touches=EVERYBODY)
        assert self.store.passed_on("carol", removed)
        with raises(InvalidValue):
            self.store.passed_on("alice", -1)

    def test_every_token_continues_the_one_before(self) -> None:
        """The chain is whole, and covers entries with every kind of value."""
        self.put("alice")
        for text in TEXTS:
            with self.store.transaction() as tx:
                tx.append(
                    Action.IMPOSE,
                    actor="bøss",
                    actor_address="2001:db8::1",
                    username="söhne",
                    account_id="Übersee",
                    detail={"reason": text},
                    touches=EVERYBODY,
                )
                tx.append(Action.UNLOCK, actor=None)
        self.add(self.restriction(), self.restriction(label="Ω漢字"))
        revision, token = self.cursor()
        found = self.store.verify()
        assert found.damage == ()
        assert (found.first, found.head, found.entries) == (1, revision, revision)
        assert (found.restrictions, found.uncovered) == (2, 0)
        assert token in (found.token, f"{found.token}:{token.partition(':')[2]}")
        assert len(found.token) == 64

    def test_a_new_store_is_verified(self) -> None:
        """A store without an entry has nothing that could be wrong."""
        found = self.store.verify()
        assert (found.head, found.entries, found.damage) == (0, 0, ())
        assert self.store.verify(expect=(0, found.token)).damage == ()

    def test_an_entry_that_was_noted_is_expected(self) -> None:
        """Another token, or an entry that is not there, is damage: it was noted outside."""
        noted = []
        for _ in range(3):
            self.touch("alice")
            found = self.store.verify()
            noted.append((found.head, found.token))
        for expect in noted:
            assert self.store.verify(expect=expect).damage == ()
        for (revision, _), (_, other) in pairwise(noted):
            (damage,) = self.store.verify(expect=(revision, other)).damage
            assert damage.revision == revision
        for revision in (4, -1, 2**70):
            (damage,) = self.store.verify(expect=(revision, noted[0][1])).damage
            assert damage.revision == revision
