"""What the overview's search looks up in the SQL stores: terms, and the blocks they are kept in.

A term is what a search text may begin: the username, the account id, the full name from each of
its words on. What begins alike lies together in an index over terms, but a page wants the first
users by name, and sorting all that match would cost more the more they are. So the users are cut,
in the order of their names, into blocks of about a thousand, and the index begins with the block:
a search walks the blocks, and stops when its page is full.

`search_terms.block` is 0 for a term that is the username itself, which is found in the table of
users, and NULL where a library that knows no blocks wrote it: those are looked up besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final
from unicodedata import normalize

from ipguard.stores._sql import Executor, Row

BLOCK: Final = 1_000
"""How many users a block has when it is made; it is cut when it has grown to twice as many."""

Placed = tuple[str, str, int, str | None]
TERM: Final = "username, term, block, account_id"
"""The columns of a `Placed`."""


def folded(text: str) -> str:
    """Return text as it is searched for; two rounds make any username its canonical form."""
    if text.isascii():
        return " ".join(text.lower().split())
    once = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", once).casefold().split())


def prefix_range(start: str) -> tuple[str, str]:
    """Return the bounds between which, by code point, just the texts with that beginning are."""
    kept = start.rstrip("\U0010ffff")
    if not kept:
        return start, "\U0010ffff" * (len(start) + 1)
    following = ord(kept[-1]) + 1
    # Surrogates cannot be stored, nor bound as a parameter.
    return start, kept[:-1] + chr(0xE000 if following == 0xD800 else following)


def placed_terms(username: str, full_name: str, account_id: str, block: int) -> list[Placed]:
    """Return a user's terms as they are stored, in their order.

    Args:
        username: Canonical.
        full_name: The name.
        account_id: The account. Terms that are the account's own name carry none: who asks by
            accounts looks at those by itself.
        block: The block that the user is in.
    """
    words, own = folded(full_name).split(), folded(account_id)
    terms = {" ".join(words[at:]) for at in range(len(words))}
    found = sorted({folded(username), own, *terms} - {""})
    return [
        (
            username,
            term,
            0 if term == username else block,
            None if term in (username, own) else account_id,
        )
        for term in found
    ]


_BLOCK_OF: Final = "SELECT id FROM search_blocks WHERE first <= %s ORDER BY first DESC LIMIT 1"
_BLOCKS_OF: Final = f"SELECT j.value, ({_BLOCK_OF % 'j.value'}) FROM %s"
_BLOCKS: Final = "SELECT first, id FROM search_blocks ORDER BY first"
_ADD_BLOCK: Final = "INSERT INTO search_blocks (first, id) VALUES (?, ?)"
_LAST_BLOCK: Final = "SELECT max(id) FROM search_blocks"
# Only in the block itself, so that the terms which are in none stay there.
_MOVE_TERMS: Final = f"""
UPDATE search_terms SET block = ({_BLOCK_OF % "search_terms.username"})
WHERE block = ? AND block > 0
"""
_SPAN: Final = """
SELECT b.first, (
    SELECT n.first FROM search_blocks n WHERE n.first > b.first ORDER BY n.first LIMIT 1
) FROM search_blocks b WHERE b.id = ?
"""
_GROWN: Final = "SELECT count(*) FROM (SELECT 1 FROM users WHERE username >= ? %s LIMIT ?) u"
_CUTS: Final = """
SELECT username FROM (
    SELECT username, row_number() OVER (ORDER BY username) AS place FROM users
    WHERE username >= ? %s
) u WHERE place %% ? = 1 AND place > 1 ORDER BY username
"""


def blocks_of(db: Executor, usernames: Iterable[str]) -> dict[str, int]:
    """Return the block of each of some users, whether they are there yet or not."""
    return dict(db.rows(_BLOCKS_OF.replace("%s", db.each()), (db.texts(usernames),)))


def cut_grown(db: Executor, block: int) -> None:
    """Cut a block into several where too many users have come into it, inside a turn."""
    ((first, following),) = db.rows(_SPAN, (block,))
    bound, params = (
        ("", (first,)) if following is None else ("AND username < ?", (first, following))
    )
    ((users,),) = db.rows(_GROWN % bound, (*params, 2 * BLOCK + 1))
    if users > 2 * BLOCK:
        ((last,),) = db.rows(_LAST_BLOCK)
        cuts = db.rows(_CUTS % bound, (*params, BLOCK))
        add_blocks(db, [(row[0], last + number) for number, row in enumerate(cuts, 1)], {block})


def add_blocks(db: Executor, new: Iterable[tuple[str, int]], cut: Iterable[int]) -> None:
    """Add blocks, and move to them what is theirs of those that they were cut from."""
    for row in new:
        db.run(_ADD_BLOCK, row)
    for block in cut:
        db.run(_MOVE_TERMS, (block,))


class Placing:
    """Places the terms of many users, and makes blocks for those among them that are new.

    Args:
        db: The connection.

    Attributes:
        new: The blocks to add: the first username and the number.
        cut: The blocks that those were cut from.
        touched: The blocks that users came into.
    """

    def __init__(self, db: Executor) -> None:
        self._blocks = db.rows(_BLOCKS)
        self._last = max(row[1] for row in self._blocks)
        self.new: list[tuple[str, int]] = []
        self.cut: set[int] = set()
        self.touched: set[int] = set()

    def terms(self, users: Iterable[Row]) -> Iterator[Placed]:
        """Give the terms of users: name, full name, account, and whether added, in order."""
        at, came, block = 0, 0, self._blocks[0][1]
        for username, full_name, account_id, added in users:
            while at + 1 < len(self._blocks) and self._blocks[at + 1][0] <= username:
                at, came = at + 1, 0
                block = self._blocks[at][1]
            if added:
                came += 1
                if came > BLOCK:
                    self._last, came = self._last + 1, 1
                    block = self._last
                    self.new.append((username, block))
                    self.cut.add(self._blocks[at][1])
                self.touched.add(block)
            yield from placed_terms(username, full_name, account_id, block)
