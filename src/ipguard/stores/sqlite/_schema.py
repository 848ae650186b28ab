"""Opening an SQLite file for the first time: is it ours, and is its schema one that we may use?"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from typing import Final

from ipguard.errors import SchemaVersionError, StoreConfigError, StoreUnavailable
from ipguard.stores._sql import SCHEMA_VERSION, check_schema, migrations
from ipguard.stores._sql.policies import UNFINISHED
from ipguard.stores.sqlite._pool import Pool, Session, make_file

_log = logging.getLogger("ipguard.stores")

APPLICATION_ID: Final = 0x49504764  # as in the first migration

_VERSION: Final = "SELECT version, oldest FROM schema_version WHERE id = 1"
_UNUSABLE: Final = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; may this user write to it and to its directory?",
    sqlite3.SQLITE_READONLY: "may not be written to by this user",
    sqlite3.SQLITE_PERM: "may not be used by this user",
}


def check(session: Session) -> None:
    """See that a new connection is to a database that may be used; run for each.

    Raises:
        StoreUnavailable: It is not, though it was when the store was opened.
    """
    if session.rows("PRAGMA application_id") != [(APPLICATION_ID,)]:
        raise StoreUnavailable(f"{session.path}: holds no ipguard database any more")
    _use_wal(session)  # a property of the file, which a restored copy may have lost
    check_version(session)


def check_version(session: Session) -> None:
    """See that the schema is still one that this library may use.

    Raises:
        StoreUnavailable: It was migrated since, to one that is not.
    """
    try:
        check_schema(*_version(session))
    except SchemaVersionError as exc:
        raise StoreUnavailable(f"{session.path}: {exc}") from exc


def prepare(pool: Pool, *, migrate: bool) -> None:
    """Make the file and its schema as far as may be, else say what is wrong; keep nothing open.

    Raises:
        StoreConfigError: The file cannot be used.
        SchemaVersionError: Its schema may not be used.
        StoreUnavailable: It is kept locked by others.
    """
    path = pool.path
    if migrate:
        make_file(path)
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as exc:
        raise StoreConfigError(f"{path}: {exc.strerror}") from exc
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        raise StoreConfigError(f"{path}: is not a file")
    _refuse_second_name(path, found.st_nlink)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("%s: others than its owner have rights to it (mode %o)", path, mode & 0o777)
    pool.check = lambda session: _prepare(session, migrate=migrate)
    try:
        with pool.session():
            pool.check = check
    except StoreUnavailable as exc:
        code = getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF
        if code not in _UNUSABLE:
            raise
        raise StoreConfigError(f"{path}: {_UNUSABLE[code]}") from exc.__cause__
    pool.forget()  # a fork then has nothing to close


def _refuse_second_name(path: str, links: int) -> None:
    """Refuse a file that others may use under another name.

    SQLite finds the log and the index by the file's name. Two names mean two logs, whose commits
    overwrite each other: a file that is mounted alone into containers, or has a second hard link.
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
    except OSError:  # not Linux: a file of another file system than its folder's is mounted
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev  # noqa: PTH116, PTH120
    # The kernel escapes these four characters.
    name = os.fsencode(path).replace(b"\\", b"\\134")
    for plain, escaped in ((b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        name = name.replace(plain, escaped)
    return name in points


def _prepare(session: Session, *, migrate: bool) -> None:
    with session.snapshot():
        found = _found(session)
    if migrate and (found is None or found[0] < SCHEMA_VERSION):
        _use_wal(session)
        session.run("BEGIN IMMEDIATE")
        found = _found(session)  # another process may have been faster
        version = found[0] if found else 0
        for number, text in migrations("sqlite"):
            if number > version:
                for statement in _statements(text):
                    session.run(statement)
        session.run("COMMIT")
        found = _found(session)
        if not version:
            # Right at first, wrong where a file was lost: nobody is restricted in an empty one.
            _log.warning("%s: made a new store, in which nobody is restricted", session.path)
    if found is None:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    check_schema(*found)
    check(session)


def _found(session: Session) -> tuple[int, int] | None:
    """Return the schema's version and the oldest to know for using it; None for no schema."""
    ((application,),) = session.rows("PRAGMA application_id")
    ((tables,),) = session.rows("SELECT count(*) FROM sqlite_master")
    if application == 0 and tables == 0:
        return None
    if application != APPLICATION_ID:
        raise StoreConfigError(f"{session.path}: is the database of another program")
    return _version(session)


def _version(session: Session) -> tuple[int, int]:
    for version, oldest in session.rows(_VERSION):
        return version, oldest
    raise StoreUnavailable(f"{session.path}: {UNFINISHED}")


def _statements(text: str) -> Iterator[str]:
    """Split a script; `executescript` would commit the transaction that it has to run in."""
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _use_wal(session: Session) -> None:
    ((mode,),) = session.rows("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StoreConfigError(f"{session.path}: SQLite has no WAL on this file system")
