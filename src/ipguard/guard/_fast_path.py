"""The fast path: a warm `is_allowed` takes one function call and two look-ups, and no lock.

It answers what a remembered row decides alone: addresses that were allowed before, addresses that
are seen for the first time, and denials that do not depend on the time. It leaves the rest to the
slow path. All names are bound when the guard is created.

A call does, in this order:

1. read the table's deadline, one attribute;
2. look the username up in a plain dict, one subscription;
3. look the address up in the row: a set, one `in`; or its bounds, a tuple that never changes;
4. read the clock, and answer only if it is before the deadline *of step 1*.

Each step is one operation on one object, which CPython makes atomic, by the GIL or, without it, by
the object's own lock or an atomic pointer (PEP 703). A sync drops rows before it moves the
deadline. So a call that read the new deadline cannot find what the sync dropped, and a call that
read the old one is bound by the old one.

A call writes the address text into the row's set. Every text there is within the row's own bounds,
so concurrent `add` and `clear` may come in any order. A call that finds the set full clears it;
concurrent calls may exceed its size by one text each. A row that was dropped is not found by later
calls. A denial is counted by `Tally`.
"""

from __future__ import annotations

import logging
import socket
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import Final

from ipguard import _fork
from ipguard.addresses import strict_pton
from ipguard.guard._table import Table
from ipguard.model import Reason

_log = logging.getLogger("ipguard.guard")

_ADDRESSES: Final = 64
"""How many texts a row remembers; a client may own 2**64 addresses."""
_UNCOUNTED: Final = 1_000


class Tally:
    """Counts each denial by reason, and takes a lock only once in a thousand.

    A denial appends to a list, which is atomic. Now and then, under a lock, the current length is
    taken off the front of the list and added to the count.
    """

    def __init__(self) -> None:
        self._uncounted: dict[Reason, list[None]] = {reason: [] for reason in Reason}
        self._counts: Counter[Reason] = Counter()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock, which a thread of the parent may hold in a forked child."""
        self._lock = _fork.ReentrantLock()

    def add(self, reason: Reason) -> None:
        """Count one denial."""
        uncounted = self._uncounted[reason]
        uncounted.append(None)
        if len(uncounted) >= _UNCOUNTED:
            self.counts()

    def counts(self) -> dict[Reason, int]:
        """Return how many denials there have been, by reason."""
        _fork.check()
        nested = self._lock.owned()  # a signal handler, in the middle of the loop below
        with self._lock:
            for reason, uncounted in self._uncounted.items():
                count = len(uncounted)
                if count and not nested:
                    self._counts[reason] += count
                    del uncounted[:count]
            return dict(self._counts)


def bind(  # noqa: C901 - inlined, because each further call would double its cost
    table: Table,
    monotonic: Callable[[], float],
    tally: Tally,
    otherwise: Callable[[str, str], bool | None],
) -> Callable[[str, str], bool | None]:
    """Create the function that answers `is_allowed` for one guard.

    Args:
        table: The guard's table.
        monotonic: The guard's clock.
        tally: The counter of denials.
        otherwise: Called with the same arguments if the row cannot decide alone.

    Returns:
        The function. It raises only what `otherwise` raises.
    """
    users = table.rows
    inet_pton, from_bytes, bisect = strict_pton, int.from_bytes, bisect_right
    # Plain integers: passing the socket module's enum members takes longer.
    ipv4, ipv6 = int(socket.AF_INET), int(socket.AF_INET6)
    deny, bad_address = tally.add, Reason.BAD_ADDRESS

    def is_allowed(username: str, address: str) -> bool | None:  # noqa: C901, PLR0912
        # A subclass of str may hash and compare differently: it takes the slow path.
        if type(username) is type(address) is str:
            until = table.deadline  # before the look-up, or a row dropped in between could answer
            try:
                row = users[username]
                if address in row:
                    if monotonic() < until:
                        return True
                else:
                    if ":" in address:
                        value = from_bytes(inet_pton(ipv6, address))
                        bounds = row.ipv6
                        if value >> 32 == 0xFFFF:  # IPv4-mapped
                            value &= 0xFFFFFFFF
                            bounds = row.ipv4
                    else:
                        value = from_bytes(inet_pton(ipv4, address))
                        bounds = row.ipv4
                    if bisect(bounds, value) & 1:
                        if monotonic() < until:
                            if len(row) >= _ADDRESSES:
                                row.clear()
                            row.add(address)
                            return True
                    elif (reason := row.otherwise) is not None and monotonic() < until:
                        deny(reason)
                        return False
            except KeyError:
                pass  # not remembered
            except (OSError, ValueError):
                deny(bad_address)
                return False
            except Exception:
                _log.debug("the fast path gave up", exc_info=True)
        return otherwise(username, address)

    return is_allowed
