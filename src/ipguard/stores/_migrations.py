"""The numbered SQL files, and which schemas this library may use."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from ipguard.errors import SchemaVersionError

SCHEMA_VERSION: Final = 3
"""The schema that this library was written for: the number of the last migration."""


def migrations(dialect: str) -> list[tuple[int, str]]:
    """Return the SQL that leads from an empty database to this library's schema.

    Args:
        dialect: `sqlite` or `postgresql`.

    Returns:
        Version and SQL text, in the order in which they are to be applied, each text within one
        transaction.
    """
    folder = files("ipguard.stores") / "migrations" / dialect
    found = sorted((item.name, item) for item in folder.iterdir() if item.name.endswith(".sql"))
    return [(int(name.partition("_")[0]), item.read_text("utf-8")) for name, item in found]


def check_schema(version: int, oldest: int) -> None:
    """Refuse a schema that this library may not use.

    A newer schema is fine as long as it says so: servers run on while it is rolled out.

    Args:
        version: The schema's version.
        oldest: The oldest schema that a library must have been written for to use it.

    Raises:
        SchemaVersionError: The schema is too old, or too new.
    """
    if version < SCHEMA_VERSION:
        raise SchemaVersionError(version, SCHEMA_VERSION)
    if oldest > SCHEMA_VERSION:
        raise SchemaVersionError(version, oldest)
