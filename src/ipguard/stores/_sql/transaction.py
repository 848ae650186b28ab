"""The writer's turn of the SQL stores.

What can be many is staged first, before the writer's lock is taken: restrictions in `_sql_staged`,
users in `_sql_users`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from ipguard.errors import (
    StoreError,
    shorten,
)
from ipguard.model import (
    Action,
    Change,
    PendingRequest,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
)
from ipguard.store import NO_DETAIL
from ipguard.stores._sql import (
    CHANGE,
    PENDING,
    REQUEST,
    RESTRICTION,
    USER,
    Executor,
    Row,
    change_row,
    encodable,
    marks,
    micros,
    moment,
    pending_of,
    request_of,
    request_row,
    restriction_of,
    restriction_row,
    touched_text,
    user_of,
)
from ipguard.stores._sql.bulk import StagedRestrictions

_INSERT_CHANGE: Final = (
    f"INSERT INTO changes ({CHANGE}, token, touched) VALUES ({marks(CHANGE)}, ?, ?)"
)
_MOVE_HEAD: Final = (
    "UPDATE head SET revision = ?, token = ?, touching = CASE WHEN ? = 1 THEN ? ELSE touching END"
    " WHERE id = 1"
)
_SAVE_REQUEST: Final = (
    f"INSERT INTO requests ({REQUEST}) VALUES ({marks(REQUEST)}) ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in REQUEST.split(", ")[1:])
)
_INSERT_RESTRICTION: Final = (
    f"INSERT INTO restrictions (username, {RESTRICTION}) VALUES (?, {marks(RESTRICTION)})"
)


class SqlSnapshot:
    """One committed state; see `ipguard.store.Snapshot` for what each method promises.

    Args:
        db: The connection, in a transaction.
        now: The store's time when that began.
    """

    def __init__(self, db: Executor, now: datetime) -> None:
        self._db = db
        self._now = now

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

    def _find(self, sql: str, key: str) -> list[Row]:
        # An id comes from outside: what cannot be stored is not there.
        return self._db.rows(sql, (key,)) if encodable(key) else []


class SqlTransaction(SqlSnapshot):
    """A writer's turn; see `ipguard.store.Transaction` for what each method promises.

    Args:
        db: The connection, on which the writer's lock is held.
        now: The store's time when it was taken.
        revision: The store's revision then.
        staged: The restrictions that are staged on this connection, if any.

    Attributes:
        revision: The revision that the turn has come to.
        touching: The last revision of this turn that touched a policy, or None.
    """

    def __init__(
        self,
        db: Executor,
        now: datetime,
        *,
        revision: int,
        staged: StagedRestrictions | None = None,
    ) -> None:
        super().__init__(db, now)
        self._staged = staged
        self.revision = revision
        self.touching: int | None = None

    def restriction(self, restriction_id: str) -> Restriction | None:
        self.withdraw()
        return super().restriction(restriction_id)

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        self.withdraw()
        return super().restrictions(username)

    def save_request(self, stored: StoredRequest) -> None:
        self._db.run(_SAVE_REQUEST, request_row(stored))

    def set_failures(self, actor: str, count: int) -> None:
        self._db.run(
            "INSERT INTO failures (actor, count) VALUES (?, ?)"
            " ON CONFLICT (actor) DO UPDATE SET count = excluded.count",
            (actor, count),
        )

    def add_restriction(self, restriction: Restriction) -> None:
        self.withdraw()
        # Asked for first: after a statement that failed, PostgreSQL lets no turn go on.
        if self._db.rows("SELECT 1 FROM restrictions WHERE id = ?", (restriction.id,)):
            raise StoreError(f"there is a restriction {shorten(restriction.id)} already")
        self._db.run(_INSERT_RESTRICTION, restriction_row(restriction))

    def remove_restriction(self, restriction_id: str) -> None:
        self.withdraw()
        self._db.run("DELETE FROM restrictions WHERE id = ?", (restriction_id,))

    def add_staged(self, *, per_user: int) -> int:
        if self._staged is None:
            return 0
        return self._staged.add(self._db, self._now, per_user=per_user)

    def orphaned_deletions(self) -> tuple[PendingRequest, ...]:
        return () if self._staged is None else self._staged.orphaned(self._db)

    def append(
        self,
        action: Action,
        *,
        actor: str | None,
        actor_address: str | None = None,
        username: str | None = None,
        account_id: str | None = None,
        detail: Mapping[str, str] = NO_DETAIL,
        touches: frozenset[str] | Touched = frozenset(),
    ) -> Change:
        change = Change(
            revision=self.revision + 1,
            at=self._now,
            actor=actor,
            actor_address=actor_address,
            action=action,
            username=username,
            detail=dict(detail),
            account_id=account_id,
        )
        token, touched = secrets.token_hex(8), touched_text(touches)
        self._db.run(_INSERT_CHANGE, (*change_row(change), token, touched))
        touching = int(touched is not None)
        self._db.run(_MOVE_HEAD, (change.revision, token, touching, change.revision))
        self.revision = change.revision
        if touched is not None:
            self.touching = change.revision
        return change

    def withdraw(self) -> None:
        """Take back what was written ahead of `add_staged`, where that was not called."""
        if self._staged is not None:
            self._staged.withdraw(self._db)


# ------------------------------------------------------------------------- pruning

_FIRST_KEPT: Final = """
SELECT COALESCE(
    (SELECT min(c.revision) FROM changes c WHERE c.revision > 0 AND c.at >= ?), h.revision
) FROM head h WHERE h.id = 1
"""


def prune(db: Executor, before: datetime) -> int:
    """Delete the changes before a moment, inside a transaction, and return how many.

    A beginning of the trail and no more: were a row missing in the middle, a guard that stands
    before it would not hear of it. And never the head's own row.
    """
    ((first,),) = db.rows(_FIRST_KEPT, (micros(before),))
    ((count,),) = db.rows("SELECT count(*) FROM changes WHERE revision < ?", (first,))
    db.run("DELETE FROM changes WHERE revision < ?", (first,))
    return int(count)
