"""Tools for the tests of adopters: a clock, a notifier, and a test suite for stores.

Nothing here is needed in production, and importing it does not need pytest.
"""

import sys

if sys.modules.get("pytest"):
    # Before the imports below, so that pytest explains failed asserts.
    for name in (
        "_case",
        "_evidence",
        "_guards",
        "_listing",
        "_records",
        "_sightings",
        "_transactions",
    ):
        sys.modules["pytest"].register_assert_rewrite(f"ipguard.testing.{name}")

from ipguard.testing._doubles import FakeClock, Message, Outbox
from ipguard.testing._evidence import EvidenceTests
from ipguard.testing._guards import GuardReadTests
from ipguard.testing._listing import HistoryTests, OpenRequestTests, OverviewTests
from ipguard.testing._records import RecordTests, UserTests
from ipguard.testing._sightings import SightingTests
from ipguard.testing._transactions import LifecycleTests, StagedTests, TransactionTests

__all__ = ["FakeClock", "Message", "Outbox", "StoreConformance"]


class StoreConformance(
    TransactionTests,
    StagedTests,
    GuardReadTests,
    RecordTests,
    UserTests,
    OverviewTests,
    OpenRequestTests,
    HistoryTests,
    SightingTests,
    EvidenceTests,
    LifecycleTests,
):
    """Tests of everything that `ipguard.store.RestrictionStore` promises.

    Subclass it in a test module, under a name that pytest collects, and open your store::

        class TestMyStore(StoreConformance):
            @pytest.fixture(autouse=True)
            def _folder(self, tmp_path):
                self.folder = tmp_path

            def open_store(self, clock):
                return MyStore(self.folder / secrets.token_hex(4), clock=clock)

            def reopen(self, store, clock):
                return MyStore(store.path, clock=clock)

    The store is opened on first use, after the fixtures of the subclass, and closed after the
    test. Tests that wait for another thread fail after 20 seconds; no test sleeps.

    Attributes:
        many: The number of restrictions in the tests with many of them, 200 by default; those
            tests use ten times as many users.
        clock: The `FakeClock` of the current test, which is also passed to `open_store`.
    """
