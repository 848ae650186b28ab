"""The one canonical form of a username.

Usernames are compared in this form everywhere, so that `JSmith` or full-width letters cannot bypass
a restriction on `jsmith`. Names that merely look alike stay different users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from unicodedata import category, normalize

from ipguard.errors import UsernameError

__all__ = ["canonical_username", "canonical_usernames"]

_LONGEST = 256
_REFUSED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
# One round is enough for every known text; the tests try each character.
_ROUNDS = 4


def canonical_username(text: str) -> str:
    """Return the canonical form of a username: the fixed point of casefold followed by NFKC.

    NFKC is defined in UAX #15, casefold in section 3.13 of the Unicode Standard; this Python's
    version of both applies. The result is always in NFKC, also for the letters that casefold
    decomposes and NFKC composes (U+01F0 and some twenty more).

    Args:
        text: The username from the host's user record.

    Returns:
        The canonical form, 1 to 256 characters.

    Raises:
        UsernameError: The text or its canonical form is not a str, empty, longer than 256
            characters, has a blank at an end, or has a character of the categories Cc, Cf, Cs, Co
            or Cn (control, format, surrogate, private use, unassigned).
    """
    if type(text) is str and 0 < len(text) <= _LONGEST and text.isascii() and text.isprintable():
        # The usual case, for logins. Of the printable characters of ASCII, a blank is refused at
        # either end.
        if text[0] != " " != text[-1]:
            return text.lower()
    elif not issubclass(type(text), str):
        raise UsernameError(text, "it is not text")
    # Call no method of a subclass, and copy or normalise no unbounded text.
    plain = str.__getitem__(text, slice(_LONGEST + 1))
    _check(plain)
    if plain.isascii():
        return plain.lower()
    # Normalise before folding too: U+0345 folds to a letter, after which marks are not reordered.
    canonical = normalize("NFKC", plain)
    for _ in range(_ROUNDS):
        previous, canonical = canonical, normalize("NFKC", canonical.casefold())
        if canonical == previous:
            _check(canonical, plain)
            return canonical
    raise UsernameError(plain, "it has no canonical form")


def canonical_usernames(texts: Iterable[str]) -> Iterator[str]:
    """Yield the canonical form of each username.

    Raises:
        TypeError: The argument is one str, whose characters would be taken for usernames.
        UsernameError: A username has no canonical form.
    """
    if isinstance(texts, str):
        raise TypeError("usernames must be several, not one str")
    return map(canonical_username, texts)


def _check(*forms: str) -> None:
    """Check each form of a username; the error names the last."""
    for form in forms:
        if not form:
            raise UsernameError(forms[-1], "it is empty")
        if len(form) > _LONGEST:
            raise UsernameError(forms[-1], f"it is longer than {_LONGEST} characters")
        if form.strip() != form:
            raise UsernameError(forms[-1], "it has a blank at an end")
        if not form.isprintable() and not _REFUSED.isdisjoint(map(category, form)):
            raise UsernameError(forms[-1], "it has a character that is invisible or unassigned")
