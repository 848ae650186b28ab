"""Audit entries: the text of their detail, the chain of their tokens, and its verification.

The text of a detail is `name=value` pairs, separated by spaces. A value that could be mistaken for
more than one, or that would break the line, is written as JSON, so that no text from outside can
forge a pair.

The token of an entry is a digest of the previous token, of the entry and its changes to
restrictions, and of a random salt. So an entry cannot be changed, removed or inserted, and the
record of restrictions cannot be changed, unless every later token is computed again.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, NamedTuple

from ipguard.model import EVERYBODY, Change, Damage, Touched, micros

__all__ = [
    "Anchor",
    "ChangedRestrictions",
    "RecordedEntry",
    "anchor_detail",
    "check_expected",
    "decode",
    "detail",
    "digest_of",
    "encode",
    "entry_columns",
    "is_chained",
    "micros",
    "new_salt",
    "next_token",
    "read_anchor",
    "read_touched",
    "report",
    "touched_text",
    "verify",
]

Row = tuple[Any, ...]

_log = logging.getLogger("ipguard.audit")
_EVERYBODY: Final = "*"  # not JSON, so it differs from every list of usernames
_DAMAGE_AT_MOST: Final = 100

_PAIR: Final = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |\Z)')


def detail(**pairs: object) -> dict[str, str]:
    """Make the detail of an entry; values that are None, False or empty are left out.

    Args:
        pairs: The particulars. True becomes `true`, a datetime its ISO 8601 text.
    """
    return {
        name: _text(value)
        for name, value in pairs.items()
        if not (value is None or value is False or value == "")
    }


def encode(detail: Mapping[str, str]) -> str:
    """Return the stored text of a detail, on one line."""
    return " ".join(f"{name}={_quoted(value)}" if name else value for name, value in detail.items())


def decode(text: str) -> dict[str, str]:
    """Read the stored text of a detail.

    Returns:
        The pairs. Text that this version cannot read as pairs is returned whole, under the name
        "", and `encode` writes it unchanged.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        if pair is None or pair[1] in found:
            return {"": text}
        value = pair[2]
        try:
            found[pair[1]] = json.loads(value) if value.startswith('"') else value
        except ValueError:
            return {"": text}
        at = pair.end()
    return found


def log_change(change: Change) -> None:
    """Write one line for a committed change to the logger `ipguard.audit`.

    The record has the values as `ipguard_action`, `ipguard_actor` and so on, and `ipguard_detail`.
    The workflow does this for its changes, a store for `put_users` and `remove_users`.
    """
    entry = {
        "revision": change.revision,
        "at": change.at.isoformat(),
        "action": change.action,
        "actor": change.actor,
        "address": change.actor_address,
        "username": change.username,
        "account": change.account_id,
    }
    text = " ".join(filter(None, (encode(detail(**entry)), encode(change.detail))))
    fields = {**entry, "detail": dict(change.detail)}
    _log.info("%s", text, extra={f"ipguard_{name}": value for name, value in fields.items()})


def _text(value: object) -> str:
    if value is True:
        return "true"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _quoted(value: str) -> str:
    if value and value.isprintable() and not any(c in ' "=\\' for c in value):
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def touched_text(touches: frozenset[str] | Touched) -> str | None:
    """Return the stored form of the users whose policy a change touches; None if there are none."""
    if isinstance(touches, Touched):
        return _EVERYBODY
    return json.dumps(sorted(touches)) if touches else None


def read_touched(texts: Iterable[str]) -> frozenset[str] | Touched:
    """Return the users whose policy any of several changes touches.

    Raises:
        ValueError: A text is not from `touched_text`.
    """
    names: set[str] = set()
    for text in texts:
        if text == _EVERYBODY:
            return EVERYBODY
        names.update(json.loads(text))
    return frozenset(names)


def entry_columns(change: Change, touches: frozenset[str] | Touched) -> Row:
    """Return the stored form of an entry, in the order in which `next_token` takes it.

    The revision, the time in microseconds, the actor, the actor's address, the action, the
    username, the account, the detail as text, and the users touched as text.
    """
    return (
        change.revision,
        micros(change.at),
        change.actor,
        change.actor_address,
        str(change.action),
        change.username,
        change.account_id,
        encode(change.detail),
        touched_text(touches),
    )


def new_salt() -> str:
    """Return the random part of a token: 16 bytes in hexadecimal."""
    return secrets.token_hex(16)


def next_token(previous: str, entry: Sequence[object], restrictions: str, salt: str) -> str:
    """Return the token of an entry, in hexadecimal.

    It is the SHA-256 digest of three texts without anything between them: the previous token; a
    JSON array of the entry's columns and of `restrictions`, without blanks, in ASCII; and the salt.

    Args:
        previous: The token of the previous entry.
        entry: The columns, as from `entry_columns`.
        restrictions: The digest of the restrictions that the entry added and ended.
        salt: The random part, as from `new_salt`.
    """
    return sha256(f"{previous}{_canonical((*entry, restrictions))}{salt}".encode()).hexdigest()


def is_chained(token: str) -> bool:
    """Return whether a token is as from `next_token`; those of older versions are shorter."""
    return len(token) == 2 * sha256().digest_size


def _hex(value: object) -> str:
    # Other types are only found if another program wrote them, and then no digest matches.
    return value.hex() if isinstance(value, bytes) else repr(value)


_canonical: Final = json.JSONEncoder(separators=(",", ":"), default=_hex).encode


class ChangedRestrictions:
    """The digest of the restrictions that an entry added and ended, row by row.

    It is the SHA-256 digest of one line for each: a JSON array as for `next_token`, and a line
    feed. First come those that were added, with "+" and their columns, then those that were ended,
    with "-", the id and the username. Both are sorted by id, then username, by code point.
    """

    def __init__(self) -> None:
        self._digest, self._any = sha256(), False

    def add(self, row: Sequence[object]) -> None:
        """Add a restriction that the entry added.

        Args:
            row: The id, the username, the first and the last address as packed bytes, the label,
                the time of creation in microseconds, its creator, and the expiry in microseconds
                or None.
        """
        self._line("+", row)

    def end(self, row: Sequence[object]) -> None:
        """Add a restriction that the entry ended, by its id and username."""
        self._line("-", row)

    def copy(self) -> ChangedRestrictions:
        """Return a copy, to which other rows can be added."""
        other = ChangedRestrictions()
        other._digest, other._any = self._digest.copy(), self._any
        return other

    def text(self) -> str:
        """Return the digest in hexadecimal, or "" if there is no row."""
        return self._digest.hexdigest() if self._any else ""

    def _line(self, sign: str, row: Sequence[object]) -> None:
        self._digest.update(f"{_canonical((sign, *row))}\n".encode())
        self._any = True


def digest_of(added: Iterable[Row], ended: Iterable[Row] = ()) -> str:
    """Return the digest of rows in any order; see `ChangedRestrictions` for the columns."""
    found = ChangedRestrictions()
    for row in sorted(added, key=_key):
        found.add(row)
    for row in sorted(ended, key=_key):
        found.end(row)
    return found.text()


def _key(row: Row) -> Row:
    return row[:2]


class Anchor(NamedTuple):
    """What a `PRUNE` entry certifies about the entries that were deleted.

    Attributes:
        kept_from: The revision of the first entry that was kept.
        token: The token of the entry before it.
        restrictions: The digest of the restrictions that began before it and had not ended, sorted
            by id and username, as if one entry had added them.
    """

    kept_from: int
    token: str
    restrictions: str


def anchor_detail(anchor: Anchor, deleted: int) -> dict[str, str]:
    """Return the detail of a `PRUNE` entry that deletes so many entries."""
    return detail(**anchor._asdict(), deleted=deleted)


def read_anchor(found: Mapping[str, str]) -> Anchor | None:
    """Return the anchor in the detail of a `PRUNE` entry, or None if there is none."""
    try:
        return Anchor(int(found["kept_from"]), found["token"], found.get("restrictions", ""))
    except (KeyError, ValueError):
        return None


class RecordedEntry(NamedTuple):
    """A stored entry: its columns, token and salt, and the digest of its restrictions.

    Older libraries write no salt and no digest: both are None.
    """

    columns: Row
    token: str
    salt: str | None
    restrictions: str | None


def report(damage: list[Damage], revision: int | None, text: str) -> None:
    """Add a place to the damage found, unless there are 100."""
    if len(damage) < _DAMAGE_AT_MOST:
        damage.append(Damage(revision, text))


def verify(
    entries: Iterable[RecordedEntry],
    added: Iterable[Row],
    ended: Iterable[Row],
    *,
    before: tuple[int, str],
    head: tuple[int, str],
    damage: list[Damage],
) -> tuple[int, int]:
    """Check a chain of entries, and the restrictions that they added and ended.

    Args:
        entries: The entries after `before`, by revision.
        added: The restrictions that were added after `before`, by revision, id and username: the
            revision, and the columns of `ChangedRestrictions.add`.
        ended: Those that were ended after it, in the same order: the revision, id and username.
        before: The revision and token that the chain continues.
        head: The revision and token of the store.
        damage: Gets the damage found.

    Returns:
        How many entries there are, and how many restrictions were added.
    """
    (revision, token), count = before, 0
    begun, over = _Rows(added, "begins", damage), _Rows(ended, "ends", damage)
    for entry in entries:
        expected, revision, count = revision + 1, entry.columns[0], count + 1
        if revision > expected:
            last = f" to {revision - 1}" if revision - 1 > expected else ""
            report(damage, expected, f"revision {expected}{last} is missing")
        found = ChangedRestrictions()
        for row in begun.at(revision):
            found.add(row)
        for row in over.at(revision):
            found.end(row)
        if entry.salt is None:
            report(
                damage,
                revision,
                "the entry has no salt: an older version of ipguard, or another program, wrote it",
            )
        elif (
            revision == expected
            and next_token(token, entry.columns, entry.restrictions or "", entry.salt)
            != entry.token
        ):
            report(damage, revision, "the token does not match the entry and the one before it")
        elif found.text() != entry.restrictions:
            report(damage, revision, "the restrictions that it added or ended are not as recorded")
        token = entry.token
    begun.finish()
    over.finish()
    if (revision, token) != head:
        report(
            damage, head[0], f"the head is at revision {head[0]}, and the last entry is {revision}"
        )
    return count, begun.count


def check_expected(expect: tuple[int, str], token: str | None, damage: list[Damage]) -> None:
    """Compare the token of an entry with the one that was noted earlier.

    Args:
        expect: The revision and the token, as noted.
        token: The entry's present token, or None if there is no such entry.
        damage: Gets the difference.
    """
    revision, noted = expect
    if token is None:
        report(damage, revision, f"the expected entry {revision} is not there: pruned, or cut off")
    elif token != noted:
        report(damage, revision, f"entry {revision} has another token than the one expected")


class _Rows:
    """Restrictions by revision; those that belong to no entry are reported."""

    def __init__(self, rows: Iterable[Row], verb: str, damage: list[Damage]) -> None:
        self._rows, self._verb, self._damage = iter(rows), verb, damage
        self._next = next(self._rows, None)
        self.count = 0

    def at(self, revision: int) -> Iterator[Row]:
        """Yield the rows of a revision, without it; report those of revisions before."""
        # In SQLite a column may hold text, whatever its type: that is after all numbers.
        while (
            self._next is not None and isinstance(self._next[0], int) and self._next[0] <= revision
        ):
            row, self._next = self._next, next(self._rows, None)
            self.count += 1
            if row[0] == revision:
                yield row[1:]
            else:
                self._report(row)

    def finish(self) -> None:
        """Report all rows that are left."""
        while self._next is not None:
            row, self._next = self._next, next(self._rows, None)
            self.count += 1
            self._report(row)

    def _report(self, row: Row) -> None:
        revision, restriction_id, username = row[:3]
        text = f"restriction {restriction_id} of {username!r} {self._verb} at revision {revision}"
        known = revision if isinstance(revision, int) else None
        report(self._damage, known, f"{text}, which has no entry")
