"""The full test of a restriction store, for whoever writes one."""

from __future__ import annotations

from ipguard.testing._changes import ChangeTests
from ipguard.testing._history import HistoryTests
from ipguard.testing._life import LifeTests
from ipguard.testing._overview import OverviewTests
from ipguard.testing._rows import RowTests
from ipguard.testing._staging import StagingTests
from ipguard.testing._turns import TurnTests
from ipguard.testing._users import UserTests

__all__ = ["StoreConformance"]


class StoreConformance(
    TurnTests,
    ChangeTests,
    RowTests,
    StagingTests,
    UserTests,
    OverviewTests,
    HistoryTests,
    LifeTests,
):
    """Tests of everything that `ipguard.store.RestrictionStore` promises.

    Subclass it in a test module, under a name that pytest collects, and say how to open your
    store::

        class TestMyStore(StoreConformance):
            @pytest.fixture(autouse=True)
            def _folder(self, tmp_path):
                self.folder = tmp_path

            def open_store(self, clock):
                return MyStore(self.folder / secrets.token_hex(4), clock=clock)

            def reopen(self, store, clock):
                return MyStore(store.path, clock=clock)

    The store is opened when a test first needs it, so fixtures of the subclass have run by then,
    and closed after the test. A test that waits for another thread fails after 20 seconds; none
    sleeps.

    Attributes:
        many: How many restrictions, and a tenth of how many users, the tests use that want many;
            200 unless the subclass says more.
        clock: The `FakeClock` of the test that runs; `open_store` is given it.
    """
