"""What others change while an import has been judged, and is waiting for the writer's turn."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from ipguard.errors import (
    DuplicateRestriction,
    IPGuardError,
    StoreUnavailable,
    TooManyRestrictions,
    UnknownUser,
)
from ipguard.model import EVERYBODY, Action, Actor, Restriction
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores._sql import Params, Row
from ipguard.stores._sql.bulk import BulkRestrictions, BulkUsers
from ipguard.stores.postgres._transaction import Batch
from ipguard.testing import FakeClock
from ipguard.testing._case import Call, StoreCase, raises, user
from tests.postgres import Given, Server, fresh_schema, until

MANY = 150  # users; so many are staged, and not compared one by one


class Between(StoreCase):
    """Others change something between the judging of an import and its turn."""

    @pytest.fixture(autouse=True)
    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def between(self, change: Callable[[], object]) -> None:
        """Let another thread change something once the restrictions are judged."""
        judge = BulkRestrictions.judge

        def judged(staged: BulkRestrictions, db: Any, now: datetime) -> None:
            found = judge(staged, db, now)
            self.patch.setattr(BulkRestrictions, "judge", judge)
            Call(change).result()
            return found

        self.patch.setattr(BulkRestrictions, "judge", judged)

    def stage(self, *staged: Restriction, per_user: int = 10) -> int:
        with self.store.transaction(staged=staged) as turn:
            count = turn.add_staged(per_user=per_user)
            self.append(turn, frozenset(r.username for r in staged))
        return count

    def refused(self, kind: type[IPGuardError], *staged: Restriction, per_user: int = 10) -> None:
        """Fail unless all are refused, in a turn that goes on and changes something else."""
        with self.store.transaction(staged=staged) as turn:
            with raises(kind):
                turn.add_staged(per_user=per_user)
            self.append(turn)
        ids = {r.id for r in staged}
        for name in ("alice", "bob"):
            assert ids.isdisjoint(r.id for r in self.held(name))

    def test_a_user_who_goes(self) -> None:
        """A user removed in between is not known, whoever else is."""
        self.put("alice", "bob")
        self.between(lambda: self.store.remove_users(["bob"]))
        self.refused(UnknownUser, self.restriction("alice"), self.restriction("bob"))

    def test_addresses_that_come(self) -> None:
        """Addresses added in between are there already; once they have expired they make way."""
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        self.between(lambda: self.add(self.restriction("bob", "203.0.113.7", expires_at=soon)))
        mine = self.restriction("bob", "203.0.113.7", created_at=soon)
        self.refused(DuplicateRestriction, self.restriction("alice"), mine)
        other = self.restriction("bob", "203.0.113.8", expires_at=soon)
        self.clock.advance(timedelta(seconds=1))
        self.between(lambda: self.add(other))
        assert self.stage(mine, self.restriction("bob", "203.0.113.8", created_at=soon)) == 2
        assert len(self.held("bob")) == 2

    def test_room_that_goes(self) -> None:
        """What a user was given in between counts for how many it may have."""
        self.put("alice", "bob")
        more = [self.restriction("bob") for _ in range(3)]
        self.between(lambda: self.add(self.restriction("bob")))
        self.refused(TooManyRestrictions, self.restriction("alice"), *more, per_user=3)
        assert self.stage(*more, per_user=4) == 3

    def test_everybody_is_touched(self) -> None:
        """A change that names nobody has them all judged again."""
        self.put("alice", "bob")

        def change() -> None:
            with self.store.transaction() as turn:
                turn.add_restriction(self.restriction("bob", "203.0.113.7"))
                turn.append(Action.IMPOSE_MANY, actor="boss", touches=EVERYBODY)

        self.between(change)
        self.refused(DuplicateRestriction, self.restriction("bob", "203.0.113.7"))
        self.between(lambda: self.touch("nobody"))
        assert self.stage(self.restriction("bob"), self.restriction("alice")) == 2

    def test_more_changes_than_are_read(self) -> None:
        """After many changes all are judged again, and the last of them counts."""
        self.patch.setattr("ipguard.stores._sql.bulk.CHANGES_READ", 1)
        self.put("alice", "bob")

        def change() -> None:
            self.touch("alice")
            self.touch("alice")
            self.add(self.restriction("bob", "203.0.113.7"))

        self.between(change)
        self.refused(DuplicateRestriction, self.restriction("bob", "203.0.113.7"))

    def test_what_refused_is_gone(self) -> None:
        """What was in the way is lifted, or expires, before the turn: then all are added."""
        self.put("alice", "bob")
        soon = self.clock() + timedelta(seconds=1)
        lifted = self.restriction("bob", "203.0.113.7")
        self.add(lifted, self.restriction("alice", "203.0.113.7", expires_at=soon))

        def lift() -> None:
            with self.store.transaction() as turn:
                turn.remove_restriction(lifted.id)
                self.append(turn, frozenset({"bob"}))

        self.between(lift)
        assert self.stage(self.restriction("bob", "203.0.113.7")) == 1
        self.between(lambda: self.clock.advance(timedelta(seconds=1)))
        assert self.stage(self.restriction("alice", "203.0.113.7", created_at=soon)) == 1
        assert len(self.held()) == len(self.held("bob")) == 1

    def test_what_refused_is_there_still(self) -> None:
        """It refuses again, whether others changed something or not."""
        self.put("alice", "bob")
        self.add(self.restriction("bob", "203.0.113.7"))
        for change in (lambda: 0, lambda: self.touch("alice")):
            self.between(change)
            self.refused(
                DuplicateRestriction,
                self.restriction("alice"),
                self.restriction("bob", "203.0.113.7"),
            )

    def test_they_are_not_there_before_they_are_added(self) -> None:
        """A turn that looks first sees none of them, may write others, and can add them then."""
        self.put("alice")
        mine, other = self.restriction(), self.restriction()
        with self.store.transaction(staged=[mine]) as turn:
            assert turn.restrictions("alice") == ()
            assert turn.restriction(mine.id) is None
            turn.add_restriction(other)
            assert turn.add_staged(per_user=2) == 1
            assert turn.restrictions("alice") == (mine, other)
            turn.remove_restriction(mine.id)
            self.append(turn, frozenset({"alice"}))
        assert self.held() == (other,)

    def test_users_of_others_meanwhile(self) -> None:
        """Users put and removed while many are compared: the import says what is so afterwards."""
        many = [user(f"u{number:03}") for number in range(MANY)]
        self.store.put_users(many[:50])
        compare = BulkUsers.compare

        def compared(staged: BulkUsers, db: Any) -> tuple[int, int]:
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
        """Do something on another thread when many users are written, and not yet there."""
        ahead = BulkUsers.write_ahead

        def wrote(staged: BulkUsers, db: Any) -> None:
            ahead(staged, db)
            Call(meanwhile).result()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BulkUsers, "write_ahead", wrote)
            yield

    def test_nobody_waits_for_users_that_are_being_put(self) -> None:
        """Others have their turns and see nothing of them; who signs up the same user waits."""
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

    def test_who_signs_up_waits_no_longer_than_it_may(self) -> None:
        """It is told so after the store's timeout, and the import goes on."""
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

    def test_a_client_that_hangs_keeps_nobody_from_signing_up(self) -> None:
        """Whoever puts many users, and stops half way, loses its place to the next."""
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

    def test_a_trail_that_is_pruned_meanwhile(self) -> None:
        """Whose policies have changed is not known then, so all are judged again."""
        self.put("alice", "bob")
        rows = Batch.rows

        def change() -> None:
            self.add(self.restriction("bob", "203.0.113.7"))
            self.touch("alice")
            self.patch.setattr(Batch, "rows", pruned)

        def pruned(turn: Batch, sql: str, params: Params = ()) -> list[Row]:
            found = rows(turn, sql, params)
            if "FROM changes" in sql:
                self.patch.setattr(Batch, "rows", rows)
                before = self.clock() + timedelta(seconds=1)
                assert Call(lambda: self.store.prune(before)).result() == 3  # type: ignore[attr-defined]
            return found

        self.between(change)
        self.refused(DuplicateRestriction, self.restriction("bob", "203.0.113.7"))

    def test_a_database_that_isolates_more_by_default(self) -> None:
        """A turn rests on what was committed before it, not on what its transaction saw first."""
        self.put("alice")
        separator = "&" if "?" in self.url else "?"
        default = quote("-c default_transaction_isolation=serializable")
        store = open_store(f"{self.url}{separator}options={default}", clock=self.clock)
        self._opened.append(store)
        self.between(lambda: self.add(self.restriction()))
        with store.transaction(staged=[self.restriction()]) as turn:
            assert turn.add_staged(per_user=2) == 1
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

    def test_a_library_that_knows_nothing_of_it(self) -> None:
        """Users that are put past the import, as an older library does, make it say so."""
        self.put("alice")

        def meanwhile() -> None:
            with self.store.transaction() as turn:
                turn.append(Action.PUT_USERS, actor=None)

        with self.written_ahead(meanwhile), raises(StoreUnavailable):
            self.store.put_users([user(f"u{number:03}") for number in range(MANY)])
        assert len(self.store.overview(Actor.EVERY_ACCOUNT).items) == 1
