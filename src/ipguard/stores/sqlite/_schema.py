"""The checks of an SQLite file when it is opened, and its migrations."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from typing import Final

from ipguard.errors import SchemaVersionError, StoreConfigError, StoreUnavailable
from ipguard.stores._sql import SCHEMA_VERSION, check_schema, migrations
from ipguard.stores.sqlite._pool import Connection, Pool, create_file

_log = logging.getLogger("ipguard.stores")

APPLICATION_ID: Final = 0x49504764  # as in the first migration

_UNUSABLE: Final = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; may this user write to it and to its directory?",
    sqlite3.SQLITE_READONLY: "may not be written to by this user",
    sqlite3.SQLITE_PERM: "may not be used by this user",
}


def check(connection: Connection) -> None:
    """Check that a new connection leads to a database that can be used.

    Raises:
        StoreUnavailable: It does not, although it did when the store was opened.
    """
    if connection.rows("PRAGMA application_id") != [(APPLICATION_ID,)]:
        raise StoreUnavailable(f"{connection.path}: is not an ipguard database any more")
    _use_wal(connection)  # a restored copy of the file may have lost it
    connection.check_schema()


def prepare(pool: Pool, *, migrate: bool) -> None:
    """Check a file, and create or migrate it if `migrate`; leave no connection open.

    Raises:
        StoreConfigError: The file cannot be used.
        SchemaVersionError: Its schema cannot be used.
        StoreUnavailable: Others keep it locked.
    """
    path = pool.path
    if migrate:
        create_file(path)
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as exc:
        raise StoreConfigError(f"{path}: {exc.strerror}") from exc
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        raise StoreConfigError(f"{path}: is not a file")
    _refuse_second_name(path, found.st_nlink)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("%s: users other than its owner have access (mode %o)", path, mode & 0o777)
    pool.check = lambda connection: _prepare(connection, migrate=migrate)
    try:
        with pool.connection():
            pool.check = check
    except StoreUnavailable as exc:
        code = getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF
        if code not in _UNUSABLE:
            raise
        raise StoreConfigError(f"{path}: {_UNUSABLE[code]}") from exc.__cause__
    pool.forget()  # so that a fork inherits no connection


def _refuse_second_name(path: str, links: int) -> None:
    """Refuse a file that others may use under another name.

    SQLite finds the log and the index by the file's name. With two names, because of a hard link or
    of a file that is mounted alone into containers, there are two logs, whose commits overwrite
    each other.
    """
    if links > 1:
        raise StoreConfigError(f"{path}: has a second hard link; remove one of the two names")
    if _is_mounted(path):
        raise StoreConfigError(
            f"{path}: is mounted alone; mount its folder instead, as the -wal and -shm files beside"
            " it belong to it"
        )


def _is_mounted(path: str) -> bool:
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:  # noqa: PTH123
            points = [line.split()[4] for line in mounts]
    except OSError:  # not Linux: a mounted file is on another file system than its folder
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev  # noqa: PTH116, PTH120
    # The kernel escapes these four characters.
    name = os.fsencode(path).replace(b"\\", b"\\134")
    for plain, escaped in ((b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        name = name.replace(plain, escaped)
    return name in points


def _prepare(connection: Connection, *, migrate: bool) -> None:
    with connection.snapshot():
        found = _found(connection)
    if migrate and (found is None or found[0] < SCHEMA_VERSION):
        _use_wal(connection)
        connection.run("BEGIN IMMEDIATE")
        found = _found(connection)  # another process may have been faster
        version = found[0] if found else 0
        for number, text in migrations("sqlite"):
            if number > version:
                for statement in _statements(text):
                    connection.run(statement)
        connection.run("COMMIT")
        found = _found(connection)
        if not version:
            # Expected at first, but wrong if a file was lost: an empty store restricts no user.
            _log.warning("%s: created a new store, in which no user is restricted", connection.path)
    if found is None:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    check_schema(*found)
    check(connection)


def _found(connection: Connection) -> tuple[int, int] | None:
    """Return the version and the oldest compatible version of the schema; None if there is none."""
    ((application,),) = connection.rows("PRAGMA application_id")
    ((tables,),) = connection.rows("SELECT count(*) FROM sqlite_master")
    if application == 0 and tables == 0:
        return None
    if application != APPLICATION_ID:
        raise StoreConfigError(f"{connection.path}: is a database of another program")
    return connection.schema_version()


def _statements(text: str) -> Iterator[str]:
    """Split a script; `executescript` would commit the transaction that it must run in."""
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _use_wal(connection: Connection) -> None:
    ((mode,),) = connection.rows("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StoreConfigError(f"{connection.path}: SQLite has no WAL on this file system")
