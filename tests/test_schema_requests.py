"""Requests in the database: those of older libraries, those that they must not see, the indexes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from ipguard import Actor, User, Workflow, WorkflowSettings, confirmation
from ipguard.addresses import AddressRange
from ipguard.audit import micros
from ipguard.model import Demand, PendingRequest, RequestKind, RequestState, StoredRequest
from ipguard.stores._sql import IS_PENDING
from ipguard.testing import Outbox
from tests.postgres import Given, Server
from tests.test_scale_listing import START, Postgres, Run, Sqlite

BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)
KEY = bytes(range(32))
_OLD: Any = (
    "id, username, kind, first_ip, last_ip, label, requested_by, requested_at, expires_at,"
    " number_expires_at, attempts_left, state, restriction_id, restriction_expires_at, reason,"
    " email, key_id, digest, resends, mails_failed, sent_at"
)
"""The columns that the libraries for schemas 1 to 5 write."""
# How those libraries list the requests of a user, and confirm one.
_LISTED = "SELECT id FROM requests WHERE username = ? AND state = 'pending' ORDER BY requested_at"


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: Server | Given
) -> Sqlite | Postgres:
    return Sqlite(tmp_path, 5) if request.param == "SQLite" else Postgres(postgres, 5)


def old_request(run: Run, request_id: str, **fields: Any) -> None:
    """Write a request as the libraries for schemas 1 to 5 do."""
    first, last = AddressRange.parse("203.0.113.0/24").packed
    row = dict.fromkeys(_OLD.split(", "), "") | {
        "id": request_id, "username": "alice", "kind": "add", "first_ip": first, "last_ip": last,
        "label": "office", "requested_by": "boss", "requested_at": micros(START),
        "expires_at": micros(START) + 10**10, "number_expires_at": micros(START) + 10**9,
        "attempts_left": 5, "state": "pending", "restriction_id": None,
        "restriction_expires_at": None, "email": "boss@example.com", "key_id": b"",
        "digest": b"", "resends": 0, "mails_failed": 0, "sent_at": micros(START),
    }  # fmt: skip
    row |= fields
    marks = ", ".join("?" * len(row))
    run(f"INSERT INTO requests ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


@pytest.mark.parametrize("late", [False, True])
def test_a_request_of_an_older_library_is_read(place: Sqlite | Postgres, late: bool) -> None:
    """Before the migration or after it; that library would have confirmed the same."""
    number = "1234567890"
    keys = confirmation.Keyring(KEY)
    if late:
        place.open().close()  # type: ignore[attr-defined]
    place.old(lambda run: old_request(run, "q1"))
    place.old(lambda run: old_request(run, "q2", kind="delete", restriction_id="r1"))
    with place.open() as store:  # type: ignore[attr-defined]
        store.put_users([User(username="alice", full_name="Alice", account_id="A1")])
        with store.snapshot() as snapshot:
            added, deleted = snapshot.pending_requests("alice")
            stored = snapshot.request("q1")
            assert len(snapshot.request_times("boss", START - timedelta(1))) == 2
        assert stored is not None
        assert stored.request == added
        addresses = (AddressRange.parse("203.0.113.0/24"),)
        assert (added.kind, added.adds, added.removes) == (RequestKind.ADD, addresses, ())
        assert (deleted.kind, deleted.adds) == (RequestKind.DELETE, ())
        assert (deleted.removes, deleted.removed) == (("r1",), addresses)
        for each in (added, deleted):
            assert (each.demand, each.impact, each.batch) == (Demand(number=True), None, None)
            assert (each.numbered, each.approvals) == (False, ())
        digest = keys.digest(keys.minting, number, added.subject)
        with store.transaction() as tx:
            tx.save_request(attrs.evolve(stored, key_id=keys.minting, digest=digest))
        flow = Workflow(store, Outbox(), key=KEY)
        flow.confirm(BOSS, "q1", number)
        assert [each.addresses for each in store.load_policy("alice").restrictions] == [*addresses]
        assert flow.cancel(BOSS, "q2").state is RequestState.CANCELLED


def test_requests_that_an_older_library_must_not_see(place: Sqlite | Postgres) -> None:
    """It sees those that add or end one restriction and demand a number alone, and no others."""
    seen: dict[str, list[Any]] = {}

    def listed(run: Run) -> None:
        found: Any = run(_LISTED, ("alice",))
        seen["ids"] = [row[0] for row in found.fetchall()]

    with place.open() as store:  # type: ignore[attr-defined]
        users = [User(username=n, full_name="", account_id="A1") for n in ("alice", "bob", "carl")]
        store.put_users(users)
        flow = Workflow(store, Outbox(), key=KEY)
        held, other = flow.impose(BOSS, "alice", ["10.0.0.1", "10.0.0.9"], reason="r").added
        simple = flow.request(BOSS, "alice", "10.0.0.2")
        strict = WorkflowSettings(add=Demand(number=True, approvals=1), delete=Demand(number=True))
        deletion: Any = Workflow(store, Outbox(), key=KEY, settings=strict).delete(BOSS, held.id)
        others = [
            flow.request(BOSS, "alice", ["10.0.0.3", "10.0.0.4"]),
            flow.request(BOSS, "alice", "10.0.0.9", replaces=[other.id], label="new"),
            flow.request_many(BOSS, ["bob", "alice"], "10.0.0.5")[1],
            Workflow(store, Outbox(), key=KEY, settings=strict).request(BOSS, "alice", "10.0.0.6"),
        ]
        place.old(listed)
        assert set(seen["ids"]) == {simple.id, deletion.id}
        (line,) = store.overview(frozenset({"A1"}), limit=1)
        pending = {each.id for each in line.pending}
        assert pending == {simple.id, deletion.id, *(each.id for each in others)}
        # A request that is closed is in no list, so its state is the plain one.
        flow.cancel(BOSS, others[0].id)
        states: list[Any] = []
        place.old(
            lambda run: states.extend(
                run("SELECT state FROM requests WHERE id = ?", (others[0].id,)).fetchall()  # type: ignore[attr-defined]
            )
        )
        assert states == [("cancelled",)]


@pytest.mark.parametrize(
    "condition", [IS_PENDING, "state = 'pending'"], ids=["this library", "older libraries"]
)
def test_pending_requests_of_a_user_are_found_by_an_index(
    place: Sqlite | Postgres, condition: str
) -> None:
    """Both databases use the partial index, for the condition of older libraries too."""
    place.open().close()  # type: ignore[attr-defined]
    sql = f"SELECT id FROM requests WHERE username = 'jo' AND {condition} ORDER BY requested_at, id"
    if isinstance(place, Sqlite):
        with closing(sqlite3.connect(place.path)) as connection:
            plan = str(connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall())
    else:
        lines: list[Any] = []

        def explain(run: Run) -> None:
            run("SET enable_seqscan = off", ())
            run("SET enable_bitmapscan = off", ())
            found: Any = run(f"EXPLAIN {sql}", ())
            lines.extend(found.fetchall())

        place.old(explain)
        plan = "\n".join(line for (line,) in lines)
    assert "requests_pending" in plan
    assert "TEMP B-TREE" not in plan
    assert "Sort" not in plan


def test_requests_survive_each_other(place: Sqlite | Postgres) -> None:
    """A request that an older library saves again keeps what only this one has written."""
    request = PendingRequest(
        id="q1", username="alice", kind=RequestKind.ADD, label="", requested_by="boss",
        adds=(AddressRange.parse("10.0.0.1"),), requested_at=START, attempts_left=3,
        expires_at=START + timedelta(1), number_expires_at=START + timedelta(1),
        state=RequestState.PENDING,
    )  # fmt: skip
    with place.open() as store:  # type: ignore[attr-defined]
        with store.transaction() as tx:
            tx.save_request(StoredRequest(request=request, email="boss@example.com"))
        place.old(lambda run: run("UPDATE requests SET resends = 1 WHERE id = ?", ("q1",)))
        with store.snapshot() as snapshot:
            (found,) = snapshot.pending_requests("alice")
    assert found == request
