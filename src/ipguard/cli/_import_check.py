"""Check the rows of an import one by one, for `--dry-run` and to report every bad row.

The workflow checks them again when it applies them, and alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, islice
from typing import Any, BinaryIO, Final, TypeVar

import attrs

from ipguard import rules
from ipguard.addresses import AddressRange
from ipguard.cli._context import Context
from ipguard.cli._files import BadRows, Columns, Format, Row, Spool, progress, rows, without_rows
from ipguard.cli._identity import READER
from ipguard.cli._output import Cell, Output, pages
from ipguard.errors import DuplicateRestriction, InvalidValue, IPGuardError, UnknownUser
from ipguard.model import Actor, Policy, Restriction
from ipguard.store import RestrictionStore
from ipguard.workflow import Workflow

T = TypeVar("T")
COLUMNS: Final = Columns(
    required=("username", "addresses"),
    optional=("label", "expires_at"),
    ignored=("id", "created_at", "created_by"),
)
_FEW: Final = 5_000  # up to this many users are looked up one by one
_SHOWN: Final = 50
_UNSET: Final = datetime.min.replace(tzinfo=UTC)


def values(row: Row) -> tuple[object, ...]:
    """Return a row in the form that the workflow takes."""
    expires_at: datetime | None = None
    if "expires_at" in row:
        try:
            expires_at = datetime.fromisoformat(row["expires_at"])
        except ValueError:
            raise InvalidValue("expires_at", "is not a time; write 2027-01-31T18:00Z") from None
    return (row["username"], row["addresses"], row.get("label", ""), expires_at)


@attrs.define
class ImportCheck:
    """The result of checking an import.

    Attributes:
        added: How many restrictions would be added.
        users: How many users would get them.
        newly: How many of these users have no restriction now.
        replaced: How many expired restrictions would be replaced.
        skipped: The lines that were skipped, because their restrictions exist.
    """

    _spool: Spool
    added: int = 0
    users: int = 0
    newly: int = 0
    replaced: int = 0
    skipped: set[int] = attrs.field(factory=set)

    def restrictions(self) -> Iterator[Restriction]:
        """Yield the restrictions to add; the id of each is its line."""
        for row in self._spool.rows(f"{_SELECT} ORDER BY line"):
            if row[1] not in self.skipped:
                yield _restriction(row, _UNSET)

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Yield the rows to add in the form that the workflow takes."""
        for each in self.restrictions():
            yield each.username, each.addresses, each.label, each.expires_at

    def _cells(self) -> Iterator[tuple[Cell, ...]]:
        for r in self.restrictions():
            yield int(r.id), r.username, str(r.addresses), r.label, r.expires_at

    def show(self, out: Output) -> None:
        """Show what the import would change."""
        if out.as_json:
            summary = {
                "dry_run": True,
                "rows": self.added,
                "users": self.users,
                "newly_restricted": self.newly,
                "replaced": self.replaced,
                "skipped": len(self.skipped),
            }
            adds = (dict(zip(_COLUMNS, row, strict=True)) for row in self._cells())
            out.array("adds", adds, lambda: summary)
            return
        limit = _SHOWN if out.rich else self.added
        out.table(_COLUMNS, islice(self._cells(), limit))
        if limit < self.added:
            out.note(f"and {self.added - limit:,} more; pipe the output to see all of them")
        out.note(
            f"would add {self.added:,} restrictions to {self.users:,} users, of whom"
            f" {self.newly:,} are not restricted now; {self.replaced:,} expired ones would be"
            f" replaced; {len(self.skipped):,} rows exist already; nothing was changed"
        )


_COLUMNS: Final = ("line", "username", "addresses", "label", "expires_at")
_SELECT: Final = "SELECT username, line, first, last, label, expires FROM rows"


@contextmanager
def checked(
    context: Context,
    store: RestrictionStore,
    flow: Workflow,
    stream: BinaryIO,
    kind: Format,
    path: str,
    *,
    skip_existing: bool = False,
) -> Iterator[ImportCheck]:
    """Check every row of a file, or raise `BadRows`; optionally skip existing restrictions."""
    bad = BadRows(path)
    with Spool("username TEXT, line INTEGER, first BLOB, last BLOB, label TEXT, expires") as spool:
        with progress(context.out, "checking", stream) as advance:
            for line, row in rows(stream, kind, COLUMNS, bad.add, advance):
                try:
                    wanted = flow.check_row(READER, values(row))
                except IPGuardError as exc:
                    bad.add(line, exc)
                    continue
                end = None if wanted.expires_at is None else wanted.expires_at.isoformat()
                spool.add((wanted.username, line, *wanted.addresses.packed, wanted.label, end))
        result = ImportCheck(spool)
        _compare(store, flow, spool, result, bad, skip_existing=skip_existing)
        bad.raise_if_any()
        if not result.added and not result.skipped:
            raise without_rows(path, "restrictions")
        yield result


def _compare(
    store: RestrictionStore,
    flow: Workflow,
    spool: Spool,
    result: ImportCheck,
    bad: BadRows,
    *,
    skip_existing: bool,
) -> None:
    """Compare the rows with each other and with the store, user by user."""
    now, per_user = flow.now(), flow.settings.restrictions_per_user
    spool.rows("CREATE INDEX by_name ON rows (username, line)")
    ((count,),) = spool.rows("SELECT count(DISTINCT username) FROM rows")
    names = (name for (name,) in spool.rows("SELECT DISTINCT username FROM rows ORDER BY username"))
    policies = map(store.load_policy, names) if count <= _FEW else _policies(store, names)
    for username, of_user in groupby(
        spool.rows(f"{_SELECT} ORDER BY username, line"), lambda row: row[0]
    ):
        policy = next(policies)
        wanted = [_restriction(row, now) for row in of_user]
        if not policy.known:
            for each in wanted:
                bad.add(int(each.id), UnknownUser(username))
            continue
        replaced, refused = rules.judge_additions(
            username, policy.restrictions, wanted, per_user=per_user, now=now
        )
        result.newly += not policy.restrictions
        result.replaced += len(replaced)
        result.added += len(wanted) - len(refused)
        result.users += len(wanted) > len(refused)
        lines = {each.addresses: each.id for each in reversed(wanted)}  # the first of each
        for each, error in refused:
            where = ""
            if isinstance(error, DuplicateRestriction):
                if skip_existing and error.found == "restriction" and not error.differs:
                    result.skipped.add(int(each.id))
                    continue
                if error.found == "row":
                    where = f", first on line {lines[each.addresses]}"
            bad.add(int(each.id), f"{error}{where}")


def _restriction(row: tuple[Any, ...], now: datetime) -> Restriction:
    """Return the restriction of a spooled row; its id is the line."""
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


def _policies(store: RestrictionStore, names: Iterator[str]) -> Iterator[Policy]:
    """Yield the policy of each user, in one walk over the store; the names are in order."""
    _, found = store.load_all_policies()
    with closing(found):  # type: ignore[type-var]
        restricted = _finder(found, lambda each: each[0])
        users = pages(partial(store.overview, Actor.EVERY_ACCOUNT), "after")
        registered = _finder(users, lambda each: each.user.username)
        for name in names:
            if (policy := restricted(name)) is not None:
                yield policy[1]
            else:
                user = registered(name)
                known = user is not None and not user.removed
                yield Policy(revision=0, restrictions=(), known=known)


def _finder(items: Iterator[T], name_of: Callable[[T], str]) -> Callable[[str], T | None]:
    """Return a function that finds names, called in their order, among items in that order."""
    item = next(items, None)

    def find(name: str) -> T | None:
        nonlocal item
        while item is not None and name_of(item) < name:
            item = next(items, None)
        return item if item is not None and name_of(item) == name else None

    return find
