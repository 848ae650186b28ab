"""The canonical form of a username, for all of Unicode."""

import sys
import unicodedata
from unicodedata import category, normalize

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipguard import usernames
from ipguard.errors import UsernameError
from ipguard.usernames import canonical_username, canonical_usernames

REFUSED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn"}


def attempt(text: object) -> str | UsernameError:
    """Return the canonical form of a username, or the error."""
    try:
        return canonical_username(text)  # type: ignore[arg-type]
    except UsernameError as error:
        return error


def assert_canonical(form: str) -> None:
    """Assert the properties of every canonical form with the standard library."""
    assert type(form) is str
    assert 1 <= len(form) <= 256
    assert normalize("NFKC", form) == form
    assert normalize("NFKC", form.casefold()) == form
    assert form == form.strip()
    assert REFUSED_CATEGORIES.isdisjoint(map(category, form))
    assert canonical_username(form) == form


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("jsmith", "jsmith"),
        ("JSmith", "jsmith"),
        ("j smith", "j smith"),
        ("j.smith+x@Example.com", "j.smith+x@example.com"),
        ("\uff2a\uff33mith", "jsmith"),  # full-width letters
        ("\u212aim", "kim"),  # the Kelvin sign
        ("\u017fmith", "smith"),  # the long s
        ("stra\u00dfe", "strasse"),
        ("\ufb01n", "fin"),  # a ligature
        ("J\u00f6rg", "j\u00f6rg"),
        ("Jo\u0308rg", "j\u00f6rg"),  # composed and decomposed
        ("\u0130x", "i\u0307x"),  # the capital I with a dot keeps its dot
        ("\u03a3\u03c2\u03c3", "\u03c3\u03c3\u03c3"),
        ("\u1fb4", "\u03ac\u03b9"),  # composed, folded and composed again
        ("\u03b1\u0345\u0301", "\u03ac\u03b9"),  # the iota below folds to a letter: marks go first
        ("\u1f80\u0301", "\u1f04\u03b9"),
        ("\u01f0", "\u01f0"),  # folded apart, and composed again
        ("J\u030c", "\u01f0"),
        ("j\u00a0smith", "j smith"),  # a no-break space inside
    ],
)
def test_spellings_of_one_name(text, canonical):
    """Case, width, ligatures and composition do not matter."""
    assert canonical_username(text) == canonical
    assert_canonical(canonical)


@pytest.mark.parametrize(
    ("one", "other"), [("jsmith", "jsm\u0131th"), ("jsmith", "jsmi\u1e6fh"), ("a", "\u0430")]
)
def test_names_that_look_alike(one, other):
    assert canonical_username(one) != canonical_username(other)


EMPTY, LONG = "it is empty", "it is longer than 256 characters"
BLANK, INVISIBLE = "it has a blank at an end", "it has a character that is invisible or unassigned"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", EMPTY),
        (" jsmith", BLANK),
        ("jsmith\n", BLANK),
        ("\x1fjsmith", BLANK),
        ("jsmith\u3000", BLANK),
        ("jsmith\u2028", BLANK),
        ("\u00a8x", BLANK),  # a spacing mark, which NFKC turns into a blank and a mark
        ("x\u200b", INVISIBLE),
        ("j\nsmith", INVISIBLE),
        ("j\0smith", INVISIBLE),
        ("jsmith\x7f", INVISIBLE),
        ("j\x85\u00f6", INVISIBLE),
        ("j\u00adsmith", INVISIBLE),  # a soft hyphen
        ("\u202ejsmith", INVISIBLE),  # written from right to left
        ("j\udcffsmith", INVISIBLE),
        ("\ue000", INVISIBLE),
        ("\u0378", INVISIBLE),
        ("x" * 257, LONG),
        ("x" * 256 + " ", LONG),
        ("\u00f6" * 257, LONG),
        ("\u00df" * 129, LONG),  # 258 letters when folded
        ("\ufdfa" * 15, LONG),  # 18 characters each
    ],
)
def test_refused(text, reason):
    """Each class of unacceptable name is refused with its reason, quoted in one short line."""
    error = attempt(text)
    assert isinstance(error, UsernameError)
    assert error.reason == reason
    assert error.text.startswith(ascii(text[:60]))
    assert len(str(error)) < 700
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["x" * 256, "\u00f6" * 256, "\u00df" * 128, "\ufdfa" * 14])
def test_the_longest_names(text):
    """256 characters are accepted, counted before and after."""
    assert_canonical(canonical_username(text))


@pytest.mark.parametrize("thing", [None, 0, True, b"jsmith", ["jsmith"], object(), str])
def test_only_text_is_a_username(thing):
    error = attempt(thing)
    assert isinstance(error, UsernameError)
    assert error.reason == "it is not text"
    assert error.text == f"{type(thing).__name__} object"


class Hostile(str):
    """Text whose methods return something else."""

    __slots__ = ()

    def lower(self) -> str:
        return "root"

    def isascii(self) -> bool:
        return True

    def __len__(self) -> int:
        return 3

    def __str__(self) -> str:
        return "root"

    def __getitem__(self, item: object) -> str:
        return "root"

    strip = casefold = isprintable = lower  # type: ignore[assignment]


def test_methods_of_a_str_subclass_are_not_called():
    assert canonical_username(Hostile("JSmith")) == "jsmith"
    assert canonical_username(Hostile("J\u00d6rg")) == "j\u00f6rg"
    assert type(canonical_username(Hostile("jsmith"))) is str
    error = attempt(Hostile("x" * 1000))
    assert isinstance(error, UsernameError)
    assert error.reason == LONG
    assert error.text.startswith("'xxx")


@pytest.mark.parametrize("text", ["x" * 257, "\ufdfa" * 10**6, "\u0344" * 10**6, "x" * 10**6])
def test_over_long_names_are_not_normalised(text, monkeypatch):
    """Over-long text is refused by its length alone."""

    def reached(*args):
        raise AssertionError("over-long text was normalised")

    monkeypatch.setattr(usernames, "normalize", reached)
    monkeypatch.setattr(usernames, "category", reached)
    error = attempt(text)
    assert isinstance(error, UsernameError)
    assert error.reason == LONG


def test_a_form_that_does_not_settle_is_refused(monkeypatch):
    """Text that keeps changing would be refused, not half converted."""
    monkeypatch.setattr(usernames, "_ROUNDS", 1)
    error = attempt("J\u00d6RG")
    assert isinstance(error, UsernameError)
    assert error.reason == "it has no canonical form"
    assert error.text == ascii("J\u00d6RG")
    assert canonical_username("j\u00f6rg") == "j\u00f6rg"


@pytest.mark.slow
def test_every_character_of_unicode():
    """Every single character is refused for a valid reason, or has a canonical form."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        found = attempt(character)
        once = normalize("NFKC", normalize("NFKC", character).casefold())
        if category(character) in REFUSED_CATEGORIES:
            assert isinstance(found, UsernameError), hex(code)
        elif once.strip() != once or character.isspace():
            assert isinstance(found, UsernameError), hex(code)
            assert found.reason == BLANK
        else:
            # One round is enough; the code allows four.
            assert found == once == normalize("NFKC", once.casefold()), hex(code)
            assert REFUSED_CATEGORIES.isdisjoint(map(category, once))


CHANGING = [
    chr(code)
    for code in range(sys.maxunicode + 1)
    if normalize("NFKC", chr(code)).casefold() != chr(code) or unicodedata.combining(chr(code))
]
# U+0345 folds to a letter, which separates the marks around it.
AWKWARD = "\u0345\u0391\u03b9\u03c5\u0130\u0149\u0308\u0301\u1f80\u1fb4\u1e9e\u017f\u212b \u00a0"
TEXT = st.one_of(
    st.text(),
    st.text(st.characters()),
    st.text(st.sampled_from(CHANGING), max_size=12),
    st.text(st.sampled_from(CHANGING) | st.sampled_from(AWKWARD), max_size=12),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300),
)


@given(TEXT)
@example("\u0391\u0345\u0301")
@example("\u1fb4\u0345\u0308")
def test_the_canonical_form_is_a_fixed_point(text):
    """The canonical form of a canonical form is itself; other text is refused."""
    found = attempt(text)
    if isinstance(found, str):
        assert_canonical(found)
        assert REFUSED_CATEGORIES.isdisjoint(map(category, text))
        assert text == text.strip()
        assert len(text) <= 256
    else:
        folded = normalize("NFKC", normalize("NFKC", text).casefold())
        assert (
            not text
            or max(len(text), len(folded)) > 256
            or not REFUSED_CATEGORIES.isdisjoint(map(category, text + folded))
            or text != text.strip()
            or folded != folded.strip()
        )


@given(TEXT)
def test_equal_spellings_have_one_form(text):
    found = attempt(text)
    if isinstance(found, str):
        for spelling in (
            normalize("NFC", text),
            normalize("NFD", text),
            normalize("NFKC", text),
            normalize("NFKC", text).casefold(),
        ):
            again = attempt(spelling)
            assert again == found or (isinstance(again, UsernameError) and again.reason == LONG)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=256))
def test_ascii_names_are_lower_case(text):
    found = attempt(text)
    assert found == text.lower() or text != text.strip()
    assert attempt(text.upper()) == found or isinstance(found, UsernameError)


def test_several_usernames():
    """Several usernames are converted lazily; one str is refused."""
    names = canonical_usernames(iter(["JSmith", " x"]))
    assert next(names) == "jsmith"
    with pytest.raises(UsernameError):
        next(names)
    with pytest.raises(TypeError, match="not one str"):
        canonical_usernames("jsmith")
