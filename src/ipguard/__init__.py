"""Decide at login time whether a user may log in from an IP address.

    store = ipguard.open_store("sqlite:///ipguard.db")
    guard = ipguard.Guard(store)
    flow = ipguard.Workflow(store, notifier, key=secret_bytes)

`Guard` answers login servers, usually from memory. `Workflow` changes restrictions in two phases: a
request mails a confirmation number, and the number puts the change into force. Import
`ipguard.mail`, `ipguard.aio`, `ipguard.admin` and `ipguard.testing` separately.
"""

from __future__ import annotations

import logging

from ipguard import errors
from ipguard.addresses import AddressRange, AddressSet
from ipguard.client_address import ClientAddress
from ipguard.errors import *  # noqa: F403 - all of them are public
from ipguard.guard import Guard, GuardStats
from ipguard.model import (
    EVERYBODY,
    AccessLine,
    Action,
    Actor,
    Applied,
    Approval,
    BulkCounts,
    Change,
    Damage,
    Decision,
    Demand,
    Direction,
    Explanation,
    Impact,
    Outcome,
    Page,
    PendingRequest,
    Policy,
    Reason,
    Refusal,
    RequestKind,
    RequestState,
    Restriction,
    Sighting,
    User,
    UserCounts,
    UserOverview,
    UserSync,
    Verification,
)
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore, Transaction
from ipguard.stores import open_store
from ipguard.usernames import canonical_username
from ipguard.workflow import Workflow, WorkflowSettings

__all__ = [
    "EVERYBODY",
    "AccessLine",
    "Action",
    "Actor",
    "AddressRange",
    "AddressSet",
    "Applied",
    "Approval",
    "BulkCounts",
    "Change",
    "ClientAddress",
    "Damage",
    "Decision",
    "Demand",
    "Direction",
    "Explanation",
    "Guard",
    "GuardStats",
    "Impact",
    "Notifier",
    "Outcome",
    "Page",
    "PendingRequest",
    "Policy",
    "Reason",
    "Refusal",
    "RequestKind",
    "RequestState",
    "Restriction",
    "RestrictionStore",
    "Sighting",
    "Transaction",
    "User",
    "UserCounts",
    "UserOverview",
    "UserSync",
    "Verification",
    "Workflow",
    "WorkflowSettings",
    "canonical_username",
    "open_store",
]
__all__ += errors.__all__

__version__ = "0.1.0"

# Libraries log nothing unless the application configures a handler.
logging.getLogger("ipguard").addHandler(logging.NullHandler())
