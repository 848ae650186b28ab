"""Conformance, part 5: users put and removed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import attrs

from ipguard.errors import UsernameError
from ipguard.model import EVERYBODY, Action, Actor, Change, RequestState, StoredUser, User
from ipguard.store import NAMED_AT_MOST
from ipguard.testing._base import Call, Hooks, Interrupted, logged, raises, user

EVERY = Actor.EVERY_ACCOUNT


class UserTests(Hooks):
    """What `put_users` and `remove_users` promise."""

    def _user(self, name: str) -> StoredUser | None:
        with self.store.transaction() as turn:
            return turn.user(name)

    def _last(self) -> Change:
        return self.store.history(EVERY, limit=1).items[0]

    def test_a_user_comes_back_as_it_was_put(self) -> None:
        """Every field of a user is kept, and the user is known from then on."""
        users = [
            User(username="alice", full_name="Alice Ångström", account_id="A 1"),
            User(username="o'brien", full_name="", account_id="a1", email="o@example.com"),
            User(username="漢" * 256, full_name="\U0001f3e2" * 256, account_id="Ω" * 256),
        ]
        assert self.store.put_users(iter(users)) == 1
        for each in users:
            assert self._user(each.username) == StoredUser(user=each)
            assert self.store.load_policy(each.username).known

    def test_the_row_of_one_user(self) -> None:
        """Putting one user is one change by the host that names the user and its account."""
        self.put("alice", account_id="A7")
        assert self._last() == Change(
            revision=1,
            at=self.clock(),
            actor=None,
            actor_address=None,
            action=Action.PUT_USERS,
            username="alice",
            detail={"added": "1", "updated": "0"},
            account_id="A7",
        )

    def test_the_row_of_several_users(self) -> None:
        """Putting several is one change that names nobody, and counts."""
        self.put("alice")
        self.store.put_users([user("alice", full_name="New"), user("bob"), user("carol")])
        row = self._last()
        assert (row.revision, row.username, row.account_id) == (2, None, None)
        assert row.detail == {"added": "2", "updated": "1"}

    def test_what_is_already_so_appends_nothing(self) -> None:
        """Users as they are, or no users, change no revision."""
        assert self.store.put_users([]) == 0
        self.put("alice", "bob")
        before = self.cursor()
        assert self.put("bob", "alice", "alice") == 1
        assert self.store.put_users(iter(())) == 1
        assert self.store.remove_users([]) == 1
        assert self.cursor() == before

    def test_one_change_among_many_the_same_names_its_user(self) -> None:
        """Users that are already so are not concerned."""
        self.put("alice", "bob", "carol")
        self.store.put_users([user("alice"), user("bob", account_id="B2"), user("carol")])
        row = self._last()
        assert (row.username, row.account_id, row.detail) == (
            "bob",
            "B2",
            {"added": "0", "updated": "1"},
        )

    def test_each_field_can_be_changed(self) -> None:
        """A new name, account or e-mail is kept, and decides about no login."""
        self.put("alice")
        for fields in (
            {"full_name": "Another"},
            {"account_id": "B2"},
            {"email": "new@example.com"},
            {"email": None},
            {"full_name": "another"},
        ):
            before = self.cursor()
            changed = user("alice", **fields)
            assert self.store.put_users([changed]) == before[0] + 1
            assert self._user("alice") == StoredUser(user=changed)
            assert self.store.changes_since(before).usernames == frozenset()
            assert not self.store.wait(before[0], 0.0)

    def test_a_new_user_touches_its_policy(self) -> None:
        """Those who are known from now on are named to guards, and no others."""
        self.put("alice")
        before = self.cursor()
        self.store.put_users([user("alice", full_name="New"), user("bob"), user("carol")])
        assert self.store.changes_since(before).usernames == frozenset({"bob", "carol"})

    def test_many_new_users_touch_everybody(self) -> None:
        """Up to `NAMED_AT_MOST` users are named, more are everybody; so with users removed."""
        few = [f"few{n}" for n in range(NAMED_AT_MOST)]
        many = [f"many{n}" for n in range(NAMED_AT_MOST + 1)]
        cursors = [self.cursor()]
        self.put(*few)
        cursors.append(self.cursor())
        assert self.store.changes_since(cursors[0]).usernames == frozenset(few)
        assert self.put(*few, *many) == 2
        assert self.store.changes_since(cursors[1]).usernames is EVERYBODY
        cursors.append(self.cursor())
        assert self.store.remove_users(few) == 3
        assert self.store.changes_since(cursors[2]).usernames == frozenset(few)
        assert self.store.remove_users([*few, *many]) == 4
        assert self.store.changes_since(cursors[2]).usernames is EVERYBODY

    def test_many_updates_touch_nobody(self) -> None:
        """However many names change, no login is decided otherwise."""
        names = [f"user{n}" for n in range(NAMED_AT_MOST + 1)]
        self.put(*names)
        before = self.cursor()
        self.put(*names, full_name="Renamed")
        assert self.store.changes_since(before).usernames == frozenset()

    def test_the_last_of_several_counts(self) -> None:
        """One username twice in a call is one user, as it was given last."""
        self.store.put_users([user("Alice", full_name="First"), user("alice", full_name="Last")])
        stored = self._user("alice")
        assert stored is not None
        assert stored.user.full_name == "Last"
        assert self._last().detail == {"added": "1", "updated": "0"}
        assert self.store.put_users([user("alice", full_name="x"), stored.user]) == 1

    def test_removing_a_user(self) -> None:
        """A removed user is not known, but its record and its restrictions stay."""
        self.put("alice", "bob")
        restriction = self.restriction()
        self.add(restriction)
        before = self.cursor()
        assert self.store.remove_users(["ALICE", "nobody"]) == 3
        assert self._user("alice") == StoredUser(user=user("alice"), removed=True)
        assert self._user("bob") == StoredUser(user=user("bob"))
        policy = self.store.load_policy("alice")
        assert (policy.known, policy.restrictions) == (False, (restriction,))
        assert self.store.changes_since(before).usernames == frozenset({"alice"})
        row = self._last()
        assert (row.action, row.actor) == (Action.REMOVE_USERS, None)
        assert (row.username, row.account_id, row.detail) == ("alice", "A1", {"removed": "1"})

    def test_removing_nobody_appends_nothing(self) -> None:
        """Those who are not registered, or no longer, are passed over."""
        self.put("alice", "bob")
        self.store.remove_users(["alice"])
        before = self.cursor()
        assert self.store.remove_users(iter(["alice", "nobody"])) == 2
        assert self.cursor() == before

    def test_removing_several_is_one_change(self) -> None:
        """The row of several removed users names nobody, and counts each once."""
        self.put("alice", "bob", "carol")
        assert self.store.remove_users(["alice", "bob", "Alice"]) == 2
        row = self._last()
        assert (row.username, row.account_id, row.detail) == (None, None, {"removed": "2"})

    def test_a_removed_users_requests_are_cancelled(self) -> None:
        """Its pending requests are cancelled, late ones too; what is closed stays as it was."""
        self.put("alice", "bob")
        live, late = self.request(), self.request(expires_at=self.clock())
        done = self.request(state=RequestState.CONFIRMED)
        bobs = self.request("bob")
        self.save(live, late, done, bobs)
        self.store.remove_users(["alice"])
        with self.store.transaction() as turn:
            for stored in (live, late):
                cancelled = attrs.evolve(stored.request, state=RequestState.CANCELLED)
                assert turn.request(stored.request.id) == attrs.evolve(stored, request=cancelled)
            assert turn.request(done.request.id) == done
            assert turn.request(bobs.request.id) == bobs
            assert turn.pending_requests("alice") == ()
            assert turn.pending_requests("bob") == (bobs.request,)
            assert len(turn.request_times("boss", self.clock() - timedelta(1))) == 4

    def test_the_name_registered_again_inherits(self) -> None:
        """Who is put again is known again, under the restrictions that went on holding."""
        self.put("alice")
        restriction = self.restriction()
        self.add(restriction)
        self.store.remove_users(["alice"])
        before = self.cursor()
        assert self.put("alice", account_id="B2") == 4
        policy = self.store.load_policy("alice")
        assert (policy.known, policy.restrictions) == (True, (restriction,))
        assert self.store.changes_since(before).usernames == frozenset({"alice"})
        assert self._user("alice") == StoredUser(user=user("alice", account_id="B2"))
        assert self._last().detail == {"added": "1", "updated": "0"}
        self.store.remove_users(["alice"])
        assert self.put("alice", account_id="B2") == 6

    def test_one_text_is_not_several_usernames(self) -> None:
        """A str given for the usernames is refused, or its characters would be users to remove."""
        self.store.put_users([user("j"), user("s")])
        with raises(TypeError):
            self.store.remove_users("js")
        assert [self.store.load_policy(name).known for name in ("j", "s")] == [True, True]

    def test_a_name_without_canonical_form_removes_nobody(self) -> None:
        """A username that cannot be one is an error, and nothing is changed."""
        self.put("alice")
        with raises(UsernameError):
            self.store.remove_users(["alice", " not a name "])
        assert self.store.load_policy("alice").known
        assert self.cursor()[0] == 1

    def test_a_source_that_raises_changes_nothing(self) -> None:
        """What the iterable raises comes out, and the next writer gets its turn."""
        self.put("alice")

        def users() -> Iterator[User]:
            yield user("bob")
            raise Interrupted

        def names() -> Iterator[str]:
            yield "alice"
            raise Interrupted

        with raises(Interrupted):
            self.store.put_users(users())
        with raises(Interrupted):
            self.store.remove_users(names())
        assert self.store.load_policy("alice").known
        assert not self.store.load_policy("bob").known
        assert Call(lambda: self.put("carol")).result() == 2

    def test_a_slow_source_of_users_holds_nobody_up(self) -> None:
        """While the iterable is read, other writers have their turns."""
        seen = []

        def users() -> Iterator[User]:
            yield user("alice")
            seen.append(Call(lambda: self.put("carol")).result())
            yield user("bob")

        def names() -> Iterator[str]:
            yield "alice"
            seen.append(Call(lambda: self.put("dora")).result())
            yield "bob"

        seen.append(self.store.put_users(users()))
        seen.append(self.store.remove_users(names()))
        assert seen == [1, 2, 3, 4]

    def test_the_audit_log_has_a_line_for_each_change(self) -> None:
        """`ipguard.audit` is told of users put and removed, once it has been committed."""
        with logged() as lines:
            self.put("alice", "bob")
            self.put("alice", "bob")
            self.store.remove_users(["nobody"])
            self.store.remove_users(["alice"])
            with raises(RuntimeError), self.store.transaction():
                self.put("carol")
        assert [line.split(" at=")[0] for line in lines] == ["revision=1", "revision=2"]
        for line, part in zip(lines, ("added=2 updated=0", "username=alice"), strict=True):
            assert part in line

    def test_many_users(self) -> None:
        """Thousands of users are one change."""
        names = [f"user{n:06d}" for n in range(self.many * 10)]
        assert self.put(*names) == 1
        assert self._last().detail == {"added": str(len(names)), "updated": "0"}
        assert self.put(*names) == 1
        assert self.store.load_policy(names[-1]).known
        assert self.store.remove_users(names) == 2
        assert self._last().detail == {"removed": str(len(names))}
