"""How much the databases read for a page of the listing, by their own counters."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest

from ipguard.addresses import AddressRange
from ipguard.model import (
    Action,
    Actor,
    Demand,
    PendingRequest,
    RequestKind,
    RequestState,
    StoredRequest,
    User,
    UserFilter,
)
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores._sql import Params, Row
from ipguard.stores._sql import store as listing
from ipguard.stores.postgres import _connection
from ipguard.stores.sqlite import Connection
from ipguard.testing import FakeClock
from tests.postgres import Given, Server, fresh_schema
from tests.test_scale_listing import START, restrictions

STEP = 4
BEGAN, GROWN = 400, 400 * STEP


class CountedSqlite:
    """A file. The counter is of SQLite's virtual machine, which takes about ten steps for a row."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.work = folder / "a.db", 0
        ask = Connection.rows

        def rows(session: Connection, sql: str, params: Params = ()) -> list[Row]:
            session.driver.set_progress_handler(self._ten_steps, 10)
            try:
                return ask(session, sql, params)
            finally:
                session.driver.set_progress_handler(None, 0)

        monkeypatch.setattr(Connection, "rows", rows)

    def _ten_steps(self) -> int:
        self.work += 1
        return 0

    def open(self) -> RestrictionStore:
        return open_store(f"sqlite:///{self.path}", clock=FakeClock(START))

    def analyze(self) -> None:
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("ANALYZE")


class CountedPostgres:
    """A schema. The counter is of the rows that all nodes of a plan read, and of pages."""

    def __init__(self, server: Server | Given, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.schema, self.work = server, fresh_schema(), 0
        ask = _connection.Connection.rows

        def rows(
            session: _connection.Connection, sql: str, params: Params = (), *, login: bool = False
        ) -> list[Row]:
            if sql.lstrip().startswith("SELECT"):
                explain = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {sql}"
                plan = ask(session, explain, params)[0][0][0]["Plan"]
                self.work += _rows_read(plan)
                self.work += plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
            return ask(session, sql, params, login=login)

        monkeypatch.setattr(_connection.Connection, "rows", rows)

    def open(self) -> RestrictionStore:
        return open_store(self.server.url(schema=self.schema, timeout=30), clock=FakeClock(START))

    def analyze(self) -> None:
        for table in (
            "users", "restrictions", "search_terms", "changes", "requests", "past_restrictions",
            "imports",
        ):  # fmt: skip
            self.server.execute(f"VACUUM ANALYZE {self.schema}.{table}")


def _rows_read(node: dict[str, Any]) -> int:
    kinds = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter")
    own = sum(node.get(kind, 0) for kind in kinds) * node["Actual Loops"]
    return int(own) + sum(map(_rows_read, node.get("Plans", ())))


def account(n: int) -> str:
    return "BIG" if n // STEP % 10 == 0 else f"U{n:05d}"


def grow(store: RestrictionStore, numbers: range) -> None:
    """Add users: a tenth belong to one account, each of the others has an account of its own."""
    store.put_users(
        User(
            username=f"user{n:05d}",
            full_name=f"{'Jo Ann' if n // STEP % 2 else 'Max'} Last{n:05d}",
            account_id=account(n),
        )
        for n in numbers
    )
    lists = [(f"user{n:05d}", f"10.1.{n >> 8}.{n & 255}") for n in numbers]
    lists += [(f"user{n:05d}", "198.51.100.0/24") for n in numbers if n // STEP % 4 < 2]
    with store.transaction() as turn:
        for restriction in restrictions(lists, str(numbers)):
            turn.add_restriction(restriction)
        for n in numbers:
            turn.append(Action.IMPOSE, actor=None, username=f"user{n:05d}", account_id=account(n))


def begin(store: RestrictionStore) -> None:
    """Add requests and temporary restrictions, few enough that filters begin with them."""
    later, addresses = START + timedelta(days=1), (AddressRange.parse("10.0.0.1"),)
    with store.transaction() as turn:
        for n in range(0, 50 * STEP, STEP):
            request = PendingRequest(
                id=f"q{n}", username=f"user{n:05d}", kind=RequestKind.ADD, adds=addresses,
                label="", requested_by="boss" if n % 2 else "other", requested_at=START,
                expires_at=later, number_expires_at=later, attempts_left=1,
                state=RequestState.PENDING, demand=Demand(approvals=1),
            )  # fmt: skip
            turn.save_request(StoredRequest(request=request, email="boss@example.com"))
        for restriction in restrictions(((f"user{n:05d}", "10.9.9.9") for n in range(50)), "soon"):
            turn.add_restriction(attrs.evolve(restriction, expires_at=later))
        turn.append(Action.IMPOSE, actor=None)


def pages(store: RestrictionStore) -> Iterator[tuple[str, Any]]:
    """Read the pages whose work must not depend on the users that they do not concern."""
    own = sorted({account(n) for n in range(0, GROWN, STEP)} - {"BIG"})
    every = Actor.EVERY_ACCOUNT
    actors: dict[str, Any] = {
        "every": every,
        "big": frozenset({"BIG"}),
        "tiny": frozenset({"U00004"}),
        "some": frozenset(own[::40]),
        "most": frozenset(own),
    }
    rare = ("last00004", "u00004", "last00004 jo", "no such name", "10.1.0.4", "9.9.9.9")
    for who, accounts in actors.items():
        for search in ("", *rare, "jo", "198.51.100.7", "198.51.100.0/24"):
            if search in (("", *rare) if who == "every" else ("",)) or who in ("tiny", "some"):
                page = store.overview(accounts, search=search, after="user00003", limit=5)
                yield f"{search!r} for {who}", page
        for only in get_args(UserFilter):
            if only != "unrestricted" or who in ("tiny", "some"):
                page = store.overview(accounts, only=only, after="user00003", limit=5)
                yield f"{only} for {who}", page
        yield f"counts for {who}", store.counts(accounts)
        yield f"requests for {who}", store.open_requests(accounts, requested_by="boss", limit=5)
        if who != "most":  # the newest changes are not theirs
            yield f"history for {who}", store.history(accounts, limit=5)


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def counted(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    postgres: Server | Given,
    monkeypatch: pytest.MonkeyPatch,
) -> CountedSqlite | CountedPostgres:
    if request.param == "SQLite":
        return CountedSqlite(tmp_path, monkeypatch)
    return CountedPostgres(postgres, monkeypatch)


READS: dict[str, Callable[[Any], object]] = {
    "a policy": lambda store: store.load_policy("jo"),
    "a row": lambda store: store.load_row("jo"),
    "a line": lambda store: store.overview(Actor.EVERY_ACCOUNT, search="jo"),
    "an earlier policy of another user": lambda store: store.policy_at("al", 2),
    "what an entry changed": lambda store: store.restrictions_changed(2),
    "the revision at a time": lambda store: store.revision_at(START),
    "the last change of another user": lambda store: store.last_changes(["al"]),
    "whether a username passed on": lambda store: store.passed_on("al", 2),
}


def test_restrictions_that_ended_cost_nothing(counted: CountedSqlite | CountedPostgres) -> None:
    """No read goes through ended restrictions, even those of the same user."""

    def replace(store: RestrictionStore, number: int) -> None:
        lists = (("jo", f"10.{number}.{n >> 8}.{n & 255}") for n in range(200))
        with store.transaction(staged=restrictions(lists, f"jo {number}")) as turn:
            turn.add_staged(per_user=1_000, replace=True)
            turn.append(Action.IMPOSE_MANY, actor=None, username="jo", touches=frozenset({"jo"}))

    def work(store: RestrictionStore) -> dict[str, int]:
        found = {}
        for name, read in READS.items():
            counted.work = 0
            read(store)
            found[name] = counted.work
        return found

    others = [f"user{n:04d}" for n in range(500)]
    with counted.open() as store:
        names = ("al", "jo", *others)
        store.put_users(User(username=name, full_name="", account_id="A1") for name in names)
        with store.transaction() as turn:
            for restriction in restrictions([("al", "10.0.0.1")], "al"):
                turn.add_restriction(restriction)
            turn.append(Action.IMPOSE, actor=None, username="al", touches=frozenset({"al"}))
        lists = ((name, f"10.2.{n}.{k}") for name in others for n in range(2) for k in range(2))
        with store.transaction(staged=restrictions(lists, "others")) as turn:
            turn.add_staged(per_user=4)
            turn.append(Action.IMPOSE_MANY, actor=None)
        replace(store, 0)
        replace(store, 1)
        counted.analyze()
        before = work(store)
        for number in range(2, 12):
            replace(store, number)
        counted.analyze()
        after = work(store)
    # Ten times the ended restrictions; a few pages more are read.
    assert not {name: n for name, n in after.items() if n - before[name] > 100}
    assert before["a policy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL"])
def test_pages_read_no_more_as_other_users_come(
    kind: str, tmp_path: Path, postgres: Server | Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the users cost no page more than a few rows, with statistics or without."""
    for name, size in (("_FEW", 100), ("_SORTED", 100), ("_COUNTED", 30)):
        monkeypatch.setattr(listing, name, size)
    counted: CountedSqlite | CountedPostgres = (
        CountedSqlite(tmp_path, monkeypatch)
        if kind == "SQLite"
        else CountedPostgres(postgres, monkeypatch)
    )

    def work(store: RestrictionStore) -> dict[str, int]:
        found = {}
        counted.work = 0
        for name, _ in pages(store):
            found[name], counted.work = counted.work, 0
        return found

    with counted.open() as store:
        begin(store)
        grow(store, range(0, GROWN, STEP))
        before = work(store)
        for first in range(1, STEP):
            grow(store, range(first, GROWN, STEP))
        unknown = work(store)
        counted.analyze()
        known = work(store)
    added = GROWN - BEGAN
    assert not {name: n for name, n in known.items() if n - before[name] > added // 4}
    # Without statistics, PostgreSQL may use any of two indexes over a small table.
    allowed = added // 4 if kind == "SQLite" else 30 * added
    assert not {name: n for name, n in unknown.items() if n - before[name] > allowed}
