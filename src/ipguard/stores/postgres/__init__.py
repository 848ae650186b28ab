"""The store in PostgreSQL, for any number of login servers. docs/postgresql.md tells how to deploy.

* A policy is one prepared statement, in autocommit: one round trip.
* The writer's turn is a row lock on `head`, so revisions are in commit order. What it writes is
  sent with its next question, or with the commit.
* A change that touches a policy notifies in its own transaction (`_postgres_listen`).
* Every wait for the server ends at a deadline of this side (`_postgres`).

Limits, stated: a name is resolved by the system's resolver, which has no deadline: write addresses,
or `hostaddr`. A server that was cut off from its successor, and does not know it, answers until it
is stopped: fencing is the cluster manager's work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final, Literal, cast

import attrs

from ipguard._checks import check_time
from ipguard.errors import StoreUnavailable
from ipguard.model import Accounts, Change, Changes, Page, Policy, Restriction, User, UserOverview
from ipguard.store import Closing, Snapshot, Transaction, log_change
from ipguard.stores._sql import SCHEMA_VERSION, Row
from ipguard.stores._sql import bulk as users_of
from ipguard.stores._sql import listing as pages
from ipguard.stores._sql import migrations as _migrations
from ipguard.stores._sql import policies as read
from ipguard.stores._sql.bulk import StagedRestrictions
from ipguard.stores._sql.transaction import SqlSnapshot, SqlTransaction, prune
from ipguard.stores.postgres import _schema as schema
from ipguard.stores.postgres._connection import Session, quoted, ticks
from ipguard.stores.postgres._listener import Listener
from ipguard.stores.postgres._options import Options
from ipguard.stores.postgres._pool import Client, connect
from ipguard.stores.postgres._schema import RESTORE
from ipguard.stores.postgres._transaction import Writer
from ipguard.usernames import canonical_usernames

__all__ = [
    "SCHEMA_VERSION",
    "Examination",
    "PostgresStore",
    "deployment_sql",
    "examine",
    "grants",
    "migrations",
]

_log = logging.getLogger("ipguard.stores.postgres")

grants = schema.grants


def migrations() -> list[tuple[int, str]]:
    """Return the schema's SQL, for hosts that migrate their databases themselves.

    Returns:
        Version and SQL text, to be applied in this order, each text in one transaction, with the
        search path set to the schema that is to hold the tables.
    """
    return _migrations("postgresql")


def deployment_sql(
    url: str, *, since: int = 0, reader: str | None = None, writer: str | None = None
) -> tuple[list[tuple[int, str]], str]:
    """Return the SQL that prepares the database of a URL, for its owner to run.

    Args:
        url: The URL of the store. Nothing connects to it.
        since: The schema version that is there already.
        reader: A role to grant what login servers need; see `grants`.
        writer: A role to grant what administration needs.

    Returns:
        The migrations, as from `migrations`, each with the statements that create and select the
        schema; and the grants.

    Raises:
        StoreConfigError: The URL or an option in it is invalid.
    """
    name = Options.parse(url, {}).schema
    start = (
        f"CREATE SCHEMA IF NOT EXISTS {quoted(name)};\n"
        f"SET LOCAL search_path TO {quoted(name)}, pg_temp;\n"
    )
    parts = [(version, start + text) for version, text in migrations() if version > since]
    return parts, grants(schema=name, reader=reader, writer=writer)


@attrs.frozen(kw_only=True)
class Examination:
    """What a connection of its own shows about the database of a store.

    Attributes:
        schema: The schema that holds the tables, as an SQL identifier.
        listens: Whether the store listens for changes.
        role: The role of the connection.
        rights: What the role may do: `owner`, `writer` and `reader` as in `grants`, or `none` if
            it may not read restrictions.
        temporary: Whether the role may create temporary tables, which a writer needs.
        recovering: Whether the server is in recovery.
        pooled: Whether there is a transaction pooler in between.
        row_security: For each table with row-level security, whether it hides rows from the role.
    """

    schema: str
    listens: bool
    role: str
    rights: Literal["owner", "writer", "reader", "none"]
    temporary: bool
    recovering: bool
    pooled: bool
    row_security: dict[str, bool]


_SESSION: Final = """
SELECT pg_backend_pid(), current_user::text, pg_is_in_recovery(),
    has_database_privilege(current_database(), 'TEMPORARY')
"""
_PRIVILEGES: Final = """
SELECT c.relname::text, has_table_privilege(c.oid, 'SELECT'), has_table_privilege(c.oid, 'INSERT'),
    has_table_privilege(c.oid, 'UPDATE') OR has_table_privilege(c.oid, 'DELETE'),
    c.relrowsecurity, row_security_active(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ? AND c.relkind IN ('r', 'p') ORDER BY c.relname
"""


def examine(url: str) -> Examination:
    """Examine the database of a URL, whether a store could use it or not.

    Args:
        url: The URL of the store; of several hosts, the first is examined.

    Raises:
        StoreConfigError: The URL or an option in it is invalid.
        StoreUnavailable: The server does not respond.
    """
    options = Options.parse(url, {})
    connection = connect(options.servers[0], time.monotonic() + options.timeout)
    try:
        session = Session(connection, options.schema)
        session.patience = options.timeout
        ((backend, role, recovering, temporary),) = session.rows(_SESSION)
        tables = session.rows(_PRIVILEGES, (options.schema,))
        pooled = backend != connection.info.backend_pid
    finally:
        connection.close()
    may_read = {name for name, read_it, *_ in tables if read_it}
    may_insert = {name for name, _, insert, *_ in tables if insert}
    may_change = {name for name, _, _, change, *_ in tables if change}
    rights: Literal["owner", "writer", "reader", "none"] = "reader"
    if "changes" in may_change:
        rights = "owner"
    elif "restrictions" not in may_read:
        rights = "none"
    elif may_insert >= {"restrictions", "users", "requests", "changes"}:
        rights = "writer"
    return Examination(
        schema=quoted(options.schema),
        listens=options.listen is not None,
        role=role,
        rights=rights,
        temporary=temporary,
        recovering=recovering,
        pooled=pooled,
        row_security={name: hides for name, *_, secured, hides in tables if secured},
    )


class PostgresStore(Closing):
    """A store in PostgreSQL. See `ipguard.store.RestrictionStore` for what each method does.

    Each keyword below but the first two may be an option of the URL instead; what else the URL
    says (`sslmode`, …) is libpq's.

    Args:
        url: `postgresql://user@host:port/database?option=value`; several hosts are tried in turn.
        clock: Returns the current time as an aware datetime; the server's clock without it.
        migrate: Whether to bring the schema up to date on opening. None: where the role may.
            False: only check. True: raise where that cannot be.
        pool_size: How many connections this process may have, the one that listens not counted; 5.
        timeout: How many seconds all waits of a read or of a change may take together; 2.0. Keep it
            below the `max_staleness` of the guards.
        bulk_timeout: How many seconds a step with any number of rows may take; 300.0.
        schema: The schema that holds the tables; `ipguard`.
        prepare: `auto`: prepare statements unless there is a pooler between; `on`, `off`.
        prepare_threshold: After how many uses a statement is prepared.
        listen: A URL to listen on where `url` leads through a pooler; `off`: do not listen.
        replica: `allow`: let servers in recovery answer, whatever the age of what they hold;
            `refuse`.

    Raises:
        StoreConfigError: The URL or an option makes no sense, or the database cannot be used.
        SchemaVersionError: The schema is not one that this library may use.
        StoreUnavailable: With `migrate=True`: the server does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], datetime] | None = None,
        migrate: bool | None = None,
        pool_size: int | None = None,
        timeout: float | None = None,
        bulk_timeout: float | None = None,
        schema: str | None = None,
        prepare: str | None = None,
        prepare_threshold: int | None = None,
        listen: str | None = None,
        replica: str | None = None,
    ) -> None:
        keywords = {
            "pool_size": pool_size,
            "timeout": timeout,
            "bulk_timeout": bulk_timeout,
            "schema": schema,
            "prepare": prepare,
            "prepare_threshold": prepare_threshold,
            "listen": listen,
            "replica": replica,
        }
        options = Options.parse(url, keywords)
        self._options = options
        self._clock = clock
        self._client = Client(options)
        self._listener = Listener(options, self._notify)
        self._writer = Writer(self._client, clock and self.now, self._listener.tell)
        if options.replica:
            _log.warning(
                "%s: replica=allow: what servers in recovery answer counts, whatever its age;"
                " nothing bounds how late a change takes effect",
                options.place,
            )
        self._client.open(migrate=migrate)

    def __repr__(self) -> str:
        return f"<PostgresStore {self._options.place}, schema {self._options.schema}>"

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC, without I/O."""
        if self._clock is not None:
            return check_time("clock", self._clock())
        return self._client.clock.now()

    # -------------------------------------------------------------------------- reading

    def load_policy(self, username: str) -> Policy:
        """Return what decides about a user, and the revision of that very snapshot."""

        def ask(session: Session) -> Policy:
            rows = session.prepared_rows(_POLICY, (username,) * 3)
            try:
                policy = read.policy_of(username, rows)
            except StoreUnavailable:
                session.connection.spoilt = True
                raise
            self._client.refuse(session, *rows[0][-2:])
            return policy

        return self._client.read(ask)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision, and the policy of each user with restrictions, from one snapshot."""
        stream = PolicyStream(self._client)
        return stream.revision, stream

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return where the store is, and whose policy changed since a revision."""
        told = self._listener.count
        params = read.changes_params(cursor)

        def ask(session: Session) -> tuple[float, list[Row]]:
            asked_at, rows = ticks(), session.prepared_rows(_CHANGES, params)
            if not rows:
                raise StoreUnavailable(f"{self._options.place}: {read.UNFINISHED}")
            self._client.refuse(session, *rows[0][4:6])
            return asked_at, rows

        asked_at, rows = self._client.read(ask)
        micros, version, oldest, touching, restore = rows[0][6:]
        schema.check_version(version, oldest)
        self._client.clock.set(micros, asked_at)
        self._listener.tell(touching, exactly=told == self._listener.count)
        return read.changes_of(cursor, [row[:4] for row in rows], restore=restore)

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait until a change after `revision` touches a policy, or the store is closed."""
        if self._client.pool.closed:
            raise StoreUnavailable("the store is closed")
        if self._listener.touching is None:
            self._listener.tell(self._client.read(read.touching))
        return self._listener.wait(revision, timeout)

    def _notify(self, payload: str) -> None:
        self._client.read(lambda it: it.rows(_NOTIFY, (self._options.schema, payload)))

    def overview(
        self, accounts: Accounts, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """Return users with their restrictions and live pending requests, by username."""
        with self._client.snapshot(_PAGES) as session:
            return pages.overview(
                session, self.now(), accounts, search=search, after=after, limit=limit
            )

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """Return changes, the newest first."""
        with self._client.snapshot(_PAGES) as session:
            return pages.history(session, accounts, username=username, before=before, limit=limit)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Open a snapshot for look-ups."""
        with self._client.snapshot() as session:
            yield SqlSnapshot(session, self.now())

    # -------------------------------------------------------------------------- writing

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        """Take the writer's turn."""
        self._writer.refuse_nested()
        if staged is None:
            with self._writer.turn() as (turn, _):
                yield turn
            return
        with self._writer.staging() as session:
            many = StagedRestrictions(session, staged)
            if many.judge(session, self.now()):
                many.write_ahead(session)
            with self._writer.staged_turn(session, many) as (turn, _):
                yield turn

    def put_users(self, users: Iterable[User]) -> int:
        """Add or update users, as one change; what is already so appends nothing."""
        self._writer.refuse_nested()
        few, many = users_of.few(users)
        if few is not None:
            deadline = self._client.deadline()
            revision, changed = self._client.read(few.compare, deadline=deadline)
            if not changed:
                return revision
            with self._writer.turn(users=True, deadline=deadline) as (turn, db):
                change = few.apply(turn, db)
            return _told(turn, change)
        with self._writer.staging() as session:
            put = users_of.StagedUsers(session, many)
            revision, changed = put.compare(session)
            if not changed:
                session.script("ROLLBACK")
                return revision
            with self._writer.users(session):
                put.write_ahead(session)
                with self._writer.staged_turn(session) as (turn, db):
                    change = put.apply(turn, db)
        return _told(turn, change)

    def remove_users(self, usernames: Iterable[str]) -> int:
        """Remove users, as one change."""
        self._writer.refuse_nested()
        with self._writer.staging() as session:
            users_of.stage_names(session, canonical_usernames(usernames))
            with self._writer.users(session), self._writer.staged_turn(session) as (turn, db):
                change = users_of.remove_staged(turn, db)
        return _told(turn, change)

    def prune(self, before: datetime) -> int:
        """Delete the changes before a moment, for the schema's owner alone; return how many.

        Only a beginning of the trail goes, and never its last row. A guard that has not synced
        since then starts over.
        """
        with self._writer.staging() as session:
            count = prune(session, before)
            session.script("COMMIT")
        return count

    # -------------------------------------------------------------------------- ending

    def close(self) -> None:
        """Let the waiting go and refuse every later call."""
        self._client.pool.close()
        self._listener.close()


_POLICY: Final = read.POLICY % ("?::text", schema.STATE)
_CHANGES: Final = f"""
SELECT f.*, {schema.STATE}, {schema.MICROS}, v.version, v.oldest, s.touching, {schema.RESTORE}
FROM ({read.CHANGES_SINCE}) f JOIN schema_version v ON v.id = 1 JOIN head s ON s.id = 1
JOIN zz_restore_marker m ON m.id = 1
"""
# The statements of a page say themselves in which order to go, by which index. The planner would
# know better only with statistics, which a store that was filled just now does not have.
_PAGES: Final = (
    "SET LOCAL jit = off; SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off;"
    " SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;"
    " SET LOCAL enable_material = off; SET LOCAL max_parallel_workers_per_gather = 0;"
    " SET LOCAL join_collapse_limit = 1; SET LOCAL plan_cache_mode = force_custom_plan"
)
_NOTIFY: Final = "SELECT pg_notify(?, ?)"


def _told(turn: SqlTransaction, change: Change | None) -> int:
    """Log a change that has been committed; return the revision."""
    if change is not None:
        log_change(change)
    return turn.revision


_FETCHED: Final = 5_000

# Written so that most rows need the fewest steps: no expiry, and three values joined. `textsend`
# gives the connection's encoding, which is UTF-8. The users are joined by nothing but their names:
# with a condition more, a planner without statistics expects so few that it looks them up in turn.
_PACKED: Final = """
SELECT q.username,
    CASE WHEN u.removed = 0 THEN decode('01', 'hex') ELSE decode('00', 'hex') END || q.packed
FROM (
    SELECT o.username, string_agg(o.packed, decode('00', 'hex')) || decode('00', 'hex') AS packed
    FROM (
        SELECT r.username,
            CASE WHEN r.expires_at IS NULL
            THEN
                CASE WHEN length(r.first_ip) = 4
                THEN decode('00', 'hex') ELSE decode('01', 'hex') END
                || r.first_ip || r.last_ip || textsend(r.id)
            ELSE
                CASE WHEN length(r.first_ip) = 4
                THEN decode('02', 'hex') ELSE decode('03', 'hex') END
                || r.first_ip || r.last_ip || int8send(r.expires_at) || textsend(r.id)
            END AS packed
        FROM restrictions r
        ORDER BY r.username, r.created_at, r.id
    ) o
    GROUP BY o.username
) q
LEFT JOIN users u ON u.username = q.username
"""


_RESTORE: Final = f"SELECT {RESTORE} FROM zz_restore_marker m WHERE m.id = 1"


class PolicyStream:
    """An iterator over users and their policies, which holds a connection until its end.

    Args:
        client: The connections.

    Attributes:
        revision: The store's revision in the snapshot.
    """

    def __init__(self, client: Client) -> None:
        self._packed = False
        self._stream = self._streamed(client)
        # Started here, so that the snapshot is of now, and closing the iterator always ends it.
        self.revision = cast("int", next(self._stream))

    def _streamed(self, client: Client) -> Iterator[int | tuple[str, Policy] | tuple[str, bytes]]:
        with client.snapshot(patience=client.options.bulk_timeout) as session:
            revision, _ = read.head(session)
            restore = session.rows(_RESTORE)
            yield revision
            statement = _PACKED if self._packed else read.ALL_POLICIES
            session.run(f"DECLARE policies NO SCROLL CURSOR FOR {statement}")
            rows = _fetched(session)
            if self._packed:
                yield from cast("Iterator[tuple[str, bytes]]", rows)
            else:
                yield from read.policies_of(revision, rows)
        # A snapshot does not protect from TRUNCATE and DROP: to an older snapshot, the tables that
        # they leave are empty.
        if client.read(lambda it: it.rows(_RESTORE)) != restore:
            raise StoreUnavailable(f"{client.options.place}: {read.UNFINISHED}")

    def __iter__(self) -> PolicyStream:
        return self

    def __next__(self) -> tuple[str, Policy]:
        return cast("tuple[str, Policy]", next(self._stream))

    def packed(self) -> Iterator[tuple[str, bytes]]:
        """Give users with what `ipguard.packed.pack` makes of their policies, instead."""
        self._packed = True
        return cast("Iterator[tuple[str, bytes]]", self._stream)

    def close(self) -> None:
        """Give the connection back."""
        self._stream.close()  # type: ignore[attr-defined]


def _fetched(session: Session) -> Iterator[Row]:
    while True:
        rows = session.rows(f"FETCH FORWARD {_FETCHED} FROM policies")
        yield from rows
        if len(rows) < _FETCHED:
            return
