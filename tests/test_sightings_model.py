"""Random histories of sightings on every store, and on a model that imports no rule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipguard.model import Sighting, User
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.testing import FakeClock
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema

UIDS = ("1", "2", "3")
NAMES = ("ann", "bob", "cat", "dan")
ADDRESSES = [
    *(f"203.0.113.{number}" for number in range(40)),
    *(f"2001:db8::{number:x}" for number in range(1, 10)),
]


class Kept:
    """One row of the model."""

    def __init__(self, sighting: Sighting) -> None:
        self.first, self.last = sighting.first_at, sighting.last_at
        self.allowed, self.refused = sighting.allowed, sighting.refused
        self.told: datetime | None = None


class Model:
    def __init__(self) -> None:
        self.users: dict[str, str] = {}  # uid -> username
        self.before: dict[str, str] = {}  # the same, of removed users as well
        self.kept: dict[str, dict[str, Kept]] = {}

    def seen(self, name: str, now: datetime) -> list[Sighting]:
        rows = [
            (address, each)
            for address, each in self.kept.get(name, {}).items()
            if now - each.last <= timedelta(days=90)
        ]
        rows.sort(key=lambda row: ip_address(row[0]).packed)
        rows.sort(key=lambda row: row[1].last, reverse=True)
        return [
            Sighting(
                username=name,
                address=address,
                first_at=each.first,
                last_at=each.last,
                allowed=each.allowed,
                refused=each.refused,
            )
            for address, each in rows[:32]
        ]

    def record(self, batch: list[Sighting], now: datetime) -> set[tuple[str, str]]:
        known = [each for each in batch if each.username in self.users.values()]
        for name in {each.username for each in known}:
            left = {each.address for each in self.seen(name, now)}
            self.kept[name] = {a: k for a, k in self.kept.get(name, {}).items() if a in left}
        for each in known:
            there = self.kept[each.username].get(each.address)
            if there is None:
                self.kept[each.username][each.address] = Kept(each)
            else:
                there.first = min(there.first, each.first_at)
                there.last = max(there.last, each.last_at)
                there.allowed += each.allowed
                there.refused += each.refused
        found = set()
        for each in known:
            left = {it.address for it in self.seen(each.username, now)}
            held = self.kept[each.username]
            self.kept[each.username] = {a: k for a, k in held.items() if a in left}
        for each in known:
            there = self.kept[each.username].get(each.address)
            if there is None or not each.refused:
                continue
            if there.told is None or now - there.told >= timedelta(days=1):
                there.told = now
                found.add((each.username, each.address))
        return found

    def sync(self, users: dict[str, str]) -> None:
        """Make these the registered users; each keeps its sightings unless it was away."""
        moved = {
            name: self.kept[self.users[uid]]
            for uid, name in users.items()
            if uid in self.users and self.users[uid] in self.kept
        }
        for name in users.values():
            self.kept.pop(name, None)
        for uid, name in self.before.items():
            if uid in users:
                self.kept.pop(name, None)
        self.kept.update(moved)
        self.users = dict(users)
        owned = {uid: name for uid, name in self.before.items() if name not in users.values()}
        self.before = owned | users


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[RestrictionStore, FakeClock]]:
    clock = FakeClock()
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'a.db'}"
    if request.param == "postgres":
        server: Server | Given = request.getfixturevalue("postgres")
        url = server.url(schema=fresh_schema(), timeout=20)
    with open_store(url, clock=clock) as store:
        yield store, clock


def batch_of(dice: random.Random, now: datetime) -> list[Sighting]:
    pairs = {(dice.choice(NAMES), dice.choice(ADDRESSES)) for _ in range(dice.choice((1, 5, 60)))}
    found = []
    for name, address in pairs:
        last = now - timedelta(minutes=dice.choice((0, 1, 5, 60, 3000)))
        first = last - timedelta(minutes=dice.choice((0, 10)))
        allowed, refused = dice.choice(((1, 0), (0, 1), (3, 2)))
        found.append(
            Sighting(
                username=name,
                address=address,
                first_at=first,
                last_at=last,
                allowed=allowed,
                refused=refused,
            )
        )
    return found


def test_stores_agree_with_the_model(world: tuple[RestrictionStore, FakeClock]) -> None:
    store, clock = world
    model = Model()
    dice = random.Random(7)
    for step in range(rounds(150, 3000)):
        now = clock()
        match dice.choice(("record", "record", "record", "time", "users", "forget")):
            case "record":
                batch = batch_of(dice, now)
                told = {(each.username, each.address) for each in store.record_sightings(batch)}
                assert told == model.record(batch, now), step
            case "time":
                clock.advance(timedelta(hours=dice.choice((1, 12, 24, 24 * 30, 24 * 100))))
            case "users":
                uids = dice.sample(UIDS, dice.randrange(1, 4))
                users = dict(zip(uids, dice.sample(NAMES, len(uids)), strict=True))
                refused = store.sync_users(
                    [
                        User(username=name, full_name="", account_id="A1", uid=uid)
                        for uid, name in users.items()
                    ],
                    remove_missing=True,
                ).refused
                assert refused == (), step
                model.sync(users)
            case _:
                name = dice.choice(NAMES)
                store.forget_sightings(name)
                model.kept.pop(name, None)
        for name in NAMES:
            assert list(store.sightings(name)) == model.seen(name, clock()), (step, name)
