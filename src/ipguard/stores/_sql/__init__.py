"""Shared by the SQL stores: `Executor`, the layout of values in rows, the reads of guards.

The statements, in the other modules, are portable SQL with `?` for each parameter; an `Executor`
adapts them to its driver. Times are stored as microseconds and addresses as packed bytes, so that
reading them parses no text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import wraps
from importlib.resources import files
from itertools import groupby
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast

import attrs

from ipguard import audit, errors, rules
from ipguard.addresses import AddressRange, AddressSet
from ipguard.audit import micros
from ipguard.model import (
    EVERYBODY,
    RESET,
    Approval,
    Change,
    Changes,
    Demand,
    Direction,
    Impact,
    PendingRequest,
    Policy,
    RequestKind,
    RequestState,
    Restriction,
    Sighting,
    StoredRequest,
    User,
)
from ipguard.row import pack_columns

P = ParamSpec("P")
T = TypeVar("T")
Row = tuple[Any, ...]
Params = Sequence[object]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_SHOWN: Final = 256
BIGGEST: Final = 2**63 - 1
"""The largest number in a column; larger arguments are replaced by it."""

UNFINISHED: Final = (
    "the database is being restored, or a restore was left unfinished: its restore marker is"
    " missing"
)


class Executor(Protocol):
    """One connection inside one transaction or snapshot."""

    def rows(self, sql: str, params: Params = ()) -> list[Row]:
        """Run a query and return all its rows."""

    def run(self, sql: str, params: Params = ()) -> None:
        """Run a statement."""

    def stream(self, sql: str) -> Iterator[Row]:
        """Yield the rows of a query, of which only some are in memory; other queries may run."""

    def insert_many(self, table: str, columns: str, rows: Iterable[Params]) -> None:
        """Insert many rows, which may come from queries on this connection."""

    def lock_table(self, table: str) -> None:
        """Keep others from writing to a table until the transaction ends."""

    def among(self, column: str) -> str:
        """Return the condition that a column is one of the texts in a parameter."""

    def each(self) -> str:
        """Return a table `j` whose column `value` has the texts in a parameter."""

    def texts(self, values: Iterable[str]) -> object:
        """Return the parameter for `among` and `each`."""


def join_plain(texts: list[str]) -> str | None:
    """Return texts in double quotes, fast even for 100,000; None if one has to be escaped."""
    joined = '","'.join(texts)
    plain = joined.isprintable() and "\\" not in joined
    return f'"{joined}"' if plain and joined.count('"') == 2 * len(texts) - 2 else None


def check_option(check: Callable[..., T], name: str, value: object, **limits: object) -> T:
    """Return an option of a store that passes a check; raise StoreConfigError if it fails."""
    try:
        return check(name, value, **limits)
    except errors.InvalidValue as exc:
        raise errors.StoreConfigError(str(exc)) from None


def _optional_micros(moment: datetime | None) -> int | None:
    return None if moment is None else micros(moment)


def moment(stored: int) -> datetime:
    """Return the datetime of a stored time.

    A row of another program may have a time before year 1 or after year 9999. It is replaced by the
    first or last possible datetime, which leads to the same decisions.
    """
    return rules.shifted(_EPOCH, timedelta(0, 0, stored))


def _optional_moment(stored: int | None) -> datetime | None:
    return None if stored is None else moment(stored)


def encodable(text: str) -> bool:
    """Return whether text can be stored at all: without lone surrogates, and without NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def reads_rows(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that decodes rows: it raises StoreUnavailable for a malformed row."""

    @wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (ArithmeticError, LookupError, TypeError, ValueError) as exc:
            raise errors.StoreUnavailable(f"the store holds a damaged row: {exc}") from exc

    return reading


RESTRICTION: Final = "id, first_ip, last_ip, label, created_at, created_by, expires_at"
"""The columns for `restriction_of`, after the username."""


def columns(names: str, table: str) -> str:
    """Return a list of columns with the name of a table before each."""
    return ", ".join(f"{table}.{name.strip()}" for name in names.split(","))


def marks(names: str) -> str:
    """Return a list of as many `?` as there are columns."""
    return ", ".join("?" * len(names.split(",")))


def make_restriction(username: str, row: Row) -> Restriction:
    """Return a restriction from the columns of `RESTRICTION`, for a caller with `@reads_rows`."""
    restriction_id, first, last, label, created_at, created_by, expires_at = row
    return Restriction(
        id=restriction_id,
        username=username,
        addresses=AddressRange.from_packed(first, last),
        label=label,
        created_at=moment(created_at),
        created_by=created_by,
        expires_at=_optional_moment(expires_at),
    )


restriction_of = reads_rows(make_restriction)
"""`make_restriction` for all other callers: a malformed row is StoreUnavailable."""


def restriction_row(restriction: Restriction) -> Row:
    """Return the username and the columns of `RESTRICTION`."""
    first, last = restriction.addresses.packed
    return (
        restriction.username,
        restriction.id,
        first,
        last,
        restriction.label,
        micros(restriction.created_at),
        restriction.created_by,
        _optional_micros(restriction.expires_at),
    )


PENDING: Final = (
    "id, username, kind, first_ip, last_ip, label, requested_by, requested_at, expires_at, "
    "number_expires_at, attempts_left, state, restriction_id, restriction_expires_at, reason, "
    "batch, content, approvals_needed"
)
"""The columns for `pending_of`."""
_UNSEEN: Final = "email, key_id, digest, resends, mails_failed, sent_at"
REQUEST: Final = f"{PENDING}, {_UNSEEN}"
"""The columns for `request_of`."""
_PENDING_COLUMNS: Final = len(PENDING.split(","))


def _fields(names: str, row: Row) -> dict[str, Any]:
    """Return the values of columns by name. The columns that end in `at` hold times."""
    return {
        name: _optional_moment(value) if name.endswith("at") else value
        for name, value in zip(names.split(", "), row, strict=True)
    }


def _row(names: str, fields: Mapping[str, Any]) -> Row:
    """Return the columns of these names, from values by name."""
    values = ((name, fields[name]) for name in names.split(", "))
    return tuple(
        _optional_micros(value) if name.endswith("at") else value for name, value in values
    )


@reads_rows
def pending_of(row: Row) -> PendingRequest:
    fields = _fields(PENDING, row)
    addresses = (AddressRange.from_packed(fields.pop("first_ip"), fields.pop("last_ip")),)
    restriction_id, content = fields.pop("restriction_id"), fields.pop("content")
    approvals = fields.pop("approvals_needed")
    kind, state = RequestKind(fields.pop("kind")), fields.pop("state")
    state = RequestState.PENDING if state == _OPEN else RequestState(state)
    if content is not None:
        fields |= _read_content(content, approvals)
    elif kind is RequestKind.ADD:
        fields["adds"] = addresses
    else:
        fields |= {"removes": (restriction_id,), "removed": addresses}
    return PendingRequest(**fields, kind=kind, state=state)


@reads_rows
def request_of(row: Row) -> StoredRequest:
    request = pending_of(row[:_PENDING_COLUMNS])
    return StoredRequest(request=request, **_fields(_UNSEEN, row[_PENDING_COLUMNS:]))


def request_row(stored: StoredRequest) -> Row:
    request = stored.request
    first, last = (request.adds or request.removed)[0].packed
    simple = (
        len(request.adds) + len(request.removes) == 1
        and request.demand == Demand(number=True)
        and request.batch is None
    )
    hidden = request.state is RequestState.PENDING and not simple
    coded = {
        "kind": request.kind.value,
        "state": _OPEN if hidden else request.state.value,
        "first_ip": first,
        "last_ip": last,
        "restriction_id": request.removes[0] if request.ends_alone else None,
        "content": _content(request),
        "approvals_needed": request.demand.approvals,
    }
    fields = attrs.asdict(stored, recurse=False) | attrs.asdict(request, recurse=False)
    return _row(REQUEST, fields | coded)


_OPEN: Final = "open"
IS_PENDING: Final = "(state = 'pending' OR state = 'open')"
"""The condition for pending requests; `open` are those that libraries before schema 6 must not see.

A library that cannot read what a request demands would list and confirm it by less. The indexes
have this very condition.
"""


def _content(request: PendingRequest) -> str:
    """Return as JSON what a request has no columns for."""
    impact, demand = request.impact, request.demand
    removes = zip(request.removes, map(_ends, request.removed), strict=True)
    found = {
        "adds": [_ends(each) for each in request.adds],
        "removes": list(removes),
        "demand": [demand.number, demand.wait // _MICROSECOND],
        "numbered": request.numbered,
        "approvals": [attrs.astuple(each) for each in request.approvals],
        "impact": None
        if impact is None
        else [
            int(impact.direction),
            [_ends(each) for each in impact.gained],
            [_ends(each) for each in impact.lost],
            impact.summary,
        ],
    }
    return json.dumps(found, separators=(",", ":"))


def _read_content(text: str, approvals: int) -> dict[str, Any]:
    """Return the fields of a request from its `_content`."""
    found = json.loads(text)
    number, wait = found["demand"]
    impact = None
    if found["impact"] is not None:
        direction, gained, lost, summary = found["impact"]
        impact = Impact(
            direction=Direction(direction),
            gained=AddressSet(map(_range, gained)),
            lost=AddressSet(map(_range, lost)),
            summary=summary,
        )
    names = [field.name for field in attrs.fields(Approval)]
    return {
        "adds": tuple(map(_range, found["adds"])),
        "removes": tuple(restriction_id for restriction_id, _ in found["removes"]),
        "removed": tuple(_range(ends) for _, ends in found["removes"]),
        "demand": Demand(number=number, approvals=approvals, wait=wait * _MICROSECOND),
        "numbered": found["numbered"],
        "approvals": tuple(
            Approval(**dict(zip(names, each, strict=True))) for each in found["approvals"]
        ),
        "impact": impact,
    }


def _ends(addresses: AddressRange) -> tuple[int, int, int]:
    return addresses.version, addresses.first, addresses.last


def _range(ends: Sequence[int]) -> AddressRange:
    version, first, last = ends
    return AddressRange(version=version, first=first, last=last)


USER: Final = "username, spelling, full_name, account_id, email, uid"
"""The columns for `user_of`."""


@reads_rows
def user_of(row: Row) -> User:
    """Return a user from the columns of `USER`.

    Values of another program that ipguard would have refused must not break a whole page:
    such characters are escaped, and an invalid e-mail address is left out.
    """
    username, spelling, full_name, account_id, email, uid = row
    given = {"full_name": full_name, "account_id": account_id, "email": email, "uid": uid}
    # Another program, or an older version of ipguard, leaves the spelling out.
    for name in (spelling, username):
        with suppress(errors.InvalidValue, errors.UsernameError):
            user = User(username=name, **given)
            if user.username == username:
                return user
    username, full_name, account_id = map(_escaped, (username, full_name, account_id))
    user = User(username=username, full_name=full_name, account_id=account_id)
    for name in ("email", "uid"):
        with suppress(errors.InvalidValue):
            user = attrs.evolve(user, **{name: given[name]})
    return user


def _escaped(text: str) -> str:
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)[:_SHOWN]


def user_row(user: User) -> Row:
    return (
        user.username,
        user.spelling,
        user.full_name,
        user.account_id,
        user.email,
        user.uid,
    )


ENTRY: Final = (
    "revision, at, actor, actor_address, action, username, account_id, detail, touched, token,"
    " salt, restrictions"
)
"""The columns of a `RecordedEntry`, one after another."""
SIGHTING: Final = "username, address, first_at, last_at, allowed, refused"
"""The columns for `sighting_of`."""


@reads_rows
def sighting_of(row: Row) -> Sighting:
    username, address, first_at, last_at, allowed, refused = row
    return Sighting(
        username=username,
        address=str(AddressRange.from_packed(address, address)),
        first_at=moment(first_at),
        last_at=moment(last_at),
        allowed=allowed,
        refused=refused,
    )


CHANGE: Final = "revision, at, actor, actor_address, action, username, detail, account_id"
"""The columns for `change_of`."""


def entry_row(entry: audit.RecordedEntry) -> Row:
    """Return the columns of `ENTRY`."""
    return (*entry.columns, entry.token, entry.salt, entry.restrictions)


@reads_rows
def change_of(row: Row) -> Change:
    fields = _fields(CHANGE, row)
    return Change(**fields | {"detail": audit.decode(fields["detail"])})


touched_of = reads_rows(audit.read_touched)
"""The users whose policy any of several changes touches; a malformed text is StoreUnavailable."""


SCHEMA_VERSION: Final = 7
"""The schema of this library: the number of the last migration."""


def migrations(dialect: str) -> list[tuple[int, str]]:
    """Return the version and SQL text of each migration to `sqlite` or `postgresql`, in order."""
    folder = files("ipguard.stores") / "migrations" / dialect
    found = sorted((item.name, item) for item in folder.iterdir() if item.name.endswith(".sql"))
    return [(int(name.partition("_")[0]), item.read_text("utf-8")) for name, item in found]


_HEAD: Final = (
    "SELECT h.revision, h.token FROM head h JOIN zz_restore_marker m ON m.id = 1 WHERE h.id = 1"
)


def _row_of(db: Executor, sql: str) -> Row:
    """Return the row of a table that has one; without it, the store is being restored."""
    for row in db.rows(sql):
        return row
    raise errors.StoreUnavailable(UNFINISHED)


def head(db: Executor) -> tuple[int, str]:
    """Return the store's revision and its token."""
    revision, token = _row_of(db, _HEAD)
    return revision, token


def schema_version(db: Executor) -> tuple[int, int]:
    """Return the version of the schema, and the oldest version compatible with it."""
    version, oldest = _row_of(db, "SELECT version, oldest FROM schema_version WHERE id = 1")
    return version, oldest


def check_schema(version: int, oldest: int) -> None:
    """Raise SchemaVersionError for a schema that this library cannot use.

    A newer schema can be compatible, so that old servers keep running while it is rolled out:
    `oldest` is the oldest version that a library must know to use it.
    """
    if version < SCHEMA_VERSION:
        raise errors.SchemaVersionError(version, SCHEMA_VERSION)
    if oldest > SCHEMA_VERSION:
        raise errors.SchemaVersionError(version, oldest)


def check_open_schema(version: int, oldest: int) -> None:
    """Raise StoreUnavailable for a schema that was migrated while a store was open."""
    try:
        check_schema(version, oldest)
    except errors.SchemaVersionError as exc:
        raise errors.StoreUnavailable(str(exc)) from exc


_FOLLOWED_AT_MOST: Final = 10_000
"""For a guard that is further behind than this, the answer is EVERYBODY."""

POLICY: Final = f"""
SELECT h.revision, u.removed, {columns(RESTRICTION, "r")}, %s, %s
FROM head h
JOIN zz_restore_marker m ON m.id = 1
LEFT JOIN users u ON u.username = ?
LEFT JOIN restrictions r ON r.username = ?
WHERE h.id = 1
ORDER BY r.created_at, r.id
"""
"""A policy in one statement, which is one snapshot. The username is its parameter, three times.

The first `%s` is the parameter that is returned as a column, the second any other columns. Without
the restore marker there is no row: tables that are being filled must not make users look
unrestricted.
"""
_RESTRICTION_ENDS: Final = 2 + len(RESTRICTION.split(","))


@reads_rows
def policy_of(username: str, rows: list[Row]) -> Policy:
    """Return a policy from the rows of `POLICY`.

    The rows are about another user if two processes share the connection.
    """
    revision, removed = _heading(username, rows)
    return Policy(
        revision=revision,
        restrictions=tuple([make_restriction(username, row[2:_RESTRICTION_ENDS]) for row in rows])
        if rows[0][2] is not None
        else (),
        known=removed == 0,
    )


@reads_rows
def packed_row_of(username: str, rows: list[Row]) -> tuple[int, bytes]:
    """Return the revision and the packed policy from the rows of `POLICY`.

    Raises:
        StoreUnavailable: As for `policy_of`.
    """
    revision, removed = _heading(username, rows)
    return revision, _packed(removed, rows if rows[0][2] is not None else [])


def _packed(removed: int | None, rows: list[Row]) -> bytes:
    # The id, the first and the last address, and the expiry.
    return pack_columns(removed == 0, [(row[2], row[3], row[4], row[8]) for row in rows])


def _heading(username: str, rows: list[Row]) -> tuple[int, int | None]:
    if not rows:
        raise errors.StoreUnavailable(UNFINISHED)
    if rows[0][_RESTRICTION_ENDS] != username:
        raise errors.StoreUnavailable(
            "the store's answer is about another user than the one asked for"
        )
    revision, removed = rows[0][:2]
    return revision, removed


ALL_POLICIES: Final = f"""
SELECT r.username, u.removed, {columns(RESTRICTION, "r")}
FROM restrictions r LEFT JOIN users u ON u.username = r.username
ORDER BY r.username, r.created_at, r.id
"""


def policies_of(revision: int, rows: Iterable[Row]) -> Iterator[tuple[str, Policy]]:
    """Yield the policies from the rows of `ALL_POLICIES`."""
    for username, group in groupby(rows, key=lambda row: row[0]):
        held = list(group)
        restrictions = tuple(restriction_of(username, row[2:]) for row in held)
        yield username, Policy(revision=revision, restrictions=restrictions, known=held[0][1] == 0)


def packed_rows_of(_: int, rows: Iterable[Row]) -> Iterator[tuple[str, bytes]]:
    """Yield the packed policies from the rows of `ALL_POLICIES`."""
    pack = reads_rows(_packed)
    for username, group in groupby(rows, key=lambda row: row[0]):
        held = list(group)
        yield username, pack(held[0][1], held)


def started(stream: Iterator[int | T]) -> tuple[int, Iterator[T]]:
    """Start a stream, so that its snapshot is of this moment; return the revision, and the rest."""
    revision = next(stream)
    assert isinstance(revision, int)
    return revision, cast("Iterator[T]", stream)


def touching(db: Executor) -> int:
    """Return the last revision that touched a policy."""
    (revision,) = _row_of(db, TOUCHING)
    return int(revision)


TOUCHING: Final = "SELECT touching FROM head WHERE id = 1"
TOUCHED_SINCE: Final = (
    "SELECT touched FROM changes WHERE revision > ? AND touched IS NOT NULL"
    " ORDER BY revision LIMIT ?"
)
"""The users touched by the changes after a revision; the parameters are that and a limit.

The order makes PostgreSQL use the index: a planner that does not know the revision expects a third
of the audit log after it, and would scan all of it each time.
"""
CHANGES_SINCE: Final = f"""
SELECT h.revision, h.token, c.token, t.touched
FROM head h
JOIN zz_restore_marker m ON m.id = 1
LEFT JOIN changes c ON c.revision = ?
LEFT JOIN ({TOUCHED_SINCE}) t ON 1 = 1
WHERE h.id = 1
"""
"""The rows for `changes_of`, with the parameters of `changes_params`."""


def changes_params(cursor: tuple[int, str] | None) -> Row:
    revision = BIGGEST if cursor is None else min(cursor[0], BIGGEST)
    return revision, revision, _FOLLOWED_AT_MOST + 1


@reads_rows
def changes_of(
    cursor: tuple[int, str] | None, rows: list[Row], *, restore: str | None = None
) -> Changes:
    """Return the store's position and the users whose policy changed since a guard's position.

    The token includes `restore`, which identifies the restore that created the tables.
    """
    if not rows:
        raise errors.StoreUnavailable(UNFINISHED)
    now_at, now_token, own_token, _ = rows[0]
    if restore is not None:
        now_token = f"{now_token}:{restore}"
    if cursor is None:
        return Changes(now_at, now_token, frozenset())
    # A token that `append` returned does not name a restore, so it matches after any of them.
    if own_token is None or cursor[1] not in (own_token, f"{own_token}:{restore}"):
        return Changes(now_at, now_token, RESET)
    if len(rows) > _FOLLOWED_AT_MOST:
        return Changes(now_at, now_token, EVERYBODY)
    return Changes(now_at, now_token, touched_of(row[3] for row in rows if row[3] is not None))
