"""The one canonical form of a username.

Usernames are compared in this form everywhere, so that a restriction on `jsmith` cannot be stepped
around as `JSmith` or in full-width letters. Names that merely look alike stay different users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from unicodedata import category, normalize

from ipguard.errors import UsernameError

__all__ = ["canonical_username", "canonical_usernames"]

_LONGEST = 256
_REFUSED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
# One round settles every text that is known; the tests go through each character.
_ROUNDS = 4


def canonical_username(text: str) -> str:
    """Give the canonical form of a username: the fixed point of casefold and then NFKC.

    NFKC is of UAX #15, casefold of section 3.13 of the Unicode Standard, both as this Python has
    them. The canonical form of a canonical form is itself. It is always in NFKC; where folding
    takes a letter apart that NFKC composes again (U+01F0 and some twenty more), NFKC has the
    last word.

    Args:
        text: The username, as the host's user record has it.

    Returns:
        The canonical form, 1 to 256 characters.

    Raises:
        UsernameError: It is not text, it is empty or longer than 256 characters, it has a blank at
            an end or a character of the categories Cc, Cf, Cs, Co or Cn (control, format,
            surrogate, private use, unassigned); as given, or in its canonical form.
    """
    if not issubclass(type(text), str):
        raise UsernameError(text, "it is not text")
    # A subclass's own methods are not asked, nor is an unbounded text copied or normalised.
    plain = str.__getitem__(text, slice(_LONGEST + 1))
    _check(plain)
    if plain.isascii():
        return plain.lower()
    # Before folding too: U+0345 folds to a letter, and the marks must be in their order by then.
    canonical = normalize("NFKC", plain)
    for _ in range(_ROUNDS):
        previous, canonical = canonical, normalize("NFKC", canonical.casefold())
        if canonical == previous:
            _check(canonical, plain)
            return canonical
    raise UsernameError(plain, "it has no canonical form")


def canonical_usernames(texts: Iterable[str]) -> Iterator[str]:
    """Give the canonical form of each of several usernames, as they come.

    Raises:
        TypeError: It is one text, whose characters would be taken for usernames.
        UsernameError: One has no canonical form.
    """
    if isinstance(texts, str):
        raise TypeError("usernames must be several, not one str")
    return map(canonical_username, texts)


def _check(*forms: str) -> None:
    """Refuse a username for the first of its forms that is not acceptable; name the last."""
    for form in forms:
        if not form:
            raise UsernameError(forms[-1], "it is empty")
        if len(form) > _LONGEST:
            raise UsernameError(forms[-1], f"it is longer than {_LONGEST} characters")
        if form.strip() != form:
            raise UsernameError(forms[-1], "it has a blank at an end")
        if not form.isprintable() and not _REFUSED.isdisjoint(map(category, form)):
            raise UsernameError(forms[-1], "it has a character that is invisible or unassigned")
