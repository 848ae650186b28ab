"""Create a store and its key with `init`; update the schema with `migrate`."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import Annotated

from typer import Option

from ipguard.cli._context import KEY, Context, command
from ipguard.cli._output import Exit, Problem
from ipguard.cli._secrets import key_in_environment, read_keys
from ipguard.errors import StoreError

_KEY_BYTES = 32


@command(KEY)
def init(context: Context) -> None:
    """Create a store, and a new key for its numbers.

    Only the owner can read the key file. An existing file is never overwritten, because losing a
    key invalidates the numbers that were mailed. If IPGUARD_KEY holds the key and no key file is
    named, only the store is created.

    Example: ipguard init --store sqlite:///ipguard.db --key-file ipguard.key
    """
    path = context.options["key_file"]
    if not path:
        if not key_in_environment():
            hint = "use --key-file or IPGUARD_KEY_FILE; or IPGUARD_KEY with the key itself"
            raise Problem(Exit.USAGE, "no place to keep the key", hint)
        read_keys(None)
    existed = _exists(context)
    if path:
        _write_key(path)
    try:
        with context.store(migrate=True) as store:
            place = repr(store).strip("<>")
            revision = store.changes_since(None).head
    except BaseException:
        if path:
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108
        raise
    # abspath, unlike Path.resolve, does not follow symbolic links.
    full = os.path.abspath(path) if path else None  # noqa: PTH100
    made = {"store": place, "made": not existed, "revision": revision, "key_file": full}
    context.out.data(made)
    state = f"exists already, at revision {revision}" if existed else "created"
    context.out.line(f"store: {place}: {state}", "green")
    key = f"{path}: created; copy it to all servers, and keep a backup" if path else "IPGUARD_KEY"
    context.out.line(f"key: {key}", "green")
    context.out.line("next: ipguard users import FILE")


def _exists(context: Context) -> bool:
    try:
        with context.store() as store:
            store.changes_since(None)
    except StoreError:
        return False
    return True


def _write_key(path: str) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        hint = "name another file; or use this key, and `ipguard migrate` creates the store"
        message = f"{path} exists already and is not overwritten"
        raise Problem(Exit.CONFIG, message, hint) from None
    with os.fdopen(handle, "w") as file:
        os.fchmod(handle, 0o600)
        file.write(secrets.token_hex(_KEY_BYTES) + "\n")
        file.flush()
        os.fsync(handle)


@command()
def migrate(
    context: Context,
    *,
    sql: Annotated[bool, Option("--sql", help="Print the SQL instead of running it.")] = False,
    since: Annotated[
        int, Option("--since", metavar="VERSION", help="With --sql: the present schema version.")
    ] = 0,
    reader: Annotated[
        str | None, Option(metavar="ROLE", help="With --sql: the role of login servers.")
    ] = None,
    writer: Annotated[
        str | None, Option(metavar="ROLE", help="With --sql: the role of administration.")
    ] = None,
) -> None:
    """Update the store's schema, or print the SQL that does.

    Servers with the previous version of ipguard keep running during the update.

    Example: ipguard migrate --sql --reader logins --writer admin_site | psql
    """
    if sql:
        _print_sql(context, since, reader, writer)
        return
    if since or reader or writer:
        raise Problem(Exit.USAGE, "--since, --reader and --writer need --sql")
    with context.store(migrate=True) as store:
        place = repr(store).strip("<>")
        head = store.changes_since(None).head
    context.out.data({"store": place, "revision": head})
    context.out.line(f"store: {place}: its schema is up to date", "green")


def _print_sql(context: Context, since: int, reader: str | None, writer: str | None) -> None:
    url, grants = context.url, ""
    if context.scheme == "sqlite":
        from ipguard.stores import sqlite

        if reader or writer:
            raise Problem(Exit.USAGE, "SQLite has no roles")
        parts = [(number, text) for number, text in sqlite.migrations() if number > since]
    elif context.scheme == "postgresql":
        try:
            from ipguard.stores import postgres
        except ImportError:
            message = 'postgresql:// needs its driver: pip install "ipguard[postgres]"'
            raise Problem(Exit.CONFIG, message) from None
        parts, grants = postgres.deployment_sql(url, since=since, reader=reader, writer=writer)
    else:
        raise Problem(Exit.CONFIG, f"the store of {context.scheme}:// does not publish its SQL")
    if context.out.as_json:
        shown = [{"version": number, "sql": text} for number, text in parts]
        context.out.data({"migrations": shown, "grants": grants})
        return
    for number, text in parts:
        context.out.raw(f"-- version {number}\nBEGIN;\n{text.rstrip()}\nCOMMIT;\n")
    if grants:
        context.out.raw(grants.rstrip() + "\n")
