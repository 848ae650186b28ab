"""The writer's turn of the SQL stores, and users put and removed.

What can be many (users, restrictions) is staged first, in temporary tables of the connection that
will write, before the writer's lock is taken; under the lock it is applied set by set.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from ipguard.addresses import AddressRange
from ipguard.errors import DuplicateRestriction, TooManyRestrictions, UnknownUser
from ipguard.model import (
    EVERYBODY,
    Action,
    Change,
    PendingRequest,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
)
from ipguard.store import NAMED_AT_MOST
from ipguard.stores._sql import (
    CHANGE,
    PENDING,
    REQUEST,
    RESTRICTION,
    USER,
    Executor,
    Row,
    change_row,
    columns,
    encodable,
    micros,
    moment,
    pending_of,
    request_of,
    request_row,
    restriction_of,
    restriction_row,
    search_terms,
    touched_text,
    user_of,
    user_row,
)
from ipguard.stores._sql_read import head

_CHUNK: Final = 1_000


def _marks(names: str) -> str:
    return ", ".join("?" * len(names.split(",")))


_INSERT_CHANGE: Final = (
    f"INSERT INTO changes ({CHANGE}, token, touched) VALUES ({_marks(CHANGE)}, ?, ?)"
)
_MOVE_HEAD: Final = (
    "UPDATE head SET revision = ?, token = ?, touching = CASE WHEN ? = 1 THEN ? ELSE touching END"
    " WHERE id = 1"
)
_SAVE_REQUEST: Final = (
    f"INSERT INTO requests ({REQUEST}) VALUES ({_marks(REQUEST)}) ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in REQUEST.split(", ")[1:])
)
_INSERT_RESTRICTION: Final = (
    f"INSERT INTO restrictions (username, {RESTRICTION}) VALUES (?, {_marks(RESTRICTION)})"
)


class SqlTransaction:
    """A writer's turn; see `ipguard.store.Transaction` for what each method promises.

    Args:
        db: The connection, on which the writer's lock is held.
        now: The store's time when it was taken.
        staged: Whether there are staged restrictions on this connection.
    """

    def __init__(self, db: Executor, now: datetime, *, staged: bool = False) -> None:
        self._db = db
        self._now = now
        self._staged = staged
        self.revision, _ = head(db)
        self.touched = False

    @property
    def now(self) -> datetime:
        return self._now

    def user(self, username: str) -> StoredUser | None:
        for row in self._find(f"SELECT {USER}, removed FROM users WHERE username = ?", username):
            return StoredUser(user=user_of(row[:4]), removed=row[4] != 0)
        return None

    def restriction(self, restriction_id: str) -> Restriction | None:
        sql = f"SELECT username, {RESTRICTION} FROM restrictions WHERE id = ?"
        for row in self._find(sql, restriction_id):
            return restriction_of(row[0], row[1:])
        return None

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        sql = f"SELECT {RESTRICTION} FROM restrictions WHERE username = ? ORDER BY created_at, id"
        return tuple(restriction_of(username, row) for row in self._find(sql, username))

    def request(self, request_id: str) -> StoredRequest | None:
        for row in self._find(f"SELECT {REQUEST} FROM requests WHERE id = ?", request_id):
            return request_of(row)
        return None

    def pending_requests(self, username: str) -> tuple[PendingRequest, ...]:
        sql = (
            f"SELECT {PENDING} FROM requests WHERE username = ? AND state = 'pending'"
            " ORDER BY requested_at, id"
        )
        return tuple(pending_of(row) for row in self._find(sql, username))

    def request_times(self, requested_by: str, since: datetime) -> tuple[datetime, ...]:
        sql = (
            "SELECT requested_at FROM requests WHERE requested_by = ? AND requested_at > ?"
            " ORDER BY requested_at"
        )
        return tuple(moment(row[0]) for row in self._db.rows(sql, (requested_by, micros(since))))

    def failures(self, actor: str) -> int:
        for row in self._find("SELECT count FROM failures WHERE actor = ?", actor):
            return int(row[0])
        return 0

    def save_request(self, stored: StoredRequest) -> None:
        self._db.run(_SAVE_REQUEST, request_row(stored))

    def set_failures(self, actor: str, count: int) -> None:
        self._db.run(
            "INSERT INTO failures (actor, count) VALUES (?, ?)"
            " ON CONFLICT (actor) DO UPDATE SET count = excluded.count",
            (actor, count),
        )

    def add_restriction(self, restriction: Restriction) -> None:
        self._db.run(_INSERT_RESTRICTION, restriction_row(restriction))

    def remove_restriction(self, restriction_id: str) -> None:
        self._db.run("DELETE FROM restrictions WHERE id = ?", (restriction_id,))

    def add_staged(self, *, per_user: int) -> int:
        if not self._staged:
            return 0
        # Everything is tested before anything is written: a caller may catch the error and go on.
        for (username,) in self._db.rows(_STAGED_UNKNOWN):
            raise UnknownUser(username)
        for sql, params in ((_STAGED_TWICE, ()), (_STAGED_HELD, (micros(self._now),))):
            for username, first, last in self._db.rows(sql, params):
                raise DuplicateRestriction(username, str(AddressRange.from_packed(first, last)))
        for (username,) in self._db.rows(_STAGED_TOO_MANY, (per_user,)):
            raise TooManyRestrictions(username, per_user)
        self._db.run(_STAGED_REPLACE)
        self._db.run(_STAGED_ADD)
        ((count,),) = self._db.rows("SELECT count(*) FROM staged_restrictions")
        return int(count)

    def append(
        self,
        action: Action,
        *,
        actor: str | None,
        actor_address: str | None = None,
        username: str | None = None,
        account_id: str | None = None,
        detail: str = "",
        touches: frozenset[str] | Touched = frozenset(),
    ) -> Change:
        change = Change(
            revision=self.revision + 1,
            at=self._now,
            actor=actor,
            actor_address=actor_address,
            action=action,
            username=username,
            detail=detail,
            account_id=account_id,
        )
        token, touched = secrets.token_hex(8), touched_text(touches)
        self._db.run(_INSERT_CHANGE, (*change_row(change), token, touched))
        touching = int(touched is not None)
        self._db.run(_MOVE_HEAD, (change.revision, token, touching, change.revision))
        self.revision = change.revision
        self.touched = self.touched or touched is not None
        return change

    def _find(self, sql: str, key: str) -> list[Row]:
        # An id comes from outside: what cannot be stored is not there.
        return self._db.rows(sql, (key,)) if encodable(key) else []


# ------------------------------------------------------------------------- staged restrictions

_STAGED_UNKNOWN: Final = """
SELECT s.username FROM staged_restrictions s LEFT JOIN users u ON u.username = s.username
WHERE u.username IS NULL OR u.removed = 1 ORDER BY s.seq LIMIT 1
"""
_STAGED_TWICE: Final = """
SELECT username, first_ip, last_ip FROM staged_restrictions
GROUP BY username, first_ip, last_ip HAVING count(*) > 1 ORDER BY min(seq) LIMIT 1
"""
# CROSS JOIN: SQLite then keeps the order, which begins with the fewer rows.
_SAME: Final = """
FROM staged_restrictions s CROSS JOIN restrictions r
WHERE r.username = s.username AND r.first_ip = s.first_ip AND r.last_ip = s.last_ip
"""
_STAGED_HELD: Final = f"""
SELECT s.username, s.first_ip, s.last_ip {_SAME}
AND (r.expires_at IS NULL OR r.expires_at > ?) ORDER BY s.seq LIMIT 1
"""
_STAGED_TOO_MANY: Final = """
SELECT n.username FROM (
    SELECT username, count(*) AS added, min(seq) AS seq FROM staged_restrictions GROUP BY username
) n
WHERE n.added + (
    SELECT count(*) FROM restrictions r WHERE r.username = n.username AND NOT EXISTS (
        SELECT 1 FROM staged_restrictions s
        WHERE s.username = r.username AND s.first_ip = r.first_ip AND s.last_ip = r.last_ip
    )
) > ?
ORDER BY n.seq LIMIT 1
"""
_STAGED_REPLACE: Final = f"DELETE FROM restrictions WHERE id IN (SELECT r.id {_SAME})"
_STAGED_ADD: Final = f"""
INSERT INTO restrictions (username, {RESTRICTION})
SELECT username, {RESTRICTION} FROM staged_restrictions ORDER BY username, created_at, id
"""


def stage_restrictions(db: Executor, restrictions: Iterable[Restriction]) -> None:
    """Read restrictions to the end into a temporary table of the connection."""
    db.run(
        "CREATE TEMPORARY TABLE staged_restrictions (seq INTEGER PRIMARY KEY, username TEXT,"
        " id TEXT, first_ip BLOB, last_ip BLOB, label TEXT, created_at INTEGER, created_by TEXT,"
        " expires_at INTEGER)"
    )
    db.run_many(
        f"INSERT INTO staged_restrictions (seq, username, {RESTRICTION})"
        f" VALUES (?, ?, {_marks(RESTRICTION)})",
        ((seq, *restriction_row(each)) for seq, each in enumerate(restrictions)),
    )
    db.run("CREATE INDEX staged_addresses ON staged_restrictions (username, first_ip, last_ip)")


# ------------------------------------------------------------------------------------- users

_DIFFERS: Final = """
u.username IS NULL OR u.removed = 1 OR u.full_name <> s.full_name OR u.account_id <> s.account_id
OR COALESCE(u.email, '') <> COALESCE(s.email, '')
"""
_FIND_CHANGED: Final = f"""
INSERT INTO changed_users ({USER}, added)
SELECT {columns(USER, "s")}, CASE WHEN u.username IS NULL OR u.removed = 1 THEN 1 ELSE 0 END
FROM staged_users s LEFT JOIN users u ON u.username = s.username
WHERE {_DIFFERS}
"""
_APPLY_USERS: Final = f"""
INSERT INTO users ({USER}, removed) SELECT {USER}, 0 FROM changed_users WHERE true
ON CONFLICT (username) DO UPDATE SET full_name = excluded.full_name,
    account_id = excluded.account_id, email = excluded.email, removed = 0
"""
_USERS_MOVED: Final = """
SELECT 1 FROM changes WHERE revision > ? AND action IN ('put_users', 'remove_users') LIMIT 1
"""


class StagedUsers:
    """Users on their way into the store, on one connection.

    What really changes is found out before the lock is taken, and again under it only where users
    were put or removed in between.
    """

    def __init__(self, db: Executor, users: Iterable[User]) -> None:
        self._seen: tuple[int, str] = (-1, "")
        for table, more in (("staged_users", ""), ("changed_users", ", added INTEGER")):
            db.run(
                f"CREATE TEMPORARY TABLE {table} (username TEXT PRIMARY KEY, full_name TEXT,"
                f" account_id TEXT, email TEXT{more})"
            )
        db.run("CREATE TEMPORARY TABLE changed_terms (term TEXT, username TEXT)")
        db.run_many(
            f"INSERT INTO staged_users ({USER}) VALUES ({_marks(USER)})"
            " ON CONFLICT (username) DO UPDATE SET full_name = excluded.full_name,"
            " account_id = excluded.account_id, email = excluded.email",
            (user_row(user) for user in users),
        )

    def compare(self, db: Executor) -> tuple[int, int]:
        """Find out what changes, in one snapshot; return the revision and how many users it is."""
        self._seen = head(db)
        db.run("DELETE FROM changed_users")
        db.run("DELETE FROM changed_terms")
        db.run(_FIND_CHANGED)
        db.run_many(
            "INSERT INTO changed_terms (term, username) VALUES (?, ?)", self._changed_terms(db)
        )
        ((count,),) = db.rows("SELECT count(*) FROM changed_users")
        return self._seen[0], count

    @staticmethod
    def _changed_terms(db: Executor) -> Iterator[Row]:
        last = ""
        while True:
            rows = db.rows(
                "SELECT username, full_name, account_id FROM changed_users WHERE username > ?"
                " ORDER BY username LIMIT ?",
                (last, _CHUNK),
            )
            for row in rows:
                yield from ((term, row[0]) for term in search_terms(*row))
            if len(rows) < _CHUNK:
                return
            last = rows[-1][0]

    def apply(self, turn: SqlTransaction, db: Executor) -> None:
        """Write what changes, under the lock, and append the one row that says so."""
        revision, token = self._seen
        own = db.rows("SELECT token FROM changes WHERE revision = ?", (revision,))
        if own != [(token,)] or db.rows(_USERS_MOVED, (revision,)):
            self.compare(db)
        ((count, added),) = db.rows("SELECT count(*), COALESCE(sum(added), 0) FROM changed_users")
        if not count:
            return
        db.run("DELETE FROM search_terms WHERE username IN (SELECT username FROM changed_users)")
        db.run(
            "INSERT INTO search_terms (term, username)"
            " SELECT term, username FROM changed_terms ORDER BY username, term"
        )
        db.run(_APPLY_USERS)
        # A login asks only whether a user is known: a new name or account decides nothing.
        _append_users(
            turn,
            Action.PUT_USERS,
            concerned=db.rows("SELECT username, account_id FROM changed_users LIMIT 2"),
            touched=db.rows(
                "SELECT username FROM changed_users WHERE added = 1 LIMIT ?", (NAMED_AT_MOST + 1,)
            ),
            detail=f"added={added} updated={count - added}",
        )


def stage_names(db: Executor, usernames: Iterable[str]) -> None:
    """Read canonical usernames to the end into a temporary table of the connection."""
    db.run("CREATE TEMPORARY TABLE staged_names (username TEXT PRIMARY KEY)")
    db.run_many(
        "INSERT INTO staged_names (username) VALUES (?) ON CONFLICT (username) DO NOTHING",
        ((name,) for name in usernames),
    )


def remove_staged(turn: SqlTransaction, db: Executor) -> None:
    """Remove the users whose names are staged, under the lock, and append the row that says so."""
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
        return
    ((count,),) = db.rows("SELECT count(*) FROM staged_names")
    db.run(
        "UPDATE requests SET state = 'cancelled' WHERE state = 'pending'"
        " AND username IN (SELECT username FROM staged_names)"
    )
    db.run("UPDATE users SET removed = 1 WHERE username IN (SELECT username FROM staged_names)")
    _append_users(
        turn,
        Action.REMOVE_USERS,
        concerned=concerned,
        touched=concerned,
        detail=f"removed={count}",
    )


def _append_users(
    turn: SqlTransaction, action: Action, *, concerned: list[Row], touched: list[Row], detail: str
) -> None:
    one = concerned[0] if len(concerned) == 1 else (None, None)
    names = frozenset(row[0] for row in touched)
    turn.append(
        action,
        actor=None,
        username=one[0],
        account_id=one[1],
        detail=detail,
        touches=names if len(names) <= NAMED_AT_MOST else EVERYBODY,
    )
