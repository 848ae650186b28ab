"""Look-ups of one user, restriction or request, as interfaces need them before a change."""

from __future__ import annotations

import threading
from typing import Any

import attrs
import pytest

import ipguard
from ipguard import UnknownRequest, UnknownRestriction, UnknownUser
from ipguard.aio import AsyncWorkflow
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, JSMITH, OFFICE, Desk


def test_a_user_is_found_by_any_spelling_of_its_name(desk: Desk) -> None:
    """The answer is the line of the overview; names that only begin alike are others."""
    desk.store.put_users([attrs.evolve(JSMITH, username="jsmith2")])
    restriction, request = desk.add(OFFICE), desk.ask(HOME)
    found = desk.flow.user(ALICE, "JSmith")
    assert found == desk.flow.overview(ALICE, search="jsmith").items[0]
    assert (found.restrictions, found.pending) == ((restriction,), (request,))
    for name in ("jsmit", "jsmith3", "zed", "", "no\0name", "zz"):
        with pytest.raises(UnknownUser):
            desk.flow.user(ALICE, name)


def test_a_restriction_is_found_by_its_id(desk: Desk) -> None:
    """An expired restriction is found, too; one of another account does not exist."""
    restriction = desk.add(expires_at=desk.later(hours=1))
    desk.wait(hours=2)
    assert desk.flow.restriction(ALICE, restriction.id) == restriction
    for actor, wanted in ((CAROL, restriction.id), (ALICE, "nothing"), (ALICE, "\ud800")):
        with pytest.raises(UnknownRestriction):
            desk.flow.restriction(actor, wanted)


def test_removed_users_exist_only_for_actors_of_every_account(desk: Desk) -> None:
    restriction = desk.add()
    desk.store.remove_users(["jsmith"])
    assert desk.flow.restriction(BOSS, restriction.id) == restriction
    assert desk.flow.user(BOSS, "jsmith").removed
    with pytest.raises(UnknownRestriction):
        desk.flow.restriction(ADAM, restriction.id)
    with pytest.raises(UnknownUser):
        desk.flow.user(ADAM, "jsmith")


def test_a_request_is_found_by_its_requester_alone(desk: Desk) -> None:
    """The request has its present state, expired requests included."""
    request = desk.ask()
    assert desk.flow.own_request(ALICE, request.id) == request
    for actor in (ADAM, BOSS, CAROL):
        with pytest.raises(UnknownRequest):
            desk.flow.own_request(actor, request.id)
    desk.wait(hours=24)
    assert desk.flow.own_request(ALICE, request.id).state == "expired"


def test_failures_are_counted_for_operators(desk: Desk) -> None:
    """Wrong numbers in a row are shown to actors of every account only."""
    desk.guess(desk.ask(), times=2)
    assert desk.flow.failures(BOSS, "Alice") == 2
    assert desk.flow.failures(BOSS, "unheard-of") == 0
    with pytest.raises(UnknownUser):
        desk.flow.failures(ALICE, "alice")


def test_a_row_of_an_import_is_checked_alone(desk: Desk) -> None:
    """A good row is returned as a restriction; the store is not asked about its user."""
    row = desk.flow.check_row(BOSS, ("Nobody", OFFICE, "office"))
    assert (row.username, str(row.addresses), row.label) == ("nobody", OFFICE, "office")
    assert row.created_at == desk.clock()
    for bad in (
        ("jsmith", "10.0.0.0/8"),
        ("jsmith", "10.0.0.256"),
        ("jsmith", OFFICE, "", desk.clock()),
    ):
        with pytest.raises(ipguard.IPGuardError):
            desk.flow.check_row(BOSS, bad)


def test_look_ups_do_not_wait_for_a_writer(desk: Desk) -> None:
    """Look-ups answer from the last commit while another thread is in a transaction."""
    restriction, request = desk.add(), desk.ask(HOME)
    inside, done = threading.Event(), threading.Event()

    def write() -> None:
        with desk.store.transaction() as tx:
            tx.remove_restriction(restriction.id)
            tx.append(ipguard.Action.LIFT, actor="boss")
            inside.set()
            done.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert inside.wait(60)
        assert desk.flow.user(ALICE, "jsmith").restrictions == (restriction,)
        assert desk.flow.restriction(ALICE, restriction.id) == restriction
        assert desk.flow.own_request(ALICE, request.id) == request
        assert desk.flow.failures(BOSS, "alice") == 0
    finally:
        done.set()
        writer.join()
    with pytest.raises(UnknownRestriction):
        desk.flow.restriction(ALICE, restriction.id)


def test_a_snapshot_writes_nothing(desk: Desk) -> None:
    with desk.unchanged(), desk.store.snapshot() as snapshot:
        assert snapshot.now == desk.clock()
        with pytest.raises((AttributeError, RuntimeError)):
            snapshot.set_failures("alice", 1)  # type: ignore[attr-defined]


def test_a_store_without_snapshots_is_read_in_a_transaction(desk: Desk) -> None:
    """Stores written before snapshots existed go on working."""

    class Old:
        def __init__(self, store: Any) -> None:
            self.now, self.overview = store.now, store.overview

            self.transaction = store.transaction

    restriction = desk.add()
    flow = desk.workflow(Old(desk.store))  # type: ignore[arg-type]
    assert flow.restriction(ALICE, restriction.id) == restriction
    with pytest.raises(UnknownRequest):
        flow.own_request(ALICE, "nothing")


def test_the_workflow_for_asyncio_has_every_method() -> None:
    public = {name for name in vars(ipguard.Workflow) if not name.startswith("_")}
    assert public <= set(dir(AsyncWorkflow))
