"""The wording of the pages: numbers, times, errors, decisions and audit entries as text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from ipguard import audit, errors
from ipguard.addresses import AddressRange
from ipguard.model import Action, Actor, Change, Decision, Explanation, PendingRequest, Reason
from ipguard.rules import all_expired, shifted

_EXACT_BELOW: Final = 10**12  # larger counts are shown as powers of two

MAIL_FAILED: Final = (
    "The mail with the confirmation number could not be sent. The request waits; send a new number."
)


def format_range(addresses: AddressRange) -> str:
    """Return a range in canonical form, with the number of its addresses."""
    size = addresses.size
    if size < _EXACT_BELOW:
        return f"{addresses}: {size:,} address{'' if size == 1 else 'es'}"
    power = size.bit_length() - 1
    return f"{addresses}: {'' if size == 1 << power else 'more than '}2^{power} addresses"


def format_time(at: datetime) -> str:
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def format_duration(duration: timedelta) -> str:
    """Return a duration in its largest unit, rounded up."""
    seconds = max(1, -(-int(duration.total_seconds() * 1000) // 1000))
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds > size:
            return _plural(-(-seconds // size), unit)
    return _plural(seconds, "second")


def format_attempts(left: int) -> str:
    return f"{_plural(left, 'attempt')} left"


def _plural(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def describe_request(request: PendingRequest) -> str:
    return request.change


_NAMES: Final = {"expires_at": "The time", "label": "The label", "reason": "The reason"}


def explain(error: errors.IPGuardError, now: datetime) -> dict[str, str]:
    """Translate an error to a form's problem, by field; the field "" is the form as a whole."""
    field = "addresses"
    match error:
        case errors.AddressError():
            hint = "" if error.hint is None else f" Did you mean {error.hint}?"
            text = f"{error.text} is not accepted: {error.reason}.{hint}"
        case errors.AddressTooBroad():
            text = f"{error.addresses} holds more addresses than a restriction may. "
            text += f"The widest network allowed is a /{error.widest}."
        case errors.DuplicateRestriction():
            text = str(error)
        case errors.TooManyRestrictions():
            text = f"{error}. Delete some first, or use a network in place of single addresses."
        case errors.TooManyRequests():
            field, text = "", f"Too many requests for now. {format_retry(error, now)}"
        case errors.InvalidValue():
            field, text = error.name, f"{_NAMES.get(error.name, 'This')} {error.reason}."
        case errors.UsernameError() | errors.UnknownUser():
            field, text = "user", "There is no such trader among yours. Choose one from the list."
        case _:
            field, text = "", str(error)
    if not text.startswith(getattr(error, "username", " ")):
        text = text[:1].upper() + text[1:]
    return {field: text if text.endswith((".", "?")) else f"{text}."}


def format_retry(error: errors.TooManyRequests, now: datetime) -> str:
    wait = f"Try again in {format_duration(error.retry_after)}"
    if error.retry_after <= timedelta(minutes=1):  # times are shown without seconds
        return f"{wait}."
    return f"{wait}, after {format_time(shifted(now, error.retry_after))}."


def explain_decision(found: Explanation) -> str:
    """Return why a login would be allowed or not."""
    name, reason = found.username, found.decision.reason
    if reason is Reason.NOT_LISTED and all_expired(found.restrictions, found.at):
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
    }[reason]


def explain_refusal(actor: Actor, decision: Decision) -> str:
    """Return why an actor may not use the page, for the actor to read."""
    if decision.reason is Reason.UNKNOWN_USER:
        return f"{actor.username} is not registered as a user who may sign in."
    if actor.address is None:
        return (
            "Your account may be used from certain IP addresses only, and this server does not "
            "know the address that you come from."
        )
    return (
        "Your account may be used from certain IP addresses only, and the address that this "
        f"server sees is not one of them: {actor.address}."
    )


_ACTIONS: Final[Mapping[tuple[str, str], str]] = {
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
    (Action.RENAME_USER, ""): "renamed {old} to {new}, with the restrictions",
    (Action.MOVE_USER, ""): "moved the user from account {old} to account {new}",
    (Action.WRONG_NUMBER, ""): "gave a wrong number for {addresses}",
    (Action.DELIVERY_FAILED, ""): "could not be sent the number for {addresses}",
}
_PARTICULARS: Final = (
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


def describe_particulars(entry: Change) -> str:
    """Return the particulars of an audit entry; those that this version cannot read, as stored."""
    if not isinstance(entry.action, Action) or "" in entry.detail:
        return audit.encode(entry.detail)
    found = dict(entry.detail)
    if "expires_at" in found:
        with suppress(ValueError):
            found["expires_at"] = format_time(datetime.fromisoformat(found["expires_at"]))
    return "; ".join(text.format(found[name]) for name, text in _PARTICULARS if name in found)


def describe_action(entry: Change) -> str:
    """Return what an audit entry records, as the words after the actor's name."""
    known = _ACTIONS.get((entry.action, entry.detail.get("kind", "")))
    text = known or _ACTIONS.get((entry.action, ""), "did “{action}”")
    return text.format(addresses=entry.detail.get("addresses", ""), action=entry.action).strip()


def describe(entry: Change, reader: str) -> str:
    """Return an audit entry as a sentence with its actor and time."""
    who = "You" if entry.actor == reader else entry.actor or "The system"
    return f"{who} {describe_action(entry)} on {format_time(entry.at)}."
