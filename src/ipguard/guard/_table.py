"""The table of a preloaded guard: every restricted user, in few bytes each.

A user that is not in it is not restricted. That makes forgetting the one thing that must not
happen here: a user whose policy has changed is marked unknown, which is not the same as absent,
and stays so until its policy has been read again. Until the table is whole, everybody is unknown.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import attrs

from ipguard.model import Policy
from ipguard.packed import pack, unpack

_UNKNOWN: Final = b""

Row = bytes | Policy
"""A packed policy; or the policy itself, where it cannot be packed."""


class Filling:
    """One snapshot of the store, as it is being streamed in.

    Attributes:
        revision: The guard's revision when it began, which the snapshot has to be of.
        rows: What has come so far; belongs to the thread that fills it.
        changed: Who was named by syncs since it began.
    """

    __slots__ = ("changed", "revision", "rows")

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.rows: dict[str, Row] = {}
        self.changed: set[str] = set()


class Table:
    """Every restricted user. All is done under the guard's lock.

    Args:
        deny_unknown: Whether it matters if a user without restrictions is registered, which the
            table cannot tell: then such a user is unknown to it.

    Attributes:
        whole: Whether a snapshot has come to its end, and nothing has made it worthless since.
        unknown: The users whose policies are to be read again.
        filling: The snapshot that is being streamed in.
        waste: The rows of a table that was given up. Whoever fills the next one empties it: to let
            go of a million rows at once would hold up every thread.
    """

    def __init__(self, *, deny_unknown: bool) -> None:
        self._deny_unknown = deny_unknown
        self._rows: dict[str, Row] = {}
        self.whole = False
        self.unknown: set[str] = set()
        self.filling: Filling | None = None
        self.waste: dict[str, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def policy(self, name: str, revision: int) -> Policy | None:
        """Return what decides about a user at the guard's revision, or None where it is unknown."""
        if not self.whole:
            return None
        row = self._rows.get(name)
        if row is None:
            # `known` is not known, and decides nothing where everybody may be unknown.
            nobody = Policy(revision=revision, restrictions=(), known=False)
            return None if self._deny_unknown else nobody
        if isinstance(row, Policy):
            return attrs.evolve(row, revision=revision)
        try:
            return unpack(row, name, revision)
        except ValueError:  # unknown, or a damaged row: the store is asked
            return None

    def put(self, name: str, policy: Policy, *, ahead: bool) -> None:
        """Take over the policy of one user, as it was read at the guard's revision.

        Args:
            name: The user.
            policy: Its policy.
            ahead: Whether it is of a revision that no sync has come to. Then it is not held, since
                that revision may turn out to be of another history; but neither may anything older.
        """
        if ahead:
            if policy.restrictions or name in self._rows:
                self.mark((name,))
        elif self.whole:
            if policy.restrictions:
                self._rows[name] = row_of(policy)
            else:
                self._rows.pop(name, None)
            self.unknown.discard(name)

    def mark(self, names: Collection[str]) -> None:
        """Mark users unknown. Safe to interrupt anywhere, and to do again."""
        if self.filling is not None:
            self.filling.changed.update(names)
        if self.whole:
            self.unknown.update(names)
            for name in names:
                self._rows[name] = _UNKNOWN

    def clear(self) -> None:
        """Mark everybody unknown; a snapshot that is being streamed in is worth nothing either."""
        self.filling = None
        self.whole = False
        if self._rows:
            self.waste, self._rows = self._rows, {}
        self.unknown.clear()

    def begin(self, revision: int) -> Filling:
        """Begin to fill the table; from now on it is noted who changes."""
        self.filling = Filling(revision)
        return self.filling

    def install(self, filling: Filling) -> bool:
        """Take a snapshot over that has come to its end, and tell whether it is still worth it."""
        if self.filling is not filling:
            return False
        self.filling = None
        for name in filling.changed:
            filling.rows[name] = _UNKNOWN
        self.unknown = filling.changed
        self._rows = filling.rows
        self.whole = True
        return True


def row_of(policy: Policy) -> Row:
    """Return a policy as the table holds it."""
    try:
        return pack(policy)
    except ValueError:
        return policy
