"""The base class of the SQL stores: their transactions, bulk changes and listing."""

from __future__ import annotations

import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeVar

import attrs

from ipguard import rules
from ipguard._checks import check_time, check_whole
from ipguard.audit import (
    RecordedEntry,
    digest_of,
    entry_columns,
    log_change,
    micros,
    new_salt,
    next_token,
)
from ipguard.errors import StoreError, StoreUnavailable, UnknownUser, shorten
from ipguard.model import (
    Accounts,
    Action,
    Actor,
    BulkCounts,
    Change,
    Page,
    PendingRequest,
    Policy,
    Restriction,
    Sighting,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserCounts,
    UserFilter,
    UserOverview,
    UserSync,
    Verification,
    check_accounts,
)
from ipguard.rules import Search, UserRecord
from ipguard.store import (
    UNAPPENDED,
    Closing,
    Snapshot,
    Transaction,
    Unread,
    append_forgotten,
    carry_out,
    read_records,
)
from ipguard.stores._sql import (
    BIGGEST,
    CHANGE,
    ENTRY,
    IS_PENDING,
    PENDING,
    REQUEST,
    RESTRICTION,
    SIGHTING,
    USER,
    Executor,
    Params,
    Row,
    change_of,
    columns,
    encodable,
    entry_row,
    marks,
    moment,
    pending_of,
    record,
    request_of,
    request_row,
    restriction_of,
    restriction_row,
    sighting_of,
    sightings,
    user_of,
)
from ipguard.stores._sql.bulk import (
    BulkRestrictions,
    BulkUsers,
    FewUsers,
    few_records,
    remove_named,
    save_users,
    stage_names,
)
from ipguard.stores._sql.record import Pruning
from ipguard.usernames import canonical_username, canonical_usernames

_INSERT_CHANGE: Final = f"INSERT INTO changes ({ENTRY}) VALUES ({marks(ENTRY)})"
_STAGE_CHANGES: Final = (
    "CREATE TEMPORARY TABLE staged_changes (revision INTEGER PRIMARY KEY, at INTEGER, actor TEXT,"
    " actor_address TEXT, action TEXT, username TEXT, account_id TEXT, detail TEXT, touched TEXT,"
    " token TEXT, salt TEXT, restrictions TEXT)"
)
_MOVE_HEAD: Final = (
    "UPDATE head SET revision = ?, token = ?, touching = COALESCE(?, touching) WHERE id = 1"
)
_SAVE_REQUEST: Final = (
    f"INSERT INTO requests ({REQUEST}) VALUES ({marks(REQUEST)}) ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in REQUEST.split(", ")[1:])
)
_INSERT_RESTRICTION: Final = (
    f"INSERT INTO restrictions (username, {RESTRICTION}, began) VALUES (?, {marks(RESTRICTION)}, ?)"
)


class SqlSnapshot:
    """One committed state, until it is `over`; `ipguard.store.Snapshot` documents the methods."""

    def __init__(self, db: Executor, now: datetime) -> None:
        self._executor = db
        self.now = now
        self._pid = os.getpid()
        self.over = False

    @property
    def db(self) -> Executor:
        """The connection, as long as the transaction lasts and in the process that began it."""
        self.check_process()
        if self.over:
            raise RuntimeError("this transaction is over")
        return self._executor

    def check_process(self) -> None:
        """Raise StoreUnavailable in a child that was forked inside the transaction."""
        if self._pid != os.getpid():
            raise StoreUnavailable("the transaction belongs to the parent process")

    def user(self, username: str) -> StoredUser | None:
        for row in self._find(f"SELECT {USER}, removed FROM users WHERE username = ?", username):
            return StoredUser(user=user_of(row[:-1]), removed=row[-1] != 0)
        return None

    def restriction(self, restriction_id: str) -> Restriction | None:
        sql = f"SELECT username, {RESTRICTION} FROM restrictions WHERE id = ?"
        for row in self._find(sql, restriction_id):
            return restriction_of(row[0], row[1:])
        return None

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        sql = f"SELECT {RESTRICTION} FROM restrictions WHERE username = ? ORDER BY created_at, id"
        return tuple(restriction_of(username, row) for row in self._find(sql, username))

    def request(self, request_id: str) -> StoredRequest | None:
        for row in self._find(f"SELECT {REQUEST} FROM requests WHERE id = ?", request_id):
            return request_of(row)
        return None

    def pending_requests(self, username: str) -> tuple[PendingRequest, ...]:
        sql = (
            f"SELECT {PENDING} FROM requests WHERE username = ? AND {IS_PENDING}"
            " ORDER BY requested_at, id"
        )
        return tuple(pending_of(row) for row in self._find(sql, username))

    def batch(self, batch_id: str) -> tuple[StoredRequest, ...]:
        sql = f"SELECT {REQUEST} FROM requests WHERE batch = ? ORDER BY requested_at, id"
        return tuple(map(request_of, self._find(sql, batch_id)))

    def request_times(self, requested_by: str, since: datetime) -> tuple[datetime, ...]:
        sql = (
            "SELECT requested_at FROM requests WHERE requested_by = ? AND requested_at > ?"
            " AND (batch IS NULL OR batch = id) ORDER BY requested_at"
        )
        return tuple(moment(row[0]) for row in self.db.rows(sql, (requested_by, micros(since))))

    def failures(self, actor: str) -> int:
        for row in self._find("SELECT count FROM failures WHERE actor = ?", actor):
            return int(row[0])
        return 0

    def _find(self, sql: str, key: str) -> list[Row]:
        # An id comes from outside; text that cannot be stored is not found.
        return self.db.rows(sql, (key,)) if encodable(key) else []


class WriteTransaction(SqlSnapshot):
    """A write transaction; `ipguard.store.Transaction` documents the methods.

    Attributes:
        revision: The revision after the last entry of this transaction.
        touching: The last revision of this transaction that touched a policy, or None.
    """

    def __init__(
        self,
        db: Executor,
        now: datetime,
        head: tuple[int, str],
        bulk: BulkRestrictions | None = None,
    ) -> None:
        super().__init__(db, now)
        self._bulk = bulk
        self.revision, self._token = head
        self.touching: int | None = None
        # What was done to restrictions since the last entry, and whose they are, as far as read.
        self._added: dict[str, Row] = {}
        self._ended: list[Row] = []
        self._imported = False
        self._owners: dict[str, str] = {}

    def restriction(self, restriction_id: str) -> Restriction | None:
        self.withdraw()
        found = super().restriction(restriction_id)
        if found is not None:
            self._owners[found.id] = found.username
        return found

    def restrictions(self, username: str) -> tuple[Restriction, ...]:
        self.withdraw()
        found = super().restrictions(username)
        self._owners.update((each.id, username) for each in found)
        return found

    def save_request(self, stored: StoredRequest) -> None:
        self.db.run(_SAVE_REQUEST, request_row(stored))

    def save_users(self, users: Sequence[StoredUser]) -> None:
        save_users(self.db, users)

    def move_sightings(self, renamed: Mapping[str, str], fresh: Collection[str]) -> None:
        sightings.move(self.db, renamed, fresh)

    def set_failures(self, actor: str, count: int) -> None:
        self.db.run(
            "INSERT INTO failures (actor, count) VALUES (?, ?)"
            " ON CONFLICT (actor) DO UPDATE SET count = excluded.count",
            (actor, count),
        )

    def add_restriction(self, restriction: Restriction) -> None:
        self.withdraw()
        # Check first: after a statement that failed, PostgreSQL refuses the whole transaction.
        if self.db.rows("SELECT 1 FROM restrictions WHERE id = ?", (restriction.id,)):
            raise StoreError(f"there is a restriction {shorten(restriction.id)} already")
        row = restriction_row(restriction)
        self.db.run(_INSERT_RESTRICTION, (*row, self.revision + 1))
        self._owners[restriction.id] = restriction.username
        self._added[restriction.id] = (row[1], row[0], *row[2:])

    def remove_restriction(self, restriction_id: str) -> None:
        self.withdraw()
        if restriction_id not in self._owners and self.restriction(restriction_id) is None:
            return
        owner = self._owners.pop(restriction_id)
        self.db.run("DELETE FROM restrictions WHERE id = ?", (restriction_id,))
        if self._added.pop(restriction_id, None) is None:  # else it was never in force
            self._ended.append((restriction_id, owner))

    def add_staged(
        self, *, per_user: int, replace: bool = False, skip_existing: bool = False
    ) -> BulkCounts:
        rules.check_bulk_options(replace=replace, skip_existing=skip_existing)
        if self._bulk is None:
            return BulkCounts(0, 0, 0)
        counts = self._bulk.add(
            self.db,
            self.now,
            self.revision + 1,
            per_user=per_user,
            replace=replace,
            skip_existing=skip_existing,
        )
        self._imported |= counts.added > 0 or counts.ended > 0
        self._owners.clear()
        return counts

    def append(
        self, action: Action, *, touches: frozenset[str] | Touched = frozenset(), **fields: Any
    ) -> Change:
        digest = self._digest()
        self._added, self._ended, self._imported = {}, [], False
        change, entry = self._next(action, touches, fields, digest)
        self.db.run(_INSERT_CHANGE, entry_row(entry))
        self._move_head()
        return change

    def stage_all(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Stage entries, at least one and any number, for `append_staged`.

        Each is given by the arguments of `append`, and by `restrictions`, the digest of what it
        does to restrictions. The table `staged_changes` then has their revisions.
        """

        def staged() -> Iterator[Row]:
            for given in entries:
                fields = dict(given)
                action, touches = fields.pop("action"), fields.pop("touches", frozenset())
                digest = fields.pop("restrictions", "")
                yield entry_row(self._next(action, touches, fields, digest)[1])

        self.db.run(_STAGE_CHANGES)
        self.db.insert_many("staged_changes", ENTRY, staged())

    def append_staged(self) -> None:
        """Append the entries that were staged."""
        self.db.run(f"INSERT INTO changes ({ENTRY}) SELECT {ENTRY} FROM staged_changes")
        self._move_head()

    def _next(
        self,
        action: Action,
        touches: frozenset[str] | Touched,
        fields: Mapping[str, Any],
        restrictions: str,
    ) -> tuple[Change, RecordedEntry]:
        """Return the next entry, also in its stored form."""
        change = Change(revision=self.revision + 1, at=self.now, action=action, **fields)
        row, salt = entry_columns(change, touches), new_salt()
        self._token = next_token(self._token, row, restrictions, salt)
        self.revision = change.revision
        if touches:
            self.touching = change.revision
        return change, RecordedEntry(row, self._token, salt, restrictions)

    def _move_head(self) -> None:
        self.db.run(_MOVE_HEAD, (self.revision, self._token, self.touching))

    def _digest(self) -> str:
        """Return the digest of the restrictions added and ended since the last entry."""
        if not self._imported or self._bulk is None:
            return digest_of(self._added.values(), self._ended)
        alone = not (self._added or self._ended)
        return self._bulk.digest(self.db, self.revision + 1, alone=alone)

    def check_appended(self) -> None:
        """Raise StoreError if restrictions were changed after the last entry."""
        if self._added or self._ended or self._imported:
            raise StoreError(UNAPPENDED)

    def withdraw(self) -> None:
        """Undo what was written ahead of `add_staged`, if that was not called."""
        if self._bulk is not None:
            self._bulk.withdraw(self.db)


# Pages of users and of the audit log, by keyset pagination. A planner has no statistics about a
# store that was just filled, so the statements fix their plans: `CROSS JOIN` keeps the order of the
# tables (in PostgreSQL by the settings of its store), `column || ''` uses no index on the column,
# and a subquery with a limit is not merged into the query around it.


class Query(NamedTuple):
    """A statement and its parameters."""

    text: str
    params: Row


_OPEN_REQUESTS: Final = f"""
SELECT {columns(REQUEST, "q")}, {columns(USER, "u")} FROM requests q
LEFT JOIN users u ON u.username = q.username %s
WHERE {IS_PENDING} AND q.expires_at > ? AND (q.requested_by = ? OR q.approvals_needed > 0)
    AND coalesce(u.username, '') <> ''
ORDER BY CASE WHEN q.requested_by = ? THEN 0 ELSE 1 END, q.requested_at DESC, q.id DESC LIMIT ?
"""
_FEW: Final = 1_000
"""Up to so many accounts, the users of each are read; for more, all users are walked through."""
_COUNTED: Final = 10_000
"""So many users are counted."""
_SORTED: Final = 10_000
"""Of so many users, all that a filter lists are sorted; more are walked through in order."""
_LAST: Final = "\U0010ffff"
"""Sorts after every character of a stored text."""
_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")


def _limited(limit: int) -> int:
    return min(check_whole("limit", limit, 1), BIGGEST >> 8)


def _storable_bound(text: str) -> str:
    """Return a text that a database takes as a parameter and that sorts like `text`."""
    found = _NOT_STORABLE.search(text)
    if found is None:
        return text
    # Surrogates sort after U+D7FF, and no username has a U+10FFFF.
    return text[: found.start()] + ("" if found[0] == "\0" else f"\ud7ff{_LAST}")


def _lines(
    db: Executor, accounts: Accounts, names: list[str], now: datetime
) -> Iterator[tuple[str, UserOverview]]:
    among, texts = db.among("username"), db.texts(names)
    users = db.rows(f"SELECT {USER}, removed FROM users WHERE {among} ORDER BY username", (texts,))
    restrictions: dict[str, list[Restriction]] = {}
    for row in db.rows(
        f"SELECT username, {RESTRICTION} FROM restrictions WHERE {among}"
        " ORDER BY username, created_at, id",
        (texts,),
    ):
        restrictions.setdefault(row[0], []).append(restriction_of(row[0], row[1:]))
    pending: dict[str, list[PendingRequest]] = {}
    for row in db.rows(
        f"SELECT {PENDING} FROM requests WHERE {IS_PENDING} AND {among} AND expires_at > ?"
        " ORDER BY username, requested_at, id",
        (texts, micros(now)),
    ):
        pending.setdefault(row[1], []).append(pending_of(row))
    seen = _seen_by(db, names, now)
    for *of_user, removed in users:
        name, account_id = of_user[0], of_user[3]
        held = restrictions.get(name, [])
        if rules.is_visible(accounts, account_id, removed=removed != 0, restricted=bool(held)):
            yield (
                name,
                UserOverview(
                    user=user_of(tuple(of_user)),
                    restrictions=tuple(held),
                    pending=tuple(pending.get(name, ())),
                    summary=rules.summarise(held, now),
                    removed=removed != 0,
                    last_used=rules.last_used(held, seen.get(name, ())),
                ),
            )


def _seen_by(
    db: Executor, usernames: Collection[str], now: datetime
) -> dict[str, tuple[Sighting, ...]]:
    """Return the sightings that are kept of each of these users who has any, newest first."""
    rows = db.rows(
        f"SELECT {SIGHTING} FROM sightings WHERE {db.among('username')} ORDER BY username",
        (db.texts(filter(encodable, usernames)),),
    )
    return {
        name: tuple(rules.sightings_kept(map(sighting_of, group), now))
        for name, group in groupby(rows, itemgetter(0))
    }


_RESTRICTED: Final = "(SELECT 1 FROM restrictions h WHERE h.username = %s LIMIT 1)"
_LISTED: Final[Mapping[UserFilter, str]] = {
    "restricted": f"{_RESTRICTED} = 1",
    "unrestricted": f"{_RESTRICTED} IS NULL",
    "pending": f"(SELECT 1 FROM requests h WHERE h.username = %s AND {IS_PENDING}"
    " AND h.expires_at > ? LIMIT 1) = 1",
    "expiring": "(SELECT 1 FROM restrictions h WHERE h.username = %s AND h.expires_at + 0 > ?"
    " AND h.expires_at + 0 <= ? LIMIT 1) = 1",
}
"""`rules.is_listed` as conditions on a username, with the parameters of `_times`.

`+ 0` keeps PostgreSQL from using the index of expiries for each username: before it has statistics,
it takes that index for the best.
"""
_ROWS_OF: Final[Mapping[UserFilter, str]] = {
    "restricted": "restrictions WHERE true",
    "pending": f"requests WHERE {IS_PENDING} AND expires_at > ?",
    "expiring": "restrictions WHERE expires_at > ? AND expires_at <= ?",
}
"""The rows that make users listed, with the same parameters."""


def _times(only: UserFilter, now: datetime) -> Params:
    if only == "pending":
        return (micros(now),)
    return (micros(now), micros(rules.expiring_until(now))) if only == "expiring" else ()


def _few_names(
    db: Executor, only: UserFilter, now: datetime, after: str = ""
) -> frozenset[str] | None:
    """Return the usernames that a filter lists, or None if they may be many."""
    if only not in _ROWS_OF:
        return None
    rows = db.rows(
        f"SELECT username FROM {_ROWS_OF[only]} AND username > ? LIMIT ?",
        (*_times(only, now), after, _SORTED + 1),
    )
    return None if len(rows) > _SORTED else frozenset(name for (name,) in rows)


def _usernames(
    db: Executor,
    accounts: Accounts,
    search: Search,
    after: str,
    limit: int,
    only: UserFilter | None,
    now: datetime,
) -> list[str]:
    """Return the first usernames that a search finds, in order, with duplicates and hidden ones."""
    listed = Query("", ())
    if only is not None:
        few = _few_names(db, only, now, after)
        if few is not None and not search.text:
            mine = _shown(db, accounts)
            named = _users_where(db, f"u.username = j.value AND {mine.text}")
            sql = f"SELECT u.username FROM {named} ORDER BY u.username || '' LIMIT ?"
            return [row[0] for row in db.rows(sql, (db.texts(few), *mine.params, limit))]
        name = "f.username" if search.text else "u.username"
        listed = Query(f" AND {_LISTED[only] % name}", tuple(_times(only, now)))
        if few is not None:
            listed = Query(f" AND {db.among(name)}", (db.texts(few),))
    if not search.text:
        if only is None:
            query = _everybody(db, accounts, after, limit)
        else:
            query = _listed(db, accounts, after, limit, listed)
        return [row[0] for row in db.rows(*query)]
    queries = [*_by_terms(db, accounts, search, after), *_by_addresses(db, accounts, search, after)]
    if not queries:
        return []
    sql = " UNION ALL ".join(text for text, _ in queries)
    params = tuple(value for _, values in queries for value in values)
    if listed.text:
        sql = f"WITH f (username) AS ({sql}) SELECT f.username FROM f WHERE true{listed.text}"
    return [
        row[0] for row in db.rows(f"{sql} ORDER BY 1 LIMIT ?", (*params, *listed.params, limit))
    ]


def _users_where(db: Executor, condition: str) -> str:
    """Return a FROM clause of users, for each text in its parameter, by a condition.

    A LEFT JOIN, with the whole condition inside: PostgreSQL turns others into inner joins, and may
    then go through all users first.
    """
    return f"{db.each()} LEFT JOIN users u ON {condition} WHERE {_FOUND}"


_FOUND: Final = "coalesce(u.username, '') <> ''"


def _shown(db: Executor, accounts: Accounts) -> Query:
    """Return the condition that a user is shown to these accounts, for no index to be used."""
    if not isinstance(accounts, frozenset):
        return Query(f"(u.removed = 0 OR {_RESTRICTED % 'u.username'} = 1)", ())
    owner = "u.account_id || ''"
    return Query(f"u.removed + 0 = 0 AND {db.among(owner)}", (_texts(db, accounts),))


def _everybody(db: Executor, accounts: Accounts, after: str, limit: int) -> Query:
    if isinstance(accounts, frozenset) and len(accounts) <= _FEW:
        theirs = "account_id = j.value AND removed = 0 AND username > ?"
        return Query(
            f"SELECT u.username FROM {db.each()} CROSS JOIN users u WHERE {theirs}"
            f" AND username <= coalesce((SELECT u.username FROM users u WHERE {theirs}"
            " ORDER BY u.username LIMIT 1 OFFSET ?), ?) ORDER BY u.username || '' LIMIT ?",
            (_texts(db, accounts), after, after, limit, _LAST, limit),
        )
    mine = _of_accounts(db, accounts)
    return Query(
        f"SELECT username FROM users WHERE username > ?{mine.text} ORDER BY username LIMIT ?",
        (after, *mine.params, limit),
    )


_OF_ACCOUNT: Final = "u.account_id = j.value AND u.removed + 0 = 0"


def _listed(db: Executor, accounts: Accounts, after: str, limit: int, listed: Query) -> Query:
    """Return the query for the users that a filter lists, by a condition on each of them."""
    # No index has the name. So PostgreSQL walks the users in their order, and does not read all of
    # them from another index, to sort them.
    mine = Query(" AND u.full_name || '' IS NOT NULL", ())
    if isinstance(accounts, frozenset):
        texts = _texts(db, accounts)
        ((size,),) = db.rows(
            f"SELECT count(*) FROM (SELECT 1 FROM {_users_where(db, _OF_ACCOUNT)} LIMIT ?) v",
            (texts, _SORTED),
        )
        if size < _SORTED:
            condition = f"{_OF_ACCOUNT} AND u.username > ?{listed.text}"
            return Query(
                f"SELECT u.username FROM {_users_where(db, condition)}"
                " ORDER BY u.username || '' LIMIT ?",
                (texts, after, *listed.params, limit),
            )
        theirs = _of_accounts(db, accounts)
        mine = Query(mine.text + theirs.text, theirs.params)
        if len(accounts) == 1:
            mine = Query(" AND u.account_id = ? AND u.removed = 0", tuple(accounts))
    return Query(
        f"SELECT u.username FROM users u WHERE u.username > ?{mine.text}{listed.text}"
        " ORDER BY u.username LIMIT ?",
        (after, *mine.params, *listed.params, limit),
    )


def _counts(db: Executor, accounts: Accounts, now: datetime) -> UserCounts:
    walk = f"SELECT u.username, u.removed, {_RESTRICTED % 'u.username'} AS held FROM"
    if isinstance(accounts, frozenset):
        first = Query(
            f"{walk} {_users_where(db, _OF_ACCOUNT)} LIMIT ?", (_texts(db, accounts), _COUNTED)
        )
    else:
        first = Query(f"{walk} users u ORDER BY u.username LIMIT ?", (_COUNTED,))
    shown = "(v.removed = 0 OR v.held = 1)"
    ((seen, users, restricted),) = db.rows(
        f"SELECT count(*), count(CASE WHEN {shown} THEN 1 END), count(v.held)"
        f" FROM ({first.text}) v",
        first.params,
    )
    found = {"users": users, "restricted": restricted, "unrestricted": users - restricted}
    more = {"users", "unrestricted"} if seen >= _COUNTED else set()
    filters: tuple[UserFilter, ...] = ("restricted", "pending", "expiring")
    for only in filters[0 if more else 1 :]:
        few = _few_names(db, only, now)
        if few is not None:
            mine = _shown(db, accounts)
            named = _users_where(db, f"u.username = j.value AND {mine.text}")
            sql = f"SELECT count(*) FROM {named}"
            ((found[only],),) = db.rows(sql, (db.texts(few), *mine.params))
        elif only != "restricted":
            ((found[only],),) = db.rows(
                f"SELECT count(*) FROM ({first.text}) v"
                f" WHERE {shown} AND {_LISTED[only] % 'v.username'}",
                (*first.params, *_times(only, now)),
            )
        if few is None and more:
            more.add(only)
    return UserCounts(**found, more=frozenset(more))


def _by_terms(db: Executor, accounts: Accounts, search: Search, after: str) -> Iterator[Query]:
    if encodable(search.text):
        yield from _with_term(db, accounts, search.text, after)
        if search.words:
            # The longest word is likely to be the rarest.
            yield from _with_term(
                db,
                accounts,
                max(search.words, key=len),
                after,
                f" AND NOT EXISTS (SELECT 1 FROM {db.each()} WHERE NOT EXISTS (SELECT 1"
                " FROM search_terms w WHERE w.username = t.username"
                f" AND w.term >= j.value AND w.term < j.value || '{_LAST}'))",
                db.texts(search.words),
            )


def _with_term(
    db: Executor, accounts: Accounts, start: str, after: str, more: str = "", *params: object
) -> Iterator[Query]:
    begins = f"t.term >= ? AND t.term < ? AND t.username > ?{more}"
    values = (start, start + _LAST, after, *params)
    if not isinstance(accounts, frozenset):
        yield Query(f"SELECT t.username || '' FROM search_terms t WHERE {begins}", values)
        return
    # A LEFT JOIN, which PostgreSQL cannot reorder. It would reorder an inner join, because it
    # estimates that a prefix matches about one row, however many it does match.
    yield Query(
        f"SELECT t.username || '' FROM {db.each()} LEFT JOIN search_terms t"
        f" ON t.account_id = j.value AND {begins} WHERE coalesce(t.username, '') <> ''",
        (_texts(db, accounts), *values),
    )
    # Terms that an older version of ipguard wrote may have no account.
    yield Query(
        f"SELECT t.username || '' FROM search_terms t WHERE t.account_id IS NULL AND {begins}",
        values,
    )


def _in_common(size: int, least: int) -> str:
    cases = (
        f"WHEN substr(r.first_ip, 1, {n}) <> substr(r.last_ip, 1, {n}) THEN {least + n - 1}"
        for n in range(1, size + 1)
    )
    return f"CASE {' '.join(cases)} ELSE {least + size} END"


# The number of leading bytes that the ends of a range have in common, plus 100 for IPv6. It must be
# the very expression of the index over restrictions: databases use the index for no other.
_SHARED: Final = (
    f"CASE length(r.first_ip) WHEN 16 THEN {_in_common(16, 100)} ELSE {_in_common(4, 0)} END"
)


def _by_addresses(db: Executor, accounts: Accounts, search: Search, after: str) -> Iterator[Query]:
    addresses = search.address or search.addresses
    if addresses is None:
        return
    first, last = addresses.packed
    size = len(first)
    if search.address is not None:
        held = "r.first_ip <= ? AND r.last_ip >= ?"
        # If the ends of a range have their first n bytes in common, every address inside begins
        # with them. So a range that contains this address begins at its first n bytes or later.
        starts = [(n, first[:n] + bytes(size - n)) for n in range(size + 1)]
    else:
        held = "r.first_ip = ? AND r.last_ip = ?"
        starts = [(next((n for n in range(size) if first[n] != last[n]), size), first)]
    near = " UNION ALL ".join(["SELECT ? AS shared, ? AS start"] * len(starts))
    version = 100 if size == 16 else 0
    everybody = Query(
        f"SELECT r.username || '' FROM ({near}) n CROSS JOIN restrictions r"
        f" WHERE {_SHARED} = n.shared AND r.first_ip >= n.start AND {held} AND r.username > ?",
        (*(each for n, start in starts for each in (n + version, start)), first, last, after),
    )
    if not isinstance(accounts, frozenset):
        yield everybody
        return
    names = db.rows(f"{everybody.text} LIMIT ?", (*everybody.params, _FEW + 1))
    if len(names) <= _FEW:
        yield Query(
            f"SELECT u.username || '' FROM {db.each()} CROSS JOIN users u"
            f" WHERE u.username = j.value AND {db.among('u.account_id')}",
            (db.texts(row[0] for row in names), _texts(db, accounts)),
        )
        return
    yield Query(
        f"SELECT u.username || '' FROM users u"
        f" WHERE {db.among('u.account_id')} AND u.removed = 0 AND u.username > ?"
        " AND (SELECT 1 FROM restrictions r WHERE r.username = u.username"
        f" AND length(r.first_ip) = ? AND {held} LIMIT 1) = 1",
        (_texts(db, accounts), after, size, first, last),
    )


def _of_accounts(db: Executor, accounts: Accounts) -> Query:
    """Return the condition that a row is of these accounts, written so that it uses no index."""
    if not isinstance(accounts, frozenset):
        return Query("", ())
    owner = "account_id || ''"
    return Query(f" AND {db.among(owner)}", (_texts(db, accounts),))


def _texts(db: Executor, accounts: frozenset[str]) -> object:
    """Return the parameter for the accounts that a row can hold, sorted as the indexes are."""
    storable = accounts if encodable("".join(accounts)) else filter(encodable, accounts)
    return db.texts(sorted(storable))


def _revisions(
    db: Executor, accounts: Accounts, username: str | None, until: int, size: int
) -> Query:
    """Return the query for the revisions of a page of the audit log, and of one entry more.

    Revision 0 is left out: it is no change, and its row only holds a token.
    """
    if username is None and isinstance(accounts, frozenset) and len(accounts) <= _FEW:
        theirs = "c.account_id = j.value AND c.revision < ?"
        return Query(
            f"SELECT c.revision FROM {db.each()} CROSS JOIN changes c WHERE {theirs}"
            f" AND c.revision >= coalesce((SELECT c.revision FROM changes c WHERE {theirs}"
            " AND c.revision > 0 ORDER BY c.revision DESC LIMIT 1 OFFSET ?), 1)"
            " ORDER BY c.revision + 0 DESC LIMIT ?",
            (_texts(db, accounts), until, until, size, size + 1),
        )
    mine = _of_accounts(db, accounts)
    about = () if username is None else (username if encodable(username) else "",)
    return Query(
        f"SELECT c.revision FROM changes c WHERE c.revision > 0 AND c.revision < ?{mine.text}"
        f"{' AND c.username = ?' if about else ''} ORDER BY c.revision DESC LIMIT ?",
        (until, *mine.params, *about, size + 1),
    )


C = TypeVar("C", bound=Executor)
T = TypeVar("T")
Writing = AbstractContextManager[WriteTransaction]


class SqlStore(Closing, Generic[C]):
    """A store in an SQL database; a subclass provides the connections, of type `C`.

    `ipguard.store.RestrictionStore` documents the public methods.

    Attributes:
        timeout: How many seconds a call may wait, all its steps together.
    """

    timeout: float
    _WRITES_AHEAD: ClassVar[bool] = False
    """Whether bulk rows are written before the writer's lock is acquired."""
    _SKIP_LOCKED: ClassVar[str] = ""
    """The clause that makes a query skip the rows that others are writing, if there may be any."""

    @abstractmethod
    def now(self) -> datetime: ...

    @abstractmethod
    def _refuse_nested(self) -> None:
        """Raise RuntimeError if this thread is in a write transaction: it would deadlock."""

    @abstractmethod
    def _snapshot(self) -> AbstractContextManager[C]:
        """Lend a connection whose reads are of one committed state."""

    def _scan(self) -> AbstractContextManager[C]:
        """Lend a connection as `_snapshot`, to read whole tables, which may take longer."""
        return self._snapshot()

    @abstractmethod
    def _read(self, reading: Callable[[C], T], deadline: float) -> T: ...

    @abstractmethod
    def _write(self, *, users: bool = False, deadline: float | None = None) -> Writing:
        """Begin a write transaction, which commits at the end of the block.

        With `users`, it adds or removes users, and may exclude others that do. Its waits end at
        `deadline`, on the clock of `time.monotonic`; by default, after the timeout.
        """

    @abstractmethod
    def _bulk(self) -> AbstractContextManager[C]:
        """Lend a connection on which any number of rows can be staged in temporary tables."""

    @abstractmethod
    def _write_bulk(self, connection: C, restrictions: BulkRestrictions | None = None) -> Writing:
        """Begin a write transaction on a connection from `_bulk`."""

    def _step(self, _connection: C, /) -> AbstractContextManager[Any]:
        """Run statements on a connection from `_bulk`, which may have no transaction yet."""
        return nullcontext()

    def _lock_users(self, _connection: C, /) -> AbstractContextManager[Any]:
        """Keep other writers from adding and removing users, if the store writes ahead."""
        return nullcontext()

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        with self._snapshot() as db:
            yield SqlSnapshot(db, self.now())

    @contextmanager
    def transaction(self, *, staged: Iterable[Restriction] | None = None) -> Iterator[Transaction]:
        self._refuse_nested()
        if staged is None:
            with self._write() as tx:
                yield tx
            return
        with self._bulk() as db:
            with self._step(db):
                restrictions = BulkRestrictions(db, staged, ahead=self._WRITES_AHEAD)
            with self._step(db):
                restrictions.judge(db, self.now())
            with self._write_bulk(db, restrictions) as tx:
                yield tx

    def put_users(self, users: Iterable[User]) -> int:
        return self._put((UserRecord(seq, user), user) for seq, user in enumerate(users)).revision

    def sync_users(
        self, records: Iterable[User | Mapping[str, Any]], *, remove_missing: bool = False
    ) -> UserSync:
        unread: list[Unread] = []
        read = read_records(records, unread)
        return self._put(read, unread, sync=True, remove_missing=remove_missing)

    def _put(
        self,
        records: Iterable[tuple[UserRecord, object]],
        unread: Sequence[Unread] = (),
        *,
        sync: bool = False,
        remove_missing: bool = False,
    ) -> UserSync:
        self._refuse_nested()
        few, many = few_records(records)
        if few is not None and not sync:
            return self._put_few([record for record, _ in few])
        with self._bulk() as connection:
            with self._step(connection):
                staged = BulkUsers(
                    connection,
                    many if few is None else few,
                    unread,
                    sync=sync,
                    remove_missing=remove_missing,
                )
            with self._step(connection):
                _, differ = staged.compare(connection)
                if not differ:
                    return staged.result(connection)
            with self._lock_users(connection):
                if self._WRITES_AHEAD:
                    staged.write_ahead(connection)
                with self._write_bulk(connection) as tx:
                    before = tx.revision
                    found = staged.apply(tx, tx.db)
        self._log_since(before, tx.revision)
        return attrs.evolve(found, revision=tx.revision)

    def _log_since(self, before: int, last: int) -> None:
        """Log the committed changes after a revision, of which there may be many."""
        # They hold already, so an error must not say otherwise.
        with suppress(StoreError):
            for first in range(before + 1, last + 1, _FEW):
                for row in self._read(
                    lambda db, first=first: db.rows(  # type: ignore[misc]
                        f"SELECT {CHANGE} FROM changes WHERE revision >= ? AND revision < ?"
                        " ORDER BY revision",
                        (first, min(first + _FEW, last + 1)),
                    ),
                    time.monotonic() + self.timeout,
                ):
                    log_change(change_of(row))

    def _put_few(self, records: Sequence[UserRecord]) -> UserSync:
        few = FewUsers(records)
        deadline = time.monotonic() + self.timeout
        revision, plan = self._read(few.plan, deadline)
        few.refuse(plan)
        if not plan.steps:
            return UserSync(revision=revision)
        with self._write(users=True, deadline=deadline) as tx:
            _, plan = few.plan(tx.db)
            few.refuse(plan)
            changes = carry_out(tx, plan)
        return UserSync(revision=_log(tx, changes))

    def rename_user(self, old: str, new: str) -> int:
        self._refuse_nested()
        name = canonical_username(old)
        with self._write(users=True) as tx:
            stored = tx.user(name)
            if stored is None or stored.removed:
                raise UnknownUser(name)
            few = FewUsers([UserRecord(0, attrs.evolve(stored.user, username=new), name)])
            _, plan = few.plan(tx.db)
            few.refuse(plan)
            changes = carry_out(tx, plan)
        return _log(tx, changes)

    def remove_users(self, usernames: Iterable[str]) -> int:
        self._refuse_nested()
        with self._bulk() as connection:
            with self._step(connection):
                stage_names(connection, canonical_usernames(usernames))
            with self._lock_users(connection), self._write_bulk(connection) as tx:
                changes = remove_named(tx, tx.db)
        return _log(tx, changes)

    def prune(self, before: datetime) -> int:
        """Delete the audit entries before a time, for the owner of the database.

        Only a prefix of the audit log is deleted, and never its latest entry; with it go the
        restrictions that had ended by then. A guard that has not synced since then starts over. A
        `PRUNE` entry, the anchor, lets `verify` continue: it has the first revision that was kept,
        the token before it, and the digest of the restrictions that are older. It is also appended
        if no entry can be deleted, but there is a restriction that no entry covers.

        Args:
            before: The time of the first entry to keep.

        Returns:
            How many entries were deleted.
        """
        self._refuse_nested()
        with self._bulk() as connection:
            with self._step(connection):
                pruning = Pruning(connection, before)
            if not pruning.needed:
                return 0
            if self._WRITES_AHEAD:
                pruning.delete(connection)
            with self._write_bulk(connection) as tx:
                changes = pruning.append(tx, tx.db)
                if not self._WRITES_AHEAD:
                    pruning.delete(tx.db)
        _log(tx, changes)
        return pruning.deleted

    def overview(
        self,
        accounts: Accounts,
        *,
        search: str = "",
        after: str | None = None,
        limit: int = 50,
        only: UserFilter | None = None,
    ) -> Page[UserOverview]:
        size, accounts, query = _limited(limit), check_accounts(accounts), Search.of(search)
        rules.check_filter(only)
        last = "" if after is None else _storable_bound(after)
        lines: list[tuple[str, UserOverview]] = []
        look, more = 2 * (size + 1), True  # a user may be found by several terms
        with self._snapshot() as db:
            now = self.now()
            while more and len(lines) <= size:
                rows = _usernames(db, accounts, query, last, look, only, now)
                names = list(dict.fromkeys(rows))
                while names and len(lines) <= size:
                    lines += _lines(db, accounts, names[: size + 1], now)
                    del names[: size + 1]
                more = len(rows) == look
                last, look = rows[-1] if rows else last, 4 * look
        items = tuple(line for _, line in lines[:size])
        return Page(items=items, next=lines[size - 1][0] if len(lines) > size else None)

    def counts(self, accounts: Accounts) -> UserCounts:
        accounts = check_accounts(accounts)
        with self._snapshot() as db:
            return _counts(db, accounts, self.now())

    def open_requests(
        self, accounts: Accounts, *, requested_by: str, limit: int = 100
    ) -> tuple[tuple[StoredRequest, User], ...]:
        size, accounts = _limited(limit), check_accounts(accounts)
        name = requested_by if encodable(requested_by) else ""
        with self._snapshot() as db:
            whose = Query("", ())
            if isinstance(accounts, frozenset):
                shown = _shown(db, accounts)
                whose = Query(f" AND {shown.text}", shown.params)
            rows = db.rows(
                _OPEN_REQUESTS % whose.text, (*whose.params, micros(self.now()), name, name, size)
            )
        first = len(REQUEST.split(", "))
        return tuple((request_of(row[:first]), user_of(row[first:])) for row in rows)

    def history(
        self,
        accounts: Accounts,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        size, accounts = _limited(limit), check_accounts(accounts)
        until = BIGGEST if before is None else max(min(before, BIGGEST), -BIGGEST)
        with self._snapshot() as db:
            wanted = _revisions(db, accounts, username, until, size)
            rows = db.rows(
                f"SELECT {CHANGE} FROM changes WHERE revision IN ({wanted.text})"
                " ORDER BY revision DESC",
                wanted.params,
            )
        items = tuple(change_of(row) for row in rows[:size])
        return Page(items=items, next=items[-1].revision if len(rows) > size else None)

    def record_sightings(self, seen: Sequence[Sighting]) -> tuple[Sighting, ...]:
        self._refuse_nested()
        with self._recording() as (db, now):
            wanted = rules.sightings_to_record(seen, now)
            return sightings.record(db, wanted, now, skip_locked=self._SKIP_LOCKED)

    @contextmanager
    def _recording(self) -> Iterator[tuple[Executor, datetime]]:
        """Begin a transaction that records sightings, and need not wait for other writers."""
        with self._write() as tx:
            yield tx.db, tx.now

    def sightings(self, username: str) -> tuple[Sighting, ...]:
        with self._snapshot() as db:
            return _seen_by(db, [username], self.now()).get(username, ())

    def forget_sightings(self, username: str, *, actor: Actor | None = None) -> int:
        self._refuse_nested()
        name = canonical_username(username)
        with self._write() as tx:
            count = sightings.forget(tx.db, name)
            changes = append_forgotten(tx, name, count, actor)
        _log(tx, changes)
        return count

    def policy_at(self, username: str, revision: int) -> Policy:
        with self._snapshot() as db:
            return record.policy_at(db, username if encodable(username) else "", revision)

    def revision_at(self, at: datetime) -> int:
        check_time("at", at)
        with self._snapshot() as db:
            return record.revision_at(db, at)

    def restrictions_changed(
        self, revision: int, *, after: str | None = None, limit: int = 100
    ) -> Page[tuple[Restriction, bool]]:
        size, last = _limited(limit), "" if after is None else _storable_bound(after)
        with self._snapshot() as db:
            return record.restrictions_changed(db, revision, last, size)

    def last_changes(self, usernames: Iterable[str]) -> Mapping[str, Change]:
        names = list(filter(encodable, usernames))
        with self._snapshot() as db:
            return record.last_changes(db, names)

    def passed_on(self, username: str, revision: int) -> bool:
        with self._snapshot() as db:
            return record.passed_on(db, username if encodable(username) else "", revision)

    def verify(self, *, expect: tuple[int, str] | None = None) -> Verification:
        with self._scan() as db:
            return record.verify(db, expect)


def _log(tx: WriteTransaction, changes: Iterable[Change]) -> int:
    """Log changes that were committed; return the revision."""
    for change in changes:
        log_change(change)
    return tx.revision
