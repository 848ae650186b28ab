"""The stores, and `open_store`, which opens the one that a URL names.

Importing this package loads no store and no database driver.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, unquote

from ipguard.errors import StoreConfigError, shorten
from ipguard.store import RestrictionStore

__all__ = ["open_store"]

Clock = Callable[[], datetime]
_GROUP = "ipguard.stores"


def open_store(
    url: str, *, clock: Clock | None = None, migrate: bool | None = None
) -> RestrictionStore:
    """Open the store that a URL names.

    - `memory://`: in this process, for tests and demonstrations.
    - `sqlite:///relative.db`, `sqlite:////absolute/path.db`: one file. `?timeout=5.0` is how many
      seconds a call waits for other writers. The path is percent-decoded.
    - `postgresql://user@host/database`: a server; needs the extra `postgres`.
    - Any other scheme: an entry point of the group `ipguard.stores` with that name, a callable that
      takes `(url, *, clock, migrate)`.

    Args:
        url: Where the store is.
        clock: Returns the current time as an aware datetime. By default, PostgreSQL uses the
            server's clock, and the other stores the host's.
        migrate: Whether to create the schema or bring it up to date. None: if that is allowed.
            False only checks it.

    Returns:
        The store; the caller closes it.

    Raises:
        StoreConfigError: The URL is invalid, or names a store that is unknown or not installed;
            or the store cannot be used as the URL says.
        SchemaVersionError: The schema is not one that this library can use.
        StoreUnavailable: Others keep the store locked.
    """
    if not isinstance(url, str):
        raise StoreConfigError(f"a store's URL is text, not {type(url).__name__}")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or not scheme:
        raise StoreConfigError(f"a store's URL begins with one of {_known()}")
    if scheme == "memory":
        from ipguard.stores.memory import MemoryStore

        if rest.strip("/"):
            raise StoreConfigError("memory:// has no path and no options")
        return MemoryStore(clock=clock)
    if scheme == "sqlite":
        from ipguard.stores.sqlite import SQLiteStore

        path, timeout = _sqlite_options(rest)
        return SQLiteStore(path, timeout=timeout, clock=clock, migrate=migrate)
    factory = _postgres() if scheme in ("postgresql", "postgres") else _plugin(scheme)
    store: RestrictionStore = factory(url, clock=clock, migrate=migrate)
    return store


def _sqlite_options(rest: str) -> tuple[str, float]:
    """Return the path and the timeout of an SQLite URL."""
    place, _, query = rest.partition("?")
    if not place.startswith("/"):
        raise StoreConfigError(
            "sqlite:// names no host: write sqlite:///relative.db or sqlite:////absolute/path.db"
        )
    pairs: list[tuple[str, str]] | None = None
    with suppress(ValueError):  # its message contains a part of the URL
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    if pairs is None:
        raise StoreConfigError("options are written ?name=value&name=value")
    options = dict(pairs)
    if len(options) < len(pairs):
        raise StoreConfigError("each option is given once")
    for name in options:
        if name != "timeout":
            raise StoreConfigError(f"sqlite:// has no option {shorten(name)}; it has timeout")
    timeout = 0.0  # refused by the store
    with suppress(ValueError):
        timeout = float(options.get("timeout", "5.0"))
    return unquote(place[1:], errors="surrogateescape"), timeout


def _postgres() -> Callable[..., Any]:
    # By name, because the driver that the module imports may be missing.
    from importlib import import_module

    try:
        store: Callable[..., Any] = import_module("ipguard.stores.postgres").PostgresStore
    except ImportError as exc:
        raise StoreConfigError(
            'postgresql:// needs its driver: pip install "ipguard[postgres]"'
        ) from exc
    return store


def _plugin(scheme: str) -> Callable[..., Any]:
    found = [point for point in _plugins() if point.name == scheme]
    if not found:
        raise StoreConfigError(f"no store has the scheme {shorten(scheme)}; there is {_known()}")
    try:
        factory: Callable[..., Any] = found[0].load()
    except (ImportError, AttributeError) as exc:
        raise StoreConfigError(f"the store of {shorten(scheme)} cannot be loaded: {exc}") from exc
    return factory


def _known() -> str:
    others = sorted({point.name for point in _plugins()})
    return ", ".join(f"{name}://" for name in ("memory", "sqlite", "postgresql", *others))


def _plugins() -> list[Any]:
    # Imported late: it loads many modules, and most hosts never need it.
    from importlib.metadata import entry_points

    return list(entry_points(group=_GROUP))
