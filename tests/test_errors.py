"""Errors carry data, survive pickling, and their messages are one bounded line."""

import copy
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
    DirectionChanged,
    DuplicateRestriction,
    InvalidValue,
    IPGuardError,
    LockoutRisk,
    NotAnApprover,
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
    TooSoon,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
    UsernameCollision,
    UsernameError,
    WrongNumber,
    shorten,
)
from ipguard.model import Direction

UNTIL = datetime(2031, 1, 31, 18, tzinfo=UTC)
DUPLICATE = "username addresses found label expires_at differs"

# Each error, the names of its attributes, their values, and its message.
CASES: list[tuple[IPGuardError, str, tuple[object, ...], str]] = [
    (
        AddressError("10.0.0.1/8", "host bits are set", "10.0.0.0/8"),
        "text reason hint",
        ("'10.0.0.1/8'", "host bits are set", "10.0.0.0/8"),
        "'10.0.0.1/8' is not accepted: host bits are set (did you mean 10.0.0.0/8?)",
    ),
    (
        UsernameError("", "it is empty"),
        "text reason",
        ("''", "it is empty"),
        "'' is not a username: it is empty",
    ),
    (
        InvalidValue("label", "is too long"),
        "name reason",
        ("label", "is too long"),
        "label: is too long",
    ),
    (
        UsernameCollision("jo", ("Jo", "JO"), ("U1", "U2")),
        "username spellings accounts removed refused",
        ("jo", ("Jo", "JO"), ("U1", "U2"), False, ()),
        "'JO' (account 'U2') is the username of another user, 'Jo' (account 'U1')",
    ),
    (
        NumberFormatError(10, "must have 10 digits, not 5"),
        "digits reason name",
        (10, "must have 10 digits, not 5", "number"),
        "the confirmation number must have 10 digits, not 5; no attempt was counted",
    ),
    (
        AddressTooBroad("10.0.0.0/8", 16),
        "addresses widest",
        ("10.0.0.0/8", 16),
        "10.0.0.0/8 holds more addresses than a /16, the widest allowed",
    ),
    (
        LockoutRisk("192.0.2.1"),
        "address",
        ("192.0.2.1",),
        "after this change you could not log in from 192.0.2.1, where you are now",
    ),
    (
        OpeningRisk("jsmith"),
        "username",
        ("jsmith",),
        "after this change jsmith could log in from every address",
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1"),
        DUPLICATE,
        ("jsmith", "192.0.2.1", "restriction", "", None, False),
        "jsmith already has 192.0.2.1 (no label, no expiry)",
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "restriction", "office", UNTIL, True),
        DUPLICATE,
        ("jsmith", "192.0.2.1", "restriction", "office", UNTIL, True),
        (
            'jsmith already has 192.0.2.1 (label "office", expires 2031-01-31 18:00 UTC);'
            " it was not changed. To change its label or expiry, replace it"
        ),
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "request", "a\nb", None, True),
        DUPLICATE,
        ("jsmith", "192.0.2.1", "request", "a\nb", None, True),
        (
            r"a request to add 192.0.2.1 (label 'a\nb', no expiry) for jsmith is already pending;"
            " it was not changed. To ask for another label or expiry, cancel that request first"
        ),
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "deletion"),
        DUPLICATE,
        ("jsmith", "192.0.2.1", "deletion", "", None, False),
        "a request to delete 192.0.2.1 of jsmith is already pending",
    ),
    (
        DuplicateRestriction("jsmith", "192.0.2.1", "row"),
        DUPLICATE,
        ("jsmith", "192.0.2.1", "row", "", None, False),
        "jsmith 192.0.2.1 is there twice",
    ),
    (UnknownUser("jsmith"), "username", ("jsmith",), "no user 'jsmith'"),
    (UnknownRequest("q1"), "request_id", ("q1",), "no request 'q1'"),
    (UnknownRestriction("r1"), "restriction_id", ("r1",), "no restriction 'r1'"),
    (RequestClosed("locked"), "state", ("locked",), "the request is closed: locked"),
    (NumberExpired(), "", (), "the confirmation number has expired; ask for a new one"),
    (WrongNumber(0), "attempts_left", (0,), "wrong confirmation number; attempts left: 0"),
    (TooManyAttempts(), "", (), "too many wrong confirmation numbers"),
    (
        TooManyRequests(timedelta(seconds=29.6)),
        "retry_after",
        (timedelta(seconds=29.6),),
        "too many requests; try again in 30 s",
    ),
    (
        DirectionChanged(Direction.TIGHTENS, Direction.OPENS, "jsmith"),
        "requested now username",
        (Direction.TIGHTENS, Direction.OPENS, "jsmith"),
        (
            "the restrictions of jsmith have changed: this was requested as a change that lets the"
            " user in from fewer addresses, and now it lets the user in from every address;"
            " withdraw the request and make a new one"
        ),
    ),
    (
        TooSoon(datetime(2030, 1, 1, 12, tzinfo=UTC)),
        "ready_at",
        (datetime(2030, 1, 1, 12, tzinfo=UTC),),
        "this request has to wait until 2030-01-01 12:00:00 UTC",
    ),
    (
        NotAnApprover("you made it"),
        "reason",
        ("you made it",),
        "you cannot approve this request: you made it",
    ),
    (
        TooManyRequests(timedelta(milliseconds=1)),
        "retry_after",
        (timedelta(milliseconds=1),),
        "too many requests; try again in 1 s",
    ),
    (
        TooManyRestrictions("jsmith", 1000),
        "username limit",
        ("jsmith", 1000),
        "jsmith already has 1000 restrictions, as many as are allowed",
    ),
    (
        DeliveryError("no route"),
        "reason request_id",
        ("no route", None),
        "the mail could not be sent: no route",
    ),
    (StoreError("odd"), "", (), "odd"),
    (StoreUnavailable("down"), "", (), "down"),
    (StoreConfigError("no driver"), "", (), "no driver"),
    (
        SchemaVersionError(None, 3),
        "found needed",
        (None, 3),
        "the store has no ipguard schema; version 3 is needed",
    ),
    (
        SchemaVersionError(2, 3),
        "found needed",
        (2, 3),
        "the store's schema is version 2; this library needs 3",
    ),
]


def test_every_error_has_a_case():
    """All of them derive from the one base class."""
    kinds = {getattr(errors, name) for name in errors.__all__}
    assert all(issubclass(kind, IPGuardError) for kind in kinds)
    assert kinds - {IPGuardError} == {type(error) for error, *_ in CASES}


@pytest.mark.parametrize(
    ("error", "names", "values", "text"), CASES, ids=[type(error).__name__ for error, *_ in CASES]
)
def test_an_error_keeps_its_data_across_processes(error, names, values, text):
    """A copy or a pickled error has the same type, attributes and message; twice too."""
    found = [error, copy.copy(error), copy.deepcopy(error)]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        found += [back, pickle.loads(pickle.dumps(back, protocol))]
    for each in found:
        assert type(each) is type(error)
        assert vars(each) == dict(zip(names.split(), values, strict=True))
        assert str(each) == text
        assert each.args == error.args


def test_errors_have_the_bases_that_callers_expect():
    """Invalid input is a ValueError too, and every failure of a store a StoreError."""
    for kind in (AddressError, UsernameError, InvalidValue):
        assert issubclass(kind, ValueError)
    for failure in (StoreUnavailable, StoreConfigError, SchemaVersionError):
        assert issubclass(failure, StoreError)
    assert not issubclass(AddressTooBroad, ValueError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("jsmith", "'jsmith'"),
        ("a\nb\x00", r"'a\nb\x00'"),
        ("ü\u202e", r"'\xfc\u202e'"),
        ("\ud800", r"'\ud800'"),
        ("x" * 61, "'" + "x" * 60 + "'…"),
        (None, "NoneType object"),
        (b"secret", "bytes object"),
    ],
)
def test_shorten(value, text):
    """Text is quoted and cut at 60 characters; of other values only the type is shown."""
    assert shorten(value) == text


@given(st.text())
def test_shortened_text_is_one_printable_line(text):
    """No text from outside breaks a line of a log; text of 60 characters is complete."""
    short = shorten(text)
    assert short.isprintable()
    assert short.rstrip("…").isascii()
    assert len(short) <= 60 * 10 + 3
    assert len(text) > 60 or eval(short) == text


@given(st.text(min_size=61))
def test_errors_of_long_text_stay_short(text):
    """An error holds only the start of its input, in its arguments too."""
    for error in (AddressError(text, "bad"), UsernameError(text, "bad")):
        assert len(str(error)) < 700
        assert text not in pickle.dumps(error).decode("latin-1")
    assert len(str(UnknownUser(text))) < 700


def test_a_collision_lists_every_refused_record():
    """The message names the first few; the attribute has all."""
    each = UsernameCollision("jo", ("Jo", "JO"), ("U1", "U2"))
    several = UsernameCollision("jo", ("Jo", "JO"), ("U1", "U2"), refused=((1, each),) * 7)
    assert str(several).startswith(f"7 users were refused: {each}; ")
    assert str(several).endswith("; …")
    assert "…" not in str(UsernameCollision("jo", ("", ""), ("", ""), refused=((1, each),) * 2))
    gone = UsernameCollision("jo", ("Jo", "JO"), ("U1", "U2"), removed=True)
    assert "a removed user whose restrictions are in force" in str(gone)
