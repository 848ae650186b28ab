"""Restrictions added in the SQL stores, any number at once: staged on the connection, then applied.

All that can be found out before the writer's lock is taken is found out then. Under the lock it is
asked again only about users whose policies have changed in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

import attrs

from ipguard import rules
from ipguard.addresses import AddressRange
from ipguard.errors import DuplicateRestriction, TooManyRestrictions, UnknownUser
from ipguard.model import EVERYBODY, PendingRequest, Restriction, Touched
from ipguard.stores._sql import (
    PENDING,
    RESTRICTION,
    Executor,
    Params,
    columns,
    micros,
    moment,
    pending_of,
    restriction_of,
    restriction_row,
    touched_of,
)
from ipguard.stores._sql_read import TOUCHED_SINCE, head

_COLUMNS: Final = f"seq, username, {RESTRICTION}"
_TABLE: Final = (
    "(seq INTEGER PRIMARY KEY, username TEXT, id TEXT, first_ip BLOB, last_ip BLOB, label TEXT,"
    " created_at INTEGER, created_by TEXT, expires_at INTEGER)"
)
_NEVER: Final = (-1, "")
MOVED_AT_MOST: Final = 1_000
"""Of more changes than this, it is not asked whom they touched."""

# In each `%s` is a condition on the users that are asked about.
_UNKNOWN: Final = """
SELECT s.username FROM staged_restrictions s LEFT JOIN users u ON u.username = s.username
WHERE (u.username IS NULL OR u.removed = 1) %s ORDER BY s.seq LIMIT 1
"""
_TWICE: Final = """
SELECT s.username, s.first_ip, s.last_ip FROM staged_restrictions s WHERE true %s
GROUP BY s.username, s.first_ip, s.last_ip HAVING count(*) > 1 ORDER BY min(s.seq) LIMIT 1
"""
# CROSS JOIN: SQLite then keeps the order, which begins with the fewer rows.
_SAME: Final = """
FROM staged_restrictions s CROSS JOIN restrictions r
WHERE r.username = s.username AND r.first_ip = s.first_ip AND r.last_ip = s.last_ip %s
"""
_HELD: Final = f"""
SELECT {columns(RESTRICTION, "r")}, s.username, s.label, s.expires_at
{_SAME} AND (r.expires_at IS NULL OR r.expires_at > ?) ORDER BY s.seq LIMIT 1
"""
_NUMBERS: Final = """
SELECT n.username, n.added + (
    SELECT count(*) FROM restrictions r WHERE r.username = n.username AND NOT EXISTS (
        SELECT 1 FROM staged_restrictions s
        WHERE s.username = r.username AND s.first_ip = r.first_ip AND s.last_ip = r.last_ip
    )
) AS number, n.seq FROM (
    SELECT s.username, count(*) AS added, min(s.seq) AS seq
    FROM staged_restrictions s WHERE true %s GROUP BY s.username
) n
"""
_MOST: Final = f"SELECT max(number) FROM ({_NUMBERS}) m"
_TOO_MANY: Final = f"SELECT username FROM ({_NUMBERS}) m WHERE number > ? ORDER BY seq LIMIT 1"
_REPLACED: Final = (
    f"INSERT INTO replaced_restrictions (username, id) SELECT r.username, r.id {_SAME}"
)
_ORPHANED: Final = f"""
SELECT {PENDING} FROM requests WHERE state = 'pending'
AND username IN (SELECT username FROM replaced_restrictions)
AND restriction_id IN (SELECT id FROM replaced_restrictions)
"""
_ADD: Final = f"INSERT INTO restrictions (username, {RESTRICTION})"


class StagedRestrictions:
    """Restrictions on their way into the store, on one connection.

    Args:
        db: The connection, before it has the writer's lock.
        restrictions: They are read to the end, into a temporary table of the connection.
    """

    def __init__(self, db: Executor, restrictions: Iterable[Restriction]) -> None:
        self._table = "staged_restrictions"
        self._ahead = self._added = False
        self._seen, self._most = _NEVER, 0
        self._refused: str | None = None
        db.run(f"CREATE TEMPORARY TABLE staged_restrictions {_TABLE}")
        db.run("CREATE TEMPORARY TABLE replaced_restrictions (username TEXT, id TEXT)")
        rows = ((seq, *restriction_row(each)) for seq, each in enumerate(restrictions))
        db.insert_many("staged_restrictions", _COLUMNS, rows)
        db.run("CREATE INDEX staged_addresses ON staged_restrictions (username, first_ip, last_ip)")

    def judge(self, db: Executor, now: datetime) -> bool:
        """Find out whether anything refuses them, but for how many a user may have."""
        self._seen = head(db)
        try:
            self._check(db, now)
        except (UnknownUser, DuplicateRestriction) as exc:
            self._refused = exc.username
            return False
        self._find_replaced(db)
        ((most,),) = db.rows(_MOST % "")
        self._most = most or 0
        return True

    def arrange(self, db: Executor) -> None:
        """Sort them, where they cannot be written ahead, so that under the lock nothing is."""
        db.run(f"CREATE TEMPORARY TABLE sorted_restrictions {_TABLE}")
        db.run(
            f"INSERT INTO sorted_restrictions (username, {RESTRICTION}) SELECT username,"
            f" {RESTRICTION} FROM staged_restrictions ORDER BY username, created_at, id"
        )
        self._table = "sorted_restrictions"

    def write_ahead(self, db: Executor) -> None:
        """Write them before the lock is taken, where nobody sees them and nobody waits for them.

        Their ids are theirs alone, so no other writer comes upon them.
        """
        self._insert(db)
        self._ahead = True

    def withdraw(self, db: Executor) -> None:
        """Take back what was written ahead, unless it has been added.

        The turn reads or writes by itself before it adds them: so all are asked about again.
        """
        self._seen = _NEVER
        if self._ahead:
            db.run("DELETE FROM restrictions WHERE id IN (SELECT id FROM staged_restrictions)")
            self._ahead = False

    def add(self, db: Executor, now: datetime, *, per_user: int) -> int:
        """Add them under the lock; see `ipguard.store.Transaction.add_staged`."""
        # Everything is tested before anything is written: a caller may catch the error and go on.
        moved = self._moved(db)
        if self._refused is not None:
            if not moved:
                self._check(db, now, *_about(db, [self._refused]))
            moved = EVERYBODY  # that one has expired by now, or another made room
        asked = ("", ()) if isinstance(moved, Touched) else _about(db, moved)
        if moved:
            self._check(db, now, *asked)
        if self._most > per_user:
            asked = "", ()
        if moved or self._most > per_user:
            about, names = asked
            for (username,) in db.rows(_TOO_MANY % about, (*names, per_user)):
                raise TooManyRestrictions(username, per_user)
        if moved:
            self._find_replaced(db, *asked)
        db.run("DELETE FROM restrictions WHERE id IN (SELECT id FROM replaced_restrictions)")
        if not self._ahead:
            self._insert(db)
        # From now on they are restrictions like others.
        self._ahead, self._added, self._seen = False, True, _NEVER
        ((count,),) = db.rows("SELECT count(*) FROM staged_restrictions")
        return int(count)

    def orphaned(self, db: Executor) -> tuple[PendingRequest, ...]:
        """Return the pending requests to delete a restriction that was replaced."""
        return tuple(map(pending_of, db.rows(_ORPHANED))) if self._added else ()

    def _insert(self, db: Executor) -> None:
        order = "username, created_at, id" if self._table == "staged_restrictions" else "seq"
        db.run(f"{_ADD} SELECT username, {RESTRICTION} FROM {self._table} ORDER BY {order}")

    def _moved(self, db: Executor) -> frozenset[str] | Touched:
        """Return whose policy may have changed since they were judged."""
        revision, token = self._seen
        rows = db.rows(TOUCHED_SINCE, (revision, MOVED_AT_MOST + 1))
        # Asked last: where this row is there still, none of those was pruned.
        if db.rows("SELECT token FROM changes WHERE revision = ?", (revision,)) != [(token,)]:
            return EVERYBODY
        return EVERYBODY if len(rows) > MOVED_AT_MOST else touched_of(row[0] for row in rows)

    def _check(self, db: Executor, now: datetime, about: str = "", names: Params = ()) -> None:
        for (username,) in db.rows(_UNKNOWN % about, names):
            raise UnknownUser(username)
        own = self._others(about)
        for username, first, last in db.rows(_TWICE % about, names):
            addresses = str(AddressRange.from_packed(first, last))
            raise DuplicateRestriction(username, addresses, "row")
        for *held, username, label, expires_at in db.rows(_HELD % own, (*names, micros(now))):
            found = restriction_of(username, tuple(held))
            until = None if expires_at is None else moment(expires_at)
            raise rules.duplicate(found, attrs.evolve(found, label=label, expires_at=until))

    def _find_replaced(self, db: Executor, about: str = "", names: Params = ()) -> None:
        """Note which restrictions make way: all that are to the same addresses have expired."""
        db.run(_REPLACED % self._others(about), names)

    def _others(self, about: str) -> str:
        return f"{about} AND r.id <> s.id" if self._ahead else about


def _about(db: Executor, usernames: Iterable[str]) -> tuple[str, Params]:
    """Return the condition that asks about some users only, and its parameter."""
    return f"AND {db.among('s.username')}", (db.texts(usernames),)
