"""The scenarios in which schedules of the guard are explored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ipguard.errors import StoreUnavailable
from ipguard.model import RESET, Reason
from tests import explorer
from tests.explored_guard import Explored
from tests.explorer import EVERYTHING, Body, step
from tests.guards import ELSEWHERE, HOME, OFFICE

Threads = Sequence[tuple[str, Body]]


class Open(Explored):
    """The user is unrestricted, and remembered."""

    def prepare(self) -> None:
        self.register("jsmith")

    def warm(self) -> None:
        super().warm()
        assert self.guarded.is_allowed("jsmith", HOME)

    def close(self) -> None:
        """Restrict the user to an address that is not asked for; one step."""
        self.commit(lambda: self.restrict("jsmith", OFFICE))


class LoginAndSync(Open):
    """A login while the user is restricted, and a sync applies it after the old lease."""

    def threads(self) -> Threads:
        return [("login", self.ask), ("sync", self.sync)]

    def sync(self) -> None:
        self.close()
        self.tick(6)
        self.try_sync()


class FirstSight(LoginAndSync):
    """The same from an address that was not seen before."""

    def sync(self) -> None:
        super().sync()
        self.ask()

    asked = (ELSEWHERE, OFFICE)

    def threads(self) -> Threads:
        return [("login", lambda: self.ask("jsmith", ELSEWHERE)), ("sync", self.sync)]


class FirstListed(LoginAndSync):
    """The same from a listed address that was not seen before, which is replaced by another."""

    def prepare(self) -> None:
        self.restrict("jsmith", HOME)

    def warm(self) -> None:
        self.guarded.sync()
        assert not self.guarded.is_allowed("jsmith", OFFICE)

    def close(self) -> None:
        def replace() -> None:
            self.lift_all("jsmith")
            self.restrict("jsmith", OFFICE)

        self.commit(replace)


class PreloadedListed(FirstListed):
    """The same with a complete table, in which no address is noted."""

    settings: ClassVar[dict[str, Any]] = {"preload": True}


class CheckAndSync(LoginAndSync):
    """The same for `check`."""

    def threads(self) -> Threads:
        return [("login", self.check), ("sync", self.sync)]


class TwoSyncs(Open):
    """Two syncs overlap; one may have read before the change, the other after it."""

    def threads(self) -> Threads:
        return [("refresher", self.refresh), ("sync", self.sync)]

    def refresh(self) -> None:
        self.try_sync()
        self.ask()

    def sync(self) -> None:
        self.close()
        self.tick(4)
        self.try_sync()
        self.tick(4)


class OverlappingSyncs(Open):
    """The older of two syncs may end last; a revision that was answered must not go back."""

    def threads(self) -> Threads:
        return [("refresher", self.try_sync), ("sync", self.sync)]

    def sync(self) -> None:
        self.close()
        self.try_sync()
        self.check()
        self.check()


class LoginAndTwoSyncs(Open):
    """The same with a login beside them."""

    def threads(self) -> Threads:
        return [("login", self.ask), ("refresher", self.try_sync), ("sync", self.sync)]

    def sync(self) -> None:
        self.close()
        self.tick(6)
        self.try_sync()


class ColdLogin(Explored):
    """A user is read while it is restricted, and a sync moves the position (the stale fill)."""

    def prepare(self) -> None:
        self.register("jsmith")

    def threads(self) -> Threads:
        return [("login", self.check), ("sync", self.sync)]

    def sync(self) -> None:
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.try_sync()
        self.tick(6)
        self.ask()


class TwoLogins(Explored):
    """Two logins share one read, while the user is restricted and a sync applies it."""

    def prepare(self) -> None:
        self.register("jsmith")

    def threads(self) -> Threads:
        return [("login", self.check), ("second", self.second)]

    def second(self) -> None:
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.try_sync()
        self.check(at_least=self.states[-1].revision)


class Waiters(TwoLogins):
    """Three logins share one read; those that wait for it may give up."""

    timeouts = True

    def threads(self) -> Threads:
        return [("login", self.check), ("second", self.check), ("third", self.check)]


class LongRead(TwoLogins):
    """A read takes longer than the lease; a second login must not use it."""

    def second(self) -> None:
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.tick(6)
        self.check()


class OvertakenRead(TwoLogins):
    """The same, but the lease is renewed, and the younger row is evicted."""

    settings: ClassVar[dict[str, Any]] = {"capacity": 1}

    def prepare(self) -> None:
        self.register("jsmith", "adoe")

    def second(self) -> None:
        self.tick(6)
        self.try_sync()
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.check()
        self.guarded.check("adoe", HOME)
        self.check()


class LostCommit(Explored):
    """A failover loses the commit that lifted the restriction."""

    lossy = True

    def prepare(self) -> None:
        super().prepare()
        self.put_back = self.back_up()

    def threads(self) -> Threads:
        return [("login", self.check), ("operator", self.operator)]

    def operator(self) -> None:
        self.lose()
        self.tick(4)
        self.try_sync()
        self.tick(4)
        self.ask()

    def lose(self) -> None:
        self.commit(lambda: self.lift_all("jsmith"))
        self.commit(self.put_back)


class ReplacedCommit(LostCommit):
    """Another commit takes the revision of the one that was lost."""

    def lose(self) -> None:
        self.commit(lambda: self.lift_all("jsmith"))
        self.commit(self.replace)

    def replace(self) -> None:
        self.put_back()
        self.touch("adoe")


class LostAfterSync(LostCommit):
    """A sync has seen the commit before it is lost, so that the next one finds another history."""

    def lose(self) -> None:
        self.commit(lambda: self.lift_all("jsmith"))
        self.try_sync()
        self.commit(self.put_back)

    def operator(self) -> None:
        self.lose()
        self.try_sync()


class ReplacedAtLeast(ReplacedCommit):
    """A second login needs the revision that replaced the lost one."""

    def operator(self) -> None:
        self.lose()
        self.try_sync()
        self.check(at_least=self.states[-1].revision)


class ReplacedAfterSync(ReplacedAtLeast):
    """The same if a sync has seen the commit before it is lost."""

    def lose(self) -> None:
        self.commit(lambda: self.lift_all("jsmith"))
        self.try_sync()
        self.commit(self.replace)


class TwoHistories(ReplacedCommit):
    """Two syncs overlap: one reads the lost commit, the other what replaced it."""

    def threads(self) -> Threads:
        return [("sync", self.try_sync), ("operator", self.lose), ("refresher", self.refresh)]

    def refresh(self) -> None:
        self.try_sync()
        self.check()


class Reset(LoginAndSync):
    """The store has pruned the change: it answers RESET."""

    def sync(self) -> None:
        self.commit(self.prune)
        self.tick(6)
        self.try_sync()

    def prune(self) -> None:
        self.restrict("jsmith", OFFICE)
        self.store.changes = lambda changes: changes._replace(usernames=RESET)

    def finish(self) -> None:
        self.store.changes = lambda changes: changes
        super().finish()


class Everybody(LoginAndSync):
    """One change concerns everybody."""

    def sync(self) -> None:
        self.commit(self.close_all)
        self.tick(6)
        self.try_sync()

    def close_all(self) -> None:
        self.restrict("jsmith", OFFICE)
        self.touch()


class Preloading(Explored):
    """A snapshot is read while a user is restricted, and another thread syncs."""

    settings: ClassVar[dict[str, Any]] = {"preload": True}

    def prepare(self) -> None:
        self.register("jsmith")
        self.restrict("adoe", OFFICE)

    def warm(self) -> None:
        self.guarded._lease.sync()

    def threads(self) -> Threads:
        return [("preload", self.try_sync), ("sync", self.sync)]

    def sync(self) -> None:
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.guarded._lease.try_sync()
        self.tick(4)
        self.guarded._lease.try_sync()
        self.tick(4)
        self.ask()


class Preloaded(Explored):
    """The table is complete, and one change concerns everybody: it is emptied and read again."""

    settings: ClassVar[dict[str, Any]] = {"preload": True}

    def threads(self) -> Threads:
        return [("login", self.check), ("sync", self.sync)]

    def sync(self) -> None:
        self.commit(self.touch)
        self.try_sync()


class PreloadedAsk(Preloaded):
    """The same for `is_allowed`, by another spelling of the username."""

    def threads(self) -> Threads:
        return [("login", lambda: self.ask("JSmith")), ("sync", self.sync)]


class PreloadedChange(Preloaded):
    """The table is complete, and an absent user is restricted."""

    def prepare(self) -> None:
        self.register("jsmith")
        self.restrict("adoe", OFFICE)

    def sync(self) -> None:
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.tick(6)
        self.try_sync()


class PreloadingAhead(Preloading):
    """A user is read ahead of the snapshot that is being read."""

    def sync(self) -> None:
        self.commit(lambda: self.restrict("jsmith", OFFICE))
        self.check()
        self.check()


class PreloadingStranger(PreloadingAhead):
    """A user who is read ahead has lost its restriction, and is not registered any more."""

    def prepare(self) -> None:
        self.restrict("jsmith", OFFICE)

    def sync(self) -> None:
        self.commit(self.remove)
        self.check()
        self.check()

    def remove(self) -> None:
        self.lift_all("jsmith")
        self.inner.remove_users(["jsmith"])


class PreloadingEverybody(Preloading):
    """One change concerns everybody while a snapshot is read."""

    def sync(self) -> None:
        self.commit(self.close_all)
        self.guarded._lease.try_sync()
        self.tick(6)
        self.guarded._lease.try_sync()
        self.ask()

    def close_all(self) -> None:
        self.restrict("jsmith", OFFICE)
        self.touch()


class PreloadingLost(Preloading):
    """A snapshot is read of a commit that is lost."""

    lossy = True

    def prepare(self) -> None:
        self.restrict("jsmith", OFFICE)
        self.put_back = self.back_up()

    def sync(self) -> None:
        self.commit(lambda: self.lift_all("jsmith"))
        self.commit(self.put_back)
        self.tick(6)
        self.guarded._lease.try_sync()
        self.ask()


class PendingRead(PreloadedChange):
    """A pending user of the complete table is read again while it changes once more."""

    def threads(self) -> Threads:
        return [("sync", self.sync), ("refresher", self.refresh)]

    def sync(self) -> None:
        self.commit(lambda: self.restrict("jsmith", HOME))
        self.try_sync()

    def refresh(self) -> None:
        self.commit(self.move)
        self.guarded._lease.try_sync()
        self.tick(6)
        self.ask()

    def move(self) -> None:
        self.lift_all("jsmith")
        self.restrict("jsmith", OFFICE)


class Outage(Open):
    """The store goes down, and comes back with a change."""

    settings: ClassVar[dict[str, Any]] = {"outage_grace": 10.0}

    def threads(self) -> Threads:
        return [("login", self.twice), ("store", self.outage)]

    def twice(self) -> None:
        self.check()
        self.check()

    def outage(self) -> None:
        self.fail_store(StoreUnavailable("down"))
        self.close()
        self.tick(6)
        self.tick(12)


class GraceAndRecovery(Outage):
    """The store comes back with a change while a login is answered in the grace."""

    def threads(self) -> Threads:
        return [("login", self.check), ("store", self.outage)]

    def outage(self) -> None:
        self.fail_store(StoreUnavailable("down"))
        self.close()
        self.tick(6)
        self.fail_store(None)
        self.tick(12)
        self.try_sync()


class Recovery(Open):
    """The store fails for two callers at once, and comes back."""

    def threads(self) -> Threads:
        return [("login", self.check), ("store", self.outage)]

    def outage(self) -> None:
        self.fail_store(StoreUnavailable("down"))
        self.close()
        self.tick(6)
        self.try_sync()
        self.fail_store(None)
        self.tick(2)
        self.check()


class Fork(Open):
    """A process forks while another thread syncs; the child has that thread no more."""

    hooks = True

    def threads(self) -> Threads:
        return [("sync", self.sync), ("child", self.child)]

    def sync(self) -> None:
        self.close()
        self.tick(6)
        self.check("adoe")

    users = ("jsmith", "adoe")

    def child(self) -> None:
        guard, run = self.guarded, explorer.running()
        assert run is not None
        if self.hooks:
            guard._before_fork()
        step("forks", writes=EVERYTHING)
        run.vanish()
        guard._after_fork_in_child()
        self.ask()
        self.check("adoe")
        self.try_sync()
        self.ask()


class ForkWithoutHooks(Fork):
    """A server forks in C, so that the child is repaired at its first call."""

    hooks = False


class ForkInParent(Fork):
    """The parent goes on after the fork."""

    def child(self) -> None:
        self.guarded._before_fork()
        step("forks", writes=EVERYTHING)
        self.guarded._after_fork_in_parent()
        self.ask()


class Start(Open):
    """Two first syncs overlap, and one of them ends late."""

    def warm(self) -> None: ...

    def threads(self) -> Threads:
        return [("refresher", self.try_sync), ("sync", self.sync)]

    def sync(self) -> None:
        self.ask()
        self.close()
        self.tick(6)
        self.ask()


class Standby(Open):
    """A server that has not seen the last change answers a sync."""

    def threads(self) -> Threads:
        return [("login", self.twice), ("sync", self.sync)]

    def twice(self) -> None:
        self.check()
        self.check()

    def sync(self) -> None:
        self.close()
        self.try_sync()
        self.commit(self.fall_behind)
        self.try_sync()

    def fall_behind(self) -> None:
        self.store.changes = lambda changes: changes._replace(head=changes.head - 1)

    def finish(self) -> None:
        self.store.changes = lambda changes: changes
        super().finish()


class ReadYourWrites(Open):
    """Who changed something asks at the revision of the change; another login is on its way."""

    def threads(self) -> Threads:
        return [("operator", self.operator), ("login", self.login)]

    def operator(self) -> None:
        self.close()
        decision = self.check(at_least=self.states[-1].revision)
        if decision.reason is Reason.STORE_UNAVAILABLE:
            explorer.fail("the store answers, but no sync was made")
        self.ask()

    def login(self) -> None:
        self.try_sync()
        self.check()


class Temporary(Explored):
    """A temporary restriction ends within the lease."""

    def prepare(self) -> None:
        self.restrict("jsmith", HOME, expires_in=3)

    def threads(self) -> Threads:
        return [("login", self.twice), ("clock", self.clocked)]

    def twice(self) -> None:
        self.ask()
        self.check()

    def clocked(self) -> None:
        self.tick(2)
        self.tick(2)
        self.ask()


class TemporaryAndSync(Temporary):
    """It is replaced by another one as well, and the old lease ends."""

    def warm(self) -> None:
        super().warm()
        self.guarded.check("jsmith", HOME)

    def threads(self) -> Threads:
        return [("login", self.check), ("sync", self.sync)]

    def sync(self) -> None:
        self.commit(self.end)
        self.tick(6)
        self.try_sync()

    def prepare(self) -> None:
        self.restrict("jsmith", HOME, expires_in=60)

    def end(self) -> None:
        self.lift_all("jsmith")
        self.restrict("jsmith", OFFICE)


class Unknown(Explored):
    """Unknown users are denied, and a table of one user evicts."""

    settings: ClassVar[dict[str, Any]] = {"unknown_users": "deny", "capacity": 1}
    users = ("jsmith", "adoe")

    def prepare(self) -> None:
        self.restrict("jsmith", HOME)

    def threads(self) -> Threads:
        return [("login", self.check), ("stranger", self.stranger)]

    def stranger(self) -> None:
        self.commit(lambda: self.register("adoe"))
        self.check("adoe")
        self.ask()


class PreloadedUnknown(Unknown):
    """The same in a complete table, where only other users are evicted."""

    users = ("jsmith", "adoe")

    def stranger(self) -> None:
        self.commit(self.swap)
        self.try_sync()
        self.check("adoe")
        self.check("jsmith")

    def swap(self) -> None:
        self.lift_all("jsmith")
        self.restrict("adoe", OFFICE)

    settings: ClassVar[dict[str, Any]] = {
        "unknown_users": "deny",
        "capacity": 1,
        "preload": True,
    }


class Helper(Open):
    """Two callers wait for a revision: one helper syncs for both."""

    timeouts = True

    def threads(self) -> Threads:
        return [("operator", self.operator), ("other", self.wait)]

    def wait(self) -> None:
        self.guarded._lease.sync_within(1.0)

    def operator(self) -> None:
        self.close()
        self.wait()
        self.check()


class Followed(Open):
    """Two threads sync and call a follower, which checks the user that it is told of."""

    def warm(self) -> None:
        super().warm()
        self.told: list[int] = []
        self.guarded.follow(self.tell)

    def threads(self) -> Threads:
        return [("one", self.change), ("two", self.change)]

    def change(self) -> None:
        self.close()
        self.try_sync()

    def tell(self, usernames: object, revision: int) -> None:
        self.told.append(revision)
        if usernames != frozenset({"jsmith"}):
            explorer.fail(f"the follower is told of {usernames}")
        if self.guarded.revision < revision or self.check().revision < revision:
            explorer.fail("the follower is told too early")

    def finish(self) -> None:
        assert self.guarded._table.backlog.first() is None, "a change was not told"
        super().finish()
        assert self.told == sorted(self.told), f"told out of order: {self.told}"
        assert self.told[-1] == self.guarded.revision


#: Each with the most forced switches in the short run (fewer where that takes many schedules), and
#: in the long run.
SCENARIOS: dict[type[Explored], tuple[int, int]] = {
    LoginAndSync: (3, 4),
    FirstSight: (2, 4),
    FirstListed: (2, 4),
    PreloadedListed: (3, 4),
    CheckAndSync: (3, 4),
    TwoSyncs: (2, 4),
    OverlappingSyncs: (3, 4),
    LoginAndTwoSyncs: (1, 3),
    ColdLogin: (1, 3),
    TwoLogins: (2, 3),
    Waiters: (1, 2),
    LongRead: (1, 3),
    OvertakenRead: (2, 2),
    LostCommit: (2, 3),
    ReplacedCommit: (1, 3),
    ReplacedAtLeast: (2, 3),
    ReplacedAfterSync: (2, 3),
    LostAfterSync: (2, 3),
    TwoHistories: (2, 3),
    Reset: (2, 4),
    Everybody: (3, 4),
    Preloading: (2, 3),
    PreloadingAhead: (2, 3),
    PreloadingStranger: (2, 3),
    PreloadingEverybody: (2, 3),
    PreloadingLost: (2, 3),
    Preloaded: (3, 4),
    PreloadedChange: (2, 4),
    PendingRead: (1, 4),
    Outage: (3, 4),
    GraceAndRecovery: (2, 3),
    Recovery: (2, 3),
    Fork: (3, 4),
    ForkWithoutHooks: (3, 4),
    ForkInParent: (2, 4),
    Start: (2, 3),
    Standby: (2, 3),
    ReadYourWrites: (2, 4),
    Temporary: (2, 4),
    TemporaryAndSync: (3, 4),
    Unknown: (1, 3),
    PreloadedUnknown: (3, 4),
    Helper: (1, 2),
    Followed: (2, 3),
}
