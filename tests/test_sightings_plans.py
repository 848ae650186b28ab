"""What SQLite reads to record sightings and to list them does not grow with the table."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ipguard.model import Actor, Sighting, User
from ipguard.store import RestrictionStore
from tests.test_scale_listing import START
from tests.test_scale_plans import CountedSqlite

BEGAN, GROWN = 200, 800


def sightings(numbers: range, hosts: range, *, refused: int = 0) -> list[Sighting]:
    return [
        Sighting(
            username=f"user{number:04d}",
            address=f"10.0.0.{host}",
            first_at=START,
            last_at=START,
            allowed=1,
            refused=refused,
        )
        for number in numbers
        for host in hosts
    ]


def grow(store: RestrictionStore, numbers: range) -> None:
    store.put_users(
        User(username=f"user{number:04d}", full_name="", account_id="A1") for number in numbers
    )
    for first in range(numbers.start, numbers.stop, 100):
        store.record_sightings(sightings(range(first, first + 100), range(10)))


def work(folder: Path, users: int) -> dict[str, int]:
    """Return how many steps each call takes in a new file with so many users."""
    some = range(0, 100, 4)
    with pytest.MonkeyPatch.context() as patched:
        database = CountedSqlite(folder, patched)
        with database.open() as store:
            grow(store, range(users))
            calls: dict[str, Callable[[], object]] = {
                "known": lambda: store.record_sightings(sightings(some, range(2))),
                "new": lambda: store.record_sightings(sightings(some, range(20, 22))),
                "refused": lambda: store.record_sightings(sightings(some, range(2), refused=1)),
                "read": lambda: store.sightings("user0004"),
                "listed": lambda: store.overview(Actor.EVERY_ACCOUNT, limit=20),
                "forgotten": lambda: store.forget_sightings("user0008"),
                "renamed": lambda: store.rename_user("user0012", "renamed"),
            }
            found = {}
            for name, call in calls.items():
                before = database.work
                call()
                found[name] = database.work - before
    return found


def test_work_does_not_grow(tmp_path: Path) -> None:
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder in folders:
        folder.mkdir()
    few, many = (work(*each) for each in zip(folders, (BEGAN, GROWN), strict=True))
    for name, count in many.items():
        assert 0 < count <= 1.5 * few[name] + 20, (name, few[name], count)
