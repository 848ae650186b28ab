"""The pages of the SQL stores: overview and history. Each runs inside one snapshot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Final, Protocol
from unicodedata import normalize

from ipguard import rules
from ipguard._checks import check_whole
from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import AddressError
from ipguard.model import Accounts, Actor, Change, Page, PendingRequest, Restriction, UserOverview
from ipguard.store import check_accounts
from ipguard.stores._sql import (
    BIGGEST,
    CHANGE,
    PENDING,
    RESTRICTION,
    USER,
    Executor,
    Params,
    Row,
    change_of,
    encodable,
    micros,
    pending_of,
    restriction_of,
    user_of,
)

_AT_ONCE: Final = 500


def _limited(limit: int) -> int:
    return min(check_whole("limit", limit, 1), BIGGEST - 1)


def overview(
    db: Executor,
    now: datetime,
    accounts: Accounts,
    *,
    search: str,
    after: str | None,
    limit: int,
) -> Page[UserOverview]:
    """Return a page of users; see `RestrictionStore.overview`."""
    size = _limited(limit)
    found = listed(db, check_accounts(accounts), search=search, after=after, limit=size + 1)
    names = found[:size]
    users = _users(db, names)
    restrictions, pending = _restrictions(db, names), _pending(db, names, now)
    items = tuple(
        UserOverview(
            user=user_of(users[name][:4]),
            restrictions=tuple(restrictions.get(name, ())),
            pending=tuple(pending.get(name, ())),
            summary=rules.summarise(restrictions.get(name, ()), now),
            removed=users[name][4] != 0,
        )
        for name in names
    )
    return Page(items=items, next=names[-1] if len(found) > size else None)


def _users(db: Executor, names: list[str]) -> dict[str, Row]:
    rows = db.rows(
        f"SELECT {USER}, removed FROM users WHERE {db.among('username')}", (db.texts(names),)
    )
    return {row[0]: row for row in rows}


def _restrictions(db: Executor, names: list[str]) -> dict[str, list[Restriction]]:
    found: dict[str, list[Restriction]] = {}
    for row in db.rows(
        f"SELECT username, {RESTRICTION} FROM restrictions"
        f" WHERE {db.among('username')} ORDER BY username, created_at, id",
        (db.texts(names),),
    ):
        found.setdefault(row[0], []).append(restriction_of(row[0], row[1:]))
    return found


def _pending(db: Executor, names: list[str], now: datetime) -> dict[str, list[PendingRequest]]:
    found: dict[str, list[PendingRequest]] = {}
    for row in db.rows(
        f"SELECT {PENDING} FROM requests"
        f" WHERE state = 'pending' AND {db.among('username')} AND expires_at > ?"
        " ORDER BY username, requested_at, id",
        (db.texts(names), micros(now)),
    ):
        found.setdefault(row[1], []).append(pending_of(row))
    return found


def history(
    db: Executor,
    accounts: Accounts,
    *,
    username: str | None,
    before: int | None,
    limit: int,
) -> Page[Change]:
    """Return a page of changes; see `RestrictionStore.history`."""
    size = _limited(limit)
    until = BIGGEST if before is None else max(min(before, BIGGEST), -BIGGEST)
    about = username if username is None or encodable(username) else ""
    revisions = _revisions(db, check_accounts(accounts), about, until, size + 1)
    items = tuple(change_of(row) for row in _changes(db, revisions[:size]))
    return Page(items=items, next=items[-1].revision if len(revisions) > size else None)


# The row of revision 0 is there for its token alone.
_TRAIL: Final = """
SELECT c.revision, c.account_id FROM changes c
WHERE c.revision > 0 AND c.revision < ? %s ORDER BY c.revision DESC
"""


def _revisions(
    db: Executor, accounts: Accounts, username: str | None, before: int, limit: int
) -> list[int]:
    """Return which rows a page of changes has; as with users, by the way that is the shorter."""
    about, whom = ("", ()) if username is None else ("AND c.username = ?", (username,))
    trail = f"{_TRAIL % about} LIMIT ?"
    if accounts is Actor.EVERY_ACCOUNT:
        return [row[0] for row in db.rows(trail, (before, *whom, limit))]
    found: list[int] = []
    if username is None and len(accounts) <= FEW:
        one = _TRAIL % "AND c.account_id = ?"
        each = [(one, (before, account)) for account in storable(accounts)]
        return sorted((row[0] for row in merged(db, each, limit)), reverse=True)[:limit]
    looked_at, look = 0, _AT_ONCE
    while looked_at < LOOKED_AT:
        rows = db.rows(trail, (before, *whom, look))
        found += [row[0] for row in rows if row[1] in accounts]
        if len(found) >= limit or len(rows) < look:
            return found[:limit]
        before, looked_at, look = rows[-1][0], looked_at + look, look * 4
    rows = db.rows(
        f"SELECT c.revision FROM {db.each()} LEFT JOIN changes c ON c.account_id = j.value"
        f" AND c.revision > 0 AND c.revision < ? {about} WHERE coalesce(c.revision, 0) > 0"
        " ORDER BY c.revision + 0 DESC LIMIT ?",
        (db.texts(sorted(storable(accounts))), before, *whom, limit - len(found)),
    )
    return found + [row[0] for row in rows]


def _changes(db: Executor, revisions: list[int]) -> list[Row]:
    found: list[Row] = []
    for at in range(0, len(revisions), _AT_ONCE):
        some = revisions[at : at + _AT_ONCE]
        found += db.rows(
            f"SELECT {CHANGE} FROM changes WHERE revision IN ({', '.join('?' * len(some))})"
            " ORDER BY revision DESC",
            some,
        )
    return found


_STORED_NOWHERE: Final = re.compile("[\0\ud800-\udfff]")
_MANY: Final = 5_000
"""For more accounts than that it takes longer to count their users than to begin."""
_FIRST_LOOK: Final = 250
LOOKED_AT: Final = 5_000
"""So many that belong to others are passed over in search of what is the accounts'."""


def listed(
    db: Executor, accounts: Accounts, *, search: str, after: str | None, limit: int
) -> list[str]:
    """Return the usernames of a page; see `RestrictionStore.overview`."""
    start, last = folded(search), "" if after is None else _bound(after)
    everyone = accounts is Actor.EVERY_ACCOUNT
    sources: list[Source] = [] if start else [Users(db, removed=everyone)]
    if start and encodable(start):
        bounds = prefix_range(start)
        sources += [Users(db, bounds, removed=everyone), Terms(db, bounds, removed=everyone)]
    address = _address(search)
    if address is not None:
        sources.append(Holders(db, address, removed=everyone))
    if accounts is Actor.EVERY_ACCOUNT:
        return _first((source.everywhere(last, limit) for source in sources), limit)
    mine = Mine(db, accounts, last)
    found = [_of_accounts(source, mine, limit) for source in sources]
    if start:
        # Which accounts are called so is found out here: what is theirs is then no search at all.
        called = _called(accounts, start)
        theirs = Mine(db, called, last) if len(called) <= _MANY else Mine(db, accounts, last, start)
        found.append(_of_accounts(Users(db), theirs, limit))
    return _first(found, limit)


def _first(found: Iterable[Found], limit: int) -> list[str]:
    return sorted({row[0] for some in found for row in some})[:limit]


def _of_accounts(source: Source, mine: Mine, limit: int) -> Found:
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


def _matching(source: Source, users: Found) -> Found:
    names = set(source.among(users))
    return [row for row in users if row[0] in names]


def _bound(text: str) -> str:
    """Return a text that can be stored and has the same usernames after it."""
    found = _STORED_NOWHERE.search(text)
    if found is None:
        return text
    # No username has a U+10FFFF in it: what follows is the last before the surrogates.
    return text[: found.start()] + ("\ud7ff\U0010ffff" if found[0] > "\0" else "")


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


def _in_common(size: int, least: int) -> str:
    cases = (
        f"WHEN substr(r.first_ip, 1, {n}) <> substr(r.last_ip, 1, {n}) THEN {least + n - 1}"
        for n in range(1, size + 1)
    )
    return f"CASE {' '.join(cases)} ELSE {least + size} END"


_SHARED: Final = (
    f"CASE length(r.first_ip) WHEN 16 THEN {_in_common(16, 100)} ELSE {_in_common(4, 0)} END"
)
"""How many bytes the ends of a run have in common, and 100 more for IPv6.

The index over restrictions has the same words, without which it would not be found.
"""
_HOLDS: Final = "r.first_ip <= ? AND r.last_ip >= ? AND length(r.first_ip) = ?"


class Holders:
    """Those who have a restriction that holds an address."""

    def __init__(self, db: Executor, address: AddressRange, *, removed: bool = False) -> None:
        self._db = db
        packed = address.packed[0]
        self._held = (packed, packed, len(packed))
        self._listed = "" if removed else " AND u.removed = 0"
        self._runs: list[Row] | None = None

    def everywhere(self, after: str, limit: int) -> Found:
        if self._runs is None:
            self._runs = _runs_holding(self._db, self._held[0])
        one = (
            "SELECT u.username, u.account_id FROM restrictions r LEFT JOIN users u"
            f" ON u.username = r.username{self._listed} WHERE {_SHARED} = ? AND r.first_ip = ?"
            f" AND r.last_ip = ? AND r.username > ? AND {PRESENT} ORDER BY r.username"
        )
        lists = [(one, (*run, after)) for run in self._runs]
        return sorted(set(merged(self._db, lists, limit)))[:limit]

    def own(self, mine: Mine, after: str, limit: int) -> Found:
        db = self._db
        condition = (
            "u.removed = 0 AND u.username > ? AND (SELECT 1 FROM restrictions r"
            f" WHERE r.username = u.username AND {_HOLDS} LIMIT 1) = 1"
        )
        if len(mine) <= FEW:
            one = (
                "SELECT u.username, u.account_id FROM users u"
                f" WHERE u.account_id = ? AND {condition} ORDER BY u.username"
            )
            each = [(one, (account, after, *self._held)) for account in mine.ids]
            return sorted(merged(db, each, limit))[:limit]
        return db.rows(
            f"SELECT u.username, u.account_id FROM {db.each()} LEFT JOIN users u"
            f" ON u.account_id = j.value AND {condition} WHERE {PRESENT} ORDER BY {SORTED} LIMIT ?",
            (mine.texts, after, *self._held, limit),
        )

    def quick(self, mine: Mine) -> bool:
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
WITH RECURSIVE near (shared, low) AS (%(seeds)s), firsts (shared, first) AS (
    SELECT n.shared, (
        SELECT r.first_ip FROM restrictions r
        WHERE %(shared)s = n.shared AND r.first_ip >= n.low AND r.first_ip <= ?
        ORDER BY r.first_ip LIMIT 1
    ) FROM near n
    UNION ALL SELECT f.shared, (
        SELECT r.first_ip FROM restrictions r
        WHERE %(shared)s = f.shared AND r.first_ip > f.first AND r.first_ip <= ?
        ORDER BY r.first_ip LIMIT 1
    ) FROM firsts f WHERE f.first IS NOT NULL
), runs (shared, first, last) AS (
    SELECT f.shared, f.first, (
        SELECT r.last_ip FROM restrictions r
        WHERE %(shared)s = f.shared AND r.first_ip = f.first AND r.last_ip >= ?
        ORDER BY r.last_ip LIMIT 1
    ) FROM firsts f WHERE f.first IS NOT NULL
    UNION ALL SELECT s.shared, s.first, (
        SELECT r.last_ip FROM restrictions r
        WHERE %(shared)s = s.shared AND r.first_ip = s.first AND r.last_ip > s.last
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
    return db.rows(_RUNS % {"seeds": seeds, "shared": _SHARED}, (*near, packed, packed, packed))


BLOCK: Final = 1_000
"""How many users a block has when it is made; it is cut when it has grown to twice as many."""

Placed = tuple[str, str, int, str | None]
TERM: Final = "username, term, block, account_id"
"""The columns of a `Placed`."""


def folded(text: str) -> str:
    """Return text as it is searched for; two rounds make any username its canonical form."""
    if text.isascii():
        return " ".join(text.lower().split())
    once = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", once).casefold().split())


def prefix_range(start: str) -> tuple[str, str]:
    """Return the bounds between which, by code point, just the texts with that beginning are."""
    kept = start.rstrip("\U0010ffff")
    if not kept:
        return start, "\U0010ffff" * (len(start) + 1)
    following = ord(kept[-1]) + 1
    # Surrogates cannot be stored, nor bound as a parameter.
    return start, kept[:-1] + chr(0xE000 if following == 0xD800 else following)


def placed_terms(username: str, full_name: str, account_id: str, block: int) -> list[Placed]:
    """Return a user's terms as they are stored, in their order.

    Args:
        username: Canonical.
        full_name: The name.
        account_id: The account. Terms that are the account's own name carry none: who asks by
            accounts looks at those by itself.
        block: The block that the user is in.
    """
    words, own = folded(full_name).split(), folded(account_id)
    terms = {" ".join(words[at:]) for at in range(len(words))}
    found = sorted({folded(username), own, *terms} - {""})
    return [
        (
            username,
            term,
            0 if term == username else block,
            None if term in (username, own) else account_id,
        )
        for term in found
    ]


_BLOCK_OF: Final = "SELECT id FROM search_blocks WHERE first <= %s ORDER BY first DESC LIMIT 1"
_BLOCKS_OF: Final = f"SELECT j.value, ({_BLOCK_OF % 'j.value'}) FROM %s"
_BLOCKS: Final = "SELECT first, id FROM search_blocks ORDER BY first"
_ADD_BLOCK: Final = "INSERT INTO search_blocks (first, id) VALUES (?, ?)"
_LAST_BLOCK: Final = "SELECT max(id) FROM search_blocks"
# Only in the block itself, so that the terms which are in none stay there.
_MOVE_TERMS: Final = f"""
UPDATE search_terms SET block = ({_BLOCK_OF % "search_terms.username"})
WHERE block = ? AND block > 0
"""
_SPAN: Final = """
SELECT b.first, (
    SELECT n.first FROM search_blocks n WHERE n.first > b.first ORDER BY n.first LIMIT 1
) FROM search_blocks b WHERE b.id = ?
"""
_GROWN: Final = "SELECT count(*) FROM (SELECT 1 FROM users WHERE username >= ? %s LIMIT ?) u"
_CUTS: Final = """
SELECT username FROM (
    SELECT username, row_number() OVER (ORDER BY username) AS place FROM users
    WHERE username >= ? %s
) u WHERE place %% ? = 1 AND place > 1 ORDER BY username
"""


def blocks_of(db: Executor, usernames: Iterable[str]) -> dict[str, int]:
    """Return the block of each of some users, whether they are there yet or not."""
    return dict(db.rows(_BLOCKS_OF.replace("%s", db.each()), (db.texts(usernames),)))


def cut_grown(db: Executor, block: int) -> None:
    """Cut a block into several where too many users have come into it, inside a turn."""
    ((first, following),) = db.rows(_SPAN, (block,))
    bound, params = (
        ("", (first,)) if following is None else ("AND username < ?", (first, following))
    )
    ((users,),) = db.rows(_GROWN % bound, (*params, 2 * BLOCK + 1))
    if users > 2 * BLOCK:
        ((last,),) = db.rows(_LAST_BLOCK)
        cuts = db.rows(_CUTS % bound, (*params, BLOCK))
        add_blocks(db, [(row[0], last + number) for number, row in enumerate(cuts, 1)], {block})


def add_blocks(db: Executor, new: Iterable[tuple[str, int]], cut: Iterable[int]) -> None:
    """Add blocks, and move to them what is theirs of those that they were cut from."""
    for row in new:
        db.run(_ADD_BLOCK, row)
    for block in cut:
        db.run(_MOVE_TERMS, (block,))


class Placing:
    """Places the terms of many users, and makes blocks for those among them that are new.

    Args:
        db: The connection.

    Attributes:
        new: The blocks to add: the first username and the number.
        cut: The blocks that those were cut from.
        touched: The blocks that users came into.
    """

    def __init__(self, db: Executor) -> None:
        self._blocks = db.rows(_BLOCKS)
        self._last = max(row[1] for row in self._blocks)
        self.new: list[tuple[str, int]] = []
        self.cut: set[int] = set()
        self.touched: set[int] = set()

    def terms(self, users: Iterable[Row]) -> Iterator[Placed]:
        """Give the terms of users: name, full name, account, and whether added, in order."""
        at, came, block = 0, 0, self._blocks[0][1]
        for username, full_name, account_id, added in users:
            while at + 1 < len(self._blocks) and self._blocks[at + 1][0] <= username:
                at, came = at + 1, 0
                block = self._blocks[at][1]
            if added:
                came += 1
                if came > BLOCK:
                    self._last, came = self._last + 1, 1
                    block = self._last
                    self.new.append((username, block))
                    self.cut.add(self._blocks[at][1])
                self.touched.add(block)
            yield from placed_terms(username, full_name, account_id, block)
