"""Conformance, part 3: what is written is what is read: restrictions, requests, failures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import attrs

from ipguard.addresses import AddressRange
from ipguard.errors import StoreError
from ipguard.model import Actor, RequestKind, RequestState, Restriction
from ipguard.testing._base import EXTREMES, TEXTS, Hooks, raises

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
                mails_failed=number + 1,
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

    def test_rows_of_nobody_are_kept(self) -> None:
        """A store keeps what is said of users whom it does not know: it judges nothing."""
        restriction, request = self.restriction("nobody"), self.request("nobody")
        self.add(restriction)
        self.save(request)
        policy = self.store.load_policy("nobody")
        assert (policy.known, policy.restrictions) == (False, (restriction,))
        with self.store.transaction() as turn:
            assert turn.user("nobody") is None
            assert turn.pending_requests("nobody") == (request.request,)
        assert self.store.overview(Actor.EVERY_ACCOUNT).items == ()
        self.put("nobody")
        (line,) = self.store.overview(Actor.EVERY_ACCOUNT)
        assert (line.restrictions, line.pending) == ((restriction,), (request.request,))

    def test_rows_of_removed_users_are_kept(self) -> None:
        """A user that was removed can still be written about."""
        self.put("alice")
        self.store.remove_users(["alice"])
        restriction, request = self.restriction(), self.request()
        self.add(restriction)
        self.save(request)
        assert self.held() == (restriction,)
        with self.store.transaction() as turn:
            assert turn.request(request.request.id) == request

    def test_an_id_is_taken_once(self) -> None:
        """A restriction under an id that is there already is refused."""
        self.put("alice", "bob")
        first = self.restriction(id="one")
        self.add(first)
        with self.store.transaction() as turn:
            with raises(StoreError):
                turn.add_restriction(self.restriction("bob", id="one"))
            self.note(turn)
        assert self.held() == (first,)
        assert self.held("bob") == ()

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

    def test_closing_one_request_leaves_the_others(self) -> None:
        """A user's other requests stay pending, and an actor's other times are still told."""
        self.put("alice")
        stored = [self.request(requested_at=self.clock() + timedelta(seconds=n)) for n in range(3)]
        self.save(*stored)
        first, second, third = (each.request for each in stored)
        closed = attrs.evolve(second, state=RequestState.CANCELLED)
        self.save(attrs.evolve(stored[1], request=closed))
        with self.store.transaction() as turn:
            assert turn.pending_requests("alice") == (first, third)
            assert len(turn.request_times("boss", MOMENTS[0])) == 3

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
