"""The checks of an SQLite file when it is opened, and its migrations."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from typing import Final

from ipguard import _fork
from ipguard._fork import ReentrantLock
from ipguard.errors import SchemaVersionError, StoreConfigError, StoreUnavailable
from ipguard.stores._sql import (
    SCHEMA_VERSION,
    Executor,
    check_open_schema,
    check_schema,
    migrations,
    schema_version,
)

_log = logging.getLogger("ipguard.stores")

APPLICATION_ID: Final = 0x49504764  # as in the first migration


def check_file(path: str, *, migrate: bool) -> None:
    """Check that a path leads to a file that can be used; create the file if `migrate`."""
    if migrate:
        _create_file(path)
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as exc:
        raise StoreConfigError(f"{path}: {exc.strerror}") from exc
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        raise StoreConfigError(f"{path}: is not a file")
    # SQLite finds the log and the index by the file's name. With two names, because of a hard link
    # or of a file that is mounted alone into containers, there are two logs, whose commits
    # overwrite each other.
    if found.st_nlink > 1:
        raise StoreConfigError(f"{path}: has a second hard link; remove one of the two names")
    if _is_mounted(path):
        raise StoreConfigError(
            f"{path}: is mounted alone; mount its folder instead, as the -wal and -shm files beside"
            " it belong to it"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("%s: users other than its owner have access (mode %o)", path, mode & 0o777)


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


def prepare(db: Executor, path: str, *, migrate: bool) -> None:
    """Check the first connection of a store, and create or migrate the schema if `migrate`."""
    db.run("BEGIN")
    found = _found(db, path)
    db.run("COMMIT")
    if migrate and (found is None or found[0] < SCHEMA_VERSION):
        _use_wal(db, path)
        db.run("BEGIN IMMEDIATE")
        found = _found(db, path)  # another process may have been faster
        version = found[0] if found else 0
        for number, text in migrations("sqlite"):
            if number > version:
                for statement in _statements(text):
                    db.run(statement)
        db.run("COMMIT")
        found = _found(db, path)
        if not version:
            # Expected at first, but wrong if a file was lost: an empty store restricts no user.
            _log.warning("%s: created a new store, in which no user is restricted", path)
    if found is None:
        raise SchemaVersionError(None, SCHEMA_VERSION)
    check_schema(*found)
    check(db, path)


def check(db: Executor, path: str) -> None:
    """Check that a new connection still leads to a database that can be used."""
    if db.rows("PRAGMA application_id") != [(APPLICATION_ID,)]:
        raise StoreUnavailable(f"{path}: is not an ipguard database any more")
    _use_wal(db, path)  # a restored copy of the file may have lost it
    check_open_schema(*schema_version(db))


def _found(db: Executor, path: str) -> tuple[int, int] | None:
    """Return the version and the oldest compatible version of the schema; None if there is none."""
    ((application,),) = db.rows("PRAGMA application_id")
    ((tables,),) = db.rows("SELECT count(*) FROM sqlite_master")
    if application == 0 and tables == 0:
        return None
    if application != APPLICATION_ID:
        raise StoreConfigError(f"{path}: is a database of another program")
    return schema_version(db)


def _statements(text: str) -> Iterator[str]:
    """Split a script; `executescript` would commit the transaction that it must run in."""
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _use_wal(db: Executor, path: str) -> None:
    ((mode,),) = db.rows("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise StoreConfigError(f"{path}: SQLite has no WAL on this file system")


# Creating a file opens and closes it, and closing drops all locks of the process on it: no other
# thread may open it in between.
_creating = ReentrantLock()


def _create_file(path: str) -> None:
    """Create an empty file, readable by its owner alone, unless it exists."""
    _fork.check()
    with _creating:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return
        except OSError as exc:
            raise StoreConfigError(f"{path}: cannot be created: {exc.strerror}") from exc


class _FileLock(_fork.Forkable):
    def _after_fork_in_child(self) -> None:
        global _creating  # noqa: PLW0603 - a thread of the parent may hold it
        _creating = ReentrantLock()


_file_lock = _FileLock()
_fork.register(_file_lock)
