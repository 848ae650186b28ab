"""Races: simultaneous confirmations, guesses, cancellations and deletions.

The outcome must be one of calls made one after another.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

import ipguard
from ipguard import Action, Applied, PendingRequest, RequestClosed, TooManyAttempts, WrongNumber
from tests.conftest import rounds
from tests.flows import ADAM, ALICE, BOSS, KEY, Desk
from tests.postgres import fresh_schema

pytestmark = pytest.mark.slow

PATIENCE = 60.0


class Crowd:
    """Threads that start each round at the same moment."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size + 1)
        self._calls: list[Callable[[], object]] = []
        self._outcomes: list[object] = [None] * size
        self._threads = [
            threading.Thread(target=self._live, args=(n,), daemon=True) for n in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def _live(self, number: int) -> None:
        while True:
            self._barrier.wait(PATIENCE)
            if not self._calls:
                return
            try:
                self._outcomes[number] = self._calls[number % len(self._calls)]()
            except Exception as exc:
                self._outcomes[number] = exc
            self._barrier.wait(PATIENCE)

    def all_at_once(self, *calls: Callable[[], object]) -> list[object]:
        """Make the calls, distributed over the threads, and return their outcomes."""
        self._calls = list(calls)
        self._barrier.wait(PATIENCE)
        self._barrier.wait(PATIENCE)
        return list(self._outcomes)

    def end(self) -> None:
        """End the threads."""
        self._calls = []
        self._barrier.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def crowd() -> Iterator[Callable[[int], Crowd]]:
    """Return a function that starts threads; they end with the test."""
    crowds: list[Crowd] = []

    def start(size: int) -> Crowd:
        crowds.append(Crowd(size))
        return crowds[-1]

    yield start
    for it in crowds:
        it.end()


def patient(url: str) -> str:
    """Return the URL of a store with a timeout long enough for slow machines."""
    return url if url == "memory://" else f"{url}{'&' if '?' in url else '?'}timeout=60"


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    """A desk over each store."""
    if request.param == "postgres":
        it = Desk(url=request.getfixturevalue("postgres").url(schema=fresh_schema()))
    else:
        it = Desk(tmp_path / "desk.db" if request.param == "sqlite" else None)
    with it.store:
        yield it


@pytest.fixture
def busy(desk: Desk) -> Desk:
    """A desk without limits on requests and failures."""
    if desk.url != "memory://":
        desk.store.close()
        desk.store = ipguard.open_store(patient(desk.url), clock=desk.clock)
    desk.use(requests_per_hour=10**9, failures_per_actor=10**9, confirm_deletes=True)
    return desk


def _kinds(outcomes: list[object]) -> Counter[str]:
    return Counter(type(outcome).__name__ for outcome in outcomes)


def test_64_threads_confirm_one_number(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """One call succeeds, the others find the request confirmed."""
    threads = crowd(64)
    for n in range(rounds(5, 200)):
        request = busy.ask(f"10.0.{n}.1")
        number = busy.number(request)
        outcomes = threads.all_at_once(lambda: busy.flow.confirm(ALICE, request.id, number))  # noqa: B023
        assert _kinds(outcomes) == {"Applied": 1, "RequestClosed": 63}
        assert {e.state for e in outcomes if isinstance(e, RequestClosed)} == {"confirmed"}
        assert len(busy.held()) == n + 1
        (winner,) = (o for o in outcomes if isinstance(o, Applied))
        assert winner.revision == busy.rows()[0].revision == 1 + 2 * (n + 1)


def test_64_threads_guess_at_once(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """Five guesses are evaluated, the others are refused."""
    threads = crowd(64)
    for n in range(rounds(5, 200)):
        request = busy.ask(f"10.0.{n}.1")
        wrong = busy.wrong(request)
        outcomes = threads.all_at_once(lambda: busy.flow.confirm(ALICE, request.id, wrong))  # noqa: B023
        assert _kinds(outcomes) == {"WrongNumber": 5, "TooManyAttempts": 59}
        left = [e.attempts_left for e in outcomes if isinstance(e, WrongNumber)]
        assert sorted(left) == [0, 1, 2, 3, 4]
        assert busy.failures() == 5 * (n + 1)
        with pytest.raises(TooManyAttempts):
            busy.confirm(request)


def test_the_cap_of_an_actor_holds_over_all_requests(
    busy: Desk, crowd: Callable[[int], Crowd]
) -> None:
    """64 guesses on 16 requests: as many are evaluated as the cap allows."""
    threads = crowd(64)
    busy.use(requests_per_hour=10**9, failures_per_actor=7)
    for n in range(rounds(3, 50)):
        requests = [busy.ask(f"10.{n}.{m}.1") for m in range(16)]
        calls = [
            lambda r=r: busy.flow.confirm(ALICE, r.id, busy.wrong(r))  # type: ignore[misc]
            for r in requests
        ]
        assert _kinds(threads.all_at_once(*calls)) == {"WrongNumber": 7, "TooManyAttempts": 57}
        busy.flow.unlock(BOSS, "alice", reason="the next round")


def test_requests_at_once(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """Of 64 equal requests one is made; of 64 others, as many as an hour allows."""
    threads = crowd(64)
    outcomes = threads.all_at_once(busy.ask)
    assert _kinds(outcomes) == {"PendingRequest": 1, "DuplicateRestriction": 63}
    assert len(busy.outbox.messages) == 1
    busy.use(requests_per_hour=20)
    calls = [lambda n=n: busy.ask(f"10.0.0.{n}") for n in range(64)]  # type: ignore[misc]
    assert _kinds(threads.all_at_once(*calls)) == {"PendingRequest": 19, "TooManyRequests": 45}


# -- confirm against cancel against delete -----------------------------------------------------


def _one_after_another(
    desk: Desk, since: int, request: PendingRequest, outcomes: list[Any]
) -> None:
    """Check that the replayed audit log explains the outcome of each call."""
    confirmed, cancelled, lifted = outcomes
    state, restriction = "pending", next(iter(request.removes), None)
    revisions = {}
    for row in reversed([row for row in desk.rows() if row.revision > since]):
        if row.action is Action.CONFIRM:
            assert state == "pending"
            assert restriction is not None
            state, restriction = "confirmed", None
        elif row.action is Action.CANCEL:
            assert state == "pending"
            state = "cancelled"
        else:
            assert row.action is Action.LIFT
            assert restriction is not None
            restriction = None
            state = "cancelled" if state == "pending" else state
        revisions[row.action] = row.revision
    if isinstance(confirmed, Applied):
        assert confirmed.revision == revisions[Action.CONFIRM]
    else:
        assert Action.CONFIRM not in revisions
        assert isinstance(confirmed, RequestClosed)
        assert confirmed.state == state == "cancelled"
    if isinstance(cancelled, PendingRequest):
        assert Action.CANCEL in revisions
    else:
        assert Action.CANCEL not in revisions
        assert isinstance(cancelled, RequestClosed)
        assert cancelled.state == state
    if isinstance(lifted, Applied):
        assert lifted.revision == revisions[Action.LIFT]
    else:
        assert Action.LIFT not in revisions
        assert isinstance(lifted, ipguard.UnknownRestriction)
        assert Action.CONFIRM in revisions
    assert desk.request(request).state == state
    assert (desk.held() == []) is (restriction is None)


def test_confirm_against_cancel_against_delete(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """The history is one of calls made one after another, and explains each outcome."""
    threads = crowd(3)
    seen: Counter[tuple[str, ...]] = Counter()
    for n in range(rounds(25, 500)):
        restriction = busy.add()
        request = busy.ask_to_delete(restriction)
        number, since = busy.number(request), busy.rows()[0].revision
        calls = [
            lambda: busy.flow.confirm(ALICE, request.id, number),  # noqa: B023
            lambda: busy.flow.cancel(ADAM, request.id),  # noqa: B023
            lambda: busy.flow.lift(BOSS, restriction.id, reason="x"),  # noqa: B023
        ]
        # Threads wake in much the same order: rotate the calls.
        turn = n % 3
        outcomes = threads.all_at_once(*calls[turn:], *calls[:turn])
        outcomes = outcomes[3 - turn :] + outcomes[: 3 - turn]
        _one_after_another(busy, since, request, outcomes)
        seen[tuple(type(outcome).__name__ for outcome in outcomes)] += 1
        for left in busy.store.load_policy("jsmith").restrictions:
            busy.flow.lift(BOSS, left.id, reason="the next round")
    assert [row.revision for row in busy.rows()] == list(range(busy.rows()[0].revision, 0, -1))
    assert len(seen) > 1, f"no race at all: {seen}"


def test_confirm_against_resend(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """Either the old number was in time, or it is a wrong number for the new one."""
    threads = crowd(2)
    for n in range(rounds(10, 200)):
        request = busy.ask(f"10.0.{n}.1")
        busy.wait(seconds=30)
        number = busy.number(request)
        calls = [
            lambda: busy.flow.confirm(ALICE, request.id, number),  # noqa: B023
            lambda: busy.flow.resend(ALICE, request.id),  # noqa: B023
        ]
        confirmed, resent = threads.all_at_once(*calls[:: 1 if n % 2 else -1])[
            :: 1 if n % 2 else -1
        ]
        if isinstance(confirmed, Applied):
            assert isinstance(resent, RequestClosed)
        else:
            assert isinstance(confirmed, WrongNumber)
            assert isinstance(resent, PendingRequest)
            busy.confirm(request)
        assert len(busy.held()) == n + 1


# -- processes ---------------------------------------------------------------------------------


def _confirm_in_a_process(url: str, barrier: Any, tasks: Any, answers: Any) -> None:
    """Confirm the requests of a queue, each together with the other processes."""
    with ipguard.open_store(url) as store:
        flow = ipguard.Workflow(store, ipguard.testing.Outbox(), key=KEY)
        while True:
            request_id, number = tasks.get(timeout=PATIENCE)
            if request_id is None:
                return
            barrier.wait(PATIENCE)
            try:
                flow.confirm(ALICE, request_id, number)
                answers.put("applied")
            except RequestClosed as exc:
                answers.put(exc.state)
            except Exception as exc:
                answers.put(repr(exc))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_8_processes_confirm_one_number(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """One process succeeds in each round; five wrong numbers are counted."""
    if kind == "sqlite":
        desk = Desk(tmp_path / "desk.db")
    else:
        desk = Desk(url=request.getfixturevalue("postgres").url(schema=fresh_schema()))
    desk.store.close()
    url = patient(desk.url)
    desk.store = ipguard.open_store(url)
    desk.use(requests_per_hour=10**9)
    # Fresh interpreters inherit nothing but the URL.
    fresh = multiprocessing.get_context("spawn")
    barrier, answers = fresh.Barrier(8), fresh.Queue()
    tasks = [fresh.Queue() for _ in range(8)]
    processes = [
        fresh.Process(target=_confirm_in_a_process, args=(url, barrier, queue, answers))
        for queue in tasks
    ]

    def together(request_id: str, number: str) -> Counter[str]:
        for queue in tasks:
            queue.put((request_id, number))
        return Counter(answers.get(timeout=PATIENCE) for _ in processes)

    for process in processes:
        process.start()
    try:
        for n in range(rounds(5, 200)):
            asked = desk.ask(f"10.0.{n}.1")
            outcomes = together(asked.id, desk.number(asked))
            assert outcomes == {"applied": 1, "confirmed": 7}
            assert len(desk.held()) == n + 1
        asked = desk.ask("10.1.0.1")
        assert together(asked.id, desk.wrong(asked)) == {
            **{f"WrongNumber({left})": 1 for left in range(5)},
            "TooManyAttempts()": 3,
        }
        assert len(desk.held()) == rounds(5, 200)
        for queue in tasks:
            queue.put((None, None))
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * 8
    finally:
        for process in processes:
            process.kill()
        desk.store.close()


# -- requests that replace, approvals, and settings that differ --------------------------------


STRANGER = "198.18.0.1"


class Watchers:
    """Threads with a guard each, which ask all the time whether a user is open.

    Attributes:
        asked: How many answers were given.
        opened: What let a stranger in.
    """

    def __init__(self, desk: Desk, size: int = 4) -> None:
        self.asked = 0
        self.opened: list[object] = []
        self._desk = desk
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, daemon=True) for _ in range(size)]

    def _watch(self) -> None:
        store = self._desk.store
        with ipguard.Guard(store, max_staleness=0.1) as guard:
            while not self._over.wait(0.001):
                if guard.is_allowed("jsmith", STRANGER):
                    self.opened.append(guard.check("jsmith", STRANGER))
                policy = store.load_policy("jsmith")
                if not policy.restrictions:
                    self.opened.append(policy)
                self.asked += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def _rotated(threads: Crowd, n: int, *calls: Callable[[], object]) -> list[Any]:
    """Make calls at once; threads wake in much the same order, so rotate the calls."""
    turn = n % len(calls)
    outcomes = threads.all_at_once(*calls[turn:], *calls[:turn])
    return outcomes[len(calls) - turn :] + outcomes[: len(calls) - turn]


def _check_watched(watchers: Watchers, seen: Counter[tuple[str, ...]]) -> None:
    """Check that no guard saw the user open, and that calls met in more than one order."""
    assert watchers.opened == []
    assert watchers.asked > 0
    assert len(seen) > 1, f"no race at all: {seen}"


def _log_since(desk: Desk, since: int) -> list[ipguard.Change]:
    """Return the audit entries after a revision, oldest first; fail if one is missing."""
    found = [row for row in reversed(desk.rows()) if row.revision > since]
    assert [row.revision for row in found] == list(range(since + 1, since + 1 + len(found)))
    return found


def _ids(text: str | None) -> set[str]:
    return set(text.split(", ")) if text else set()


def _explain_replacing(
    desk: Desk, since: int, held: set[str], request: PendingRequest, outcomes: list[Any]
) -> None:
    """Replay the audit log, and find for each refusal a state in which it was right."""
    replaced, *deleted = outcomes
    states, revisions = [held], {}
    for row in _log_since(desk, since):
        ids = _ids(row.detail["restriction"])
        if row.action is Action.CONFIRM:
            assert row.detail["request"] == request.id
            gone = _ids(row.detail.get("replaces"))
            assert gone == states[-1] & set(request.removes)
            states.append(states[-1] - gone | ids)
        else:
            assert row.action is Action.DELETE
            assert ids < states[-1]  # never the last one
            states.append(states[-1] - ids)
        revisions[row.revision] = ids
    assert all(states)
    assert {r.id for r in desk.store.load_policy("jsmith").restrictions} == states[-1]
    assert isinstance(replaced, Applied)
    assert {r.id for r in replaced.added} == revisions.pop(replaced.revision)
    for restriction_id, outcome in zip(sorted(held), deleted, strict=True):
        if isinstance(outcome, Applied):
            assert revisions.pop(outcome.revision) == {restriction_id}
        elif isinstance(outcome, ipguard.OpeningRisk):
            assert {restriction_id} in states
        else:
            assert isinstance(outcome, ipguard.UnknownRestriction)
            assert any(restriction_id not in state for state in states)
    assert not revisions


def test_replace_against_delete(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """A request that replaces both restrictions of a user, while each of them is deleted."""
    busy.use(requests_per_hour=10**9)
    threads, seen = crowd(3), Counter[tuple[str, ...]]()
    busy.flow.impose(BOSS, "jsmith", ["10.0.0.1", "10.0.0.2"], reason="x")
    with Watchers(busy) as watchers:
        for n in range(rounds(15, 500)):
            applied = busy.flow.impose(
                BOSS, "jsmith", ["10.0.0.1", "10.0.0.2"], reason="x", only=True
            )
            one, two = sorted(r.id for r in applied.added)
            # Every third time, only one of them is replaced.
            replaces = [one, two][: 1 + bool(n % 3)]
            request = busy.ask("10.0.0.3", replaces=replaces)
            number, since = busy.number(request), busy.rows()[0].revision
            outcomes = _rotated(
                threads,
                n,
                lambda: busy.flow.confirm(ALICE, request.id, number),  # noqa: B023
                lambda: busy.flow.delete(ADAM, one, allow_opening=False),  # noqa: B023
                lambda: busy.flow.delete(ADAM, two, allow_opening=False),  # noqa: B023
            )
            _explain_replacing(busy, since, {one, two}, request, outcomes)
            seen[tuple(type(outcome).__name__ for outcome in outcomes)] += 1
    _check_watched(watchers, seen)


def test_approve_against_cancel(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """A request is approved by two and cancelled by the user concerned, all at once."""
    busy.use(requests_per_hour=10**9, add=ipguard.Demand(approvals=1))
    concerned = ipguard.Actor(username="jsmith", email="j@firm.example", manages=frozenset())
    threads, seen = crowd(3), Counter[tuple[str, ...]]()
    busy.add("10.0.0.1")
    with Watchers(busy) as watchers:
        for n in range(rounds(15, 500)):
            (old,) = busy.store.load_policy("jsmith").restrictions
            request = busy.ask(f"10.{n >> 8}.{n & 255}.3", replaces=[old.id])
            since = busy.rows()[0].revision
            outcomes = _rotated(
                threads,
                n,
                lambda: busy.flow.approve(ADAM, request.id),  # noqa: B023
                lambda: busy.flow.approve(BOSS, request.id),  # noqa: B023
                lambda: busy.flow.cancel(concerned, request.id),  # noqa: B023
            )
            log = [(str(row.action), row.actor) for row in _log_since(busy, since)]
            state = busy.request(request).state
            for name, outcome in zip(("adam", "boss", "jsmith"), outcomes, strict=True):
                if isinstance(outcome, Applied):
                    assert log == [("approve", name), ("confirm", name)]
                    assert outcome.revision == since + 2
                elif isinstance(outcome, PendingRequest):
                    assert (name, outcome.state, log) == ("jsmith", state, [("cancel", name)])
                else:
                    assert isinstance(outcome, RequestClosed)
                    assert outcome.state == state
            assert _kinds(outcomes)["RequestClosed"] == 2
            assert busy.held() == (
                [f"10.{n >> 8}.{n & 255}.3"] if state == "confirmed" else [str(old.addresses)]
            )
            seen[tuple(type(outcome).__name__ for outcome in outcomes)] += 1
    _check_watched(watchers, seen)


def test_confirm_against_a_settings_change(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """One server has the old settings still, while another one demands an approval already."""
    busy.use(requests_per_hour=10**9)
    stricter = busy.workflow(
        requests_per_hour=10**9, loosens=ipguard.Demand(number=True, approvals=1)
    )
    threads, seen = crowd(3), Counter[tuple[str, ...]]()
    busy.add("10.0.0.1")
    with Watchers(busy) as watchers:
        for n in range(rounds(15, 500)):
            (old,) = busy.store.load_policy("jsmith").restrictions
            request = busy.ask(f"10.{n >> 8}.{n & 255}.3", replaces=[old.id])
            number, since = busy.number(request), busy.rows()[0].revision
            lax, strict, approved = outcomes = _rotated(
                threads,
                n,
                lambda: busy.flow.confirm(ALICE, request.id, number),  # noqa: B023
                lambda: stricter.confirm(ALICE, request.id, number),  # noqa: B023
                lambda: stricter.approve(ADAM, request.id),  # noqa: B023
            )
            log = _log_since(busy, since)
            steps = [(str(row.action), row.actor) for row in log]
            *before, last = steps
            # It was confirmed once, by the last act of those that changed anything.
            assert last[0] == "confirm"
            assert len(set(steps)) == len(steps) <= 3
            assert set(before) <= {("number_accepted", "alice"), ("approve", "adam")}
            (winner,) = (each for each in outcomes if isinstance(each, Applied))
            assert winner.revision == log[-1].revision
            if winner is strict:
                assert before == [("approve", "adam")]
            elif winner is approved:
                assert before == [("number_accepted", "alice"), ("approve", "adam")]
            for outcome, mark in (
                (lax, None),
                (strict, ("number_accepted", "alice")),
                (approved, ("approve", "adam")),
            ):
                if isinstance(outcome, PendingRequest):
                    assert mark in before
                elif outcome is not winner:
                    assert isinstance(outcome, RequestClosed)
                    assert outcome.state == "confirmed"
            assert busy.held() == [f"10.{n >> 8}.{n & 255}.3"]
            seen[tuple(type(outcome).__name__ for outcome in outcomes)] += 1
    _check_watched(watchers, seen)


def test_import_against_replace_and_delete(busy: Desk, crowd: Callable[[int], Crowd]) -> None:
    """An import that replaces the list of a user is one change among the others."""
    busy.use(requests_per_hour=10**9)
    threads, seen = crowd(3), Counter[tuple[str, ...]]()
    busy.add("10.0.0.1")
    with Watchers(busy) as watchers:
        for n in range(rounds(15, 500)):
            applied = busy.flow.impose(BOSS, "jsmith", "10.0.0.1", reason="x", only=True)
            assert applied.restriction is not None
            old = applied.restriction.id
            request = busy.ask("10.0.0.3", replaces=[old])
            number, since = busy.number(request), busy.rows()[0].revision
            rows = [("jsmith", "10.0.0.2")]
            imported, replaced, deleted = _rotated(
                threads,
                n,
                lambda: busy.flow.impose_many(BOSS, rows, reason="x", replace=True),  # noqa: B023
                lambda: busy.flow.confirm(ALICE, request.id, number),  # noqa: B023
                lambda: busy.flow.delete(ADAM, old, allow_opening=False),  # noqa: B023
            )
            held, order = {"10.0.0.1"}, [row.action for row in _log_since(busy, since)]
            for action in order:
                if action is Action.IMPOSE_MANY:
                    held = {"10.0.0.2"}
                elif action is Action.CONFIRM:
                    held = held - {"10.0.0.1"} | {"10.0.0.3"}
                else:
                    assert action is Action.DELETE
                    held = held - {"10.0.0.1"}
                assert held
            assert set(busy.held()) == held
            assert isinstance(imported, Applied)
            assert isinstance(replaced, Applied)
            # The old one was the last until another change had ended it.
            assert isinstance(deleted, (ipguard.OpeningRisk, ipguard.UnknownRestriction))
            assert len(order) == 2
            seen[(*map(str, order), type(deleted).__name__)] += 1
    _check_watched(watchers, seen)
