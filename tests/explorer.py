"""An explorer of schedules: it runs threads one at a time, and tries every order of their steps.

A step is an access to something that threads share: a lock, a clock, a field that is read without
a lock. Threads announce a step by calling `step` or by using the locks below, and are switched only
there. `explore` tries each schedule with at most `bound` forced switches (a switch away from a
thread that could have gone on), depth first, each from a new scenario.

Schedules that differ only in the order of independent steps lead to the same state. Each thread has
a digest of its steps so far and of the steps of others that they depend on: a read depends on the
last write, a write on the last write and on all reads since. A step whose digests, thread and
remaining switches were seen before is not taken again. So each class of schedules is run once, and
the work done between two steps must not depend on anything shared that was not announced.

A thread that was forced off goes on only once others have taken a step that its own next step
depends on. Otherwise that step could as well come first, and the switch after it.

A step whose objects no other thread accesses, or which all threads only read, is independent of all
others, and is no place for a switch. `Contended` learns who accesses what: with each new access the
exploration begins again.
"""

from __future__ import annotations

import _thread
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Self

Body = Callable[[], object]
Key = tuple[tuple[int, ...], int, tuple[int, ...]]

EVERYTHING: Final = ("everything",)
"""The object of a step that depends on all steps before it."""


class Abandoned(BaseException):
    """Ends a thread whose schedule is over."""


class Op(NamedTuple):
    """A step that a thread is about to take."""

    what: str
    reads: tuple[object, ...] = ()
    writes: tuple[object, ...] = ()
    lock: Lock | None = None  # which must be free
    patient: bool = True  # whether it waits for that lock as long as it takes
    after: Task | None = None  # which must have ended
    release: tuple[object, ...] = ()  # the lock that is released

    def conflicts(self, other: Op) -> bool:
        """Return whether the order of two steps matters."""
        if self.after or other.after or EVERYTHING in (self.writes, other.writes, self.reads):
            return True
        for each in self.writes:
            if each in other.writes or each in other.reads:
                return True
        return any(each in other.writes for each in self.reads)


class Worker:
    """An operating-system thread, used by one task after the other."""

    def __init__(self) -> None:
        self._wake = _thread.allocate_lock()
        self._wake.acquire()
        self._job: Body | None = None
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            job, self._job = self._job, None
            if job is None:
                return
            job()
            del job

    def begin(self, job: Body | None) -> None:
        self._job = job
        self._wake.release()

    def resume(self) -> None:
        self._wake.release()

    def pause(self) -> None:
        self._wake.acquire()


class Task:
    """One thread of a schedule."""

    def __init__(self, index: int, name: str, body: Body) -> None:
        self.index = index
        self.name = name
        self.body = body
        self.op = Op("starts")
        self.digest = index
        self.worker: Worker | None = None
        self.done = False
        self.created = 0
        self.timed_out = False
        self.forced_off = False  # and nobody has taken a step since that its own depends on
        self.notes: dict[str, Any] = {}


class Contended:
    """Which threads, by number, read and write each object, as far as is known."""

    def __init__(self) -> None:
        self.size = 0
        self.threads: set[int] = set()
        self._readers: dict[object, set[int]] = {}
        self._writers: dict[object, set[int]] = {}
        self._tried: set[object] = set()
        self._answers: dict[object, bool] = {}

    def tried(self, lock: object) -> None:
        """Note that threads look whether a lock is held, so that it matters when it is released."""
        self._add(self._tried, lock)

    def _add(self, known: set[Any], new: object) -> None:
        if new not in known:
            known.add(new)
            self.size += 1
            self._answers.clear()

    def concerns(
        self,
        reads: tuple[object, ...],
        writes: tuple[object, ...],
        release: tuple[object, ...],
        task: int,
        done: frozenset[int],
    ) -> bool:
        """Return whether the order of a step and the steps of threads that are left may matter."""
        question = reads, writes, release, task, done
        answer = self._answers.get(question)
        if answer is None:
            self._add(self.threads, task)
            for each in reads:
                self._add(self._readers.setdefault(each, set()), task)
            for each in writes:
                self._add(self._writers.setdefault(each, set()), task)
            # A thread that is not started yet counts as well.
            others = self.threads - done - {task}
            answer = self._answers[question] = self._concerns(reads, writes, release, others)
        return answer

    def _concerns(
        self,
        reads: tuple[object, ...],
        writes: tuple[object, ...],
        release: tuple[object, ...],
        others: set[int],
    ) -> bool:
        if reads is EVERYTHING or writes is EVERYTHING:
            return True
        if release and release not in self._tried:
            return False  # those that wait for the lock cannot tell
        none: set[int] = set()
        return any(
            not others.isdisjoint(self._writers.get(each, none)) for each in (*reads, *writes)
        ) or any(not others.isdisjoint(self._readers.get(each, none)) for each in writes)


class Point(NamedTuple):
    """A choice that was made, and the choices that are left."""

    chosen: int
    others: list[tuple[int, Key, int]]


class Schedule:
    """One run of the threads, along the given choices and then along new ones."""

    def __init__(
        self,
        bodies: Sequence[tuple[str, Body]],
        choices: Sequence[int],
        seen: dict[Key, int],
        workers: list[Worker],
        contended: Contended,
        *,
        bound: int,
        timeouts: bool = False,
    ) -> None:
        self.tasks = [Task(index, name, body) for index, (name, body) in enumerate(bodies)]
        self.current = self.tasks[0]
        self.points: list[Point] = []
        self.trace: list[tuple[str, str]] = []
        self.failure: str | None = None
        self.complete = False
        self.forked = False
        self._choices = choices
        self._seen = seen
        self._workers = workers
        self._contended = contended
        self._bound = bound
        self._timeouts = timeouts
        self._used = 0
        self._last: Task | None = None
        self._done: frozenset[int] = frozenset()
        self.over = False
        self._main = _thread.allocate_lock()
        self._main.acquire()
        self._writes: dict[object, int] = {}
        self._reads: dict[object, int] = {}

    # ------------------------------------------------------------------------------- the threads

    def run(self) -> None:
        """Run the threads until all have ended, or the rest was seen before."""
        chosen = self._choose()
        if chosen is not None:
            self._go(chosen)
            self._main.acquire()
        self.over = True
        self.complete = all(task.done or task.op.after is task for task in self.tasks)
        for task in self.tasks:
            if task.worker is not None and not task.done:
                self.current = task
                task.worker.resume()
                self._main.acquire()

    def _go(self, task: Task) -> None:
        self.current = task
        if task.worker is None:
            task.worker = self._workers.pop() if self._workers else Worker()
            task.worker.begin(lambda: self._job(task))
        else:
            task.worker.resume()

    def _job(self, task: Task) -> None:
        try:
            task.body()
        except Abandoned:
            pass
        except BaseException as error:
            self.failure = self.failure or f"{task.name} raises {type(error).__name__}: {error}"
        task.done = True
        self._done |= {task.index}
        assert task.worker is not None
        self._workers.append(task.worker)
        following = None if self.over or self.failure else self._choose()
        if following is None:
            self._main.release()
        else:
            self._go(following)

    def step(self, op: Op) -> bool:
        """Announce a step, and return when it may be taken; return whether the lock was had."""
        task = self.current
        if self.over:
            raise Abandoned
        if (
            op.after is None
            and self.is_independent(op.reads, op.writes, op.release)
            and self._ready_for(task, op)
        ):
            self.trace.append((task.name, op.what))
            return True
        task.op = op
        chosen = self._choose()
        if chosen is not task:
            assert task.worker is not None
            if chosen is None:
                self._main.release()
            else:
                self._go(chosen)
            task.worker.pause()
            if self.over:
                raise Abandoned
        return not task.timed_out

    def fail(self, why: str) -> None:
        """End this schedule, since a promise was broken."""
        if not self.over:
            self.failure = self.failure or why
        raise Abandoned

    def is_independent(
        self, reads: tuple[object, ...], writes: tuple[object, ...], release: tuple[object, ...]
    ) -> bool:
        """Return whether a step of the current thread commutes with all that others may do."""
        return not self._contended.concerns(reads, writes, release, self.current.index, self._done)

    def tried(self, lock: tuple[object, ...]) -> None:
        """Note that this thread looks whether a lock is held."""
        self._contended.tried(lock)

    def spawn(self, name: str, body: Body) -> Task:
        """Add a thread; it runs when it is chosen."""
        task = Task(len(self.tasks), name, body)
        task.digest = hash((self.current.digest, "spawns"))
        self.tasks.append(task)
        return task

    def vanish(self) -> None:
        """End all threads but the current one where they are, as in the child of a fork."""
        self.forked = True
        for task in self.tasks:
            if task is not self.current and not task.done:
                task.op = Op("does not exist", after=task)

    # ------------------------------------------------------------------------------- the choices

    def _ready(self, task: Task) -> bool:
        return self._ready_for(task, task.op)

    @staticmethod
    def _ready_for(task: Task, op: Op) -> bool:
        if op.after is not None:
            return op.after.done
        return op.lock is None or op.lock.is_free_for(task)

    def _choose(self) -> Task | None:
        """Choose who takes the next step; None if all have ended, or the rest was seen before."""
        if self.failure is not None:
            return None
        last = self._last
        if last is not None and (last.done or not self._ready(last)):
            last = None
        at = len(self.points)
        if at < len(self._choices):
            chosen = self._choices[at]
            self.points.append(Point(chosen, []))
        else:
            fresh = self._fresh_choices(last)
            if not fresh:
                return None
            (chosen, key, used), *others = fresh
            self._seen[key] = used
            self.points.append(Point(chosen, others))
        task = self.tasks[chosen if chosen >= 0 else ~chosen]
        if last is not None and task is not last:
            last.forced_off = True
        self._used += self._cost(chosen, last)
        self._commit(task, chosen, self._digest_after(chosen))
        self._last = task
        return task

    @staticmethod
    def _cost(choice: int, last: Task | None) -> int:
        return int(choice < 0 or (last is not None and last.index != choice))

    def _fresh_choices(self, last: Task | None) -> list[tuple[int, Key, int]]:
        """Return the choices that lead to something new, each with its key and the switches used.

        The first goes on with the last thread, if that can go on.
        """
        live = [task for task in self.tasks if not task.done]
        ready = [task for task in live if self._ready(task)]
        if not ready:
            waiting = [task for task in live if task.op.after is not task]
            if waiting:
                states = ", ".join(f"{task.name} {task.op.what}" for task in waiting)
                self.failure = f"no thread can run: {states}"
            return []
        choices = [task.index for task in ready if not task.forced_off]
        if last is not None:
            choices.remove(last.index)
            choices.insert(0, last.index)
        if self._timeouts:
            choices += [
                ~task.index for task in live if not task.op.patient and not self._ready(task)
            ]
        fresh = []
        for choice in choices:
            used = self._used + self._cost(choice, last)
            if used <= self._bound:
                key = self._key_after(choice, last)
                if self._seen.get(key, self._bound + 1) > used:
                    fresh.append((choice, key, used))
        return fresh

    def _digest_after(self, choice: int) -> int:
        task = self.tasks[choice if choice >= 0 else ~choice]
        op = task.op
        if op.writes is EVERYTHING or op.reads is EVERYTHING:
            return hash((op.what, tuple([each.digest for each in self.tasks])))
        writes, reads = self._writes, self._reads
        return hash(
            (
                task.digest,
                op.what,
                choice,
                tuple([writes.get(each) for each in op.reads]),
                tuple([(writes.get(each), reads.get(each)) for each in op.writes]),
            )
        )

    def _key_after(self, choice: int, last: Task | None) -> Key:
        index = choice if choice >= 0 else ~choice
        op = self.tasks[index].op
        digests = tuple(
            [
                each.digest if each.index != index else self._digest_after(choice)
                for each in self.tasks
            ]
        )
        forced_off = tuple(
            [
                each.index
                for each in self.tasks
                if each.index != index
                and (each.forced_off or each is last)
                and not op.conflicts(each.op)
            ]
        )
        return digests, index, forced_off

    def _commit(self, task: Task, choice: int, digest: int) -> None:
        op = task.op
        task.digest = digest
        task.timed_out = choice < 0
        task.forced_off = False
        for each in op.reads:
            self._reads[each] = self._reads.get(each, 0) + digest
        for each in op.writes:
            self._writes[each] = digest
            self._reads[each] = 0
        for other in self.tasks:
            if other.forced_off and op.conflicts(other.op):
                other.forced_off = False
        self.trace.append((task.name, op.what if choice >= 0 else op.what + " in vain"))


_schedule: Schedule | None = None


def running() -> Schedule | None:
    """Return the schedule that is being run, or None."""
    return _schedule


def step(what: str, *, reads: tuple[object, ...] = (), writes: tuple[object, ...] = ()) -> None:
    """Announce a step of the thread that calls; do nothing if no schedule is being run."""
    run = _schedule
    if run is not None:
        if run.over or not run.is_independent(reads, writes, ()):
            run.step(Op(what, reads, writes))
        else:
            run.trace.append((run.current.name, what))


def fail(why: str) -> None:
    """End this schedule: what the guard promises does not hold."""
    assert _schedule is not None, why
    _schedule.fail(why)


# ----------------------------------------------------------------------------------------- locks


class Lock:
    """A lock whose acquisition and release are steps."""

    reentrant = False

    def __init__(self) -> None:
        task = None if _schedule is None else _schedule.current
        if task is None:
            self.name: tuple[object, ...] = ("lock", next(_numbers))
        else:
            task.created += 1
            self.name = ("lock", task.index, task.created)
        self.owner: object = None
        self.depth = 0

    def is_free_for(self, task: object) -> bool:
        return self.owner is None or (self.reentrant and self.owner is task)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        run = _schedule
        waits = blocking and timeout != 0
        if run is None:
            me: object = "main"
        else:
            me = run.current
            op = Op("acquires", writes=(self.name,), lock=self if waits else None)
            if not waits:
                run.tried(self.name)
            if not run.step(op._replace(patient=timeout < 0)):
                return False
        if not self.is_free_for(me):
            assert not waits, "a lock was left locked"
            return False
        self.owner, self.depth = me, self.depth + 1
        return True

    def release(self) -> None:
        if _schedule is not None:
            _schedule.step(Op("releases", writes=(self.name,), release=self.name))
        if self.owner is None:
            raise RuntimeError("release of a lock that is free")
        self.depth -= 1
        if not self.depth:
            self.owner = None

    def locked(self) -> bool:
        if _schedule is not None:
            _schedule.tried(self.name)
        step("looks whether a lock is held", reads=(self.name,))
        return self.owner is not None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class ReentrantLock(Lock):
    """The same for a lock that its owner may take again."""

    reentrant = True

    def owned(self) -> bool:
        return self.owner is ("main" if _schedule is None else _schedule.current)


class Thread:
    """A thread that a scenario's thread starts."""

    def __init__(self, *, target: Body, name: str, daemon: bool) -> None:
        self._target = target
        self._name = name
        self._task: Task | None = None

    def start(self) -> None:
        assert _schedule is not None
        self._task = _schedule.spawn(self._name, self._target)

    def is_alive(self) -> bool:
        if self._task is None:
            return False
        step("looks whether a thread runs", reads=EVERYTHING)
        return not self._task.done

    def join(self, timeout: float | None = None) -> None:
        if _schedule is not None:
            _schedule.step(Op("joins", after=self._task, patient=timeout is None))


_numbers = itertools.count()

# ------------------------------------------------------------------------------------ exploring


class Outcome(NamedTuple):
    """What an exploration found.

    Attributes:
        schedules: How many schedules were run, those included that ended in a known state.
        failure: The first broken promise, or None.
        trace: The steps that led to it.
    """

    schedules: int
    failure: str | None
    trace: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"schedule {self.schedules}: {self.failure}"]
        for name, steps in itertools.groupby(self.trace, key=lambda each: each[0]):
            lines.append(f"  {name}: {', '.join(what for _, what in steps)}")
        return "\n".join(lines)


class Scenario:
    """Something new for each schedule: subclass it, prepare in `__init__`."""

    timeouts = False

    def threads(self) -> Sequence[tuple[str, Body]]:
        """Return the threads, with their names."""
        raise NotImplementedError

    def finish(self) -> None:
        """Check what must hold when all threads have ended; raise AssertionError if not."""


def explore(new: Callable[[], Scenario], *, bound: int, limit: int | None = None) -> Outcome:
    """Run all schedules of a scenario, until one breaks a promise or `limit` were run."""
    count = 0
    gc.freeze()  # each run leaves garbage; what was there before need not be searched for it
    try:
        for count, failure, trace in _runs(new, bound):
            if failure is not None or count == limit:
                return Outcome(count, failure, trace)
    finally:
        gc.unfreeze()
    return Outcome(count, None, [])


def _runs(
    new: Callable[[], Scenario], bound: int
) -> Iterator[tuple[int, str | None, list[tuple[str, str]]]]:
    global _numbers  # noqa: PLW0603
    seen: dict[Key, int] = {}
    workers: list[Worker] = []
    path: list[Point] = []
    contended = Contended()
    known = 0
    try:
        for count in itertools.count(1):
            choices = [point.chosen for point in path]
            _numbers = itertools.count()  # so that locks have the same names in each run
            scenario = new()
            run = Schedule(
                scenario.threads(),
                choices,
                seen,
                workers,
                contended,
                bound=bound,
                timeouts=scenario.timeouts,
            )
            _run(run, scenario)
            yield count, run.failure, run.trace
            if contended.size > known:
                known = contended.size
                path.clear()
                seen.clear()
                continue
            path += run.points[len(path) :]
            while path:
                others = path.pop().others
                while others:
                    chosen, key, used = others.pop(0)
                    if seen.get(key, bound + 1) > used:
                        seen[key] = used
                        path.append(Point(chosen, others))
                        break
                else:
                    continue
                break
            else:
                return
    finally:
        for worker in workers:
            worker.begin(None)


def _run(run: Schedule, scenario: Scenario) -> None:
    global _schedule  # noqa: PLW0603
    _schedule = run
    try:
        run.run()
    finally:
        _schedule = None
    if run.failure is None and run.complete:
        try:
            scenario.finish()
        except AssertionError as error:
            run.failure = f"afterwards: {error}".splitlines()[0]
