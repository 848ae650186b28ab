"""The pages of the SQL stores: overview and history. Each runs inside one snapshot."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from ipguard import rules
from ipguard.errors import InvalidValue
from ipguard.model import (
    Accounts,
    Actor,
    Change,
    Page,
    PendingRequest,
    Restriction,
    UserOverview,
)
from ipguard.store import checked_accounts
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
from ipguard.stores._sql_search import LOOKED_AT, listed
from ipguard.stores._sql_sources import FEW, merged, storable

_AT_ONCE: Final = 500


def _limited(limit: int) -> int:
    if limit < 1:
        raise InvalidValue("limit", "must be at least 1")
    return min(limit, BIGGEST - 1)


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
    found = listed(db, checked_accounts(accounts), search=search, after=after, limit=size + 1)
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
    revisions = _revisions(db, checked_accounts(accounts), about, until, size + 1)
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
