"""Bulk writes of the SQL stores: any number of restrictions or users in one change.

Rows are staged in temporary tables and checked before the writer's lock is acquired. Under the
lock, only users whose policies have changed since then are checked again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, Final, Protocol

from ipguard import rules
from ipguard.addresses import AddressRange
from ipguard.audit import ChangedRestrictions, digest_of, micros
from ipguard.errors import (
    DuplicateRestriction,
    InvalidValue,
    StoreUnavailable,
    TooManyRestrictions,
    UnknownUser,
)
from ipguard.model import (
    EVERYBODY,
    Action,
    BulkCounts,
    Change,
    Restriction,
    StoredUser,
    Touched,
    User,
    UserSync,
)
from ipguard.rules import UserHeld, UserPlan, UserRecord, plan_users
from ipguard.store import (
    NAMED_AT_MOST,
    Transaction,
    Unread,
    append_users,
    refuse_all,
    user_entries,
)
from ipguard.stores._sql import (
    IS_PENDING,
    RESTRICTION,
    TOUCHED_SINCE,
    USER,
    Executor,
    Params,
    Row,
    columns,
    head,
    marks,
    restriction_of,
    restriction_row,
    touched_of,
    user_of,
    user_row,
)
from ipguard.stores._sql.sightings import move_staged as move_staged_sightings

_COLUMNS: Final = f"seq, username, {RESTRICTION}"
_UNNUMBERED: Final = (
    "username TEXT, id TEXT, first_ip BLOB, last_ip BLOB, label TEXT, created_at INTEGER,"
    " created_by TEXT, expires_at INTEGER"
)
_NEVER: Final = (-1, "")
CHANGES_READ: Final = 1_000
"""If more changes than this happened since the check, everything is checked again."""

# The `%s` in each statement is a condition that limits it to some users.
_UNKNOWN: Final = """
SELECT s.username FROM staged_restrictions s LEFT JOIN users u ON u.username = s.username
WHERE (u.username IS NULL OR u.removed = 1) %s ORDER BY s.seq LIMIT 1
"""
_TWICE: Final = """
SELECT s.username, s.first_ip, s.last_ip FROM staged_restrictions s WHERE true %s
GROUP BY s.username, s.first_ip, s.last_ip HAVING count(*) > 1 ORDER BY min(s.seq) LIMIT 1
"""
# All present restrictions of the users concerned; `seq` is of the staged restriction to the same
# addresses, and `same` whether its label and expiry are the same too. CROSS JOIN makes SQLite keep
# this order.
_FIND_PRESENT: Final = """
INSERT INTO present_restrictions (id, username, seq, expires_at, same)
SELECT r.id, r.username, s.seq, r.expires_at, CASE WHEN s.label = r.label
    AND (s.expires_at = r.expires_at OR (s.expires_at IS NULL AND r.expires_at IS NULL))
    THEN 1 ELSE 0 END
FROM (SELECT DISTINCT s.username FROM staged_restrictions s WHERE true %s) n
CROSS JOIN restrictions r
LEFT JOIN staged_restrictions s
    ON s.username = r.username AND s.first_ip = r.first_ip AND s.last_ip = r.last_ip
WHERE r.username = n.username %s
"""
_LIVE: Final = "p.seq IS NOT NULL AND (p.expires_at IS NULL OR p.expires_at > ?)"
# The most rows of one user; and with them the restrictions that stay, unless lists are replaced.
_MOST: Final = """
SELECT COALESCE(max(n.given), 0), COALESCE(max(n.given + COALESCE(p.others, 0)), 0) FROM (
    SELECT username, count(*) AS given FROM staged_restrictions GROUP BY username
) n LEFT JOIN (
    SELECT username, count(*) - count(DISTINCT seq) AS others
    FROM present_restrictions GROUP BY username
) p ON p.username = n.username
"""
_TOO_MANY: Final = """
SELECT n.username FROM (
    SELECT s.username, count(*) - count(k.seq) AS added, min(s.seq) AS seq
    FROM staged_restrictions s LEFT JOIN kept_rows k ON k.seq = s.seq
    GROUP BY s.username
) n LEFT JOIN (
    SELECT p.username, count(*) - count(e.id) AS stay
    FROM present_restrictions p LEFT JOIN ended_restrictions e ON e.id = p.id GROUP BY p.username
) p ON p.username = n.username
WHERE n.added > 0 AND n.added + COALESCE(p.stay, 0) > ? ORDER BY n.seq LIMIT 1
"""
_PRESENT_LIVE: Final = f"FROM present_restrictions p WHERE {_LIVE}"
_KEEP: Final = (
    f"INSERT INTO kept_rows (seq, id) SELECT p.seq, min(p.id) {_PRESENT_LIVE} %s GROUP BY p.seq"
)
# NOT EXISTS, because PostgreSQL compares each row with each for a long NOT IN.
_END_OTHERS: Final = """
INSERT INTO ended_restrictions (id) SELECT p.id FROM present_restrictions p
WHERE NOT EXISTS (SELECT 1 FROM kept_rows k WHERE k.seq = p.seq AND k.id = p.id)
"""
_END_EXPIRED: Final = """
INSERT INTO ended_restrictions (id) SELECT p.id FROM present_restrictions p
WHERE p.seq IS NOT NULL AND NOT EXISTS (SELECT 1 FROM kept_rows k WHERE k.seq = p.seq)
"""
_NOT_KEPT: Final = "NOT EXISTS (SELECT 1 FROM kept_rows k WHERE k.seq = s.seq)"
_NOT_LATE: Final = "NOT EXISTS (SELECT 1 FROM late_rows l WHERE l.seq = s.seq)"
_SORTED_KEY: Final = "id, username"
_BY_KEY: Final = f"{_SORTED_KEY}, {RESTRICTION.removeprefix('id, ')}"
"""The columns of `ipguard.audit.ChangedRestrictions.add`."""
# `same` is NULL for rows that no live restriction has the addresses of.
_DIGESTED: Final = f"""
SELECT {columns(_BY_KEY, "s")}, k.same FROM staged_restrictions s LEFT JOIN (
    SELECT p.seq, max(p.same) AS same FROM present_restrictions p
    WHERE p.seq IS NOT NULL AND (p.expires_at IS NULL OR p.expires_at > %d) GROUP BY p.seq
) k ON k.seq = s.seq ORDER BY {columns(_SORTED_KEY, "s")}
"""
_ENDS: Final = f"""
SELECT {columns(_SORTED_KEY, "p")} FROM present_restrictions p LEFT JOIN (
    SELECT p.seq, min(p.id) AS id FROM present_restrictions p
    WHERE p.seq IS NOT NULL AND (p.expires_at IS NULL OR p.expires_at > %%d) %s GROUP BY p.seq
) k ON k.seq = p.seq %s ORDER BY {columns(_SORTED_KEY, "p")}
"""
# As `_END_OTHERS` and `_END_EXPIRED`, before it is known which rows are kept.
_ENDS_OTHERS: Final = _ENDS % ("AND p.same = 1", "AND k.id = p.id WHERE k.seq IS NULL")
_ENDS_EXPIRED: Final = _ENDS % ("", "WHERE p.seq IS NOT NULL AND k.seq IS NULL")
_BEGUN_AT: Final = (
    f"SELECT {_BY_KEY} FROM restrictions WHERE began = {{0}} OR began IN"
    f" (SELECT number FROM imports WHERE revision = {{0}}) ORDER BY {_SORTED_KEY}"
)
_ENDED_AT: Final = (
    f"SELECT {_SORTED_KEY} FROM past_restrictions WHERE ended = {{0}} ORDER BY {_SORTED_KEY}"
)
_CANCEL_DELETIONS: Final = f"""
UPDATE requests SET state = 'cancelled' WHERE {IS_PENDING} AND expires_at > ?
AND restriction_id IN (SELECT id FROM ended_restrictions)
"""


class BulkRestrictions:
    """Restrictions to add in one change, staged on one connection.

    This is `rules.judge_additions` as statements about sets; the conformance suite compares the
    two. The restrictions are read to the end into a temporary table. Then, before the writer's lock
    is acquired, `judge` sorts them or, with `ahead`, writes them into the store's table already,
    where other transactions do not see them: little is left to do while the lock is held.
    """

    def __init__(self, db: Executor, restrictions: Iterable[Restriction], *, ahead: bool) -> None:
        self._table = "staged_restrictions"
        self._write_ahead = ahead
        self._ahead = False
        self._number = _new_number()
        self._seen, self._most = _NEVER, (0, 0)
        # For each option, how many rows are kept, how many restrictions end, and the digest.
        self._digests: dict[str, tuple[int, int, ChangedRestrictions]] = {}
        self._digest: ChangedRestrictions | None = None
        self._refused: str | None = None
        db.run(
            f"CREATE TEMPORARY TABLE staged_restrictions (seq INTEGER PRIMARY KEY, {_UNNUMBERED})"
        )
        db.run(
            "CREATE TEMPORARY TABLE present_restrictions"
            " (id TEXT, username TEXT, seq INTEGER, expires_at INTEGER, same INTEGER)"
        )
        db.run("CREATE TEMPORARY TABLE ended_restrictions (id TEXT PRIMARY KEY)")
        db.run("CREATE TEMPORARY TABLE kept_rows (seq INTEGER PRIMARY KEY, id TEXT)")
        # The rows that were not written ahead, because the user had a live restriction to them.
        db.run("CREATE TEMPORARY TABLE late_rows (seq INTEGER PRIMARY KEY)")
        rows = ((seq, *restriction_row(each)) for seq, each in enumerate(restrictions))
        db.insert_many("staged_restrictions", _COLUMNS, rows)
        db.run("CREATE INDEX staged_addresses ON staged_restrictions (username, first_ip, last_ip)")

    def judge(self, db: Executor, now: datetime) -> None:
        """Compare the restrictions with the present ones, and prepare for the lock."""
        self._seen = head(db)
        try:
            self._check(db)
        except (UnknownUser, DuplicateRestriction) as exc:
            self._refused = exc.username
            return
        self._find_present(db)
        ((alone, joined),) = db.rows(_MOST)
        self._most = alone, joined
        self._digest_rows(db, micros(now))
        if self._write_ahead:
            db.run(
                f"INSERT INTO late_rows (seq) SELECT DISTINCT p.seq {_PRESENT_LIVE}", (micros(now),)
            )
            self._insert(db, _NOT_LATE)
            self._ahead = True
            return
        table = f"(place INTEGER PRIMARY KEY, seq INTEGER, {_UNNUMBERED})"
        db.run(f"CREATE TEMPORARY TABLE sorted_restrictions {table}")
        db.run(
            f"INSERT INTO sorted_restrictions ({_COLUMNS}) SELECT {_COLUMNS}"
            " FROM staged_restrictions ORDER BY username, created_at, id"
        )
        self._table = "sorted_restrictions"

    def withdraw(self, db: Executor) -> None:
        """Undo what was written ahead, unless it has been added.

        The transaction reads or writes restrictions before it adds these, so all of them have to
        be checked again.
        """
        self._seen = _NEVER
        if self._ahead:
            self._take_back(db, _NOT_LATE)
            self._ahead = False

    def _digest_rows(self, db: Executor, at: int) -> None:
        """Compute the digest of the addition for each option, as things are now.

        Without an option a live restriction to the same addresses is refused, so none is kept.
        """
        options = {"none": _ENDS_EXPIRED, "same": _ENDS_OTHERS, "live": _ENDS_EXPIRED}
        digests = {option: ChangedRestrictions() for option in options}
        kept, ended = dict.fromkeys(options, 0), dict.fromkeys(options, 0)
        ((live,),) = db.rows(f"SELECT count(*) {_PRESENT_LIVE}", (at,))
        different = digests if live else {"none": digests["none"]}
        for *row, same in db.stream(_DIGESTED % at):
            for option, digest in different.items():
                if option == "none" or (same is None if option == "live" else same != 1):
                    digest.add(row)
                else:
                    kept[option] += 1
        for option, statement in options.items():
            digest = digests[option] if live else digests["none"].copy()
            for ending in db.stream(statement % at):
                digest.end(ending)
                ended[option] += 1
            self._digests[option] = kept[option], ended[option], digest

    def digest(self, db: Executor, revision: int, *, alone: bool) -> str:
        """Return the digest of the entry that the addition belongs to.

        Args:
            db: The connection.
            revision: The revision of the entry.
            alone: Whether the transaction has changed no other restrictions since the last entry.
        """
        if self._digest is not None and alone:
            return self._digest.text()
        # What is in the record is what will be verified, whatever led to it.
        digest = ChangedRestrictions()
        for row in db.stream(_BEGUN_AT.format(revision)):
            digest.add(row)
        for row in db.stream(_ENDED_AT.format(revision)):
            digest.end(row)
        return digest.text()

    def add(
        self,
        db: Executor,
        now: datetime,
        revision: int,
        *,
        per_user: int,
        replace: bool,
        skip_existing: bool,
    ) -> BulkCounts:
        """Add the restrictions under the lock; see `ipguard.store.Transaction.add_staged`."""
        # Check everything before writing anything: a caller may catch the error and continue.
        at, changed = micros(now), self._check_again(db)
        self._decide(db, at, replace=replace, skip_existing=skip_existing)
        if changed or self._most[not replace] > per_user:
            for (username,) in db.rows(_TOO_MANY, (per_user,)):
                raise TooManyRestrictions(username, per_user)
        counts = ("staged_restrictions", "kept_rows", "ended_restrictions")
        (given, kept, ended) = (db.rows(f"SELECT count(*) FROM {each}")[0][0] for each in counts)
        if ended:
            db.run("DELETE FROM restrictions WHERE id IN (SELECT id FROM ended_restrictions)")
            db.run(_CANCEL_DELETIONS, (at,))
        if not self._ahead:
            self._insert(db, _NOT_KEPT)
        else:
            if changed and kept:
                self._take_back(db, f"NOT ({_NOT_KEPT}) AND {_NOT_LATE}")
            self._insert(db, f"NOT ({_NOT_LATE}) AND {_NOT_KEPT}")
        if given > kept:
            db.run("INSERT INTO imports (number, revision) VALUES (?, ?)", (self._number, revision))
        option = "same" if replace else "live" if skip_existing else "none"
        as_judged = self._digests.get(option)
        # With time, fewer rows are kept and more end; as many are the same ones.
        same = not changed and as_judged is not None and as_judged[:2] == (kept, ended)
        self._digest = as_judged[2] if same and as_judged is not None else None
        # They are now restrictions like all others.
        self._ahead, self._seen, self._number = False, _NEVER, _new_number()
        return BulkCounts(added=int(given - kept), kept=int(kept), ended=int(ended))

    def _check_again(self, db: Executor) -> bool:
        """Check the users that have changed since `judge`; return whether any may have."""
        changed = self._changed(db)
        if self._refused is not None:
            if not changed:
                self._check(db, *_only(db, [self._refused]))
            changed = EVERYBODY  # the user was registered since
        if changed:
            only = ("", ()) if isinstance(changed, Touched) else _only(db, changed)
            self._check(db, *only)
            self._find_present(db, *only)
        return bool(changed)

    def _decide(self, db: Executor, at: int, *, replace: bool, skip_existing: bool) -> None:
        """Record which rows are kept, and which restrictions end; refuse duplicates."""
        db.run("DELETE FROM kept_rows")
        db.run("DELETE FROM ended_restrictions")
        if replace or skip_existing:
            db.run(_KEEP % ("AND p.same = 1" if replace else ""), (at,))
        else:
            self._refuse_duplicates(db, at)
        db.run(_END_OTHERS if replace else _END_EXPIRED)

    def _insert(self, db: Executor, condition: str) -> None:
        order = "username, created_at, id" if self._table == "staged_restrictions" else "place"
        db.run(
            f"INSERT INTO restrictions (username, {RESTRICTION}, began)"
            f" SELECT username, {RESTRICTION}, {self._number} FROM {self._table} s"
            f" WHERE {condition} ORDER BY {order}"
        )

    @staticmethod
    def _take_back(db: Executor, condition: str) -> None:
        staged = f"SELECT s.id FROM staged_restrictions s WHERE {condition}"
        db.run(f"DELETE FROM restrictions WHERE id IN ({staged})")

    def _changed(self, db: Executor) -> frozenset[str] | Touched:
        """Return the users whose policy may have changed since `judge`."""
        rows = db.rows(TOUCHED_SINCE, (self._seen[0], CHANGES_READ + 1))
        if len(rows) > CHANGES_READ or not _exists(db, self._seen):
            return EVERYBODY
        return touched_of(row[0] for row in rows)

    def _check(self, db: Executor, only: str = "", names: Params = ()) -> None:
        for (username,) in db.rows(_UNKNOWN % only, names):
            raise UnknownUser(username)
        for username, first, last in db.rows(_TWICE % only, names):
            addresses = str(AddressRange.from_packed(first, last))
            raise DuplicateRestriction(username, addresses, "row")

    def _find_present(self, db: Executor, only: str = "", names: Params = ()) -> None:
        """Record the present restrictions of all users, or of those that have changed."""
        users = f"SELECT s.username FROM staged_restrictions s WHERE true {only}"
        some = f" WHERE username IN ({users})" if only else ""
        db.run(f"DELETE FROM present_restrictions{some}", names)
        # Those that were written ahead are not present.
        others = f"AND (s.seq IS NULL OR r.id <> s.id OR NOT ({_NOT_LATE}))"
        db.run(_FIND_PRESENT % (only, others if self._ahead else ""), names)

    def _refuse_duplicates(self, db: Executor, at: int) -> None:
        for restriction_id, seq in db.rows(
            f"SELECT p.id, p.seq {_PRESENT_LIVE} ORDER BY p.seq LIMIT 1", (at,)
        ):
            staged = f"SELECT username, {RESTRICTION} FROM staged_restrictions WHERE seq = ?"
            held = f"SELECT username, {RESTRICTION} FROM restrictions WHERE id = ?"
            ((name, *wanted),) = db.rows(staged, (seq,))
            ((_, *found),) = db.rows(held, (restriction_id,))
            raise rules.duplicate(
                restriction_of(name, tuple(found)), restriction_of(name, tuple(wanted))
            )


def _new_number() -> int:
    """Return the number of an import that does not know its revision yet."""
    return -1 - secrets.randbits(62)


def _exists(db: Executor, entry: tuple[int, str]) -> bool:
    """Return whether an audit entry exists; if so, what was read before misses no pruned entry."""
    revision, token = entry
    return db.rows("SELECT token FROM changes WHERE revision = ?", (revision,)) == [(token,)]


def _only(db: Executor, usernames: Iterable[str]) -> tuple[str, Params]:
    """Return a condition that limits a statement to some users, and its parameter."""
    return f"AND {db.among('s.username')}", (db.texts(usernames),)


_CHUNK: Final = 1_000
_FEW: Final = 100
_TRIES: Final = 3

_RESTRICTED: Final = (
    "CASE WHEN EXISTS (SELECT 1 FROM restrictions r WHERE r.username = %s) THEN 1 ELSE 0 END"
)
_HELD_USERS: Final = f"""
SELECT h.revision, j.value, {columns(USER, "u")}, u.removed, {_RESTRICTED % "j.value"}
FROM head h LEFT JOIN %s ON 1 = 1 LEFT JOIN users u ON u.username = j.value WHERE h.id = 1
UNION ALL
SELECT h.revision, u.username, {columns(USER, "u")}, u.removed, {_RESTRICTED % "u.username"}
FROM head h JOIN %s ON 1 = 1 JOIN users u ON u.uid = j.value WHERE h.id = 1
"""
_LINKED_BY_UID: Final = """
FROM staged_users s JOIN users u ON u.uid = s.uid AND u.username <> s.username
JOIN staged_users t ON t.username = u.username
"""
_FIND_LINKED: Final = f"""
INSERT INTO linked_names (username)
SELECT s.username FROM staged_users s JOIN staged_users t ON t.uid = s.uid
WHERE t.username <> s.username
UNION SELECT s.username {_LINKED_BY_UID} UNION SELECT u.username {_LINKED_BY_UID}
"""
_FIND_CHANGED: Final = """
INSERT INTO changed_names (username)
SELECT s.username FROM staged_users s LEFT JOIN users u ON u.username = s.username
WHERE u.username IS NULL OR u.removed = 1 OR COALESCE(u.spelling, u.username) <> s.spelling
    OR u.full_name <> s.full_name OR u.account_id <> s.account_id
    OR COALESCE(u.email, '') <> COALESCE(s.email, '') OR COALESCE(u.uid, '') <> s.uid
UNION SELECT username FROM linked_names
"""
_JUDGED: Final = ", ".join(
    (
        "linked, seq, given, restricted, kept, removed, other_removed",
        *(f"{kind}_{name}" for kind in "suo" for name in USER.split(", ")),
    )
)
_SORT_CHANGED: Final = f"""
INSERT INTO sorted_users (place, {_JUDGED})
SELECT row_number() OVER (ORDER BY s.username, s.seq),
    CASE WHEN l.username IS NULL THEN 0 ELSE 1 END, s.seq, s.given,
    {_RESTRICTED % "s.username"},
    CASE WHEN EXISTS (SELECT 1 FROM kept_users k WHERE k.username = u.username OR k.uid = u.uid)
        THEN 1 ELSE 0 END,
    u.removed, o.removed, {columns(USER, "s")}, {columns(USER, "u")}, {columns(USER, "o")}
FROM changed_names c JOIN staged_users s ON s.username = c.username
LEFT JOIN linked_names l ON l.username = s.username
LEFT JOIN users u ON u.username = s.username
LEFT JOIN users o ON o.uid = s.uid AND o.username <> s.username
"""
_FIND_MISSING: Final = """
INSERT INTO missing_users (username, account_id)
SELECT u.username, u.account_id FROM users u WHERE u.removed = 0
    AND NOT EXISTS (SELECT 1 FROM staged_users s WHERE s.username = u.username)
    AND NOT EXISTS (SELECT 1 FROM staged_users s WHERE s.uid = u.uid)
    AND NOT EXISTS (SELECT 1 FROM kept_users k WHERE k.username = u.username)
    AND NOT EXISTS (SELECT 1 FROM kept_users k WHERE k.uid = u.uid)
"""
_STEP: Final = f"{USER}, old, was, added, changed, free, terms"
_APPLIED: Final = f"""
ON CONFLICT (username) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in USER.split(", ")[1:])}, removed = %s
"""
_APPLY_USERS: Final = f"""
INSERT INTO users ({USER}, removed) SELECT {USER}, 0 FROM changed_users WHERE true {_APPLIED % 0}
"""
_APPLY_USER: Final = (
    f"INSERT INTO users ({USER}, removed) VALUES ({marks(USER)}, ?)" + _APPLIED % "excluded.removed"
)
_RENAMED: Final = """
SELECT username FROM changed_users WHERE old IS NOT NULL
UNION SELECT old FROM changed_users WHERE old IS NOT NULL
"""
_MOVED: Final = f"username, {RESTRICTION}"
_MOVED_BY_USER: Final = f"SELECT {_BY_KEY}, old FROM moved_restrictions ORDER BY username, id"
_TERM: Final = "username, term, account_id"
_ADD_TERM: Final = f"INSERT INTO search_terms ({_TERM}) VALUES ({marks(_TERM)})"
# Older libraries leave the account out of some of a user's terms, and write fewer of them.
_OUTDATED: Final = """
SELECT username, full_name, account_id FROM users WHERE username IN (
    SELECT username FROM search_terms WHERE account_id IS NULL LIMIT ?
)
"""
_USERS_CHANGED: Final = """
SELECT 1 FROM changes WHERE revision > ?
AND action IN ('put_users', 'remove_users', 'rename_user', 'move_user') LIMIT 1
"""


def _write_terms(db: Executor, users: Iterable[Row]) -> None:
    """Write the search terms of users (name, full name, account), and of some outdated ones."""
    by_name = {row[0]: row for row in (*db.rows(_OUTDATED, (_FEW,)), *users)}
    if by_name:
        db.run(f"DELETE FROM search_terms WHERE {db.among('username')}", (db.texts(by_name),))
    for username, full_name, account_id in by_name.values():
        for term in rules.search_terms(username, full_name, account_id):
            db.run(_ADD_TERM, (username, term, account_id))


def save_users(db: Executor, users: Sequence[StoredUser]) -> None:
    """Add a few users, or replace those with their usernames."""
    if users:
        rows = [user_row(stored.user) for stored in users]
        _write_terms(db, [(row[0], row[2], row[3]) for row in rows])
        for row, stored in zip(rows, users, strict=True):
            db.run(_APPLY_USER, (*row, int(stored.removed)))


class FewUsers:
    """A few users to add or update, as after a login or a sign-up.

    One read compares them with the stored ones. If none differs, no write transaction is begun.
    """

    def __init__(self, records: Sequence[UserRecord]) -> None:
        self._records = records

    def plan(self, db: Executor) -> tuple[int, UserPlan]:
        """Return the store's revision, and what the users change."""
        records = self._records
        names = {record.user.username for record in records}
        names.update(record.renames for record in records if record.renames is not None)
        uids = {record.user.uid for record in records if record.user.uid is not None}
        rows = db.rows(
            _HELD_USERS % (db.each(), db.each()), (db.texts(sorted(names)), db.texts(sorted(uids)))
        )
        held: dict[str, UserHeld] = {}
        for _, name, *user, removed, restricted in rows:
            if name is not None and name not in held:
                found = None if removed is None else user_of(tuple(user))
                held[name] = UserHeld(found, removed == 1, restricted == 1)
        return rows[0][0], plan_users(records, held)

    def refuse(self, plan: UserPlan) -> None:
        """Raise the error of `put_users` if a plan refuses records."""
        users = {record.seq: record.user for record in self._records}
        refuse_all((users[seq], error) for seq, error in plan.refused)


class BulkTransaction(Transaction, Protocol):
    """A write transaction that `BulkUsers` can use."""

    def stage_all(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Stage entries, at least one and any number, for `append_staged`."""

    def append_staged(self) -> None:
        """Append the entries that were staged."""


class BulkUsers:
    """Any number of users to add, update or remove, staged on one connection.

    They are compared before the lock is acquired, and again under the lock only if users were added
    or removed since then. `ipguard.rules.plan_users` judges the records of each username by
    themselves, and those all at once that other records can free a username for.
    """

    def __init__(
        self,
        db: Executor,
        records: Iterable[tuple[UserRecord, object]],
        unread: Sequence[Unread] = (),
        *,
        sync: bool = False,
        remove_missing: bool = False,
    ) -> None:
        self._seen: tuple[int, str] = (-1, "")
        self._written = False
        self._unread, self._sync, self._remove_missing = unread, sync, remove_missing
        self._removed: list[User] = []
        self._refused: list[Unread] = []
        texts = {name: f"{name} TEXT" for name in USER.split(", ")}
        user = ", ".join(texts.values())
        db.run(f"CREATE TEMPORARY TABLE staged_users (seq INTEGER PRIMARY KEY, {user}, given TEXT)")
        db.run("CREATE TEMPORARY TABLE kept_users (username TEXT, uid TEXT)")
        db.run("CREATE TEMPORARY TABLE linked_names (username TEXT PRIMARY KEY)")
        db.run("CREATE TEMPORARY TABLE changed_names (username TEXT PRIMARY KEY)")
        numbers = "linked INTEGER, seq INTEGER, given TEXT, restricted INTEGER, kept INTEGER"
        three = ", ".join(f"{kind}_{text}" for kind in "suo" for text in texts.values())
        db.run(
            f"CREATE TEMPORARY TABLE sorted_users (place INTEGER PRIMARY KEY, {numbers},"
            f" removed INTEGER, other_removed INTEGER, {three})"
        )
        flags = "added INTEGER, changed INTEGER, free INTEGER, terms INTEGER"
        db.run(
            f"CREATE TEMPORARY TABLE changed_users ({user}, old TEXT, was TEXT, {flags},"
            " PRIMARY KEY (username))"
        )
        db.run("CREATE TEMPORARY TABLE missing_users (username TEXT PRIMARY KEY, account_id TEXT)")
        db.run("CREATE TEMPORARY TABLE changed_terms (username TEXT, term TEXT, account_id TEXT)")
        rows = (
            (
                record.seq,
                *user_row(record.user),
                json.dumps(dict(given)) if isinstance(given, Mapping) else None,
            )
            for record, given in records
        )
        db.insert_many("staged_users", f"seq, {USER}, given", rows)
        db.insert_many("kept_users", "username, uid", (each.keys for each in unread))
        db.run("CREATE INDEX staged_users_by_name ON staged_users (username, seq)")
        db.run("CREATE INDEX staged_users_by_uid ON staged_users (uid)")
        if remove_missing and not db.rows("SELECT 1 FROM staged_users LIMIT 1"):
            raise InvalidValue("records", "holds no user, and all would be removed")

    def compare(self, db: Executor) -> tuple[int, bool]:
        """Find what the records change; return the revision, and whether anything changes.

        Raises:
            UsernameCollision: Records are refused, and it is not `sync_users`.
        """
        for _ in range(_TRIES):
            self._compare(db)
            if not self._users_changed(db):
                break
        if self._refused and not self._sync:
            refuse_all((each.given, each.error) for each in self._refused)  # type: ignore[misc]
        found = db.rows("SELECT 1 FROM changed_users LIMIT 1")
        found += db.rows("SELECT 1 FROM missing_users LIMIT 1")
        return self._seen[0], bool(found)

    def _compare(self, db: Executor) -> None:
        self._seen = head(db)
        self._removed, self._refused = [], []
        for table in ("linked_names", "changed_names", "sorted_users", "changed_users"):
            db.run(f"DELETE FROM {table}")
        for table in ("changed_terms", "missing_users"):
            db.run(f"DELETE FROM {table}")
        db.run(_FIND_LINKED)
        db.run(_FIND_CHANGED)
        db.run(_SORT_CHANGED)
        db.insert_many("changed_users", _STEP, self._steps(db))
        db.insert_many("changed_terms", _TERM, self._terms(db))
        removed = ((user.username, user.account_id) for user in self._removed)
        db.insert_many("missing_users", "username, account_id", removed)
        if self._remove_missing:
            db.run(_FIND_MISSING)
        self._refused.sort(key=itemgetter(0))

    def _steps(self, db: Executor) -> Iterator[Row]:
        """Yield the rows of `changed_users`."""
        linked: list[Row] = []
        others: list[Row] = []
        for _, group in groupby(_pages(db, "sorted_users", "place", _JUDGED, 0), itemgetter(8)):
            rows = list(group)
            (linked if rows[0][1] else others).extend(rows)
            if len(others) >= _CHUNK:
                yield from self._judge(others)
                others.clear()
        yield from self._judge(linked)
        yield from self._judge(others)

    def _judge(self, rows: Iterable[Row]) -> Iterator[Row]:
        size = len(USER.split(", "))
        held: dict[str, UserHeld] = {}
        records: dict[int, tuple[UserRecord, str | None]] = {}
        for _, _, seq, given, restricted, kept, removed, other_removed, *fields in rows:
            user, there, other = (tuple(fields[n * size : n * size + size]) for n in range(3))
            record = UserRecord(seq, user_of(user))
            records[seq] = record, given
            found = None if there[0] is None else user_of(there)
            held[user[0]] = UserHeld(found, removed == 1, restricted == 1, kept == 1)
            if other[0] is not None:
                held.setdefault(other[0], UserHeld(user_of(other), other_removed == 1))
        plan = plan_users(
            (record for record, _ in records.values()), held, remove_missing=self._remove_missing
        )
        self._removed += plan.removed
        for seq, error in plan.refused:
            record, given = records[seq]
            self._refused.append(Unread(seq, json.loads(given) if given else record.user, error))
        for step in plan.steps:
            before = step.before
            known = before is not None and user_row(before)[2:4] == user_row(step.user)[2:4]
            yield (
                *user_row(step.user),
                step.old,
                before.account_id if before is not None and step.moved else None,
                int(step.added),
                int(step.changed),
                int(step.free),
                int(not known or step.old is not None),
            )

    @staticmethod
    def _terms(db: Executor) -> Iterator[Row]:
        named = "full_name, account_id, terms"
        for username, full_name, account_id, terms in _pages(
            db, "changed_users", "username", named, ""
        ):
            if terms:
                for term in sorted(rules.search_terms(username, full_name, account_id)):
                    yield username, term, account_id

    def write_ahead(self, db: Executor) -> None:
        """Write the users before the writer's lock is acquired, under the users' lock."""
        if self._users_changed(db):
            self.compare(db)
        self._write(db)
        self._written = True

    def apply(self, tx: BulkTransaction, db: Executor) -> UserSync:
        """Write the differences under the lock; return them, without the revision."""
        if self._users_changed(db) or self._taken(db):
            # By a server with an older version of ipguard, which does not take the users' lock; or
            # a username that was to pass to another user has got a restriction.
            if self._written:
                raise StoreUnavailable("other users were written at the same time; try again")
            self.compare(db)
        if not self._written:
            self._write(db)
        self._cancel_requests(db)
        move_staged_sightings(db)
        found = self.result(db)
        self._append(tx, db, found)
        return found

    def result(self, db: Executor) -> UserSync:
        """Return what is changed, and the records that are refused; without the revision."""
        ((added, changed, renamed, moved),) = db.rows(
            "SELECT COALESCE(sum(added), 0), COALESCE(sum(changed), 0), count(old), count(was)"
            " FROM changed_users"
        )
        ((removed,),) = db.rows("SELECT count(*) FROM missing_users")
        refused = sorted((*self._unread, *self._refused), key=itemgetter(0))
        return UserSync(
            revision=self._seen[0],
            added=int(added),
            changed=int(changed),
            renamed=renamed,
            moved=moved,
            removed=removed,
            refused=tuple((each.given, each.error) for each in refused),
        )

    def _users_changed(self, db: Executor) -> bool:
        """Return whether users were added or removed since `compare`."""
        changed = db.rows(_USERS_CHANGED, (self._seen[0],))
        return bool(changed) or not _exists(db, self._seen)

    @staticmethod
    def _taken(db: Executor) -> bool:
        return bool(
            db.rows(
                "SELECT 1 FROM changed_users c JOIN restrictions r ON r.username = c.username"
                " WHERE c.free = 1 LIMIT 1"
            )
        )

    @staticmethod
    def _write(db: Executor) -> None:
        missing = "SELECT username FROM missing_users"
        db.run(f"UPDATE users SET removed = 1 WHERE username IN ({missing})")
        old = "SELECT old FROM changed_users WHERE old IS NOT NULL"
        db.run(f"UPDATE users SET removed = 1, uid = NULL WHERE username IN ({old})")
        db.run(
            "DELETE FROM search_terms"
            " WHERE username IN (SELECT username FROM changed_users WHERE terms = 1)"
        )
        db.run(f"INSERT INTO search_terms ({_TERM}) SELECT {_TERM} FROM changed_terms")
        db.run(_APPLY_USERS)
        _write_terms(db, ())

    @staticmethod
    def _cancel_requests(db: Executor) -> None:
        db.run(
            f"UPDATE requests SET state = 'cancelled' WHERE {IS_PENDING}"
            f" AND username IN ({_RENAMED} UNION SELECT username FROM missing_users)"
        )

    @staticmethod
    def _find_moved(db: Executor) -> None:
        """Record the restrictions of users that are renamed."""
        db.run(
            f"CREATE TEMPORARY TABLE moved_restrictions ({_UNNUMBERED}, old TEXT, began INTEGER)"
        )
        db.run(
            f"INSERT INTO moved_restrictions ({_MOVED}, old, began)"
            f" SELECT c.username, {columns(RESTRICTION, 'r')}, c.old, COALESCE(i.revision, r.began)"
            " FROM changed_users c JOIN restrictions r ON r.username = c.old"
            " LEFT JOIN imports i ON i.number = r.began"
        )

    @staticmethod
    def _entries(db: Executor) -> Iterator[dict[str, Any]]:
        """Yield the entries of users that are renamed or moved to another account."""
        users = (
            (old or name, name, was or account, account)
            for name, old, was, account in _pages(
                db, "changed_users", "username", "old, was, account_id", ""
            )
            if old is not None or was is not None
        )
        # Both are sorted by the new username.
        moved = groupby(db.stream(_MOVED_BY_USER), itemgetter(1))
        owner, rows = next(moved, (None, iter(())))
        for entry in user_entries(users):
            if entry["action"] is Action.RENAME_USER and entry["username"] == owner:
                held = list(rows)
                entry["restrictions"] = digest_of(
                    (row[:-1] for row in held), ((row[0], row[-1]) for row in held)
                )
                owner, rows = next(moved, (None, iter(())))
            yield entry

    @staticmethod
    def _move_restrictions(db: Executor) -> None:
        """Move restrictions to the new usernames, each at the revision of its user's entry."""
        entry = "JOIN staged_changes s ON s.username = m.username AND s.action = 'rename_user'"
        db.run(
            f"INSERT INTO past_restrictions (username, ended, {RESTRICTION}, began)"
            f" SELECT m.old, s.revision, {columns(RESTRICTION, 'm')}, m.began"
            f" FROM moved_restrictions m {entry}"
        )
        db.run("DELETE FROM restrictions WHERE id IN (SELECT id FROM moved_restrictions)")
        db.run(
            f"INSERT INTO restrictions ({_MOVED}, began) SELECT {columns(_MOVED, 'm')}, s.revision"
            f" FROM moved_restrictions m {entry}"
        )

    def _append(self, tx: BulkTransaction, db: Executor, found: UserSync) -> None:
        removed = db.rows(
            "SELECT username, account_id FROM missing_users ORDER BY username LIMIT ?",
            (NAMED_AT_MOST + 1,),
        )
        counts = {"removed": found.removed}
        append_users(tx, Action.REMOVE_USERS, counts, removed, _names(removed))
        if found.renamed or found.moved:
            self._find_moved(db)
            tx.stage_all(self._entries(db))
            self._move_restrictions(db)
            tx.append_staged()
        put, added = (
            db.rows(
                f"SELECT username, account_id FROM changed_users WHERE {condition} = 1"
                " ORDER BY username LIMIT ?",
                (most,),
            )
            for condition, most in (("added + changed", 2), ("added", NAMED_AT_MOST + 1))
        )
        counts = {"added": found.added, "updated": found.changed}
        append_users(tx, Action.PUT_USERS, counts, put, _names(added))


def _names(rows: Iterable[Row]) -> Iterator[str]:
    return (row[0] for row in rows)


def _pages(db: Executor, table: str, key: str, names: str, first: object) -> Iterator[Row]:
    """Yield the key and these columns of each row of a table after a key, in the key's order."""
    while True:
        rows = db.rows(
            f"SELECT {key}, {names} FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT ?",
            (first, _CHUNK),
        )
        yield from rows
        if len(rows) < _CHUNK:
            return
        first = rows[-1][0]


def few_records(
    records: Iterable[tuple[UserRecord, object]],
) -> tuple[list[tuple[UserRecord, object]] | None, Iterable[tuple[UserRecord, object]]]:
    """Return records in a list if they are few, else an iterator over all of them."""
    source = iter(records)
    first = list(islice(source, _FEW + 1))
    return (first, ()) if len(first) <= _FEW else (None, chain(first, source))


def stage_names(db: Executor, usernames: Iterable[str]) -> None:
    """Read canonical usernames to the end into a temporary table of the connection."""
    db.run("CREATE TEMPORARY TABLE staged_names (seq INTEGER PRIMARY KEY, username TEXT)")
    db.insert_many("staged_names", "seq, username", enumerate(usernames))
    _keep_last(db, "staged_names")


def _keep_last(db: Executor, table: str) -> None:
    """Keep the last of several staged rows with the same username."""
    db.run(f"CREATE INDEX {table}_by_name ON {table} (username, seq)")
    db.run(
        f"DELETE FROM {table} WHERE EXISTS (SELECT 1 FROM {table} l"
        f" WHERE l.username = {table}.username AND l.seq > {table}.seq)"
    )


def remove_named(tx: Transaction, db: Executor) -> list[Change]:
    """Remove the users whose names are staged; return the audit entry, if there is one."""
    db.run(
        "DELETE FROM staged_names WHERE username NOT IN"
        " (SELECT username FROM users WHERE removed = 0)"
    )
    concerned = db.rows(
        "SELECT u.username, u.account_id FROM staged_names s"
        " CROSS JOIN users u WHERE u.username = s.username LIMIT ?",
        (NAMED_AT_MOST + 1,),
    )
    if not concerned:
        return []
    ((count,),) = db.rows("SELECT count(*) FROM staged_names")
    db.run(
        f"UPDATE requests SET state = 'cancelled' WHERE {IS_PENDING}"
        " AND username IN (SELECT username FROM staged_names)"
    )
    db.run("UPDATE users SET removed = 1 WHERE username IN (SELECT username FROM staged_names)")
    names = _names(concerned)
    return append_users(tx, Action.REMOVE_USERS, {"removed": count}, concerned, names)
