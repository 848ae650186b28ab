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
`Tally`, and logged.

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
from ipguard.guard._table import Entry, Table
from ipguard.model import Reason
from ipguard.row import lists, otherwise
from ipguard.usernames import canonical_username

_log = logging.getLogger("ipguard.guard")

_UNCOUNTED: Final = 1_000


class Tally:
    """Counts decisions by reason, and takes a lock only once in a thousand.

    A decision appends to a list, which is atomic. Now and then, under a lock, the current length is
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
        """Count one decision."""
        uncounted = self._uncounted[reason]
        uncounted.append(None)
        if len(uncounted) >= _UNCOUNTED:
            self.counts()

    def counts(self) -> Counter[Reason]:
        """Return how many decisions there have been, by reason."""
        _fork.check()
        nested = self._lock.owned()  # a signal handler, in the middle of the loop below
        with self._lock:
            for reason, uncounted in self._uncounted.items():
                count = len(uncounted)
                if count and not nested:
                    self._counts[reason] += count
                    del uncounted[:count]
            return self._counts.copy()


def bind(  # noqa: C901 - inlined, because each further call costs half a look-up
    table: Table,
    monotonic: Callable[[], float],
    deny: Callable[[str, str, Reason], None],
    slow_path: Callable[[str, str], bool | None],
    *,
    preload: bool,
) -> Callable[[str, str], bool | None]:
    """Create the function that answers `is_allowed` for one guard.

    Args:
        table: The guard's table.
        monotonic: The guard's clock.
        deny: Called with the same arguments and the reason for each denial.
        slow_path: Called with the same arguments if the row cannot decide alone.
        preload: Whether most users are preloaded, so that no address is remembered with them.

    Returns:
        The function. It raises only what `slow_path` raises.
    """
    pack, find = pack_address, table.find
    unrestricted, bad_address = Reason.UNRESTRICTED, Reason.BAD_ADDRESS

    def unlisted(
        row: bytes | None, packed: bytes | None, until: float, username: str, address: str
    ) -> bool | None:
        if packed is None:
            deny(username, address, bad_address)
            return False
        reason = None if row is None else otherwise(row)
        if reason is None or monotonic() >= until:
            return None
        if reason is unrestricted:
            return True
        deny(username, address, reason)
        return False

    def without_entry(row: bytes | None, username: str, address: str, until: float) -> bool | None:
        try:
            if row is None:
                row = find(canonical_username(username))
            packed = pack(address)
            if row is None or packed is None or not lists(row, packed):
                answer = unlisted(row, packed, until, username, address)
            else:
                answer = True if monotonic() < until else None
            if answer is not None:
                return answer
        except UsernameError:
            pass
        except Exception:
            _log.debug("the fast path gave up", exc_info=True)
        return slow_path(username, address)

    def is_allowed(username: str, address: str) -> bool | None:
        if type(username) is not str or type(address) is not str:
            return slow_path(username, address)
        until = table.deadline  # before the look-up, or a row dropped in between could answer
        try:
            # Without `preload`, all are entries.
            entry: Entry = table.rows[username]  # type: ignore[assignment]
            if entry.text == address and monotonic() < until:
                return True
            row, packed = entry.row, pack(address)
            if packed is None or not lists(row, packed):
                answer = unlisted(row, packed, until, username, address)
            else:
                answer = True if monotonic() < until else None
            if answer:
                entry.text = address
            if answer is not None:
                return answer
        except KeyError:
            return without_entry(None, username, address, until)
        except Exception:
            _log.debug("the fast path gave up", exc_info=True)
        return slow_path(username, address)

    def is_allowed_preloaded(username: str, address: str) -> bool | None:
        if type(username) is not str or type(address) is not str:
            return slow_path(username, address)
        until = table.deadline
        found = table.rows.get(username)
        row = found.row if type(found) is Entry else found
        return without_entry(row, username, address, until)

    return is_allowed_preloaded if preload else is_allowed
