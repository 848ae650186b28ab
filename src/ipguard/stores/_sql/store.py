"""The base class of the SQL stores, and their write transaction."""

from __future__ import annotations

import os
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any, ClassVar, Final, Generic, TypeVar

from ipguard.audit import log_change
from ipguard.errors import StoreError, StoreUnavailable, shorten
from ipguard.model import (
    Accounts,
    Action,
    Change,
    Page,
    PendingRequest,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserOverview,
)
from ipguard.store import NO_DETAIL, Closing, Snapshot, Transaction
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
    listing,
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
from ipguard.stores._sql.bulk import (
    BulkRestrictions,
    BulkUsers,
    few_users,
    remove_named,
    stage_names,
)
from ipguard.usernames import canonical_usernames

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
    """One committed state; `ipguard.store.Snapshot` documents the methods.

    Args:
        db: The connection, in a transaction.
        now: The store's time when the transaction began.
    """

    def __init__(self, db: Executor, now: datetime) -> None:
        self._executor = db
        self._now = now
        self._pid = os.getpid()
        self._over = False

    @property
    def now(self) -> datetime:
        return self._now

    @property
    def db(self) -> Executor:
        """The connection, as long as the transaction lasts and in the process that began it."""
        self.check_process()
        if self._over:
            raise RuntimeError("this transaction is over")
        return self._executor

    def check_process(self) -> None:
        """Refuse to continue in a child that was forked inside the transaction.

        Raises:
            StoreUnavailable: This is such a child.
        """
        if self._pid != os.getpid():
            raise StoreUnavailable("the transaction belongs to the parent process")

    def end(self) -> None:
        """Refuse all further calls."""
        self._over = True

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
        return tuple(moment(row[0]) for row in self.db.rows(sql, (requested_by, micros(since))))

    def failures(self, actor: str) -> int:
        for row in self._find("SELECT count FROM failures WHERE actor = ?", actor):
            return int(row[0])
        return 0

    def _find(self, sql: str, key: str) -> list[Row]:
        # An id comes from outside; text that cannot be stored is not found.
        return self.db.rows(sql, (key,)) if encodable(key) else []


class WriteTransaction(SqlSnapshot):
    """A write transaction; `ipguard.store.Transaction` documents the methods.

    Args:
        db: The connection, which holds the writer's lock.
        now: The store's time when the lock was acquired.
        revision: The store's revision at that time.
        bulk: The restrictions that were staged on this connection, if any.

    Attributes:
        revision: The revision after the last entry of this transaction.
        touching: The last revision of this transaction that touched a policy, or None.
    """

    def __init__(
        self, db: Executor, now: datetime, *, revision: int, bulk: BulkRestrictions | None = None
    ) -> None:
        super().__init__(db, now)
        self._bulk = bulk
        self.revision = revision
        self.touching: int | None = None

    def restriction(self, restriction_id: str) -> Restriction | None:
        self.withdraw()
        return super().restriction(restriction_id)

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        self.withdraw()
        return super().restrictions(username)

    def save_request(self, stored: StoredRequest) -> None:
        self.db.run(_SAVE_REQUEST, request_row(stored))

    def set_failures(self, actor: str, count: int) -> None:
        self.db.run(
            "INSERT INTO failures (actor, count) VALUES (?, ?)"
            " ON CONFLICT (actor) DO UPDATE SET count = excluded.count",
            (actor, count),
        )

    def add_restriction(self, restriction: Restriction) -> None:
        self.withdraw()
        # Check first: after a statement that failed, PostgreSQL refuses the whole transaction.
        if self.db.rows("SELECT 1 FROM restrictions WHERE id = ?", (restriction.id,)):
            raise StoreError(f"there is a restriction {shorten(restriction.id)} already")
        self.db.run(_INSERT_RESTRICTION, restriction_row(restriction))

    def remove_restriction(self, restriction_id: str) -> None:
        self.withdraw()
        self.db.run("DELETE FROM restrictions WHERE id = ?", (restriction_id,))

    def add_staged(self, *, per_user: int) -> int:
        return 0 if self._bulk is None else self._bulk.add(self.db, self._now, per_user=per_user)

    def orphaned_deletions(self) -> tuple[PendingRequest, ...]:
        return () if self._bulk is None else self._bulk.orphaned(self.db)

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
        self.db.run(_INSERT_CHANGE, (*change_row(change), token, touched))
        touching = int(touched is not None)
        self.db.run(_MOVE_HEAD, (change.revision, token, touching, change.revision))
        self.revision = change.revision
        if touched is not None:
            self.touching = change.revision
        return change

    def withdraw(self) -> None:
        """Undo what was written ahead of `add_staged`, if that was not called."""
        if self._bulk is not None:
            self._bulk.withdraw(self.db)


_FIRST_KEPT: Final = """
SELECT COALESCE(
    (SELECT min(c.revision) FROM changes c WHERE c.revision > 0 AND c.at >= ?), h.revision
) FROM head h WHERE h.id = 1
"""


C = TypeVar("C", bound=Executor)
T = TypeVar("T")
Writing = AbstractContextManager[WriteTransaction]


class SqlStore(Closing, Generic[C]):
    """A store in an SQL database; a subclass provides the connections, of type `C`.

    Attributes:
        timeout: How many seconds a call may wait, all its steps together.
    """

    timeout: float
    _WRITES_AHEAD: ClassVar[bool] = False
    """Whether bulk rows are written before the writer's lock is acquired."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the store's time, aware and in UTC."""

    @abstractmethod
    def _refuse_nested(self) -> None:
        """Raise RuntimeError if this thread is in a write transaction: it would deadlock."""

    @abstractmethod
    def _snapshot(self) -> AbstractContextManager[C]:
        """Lend a connection whose reads are of one committed state."""

    @abstractmethod
    def _read(self, reading: Callable[[C], T], deadline: float) -> T:
        """Run a read."""

    @abstractmethod
    def _write(self, *, users: bool = False, deadline: float | None = None) -> Writing:
        """Begin a write transaction, which commits at the end of the block.

        Args:
            users: Whether it adds or removes users.
            deadline: On the clock of `time.monotonic`; the timeout from now by default.
        """

    @abstractmethod
    def _bulk(self) -> AbstractContextManager[C]:
        """Lend a connection on which any number of rows can be staged in temporary tables."""

    @abstractmethod
    def _write_bulk(self, connection: C, restrictions: BulkRestrictions | None = None) -> Writing:
        """Begin a write transaction on a connection from `_bulk`."""

    def _step(self, _connection: C, /) -> AbstractContextManager[Any]:
        """Run statements on a connection from `_bulk`, which may have no transaction yet."""
        return nullcontext()

    def _lock_users(self, _connection: C, /) -> AbstractContextManager[Any]:
        """Keep other writers from adding and removing users, if the store writes ahead."""
        return nullcontext()

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Open a snapshot for look-ups, which waits for no writer."""
        with self._snapshot() as db:
            yield SqlSnapshot(db, self.now())

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        """Begin a write transaction."""
        self._refuse_nested()
        if staged is None:
            with self._write() as tx:
                yield tx
            return
        with self._bulk() as db:
            with self._step(db):
                restrictions = BulkRestrictions(db, staged, ahead=self._WRITES_AHEAD)
            with self._step(db):
                restrictions.judge(db, self.now())
            with self._write_bulk(db, restrictions) as tx:
                yield tx

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users in one change, if any of them differs; return the revision."""
        self._refuse_nested()
        few, many = few_users(users)
        if few is not None:
            deadline = time.monotonic() + self.timeout
            revision, differ = self._read(few.compare, deadline)
            if not differ:
                return revision
            with self._write(users=True, deadline=deadline) as tx:
                change = few.apply(tx, tx.db)
            return _log(tx, change)
        with self._bulk() as connection:
            with self._step(connection):
                staged = BulkUsers(connection, many)
            with self._step(connection):
                revision, differ = staged.compare(connection)
            if not differ:
                return revision
            with self._lock_users(connection):
                if self._WRITES_AHEAD:
                    staged.write_ahead(connection)
                with self._write_bulk(connection) as tx:
                    change = staged.apply(tx, tx.db)
        return _log(tx, change)

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users in one change; return the revision."""
        self._refuse_nested()
        with self._bulk() as connection:
            with self._step(connection):
                stage_names(connection, canonical_usernames(usernames))
            with self._lock_users(connection), self._write_bulk(connection) as tx:
                change = remove_named(tx, tx.db)
        return _log(tx, change)

    def prune(self, before: datetime) -> int:
        """Delete the audit entries before a time, for the owner of the database.

        Only a prefix of the audit log is deleted, and never its latest entry. A guard that has not
        synced since then starts over.

        Args:
            before: The time of the first entry to keep.

        Returns:
            How many entries were deleted.
        """
        self._refuse_nested()
        with self._pruning() as db:
            # Delete a prefix of the audit log, never its latest entry: a gap would hide changes
            # from guards that are still behind it.
            ((first,),) = db.rows(_FIRST_KEPT, (micros(before),))
            ((count,),) = db.rows("SELECT count(*) FROM changes WHERE revision < ?", (first,))
            db.run("DELETE FROM changes WHERE revision < ?", (first,))
            return int(count)

    @contextmanager
    def _pruning(self) -> Iterator[Executor]:
        """Begin a transaction that deletes audit entries."""
        with self._write() as tx:
            yield tx.db

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and pending requests, by username."""
        with self._snapshot() as db:
            return listing.overview(
                db, self.now(), accounts, search=search, after=after, limit=limit
            )

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return audit entries, newest first."""
        with self._snapshot() as db:
            return listing.history(db, accounts, username=username, before=before, limit=limit)


def _log(tx: WriteTransaction, change: Change | None) -> int:
    """Log a change that was committed; return the revision."""
    if change is not None:
        log_change(change)
    return tx.revision
