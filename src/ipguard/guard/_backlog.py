"""The users that syncs dropped, until the followers of the guard are called for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from ipguard.model import EVERYBODY, RESET, Touched

_LONGEST: Final = 1_000  # usernames

Dropped = tuple[frozenset[str] | Touched, int]
"""The users that a sync dropped, or `EVERYBODY`, and the guard's revision after it."""
Callback = Callable[[frozenset[str] | Touched, int], object]


class Backlog:
    """A queue of dropped users for followers; if it grows too long, one `EVERYBODY`.

    Not thread-safe. Each step is safe to interrupt, as a signal handler that raises does.

    Attributes:
        readers: One object for each follower; without followers, nothing is added.
    """

    def __init__(self, *readers: object) -> None:
        self.readers = set(readers)
        self._items: deque[Dropped] = deque()

    def add(self, usernames: frozenset[str] | Touched, revision: int) -> None:
        """Add what one sync dropped, if anything."""
        if not (self.readers and usernames):
            return
        items = self._items
        waiting = sum(1 if isinstance(names, Touched) else len(names) for names, _ in items)
        overflows = waiting >= _LONGEST
        items.append((EVERYBODY if overflows or usernames is RESET else usernames, revision))
        while overflows and len(items) > 1:
            items.popleft()

    def first(self) -> Dropped | None:
        """Return the oldest item, which stays until `remove`."""
        try:
            return self._items[0]
        except IndexError:
            return None

    def remove(self, item: Dropped) -> None:
        """Remove the oldest item, if it is this one."""
        if self.first() is item:
            self._items.popleft()
