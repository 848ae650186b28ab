"""Conformance tests of the sightings."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from typing import Any

from ipguard import errors
from ipguard.model import Action, Actor, Sighting
from ipguard.store import RestrictionStore
from ipguard.testing._case import EVERY, StoreCase, raises, together, user

HERE = "203.0.113.7"
DAY = timedelta(days=1)


class SightingTests(StoreCase):
    """What a store keeps of logins with the right password."""

    def seen(self, username: str = "alice", address: str = HERE, **fields: Any) -> Sighting:
        """Return a sighting of one allowed login at this moment."""
        at = fields.pop("at", self.clock())
        given = {"first_at": at, "last_at": at, "allowed": 1, "refused": 0} | fields
        return Sighting(username=username, address=address, **given)

    def sightings(self, username: str = "alice") -> tuple[Sighting, ...]:
        return self.store.sightings(username)

    def addresses(self, username: str = "alice") -> list[str]:
        return [each.address for each in self.sightings(username)]

    def test_a_sighting_comes_back_as_it_was(self) -> None:
        """Every field is kept exactly; only the user concerned has it."""
        self.put("alice", "bob")
        given = [
            self.seen(address=address, allowed=3, refused=2, first_at=self.clock() - DAY)
            for address in ("0.0.0.1", "255.255.255.254", "2001:db8::", "2001:db8:ff:ffff::1")
        ]
        self.store.record_sightings(given)
        assert set(self.sightings()) == set(given)
        assert self.sightings("bob") == self.sightings("nobody") == ()

    def test_sightings_are_returned_newest_first(self) -> None:
        """They are ordered by `last_at`, in whatever order they were recorded."""
        self.put("alice")
        ages = [3, 0, 2, 89, 1]
        self.store.record_sightings(
            [self.seen(address=f"10.0.0.{age}", at=self.clock() - age * DAY) for age in ages]
        )
        assert self.addresses() == [f"10.0.0.{age}" for age in sorted(ages)]

    def test_counts_are_added_and_times_are_joined(self) -> None:
        """The counts of all calls are added; the earliest and the latest time are kept."""
        self.put("alice")
        began = self.clock()
        for allowed, refused in ((1, 0), (2, 5), (0, 1)):
            self.store.record_sightings([self.seen(allowed=allowed, refused=refused)])
            self.clock.advance(timedelta(hours=1))
        late = self.seen(at=began - DAY, last_at=began)
        self.store.record_sightings([late])
        assert self.sightings() == (
            Sighting(
                username="alice",
                address=HERE,
                first_at=began - DAY,
                last_at=began + timedelta(hours=2),
                allowed=4,
                refused=6,
            ),
        )

    def test_one_user_and_address_may_come_twice_and_in_other_spellings(self) -> None:
        """Addresses are stored in their canonical form."""
        self.put("alice")
        self.store.record_sightings(
            [
                self.seen(address="2001:DB8:0::1"),
                self.seen(address="2001:db8::1", refused=1),
                self.seen(address="::ffff:203.0.113.7"),
            ]
        )
        found = {each.address: (each.allowed, each.refused) for each in self.sightings()}
        assert found == {"2001:db8::1": (2, 1), HERE: (1, 0)}

    def test_users_who_are_not_registered_are_left_out(self) -> None:
        """Nothing is kept of unknown or removed users, and nothing is to be told to them."""
        self.put("alice", "gone")
        self.store.remove_users(["gone"])
        told = self.store.record_sightings(
            [self.seen(name, refused=1) for name in ("alice", "gone", "nobody", "a\ud800b", "a\0b")]
        )
        assert [each.username for each in told] == ["alice"]
        assert self.sightings("gone") == self.sightings("nobody") == ()

    def test_32_addresses_of_a_user_are_kept_those_seen_last(self) -> None:
        """The oldest goes, even if it was just recorded; other users lose nothing."""
        self.put("alice", "bob")
        self.store.record_sightings([self.seen("bob", at=self.clock() - 80 * DAY)])
        for number in range(40):
            self.clock.advance(timedelta(minutes=1))
            self.store.record_sightings([self.seen(address=f"10.0.0.{number}")])
        assert self.addresses() == [f"10.0.0.{number}" for number in range(39, 7, -1)]
        self.store.record_sightings([self.seen(address="10.9.9.9", at=self.clock() - DAY)])
        assert "10.9.9.9" not in self.addresses()
        assert self.addresses("bob") == [HERE]

    def test_many_addresses_of_a_user_at_once_leave_32(self) -> None:
        """A full batch about one user leaves the newest 32 addresses."""
        self.put("alice")
        at = self.clock()
        self.store.record_sightings(
            [
                self.seen(address=f"10.0.{n // 256}.{n % 256}", at=at - timedelta(minutes=n))
                for n in range(1000)
            ]
        )
        assert self.addresses() == [f"10.0.0.{number}" for number in range(32)]

    def test_sightings_of_more_than_90_days_ago_are_dropped(self) -> None:
        """They are not returned, and recording deletes those of all users."""
        self.put("alice", "bob")
        self.store.record_sightings([self.seen(), self.seen("bob")])
        self.clock.advance(timedelta(days=90))
        assert self.addresses() == self.addresses("bob") == [HERE]
        self.clock.advance(timedelta(microseconds=1))
        assert self.addresses() == self.addresses("bob") == []
        self.store.record_sightings([self.seen(address="10.0.0.1")])
        self.clock.set(self.clock() - DAY)
        assert self.addresses() == ["10.0.0.1"], "what was too old was not deleted"
        assert self.addresses("bob") == [], "what was too old was not deleted for others"

    def test_a_sighting_that_is_too_old_is_not_recorded(self) -> None:
        """A batch that arrives late writes nothing that has to be dropped."""
        self.put("alice")
        old = self.seen(at=self.clock() - 91 * DAY, refused=1)
        assert self.store.record_sightings([old]) == ()
        assert self.addresses() == []

    def test_a_time_in_the_future_becomes_the_present(self) -> None:
        """A clock that runs ahead keeps no sighting for longer."""
        self.put("alice")
        self.store.record_sightings([self.seen(at=self.clock() + DAY)])
        (found,) = self.sightings()
        assert found.first_at == found.last_at == self.clock()

    def test_bad_sightings_are_refused_and_nothing_is_written(self) -> None:
        """An invalid address, a negative count or too many sightings are an error."""
        self.put("alice")
        for bad in (
            self.seen(address="203.0.113.0/24"),
            self.seen(address=""),
            self.seen(allowed=-1),
            self.seen(refused=-1),
        ):
            with raises(errors.InvalidValue):
                self.store.record_sightings([self.seen(address="10.0.0.1"), bad])
        with raises(errors.InvalidValue):
            self.store.record_sightings([self.seen()] * 1001)
        assert self.addresses() == []

    def test_nothing_is_appended_to_the_audit_log(self) -> None:
        """Recording changes neither the revision nor its token."""
        self.put("alice")
        before = self.cursor()
        self.store.record_sightings([self.seen(refused=1)])
        assert self.store.record_sightings([]) == ()
        assert self.cursor() == before

    def test_a_refused_login_is_returned_once_a_day_for_each_address(self) -> None:
        """The notice is due again after a day, and only for a new refusal."""
        self.put("alice", "bob")
        began = self.clock()
        other = "2001:db8::1"

        def told(*sightings: Sighting) -> list[tuple[str, str, int]]:
            found = self.store.record_sightings(sightings)
            return sorted((each.username, each.address, each.refused) for each in found)

        assert told(self.seen()) == []
        assert told(self.seen(refused=1), self.seen("bob")) == [("alice", HERE, 1)]
        assert told(self.seen(refused=1)) == []
        assert told(self.seen(refused=1), self.seen(address=other, refused=4)) == [
            ("alice", other, 4)
        ]
        self.clock.set(began + DAY - timedelta(microseconds=1))
        assert told(self.seen(refused=1)) == []
        self.clock.set(began + DAY)
        assert told(self.seen()) == []
        assert told(self.seen(refused=1)) == [("alice", HERE, 5)]

    def test_one_of_several_servers_is_to_tell_a_user(self) -> None:
        """Of several calls at the same moment, one returns the refused login."""
        self.put("alice")
        other = self.second()
        stores: list[RestrictionStore] = [self.store, self.store if other is None else other] * 4
        for number in range(5):
            seen = [self.seen(address=f"10.0.0.{number}", refused=1)]
            answers = together(partial(store.record_sightings, seen) for store in stores)
            assert sum(len(told) for told in answers) == 1
        assert [each.refused for each in self.sightings()] == [len(stores)] * 5

    def test_concurrent_batches_lose_nothing(self) -> None:
        """Batches about the same users in any order are all counted, without deadlock."""
        names = [f"user{number}" for number in range(20)]
        self.put(*names)
        other = self.second()
        stores = [self.store, self.store if other is None else other] * 3
        at = self.clock()

        def batch(turn: int) -> list[Sighting]:
            order = names if turn % 2 else names[::-1]
            return [self.seen(name, f"10.0.0.{n}", at=at) for name in order for n in range(20)]

        together(partial(store.record_sightings, batch(turn)) for turn, store in enumerate(stores))
        for name in names:
            assert [each.allowed for each in self.sightings(name)] == [len(stores)] * 20

    def test_sightings_follow_a_renamed_user(self) -> None:
        """A rename moves them, and when the user was told about them."""
        self.put("alice", "bob")
        self.store.record_sightings([self.seen(refused=1), self.seen("bob", "10.0.0.1")])
        (before,) = self.sightings()
        self.store.rename_user("alice", "Alice2")
        assert self.sightings() == ()
        (after,) = self.sightings("alice2")
        assert (after.address, after.refused, after.first_at) == (HERE, 1, before.first_at)
        assert self.addresses("bob") == ["10.0.0.1"]
        assert self.store.record_sightings([self.seen("alice2", refused=1)]) == (), "told again"

    def test_sightings_follow_users_who_swap_usernames(self) -> None:
        """Renames of one change move all sightings at once."""
        names = ("alice", "bob", "carol")
        self.store.sync_users([user(name, uid=name) for name in names])
        self.store.record_sightings(
            [self.seen(name, f"10.0.0.{n}") for n, name in enumerate(names)]
        )
        self.store.sync_users(
            [user(new, uid=old) for new, old in zip(("bob", "carol", "alice"), names, strict=True)]
        )
        assert self.addresses("bob") == ["10.0.0.0"]
        assert self.addresses("carol") == ["10.0.0.1"]
        assert self.addresses("alice") == ["10.0.0.2"]

    def test_a_renamed_user_does_not_get_the_sightings_of_another(self) -> None:
        """Those of a removed user with the new username are deleted."""
        for rename in (
            lambda: self.store.rename_user("alice", "bob"),
            lambda: self.store.sync_users([user("bob", uid="1")]),
        ):
            self.store.put_users([user("alice", uid="1"), user("bob")])
            self.store.record_sightings([self.seen(), self.seen("bob", "10.0.0.1")])
            self.store.remove_users(["bob"])
            rename()
            assert self.addresses("bob") == [HERE]
            self.store.remove_users(["bob"])

    def test_a_user_who_is_registered_again_has_no_sightings(self) -> None:
        """The username may belong to somebody else now."""
        for put in (self.store.put_users, self.store.sync_users):
            self.put("alice", "bob")
            self.store.record_sightings([self.seen(), self.seen("bob")])
            self.store.remove_users(["alice"])
            put([user("alice", full_name="Somebody Else")])
            assert self.addresses() == []
            assert self.addresses("bob") == [HERE]
            self.store.remove_users(["alice"])

    def test_sightings_are_forgotten_with_an_entry(self) -> None:
        """All addresses of one user are deleted; without any, nothing is appended."""
        self.put("alice", "bob")
        self.store.record_sightings(
            [self.seen(refused=1), self.seen(address="10.0.0.1"), self.seen("bob")]
        )
        boss = Actor(
            username="boss", email="b@x.example", manages=set(), address="10.1.1.1", via="a test"
        )
        assert self.store.forget_sightings("ALICE", actor=boss) == 2
        entry = self.last_change()
        assert entry.action is Action.FORGET_SIGHTINGS
        assert (entry.username, entry.account_id) == ("alice", "A1")
        assert (entry.actor, entry.actor_address) == ("boss", "10.1.1.1")
        assert entry.detail == {"addresses": "2", "via": "a test"}
        assert self.addresses() == []
        assert self.addresses("bob") == [HERE]
        before = self.cursor()
        assert self.store.forget_sightings("alice") == 0
        assert self.cursor() == before
        assert len(self.store.record_sightings([self.seen(refused=1)])) == 1

    def test_sightings_of_a_removed_user_can_be_forgotten(self) -> None:
        """The user need not be registered; a bad username is an error."""
        self.put("alice")
        self.store.record_sightings([self.seen()])
        self.store.remove_users(["alice"])
        assert self.store.forget_sightings("alice") == 1
        assert self.last_change().actor is None
        with raises(errors.UsernameError):
            self.store.forget_sightings("")

    def test_the_overview_says_when_each_restriction_was_used_last(self) -> None:
        """Allowed logins within 90 days count, for each restriction that has the address."""
        self.put("alice", "bob")
        network = self.restriction(addresses="203.0.113.0/24")
        single = self.restriction(addresses=HERE)
        refused = self.restriction(addresses="2001:db8::/32")
        unused = self.restriction(addresses="198.51.100.1")
        self.add(network, single, refused, unused)
        began = self.clock()
        self.clock.advance(timedelta(days=3))
        self.store.record_sightings(
            [
                self.seen(at=began + DAY),
                self.seen(address="203.0.113.8", at=began + 2 * DAY),
                self.seen(address="2001:db8::1", allowed=0, refused=3),
                self.seen("bob", "198.51.100.1"),
            ]
        )
        assert self.last_used() == {single.id: began + DAY, network.id: began + 2 * DAY}
        self.clock.set(began + 91 * DAY + timedelta(microseconds=1))
        assert self.last_used() == {network.id: began + 2 * DAY}

    def last_used(self) -> dict[str, datetime]:
        (alice,) = self.store.overview(EVERY, search="alice").items
        return dict(alice.last_used)

    def test_a_restriction_was_not_used_before_it_was_created(self) -> None:
        """An earlier login from its addresses does not count."""
        self.put("alice")
        self.store.record_sightings([self.seen()])
        self.clock.advance(timedelta(hours=1))
        restriction = self.restriction(addresses=HERE)
        self.add(restriction)
        assert self.last_used() == {}
        self.store.record_sightings([self.seen()])
        assert self.last_used() == {restriction.id: self.clock()}
