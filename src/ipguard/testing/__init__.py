"""What an adopter's tests need: a clock, a mailbox, and the full test of a store.

Nothing here is needed at run time, and importing it needs no pytest.
"""

import sys

if "pytest" in sys.modules:
    # Before the import below: what a plain assert compared is then told when it fails.
    for _part in ("_base", "_changes", "_life", "_pages", "_rows", "_turns", "_users"):
        sys.modules["pytest"].register_assert_rewrite(f"ipguard.testing.{_part}")

from ipguard.testing.clock import FakeClock
from ipguard.testing.conformance import StoreConformance
from ipguard.testing.outbox import Message, Outbox

__all__ = ["FakeClock", "Message", "Outbox", "StoreConformance"]
