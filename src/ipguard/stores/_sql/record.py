"""The record in the SQL stores: earlier policies, what an entry did, verification and pruning.

A restriction is in force from the revision in its column `began`. When its row is deleted, a
trigger of the database moves it to `past_restrictions`, with the revision at which it ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Final

from ipguard import rules
from ipguard._checks import check_whole
from ipguard.audit import (
    Anchor,
    ChangedRestrictions,
    RecordedEntry,
    anchor_detail,
    check_expected,
    decode,
    is_chained,
    micros,
    read_anchor,
    report,
    touched_text,
)
from ipguard.audit import verify as verify_entries
from ipguard.errors import StoreUnavailable
from ipguard.model import (
    EVERYBODY,
    Action,
    Change,
    Damage,
    Page,
    Policy,
    Restriction,
    Verification,
)
from ipguard.store import Transaction
from ipguard.stores._sql import (
    BIGGEST,
    CHANGE,
    ENTRY,
    RESTRICTION,
    UNFINISHED,
    Executor,
    change_of,
    columns,
    reads_rows,
    restriction_of,
)

_HELD: Final = columns(RESTRICTION, "r")
_BEGAN: Final = "COALESCE(i.revision, r.began)"
# The row is in force after a revision. An older library does not write `began`: then the time of
# the revision decides.
_BEGUN: Final = f"({_BEGAN} BETWEEN 0 AND ? OR (r.began IS NULL AND r.created_at <= ?))"
_POLICY_AT: Final = f"""
SELECT {RESTRICTION} FROM (
    SELECT {_HELD} FROM restrictions r LEFT JOIN imports i ON i.number = r.began
    WHERE r.username = ? AND {_BEGUN}
    UNION ALL
    SELECT {_HELD} FROM past_restrictions r
    WHERE r.username = ? AND r.ended > ? AND {_BEGUN.replace(_BEGAN, "r.began")}
) p ORDER BY created_at, id
"""
_BOUNDS: Final = """
SELECT h.revision, h.token, h.recorded,
    COALESCE((SELECT min(c.revision) FROM changes c), h.revision + 1)
FROM head h JOIN zz_restore_marker m ON m.id = 1 WHERE h.id = 1
"""
_CHANGED: Final = (
    f"SELECT id, ?, username, {RESTRICTION} FROM %s WHERE %s = ? AND id > ? ORDER BY id LIMIT ?"
)
_LAST_CHANGE: Final = """
SELECT (
    SELECT n.revision FROM changes n WHERE n.username = j.value AND n.touched IS NOT NULL
    ORDER BY n.revision DESC LIMIT 1
) FROM
"""
# `touched` has the usernames as JSON.
_PASSED_ON: Final = """
SELECT 1 FROM changes WHERE revision > ?
    AND action IN ('put_users', 'remove_users', 'rename_user') AND COALESCE(username, '') <> ?
    AND (touched = ? OR replace(touched, ?, '') <> touched)
LIMIT 1
"""


def policy_at(db: Executor, username: str, revision: int) -> Policy:
    """Return a user's policy as it was after a revision; see `ipguard.store`."""
    head, _, recorded, first = _bounds(db)
    # A prune deletes what had ended before the first entry that it kept.
    rules.check_revision(revision, max(recorded, first - 1), head)
    at = db.rows(_AT, (revision,))
    then = (revision, at[0][0] if at else -BIGGEST)
    rows = db.rows(_POLICY_AT, (username, *then, username, revision, *then))
    user = db.rows("SELECT removed FROM users WHERE username = ?", (username,))
    held = tuple(restriction_of(username, row) for row in rows)
    return Policy(revision=revision, restrictions=held, known=user == [(0,)])


def revision_at(db: Executor, at: datetime) -> int:
    """Return the revision of the last entry at or before a time; 0 if there is none."""
    for (revision,) in db.rows(
        "SELECT revision FROM changes WHERE at <= ? AND revision > 0"
        " ORDER BY at DESC, revision DESC LIMIT 1",
        (micros(at),),
    ):
        return int(revision)
    return 0


def restrictions_changed(
    db: Executor, revision: int, after: str, limit: int
) -> Page[tuple[Restriction, bool]]:
    """Return the restrictions that an entry added or ended; see `ipguard.store`."""
    if not 0 < revision <= BIGGEST:
        return Page(items=(), next=None)
    found = db.rows(
        _CHANGED % ("past_restrictions", "ended"), (0, revision, after, limit + 1)
    ) + db.rows(_CHANGED % ("past_restrictions", "began"), (1, revision, after, limit + 1))
    numbers = db.rows("SELECT number FROM imports WHERE revision = ?", (revision,))
    for (began,) in ((revision,), *numbers):
        found += db.rows(_CHANGED % ("restrictions", "began"), (1, began, after, limit + 1))
    found.sort(key=lambda row: row[:2])
    ids = list(dict.fromkeys(row[0] for row in found))
    last = ids[limit - 1] if len(ids) > limit else None
    items = tuple(
        (restriction_of(row[2], row[3:]), row[1] == 1)
        for row in found
        if last is None or row[0] <= last
    )
    return Page(items=items, next=last)


def last_changes(db: Executor, usernames: Iterable[str]) -> Mapping[str, Change]:
    """Return for each user the last entry that names it and touches it."""
    rows = db.rows(
        f"SELECT {CHANGE} FROM changes WHERE revision IN ({_LAST_CHANGE}{db.each()})",
        (db.texts(usernames),),
    )
    return {change.username: change for change in map(change_of, rows) if change.username}


def passed_on(db: Executor, username: str, revision: int) -> bool:
    """Return whether a username may be another user's since a revision; see `ipguard.store`."""
    check_whole("revision", revision, 0)
    named = (touched_text(frozenset({username})) or "")[1:-1]
    everybody = touched_text(EVERYBODY)
    return bool(db.rows(_PASSED_ON, (min(revision, BIGGEST), username, everybody, named)))


@reads_rows
def _bounds(db: Executor) -> tuple[int, str, int, int]:
    """Return the head's revision and token, where the record begins, and the first entry."""
    for head, token, recorded, first in db.rows(_BOUNDS):
        return head, token, int(recorded), first
    raise StoreUnavailable(UNFINISHED)


# ----------------------------------------------------------------------------- verification

_KEY: Final = "id, username"
_DIGESTED: Final = f"id, username, {RESTRICTION.removeprefix('id, ')}"
_RECORD: Final = f"""(
    SELECT r.username, {_HELD}, {_BEGAN} AS began, NULL AS ended
    FROM restrictions r LEFT JOIN imports i ON i.number = r.began
    UNION ALL
    SELECT r.username, {_HELD}, r.began, r.ended FROM past_restrictions r
) x"""
# What an anchor covers: it began before the first entry that was kept, and had not ended then. The
# rows of older libraries count by their time, which `anchor` replaces by 0.
_ANCHORED: Final = f"""
SELECT {_DIGESTED} FROM {_RECORD} WHERE (began BETWEEN 0 AND %s %s)
    AND (ended IS NULL OR ended > %s) ORDER BY {_KEY}
"""


def verify(db: Executor, expect: tuple[int, str] | None) -> Verification:
    """Check the chain of tokens and the record, from one snapshot and in bounded memory."""
    damage: list[Damage] = []
    head, token, recorded, _ = _bounds(db)
    _, anchor = latest_anchor(db)
    # Entries that were written before the record began have no salt.
    first = max(recorded + 1, 1 if anchor is None else anchor.kept_from)
    kept_from = anchor.kept_from if anchor else (first if recorded else 0)
    if anchor is not None and first == anchor.kept_from:
        before = anchor.token
    else:
        before = _token(db, first - 1) or ""
        if not before:
            report(damage, first - 1, f"revision {first - 1} is missing")
        elif is_chained(before):
            report(
                damage,
                first - 1,
                "the entry belongs to the record, but the store says that the record begins later",
            )
    entries, begun = verify_entries(
        _entries(db, first),
        db.stream(
            f"SELECT began, {_DIGESTED} FROM {_RECORD} WHERE began >= {kept_from}"
            f" ORDER BY began, {_KEY}"
        ),
        db.stream(
            f"SELECT ended, {_KEY} FROM past_restrictions WHERE ended >= {kept_from}"
            f" ORDER BY ended, {_KEY}"
        ),
        before=(first - 1, before),
        head=(head, token),
        damage=damage,
    )
    older, uncovered = _older(db, kept_from, anchor, damage)
    if expect is not None:
        known = -1 < expect[0] <= BIGGEST
        check_expected(expect, _token(db, expect[0]) if known else None, damage)
        if known and expect[0] < first - 1:
            report(damage, expect[0], f"what was checked begins later, at revision {first}")
    return Verification(
        first=first,
        head=head,
        token=token,
        entries=entries,
        restrictions=begun + older + uncovered,
        uncovered=uncovered,
        damage=tuple(damage),
    )


def _entries(db: Executor, first: int) -> Iterator[RecordedEntry]:
    statement = f"SELECT {ENTRY} FROM changes WHERE revision >= {first} ORDER BY revision"
    for *entry, token, salt, restrictions in db.stream(statement):
        yield RecordedEntry(tuple(entry), token, salt, restrictions)


def _older(
    db: Executor, kept_from: int, anchor: Anchor | None, damage: list[Damage]
) -> tuple[int, int]:
    """Check the restrictions that began before the first entry.

    Returns:
        How many the anchor covers, and how many nothing covers.
    """
    count, digest = _anchored(db, kept_from)
    if anchor is not None and digest != anchor.restrictions:
        report(
            damage,
            kept_from,
            f"the restrictions from before revision {kept_from} are not as recorded when older"
            " entries were pruned",
        )
    strange = f"FROM {_RECORD} WHERE began IS NULL OR began < 0"
    ((others,),) = db.rows(f"SELECT count(*) {strange}")
    for restriction_id, username in db.rows(f"SELECT {_KEY} {strange} ORDER BY {_KEY} LIMIT 100"):
        report(
            damage,
            None,
            f"restriction {restriction_id} of {username!r} belongs to no entry: an older version of"
            " ipguard, or another program, wrote it",
        )
    return (0, count + others) if anchor is None else (count, int(others))


def _anchored(db: Executor, kept_from: int, at: int | None = None) -> tuple[int, str]:
    """Return how many restrictions an anchor covers, and their digest."""
    older = "" if at is None else f"OR (began IS NULL AND created_at < {at})"
    found, count = ChangedRestrictions(), 0
    for row in db.stream(_ANCHORED % (kept_from - 1, older, kept_from - 1)):
        found.add(row)
        count += 1
    return count, found.text()


def _token(db: Executor, revision: int) -> str | None:
    for (token,) in db.rows("SELECT token FROM changes WHERE revision = ?", (revision,)):
        return str(token)
    return None


@reads_rows
def latest_anchor(db: Executor) -> tuple[int, Anchor | None]:
    """Return the revision of the latest `PRUNE` entry and its anchor; 0 and None without one."""
    for revision, detail in db.rows(
        "SELECT revision, detail FROM changes WHERE action = ? ORDER BY revision DESC LIMIT 1",
        (Action.PRUNE.value,),
    ):
        return revision, read_anchor(decode(detail))
    return 0, None


# ----------------------------------------------------------------------------- pruning

_FIRST_KEPT: Final = """
SELECT COALESCE(
    (SELECT min(c.revision) FROM changes c WHERE c.revision > 0 AND c.at >= ?), h.revision
) FROM head h WHERE h.id = 1
"""
_AT: Final = "SELECT at FROM changes WHERE revision = ?"
_COUNT: Final = (
    "SELECT count(*), COALESCE(sum(CASE WHEN action = ? THEN 1 ELSE 0 END), 0) FROM changes"
    " WHERE revision < ?"
)
_UNCOVERED: Final = f"SELECT 1 FROM {_RECORD} WHERE began IS NULL AND created_at < ? LIMIT 1"


class Pruning:
    """A prefix of the audit log to delete, and the anchor that replaces it.

    The anchor is computed before the writer's lock is acquired. That is safe because it covers the
    restrictions that end later too, and nothing else about older ones changes.

    Attributes:
        deleted: How many entries are deleted.
        needed: Whether there is anything to delete or to cover.
    """

    def __init__(self, db: Executor, before: datetime) -> None:
        head, _, _, oldest = _bounds(db)
        ((first,),) = db.rows(_FIRST_KEPT, (micros(before),))
        self._seen, latest = latest_anchor(db)
        first = max(first, latest.kept_from if latest else 0)
        kept = latest is not None and latest.kept_from == first
        token = latest.token if latest and kept else _token(db, first - 1)
        if token is None and oldest == first < head:
            # An older library has pruned without an anchor: give up one entry more for its token.
            token, first = _token(db, first), first + 1
        self._first, (self._at,) = first, db.rows(_AT, (first,))[0]
        ((deleted, anchors),) = db.rows(_COUNT, (Action.PRUNE.value, first))
        self.deleted = int(deleted)
        self._adopts = bool(db.rows(_UNCOVERED, (self._at,)))
        self._anchor: Anchor | None = None
        if token is not None and (self._adopts or not kept):
            count, digest = _anchored(db, first, self._at)
            # A prune of everything leaves the anchor before it, which is not worth another one.
            if deleted > anchors or self._adopts or (not deleted and (count or first > 1)):
                self._anchor = Anchor(first, token, digest)
        self.needed = self._anchor is not None or (kept and self.deleted > 0)

    def delete(self, db: Executor) -> None:
        """Delete the entries, and the restrictions that ended before the first one kept."""
        # Entries first: the first one that is left bounds what `policy_at` answers.
        db.run("DELETE FROM changes WHERE revision < ?", (self._first,))
        db.run("DELETE FROM past_restrictions WHERE ended < ?", (self._first,))

    def append(self, tx: Transaction, db: Executor) -> list[Change]:
        """Append the anchor, if it is a new one, under the writer's lock; return the entry."""
        # The anchor that was there may be among the entries that are deleted already.
        if latest_anchor(db)[0] > self._seen:
            raise StoreUnavailable("the audit log was pruned at the same time; try again")
        if self._anchor is None:
            return []
        if self._adopts:
            for table in ("restrictions", "past_restrictions"):
                db.run(
                    f"UPDATE {table} SET began = 0 WHERE began IS NULL AND created_at < ?",
                    (self._at,),
                )
        detail = anchor_detail(self._anchor, self.deleted)
        return [tx.append(Action.PRUNE, actor=None, detail=detail)]
