"""Every answer of login servers is right, whatever fails: no answer of a million is wrong.

Real servers and real login servers, in processes of their own; see `tests/outages.py` for what
fails, and `tests/histories.py` for what is right.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator

import attrs
import pytest

from tests.conftest import rounds
from tests.histories import (
    BOOL,
    LISTED,
    NO_RESTRICTION,
    NOT_LISTED,
    NOTHING,
    RAISED,
    REASONS,
    STORE_UNAVAILABLE,
    STRANGER,
    UNRESTRICTED,
    Answer,
    History,
    Ledger,
)
from tests.logins import Login
from tests.outages import BROKEN, LOGINS, Finding, Network, NoNetwork, World, judge_of
from tests.requirements import missing

# Many processes, and a machine that others may be busy on.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(600, 7_200))]

ANSWERS = 1_000_000


@attrs.frozen
class Record:
    """What came of it.

    Attributes:
        findings: The judgements of all rounds.
        ledger: The states of the store in the last one.
        answers: Answers of a sound guard with one thread in that one.
        login: How that guard was set up.
    """

    findings: list[Finding]
    ledger: Ledger
    answers: list[Answer]
    login: Login


@pytest.fixture(scope="module")
def network() -> Iterator[Network | None]:
    """A network in which packets can be dropped, if this machine allows one."""
    if os.geteuid() == 0 and not (shutil.which("iptables") and shutil.which("ip")):
        missing("iptables or ip", "iptables iproute2")
    try:
        network = Network()
    except NoNetwork:
        yield None
        return
    with network:
        yield network


def lived(network: Network | None, seed: int) -> Record:
    """Let everything fail while all answers are recorded, and judge them."""
    with World(network, seed) as world:
        world.let_all_fail()
        world.until(lambda: world.count() >= ANSWERS, "a million answers")
        ledger = world.close()
        answers = [Answer(*each) for each in world.servers[1].sessions()[0]]
        return Record(list(world.findings()), ledger, answers, LOGINS[1])


@pytest.fixture(scope="module")
def record(network: Network | None) -> Record:
    """The record of the last round, with the findings of all."""
    record = lived(network, 0)
    findings = record.findings
    for seed in range(1, rounds(1, 10)):
        # The proxy is tried even if packets can be dropped.
        record = lived(network if seed % 2 else None, seed)
        findings += record.findings
    return attrs.evolve(record, findings=findings)


def test_no_answer_is_wrong(record: Record) -> None:
    """Not one of a million, and they had every reason."""
    sound = [each for each in record.findings if not each.broken]
    assert [wrong for each in sound for wrong in each.wrong] == []
    reasons = sum((each.reasons for each in sound), Counter[str]())
    assert reasons.total() >= ANSWERS * rounds(1, 10)
    assert set(reasons) == set(REASONS) - {"", "raised"}
    for each in sound:
        assert max(each.oldest.values()) <= each.login.max_staleness
    print(dict(reasons))
    for what in sound[0].oldest:
        ages = [
            each.oldest[what] for each in sound if each.login.max_staleness == 0.5
            if what in each.oldest
        ]  # fmt: skip
        print(f"{what}: states of up to {max(ages):.3f} s ago")


@pytest.mark.parametrize(("broken", "fault"), list(BROKEN.items()))
def test_a_broken_guard_is_found(record: Record, broken: str, fault: str) -> None:
    """Each guard in which one rule is broken gives answers that are wrong in that way."""
    wrong = [wrong for each in record.findings if each.broken == broken for wrong in each.wrong]
    assert any(fault in found for _, found in wrong)


# ------------------------------------------------------------------------------ planted wrongs


class Plant:
    """Makes one answer of a record wrong."""

    def __init__(self, record: Record) -> None:
        self.record, self.ledger = record, record.ledger
        self.lease = round(record.login.max_staleness * 1e9)
        self.first, self.last = record.ledger.histories
        self.answers = [each for each in record.answers if each.began < record.ledger.forked]

    def find(self, reason: int, matches: Callable[[Answer], object] = lambda _: True) -> Answer:
        """Return the first such answer before the failover that demands nothing.

        The user has no temporary restriction: it might expire at that moment.
        """
        return next(
            each
            for each in self.answers
            if each.reason == reason and each.wanted == NOTHING
            if not self.first.policy(each.user, each.revision).temporary and matches(each)
        )

    def of(self, answer: Answer, history: History, revision: int) -> Answer:
        """Return an answer that is right about its user at a revision."""
        address = self.ledger.addresses[answer.address]
        assert address is not None
        policy = history.policy(answer.user, revision)
        allowed, reason, restriction = policy.decide(address, answer.began, deny_unknown=False)
        return answer._replace(
            revision=revision, allowed=allowed, reason=reason, restriction=restriction
        )

    def late(self, answer: Answer) -> Answer:
        """Return the same answer, given just after its state was too old."""
        began = int(self.first.spans[answer.revision][-1][1]) + self.lease + 2_000
        return answer._replace(began=began, ended=began + 1_000, position=0)

    # ----------------------------------------------------------------------------- each wrong

    def changes(self, answer: Answer) -> bool:
        """Return whether the next revision is of the same history and changes the user."""
        _, hi = self.first.spans[answer.revision][-1]
        return (
            hi < self.record.answers[-1].began - 2 * self.lease
            and answer.revision + 1 in self.first.policies[answer.user][0]
        )

    def allow_after_a_deletion(self) -> Answer:
        return self.late(self.find(LISTED, self.changes))

    def denial_after_an_addition(self) -> Answer:
        return self.late(self.find(NOT_LISTED, self.changes))

    def user_goes_back(self) -> Answer:
        seen: dict[int, list[int]] = {}
        for each in self.answers:
            if each.wanted == NOTHING and each.reason in (LISTED, NOT_LISTED, UNRESTRICTED):
                before = [r for r in seen.setdefault(each.user, []) if r < each.revision]
                known = each.user != STRANGER and each.revision in seen[each.user]
                if known and before and self.fresh(before[-1], each):
                    return self.of(each._replace(position=0), self.first, before[-1])
                seen[each.user].append(each.revision)
        raise AssertionError("no user was answered at two revisions")

    def fresh(self, revision: int, answer: Answer) -> bool:
        """Return whether a state was still young enough for an answer."""
        return self.first.spans[revision][-1][1] >= answer.began - self.lease

    def guard_goes_back(self) -> Answer:
        def at_its_position(answer: Answer) -> bool:
            position = answer.position
            return position == answer.revision and self.fresh(position - 1, answer)

        answer = self.find(NOT_LISTED, at_its_position)
        return self.of(answer, self.first, answer.revision - 1)

    def demand_unmet(self) -> Answer:
        answer = self.find(LISTED)
        return answer._replace(wanted=answer.revision + 1)

    def allow_from_elsewhere(self) -> Answer:
        answer = self.find(NOT_LISTED)
        policy = self.first.policy(answer.user, answer.revision)
        return answer._replace(allowed=True, reason=LISTED, restriction=policy.listed[0].id)

    def allow_without_its_restriction(self) -> Answer:
        return self.find(LISTED)._replace(restriction=b"f" * 16)

    def denial_with_a_restriction(self) -> Answer:
        return self.find(NOT_LISTED)._replace(restriction=b"f" * 16)

    def denial_of_a_listed_address(self) -> Answer:
        answer = self.find(LISTED)
        return answer._replace(allowed=False, reason=NOT_LISTED, restriction=NO_RESTRICTION)

    def revision_that_never_was(self) -> Answer:
        return self.find(LISTED)._replace(revision=2**31 - 1)

    def revision_before_its_commit(self) -> Answer:
        # Of a user whom no commit changes.
        return self.find(UNRESTRICTED, lambda a: a.user == STRANGER)._replace(
            revision=self.first.head
        )

    def lost_state_after_the_failover(self) -> Answer:
        lost = self.find(LISTED, lambda a: a.revision > self.last.shared)
        return self.late(lost._replace(revision=self.first.head))

    def unrestricted_though_restricted(self) -> Answer:
        answer = self.find(NOT_LISTED)
        return answer._replace(allowed=True, reason=UNRESTRICTED)

    def unavailable_and_allowed(self) -> Answer:
        return self.find(STORE_UNAVAILABLE)._replace(allowed=True)

    def exception(self) -> Answer:
        return self.find(LISTED)._replace(reason=RAISED)

    def plain_allow_from_elsewhere(self) -> Answer:
        return self.find(NOT_LISTED, self.long_since)._replace(allowed=True, reason=BOOL)

    def long_since(self, answer: Answer) -> bool:
        """Return whether the user's policy was the same for longer than the lease."""
        during = self.ledger.during(answer.user, answer.began - self.lease, answer.ended)
        return len(list(during)) == 1

    def plain_allow_before_the_first_sync(self) -> Answer:
        answer = self.find(BOOL, lambda a: a.allowed)
        return answer._replace(revision=0)

    def answer_of_a_dead_store(self) -> Answer:
        since, until = self.ledger.absences[0]
        answer = self.find(STORE_UNAVAILABLE, lambda a: since < a.began)
        head = max(r for r, spans in self.first.spans.items() if spans and spans[0][0] < since)
        later = answer._replace(began=int(until) - 2_000, ended=int(until) - 1_000)
        return self.of(later._replace(position=0), self.first, head)

    def allow_after_its_expiry(self) -> Answer:
        def expired(answer: Answer) -> bool:
            listed = self.first.policy(answer.user, answer.revision).listed
            return bool(listed) and all(each.expires < answer.began for each in listed)

        answer = next(a for a in self.answers if a.reason == NOT_LISTED and expired(a))
        restriction = self.first.policy(answer.user, answer.revision).listed[0]
        return answer._replace(allowed=True, reason=LISTED, restriction=restriction.id)


PLANTS: list[tuple[Callable[[Plant], Answer], str]] = [
    (Plant.allow_after_a_deletion, "stale"),
    (Plant.denial_after_an_addition, "stale"),
    (Plant.user_goes_back, "back"),
    (Plant.guard_goes_back, "back"),
    (Plant.demand_unmet, "at_least"),
    (Plant.allow_from_elsewhere, "disagrees"),
    (Plant.allow_without_its_restriction, "disagrees"),
    (Plant.denial_with_a_restriction, "disagrees"),
    (Plant.denial_of_a_listed_address, "disagrees"),
    (Plant.revision_that_never_was, "unknown"),
    (Plant.revision_before_its_commit, "stale"),
    (Plant.lost_state_after_the_failover, "stale"),
    (Plant.unrestricted_though_restricted, "disagrees"),
    (Plant.unavailable_and_allowed, "groundless"),
    (Plant.exception, "groundless"),
    (Plant.plain_allow_from_elsewhere, "stale"),
    (Plant.plain_allow_before_the_first_sync, "groundless"),
    (Plant.answer_of_a_dead_store, "stale"),
    (Plant.allow_after_its_expiry, "disagrees"),
]


@pytest.mark.parametrize(("plant", "fault"), PLANTS)
def test_a_planted_wrong_is_found(
    record: Record, plant: Callable[[Plant], Answer], fault: str
) -> None:
    """One answer is changed, or one added: it is found, and no other is called wrong."""
    wrong = plant(Plant(record))
    answers = [each for each in record.answers if each.began != wrong.began]
    answers.append(wrong)
    answers.sort()
    judge = judge_of(record.ledger, record.login)
    found = {each: why for each in answers if (why := judge.judge(0, each))}
    assert list(found) == [wrong]
    assert fault in found[wrong].split(", ")
