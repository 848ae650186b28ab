"""Whom a page of the SQL stores lists: usernames in order, whatever is asked for.

A page costs the same however many users there are, because nothing is sorted that grows with them:

* Each way to match is a source, which gives the next users in the order of their names: all of
  them, or those whose name begins so, from an index; by terms from the blocks (`_sql_terms`); by an
  address from the different runs of addresses that hold it, each of which has its users in order.
  A page is the beginning of what its sources give together.
* Where the actor has some accounts, a source is asked for the whole store, and what it gives is
  held against the accounts; or it is asked for the accounts' own users. The first is sooner where
  much matches, the second where little does. Nobody can know which it is, so the first is given up
  after a bounded number of users.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Final, Protocol

from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import AddressError
from ipguard.model import Accounts, Actor
from ipguard.stores._sql import Executor, Params, Row, encodable
from ipguard.stores._sql_terms import folded, prefix_range

Found = list[Row]
"""Usernames, in order, and their accounts."""

FEW: Final = 50
"""So many accounts are looked at one by one."""
_SEVERAL: Final = 8
"""So many are looked at in each block."""
_MANY: Final = 5_000
"""For more than that it takes longer to count their users than to begin."""
_SMALL: Final = 200
"""So many users are simply looked through."""
_FIRST_LOOK: Final = 250
LOOKED_AT: Final = 20_000
"""So many that belong to others are passed over in search of what is the accounts'."""
_TOGETHER: Final = 50
"""So many ordered lists are read by one statement."""

# What is found by something else is sorted then: no planner is to walk the users in their order
# instead, until enough of them match.
_SORTED: Final = "u.username || ''"
_HOLDS: Final = "r.first_ip <= ? AND r.last_ip >= ? AND length(r.first_ip) = ?"


class _Source(Protocol):
    def everywhere(self, after: str, limit: int) -> Found:
        """Return the first users of the store after a name; fewer than `limit` are all."""

    def own(self, mine: _Mine, after: str, limit: int) -> Found:
        """Return the first users of these accounts after a name."""

    def quick(self, mine: _Mine) -> bool:
        """Tell whether `own` costs little for certain."""

    def among(self, users: Found) -> Iterable[str]:
        """Return who among a few users matches."""


class _Mine:
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
        """Those that a store can have."""
        return [each for each in storable(self._accounts) if folded(each).startswith(self._start)]

    @cached_property
    def texts(self) -> object:
        """The same, as a parameter for `Executor.each`."""
        return self._db.texts(self.ids)

    @cached_property
    def few(self) -> Found | None:
        """All their users that the page could have, where those are a few."""
        some = self._db.rows(
            f"SELECT u.username, u.account_id FROM {self._db.each()} CROSS JOIN users u"
            " WHERE u.account_id = j.value AND u.removed = 0 AND u.username > ? LIMIT ?",
            (self.texts, self.after, _SMALL + 1),
        )
        return some if len(some) <= _SMALL else None


def listed(
    db: Executor, accounts: Accounts, *, search: str, after: str | None, limit: int
) -> list[str]:
    """Return the usernames of a page; see `RestrictionStore.overview`."""
    start, last = folded(search), "" if after is None else _bound(after)
    everyone = accounts is Actor.EVERY_ACCOUNT
    sources: list[_Source] = [] if start else [_Users(db, removed=everyone)]
    if start and encodable(start):
        bounds = prefix_range(start)
        sources += [_Users(db, bounds, removed=everyone), _Terms(db, bounds, removed=everyone)]
    address = _address(search)
    if address is not None:
        sources.append(_Holders(db, address, removed=everyone))
    if accounts is Actor.EVERY_ACCOUNT:
        return _first((source.everywhere(last, limit) for source in sources), limit)
    mine = _Mine(db, accounts, last)
    found = [_of_accounts(source, mine, limit) for source in sources]
    if start:
        # Which accounts are called so is found out here: what is theirs is then no search at all.
        called = _called(accounts, start)
        theirs = (
            _Mine(db, called, last) if len(called) <= _MANY else _Mine(db, accounts, last, start)
        )
        found.append(_of_accounts(_Users(db), theirs, limit))
    return _first(found, limit)


def _first(found: Iterable[Found], limit: int) -> list[str]:
    return sorted({row[0] for some in found for row in some})[:limit]


def _of_accounts(source: _Source, mine: _Mine, limit: int) -> Found:
    """Return the first users of these accounts, by the way that turns out to be the shorter."""
    if len(mine) <= _MANY and mine.few is not None:
        return _matching(source, mine.few)
    if source.quick(mine):
        return source.own(mine, mine.after, limit)
    found: Found = []
    after, looked_at, look = mine.after, 0, _FIRST_LOOK
    while looked_at < LOOKED_AT:
        rows = source.everywhere(after, look)
        found += [row for row in rows if row[1] in mine]
        if len(found) >= limit or len(rows) < look:
            return found[:limit]
        after, looked_at, look = rows[-1][0], looked_at + look, look * 4
    if mine.few is not None:
        return _matching(source, mine.few)
    return found + source.own(mine, after, limit - len(found))


def _matching(source: _Source, users: Found) -> Found:
    names = set(source.among(users))
    return [row for row in users if row[0] in names]


def _bound(text: str) -> str:
    """Return a text that can be stored and has the same usernames after it."""
    return text.partition("\0")[0].encode("utf-8", "replace").decode()


def _address(text: str) -> AddressRange | None:
    try:
        return parse_address(text.strip(" \t\r\n"))
    except AddressError:
        return None


def _called(accounts: frozenset[str], start: str) -> frozenset[str]:
    """Return the accounts whose id begins so, when folded; not all of them, where it is many."""
    # One text is searched much sooner than a hundred thousand. What is not an account after all,
    # because one of them has the separator in it, is none of theirs.
    text = "\n".join(accounts)
    if not text.isascii() or " " in text:
        return frozenset(each for each in accounts if folded(each).startswith(start))
    text = f"\n{text}\n"
    lower, mark = text.lower(), f"\n{start}"
    found, at = set[str](), lower.find(mark)
    while at >= 0 and len(found) <= 2 * _MANY:
        end = text.index("\n", at + 1)
        found.add(text[at + 1 : end])
        at = lower.find(mark, end)
    return accounts.intersection(found)


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


class _Users:
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
                f"{select} u.removed = 1 AND {span} AND EXISTS"
                " (SELECT 1 FROM restrictions r WHERE r.username = u.username)"
                " ORDER BY u.username LIMIT ?",
                (*params, limit),
            )
        return sorted(found)[:limit]

    def own(self, mine: _Mine, after: str, limit: int) -> Found:
        db, (span, params) = self._db, self._span(after)
        if len(mine) <= FEW:
            one = (
                "SELECT u.username, u.account_id FROM users u"
                f" WHERE u.account_id = ? AND u.removed = 0 AND {span} ORDER BY u.username"
            )
            each = [(one, (account, *params)) for account in mine.ids]
            return sorted(merged(db, each, limit))[:limit]
        return db.rows(
            f"SELECT u.username, u.account_id FROM {db.each()} CROSS JOIN users u"
            f" WHERE u.account_id = j.value AND u.removed = 0 AND {span}"
            f" ORDER BY {_SORTED} LIMIT ?",
            (mine.texts, *params, limit),
        )

    def quick(self, mine: _Mine) -> bool:
        return len(mine) <= FEW

    def among(self, users: Found) -> Iterable[str]:
        if self._bounds is None:
            return (row[0] for row in users)
        start, end = self._bounds
        return (row[0] for row in users if start <= row[0] < end)


class _Terms:
    """Those who have a term between two bounds."""

    def __init__(self, db: Executor, bounds: tuple[str, str], *, removed: bool = False) -> None:
        self._db = db
        self._bounds = bounds
        self._listed = (
            "(u.removed = 0 OR EXISTS (SELECT 1 FROM restrictions r WHERE r.username = u.username))"
            if removed
            else "u.removed = 0"
        )

    def everywhere(self, after: str, limit: int) -> Found:
        return self._with_unplaced(self._by_blocks("", (), after, limit), after, limit)

    def own(self, mine: _Mine, after: str, limit: int) -> Found:
        db = self._db
        if self.quick(mine):
            found = self._by_blocks(f"{db.each()} CROSS JOIN", (mine.texts,), after, limit)
        else:
            found = db.rows(
                f"SELECT DISTINCT {_SORTED}, u.account_id FROM {db.each()}"
                " CROSS JOIN search_terms t CROSS JOIN users u"
                " WHERE t.account_id = j.value AND t.term >= ? AND t.term < ? AND t.username > ?"
                f" AND u.username = t.username AND {self._listed} ORDER BY 1 LIMIT ?",
                (mine.texts, *self._bounds, after, limit),
            )
        return self._with_unplaced(found, after, limit, mine)

    def quick(self, mine: _Mine) -> bool:
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
        terms = f"{each} search_terms t"
        # Each of the two indexes is over a part of the terms, and the condition has to say so.
        part = "t.account_id = j.value" if each else "t.block > 0"
        matching = f"{part} AND t.term >= ? AND t.term < ?"
        ((first,),) = db.rows("SELECT max(first) FROM search_blocks WHERE first <= ?", (after,))
        from_here, blocks = ">=", 2
        while True:
            some = db.rows(
                f"SELECT b.id, b.first FROM search_blocks b WHERE b.first {from_here} ?"
                f" AND (SELECT 1 FROM {terms} WHERE t.block = b.id AND {matching} LIMIT 1) = 1"
                " ORDER BY b.first LIMIT ?",
                (first, *accounts, *self._bounds, blocks),
            )
            numbers = ", ".join(str(int(row[0])) for row in some) or "0"
            found += db.rows(
                f"SELECT DISTINCT {_SORTED}, u.account_id FROM {terms} CROSS JOIN users u"
                f" WHERE t.block IN ({numbers}) AND {matching} AND t.username > ?"
                f" AND u.username = t.username AND {self._listed} ORDER BY 1 LIMIT ?",
                (*accounts, *self._bounds, after, limit - len(found)),
            )
            if len(some) < blocks or len(found) >= limit:
                return found
            first, from_here, blocks = some[-1][1], ">", blocks * 4

    def _with_unplaced(
        self, found: Found, after: str, limit: int, mine: _Mine | None = None
    ) -> Found:
        """Add those whose terms were written by a library that knows no blocks."""
        look = max(limit, _FIRST_LOOK)
        more: Found = []
        while len(more) < limit:
            rows = self._db.rows(
                f"SELECT DISTINCT {_SORTED}, u.account_id FROM search_terms t CROSS JOIN users u"
                " WHERE t.block IS NULL AND t.term >= ? AND t.term < ? AND t.username > ?"
                f" AND u.username = t.username AND {self._listed} ORDER BY 1 LIMIT ?",
                (*self._bounds, after, look),
            )
            more += [row for row in rows if mine is None or row[1] in mine]
            if len(rows) < look:
                break
            after = rows[-1][0]
        return sorted({*found, *more})[:limit] if more else found


class _Holders:
    """Those who have a restriction that holds an address."""

    def __init__(self, db: Executor, address: AddressRange, *, removed: bool = False) -> None:
        self._db = db
        packed = address.packed[0]
        self._held = (packed, packed, len(packed))
        self._listed = "" if removed else "AND u.removed = 0"
        self._runs: list[Row] | None = None

    def everywhere(self, after: str, limit: int) -> Found:
        if self._runs is None:
            self._runs = _runs_holding(self._db, self._held[0])
        one = (
            "SELECT u.username, u.account_id FROM restrictions r CROSS JOIN users u"
            " WHERE r.shared = ? AND r.first_ip = ? AND r.last_ip = ? AND r.username > ?"
            f" AND u.username = r.username {self._listed} ORDER BY r.username"
        )
        lists = [(one, (*run, after)) for run in self._runs]
        return sorted(set(merged(self._db, lists, limit)))[:limit]

    def own(self, mine: _Mine, after: str, limit: int) -> Found:
        db = self._db
        condition = (
            "u.removed = 0 AND u.username > ? AND EXISTS"
            f" (SELECT 1 FROM restrictions r WHERE r.username = u.username AND {_HOLDS})"
        )
        if len(mine) <= FEW:
            one = (
                "SELECT u.username, u.account_id FROM users u"
                f" WHERE u.account_id = ? AND {condition} ORDER BY u.username"
            )
            each = [(one, (account, after, *self._held)) for account in mine.ids]
            return sorted(merged(db, each, limit))[:limit]
        return db.rows(
            f"SELECT u.username, u.account_id FROM {db.each()} CROSS JOIN users u"
            f" WHERE u.account_id = j.value AND {condition} ORDER BY {_SORTED} LIMIT ?",
            (mine.texts, after, *self._held, limit),
        )

    def quick(self, mine: _Mine) -> bool:
        del mine
        return False

    def among(self, users: Found) -> Iterable[str]:
        db = self._db
        rows = db.rows(
            f"SELECT r.username FROM restrictions r WHERE {db.among('r.username')} AND {_HOLDS}",
            (db.texts(row[0] for row in users), *self._held),
        )
        return (row[0] for row in rows)


_RUNS: Final = """
WITH RECURSIVE near (shared, low) AS (%s), firsts (shared, first) AS (
    SELECT n.shared, (
        SELECT r.first_ip FROM restrictions r
        WHERE r.shared = n.shared AND r.first_ip >= n.low AND r.first_ip <= ?
        ORDER BY r.first_ip LIMIT 1
    ) FROM near n
    UNION ALL SELECT f.shared, (
        SELECT r.first_ip FROM restrictions r
        WHERE r.shared = f.shared AND r.first_ip > f.first AND r.first_ip <= ?
        ORDER BY r.first_ip LIMIT 1
    ) FROM firsts f WHERE f.first IS NOT NULL
), runs (shared, first, last) AS (
    SELECT f.shared, f.first, (
        SELECT r.last_ip FROM restrictions r
        WHERE r.shared = f.shared AND r.first_ip = f.first AND r.last_ip >= ?
        ORDER BY r.last_ip LIMIT 1
    ) FROM firsts f WHERE f.first IS NOT NULL
    UNION ALL SELECT s.shared, s.first, (
        SELECT r.last_ip FROM restrictions r
        WHERE r.shared = s.shared AND r.first_ip = s.first AND r.last_ip > s.last
        ORDER BY r.last_ip LIMIT 1
    ) FROM runs s WHERE s.last IS NOT NULL
)
SELECT shared, first, last FROM runs WHERE last IS NOT NULL
"""


def _runs_holding(db: Executor, packed: bytes) -> list[Row]:
    """Return the different runs of addresses that hold an address, which users have in common.

    A run whose ends have the first `n` bytes in common holds the address only if the address has
    them as well. So it begins between those bytes and the address, and each `n` is one short walk
    from one run to the next, however many users have it.
    """
    size = len(packed)
    near: list[object] = []
    for common in range(size + 1):
        near += [common + (100 if size == 16 else 0), packed[:common] + bytes(size - common)]
    seeds = " UNION ALL ".join(["SELECT ?, ?"] * (size + 1))
    return db.rows(_RUNS.replace("%s", seeds), (*near, packed, packed, packed))
