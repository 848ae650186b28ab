"""Errors carry data, survive pickling, and say things in one bounded line."""

import copy
import inspect
import pickle
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import errors
from ipguard.errors import (
    AddressError,
    AddressTooBroad,
    DeliveryError,
    DuplicateRestriction,
    InvalidValue,
    IPGuardError,
    LockoutRisk,
    NumberExpired,
    NumberFormatError,
    OpeningRisk,
    RequestClosed,
    SchemaVersionError,
    StoreConfigError,
    StoreError,
    StoreUnavailable,
    TooManyAttempts,
    TooManyRequests,
    TooManyRestrictions,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
    UsernameError,
    WrongNumber,
    shorten,
)

UNTIL = datetime(2031, 1, 31, 18, tzinfo=UTC)

# Each error, the data it carries, and the sentence it says.
CASES: list[tuple[IPGuardError, dict[str, object], str]] = [
    (
        AddressError("1.2.3.4\n", "it ends in a blank"),
        {"text": r"'1.2.3.4\n'", "reason": "it ends in a blank", "hint": None},
        r"'1.2.3.4\n' is not accepted: it ends in a blank",
    ),
    (
        AddressError("10.0.0.1/8", "host bits are set", "10.0.0.0/8"),
        {"text": "'10.0.0.1/8'", "reason": "host bits are set", "hint": "10.0.0.0/8"},
        "'10.0.0.1/8' is not accepted: host bits are set (did you mean 10.0.0.0/8?)",
    ),
    (
        UsernameError("", "it is empty"),
        {"text": "''", "reason": "it is empty"},
        "'' is not a username: it is empty",
    ),
    (
        InvalidValue("label", "is too long"),
        {"name": "label", "reason": "is too long"},
        "label: is too long",
    ),
    (
        NumberFormatError(10, "must have 10 digits, not 5"),
        {"name": "number", "reason": "must have 10 digits, not 5", "digits": 10},
        "the confirmation number must have 10 digits, not 5; no attempt was counted",
    ),
    (
        AddressTooBroad("10.0.0.0/8", 16),
        {"addresses": "10.0.0.0/8", "widest": 16},
        "10.0.0.0/8 holds more addresses than a /16, the widest allowed",
    ),
    (
        LockoutRisk("192.0.2.1"),
        {"address": "192.0.2.1"},
        "after this change you could not log in from 192.0.2.1, where you are now",
    ),
    (
        OpeningRisk("jsmith"),
        {"username": "jsmith"},
        "after this change jsmith could log in from every address",
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1"),
        {
            "username": "jsmith",
            "addresses": "192.0.2.1",
            "found": "restriction",
            "label": "",
            "expires_at": None,
            "differs": False,
        },
        "jsmith already has 192.0.2.1 (no label, no expiry)",
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "restriction", "office", UNTIL, True),
        {
            "username": "jsmith",
            "addresses": "192.0.2.1",
            "found": "restriction",
            "label": "office",
            "expires_at": UNTIL,
            "differs": True,
        },
        (
            'jsmith already has 192.0.2.1 (label "office", expires 2031-01-31 18:00 UTC);'
            " it was not changed. To change its label or expiry, delete it and add it again"
        ),
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "request", "a\nb", None, True),
        {
            "username": "jsmith",
            "addresses": "192.0.2.1",
            "found": "request",
            "label": "a\nb",
            "expires_at": None,
            "differs": True,
        },
        (
            r"a request to add 192.0.2.1 (label 'a\nb', no expiry) for jsmith is already pending;"
            " it was not changed. To ask for another label or expiry, cancel that request first"
        ),
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "deletion"),
        {
            "username": "jsmith",
            "addresses": "192.0.2.1",
            "found": "deletion",
            "label": "",
            "expires_at": None,
            "differs": False,
        },
        "a request to delete 192.0.2.1 of jsmith is already pending",
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "row"),
        {
            "username": "jsmith",
            "addresses": "192.0.2.1",
            "found": "row",
            "label": "",
            "expires_at": None,
            "differs": False,
        },
        "jsmith 192.0.2.1 is there twice",
    ),
    (UnknownUser("jsmith"), {"username": "jsmith"}, "no user 'jsmith'"),
    (UnknownRequest("q1"), {"request_id": "q1"}, "no request 'q1'"),
    (UnknownRestriction("r1"), {"restriction_id": "r1"}, "no restriction 'r1'"),
    (RequestClosed("locked"), {"state": "locked"}, "the request is closed: locked"),
    (NumberExpired(), {}, "the confirmation number has expired; ask for a new one"),
    (WrongNumber(4), {"attempts_left": 4}, "wrong confirmation number; attempts left: 4"),
    (WrongNumber(0), {"attempts_left": 0}, "wrong confirmation number; attempts left: 0"),
    (TooManyAttempts(), {}, "too many wrong confirmation numbers"),
    (
        TooManyRequests(timedelta(seconds=29.6)),
        {"retry_after": timedelta(seconds=29.6)},
        "too many requests; try again in 30 s",
    ),
    (
        TooManyRequests(timedelta(milliseconds=1)),
        {"retry_after": timedelta(milliseconds=1)},
        "too many requests; try again in 1 s",
    ),
    (
        TooManyRestrictions("jsmith", 1000),
        {"username": "jsmith", "limit": 1000},
        "jsmith already has 1000 restrictions, as many as are allowed",
    ),
    (
        DeliveryError("no route"),
        {"reason": "no route", "request_id": None},
        "the mail could not be sent: no route",
    ),
    (
        DeliveryError("no route", "q1"),
        {"reason": "no route", "request_id": "q1"},
        "the mail could not be sent: no route",
    ),
    (StoreError("odd"), {}, "odd"),
    (StoreUnavailable("down"), {}, "down"),
    (StoreConfigError("no driver"), {}, "no driver"),
    (
        SchemaVersionError(None, 3),
        {"found": None, "needed": 3},
        "the store has no ipguard schema; version 3 is needed",
    ),
    (
        SchemaVersionError(2, 3),
        {"found": 2, "needed": 3},
        "the store's schema is version 2; this library needs 3",
    ),
]
each = pytest.mark.parametrize(
    ("error", "data", "text"), CASES, ids=[type(error).__name__ for error, _, _ in CASES]
)


def test_every_error_has_its_case():
    """No error is left out of the cases below but the base itself."""
    defined = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    }
    assert defined - {IPGuardError} == {type(error) for error, _, _ in CASES}
    assert all(issubclass(kind, IPGuardError) for kind in defined)


@each
def test_an_error_carries_its_data(error, data, text):
    """What a caller needs is in attributes, and nowhere else."""
    assert vars(error) == data


@each
def test_an_error_says_its_sentence(error, data, text):
    """An error reads as one sentence."""
    assert str(error) == text


@each
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_crosses_processes(error, data, text, protocol):
    """A pickled error comes back as the same type, with the same data and sentence; twice too."""
    back = pickle.loads(pickle.dumps(error, protocol))
    again = pickle.loads(pickle.dumps(back, protocol))
    for other in (back, again, copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert vars(other) == data
        assert str(other) == text
        assert other.args == error.args


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (AddressError, ValueError),
        (UsernameError, ValueError),
        (InvalidValue, ValueError),
        (StoreUnavailable, StoreError),
        (StoreConfigError, StoreError),
        (SchemaVersionError, StoreError),
    ],
)
def test_errors_are_also_what_callers_expect(kind, base):
    """Bad text is a ValueError as well, and each trouble with a store a StoreError."""
    assert issubclass(kind, base)
    assert not issubclass(AddressTooBroad, ValueError)


class TestShortened:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("jsmith", "'jsmith'"),
            ("", "''"),
            ("a\nb\x00", r"'a\nb\x00'"),
            ("ü\u202e", r"'\xfc\u202e'"),
            ("\ud800", r"'\ud800'"),
            ("x" * 60, "'" + "x" * 60 + "'"),
            ("x" * 61, "'" + "x" * 60 + "'…"),
            ("x" * 1_000_000, "'" + "x" * 60 + "'…"),
            (None, "NoneType object"),
            (b"secret", "bytes object"),
            (17, "int object"),
        ],
    )
    def test_of(self, value, text):
        """Text is quoted and cut at 60 characters; of anything else only the type is told."""
        assert shorten(value) == text

    @given(st.text())
    def test_is_one_printable_line(self, text):
        """Nothing from outside can break a line of a log or turn its direction."""
        short = shorten(text)
        assert short.isprintable()
        assert short.rstrip("…").isascii()
        assert len(short) <= 60 * 10 + 3

    @given(st.text(max_size=60))
    def test_short_text_is_told_in_full(self, text):
        """Nothing is lost of what is short."""
        assert eval(shorten(text)) == text

    @given(st.text(min_size=61))
    def test_errors_of_long_text_stay_short(self, text):
        """An error holds no more than the start of its input, in its arguments either."""
        for error in (AddressError(text, "bad"), UsernameError(text, "bad")):
            assert len(str(error)) < 700
            assert text not in pickle.dumps(error).decode("latin-1")
        assert len(str(UnknownUser(text))) < 700
