"""Rows of stores: which of a store's methods a guard reads, and that all pack the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipguard.addresses import AddressRange
from ipguard.errors import StoreUnavailable
from ipguard.guard import Guard
from ipguard.model import Action, Policy, Reason, Restriction, User
from ipguard.row import pack
from ipguard.store import row_loader, rows_loader
from ipguard.stores import open_store
from ipguard.stores.memory import MemoryStore
from ipguard.stores.sqlite import SQLiteStore
from ipguard.testing import FakeClock
from tests.conftest import rounds
from tests.guards import HOME, OFFICE, World, memory
from tests.postgres import Given, Server, fresh_schema
from tests.test_row import IPV6

__all__ = ["memory"]

# ------------------------------------------------------------------------- which method is read


class Own(MemoryStore):
    """A store with rows of its own, which say where they came from."""

    def load_row(self, username: str) -> tuple[int, bytes]:
        return 1, b"own " + username.encode()

    def load_all_rows(self) -> tuple[int, Iterator[tuple[str, bytes]]]:
        return 1, iter([("own", b"")])


class Audited(Own):
    """A subclass that overrides the policies: its rows must be packed from these."""

    def load_policy(self, username: str) -> Policy:
        return Policy(revision=2, restrictions=(), known=True)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        return 2, iter([("audited", self.load_policy("audited"))])


class OwnAgain(Audited):
    """A subclass of that one, with rows of its own."""

    load_row = Own.load_row
    load_all_rows = Own.load_all_rows


class Both(MemoryStore):
    """A store that defines both in one class."""

    load_policy = Audited.load_policy
    load_all_policies = Audited.load_all_policies
    load_row = Own.load_row
    load_all_rows = Own.load_all_rows


class RowOnly(Own):
    """A subclass that overrides one of the two policy methods."""

    load_all_policies = Audited.load_all_policies


class Wrapper:
    """A wrapper that overrides the policies, and delegates everything else."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def load_policy(self, username: str) -> Policy:
        policy: Policy = self._store.load_policy(username)
        return policy

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        found: tuple[int, Iterator[tuple[str, Policy]]] = self._store.load_all_policies()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Proxy:
    """A wrapper that only delegates."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class OwnWrapper(Wrapper):
    """A wrapper with rows of its own."""

    load_row = Own.load_row
    load_all_rows = Own.load_all_rows


OWN, PACKED = b"own jsmith", b"\3\0\0\0\0"


@pytest.mark.parametrize(
    ("store", "row", "user"),
    [
        (Own(), OWN, "own"),
        (Audited(), PACKED, "audited"),
        (OwnAgain(), OWN, "own"),
        (Both(), OWN, "own"),
        (RowOnly(), OWN, "audited"),
        (Wrapper(Audited()), PACKED, "audited"),
        (OwnWrapper(Audited()), OWN, "own"),
        (Proxy(Audited()), PACKED, "audited"),
    ],
    ids=lambda it: type(it).__name__,
)
def test_the_most_derived_class_decides(store: Any, row: bytes, user: str) -> None:
    """A method that a subclass or a wrapper has bypassed is not read."""
    assert row_loader(store)("jsmith")[1] == row
    revision, rows = rows_loader(store)()
    assert [name for name, _ in rows] == [user]
    assert revision == (1 if user == "own" else 2)


def test_a_wrapper_is_not_bypassed_by_a_guard(tmp_path: Path) -> None:
    """Its policies decide, although the store that it wraps has rows."""

    class Lenient(Wrapper):
        def load_policy(self, username: str) -> Policy:
            policy: Policy = self._store.load_policy(username)
            return attrs.evolve(policy, restrictions=())

        def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
            return self._store.load_all_policies()[0], iter(())

    with SQLiteStore(tmp_path / "ipguard.db") as store:
        World(store, FakeClock()).restrict("jsmith", HOME)
        for inner, reason in (
            (store, Reason.NOT_LISTED),
            (Wrapper(store), Reason.NOT_LISTED),
            (Lenient(store), Reason.UNRESTRICTED),
        ):
            for preload in (False, True):
                guard = Guard(inner, preload=preload)  # type: ignore[arg-type]
                guard.sync()
                assert guard.check("jsmith", OFFICE).reason is reason


def test_packing_closes_the_policies_that_it_reads(memory: World) -> None:
    """At the end, or when it is closed itself; a plain iterator need not have `close`."""
    closed: list[int] = []

    def policies() -> Iterator[tuple[str, Policy]]:
        try:
            for name in ("ann", "bob"):
                yield name, Policy(revision=1, restrictions=(), known=True)
        finally:
            closed.append(1)

    for reads in (1, 9):
        memory.store.load_all_policies = lambda: (1, policies())  # type: ignore[method-assign]
        _, rows = rows_loader(memory.store)()  # type: ignore[arg-type]
        for _ in zip(range(reads), rows, strict=False):
            pass
        rows.close()  # type: ignore[attr-defined]
    assert closed == [1, 1]
    plain = iter([("ann", Policy(revision=1, restrictions=(), known=True))])
    memory.store.load_all_policies = lambda: (1, plain)  # type: ignore[method-assign]
    _, rows = rows_loader(memory.store)()  # type: ignore[arg-type]
    assert list(rows) == [("ann", PACKED)]


def test_a_method_that_was_replaced_on_the_store_itself_is_not_bypassed() -> None:
    """As a test replaces it to simulate an outage."""
    store = Own()
    store.load_policy = Audited().load_policy  # type: ignore[method-assign]
    assert row_loader(store)("jsmith") == (2, PACKED)
    store.load_row = Own.load_row.__get__(store)  # type: ignore[method-assign]
    assert row_loader(store)("jsmith") == (1, OWN)


# -------------------------------------------------------------------------------- the same bytes

NAMES = ["ann", "b\u00f6b", "\u738b\u7ea2", "dan"]
IDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
MOMENTS = st.datetimes(timezones=st.just(UTC))  # also before 1970
IPV4 = st.integers(0, 2**32 - 1)


def between(version: int, ends: list[int]) -> AddressRange:
    return AddressRange(version=version, first=min(ends), last=max(ends))


RANGES = st.lists(IPV4, min_size=2, max_size=2).map(lambda ends: between(4, ends)) | st.lists(
    IPV6, min_size=2, max_size=2
).map(lambda ends: between(6, ends))
RESTRICTIONS = st.builds(
    Restriction,
    id=IDS,
    username=st.sampled_from(NAMES),
    addresses=RANGES | st.sampled_from(["0.0.0.0/0", "::/0", HOME]).map(AddressRange.parse),
    label=st.just("a label"),
    created_at=st.integers(0, 3).map(
        lambda seconds: datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    ),
    created_by=st.just("admin"),
    expires_at=st.none() | MOMENTS,
)
MANY = st.lists(RESTRICTIONS, max_size=25, unique_by=lambda restriction: restriction.id)
USERS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["registered", "removed"]))


def fill(store: Any, restrictions: list[Restriction], users: dict[str, str]) -> None:
    store.put_users(User(username=name, full_name="", account_id="A1") for name in users)
    store.remove_users([name for name, state in users.items() if state == "removed"])
    with store.transaction() as turn:
        for restriction in restrictions:
            turn.add_restriction(restriction)
        turn.append(Action.CONFIRM, actor="admin", touches=frozenset(NAMES))


def check_rows(store: Any, restrictions: list[Restriction], users: dict[str, str]) -> None:
    """Compare the rows of a store with those of its policies, and these with what was put in."""
    fill(store, restrictions, users)
    revision, policies = store.load_all_policies()
    expected = {name: pack(policy) for name, policy in policies}
    again, stream = store.load_all_rows()
    rows = list(stream)
    assert dict(rows) == expected
    assert len(rows) == len(expected) == len({it.username for it in restrictions})
    assert again == revision
    for name in NAMES:
        policy = store.load_policy(name)
        assert store.load_row(name) == (revision, pack(policy))
        assert pack(policy) == expected.get(name, pack(policy))
        own = [it for it in restrictions if it.username == name]
        own.sort(key=lambda it: (it.created_at, it.id))
        state = users.get(name)
        put = Policy(revision=1, restrictions=tuple(own), known=state == "registered")
        assert pack(put) == pack(policy)


@contextmanager
def postgres_store(postgres: Server | Given) -> Iterator[Any]:
    schema = fresh_schema()
    with open_store(postgres.url(schema=schema, listen="off", timeout=20)) as store:
        yield store
    postgres.execute(f'DROP SCHEMA "{schema}" CASCADE')


def test_sqlite_packs_the_same_bytes(tmp_path: Path) -> None:
    """For one user, and for all."""
    paths = iter(range(10**9))

    @settings(max_examples=rounds(10, 1_000))
    @given(restrictions=MANY, users=USERS)
    def check(restrictions: list[Restriction], users: dict[str, str]) -> None:
        with SQLiteStore(tmp_path / f"{next(paths)}.db") as store:
            check_rows(store, restrictions, users)

    check()


def test_postgresql_packs_the_same_bytes(postgres: Server | Given) -> None:
    """For one user, and for all, whom the server packs."""

    @settings(max_examples=rounds(8, 500))
    @given(restrictions=MANY, users=USERS)
    def check(restrictions: list[Restriction], users: dict[str, str]) -> None:
        with postgres_store(postgres) as store:
            check_rows(store, restrictions, users)

    check()


@pytest.mark.slow
def test_user_with_too_many_restrictions_is_not_preloaded(postgres: Server | Given) -> None:
    """A row with a number that does not fit would be read as another row."""
    with postgres_store(postgres) as store:
        world = World(store, FakeClock())
        for name in ("jsmith", "adoe"):
            world.restrict(name, HOME)
        schema = store._options.schema
        postgres.execute(
            f'INSERT INTO "{schema}".restrictions'
            " (username, id, first_ip, last_ip, label, created_at, created_by)"
            " SELECT 'jsmith', 'r' || n, int4send(n), int4send(n), '', n, 'admin'"
            " FROM generate_series(3, 65537) n"
        )
        rows = dict(store.load_all_rows()[1])
        assert rows["jsmith"] == b""
        assert rows["adoe"] == pack(store.load_policy("adoe"))
        with pytest.raises(StoreUnavailable, match="65,535"):
            store.load_row("jsmith")
        guard = Guard(store, preload=True)
        guard.sync()
        assert guard.stats().preloaded == 2
        assert guard.check("adoe", HOME).reason is Reason.LISTED
        assert guard.check("jsmith", HOME).reason is Reason.STORE_UNAVAILABLE
        postgres.execute(f"DELETE FROM \"{schema}\".restrictions WHERE id = 'r3'")
        row = dict(store.load_all_rows()[1])["jsmith"]
        assert row[:5] == b"\1\xff\xff\0\0"
        assert store.load_row("jsmith")[1] == row
