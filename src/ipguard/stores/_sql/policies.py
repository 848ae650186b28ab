"""The reads of guards in the SQL stores: policies, and which of them changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from ipguard.errors import StoreUnavailable
from ipguard.model import EVERYBODY, RESET, Changes, Policy
from ipguard.stores._sql import (
    BIGGEST,
    RESTRICTION,
    UNFINISHED,
    Executor,
    Row,
    columns,
    make_restriction,
    reads_rows,
    restriction_of,
    touched_of,
)

_FOLLOWED_AT_MOST: Final = 10_000
"""For a guard that is further behind than this, the answer is EVERYBODY."""

POLICY: Final = f"""
SELECT h.revision, u.removed, {columns(RESTRICTION, "r")}, %s, %s
FROM head h
JOIN zz_restore_marker m ON m.id = 1
LEFT JOIN users u ON u.username = ?
LEFT JOIN restrictions r ON r.username = ?
WHERE h.id = 1
ORDER BY r.created_at, r.id
"""
"""A policy in one statement, which is one snapshot. The username is its parameter, three times.

The first `%s` is the parameter that is returned as a column, the second any other columns. Without
the restore marker there is no row: tables that are being filled must not make users look
unrestricted.
"""
_RESTRICTION_ENDS: Final = 2 + len(RESTRICTION.split(","))


@reads_rows
def policy_of(username: str, rows: list[Row]) -> Policy:
    """Return a policy from the rows of `POLICY`.

    Raises:
        StoreUnavailable: The store is being restored; or the rows are about another user, because
            two processes share the connection.
    """
    if not rows:
        raise StoreUnavailable(UNFINISHED)
    if rows[0][_RESTRICTION_ENDS] != username:
        raise StoreUnavailable("the store's answer is about another user than the one asked for")
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
    """Yield the policies from the rows of `ALL_POLICIES`."""
    for username, group in groupby(rows, key=lambda row: row[0]):
        held = list(group)
        restrictions = tuple(restriction_of(username, row[2:]) for row in held)
        yield username, Policy(revision=revision, restrictions=restrictions, known=held[0][1] == 0)


def touching(db: Executor) -> int:
    """Return the last revision that touched a policy."""
    for (revision,) in db.rows(TOUCHING):
        return int(revision)
    raise StoreUnavailable(UNFINISHED)


TOUCHING: Final = "SELECT touching FROM head WHERE id = 1"
TOUCHED_SINCE: Final = (
    "SELECT touched FROM changes WHERE revision > ? AND touched IS NOT NULL"
    " ORDER BY revision LIMIT ?"
)
"""The users touched by the changes after a revision; the parameters are that and a limit.

The order makes PostgreSQL use the index: a planner that does not know the revision expects a third
of the audit log after it, and would scan all of it each time.
"""
CHANGES_SINCE: Final = f"""
SELECT h.revision, h.token, c.token, t.touched
FROM head h
JOIN zz_restore_marker m ON m.id = 1
LEFT JOIN changes c ON c.revision = ?
LEFT JOIN ({TOUCHED_SINCE}) t ON 1 = 1
WHERE h.id = 1
"""
"""The rows for `changes_of`, with the parameters of `changes_params`."""


def changes_params(cursor: tuple[int, str] | None) -> Row:
    """Return the parameters of `CHANGES_SINCE`."""
    revision = BIGGEST if cursor is None else min(cursor[0], BIGGEST)
    return revision, revision, _FOLLOWED_AT_MOST + 1


@reads_rows
def changes_of(
    cursor: tuple[int, str] | None, rows: list[Row], *, restore: str | None = None
) -> Changes:
    """Return the store's position and the users whose policy changed.

    Args:
        cursor: The position of the guard.
        rows: The rows of `CHANGES_SINCE`.
        restore: Identifies the restore that created the tables; becomes part of the token.

    Raises:
        StoreUnavailable: The restore marker is missing.
    """
    if not rows:
        raise StoreUnavailable(UNFINISHED)
    now_at, now_token, own_token, _ = rows[0]
    if restore is not None:
        now_token = f"{now_token}:{restore}"
    if cursor is None:
        return Changes(now_at, now_token, frozenset())
    # A token from a transaction has no restore: it fits all tables that have its change.
    if own_token is None or cursor[1] not in (own_token, f"{own_token}:{restore}"):
        return Changes(now_at, now_token, RESET)
    if len(rows) > _FOLLOWED_AT_MOST:
        return Changes(now_at, now_token, EVERYBODY)
    return Changes(now_at, now_token, touched_of(row[3] for row in rows if row[3] is not None))
