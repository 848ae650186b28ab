"""The schema in PostgreSQL: its creation, the check of each new connection, and the roles."""

from __future__ import annotations

import logging
from typing import Final

from psycopg import errors

from ipguard.errors import SchemaVersionError, StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import SCHEMA_VERSION, UNFINISHED, check_schema, migrations
from ipguard.stores.postgres._connection import BEGIN, Connection, ServerClock, quoted, ticks
from ipguard.stores.postgres._options import Options

_log = logging.getLogger("ipguard.stores.postgres")

MICROS: Final = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
"""The server's time, as times are stored."""
STATE: Final = (
    "pg_is_in_recovery(), 'changes_pkey'::regclass IS NOT NULL"
    " AND 'head_pkey'::regclass IS NOT NULL"
    " AND 'restrictions_pkey'::regclass IS NOT NULL"
    " AND 'users_pkey'::regclass IS NOT NULL"
)
"""Whether the server is in recovery, and whether the tables have their indexes.

`pg_restore --jobs` may restore the restore marker before it has filled other tables, but it creates
the indexes of a table only after that. The name of a missing index is an error when the statement
is parsed, so a prepared statement does not pay for the check.
"""
RESTORE: Final = "m.tableoid::bigint || '.' || m.xmin::text"
"""Which restore created the tables: the marker `m` is written once, in its own transaction."""
_PREPARED_AFTER: Final = 5
_GREETING: Final = f"""
SELECT pg_backend_pid(), pg_is_in_recovery(), current_setting('server_encoding'), {MICROS},
    v.version, v.oldest, t.hidden, t.other, current_setting('zero_damaged_pages') = 'on'
FROM schema_version v CROSS JOIN (
    SELECT string_agg(c.relname::text, ', ') FILTER (WHERE row_security_active(c.oid)) AS hidden,
        string_agg(c.relname::text, ', ') FILTER (WHERE c.relkind NOT IN ('r', 'p')) AS other
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = ? AND c.relname IN ('changes', 'head', 'restrictions', 'users')
) t WHERE v.id = 1
"""
_MISSING: Final = (errors.UndefinedTable, errors.InvalidSchemaName)
_NOT_ALLOWED: Final = (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction)
_LOCK: Final = 0x49504764  # "IPGd"; with the schema's name it makes the advisory lock's number


def greet(connection: Connection, options: Options, clock: ServerClock) -> tuple[int, int]:
    """Check what a new connection leads to, and whether statements can be prepared on it.

    Set the clock, and return the version of the schema and the oldest version compatible with it.
    """
    auto = options.prepare == -1
    connection.prepare_threshold = None if auto else options.prepare
    connection.settled = False if options.prepare is None else None
    asked_at = ticks()
    try:
        rows = connection.rows(_GREETING, (options.schema,))
    except StoreError as exc:
        if isinstance(exc.__cause__, _MISSING):
            raise SchemaVersionError(None, SCHEMA_VERSION) from exc.__cause__
        raise
    if not rows:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    backend, recovering, encoding, micros, version, oldest, hidden, other, zeroed = rows[0]
    _check_encoding(encoding)
    if recovering and not options.replica:
        raise StoreUnavailable(
            f"{options.place}: the server is in recovery; its data may be of any age"
        )
    if hidden:
        raise StoreUnavailable(
            f"{options.place}: row-level security hides rows of {hidden} from this role"
        )
    if zeroed:  # only a superuser could turn it off for this session
        raise StoreUnavailable(f"{options.place}: zero_damaged_pages is on, which drops rows")
    if other:  # a view, for example, may show fewer rows
        raise StoreUnavailable(f"{options.place}: {other} must be a table")
    # A pooler reports a backend pid that it made up. Behind it, the next transaction may be in
    # another session, so nothing is prepared, and settings do not last.
    direct = backend == connection.info.backend_pid
    connection.settled = direct and options.prepare is not None
    if auto and direct:
        connection.prepare_threshold, connection.prepares = _PREPARED_AFTER, True
    clock.set(micros, asked_at)
    return version, oldest


def _check_encoding(encoding: str) -> None:
    if encoding != "UTF8":
        raise StoreConfigError(f"the database's encoding is {encoding}; ipguard needs UTF8")


def check(connection: Connection, options: Options, clock: ServerClock) -> None:
    """Raise StoreUnavailable unless a new connection leads to a database that can be used."""
    try:
        check_schema(*greet(connection, options, clock))
    except StoreUnavailable:
        raise
    except StoreError as exc:
        raise StoreUnavailable(f"{options.place}: {exc}") from exc


def prepare(
    connection: Connection, options: Options, clock: ServerClock, *, migrate: bool | None
) -> None:
    """Check the first connection of a store, and create or migrate the schema.

    Args:
        connection: The connection.
        options: The options of the store.
        clock: The clock to set.
        migrate: True: it must be possible. None: if the role may. False: only check.
    """
    oldest = 0
    try:
        version, oldest = greet(connection, options, clock)
        check_schema(version, oldest)
    except SchemaVersionError as exc:
        if migrate is False or oldest > SCHEMA_VERSION:
            raise
        try:
            _migrate(connection, options)
        except StoreError as failure:
            if migrate is None and isinstance(failure.__cause__, _NOT_ALLOWED):
                raise exc from failure
            if isinstance(failure.__cause__, errors.DuplicateTable):
                raise StoreConfigError(
                    f"the schema {options.schema} has tables of another program"
                ) from failure.__cause__
            raise
        check_schema(*greet(connection, options, clock))


def _migrate(connection: Connection, options: Options) -> None:
    """Bring the schema up to date, in one transaction, one process at a time."""
    schema, milliseconds = quoted(options.schema), int(options.bulk_timeout * 1000)
    connection.patience = options.bulk_timeout
    connection.begin(
        f"{BEGIN}; SET LOCAL lock_timeout = {milliseconds};"
        f" SET LOCAL statement_timeout = {milliseconds}"
    )
    connection.rows(
        f"SELECT pg_advisory_xact_lock({_LOCK}::int, hashtext(?::text))", (options.schema,)
    )
    # CREATE SCHEMA IF NOT EXISTS needs more rights even if the schema exists.
    ((there, encoding),) = connection.rows(
        "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = ?),"
        " current_setting('server_encoding')",
        (options.schema,),
    )
    _check_encoding(encoding)
    if not there:
        connection.script(f"CREATE SCHEMA {schema}")
    connection.script(f"SET LOCAL search_path TO {schema}, pg_temp")
    ((version,),) = connection.rows(
        "SELECT COALESCE((SELECT c.oid::bigint FROM pg_class c WHERE c.oid ="
        " to_regclass('schema_version')), 0)"
    )
    if version:
        found = connection.rows("SELECT version FROM schema_version WHERE id = 1")
        if not found:
            raise StoreUnavailable(f"{options.place}: {UNFINISHED}")
        ((version,),) = found
    for number, text in migrations("postgresql"):
        if number > version:
            connection.script(text)
            _log.info("%s: schema brought to version %d", options.place, number)
    connection.script("COMMIT")


# ----------------------------------------------------------------------------- roles

_READER: Final = """
GRANT SELECT ON {schema}.schema_version, {schema}.zz_restore_marker TO {role};
GRANT SELECT ON {schema}.head, {schema}.restrictions TO {role};
GRANT SELECT (revision, token, touched) ON {schema}.changes TO {role};
GRANT SELECT (username, removed) ON {schema}.users TO {role};
"""
_WRITER: Final = """
GRANT SELECT ON {schema}.schema_version, {schema}.zz_restore_marker TO {role};
GRANT SELECT, UPDATE ON {schema}.head TO {role};
GRANT SELECT, INSERT ON {schema}.changes TO {role};
GRANT SELECT, INSERT, UPDATE ON {schema}.users, {schema}.requests, {schema}.failures TO {role};
GRANT SELECT, INSERT, DELETE ON {schema}.restrictions, {schema}.search_terms TO {role};
"""


def grants(*, schema: str = "ipguard", reader: str | None = None, writer: str | None = None) -> str:
    """Return the SQL that grants roles what they need and no more; the schema's owner runs it.

    Only migrations and `prune` need the owner. The roles must exist. The SQL can be run again.

    Args:
        schema: The schema that holds the tables.
        reader: The role of login servers: it changes nothing, and cannot read digests and e-mail
            addresses.
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
