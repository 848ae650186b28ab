"""What a guard remembers of users: bounded, dropped by name, read without a lock.

Readers look a username up in `by_spelling`, a plain dict, as the client's server spelt it. All
writing is done under the guard's lock. Dropping an entry only takes it out of the dict: a reader
that still holds it may add to it, but nobody will find it again, so a late addition is harmless.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from cachetools import FIFOCache

from ipguard.guard._table import Table
from ipguard.model import Policy, Reason
from ipguard.rules import lasting

_SPELLINGS: Final = 8
_ALL: Final = (0,)
_NONE: Final[tuple[int, ...]] = ()


class Entry(set[str]):
    """One user: the texts of addresses allowed so far, and what decides about the others.

    Attributes:
        policy: What the store said.
        ipv4: Flat sorted bounds of the IPv4 addresses allowed whatever the time: an address is in
            when `bisect_right` of them is odd.
        ipv6: Likewise.
        otherwise: Why all other addresses are denied; None where that depends on the time.
        spellings: The keys of `Cache.by_spelling` that lead here; the first is canonical.
    """

    __slots__ = ("ipv4", "ipv6", "otherwise", "policy", "spellings")

    def __init__(self, policy: Policy, name: str, *, deny_unknown: bool) -> None:
        super().__init__()
        self.policy = policy
        self.spellings: tuple[str, ...] = (name,)
        self.ipv4: tuple[int, ...]
        self.ipv6: tuple[int, ...]
        self.otherwise: Reason | None = Reason.NOT_LISTED
        if deny_unknown and not policy.known:
            self.ipv4 = self.ipv6 = _NONE
            self.otherwise = Reason.UNKNOWN_USER
        elif not policy.restrictions:
            self.ipv4 = self.ipv6 = _ALL
        else:
            # Temporary restrictions are left out: what rests on them is decided each time.
            addresses = lasting(policy.restrictions)
            self.ipv4 = tuple(addresses.bounds(4))
            self.ipv6 = tuple(addresses.bounds(6))
            if any(r.expires_at is not None for r in policy.restrictions):
                self.otherwise = None


class Cache:
    """At most `capacity` users. All but reading `by_spelling` is done under the guard's lock.

    cachetools keeps the order in which users came, no more. Hits do not pass here, so the oldest
    goes first. Users that nobody registered and nobody restricted go before all others: invented
    usernames cannot push out real ones.

    Args:
        capacity: How many users.
        deny_unknown: Whether users that nobody registered are refused.
        table: Of a preloaded guard: where users are looked for that are not among these. It is kept
            true as users are; evicting one leaves it alone.
    """

    def __init__(self, capacity: int, *, deny_unknown: bool, table: Table | None = None) -> None:
        self.by_spelling: dict[str, Entry] = {}
        self.evictions = 0
        self.table = table
        self._capacity = capacity
        self._deny_unknown = deny_unknown
        self._forget_all()

    def _forget_all(self) -> None:
        self.by_spelling.clear()
        self._users: FIFOCache[str, None] = FIFOCache(self._capacity + 1)
        self._strangers: FIFOCache[str, None] = FIFOCache(self._capacity + 1)
        self._ahead: set[str] = set()

    def __len__(self) -> int:
        return len(self._users) + len(self._strangers)

    def entry(self, name: str, policy: Policy) -> Entry:
        """Make an entry, without remembering it."""
        return Entry(policy, name, deny_unknown=self._deny_unknown)

    def find(self, name: str, spelling: str, revision: int) -> Entry | None:
        """Return a user that is remembered, or that the table has, which is then remembered.

        Args:
            name: The canonical username.
            spelling: How the client's server spelt it.
            revision: The guard's revision, which all of this is current to.
        """
        entry = self.by_spelling.get(name)
        if entry is None and self.table is not None:
            policy = self.table.policy(name, revision)
            if policy is not None:
                entry = self.entry(name, policy)
                self._keep(entry, spelling)
        return entry

    def supersede(self, entry: Entry, *, ahead: bool) -> None:
        """Forget what is older than an entry, without remembering the entry itself.

        Args:
            entry: The user, as the store had it.
            ahead: Whether the policy is of a revision that no sync had come to when it was read.
        """
        name = entry.spellings[0]
        if self.table is not None:
            self.table.put(name, entry.policy, ahead=ahead)
        self._forget(name)

    def put(self, entry: Entry, spelling: str, *, ahead: bool) -> None:
        """Remember a user in place of what was known, found by both spellings from now on.

        Args:
            entry: The user, as the store had it.
            spelling: How the client's server spelt it.
            ahead: As for `supersede`. The next sync drops such an entry.
        """
        self.supersede(entry, ahead=ahead)
        if ahead:
            self._ahead.add(entry.spellings[0])
        self._keep(entry, spelling)

    def _keep(self, entry: Entry, spelling: str) -> None:
        name, policy = entry.spellings[0], entry.policy
        stranger = not policy.known and not policy.restrictions
        try:
            (self._strangers if stranger else self._users)[name] = None
            self.by_spelling[name] = entry
            self.spell(entry, spelling)
            while len(self) > self._capacity:
                oldest, _ = (self._strangers or self._users).popitem()
                self._forget(oldest)
                self.evictions += 1
        except BaseException:
            self._forget_all()  # a signal handler raised: cachetools may be in the middle of it
            raise

    def spell(self, entry: Entry, spelling: str) -> None:
        """Let an entry be found by one more spelling, if it is still held and has not too many."""
        held = self.by_spelling.get(entry.spellings[0]) is entry
        if held and spelling not in entry.spellings and len(entry.spellings) < _SPELLINGS:
            entry.spellings += (spelling,)
            self.by_spelling[spelling] = entry

    def drop(self, names: Collection[str]) -> None:
        """Forget users whose policy has changed, under every spelling, and in the table.

        Safe to interrupt anywhere, as a signal handler that raises does, and to do again.
        """
        if self.table is not None:
            self.table.mark(names)
        for name in names:
            self._forget(name)

    def _forget(self, name: str) -> None:
        # Readers lose the user first, and what it was found by last: so this can be interrupted.
        entry = self.by_spelling.get(name)
        if entry is not None:  # an entry that has remembered no address yet is falsy
            for spelling in reversed(entry.spellings):
                self.by_spelling.pop(spelling, None)
        try:
            self._users.pop(name, None)
            self._strangers.pop(name, None)
        except BaseException:
            self._forget_all()  # as in `_keep`
            raise
        self._ahead.discard(name)

    def drop_ahead(self) -> None:
        """Forget those who were read ahead of the last sync.

        The next sync tells what changed after the revision that it begins with. It cannot tell that
        a later revision, which these were read at, is still in the store's history: a backup that
        was restored meanwhile may have ended between the two.
        """
        for name in tuple(self._ahead):
            self._forget(name)

    def clear(self) -> None:
        """Forget everybody."""
        if self.table is not None:
            self.table.clear()
        self._forget_all()
