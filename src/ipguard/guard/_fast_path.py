"""The hot path: a warm `is_allowed` is about one function call and two look-ups.

It answers what a remembered user's entry decides by itself: addresses allowed before, addresses
seen for the first time, and denials that no passing of time can change. Everything else it leaves
to the slow path. All names are bound when the guard is made, so a call looks nothing up but the
question.

It takes no lock, whatever the interpreter. A call does, in this order:

1. read the lease's moment, one attribute;
2. look the username up in a plain dict, one subscription;
3. ask the entry: a set, one `in`; or its bounds, a tuple that never changes;
4. read the clock, and answer only if it is before the moment *of step 1*.

Each of these is one operation on one object, which CPython makes atomic, by the GIL or, without it,
by the object's own lock or an atomic pointer (PEP 703). A sync forgets who changed before it moves
the moment. So whoever reads the new moment, and looks up after that, does not find what was
forgotten; and whoever read the old one is bound by the old one.

What it writes: the text of an address goes into the entry's set. `add` and `clear` of several
callers may come in any order: each text in that set is inside the entry's own bounds, so which of
them stay decides nothing. The set is emptied by the caller that finds it full; others that found it
full too empty it again, or add to it, so it holds a few texts over its size at the most, as many as
there are such callers. An entry that was forgotten meanwhile is found by nobody, with all that is
added to it. And a denial is counted (`_stats.Tally`).
"""

from __future__ import annotations

import logging
import socket
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Final

from ipguard.addresses import strict_pton
from ipguard.guard._cache import Entry
from ipguard.guard._lease import Lease
from ipguard.guard._stats import Tally
from ipguard.model import Reason

_log = logging.getLogger("ipguard.guard")

_ADDRESSES: Final = 64
"""How many texts an entry remembers. A client may own 2**64 addresses; a full set starts anew."""


def bind(  # noqa: C901 - a call more would cost more than what is in it
    lease: Lease,
    users: Mapping[str, Entry],
    monotonic: Callable[[], float],
    tally: Tally,
    otherwise: Callable[[str, str], bool | None],
) -> Callable[[str, str], bool | None]:
    """Make the function that answers `is_allowed` for one guard.

    Args:
        lease: Whose moment every answer rests on.
        users: Who is remembered, by spelling; a plain dict.
        monotonic: The guard's clock.
        tally: Where denials are counted.
        otherwise: What is called with the question where the answer takes more.

    Returns:
        The function. It raises nothing that `otherwise` does not raise.
    """
    inet_pton, from_bytes, bisect = strict_pton, int.from_bytes, bisect_right
    # Plain numbers: what the socket module has under these names takes longer to hand over.
    ipv4, ipv6 = int(socket.AF_INET), int(socket.AF_INET6)
    deny, bad_address = tally.add, Reason.BAD_ADDRESS

    def is_allowed(username: str, address: str) -> bool | None:  # noqa: C901, PLR0912
        # A subclass of str may hash and compare as it likes: it takes the slow path.
        if type(username) is type(address) is str:
            until = lease.deadline  # before the look-up, so a drop meanwhile cannot be missed
            try:
                entry = users[username]
                if address in entry:
                    if monotonic() < until:
                        return True
                else:
                    if ":" in address:
                        value = from_bytes(inet_pton(ipv6, address))
                        bounds = entry.ipv6
                        if value >> 32 == 0xFFFF:  # IPv4-mapped
                            value &= 0xFFFFFFFF
                            bounds = entry.ipv4
                    else:
                        value = from_bytes(inet_pton(ipv4, address))
                        bounds = entry.ipv4
                    if bisect(bounds, value) & 1:
                        if monotonic() < until:
                            if len(entry) >= _ADDRESSES:
                                entry.clear()
                            entry.add(address)
                            return True
                    elif (reason := entry.otherwise) is not None and monotonic() < until:
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
