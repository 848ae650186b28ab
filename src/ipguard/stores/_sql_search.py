"""Whom a page of the SQL stores lists: usernames in order, whatever is asked for.

What a page costs hardly grows with the users, because nothing is sorted that grows with them:

* Each way to match is a source, which gives the next users in the order of their names: see
  `_sql_sources` and `_sql_holders`. A page is the beginning of what its sources give together.
* Where the actor has some accounts, a source is asked for the whole store, and what it gives is
  held against the accounts; or it is asked for the accounts' own users. The first is sooner where
  much matches, the second where little does. Nobody can know which it is, so the first is given up
  after a bounded number of users.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import AddressError
from ipguard.model import Accounts, Actor
from ipguard.stores._sql import Executor, encodable
from ipguard.stores._sql_holders import Holders
from ipguard.stores._sql_sources import Found, Mine, Source, Terms, Users
from ipguard.stores._sql_terms import folded, prefix_range

_STORED_NOWHERE: Final = re.compile("[\0\ud800-\udfff]")
_MANY: Final = 5_000
"""For more accounts than that it takes longer to count their users than to begin."""
_FIRST_LOOK: Final = 250
LOOKED_AT: Final = 5_000
"""So many that belong to others are passed over in search of what is the accounts'."""


def listed(
    db: Executor, accounts: Accounts, *, search: str, after: str | None, limit: int
) -> list[str]:
    """Return the usernames of a page; see `RestrictionStore.overview`."""
    start, last = folded(search), "" if after is None else _bound(after)
    everyone = accounts is Actor.EVERY_ACCOUNT
    sources: list[Source] = [] if start else [Users(db, removed=everyone)]
    if start and encodable(start):
        bounds = prefix_range(start)
        sources += [Users(db, bounds, removed=everyone), Terms(db, bounds, removed=everyone)]
    address = _address(search)
    if address is not None:
        sources.append(Holders(db, address, removed=everyone))
    if accounts is Actor.EVERY_ACCOUNT:
        return _first((source.everywhere(last, limit) for source in sources), limit)
    mine = Mine(db, accounts, last)
    found = [_of_accounts(source, mine, limit) for source in sources]
    if start:
        # Which accounts are called so is found out here: what is theirs is then no search at all.
        called = _called(accounts, start)
        theirs = Mine(db, called, last) if len(called) <= _MANY else Mine(db, accounts, last, start)
        found.append(_of_accounts(Users(db), theirs, limit))
    return _first(found, limit)


def _first(found: Iterable[Found], limit: int) -> list[str]:
    return sorted({row[0] for some in found for row in some})[:limit]


def _of_accounts(source: Source, mine: Mine, limit: int) -> Found:
    """Return the first users of these accounts, by the way that turns out to be the shorter."""
    if len(mine) <= _MANY and mine.few is not None:
        return _matching(source, mine.few)
    if source.quick(mine):
        return source.own(mine, mine.after, limit)
    found: Found = []
    after, looked_at, look = mine.after, 0, _FIRST_LOOK
    while looked_at < LOOKED_AT:
        rows = source.everywhere(after, look)
        found += [row for row in rows if row[1] in mine]
        if len(found) >= limit or len(rows) < look:
            return found[:limit]
        after, looked_at, look = rows[-1][0], looked_at + look, look * 4
    if mine.few is not None:
        return _matching(source, mine.few)
    return found + source.own(mine, after, limit - len(found))


def _matching(source: Source, users: Found) -> Found:
    names = set(source.among(users))
    return [row for row in users if row[0] in names]


def _bound(text: str) -> str:
    """Return a text that can be stored and has the same usernames after it."""
    found = _STORED_NOWHERE.search(text)
    if found is None:
        return text
    # No username has a U+10FFFF in it: what follows is the last before the surrogates.
    return text[: found.start()] + ("\ud7ff\U0010ffff" if found[0] > "\0" else "")


def _address(text: str) -> AddressRange | None:
    try:
        return parse_address(text.strip(" \t\r\n"))
    except AddressError:
        return None


def _called(accounts: frozenset[str], start: str) -> frozenset[str]:
    """Return the accounts whose id begins so, when folded; not all of them, where it is many."""
    # One text is searched much sooner than a hundred thousand. What is not an account after all,
    # because one of them has the separator in it, is none of theirs.
    text = "\n".join(accounts)
    if not text.isascii() or " " in text:
        return frozenset(each for each in accounts if folded(each).startswith(start))
    text = f"\n{text}\n"
    lower, mark = text.lower(), f"\n{start}"
    found, at = set[str](), lower.find(mark)
    while at >= 0 and len(found) <= 2 * _MANY:
        end = text.index("\n", at + 1)
        found.add(text[at + 1 : end])
        at = lower.find(mark, end)
    return accounts.intersection(found)
