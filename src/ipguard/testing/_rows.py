"""Conformance, part 3: what is written is what is read; staging; requests and failures."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import attrs

from ipguard.addresses import AddressRange
from ipguard.errors import DuplicateRestriction, TooManyRestrictions, UnknownUser
from ipguard.model import Actor, RequestKind, RequestState, Restriction
from ipguard.testing._base import Call, Hooks, Interrupted, raises

EXTREMES = (
    (4, 0, 0),
    (4, 0, 2**32 - 1),
    (4, 2**32 - 1, 2**32 - 1),
    (4, 2**31 - 1, 2**31),
    (6, 0, 0),
    (6, 0, 2**128 - 1),
    (6, 1, 1),
    (6, 2**127 - 1, 2**127),
    (6, 2**63 - 1, 2**63),
    (6, 2**64 - 1, 2**64),
    (6, 2**128 - 1, 2**128 - 1),
)
"""Version, first, last: whoever keeps numbers too narrow, signed, or as text shows here."""

TEXTS = (
    "",
    "office",
    'it\'s "quoted" \\ % _ ; -- $1 :name {} <b>&amp;',
    "  blanks  at  the  ends  ",
    "Zürich Ω漢字 مكتب",
    "e\u0301 decomposed, \u00e9 composed",
    "\U0001f3e2" * 100,
    "x" * 100,
    "null",
)
"""Labels and reasons that come back as they are, or not at all."""

MOMENTS = (
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(2030, 3, 31, 1, 30, 0, 1, tzinfo=UTC),
    datetime(2030, 10, 27, 2, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
)
"""Moments that come back to the microsecond."""


def aware(moment: datetime) -> None:
    """Fail unless it is an aware datetime in UTC."""
    assert isinstance(moment, datetime)
    assert moment.utcoffset() == timedelta()


class RowTests(Hooks):
    """What is kept of restrictions, requests and failures."""

    def _comes_back(self, restriction: Restriction) -> None:
        with self.store.transaction() as turn:
            turn.add_restriction(restriction)
            self.note(turn, frozenset({restriction.username}))
        (read,) = self.held(restriction.username)
        assert read == restriction
        assert type(read.addresses) is AddressRange
        aware(read.created_at)
        with self.store.transaction() as turn:
            assert turn.restriction(restriction.id) == restriction
            assert turn.restrictions(restriction.username) == (restriction,)
            turn.remove_restriction(restriction.id)
            self.note(turn, frozenset({restriction.username}))

    def test_every_address_comes_back(self) -> None:
        """Addresses at the ends and in the middle of both spaces are kept exactly."""
        self.put("alice")
        for version, first, last in EXTREMES:
            run = AddressRange(version=version, first=first, last=last)
            self._comes_back(self.restriction(addresses=run))

    def test_every_label_comes_back(self) -> None:
        """A label is kept character by character."""
        self.put("alice")
        for text in TEXTS:
            self._comes_back(self.restriction(label=text))

    def test_every_name_and_id_comes_back(self) -> None:
        """Usernames of 256 characters and ids of any text are kept as they are."""
        for name in ("a b", "o'brien", "ünïcode", "漢" * 256, "𐐨" * 256, "100%_x\\"):
            self.put(name)
            self._comes_back(self.restriction(name, id=f"id of {name}", created_by=name))

    def test_every_moment_comes_back(self) -> None:
        """Times are kept to the microsecond, and are aware and in UTC when read."""
        self.put("alice")
        for moment in MOMENTS:
            at = moment.astimezone(UTC)
            self._comes_back(self.restriction(created_at=at, expires_at=at))
        self._comes_back(self.restriction(expires_at=None))

    def test_the_stores_time_is_utc(self) -> None:
        """`now()` is the clock's time, to the microsecond, in UTC."""
        aware(self.store.now())
        assert self.store.now() == self.clock()
        self.clock.advance(timedelta(microseconds=1))
        assert self.store.now() == self.clock()

    def test_every_field_of_a_request_comes_back(self) -> None:
        """A request is kept in full, digest and all, whatever its kind and state."""
        self.put("alice")
        for number, state in enumerate(RequestState):
            stored = attrs.evolve(
                self.request(
                    kind=RequestKind.DELETE if number % 2 else RequestKind.ADD,
                    addresses=AddressRange(version=6, first=2**127, last=2**128 - 1),
                    label=TEXTS[2],
                    requested_by="bøss",
                    requested_at=MOMENTS[1],
                    expires_at=MOMENTS[4],
                    number_expires_at=MOMENTS[2],
                    attempts_left=number,
                    state=state,
                    restriction_id="r'1" if number % 2 else None,
                    restriction_expires_at=MOMENTS[4] if number % 2 else None,
                    reason="x" * 500,
                ),
                email="the+boss@example.com",
                key_id=b"\x00\xff key",
                digest=bytes(range(255, 223, -1)),
                resends=number,
                sent_at=MOMENTS[1] if number % 2 else None,
            )
            self.save(stored)
            with self.store.transaction() as turn:
                read = turn.request(stored.request.id)
            assert read == stored
            assert read is not None
            assert type(read.request.state) is RequestState
            assert type(read.request.kind) is RequestKind
            assert type(read.digest) is type(read.key_id) is bytes
            aware(read.request.requested_at)
            aware(read.request.number_expires_at)

    def test_an_unknown_row_is_none(self) -> None:
        """What is not there reads as None, or as nothing."""
        with self.store.transaction() as turn:
            assert turn.user("nobody") is None
            assert turn.restriction("none") is None
            assert turn.restrictions("nobody") == ()
            assert turn.request("none") is None
            assert turn.pending_requests("nobody") == ()
            assert turn.request_times("nobody", MOMENTS[0]) == ()
            assert turn.failures("nobody") == 0

    def test_saving_a_request_again_replaces_it(self) -> None:
        """One id is one request: the newest state of it counts."""
        self.put("alice")
        stored = self.request()
        self.save(stored)
        closed = attrs.evolve(stored.request, state=RequestState.LOCKED, attempts_left=0)
        newer = attrs.evolve(stored, request=closed, digest=b"\x01" * 32, resends=2)
        self.save(newer)
        with self.store.transaction() as turn:
            assert turn.request(stored.request.id) == newer
            assert turn.pending_requests("alice") == ()

    def test_pending_requests_in_their_order(self) -> None:
        """A user's pending requests come oldest first, those whose time has passed included."""
        self.put("alice", "bob")
        at = self.clock()
        of_alice = [
            self.request(id=text, requested_at=at + timedelta(microseconds=shift))
            for text, shift in (("d", 0), ("c", 1), ("a", 1), ("b", -1))
        ]
        closed = [self.request(state=s) for s in RequestState if s is not RequestState.PENDING]
        self.save(*of_alice, *closed, self.request("bob"))
        self.clock.advance(timedelta(days=400))
        with self.store.transaction() as turn:
            assert [request.id for request in turn.pending_requests("alice")] == list("bdac")

    def test_when_an_actor_asked(self) -> None:
        """`request_times` tells each request once, after `since`, whatever became of it."""
        self.put("alice", "bob")
        start = self.clock()
        times = [start + timedelta(microseconds=n) for n in (3, 1, 2, 2)]
        states = (RequestState.CONFIRMED, RequestState.PENDING, RequestState.LOCKED)
        self.save(
            *(
                self.request("bob" if n % 2 else "alice", requested_at=at, state=states[n % 3])
                for n, at in enumerate(times)
            ),
            self.request(requested_by="other"),
        )
        again = self.request(requested_at=start + timedelta(microseconds=4))
        self.save(again)
        self.save(attrs.evolve(again, resends=1))
        expected = (*sorted(times), start + timedelta(microseconds=4))
        with self.store.transaction() as turn:
            assert turn.request_times("boss", start) == expected
            assert turn.request_times("boss", expected[0]) == expected[1:]
            assert turn.request_times("boss", expected[1]) == expected[3:]
            assert turn.request_times("boss", expected[-1]) == ()
            assert turn.request_times("other", MOMENTS[0]) == (start,)

    def test_failures_are_each_actors_own(self) -> None:
        """The count of wrong numbers is set and read for each actor, and can go back to 0."""
        for counts in ({"boss": 1, "chef": 100}, {"boss": 0}, {"boss": 2, "chef": 0}):
            with self.store.transaction() as turn:
                for actor, count in counts.items():
                    turn.set_failures(actor, count)
                self.note(turn)
            with self.store.transaction() as turn:
                assert {actor: turn.failures(actor) for actor in counts} == counts
                assert turn.failures("nobody") == 0


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
