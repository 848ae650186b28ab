"""The listing of the SQL stores gives the memory store's answers, whichever library wrote."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, Action, Actor, Restriction, User
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores._sql import encodable, migrations
from ipguard.stores._sql import store as listing
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema

START = datetime(2030, 1, 1, tzinfo=UTC)
EVERY = Actor.EVERY_ACCOUNT

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
    "2001:db8:0:1::", "2001:db7:ffff::5", "10.0.0.1/32", "::1/128",
)  # fmt: skip
TEXTS = (
    "", "a", "A1", "a10", "jo", "JON", "jones", "jo j", "jones jo", "ab jo b", "strasse", "STRA",
    "ab", "\uff41", "ω", "a b", "a 3", "z", "z3", "zz", "ü", "b", "u", "b-ab", "\ud800",
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
    st.sampled_from(TEXTS + ADDRESSES + RUNS),
    st.none() | st.sampled_from([*NAMES, "", "jo", "\ud800", "a\0"]),
    st.integers(1, 5),
)
lists = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(RUNS)), max_size=12)


@pytest.fixture
def two_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk through all users or changes for an actor of more than two accounts or users."""
    monkeypatch.setattr(listing, "_FEW", 2)
    monkeypatch.setattr(listing, "_SORTED", 2)


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


# --------------------------------------------------------------------- older libraries

Run = Callable[[str, tuple[Any, ...]], object]

_UPSERT = (
    "INSERT INTO users (username, full_name, account_id, email, removed) VALUES (?, ?, ?, ?, 0)"
    " ON CONFLICT (username) DO UPDATE SET full_name = excluded.full_name,"
    " account_id = excluded.account_id, email = excluded.email, removed = 0"
)
_RESTRICTION = (
    "INSERT INTO restrictions (username, id, first_ip, last_ip, label, created_at, created_by,"
    " expires_at) VALUES (?, ?, ?, ?, '', 0, 'boss', NULL)"
)


def folded(text: str) -> str:
    return normalize("NFKC", text).casefold()


def old_put(run: Run, users: Iterable[User], *, schema: int) -> None:
    """Write users as the libraries for schemas 1 to 3 do."""
    for user in users:
        words, own = folded(user.full_name).split(), folded(user.account_id)
        terms = {" ".join(words[at:]) for at in range(len(words))} | {user.username, own}
        run("DELETE FROM search_terms WHERE username = ?", (user.username,))
        for term in terms - {""}:
            if schema == 1:
                run(
                    "INSERT INTO search_terms (username, term) VALUES (?, ?)",
                    (user.username, term),
                )
                continue
            account = None if term in (user.username, own) else user.account_id
            run(
                "INSERT INTO search_terms (username, term, block, account_id) VALUES (?, ?, ?, ?)",
                (user.username, term, int(term != user.username), account),
            )
        run(_UPSERT, (user.username, user.full_name, user.account_id, user.email))


class Sqlite:
    """A file with an old schema, and the store over it."""

    def __init__(self, folder: Path, schema: int) -> None:
        self.path = folder / "old.db"
        with closing(sqlite3.connect(self.path)) as connection:
            for _, sql in migrations("sqlite")[:schema]:
                connection.executescript(sql)

    def old(self, write: Callable[[Run], object]) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            write(connection.execute)

    def open(self) -> RestrictionStore:
        return open_store(f"sqlite:///{self.path}", clock=FakeClock(START))


class Postgres:
    """A schema of an old version in a server, and the store over it."""

    def __init__(self, server: Server | Given, schema: int) -> None:
        self.server, self.schema = server, fresh_schema()
        sql = "".join(sql for _, sql in migrations("postgresql")[:schema])
        server.execute(f"CREATE SCHEMA {self.schema}; SET search_path TO {self.schema}; {sql}")

    def old(self, write: Callable[[Run], object]) -> None:
        import psycopg

        options = f"-c search_path={self.schema}"
        with psycopg.connect(self.server.url(), options=options) as connection:
            write(lambda sql, params: connection.execute(sql.replace("?", "%s"), params))

    def open(self) -> RestrictionStore:
        return open_store(self.server.url(schema=self.schema, timeout=20), clock=FakeClock(START))


# --------------------------------------------------------------------- the same answers


def _written(
    step: str, users: list[User], rows: list[tuple[str, str]], mark: str, schema: int
) -> tuple[Callable[[RestrictionStore], object], Callable[[Run], object]]:
    """Return how a store makes a change, and how an older library does."""

    def old_add(run: Run) -> None:
        for each in restrictions(rows, mark):
            run(_RESTRICTION, (each.username, each.id, *each.addresses.packed))

    def old_remove(run: Run) -> None:
        for user in users:
            run("UPDATE users SET removed = 1 WHERE username = ?", (user.username,))

    if "add" in step:
        return lambda store: add(store, rows, mark), old_add
    if step == "remove":
        return lambda store: store.remove_users(user.username for user in users), old_remove
    last = {user.username: user for user in users}.values()
    return lambda store: store.put_users(users), lambda run: old_put(run, last, schema=schema)


@pytest.mark.slow
@pytest.mark.usefixtures("two_are_many")
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
    migrated_before=st.integers(0, 3),
    schema=st.sampled_from([1, 3]),
    asked=st.lists(pages, min_size=5, max_size=25),
)
def test_pages_equal_those_of_the_memory_store(
    steps: list[tuple[str, list[User], list[tuple[str, str]]]],
    migrated_before: int,
    schema: int,
    asked: list[tuple[Any, str, str | None, int]],
    tmp_path_factory: pytest.TempPathFactory,
    postgres: Server | Given,
) -> None:
    """Older and newer libraries write before and after the migration; every page is the same."""
    places: tuple[Sqlite | Postgres, ...] = (
        Sqlite(tmp_path_factory.mktemp("old"), schema),
        Postgres(postgres, schema),
    )
    with ExitStack() as stack:
        memory = stack.enter_context(MemoryStore(clock=FakeClock(START)))
        stores: list[Any] = []
        for number, (step, users, rows) in enumerate(steps):
            if number == migrated_before:
                stores = [stack.enter_context(place.open()) for place in places]  # type: ignore[arg-type]
            write, old_write = _written(step, users, rows, str(number), schema)
            write(memory)
            for place, store in zip(places, stores or [None, None], strict=True):
                if store is None or step.startswith("old"):
                    place.old(old_write)
                else:
                    write(store)
        stores = stores or [stack.enter_context(place.open()) for place in places]  # type: ignore[arg-type]
        for whose, search, after, limit in asked:
            expected = memory.overview(whose, search=search, after=after, limit=limit)
            for store in stores:
                found = store.overview(whose, search=search, after=after, limit=limit)
                assert [(i.user, len(i.restrictions)) for i in found] == [
                    (i.user, len(i.restrictions)) for i in expected
                ]
                assert found.next == expected.next


@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL"])
def test_parts_of_names_that_an_older_library_wrote(
    kind: str, tmp_path: Path, postgres: Server | Given
) -> None:
    """Terms for parts of a name come with the migration, and later with the next change."""
    place = Sqlite(tmp_path, 3) if kind == "SQLite" else Postgres(postgres, 3)
    early = User(username="anna", full_name="Anna-Lena (O'Brien)", account_id="A1")
    same = User(username="li-wei", full_name="Li-Wei", account_id="A1")
    late = User(username="eve", full_name="Eve Smith-Jones", account_id="A1")
    place.old(lambda run: old_put(run, [early, same], schema=3))

    def found(search: str) -> list[str]:
        return [line.user.username for line in store.overview(frozenset({"A1"}), search=search)]

    with place.open() as store:  # type: ignore[attr-defined]
        assert found("lena") == found("brien") == found("o'brien anna") == ["anna"]
        assert found("wei") == ["li-wei"]
        place.old(lambda run: old_put(run, [late], schema=3))
        assert found("smith") == found("eve") == found("a1")[1:2] == ["eve"]
        assert found("jones") == []
        store.put_users([User(username="max", full_name="Max", account_id="A1")])
        assert found("jones") == ["eve"]


@pytest.mark.parametrize("after", ["\ud800", "jo\ud900x", "b\udfff", "jo\0\ud800", "\0"])
def test_a_page_may_begin_after_a_text_that_no_store_holds(after: str) -> None:
    """The text that replaces it can be stored and has the same usernames after it."""
    names = ["a", "jo", "jo한", "jo\ud7a3x", "jo😀", "한", "\ud7a3", "😀", "\ufb50"]
    bound = listing._storable_bound(after)
    assert encodable(bound)
    assert [name for name in names if name > bound] == [name for name in names if name > after]


@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL"])
def test_counts_of_many_users_are_lower_bounds(
    kind: str, tmp_path: Path, postgres: Server | Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that are too low are named; filters that list few users are counted exactly."""
    place = Sqlite(tmp_path, 6) if kind == "SQLite" else Postgres(postgres, 6)
    monkeypatch.setattr(listing, "_COUNTED", 10)
    names = [f"u{n:02}" for n in range(40)]
    with place.open() as store, MemoryStore(clock=FakeClock(START)) as memory:  # type: ignore[attr-defined]
        for each in (store, memory):
            each.put_users(
                User(username=n, full_name="", account_id="A1" if n < "u35" else "B2")
                for n in names
            )
            add(each, [(name, "10.0.0.1") for name in names[8:12]], "few")
            each.remove_users(names[30:])
        both = frozenset({"A1", "B2"})
        for accounts in (EVERY, both, frozenset({"A1"})):
            counts = store.counts(accounts)
            assert counts == (10, 4, 8, 0, 0, frozenset({"users", "unrestricted"}))
            assert (counts.text("users"), counts.text("restricted")) == ("10+", "4")
        assert store.counts(frozenset({"B2"})) == memory.counts(frozenset({"B2"}))
        monkeypatch.setattr(listing, "_SORTED", 2)
        assert store.counts(EVERY) == (
            10,
            2,
            8,
            0,
            0,
            frozenset({"users", "unrestricted", "restricted"}),
        )
        monkeypatch.setattr(listing, "_COUNTED", 41)
        for accounts in (EVERY, both, frozenset({"A1"}), frozenset({"B2"}), frozenset({"C3"})):
            assert store.counts(accounts) == memory.counts(accounts)
