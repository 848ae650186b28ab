"""What recording logins costs a login, and what a flood of them costs the process and the store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks import fixtures as fx
from benchmarks.measure import Fact, Part, Row, Scale, Subject, Work, resident
from ipguard import Guard, RestrictionStore, Sighting

_SALT = bytes(16)
_REAL = 100


def _hash() -> None:
    """Check a password; hosts use a slower hash, beside which the rest would cost even less."""
    hashlib.scrypt(b"correct horse", salt=_SALT, n=2**11, r=8, p=1)


class Counting:
    """A store around a store, which counts the batches of sightings."""

    def __init__(self, store: RestrictionStore) -> None:
        self._store = store
        self.batches = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def record_sightings(self, seen: Sequence[Sighting]) -> tuple[Sighting, ...]:
        self.batches += 1
        return self._store.record_sightings(seen)


def _login(guard: Guard, *, hashed: bool, seen: bool) -> Callable[[str, str], bool]:
    def ask(username: str, address: str) -> bool:
        if hashed:
            _hash()
        decision = guard.check(username, address)
        if seen:
            guard.saw(username, address, decision)
        return decision.allowed

    return ask


def costs(scale: Scale) -> Part:
    """A login of many users at random, with and without a sighting, on SQLite."""
    count = min(scale.stored, 1_000)

    def work(*, hashed: bool, seen: bool) -> Work:
        guard = Guard(fx.filled(f"sqlite:///{fx.scratch() / 'seen.db'}", count), max_staleness=3600)
        fx.fill(guard, count)
        return fx.asking(_login(guard, hashed=hashed, seen=seen), fx.at_random(count))

    def facts() -> Iterator[Fact]:
        store = Counting(fx.filled(f"sqlite:///{fx.scratch() / 'flood.db'}", _REAL))
        guard = Guard(store, max_staleness=3600)  # type: ignore[arg-type]
        real = fx.homes(_REAL)
        fx.fill(guard, _REAL)
        total, before, began = 50 * scale.flooded, resident(), time.monotonic()
        for number in range(total):
            guard.saw(f"invented{number}", fx.home(number), True)  # noqa: FBT003
            if number % (total // _REAL) == 0:
                username, address = real[number // (total // _REAL) % _REAL]
                guard.saw(username, address, True)  # noqa: FBT003
        took, batches, after = time.monotonic() - began, store.batches, resident()
        guard.close()
        kept = sum(bool(store._store.sightings(username)) for username, _ in real)  # noqa: SLF001
        yield "memory", max(0, after - before), None
        yield "batches", max(0, batches - 1) / took, None
        yield "gone", _REAL - kept, None

    return Part(
        title="Sightings",
        rows=[
            Row("a login with a sighting", "without", "login, seen", 1.1),
            Row("a check alone with a sighting", "without", "check, seen", None),
            Row("memory for a flood of sightings", "", "memory", 64e6, judged="ours", unit="B"),
            Row("batches a second in the flood", "", "batches", 2.1, judged="ours", unit=""),
            Row("real users without a sighting after it", "", "gone", 0, judged="ours", unit=""),
        ],
        subjects=[
            Subject("login", lambda: work(hashed=True, seen=False)),
            Subject("login, seen", lambda: work(hashed=True, seen=True)),
            Subject("check", lambda: work(hashed=False, seen=False)),
            Subject("check, seen", lambda: work(hashed=False, seen=True), "check"),
        ],
        facts=facts,
        slot=20.0,
    )
