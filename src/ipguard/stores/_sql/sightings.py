"""Write sightings in the SQL stores: the logins with the right password of each user and address.

They are written by ordinary transactions, without the writer's lock, so that logins on many servers
and changes of restrictions do not wait for each other. Each transaction writes its rows by username
and address, so that two of them cannot wait for each other either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Final

from ipguard import rules
from ipguard.addresses import pack_address
from ipguard.audit import micros
from ipguard.model import Sighting
from ipguard.stores._sql import SIGHTING, Executor, Row, columns, encodable, marks, sighting_of

# The rows of a statement replace `%s`. A planner that scanned a whole table, in place of a look-up
# for each row, would take seconds: `CROSS JOIN` prevents that in SQLite, settings in PostgreSQL.
_ADD: Final = f"""
INSERT INTO sightings ({SIGHTING})
SELECT u.username, v.column2, v.column3, v.column4, v.column5, v.column6
FROM (VALUES %s) v CROSS JOIN users u WHERE u.username = v.column1 AND u.removed = 0
ORDER BY u.username, v.column2
ON CONFLICT (username, address) DO UPDATE SET
    first_at = CASE WHEN excluded.first_at < sightings.first_at
        THEN excluded.first_at ELSE sightings.first_at END,
    last_at = CASE WHEN excluded.last_at > sightings.last_at
        THEN excluded.last_at ELSE sightings.last_at END,
    allowed = sightings.allowed + excluded.allowed,
    refused = sightings.refused + excluded.refused
"""
_CLEANED_AT_ONCE: Final = 1_000
_AT_ONCE: Final = 100
"""How many rows a statement has."""
# In PostgreSQL `%s` skips the rows that others are writing: they clean up later.
_TRIM: Final = f"""
DELETE FROM sightings WHERE (username, address) IN (
    SELECT s.username, s.address FROM sightings s WHERE (s.username, s.address) IN (
        SELECT v.username, v.address FROM (
            SELECT username, address, row_number() OVER (
                PARTITION BY username ORDER BY last_at DESC, address
            ) AS place FROM sightings WHERE %s
        ) v WHERE v.place > {rules.SIGHTINGS_KEPT}
    ) %s
)
"""
_EXPIRE: Final = """
DELETE FROM sightings WHERE (username, address) IN (
    SELECT s.username, s.address FROM sightings s WHERE %s AND s.last_at < ? %s
)
"""
_CLEAN: Final = f"""
DELETE FROM sightings WHERE (username, address) IN (
    SELECT s.username, s.address FROM sightings s WHERE s.last_at < ?
    ORDER BY s.last_at LIMIT {_CLEANED_AT_ONCE} %s
)
"""
_UNTOLD: Final = f"""
SELECT {columns(SIGHTING, "s")} FROM (VALUES %s) v CROSS JOIN users u CROSS JOIN sightings s
WHERE u.username = v.column1 AND u.removed = 0 AND s.username = v.column1
    AND s.address = v.column2 AND (s.told_at IS NULL OR s.told_at <= ?)
"""
_TELL: Final = "UPDATE sightings SET told_at = ? WHERE username = ? AND address = ?"
_MOVED: Final = f"{SIGHTING}, told_at"


def record(
    db: Executor, seen: Sequence[Sighting], now: datetime, *, skip_locked: str
) -> tuple[Sighting, ...]:
    """Add sightings in the order of their keys; return those to tell their users about.

    Args:
        db: The connection, in a transaction of its own.
        seen: What `rules.sightings_to_record` returned.
        now: The store's time.
        skip_locked: The clause that makes a query skip the rows that others are writing.
    """
    rows = [
        (
            each.username,
            _packed(each),
            micros(each.first_at),
            micros(each.last_at),
            each.allowed,
            each.refused,
        )
        for each in seen
        if encodable(each.username)
    ]
    names = db.texts(dict.fromkeys(row[0] for row in rows))
    since = micros(rules.seen_since(now))
    # First, so that no count is added to an expired row.
    db.run(_EXPIRE % (db.among("s.username"), skip_locked), (names, since))
    for values, params in _values(rows):
        db.run(_ADD % values, params)
    db.run(_TRIM % (db.among("username"), skip_locked), (names,))
    db.run(_CLEAN % skip_locked, (since,))
    told: list[Sighting] = []
    for values, params in _values([row[:2] for row in rows if row[-1]]):
        told += map(
            sighting_of, db.rows(_UNTOLD % values, (*params, micros(rules.told_until(now))))
        )
    for each in told:
        db.run(_TELL, (micros(now), each.username, _packed(each)))
    return tuple(told)


def _values(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Yield the text for `VALUES` and the parameters of some rows at a time."""
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        mark = f"({marks(','.join('?' * len(some[0])))})"
        yield ", ".join([mark] * len(some)), tuple(chain.from_iterable(some))


def forget(db: Executor, username: str) -> int:
    """Delete the sightings of a user; return how many there were."""
    db.lock_table("sightings")
    ((count,),) = db.rows("SELECT count(*) FROM sightings WHERE username = ?", (username,))
    db.run("DELETE FROM sightings WHERE username = ?", (username,))
    return int(count)


def move(db: Executor, renamed: Mapping[str, str], fresh: Collection[str]) -> None:
    """Let the sightings of a few users follow them; see `UserTransaction.move_sightings`."""
    names = sorted({*renamed, *renamed.values(), *fresh})
    if not names:
        return
    moved: list[Row] = []
    if renamed:
        db.lock_table("sightings")
        moved = db.rows(
            f"SELECT {_MOVED} FROM sightings WHERE {db.among('username')}",
            (db.texts(renamed),),
        )
    db.run(f"DELETE FROM sightings WHERE {db.among('username')}", (db.texts(names),))
    for old, *rest in moved:
        db.run(
            f"INSERT INTO sightings ({_MOVED}) VALUES (?, ?, ?, ?, ?, ?, ?)", (renamed[old], *rest)
        )


def move_staged(db: Executor) -> None:
    """Let the sightings of the users in `changed_users` follow them, as `move` does."""
    renamed = "SELECT old FROM changed_users WHERE old IS NOT NULL"
    if db.rows(f"{renamed} LIMIT 1"):
        db.lock_table("sightings")
        db.run(
            "CREATE TEMPORARY TABLE moved_sightings (username TEXT, address BLOB,"
            " first_at INTEGER, last_at INTEGER, allowed INTEGER, refused INTEGER, told_at INTEGER)"
        )
        db.run(
            f"INSERT INTO moved_sightings ({_MOVED}) SELECT c.username,"
            " s.address, s.first_at, s.last_at, s.allowed, s.refused, s.told_at"
            " FROM changed_users c JOIN sightings s ON s.username = c.old WHERE c.added = 0"
        )
        news = "SELECT username FROM changed_users WHERE old IS NOT NULL"
        db.run(f"DELETE FROM sightings WHERE username IN ({renamed} UNION {news})")
        db.run(f"INSERT INTO sightings ({_MOVED}) SELECT {_MOVED} FROM moved_sightings")
    db.run(
        "DELETE FROM sightings"
        " WHERE username IN (SELECT username FROM changed_users WHERE added = 1)"
    )


def _packed(sighting: Sighting) -> bytes:
    packed = pack_address(sighting.address)
    assert packed is not None  # it is canonical
    return packed
