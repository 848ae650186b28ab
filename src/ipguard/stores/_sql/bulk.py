"""Bulk writes of the SQL stores: any number of restrictions or users in one change.

Rows are staged in temporary tables and checked before the writer's lock is acquired. Under the
lock, only users whose policies have changed since then are checked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain, islice
from typing import Final

import attrs

from ipguard import audit, rules
from ipguard.addresses import AddressRange
from ipguard.errors import DuplicateRestriction, StoreUnavailable, TooManyRestrictions, UnknownUser
from ipguard.model import EVERYBODY, Action, Change, PendingRequest, Restriction, Touched, User
from ipguard.store import NAMED_AT_MOST, Transaction, append_users
from ipguard.stores._sql import (
    PENDING,
    RESTRICTION,
    TOUCHED_SINCE,
    USER,
    Executor,
    Params,
    Row,
    columns,
    head,
    marks,
    micros,
    moment,
    pending_of,
    restriction_of,
    restriction_row,
    touched_of,
    user_row,
)

_COLUMNS: Final = f"seq, username, {RESTRICTION}"
_TABLE: Final = (
    "(seq INTEGER PRIMARY KEY, username TEXT, id TEXT, first_ip BLOB, last_ip BLOB, label TEXT,"
    " created_at INTEGER, created_by TEXT, expires_at INTEGER)"
)
_NEVER: Final = (-1, "")
CHANGES_READ: Final = 1_000
"""If more changes than this happened since the check, everything is checked again."""

# The `%s` in each statement is a condition that limits it to some users.
_UNKNOWN: Final = """
SELECT s.username FROM staged_restrictions s LEFT JOIN users u ON u.username = s.username
WHERE (u.username IS NULL OR u.removed = 1) %s ORDER BY s.seq LIMIT 1
"""
_TWICE: Final = """
SELECT s.username, s.first_ip, s.last_ip FROM staged_restrictions s WHERE true %s
GROUP BY s.username, s.first_ip, s.last_ip HAVING count(*) > 1 ORDER BY min(s.seq) LIMIT 1
"""
# CROSS JOIN makes SQLite keep this order, which begins with the smaller table.
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


class BulkRestrictions:
    """Restrictions to add in one change, staged on one connection.

    This is `rules.judge_additions` as statements about sets; the conformance suite compares the
    two. The restrictions are read to the end into a temporary table. Then, before the writer's lock
    is acquired, `judge` sorts them or, with `ahead`, writes them into the store's table already,
    where other transactions do not see them: little is left to do while the lock is held.
    """

    def __init__(self, db: Executor, restrictions: Iterable[Restriction], *, ahead: bool) -> None:
        self._table = "staged_restrictions"
        self._write_ahead = ahead
        self._ahead = self._added = False
        self._seen, self._most = _NEVER, 0
        self._refused: str | None = None
        db.run(f"CREATE TEMPORARY TABLE staged_restrictions {_TABLE}")
        db.run("CREATE TEMPORARY TABLE replaced_restrictions (username TEXT, id TEXT)")
        rows = ((seq, *restriction_row(each)) for seq, each in enumerate(restrictions))
        db.insert_many("staged_restrictions", _COLUMNS, rows)
        db.run("CREATE INDEX staged_addresses ON staged_restrictions (username, first_ip, last_ip)")

    def judge(self, db: Executor, now: datetime) -> None:
        """Find what refuses the restrictions, except for the limit of restrictions per user."""
        self._seen = head(db)
        try:
            self._check(db, now)
        except (UnknownUser, DuplicateRestriction) as exc:
            self._refused = exc.username
            return
        self._find_replaced(db)
        ((most,),) = db.rows(_MOST % "")
        self._most = most or 0
        if self._write_ahead:
            self._insert(db)
            self._ahead = True
            return
        db.run(f"CREATE TEMPORARY TABLE sorted_restrictions {_TABLE}")
        db.run(
            f"INSERT INTO sorted_restrictions (username, {RESTRICTION}) SELECT username,"
            f" {RESTRICTION} FROM staged_restrictions ORDER BY username, created_at, id"
        )
        self._table = "sorted_restrictions"

    def withdraw(self, db: Executor) -> None:
        """Undo what was written ahead, unless it has been added.

        The transaction reads or writes restrictions before it adds these, so all of them have to
        be checked again.
        """
        self._seen = _NEVER
        if self._ahead:
            db.run("DELETE FROM restrictions WHERE id IN (SELECT id FROM staged_restrictions)")
            self._ahead = False

    def add(self, db: Executor, now: datetime, *, per_user: int) -> int:
        """Add the restrictions under the lock; see `ipguard.store.Transaction.add_staged`."""
        # Check everything before writing anything: a caller may catch the error and continue.
        changed = self._changed(db)
        if self._refused is not None:
            if not changed:
                self._check(db, now, *_only(db, [self._refused]))
            changed = EVERYBODY  # the duplicate has expired since, or was removed
        only = ("", ()) if isinstance(changed, Touched) else _only(db, changed)
        if changed:
            self._check(db, now, *only)
        if self._most > per_user:
            only = "", ()
        if changed or self._most > per_user:
            condition, names = only
            for (username,) in db.rows(_TOO_MANY % condition, (*names, per_user)):
                raise TooManyRestrictions(username, per_user)
        if changed:
            self._find_replaced(db, *only)
        db.run("DELETE FROM restrictions WHERE id IN (SELECT id FROM replaced_restrictions)")
        if not self._ahead:
            self._insert(db)
        # They are now restrictions like all others.
        self._ahead, self._added, self._seen = False, True, _NEVER
        ((count,),) = db.rows("SELECT count(*) FROM staged_restrictions")
        return int(count)

    def orphaned(self, db: Executor) -> tuple[PendingRequest, ...]:
        """Return the pending requests to delete a restriction that was replaced."""
        return tuple(map(pending_of, db.rows(_ORPHANED))) if self._added else ()

    def _insert(self, db: Executor) -> None:
        order = "username, created_at, id" if self._table == "staged_restrictions" else "seq"
        db.run(
            f"INSERT INTO restrictions (username, {RESTRICTION})"
            f" SELECT username, {RESTRICTION} FROM {self._table} ORDER BY {order}"
        )

    def _changed(self, db: Executor) -> frozenset[str] | Touched:
        """Return the users whose policy may have changed since `judge`."""
        rows = db.rows(TOUCHED_SINCE, (self._seen[0], CHANGES_READ + 1))
        if len(rows) > CHANGES_READ or not _exists(db, self._seen):
            return EVERYBODY
        return touched_of(row[0] for row in rows)

    def _check(self, db: Executor, now: datetime, only: str = "", names: Params = ()) -> None:
        for (username,) in db.rows(_UNKNOWN % only, names):
            raise UnknownUser(username)
        for username, first, last in db.rows(_TWICE % only, names):
            addresses = str(AddressRange.from_packed(first, last))
            raise DuplicateRestriction(username, addresses, "row")
        held_by = _HELD % self._others(only)
        for *held, username, label, expires_at in db.rows(held_by, (*names, micros(now))):
            found = restriction_of(username, tuple(held))
            until = None if expires_at is None else moment(expires_at)
            raise rules.duplicate(found, attrs.evolve(found, label=label, expires_at=until))

    def _find_replaced(self, db: Executor, only: str = "", names: Params = ()) -> None:
        """Record which restrictions are replaced: all with the same addresses have expired."""
        db.run(_REPLACED % self._others(only), names)

    def _others(self, only: str) -> str:
        return f"{only} AND r.id <> s.id" if self._ahead else only


def _exists(db: Executor, entry: tuple[int, str]) -> bool:
    """Return whether an audit entry exists; if so, what was read before misses no pruned entry."""
    revision, token = entry
    return db.rows("SELECT token FROM changes WHERE revision = ?", (revision,)) == [(token,)]


def _only(db: Executor, usernames: Iterable[str]) -> tuple[str, Params]:
    """Return a condition that limits a statement to some users, and its parameter."""
    return f"AND {db.among('s.username')}", (db.texts(usernames),)


_CHUNK: Final = 1_000
_FEW: Final = 100

_DIFFERS: Final = """
u.username IS NULL OR u.removed = 1 OR u.full_name <> s.full_name OR u.account_id <> s.account_id
OR COALESCE(u.email, '') <> COALESCE(s.email, '')
"""
_FIND_CHANGED: Final = f"""
INSERT INTO changed_users ({USER}, added, present)
SELECT {columns(USER, "s")}, CASE WHEN u.username IS NULL OR u.removed = 1 THEN 1 ELSE 0 END,
    CASE WHEN u.username IS NULL THEN 0 ELSE 1 END
FROM staged_users s LEFT JOIN users u ON u.username = s.username
WHERE {_DIFFERS} ORDER BY s.username
"""
_APPLIED: Final = """
ON CONFLICT (username) DO UPDATE SET full_name = excluded.full_name,
    account_id = excluded.account_id, email = excluded.email, removed = 0
"""
_APPLY_USERS: Final = f"""
INSERT INTO users ({USER}, removed) SELECT {USER}, 0 FROM changed_users WHERE true {_APPLIED}
"""
_APPLY_USER: Final = f"INSERT INTO users ({USER}, removed) VALUES ({marks(USER)}, 0) {_APPLIED}"
_TERM: Final = "username, term, account_id"
_ADD_TERM: Final = f"INSERT INTO search_terms ({_TERM}) VALUES ({marks(_TERM)})"
# Older libraries leave the account out of some of a user's terms, and write fewer of them.
_OUTDATED: Final = """
SELECT username, full_name, account_id FROM users WHERE username IN (
    SELECT username FROM search_terms WHERE account_id IS NULL LIMIT ?
)
"""
_USERS_CHANGED: Final = """
SELECT 1 FROM changes WHERE revision > ? AND action IN ('put_users', 'remove_users') LIMIT 1
"""


def _write_terms(db: Executor, users: Iterable[Row]) -> None:
    """Write the search terms of users (name, full name, account), and of some outdated ones."""
    by_name = {row[0]: row for row in (*db.rows(_OUTDATED, (_FEW,)), *users)}
    if by_name:
        db.run(f"DELETE FROM search_terms WHERE {db.among('username')}", (db.texts(by_name),))
    for username, full_name, account_id in by_name.values():
        for term in rules.search_terms(username, full_name, account_id):
            db.run(_ADD_TERM, (username, term, account_id))


class FewUsers:
    """A few users to add or update, as after a login or a sign-up.

    One read compares them with the stored ones. If none differs, no write transaction is begun.
    """

    def __init__(self, users: Iterable[User]) -> None:
        self._users = {user.username: user for user in users}

    def compare(self, db: Executor) -> tuple[int, list[User], list[str]]:
        """Return the store's revision, the users that differ, and the names of those to add."""
        rows = db.rows(
            f"SELECT h.revision, u.removed, {columns(USER, 'u')} FROM head h"
            f" LEFT JOIN users u ON {db.among('u.username')} WHERE h.id = 1",
            (db.texts(self._users),),
        )
        stored = {row[2]: row[1:] for row in rows}
        users = self._users.items()
        changed = [user for name, user in users if stored.get(name) != (0, *user_row(user))]
        names = [user.username for user in changed]
        added = [name for name in names if name not in stored or stored[name][0]]
        return rows[0][0], changed, added

    def apply(self, tx: Transaction, db: Executor) -> Change | None:
        """Write the differences under the lock; return the audit entry, if there is one."""
        _, changed, added = self.compare(db)
        if not changed:
            return None
        _write_terms(db, [user_row(user)[:3] for user in changed])
        for user in changed:
            db.run(_APPLY_USER, user_row(user))
        return append_users(
            tx,
            Action.PUT_USERS,
            audit.detail(added=len(added), updated=len(changed) - len(added)),
            users=[(user.username, user.account_id) for user in changed],
            touched=added,
        )


class BulkUsers:
    """Any number of users to add or update, staged on one connection.

    They are compared before the lock is acquired, and again under the lock only if users were added
    or removed since then.
    """

    def __init__(self, db: Executor, users: Iterable[User]) -> None:
        self._seen: tuple[int, str] = (-1, "")
        self._written = False
        db.run(
            "CREATE TEMPORARY TABLE staged_users (seq INTEGER PRIMARY KEY, username TEXT,"
            " full_name TEXT, account_id TEXT, email TEXT)"
        )
        db.run(
            "CREATE TEMPORARY TABLE changed_users (username TEXT PRIMARY KEY, full_name TEXT,"
            " account_id TEXT, email TEXT, added INTEGER, present INTEGER)"
        )
        db.run("CREATE TEMPORARY TABLE changed_terms (username TEXT, term TEXT, account_id TEXT)")
        rows = ((seq, *user_row(user)) for seq, user in enumerate(users))
        db.insert_many("staged_users", f"seq, {USER}", rows)
        _keep_last(db, "staged_users")

    def compare(self, db: Executor) -> tuple[int, int]:
        """Find the users that differ, in one snapshot; return the revision and their number."""
        self._seen = head(db)
        db.run("DELETE FROM changed_users")
        db.run("DELETE FROM changed_terms")
        db.run(_FIND_CHANGED)
        db.insert_many("changed_terms", _TERM, self._changed_terms(db))
        ((count,),) = db.rows("SELECT count(*) FROM changed_users")
        return self._seen[0], count

    @staticmethod
    def _changed_terms(db: Executor) -> Iterator[Row]:
        last: str | None = ""
        while last is not None:
            rows = db.rows(
                "SELECT username, full_name, account_id FROM changed_users"
                " WHERE username > ? ORDER BY username LIMIT ?",
                (last, _CHUNK),
            )
            for username, full_name, account_id in rows:
                for term in sorted(rules.search_terms(username, full_name, account_id)):
                    yield username, term, account_id
            last = rows[-1][0] if rows else None

    def write_ahead(self, db: Executor) -> None:
        """Write the differences before the writer's lock is acquired, under the users' lock."""
        if self._users_changed(db):
            self.compare(db)
        self._write(db)
        self._written = True

    def apply(self, tx: Transaction, db: Executor) -> Change | None:
        """Write the differences under the lock; return the audit entry, if there is one."""
        if self._users_changed(db):
            # By a server with an older version of ipguard, which does not take the users' lock.
            if self._written:
                raise StoreUnavailable("other users were written at the same time; try again")
            self.compare(db)
        if not self._written:
            self._write(db)
        ((count, added),) = db.rows("SELECT count(*), count(nullif(added, 0)) FROM changed_users")
        if not count:
            return None
        # Only added users are touched: policies contain neither names nor accounts.
        touched = db.rows(
            "SELECT username FROM changed_users WHERE added = 1 LIMIT ?", (NAMED_AT_MOST + 1,)
        )
        return append_users(
            tx,
            Action.PUT_USERS,
            audit.detail(added=added, updated=count - added),
            users=db.rows("SELECT username, account_id FROM changed_users LIMIT 2"),
            touched=(name for (name,) in touched),
        )

    def _users_changed(self, db: Executor) -> bool:
        """Return whether users were added or removed since `compare`."""
        changed = db.rows(_USERS_CHANGED, (self._seen[0],))
        return bool(changed) or not _exists(db, self._seen)

    def _write(self, db: Executor) -> None:
        db.run(
            "DELETE FROM search_terms"
            " WHERE username IN (SELECT username FROM changed_users WHERE present = 1)"
        )
        db.run(f"INSERT INTO search_terms ({_TERM}) SELECT {_TERM} FROM changed_terms")
        db.run(_APPLY_USERS)
        _write_terms(db, ())


def few_users(users: Iterable[User]) -> tuple[FewUsers | None, Iterable[User]]:
    """Return users as `FewUsers` if they are few, else an iterator over all of them."""
    source = iter(users)
    first = list(islice(source, _FEW + 1))
    return (FewUsers(first), ()) if len(first) <= _FEW else (None, chain(first, source))


def stage_names(db: Executor, usernames: Iterable[str]) -> None:
    """Read canonical usernames to the end into a temporary table of the connection."""
    db.run("CREATE TEMPORARY TABLE staged_names (seq INTEGER PRIMARY KEY, username TEXT)")
    db.insert_many("staged_names", "seq, username", enumerate(usernames))
    _keep_last(db, "staged_names")


def _keep_last(db: Executor, table: str) -> None:
    """Keep the last of several staged rows with the same username."""
    db.run(f"CREATE INDEX {table}_by_name ON {table} (username, seq)")
    db.run(
        f"DELETE FROM {table} WHERE EXISTS (SELECT 1 FROM {table} l"
        f" WHERE l.username = {table}.username AND l.seq > {table}.seq)"
    )


def remove_named(tx: Transaction, db: Executor) -> Change | None:
    """Remove the users whose names are staged; return the audit entry, if there is one."""
    db.run(
        "DELETE FROM staged_names WHERE username NOT IN"
        " (SELECT username FROM users WHERE removed = 0)"
    )
    concerned = db.rows(
        "SELECT u.username, u.account_id FROM staged_names s"
        " CROSS JOIN users u WHERE u.username = s.username LIMIT ?",
        (NAMED_AT_MOST + 1,),
    )
    if not concerned:
        return None
    ((count,),) = db.rows("SELECT count(*) FROM staged_names")
    db.run(
        "UPDATE requests SET state = 'cancelled' WHERE state = 'pending'"
        " AND username IN (SELECT username FROM staged_names)"
    )
    db.run("UPDATE users SET removed = 1 WHERE username IN (SELECT username FROM staged_names)")
    return append_users(
        tx,
        Action.REMOVE_USERS,
        audit.detail(removed=count),
        users=concerned,
        touched=(row[0] for row in concerned),
    )
