"""Changes by others between the checks of an import and its write transaction."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import attrs
import pytest

from ipguard.errors import (
    DuplicateRestriction,
    IPGuardError,
    StoreUnavailable,
    TooManyRestrictions,
    UnknownUser,
)
from ipguard.model import EVERYBODY, Action, Actor, Restriction
from ipguard.rules import UserPlan
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores._sql import Params, Row
from ipguard.stores._sql.bulk import BulkRestrictions, BulkUsers, FewUsers
from ipguard.stores.postgres._connection import Batch
from ipguard.testing import FakeClock
from ipguard.testing._case import Call, StoreCase, raises, user
from tests.postgres import Given, Server, fresh_schema, until

MANY = 150  # users; so many are staged, and not compared one by one


class Between(StoreCase):
    """A store in which others change something between the checks and the transaction."""

    @pytest.fixture(autouse=True)
    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def between(self, change: Callable[[], object]) -> None:
        """Let another thread change something once the restrictions are checked."""
        judge = BulkRestrictions.judge

        def judged(staged: BulkRestrictions, db: Any, now: datetime) -> None:
            found = judge(staged, db, now)
            self.patch.setattr(BulkRestrictions, "judge", judge)
            Call(change).result()
            return found

        self.patch.setattr(BulkRestrictions, "judge", judged)

    def refused(self, kind: type[IPGuardError], *staged: Restriction, per_user: int = 10) -> None:
        """Fail unless all are refused, in a transaction that then changes something else."""
        with self.store.transaction(staged=staged) as turn:
            with raises(kind):
                turn.add_staged(per_user=per_user)
            self.append(turn)
        ids = {r.id for r in staged}
        for name in ("alice", "bob"):
            assert ids.isdisjoint(r.id for r in self.held(name))

    def test_a_user_who_is_removed(self) -> None:
        """A user removed in between is unknown; the others stay known."""
        self.put("alice", "bob")
        self.between(lambda: self.store.remove_users(["bob"]))
        self.refused(UnknownUser, self.restriction("alice"), self.restriction("bob"))

    def test_addresses_that_are_added(self) -> None:
        """Addresses added in between are duplicates; once they have expired they are replaced."""
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        self.between(lambda: self.add(self.restriction("bob", "203.0.113.7", expires_at=soon)))
        mine = self.restriction("bob", "203.0.113.7", created_at=soon)
        self.refused(DuplicateRestriction, self.restriction("alice"), mine)
        other = self.restriction("bob", "203.0.113.8", expires_at=soon)
        self.clock.advance(timedelta(seconds=1))
        self.between(lambda: self.add(other))
        assert self.add_staged([mine, self.restriction("bob", "203.0.113.8", created_at=soon)]) == 2
        assert len(self.held("bob")) == 2

    def test_restrictions_that_use_up_the_limit(self) -> None:
        self.put("alice", "bob")
        more = [self.restriction("bob") for _ in range(3)]
        self.between(lambda: self.add(self.restriction("bob")))
        self.refused(TooManyRestrictions, self.restriction("alice"), *more, per_user=3)
        assert self.add_staged([*more], per_user=4) == 3

    def test_everybody_is_touched(self) -> None:
        """After a change that touches EVERYBODY, all restrictions are checked again."""
        self.put("alice", "bob")

        def change() -> None:
            with self.store.transaction() as turn:
                turn.add_restriction(self.restriction("bob", "203.0.113.7"))
                turn.append(Action.IMPOSE_MANY, actor="boss", touches=EVERYBODY)

        self.between(change)
        self.refused(DuplicateRestriction, self.restriction("bob", "203.0.113.7"))
        self.between(lambda: self.touch("nobody"))
        assert self.add_staged([self.restriction("bob"), self.restriction("alice")]) == 2

    def test_more_changes_than_are_read(self) -> None:
        """After many changes all are checked again, and the last one counts."""
        self.patch.setattr("ipguard.stores._sql.bulk.CHANGES_READ", 1)
        self.put("alice", "bob")

        def change() -> None:
            self.touch("alice")
            self.touch("alice")
            self.add(self.restriction("bob", "203.0.113.7"))

        self.between(change)
        self.refused(DuplicateRestriction, self.restriction("bob", "203.0.113.7"))

    def test_a_duplicate_that_disappears(self) -> None:
        """If a duplicate is lifted, or expires, before the transaction, all are added."""
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        lifted = self.restriction("bob", "203.0.113.7")
        self.add(lifted, self.restriction("alice", "203.0.113.7", expires_at=soon))

        def lift() -> None:
            with self.store.transaction() as turn:
                turn.remove_restriction(lifted.id)
                self.append(turn, frozenset({"bob"}))

        self.between(lift)
        assert self.add_staged([self.restriction("bob", "203.0.113.7")]) == 1
        self.between(lambda: self.clock.advance(timedelta(seconds=1)))
        assert self.add_staged([self.restriction("alice", "203.0.113.7", created_at=soon)]) == 1
        assert len(self.held()) == len(self.held("bob")) == 1

    def test_a_duplicate_that_stays(self) -> None:
        """A duplicate refuses the import again, whether others changed something or not."""
        self.put("alice", "bob")
        self.add(self.restriction("bob", "203.0.113.7"))
        for change in (lambda: 0, lambda: self.touch("alice")):
            self.between(change)
            self.refused(
                DuplicateRestriction,
                self.restriction("alice"),
                self.restriction("bob", "203.0.113.7"),
            )

    def test_lists_that_change_before_they_are_replaced(self) -> None:
        """Restrictions that others add in between end or are kept; expired ones are replaced."""
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        ends, expires = self.restriction(), self.restriction("alice", "::7", expires_at=soon)
        equal = self.restriction("alice", "203.0.113.7")
        other = self.restriction("alice", "203.0.113.8", label="other")
        self.add(expires, ends, self.restriction("bob", "203.0.113.7"))

        def change() -> None:
            self.add(equal, other)
            self.clock.advance(timedelta(seconds=1))

        staged = [
            self.restriction("alice", "203.0.113.7", created_at=soon),
            self.restriction("alice", "203.0.113.8", created_at=soon),
            self.restriction("alice", "::7", expires_at=soon, created_at=soon),
            self.restriction("alice", "10.0.0.0/8", created_at=soon),
            self.restriction("bob", "203.0.113.7", created_at=soon),
        ]
        self.between(change)
        assert self.stage(staged, per_user=4, replace=True) == (3, 2, 3)
        assert self.held() == (equal, *staged[1:4])
        assert len(self.held("bob")) == 1
        self.between(lambda: self.add(self.restriction("bob")))
        assert self.stage([attrs.evolve(staged[4], id="x")], replace=True) == (0, 1, 1)

    def test_rows_that_others_add_before_they_are_skipped(self) -> None:
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        live = self.restriction("bob", "203.0.113.7", expires_at=soon)
        mine = self.restriction("alice", "203.0.113.7", label="theirs")
        self.add(live)

        def change() -> None:
            self.add(mine)
            self.clock.advance(timedelta(seconds=1))

        staged = [self.restriction(name, "203.0.113.7") for name in ("alice", "bob")]
        self.between(change)
        assert self.stage(staged, per_user=1, skip_existing=True) == (1, 1, 1)
        assert (self.held(), self.held("bob")) == ((mine,), (staged[1],))

    def test_staged_rows_are_invisible_until_they_are_added(self) -> None:
        """A transaction that reads first sees none of them, and can still add them later."""
        self.put("alice")
        mine, other = self.restriction(), self.restriction()
        with self.store.transaction(staged=[mine]) as turn:
            assert turn.restrictions("alice") == ()
            assert turn.restriction(mine.id) is None
            turn.add_restriction(other)
            assert turn.add_staged(per_user=2).added == 1
            assert turn.restrictions("alice") == (mine, other)
            turn.remove_restriction(mine.id)
            self.append(turn, frozenset({"alice"}))
        assert self.held() == (other,)

    def test_users_written_by_others(self) -> None:
        """The import reports the differences after users were added and removed in between."""
        many = [user(f"u{number:03}") for number in range(MANY)]
        self.store.put_users(many[:50])
        compare = BulkUsers.compare

        def compared(staged: BulkUsers, db: Any) -> tuple[int, bool]:
            found = compare(staged, db)
            self.patch.setattr(BulkUsers, "compare", compare)
            Call(lambda: self.store.put_users(many[50:52])).result()
            Call(lambda: self.store.remove_users(["u000"])).result()
            return found

        self.patch.setattr(BulkUsers, "compare", compared)
        self.store.put_users([*many[:149], user("u149", full_name="Last One")])
        page = self.store.overview(Actor.EVERY_ACCOUNT, limit=2 * MANY)
        assert [each.user.username for each in page] == [each.username for each in many]
        assert not any(each.removed for each in page)
        assert self.store.history(Actor.EVERY_ACCOUNT).items[0].detail == {
            "added": "99",
            "updated": "0",
        }
        assert len(self.store.overview(Actor.EVERY_ACCOUNT, search="last").items) == 1

    def test_a_username_that_others_restrict(self) -> None:
        """A restriction made in between stays with its user; a new one was to get the username."""
        self.store.put_users([user("jo", uid="1"), user("ann", uid="2")])
        compare = BulkUsers.compare

        def compared(staged: BulkUsers, db: Any) -> tuple[int, bool]:
            found = compare(staged, db)
            self.patch.setattr(BulkUsers, "compare", compare)
            Call(lambda: self.add(self.restriction("jo"))).result()
            return found

        self.patch.setattr(BulkUsers, "compare", compared)
        records = [user("jo", uid="3"), user("ann", uid="2")]
        with suppress(StoreUnavailable):  # PostgreSQL has written the users already
            self.store.sync_users(records, remove_missing=True)
        found = self.store.sync_users(records, remove_missing=True)
        assert [record for record, _ in found.refused] == records[:1]
        with self.store.transaction() as turn:
            stored = turn.user("jo")
        assert stored is not None
        assert (stored.user.uid, stored.removed) == ("1", True)
        assert len(self.held("jo")) == 1

    def test_a_user_written_by_others(self) -> None:
        """Users that are compared one by one are compared again under the lock."""
        self.put("jo")
        plan = FewUsers.plan

        def planned(staged: FewUsers, db: Any) -> tuple[int, UserPlan]:
            found = plan(staged, db)
            self.patch.setattr(FewUsers, "plan", plan)
            Call(lambda: self.put("jo", "ann", full_name="Jo B")).result()
            return found

        self.patch.setattr(FewUsers, "plan", planned)
        assert self.put("jo", "ann", "zoe", full_name="Jo B") == 3
        assert [change.detail for change in self.store.history(Actor.EVERY_ACCOUNT, limit=2)] == [
            {"added": "1", "updated": "0"},
            {"added": "1", "updated": "1"},
        ]


class TestSQLite(Between):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        return open_store(f"sqlite:///{self.folder / secrets.token_hex(4)}.db", clock=clock)


class TestPostgres(Between):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: Server | Given) -> None:
        self.server = postgres

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        self.url = self.server.url(schema=fresh_schema())
        return open_store(self.url, clock=clock)

    @contextmanager
    def written_ahead(self, meanwhile: Callable[[], object]) -> Iterator[None]:
        """Run something on another thread when many users are written, but invisible."""
        ahead = BulkUsers.write_ahead

        def wrote(staged: BulkUsers, db: Any) -> None:
            ahead(staged, db)
            Call(meanwhile).result()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BulkUsers, "write_ahead", wrote)
            yield

    def test_a_bulk_write_of_users_delays_only_the_same_users(self) -> None:
        """Other writers continue and see none of them; a sign-up of the same user waits."""
        self.put("alice")
        many, waiting = [user(f"u{number:03}") for number in range(MANY)], []

        def meanwhile() -> None:
            assert self.add(self.restriction()) == 2
            assert [each.user.username for each in self.store.overview(Actor.EVERY_ACCOUNT)] == [
                "alice"
            ]
            for store in (self.store, open_store(self.url)):
                self._opened.append(store)
                waiting.append(Call(lambda s=store: s.put_users([many[7], user("zoe")])))  # type: ignore[misc]
            assert self.touch("alice") == 3
            assert not any(call.over(0.05) for call in waiting)

        with self.written_ahead(meanwhile):
            assert self.store.put_users(many) == 4
        assert [call.result() for call in waiting] == [5, 5]
        assert len(self.store.overview(Actor.EVERY_ACCOUNT, limit=2 * MANY).items) == MANY + 2

    def test_a_sign_up_waits_for_at_most_the_timeout(self) -> None:
        self.put("alice")
        many = [user(f"u{number:03}") for number in range(MANY)]
        separator = "&" if "?" in self.url else "?"
        hasty = open_store(f"{self.url}{separator}timeout=0.3")
        self._opened.append(hasty)

        def meanwhile() -> None:
            calls = [Call(lambda: hasty.put_users([many[7]])) for _ in range(2)]
            for call in calls:
                with raises(StoreUnavailable):
                    call.result()

        with self.written_ahead(meanwhile):
            assert self.store.put_users(many) == 2
        assert hasty.put_users([many[7], user("zoe")]) == 3

    def test_a_hanging_client_does_not_block_sign_ups(self) -> None:
        """A client that stops in the middle of a bulk write loses its lock."""
        self.put("alice")
        separator = "&" if "?" in self.url else "?"
        hanging = open_store(f"{self.url}{separator}timeout=0.3")
        self._opened.append(hanging)
        revisions: list[int] = []
        with (
            self.written_ahead(lambda: revisions.append(self.store.put_users([user("zoe")]))),
            raises(StoreUnavailable),
        ):
            hanging.put_users([user(f"u{number:03}") for number in range(MANY)])
        assert revisions == [2]
        assert len(self.store.overview(Actor.EVERY_ACCOUNT).items) == 2

    def test_an_audit_log_that_is_pruned(self) -> None:
        """The touched users are then unknown, so all restrictions are checked again.

        Only an older library prunes without the writer's lock.
        """
        self.put("alice", "bob")
        rows = Batch.rows
        schema = parse_qs(urlsplit(self.url).query)["schema"][0]

        def change() -> None:
            self.add(self.restriction("bob", "203.0.113.7"))
            self.touch("alice")
            self.patch.setattr(Batch, "rows", pruned)

        def pruned(turn: Batch, sql: str, params: Params = ()) -> list[Row]:
            found = rows(turn, sql, params)
            if "FROM changes" in sql:
                self.patch.setattr(Batch, "rows", rows)
                self.server.execute(f"DELETE FROM {schema}.changes WHERE revision < 3")
            return found

        self.between(change)
        self.refused(DuplicateRestriction, self.restriction("bob", "203.0.113.7"))

    def test_a_database_that_isolates_more_by_default(self) -> None:
        """A transaction sees all earlier commits, even those after its first snapshot."""
        self.put("alice")
        separator = "&" if "?" in self.url else "?"
        default = quote("-c default_transaction_isolation=serializable")
        store = open_store(f"{self.url}{separator}options={default}", clock=self.clock)
        self._opened.append(store)
        self.between(lambda: self.add(self.restriction()))
        with store.transaction(staged=[self.restriction()]) as turn:
            assert turn.add_staged(per_user=2).added == 1
            self.append(turn, frozenset({"alice"}))
        entered, leave = Event(), Event()

        def first() -> None:
            with self.store.transaction() as turn:
                entered.set()
                assert leave.wait(20)
                self.append(turn)

        calls = [Call(first)]
        assert entered.wait(20)
        calls.append(Call(lambda: self.touch("alice", store=store)))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
        schema = parse_qs(urlsplit(self.url).query)["schema"][0]
        until(lambda: self.server.execute(waiting, f"%{schema}%"), "the second waits")
        leave.set()
        assert [call.result() for call in calls] == [None, 5]

    def test_an_older_library(self) -> None:
        """If an older library writes users without the lock, the import raises."""
        self.put("alice")

        def meanwhile() -> None:
            with self.store.transaction() as turn:
                turn.append(Action.PUT_USERS, actor=None)

        with self.written_ahead(meanwhile), raises(StoreUnavailable):
            self.store.put_users([user(f"u{number:03}") for number in range(MANY)])
        assert len(self.store.overview(Actor.EVERY_ACCOUNT).items) == 1
