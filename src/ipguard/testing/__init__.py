"""What an adopter's tests need: a clock, a mailbox, and the full test of a store.

Nothing here is needed at run time, and importing it needs no pytest.
"""

from ipguard.testing.clock import FakeClock
from ipguard.testing.outbox import Message, Outbox

__all__ = ["FakeClock", "Message", "Outbox"]
