"""The reads of the SQL stores. Each function runs inside one snapshot that the caller opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby
from typing import Final

from ipguard import rules
from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import AddressError, InvalidValue
from ipguard.model import (
    EVERYBODY,
    RESET,
    Accounts,
    Actor,
    Change,
    Changes,
    Page,
    PendingRequest,
    Policy,
    Restriction,
    UserOverview,
)
from ipguard.stores._sql import (
    BIGGEST,
    CHANGE,
    PENDING,
    RESTRICTION,
    USER,
    Executor,
    Row,
    change_of,
    columns,
    encodable,
    folded,
    make_restriction,
    micros,
    pending_of,
    prefix_range,
    reads_rows,
    restriction_of,
    touched_of,
    user_of,
)

_FOLLOWED_AT_MOST: Final = 10_000
"""A guard that is behind by more changes than this is told EVERYBODY."""
_FEW_ACCOUNTS: Final = 1_000
_FEW_TERMS: Final = 5_000

POLICY: Final = f"""
SELECT h.revision, u.removed, {columns(RESTRICTION, "r")}, %s
FROM head h
LEFT JOIN users u ON u.username = ?
LEFT JOIN restrictions r ON r.username = ?
WHERE h.id = 1
ORDER BY r.created_at, r.id
"""
"""A policy in one statement, which is one snapshot. Its parameters are the username, twice.

`%s` is for one more column, which `policy_of` passes over.
"""
_RESTRICTION_ENDS: Final = 2 + len(RESTRICTION.split(","))


@reads_rows
def policy_of(username: str, rows: list[Row]) -> Policy:
    """Return a policy from the rows of `POLICY`."""
    revision, removed, restriction_id = rows[0][:3]
    return Policy(
        revision=revision,
        restrictions=()
        if restriction_id is None
        else tuple([make_restriction(username, row[2:_RESTRICTION_ENDS]) for row in rows]),
        known=removed == 0,
    )


ALL_POLICIES: Final = f"""
SELECT r.username, u.removed, {columns(RESTRICTION, "r")}
FROM restrictions r LEFT JOIN users u ON u.username = r.username
ORDER BY r.username, r.created_at, r.id
"""


def policies_of(revision: int, rows: Iterable[Row]) -> Iterator[tuple[str, Policy]]:
    """Give the policies from the rows of `ALL_POLICIES`, as they come."""
    for username, group in groupby(rows, key=lambda row: row[0]):
        held = list(group)
        restrictions = tuple(restriction_of(username, row[2:]) for row in held)
        yield username, Policy(revision=revision, restrictions=restrictions, known=held[0][1] == 0)


def head(db: Executor) -> tuple[int, str]:
    """Return the store's revision and its token."""
    ((revision, token),) = db.rows("SELECT revision, token FROM head WHERE id = 1")
    return revision, token


def touching(db: Executor) -> int:
    """Return the last revision that touched a policy."""
    ((revision,),) = db.rows(TOUCHING)
    return int(revision)


TOUCHING: Final = "SELECT touching FROM head WHERE id = 1"
CHANGES_SINCE: Final = """
SELECT h.revision, h.token, c.token, t.touched
FROM head h
LEFT JOIN changes c ON c.revision = ?
LEFT JOIN changes t ON t.revision > ? AND t.touched IS NOT NULL
WHERE h.id = 1
LIMIT ?
"""


"""What `changes_of` reads, with the parameters of `changes_params`."""


def changes_params(cursor: tuple[int, str] | None) -> Row:
    """Return the parameters of `CHANGES_SINCE`."""
    revision = BIGGEST if cursor is None else min(cursor[0], BIGGEST)
    return revision, revision, _FOLLOWED_AT_MOST + 1


def changes_of(cursor: tuple[int, str] | None, rows: list[Row]) -> Changes:
    """Return where the store is, and whose policy changed, from the rows of `CHANGES_SINCE`."""
    now_at, now_token, own_token, _ = rows[0]
    if cursor is None:
        return Changes(now_at, now_token, frozenset())
    if own_token is None or own_token != cursor[1]:
        return Changes(now_at, now_token, RESET)
    if len(rows) > _FOLLOWED_AT_MOST:
        return Changes(now_at, now_token, EVERYBODY)
    return Changes(now_at, now_token, touched_of(row[3] for row in rows if row[3] is not None))


class _Where:
    """Conditions and their parameters, in the order in which they come."""

    def __init__(self) -> None:
        self._conditions: list[str] = []
        self.params: list[object] = []

    def add(self, condition: str, *params: object) -> None:
        self._conditions.append(f"({condition})")
        self.params += params

    def __str__(self) -> str:
        return " AND ".join(self._conditions)


def _limited(limit: int) -> int:
    if limit < 1:
        raise InvalidValue("limit", "must be at least 1")
    return min(limit, BIGGEST - 1)


def _bound(text: str) -> str:
    """Return a text that can be stored and has the same usernames after it."""
    return text.partition("\0")[0].encode("utf-8", "replace").decode()


def _add_accounts(db: Executor, where: _Where, column: str, accounts: frozenset[str]) -> None:
    known = [account for account in accounts if encodable(account)]
    # Few accounts are found through the index on them. With many it is better to walk the page's
    # order and look each row's account up, which "||" tells the planner in every dialect.
    plain = column if len(known) <= _FEW_ACCOUNTS else f"{column} || ''"
    where.add(db.among(plain), db.texts(known))


def _add_search(db: Executor, where: _Where, search: str) -> None:
    start = folded(search)
    if not start:
        return
    ways: list[str] = ["1 = 0"]
    params: list[object] = []
    if encodable(start):
        bounds = prefix_range(start)
        few = len(db.rows(_TERMS_UP_TO, (*bounds, _FEW_TERMS))) < _FEW_TERMS
        ways.append(_BY_TERM if few else _BY_USER)
        params += bounds
    address = _address(search)
    if address is not None:
        packed = address.packed[0]
        ways.append(_BY_ADDRESS)
        params += [packed, packed, len(packed)]
    where.add(" OR ".join(ways), *params)


_TERMS_UP_TO: Final = "SELECT 1 FROM search_terms WHERE term >= ? AND term < ? LIMIT ?"
_BY_TERM: Final = (
    "u.username IN (SELECT t.username FROM search_terms t WHERE t.term >= ? AND t.term < ?)"
)
# Where much matches, the next page is found sooner by walking the users.
_BY_USER: Final = (
    "EXISTS (SELECT 1 FROM search_terms t"
    " WHERE t.username = u.username AND t.term >= ? AND t.term < ?)"
)
_BY_ADDRESS: Final = (
    "u.username IN (SELECT r.username FROM restrictions r"
    " WHERE r.first_ip <= ? AND r.last_ip >= ? AND length(r.first_ip) = ?)"
)


def _address(text: str) -> AddressRange | None:
    try:
        return parse_address(text.strip(" \t\r\n"))
    except AddressError:
        return None


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
    size, where = _limited(limit), _Where()
    if accounts is Actor.EVERY_ACCOUNT:
        where.add(
            "u.removed = 0 OR EXISTS (SELECT 1 FROM restrictions r WHERE r.username = u.username)"
        )
    else:
        where.add("u.removed = 0")
        _add_accounts(db, where, "u.account_id", frozenset(accounts))
    if after is not None:
        where.add("u.username > ?", _bound(after))
    _add_search(db, where, search)
    found = db.rows(
        f"SELECT {columns(USER, 'u')}, u.removed FROM users u WHERE {where}"
        " ORDER BY u.username LIMIT ?",
        (*where.params, size + 1),
    )
    page = found[:size]
    names = [row[0] for row in page]
    restrictions, pending = _restrictions(db, names), _pending(db, names, now)
    items = tuple(
        UserOverview(
            user=user_of(row[:4]),
            restrictions=tuple(restrictions.get(row[0], ())),
            pending=tuple(pending.get(row[0], ())),
            summary=rules.summarise(restrictions.get(row[0], ()), now),
            removed=row[4] != 0,
        )
        for row in page
    )
    return Page(items=items, next=names[-1] if len(found) > size else None)


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
    size, where = _limited(limit), _Where()
    where.add("revision > 0")  # the row of the empty store is there for its token alone
    if before is not None:
        where.add("revision < ?", max(min(before, BIGGEST), -BIGGEST))
    if accounts is not Actor.EVERY_ACCOUNT:
        _add_accounts(db, where, "account_id", frozenset(accounts))
    if username is not None:
        where.add("username = ?", username if encodable(username) else "")
    found = db.rows(
        f"SELECT {CHANGE} FROM changes WHERE {where} ORDER BY revision DESC LIMIT ?",
        (*where.params, size + 1),
    )
    items = tuple(change_of(row) for row in found[:size])
    return Page(items=items, next=items[-1].revision if len(found) > size else None)
