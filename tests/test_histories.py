"""The checker of recorded histories agrees with a slow one that follows from the definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import attrs
from hypothesis import event, given
from hypothesis import strategies as st

from tests.histories import (
    BAD_ADDRESS,
    BOOL,
    FOREVER,
    NO_RESTRICTION,
    NOTHING,
    RAISED,
    REASONS,
    STORE_UNAVAILABLE,
    STRANGER,
    Answer,
    Judge,
    Ledger,
    Listed,
    Policy,
    merged,
)

ADDRESSES = ("192.0.2.1", "::ffff:192.0.2.2", "2001:db8::1", "192.0.2.01")
LEASE, EARLY = 3, 2
USERS = (0, 1)


# ------------------------------------------------------------------------------- what happened


@attrs.frozen
class Event:
    """Something that happens to the store.

    Attributes:
        kind: `commit`, `absent` or `fork`.
        since: When it begins, and
        until: when it ends, at the latest.
        user: Whose policy changes.
        policy: That policy.
        lost: How many commits are lost.
    """

    kind: str
    since: int
    until: int
    user: int
    policy: Policy
    lost: int


ONE, TWO = 3221225985, 3221225986  # the first two of ADDRESSES
ids = st.sampled_from([b"a" * 16, b"b" * 16])
listed = st.one_of(
    st.builds(Listed, ids, st.just(4), st.just(ONE), st.sampled_from([ONE, TWO])),
    st.builds(Listed, ids, st.just(4), st.just(TWO), st.just(TWO), st.integers(0, 40)),
    st.builds(Listed, ids, st.just(6), st.just(0), st.just(1 << 127)),
)
policies = st.builds(Policy, st.lists(listed, max_size=2), known=st.booleans())


@st.composite
def happenings(draw: Any) -> list[Event]:
    found, at, forks = [], 0, 0
    for _ in range(draw(st.integers(0, 7))):
        kind = draw(st.sampled_from(["commit", "commit", "commit", "absent", "fork"]))
        forks += kind == "fork"
        if forks > 2:
            break
        since = at + draw(st.integers(0, 5))
        until = since + draw(st.integers(0, 4))
        # The doubt about a commit may reach into what happens next.
        at = until if kind != "commit" else draw(st.integers(since, until))
        user, policy = draw(st.sampled_from(USERS)), draw(policies)
        found.append(Event(kind, since, until, user, policy, draw(st.integers(0, 2))))
    return found


def written(events: Sequence[Event]) -> Ledger:
    """Return the ledger of the events."""
    ledger = Ledger(3, 0, {user: Policy() for user in USERS}, ADDRESSES, EARLY)
    for each in events:
        head = ledger.now.head
        if each.kind == "commit":
            ledger.commit(head + 1, each.since, each.until, {each.user: each.policy})
        elif each.kind == "absent":
            ledger.absent(each.since, each.until)
        else:
            ledger.fork(max(3, head - each.lost), each.since, each.until)
    ledger.close()
    return ledger


# -------------------------------------------------------------------------------- the slow one


@attrs.define
class Slow:
    """All that follows from the events, spelt out.

    Attributes:
        histories: In each: by revision, the policies, and the times at which it was the head.
        shared: For each history, the last revision that it shares with the one before.
        absences: When nobody could read.
    """

    histories: list[dict[int, tuple[dict[int, Policy], list[list[float]]]]]
    shared: list[int]
    absences: list[tuple[int, int]]

    @classmethod
    def of(cls, events: Sequence[Event]) -> Slow:
        first: dict[int, Policy] = {user: Policy() for user in USERS}
        slow = cls([{3: (first, [[0, FOREVER]])}], [3], [])
        for each in events:
            now = slow.histories[-1]
            head = max(now)
            if each.kind == "commit":
                now[head][1][-1][1] = each.until
                changed = now[head][0] | {each.user: each.policy}
                now[head + 1] = (changed, [[each.since, FOREVER]])
            elif each.kind == "absent":
                slow.absences.append((each.since, each.until))
            else:
                now[head][1][-1][1] = each.since
                shared = max(3, head - each.lost)
                slow.shared.append(shared)
                slow.histories.append(
                    {
                        # The others were never the head in this history.
                        r: (held, [[each.until, FOREVER]] if r == shared else [])
                        for r, (held, _) in now.items()
                        if r <= shared
                    }
                )
        return slow

    def readable(self, spans: list[list[float]], answer: Answer) -> bool:
        return any(
            lo <= at <= hi and not any(since < at < until for since, until in self.absences)
            for at in range(answer.began - LEASE, answer.ended + 1)
            for lo, hi in spans
        )

    def common(self, one: int, other: int, revision: int) -> bool:
        """Return whether a revision is the same state in two histories."""
        low, high = sorted((one, other))
        return all(revision <= shared for shared in self.shared[low + 1 : high + 1])

    def decisions(self, policy: Policy, answer: Answer) -> set[tuple[bool, int, bytes]]:
        """Return what may be decided, at any moment."""
        client = (
            (4, 3221225985), (4, 3221225986), (6, 0x20010DB8 << 96 | 1), None
        )[answer.address]  # fmt: skip
        if client is None:
            return {(False, BAD_ADDRESS, NO_RESTRICTION)}
        return {
            policy.decide(client, at, deny_unknown=True)
            for at in range(answer.began, answer.ended + EARLY + 1)
        }

    def explains(self, number: int, answer: Answer) -> bool:
        """Return whether a history explains an answer, apart from all others."""
        state = self.histories[number].get(answer.revision)
        if state is None or not self.readable(state[1], answer):
            return False
        if answer.wanted != NOTHING:
            same = self.common(number, answer.history, answer.wanted)
            if not same and answer.history > number:
                return False
            if (same or answer.history == number) and answer.revision < answer.wanted:
                return False
        policy = state[0].get(answer.user, Policy(known=False))
        given = (answer.allowed, answer.reason, answer.restriction)
        return given in self.decisions(policy, answer)

    def alone(self, answer: Answer) -> bool:
        """Return whether an answer without a state is right."""
        if answer.reason == BOOL:
            exists = any(answer.revision in history for history in self.histories)
            return not answer.allowed or (
                exists
                and any(
                    self.readable(spans, answer)
                    and any(
                        allowed
                        for allowed, *_ in self.decisions(
                            held.get(answer.user, Policy(known=False)),
                            answer._replace(ended=answer.began - EARLY),
                        )
                    )
                    for history in self.histories
                    for held, spans in history.values()
                )
            )
        valid = answer.address != len(ADDRESSES) - 1
        return (
            answer.reason != RAISED
            and not answer.allowed
            and answer.restriction == NO_RESTRICTION
            and not (answer.reason == BAD_ADDRESS and valid)
        )

    def right(self, answers: Sequence[tuple[int, Answer]]) -> bool:
        """Return whether some choice of histories explains all answers."""
        based = [each for each in answers if each[1].reason > BAD_ADDRESS]
        if not all(self.alone(answer) for _, answer in answers if answer.reason <= BAD_ADDRESS):
            return False
        numbers = range(len(self.histories))
        return (
            any(
                self._consistent(list(zip(chosen, *zip(*based, strict=True), strict=True)))
                for chosen in itertools.product(numbers, repeat=len(based))
            )
            if based
            else True
        )

    def _consistent(self, told: list[tuple[int, int, Answer]]) -> bool:
        for at, (number, session, answer) in enumerate(told):
            if not self.explains(number, answer):
                return False
            earlier = [
                (n, each) for n, s, each in told[:at] if s == session or each.ended < answer.began
            ]
            if any(n > number for n, _ in earlier):
                return False
            if any(
                (n, each.revision) > (number, answer.revision)
                for n, each in earlier
                if each.user == answer.user != STRANGER
            ):
                return False
            known = number == 0 or any(n == number for n, _ in earlier)
            if known and answer.revision < answer.position:
                return False
        return True


# --------------------------------------------------------------------------------- the answers


@st.composite
def sessions(draw: Any, slow: Slow) -> list[list[Answer]]:
    """Return answers of two threads, of which most are right."""
    found: list[list[Answer]] = [[], []]
    clocks = [0, 0]
    for _ in range(draw(st.integers(1, 6))):
        session = draw(st.integers(0, 1))
        began = clocks[session] + draw(st.integers(0, 8))
        ended = clocks[session] = began + draw(st.integers(0, 3))
        number = draw(st.integers(0, len(slow.histories) - 1))
        history = slow.histories[number]
        revision = draw(st.sampled_from(sorted(history)))
        answer = Answer(
            began, ended, NOTHING, draw(st.integers(0, 3)), revision,
            draw(st.sampled_from((*USERS, STRANGER))), draw(st.integers(0, len(ADDRESSES) - 1)),
            0, False, NO_RESTRICTION, STORE_UNAVAILABLE,
        )  # fmt: skip
        policy = history[revision][0].get(answer.user, Policy(known=False))
        decisions = slow.decisions(policy, answer)
        allowed, reason, restriction = draw(st.sampled_from(sorted(decisions)))
        answer = answer._replace(allowed=allowed, reason=reason, restriction=restriction)
        if draw(st.integers(0, 3)) == 0:
            answer = answer._replace(wanted=draw(st.integers(2, 9)), history=number)
        if draw(st.integers(0, 4)) == 0:
            answer = answer._replace(**draw(mistakes))
        found[session].append(answer)
    return found


mistakes = st.fixed_dictionaries(
    {},
    optional={
        "position": st.integers(2, 9),
        "revision": st.integers(2, 9),
        "wanted": st.integers(2, 9),
        "history": st.integers(0, 1),
        "allowed": st.booleans(),
        "reason": st.integers(RAISED, len(REASONS) - 1),
        "restriction": ids,
    },
)


@given(st.data())
def test_the_checker_finds_what_a_slow_one_finds(data: st.DataObject) -> None:
    """The first wrong answer is the one that no choice of histories explains any more."""
    events = data.draw(happenings())
    slow = Slow.of(events)
    told = data.draw(sessions(slow))
    judge = Judge(written(events), LEASE, deny_unknown=True)
    answers = [(session, answer) for _, session, answer in merged(told)]
    found = [answer for session, answer in answers if judge.judge(session, answer)]
    expected = next(
        (answers[at][1] for at in range(len(answers)) if not slow.right(answers[: at + 1])), None
    )
    event("wrong" if expected else "right")
    assert (found[0] if found else None) == expected
