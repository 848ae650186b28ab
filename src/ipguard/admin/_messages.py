"""The wording of the pages: numbers, times, errors, decisions and audit entries as text."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from ipguard import audit, errors
from ipguard._csv import safe_cell
from ipguard.addresses import AddressRange, is_private, parse_address
from ipguard.model import (
    Action,
    Actor,
    Change,
    Decision,
    Demand,
    Explanation,
    PendingRequest,
    Reason,
    RequestKind,
)
from ipguard.rules import all_expired, shifted

_EXACT_BELOW: Final = 10**12  # larger counts are shown as powers of two

_SHOWN: Final = 200  # characters of a list of addresses in a message

MAIL_FAILED: Final = (
    "The mail with the confirmation number could not be sent. The request waits; send a new number."
)
NUMBER_SENT: Final = "You will receive an email with a confirmation number."
ENTER_IT: Final = f"{NUMBER_SENT} Enter it here."


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


def format_ranges(several: Iterable[AddressRange]) -> str:
    """Return ranges with the number of their addresses."""
    return "; ".join(map(format_range, several))


def mask_email(email: str) -> str:
    """Return an address that its owner recognises: `r…s@example.com`."""
    local, _, domain = email.rpartition("@")
    return f"{local[0]}…{local[-1] if len(local) > 2 else ''}@{domain}"


def hint_private(several: Iterable[AddressRange], actor: Actor) -> str:
    """Return a warning of addresses that the internet never sees, or ""."""
    if actor.address is not None and is_private(parse_address(actor.address)):
        return ""  # this server itself sees such addresses
    found = next(filter(is_private, several), None)
    if found is None:
        return ""
    what = "is an address" if found.size == 1 else "are addresses"
    return f"{found} {what} inside your office or home; the internet sees another."


def describe_demand(demand: Demand) -> str:
    """Return a demand as sentences for the requester."""
    found = []
    if demand.wait:
        found.append(f"The change waits for {format_duration(demand.wait)} before it can hold.")
        act = "have the confirmation number sent" if demand.number else "confirm it"
        found.append(f"After that, come back here and {act}.")
    elif demand.number:
        found.append(NUMBER_SENT)
    if demand.approvals:
        others = _plural(demand.approvals, "other administrator")
        found.append(f"{others} must approve it.")
    return " ".join(found)


class Waiting(NamedTuple):
    """Requests that share a number, or one: the first, the usernames, and the next step."""

    first: PendingRequest
    names: list[str]
    next: str


def group_waiting(requests: Iterable[PendingRequest], actor: Actor, now: datetime) -> list[Waiting]:
    """Group requests by their numbers."""
    found: dict[str, Waiting] = {}
    for each in requests:
        text = f"Requested by {each.requested_by}; your approval is missing."
        if each.requested_by == actor.username:
            text = _describe_next(each, now)
        found.setdefault(each.batch or each.id, Waiting(each, [], text)).names.append(each.spelling)
    return [each._replace(names=sorted(each.names)) for each in found.values()]


def _describe_next(request: PendingRequest, now: datetime) -> str:
    """Return the next step of the requester."""
    demand = request.demand
    if now < request.ready_at:
        return f"It waits until {format_time(request.ready_at)}."
    if demand.number and not request.numbered:
        if not request.attempts_left:
            return "The wait is over: have the number sent."
        if request.number_expires_at <= now:
            return "The number has expired: send a new one."
        return f"Enter the number. It is valid until {format_time(request.number_expires_at)}."
    if demand.approvals > len(request.approvals):
        return "It waits for the approval of another administrator."
    return "Confirm it."


def describe_done(
    kind: RequestKind, adds: Collection[AddressRange], removed: Collection[AddressRange]
) -> str:
    """Return a finished change as a sentence."""
    new, old = _name_ranges(adds), _name_ranges(removed)
    if kind is RequestKind.DELETE:
        return f"{old} {'was' if len(removed) == 1 else 'were'} deleted."
    if kind is RequestKind.REPLACE and set(adds) == set(removed):
        return f"{new} {'was' if len(adds) == 1 else 'were'} changed."
    text = f"{new} now {'holds' if len(adds) == 1 else 'hold'}"
    return f"{text} in place of {old}." if kind is RequestKind.REPLACE else f"{text}."


def _name_ranges(several: Collection[AddressRange]) -> str:
    text = ", ".join(map(str, several))
    return text if len(text) <= _SHOWN else f"{len(several)} restrictions"


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
            text = _explain_duplicate(error)
        case errors.UnknownRestriction():
            field, text = "", "The restriction that this is about has ended."
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


def _explain_duplicate(error: errors.DuplicateRestriction) -> str:
    if error.found == "restriction" and error.differs:
        return f"{str(error).partition('; it was not')[0]}. Use its link “Change” to change it."
    return str(error)


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
    (Action.REQUEST, "replace"): "asked to replace a restriction by {addresses}",
    (Action.CONFIRM, ""): "confirmed {addresses}",
    (Action.CONFIRM, "replace"): "replaced a restriction by {addresses}",
    (Action.CONFIRM, "delete"): "confirmed the deletion of {addresses}",
    (Action.CANCEL, ""): "cancelled the request for {addresses}",
    (Action.CANCEL, "delete"): "cancelled the request to delete {addresses}",
    (Action.APPROVE, ""): "approved the request for {addresses}",
    (Action.APPROVE, "delete"): "approved the request to delete {addresses}",
    (Action.NUMBER_ACCEPTED, ""): "gave the right number for {addresses}; approvals are missing",
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
    (Action.FORGET_SIGHTINGS, ""): "erased the recent logins (addresses: {addresses})",
    (Action.PRUNE, ""): "deleted the entries before {kept_from}",
}
_PARTICULARS: Final = (
    ("label", "label: {}"),
    ("reason", "reason: {}"),
    ("expires_at", "expires: {}"),
    ("attempts_left", "attempts left: {}"),
    ("locked", "the request is locked"),
    ("unrestricted", "no restrictions left: any address"),
    ("gained", "then also from: {}"),
    ("lost", "no longer from: {}"),
    ("restricted_to_nothing", "all that is left has expired: no address"),
    ("added", "added: {}"),
    ("updated", "changed: {}"),
    ("removed", "removed: {}"),
    ("restrictions", "restrictions: {}"),
    ("failures", "wrong numbers before: {}"),
    ("deleted", "entries deleted: {}"),
    ("ready_at", "waits until: {}"),
    ("approvals", "approvals needed: {}"),
    ("requested_by", "requested by: {}"),
    ("via", "by way of: {}"),
)


def describe_particulars(entry: Change) -> str:
    """Return the particulars of an audit entry; those that this version cannot read, as stored."""
    if not isinstance(entry.action, Action) or "" in entry.detail:
        return audit.encode(entry.detail)
    found = dict(entry.detail)
    if entry.action is Action.PRUNE:
        found.pop("restrictions", None)  # a digest
    for name in ("expires_at", "ready_at"):
        with suppress(KeyError, ValueError):
            found[name] = format_time(datetime.fromisoformat(found[name]))
    for name in ("gained", "lost"):
        if len(text := found.get(name, "")) > _SHOWN or "::/0" in text:
            del found[name]  # nearly every address: what is left says more
    return "; ".join(text.format(found[name]) for name, text in _PARTICULARS if name in found)


def describe_action(entry: Change) -> str:
    """Return what an audit entry records, as the words after the actor's name."""
    known = _ACTIONS.get((entry.action, entry.detail.get("kind", "")))
    text = known or _ACTIONS.get((entry.action, ""), "did “{action}”")
    # An entry of another version may lack a particular.
    return text.format_map(defaultdict(str, entry.detail, action=entry.action)).strip()


def describe(entry: Change, reader: str) -> str:
    """Return an audit entry as a sentence with its actor and time."""
    who = "You" if entry.actor == reader else entry.actor or "The system"
    return f"{who} {describe_action(entry)} on {format_time(entry.at)}."


def name_action(action: str) -> str:
    """Return the name of an action, for a list to choose from."""
    return action.replace("_", " ").capitalize()


_HEADINGS: Final = (
    *("Revision", "Time", "Actor", "Address of the actor", "Action", "Trader", "Account ID"),
    *("What", "Particulars"),
)


def format_csv(entries: Iterable[Change]) -> str:
    """Return audit entries as CSV (RFC 4180), in which no cell is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(_HEADINGS)
    for entry in entries:
        cells = (
            *(entry.revision, entry.at.isoformat(), entry.actor, entry.actor_address, entry.action),
            *(entry.username, entry.account_id, describe_action(entry)),
            describe_particulars(entry),
        )
        writer.writerow(map(safe_cell, cells))
    return text.getvalue()
