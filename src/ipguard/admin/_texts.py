"""What the page says: numbers, times, errors and changes in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

import attrs

from ipguard import audit
from ipguard.addresses import AddressRange
from ipguard.errors import (
    AddressError,
    AddressTooBroad,
    DuplicateRestriction,
    InvalidValue,
    IPGuardError,
    TooManyRequests,
    TooManyRestrictions,
    UnknownUser,
    UsernameError,
)
from ipguard.model import (
    Action,
    Change,
    Explanation,
    PendingRequest,
    Reason,
    RequestKind,
    UserOverview,
)
from ipguard.rules import shifted

_READABLE: Final = 10**12


@attrs.frozen
class Problem:
    """What is wrong with a form.

    Attributes:
        field: The field that it belongs to, or "" for the form as a whole.
        text: What is wrong, and what to do.
    """

    field: str
    text: str


def sentence(text: str) -> str:
    """Make a sentence of a few words."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '?')) else '.'}"


def count(addresses: AddressRange) -> str:
    """Say how many addresses a range holds."""
    size = addresses.size
    if size == 1:
        return "1 address"
    if size < _READABLE:
        return f"{size:,} addresses"
    power = size.bit_length() - 1
    return f"{'' if size == 1 << power else 'more than '}2^{power} addresses"


def understood(addresses: AddressRange) -> str:
    """Say what a person's text was understood as."""
    return f"{addresses}: {count(addresses)}"


def shut(line: UserOverview, now: datetime) -> bool:
    """Tell whether a user is restricted to nothing: all that there is has expired."""
    return bool(line.restrictions) and all(one.expired(now) for one in line.restrictions)


def wanted(request: PendingRequest) -> str:
    """Say what a request asks for."""
    return f"{'add' if request.kind is RequestKind.ADD else 'delete'} {request.addresses}"


def moment(at: datetime) -> str:
    """Write a time, with its zone."""
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def length(of: timedelta) -> str:
    """Say how long something takes or lasts, in its largest unit, rounded up."""
    seconds = max(1, -(-int(of.total_seconds() * 1000) // 1000))
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds > size:
            return _plural(-(-seconds // size), unit)
    return _plural(seconds, "second")


def attempts(left: int) -> str:
    """Say how many attempts are left."""
    return f"{_plural(left, 'attempt')} left"


def _plural(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


# -- errors --------------------------------------------------------------------------------------


def problem(error: IPGuardError, now: datetime) -> Problem:
    """Say what an error of the workflow means for whoever filled a form in."""
    for kind, tell in _PROBLEMS.items():
        if isinstance(error, kind):
            return tell(error, now)
    return Problem("", sentence(str(error)))


def _address(error: IPGuardError, _: datetime) -> Problem:
    assert isinstance(error, AddressError)
    hint = "" if error.hint is None else f" Did you mean {error.hint}?"
    return Problem("addresses", f"{error.text} is not accepted: {error.reason}.{hint}")


def _broad(error: IPGuardError, _: datetime) -> Problem:
    assert isinstance(error, AddressTooBroad)
    return Problem(
        "addresses",
        f"{error.addresses} holds more addresses than a restriction may. "
        f"The widest network allowed is a /{error.widest}.",
    )


def _duplicate(error: IPGuardError, _: datetime) -> Problem:
    assert isinstance(error, DuplicateRestriction)
    text = str(error)  # which may begin with the username: that is spelt as it is
    return Problem("addresses", f"{text}." if text.startswith(error.username) else sentence(text))


def _many(error: IPGuardError, _: datetime) -> Problem:
    assert isinstance(error, TooManyRestrictions)
    return Problem(
        "addresses",
        f"{error.username} already has {error.limit} restrictions, as many as are allowed. "
        "Delete some first, or use a network in place of single addresses.",
    )


def _pace(error: IPGuardError, now: datetime) -> Problem:
    assert isinstance(error, TooManyRequests)
    return Problem("", f"Too many requests for now. {retry(error, now)}")


def retry(error: TooManyRequests, now: datetime) -> str:
    """Say when something can be tried again."""
    wait = f"Try again in {length(error.retry_after)}"
    if error.retry_after <= timedelta(minutes=1):  # a moment has no seconds
        return f"{wait}."
    return f"{wait}, after {moment(shifted(now, error.retry_after))}."


_NAMES: Final = {"expires_at": "The time", "label": "The label", "reason": "The reason"}


def _value(error: IPGuardError, _: datetime) -> Problem:
    assert isinstance(error, InvalidValue)
    return Problem(error.name, f"{_NAMES.get(error.name, 'This')} {error.reason}.")


def _user(_: IPGuardError, __: datetime) -> Problem:
    return Problem("user", "There is no such trader among yours. Choose one from the list.")


_PROBLEMS: Final[Mapping[type[IPGuardError], Callable[[IPGuardError, datetime], Problem]]] = {
    AddressError: _address,
    AddressTooBroad: _broad,
    DuplicateRestriction: _duplicate,
    TooManyRestrictions: _many,
    TooManyRequests: _pace,
    InvalidValue: _value,
    UsernameError: _user,
    UnknownUser: _user,
}


# -- decisions -----------------------------------------------------------------------------------


def verdict(found: Explanation) -> str:
    """Say why a login would be let in or not."""
    name = found.username
    if found.decision.reason is Reason.NOT_LISTED and all(
        restriction.expired(found.at) for restriction in found.restrictions
    ):
        return (
            f"Every restriction of {name} has expired. Time never lifts a restriction: "
            "until somebody adds or deletes one, no address is let in."
        )
    return {
        Reason.UNRESTRICTED: f"{name} has no restrictions: any address is let in.",
        Reason.LISTED: f"A restriction of {name} lists this address.",
        Reason.NOT_LISTED: f"No restriction of {name} lists this address.",
        Reason.BAD_ADDRESS: "This is no address.",
        Reason.BAD_USERNAME: "This is no username.",
        Reason.UNKNOWN_USER: f"{name} is not registered, and such users are not let in.",
        Reason.STORE_UNAVAILABLE: "The store does not answer now.",
    }[found.decision.reason]


# -- changes -------------------------------------------------------------------------------------


_DONE: Final[Mapping[tuple[str, str], str]] = {
    (Action.REQUEST, ""): "asked for {addresses}",
    (Action.REQUEST, "delete"): "asked to delete {addresses}",
    (Action.CONFIRM, ""): "confirmed {addresses}",
    (Action.CONFIRM, "delete"): "confirmed the deletion of {addresses}",
    (Action.CANCEL, ""): "cancelled the request for {addresses}",
    (Action.CANCEL, "delete"): "cancelled the request to delete {addresses}",
    (Action.RESEND, ""): "had a new number sent for {addresses}",
    (Action.DELETE, ""): "deleted {addresses}",
    (Action.IMPOSE, ""): "imposed {addresses} without a number",
    (Action.IMPOSE_MANY, ""): "imposed many restrictions without numbers",
    (Action.LIFT, ""): "lifted {addresses} without a number",
    (Action.UNLOCK, ""): "allowed new attempts after too many wrong numbers",
    (Action.PUT_USERS, ""): "registered or changed users",
    (Action.REMOVE_USERS, ""): "removed users",
    (Action.WRONG_NUMBER, ""): "gave a wrong number for {addresses}",
    (Action.DELIVERY_FAILED, ""): "could not be sent the number for {addresses}",
}


_MORE: Final = (
    ("label", "label: {}"),
    ("reason", "reason: {}"),
    ("expires_at", "expires: {}"),
    ("attempts_left", "attempts left: {}"),
    ("locked", "the request is locked"),
    ("unrestricted", "no restrictions left: any address"),
    ("restricted_to_nothing", "all that is left has expired: no address"),
    ("added", "added: {}"),
    ("updated", "changed: {}"),
    ("removed", "removed: {}"),
    ("restrictions", "restrictions: {}"),
    ("failures", "wrong numbers before: {}"),
    ("via", "by way of: {}"),
)


def more(change: Change) -> str:
    """Return the particulars of a change; unknown actions and unreadable ones as stored."""
    if not isinstance(change.action, Action) or "" in change.detail:
        return audit.encode(change.detail)
    found = dict(change.detail)
    if "expires_at" in found:
        with suppress(ValueError):
            found["expires_at"] = moment(datetime.fromisoformat(found["expires_at"]))
    return "; ".join(text.format(found[name]) for name, text in _MORE if name in found)


def done(change: Change) -> str:
    """Return what a change did, as the words after the actor's name."""
    known = _DONE.get((change.action, change.detail.get("kind", "")))
    text = known or _DONE.get((change.action, ""), "did “{action}”")
    return text.format(addresses=change.detail.get("addresses", ""), action=change.action).strip()


def told(change: Change, me: str) -> str:
    """Say who did what and when, in a sentence."""
    who = "You" if change.actor == me else change.actor or "The system"
    return f"{who} {done(change)} on {moment(change.at)}."
