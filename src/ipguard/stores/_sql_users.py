"""Users put and removed in the SQL stores: staged on the connection, then applied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from ipguard.model import EVERYBODY, Action, Change, User
from ipguard.store import NAMED_AT_MOST
from ipguard.stores._sql import USER, Executor, Row, columns, user_row
from ipguard.stores._sql_read import head
from ipguard.stores._sql_terms import TERM, Placing, add_blocks, cut_grown
from ipguard.stores._sql_write import SqlTransaction

_CHUNK: Final = 1_000

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
        db.run(
            "CREATE TEMPORARY TABLE staged_users (seq INTEGER PRIMARY KEY, username TEXT,"
            " full_name TEXT, account_id TEXT, email TEXT)"
        )
        db.run(
            "CREATE TEMPORARY TABLE changed_users (username TEXT PRIMARY KEY, full_name TEXT,"
            " account_id TEXT, email TEXT, added INTEGER)"
        )
        db.run(
            "CREATE TEMPORARY TABLE changed_terms (username TEXT, term TEXT, block INTEGER,"
            " account_id TEXT)"
        )
        rows = ((seq, *user_row(user)) for seq, user in enumerate(users))
        db.insert_many("staged_users", f"seq, {USER}", rows)
        _keep_last(db, "staged_users")

    def compare(self, db: Executor) -> tuple[int, int]:
        """Find out what changes, in one snapshot; return the revision and how many users it is."""
        self._seen = head(db)
        db.run("DELETE FROM changed_users")
        db.run("DELETE FROM changed_terms")
        db.run(_FIND_CHANGED)
        self._placing = Placing(db)
        terms = self._placing.terms(self._changed(db))
        db.insert_many("changed_terms", TERM, terms)
        ((count,),) = db.rows("SELECT count(*) FROM changed_users")
        return self._seen[0], count

    @staticmethod
    def _changed(db: Executor) -> Iterator[Row]:
        last = ""
        while True:
            rows = db.rows(
                "SELECT username, full_name, account_id, added FROM changed_users"
                " WHERE username > ? ORDER BY username LIMIT ?",
                (last, _CHUNK),
            )
            yield from rows
            if len(rows) < _CHUNK:
                return
            last = rows[-1][0]

    def apply(self, turn: SqlTransaction, db: Executor) -> Change | None:
        """Write what changes, under the lock, and return the one row that says so, if any."""
        revision, token = self._seen
        own = db.rows("SELECT token FROM changes WHERE revision = ?", (revision,))
        if own != [(token,)] or db.rows(_USERS_MOVED, (revision,)):
            self.compare(db)
        ((count, added),) = db.rows("SELECT count(*), count(nullif(added, 0)) FROM changed_users")
        if not count:
            return None
        placing = self._placing
        add_blocks(db, placing.new, placing.cut)
        db.run("DELETE FROM search_terms WHERE username IN (SELECT username FROM changed_users)")
        db.run(f"INSERT INTO search_terms ({TERM}) SELECT {TERM} FROM changed_terms")
        db.run(_APPLY_USERS)
        for block in placing.touched:
            cut_grown(db, block)
        # A login asks only whether a user is known: a new name or account decides nothing.
        return _append_users(
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
    db.run("CREATE TEMPORARY TABLE staged_names (seq INTEGER PRIMARY KEY, username TEXT)")
    db.insert_many("staged_names", "seq, username", enumerate(usernames))
    _keep_last(db, "staged_names")


def _keep_last(db: Executor, table: str) -> None:
    """Keep the last of several staged rows with one username."""
    db.run(f"CREATE INDEX {table}_by_name ON {table} (username, seq)")
    db.run(
        f"DELETE FROM {table} WHERE EXISTS (SELECT 1 FROM {table} l"
        f" WHERE l.username = {table}.username AND l.seq > {table}.seq)"
    )


def remove_staged(turn: SqlTransaction, db: Executor) -> Change | None:
    """Remove the users whose names are staged, under the lock; return the row that says so."""
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
    return _append_users(
        turn,
        Action.REMOVE_USERS,
        concerned=concerned,
        touched=concerned,
        detail=f"removed={count}",
    )


def _append_users(
    turn: SqlTransaction, action: Action, *, concerned: list[Row], touched: list[Row], detail: str
) -> Change:
    one = concerned[0] if len(concerned) == 1 else (None, None)
    names = frozenset(row[0] for row in touched)
    return turn.append(
        action,
        actor=None,
        username=one[0],
        account_id=one[1],
        detail=detail,
        touches=names if len(names) <= NAMED_AT_MOST else EVERYBODY,
    )
