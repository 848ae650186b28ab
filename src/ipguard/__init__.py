"""Decide at login time whether a user may come in from an address.

    store = ipguard.open_store("sqlite:///ipguard.db")
    guard = ipguard.Guard(store)
    flow = ipguard.Workflow(store, notifier, key=secret_bytes)

`Guard` answers login servers, from memory where it can. `Workflow` changes what the answers are: a
restriction is requested, its confirmation number goes out by e-mail, and once that is typed in, it
holds. `ipguard.mail` and `ipguard.testing` are imported by those who use them.
"""

from __future__ import annotations

import logging

from ipguard.addresses import AddressRange, AddressSet
from ipguard.errors import (
    AddressError,
    AddressTooBroad,
    DeliveryError,
    DuplicateRestriction,
    InvalidValue,
    IPGuardError,
    LockoutRisk,
    NumberExpired,
    NumberFormatError,
    OpeningRisk,
    RequestClosed,
    SchemaVersionError,
    StoreConfigError,
    StoreError,
    StoreUnavailable,
    TooManyAttempts,
    TooManyRequests,
    TooManyRestrictions,
    UnknownRequest,
    UnknownRestriction,
    UnknownUser,
    UsernameError,
    WrongNumber,
)
from ipguard.guard import Guard, GuardStats
from ipguard.model import (
    Action,
    Actor,
    Applied,
    Change,
    Decision,
    Explanation,
    Page,
    PendingRequest,
    Policy,
    Reason,
    RequestKind,
    RequestState,
    Restriction,
    User,
    UserOverview,
)
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore, Transaction
from ipguard.stores import open_store
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow, WorkflowSettings

__all__ = [
    "Action",
    "Actor",
    "AddressError",
    "AddressRange",
    "AddressSet",
    "AddressTooBroad",
    "Applied",
    "Change",
    "Decision",
    "DeliveryError",
    "DuplicateRestriction",
    "Explanation",
    "Guard",
    "GuardStats",
    "IPGuardError",
    "InvalidValue",
    "LockoutRisk",
    "Notifier",
    "NumberExpired",
    "NumberFormatError",
    "OpeningRisk",
    "Page",
    "PendingRequest",
    "Policy",
    "Reason",
    "RequestClosed",
    "RequestKind",
    "RequestState",
    "Restriction",
    "RestrictionStore",
    "SchemaVersionError",
    "StoreConfigError",
    "StoreError",
    "StoreUnavailable",
    "TooManyAttempts",
    "TooManyRequests",
    "TooManyRestrictions",
    "Transaction",
    "UnknownRequest",
    "UnknownRestriction",
    "UnknownUser",
    "User",
    "UserOverview",
    "UsernameError",
    "Workflow",
    "WorkflowSettings",
    "WrongNumber",
    "canonical_username",
    "open_store",
]

__version__ = "0.1.0"

# A library says nothing unless the application asks to hear it.
logging.getLogger("ipguard").addHandler(logging.NullHandler())
