"""What an adopter's tests need: a clock, a mailbox, and the full test of a store.

Nothing here is needed at run time, and importing it needs no pytest.
"""

import sys

if sys.modules.get("pytest"):
    # Before the import below: what a plain assert compared is then told when it fails.
    sys.modules["pytest"].register_assert_rewrite(
        *(
            f"ipguard.testing._{part}"
            for part in (
                "base",
                "changes",
                "history",
                "life",
                "overview",
                "rows",
                "staging",
                "turns",
                "users",
            )
        )
    )

from ipguard.testing.clock import FakeClock
from ipguard.testing.conformance import StoreConformance
from ipguard.testing.outbox import Message, Outbox

__all__ = ["FakeClock", "Message", "Outbox", "StoreConformance"]
