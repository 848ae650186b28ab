"""Translate audit entries and sightings to events of the Open Cybersecurity Schema Framework.

Each entry is an event of class 3001, Account Change. Entries about a confirmation number are of
class 3002, Authentication, and so are sightings: they are about what a person proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from itertools import zip_longest
from typing import Annotated, Any, Final

from typer import Option

import ipguard
from ipguard.model import Action, Change, Sighting


class EventFormat(StrEnum):
    """Formats of events for other programs."""

    OCSF = "ocsf"


EventOption = Annotated[
    EventFormat | None,
    Option("--format", help="Write one event a line, in JSON, as the OCSF defines it."),
]
VERSION: Final = "1.4.0"
"""The version of the schema; all that an event has is in the later versions 1.x too."""

_ACCOUNT_CHANGE: Final = 3001
_AUTHENTICATION: Final = 3002
_CLASSES: Final = {_ACCOUNT_CHANGE: "Account Change", _AUTHENTICATION: "Authentication"}
_LOGON: Final = (1, "Logon")
_CREATE: Final = (1, "Create")
_DELETE: Final = (6, "Delete")
_ATTACH: Final = (7, "Attach Policy")
_DETACH: Final = (8, "Detach Policy")
_UNLOCK: Final = (12, "Unlock")
_OTHER: Final = 99

_ACTIVITIES: Final[Mapping[str, tuple[int, str]]] = {
    Action.CONFIRM: _ATTACH,
    Action.IMPOSE: _ATTACH,
    Action.IMPOSE_MANY: _ATTACH,
    Action.DELETE: _DETACH,
    Action.LIFT: _DETACH,
    Action.UNLOCK: _UNLOCK,
    Action.PUT_USERS: _CREATE,
    Action.REMOVE_USERS: _DELETE,
}
_NUMBERS: Final = (Action.WRONG_NUMBER, Action.NUMBER_ACCEPTED)
_FAILURES: Final = (Action.WRONG_NUMBER, Action.DELIVERY_FAILED)

_SEVERITIES: Final = {0: "Unknown", 1: "Informational", 2: "Low", 3: "Medium"}
_STATUSES: Final = {0: "Unknown", 1: "Success", 2: "Failure"}


def change_event(change: Change) -> dict[str, Any]:
    """Return the event of an audit entry, an entry of an unknown action included."""
    action, detail = change.action, change.detail
    numbers = action in _NUMBERS
    user, result = _users(change)
    more: dict[str, Any] = {
        "user": {"name": change.actor or "-"} if numbers else user,
        "actor": {"user": {"name": change.actor}} if change.actor else {"app_name": "host"},
        "message": _message(change),
        "unmapped": {name or "detail": text for name, text in detail.items()},
    }
    if numbers:
        more["service"] = {"name": "ipguard"}
    if result:
        more["user_result"] = result
    if change.actor_address:
        more["src_endpoint"] = {"ip": change.actor_address}
    if policies := list(_policies(change)):
        more["policies"] = policies
    if action in _FAILURES:
        more["status_detail"] = str(action)
    metadata = {
        "uid": str(change.revision),
        "sequence": change.revision,
        "event_code": str(action),
        "log_name": "audit",
    }
    if request := detail.get("request"):
        metadata["correlation_uid"] = request
    return _event(
        _AUTHENTICATION if numbers else _ACCOUNT_CHANGE,
        _activity(change),
        change.at,
        severity=_severity(change),
        status=0 if not isinstance(action, Action) else 2 if action in _FAILURES else 1,
        metadata=metadata,
        **more,
    )


def sighting_events(sighting: Sighting) -> Iterator[dict[str, Any]]:
    """Yield an event for the allowed logins of a sighting, and one for the refused ones."""
    for status, count in ((1, sighting.allowed), (2, sighting.refused)):
        if count:
            refused = {"status_detail": "The address is not allowed"} if status == 2 else {}
            yield _event(
                _AUTHENTICATION,
                _LOGON,
                sighting.last_at,
                severity=status,
                status=status,
                metadata={"event_code": "sighting", "log_name": "sightings"},
                user={"name": sighting.username},
                service={"name": "login"},
                src_endpoint={"ip": sighting.address},
                count=count,
                start_time=_milliseconds(sighting.first_at),
                end_time=_milliseconds(sighting.last_at),
                **refused,
            )


def _event(
    class_uid: int,
    activity: tuple[int, str],
    at: datetime,
    *,
    severity: int,
    status: int,
    metadata: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    number, name = activity
    product = {"name": "ipguard", "vendor_name": "ipguard", "version": ipguard.__version__}
    return {
        "class_uid": class_uid,
        "class_name": _CLASSES[class_uid],
        "category_uid": 3,
        "category_name": "Identity & Access Management",
        "activity_id": number,
        "activity_name": name,
        "type_uid": class_uid * 100 + number,
        "type_name": f"{_CLASSES[class_uid]}: {'Other' if number == _OTHER else name}",
        "time": _milliseconds(at),
        "severity_id": severity,
        "severity": _SEVERITIES[severity],
        "status_id": status,
        "status": _STATUSES[status],
        "metadata": {
            "version": VERSION,
            "product": product,
            "original_time": at.isoformat(),
            **metadata,
        },
        **more,
    }


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _activity(change: Change) -> tuple[int, str]:
    """Return the activity of an entry; what has none of its own is named by its action."""
    action, detail = change.action, change.detail
    if _ends_only(change):
        return _DETACH
    if action is Action.PUT_USERS and detail.get("added") == "0":
        return _OTHER, str(action)
    return _ACTIVITIES.get(action, (_OTHER, str(action)))


def _ends_only(change: Change) -> bool:
    """Return whether an entry ended restrictions and added none."""
    if change.action is Action.CONFIRM:
        return change.detail.get("kind") == "delete"
    if change.action is Action.IMPOSE_MANY:
        return change.detail.get("restrictions") == "0" and "ended" in change.detail
    return change.action in (Action.DELETE, Action.LIFT)


def _severity(change: Change) -> int:
    """Return how severe an entry is: 3 if a user is open to every address, for example."""
    action, detail = change.action, change.detail
    if not isinstance(action, Action):
        return 0
    if detail.get("direction") == "opens" or "unrestricted" in detail or "locked" in detail:
        return 3
    low = detail.get("direction") == "loosens" or action in (*_FAILURES, Action.PRUNE)
    return 2 if low else 1


def _users(change: Change) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the user that an entry is about and, if it was renamed or moved, as it is since."""
    name, account, detail = change.username, change.account_id, change.detail
    old, new = detail.get("old"), detail.get("new")
    if change.action is Action.RENAME_USER and old and new:
        return _user(old, account), _user(new, account)
    if change.action is Action.MOVE_USER and old and new:
        return _user(name, old), _user(name, new)
    return _user(name, account), None


def _user(name: str | None, account: str | None) -> dict[str, Any]:
    if name is None:
        return {"name": "(several users)", "type": "Several users", "type_id": _OTHER}
    return {"name": name} | ({"account": {"uid": account}} if account else {})


def _message(change: Change) -> str:
    words = " ".join(filter(None, (str(change.action), change.username)))
    detail = change.detail
    more = (detail.get(name) for name in ("afterwards", "addresses", "reason"))
    return ": ".join(filter(None, (words, next(filter(None, more), None))))


def _policies(change: Change) -> Iterator[dict[str, Any]]:
    """Yield the restrictions that an entry about one user added or ended."""
    detail, label = change.detail, change.detail.get("label", "")
    if change.action in _NUMBERS or not detail.get("restriction"):
        return  # the entry is about a request
    added = not _ends_only(change)
    for uid, addresses in _pairs(detail, "restriction", "addresses"):
        more = {"desc": label} if added and label else {}
        yield {"uid": uid, "name": addresses, **more, "is_applied": added}
    for uid, addresses in _pairs(detail, "replaces", "ends"):
        yield {"uid": uid, "name": addresses, "is_applied": False}


def _pairs(detail: Mapping[str, str], ids: str, addresses: str) -> Iterator[tuple[str, str]]:
    """Yield the ids of restrictions with their addresses."""
    first, second = (detail.get(name, "").split(", ") for name in (ids, addresses))
    return ((uid, text) for uid, text in zip_longest(first, second, fillvalue="") if uid)
