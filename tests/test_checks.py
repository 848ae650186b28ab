"""The checks of arguments: values that pass, and the reason for each refusal."""

import math
import sys
import unicodedata
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo

import pytest

from ipguard import _checks
from ipguard._checks import check_text, check_time
from ipguard.errors import InvalidValue

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


class NoOffset(tzinfo):
    """A time zone without an offset."""

    def utcoffset(self, moment):
        return None

    dst = tzname = utcoffset


class Failing(NoOffset):
    """A time zone that raises."""

    def utcoffset(self, moment):
        raise RuntimeError("no such zone")


def refusal(check: str, *args, **options) -> str:
    """Return the reason for which a value is refused."""
    with pytest.raises(InvalidValue) as raised:
        getattr(_checks, check)("setting", *args, **options)
    assert raised.value.name == "setting"
    return raised.value.reason


@pytest.mark.parametrize(
    "text", ["", " ", "office", "Büro 漢字 مكتب", "\U0001f3e2" * 20, "a\u0301"]
)
def test_text_in_any_language_is_accepted(text):
    """The limit counts characters."""
    assert check_text("label", text, 20) is text
    assert refusal("check_text", "x" * 21, 20) == "has more than 20 characters"


def test_text_must_not_break_or_reorder_lines():
    """Every character of Unicode, against the properties of the standard."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        breaks = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        # The property Bidi_Control, whose classes are these except for the three marks.
        turns = unicodedata.bidirectional(character) in (
            *("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"),
        )
        refused = breaks or turns or character in "\u200e\u200f\u061c"
        try:
            check_text("label", character, 1)
        except InvalidValue:
            assert refused, ascii(character)
        else:
            assert not refused, ascii(character)
    for whole in ("a\n", "\u202ea", "a\ud800a"):
        assert refusal("check_text", whole, 10) == "must not hold control characters"


@pytest.mark.parametrize("text", ["", " ", "\u3000 \u00a0"])
def test_required_text_is_not_blank(text):
    assert check_text("reason", text, 10) == text
    assert refusal("check_text", text, 10, required=True) == "must not be empty"
    assert check_text("reason", " x ", 10, required=True) == " x "


@pytest.mark.parametrize("value", [None, 1, b"x", ["x"]])
def test_other_types_are_not_text(value):
    assert refusal("check_text", value, 10) == f"must be text, not {type(value).__name__}"


def test_a_time_is_returned_in_utc():
    given = datetime(2030, 1, 1, 17, 30, 0, 1, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    moment = check_time("expires_at", given)
    assert moment == given == NOW.replace(microsecond=1)
    assert moment.tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (NOW.replace(tzinfo=None), "must be an aware datetime"),
        (NOW.replace(tzinfo=NoOffset()), "must be an aware datetime"),
        (NOW.replace(tzinfo=Failing()), "has a time zone that fails: RuntimeError"),
        (
            datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
            "is outside the range of times in UTC",
        ),
        (
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
            "is outside the range of times in UTC",
        ),
        ("2030-01-01T12:00:00Z", "must be a datetime, not str"),
        (date(2030, 1, 1), "must be a datetime, not date"),
    ],
)
def test_other_values_are_not_times(value, reason):
    """A naive time is another moment on each host."""
    assert refusal("check_time", value) == reason


@pytest.mark.parametrize(
    ("check", "options", "accepted", "refused", "reason"),
    [
        (
            "check_whole",
            {"least": 1},
            [1, 10**30],
            [0, -1, True, 1.0, "1", None, math.nan],
            "must be a whole number of at least 1",
        ),
        (
            "check_whole",
            {"least": 0, "most": 32},
            [0, 32],
            [-1, 33, False, 5.0, "5", []],
            "must be a whole number from 0 to 32",
        ),
        (
            "check_seconds",
            {},
            [0, -1.5, 999_999_999],
            [math.inf, math.nan, 1e9, True, "1", None, DAY],
            "must be a finite number of seconds",
        ),
        ("check_seconds", {"above": 0}, [0.001], [0, -1], "must be more than 0 seconds"),
        ("check_seconds", {"least": 0}, [0], [-0.001], "must be at least 0 seconds"),
        ("check_seconds", {"most": 10}, [10], [10.5], "must be at most 10 seconds"),
        (
            "check_duration",
            {},
            [timedelta(microseconds=1), 366 * DAY],
            [timedelta(0), -DAY, 367 * DAY, timedelta.max],
            "must be more than 0 to 366 days",
        ),
        (
            "check_duration",
            {"zero": True},
            [timedelta(0)],
            [timedelta(microseconds=-1)],
            "must be 0 to 366 days",
        ),
        ("check_duration", {}, [DAY], [None, 600, "1 day", True], "must be a timedelta"),
        (
            "check_switch",
            {},
            [True, False],
            ["false", 0, 1, None],
            "must be True or False",
        ),
    ],
)
def test_numbers_durations_and_switches(check, options, accepted, refused, reason):
    for value in accepted:
        assert getattr(_checks, check)("setting", value, **options) == value
    for value in refused:
        assert refusal(check, value, **options) == reason


def test_callables():
    _checks.check_callable("setting", print)
    assert refusal("check_callable", None) == "must be callable"
