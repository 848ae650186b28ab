"""A checker of recorded histories: is every answer one that the guard promises?

The writer of a store records each of its states in a `Ledger`; login servers record each `Answer`.
A `Judge` then finds the answers that the promise does not allow:

* **stale**: at no moment, from `max_staleness` before the check began until it ended, was the state
  of the answer's revision the head of the store, and readable. A lease runs from the start of a
  read, by the clock that the recording uses, and the decision is made after the check began: so
  there must be such a moment. A commit lies between two recorded moments; between them, the state
  before it and the state after it both count as the head. `is_allowed` names no revision: for an
  allow, any policy that the user had at such a moment may allow the address.
* **back**: the revision is below that of an answer about the same user that had ended before this
  check began, or below the revision of the guard when the check began.
* **at_least**: the revision is below the one that was demanded.
* **disagrees**: a model of a few lines decides otherwise on the user's policy at that revision.
* **unknown**: there never was such a revision.
* **groundless**: an allow that rests on no policy, or an exception.

A failover that loses commits begins another history, which shares a prefix with the one before. A
revision after the prefix may be of either. A guard moves to the new history once, and never back.
An answer is right if it is right in the oldest history that explains it: later answers are then
the least constrained. Users and addresses are numbers, times are nanoseconds.

Nothing here imports ipguard: what is checked must not check itself.
"""

from __future__ import annotations

import heapq
import ipaddress
import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from operator import itemgetter
from typing import Final, NamedTuple

FOREVER: Final = math.inf
NO_RESTRICTION: Final = bytes(16)
STRANGER: Final = -1
"""Any user who was never registered nor restricted. No two answers are about the same one."""
NOTHING: Final = -1
"""The revision that is demanded if none is."""

REASONS: Final = (
    "",  # the record is not complete
    "raised",
    "bool",  # `is_allowed`, which gives no reason
    "store_unavailable",
    "bad_address",
    "unknown_user",
    "unrestricted",
    "listed",
    "not_listed",
)
_, RAISED, BOOL, STORE_UNAVAILABLE, BAD_ADDRESS, UNKNOWN_USER, UNRESTRICTED, LISTED, NOT_LISTED = (
    range(len(REASONS))
)


class Answer(NamedTuple):
    """One answer of a guard.

    Attributes:
        began: When the check was called.
        ended: When it returned.
        wanted: Its `at_least`, or NOTHING.
        position: The guard's revision before the call.
        revision: The revision of the decision; of `is_allowed`: the guard's revision afterwards.
        user: The user.
        address: The client's address.
        history: The history of `wanted`.
        allowed: Whether the login was allowed.
        restriction: The id of the restriction that lists the address.
        reason: The place of the reason in REASONS.
    """

    began: int
    ended: int
    wanted: int
    position: int
    revision: int
    user: int
    address: int
    history: int
    allowed: bool
    restriction: bytes
    reason: int


RECORD: Final = struct.Struct("=qqiiihhB?16sB")
"""An `Answer` in a file. The reason is written last: a process may be killed within a record."""


# ------------------------------------------------------------------------------------ the model


class Listed(NamedTuple):
    """A restriction: its id, its addresses, and the moment from which it allows none."""

    id: bytes
    version: int
    first: int
    last: int
    expires: float = FOREVER


Verdict = tuple[bool, int, bytes]
"""Whether the login is allowed, the reason, and the restriction."""


class Policy:
    """What a user's restrictions mean."""

    def __init__(self, listed: Sequence[Listed] = (), *, known: bool = True) -> None:
        # Of several that list an address, the oldest permanent one is named, else the oldest.
        self.listed = tuple(sorted(listed, key=lambda each: each.expires < FOREVER))
        self.known = known
        self.temporary = any(each.expires < FOREVER for each in listed)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Policy)
        return (self.listed, self.known) == (other.listed, other.known)

    __hash__ = None  # type: ignore[assignment]

    def decide(self, address: tuple[int, int], at: float, *, deny_unknown: bool) -> Verdict:
        """Decide on a login at a moment."""
        version, value = address
        if deny_unknown and not self.known:
            return False, UNKNOWN_USER, NO_RESTRICTION
        if not self.listed:
            return True, UNRESTRICTED, NO_RESTRICTION
        for each in self.listed:
            if each.version == version and each.first <= value <= each.last and at < each.expires:
                return True, LISTED, each.id
        return False, NOT_LISTED, NO_RESTRICTION


_OPEN: Final = Policy(known=False)


def parsed(text: str) -> tuple[int, int] | None:
    """Return the version and the number of an address, or None."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.version, int(address)


# ----------------------------------------------------------------------------------- the ledger

Span = tuple[float, float]
"""The earliest and the latest moment at which something may have been so."""


class History:
    """One order of states.

    Attributes:
        shared: The last revision that it shares with the histories before.
        head: Its last revision.
        spans: For each revision, when it was the head. Those before the last shared one never were.
        policies: For each user, the revisions of its changes, and its policy from each on.
    """

    def __init__(self, shared: int, before: History | None = None) -> None:
        self.shared = self.head = shared
        self.spans: dict[int, list[Span]] = {}
        self.policies: dict[int, tuple[list[int], list[Policy]]] = {}
        if before is not None:
            for user, (revisions, policies) in before.policies.items():
                kept = bisect_right(revisions, shared)
                self.policies[user] = revisions[:kept], policies[:kept]

    def policy(self, user: int, revision: int) -> Policy:
        """Return a user's policy at a revision."""
        if user not in self.policies:
            return _OPEN
        revisions, policies = self.policies[user]
        return policies[bisect_right(revisions, revision) - 1]


class Ledger:
    """All states of a store, as its writer records them.

    Args:
        revision: The first one.
        at: A moment at which it was the head.
        policies: The policies of all users.
        addresses: The clients' addresses.
        early: By how much a temporary restriction may end too early. A guard estimates the
            store's clock by a read, and takes its answer for one of the read's start.

    Attributes:
        histories: The histories, each a continuation of the one before.
        absences: When nobody could read.
        forked: When the last history began.
    """

    def __init__(
        self,
        revision: int,
        at: int,
        policies: Mapping[int, Policy],
        addresses: Sequence[str],
        early: int = 0,
    ) -> None:
        self.addresses = [parsed(text) for text in addresses]
        self.early = early
        self.histories = [History(revision)]
        self.absences: list[Span] = []
        self.forked = FOREVER
        self._timelines: dict[int, list[tuple[float, float, Policy]]] = {}
        self._begin(revision, at, policies)

    @property
    def now(self) -> History:
        return self.histories[-1]

    def _begin(self, revision: int, before: float, policies: Mapping[int, Policy]) -> None:
        now = self.now
        now.head = revision
        now.spans.setdefault(revision, []).append((before, FOREVER))
        for user, policy in policies.items():
            self._timelines.setdefault(user, []).append((before, FOREVER, policy))
            revisions, values = now.policies.setdefault(user, ([], []))
            if not revisions or revisions[-1] != revision:
                revisions.append(revision)
                values.append(policy)

    def _end(self, after: float, users: Iterable[int]) -> None:
        spans = self.now.spans[self.now.head]
        spans[-1] = spans[-1][0], after
        for user in users:
            timeline = self._timelines[user]
            timeline[-1] = timeline[-1][0], after, timeline[-1][2]

    def commit(
        self, revision: int, before: int, after: int, policies: Mapping[int, Policy]
    ) -> None:
        """Add a state.

        Args:
            revision: Its revision.
            before: A moment before the commit.
            after: A moment after it.
            policies: The policies that it changed.
        """
        assert revision == self.now.head + 1
        self._end(after, policies)
        self._begin(revision, before, policies)

    def absent(self, since: int, until: float) -> None:
        """Note that nobody could read from the store: it was stopped, or dead."""
        self.absences.append((since, until))

    def fork(self, shared: int, died: int, lives: int) -> None:
        """Begin another history.

        Args:
            shared: The last revision that it shares.
            died: A moment after the last read of the store that had the others.
            lives: A moment before the first read of the one that has only the shared ones.
        """
        self._end(died, self._timelines)
        self.forked = lives
        old = self.now
        self.histories.append(History(shared, old))
        self._begin(shared, lives, {user: old.policy(user, shared) for user in old.policies})

    def close(self) -> None:
        """Subtract the times at which the store could not be read."""
        for history in self.histories:
            for revision, spans in history.spans.items():
                history.spans[revision] = [left for span in spans for left in self._present(*span)]
        for user, timeline in self._timelines.items():
            # Sorted, since the store may have been absent within the doubt about a commit.
            self._timelines[user] = sorted(
                ((*left, policy) for lo, hi, policy in timeline for left in self._present(lo, hi)),
                key=itemgetter(1, 0),
            )
        self._ends = {u: [hi for _, hi, _ in line] for u, line in self._timelines.items()}

    def _present(self, lo: float, hi: float) -> Iterator[Span]:
        for since, until in self.absences:
            if lo < until and since < hi:
                if lo <= since:
                    yield lo, since
                lo = until
                if lo > hi:
                    return
        yield lo, hi

    def shared(self, one: int, other: int) -> float:
        """Return the last revision that two histories share."""
        low, high = sorted((one, other))
        return min((each.shared for each in self.histories[low + 1 : high + 1]), default=FOREVER)

    def during(self, user: int, since: float, until: float) -> Iterator[Policy]:
        """Yield the policies that a user had at some moment of a time."""
        if user not in self._timelines:
            yield _OPEN
            return
        line, at = self._timelines[user], bisect_left(self._ends[user], since)
        while at < len(line) and line[at][0] <= until:
            yield line[at][2]
            at += 1


# ---------------------------------------------------------------------------------- the checker

State = tuple[int, int]
"""The number of a history, and a revision."""


class Judge:
    """Judges the answers of one guard, in the order in which the checks began.

    Args:
        ledger: The states of its store; closed.
        lease: The maximum age of a state.
        deny_unknown: Whether users must be registered.

    Attributes:
        oldest: The age of the oldest state that an answer rested on, when its check began.
    """

    def __init__(self, ledger: Ledger, lease: int, *, deny_unknown: bool = False) -> None:
        self._ledger = ledger
        self._lease = lease
        self._deny_unknown = deny_unknown
        self.oldest = 0.0
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        # What answers that have ended have shown: the guard's history, and each user's state.
        self._history = 0
        self._floors: dict[int, State] = {}
        self._latest: dict[int, tuple[int, int, State]] = {}

    def judge(self, session: int, answer: Answer) -> str:
        """Return what is wrong with an answer, by history; empty if nothing is.

        Args:
            session: The thread or task, whose calls do not overlap.
            answer: Its next answer. May be any tuple with these fields.
        """
        began, ended, _, _, _, user, address, _, allowed, restriction, reason = answer
        self._settle(session, began)
        if reason == RAISED:
            return "groundless"
        if reason == BOOL:
            return self._judge_bool(answer) if allowed else ""
        if reason in (STORE_UNAVAILABLE, BAD_ADDRESS):
            if allowed or restriction != NO_RESTRICTION:
                return "groundless"
            mistaken = reason == BAD_ADDRESS and self._ledger.addresses[address] is not None
            return "disagrees" if mistaken else ""
        faults = []
        for number in range(self._history, len(self._ledger.histories)):
            fault = self._fault(number, answer)
            if not fault:
                self._latest[session] = ended, user, (number, answer[4])
                return ""
            faults.append(fault)
        return ", ".join(faults)

    def _settle(self, session: int, began: int) -> None:
        latest = self._latest
        for other in [each for each in latest if each == session or latest[each][0] < began]:
            _, user, state = latest.pop(other)
            if state > self._floors.get(user, (0, 0)):
                self._floors[user] = state
            self._history = max(self._history, state[0])

    def _fault(self, number: int, answer: Answer) -> str:
        """Return what is wrong with an answer if it is of this history."""
        began, ended, wanted, position, revision, user, _, of, *_ = answer
        history = self._ledger.histories[number]
        spans = history.spans.get(revision)
        if spans is None:
            return "unknown"
        since = began - self._lease
        for lo, hi in spans:
            if lo <= ended and hi >= since:
                self.oldest = max(self.oldest, began - hi)
                break
        else:
            return "stale"
        if user != STRANGER and self._floors.get(user, (0, 0)) > (number, revision):
            return "back"
        # A position of an older history says nothing about this one.
        if number == self._history and revision < position:
            return "back"
        if wanted != NOTHING:
            # A revision that was lost means nothing in a later history.
            meant = of >= number or wanted <= self._ledger.shared(of, number)
            held = of <= number or wanted <= self._ledger.shared(of, number)
            if meant and (revision < wanted or not held):
                return "at_least"
        return "" if self._agrees(history.policy(user, revision), answer) else "disagrees"

    def _agrees(self, policy: Policy, answer: Answer) -> bool:
        began, ended, _, _, _, _, address, _, allowed, restriction, reason = answer
        if not policy.temporary:
            key = id(policy), address
            verdict = self._verdicts.get(key)
            if verdict is None:
                verdict = self._verdicts[key] = self._decide(policy, address, began)
            return verdict == (allowed, reason, restriction)
        moments = began, ended + self._ledger.early
        # Between the two, one after another may expire.
        turns = [each.expires for each in policy.listed if moments[0] < each.expires <= moments[1]]
        given = allowed, reason, restriction
        return any(self._decide(policy, address, at) == given for at in (moments[0], *turns))

    def _decide(self, policy: Policy, address: int, at: float) -> Verdict:
        client = self._ledger.addresses[address]
        if client is None:
            return False, BAD_ADDRESS, NO_RESTRICTION
        return policy.decide(client, at, deny_unknown=self._deny_unknown)

    def _judge_bool(self, answer: Answer) -> str:
        """Judge an allow of `is_allowed`, which names no revision: the user's policy counts."""
        if not any(answer[4] in each.spans for each in self._ledger.histories):
            return "groundless"
        found = list(self._ledger.during(answer[5], answer[0] - self._lease, answer[1]))
        if any(self._decide(policy, answer[6], answer[0])[0] for policy in found):
            return ""
        return "stale"


def merged(sessions: Iterable[Iterable[Answer]]) -> Iterator[tuple[int, int, Answer]]:
    """Yield the answers of all threads or tasks of a guard, as their checks began.

    Yields:
        When the check began, the number of the thread, and the answer.
    """
    return heapq.merge(*map(_numbered, count(), sessions))


def _numbered(number: int, answers: Iterable[Answer]) -> Iterator[tuple[int, int, Answer]]:
    return ((each[0], number, each) for each in answers)
