"""Pages of many users: the ways to look them up, each pressed to its edges by small figures."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, Action, Actor, Restriction, User
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores._sql import encodable, listing, migrations
from ipguard.stores._sql.listing import _bound
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema

pytestmark = pytest.mark.slow

START = datetime(2030, 1, 1, tzinfo=UTC)
EVERY = Actor.EVERY_ACCOUNT

# ------------------------------------------------------------------------- what is put and asked

WORDS = ("Jo", "jon", "JONES", "Straße", "strasse", "Ω", "\uff21b", "ab", "b")
ACCOUNTS = ("A1", "a2", "A 3", "ab", "Ü1", "A10")
NAMES = (
    "a0", "a1", "a2", "a3", "a b", "jo", "jo0", "jo1", "jo2", "jo3", "z0", "z1", "z2", "z3", "ω",
    "10.0.0.1",
)  # fmt: skip
RUNS = (
    "10.0.0.1", "10.0.0.0/30", "10.0.0.0/24", "10.0.0.255-10.0.1.0", "10.0.0.1-10.255.0.0",
    "0.0.0.0/0", "9.255.255.255-10.0.0.0", "127.255.255.255-128.0.0.0", "10.0.0.0-10.0.0.254",
    "::/0", "2001:db8::/64", "2001:db8::-2001:db8::1:0", "2001:db7:ffff::-2001:db8::", "::1",
)  # fmt: skip
ADDRESSES = (
    "10.0.0.0", "10.0.0.1", "10.0.0.255", "10.0.1.0", "10.0.1.1", "10.200.0.0", "127.255.255.255",
    "128.0.0.0", "255.255.255.255", "0.0.0.0", "::", "::1", "2001:db8::", "2001:db8::1:0",
    "2001:db8:0:1::", "2001:db7:ffff::5",
)  # fmt: skip
TEXTS = (
    "", "a", "A1", "a10", "jo", "JON", "jones", "jo j", "strasse", "STRA", "ab", "\uff41", "ω",
    "a b", "z", "z3", "zz", "ü", "b", "u",
)  # fmt: skip

people = st.builds(
    User,
    username=st.sampled_from(NAMES),
    full_name=st.lists(st.sampled_from(WORDS), max_size=3).map("  ".join),
    account_id=st.sampled_from(ACCOUNTS),
    email=st.none(),
)
accounts = st.just(EVERY) | st.frozensets(st.sampled_from([*ACCOUNTS, "none", "x\ny", "\ud800"]))
pages = st.tuples(
    accounts,
    st.sampled_from(TEXTS + ADDRESSES),
    st.none() | st.sampled_from([*NAMES, "", "jo", "\ud800", "a\0"]),
    st.integers(1, 5),
)
lists = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(RUNS)), max_size=12)


def restrictions(rows: Iterable[tuple[str, str]], mark: str) -> Iterator[Restriction]:
    for number, (name, text) in enumerate(rows):
        yield Restriction(
            id=f"{mark} {number}",
            username=name,
            addresses=AddressRange.parse(text),
            label="",
            created_at=START,
            created_by="boss",
        )


def add(store: RestrictionStore, rows: list[tuple[str, str]], mark: str) -> None:
    with store.transaction() as turn:
        for restriction in restrictions(rows, mark):
            turn.add_restriction(restriction)
        turn.append(Action.IMPOSE_MANY, actor=None, touches=EVERYBODY)


@pytest.fixture
def edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few users, looks at a few rows: every way is gone, and left half way."""
    monkeypatch.setattr(listing, "BLOCK", 2)
    figures: dict[ModuleType, dict[str, int]] = {
        listing: {
            "_MANY": 3,
            "_FIRST_LOOK": 1,
            "LOOKED_AT": 3,
            "FEW": 2,
            "_SEVERAL": 1,
            "_SMALL": 2,
            "_UNPLACED": 1,
            "_TOGETHER": 2,
            "_AT_ONCE": 2,
        },
    }
    for module, names in figures.items():
        for name, figure in names.items():
            monkeypatch.setattr(module, name, figure)


# ------------------------------------------------------------------------- the library before

_OLD_UPSERT = (
    "INSERT INTO users (username, full_name, account_id, email, removed) VALUES (?, ?, ?, ?, 0)"
    " ON CONFLICT (username) DO UPDATE SET full_name = excluded.full_name,"
    " account_id = excluded.account_id, email = excluded.email, removed = 0"
)
_OLD_RESTRICTION = (
    "INSERT INTO restrictions (username, id, first_ip, last_ip, label, created_at, created_by,"
    " expires_at) VALUES (?, ?, ?, ?, '', 0, 'boss', NULL)"
)
Run = Callable[[str, tuple[Any, ...]], object]


def old_put(run: Run, users: Iterable[User]) -> None:
    """Write users as the library for schema 1 does."""
    for user in users:
        words = listing.folded(user.full_name).split()
        terms = {" ".join(words[at:]) for at in range(len(words))}
        terms |= {listing.folded(user.username), listing.folded(user.account_id)}
        run("DELETE FROM search_terms WHERE username = ?", (user.username,))
        for term in terms - {""}:
            run("INSERT INTO search_terms (term, username) VALUES (?, ?)", (term, user.username))
        run(_OLD_UPSERT, (user.username, user.full_name, user.account_id, user.email))


def old_add(run: Run, rows: Iterable[tuple[str, str]], mark: str) -> None:
    """Write restrictions as that library does."""
    for restriction in restrictions(rows, mark):
        run(
            _OLD_RESTRICTION,
            (restriction.username, restriction.id, *restriction.addresses.packed),
        )


def old_remove(run: Run, names: Iterable[str]) -> None:
    """Remove users as that library does."""
    for name in names:
        run("UPDATE users SET removed = 1 WHERE username = ?", (name,))


class Sqlite:
    """A file with schema 1, and the store over it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "old.db"
        ((_, sql),) = migrations("sqlite")[:1]
        with closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(sql)

    def old(self, write: Callable[[Run], object]) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            write(connection.execute)

    def open(self) -> RestrictionStore:
        return open_store(f"sqlite:///{self.path}", clock=FakeClock(START))


class Postgres:
    """The same in a server."""

    def __init__(self, server: Server | Given) -> None:
        self.server, self.schema = server, fresh_schema()
        ((_, sql),) = migrations("postgresql")[:1]
        server.execute(f"CREATE SCHEMA {self.schema}; SET search_path TO {self.schema}; {sql}")

    def old(self, write: Callable[[Run], object]) -> None:
        import psycopg

        options = f"-c search_path={self.schema}"
        with psycopg.connect(self.server.url(), options=options) as connection:
            write(lambda sql, params: connection.execute(sql.replace("?", "%s"), params))

    def open(self) -> RestrictionStore:
        return open_store(self.server.url(schema=self.schema), clock=FakeClock(START))


# ------------------------------------------------------------------------- the same answers


def _written(
    step: str, users: list[User], rows: list[tuple[str, str]], mark: str
) -> tuple[Callable[[RestrictionStore], object], Callable[[Run], object]]:
    """Return how a store writes something, and how the library before does."""
    if "add" in step:
        return lambda store: add(store, rows, mark), lambda run: old_add(run, rows, mark)
    if step == "remove":
        names = {user.username for user in users}
        return lambda store: store.remove_users(names), lambda run: old_remove(run, names)
    last = {user.username: user for user in users}
    return lambda store: store.put_users(users), lambda run: old_put(run, last.values())


@pytest.mark.usefixtures("edges")
@settings(max_examples=rounds(25, 1_000))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["old", "new", "new", "remove", "add", "old add"]),
            st.lists(people, min_size=1, max_size=10),
            lists,
        ),
        max_size=6,
    ),
    before=st.integers(0, 3),
    asked=st.lists(pages, min_size=5, max_size=25),
)
def test_pages_are_the_references_whoever_wrote(
    steps: list[tuple[str, list[User], list[tuple[str, str]]]],
    before: int,
    asked: list[tuple[Any, str, str | None, int]],
    tmp_path_factory: pytest.TempPathFactory,
    postgres: Server | Given,
) -> None:
    """Before, while and after the schema is brought up to date, by old servers and new ones."""
    places: tuple[Sqlite | Postgres, ...] = (
        Sqlite(tmp_path_factory.mktemp("old")),
        Postgres(postgres),
    )
    memory = MemoryStore(clock=FakeClock(START))
    stores: list[RestrictionStore] = []
    for number, (step, users, rows) in enumerate(steps):
        if number == before:
            stores = [place.open() for place in places]
        write, old_write = _written(step, users, rows, str(number))
        write(memory)
        if stores and not step.startswith("old"):
            for store in stores:
                write(store)
        else:
            for place in places:
                place.old(old_write)
    stores = stores or [place.open() for place in places]
    try:
        for whose, search, after, limit in asked:
            expected = memory.overview(whose, search=search, after=after, limit=limit)
            for store in stores:
                found = store.overview(whose, search=search, after=after, limit=limit)
                assert [i.user for i in found] == [i.user for i in expected]
                assert [len(i.restrictions) for i in found] == [
                    len(i.restrictions) for i in expected
                ]
                assert found.next == expected.next
    finally:
        for store in stores:
            store.close()


@pytest.mark.usefixtures("edges")
@settings(max_examples=rounds(25, 1_000))
@given(
    rows=st.lists(
        st.tuples(st.none() | st.sampled_from(NAMES[:3]), st.none() | st.sampled_from(ACCOUNTS)),
        max_size=20,
    ),
    asked=st.lists(
        st.tuples(
            accounts,
            st.none() | st.sampled_from([*NAMES[:3], "nobody", "\ud800"]),
            st.none() | st.integers(-1, 22),
            st.integers(1, 5),
        ),
        min_size=5,
        max_size=25,
    ),
)
def test_the_trail_is_the_references(
    rows: list[tuple[str | None, str | None]],
    asked: list[tuple[Any, str | None, int | None, int]],
    tmp_path_factory: pytest.TempPathFactory,
    postgres: Server | Given,
) -> None:
    """Whose rows are asked for, many or few, each page has those that the reference has."""
    folder = tmp_path_factory.mktemp("trail")
    with (
        MemoryStore(clock=FakeClock(START)) as memory,
        open_store(f"sqlite:///{folder}/a.db", clock=FakeClock(START)) as sqlite,
        open_store(postgres.url(schema=fresh_schema()), clock=FakeClock(START)) as server,
    ):
        for store in (memory, sqlite, server):
            with store.transaction() as turn:
                for username, account in rows:
                    turn.append(Action.IMPOSE, actor=None, username=username, account_id=account)
        for whose, username, before, limit in asked:
            wanted = {"username": username, "before": before, "limit": limit}
            expected = memory.history(whose, **wanted)  # type: ignore[arg-type]
            for store in (sqlite, server):
                assert store.history(whose, **wanted) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("after", ["\ud800", "jo\ud900x", "b\udfff", "jo\0\ud800", "\0"])
def test_a_page_may_begin_after_what_no_store_has(after: str) -> None:
    """What takes its place can be stored, and has the same usernames after it."""
    names = ["a", "jo", "jo한", "jo\ud7a3x", "jo😀", "한", "\ud7a3", "😀", "\ufb50"]
    bound = _bound(after)
    assert encodable(bound)
    assert [name for name in names if name > bound] == [name for name in names if name > after]
