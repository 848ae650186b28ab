"""One answer: from what is remembered, else by a sync and a load, each bounded in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import attrs

from ipguard.addresses import AddressRange, login_address
from ipguard.errors import UsernameError
from ipguard.guard._cache import Cache, Entry
from ipguard.guard._lease import Lease
from ipguard.guard._loads import Loads
from ipguard.model import Decision, Reason
from ipguard.rules import decide
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username

_TRIES: Final = 2


class Answers:
    """What a guard answers, before anybody is told of it.

    Args:
        store: For its clock, which alone judges an expiry.
        cache: What is remembered.
        lease: Until when that may be used.
        loads: How it is read.
        outage_grace: Of the guard.
        deny_unknown: Whether who is not registered may not log in.
        monotonic: The clock for ages, in seconds.
    """

    def __init__(
        self,
        store: RestrictionStore,
        cache: Cache,
        lease: Lease,
        loads: Loads,
        *,
        outage_grace: float,
        deny_unknown: bool,
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._cache = cache
        self._lease = lease
        self._loads = loads
        self._outage_grace = outage_grace
        self._deny_unknown = deny_unknown
        self._monotonic = monotonic

    def _parsed(
        self, username: str, address: str
    ) -> tuple[str, str, AddressRange] | Literal[Reason.BAD_USERNAME, Reason.BAD_ADDRESS]:
        """Return the user's name, how to find it next time, and the address; or what is wrong."""
        try:
            name = canonical_username(username)
        except UsernameError:
            return Reason.BAD_USERNAME
        found = login_address(address)
        if found is None:
            return Reason.BAD_ADDRESS
        version, value = found
        client = AddressRange(version=version, first=value, last=value)
        # A str of a class of its own may hash and compare as it likes: it is not kept as a key.
        return name, username if type(username) is str else name, client

    def recall(
        self, username: str, address: str, at_least: int | None, *, resting: bool | None = None
    ) -> Decision | None:
        """Answer without I/O and without waiting, as `answer` would, for an event loop.

        Args:
            username: As for `check`.
            address: As for `check`.
            at_least: As for `check`.
            resting: Whether the store is not to be asked now; None: what its health says.

        Returns:
            The decision, or None where it takes a sync or a load. Where the store is not to be
            asked, it is always a decision.
        """
        parsed = self._parsed(username, address)
        if not isinstance(parsed, tuple):
            return self.denied(parsed)
        name, spelling, client = parsed
        wanted = 0 if at_least is None else at_least
        until, revision = self._lease.deadline, self._lease.revision  # in this order: `answer`
        entry = self._held(name)
        if entry is not None and revision >= wanted:
            self._spell(entry, spelling)
            decision = self._decide(entry, client, until, revision)
            if decision is not None:
                return decision
        if self._lease.health.resting() if resting is None else resting:
            return self._in_grace(name, client, wanted)
        return None

    def answer(self, username: str, address: str, at_least: int | None) -> Decision:
        """Answer, with one sync and one load at the most where something is missing."""
        parsed = self._parsed(username, address)
        if not isinstance(parsed, tuple):
            return self.denied(parsed)
        name, spelling, client = parsed
        wanted = 0 if at_least is None else at_least
        for _ in range(_TRIES):
            if not self._lease.hold(wanted):
                return self._in_grace(name, client, wanted)
            # In this order: what is still found after the revision was read is current to it.
            until, revision = self._lease.deadline, self._lease.revision
            if revision < wanted:
                break  # another history was taken over just now
            entry = self._cache.by_spelling.get(name)
            if entry is None:
                loaded = self._loads.load(name, spelling, revision)
                if loaded is None:
                    break
                entry, until = loaded
            else:
                self._spell(entry, spelling)
            decision = self._decide(entry, client, until, revision)
            if decision is not None:
                return decision
        return self.denied(Reason.STORE_UNAVAILABLE)

    def _decide(
        self, entry: Entry, client: AddressRange, until: float, revision: int
    ) -> Decision | None:
        """Decide by an entry found after `until` and `revision` were read; None once it is over."""
        decision = decide(entry.policy, client, self._store.now(), deny_unknown=self._deny_unknown)
        if self._monotonic() < until:
            return attrs.evolve(decision, revision=max(decision.revision, revision))
        return None

    def _held(self, name: str) -> Entry | None:
        """Return what is remembered of a user, by the table too."""
        entry = self._cache.by_spelling.get(name)
        if entry is None and self._cache.table is not None and not self._lease.entered():
            with self._lease.lock:
                entry = self._cache.find(name, name, self._lease.revision)
        return entry

    def _spell(self, entry: Entry, spelling: str) -> None:
        if spelling not in entry.spellings and not self._lease.entered():
            with self._lease.lock:
                self._cache.spell(entry, spelling)

    def _in_grace(self, name: str, client: AddressRange, wanted: int) -> Decision:
        """Answer from what is remembered though the lease is over, where that was chosen."""
        until, revision = self._lease.deadline, self._lease.revision
        entry = self._held(name)
        if entry is None or revision < wanted:
            return self.denied(Reason.STORE_UNAVAILABLE)
        decision = decide(entry.policy, client, self._store.now(), deny_unknown=self._deny_unknown)
        now = self._monotonic()
        if now >= until + self._outage_grace:
            return self.denied(Reason.STORE_UNAVAILABLE)
        # Another thread may have renewed the lease meanwhile: then the answer is as good as any.
        return attrs.evolve(decision, revision=max(decision.revision, revision), stale=now >= until)

    def denied(self, reason: Reason) -> Decision:
        """Return a decision that no policy led to."""
        return Decision(allowed=False, reason=reason, revision=self._lease.revision)
