"""Tests of AsyncGuard and AsyncWorkflow."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import itertools
import os
import random
import subprocess
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ipguard import (
    EVERYBODY,
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


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def started(coroutine: Any) -> asyncio.Task[Any]:
    """Return a task that has come to its first await."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


def at_rest(*executors: Executor) -> bool:
    return all(each._busy == 0 and not each._queue for each in executors)


# -- on the event loop ----------------------------------------------------------------------------


@in_event_loop
async def test_same_decisions_as_a_guard(world: World) -> None:
    world.restrict("jsmith", HOME)
    world.restrict("temp", HOME, expires_in=100)
    plain, guard = world.guard(), guarded(world)
    questions: list[tuple[Any, Any]] = [
        (name, address)
        for name in ("jsmith", "JSmith", "temp", "stranger", "", " x", None)
        for address in (HOME, OFFICE, "::1", "nonsense", None, 5)
    ]
    for name, address in questions * 2:
        expected = plain.check(name, address)
        assert await guard.check(name, address) == expected
        assert await guard.is_allowed(name, address) is expected.allowed
        assert (await guard.explain(name, address)).decision.allowed is expected.allowed
    assert guard.stats().denials == {
        reason: 2 * count for reason, count in plain.stats().denials.items()
    }


@in_event_loop
async def test_remembered_users_never_leave_the_event_loop(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = guarded(world)
    assert await guard.is_allowed("jsmith", HOME)
    loads, syncs = len(world.store.loads), len(world.store.syncs)
    guard._logins._submit = lambda call: pytest.fail("the call left the event loop")  # type: ignore[method-assign]
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


@in_event_loop
async def test_failing_clock_of_the_store_denies(memory: World) -> None:
    memory.restrict("jsmith", HOME, expires_in=60)
    guard = guarded(memory, threads=1, waiting=0)

    def fail() -> None:
        raise ZeroDivisionError

    await guard.is_allowed("jsmith", HOME)
    memory.store.at_now.extend([fail] * 2)  # on the loop, then on the thread
    assert (await guard.check("jsmith", HOME)).reason is Reason.STORE_UNAVAILABLE
    with gate(memory.store.before_load) as hanging:
        load = await started(guard.check("adoe", HOME))
        hanging.reached()
        memory.store.at_now.extend([fail] * 2)  # on the loop, twice: no thread is free
        assert (await guard.check("jsmith", HOME)).reason is Reason.STORE_UNAVAILABLE
    await load
    assert await guard.is_allowed("jsmith", HOME)


@in_event_loop
async def test_open_circuit_breaker_answers_on_the_event_loop(memory: World) -> None:
    """Within `outage_grace`, remembered users get stale answers."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, outage_grace=10)
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


# -- on threads -----------------------------------------------------------------------------------


@in_event_loop
async def test_load_that_hangs_does_not_block_the_event_loop(world: World) -> None:
    world.restrict("jsmith", HOME)
    world.restrict("adoe", HOME)
    guard = guarded(world)
    await guard.is_allowed("jsmith", HOME)
    with gate(world.store.before_load) as hanging:
        slow = await started(guard.is_allowed("adoe", HOME))
        hanging.reached()
        assert await guard.is_allowed("jsmith", HOME)
        assert not slow.done()
    assert await slow


@in_event_loop
async def test_full_queue_denies_at_once(world: World) -> None:
    world.restrict("jsmith", HOME)
    guard = guarded(world, threads=1, waiting=1)
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


@in_event_loop
async def test_calls_about_one_user_take_one_thread(world: World) -> None:
    """Ten thousand calls, one thread, no queue and one read."""
    world.restrict("jsmith", HOME)
    guard = guarded(world, threads=1, waiting=0)
    wanted = [HOME, ELSEWHERE] * 5_000
    await guard.sync()
    answers = await asyncio.gather(*(guard.is_allowed("jsmith", each) for each in wanted))
    assert answers == [each == HOME for each in wanted]
    assert not guard._asking
    assert world.store.loads == ["jsmith"]


@pytest.mark.parametrize("in_line", [True, False])
@in_event_loop
async def test_cancelling_the_first_call_does_not_cancel_the_waiters(
    memory: World, in_line: bool
) -> None:
    guard = guarded(memory, threads=2, waiting=1)
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
    assert memory.store.loads.count("jsmith") == 1


def test_closed_event_loop_is_freed(memory: World) -> None:
    guard = guarded(memory, threads=1)
    guard.guard.sync()
    loops = []
    with gate(memory.store.before_load) as hanging:
        for name in ("jsmith", "adoe"):  # one runs, the other waits in the queue
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


@in_event_loop
async def test_wait_for_keeps_its_timeout_while_the_store_hangs(memory: World) -> None:
    guard = guarded(memory, threads=1, waiting=0)
    with gate(memory.store.before_sync) as hanging:
        assert not await guard.wait_for(1, 0.01)
        hanging.reached()
        comes_true(lambda: at_rest(guard._others))
        assert not await guard.wait_for(1, 0.01)
    assert await guard.wait_for(memory.restrict("jsmith"), 30)
    assert len(memory.store.syncs) <= 2


@in_event_loop
async def test_waiter_that_needs_a_later_revision_asks_itself(memory: World) -> None:
    revision = memory.restrict("jsmith", HOME)
    guard = guarded(memory)
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


@in_event_loop
async def test_waiter_of_a_call_that_hangs_gives_up(memory: World) -> None:
    guard = guarded(memory, threads=1, waiting=0, max_staleness=0.1)
    with gate(memory.store.before_load) as hanging:
        first = await started(guard.check("jsmith", HOME))
        hanging.reached()
        decision = await guard.check("jsmith", HOME)
        assert decision.reason is Reason.STORE_UNAVAILABLE
        assert not first.done()
    assert await first


def test_subclass_of_str_as_a_username(memory: World) -> None:
    class Loud(str):
        __slots__ = ()

        def __hash__(self) -> int:
            raise ZeroDivisionError

    memory.restrict("jsmith", HOME)
    guard = guarded(memory)
    assert asyncio.run(guard.is_allowed(Loud("jsmith"), HOME))
    assert not asyncio.run(guard.is_allowed(Loud("jsmith"), ELSEWHERE))


@in_event_loop
async def test_full_queue_within_the_outage_grace(memory: World) -> None:
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, threads=1, waiting=0, outage_grace=10)
    await guard.is_allowed("jsmith", HOME)
    memory.pass_time(5)
    with gate(memory.store.before_sync) as hanging:
        first = await started(guard.check("mary", HOME))
        hanging.reached()
        decision = await guard.check("jsmith", HOME)
        assert (decision.allowed, decision.stale) == (True, True)
        assert not await guard.is_allowed("adoe", HOME)
    await first


@in_event_loop
async def test_at_least(world: World) -> None:
    world.restrict("jsmith", OFFICE)
    guard = guarded(world)
    assert not await guard.is_allowed("jsmith", HOME)
    revision = world.restrict("jsmith", HOME)
    assert (await guard.check("jsmith", HOME)).reason is Reason.NOT_LISTED
    decision = await guard.check("jsmith", HOME, at_least=revision)
    assert (decision.allowed, decision.revision) == (True, revision)
    later = await guard.check("jsmith", HOME, at_least=revision + 1)
    assert later.reason is Reason.STORE_UNAVAILABLE
    assert (await guard.check("jsmith", HOME, "5")).reason is Reason.STORE_UNAVAILABLE


@in_event_loop
async def test_wait_for(world: World) -> None:
    guard = guarded(world)
    assert guard.revision == 0
    revision = world.restrict("jsmith", HOME)
    assert await guard.wait_for(revision, 30)
    assert await guard.wait_for(revision, 0)
    assert await guard.sync() == guard.revision == revision
    assert not await guard.wait_for(revision + 1, 0.01)
    assert not await guard.wait_for(revision + 1, -1)
    with pytest.raises(InvalidValue):
        await guard.wait_for(revision, "1")


@in_event_loop
async def test_wait_for_does_not_take_a_login_thread(memory: World) -> None:
    guard = guarded(memory, threads=1, waiting=1, max_staleness=0.02)
    with gate(memory.store.before_sync) as hanging:
        hung = await started(guard.sync())
        hanging.reached()
        assert not await guard.wait_for(1, 0.01)  # waits in the queue
        second = await started(guard.explain("jsmith", HOME))
        assert not await guard.wait_for(1, 1000)  # the queue is full
        with pytest.raises(StoreUnavailable):
            await guard.sync()
        assert await guard.is_allowed("jsmith", HOME)
    assert await hung == 0
    assert (await second).decision


@in_event_loop
async def test_explain_and_sync_raise_as_a_guard(memory: World) -> None:
    guard = guarded(memory)
    memory.store.down = OSError("cable")
    with pytest.raises(StoreUnavailable, match="cable"):
        await guard.explain("jsmith", HOME)
    with pytest.raises(StoreUnavailable, match="cable"):
        await guard.sync()


@in_event_loop
async def test_healthy(memory: World) -> None:
    guard = guarded(memory, threads=1, waiting=0)
    assert await guard.healthy()
    memory.pass_time(5)
    assert await guard.healthy()
    with gate(memory.store.before_load) as held:
        explaining = await started(guard.explain("jsmith", HOME))
        held.reached()
        assert await guard.healthy()  # no thread is free: the lease runs
        memory.pass_time(5)
        assert not await guard.healthy()
        held.let_go()
        await explaining
    memory.store.down = StoreUnavailable("down")
    assert not await guard.healthy(timeout=0.1)


# -- followers ------------------------------------------------------------------------------------


@in_event_loop
async def test_follow(world: World) -> None:
    """From the call on; each change is one item, and the answer is the new one."""
    world.register("jsmith")
    async with guarded(world, max_staleness=3600) as guard:
        assert await guard.is_allowed("jsmith", HOME)
        changes = guard.follow()
        revision = world.restrict("jsmith", OFFICE)
        assert await anext(changes) == (frozenset({"jsmith"}), revision)
        assert not await guard.is_allowed("jsmith", HOME)
        latest = world.touch()
        async for usernames, revision in changes:
            assert (usernames, revision) == (EVERYBODY, latest)
            break


@in_event_loop
async def test_follower_that_is_not_used_any_more(memory: World) -> None:
    """It is removed whether it was closed, cancelled, or never started."""
    guard = guarded(memory)
    callbacks = guard.guard._followers._callbacks
    closed, waiting, unused = guard.follow(), guard.follow(), guard.follow()
    assert len(callbacks) == 3
    task = await started(anext(waiting))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await closed.aclose()
    del closed, waiting, unused, task
    await asyncio.sleep(0)  # the loop lets go of the task
    assert not callbacks


@in_event_loop
async def test_follower_that_does_not_read(memory: World) -> None:
    """The memory that it takes is bounded."""
    guard = guarded(memory)
    await guard.sync()
    changes = guard.follow()
    for _ in range(30):
        memory.touch(*(f"u{n}" for n in range(50)))
        await guard.sync()
    await asyncio.sleep(0)
    assert await anext(changes) == (EVERYBODY, 21)
    assert (await anext(changes))[1] == 22


def test_follower_of_a_closed_loop_is_removed(memory: World) -> None:
    guard = guarded(memory)

    async def follow() -> Any:
        return guard.follow()

    changes = asyncio.run(follow())
    guard.guard.sync()
    memory.restrict("jsmith", HOME)
    guard.guard.sync()
    assert not guard.guard._followers._callbacks
    del changes


# -- observer, report_only, start and close -------------------------------------------------------


@in_event_loop
async def test_observer_is_called_once_on_the_event_loop(memory: World) -> None:
    memory.restrict("jsmith", HOME)
    calls: list[tuple[object, object, Decision, int]] = []
    guard = guarded(memory, observer=lambda *args: calls.append((*args, threading.get_ident())))
    decisions = [await guard.check("jsmith", address) for address in (HOME, HOME, OFFICE)]
    assert await guard.is_allowed("jsmith", HOME)
    assert [each[2] for each in calls] == [*decisions, decisions[0]]
    assert {each[3] for each in calls} == {threading.get_ident()}


@in_event_loop
async def test_async_with_starts_and_stops_the_refresher(world: World) -> None:
    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name.startswith("ipguard-")}

    before = threads()
    guard = AsyncGuard(world.inner)
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
    comes_true(lambda: threads() <= before)


def test_constructor_of_the_guard(memory: World) -> None:
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


def test_guard_with_overridden_methods_is_refused(memory: World) -> None:
    """The overridden methods would not be called."""

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


@in_event_loop
async def test_call_cancelled_in_the_queue_is_withdrawn(memory: World) -> None:
    guard = guarded(memory, threads=1, waiting=1)
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


@in_event_loop
async def test_call_cancelled_on_a_thread_runs_to_its_end(memory: World) -> None:
    """The policy it read is remembered, and its thread is free afterwards."""
    memory.restrict("jsmith", HOME)
    guard = guarded(memory, threads=1, waiting=0)
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


def test_call_cancelled_as_a_thread_takes_it_is_not_made() -> None:
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
    """Read and write, cancelled at random; then check the threads and the workflow."""
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
    assert ended["NoneType"]  # the points are spread
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


def test_cancelled_at_random_points(tmp_path: Path, rounds: Any) -> None:
    store: Any = open_store(f"sqlite:///{tmp_path / 'cancel.db'}")
    cancel_at_random_points(store, rounds(200, 10_000))
    pool = store._pool
    comes_true(lambda: len(pool._idle) == len(pool._open))
    assert not pool.writing.locked()
    store.close()
    assert not pool._open


# -- the workflow ---------------------------------------------------------------------------------


@in_event_loop
async def test_workflow(desk: Desk) -> None:
    async with AsyncWorkflow(desk.store, desk.outbox, key=KEY) as flow:
        request = await flow.request(ALICE, "jsmith", HOME)
        assert isinstance(request, PendingRequest)
        applied = await flow.confirm(ALICE, request.id, desk.number(request))
        assert desk.held() == [HOME]
        assert isinstance(applied, Applied)
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


@in_event_loop
async def test_the_report_is_read_on_a_thread(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are those of the workflow, and the event loop reads none itself."""
    monkeypatch.setattr("ipguard.aio._LINES", 2)
    desk.add(HOME)
    expected = list(desk.flow.report(BOSS))
    threads = set()
    overview = desk.store.overview

    def noted(*args: Any, **more: Any) -> Any:
        threads.add(threading.current_thread().name)
        return overview(*args, **more)

    monkeypatch.setattr(desk.store, "overview", noted)
    flow = AsyncWorkflow(desk.flow)
    assert [line async for line in flow.report(BOSS)] == expected
    assert threads == {"ipguard-aio"}
    with pytest.raises(InvalidValue):
        await anext(flow.report(BOSS, unused=timedelta(days=91)))


def test_every_public_method_can_be_awaited() -> None:
    for name, method in inspect.getmembers(Workflow, inspect.isfunction):
        if name.startswith("_"):
            continue
        awaited = getattr(AsyncWorkflow, name)
        if name == "report":
            assert inspect.isasyncgenfunction(awaited)
        else:
            assert inspect.iscoroutinefunction(awaited)
        assert inspect.signature(awaited).parameters == inspect.signature(method).parameters
        assert awaited.__doc__
    for name, _ in inspect.getmembers(Guard, inspect.isfunction):
        plain = name in ("count_allows", "follow", "follow_refusals", "stats")
        if not (name.startswith("_") or "fork" in name or plain):
            assert inspect.iscoroutinefunction(getattr(AsyncGuard, name))


@in_event_loop
async def test_full_workflow_raises_store_unavailable(desk: Desk) -> None:
    flow = AsyncWorkflow(desk.flow, threads=1, waiting=0)
    step = Gate()
    desk.outbox.number_issued = lambda *args: step()  # type: ignore[method-assign]
    try:
        first = await started(flow.request(ALICE, "jsmith", HOME))
        step.reached()
        with pytest.raises(StoreUnavailable, match="too many"):
            await flow.request(ALICE, "mary", HOME)
    finally:
        step.let_go()
    await first
    assert len(desk.rows()) == 1 + 1  # the users, and one request


@in_event_loop
async def test_cancelled_confirm_is_applied_once(desk: Desk) -> None:
    """Trying again shows that it is confirmed."""
    request = desk.ask(HOME)
    number = desk.number(request)
    flow = AsyncWorkflow(desk.flow)
    step = Gate()
    announce = desk.outbox.change_applied

    def slow(*args: Any) -> None:
        step()
        announce(*args)

    desk.outbox.change_applied = slow  # type: ignore[assignment, method-assign]
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
    assert desk.held() == [HOME]


def test_constructor_of_the_workflow(desk: Desk) -> None:
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


@in_event_loop
async def test_context_variables_are_kept_on_the_thread() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(7)
    assert await Executor(1, 0).run(variable.get) == 7


def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_executor, "_IDLE_TIMEOUT", 0.001)
    executor = Executor(2, 0)
    for _ in range(3):
        assert asyncio.run(executor.run(lambda: 5)) == 5
        comes_true(lambda: not executor._workers)


@in_event_loop
async def test_no_thread_can_be_started(memory: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls wait for a thread that runs; without one they fail."""
    guard = guarded(memory, threads=2, waiting=1)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

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


def test_process_exits_while_a_load_hangs(tmp_path: Path) -> None:
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
def test_forked_child_has_its_own_threads(tmp_path: Path) -> None:
    """All threads of the parent hang."""
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


@in_event_loop
async def test_saw_stays_on_the_event_loop(memory: World) -> None:
    """It takes no thread of the guard's calls, and `close` writes what is waiting."""
    memory.register("jsmith")
    guard = guarded(memory)
    found: list[str] = []
    end = guard.follow_refusals(lambda sighting: found.append(sighting.address))
    await guard.saw("jsmith", HOME, await guard.check("jsmith", HOME))
    await guard.saw("jsmith", OFFICE, False)
    await guard.close()
    assert sorted(each.address for each in memory.inner.sightings("jsmith")) == sorted(
        (HOME, OFFICE)
    )
    assert found == [OFFICE]
    end()
    await guard.saw("jsmith", ELSEWHERE, False)
    await guard.close()
    assert found == [OFFICE]
    assert guard.stats().sightings_written == 3
