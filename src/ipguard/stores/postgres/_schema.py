"""The schema in PostgreSQL: made, checked with each new connection, and who may do what in it."""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

from psycopg import errors

from ipguard.errors import SchemaVersionError, StoreConfigError, StoreError, StoreUnavailable
from ipguard.stores._sql import SCHEMA_VERSION, check_schema, migrations
from ipguard.stores._sql.policies import UNFINISHED
from ipguard.stores.postgres._connection import BEGIN, Session, quoted, ticks
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

`pg_restore --jobs` may restore the restore marker before it has filled other tables, but it makes
the indexes of a table only when that table is filled. A name without an index is an error when the
statement is parsed, so that a prepared statement does not pay for it.
"""
RESTORE: Final = "m.tableoid::bigint || '.' || m.xmin::text"
"""Which restore made the tables: the marker `m` is written once, by a transaction of its own."""
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


class Greeting(NamedTuple):
    """What a new connection turned out to be."""

    asked_at: float  # the `ticks` before it was asked
    micros: int
    version: int
    oldest: int


def greet(session: Session, options: Options) -> Greeting:
    """Find out what a new connection leads to, and whether statements may be prepared on it.

    Raises:
        SchemaVersionError: There is no schema.
        StoreConfigError: The database cannot be used, or not by this role.
        StoreUnavailable: The server does not answer, or is in recovery.
    """
    connection = session.connection
    auto = options.prepare == -1
    connection.prepare_threshold = None if auto else options.prepare
    connection.settled = False if options.prepare is None else None
    asked_at = ticks()
    try:
        rows = session.rows(_GREETING, (options.schema,))
    except StoreError as exc:
        if isinstance(exc.__cause__, _MISSING):
            raise SchemaVersionError(None, SCHEMA_VERSION) from exc.__cause__
        raise
    if not rows:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    backend, recovering, encoding, micros, version, oldest, hidden, other, zeroed = rows[0]
    if encoding != "UTF8":
        raise StoreConfigError(f"the database's encoding is {encoding}; ipguard needs UTF8")
    if recovering and not options.replica:
        raise StoreUnavailable(
            f"{options.place}: the server is in recovery; what it holds may be of any age"
        )
    if hidden:
        raise StoreUnavailable(
            f"{options.place}: row-level security hides rows of {hidden} from this role"
        )
    if zeroed:  # only a superuser could switch it off for this session
        raise StoreUnavailable(f"{options.place}: zero_damaged_pages is on, which drops rows")
    if other:  # as of a view, which may show fewer rows
        raise StoreUnavailable(f"{options.place}: {other} must be a table")
    # A pooler reports a process number that it made up. Behind it, the next transaction may be on
    # another session, so nothing is prepared, and settings do not last.
    direct = backend == connection.info.backend_pid
    connection.settled = direct and options.prepare is not None
    if auto and direct:
        connection.prepare_threshold, connection.prepares = _PREPARED_AFTER, True
    return Greeting(asked_at, micros, version, oldest)


def check_version(version: int, oldest: int) -> None:
    """See that the schema is still one that this library may use.

    Raises:
        StoreUnavailable: It is not, though it was when the store was opened.
    """
    try:
        check_schema(version, oldest)
    except SchemaVersionError as exc:
        raise StoreUnavailable(str(exc)) from exc


def prepare(session: Session, options: Options, *, migrate: bool | None) -> Greeting:
    """Greet the first connection of a store, making the schema or bringing it up to date.

    Args:
        session: The connection.
        options: What the store was opened with.
        migrate: True: it must be possible. None: where the role may. False: only check.

    Raises:
        SchemaVersionError: The schema may not be used, and not be made so.
        StoreConfigError: The database cannot be used, or not by this role.
        StoreUnavailable: The server does not answer.
    """
    greeting: Greeting | None = None
    try:
        greeting = greet(session, options)
        check_schema(greeting.version, greeting.oldest)
    except SchemaVersionError as exc:
        newer = greeting is not None and greeting.oldest > SCHEMA_VERSION
        if migrate is False or newer:
            raise
        try:
            _migrate(session, options)
        except StoreError as failure:
            if migrate is None and isinstance(failure.__cause__, _NOT_ALLOWED):
                raise exc from failure
            if isinstance(failure.__cause__, errors.DuplicateTable):
                raise StoreConfigError(
                    f"the schema {options.schema} has tables of another program"
                ) from failure.__cause__
            raise
        greeting = greet(session, options)
        check_schema(greeting.version, greeting.oldest)
    return greeting


def _migrate(session: Session, options: Options) -> None:
    """Bring the schema up to date, in one transaction, one process at a time."""
    schema, milliseconds = quoted(options.schema), int(options.bulk_timeout * 1000)
    session.patience = options.bulk_timeout
    try:
        session.begin(
            f"{BEGIN}; SET LOCAL lock_timeout = {milliseconds};"
            f" SET LOCAL statement_timeout = {milliseconds}"
        )
        session.rows(
            f"SELECT pg_advisory_xact_lock({_LOCK}::int, hashtext(?::text))", (options.schema,)
        )
        # CREATE SCHEMA IF NOT EXISTS asks for more rights, whether it is there or not.
        ((there,),) = session.rows(
            "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = ?)", (options.schema,)
        )
        if not there:
            session.script(f"CREATE SCHEMA {schema}")
        session.script(f"SET LOCAL search_path TO {schema}, pg_temp")
        ((version,),) = session.rows(
            "SELECT COALESCE((SELECT c.oid::bigint FROM pg_class c WHERE c.oid ="
            " to_regclass('schema_version')), 0)"
        )
        if version:
            found = session.rows("SELECT version FROM schema_version WHERE id = 1")
            if not found:
                raise StoreUnavailable(f"{options.place}: {UNFINISHED}")
            ((version,),) = found
        for number, text in migrations("postgresql"):
            if number > version:
                session.script(text)
                _log.info("%s: schema brought to version %d", options.place, number)
        session.script("COMMIT")
    except BaseException:
        session.connection.close()
        raise


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
    """Return the SQL that gives roles what they need and no more; the schema's owner runs it.

    The owner itself is for migrations and `prune`. The roles must be there; running it again does
    no harm.

    Args:
        schema: The schema that holds the tables.
        reader: The role of login servers: it changes nothing, and sees no digest and no e-mail.
        writer: The role of administration: it adds to the trail, and can neither change nor delete
            what is there. It also needs TEMPORARY on the database, which everybody has by default.
    """
    place, text = quoted(schema), ""
    for role, rights in ((reader, _READER), (writer, _WRITER)):
        if role is not None:
            text += f"GRANT USAGE ON SCHEMA {place} TO {quoted(role)};"
            text += rights.format(schema=place, role=quoted(role))
    return text
