"""Confirmation numbers: mint, format, parse, digest, compare."""

import hmac
import secrets
import string
from typing import Any, cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ipguard.confirmation import Keyring, format_number, mint, parse_number
from ipguard.errors import InvalidValue, NumberFormatError

OLD, NEW = b"o" * 32, b"n" * 33
SUBJECT = ("request", "jsmith", "add", "203.0.113.7")
subjects = st.lists(st.text(max_size=12), min_size=1, max_size=5).map(tuple)
numbers = st.text(string.digits, min_size=1, max_size=12)


class TestMint:
    @pytest.mark.parametrize("digits", [1, 4, 10, 20])
    def test_has_the_requested_digits(self, digits):
        """Leading zeros are included."""
        for _ in range(200):
            number = mint(digits)
            assert len(number) == digits
            assert set(number) <= set(string.digits)

    def test_comes_from_the_secure_random_source(self, monkeypatch):
        """One call of `secrets` chooses among all numbers of that length."""
        asked = []

        def randbelow(limit: int) -> int:
            asked.append(limit)
            return limit - 1 if len(asked) == 1 else 0

        monkeypatch.setattr(secrets, "randbelow", randbelow)
        assert mint(10) == "9999999999"
        assert mint(10) == "0000000000"
        assert asked == [10**10, 10**10]


class TestText:
    @pytest.mark.parametrize(
        ("number", "shown"),
        [
            ("", ""),
            ("123456", "12345-6"),
            ("4920177340", "49201-77340"),
            ("00000000000", "00000-00000-0"),
        ],
    )
    def test_format_number(self, number, shown):
        assert format_number(number) == shown

    @given(numbers)
    def test_a_formatted_number_can_be_parsed(self, number):
        assert parse_number(format_number(number), len(number)) == number

    @pytest.mark.parametrize(
        "text",
        [
            "49201-77340",
            " 49201 77340 ",
            "\t4 9 2 0 1\u00a077340\r\n",
            "49201\u201077340",  # a hyphen proper
            "49201\u201377340",  # an en dash
            "49201 \u2014 77340",  # an em dash
            "\u300049201\u2028\uff0d77340",  # blanks and the hyphen of an ideographic keyboard
            "49201\u221277340",  # a minus sign
            "49201\u30fc77340",  # the long-vowel mark, from the hyphen key of a Japanese keyboard
            "\ufeff49201-\u206077340\u200b",  # byte order mark, word joiner, zero-width space
            "\u202a49201\u00ad77340\u202c",  # embedding marks, soft hyphen
            "4\ufe0f920177340\u034f",  # variation selector, grapheme joiner
            "\u316449201\u280077340",  # Hangul filler, blank Braille pattern
        ],
    )
    def test_spaces_dashes_and_invisible_characters_are_ignored(self, text):
        """Mail programs, clipboards and people add them."""
        assert parse_number(text, 10) == "4920177340"

    @pytest.mark.parametrize(
        "text",
        [
            "\uff14\uff19\uff12\uff10\uff11-\uff17\uff17\uff13\uff14\uff10",  # full width
            "\u0664\u0669\u0662\u0660\u0661\u0667\u0667\u0663\u0664\u0660",  # Arabic-Indic
            "\u096a\u096f\u0968\u0966\u0967 \u096d\u096d\u0969\u096a\u0966",  # Devanagari
            "\U0001d7d2920177340",  # a bold digit, which NFKC turns into ASCII
        ],
    )
    def test_digits_of_any_script_are_accepted(self, text):
        assert parse_number(text, 10) == "4920177340"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "must have 10 digits, not 0"),
            ("49201", "must have 10 digits, not 5"),
            ("49201773400", "must have 10 digits, not 11"),
            ("49201_77340", "must have 10 digits only; '_' is not a digit"),
            ("4920l77340", "must have 10 digits only; 'l' is not a digit"),
            ("4920177340\x00", r"must have 10 digits only; '\x00' is not a digit"),
            ("\ud800", r"must have 10 digits only; '\ud800' is not a digit"),
            ("492017734\u4e00", r"must have 10 digits only; '\u4e00' is not a digit"),
        ],
    )
    def test_other_text_is_a_typing_error(self, text, reason):
        """Text that cannot be a number is distinct from a wrong number."""
        with pytest.raises(NumberFormatError) as raised:
            parse_number(text, 10)
        assert (raised.value.digits, raised.value.reason) == (10, reason)

    def test_long_text_is_not_parsed(self):
        assert parse_number(" " * 255 + "1", 1) == "1"
        for text in (" " * 256 + "1", "1" * 1_000_000):
            with pytest.raises(NumberFormatError, match="far longer"):
                parse_number(text, 1)


class TestKeyring:
    def test_takes_one_key_or_several(self):
        """A key is at least 32 bytes of any bytes type; the first of several mints."""
        one = Keyring(OLD)
        several: list[Any] = [[OLD], (OLD,), bytearray(OLD), memoryview(OLD), [bytearray(OLD)]]
        for keys in several:
            assert Keyring(keys).minting == one.minting
        assert Keyring([NEW, OLD]).minting == Keyring(NEW).minting != one.minting
        assert Keyring([OLD, NEW]).minting == one.minting

    @pytest.mark.parametrize(
        ("keys", "reason"),
        [
            ([], "there must be at least one key"),
            (b"x" * 31, "must have at least 32 bytes"),
            ([OLD, b"x" * 31], "must have at least 32 bytes"),
            (["x" * 32], "must be bytes, not str"),
            ("x" * 32, "must be bytes, not str"),
            ([OLD, None], "must be bytes, not NoneType"),
        ],
    )
    def test_invalid_keys(self, keys, reason):
        with pytest.raises(InvalidValue) as raised:
            Keyring(keys)
        assert (raised.value.name, raised.value.reason) == ("key", reason)

    def test_the_length_of_a_view_is_in_bytes(self):
        """The items of a memoryview may be wider."""
        wide, short = (memoryview(bytes(size)).cast("I") for size in (32, 28))
        assert Keyring(cast(bytes, wide)).minting == Keyring(bytes(32)).minting
        with pytest.raises(InvalidValue):
            Keyring(cast(bytes, short))

    def test_the_ring_copies_its_keys(self):
        """The caller may wipe its own."""
        key = bytearray(OLD)
        ring = Keyring(cast(bytes, key))
        digest = ring.digest(ring.minting, "1", SUBJECT)
        key[:] = bytes(32)
        assert ring.digest(ring.minting, "1", SUBJECT) == digest

    def test_the_first_mints_and_all_verify(self):
        """A number minted under an older key matches under that key only."""
        old, both = Keyring(OLD), Keyring([NEW, OLD])
        digest = old.digest(old.minting, "4920177340", SUBJECT)
        assert old.minting in both
        assert both.minting not in old
        assert both.matches(old.minting, digest, "4920177340", SUBJECT)
        assert not both.matches(both.minting, digest, "4920177340", SUBJECT)

    def test_an_unknown_key_is_an_error(self):
        """A withdrawn key is distinct from a wrong guess."""
        ring, gone = Keyring(NEW), Keyring(OLD)
        assert gone.minting not in ring
        for call in (
            lambda: ring.digest(gone.minting, "1", SUBJECT),
            lambda: ring.matches(gone.minting, bytes(32), "1", SUBJECT),
        ):
            with pytest.raises(KeyError):
                call()

    @pytest.mark.parametrize("other", [b"", b"x", "text", None, 1])
    def test_other_values_are_not_in_the_ring(self, other):
        assert other not in Keyring(OLD)

    def test_a_key_id_is_a_digest_of_the_key(self):
        """Stores keep it, so its format is fixed."""
        expected = hmac.new(OLD, b"\0\0\0\0\0\0\0\x0eipguard key id", "sha256").digest()[:8]
        assert Keyring(OLD).minting == expected
        assert len(expected) == 8

    def test_the_repr_has_no_key(self):
        ring = Keyring([NEW, OLD])
        assert repr(ring) == str(ring) == "<Keyring of 2>"


class TestDigest:
    def test_is_an_hmac_over_length_prefixed_fields(self):
        """Stores keep the digest, so its format is fixed: the number first, then the subject."""
        ring = Keyring(OLD)
        message = b"".join(
            len(field).to_bytes(8, "big") + field
            for field in (b"4920177340", "jsm\u00eft".encode(), b"", b"add")
        )
        expected = hmac.new(OLD, message, "sha256").digest()
        assert ring.digest(ring.minting, "4920177340", iter(["jsm\u00eft", "", "add"])) == expected

    @given(numbers, subjects, st.data())
    def test_differs_when_a_field_changes(self, number, subject, data):
        at = data.draw(st.integers(0, len(subject) - 1))
        changed = list(subject)
        changed[at] = data.draw(st.text(max_size=12))
        assume(changed[at] != subject[at])
        self._void(number, subject, changed)

    @given(numbers, subjects, st.data())
    def test_differs_when_text_moves_between_fields(self, number, subject, data):
        """`ab`, `c` differs from `a`, `bc`."""
        at = data.draw(st.integers(0, len(subject) - 1))
        fields = [number, *subject]
        assume(fields[at])
        fields[at], fields[at + 1] = fields[at][:-1], fields[at][-1] + fields[at + 1]
        ring = Keyring(OLD)
        kept = ring.digest(ring.minting, number, subject)
        assert ring.digest(ring.minting, fields[0], fields[1:]) != kept

    @given(numbers, subjects)
    def test_differs_when_a_field_is_added_or_left_out(self, number, subject):
        """Empty fields count too."""
        self._void(number, subject, [*subject, ""])
        self._void(number, subject, ["", *subject])
        self._void(number, subject, subject[1:])
        self._void(number, subject, subject[:-1])

    def _void(self, number, subject, changed) -> None:
        ring = Keyring(OLD)
        kept = ring.digest(ring.minting, number, subject)
        assert len(kept) == 32
        assert ring.matches(ring.minting, kept, number, subject)
        assert not ring.matches(ring.minting, kept, number, changed)


class TestMatches:
    @given(numbers)
    def test_only_the_number_matches(self, number):
        """Numbers of any other length or value are wrong."""
        ring = Keyring(OLD)
        digest = ring.digest(ring.minting, "4920177340", SUBJECT)
        assert ring.matches(ring.minting, digest, number, SUBJECT) is (number == "4920177340")
        assert ring.matches(ring.minting, digest, "4920177340", SUBJECT)

    def test_the_subject_may_have_surrogates(self):
        """Stored fields may have text that UTF-8 cannot encode."""
        ring = Keyring(OLD)
        assert len(ring.digest(ring.minting, "1", ["\udcff"])) == 32

    def test_compares_in_constant_time(self, monkeypatch):
        compared = []

        def compare_digest(left: bytes, right: bytes) -> bool:
            compared.append((left, right))
            return True

        monkeypatch.setattr(hmac, "compare_digest", compare_digest)
        ring = Keyring(OLD)
        kept = bytes(32)
        assert ring.matches(ring.minting, kept, "12", SUBJECT)
        assert compared == [(kept, ring.digest(ring.minting, "12", SUBJECT))]

    def test_derived_keys_differ_by_purpose(self):
        """Each key of the ring gives one key for each purpose, in order."""
        both = Keyring([NEW, OLD]).derive("forms")
        assert both == (*Keyring(NEW).derive("forms"), *Keyring(OLD).derive("forms"))
        others = Keyring([NEW, OLD]).derive("cookies")
        assert len({*both, *others, NEW, OLD}) == 6
        assert {len(key) for key in (*both, *others)} == {32}
