"""What an import would do, row by row: for `--dry-run`, and to name every bad row.

The workflow judges again, and it alone decides: what is told here is of a moment before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import groupby
from json import dumps
from typing import Any, BinaryIO, Final, Generic, TypeVar

import attrs

from ipguard import rules
from ipguard.addresses import AddressRange
from ipguard.cli._bulk import BadRows, Spool, progress
from ipguard.cli._call import Call
from ipguard.cli._files import BadRow, Columns, Row, holds_no, rows
from ipguard.errors import (
    DuplicateRestriction,
    InvalidValue,
    IPGuardError,
    UnknownUser,
)
from ipguard.model import Actor, Policy, Restriction, UserOverview
from ipguard.store import RestrictionStore
from ipguard.workflow import Workflow

T = TypeVar("T")
COLUMNS: Final = Columns(
    needed=("username", "addresses"),
    allowed=("label", "expires_at"),
    ignored=("id", "created_at", "created_by"),
)
_FEW: Final = 5_000  # up to so many users are looked up one by one
_PAGE: Final = 1_000
_SHOWN: Final = 50
_UNSET: Final = datetime.min.replace(tzinfo=UTC)


def values(row: Row) -> tuple[object, ...]:
    """Return a row as the workflow takes it, which judges what it says.

    Raises:
        InvalidValue: Something is missing, or `expires_at` is no time.
    """
    for name in COLUMNS.needed:
        if name not in row:
            raise InvalidValue(name, "is missing")
    until: datetime | None = None
    if "expires_at" in row:
        try:
            until = datetime.fromisoformat(row["expires_at"])
        except ValueError:
            raise InvalidValue("expires_at", "is no time; write 2027-01-31T18:00Z") from None
    return (row["username"], row["addresses"], row.get("label", ""), until)


@attrs.define
class Judged:
    """What an import would do.

    Attributes:
        spool: The good rows.
        added: How many restrictions would be added.
        users: To how many users.
        newly: How many of them are not restricted now, and could log in from nowhere else any more.
        replaced: How many expired restrictions would be replaced.
        skipped: The lines whose restrictions hold already, and are not added again.
    """

    spool: Spool
    added: int = 0
    users: int = 0
    newly: int = 0
    replaced: int = 0
    skipped: set[int] = attrs.field(factory=set)

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Yield the good rows as the workflow takes them."""
        for row in self.spool.rows(
            "SELECT username, line, first, last, label, expires FROM rows ORDER BY line"
        ):
            if row[1] not in self.skipped:
                wanted = _restriction(row, _UNSET)
                yield wanted.username, wanted.addresses, wanted.label, wanted.expires_at


@contextmanager
def judge(
    call: Call,
    store: RestrictionStore,
    flow: Workflow,
    actor: Actor,
    stream: BinaryIO,
    kind: str,
    path: str,
    *,
    skip_existing: bool = False,
) -> Iterator[Judged]:
    """Judge each row of a file; with `skip_existing`, leave out what holds already.

    Raises:
        BadRows: Some cannot be imported.
        Problem: There is none.
    """
    bad, now = BadRows(path), store.now()
    spool = Spool("line INTEGER, username TEXT, first BLOB, last BLOB, label TEXT, expires TEXT")
    with spool:
        judged = Judged(spool)
        with progress(call.out, "checking", stream) as tell:
            for line, row in rows(stream, kind, COLUMNS, tell):
                try:
                    if isinstance(row, BadRow):
                        bad.add(line, row.reason)
                        continue
                    wanted = flow.check_row(actor, values(row))
                except IPGuardError as exc:
                    bad.add(line, exc)
                    continue
                until = None if wanted.expires_at is None else wanted.expires_at.isoformat()
                spool.add((line, wanted.username, *wanted.addresses.packed, wanted.label, until))
        _compare(
            store,
            judged,
            bad,
            flow.settings.restrictions_per_user,
            now,
            skip_existing=skip_existing,
        )
        bad.raise_if_any()
        if not judged.added and not judged.skipped:
            raise holds_no(path, "restrictions")
        yield judged


def _compare(
    store: RestrictionStore,
    judged: Judged,
    bad: BadRows,
    per_user: int,
    now: datetime,
    *,
    skip_existing: bool,
) -> None:
    """Compare the rows with each other and with the store, user by user."""
    spool = judged.spool
    spool.rows("CREATE INDEX by_name ON rows (username, line)")  # sorted but once
    ((count,),) = spool.rows("SELECT count(DISTINCT username) FROM rows")
    names = spool.rows("SELECT DISTINCT username FROM rows ORDER BY username")
    policies = _policies(store, (name for (name,) in names), few=count <= _FEW)
    found = spool.rows(
        "SELECT username, line, first, last, label, expires FROM rows ORDER BY username, line"
    )
    for username, theirs in groupby(found, lambda row: row[0]):
        policy = next(policies)
        wanted = [_restriction(row, now) for row in theirs]
        if not policy.known:
            for each in wanted:
                bad.add(int(each.id), UnknownUser(username))
            continue
        replaced, refused = rules.judge_additions(
            username, policy.restrictions, wanted, per_user=per_user, now=now
        )
        judged.newly += not policy.restrictions
        judged.replaced += len(replaced)
        judged.added += len(wanted) - len(refused)
        judged.users += len(wanted) > len(refused)
        first: dict[AddressRange, str] = {}
        for each in wanted if refused else ():
            first.setdefault(each.addresses, each.id)
        for each, error in refused:
            where = ""
            if isinstance(error, DuplicateRestriction):
                if skip_existing and error.found == "restriction" and not error.differs:
                    judged.skipped.add(int(each.id))
                    continue
                if error.found == "row":
                    where = f", first on line {first[each.addresses]}"
            bad.add(int(each.id), f"{error}{where}")


def _restriction(row: tuple[Any, ...], now: datetime) -> Restriction:
    """Make the restriction of a row; its id is the number of the line."""
    username, line, first, last, label, expires = row
    return Restriction(
        id=str(line),
        username=username,
        addresses=AddressRange.from_packed(first, last),
        label=label,
        created_at=now,
        created_by="",
        expires_at=None if expires is None else datetime.fromisoformat(expires),
    )


def _policies(store: RestrictionStore, names: Iterator[str], *, few: bool) -> Iterator[Policy]:
    """Return the policy of each user, in the order of their names."""
    if few:
        yield from map(store.load_policy, names)
        return
    _, found = store.load_all_policies()
    with closing(found):  # type: ignore[type-var]
        restricted = _Walk(found, lambda each: each[0])
        # Whoever is restricted has been found by then: often no page is read.
        users = _Walk(_users(store), lambda each: each.user.username)
        for name in names:
            if (policy := restricted.at(name)) is not None:
                yield policy[1]
            else:
                user = users.at(name)
                known = user is not None and not user.removed
                yield Policy(revision=0, restrictions=(), known=known)


class _Walk(Generic[T]):
    """Looks up names, one after the other in their order, among what comes in that order."""

    def __init__(self, found: Iterator[T], name: Callable[[T], str]) -> None:
        self._found = found
        self._name = name
        self._next: T | None = None
        self._begun = False

    def at(self, name: str) -> T | None:
        if not self._begun:
            self._next, self._begun = next(self._found, None), True
        while self._next is not None and self._name(self._next) < name:
            self._next = next(self._found, None)
        if self._next is None or self._name(self._next) != name:
            return None
        return self._next


def _users(store: RestrictionStore) -> Iterator[UserOverview]:
    after: str | None = None
    while True:
        page = store.overview(Actor.EVERY_ACCOUNT, after=after, limit=_PAGE)
        yield from page
        if page.next is None:
            return
        after = page.next


def show(call: Call, judged: Judged) -> None:
    """Show what would change."""
    found = judged.spool.rows(
        "SELECT username, first, last, label, expires, line FROM rows ORDER BY line"
    )
    adds = (
        {
            "line": line,
            "username": username,
            "addresses": str(AddressRange.from_packed(first, last)),
            "label": label,
            "expires_at": until,
        }
        for username, first, last, label, until, line in found
        if line not in judged.skipped
    )
    if call.out.as_json:
        head = {
            "dry_run": True,
            "rows": judged.added,
            "users": judged.users,
            "newly_restricted": judged.newly,
            "replaced": judged.replaced,
            "skipped": len(judged.skipped),
        }
        call.out.raw(dumps(head).removesuffix("}") + ', "adds": [')
        for number, each in enumerate(adds):
            call.out.raw((", " if number else "") + dumps(each))
        call.out.raw("]}\n")
        return
    limit = _SHOWN if call.out.rich else judged.added
    columns = ("line", "username", "addresses", "label", "expires_at")
    shown = ([each[name] for name in columns] for each, _ in zip(adds, range(limit), strict=False))
    call.out.table(columns, shown)
    if limit < judged.added:
        call.out.note(f"and {judged.added - limit:,} more: piped, all of them are listed")
    call.out.note(
        f"would add {judged.added:,} restrictions to {judged.users:,} users, of whom"
        f" {judged.newly:,} are not restricted now; {judged.replaced:,} expired ones would be"
        f" replaced; {len(judged.skipped):,} rows hold already; nothing was changed"
    )
