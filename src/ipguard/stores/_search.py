"""What a search of the listing finds, for every store.

A user is found by its terms: the username, the account id, and the full name from each of its
words on. A text finds the users with a term that begins with it. A text of several words also finds
the users with a term for each word, in any order. An address finds the users with a restriction
that holds it; a network or a range finds those with exactly that restriction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple
from unicodedata import normalize

from ipguard.addresses import AddressRange, parse_address
from ipguard.errors import AddressError
from ipguard.model import Accounts, Actor, Restriction, User

# Blanks, hyphens, dashes, apostrophes, quotes and other punctuation of names. Normalisation makes
# an acute accent that was typed as an apostrophe a blank and a combining accent.
_BETWEEN_WORDS: Final = re.compile(
    r"""[ \-'"`,.;:()\[\]/\xab\xb7\xbb\u02b9-\u02bc\u2010-\u201f\u2032\u30fb]+[\u0300-\u036f]*"""
)


def folded(text: str) -> str:
    """Return text as it is compared; two rounds turn any username into its canonical form."""
    if text.isascii():
        return " ".join(text.lower().split())
    once = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", once).casefold().split())


def terms_of(username: str, full_name: str, account_id: str) -> set[str]:
    """Return the terms of a user, folded."""
    name = folded(full_name)
    starts = {0, *(found.end() for found in _BETWEEN_WORDS.finditer(name))}
    starts.update(at for at, character in enumerate(name, 1) if character == " ")
    return {folded(username), folded(account_id), *(name[start:] for start in starts)} - {""}


class Search(NamedTuple):
    """A text that was searched for.

    Attributes:
        text: The text, folded; empty finds every user.
        words: The words of a text that is more than one word.
        address: The address to look for in restrictions, if the text is one.
        addresses: The restriction to look for, if the text is a network or a range.
    """

    text: str
    words: frozenset[str] = frozenset()
    address: AddressRange | None = None
    addresses: AddressRange | None = None

    @classmethod
    def of(cls, typed: str) -> Search:
        """Read a text as a person typed it."""
        text, plain = folded(typed), typed.strip(" \t\r\n")
        try:
            return cls(text, address=parse_address(plain))
        except AddressError:
            pass
        try:
            return cls(text, addresses=AddressRange.parse(plain))
        except AddressError:
            words = [word for word in _BETWEEN_WORDS.split(text) if word]
            return cls(text, frozenset(words) if len(words) > 1 else frozenset())

    def matches(self, user: User, restrictions: Iterable[Restriction]) -> bool:
        """Return whether this search finds a user with these restrictions."""
        terms = terms_of(user.username, user.full_name, user.account_id)
        begun = [any(term.startswith(word) for term in terms) for word in self.words]
        if any(term.startswith(self.text) for term in terms) or (begun and all(begun)):
            return True
        if self.address is not None:
            return any(self.address in each.addresses for each in restrictions)
        return any(self.addresses == each.addresses for each in restrictions)


def is_visible(accounts: Accounts, account_id: str, *, removed: bool, restricted: bool) -> bool:
    """Return whether the listing shows a user to an actor of these accounts.

    Removed users are shown to actors of every account only, and only with restrictions.
    """
    if removed:
        return accounts is Actor.EVERY_ACCOUNT and restricted
    return account_id in accounts
