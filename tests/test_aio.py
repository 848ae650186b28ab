"""AsyncGuard and AsyncWorkflow: never in the event loop's way, and nothing leaks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipguard import (
    Applied,
    Decision,
    Guard,
    InvalidValue,
    PendingRequest,
    Reason,
    StoreUnavailable,
    UnknownUser,
    Workflow,
    open_store,
)
from ipguard.aio import AsyncGuard, AsyncWorkflow, GuardSettings, _executor
from ipguard.aio._executor import Executor
from ipguard.testing import FakeClock, Outbox
from tests.flows import ALICE, BOSS, KEY, PEOPLE, Desk
from tests.guards import ELSEWHERE, HOME, OFFICE, Gate, World, comes_true, gate
from tests.guards import memory as memory  # noqa: PLC0414
from tests.guards import world as world  # noqa: PLC0414
from tests.test_guard_fork import in_child


def guarded(world: World, *, threads: int = 4, waiting: int = 64, **settings: Any) -> AsyncGuard:
    settings.setdefault("monotonic", world.clock.monotonic)
    return AsyncGuard(world.store, threads=threads, waiting=waiting, **settings)


async def started(coroutine: Any) -> asyncio.Task[Any]:
    """Return a task that has come to its first await."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


def at_rest(*executors: Executor) -> bool:
    return all(each._busy == 0 and not each._queue for each in executors)


class Silent:
    """A store that must not be asked: what is remembered is answered without it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.asked: list[str] = []

    def now(self) -> Any:
        return self._store.now()

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        raise StoreUnavailable("down")


# -- what is remembered ---------------------------------------------------------------------------


def test_it_answers_as_a_guard(world: World) -> None:
    """Every question has the same answer as from a Guard over the same store, asked twice."""
    world.restrict("jsmith", HOME)
    world.restrict("temp", HOME, expires_in=100)
    plain, guard = world.guard(), guarded(world)
    questions: list[tuple[Any, Any]] = [
        (name, address)
        for name in ("jsmith", "JSmith", "temp", "nobody", "", " x", None)
        for address in (HOME, OFFICE, "::1", "nonsense", None, 5)
    ]

    async def main() -> None:
        for name, address in questions * 2:
            expected = plain.check(name, address)
            assert await guard.check(name, address) == expected
            assert await guard.is_allowed(name, address) is expected.allowed
            assert (await guard.explain(name, address)).decision.allowed is expected.allowed

    asyncio.run(main())
    assert guard.stats().denials == {
        reason: 2 * count for reason, count in plain.stats().denials.items()
    }


def test_what_is_remembered_never_leaves_the_event_loop(world: World) -> None:
    """No thread, no read: allowed, denied and malformed, while the store hangs or is closed."""
    world.restrict("jsmith", HOME)
    guard = guarded(world)

    async def main() -> None:
        assert await guard.is_allowed("jsmith", HOME)
        loads, syncs = len(world.store.loads), len(world.store.syncs)
        guard._logins._submit = lambda call: pytest.fail("it left the loop")  # type: ignore[method-assign]
        for _ in range(3):
            for name in ("jsmith", "JSMITH", "JSmith"):
                assert await guard.is_allowed(name, HOME)
                assert not await guard.is_allowed(name, OFFICE)
                assert (await guard.check(name, HOME)).reason is Reason.LISTED
                assert (await guard.check(name, OFFICE)).reason is Reason.NOT_LISTED
            assert (await guard.check("jsmith", "x")).reason is Reason.BAD_ADDRESS
            assert (await guard.check("", HOME)).reason is Reason.BAD_USERNAME
            assert (await guard.check("jsmith", HOME, guard.revision)).allowed
        assert (len(world.store.loads), len(world.store.syncs)) == (loads, syncs)

    asyncio.run(main())


def test_a_store_that_raises_is_not_asked_for_what_is_remembered(memory: World) -> None:
    """Once a user is remembered, every call of the store may fail, until the lease is over."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory)
    asyncio.run(guard.is_allowed("jsmith", HOME))
    silent = Silent(memory.inner)
    memory.store.store = silent  # type: ignore[assignment]

    async def main() -> None:
        assert await guard.is_allowed("jsmith", HOME)
        assert (await guard.check("jsmith", ELSEWHERE)).reason is Reason.NOT_LISTED
        assert silent.asked == []
        memory.pass_time(5)
        assert (await guard.check("jsmith", HOME)).reason is Reason.STORE_UNAVAILABLE
        assert silent.asked == ["changes_since"]

    asyncio.run(main())


def test_a_clock_of_the_store_that_fails_denies(memory: World) -> None:
    """A defect on the event loop becomes a denial, as in a Guard, and is never raised."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, threads=1, waiting=0)

    def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        await guard.is_allowed("jsmith", HOME)
        memory.store.at_now.extend([fail] * 2)  # on the loop, then on the thread
        assert (await guard.check("jsmith", HOME)).reason is Reason.STORE_UNAVAILABLE
        with gate(memory.store.before_load) as hanging:
            load = await started(guard.check("adoe", HOME))
            hanging.reached()
            memory.store.at_now.extend([fail] * 2)  # on the loop, twice: there is no thread
            assert (await guard.check("jsmith", HOME)).reason is Reason.STORE_UNAVAILABLE
        await load
        assert await guard.is_allowed("jsmith", HOME)

    asyncio.run(main())


def test_while_the_store_is_known_to_be_down_nothing_leaves_the_event_loop(memory: World) -> None:
    """Denials are immediate, and within `outage_grace` who is remembered is answered."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, outage_grace=10)

    async def main() -> None:
        await guard.is_allowed("jsmith", HOME)
        memory.pass_time(5)
        memory.store.down = StoreUnavailable("down")
        stale = await guard.check("jsmith", HOME)
        assert (stale.allowed, stale.stale) == (True, True)
        submit, guard._logins._submit = guard._logins._submit, None  # type: ignore[assignment, method-assign]
        assert await guard.check("jsmith", HOME) == stale
        assert (await guard.check("adoe", HOME)).reason is Reason.STORE_UNAVAILABLE
        guard._logins._submit = submit  # type: ignore[method-assign]
        memory.pass_time(2)
        memory.store.down = None
        assert not (await guard.check("jsmith", HOME)).stale

    asyncio.run(main())


def test_a_change_dropped_between_look_up_and_answer_lets_nobody_in(memory: World) -> None:
    """Truth 1 on the event loop: the clock is tested against the moment taken before the look-up.

    The store's clock stands for the pause of an event loop in the middle of an answer.
    """
    memory.restrict("temp", HOME, expires_in=1000)
    guard = guarded(memory)

    def pause() -> None:
        memory.pass_time(5)
        memory.lift_all("temp")
        memory.restrict("temp", OFFICE)
        guard.guard.sync()

    async def main() -> None:
        assert await guard.is_allowed("temp", HOME)
        memory.store.at_now.append(pause)
        assert (await guard.check("temp", HOME)).reason is Reason.NOT_LISTED

    asyncio.run(main())


# -- what is not ----------------------------------------------------------------------------------


def test_a_load_that_hangs_is_not_in_the_event_loops_way(world: World) -> None:
    """Other coroutines go on, and are answered, while a thread waits for the store."""
    world.restrict("jsmith", HOME)
    world.restrict("adoe", HOME)
    guard = guarded(world)

    async def main() -> None:
        await guard.is_allowed("jsmith", HOME)
        with gate(world.store.before_load) as hanging:
            slow = await started(guard.is_allowed("adoe", HOME))
            hanging.reached()
            assert await guard.is_allowed("jsmith", HOME)
            assert not slow.done()
        assert await slow

    asyncio.run(main())


def test_beyond_its_places_it_denies_at_once(world: World) -> None:
    """One at work, one in line, and the next is STORE_UNAVAILABLE, counted; then all is well."""
    world.restrict("jsmith", HOME)
    guard = guarded(world, threads=1, waiting=1)

    async def main() -> None:
        await guard.sync()
        with gate(world.store.before_load) as hanging:
            first = await started(guard.check("jsmith", HOME))
            hanging.reached()
            second = await started(guard.check("adoe", HOME))
            third = await guard.check("third", HOME)
            assert third.reason is Reason.STORE_UNAVAILABLE
            assert not await guard.is_allowed("fourth", HOME)
            assert guard.stats().denials == {Reason.STORE_UNAVAILABLE: 2}
            assert not first.done()
            assert not second.done()
        assert await first
        assert await second
        assert await guard.is_allowed("third", HOME)

    asyncio.run(main())


def test_any_number_who_miss_on_one_user_take_one_place(world: World) -> None:
    """Ten thousand at once are all answered after one read, though there is one thread and no line.

    Each by its own address.
    """
    world.restrict("jsmith", HOME)
    guard = guarded(world, threads=1, waiting=0)
    wanted = [HOME, ELSEWHERE] * 5_000

    async def main() -> None:
        await guard.sync()
        answers = await asyncio.gather(*(guard.is_allowed("jsmith", each) for each in wanted))
        assert answers == [each == HOME for each in wanted]
        assert not guard._asking

    asyncio.run(main())
    assert world.store.loads == ["jsmith"]


@pytest.mark.parametrize("in_line", [True, False])
def test_whoever_shares_a_call_does_not_share_its_end(memory: World, in_line: bool) -> None:
    """The one who asked first is cancelled, in line or at work; the others are answered."""
    guard = guarded(memory, threads=2, waiting=1)

    async def main() -> None:
        await guard.sync()
        with gate(*[memory.store.before_load] * (2 if in_line else 1)) as hanging:
            others = [await started(guard.check(f"{n}", HOME)) for n in range(2 * in_line)]
            first = await started(guard.check("jsmith", HOME))
            if not in_line:
                hanging.reached()
            crowd = [await started(guard.is_allowed("jsmith", HOME)) for _ in range(100)]
            assert first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        assert all(await asyncio.gather(*crowd, *others))
        assert not guard._asking

    asyncio.run(main())
    assert memory.store.loads.count("jsmith") == 1


def test_a_closed_event_loop_is_not_kept(memory: World) -> None:
    """A loop that is closed while its calls are in progress is freed, and so are its calls."""
    guard = guarded(memory, threads=1)
    guard.guard.sync()
    loops = []
    with gate(memory.store.before_load) as hanging:
        for name in ("jsmith", "adoe"):  # one is at work, the other in line
            loop = asyncio.new_event_loop()
            task = loop.create_task(guard.check(name, HOME))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.call_soon(loop.stop)
            loop.run_forever()
            loop.close()
            loops.append(weakref.ref(loop))
            del loop, task
        hanging.reached()
    comes_true(lambda: at_rest(guard._logins))
    guard._logins.retire()
    comes_true(lambda: not guard._logins._workers)
    gc.collect()
    assert not guard._asking
    assert [loop() for loop in loops] == [None, None]
    assert asyncio.run(guard.is_allowed("jsmith", HOME))


def test_waiting_for_a_revision_keeps_its_timeout_while_the_store_hangs(memory: World) -> None:
    """The wait ends though the sync has not, and takes no thread for longer."""
    guard = guarded(memory, threads=1, waiting=0)

    async def main() -> None:
        with gate(memory.store.before_sync) as hanging:
            assert not await guard.wait_for(1, 0.01)
            hanging.reached()
            comes_true(lambda: at_rest(guard._others))
            assert not await guard.wait_for(1, 0.01)
        assert await guard.wait_for(memory.restrict("jsmith"), 30)

    asyncio.run(main())
    assert len(memory.store.syncs) <= 2


def test_an_answer_that_was_not_to_be_shared_is_asked_for_by_each(memory: World) -> None:
    """Who needs a later revision than was read asks for itself, once."""
    revision = memory.restrict("jsmith", HOME)
    guard = guarded(memory)

    async def main() -> None:
        await guard.sync()
        with gate(memory.store.before_load) as hanging:
            first = await started(guard.check("jsmith", HOME))
            hanging.reached()
            later = [
                await started(guard.check("jsmith", HOME, at_least=revision + n)) for n in (1, 1, 2)
            ]
            memory.touch("somebody")
        assert await first
        decisions = await asyncio.gather(*later)
        assert [bool(decision) for decision in decisions] == [True, True, False]
        assert not guard._asking

    asyncio.run(main())


def test_behind_a_call_that_hangs_nobody_waits_for_long(memory: World) -> None:
    """Who shares it gives up when others would, and is answered as where no place is left."""
    guard = guarded(memory, threads=1, waiting=0, max_staleness=0.1)

    async def main() -> None:
        with gate(memory.store.before_load) as hanging:
            first = await started(guard.check("jsmith", HOME))
            hanging.reached()
            decision = await guard.check("jsmith", HOME)
            assert decision.reason is Reason.STORE_UNAVAILABLE
            assert not first.done()
        assert await first

    asyncio.run(main())


def test_a_name_of_a_class_of_its_own_is_no_key(memory: World) -> None:
    """Whatever such a text does when it is hashed or compared, the answer is the guard's."""

    class Loud(str):
        __slots__ = ()

        def __hash__(self) -> int:
            raise ZeroDivisionError

    memory.restrict("jsmith", HOME)
    guard = guarded(memory)
    assert asyncio.run(guard.is_allowed(Loud("jsmith"), HOME))
    assert not asyncio.run(guard.is_allowed(Loud("jsmith"), ELSEWHERE))


def test_full_counts_as_down_for_outage_grace(memory: World) -> None:
    """The lease is over and no place is left: who is remembered is answered, marked stale."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, threads=1, waiting=0, outage_grace=10)

    async def main() -> None:
        await guard.is_allowed("jsmith", HOME)
        memory.pass_time(5)
        with gate(memory.store.before_sync) as hanging:
            first = await started(guard.check("mary", HOME))
            hanging.reached()
            decision = await guard.check("jsmith", HOME)
            assert (decision.allowed, decision.stale) == (True, True)
            assert not await guard.is_allowed("adoe", HOME)
        await first

    asyncio.run(main())


def test_at_least(world: World) -> None:
    """A revision that a sync brings is answered; one that it does not bring denies."""
    world.restrict("jsmith", OFFICE)
    guard = guarded(world)

    async def main() -> None:
        assert not await guard.is_allowed("jsmith", HOME)
        revision = world.restrict("jsmith", HOME)
        assert (await guard.check("jsmith", HOME)).reason is Reason.NOT_LISTED
        decision = await guard.check("jsmith", HOME, at_least=revision)
        assert (decision.allowed, decision.revision) == (True, revision)
        later = await guard.check("jsmith", HOME, at_least=revision + 1)
        assert later.reason is Reason.STORE_UNAVAILABLE
        assert (await guard.check("jsmith", HOME, "5")).reason is Reason.STORE_UNAVAILABLE

    asyncio.run(main())


def test_waiting_for_a_revision(world: World) -> None:
    """True once the guard is there, False at the timeout; a sync tells the revision."""
    guard = guarded(world)

    async def main() -> None:
        assert guard.revision == 0
        revision = world.restrict("jsmith", HOME)
        assert await guard.wait_for(revision, 30)
        assert await guard.wait_for(revision, 0)
        assert await guard.sync() == guard.revision == revision
        assert not await guard.wait_for(revision + 1, 0.01)
        assert not await guard.wait_for(revision + 1, -1)
        with pytest.raises(InvalidValue):
            await guard.wait_for(revision, "1")

    asyncio.run(main())


def test_waiting_takes_no_logins_place_and_is_bounded(memory: World) -> None:
    """While every thread for other things hangs, logins go on; waiting ends at its timeout."""
    guard = guarded(memory, threads=1, waiting=1, max_staleness=0.02)

    async def main() -> None:
        with gate(memory.store.before_sync) as hanging:
            hung = await started(guard.sync())
            hanging.reached()
            assert not await guard.wait_for(1, 0.01)  # in line until its time is over
            second = await started(guard.explain("jsmith", HOME))
            assert not await guard.wait_for(1, 1000)  # no place: at once
            with pytest.raises(StoreUnavailable):
                await guard.sync()
            assert await guard.is_allowed("jsmith", HOME)
        assert await hung == 0
        assert (await second).decision

    asyncio.run(main())


def test_errors_are_those_of_the_guard(memory: World) -> None:
    """`explain` and `sync` raise what a Guard's raise."""
    guard = guarded(memory)
    memory.store.down = OSError("cable")

    async def main() -> None:
        with pytest.raises(StoreUnavailable, match="cable"):
            await guard.explain("jsmith", HOME)
        with pytest.raises(StoreUnavailable, match="cable"):
            await guard.sync()

    asyncio.run(main())


# -- observer, report_only, life ------------------------------------------------------------------


def test_the_observer_is_told_once_on_the_event_loop(memory: World) -> None:
    """Hit, miss and denial alike, with the decision that the caller gets, on the loop's thread."""
    memory.restrict("jsmith", HOME)
    told: list[tuple[object, object, Decision, int]] = []
    guard = guarded(memory, observer=lambda *args: told.append((*args, threading.get_ident())))

    async def main() -> None:
        decisions = [await guard.check("jsmith", address) for address in (HOME, HOME, OFFICE)]
        assert await guard.is_allowed("jsmith", HOME)
        assert [each[2] for each in told] == [*decisions, decisions[0]]
        assert {each[3] for each in told} == {threading.get_ident()}

    asyncio.run(main())


def test_report_only_allows_and_tells(memory: World, caplog: pytest.LogCaptureFixture) -> None:
    """Every answer allows with the reason that it would have had, and the log is told once each."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, report_only=True)

    async def main() -> None:
        for _ in range(2):
            decision = await guard.check("jsmith", OFFICE)
            assert (decision.allowed, decision.reason) == (True, Reason.NOT_LISTED)
        assert await guard.is_allowed("jsmith", OFFICE)

    with caplog.at_level(logging.WARNING, "ipguard.guard"):
        asyncio.run(main())
    assert sum("report only" in record.message for record in caplog.records) == 3


def test_it_starts_and_stops_the_refresher(world: World) -> None:
    """`async with` runs it; closing ends it and the idle threads; questions are answered on."""

    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name.startswith("ipguard-")}

    before = threads()
    guard = AsyncGuard(world.inner)

    async def main() -> None:
        async with guard as entered:
            assert entered is guard
            assert guard.stats().woken_by == "refresher"
            assert await guard.wait_for(world.restrict("jsmith", HOME), 30)
            assert await guard.is_allowed("jsmith", HOME)
        assert guard.stats().woken_by == "callers"
        comes_true(lambda: threads() <= before)
        assert not await guard.is_allowed("jsmith", OFFICE)
        assert await guard.is_allowed("adoe", OFFICE)
        await guard.aclose()

    asyncio.run(main())
    comes_true(lambda: threads() <= before)


def test_it_is_made_from_a_guard_or_as_one(memory: World) -> None:
    """A guard is shared as it is; its settings are Guard's, by name, and refused beside a guard."""
    plain = memory.guard()
    assert AsyncGuard(plain).guard is plain
    names = set(inspect.signature(Guard).parameters) - {"store"}
    assert set(GuardSettings.__annotations__) == names
    with pytest.raises(InvalidValue, match="capacity"):
        AsyncGuard(plain, capacity=5)
    with pytest.raises(InvalidValue, match="max_staleness"):
        AsyncGuard(memory.store, max_staleness=0)
    with pytest.raises(TypeError):
        AsyncGuard(memory.store, nonsense=0)  # type: ignore[call-arg]
    for threads, waiting in ((0, 0), (True, 0), (1, -1), (1.0, 0), (1, "4")):
        with pytest.raises(InvalidValue):
            AsyncGuard(memory.store, threads=threads, waiting=waiting)


def test_a_guard_that_answers_otherwise_is_refused(memory: World) -> None:
    """An overridden `check` or `is_allowed` would be stepped around, and might have denied."""

    class Checks(Guard):
        def check(self, username: str, address: str, at_least: int | None = None) -> Decision:
            raise NotImplementedError

    class Allows(Guard):
        def is_allowed(self, username: str, address: str) -> bool:
            raise NotImplementedError

    for kind in (Checks, Allows):
        with pytest.raises(InvalidValue, match="override"):
            AsyncGuard(kind(memory.store))


# -- cancellation ---------------------------------------------------------------------------------


def test_a_call_cancelled_in_line_holds_no_place_and_does_nothing(memory: World) -> None:
    """Its place is free at once, and the store is never asked."""
    guard = guarded(memory, threads=1, waiting=1)

    async def main() -> None:
        await guard.sync()
        with gate(memory.store.before_load) as hanging:
            first = await started(guard.check("first", HOME))
            hanging.reached()
            for n in range(50):
                waits = await started(guard.check(f"user{n}", HOME))
                waits.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waits
                comes_true(lambda: not guard._logins._queue)
            last = await started(guard.check("last", HOME))
        assert (await first).allowed
        assert (await last).allowed
        assert memory.store.loads == ["first", "last"]

    asyncio.run(main())


def test_a_call_cancelled_at_work_goes_on_and_frees_its_place_once(memory: World) -> None:
    """What it read is remembered; the one place is taken until then, and free afterwards."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, threads=1, waiting=0)

    async def main() -> None:
        await guard.sync()
        for _ in range(3):
            memory.touch("jsmith")
            await guard.sync()
            with gate(memory.store.before_load) as hanging:
                task = await started(guard.check("jsmith", HOME))
                hanging.reached()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not await guard.is_allowed("adoe", HOME)
            comes_true(lambda: at_rest(guard._logins))
            loads = len(memory.store.loads)
            assert await guard.is_allowed("jsmith", HOME)
            assert len(memory.store.loads) == loads

    asyncio.run(main())


def test_a_call_cancelled_just_as_a_thread_takes_it_is_not_made() -> None:
    """The thread has it already, and finds that nobody wants it any more."""
    executor = Executor(1, 0)
    step, calls = Gate(), list[int]()
    inner = executor._next

    def slow() -> Any:
        job = inner()
        step()
        return job

    executor._next = slow  # type: ignore[method-assign]
    future = executor._submit(lambda: calls.append(1))
    step.reached()
    assert future.cancel()
    step.let_go()
    comes_true(lambda: at_rest(executor))
    assert calls == []


def cancel_at_random_points(store: Any, wanted: int) -> None:
    """Read and write, cancelled anywhere; threads and workflow must be whole afterwards."""
    plain = Workflow(store, Outbox(), key=KEY)
    store.put_users(PEOPLE)
    guard = AsyncGuard(store, threads=3, waiting=4, max_staleness=0.05)
    flow = AsyncWorkflow(plain, threads=3, waiting=4)
    chance = random.Random(7)
    ended: Counter[str] = Counter()

    async def call(n: int) -> None:
        which = n % 6
        if which == 0:
            await guard.is_allowed(f"user{n}", HOME)
        elif which == 1:
            await guard.check("jsmith", HOME, at_least=guard.revision)
        elif which == 2:
            await guard.explain("jsmith", HOME)
        elif which == 3:
            await flow.overview(BOSS)
        elif which == 4:
            await guard.wait_for(guard.revision + 1, 0.001)
        else:
            applied = await flow.impose(
                BOSS, "jsmith", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", reason="x"
            )
            assert isinstance(applied, Applied)
            assert applied.restriction is not None
            await flow.lift(BOSS, applied.restriction.id, reason="x")

    async def main() -> None:
        for batch in itertools.takewhile(
            lambda _: ended["CancelledError"] < wanted, itertools.count()
        ):
            tasks = [asyncio.create_task(call(batch * 20 + n)) for n in range(20)]
            for task in chance.sample(tasks, len(tasks)):
                for _ in range(int(chance.expovariate(0.1))):
                    await asyncio.sleep(0)
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                ended[type(result).__name__] += 1

    asyncio.run(main())
    executors = (guard._logins, guard._others, flow._executor)
    comes_true(lambda: at_rest(*executors))
    assert set(ended) <= {"CancelledError", "NoneType", "StoreUnavailable"}
    assert ended["NoneType"]  # not all were cancelled at once: the points are spread
    assert all(len(each._workers) <= 3 for each in executors)
    assert not guard._asking

    async def after() -> None:
        assert await guard.sync() == guard.revision
        assert await guard.is_allowed("fresh", HOME)
        history = await flow.history(BOSS, limit=1)
        assert await guard.wait_for(history.items[0].revision, 30)
        await guard.close()
        await flow.close()

    asyncio.run(after())


def test_cancelled_at_random_points_nothing_is_left(tmp_path: Path, rounds: Any) -> None:
    """Reads and writes over SQLite, cancelled anywhere: pool and threads are whole afterwards."""
    store: Any = open_store(f"sqlite:///{tmp_path / 'cancel.db'}")
    cancel_at_random_points(store, rounds(200, 10_000))
    pool = store._pool
    comes_true(lambda: len(pool._idle) == len(pool._open))
    assert not pool.writing.locked()
    store.close()
    assert not pool._open


# -- the workflow ---------------------------------------------------------------------------------


def test_both_phases_are_awaited(desk: Desk) -> None:
    """Request, confirm, delete, operators' acts and both lists: as a Workflow answers."""

    async def main() -> None:
        async with AsyncWorkflow(desk.store, desk.outbox, key=KEY) as flow:
            request = await flow.request(ALICE, "jsmith", HOME)
            assert isinstance(request, PendingRequest)
            applied = await flow.confirm(ALICE, request.id, desk.number(request))
            assert desk.held() == [HOME]
            assert applied.restriction is not None
            await flow.delete(ALICE, applied.restriction.id)
            other = await flow.request(ALICE, "jsmith", OFFICE)
            desk.wait(minutes=1)
            await flow.resend(ALICE, other.id)
            await flow.cancel(ALICE, other.id)
            with pytest.raises(UnknownUser):
                await flow.request(ALICE, "zed", OFFICE)
            many = await flow.impose_many(BOSS, [("jsmith", OFFICE)], reason="x")
            assert many.revision
            one = await flow.impose(BOSS, "mary", OFFICE, reason="x")
            assert one.restriction is not None
            await flow.lift(BOSS, one.restriction.id, reason="x")
            await flow.unlock(BOSS, "alice", reason="x")
            assert await flow.overview(ALICE) == desk.flow.overview(ALICE)
            assert await flow.history(ALICE) == desk.flow.history(ALICE)
            await flow.aclose()

    asyncio.run(main())


def test_it_has_every_method_of_a_workflow() -> None:
    """Whatever a Workflow offers can be awaited, with the same arguments and a docstring."""
    for name, method in inspect.getmembers(Workflow, inspect.isfunction):
        if name.startswith("_"):
            continue
        awaited = getattr(AsyncWorkflow, name)
        assert inspect.iscoroutinefunction(awaited)
        assert inspect.signature(awaited).parameters == inspect.signature(method).parameters
        assert awaited.__doc__
    for name, _ in inspect.getmembers(Guard, inspect.isfunction):
        if not (name.startswith("_") or "fork" in name or name == "stats"):
            assert inspect.iscoroutinefunction(getattr(AsyncGuard, name))


def test_a_full_workflow_says_so(desk: Desk) -> None:
    """One at work, none in line: the next is StoreUnavailable, and changes nothing."""
    flow = AsyncWorkflow(desk.flow, threads=1, waiting=0)
    step = Gate()
    desk.outbox.number_issued = lambda *args: step()  # type: ignore[method-assign]

    async def main() -> None:
        try:
            first = await started(flow.request(ALICE, "jsmith", HOME))
            step.reached()
            with pytest.raises(StoreUnavailable, match="too many"):
                await flow.request(ALICE, "mary", HOME)
        finally:
            step.let_go()
        await first

    asyncio.run(main())
    assert len(desk.rows()) == 1 + 1  # the users, and one request


def test_a_cancelled_confirm_goes_through_and_trying_again_shows_it(desk: Desk) -> None:
    """The change under way is not undone by a cancelled await, and it is not made twice."""
    request = desk.ask(HOME)
    number = desk.number(request)
    flow = AsyncWorkflow(desk.flow)
    step = Gate()
    announce = desk.outbox.change_applied

    def slow(*args: Any) -> None:
        step()
        announce(*args)

    desk.outbox.change_applied = slow  # type: ignore[assignment, method-assign]

    async def main() -> None:
        try:
            task = await started(flow.confirm(ALICE, request.id, number))
            step.reached()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            step.let_go()
        comes_true(lambda: at_rest(flow._executor))
        with pytest.raises(Exception, match="confirmed"):
            await flow.confirm(ALICE, request.id, number)

    asyncio.run(main())
    assert desk.held() == [HOME]


def test_a_workflow_is_made_from_one_or_as_one(desk: Desk) -> None:
    """A workflow is shared as it is, beside nothing else; mistakes are told as Workflow does."""
    assert AsyncWorkflow(desk.flow).flow is desk.flow
    with pytest.raises(InvalidValue, match="is a workflow"):
        AsyncWorkflow(desk.flow, desk.outbox)
    with pytest.raises(InvalidValue):
        AsyncWorkflow(desk.store)
    with pytest.raises(InvalidValue):
        AsyncWorkflow(desk.store, desk.outbox)
    with pytest.raises(InvalidValue, match="waiting"):
        AsyncWorkflow(desk.flow, waiting=-1)


# -- the threads ----------------------------------------------------------------------------------


def test_calls_keep_their_callers_context() -> None:
    """What a host keeps in a context variable, such as a request's id, is there on the thread."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def main() -> None:
        variable.set(7)
        assert await Executor(1, 0).run(variable.get) == 7

    asyncio.run(main())


def test_idle_threads_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while without work they are gone; the next call starts one again."""
    monkeypatch.setattr(_executor, "_IDLE_TIMEOUT", 0.001)
    executor = Executor(2, 0)
    for _ in range(3):
        assert asyncio.run(executor.run(lambda: 5)) == 5
        comes_true(lambda: not executor._workers)


def test_one_thread_serves_what_comes_one_after_another() -> None:
    """A thread that is idle takes the next call; no other is started."""
    executor = Executor(4, 4)
    names = {asyncio.run(executor.run(threading.get_ident)) for _ in range(20)}
    assert (len(names), len(executor._workers)) == (1, 1)


def test_where_no_thread_is_to_be_had(memory: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any it is StoreUnavailable, and a denial; with one at work, calls wait for that."""
    guard = guarded(memory, threads=2, waiting=1)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            assert (await guard.check("jsmith", HOME)).reason is Reason.STORE_UNAVAILABLE
            with pytest.raises(StoreUnavailable, match="no thread"):
                await guard.sync()
            assert at_rest(guard._logins, guard._others)
        with gate(memory.store.before_load) as hanging:
            first = await started(guard.check("jsmith", HOME))
            hanging.reached()
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                second = await started(guard.check("adoe", HOME))
        assert await first
        assert await second

    asyncio.run(main())


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    """The interpreter exits while a load hangs for good."""
    code = """
import asyncio, threading, ipguard
from ipguard.aio import AsyncGuard
store = ipguard.open_store("memory://")
reached = threading.Event()
def hang(name):
    reached.set()
    threading.Event().wait()
store.load_policy = hang
async def main():
    task = asyncio.create_task(AsyncGuard(store).is_allowed("jsmith", "203.0.113.7"))
    await asyncio.sleep(0)
    reached.wait()
    task.cancel()
asyncio.run(main())
print("out")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("out\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(tmp_path: Path) -> None:
    """All places of the parent are taken by calls that hang: the child answers, and so it does."""
    clock = FakeClock()
    with open_store(f"sqlite:///{tmp_path / 'fork.db'}", clock=clock) as store:
        world = World(store, clock)
        guard = guarded(world, threads=1, waiting=1)
        world.restrict("jsmith", HOME)

        async def hang(hanging: Gate) -> None:
            tasks = [await started(guard.check(name, HOME)) for name in ("a", "b")]
            hanging.reached()
            assert not await guard.is_allowed("jsmith", HOME)
            tasks[0].cancel()

        async def ask() -> list[bool]:
            return [await guard.is_allowed("jsmith", HOME), await guard.is_allowed("jsmith", "::1")]

        asyncio.run(guard.sync())
        with gate(world.store.before_load) as hanging:
            asyncio.run(hang(hanging))
            assert in_child(lambda: asyncio.run(ask())) == [True, False]
        comes_true(lambda: at_rest(guard._logins))
        assert asyncio.run(ask()) == [True, False]


# -- gevent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("patched", [True, False])
def test_threads_patched_by_gevent_are_refused(
    patched: bool, memory: World, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where threads are greenlets, both classes say so when they are made; gevent alone is fine."""
    fake: Any = types.ModuleType("gevent.monkey")
    fake.is_module_patched = lambda name: patched and name == "threading"
    monkeypatch.setitem(sys.modules, "gevent.monkey", fake)
    make: Callable[[], object]
    for make in (lambda: AsyncGuard(memory.store), lambda: AsyncWorkflow(desk.flow)):
        if patched:
            with pytest.raises(InvalidValue, match="gevent"):
                make()
        else:
            make()


@pytest.mark.slow
def test_a_guard_works_under_gevent(tmp_path: Path) -> None:
    """All patched: guard, refresher and workflow go on in greenlets; the async ones are refused."""
    pytest.importorskip("gevent")
    code = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent, ipguard
from ipguard.aio import AsyncGuard
from ipguard.testing import Outbox
boss = ipguard.Actor(username="boss", email="b@x.example", manages=ipguard.Actor.EVERY_ACCOUNT)
for url in ("memory://", f"sqlite:///{sys.argv[1]}/gevent.db"):
    with ipguard.open_store(url) as store, ipguard.Guard(store) as guard:
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        names = [f"user{n}" for n in range(100)]
        store.put_users(
            [ipguard.User(username=name, full_name="X", account_id="U1") for name in names]
        )
        def one(name):
            applied = flow.impose(boss, name, "203.0.113.7", reason="x")
            assert guard.wait_for(applied.revision, 30)
            return guard.is_allowed(name, "203.0.113.7"), guard.is_allowed(name, "203.0.113.8")
        jobs = [gevent.spawn(one, name) for name in names]
        gevent.joinall(jobs, timeout=60)
        assert [job.value for job in jobs] == [(True, False)] * 100
        assert guard.stats().woken_by == "refresher"
        try:
            AsyncGuard(guard)
        except ipguard.InvalidValue as refused:
            print(refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is patched by gevent") == 2
