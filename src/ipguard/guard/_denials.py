"""The log of denials, for operators and for tools that read the fields of log records."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ipguard import _fork
from ipguard.addresses import parse_address
from ipguard.errors import AddressError, UsernameError, shorten
from ipguard.guard._table import Table
from ipguard.model import Reason
from ipguard.usernames import canonical_username

_log = logging.getLogger("ipguard.guard")

_PER_SECOND: Final = 10


class DenialLog:
    """Logs denials: at INFO and at most ten a second, so that an attack cannot fill the disk.

    With `report_only` the logins were allowed, so each line is a warning, and none is left out.
    """

    def __init__(self, table: Table, monotonic: Callable[[], float], *, report_only: bool) -> None:
        self._table = table
        self._monotonic = monotonic
        self._report_only = report_only
        self._level = logging.WARNING if report_only else logging.INFO
        self._text = "%s may not log in from %s: %s"
        if report_only:
            self._text = "report only: %s would not be allowed from %s: %s"
        self._times: deque[float] = deque(maxlen=_PER_SECOND)
        self._dropped = 0
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock, which a thread of the parent may hold in a forked child."""
        self._lock = _fork.ReentrantLock()

    def write(
        self, username: object, address: object, reason: Reason, revision: int | None
    ) -> None:
        """Log one denial, or count it if there were too many. Raises nothing.

        Without a revision, that of the table is logged.
        """
        if not _log.isEnabledFor(self._level):
            return
        # The username and the address may be any objects, and handlers of the host may raise.
        with contextlib.suppress(Exception):
            dropped = self._admit()
            if dropped is None:
                return
            text, shown = self._text, [shorten(username), shorten(address), str(reason)]
            if dropped:
                text += " (%s denials before this one were not logged)"
                shown.append(str(dropped))
            extra = {
                "ipguard_username": _shown(canonical_username, username),
                "ipguard_address": _shown(parse_address, address),
                "ipguard_reason": reason,
                "ipguard_revision": self._table.position.revision if revision is None else revision,
                "ipguard_dropped": dropped,
            }
            _log.log(self._level, text, *shown, extra=extra)

    def _admit(self) -> int | None:
        """Return how many denials were dropped before this one; None if this one is dropped."""
        if self._report_only:
            return 0
        _fork.check()
        with self._lock:
            now, times = self._monotonic(), self._times
            if len(times) == _PER_SECOND and now - times[0] < 1.0:
                self._dropped += 1
                return None
            times.append(now)
            dropped, self._dropped = self._dropped, 0
            return dropped


def _shown(parse: Callable[[Any], object], text: object) -> str:
    """Return a username or an address as the audit log has it; quoted text if it is malformed."""
    try:
        return str(parse(text))
    except (AddressError, UsernameError):
        return shorten(text)
