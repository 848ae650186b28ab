"""The store in PostgreSQL, for any number of login servers. See docs/postgresql.md.

* A policy is loaded by one prepared statement, in autocommit: one round trip.
* The writer's lock is a row lock on `head`, so revisions are in commit order. Writes are sent
  together with the next query, or with the commit.
* A change that touches a policy notifies in its own transaction (`_listener`).
* Every wait for the server ends at a deadline on the client's side (`_connection`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Final, Literal, TypeVar

import attrs
from psycopg import sql

from ipguard import _fork
from ipguard._checks import check_time
from ipguard._fork import acquire
from ipguard.errors import StoreUnavailable
from ipguard.model import Changes, Policy
from ipguard.stores._sql import (
    ALL_POLICIES,
    CHANGES_SINCE,
    POLICY,
    SCHEMA_VERSION,
    UNFINISHED,
    Row,
    changes_of,
    changes_params,
    check_open_schema,
    head,
    moment,
    packed_row_of,
    policies_of,
    policy_of,
    started,
    touching,
)
from ipguard.stores._sql import migrations as _migrations
from ipguard.stores._sql.bulk import BulkRestrictions
from ipguard.stores._sql.store import SqlStore, WriteTransaction
from ipguard.stores.postgres._connection import BEGIN, Batch, Connection, quoted, ticks
from ipguard.stores.postgres._listener import Listener
from ipguard.stores.postgres._options import Options
from ipguard.stores.postgres._pool import MICROS, RESTORE, STATE, Pool, connect

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
T = TypeVar("T")

_POLICY: Final = POLICY % ("?::text", STATE)
_KEPT_TOO_LONG: Final = "another thread kept the writer's lock for too long"
_USERS_LOCK: Final = 0x49504755  # "IPGU"; with the schema's name it makes the lock's number
_CHANGES: Final = f"""
SELECT f.*, {STATE}, {MICROS}, v.version, v.oldest, s.touching, {RESTORE}
FROM ({CHANGES_SINCE}) f JOIN schema_version v ON v.id = 1 JOIN head s ON s.id = 1
JOIN zz_restore_marker m ON m.id = 1
"""
# Follow the order of tables and the indexes that the statements of a listing are written for. The
# planner has no statistics about a store that was just filled, and would choose slower plans.
_LISTING: Final = (
    "SET LOCAL jit = off; SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off;"
    " SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;"
    " SET LOCAL enable_material = off; SET LOCAL max_parallel_workers_per_gather = 0;"
    " SET LOCAL join_collapse_limit = 1; SET LOCAL plan_cache_mode = force_custom_plan"
)


def migrations() -> list[tuple[int, str]]:
    """Return the schema's SQL, for hosts that migrate their databases themselves.

    Returns:
        Version and SQL text, to be applied in this order, each text in one transaction, with the
        search path set to the schema that is to hold the tables.
    """
    return _migrations("postgresql")


_READER: Final = """
GRANT SELECT ON {schema}.schema_version, {schema}.zz_restore_marker TO {role};
GRANT SELECT ON {schema}.head, {schema}.restrictions TO {role};
GRANT SELECT (revision, token, touched) ON {schema}.changes TO {role};
GRANT SELECT (username, removed) ON {schema}.users TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.sightings TO {role};
"""
_WRITER: Final = """
GRANT SELECT ON {schema}.schema_version, {schema}.zz_restore_marker TO {role};
GRANT SELECT, UPDATE ON {schema}.head TO {role};
GRANT SELECT, INSERT ON {schema}.changes, {schema}.past_restrictions, {schema}.imports TO {role};
GRANT SELECT, INSERT, UPDATE ON {schema}.users, {schema}.requests, {schema}.failures TO {role};
GRANT SELECT, INSERT, DELETE ON {schema}.restrictions, {schema}.search_terms TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.sightings TO {role};
"""


def grants(*, schema: str = "ipguard", reader: str | None = None, writer: str | None = None) -> str:
    """Return the SQL that grants roles what they need and no more; the schema's owner runs it.

    Only migrations and `prune` need the owner. The roles must exist. The SQL can be run again.

    Args:
        schema: The schema that holds the tables.
        reader: The role of login servers: it changes nothing but sightings, and cannot read digests
            and e-mail addresses.
        writer: The role of administration: it appends to the audit log, but cannot change or
            delete entries. It also needs TEMPORARY on the database, which all roles have by
            default.
    """
    place, text = quoted(schema), ""
    for role, rights in ((reader, _READER), (writer, _WRITER)):
        if role is not None:
            text += f"GRANT USAGE ON SCHEMA {place} TO {quoted(role)};"
            text += rights.format(schema=place, role=quoted(role))
    return text


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
    """The database of a store, as seen through a separate connection.

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
    connection = connect(options.servers[0], time.monotonic() + options.timeout, options.schema)
    try:
        connection.patience = options.timeout
        ((backend, role, recovering, temporary),) = connection.rows(_SESSION)
        tables = connection.rows(_PRIVILEGES, (options.schema,))
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


class PostgresStore(SqlStore[Connection], _fork.Forkable):
    """A store in PostgreSQL. See `ipguard.store.RestrictionStore` for its methods.

    Each keyword below except the first two can be an option of the URL instead. All other options
    of the URL (`sslmode`, …) are passed to libpq.

    Args:
        url: `postgresql://user@host:port/database?option=value`; several hosts are tried in turn.
        clock: Returns the current time as an aware datetime; the server's clock by default.
        migrate: Whether to bring the schema up to date on opening. None: if the role may.
            False: only check. True: raise if that is impossible.
        pool_size: How many connections this process may have, not counting the listener; 5.
        timeout: How many seconds all waits of a read or of a change may take together; 2.0. Keep it
            below the `max_staleness` of the guards.
        bulk_timeout: How many seconds a step with any number of rows may take; 300.0.
        schema: The schema that holds the tables; `ipguard`.
        prepare: `auto`: prepare statements unless there is a pooler in between; `on`, `off`.
        prepare_threshold: After how many uses a statement is prepared.
        listen: A URL to listen on if `url` leads through a pooler; `off`: do not listen.
        replica: `allow`: accept answers of servers in recovery, however old their data is;
            `refuse`.

    Raises:
        StoreConfigError: The URL or an option is invalid, or the database cannot be used.
        SchemaVersionError: The schema is not one that this library can use.
        StoreUnavailable: With `migrate=True`: the server does not respond.
    """

    _WRITES_AHEAD = True
    _SKIP_LOCKED = "FOR UPDATE SKIP LOCKED"

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
        self.timeout = options.timeout
        self._pool = Pool(options)
        self._listener = Listener(options, self._notify)
        self._after_fork_in_child()
        _fork.register(self)
        if options.replica:
            _log.warning(
                "%s: replica=allow: answers of servers in recovery are accepted, however old their"
                " data is; nothing bounds how late a change takes effect",
                options.place,
            )
        self._pool.open(migrate=migrate)

    def __repr__(self) -> str:
        return f"<PostgresStore {self._options.place}, schema {self._options.schema}>"

    @property
    def wake_ups(self) -> str:
        """How waiting guards learn of changes: `listening for changes`, or `polling: ` and why.

        It is empty until the first `wait` has found out.
        """
        return self._listener.state

    def now(self) -> datetime:
        """Return the store's time, aware and in UTC, without I/O."""
        if self._clock is not None:
            return check_time("clock", self._clock())
        return self._pool.clock.now()

    def close(self) -> None:
        """Wake all waiting threads and refuse every later call."""
        self._pool.close()
        self._listener.close()

    def load_policy(self, username: str) -> Policy:
        """Load the policy of a user and the revision of the same snapshot."""
        return self._load(username, policy_of)

    def load_row(self, username: str) -> tuple[int, bytes]:
        """Load the packed policy of a user and the revision of the same snapshot."""
        return self._load(username, packed_row_of)

    def _load(self, username: str, decode: Callable[[str, list[Row]], T]) -> T:
        def load(connection: Connection) -> T:
            rows = connection.rows(_POLICY, (username,) * 3, login=True)
            try:
                loaded = decode(username, rows)
            except StoreUnavailable:
                connection.spoilt = True
                raise
            self._pool.refuse(connection, *rows[0][-2:])
            return loaded

        return self._pool.read(load)

    def load_all_policies(self) -> tuple[int, Iterator[tuple[str, Policy]]]:
        """Return the revision and the policies of all restricted users, from one snapshot."""
        return started(_stream(self._pool, ALL_POLICIES, policies_of))

    def load_all_rows(self) -> tuple[int, Iterator[tuple[str, bytes]]]:
        """Return the revision and the packed policies of all restricted users, from one snapshot.

        The server packs: it sends one row for each user.
        """
        return started(_stream(self._pool, _PACKED, lambda _, rows: rows))

    def changes_since(self, cursor: tuple[int, str] | None) -> Changes:
        """Return the store's position and the users whose policy changed since a revision."""
        told = self._listener.count
        params = changes_params(cursor)

        def load(connection: Connection) -> tuple[float, list[Row]]:
            asked_at, rows = ticks(), connection.rows(_CHANGES, params, login=True)
            if not rows:
                raise StoreUnavailable(f"{self._options.place}: {UNFINISHED}")
            self._pool.refuse(connection, *rows[0][4:6])
            return asked_at, rows

        asked_at, rows = self._pool.read(load)
        micros, version, oldest, touching, restore = rows[0][6:]
        check_open_schema(version, oldest)
        self._pool.clock.set(micros, asked_at)
        self._listener.tell(touching, exactly=told == self._listener.count)
        return changes_of(cursor, [row[:4] for row in rows], restore=restore)

    def wait(self, revision: int, timeout: float) -> bool:
        """Wait for a change after `revision` that touches a policy; return whether there is one."""
        if self._pool.closed:
            raise StoreUnavailable("the store is closed")
        if self._listener.touching is None:
            self._listener.tell(self._pool.read(touching))
        return self._listener.wait(revision, timeout)

    def _notify(self, payload: str) -> None:
        channel = self._options.schema
        self._pool.read(lambda it: it.rows("SELECT pg_notify(?, ?)", (channel, payload)))

    def _snapshot(self) -> AbstractContextManager[Connection]:
        return self._pool.snapshot(_LISTING)

    def _read(self, reading: Callable[[Connection], T], deadline: float) -> T:
        return self._pool.read(reading, deadline=deadline)

    @contextmanager
    def _recording(self) -> Iterator[tuple[Batch, datetime]]:
        # A server that crashes may lose the last sightings, so the commit does not wait for a disk.
        pool, place = self._pool, quoted(self._options.schema)
        deadline = pool.deadline()
        begin = f"""{BEGIN};{self._limits_sql(deadline, self._options.timeout)}
        SET LOCAL jit = off; SET LOCAL enable_seqscan = off; SET LOCAL synchronous_commit = off;
        SELECT v.version, v.oldest FROM {place}.schema_version v
            JOIN {place}.zz_restore_marker m ON m.id = 1 WHERE v.id = 1"""
        with pool.begun(begin, deadline=deadline) as (connection, found):
            if not found[-1]:
                raise StoreUnavailable(f"{self._options.place}: {UNFINISHED}")
            check_open_schema(*found[-1][0])
            connection.share(deadline - time.monotonic())
            db = Batch(connection)
            yield db, self.now()
            db.commit(None)

    def _scan(self) -> AbstractContextManager[Connection]:
        return self._pool.snapshot(patience=self._options.bulk_timeout)

    def _after_fork_in_child(self) -> None:
        """Replace the locks, which threads of the parent may hold."""
        self._queue = threading.Lock()
        self._inside: set[int] = set()  # the threads in a transaction
        # However many threads stage rows, one connection is left for logins.
        self._bulk_slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(max(1, self._options.pool_size - 1)):
            self._bulk_slots.put(None)
        self._users = threading.Lock()

    def _refuse_nested(self) -> None:
        _fork.check()
        if threading.get_ident() in self._inside:
            raise RuntimeError("this thread is in a transaction of this store already")

    @contextmanager
    def _write(
        self, *, users: bool = False, deadline: float | None = None
    ) -> Iterator[WriteTransaction]:
        pool, statement = self._pool, self._options.timeout
        deadline, queue = deadline or pool.deadline(), self._users if users else self._queue
        # Threads of one process queue here, so that waiting threads hold no connection. Bulk
        # writes have one already, and wait for the row lock alone.
        held: list[bool] = []
        try:
            if not acquire(queue, deadline - time.monotonic(), held):
                raise StoreUnavailable(_KEPT_TOO_LONG)
            asked_at = ticks()
            first = self._lock_users_sql(deadline, statement) if users else ""
            begin = f"{BEGIN};{first}{self._lock_sql(deadline, statement)}"
            with pool.begun(begin, deadline=deadline) as (connection, found):
                connection.share(deadline - time.monotonic())
                with self._locked(connection, found, asked_at) as tx:
                    yield tx
        finally:
            if True in held:
                queue.release()

    @contextmanager
    def _bulk(self) -> Iterator[Connection]:
        # Temporary tables end with the transaction, so this works through a transaction pooler.
        _fork.check()
        slots, held = self._bulk_slots, list[None]()
        try:
            try:
                held.extend(map(slots.get, (True,), (self._options.timeout,)))
            except Empty:
                raise StoreUnavailable("too many bulk changes at once") from None
            with self._pool.begun(f"{BEGIN}; SET LOCAL jit = off") as (connection, _):
                connection.patience = self._options.bulk_timeout
                yield connection
        finally:
            if held:
                slots.put(None)

    @contextmanager
    def _lock_users(self, connection: Connection) -> Iterator[None]:
        # Users are written under this lock before the writer's lock is acquired. Other writers do
        # not wait for it.
        patience, queue = self._options.bulk_timeout, self._users
        held: list[bool] = []
        try:
            if not acquire(queue, patience, held):
                raise StoreUnavailable(_KEPT_TOO_LONG)
            connection.script(self._lock_users_sql(time.monotonic() + patience, patience))
            yield
        finally:
            if True in held:
                queue.release()

    @contextmanager
    def _write_bulk(
        self, connection: Connection, restrictions: BulkRestrictions | None = None
    ) -> Iterator[WriteTransaction]:
        deadline, patience, asked_at = self._pool.deadline(), connection.patience, ticks()
        connection.patience, connection.deadline = None, deadline
        found = connection.script(self._lock_sql(deadline, self._options.bulk_timeout))
        connection.patience = patience
        with self._locked(connection, found, asked_at, restrictions) as tx:
            yield tx

    def _limits_sql(self, deadline: float, statement: float) -> str:
        """Return the server's own timeouts, in case this client vanishes and holds its locks.

        The server gives up on a lock before the client would, which keeps the connection.
        """
        seconds = {
            "lock_timeout": 0.8 * (deadline - time.monotonic()),
            "statement_timeout": statement,
            "idle_in_transaction_session_timeout": 2 * self._options.timeout,
        }
        # 0 would turn a timeout off.
        return "".join(
            f" SET LOCAL {name} = {max(1, int(limit * 1000))};" for name, limit in seconds.items()
        )

    def _lock_users_sql(self, deadline: float, statement: float) -> str:
        name = sql.Literal(self._options.schema).as_string(None)
        return f"""{self._limits_sql(deadline, statement)}
        SELECT pg_advisory_xact_lock({_USERS_LOCK}::int, hashtext({name}::text));"""

    def _lock_sql(self, deadline: float, statement: float) -> str:
        """Return the statements that acquire the writer's lock, in one round trip.

        FOR UPDATE is an error in a server that is in recovery.
        """
        place = quoted(self._options.schema)
        return f"""{self._limits_sql(deadline, statement)}
        SELECT set_config('synchronous_commit', 'on', true)
            WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');
        SELECT 1 FROM {place}.head WHERE id = 1 FOR UPDATE;
        SELECT h.revision, h.token, {MICROS}, v.version, v.oldest FROM {place}.head h
            JOIN {place}.schema_version v ON v.id = 1
            JOIN {place}.zz_restore_marker m ON m.id = 1 WHERE h.id = 1"""

    @contextmanager
    def _locked(
        self,
        connection: Connection,
        found: list[list[Row]],
        asked_at: float,
        restrictions: BulkRestrictions | None = None,
    ) -> Iterator[WriteTransaction]:
        """Run the block with the transaction whose lock was acquired, then commit."""
        if not found[-1]:
            raise StoreUnavailable(f"{self._options.place}: {UNFINISHED}")
        revision, token, micros, version, oldest = found[-1][0]
        check_open_schema(version, oldest)
        self._pool.clock.set(micros, asked_at)
        now = moment(micros) if self._clock is None else self.now()
        db = Batch(connection)
        tx = WriteTransaction(db, now, (revision, token), restrictions)
        inside, thread = self._inside, threading.get_ident()
        try:
            inside.add(thread)
            yield tx
            tx.withdraw()
            tx.check_appended()
            tx.check_process()
            db.commit(tx.touching)
        finally:
            tx.over = True
            # A signal handler may raise after any call, so this is the only one here.
            inside.discard(thread)
        if tx.touching is not None:
            self._listener.tell(tx.touching)


# ----------------------------------------------------------------------------- preloading

_RESTORE: Final = f"SELECT {RESTORE} FROM zz_restore_marker m WHERE m.id = 1"
# Restrictions are read in the order of the primary key, so that a planner with statistics sorts
# nothing. A row whose numbers do not fit is left empty, which no guard takes for a row. `textsend`
# returns the encoding of the connection, UTF-8. The join's only condition is the name: with one
# more, a planner without statistics expects so few users that it looks them up one by one.
_PACKED: Final = """
SELECT q.username,
    CASE WHEN greatest(length(q.ends4) / 8, length(q.ends6) / 32) > 65535 THEN ''::bytea ELSE
        set_byte(
            decode('00', 'hex'), 0,
            CASE WHEN u.removed = 0 THEN 1 ELSE 0 END
            + CASE WHEN coalesce(q.temporary4, q.temporary6) IS NULL THEN 0 ELSE 4 END
        )
        || substring(int4send(coalesce(length(q.ends4) / 8, 0)) FROM 3)
        || substring(int4send(coalesce(length(q.ends6) / 32, 0)) FROM 3)
        || coalesce(q.ends4, ''::bytea) || coalesce(q.ends6, ''::bytea)
        || coalesce(q.ids4 || decode('00', 'hex') || q.ids6, q.ids4, q.ids6, ''::bytea)
        || CASE WHEN coalesce(q.temporary4, q.temporary6) IS NULL THEN ''::bytea ELSE
            decode('00', 'hex')
            || coalesce(q.temporary4, ''::bytea) || coalesce(q.temporary6, ''::bytea)
        END
    END
FROM (
    SELECT o.username,
        string_agg(o.ends, ''::bytea) FILTER (WHERE o.permanent AND o.size = 4) AS ends4,
        string_agg(o.ends, ''::bytea) FILTER (WHERE o.permanent AND o.size = 16) AS ends6,
        string_agg(o.id, decode('00', 'hex')) FILTER (WHERE o.permanent AND o.size = 4) AS ids4,
        string_agg(o.id, decode('00', 'hex')) FILTER (WHERE o.permanent AND o.size = 16) AS ids6,
        string_agg(o.temporary, ''::bytea) FILTER (WHERE o.size = 4) AS temporary4,
        string_agg(o.temporary, ''::bytea) FILTER (WHERE o.size = 16) AS temporary6
    FROM (
        SELECT r.username, length(r.first_ip) AS size, r.first_ip || r.last_ip AS ends,
            textsend(r.id) AS id, r.expires_at IS NULL AS permanent,
            CASE WHEN r.expires_at IS NOT NULL THEN
                substring(int4send(length(r.first_ip)) FROM 4) || r.first_ip || r.last_ip
                || int8send(r.expires_at)
                || substring(int4send(octet_length(r.id)) FROM 3) || textsend(r.id)
            END AS temporary
        FROM restrictions r
        ORDER BY r.username, r.created_at, r.id
    ) o
    GROUP BY o.username
) q
LEFT JOIN users u ON u.username = q.username
"""


def _stream(
    pool: Pool, statement: str, decode: Callable[[int, Iterator[Row]], Iterator[T]]
) -> Iterator[int | T]:
    """Yield the revision of a snapshot, then what a statement finds in it."""
    with pool.snapshot(patience=pool.options.bulk_timeout) as connection:
        revision, _ = head(connection)
        restore = connection.rows(_RESTORE)
        yield revision
        yield from decode(revision, connection.stream(statement))
    # Snapshots are not isolated from TRUNCATE and DROP: a restore would have made the tables
    # look empty in this one.
    if pool.read(lambda it: it.rows(_RESTORE)) != restore:
        raise StoreUnavailable(f"{pool.options.place}: {UNFINISHED}")
