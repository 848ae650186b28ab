"""`init` and `migrate`: a new store, and one of an older version."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import Annotated

import typer

from ipguard.cli._app import KEY, command
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.errors import StoreError

_KEY_BYTES = 32


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, KEY)(init)
    command(app)(migrate)


def init(call: Call) -> None:
    """Make a store and the key of its confirmation numbers.

    The key file is readable by its owner alone. One that is there is never overwritten: who loses a
    key loses the numbers that are on their way.
    """
    path = call.given["key_file"] or os.environ.get("IPGUARD_KEY_FILE")
    if not path:
        raise Problem(
            Exit.USAGE, "where should the key be kept?", hint="--key-file, or IPGUARD_KEY_FILE"
        )
    there = _is_there(call)
    _write_key(path)
    try:
        with call.store(migrate=True) as store:
            place = repr(store).strip("<>")
            revision = store.changes_since(None).head
    except BaseException:
        with suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        raise
    if call.out.as_json:
        full = os.path.abspath(path)  # noqa: PTH100 - resolves no link, as wanted
        call.out.data({"store": place, "made": not there, "revision": revision, "key_file": full})
        return
    new = f"was there already, at revision {revision}" if there else "made"
    call.out.line(f"store: {place}: {new}", "green")
    call.out.line(f"key: {path}: made; give all servers the same, and keep a copy", "green")
    call.out.line("next: ipguard users import FILE")


def _is_there(call: Call) -> bool:
    try:
        with call.store() as store:
            store.changes_since(None)
    except StoreError:
        return False
    return True


def _write_key(path: str) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise Problem(
            Exit.CONFIG,
            f"{path} is there already, and is not overwritten",
            hint="name another file; or use this key, and `ipguard migrate` makes the store alone",
        ) from None
    with os.fdopen(handle, "w") as file:
        os.fchmod(handle, 0o600)
        file.write(secrets.token_hex(_KEY_BYTES) + "\n")
        file.flush()
        os.fsync(handle)


def migrate(
    call: Call,
    *,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL instead; the store is not touched.")
    ] = False,
    since: Annotated[
        int, typer.Option("--since", metavar="VERSION", help="With --sql: what is there already.")
    ] = 0,
    reader: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="With --sql: grants for the role of login servers."),
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="With --sql: grants for the role of administration."),
    ] = None,
) -> None:
    """Bring the store's schema up to date.

    Or print the SQL that does so. Servers of the version before run on meanwhile.
    """
    if sql:
        _print_sql(call, since, reader, writer)
        return
    if since or reader or writer:
        raise Problem(Exit.USAGE, "--since, --reader and --writer go with --sql")
    with call.store(migrate=True) as store:
        place = repr(store).strip("<>")
        head = store.changes_since(None).head
    if call.out.as_json:
        call.out.data({"store": place, "revision": head})
    else:
        call.out.line(f"store: {place}: its schema is up to date", "green")


def _print_sql(call: Call, since: int, reader: str | None, writer: str | None) -> None:
    scheme = call.url.partition("://")[0].lower()
    if scheme == "sqlite":
        from ipguard.stores import sqlite

        if reader or writer:
            raise Problem(Exit.USAGE, "SQLite has no roles")
        parts = [(number, text) for number, text in sqlite.migrations() if number > since]
        grants = ""
    elif scheme in ("postgresql", "postgres"):
        parts, grants = _postgres(call.url, since, reader, writer)
    else:
        raise Problem(Exit.CONFIG, f"the store of {scheme}:// says nothing about its SQL")
    if call.out.as_json:
        shown = [{"version": number, "sql": text} for number, text in parts]
        call.out.data({"migrations": shown, "grants": grants})
        return
    for number, text in parts:
        call.out.raw(f"-- version {number}\nBEGIN;\n{text.rstrip()}\nCOMMIT;\n")
    if grants:
        call.out.raw(grants.rstrip() + "\n")


def _postgres(
    url: str, since: int, reader: str | None, writer: str | None
) -> tuple[list[tuple[int, str]], str]:
    try:
        from ipguard.stores import postgres
    except ImportError:
        raise Problem(
            Exit.CONFIG, 'postgresql:// needs its driver: pip install "ipguard[postgres]"'
        ) from None
    return postgres.deployment_sql(url, since=since, reader=reader, writer=writer)
