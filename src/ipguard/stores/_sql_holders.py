"""Who has a restriction that holds an address, for the pages of the SQL stores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ipguard.addresses import AddressRange
from ipguard.stores._sql import Executor, Row
from ipguard.stores._sql_sources import FEW, PRESENT, SORTED, Found, Mine, merged


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
