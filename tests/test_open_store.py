"""`open_store`: which store a URL opens, and the errors of other URLs."""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ipguard.errors import StoreConfigError
from ipguard.stores import open_store
from ipguard.stores.memory import MemoryStore
from ipguard.stores.sqlite import SQLiteStore

SECRET = "hunter2"


def refused(url: Any) -> str:
    """Return the error of a URL that opens no store, without its password."""
    with pytest.raises(StoreConfigError) as raised:
        open_store(url)
    shown = f"{raised.value} {raised.value!r}"
    assert SECRET not in shown
    return shown


def test_memory() -> None:
    """`memory://` is a new store in this process, each time."""
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    with open_store("memory://", clock=lambda: moment) as store:
        assert isinstance(store, MemoryStore)
        assert store.now() == moment
    assert isinstance(open_store("MEMORY://"), MemoryStore)


@pytest.mark.parametrize("url", ["memory:///a.db", "memory://host", "memory://?timeout=1"])
def test_memory_has_no_options(url: str) -> None:
    """Options that would be ignored are refused."""
    assert "memory://" in refused(url)


def test_sqlite_with_an_absolute_path(tmp_path: Path) -> None:
    """Four slashes: the path begins with one."""
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    with open_store(f"sqlite:///{tmp_path}/a.db?timeout=0.25", clock=lambda: moment) as store:
        assert isinstance(store, SQLiteStore)
        assert store.now() == moment
        assert store._pool.timeout == 0.25
    assert (tmp_path / "a.db").exists()


def test_sqlite_with_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes: from the current directory, even if that changes, as a daemon's does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    with open_store("sqlite:///in/a.db") as store:
        monkeypatch.chdir("/")
        assert store.put_users([]) == 0
    assert (tmp_path / "in" / "a.db").exists()


@pytest.mark.parametrize("name", ["a b.db", "a%b.db", "a%20b.db", "ä?#.db", "a&b=c.db"])
def test_a_path_is_percent_decoded(tmp_path: Path, name: str) -> None:
    """Any file name can be written, and SQLite takes no part of it for an option."""
    quoted = "".join(f"%{byte:02X}" for byte in name.encode())
    open_store(f"sqlite:///{tmp_path}/{quoted}").close()
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "sqlite:///relative.db"),
        ("sqlite://host/a.db", "sqlite:///relative.db"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///a.db?mode=ro", "timeout"),
        ("sqlite:///a.db?timeout=soon", "seconds"),
        ("sqlite:///a.db?timeout=0", "seconds"),
        ("sqlite:///a.db?timeout=nan", "seconds"),
        ("sqlite:///a.db?timeout=1&timeout=2", "once"),
        ("sqlite:///a.db?timeout", "?name=value"),
        ("sqlite:///missing/a.db", "No such file"),
        ("sqlite:///a%FF.db", "UTF-8"),
        ("sqlite:///a%00.db", "memory://"),
    ],
)
def test_an_invalid_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    """The error says what to write instead, and no file is created."""
    monkeypatch.chdir(tmp_path)
    assert said in refused(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["", "a.db", "/a.db", "sqlite:/a.db", "://a", "mysql://jo:hunter2@db/x", "jo:hunter2@db/x"],
)
def test_an_unknown_scheme(url: str) -> None:
    """The error lists the known schemes, and shows nothing after the scheme."""
    said = refused(url)
    assert all(f"{known}://" in said for known in ("memory", "sqlite", "postgresql"))


@pytest.mark.parametrize("url", [None, 7, b"memory://", Path("a.db")])
def test_a_url_is_text(url: object) -> None:
    """Anything else is refused, and the error names its type."""
    assert type(url).__name__ in refused(url)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_postgresql_without_its_extra(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, "ipguard.stores.postgres", None)
    assert 'pip install "ipguard[postgres]"' in refused(f"{scheme}://jo:{SECRET}@db/x")


def plugin(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name=name, value=value, group="ipguard.stores")

    def found(*, group: str, **wanted: str) -> list[EntryPoint]:
        assert group == "ipguard.stores"
        return [point] if wanted.get("name", name) == name else []

    monkeypatch.setattr("importlib.metadata.entry_points", found)


def factory(url: str, *, clock: Callable[[], datetime] | None, migrate: bool | None) -> object:
    return url, clock, migrate


def test_other_schemes_are_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callable gets the whole URL and the two arguments."""
    plugin(monkeypatch, "redis", f"{__name__}:factory")
    url = f"redis://:{SECRET}@host"
    opened: object = open_store(url, migrate=False)
    assert opened == (url, None, False)
    assert "redis://" in refused("mysql://host")


@pytest.mark.parametrize("value", ["no_such_module:f", f"{__name__}:no_such_name"])
def test_an_entry_point_that_cannot_be_loaded(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that fails to load is a configuration error, with the reason."""
    plugin(monkeypatch, "redis", value)
    assert "no_such" in refused(f"redis://:{SECRET}@host")
