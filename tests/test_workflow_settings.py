"""The workflow's figures: their defaults, and what is refused at construction."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import attrs
import pytest

import ipguard
from ipguard import InvalidValue, Workflow, WorkflowSettings
from ipguard.stores.memory import MemoryStore
from ipguard.testing import Outbox
from tests.flows import ALICE, KEY, PEOPLE, Desk

COUNTS = {
    "number_digits": (6, 18),
    "attempts_per_number": (1, 10**9),
    "failures_per_actor": (1, 10**9),
    "resends_per_request": (0, 10**9),
    "requests_per_hour": (1, 10**9),
    "widest_ipv4": (0, 32),
    "widest_ipv6": (0, 128),
    "restrictions_per_user": (1, 10**9),
}
LENGTHS = ("number_lifetime", "request_lifetime", "resend_interval")
NO_COUNTS: tuple[Any, ...] = (True, False, None, "5", 5.0, math.nan, [], timedelta(1))
NO_LENGTHS: tuple[Any, ...] = (None, 600, 600.0, "10 min", True, timedelta(microseconds=-1))


def test_the_defaults_are_those_of_the_contract() -> None:
    """Word for word."""
    assert WorkflowSettings() == WorkflowSettings(
        number_digits=10,
        number_lifetime=timedelta(minutes=10),
        request_lifetime=timedelta(hours=24),
        attempts_per_number=5,
        failures_per_actor=100,
        resends_per_request=5,
        resend_interval=timedelta(seconds=30),
        requests_per_hour=20,
        widest_ipv4=16,
        widest_ipv6=32,
        restrictions_per_user=1000,
        confirm_deletes=False,
    )


def test_every_setting_is_tested_here() -> None:
    """A new setting needs a line above."""
    names = {field.name for field in attrs.fields(WorkflowSettings)}
    assert names == {*COUNTS, *LENGTHS, "confirm_deletes"}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_have_ends(name: str) -> None:
    """The least and the most are accepted, what is past them is refused by name."""
    least, most = COUNTS[name]
    for good in (least, most):
        assert getattr(WorkflowSettings(**{name: good}), name) == good
    for bad in (least - 1, most + 1, -1, 10**30):
        with pytest.raises(InvalidValue) as caught:
            WorkflowSettings(**{name: bad})
        assert caught.value.name == name


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_a_count_is_a_whole_number(name: str, value: Any) -> None:
    """True is not 1, and neither is "5" 5."""
    with pytest.raises(InvalidValue) as caught:
        WorkflowSettings(**{name: value})
    assert caught.value.name == name


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("value", NO_LENGTHS, ids=repr)
def test_a_length_of_time_is_a_timedelta(name: str, value: Any) -> None:
    """Seconds as a number are refused: they might have been meant as minutes."""
    with pytest.raises(InvalidValue) as caught:
        WorkflowSettings(**{name: value})
    assert caught.value.name == name


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_have_ends(name: str) -> None:
    """None at all only where mails may follow at once, and never longer than a year."""
    zero: dict[str, Any] = {name: timedelta()}
    if name == "resend_interval":
        assert WorkflowSettings(**zero).resend_interval == timedelta()
    else:
        with pytest.raises(InvalidValue):
            WorkflowSettings(**zero)
    for bad in (timedelta(days=366, microseconds=1), timedelta.max):
        with pytest.raises(InvalidValue):
            WorkflowSettings(**{name: bad})


def test_a_number_does_not_outlive_its_request() -> None:
    """Such settings contradict themselves."""
    with pytest.raises(InvalidValue):
        WorkflowSettings(number_lifetime=timedelta(hours=25))
    with pytest.raises(InvalidValue):
        WorkflowSettings(request_lifetime=timedelta(minutes=9))
    WorkflowSettings(request_lifetime=timedelta(minutes=10))


@pytest.mark.parametrize("value", [False, True, "last"])
def test_deletes_are_confirmed_never_always_or_the_last(value: Any) -> None:
    """These three are what it can be."""
    assert WorkflowSettings(confirm_deletes=value).confirm_deletes == value


@pytest.mark.parametrize("value", [None, 0, 1, "", "LAST", "always", "first", b"last", ["last"]])
def test_anything_else_for_deletes_is_refused(value: Any) -> None:
    """A misspelt setting must not turn the number off."""
    with pytest.raises(InvalidValue) as caught:
        WorkflowSettings(confirm_deletes=value)
    assert caught.value.name == "confirm_deletes"


def test_settings_are_frozen_and_named() -> None:
    """Nobody changes them behind a workflow's back, and none is given by position or misspelt."""
    settings: Any = WorkflowSettings()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        settings.attempts_per_number = 10**9
    kind: Any = WorkflowSettings
    with pytest.raises(TypeError):
        kind(10)
    with pytest.raises(TypeError):
        kind(attempts=5)


@pytest.mark.parametrize("settings", [{}, {"number_digits": 8}, "", 0, False, WorkflowSettings])
def test_a_workflow_takes_settings_and_nothing_like_them(settings: Any) -> None:
    """A dictionary is refused at once, an empty one too, not at the first request."""
    with ipguard.open_store("memory://") as store, pytest.raises(InvalidValue) as caught:
        Workflow(store, Outbox(), key=KEY, settings=settings)
    assert caught.value.name == "settings"


def test_the_extremes_work(desk: Desk) -> None:
    """With every figure at its most, and at its least, a restriction travels the whole way."""
    for index, lengths in ((1, timedelta(days=366)), (0, timedelta(microseconds=1))):
        ends = {name: both[index] for name, both in COUNTS.items()}
        desk.use(**ends, **dict.fromkeys(LENGTHS, lengths))
        for person in PEOPLE[:1]:
            request = desk.ask(f"203.0.113.{index}/32", person.username, ALICE)
            desk.confirm(request)
        desk.store.remove_users(["jsmith"])
        desk.store.put_users(PEOPLE)
        for restriction in desk.store.load_policy("jsmith").restrictions:
            desk.delete(restriction)
        desk.wait(hours=1)


@pytest.mark.parametrize("digits", [6, 11, 18])
def test_numbers_have_as_many_digits(desk: Desk, digits: int) -> None:
    """Written in groups of five, and confirmed as they are written."""
    desk.use(number_digits=digits)
    request = desk.ask()
    assert len(desk.number(request).replace("-", "")) == digits
    assert max(map(len, desk.number(request).split("-"))) <= 5
    desk.confirm(request)


@pytest.mark.parametrize(
    ("store", "notifier", "said"),
    [
        (None, Outbox(), "store: is no restriction store; open_store opens one"),
        ("memory://", Outbox(), "store: is no restriction store; open_store opens one"),
        (MemoryStore(), None, "notifier: is no notifier"),
        (MemoryStore(), print, "notifier: is no notifier"),
    ],
    ids=["no store", "a url", "no notifier", "a function"],
)
def test_a_workflow_of_the_wrong_parts(store: Any, notifier: Any, said: str) -> None:
    """The mistake is told at construction, not at an administrator's first request."""
    with pytest.raises(InvalidValue) as caught:
        Workflow(store, notifier, key=bytes(32))
    assert str(caught.value) == said
