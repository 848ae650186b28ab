"""The options of the PostgreSQL store, from its URL and keywords."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

import attrs
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from ipguard._checks import check_seconds, check_whole
from ipguard.errors import StoreConfigError, shorten
from ipguard.stores._sql import check_option

_LIBPQ: Final = frozenset(option.keyword.decode() for option in Conninfo.get_defaults())
# Defaults of each connection. With keepalives, even a connection that only listens notices soon
# that the server is gone.
_DEFAULTS: Final = {
    "fallback_application_name": "ipguard",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
}
_ENCODING: Final = {"client_encoding": "utf8"}  # others cannot represent all names
_LISTENER: Final = {"fallback_application_name": "ipguard listener"}
_NAME_AT_MOST: Final = 63  # bytes of an identifier


@attrs.frozen(kw_only=True)
class Options:
    """How the store connects. The `repr` contains no password.

    Attributes:
        servers: A connection string for each server to try, in order.
        listen: The same for the connection that listens; None: do not listen.
        schema: The schema that holds the tables; also the name of the channel.
        prepare: After how many uses a statement is prepared; None: never; -1: if the connection
            allows it, see `_pool.greet`.
        place: Where the store is, for messages.

    The others are options of `PostgresStore`.
    """

    servers: tuple[str, ...] = attrs.field(repr=False)
    listen: tuple[str, ...] | None = attrs.field(repr=False)
    pool_size: int
    timeout: float
    bulk_timeout: float
    schema: str
    prepare: int | None
    replica: bool
    place: str

    @classmethod
    def parse(cls, url: str, keywords: Mapping[str, Any]) -> Options:
        """Parse a URL, and keywords that are not None. No error message contains a secret."""
        dsn, given = _split(url)
        for name, value in keywords.items():
            if value is None:
                continue
            if name in given:
                raise StoreConfigError(f"{name} is given twice: in the URL and as a keyword")
            given[name] = value
        params = _conninfo(dsn)
        listen = given.get("listen", dsn)
        if not isinstance(listen, str):
            raise StoreConfigError('listen must be a URL, or "off"')
        return cls(
            servers=_servers(params),
            listen=None if listen == "off" else _servers(_conninfo(listen) | _LISTENER),
            pool_size=_whole("pool_size", given.get("pool_size", 5), least=1),
            timeout=_seconds("timeout", given.get("timeout", 2.0)),
            bulk_timeout=_seconds("bulk_timeout", given.get("bulk_timeout", 300.0)),
            schema=_schema(given.get("schema", "ipguard")),
            prepare=_prepare(given),
            replica=_one_of("replica", given.get("replica", "refuse"), ("refuse", "allow"))
            == "allow",
            place=_place(params),
        )


_OURS: Final = {field.name for field in attrs.fields(Options)} - {"servers", "place"} | {
    "prepare_threshold"
}


def _split(url: str) -> tuple[str, dict[str, Any]]:
    """Separate the library's own options from the URL for libpq."""
    scheme, separator, rest = url.partition("://")
    address, _, query = f"{scheme.lower()}{separator}{rest}".partition("?")
    given: dict[str, Any] = {}
    others: list[tuple[str, str]] = []
    for pair in query.split("&") if query else ():
        name, equals, value = pair.partition("=")
        name, value = unquote(name), unquote(value)
        if not equals or name in given or name in dict(others):
            raise StoreConfigError("options are written ?name=value&name=value, each once")
        if name in _OURS:
            given[name] = value
        elif name in _LIBPQ or name == "ssl":
            others.append((name, value))
        elif "@" in query:  # most likely a password with a `?` in it
            raise StoreConfigError(_NO_URL)
        else:
            raise StoreConfigError(
                f"postgresql:// has no option {shorten(name)}; it has"
                f" {', '.join(sorted(_OURS))}, and those of libpq"
            )
    return f"{address}?{urlencode(others, quote_via=quote)}" if others else address, given


_NO_URL: Final = (
    "not a PostgreSQL URL: write postgresql://user@host:port/database?option=value,"
    " with special characters percent-encoded"
)


def _conninfo(dsn: str) -> dict[str, Any]:
    # libpq takes the text after the first `@` or `/` for a host or database, which its errors show:
    # if the password contains one of the two, that text is a part of the password.
    authority, _, path = dsn.partition("?")[0].partition("://")[2].partition("/")
    if authority.count("@") < 2 and "@" not in path:
        # The driver's error may contain the password, and would be the context of an error raised
        # inside `except`, even with `from None`.
        with suppress(ProgrammingError, UnicodeError, ValueError):
            return _DEFAULTS | conninfo_to_dict(dsn) | _ENCODING
    raise StoreConfigError(_NO_URL)


def _servers(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one connection string per host: libpq may spend all the time on one that hangs."""
    lists = {name: str(params.get(name) or "").split(",") for name in ("host", "hostaddr", "port")}
    count = max(len(lists["host"]), len(lists["hostaddr"]))
    found = []
    for at in range(count):
        one = dict(params)
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise StoreConfigError(
                    "host, hostaddr and port must have the same number of values"
                )
            value = values[at] if len(values) == count else values[0]
            if name == "port" and value and not (value.isascii() and value.isdecimal()):
                # Part of a password with a `/` in it; errors of libpq would contain it.
                raise StoreConfigError(_NO_URL)
            if value:
                one[name] = value
            else:
                one.pop(name, None)
        found.append(make_conninfo("", **one))
    return tuple(found)


def _place(params: Mapping[str, Any]) -> str:
    host = params.get("host") or params.get("hostaddr") or "localhost"
    return f"{params.get('dbname') or 'the default database'} at {host}"


def _whole(name: str, value: object, *, least: int) -> int:
    return check_option(check_whole, name, _number(int, value), least=least)


def _seconds(name: str, value: object) -> float:
    # The server's settings are milliseconds, as integers of 32 bits.
    return check_option(check_seconds, name, _number(float, value), above=0, most=2_000_000)


def _number(kind: Callable[[str], float], value: object) -> object:
    with suppress(ValueError):
        return kind(value) if isinstance(value, str) else value
    return value


def _schema(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value.encode()) <= _NAME_AT_MOST or "\0" in value:
        raise StoreConfigError(f"schema must be a name of at most {_NAME_AT_MOST} bytes")
    if value.startswith("pg_"):
        raise StoreConfigError("schema: PostgreSQL reserves names that begin with pg_")
    return value


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> object:
    if value not in allowed:
        raise StoreConfigError(f"{name} must be {' or '.join(allowed)}")
    return value


def _prepare(given: Mapping[str, Any]) -> int | None:
    if _one_of("prepare", given.get("prepare", "auto"), ("auto", "on", "off")) == "off":
        return None
    if "prepare_threshold" in given:
        return _whole("prepare_threshold", given["prepare_threshold"], least=0)
    return 0 if given.get("prepare") == "on" else -1
