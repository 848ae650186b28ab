"""Conformance, part 4: many restrictions at once, all or none."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from ipguard.addresses import AddressRange
from ipguard.errors import DuplicateRestriction, TooManyRestrictions, UnknownUser
from ipguard.model import Actor, RequestKind, Restriction
from ipguard.testing._base import EXTREMES, TEXTS, Call, Hooks, Interrupted, raises


class StagingTests(Hooks):
    """What `transaction(staged=...)` and `add_staged` promise."""

    def _stage(self, staged: list[Restriction], per_user: int = 1000) -> int:
        with self.store.transaction(staged=staged) as turn:
            count = turn.add_staged(per_user=per_user)
            self.note(turn, frozenset(r.username for r in staged))
        return count

    def _refused(
        self, kind: type[Any], staged: list[Restriction], per_user: int = 1000
    ) -> Exception:
        """Fail unless the staged are refused as a whole, even where the caller goes on."""
        before = {r.username: self.held(r.username) for r in staged}
        with self.store.transaction(staged=staged) as turn:
            with raises(kind) as raised:
                turn.add_staged(per_user=per_user)
            self.note(turn)
        assert {name: self.held(name) for name in before} == before
        error = raised.value
        assert isinstance(error, Exception)
        return error

    def test_staged_restrictions_are_added(self) -> None:
        """All of them are added, in full, and counted."""
        self.put("alice", "bob")
        old = self.restriction("alice")
        self.add(old)
        staged = [
            self.restriction(name, label=text, expires_at=self.clock() + timedelta(days=1))
            for text in TEXTS
            for name in ("alice", "bob")
        ]
        staged += [
            self.restriction("bob", AddressRange(version=version, first=first, last=last))
            for version, first, last in EXTREMES
        ]
        assert self._stage(staged) == len(staged)
        assert self.held("alice") == (old, *(r for r in staged if r.username == "alice"))
        assert self.held("bob") == tuple(r for r in staged if r.username == "bob")
        with self.store.transaction() as turn:
            assert turn.restriction(staged[-1].id) == staged[-1]

    def test_what_the_turn_added_before_counts(self) -> None:
        """What the same turn has added is in the way of the staged, and takes room, like others."""
        self.put("alice")
        staged = [self.restriction(addresses="203.0.113.7")]
        for per_user, addresses, kind in (
            (10, "203.0.113.7", DuplicateRestriction),
            (1, "203.0.113.8", TooManyRestrictions),
        ):
            with raises(Interrupted), self.store.transaction(staged=staged) as turn:
                turn.add_restriction(self.restriction(addresses=addresses))
                with raises(kind):
                    turn.add_staged(per_user=per_user)
                raise Interrupted
        assert self._stage(staged, per_user=1) == 1

    def test_nothing_staged_adds_nothing(self) -> None:
        """Without staged restrictions, or with none, `add_staged` adds 0."""
        assert self._stage([]) == 0
        with self.store.transaction() as turn:
            assert turn.add_staged(per_user=1) == 0

    def test_what_is_not_added_is_gone(self) -> None:
        """Restrictions staged for one turn are not there in the next."""
        self.put("alice")
        with self.store.transaction(staged=[self.restriction()]):
            pass
        with raises(Interrupted), self.store.transaction(staged=[self.restriction()]):
            raise Interrupted
        assert self.held() == ()
        with self.store.transaction() as turn:
            assert turn.add_staged(per_user=10) == 0
        assert self._stage([self.restriction()]) == 1
        assert len(self.held()) == 1

    def test_an_unknown_user_refuses_all(self) -> None:
        """One restriction for somebody who is not registered, or is removed, refuses them all."""
        self.put("alice", "bob")
        self.store.remove_users(["bob"])
        for name in ("bob", "nobody"):
            error = self._refused(UnknownUser, [self.restriction(), self.restriction(name)])
            assert isinstance(error, UnknownUser)
            assert error.username == name

    def test_a_duplicate_refuses_all(self) -> None:
        """Addresses that a user has already, or that are staged twice for it, refuse them all."""
        self.put("alice", "bob")
        self.add(self.restriction("alice", "203.0.113.0/24"))
        existing = self.restriction("alice", "203.0.113.0/24")
        twice = [self.restriction("bob", "2001:db8::/32") for _ in range(2)]
        for staged, name, text in (
            ([self.restriction(), existing], "alice", "203.0.113.0/24"),
            ([self.restriction(), *twice], "bob", "2001:db8::/32"),
        ):
            error = self._refused(DuplicateRestriction, staged)
            assert isinstance(error, DuplicateRestriction)
            assert (error.username, error.addresses) == (name, text)
        near = [self.restriction("alice", t) for t in ("203.0.113.0/25", "203.0.113.0")]
        assert self._stage([*near, self.restriction("bob", "203.0.113.0/24")]) == 3

    def test_an_expired_duplicate_is_replaced(self) -> None:
        """An expired restriction to the same addresses makes way; other expired ones stay."""
        self.put("alice")
        soon = self.clock() + timedelta(seconds=1)
        old = self.restriction("alice", "203.0.113.7", expires_at=soon)
        other = self.restriction("alice", "203.0.113.8", expires_at=soon)
        self.add(old, other)
        new = self.restriction("alice", "203.0.113.7", created_at=soon)
        self._refused(DuplicateRestriction, [new])
        self.clock.advance(timedelta(seconds=1))
        assert self._stage([new]) == 1
        assert self.held() == (other, new)
        with self.store.transaction() as turn:
            assert turn.restriction(old.id) is None

    def test_requests_to_delete_what_is_replaced(self) -> None:
        """The pending requests to delete a replaced restriction are returned, and no others."""
        self.put("alice", "bob")
        olds = [
            self.restriction("alice", f"203.0.113.{n}", expires_at=self.clock()) for n in (7, 8)
        ]
        self.add(*olds)
        requests = [
            self.request("alice", kind=RequestKind.DELETE, restriction_id=olds[0].id),
            self.request("alice", kind=RequestKind.DELETE, restriction_id=olds[1].id),
            self.request("alice"),
            self.request("bob"),
        ]
        with self.store.transaction() as turn:
            for request in requests:
                turn.save_request(request)
            assert turn.orphaned_deletions() == ()
            self.note(turn)
        staged = [self.restriction("alice", "203.0.113.7"), self.restriction("bob")]
        with self.store.transaction(staged=staged) as turn:
            assert turn.orphaned_deletions() == ()
            turn.add_staged(per_user=10)
            assert turn.orphaned_deletions() == (requests[0].request,)
            self.note(turn)

    def test_staged_twice_is_twice_even_when_expired(self) -> None:
        """Of two staged with the same addresses neither replaces the other."""
        self.put("alice")
        staged = [
            self.restriction("alice", "203.0.113.7", expires_at=self.clock()),
            self.restriction("alice", "203.0.113.7"),
        ]
        self._refused(DuplicateRestriction, staged)

    def test_no_user_gets_more_than_it_may_have(self) -> None:
        """`per_user` counts what a user has, expired ones too, less what is replaced."""
        self.put("alice", "bob")
        now = self.clock()
        expired = self.restriction("alice", "203.0.113.7", expires_at=now)
        self.add(expired, self.restriction(), self.restriction())
        bobs = self.restriction("bob")
        two = [self.restriction(), self.restriction()]
        error = self._refused(TooManyRestrictions, [bobs, *two], per_user=4)
        assert isinstance(error, TooManyRestrictions)
        assert (error.username, error.limit) == ("alice", 4)
        same = self.restriction("alice", "203.0.113.7")
        assert self._stage([bobs, two[0], same], per_user=4) == 3
        assert len(self.held()) == 4

    def test_the_first_error_is_the_same_everywhere(self) -> None:
        """An unknown user goes before a duplicate, a duplicate before too many."""
        self.put("alice", "bob")
        same = [self.restriction("alice", "203.0.113.7") for _ in range(2)]
        unknown, many = self.restriction("nobody"), [self.restriction("bob") for _ in range(3)]
        self._refused(UnknownUser, [*many, *same, unknown], per_user=2)
        self._refused(DuplicateRestriction, [*many, *same], per_user=2)
        self._refused(TooManyRestrictions, many, per_user=2)

    def test_a_source_that_raises_leaves_nothing(self) -> None:
        """What the source raises comes out, nothing is added, and the next writer gets its turn."""
        self.put("alice")

        def source() -> Iterator[Restriction]:
            yield self.restriction()
            raise Interrupted

        before = self.cursor()
        with raises(Interrupted), self.store.transaction(staged=source()):
            raise AssertionError("the block began")
        assert self.cursor() == before
        assert self.held() == ()
        assert Call(lambda: self.touch("alice")).result() == before[0] + 1
        assert self._stage([self.restriction()]) == 1

    def test_a_slow_source_holds_nobody_up(self) -> None:
        """While the source is read, other writers have their turns."""
        self.put("alice")
        seen = []

        def source() -> Iterator[Restriction]:
            yield self.restriction()
            seen.append(Call(lambda: self.touch("alice")).result())
            yield self.restriction()

        with self.store.transaction(staged=source()) as turn:
            assert turn.add_staged(per_user=10) == 2
            seen.append(self.note(turn, frozenset({"alice"})))
        assert seen == [2, 3]
        assert len(self.held()) == 2

    def test_two_may_stage_at_once(self) -> None:
        """What one writer stages, another does not add."""
        self.put("alice", "bob")

        def source() -> Iterator[Restriction]:
            yield self.restriction("alice")
            Call(lambda: self._stage([self.restriction("bob")])).result()
            yield self.restriction("alice")

        with self.store.transaction(staged=source()) as turn:
            assert turn.add_staged(per_user=10) == 2
            self.note(turn, frozenset({"alice"}))
        assert len(self.held("alice")) == 2
        assert len(self.held("bob")) == 1

    def test_an_exception_undoes_what_was_staged(self) -> None:
        """Staged restrictions that were added go with the turn that fails."""
        self.put("alice")
        soon = self.clock()
        old = self.restriction("alice", "203.0.113.7", expires_at=soon)
        self.add(old)
        staged = [self.restriction(), self.restriction("alice", "203.0.113.7")]
        with raises(Interrupted), self.store.transaction(staged=staged) as turn:
            assert turn.add_staged(per_user=10) == 2
            assert len(turn.restrictions("alice")) == 2
            raise Interrupted
        assert self.held() == (old,)
        assert self.store.history(Actor.EVERY_ACCOUNT).items[0].revision == 2
