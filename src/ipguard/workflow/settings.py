"""The settings of the workflow; most defaults come from OWASP ASVS 5.0 and NIST SP 800-63B-4."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import attrs

from ipguard._checks import check_duration, check_whole
from ipguard.errors import InvalidValue
from ipguard.model import Demand

__all__ = ["WorkflowSettings"]

_Check = Callable[[Any, "attrs.Attribute[Any]", Any], object]

_MOST = 1_000_000_000  # larger numbers limit nothing, and databases cannot store all of them


def _whole(least: int, most: int = _MOST) -> _Check:
    return lambda _, attribute, value: check_whole(attribute.name, value, least, most)


def _duration(*, zero: bool = False) -> _Check:
    return lambda _, attribute, value: check_duration(attribute.name, value, zero=zero)


def _check_deletes(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not (isinstance(value, bool) or value == "last"):
        raise InvalidValue(attribute.name, 'must be False, "last" or True')


def _check_demand(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Demand):
        raise InvalidValue(attribute.name, "must be a Demand")


@attrs.frozen(kw_only=True)
class WorkflowSettings:
    """Limits and lifetimes of the workflow.

    Attributes:
        number_digits: Digits of a confirmation number, 6 to 18. 10 digits are 33 bits; ASVS 6.5.4
            asks for 20. After a change of this setting, `resend` replaces numbers mailed before.
        number_lifetime: How long a number is valid; ASVS 6.5.5 allows at most 10 minutes.
        request_lifetime: How long a request is pending; NIST SP 800-63A-4 3.8 has 24 hours for
            e-mail.
        attempts_per_number: Wrong numbers before the request is locked.
        failures_per_actor: Wrong numbers in a row, over all requests, before an actor's numbers are
            no longer evaluated; NIST SP 800-63B-4 3.2.2 allows at most 100.
        resends_per_request: New numbers for one request.
        resend_interval: The shortest time between two mails of one request.
        requests_per_hour: Requests of one actor.
        widest_ipv4: The shortest IPv4 prefix whose number of addresses one restriction may hold;
            0 allows every IPv4 address.
        widest_ipv6: The same for IPv6.
        restrictions_per_user: Restrictions of one user, expired ones included; 65,535 at most, as a
            guard holds no more.
        add: What a request demands that adds addresses.
        delete: What a request demands that ends restrictions. Replacing demands both.
        loosens: What a request demands, besides, that lets the user in from other addresses too.
        opens: What a request demands, besides, that opens the user to every address.
        confirm_deletes: `True` is short for a number in `delete`, `"last"` (recommended) for one in
            `opens`.

    Raises:
        InvalidValue: A value is out of its range.
    """

    number_digits: int = attrs.field(default=10, validator=_whole(6, 18))
    number_lifetime: timedelta = attrs.field(default=timedelta(minutes=10), validator=_duration())
    request_lifetime: timedelta = attrs.field(default=timedelta(hours=24), validator=_duration())
    attempts_per_number: int = attrs.field(default=5, validator=_whole(1))
    failures_per_actor: int = attrs.field(default=100, validator=_whole(1))
    resends_per_request: int = attrs.field(default=5, validator=_whole(0))
    resend_interval: timedelta = attrs.field(
        default=timedelta(seconds=30), validator=_duration(zero=True)
    )
    requests_per_hour: int = attrs.field(default=20, validator=_whole(1))
    widest_ipv4: int = attrs.field(default=16, validator=_whole(0, 32))
    widest_ipv6: int = attrs.field(default=32, validator=_whole(0, 128))
    restrictions_per_user: int = attrs.field(default=1000, validator=_whole(1, 65_535))
    add: Demand = attrs.field(default=Demand(number=True), validator=_check_demand)
    delete: Demand = attrs.field(default=Demand(), validator=_check_demand)
    loosens: Demand = attrs.field(default=Demand(), validator=_check_demand)
    opens: Demand = attrs.field(default=Demand(), validator=_check_demand)
    confirm_deletes: bool | Literal["last"] = attrs.field(default=False, validator=_check_deletes)

    def __attrs_post_init__(self) -> None:
        if self.number_lifetime > self.request_lifetime:
            raise InvalidValue("number_lifetime", "must not be longer than request_lifetime")
        number = Demand(number=True)
        if self.confirm_deletes is True:
            object.__setattr__(self, "delete", self.delete | number)
        elif self.confirm_deletes == "last":
            object.__setattr__(self, "opens", self.opens | number)
