"""Who a user is, over all stores: renames, moves, syncs and removals never mix up restrictions.

The checks follow the documentation and import no rule of ipguard. Each step is done in every store,
and all of them must agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ipguard
from ipguard import Actor, InvalidValue, UnknownUser, User, UsernameCollision, Workflow
from ipguard.model import Action, StoredUser
from ipguard.store import RestrictionStore
from ipguard.testing import FakeClock, Outbox
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema

DESK = Actor(username="desk", email="desk@example.com", manages=Actor.EVERY_ACCOUNT)
NAMES = ("ann", "bob", "cat")
USERS = st.builds(
    User,
    username=st.sampled_from(["ann", "Ann", "bob", "Bob", "cat"]),
    full_name=st.sampled_from(["", "", "New"]),
    account_id=st.sampled_from(["U1", "U1", "U2"]),
    uid=st.sampled_from([None, "1", "2", "3"]),
)
#: Nothing but its username or its uid can be read.
BROKEN = st.builds(
    lambda name, uid: {"username": name, "full_name": "\n", "account_id": "U1", "uid": uid},
    st.sampled_from([*NAMES, ""]),
    st.sampled_from([None, "1", "2", "3"]),
)
MAPPINGS = USERS.map(
    lambda user: {
        "username": user.spelling,
        "full_name": user.full_name,
        "account_id": user.account_id,
        "uid": user.uid,
    }
)
ANY_NAME = st.sampled_from(["ann", "Ann", "bob", "cat"])
STEPS = st.one_of(
    st.tuples(st.just("put"), st.lists(USERS, min_size=1, max_size=4)),
    st.tuples(
        st.just("sync"),
        st.lists(st.one_of(USERS, USERS, MAPPINGS, BROKEN), max_size=5),
        st.booleans(),
    ),
    st.tuples(st.just("rename"), ANY_NAME, ANY_NAME),
    st.tuples(st.just("remove"), st.lists(ANY_NAME, max_size=2)),
    st.tuples(st.just("impose"), st.sampled_from(NAMES)),
    st.tuples(st.just("request"), st.sampled_from(NAMES)),
    st.tuples(st.just("lift"), st.sampled_from(NAMES)),
)


@attrs.define
class Shown:
    """What a store has under a username."""

    stored: StoredUser | None
    restrictions: tuple[str, ...]
    pending: tuple[str, ...]

    @property
    def user(self) -> User | None:
        return None if self.stored is None else self.stored.user


class World:
    """One store, and a workflow that labels what it makes."""

    def __init__(self, url: str) -> None:
        self.clock = FakeClock()
        self.store: RestrictionStore = ipguard.open_store(url, clock=self.clock)
        self.flow = Workflow(
            self.store,
            Outbox(),
            key=bytes(range(32)),
            settings=ipguard.WorkflowSettings(requests_per_hour=10_000),
        )
        self.labels = 0

    def run(self, kind: str, *args: Any) -> tuple[Any, ...]:
        """Run a step; return what came of it, without ids."""
        try:
            return (getattr(self, kind)(*args),)
        except (UsernameCollision, InvalidValue, UnknownUser) as exc:
            return type(exc), repr(exc)

    def put(self, users: list[User]) -> int:
        return self.store.put_users(users)

    def sync(self, records: list[Any], remove_missing: bool) -> Any:
        found = self.store.sync_users(records, remove_missing=remove_missing)
        again = self.store.sync_users(records, remove_missing=remove_missing)
        assert again == ipguard.UserSync(revision=found.revision, refused=again.refused)
        refused = [(record, repr(error)) for record, error in found.refused]
        return attrs.evolve(found, refused=()), refused

    def rename(self, old: str, new: str) -> int:
        return self.store.rename_user(old, new)

    def remove(self, names: list[str]) -> int:
        return self.store.remove_users(names)

    def impose(self, name: str) -> int:
        self.labels += 1
        self.clock.advance(timedelta(seconds=1))  # stores sort by time, then by id
        addresses, label = f"203.0.113.{self.labels}", str(self.labels)
        return self.flow.impose(DESK, name, addresses, reason="x", label=label).revision

    def request(self, name: str) -> None:
        self.labels += 1
        self.clock.advance(timedelta(seconds=1))  # stores sort by time, then by id
        self.flow.request(DESK, name, f"203.0.113.{self.labels}", label=str(self.labels))

    def lift(self, name: str) -> int:
        held = self.store.load_policy(name).restrictions
        return self.flow.lift(DESK, held[0].id, reason="x").revision if held else 0

    def shown(self) -> dict[str, Shown]:
        with self.store.transaction() as tx:
            return {
                name: Shown(
                    tx.user(name),
                    tuple(each.label for each in tx.restrictions(name)),
                    tuple(each.label for each in tx.pending_requests(name)),
                )
                for name in NAMES
            }

    def log(self) -> list[tuple[object, ...]]:
        kinds = (Action.PUT_USERS, Action.REMOVE_USERS, Action.RENAME_USER, Action.MOVE_USER)
        return [
            (row.revision, row.action, row.username, row.account_id, row.detail)
            for row in self.store.history(Actor.EVERY_ACCOUNT, limit=10_000)
            if row.action in kinds
        ]


def alike(one: User, other: User) -> bool:
    """Return whether two records are about one user, as docs/users.md has it."""
    if one.uid is not None and other.uid is not None:
        return one.uid == other.uid
    same = one.spelling == other.spelling or one.account_id == other.account_id
    return one.username == other.username and same


def linked(start: User, records: Iterable[User], end: User) -> bool:
    """Return whether records of one call lead from one user to another, each about one user."""
    rest, found = [*records, end], [start]
    for each in found:
        found += [other for other in rest if alike(each, other)]
        rest = [other for other in rest if not alike(each, other)]
    return end in found


def check(
    before: dict[str, Shown], after: dict[str, Shown], step: Sequence[Any], records: list[User]
) -> None:
    """Check that restrictions stay with their user, and that none are lost."""
    places = {label: name for name, shown in after.items() for label in shown.restrictions}
    for name, was in before.items():
        kept = [label for label in was.restrictions if step[0] != "lift" or label in places]
        if not kept:
            continue
        assert len(was.restrictions) - len(kept) <= (step == ("lift", name))
        (now,) = {places[label] for label in kept}
        assert [label for label in after[now].restrictions if label in kept] == kept
        assert set(after[now].restrictions) - set(kept) == set() or step[0] == "impose"
        one, other = was.user, after[now].user
        assert one is not None
        assert other is not None
        if now == name:
            assert linked(one, records, other)
            assert one.uid in (None, other.uid)
        elif step[0] == "rename":
            assert attrs.evolve(one, username=other.spelling) == other
        else:
            assert one.uid == other.uid is not None
    for name, was in before.items():
        for label in after[name].pending:
            if label in was.pending:
                one, other = was.user, after[name].user
                assert one is not None
                assert other is not None
                assert linked(one, records, other)
            else:
                assert step == ("request", name)


@contextmanager
def worlds(urls: Callable[[Path], Iterable[str]]) -> Iterator[list[World]]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        found = [World(url) for url in urls(Path(folder))]
        for world in found:
            stack.callback(world.store.close)
        yield found


def agree(steps: list[Any], urls: Callable[[Path], Iterable[str]]) -> None:
    with worlds(urls) as (first, *others):
        before = first.shown()
        for step in steps:
            outcome = first.run(*step)
            given = step[1] if step[0] in ("put", "sync") else []
            records = [readable(record) for record in given]
            after = first.shown()
            check(before, after, step, [record for record in records if record is not None])
            for other in others:
                assert other.run(*step) == outcome
                assert other.shown() == after
                assert other.log() == first.log()
            before = after


def readable(record: Any) -> User | None:
    try:
        return record if isinstance(record, User) else User(**record)
    except ipguard.IPGuardError:
        return None


@settings(max_examples=rounds(40, 5_000))
@given(st.lists(STEPS, max_size=12))
def test_no_user_gets_the_restrictions_of_another(steps: list[Any]) -> None:
    """After any steps, restrictions are with their own user, and SQLite agrees with memory."""
    agree(steps, lambda folder: ["memory://", f"sqlite:///{folder / 'a.db'}"])


@pytest.mark.slow
def test_no_user_gets_the_restrictions_of_another_in_postgresql(postgres: Server | Given) -> None:
    @settings(max_examples=rounds(15, 500))
    @given(st.lists(STEPS, max_size=12))
    def run(steps: list[Any]) -> None:
        agree(steps, lambda _: ["memory://", postgres.url(schema=fresh_schema(), listen="off")])

    run()
