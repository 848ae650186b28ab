"""Where a page's users are looked up: all users, those whose name begins so, those with a term.

No planner is left a choice that grows with the users. It knows nothing of a store that was filled
just now, so what is to be walked first stands on the left of a left join, which cannot be turned
round, and what is to be sorted is an expression, which no index has in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Final, Protocol

from ipguard.stores._sql import Executor, Params, Row, encodable
from ipguard.stores._sql_terms import folded

Found = list[Row]
"""Usernames, in order, and their accounts."""

FEW: Final = 50
"""So many accounts are looked at one by one."""
_SEVERAL: Final = 8
"""So many are looked at in each block."""
_SMALL: Final = 200
"""So many users are simply looked through."""
_UNPLACED: Final = 250
_TOGETHER: Final = 50
"""So many ordered lists are read by one statement."""

SORTED: Final = "u.username || ''"
# Of a left join, where it found anybody. Were it said by IS NOT NULL, PostgreSQL would take it for
# an inner join, and turn it round.
PRESENT: Final = "coalesce(u.username, '') <> ''"


class Source(Protocol):
    def everywhere(self, after: str, limit: int) -> Found:
        """Return the first users of the store after a name; fewer than `limit` are all."""

    def own(self, mine: Mine, after: str, limit: int) -> Found:
        """Return the first users of these accounts after a name."""

    def quick(self, mine: Mine) -> bool:
        """Tell whether `own` costs little for certain."""

    def among(self, users: Found) -> Iterable[str]:
        """Return who among a few users matches."""


class Mine:
    """The accounts that a page is for.

    Args:
        db: The connection.
        accounts: Their ids.
        after: The name that the page begins after.
        start: What the ids have to begin with, folded.
    """

    def __init__(self, db: Executor, accounts: frozenset[str], after: str, start: str = "") -> None:
        self._db = db
        self._accounts = accounts
        self._start = start
        self.after = after

    def __len__(self) -> int:
        return len(self._accounts)

    def __contains__(self, account_id: str) -> bool:
        return account_id in self._accounts and folded(account_id).startswith(self._start)

    @cached_property
    def ids(self) -> list[str]:
        """Those that a store can have, in order, as an index is walked the soonest."""
        ids = storable(self._accounts)
        if self._start:
            ids = (each for each in ids if folded(each).startswith(self._start))
        return sorted(ids)

    @cached_property
    def texts(self) -> object:
        """The same, as a parameter for `Executor.each`."""
        return self._db.texts(self.ids)

    @cached_property
    def few(self) -> Found | None:
        """All their users that the page could have, where those are a few."""
        some = self._db.rows(
            f"SELECT u.username, u.account_id FROM {self._db.each()} LEFT JOIN users u"
            " ON u.account_id = j.value AND u.removed = 0 AND u.username > ?"
            f" WHERE {PRESENT} LIMIT ?",
            (self.texts, self.after, _SMALL + 1),
        )
        return some if len(some) <= _SMALL else None


def storable(accounts: frozenset[str]) -> Iterable[str]:
    """Return the accounts that a store can have."""
    # One test for all of them is much sooner than one for each.
    return accounts if encodable("".join(accounts)) else filter(encodable, accounts)


def merged(db: Executor, lists: Sequence[tuple[str, Params]], limit: int) -> list[Row]:
    """Return the rows of several statements, each of which has an order and `limit` rows at most.

    They are not in order together.
    """
    found: list[Row] = []
    for at in range(0, len(lists), _TOGETHER):
        some = lists[at : at + _TOGETHER]
        sql = " UNION ALL ".join(
            f"SELECT * FROM ({text} LIMIT ?) l{n}" for n, (text, _) in enumerate(some)
        )
        found += db.rows(sql, [value for _, params in some for value in (*params, limit)])
    return found


class Users:
    """All users, or those whose names are between two bounds."""

    def __init__(
        self, db: Executor, bounds: tuple[str, str] | None = None, *, removed: bool = False
    ) -> None:
        self._db = db
        self._bounds = bounds
        self._removed = removed

    def _span(self, after: str) -> tuple[str, Row]:
        # One lower bound, as only one is looked up in an index.
        if self._bounds is None:
            return "u.username > ?", (after,)
        start, end = self._bounds
        if after < start:
            return "u.username >= ? AND u.username < ?", (start, end)
        return "u.username > ? AND u.username < ?", (after, end)

    def everywhere(self, after: str, limit: int) -> Found:
        span, params = self._span(after)
        select = "SELECT u.username, u.account_id FROM users u WHERE"
        found = self._db.rows(
            f"{select} u.removed = 0 AND {span} ORDER BY u.username LIMIT ?", (*params, limit)
        )
        if self._removed:
            found += self._db.rows(
                f"{select} u.removed = 1 AND {span} AND"
                " (SELECT 1 FROM restrictions r WHERE r.username = u.username LIMIT 1) = 1"
                " ORDER BY u.username LIMIT ?",
                (*params, limit),
            )
        return sorted(found)[:limit]

    def own(self, mine: Mine, after: str, limit: int) -> Found:
        db, (span, params) = self._db, self._span(after)
        if len(mine) <= FEW:
            one = (
                "SELECT u.username, u.account_id FROM users u"
                f" WHERE u.account_id = ? AND u.removed = 0 AND {span} ORDER BY u.username"
            )
            each = [(one, (account, *params)) for account in mine.ids]
            return sorted(merged(db, each, limit))[:limit]
        return db.rows(
            f"SELECT u.username, u.account_id FROM {db.each()} LEFT JOIN users u"
            f" ON u.account_id = j.value AND u.removed = 0 AND {span}"
            f" WHERE {PRESENT} ORDER BY {SORTED} LIMIT ?",
            (mine.texts, *params, limit),
        )

    def quick(self, mine: Mine) -> bool:
        return len(mine) <= FEW

    def among(self, users: Found) -> Iterable[str]:
        if self._bounds is None:
            return (row[0] for row in users)
        start, end = self._bounds
        return (row[0] for row in users if start <= row[0] < end)


class Terms:
    """Those who have a term between two bounds."""

    def __init__(self, db: Executor, bounds: tuple[str, str], *, removed: bool = False) -> None:
        self._db = db
        self._bounds = bounds
        listed = (
            "(u.removed = 0 OR EXISTS (SELECT 1 FROM restrictions r WHERE r.username = u.username))"
            if removed
            else "u.removed = 0"
        )
        self._users = f"LEFT JOIN users u ON u.username = t.username AND {listed} WHERE {PRESENT}"

    def everywhere(self, after: str, limit: int) -> Found:
        return self._with_unplaced(self._by_blocks("", (), after, limit), after, limit)

    def own(self, mine: Mine, after: str, limit: int) -> Found:
        db = self._db
        if self.quick(mine):
            found = self._by_blocks(db.each(), (mine.texts,), after, limit)
        else:
            found = db.rows(
                f"SELECT DISTINCT {SORTED}, u.account_id FROM {db.each()} LEFT JOIN search_terms t"
                " ON t.account_id = j.value AND t.term >= ? AND t.term < ? AND t.username > ?"
                f" {self._users} ORDER BY 1 LIMIT ?",
                (mine.texts, *self._bounds, after, limit),
            )
        return self._with_unplaced(found, after, limit, mine)

    def quick(self, mine: Mine) -> bool:
        return len(mine) <= _SEVERAL

    def among(self, users: Found) -> Iterable[str]:
        db = self._db
        rows = db.rows(
            f"SELECT username FROM search_terms WHERE {db.among('username')}"
            " AND term >= ? AND term < ?",
            (db.texts(row[0] for row in users), *self._bounds),
        )
        return (row[0] for row in rows)

    def _by_blocks(self, each: str, accounts: Params, after: str, limit: int) -> Found:
        db, found = self._db, list[Row]()
        # Each of the two indexes is over a part of the terms, and the condition has to say so.
        whose = "t.account_id = j.value" if each else "t.block > 0"
        terms = (
            f"FROM {each or '(SELECT 1) j'} LEFT JOIN search_terms t"
            f" ON {whose} AND t.term >= ? AND t.term < ?"
        )
        ((first,),) = db.rows("SELECT max(first) FROM search_blocks WHERE first <= ?", (after,))
        from_here, blocks = ">=", 2
        while True:
            some = db.rows(
                f"SELECT b.id, b.first FROM search_blocks b WHERE b.first {from_here} ?"
                f" AND (SELECT 1 {terms} AND t.block = b.id"
                " WHERE coalesce(t.block, 0) > 0 LIMIT 1) = 1 ORDER BY b.first LIMIT ?",
                (first, *accounts, *self._bounds, blocks),
            )
            numbers = ", ".join(str(int(row[0])) for row in some) or "0"
            found += db.rows(
                f"SELECT DISTINCT {SORTED}, u.account_id {terms} AND t.username > ?"
                f" AND t.block IN ({numbers}) {self._users} ORDER BY 1 LIMIT ?",
                (*accounts, *self._bounds, after, limit - len(found)),
            )
            if len(some) < blocks or len(found) >= limit:
                return found
            first, from_here, blocks = some[-1][1], ">", blocks * 4

    def _with_unplaced(
        self, found: Found, after: str, limit: int, mine: Mine | None = None
    ) -> Found:
        """Add those whose terms were written by a library that knows no blocks."""
        look = max(limit, _UNPLACED)
        more: Found = []
        while len(more) < limit:
            rows = self._db.rows(
                f"SELECT DISTINCT {SORTED}, u.account_id FROM (SELECT 1) j LEFT JOIN search_terms t"
                " ON t.block IS NULL AND t.term >= ? AND t.term < ? AND t.username > ?"
                f" {self._users} ORDER BY 1 LIMIT ?",
                (*self._bounds, after, look),
            )
            more += [row for row in rows if mine is None or row[1] in mine]
            if len(rows) < look:
                break
            after = rows[-1][0]
        return sorted({*found, *more})[:limit] if more else found
