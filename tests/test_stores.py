"""Every store keeps every promise of `ipguard.store`, and all of them answer alike."""

import secrets
from pathlib import Path

import pytest

from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from ipguard.stores.memory import MemoryStore
from ipguard.testing import FakeClock, StoreConformance
from tests.conftest import rounds


class TestMemory(StoreConformance):
    many = rounds(200, 10_000)

    def open_store(self, clock: FakeClock) -> MemoryStore:
        return MemoryStore(clock=clock)


class TestSQLite(StoreConformance):
    many = rounds(200, 10_000)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.urls: dict[RestrictionStore, str] = {}

    def open_store(self, clock: FakeClock) -> RestrictionStore:
        url = f"sqlite:///{self.folder / secrets.token_hex(4)}.db"
        store = open_store(url, clock=clock)
        self.urls[store] = url
        return store

    def reopen(self, store: RestrictionStore, clock: FakeClock) -> RestrictionStore:
        return open_store(self.urls[store], clock=clock)
