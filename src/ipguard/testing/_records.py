"""Conformance tests of what a store keeps: restrictions, requests, failures and users."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import attrs

from ipguard.addresses import AddressRange, AddressSet
from ipguard.errors import (
    InvalidValue,
    StoreError,
    UnknownUser,
    UsernameCollision,
    UsernameError,
)
from ipguard.model import (
    EVERYBODY,
    Action,
    Approval,
    Change,
    Demand,
    Direction,
    Impact,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    StoredUser,
    User,
    UserSync,
)
from ipguard.store import NAMED_AT_MOST
from ipguard.testing._case import (
    EVERY,
    EXTREMES,
    TEXTS,
    Call,
    Interrupted,
    StoreCase,
    logs,
    raises,
    user,
)

T = TypeVar("T")

MOMENTS = (
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(2030, 3, 31, 1, 30, 0, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
)
"""Times that a store must return to the microsecond."""
BITS = ((4, 32), (6, 128))


def assert_utc(moment: datetime) -> None:
    assert isinstance(moment, datetime)
    assert moment.utcoffset() == timedelta()


class RecordTests(StoreCase):
    def test_every_field_of_a_restriction_comes_back(self) -> None:
        """Addresses, texts and times to the microsecond are kept exactly; times are in UTC."""
        names = ("a b", "o'brien", "ünïcode", "漢" * 256, "𐐨" * 256, "100%_x\\")
        self.put("alice", *names)
        for restriction in (
            *(self.restriction(addresses=addresses) for addresses in EXTREMES),
            *(self.restriction(label=text) for text in TEXTS),
            *(self.restriction(name, id=f"id of {name}", created_by=name) for name in names),
            *(self.restriction(created_at=moment, expires_at=moment) for moment in MOMENTS),
        ):
            name = restriction.username
            self.add(restriction)
            (read,) = self.held(name)
            assert read == restriction
            assert type(read.addresses) is AddressRange
            assert_utc(read.created_at)
            with self.store.transaction() as tx:
                assert tx.restriction(restriction.id) == restriction
                assert tx.restrictions(name) == (restriction,)
                tx.remove_restriction(restriction.id)
                self.append(tx, frozenset({name}))

    def _contents(self) -> Iterator[dict[str, Any]]:
        """Yield the fields of requests of each kind, with little and with much in them."""
        every = AddressSet([AddressRange(version=v, first=0, last=2**b - 1) for v, b in BITS])
        number, nothing = Demand(number=True), AddressSet()
        yield {"kind": RequestKind.ADD, "adds": EXTREMES[:1]}
        yield {"kind": RequestKind.ADD, "adds": EXTREMES, "batch": "q'1", "numbered": True}
        yield {"kind": RequestKind.DELETE, "removes": ("r'1",), "removed": EXTREMES[1:2]}
        yield {"kind": RequestKind.DELETE, "removes": ("r1", "r2"), "removed": EXTREMES[-2:]}
        yield {
            "kind": RequestKind.REPLACE,
            "adds": EXTREMES[:2],
            "removes": tuple(f"r{n}" for n in range(len(EXTREMES))),
            "removed": EXTREMES,
        }
        for demand in (
            Demand(),
            Demand(number=True, approvals=10),
            Demand(wait=timedelta(days=366)),
            Demand(approvals=1, wait=timedelta(microseconds=1)),
        ):
            approvals = tuple(
                Approval(username="bøss", email="b@example.com", account_id=account, subject="d")
                for account in (None, "", "Ω 1")
            )
            yield {"adds": EXTREMES[-1:], "demand": demand, "approvals": approvals}
        for direction, gained, lost in zip(
            Direction,
            (nothing, every, every, nothing),
            (nothing, nothing, every, every),
            strict=True,
        ):
            found = Impact(direction=direction, gained=gained, lost=lost, summary=TEXTS[4])
            yield {"adds": EXTREMES[2:3], "impact": found, "demand": number}

    def test_every_field_of_a_request_comes_back(self) -> None:
        """A request of any kind, content and state is kept with all its fields."""
        self.put("alice")
        for number, (state, content) in enumerate(
            itertools.product(RequestState, self._contents())
        ):
            odd = number % 2 == 1
            stored = attrs.evolve(
                self.request(
                    **content,
                    label=TEXTS[2],
                    requested_by="bøss",
                    requested_at=MOMENTS[1],
                    expires_at=MOMENTS[3],
                    number_expires_at=MOMENTS[2],
                    attempts_left=number,
                    state=state,
                    restriction_expires_at=MOMENTS[3] if odd else None,
                    reason="x" * 500,
                ),
                email="the+boss@example.com",
                key_id=b"\x00\xff key" if odd else b"",
                digest=bytes(range(255, 223, -1)) if odd else b"",
                resends=number,
                mails_failed=number + 1,
                sent_at=MOMENTS[1] if odd else None,
            )
            self.save(stored)
            with self.store.transaction() as tx:
                read = tx.request(stored.request.id)
            assert read == stored
            assert read is not None
            assert type(read.request.state) is RequestState
            assert type(read.request.kind) is RequestKind
            assert type(read.digest) is type(read.key_id) is bytes
            assert_utc(read.request.requested_at)
            assert_utc(read.request.number_expires_at)
            impact, given = read.request.impact, stored.request.impact
            assert given is None or (impact is not None and impact.summary == given.summary)

    def test_requests_that_share_a_number(self) -> None:
        """`batch` returns them in any state, by time, then id; they count as one request."""
        self.put("alice", "bob", "carol")
        later = self.clock() + timedelta(microseconds=1)
        (first, *others) = [
            self.request(name, id=each, requested_at=at, batch="b", state=state)
            for name, each, at, state in (
                ("alice", "b", self.clock(), RequestState.PENDING),
                ("bob", "c", self.clock(), RequestState.CANCELLED),
                ("carol", "a", later, RequestState.PENDING),
            )
        ]
        self.save(*others, self.request(batch="other"), self.request("carol"), first)
        with self.store.transaction() as tx:
            assert tx.batch("b") == (first, *others)
            assert tx.pending_requests("carol")[1:] == (others[1].request,)
            assert tx.batch("none") == tx.batch("\ud800") == tx.batch("") == ()
            since = self.clock() - timedelta(days=1)
            assert tx.request_times("boss", since) == (self.clock(), self.clock())

    def test_records_of_users_that_are_not_registered(self) -> None:
        """A store keeps restrictions and requests of users that are unknown or removed."""
        self.put("gone")
        self.store.remove_users(["gone"])
        written = {
            name: (self.restriction(name), self.request(name)) for name in ("gone", "unknown")
        }
        for name, (restriction, request) in written.items():
            self.add(restriction)
            self.save(request)
            policy = self.store.load_policy(name)
            assert (policy.known, policy.restrictions) == (False, (restriction,))
            with self.store.transaction() as tx:
                assert (tx.user(name) is None) == (name == "unknown")
                assert tx.request(request.request.id) == request
                assert tx.pending_requests(name) == (request.request,)
        assert [line.user.username for line in self.store.overview(EVERY)] == ["gone"]
        self.put("unknown")
        (_, line) = self.store.overview(EVERY)
        restriction, request = written["unknown"]
        assert (line.restrictions, line.pending) == ((restriction,), (request.request,))

    def test_removing_a_restriction(self) -> None:
        """It is gone from every read; an id in use is refused, and an unknown one is ignored."""
        self.put("alice", "bob")
        kept, gone = self.restriction(), self.restriction()
        self.add(kept, gone)
        with self.store.transaction() as tx:
            with raises(StoreError):
                tx.add_restriction(self.restriction("bob", id=gone.id))
            self.append(tx)
        assert (self.held(), self.held("bob")) == ((kept, gone), ())
        for removed, left in ((gone, (kept,)), (kept, ())):
            with self.store.transaction() as tx:
                tx.remove_restriction(removed.id)
                tx.remove_restriction("no such restriction")
                self.append(tx, frozenset({"alice"}))
            assert self.held() == left
            with self.store.transaction() as tx:
                assert tx.restriction(removed.id) is None
                assert tx.restrictions("alice") == left
        assert list(self.store.load_all_policies()[1]) == []

    def test_pending_requests(self) -> None:
        """They are ordered by time, then id, expired ones too; the last save of each counts."""
        self.put("alice", "bob")
        at = self.clock()
        of_alice = [
            self.request(id=text, requested_at=at + timedelta(microseconds=shift))
            for text, shift in (("d", 0), ("c", 1), ("a", 1), ("b", -1))
        ]
        closed = [self.request(state=s) for s in RequestState if s is not RequestState.PENDING]
        self.save(*of_alice, *closed, self.request("bob"))
        self.clock.advance(timedelta(days=400))
        with self.store.transaction() as tx:
            assert [request.id for request in tx.pending_requests("alice")] == list("bdac")
        locked = attrs.evolve(of_alice[2].request, state=RequestState.LOCKED, attempts_left=0)
        newer = attrs.evolve(of_alice[2], request=locked, digest=b"\x01" * 32, resends=2)
        self.save(newer)
        with self.store.transaction() as tx:
            assert tx.request("a") == newer
            assert [request.id for request in tx.pending_requests("alice")] == list("bdc")
            assert len(tx.request_times("boss", MOMENTS[0])) == 5 + len(closed)

    def test_request_times(self) -> None:
        """`request_times` returns the time of each request after `since`, in any state, once."""
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
        with self.store.transaction() as tx:
            assert tx.request_times("boss", start) == expected
            assert tx.request_times("boss", expected[0]) == expected[1:]
            assert tx.request_times("boss", expected[1]) == expected[3:]
            assert tx.request_times("boss", expected[-1]) == ()
            assert tx.request_times("other", MOMENTS[0]) == (start,)

    def test_failures_are_counted_for_each_actor(self) -> None:
        """The count of wrong numbers is set and read for each actor and can return to 0."""
        for counts in ({"boss": 1, "chef": 100}, {"boss": 0}, {"boss": 2, "chef": 0}):
            with self.store.transaction() as tx:
                for actor, count in counts.items():
                    tx.set_failures(actor, count)
                self.append(tx)
            with self.store.transaction() as tx:
                assert {actor: tx.failures(actor) for actor in counts} == counts
                assert tx.failures("nobody") == 0


class UserTests(StoreCase):
    def _user(self, name: str) -> StoredUser | None:
        with self.store.transaction() as tx:
            return tx.user(name)

    def _last(self) -> tuple[str | None, str | None, Any]:
        """Return the user, the account and the detail of the newest audit entry."""
        change = self.last_change()
        return change.username, change.account_id, change.detail

    def test_every_field_of_a_user_comes_back(self) -> None:
        """Users are kept with all their fields and are known afterwards."""
        users = [
            User(username="alice", full_name="Alice Ångström", account_id="A 1"),
            User(username="O'Brien", full_name="", account_id="a1", email="o@example.com"),
            User(username="ＦＵＬＬ", full_name="", account_id="a1", uid="漢" * 128),  # noqa: RUF001
            User(username="漢" * 256, full_name="\U0001f3e2" * 256, account_id="Ω" * 256),
        ]
        assert self.store.put_users(iter(users)) == 1
        for each in users:
            assert self._user(each.username) == StoredUser(user=each)
            assert self.store.load_policy(each.username).known

    def test_put_users_appends_one_entry(self) -> None:
        """The entry counts the users, and names the user if exactly one changed."""
        self.put("alice", account_id="A7")
        assert self.last_change() == Change(
            revision=1,
            at=self.clock(),
            actor=None,
            action=Action.PUT_USERS,
            username="alice",
            detail={"added": "1", "updated": "0"},
            account_id="A7",
        )
        new = user("alice", full_name="New", account_id="A7")
        assert self.store.put_users([new, user("bob"), user("carol")]) == 2
        assert self._last() == (None, None, {"added": "2", "updated": "1"})
        new = user("bob", full_name="New")
        assert self.store.put_users([new, user("carol")]) == 3
        assert self._last() == ("bob", "A1", {"added": "0", "updated": "1"})

    def test_users_that_do_not_change_append_nothing(self) -> None:
        """Putting users again, or no users, takes no revision; the last record of a name counts."""
        assert self.store.put_users([]) == 0
        first = user("Alice", full_name="First")
        assert self.store.put_users([first, user("bob"), user("alice")]) == 1
        assert self._user("alice") == StoredUser(user=user("alice"))
        assert self._last() == (None, None, {"added": "2", "updated": "0"})
        before = self.cursor()
        assert self.store.put_users([first, user("alice")]) == 1
        assert self.put("bob", "alice", "alice") == 1
        assert self.store.put_users(iter(())) == 1
        assert self.store.remove_users([]) == 1
        assert self.cursor() == before

    def test_each_field_can_be_changed(self) -> None:
        """A new name, account or e-mail address is kept and touches no policy."""
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

    def test_new_and_removed_users_are_touched(self) -> None:
        """Up to `NAMED_AT_MOST` users are named, more are EVERYBODY; updates touch no user."""
        few = [f"few{n}" for n in range(NAMED_AT_MOST)]
        many = [f"many{n}" for n in range(NAMED_AT_MOST + 1)]
        steps: tuple[tuple[Callable[[], int], object], ...] = (
            (lambda: self.put(*few), frozenset(few)),
            (lambda: self.put(*few, "one", full_name="Renamed"), frozenset({"one"})),
            (lambda: self.put(*few, *many, full_name="Renamed"), EVERYBODY),
            (lambda: self.put(*few, *many), frozenset()),
            (lambda: self.store.remove_users(few), frozenset(few)),
            (lambda: self.store.remove_users([*few, *many]), EVERYBODY),
        )
        for revision, (step, touched) in enumerate(steps, start=1):
            before = self.cursor()
            assert step() == revision
            assert self.store.changes_since(before).usernames == touched

    def test_removing_users(self) -> None:
        """A removed user's record and restrictions stay, for a user of the same name to inherit."""
        self.put("alice", "bob", "carol", "dora")
        restriction = self.restriction()
        self.add(restriction)
        before = self.cursor()
        assert self.store.remove_users(["ALICE", "nobody"]) == 3
        assert self._user("alice") == StoredUser(user=user("alice"), removed=True)
        assert self._user("bob") == StoredUser(user=user("bob"))
        policy = self.store.load_policy("alice")
        assert (policy.known, policy.restrictions) == (False, (restriction,))
        assert self.store.changes_since(before).usernames == frozenset({"alice"})
        change = self.last_change()
        assert (change.action, change.actor) == (Action.REMOVE_USERS, None)
        assert self._last() == ("alice", "A1", {"removed": "1"})
        assert self.store.remove_users(["bob", "carol", "Bob"]) == 4
        assert self._last() == (None, None, {"removed": "2"})
        # Users that are not registered, or no longer, are ignored.
        assert self.store.remove_users(iter(["alice", "nobody"])) == 4
        before = self.cursor()
        assert self.put("alice", account_id="B2") == 5
        policy = self.store.load_policy("alice")
        assert (policy.known, policy.restrictions) == (True, (restriction,))
        assert self.store.changes_since(before).usernames == frozenset({"alice"})
        assert self._user("alice") == StoredUser(user=user("alice", account_id="B2"))
        assert self._last() == ("alice", "B2", {"added": "1", "updated": "0"})
        self.store.remove_users(["alice"])
        assert self.put("alice", account_id="B2") == 7

    def test_requests_of_removed_users_are_cancelled(self) -> None:
        """Pending requests of a removed user, expired ones included, are cancelled."""
        self.put("alice", "bob")
        live, late = self.request(), self.request(expires_at=self.clock())
        done = self.request(state=RequestState.CONFIRMED)
        bobs = self.request("bob")
        self.save(live, late, done, bobs)
        self.store.remove_users(["alice"])
        with self.store.transaction() as tx:
            for stored in (live, late):
                cancelled = attrs.evolve(stored.request, state=RequestState.CANCELLED)
                assert tx.request(stored.request.id) == attrs.evolve(stored, request=cancelled)
            assert tx.request(done.request.id) == done
            assert tx.request(bobs.request.id) == bobs
            assert tx.pending_requests("alice") == ()
            assert tx.pending_requests("bob") == (bobs.request,)
            assert len(tx.request_times("boss", self.clock() - timedelta(1))) == 4

    def test_remove_users_checks_its_argument(self) -> None:
        """A single str, or a name without a canonical form, is refused and removes no user."""
        self.put("j", "s")
        with raises(TypeError):
            self.store.remove_users("js")
        with raises(UsernameError):
            self.store.remove_users(["j", " not a name "])
        assert [self.store.load_policy(name).known for name in ("j", "s")] == [True, True]
        assert self.cursor()[0] == 1

    def test_a_source_that_raises_changes_nothing(self) -> None:
        """An error of an iterable is raised unchanged, and the next writer is not blocked."""

        def source(item: T) -> Iterator[T]:
            yield item
            raise Interrupted

        self.put("alice")
        before = self.cursor()
        with raises(Interrupted):
            self.store.put_users(source(user("bob")))
        with raises(Interrupted):
            self.store.remove_users(source("alice"))
        with raises(Interrupted), self.store.transaction(staged=source(self.restriction())):
            raise AssertionError("the block began")
        assert self.cursor() == before
        assert self.store.load_policy("alice").known
        assert not self.store.load_policy("bob").known
        assert Call(lambda: self.put("carol")).result() == before[0] + 1
        assert self.add_staged([self.restriction()], per_user=1) == 1

    def test_a_slow_source_does_not_block_writers(self) -> None:
        """While an iterable is read, other writers commit and stage restrictions of their own."""

        def source(first: T, write: Callable[[], int], last: T) -> Iterator[T]:
            yield first
            revisions.append(Call(write).result())
            yield last

        revisions: list[int] = []
        users = source(user("alice"), lambda: self.put("carol"), user("bob"))
        revisions.append(self.store.put_users(users))
        names = source("alice", lambda: self.put("dora"), "bob")
        revisions.append(self.store.remove_users(names))
        assert revisions == [1, 2, 3, 4]
        inner, first, last = (self.restriction("carol") for _ in range(3))
        assert self.add_staged(source(first, lambda: self.add_staged([inner]), last)) == 2
        assert revisions[4:] == [1]
        assert self.held("carol") == (inner, first, last)

    def _renamed(self, before: tuple[int, str], kept: Restriction, asked: StoredRequest) -> None:
        """Check that alice is now Bea, after a change that began at `before`."""
        stored = self._user("bea")
        assert stored is not None
        assert (stored.user.spelling, stored.removed) == ("Bea", False)
        assert self.held("alice") == ()
        assert self.held("bea") == (attrs.evolve(kept, username="bea"),)
        assert not self.store.load_policy("alice").known
        assert self.store.changes_since(before).usernames == frozenset({"alice", "bea"})
        change = self.last_change()
        assert (change.action, change.actor) == (Action.RENAME_USER, None)
        assert self._last() == ("bea", "A1", {"old": "alice", "new": "bea"})
        with self.store.transaction() as tx:
            request = tx.request(asked.request.id)
            assert request is not None
            assert request.request.state is RequestState.CANCELLED
            found = tx.restriction(kept.id)
            assert found is not None
            assert found.username == "bea"
        (line,) = self.store.overview(EVERY, search="bea")
        assert (line.user, line.removed) == (stored.user, False)
        assert self.store.overview(EVERY, search="alice").items == ()

    def test_a_uid_with_another_username_renames_the_user(self) -> None:
        """Restrictions follow, pending requests are cancelled, and both usernames are touched."""
        self.store.put_users([user("alice", uid="7"), user("carol")])
        kept, asked = self.restriction(), self.request()
        self.add(kept)
        self.save(asked)
        before = self.cursor()
        for _ in range(2):
            assert self.store.put_users([user("Bea", uid="7")]) == before[0] + 1
        self._renamed(before, kept, asked)
        # The old username is free again.
        self.store.put_users([user("alice", uid="8")])
        assert self.held("alice") == ()
        assert self.store.sync_users([user("dora", uid="7")]).renamed == 1
        assert [each.id for each in self.held("dora")] == [kept.id]
        with raises(UsernameCollision):
            self.store.put_users([user("dora", uid="8")])
        # A removed user who comes back under another username still has the restrictions.
        self.store.remove_users(["dora"])
        found = self.store.sync_users([user("emma", uid="7")])
        assert (found.added, found.renamed) == (1, 1)
        assert [each.id for each in self.held("emma")] == [kept.id]

    def _synced(self, records: Iterable[User]) -> int:
        return self.store.sync_users(records).revision

    def test_rename_user(self) -> None:
        """A user without a uid can be renamed too, and spelled differently."""
        self.put("alice", "carol")
        kept, asked = self.restriction(), self.request()
        self.add(kept)
        self.save(asked)
        before = self.cursor()
        assert self.store.rename_user("ALICE", "Bea") == before[0] + 1
        self._renamed(before, kept, asked)
        assert self.store.rename_user("bea", "Bea") == before[0] + 1
        assert self.store.rename_user("bea", "BEA") == before[0] + 2
        assert self._last() == ("bea", "A1", {"added": "0", "updated": "1"})
        stored = self._user("bea")
        assert stored is not None
        assert stored.user.spelling == "BEA"
        self.store.remove_users(["carol"])
        for old in ("alice", "carol", "nobody"):
            with raises(UnknownUser):
                self.store.rename_user(old, "dora")
        with raises(UsernameError):
            self.store.rename_user("bea", " ")
        self.put("dora")
        with raises(UsernameCollision) as raised:
            self.store.rename_user("dora", "Bea")
        error = raised.exception
        assert (error.username, error.spellings, error.accounts) == (
            "bea", ("BEA", "Bea"), ("A1", "A1"),
        )  # fmt: skip
        # A removed user keeps the username as long as there are restrictions.
        self.store.remove_users(["bea"])
        with raises(UsernameCollision) as raised:
            self.store.rename_user("dora", "bea")
        assert raised.exception.removed
        with self.store.transaction() as tx:
            tx.remove_restriction(kept.id)
            self.append(tx, frozenset({"bea"}))
        self.store.rename_user("dora", "bea")
        assert self.store.load_policy("bea").known
        assert self.store.load_policy("bea").restrictions == ()

    def test_usernames_that_pass_from_one_to_another(self) -> None:
        """Users may swap usernames and take those given up in one call; all keep their own."""
        for put in (self.store.put_users, self._synced):
            names = ("alice", "bob", "carol")
            users = [user(name, uid=uid) for name, uid in zip(names, "123", strict=True)]
            if put == self._synced:
                self.store.remove_users([*names, "dora"])
            restrictions = [self.restriction(name) for name in names]
            put(users)
            self.add(*restrictions)
            for moved in (("bob", "alice", "carol"), ("carol", "bob", "alice")):
                put([user(name, uid=uid) for name, uid in zip(moved, "123", strict=True)])
                for name, kept in zip(moved, restrictions, strict=True):
                    assert [each.id for each in self.held(name)] == [kept.id]
            put([user("dora", uid="1"), user("carol", uid="2"), user("bob", uid="4")])
            found = {name: [each.id for each in self.held(name)] for name in ("dora", "carol")}
            assert found == {"dora": [restrictions[0].id], "carol": [restrictions[1].id]}
            assert self.held("bob") == ()
            with self.store.transaction() as tx:
                for each in restrictions:
                    tx.remove_restriction(each.id)
                self.append(tx, frozenset(names))

    def test_two_users_with_one_canonical_username_are_refused(self) -> None:
        """In one call and across calls, and with all of the call; a spelling alone changes one."""
        first, second = user("JSmith", account_id="A1"), user("jsmith", account_id="B2")
        with raises(UsernameCollision) as raised:
            self.store.put_users([user("carol"), first, second])
        assert [record for record, _ in raised.exception.refused] == [second]
        assert not self.store.load_policy("carol").known
        self.store.put_users([first])
        kept = self.restriction("jsmith")
        self.add(kept)
        before = self.cursor()
        rival = user("jsmith", account_id="B2", uid="2")
        for _ in range(2):
            with raises(UsernameCollision) as raised:
                self.store.put_users([user("carol"), second, user("dora"), rival])
        error = raised.exception
        assert (error.username, error.spellings, error.accounts) == (
            "jsmith", ("JSmith", "jsmith"), ("A1", "B2"),
        )  # fmt: skip
        assert [record for record, _ in error.refused] == [second, rival]
        assert self.cursor() == before
        assert self._user("jsmith") == StoredUser(user=first)
        # The same spelling, or the same account: one user, who also gets a uid.
        self.store.put_users([user("jsmith", account_id="A1", uid="1")])
        self.store.put_users([user("jsmith", account_id="A1")])
        stored = self._user("jsmith")
        assert stored is not None
        assert (stored.user.uid, stored.user.spelling) == ("1", "jsmith")
        with raises(UsernameCollision):
            self.store.put_users([rival])
        # Removed: the restrictions keep the username.
        self.store.remove_users(["jsmith"])
        with raises(UsernameCollision) as raised:
            self.store.put_users([rival])
        assert raised.exception.removed
        with self.store.transaction() as tx:
            tx.remove_restriction(kept.id)
            self.append(tx, frozenset({"jsmith"}))
        self.store.put_users([rival])
        assert self._user("jsmith") == StoredUser(user=rival)

    def test_a_user_who_moves(self) -> None:
        """Another account is recorded with both, and shown to the new one; no user is touched."""
        self.put("alice")
        before = self.cursor()
        assert self.put("alice", account_id="B2") == 2
        change = self.last_change()
        assert (change.action, change.actor) == (Action.MOVE_USER, None)
        assert self._last() == ("alice", "B2", {"old": "A1", "new": "B2"})
        assert self.store.changes_since(before).usernames == frozenset()
        self.store.put_users([user("alice", account_id="B2", uid="1")])
        assert self.store.put_users([user("bea", account_id="C3", uid="1")]) == 5
        changes = self.store.history(EVERY, limit=2).items
        assert [(each.action, each.account_id) for each in changes] == [
            (Action.MOVE_USER, "C3"), (Action.RENAME_USER, "B2"),
        ]  # fmt: skip

    def test_sync_users(self) -> None:
        """It counts what it does and what it refuses; the same records again append nothing."""
        self.store.put_users([user("alice", uid="1"), user("bob", uid="2"), user("carol", uid="3")])
        kept = self.restriction("carol")
        self.add(kept)
        changed = {"username": "bob", "full_name": "New", "account_id": "A1", "uid": "2"}
        records: list[Any] = [
            user("Bea", uid="1"),
            changed,
            {"username": "x", "full_name": "x"},
            user("dora", uid="4"),
            user("DORA", uid="5", account_id="B2"),
            {**changed, "username": "BOB", "uid": "6"},
            7,
        ]
        found = self.store.sync_users(iter(records), remove_missing=True)
        assert attrs.evolve(found, refused=()) == UserSync(
            revision=self.cursor()[0], added=1, changed=1, renamed=1, removed=1
        )
        assert [record for record, _ in found.refused] == [*records[2:3], *records[4:]]
        assert [type(error).__name__ for _, error in found.refused] == [
            "InvalidValue", "UsernameCollision", "UsernameCollision", "InvalidValue",
        ]  # fmt: skip
        assert [change.action for change in self.store.history(EVERY, limit=3)] == [
            Action.PUT_USERS, Action.RENAME_USER, Action.REMOVE_USERS,
        ]  # fmt: skip
        assert self.store.load_policy("carol").restrictions == (kept,)
        before = self.cursor()
        again = self.store.sync_users(iter(records), remove_missing=True)
        assert (again.revision, len(again.refused)) == (found.revision, 4)
        assert self.cursor() == before
        moved = self.store.sync_users([user("bob", uid="2", account_id="B2")])
        assert (moved.moved, moved.changed, moved.removed) == (1, 0, 0)
        for nothing in ([], [{"username": "bob"}]):
            with raises(InvalidValue):
                self.store.sync_users(nothing, remove_missing=True)
        assert self.store.sync_users([]) == UserSync(revision=moved.revision)

    def test_records_that_cannot_be_read_keep_their_users(self) -> None:
        """Such a record keeps the user with its username or its uid, and no other."""
        users = [user(name, uid=name[0]) for name in ("alice", "bob", "carol", "dora")]
        self.store.put_users(users)
        broken: list[Any] = [{"username": "ALICE"}, {"username": "b\n", "uid": "b"}, "carol"]
        found = self.store.sync_users([*broken, users[3]], remove_missing=True)
        assert (found.removed, len(found.refused)) == (1, 3)
        known = [self.store.load_policy(each.username).known for each in users]
        assert known == [True, True, False, True]
        self.put("emma", "dora")
        assert (
            self.store.sync_users([{"username": "x"}, users[3]], remove_missing=True).removed == 3
        )

    def test_a_username_that_is_reused_the_same_night(self) -> None:
        """A new user gets the username of a missing one, if there are no restrictions."""
        self.store.put_users([user("alice", uid="1"), user("bob", uid="2")])
        kept = self.restriction("bob")
        self.add(kept)
        records = [user("alice", uid="3"), user("bob", uid="4")]
        for _ in range(2):
            found = self.store.sync_users(records, remove_missing=True)
            assert [record for record, _ in found.refused] == records[1:]
        alice, bob = self._user("alice"), self._user("bob")
        assert alice == StoredUser(user=records[0])
        assert bob == StoredUser(user=user("bob", uid="2"), removed=True)
        assert self.held("bob") == (kept,)

    def test_many_users_that_are_renamed(self) -> None:
        """Renames and moves of any number are one change, with an entry for each."""
        count = 10 * self.many
        names = [f"u{n:05}" for n in range(count)]
        self.store.put_users(user(name, uid=str(n)) for n, name in enumerate(names))
        some = [self.restriction(name) for name in names[:: count // 10]]
        self.add(*some)
        before = self.cursor()
        shifted = [*names[1:], names[0]]
        found = self.store.sync_users(
            user(name, uid=str(n), account_id="B2") for n, name in enumerate(shifted)
        )
        assert (found.renamed, found.moved, found.changed) == (count, count, 0)
        assert found.revision == before[0] + 2 * count
        after = dict(zip(names, shifted, strict=True))
        for each in some:
            assert self.held(after[each.username]) == (
                attrs.evolve(each, username=after[each.username]),
            )
        assert len(dict(self.store.load_all_policies()[1])) == len(some)
        assert self._last() == (names[-1], "B2", {"old": "A1", "new": "B2"})

    def test_changes_of_users_are_logged(self) -> None:
        """`ipguard.audit` gets a line for each commit that changed users."""
        with logs("ipguard.audit", "INFO") as logged:
            self.put("alice", "bob")
            self.put("alice", "bob")
            self.store.remove_users(["nobody"])
            self.store.remove_users(["alice"])
            with raises(RuntimeError), self.store.transaction():
                self.put("carol")
        lines = [record.getMessage() for record in logged.records]
        assert [line.split(" at=")[0] for line in lines] == ["revision=1", "revision=2"]
        assert "added=2 updated=0" in lines[0]
        assert "username=alice" in lines[1]
