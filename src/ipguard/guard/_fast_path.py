"""The fast path: a warm `is_allowed` takes one function call and one look-up, and no lock.

It answers what a remembered row decides alone: the address that was allowed last, addresses that
are seen for the first time, and denials that do not depend on the time. It leaves the rest to the
slow path.

A call does, in this order:

1. read the table's deadline, one attribute;
2. look the username up in a dict, one subscription; a user without a row is looked up by the
   canonical username;
3. compare the address with the one that was allowed last, or search the bytes of the row;
4. read the clock, and answer only if it is before the deadline *of step 1*.

Each step is one operation on one object, which CPython makes atomic, by the GIL or, without it, by
the object's own lock or an atomic pointer (PEP 703). A sync drops rows before it moves the
deadline. So a call that read the new deadline cannot find what the sync dropped, and a call that
read the old one is bound by the old one.

A call writes the address text into the entry that it found. The entry's row never changes, and it
lists every such text. An entry that was dropped is not found by later calls. A denial is counted by
`Tally`.

Only exact `str` objects come this far. A subclass may hash and compare as it likes, so that it
could find another user's row. The test takes a third of a dict look-up.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from ipguard import _fork
from ipguard.addresses import pack_address
from ipguard.errors import UsernameError
from ipguard.guard._table import Entry, Found, Table, row_of
from ipguard.model import Reason
from ipguard.usernames import canonical_username

_log = logging.getLogger("ipguard.guard")

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


def bind(  # noqa: C901 - inlined, because each further call costs half a look-up
    table: Table,
    monotonic: Callable[[], float],
    tally: Tally,
    otherwise: Callable[[str, str], bool | None],
    *,
    preload: bool,
) -> Callable[[str, str], bool | None]:
    """Create the function that answers `is_allowed` for one guard.

    Args:
        table: The guard's table.
        monotonic: The guard's clock.
        tally: The counter of denials.
        otherwise: Called with the same arguments if the row cannot decide alone.
        preload: Whether most users are preloaded, so that no address is remembered with them.

    Returns:
        The function. It raises only what `otherwise` raises.
    """
    pack, find, deny = pack_address, table.find, tally.add
    listed, unrestricted, bad_address = Reason.LISTED, Reason.UNRESTRICTED, Reason.BAD_ADDRESS

    def decide(found: Found | None, username: str, address: str, until: float) -> bool | None:
        try:
            if found is None:
                found = find(canonical_username(username))
            packed = pack(address)
            if packed is None:
                deny(bad_address)
                return False
            if found is not None:
                row = row_of(found)
                reason = listed if row.lists(packed) else row.otherwise
                if reason is not None and monotonic() < until:
                    if reason is not listed and reason is not unrestricted:
                        deny(reason)
                        return False
                    if type(found) is Entry:
                        found.text = address
                    return True
        except UsernameError:
            pass
        except Exception:
            _log.debug("the fast path gave up", exc_info=True)
        return otherwise(username, address)

    def is_allowed(username: str, address: str) -> bool | None:
        if type(username) is not str or type(address) is not str:
            return otherwise(username, address)
        until = table.deadline  # before the look-up, or a row dropped in between could answer
        try:
            found = table.rows[username]
            # Without `preload`, all are entries.
            if found.text == address and monotonic() < until:  # type: ignore[union-attr]
                return True
        except KeyError:
            return decide(None, username, address, until)
        except Exception:
            _log.debug("the fast path gave up", exc_info=True)
            return otherwise(username, address)
        return decide(found, username, address, until)

    def is_allowed_preloaded(username: str, address: str) -> bool | None:
        if type(username) is not str or type(address) is not str:
            return otherwise(username, address)
        until = table.deadline
        return decide(table.rows.get(username), username, address, until)

    return is_allowed_preloaded if preload else is_allowed
