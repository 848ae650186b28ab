"""Bad input: a clear error, and an unchanged store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import ipguard
from ipguard import AddressError, InvalidValue, UnknownRequest, UnknownRestriction, UsernameError
from tests.flows import ALICE, BOSS, HOME, OFFICE, Desk

NO_TEXT: tuple[Any, ...] = (None, 5, True, b"x", ["x"], {"a": 1}, 1.5)
NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)  # as a desk's clock begins


class Sly(str):
    """A str that claims to equal everything."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    "label",
    ["x" * 101, "a\nb", "a\0", "\r", "\u2028", "\u202e", "\ud800", "\x7f", *NO_TEXT],
    ids=repr,
)
def test_labels(desk: Desk, label: Any) -> None:
    """At most 100 characters of text on one line."""
    for call in (
        lambda: desk.ask(label=label),
        lambda: desk.flow.impose(BOSS, "jsmith", OFFICE, reason="x", label=label),
    ):
        with desk.unchanged(), pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.name == "label"


@pytest.mark.parametrize("label", ["", "x" * 100, "Büro 東京", "<b>", "%s {0} $(x)", "' OR 1=1 --"])
def test_valid_labels(desk: Desk, label: str) -> None:
    applied = desk.confirm(desk.ask(label=label))
    assert applied.restriction is not None
    assert applied.restriction.label == label
    assert desk.store.load_policy("jsmith").restrictions[0].label == label


@pytest.mark.parametrize("reason", ["x" * 501, "a\nb", "\0", *NO_TEXT], ids=repr)
def test_reasons_for_deleting(desk: Desk, reason: Any) -> None:
    """At most 500 characters of text on one line."""
    restriction = desk.add()
    for setting in (False, True):
        desk.use(confirm_deletes=setting)
        with desk.unchanged(), pytest.raises(InvalidValue) as caught:
            desk.flow.delete(ALICE, restriction.id, reason)
        assert caught.value.name == "reason"
    desk.use()
    desk.delete(restriction, reason="x" * 500)


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2040, 1, 1),  # noqa: DTZ001 - naive is the point
        NOW,
        datetime.min.replace(tzinfo=UTC),
        2_000_000_000,
        (NOW + timedelta(days=1)).date(),
    ],
    ids=repr,
)
def test_times(desk: Desk, moment: Any) -> None:
    """Only aware times in the future are accepted."""
    for call in (
        lambda: desk.ask(expires_at=moment),
        lambda: desk.flow.impose(BOSS, "jsmith", OFFICE, reason="x", expires_at=moment),
    ):
        with desk.unchanged(), pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.name == "expires_at"


def test_the_farthest_time(desk: Desk) -> None:
    last = datetime.max.replace(tzinfo=UTC)
    applied = desk.confirm(desk.ask(expires_at=last))
    assert applied.restriction is not None
    assert desk.store.load_policy("jsmith").restrictions[0].expires_at == last


@pytest.mark.parametrize(
    "addresses",
    ["", "nonsense", "203.0.113.7/8", "0.0.0.0", "1" * 10**6, "\ud800", *NO_TEXT],
    ids=lambda value: repr(value)[:20],
)
def test_addresses(desk: Desk, addresses: Any) -> None:
    for call in (
        lambda: desk.ask(addresses),
        lambda: desk.flow.impose(BOSS, "jsmith", addresses, reason="x"),
    ):
        with desk.unchanged(), pytest.raises(AddressError):
            call()


def test_a_constructed_range_is_checked(desk: Desk) -> None:
    for first in (0, 2**32 - 1, 0xE0 << 24):
        made = ipguard.AddressRange(version=4, first=first, last=first)
        with desk.unchanged(), pytest.raises(AddressError):
            desk.flow.request(ALICE, "jsmith", made)


@pytest.mark.parametrize(
    "username",
    ["", " jsmith", "jsmith ", "x" * 257, "a\0", "a\u200b", "\ud800", *NO_TEXT],
    ids=repr,
)
def test_usernames(desk: Desk, username: Any) -> None:
    """A name without a canonical form is refused before any look-up."""
    for call in (
        lambda: desk.flow.request(ALICE, username, OFFICE),
        lambda: desk.flow.impose(BOSS, username, OFFICE, reason="x"),
        lambda: desk.flow.unlock(BOSS, username, reason="x"),
    ):
        with desk.unchanged(), pytest.raises(UsernameError):
            call()


@pytest.mark.parametrize("username", ["", "jsmith ", "a\0", 5, b"x"], ids=repr)
def test_usernames_in_the_history(desk: Desk, username: Any) -> None:
    with pytest.raises(UsernameError):
        desk.flow.history(BOSS, username=username)


@pytest.mark.parametrize(
    "made_up",
    ["", "0" * 16, "x" * 10**6, "\0", "\ud800", "' OR 1=1 --", "%", *NO_TEXT],
    ids=lambda value: repr(value)[:20],
)
def test_ids(desk: Desk, made_up: Any) -> None:
    request, restriction = desk.ask(), desk.add(HOME)
    assert made_up not in (request.id, restriction.id)
    for call, error in (
        (lambda: desk.flow.confirm(ALICE, made_up, desk.number(request)), UnknownRequest),
        (lambda: desk.flow.cancel(ALICE, made_up), UnknownRequest),
        (lambda: desk.flow.resend(ALICE, made_up), UnknownRequest),
        (lambda: desk.flow.delete(ALICE, made_up), UnknownRestriction),
        (lambda: desk.flow.lift(BOSS, made_up, reason="x"), UnknownRestriction),
    ):
        with desk.unchanged(), pytest.raises(error) as caught:
            call()
        assert len(str(caught.value)) < 100


@pytest.mark.parametrize("number", [None, 4920177340, b"49201-77340", ["1"], True, 1.5], ids=repr)
def test_numbers_of_the_wrong_type(desk: Desk, number: Any) -> None:
    """A number of the wrong type is an error of the program, not an attempt."""
    request = desk.ask()
    with desk.unchanged(), pytest.raises(InvalidValue) as caught:
        desk.flow.confirm(ALICE, request.id, number)
    assert caught.value.name == "number"


def test_text_with_overridden_equality(desk: Desk) -> None:
    """A str subclass that equals everything matches nothing."""
    request, restriction = desk.ask(), desk.add(HOME)
    with pytest.raises(ipguard.WrongNumber):
        desk.flow.confirm(ALICE, request.id, Sly(desk.wrong(request)))
    for call, error in (
        (lambda: desk.flow.confirm(ALICE, Sly("0"), desk.number(request)), UnknownRequest),
        (lambda: desk.flow.delete(ALICE, Sly("0")), UnknownRestriction),
    ):
        with desk.unchanged(), pytest.raises(error):
            call()
    assert desk.held() == [str(restriction.addresses)]
