"""The values that the rooms hand to one another: frozen, keyword-only, checked at construction.

Times are aware datetimes in UTC. Usernames are held in their one canonical form. Text that people
wrote (labels, names) holds no character that could break a line of a log, a mail header or a page.
"""

from ipguard.model._answers import Decision, Explanation, Policy, Reason
from ipguard.model._changes import EVERYBODY, RESET, Action, Applied, Change, Changes, Touched
from ipguard.model._checks import LABEL_LIMIT, REASON_LIMIT, checked_text, checked_time
from ipguard.model._people import Accounts, Actor, StoredUser, User
from ipguard.model._restrictions import (
    Page,
    PendingRequest,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    UserOverview,
)

__all__ = [  # noqa: RUF022 - the order of the reference
    "User",
    "Actor",
    "Accounts",
    "Restriction",
    "RequestKind",
    "RequestState",
    "PendingRequest",
    "Policy",
    "Reason",
    "Decision",
    "Explanation",
    "Action",
    "Change",
    "Applied",
    "UserOverview",
    "Page",
    "StoredUser",
    "StoredRequest",
    "Changes",
    "Touched",
    "EVERYBODY",
    "RESET",
    "LABEL_LIMIT",
    "REASON_LIMIT",
    "checked_text",
    "checked_time",
]
