"""Mutants of the guard: each breaks one of its guarantees, and names a scenario that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from ipguard import guard as guard_room
from ipguard.guard import _fast_path, _lease, _preload, _refresher, _slow_path, _table
from tests import guard_scenarios as of
from tests.explored_guard import Explored, mutate

Guard = guard_room.Guard
Table, Position = _table.Table, _table.Position
SlowPath, SingleFlight = _slow_path.SlowPath, _slow_path.SingleFlight
Lease = _lease.Lease
Followers = _refresher.Followers


class Mutant(NamedTuple):
    """A guard that is broken in one way.

    Attributes:
        what: What is wrong with it.
        scenario: Where a schedule shows that.
        function: The function that is changed.
        replacements: Fragments of its source, and what is in their place.
    """

    what: str
    scenario: type[Explored]
    function: Any
    replacements: tuple[tuple[str, str], ...]

    def mutation(self) -> Callable[[pytest.MonkeyPatch], None]:
        return mutate(self.function, *self.replacements)


def mutant(
    what: str, scenario: type[Explored], function: Any, *replacements: tuple[str, str]
) -> Mutant:
    return Mutant(what, scenario, function, replacements)


_LOOKED = "return until, position.revision, held, row"

MUTANTS = (
    # 1. The reader.
    mutant(
        "fast path: the deadline is read after the look-up",
        of.LoginAndSync,
        _fast_path.bind,
        ("        until = table.deadline  # before the look-up, or a row dropped", "        #"),
        (
            "entry: Entry = table.rows[username]",
            "entry = table.rows[username]; until = table.deadline",
        ),
        ("(None, username, address, until)", "(None, username, address, 0.0)"),
    ),
    mutant(
        "fast path: the clock is compared with a newer deadline",
        of.LoginAndSync,
        _fast_path.bind,
        (
            "entry.text == address and monotonic() < until",
            "entry.text == address and monotonic() < table.deadline",
        ),
    ),
    mutant(
        "fast path: the clock is not read",
        of.LoginAndSync,
        _fast_path.bind,
        ("entry.text == address and monotonic() < until", "entry.text == address"),
    ),
    mutant(
        "first sight of a listed address: the clock is not read",
        of.FirstListed,
        _fast_path.bind,
        (
            "answer = True if monotonic() < until else None\n            if answer:",
            "answer = True\n            if answer:",
        ),
    ),
    mutant(
        "listed address of a preloaded user: the clock is not read",
        of.PreloadedListed,
        _fast_path.bind,
        (
            "answer = True if monotonic() < until else None\n            if answer is not",
            "answer = True\n            if answer is not",
        ),
    ),
    mutant(
        "first sight of an address: the clock is compared with a newer deadline",
        of.FirstSight,
        _fast_path.bind,
        (
            "reason is None or monotonic() >= until",
            "reason is None or monotonic() >= table.deadline",
        ),
    ),
    mutant(
        "slow path: no comparison with the deadline at the end",
        of.TemporaryAndSync,
        SlowPath._decide,
        ("if self._monotonic() >= until:", "if False:"),
    ),
    mutant(
        "recall: the deadline is read after the look-up",
        of.CheckAndSync,
        Table.look,
        (_LOOKED, "return self.deadline, position.revision, held, row"),
    ),
    mutant(
        "recall: the revision is read after the look-up",
        of.ReadYourWrites,
        Table.look,
        (_LOOKED, "return until, position.revision, self.position.revision, row"),
    ),
    mutant(
        "grace: the deadline is read after the look-up",
        of.GraceAndRecovery,
        Table.look,
        (_LOOKED, "return self.deadline, position.revision, held, row"),
    ),
    mutant(
        "recall: the position may have moved during the look-up",
        of.PreloadingAhead,
        Table.look,
        ("if self.position is position and self.find", "if self.find"),
    ),
    mutant(
        "recall: the row may be another one than its revision is of",
        of.OvertakenRead,
        Table.look,
        (" and self.find(name) is row", ""),
    ),
    # 2. The sync.
    mutant(
        "sync: the deadline is moved before rows are dropped",
        of.LoginAndSync,
        Table.apply,
        (
            "            known = self.position\n",
            (
                "            known = self.position\n"
                "            self.deadline = max(self.deadline, started + self._max_staleness)\n"
            ),
        ),
    ),
    mutant(
        "sync: the position is moved before rows are dropped",
        of.ReadYourWrites,
        Table.apply,
        (
            "                self._drop_changed(usernames)",
            (
                "                self.position = Position(head, token, known.history, 0)\n"
                "                self._drop_changed(usernames)"
            ),
        ),
    ),
    mutant(
        "sync: no row is dropped",
        of.LoginAndSync,
        Table.apply,
        ("self._drop_changed(usernames)", "pass"),
    ),
    mutant(
        "sync: the lease counts from the end of the read",
        of.TwoSyncs,
        Lease.sync,
        (
            "apply(cursor, changes, started, has_slept)",
            "apply(cursor, changes, self._monotonic(), has_slept)",
        ),
    ),
    mutant(
        "sync: an older read moves the position back",
        of.OverlappingSyncs,
        Table.apply,
        ("if known.cursor not in {cursor, (head, token)}:", "if False:"),
        ("elif head < known.revision:", "elif False:"),
    ),
    mutant(
        "sync: a read from an overtaken position is applied",
        of.TwoHistories,
        Table.apply,
        ("if known.cursor not in {cursor, (head, token)}:", "if False:"),
    ),
    mutant(
        "sync: positions are compared without their tokens",
        of.TwoHistories,
        Table.apply,
        (
            "if known.cursor not in {cursor, (head, token)}:",
            "if cursor and known.revision not in {cursor[0], head}:",
        ),
    ),
    mutant(
        "sync: a store that is behind renews the lease",
        of.Standby,
        Table.apply,
        ("elif head < known.revision:", "elif False:"),
    ),
    # 3. The load.
    mutant(
        "load: a row below the position is remembered (the stale fill)",
        of.ColdLogin,
        Table.remember,
        (" and revision >= position.revision", ""),
    ),
    mutant(
        "load: a row is remembered after a younger read of the same user",
        of.OvertakenRead,
        SingleFlight._read,
        (
            "if self._in_flight.get(name) is load:\n                    self",
            "if True:\n                    self",
        ),
    ),
    mutant(
        "load: a row of a lost history is remembered",
        of.LostAfterSync,
        Table.remember,
        ("began.history == position.history and ", ""),
    ),
    mutant(
        "load: every policy covers the syncs since",
        of.LostCommit,
        Position.covers,
        ("return revision <= self.revision or syncs <= self.syncs", "return True"),
    ),
    mutant(
        "load: a row that is ahead survives the next sync",
        of.LostCommit,
        Table.remember,
        ("if revision > began.revision:", "if False:"),
    ),
    mutant(
        "load: a row is ahead only of the position when it is remembered",
        of.ReplacedCommit,
        Table.remember,
        ("if revision > began.revision:", "if revision > position.revision:"),
        ("kept = began.covers(revision, position.syncs)", "kept = True"),
    ),
    mutant(
        "load: a policy below the revision of the call answers it",
        of.TwoLogins,
        SingleFlight.load,
        ("and load.revision >= revision", ""),
    ),
    mutant(
        "load: a waiter uses a policy of a lost history",
        of.ReplacedAfterSync,
        SingleFlight.load,
        ("load.position.history == self._table.position.history\n", "True\n"),
    ),
    mutant(
        "load: a waiter uses a policy that a sync has overtaken",
        of.ReplacedAtLeast,
        SingleFlight.load,
        ("and load.position.covers(load.revision, syncs)", ""),
    ),
    mutant(
        "load: the lease of a policy counts from the end of its read",
        of.LongRead,
        SingleFlight.load,
        ("load.started + self._max_staleness", "self._monotonic() + self._max_staleness"),
    ),
    mutant(
        "check: at_least is not compared with the remembered revision",
        of.ReadYourWrites,
        SlowPath.recall,
        ("if row is not None and revision >= wanted:", "if row is not None:"),
    ),
    mutant(
        "check: no sync is made for at_least",
        of.ReadYourWrites,
        Lease._holds,
        (" and self._table.position.revision >= revision", ""),
    ),
    # 4. Unrestricted is a policy like any other.
    mutant(
        "sync: an unrestricted user is not dropped",
        of.LoginAndSync,
        Table._drop_changed,
        (
            "            self._drop(name)",
            (
                "            if is_restricted(getattr(self.rows.get(name), 'row', OPEN)):\n"
                "                self._drop(name)"
            ),
        ),
    ),
    # 5. Temporary restrictions, and what a reader may leave behind.
    mutant(
        "slow path: an allow by a temporary restriction is noted",
        of.Temporary,
        SlowPath.answer,
        ("decision.allowed and not row[0] & TEMPORARY", "decision.allowed"),
    ),
    mutant(
        "slow path: an address is noted with another row",
        of.ColdLogin,
        Table.note,
        (" and entry.row is row", ""),
    ),
    mutant(
        "fast path: an address is noted with another row",
        of.FirstSight,
        _fast_path.bind,
        ("entry.text = address", "table.rows[username].text = address"),
    ),
    # 6. Another history.
    mutant(
        "sync: RESET drops nothing",
        of.Reset,
        Table.apply,
        ("if usernames is RESET or known.token is None:", "if known.token is None:"),
    ),
    mutant(
        "sync: EVERYBODY drops nothing",
        of.Everybody,
        Table.apply,
        (
            "                self._clear()\n            else:",
            "                pass\n            else:",
        ),
    ),
    # 8. Preload.
    mutant(
        "swap: users who changed meanwhile are not marked",
        of.Preloading,
        Table.swap_snapshot,
        ("rows[name] = PENDING", "pass"),
    ),
    mutant(
        "sync: users who change while a snapshot is read are not recorded",
        of.Preloading,
        Table._drop_changed,
        ("self.snapshot.changed.update(usernames)", "pass"),
    ),
    mutant(
        "preload: a snapshot of another revision is used",
        of.PreloadingLost,
        _preload.Preload._read,
        ("revision == snapshot.revision and ", ""),
    ),
    mutant(
        "preload: a snapshot that became invalid is used",
        of.PreloadingEverybody,
        Table._clear,
        ("self.snapshot = None", "pass"),
    ),
    mutant(
        "load: a row that is ahead of the snapshot is not recorded",
        of.PreloadingAhead,
        Table._note_ahead,
        ("(self.snapshot.changed if _known(row) else self.snapshot.strangers).add(name)", "pass"),
    ),
    mutant(
        "swap: strangers who were read ahead are not looked up",
        of.PreloadingStranger,
        Table.swap_snapshot,
        ("rows.keys() & snapshot.strangers", "set()"),
    ),
    mutant(
        "look-up: complete is read before the row",
        of.PreloadedAsk,
        Table.find,
        ("found = rows.get(name)", "complete = self.complete; found = rows.get(name)"),
        ("OPEN if rows is self.complete and", "OPEN if rows is complete and"),
    ),
    mutant(
        "drop: a row of a complete table is deleted",
        of.PreloadedChange,
        Table._drop,
        ("if self.complete is None or (bounded and self.deny_unknown):", "if True:"),
    ),
    mutant(
        "pending: a policy of an older revision is kept",
        of.PendingRead,
        Table.refresh,
        ("if same and revision == now.revision and wanted:", "if True:"),
    ),
    # 9. Fork.
    mutant(
        "fork: the child keeps the table's lock",
        of.ForkWithoutHooks,
        Table.after_fork,
        ("self._lock = _fork.ReentrantLock()", "pass"),
    ),
    mutant(
        "fork: the child keeps the turn to sync",
        of.Fork,
        Lease.after_fork,
        ("self._renew_locks()", "pass"),
    ),
    mutant(
        "fork: the child waits for reads of the parent",
        of.Fork,
        SingleFlight.after_fork,
        ("self._in_flight: dict[str, _Load] = {}", "self.__dict__.setdefault('_in_flight', {})"),
    ),
    mutant(
        "fork: the parent keeps the lock",
        of.ForkInParent,
        Guard._after_fork_in_parent,
        ("self._table.lock.release()", "pass"),
    ),
    # 10. A store that hangs or fails.
    mutant(
        "sync: the turn is not given back",
        of.Recovery,
        Lease.ensure,
        ("turn.release()", "pass"),
    ),
    mutant(
        "load: the waiters are not woken",
        of.TwoLogins,
        SingleFlight.load,
        ("led[0].done.release()", "pass"),
    ),
    mutant(
        "grace: it never ends",
        of.Outage,
        SlowPath._in_grace,
        ("until + self._outage_grace", "float('inf')"),
    ),
    mutant(
        "grace: a stale decision does not say so",
        of.Outage,
        SlowPath._in_grace,
        ("stale=self._monotonic() >= until", "stale=False"),
    ),
    # 11. Followers.
    mutant(
        "follower: told while the sync has not ended",
        of.Followed,
        Followers._deliver_first,
        ("with self._table.lock:  # the sync", "if True:  # the sync"),
    ),
    mutant(
        "follower: a change that comes as the last call ends is left",
        of.Followed,
        Followers.deliver,
        ("while self._table.backlog.first() is not None:", "for _ in range(2):"),
    ),
    # 12. The start.
    mutant(
        "sync: a late first read, which names nobody, is applied",
        of.Start,
        Table.apply,
        (
            "if known.cursor not in {cursor, (head, token)}:",
            "if cursor is not None and known.cursor not in {cursor, (head, token)}:",
        ),
    ),
)
