"""The listing of the SQL stores: pages of users and of the audit log, by keyset pagination.

Each function runs inside one snapshot. A planner has no statistics about a store that was just
filled, so the statements fix their plans: `CROSS JOIN` keeps the order of the tables (in PostgreSQL
by the settings of its store), `column || ''` uses no index on the column, and a subquery with a
limit is not merged into the query around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Final, NamedTuple

from ipguard import rules
from ipguard._checks import check_whole
from ipguard.model import (
    Accounts,
    Change,
    Page,
    PendingRequest,
    Restriction,
    UserOverview,
    check_accounts,
)
from ipguard.rules import Search
from ipguard.stores._sql import (
    BIGGEST,
    CHANGE,
    PENDING,
    RESTRICTION,
    USER,
    Executor,
    Row,
    change_of,
    encodable,
    micros,
    pending_of,
    restriction_of,
    user_of,
)


class Query(NamedTuple):
    """A statement and its parameters."""

    text: str
    params: Row


_FEW: Final = 1_000
"""Up to so many accounts, the users of each are read; for more, all users are walked through."""
_LAST: Final = "\U0010ffff"
"""Sorts after every character of a stored text."""
_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")


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
    size, accounts, query = _limited(limit), check_accounts(accounts), Search.of(search)
    last = "" if after is None else _storable_bound(after)
    lines: list[tuple[str, UserOverview]] = []
    look, more = 2 * (size + 1), True  # a user may be found by several terms
    while more and len(lines) <= size:
        rows = _usernames(db, accounts, query, last, look)
        names = list(dict.fromkeys(rows))
        while names and len(lines) <= size:
            lines += _lines(db, accounts, names[: size + 1], now)
            del names[: size + 1]
        more = len(rows) == look
        last, look = rows[-1] if rows else last, 4 * look
    items = tuple(line for _, line in lines[:size])
    return Page(items=items, next=lines[size - 1][0] if len(lines) > size else None)


def _limited(limit: int) -> int:
    return min(check_whole("limit", limit, 1), BIGGEST >> 8)


def _storable_bound(text: str) -> str:
    """Return a text that a database takes as a parameter and that sorts like `text`."""
    found = _NOT_STORABLE.search(text)
    if found is None:
        return text
    # Surrogates sort after U+D7FF, and no username has a U+10FFFF.
    return text[: found.start()] + ("" if found[0] == "\0" else f"\ud7ff{_LAST}")


def _lines(
    db: Executor, accounts: Accounts, names: list[str], now: datetime
) -> Iterator[tuple[str, UserOverview]]:
    among, texts = db.among("username"), db.texts(names)
    users = db.rows(f"SELECT {USER}, removed FROM users WHERE {among} ORDER BY username", (texts,))
    restrictions: dict[str, list[Restriction]] = {}
    for row in db.rows(
        f"SELECT username, {RESTRICTION} FROM restrictions WHERE {among}"
        " ORDER BY username, created_at, id",
        (texts,),
    ):
        restrictions.setdefault(row[0], []).append(restriction_of(row[0], row[1:]))
    pending: dict[str, list[PendingRequest]] = {}
    for row in db.rows(
        f"SELECT {PENDING} FROM requests WHERE state = 'pending' AND {among} AND expires_at > ?"
        " ORDER BY username, requested_at, id",
        (texts, micros(now)),
    ):
        pending.setdefault(row[1], []).append(pending_of(row))
    for name, full_name, account_id, email, removed in users:
        held = restrictions.get(name, [])
        if rules.is_visible(accounts, account_id, removed=removed != 0, restricted=bool(held)):
            yield (
                name,
                UserOverview(
                    user=user_of((name, full_name, account_id, email)),
                    restrictions=tuple(held),
                    pending=tuple(pending.get(name, ())),
                    summary=rules.summarise(held, now),
                    removed=removed != 0,
                ),
            )


def _usernames(
    db: Executor, accounts: Accounts, search: Search, after: str, limit: int
) -> list[str]:
    """Return the first usernames that a search finds, in order.

    The caller removes duplicates and users that are not visible to the actor.
    """
    if not search.text:
        return [row[0] for row in db.rows(*_everybody(db, accounts, after, limit))]
    queries = [
        *_by_terms(db, accounts, search, after),
        *_by_addresses(db, accounts, search, after),
    ]
    if not queries:
        return []
    sql = " UNION ALL ".join(text for text, _ in queries)
    params = tuple(value for _, values in queries for value in values)
    return [row[0] for row in db.rows(f"{sql} ORDER BY 1 LIMIT ?", (*params, limit))]


def _everybody(db: Executor, accounts: Accounts, after: str, limit: int) -> Query:
    if isinstance(accounts, frozenset) and len(accounts) <= _FEW:
        theirs = "account_id = j.value AND removed = 0 AND username > ?"
        return Query(
            f"SELECT u.username FROM {db.each()} CROSS JOIN users u WHERE {theirs}"
            f" AND username <= coalesce((SELECT u.username FROM users u WHERE {theirs}"
            " ORDER BY u.username LIMIT 1 OFFSET ?), ?) ORDER BY u.username || '' LIMIT ?",
            (_texts(db, accounts), after, after, limit, _LAST, limit),
        )
    mine = _of_accounts(db, accounts)
    return Query(
        f"SELECT username FROM users WHERE username > ?{mine.text} ORDER BY username LIMIT ?",
        (after, *mine.params, limit),
    )


def _by_terms(db: Executor, accounts: Accounts, search: Search, after: str) -> Iterator[Query]:
    """Yield the queries for users with the terms of a search."""
    if encodable(search.text):
        yield from _with_term(db, accounts, search.text, after)
        if search.words:
            # The longest word is likely to be the rarest.
            yield from _with_term(
                db,
                accounts,
                max(search.words, key=len),
                after,
                f" AND NOT EXISTS (SELECT 1 FROM {db.each()} WHERE NOT EXISTS (SELECT 1"
                " FROM search_terms w WHERE w.username = t.username"
                f" AND w.term >= j.value AND w.term < j.value || '{_LAST}'))",
                db.texts(search.words),
            )


def _with_term(
    db: Executor, accounts: Accounts, start: str, after: str, more: str = "", *params: object
) -> Iterator[Query]:
    begins = f"t.term >= ? AND t.term < ? AND t.username > ?{more}"
    values = (start, start + _LAST, after, *params)
    if not isinstance(accounts, frozenset):
        yield Query(f"SELECT t.username || '' FROM search_terms t WHERE {begins}", values)
        return
    # A LEFT JOIN, which PostgreSQL cannot reorder. It would reorder an inner join, because it
    # estimates that a prefix matches about one row, however many it does match.
    yield Query(
        f"SELECT t.username || '' FROM {db.each()} LEFT JOIN search_terms t"
        f" ON t.account_id = j.value AND {begins} WHERE coalesce(t.username, '') <> ''",
        (_texts(db, accounts), *values),
    )
    # Terms that an older version of ipguard wrote may have no account.
    yield Query(
        f"SELECT t.username || '' FROM search_terms t WHERE t.account_id IS NULL AND {begins}",
        values,
    )


def _in_common(size: int, least: int) -> str:
    cases = (
        f"WHEN substr(r.first_ip, 1, {n}) <> substr(r.last_ip, 1, {n}) THEN {least + n - 1}"
        for n in range(1, size + 1)
    )
    return f"CASE {' '.join(cases)} ELSE {least + size} END"


# The number of leading bytes that the ends of a range have in common, plus 100 for IPv6. It must be
# the very expression of the index over restrictions: databases use the index for no other.
_SHARED: Final = (
    f"CASE length(r.first_ip) WHEN 16 THEN {_in_common(16, 100)} ELSE {_in_common(4, 0)} END"
)


def _by_addresses(db: Executor, accounts: Accounts, search: Search, after: str) -> Iterator[Query]:
    """Yield the query for users with the restrictions of a search."""
    addresses = search.address or search.addresses
    if addresses is None:
        return
    first, last = addresses.packed
    size = len(first)
    if search.address is not None:
        held = "r.first_ip <= ? AND r.last_ip >= ?"
        # If the ends of a range have their first n bytes in common, every address inside begins
        # with them. So a range that contains this address begins at its first n bytes or later.
        starts = [(n, first[:n] + bytes(size - n)) for n in range(size + 1)]
    else:
        held = "r.first_ip = ? AND r.last_ip = ?"
        starts = [(next((n for n in range(size) if first[n] != last[n]), size), first)]
    near = " UNION ALL ".join(["SELECT ? AS shared, ? AS start"] * len(starts))
    version = 100 if size == 16 else 0
    everybody = Query(
        f"SELECT r.username || '' FROM ({near}) n CROSS JOIN restrictions r"
        f" WHERE {_SHARED} = n.shared AND r.first_ip >= n.start AND {held} AND r.username > ?",
        (*(each for n, start in starts for each in (n + version, start)), first, last, after),
    )
    if not isinstance(accounts, frozenset):
        yield everybody
        return
    names = db.rows(f"{everybody.text} LIMIT ?", (*everybody.params, _FEW + 1))
    if len(names) <= _FEW:
        yield Query(
            f"SELECT u.username || '' FROM {db.each()} CROSS JOIN users u"
            f" WHERE u.username = j.value AND {db.among('u.account_id')}",
            (db.texts(row[0] for row in names), _texts(db, accounts)),
        )
        return
    yield Query(
        f"SELECT u.username || '' FROM users u"
        f" WHERE {db.among('u.account_id')} AND u.removed = 0 AND u.username > ?"
        " AND (SELECT 1 FROM restrictions r WHERE r.username = u.username"
        f" AND length(r.first_ip) = ? AND {held} LIMIT 1) = 1",
        (_texts(db, accounts), after, size, first, last),
    )


def _of_accounts(db: Executor, accounts: Accounts) -> Query:
    """Return the condition that a row is of these accounts, written so that it uses no index."""
    if not isinstance(accounts, frozenset):
        return Query("", ())
    owner = "account_id || ''"
    return Query(f" AND {db.among(owner)}", (_texts(db, accounts),))


def _texts(db: Executor, accounts: frozenset[str]) -> object:
    """Return the parameter for accounts, sorted as the indexes are.

    Accounts that no row can hold are left out.
    """
    storable = accounts if encodable("".join(accounts)) else filter(encodable, accounts)
    return db.texts(sorted(storable))


# --------------------------------------------------------------------- the audit log


def history(
    db: Executor,
    accounts: Accounts,
    *,
    username: str | None,
    before: int | None,
    limit: int,
) -> Page[Change]:
    """Return a page of changes; see `RestrictionStore.history`."""
    size, accounts = _limited(limit), check_accounts(accounts)
    until = BIGGEST if before is None else max(min(before, BIGGEST), -BIGGEST)
    # Leave out revision 0: it is no change, and its row only holds a token.
    if username is None and isinstance(accounts, frozenset) and len(accounts) <= _FEW:
        theirs = "c.account_id = j.value AND c.revision < ?"
        revisions = (
            f"SELECT c.revision FROM {db.each()} CROSS JOIN changes c WHERE {theirs}"
            f" AND c.revision >= coalesce((SELECT c.revision FROM changes c WHERE {theirs}"
            " AND c.revision > 0 ORDER BY c.revision DESC LIMIT 1 OFFSET ?), 1)"
            " ORDER BY c.revision + 0 DESC LIMIT ?"
        )
        params: Row = (_texts(db, accounts), until, until, size, size + 1)
    else:
        mine = _of_accounts(db, accounts)
        about = () if username is None else (username if encodable(username) else "",)
        revisions = (
            f"SELECT c.revision FROM changes c WHERE c.revision > 0 AND c.revision < ?{mine.text}"
            f"{' AND c.username = ?' if about else ''} ORDER BY c.revision DESC LIMIT ?"
        )
        params = (until, *mine.params, *about, size + 1)
    rows = db.rows(
        f"SELECT {CHANGE} FROM changes WHERE revision IN ({revisions}) ORDER BY revision DESC",
        params,
    )
    items = tuple(change_of(row) for row in rows[:size])
    return Page(items=items, next=items[-1].revision if len(rows) > size else None)
