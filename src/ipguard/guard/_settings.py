"""What a guard may be made with."""

from __future__ import annotations

from collections.abc import Mapping

from ipguard._checks import check_callable, check_seconds, check_switch, check_whole
from ipguard.errors import InvalidValue


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
    check_seconds("max_staleness", max_staleness, above=0)
    check_seconds("outage_grace", outage_grace, least=0)
    if not hasattr(store, "load_policy"):
        raise InvalidValue("store", "is no restriction store; open_store opens one")
    for name, value in switches.items():
        check_switch(name, value)
    for name, function in functions.items():
        if function is not None:
            check_callable(name, function)
    check_whole("capacity", capacity, 1)
    if unknown_users not in ("allow", "deny"):
        raise InvalidValue("unknown_users", 'must be "allow" or "deny"')
