"""The settings of the workflow: defaults, and checks at construction."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import attrs
import pytest

import ipguard
from ipguard import (
    Demand,
    Direction,
    InvalidValue,
    RequestKind,
    Workflow,
    WorkflowSettings,
    rules,
)
from ipguard.stores.memory import MemoryStore
from ipguard.testing import Outbox
from tests.flows import KEY, PEOPLE, Desk

COUNTS = {
    "number_digits": (6, 18),
    "attempts_per_number": (1, 10**9),
    "failures_per_actor": (1, 10**9),
    "resends_per_request": (0, 10**9),
    "requests_per_hour": (1, 10**9),
    "widest_ipv4": (0, 32),
    "widest_ipv6": (0, 128),
    "restrictions_per_user": (1, 65_535),
}
DEMANDS = ("add", "delete", "loosens", "opens")
DURATIONS = ("number_lifetime", "request_lifetime", "resend_interval")
NO_COUNTS: tuple[Any, ...] = (True, False, None, "5", 5.0, math.nan, [], timedelta(1))
NO_DURATIONS: tuple[Any, ...] = (None, 600, 600.0, "10 min", True, timedelta(microseconds=-1))


def test_every_setting_is_tested_here() -> None:
    """A new setting needs a line above."""
    names = {field.name for field in attrs.fields(WorkflowSettings)}
    assert names == {*COUNTS, *DURATIONS, *DEMANDS, "confirm_deletes"}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_a_whole_number_within_bounds(name: str) -> None:
    least, most = COUNTS[name]
    for good in (least, most):
        assert getattr(WorkflowSettings(**{name: good}), name) == good
    for bad in (least - 1, most + 1, -1, 10**30, *NO_COUNTS):
        with pytest.raises(InvalidValue) as caught:
            WorkflowSettings(**{name: bad})
        assert caught.value.name == name


@pytest.mark.parametrize("name", DEMANDS)
def test_a_demand_is_a_demand(name: str) -> None:
    demand = Demand(number=True, approvals=10, wait=timedelta(days=366))
    assert getattr(WorkflowSettings(**{name: demand}), name) == demand
    for bad in (True, None, "number", {"number": True}):
        with pytest.raises(InvalidValue) as caught:
            WorkflowSettings(**{name: bad})
        assert caught.value.name == name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("number", (1, None, "yes")),
        ("approvals", (-1, 11, True, 1.0)),
        ("wait", (timedelta(microseconds=-1), timedelta(days=367), 60)),
    ],
)
def test_the_fields_of_a_demand(name: str, values: Any) -> None:
    for bad in values:
        with pytest.raises(InvalidValue) as caught:
            Demand(**{name: bad})
        assert caught.value.name == name


def test_demands_are_joined_to_the_stricter_of_each_field() -> None:
    one = Demand(number=True, wait=timedelta(hours=1))
    other = Demand(approvals=2, wait=timedelta(minutes=1))
    assert one | other == Demand(number=True, approvals=2, wait=timedelta(hours=1))
    assert not Demand()
    assert all((one, other, Demand(wait=timedelta(1)), Demand(number=True)))


ADD, DELETE = Demand(approvals=1), Demand(approvals=2)
LOOSENS, OPENS = Demand(approvals=3), Demand(approvals=4)


@pytest.mark.parametrize(
    ("kind", "direction", "approvals"),
    [
        ("add", Direction.NEUTRAL, 1),
        ("add", Direction.TIGHTENS, 1),
        ("add", Direction.LOOSENS, 3),
        ("delete", Direction.TIGHTENS, 2),
        ("delete", Direction.OPENS, 4),
        ("replace", Direction.NEUTRAL, 2),
        ("replace", Direction.LOOSENS, 3),
    ],
)
def test_what_a_request_demands(kind: str, direction: Direction, approvals: int) -> None:
    found = rules.demanded(
        RequestKind(kind), direction, add=ADD, delete=DELETE, loosens=LOOSENS, opens=OPENS
    )
    assert found == Demand(approvals=approvals)


def test_the_shorthand_for_deletions() -> None:
    number, approval = Demand(number=True), Demand(approvals=1)
    assert WorkflowSettings(confirm_deletes=True, delete=approval).delete == number | approval
    assert WorkflowSettings(confirm_deletes="last").opens == number
    assert WorkflowSettings().delete == WorkflowSettings(confirm_deletes="last").delete == Demand()


@pytest.mark.parametrize("name", DURATIONS)
def test_a_duration_is_a_timedelta_within_bounds(name: str) -> None:
    """Plain numbers have no clear unit; only the interval between mails may be 0."""
    bad: list[Any] = [*NO_DURATIONS, timedelta(days=366, microseconds=1), timedelta.max]
    if name == "resend_interval":
        assert WorkflowSettings(resend_interval=timedelta()).resend_interval == timedelta()
    else:
        bad.append(timedelta())
    for value in bad:
        with pytest.raises(InvalidValue) as caught:
            WorkflowSettings(**{name: value})
        assert caught.value.name == name


def test_a_number_does_not_outlive_its_request() -> None:
    with pytest.raises(InvalidValue):
        WorkflowSettings(number_lifetime=timedelta(hours=25))
    with pytest.raises(InvalidValue):
        WorkflowSettings(request_lifetime=timedelta(minutes=9))
    WorkflowSettings(request_lifetime=timedelta(minutes=10))


@pytest.mark.parametrize("value", [None, 0, 1, "", "LAST", "always", "first", b"last", ["last"]])
def test_invalid_confirm_deletes(value: Any) -> None:
    """A misspelt value must not turn confirmation off."""
    with pytest.raises(InvalidValue) as caught:
        WorkflowSettings(confirm_deletes=value)
    assert caught.value.name == "confirm_deletes"


def test_settings_are_frozen_and_named() -> None:
    """Settings cannot be changed, passed by position, or misspelt."""
    settings: Any = WorkflowSettings()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        settings.attempts_per_number = 10**9
    kind: Any = WorkflowSettings
    with pytest.raises(TypeError):
        kind(10)
    with pytest.raises(TypeError):
        kind(attempts=5)


@pytest.mark.parametrize("settings", [{}, {"number_digits": 8}, "", 0, False, WorkflowSettings])
def test_settings_of_the_wrong_type(settings: Any) -> None:
    """A dictionary is refused at construction, even if empty."""
    with ipguard.open_store("memory://") as store, pytest.raises(InvalidValue) as caught:
        Workflow(store, Outbox(), key=KEY, settings=settings)
    assert caught.value.name == "settings"


def test_the_extremes_work(desk: Desk) -> None:
    """A restriction can be added and deleted with all settings at either bound."""
    for index, durations in ((1, timedelta(days=366)), (0, timedelta(microseconds=1))):
        ends = {name: both[index] for name, both in COUNTS.items()}
        desk.use(**ends, **dict.fromkeys(DURATIONS, durations))
        desk.confirm(desk.ask(f"203.0.113.{index}/32"))
        desk.store.remove_users(["jsmith"])
        desk.store.put_users(PEOPLE)
        for restriction in desk.store.load_policy("jsmith").restrictions:
            desk.delete(restriction)
        desk.wait(hours=1)


@pytest.mark.parametrize(
    ("store", "notifier", "message"),
    [
        (None, Outbox(), "store: must be a restriction store, such as open_store returns"),
        ("memory://", Outbox(), "store: must be a restriction store, such as open_store returns"),
        (MemoryStore(), None, "notifier: must be a notifier, such as ipguard.mail has"),
        (MemoryStore(), print, "notifier: must be a notifier, such as ipguard.mail has"),
    ],
    ids=["no store", "a url", "no notifier", "a function"],
)
def test_arguments_of_the_wrong_type(store: Any, notifier: Any, message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        Workflow(store, notifier, key=bytes(32))
    assert str(caught.value) == message
