"""What a guard may be made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ipguard.errors import InvalidValue

_LONGEST: Final = 1e9  # seconds; a lock can be waited for no longer on some systems


def check_settings(
    store: object,
    *,
    max_staleness: float,
    outage_grace: float,
    capacity: int,
    switches: Mapping[str, object],
    unknown_users: object,
    functions: Mapping[str, object],
) -> None:
    """Refuse what makes no sense; see `Guard`.

    Args:
        store: As for `Guard`.
        max_staleness: As for `Guard`.
        outage_grace: As for `Guard`.
        capacity: As for `Guard`.
        switches: The settings that are on or off.
        unknown_users: As for `Guard`.
        functions: The settings that are called, or None.

    Raises:
        InvalidValue: It names the setting.
    """
    check_seconds("max_staleness", max_staleness)
    if max_staleness <= 0:
        raise InvalidValue("max_staleness", "must be more than 0")
    check_seconds("outage_grace", outage_grace)
    if outage_grace < 0:
        raise InvalidValue("outage_grace", "must not be negative")
    if not hasattr(store, "load_policy"):
        raise InvalidValue("store", "is no restriction store; open_store opens one")
    # Text such as "false" is true, and would let everybody in.
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise InvalidValue(name, "must be True or False")
    for name, function in functions.items():
        if not (function is None or callable(function)):
            raise InvalidValue(name, "must be callable")
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise InvalidValue("capacity", "must be a whole number of at least 1")
    if unknown_users not in ("allow", "deny"):
        raise InvalidValue("unknown_users", 'must be "allow" or "deny"')


def check_seconds(name: str, value: float) -> None:
    """Refuse what is no number of seconds.

    Raises:
        InvalidValue: It names the setting.
    """
    # Asked this way round, because nothing is true of what is no number.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and -_LONGEST < value < _LONGEST):
        raise InvalidValue(name, "must be a finite number of seconds")
