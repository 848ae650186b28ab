"""A stateful test: workflow and guard against a model, with steps in random order.

The model follows the documentation and does not use `ipguard.rules`: addresses are pairs of
integers, times are seconds, and the outcome of each step is predicted before it runs. Refusals,
changes, revisions, the audit log and the list of users must agree. Each answer of the guard must
have been right at some time in the last `max_staleness` seconds.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ipguard
from ipguard import Actor, Demand, Guard, User, Workflow, WorkflowSettings
from ipguard.addresses import AddressSet
from ipguard.testing import FakeClock, Outbox
from tests.conftest import rounds
from tests.postgres import Given, Server, fresh_schema

KEY = bytes(range(32))
STALE = 5
ATTEMPTS, CAP, RESENDS, INTERVAL, PER_HOUR, PER_USER = 3, 4, 1, 30, 6, 3
NUMBER_LIVES, REQUEST_LIVES, HOUR = 600, 7200, 3600

BASE = 203 << 24 | 113 << 8  # 203.0.113.0
SIX = 0x20010DB8 << 96
RANGES: dict[str, tuple[int, int, int]] = {
    "203.0.113.1": (4, BASE + 1, BASE + 1),
    "::ffff:203.0.113.1": (4, BASE + 1, BASE + 1),
    "203.0.113.0/30": (4, BASE, BASE + 3),
    "203.0.113.0-203.0.113.3": (4, BASE, BASE + 3),
    "203.0.113.2-203.0.113.5": (4, BASE + 2, BASE + 5),
    "2001:db8::/64": (6, SIX, SIX + 2**64 - 1),
}
TOO_BROAD = "203.0.0.0/8"
CLIENTS: dict[str, tuple[int, int] | None] = {
    "203.0.113.1": (4, BASE + 1),
    "::ffff:203.0.113.2": (4, BASE + 2),
    "203.0.113.5": (4, BASE + 5),
    "2001:db8::7": (6, SIX + 7),
    "2001:db8:0:1::": (6, SIX + 2**64),
    "198.51.100.1": (4, 198 << 24 | 51 << 16 | 100 << 8 | 1),
    "203.0.113.01": None,
}
NAMES = ("ann", "bob", "cat")
FULL_NAME = "A Trader"  # of all users: a rename leaves it
SPELLINGS = {"ann": "Ann", "bob": "bob", "cat": "ＣＡＴ", "eve": "eve"}  # noqa: RUF001
ACTORS: dict[str, tuple[frozenset[str] | None, str | None]] = {
    "ann": (frozenset({"U1"}), "203.0.113.1"),
    "bob": (frozenset({"U1", "U2"}), "203.0.113.5"),
    "dan": (frozenset({"U2"}), None),
    "root": (None, "203.0.113.1"),
    "kim": (frozenset({"U1", "U2"}), None),  # another account of ann
    "cat": (frozenset(), None),  # manages nobody
}
EMAILS = {"kim": "ANN@x.example"}

NOTHING: DemandOf = (False, 0, 0)
DEFAULTS: dict[str, DemandOf] = {
    "add": (True, 0, 0),
    "delete": NOTHING,
    "loosens": NOTHING,
    "opens": NOTHING,
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, DemandOf]]] = {
    "as delivered": ({}, DEFAULTS),
    "number for each deletion": ({"confirm_deletes": True}, DEFAULTS | {"delete": (True, 0, 0)}),
    "number for the last one": ({"confirm_deletes": "last"}, DEFAULTS | {"opens": (True, 0, 0)}),
    "approval": ({}, DEFAULTS | {"add": (False, 1, 0), "opens": (False, 1, 0)}),
    "number and approvals": ({}, DEFAULTS | {"add": (True, 1, 0), "loosens": (True, 2, 0)}),
    "wait": ({}, DEFAULTS | {"add": (False, 0, 300), "delete": (True, 0, 30)}),
    "all": ({}, DEFAULTS | {"add": (True, 1, 30), "opens": (False, 2, 300)}),
    "nothing": ({}, dict.fromkeys(DEFAULTS, NOTHING)),
}
"""Settings of the workflow: those that are not a demand, and what they demand."""

STORY = (
    *("confirm", "approve", "wait") * 3,
    *("resend", "move", "guess", "settings", "lift"),
)
"""What happens to requests that belong together; some of it more often."""


Run = tuple[int, int, int]
DemandOf = tuple[bool, int, float]  # whether a number, how many approvals, how many seconds to wait
DIRECTIONS = ["neutral", "tightens", "loosens", "opens"]


def joined(*demands: DemandOf) -> DemandOf:
    number, approvals, wait = zip(*demands, strict=True)
    return any(number), max(approvals), max(wait)


def demand(number: bool, approvals: int, wait: float) -> Demand:
    return Demand(number=number, approvals=approvals, wait=timedelta(seconds=wait))


class Refused(Exception):
    """The refusal that the model predicts."""

    def __init__(self, name: str, *data: object) -> None:
        super().__init__(name, *data)
        self.name, self.data = name, data


@attrs.define
class ModelRestriction:
    """A restriction of the model."""

    user: str
    run: tuple[int, int, int]
    until: float | None

    def over(self, now: float) -> bool:
        return self.until is not None and now >= self.until


@attrs.define
class ModelRequest:
    """A request of the model."""

    key: str
    user: str
    by: str
    runs: tuple[Run, ...]
    removes: tuple[str, ...]
    until: float | None
    asked_at: float
    demand: DemandOf
    direction: int
    batch: str | None
    state: str = "pending"
    left: int = 0
    sent: int = 0  # numbers that were mailed
    failed: int = 0  # mails in a row
    tried_at: float | None = None
    number_ends: float = 0.0
    numbered: bool = False
    approvals: dict[str, tuple[str, str | None]] = attrs.field(factory=dict)
    numbers: list[str] = attrs.field(factory=list)

    @property
    def ends(self) -> float:
        return self.asked_at + self.demand[2] + REQUEST_LIVES

    @property
    def kind(self) -> str:
        return ("replace" if self.removes else "add") if self.runs else "delete"

    def state_at(self, now: float) -> str:
        return "expired" if self.state == "pending" and now >= self.ends else self.state


@attrs.define
class ModelPlan:
    """A change of the model that is allowed: the additions, and the ids that end."""

    user: str
    runs: tuple[Run, ...]
    until: float | None
    removes: list[str]
    expired: list[str]
    after: Policy
    direction: int

    @property
    def kind(self) -> str:
        return ("replace" if self.removes else "add") if self.runs else "delete"


Policy = tuple[tuple[Run, float | None], ...]


def allows(policy: Policy, client: tuple[int, int] | None, now: float) -> bool:
    """Return whether restrictions allow a client."""
    if client is None:
        return False
    version, number = client
    return not policy or any(
        run[0] == version and run[1] <= number <= run[2] and (until is None or now < until)
        for run, until in policy
    )


def worse(before: Policy, after: Policy, now: float) -> int:
    """Return the direction of a change: for how long is each address allowed, before and after?"""
    if before and not after:
        return 3
    points = {(v, n) for (v, first, last), _ in (*before, *after) for n in (first, last, last + 1)}
    points |= {(4, 0), (6, 0)}

    def ends(policy: Policy, point: tuple[int, int]) -> float:
        if not policy:
            return float("inf")
        times = [
            float("inf") if until is None else until
            for (version, first, last), until in policy
            if version == point[0] and first <= point[1] <= last
        ]
        return max([now, *times])

    changes = [(ends(before, point), ends(after, point)) for point in points]
    if any(then > was for was, then in changes):
        return 2
    return int(any(then < was for was, then in changes) or bool(before) != bool(after))


class Model:
    """The expected state."""

    def __init__(self, settings: str) -> None:
        self.settings = settings
        self.now = 0.0
        self.accounts: dict[str, str] = {}
        self.removed: set[str] = set()
        self.restrictions: dict[str, ModelRestriction] = {}
        self.requests: dict[str, ModelRequest] = {}
        self.failures: dict[str, int] = {}
        self.log: list[tuple[str, str | None, str | None, str | None]] = []
        # The restrictions of each user with the time of each change, for answers that may be stale.
        self.changes: dict[str, list[tuple[float, Policy]]] = {name: [(0.0, ())] for name in NAMES}

    # Reads.

    def restriction_ids(self) -> list[str]:
        """Return the ids in an order that does not depend on them: they are random."""
        return sorted(
            self.restrictions, key=lambda k: (self.restrictions[k].user, self.restrictions[k].run)
        )

    def restrictions_of(self, user: str) -> dict[str, ModelRestriction]:
        found = ((key, self.restrictions[key]) for key in self.restriction_ids())
        return {key: r for key, r in found if r.user == user}

    def policy(self, user: str) -> Policy:
        return tuple((r.run, r.until) for r in self.restrictions_of(user).values())

    def possible_answers(self, user: str, client: tuple[int, int] | None) -> set[bool]:
        changes = [*self.changes[user], (float("inf"), ())]
        return {
            allows(policy, client, self.now)
            for (_, policy), (replaced, _) in itertools.pairwise(changes)
            if replaced > self.now - STALE
        }

    def sees(self, actor: str, user: str) -> bool:
        manages = ACTORS[actor][0]
        if user not in self.accounts:
            return False
        return manages is None or (self.accounts[user] in manages and user not in self.removed)

    def append(self, action: str, actor: str | None, user: str | None) -> int:
        account = None if user is None else self.accounts.get(user)
        self.log.append((action, actor, user, account))
        for name in NAMES:
            if self.changes[name][-1][1] != self.policy(name):
                self.changes[name].append((self.now, self.policy(name)))
        return len(self.log)

    # Refusals.

    def plan(
        self,
        user: str,
        runs: tuple[Run, ...],
        until: float | None,
        removes: Iterable[str] = (),
        *,
        only: bool = False,
    ) -> ModelPlan:
        """Judge a change of one user, or refuse it."""
        if runs and until is not None and until <= self.now:
            raise Refused("InvalidValue")
        held = self.restrictions_of(user)
        ends = [key for key in held if only or key in set(removes)]
        kept = {key: r for key, r in held.items() if key not in ends}
        expired = [key for key, r in kept.items() if r.run in runs]
        if len(set(runs)) < len(runs) or any(not kept[key].over(self.now) for key in expired):
            raise Refused("DuplicateRestriction")
        left = [(r.run, r.until) for key, r in kept.items() if key not in expired]
        after = (*left, *((run, until) for run in runs))
        if runs and len(after) > PER_USER:
            raise Refused("TooManyRestrictions", user, PER_USER)
        direction = worse(self.policy(user), after, self.now)
        return ModelPlan(user, runs, until, ends, expired, after, direction)

    def replan(self, request: ModelRequest) -> ModelPlan:
        """Judge a request as things are now."""
        held = self.restrictions_of(request.user)
        present = [key for key in request.removes if key in held]
        if not request.runs and not present:
            raise Refused("UnknownRestriction", request.removes[0])
        plan = self.plan(request.user, request.runs, request.until, present)
        if plan.direction > request.direction:
            raise Refused("DirectionChanged")
        return plan

    def change(self, plan: ModelPlan, ids: list[str]) -> None:
        """Make a change; `ids` are those of the new restrictions."""
        for key in (*plan.removes, *plan.expired):
            self.remove_restriction(key)
        for key, run in zip(ids, plan.runs, strict=True):
            self.restrictions[key] = ModelRestriction(plan.user, run, plan.until)

    def demanded(self, kind: str, direction: int) -> DemandOf:
        now = SETTINGS[self.settings][1]
        return joined(
            now["add"] if kind != "delete" else NOTHING,
            now["delete"] if kind != "add" else NOTHING,
            now["loosens"] if direction >= 2 else NOTHING,
            now["opens"] if direction == 3 else NOTHING,
        )

    def demand_of(self, members: list[ModelRequest]) -> DemandOf:
        return joined(*(joined(r.demand, self.demanded(r.kind, r.direction)) for r in members))

    def batch(self, actor: str, request: ModelRequest) -> list[ModelRequest]:
        """Return a request, and the pending ones that the actor sees and one number confirms."""
        others = [
            other
            for key, other in sorted(self.requests.items())
            if other is not request
            and request.batch is not None
            and other.batch == request.batch
            and other.state_at(self.now) == "pending"
            and (other.tried_at, other.numbered) == (request.tried_at, request.numbered)
            and self.sees(actor, other.user)
        ]
        return [request, *others]

    def check_ready(self, members: list[ModelRequest]) -> DemandOf:
        """Refuse a request that is closed or waits."""
        request = members[0]
        state = request.state_at(self.now)
        if state == "locked":
            raise Refused("TooManyAttempts")
        if state != "pending":
            raise Refused("RequestClosed", state)
        demand = self.demand_of(members)
        if self.now < request.asked_at + demand[2]:
            raise Refused("TooSoon")
        return demand

    def approvals_missing(
        self, members: list[ModelRequest], needed: int, given: Any = None
    ) -> bool:
        """Return whether an approval is missing; `given` has those of each, by its key."""
        for each in members:
            approvals = each.approvals if given is None else given[each.key]
            counted = [
                name
                for name, (_, account) in approvals.items()
                if account in (None, self.accounts[each.user])
            ]
            people = {email_of(name) for name in counted}
            # Users have no e-mail address here, so that the username alone tells who is concerned.
            if needed and (len(people) < needed or counted == [each.user]):
                return True
        return False

    def check_lockout(self, actor: str, user: str, after: Policy) -> None:
        address = ACTORS[actor][1]
        if actor != user or address is None:
            return
        client = CLIENTS[address]
        forever = float("inf")
        if allows(self.policy(user), client, self.now) and not allows(after, client, forever):
            raise Refused("LockoutRisk", address)

    def check_rate(self, actor: str) -> None:
        times = [
            r.asked_at for r in self.requests.values() if r.by == actor and r.batch in (None, r.key)
        ]
        recent = sorted(t for t in times if t > self.now - HOUR)
        if len(recent) >= PER_HOUR:
            raise Refused("TooManyRequests", recent[-PER_HOUR] + HOUR - self.now)

    def check_not_pending(self, plan: ModelPlan) -> None:
        for request in self.pending(plan.user):
            if set(request.runs) & set(plan.runs) or set(request.removes) & set(plan.removes):
                raise Refused("DuplicateRestriction")

    def registered(self, user: str) -> bool:
        return user in self.accounts and user not in self.removed

    def cancel_requests(self, user: str) -> None:
        for request in self.requests.values():
            if request.user == user and request.state == "pending":
                request.state = "cancelled"

    def pending(self, user: str) -> list[ModelRequest]:
        return [
            r
            for r in self.requests.values()
            if r.user == user and r.state_at(self.now) == "pending"
        ]

    def waiting(self) -> list[str]:
        return [key for key, r in self.requests.items() if r.state_at(self.now) == "pending"]

    def remove_restriction(self, key: str) -> None:
        user = self.restrictions.pop(key).user
        for request in self.pending(user):
            if request.removes == (key,) and not request.runs:
                request.state = "cancelled"


def email_of(name: str) -> str:
    """Return who a person is: one e-mail address is one person."""
    return EMAILS.get(name, f"{name}@x.example").casefold()


class Machine(RuleBasedStateMachine):
    """The library and the model, side by side."""

    def url(self) -> str:
        """Return the URL of the store."""
        raise NotImplementedError

    @initialize(chosen=st.sampled_from(sorted(SETTINGS)))
    def open(self, chosen: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ipguard-"))
        self.clock = FakeClock()
        self.started = self.clock()
        self.store = ipguard.open_store(self.url(), clock=self.clock)
        self.outbox = Outbox()
        self.flow = self.workflow(chosen)
        # One guard syncs by itself; the other is request for each new revision.
        self.guard, self.prompt = (
            Guard(self.store, max_staleness=STALE, monotonic=self.clock.monotonic) for _ in range(2)
        )
        self.model = Model(chosen)
        # What the model had after each step, by revision.
        self.earlier: dict[int, dict[str, dict[str, tuple[int, int, int]]]] = {}
        self.put("ann", "U1")
        self.put("bob", "U2")
        self.put("cat", "U2")

    def workflow(self, chosen: str) -> Workflow:
        other, demands = SETTINGS[chosen]
        return Workflow(
            self.store,
            self.outbox,
            key=KEY,
            settings=WorkflowSettings(
                attempts_per_number=ATTEMPTS,
                failures_per_actor=CAP,
                resends_per_request=RESENDS,
                requests_per_hour=PER_HOUR,
                restrictions_per_user=PER_USER,
                request_lifetime=timedelta(seconds=REQUEST_LIVES),
                **other or {name: demand(*values) for name, values in demands.items()},
            ),
        )

    @rule(chosen=st.sampled_from(sorted(SETTINGS)))
    def change_settings(self, chosen: str) -> None:
        """Another server has other settings, stricter or laxer."""
        self.flow, self.model.settings = self.workflow(chosen), chosen

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.check_history()
        self.check_record()
        self.store.close()
        shutil.rmtree(self.folder)

    # -- steps ---------------------------------------------------------------------------------

    def actor(self, name: str) -> Actor:
        manages, address = ACTORS[name]
        return Actor(
            username=SPELLINGS.get(name, name),
            email=EMAILS.get(name, f"{name}@x.example"),
            manages=Actor.EVERY_ACCOUNT if manages is None else manages,
            address=address,
        )

    def run_step(self, predict: Callable[[], Any], call: Callable[[], Any]) -> Any:
        """Run a step; fail unless it is refused exactly when the model predicts it.

        `predict` raises Refused, or returns a function that applies the outcome to the model.
        """
        refused: Refused | None = None
        raised: ipguard.IPGuardError | None = None
        then: Callable[[Any], object] = lambda _: None  # noqa: E731
        outcome: Any = None
        try:
            then = predict()
        except Refused as exc:
            refused = exc
        try:
            outcome = call()
        except ipguard.IPGuardError as exc:
            raised = exc
        if refused is None:
            assert raised is None, f"refused by {raised!r}, and should not have been"
            then(outcome)
            return outcome
        assert type(raised).__name__ == refused.name, f"{raised!r} or {outcome}, not {refused!r}"
        assert raised is not None
        assert not refused.data or refused.data == data_of(raised), f"{raised!r}, not {refused!r}"
        return None

    # -- the host ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), account=st.sampled_from(["U1", "U2"]))
    def put(self, name: str, account: str) -> None:
        model = self.model
        revision = self.store.put_users(
            [User(username=SPELLINGS[name], full_name=FULL_NAME, account_id=account)]
        )
        if model.accounts.get(name) != account or name in model.removed:
            back = name in model.removed or name not in model.accounts
            model.accounts[name] = account
            model.removed.discard(name)
            model.append("put_users" if back else "move_user", None, name)
        assert revision == len(model.log)

    @rule(name=st.sampled_from(NAMES), back=st.sampled_from([True, True, False]))
    def remove_and_put_back(self, name: str, back: bool) -> None:
        self.remove(name)
        if back:
            self.put(name, self.model.accounts[name])

    def remove(self, name: str) -> None:
        model = self.model
        revision = self.store.remove_users([name])
        if model.registered(name):
            model.removed.add(name)
            model.cancel_requests(name)
            model.append("remove_users", None, name)
        assert revision == len(model.log)

    @precondition(lambda self: len(self.model.log) % 4 == 0)  # less often than requests
    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename(self, old: str, new: str) -> None:
        model = self.model

        def predict() -> Any:
            if not model.registered(old):
                raise Refused("UnknownUser", old)
            if new != old and (model.registered(new) or model.restrictions_of(new)):
                raise Refused("UsernameCollision")

            def then(revision: int) -> None:
                if new != old:
                    for each in model.restrictions_of(old).values():
                        each.user = new
                    model.cancel_requests(old)
                    model.accounts[new] = model.accounts[old]
                    model.removed.discard(new)
                    model.removed.add(old)
                    model.append("rename_user", None, new)
                assert revision == len(model.log)

            return then

        self.run_step(predict, lambda: self.store.rename_user(SPELLINGS[old], SPELLINGS[new]))

    @precondition(lambda self: len(self.model.log) % 4 == 0)
    @rule(
        accounts=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["U1", "U2"])),
        remove_missing=st.booleans(),
    )
    def sync(self, accounts: dict[str, str], remove_missing: bool) -> None:
        model = self.model

        def predict() -> Any:
            if remove_missing and not accounts:
                raise Refused("InvalidValue")
            gone = [
                n for n in NAMES if remove_missing and model.registered(n) and n not in accounts
            ]
            added = [name for name in NAMES if name in accounts and not model.registered(name)]
            moved = [
                name
                for name in NAMES
                if name in accounts and name not in added and model.accounts[name] != accounts[name]
            ]

            def then(found: ipguard.UserSync) -> None:
                for name in gone:
                    model.removed.add(name)
                    model.cancel_requests(name)
                model.accounts.update(accounts)
                model.removed.difference_update(accounts)
                for action, names in (("remove_users", gone), ("put_users", added)):
                    if action == "put_users":
                        for name in moved:
                            model.append("move_user", None, name)
                    if names:
                        model.append(action, None, names[0] if len(names) == 1 else None)
                assert found == ipguard.UserSync(
                    revision=len(model.log), added=len(added), moved=len(moved), removed=len(gone)
                )

            return then

        records = [
            {"username": SPELLINGS[name], "full_name": FULL_NAME, "account_id": account}
            for name, account in accounts.items()
        ]
        self.run_step(
            predict, lambda: self.store.sync_users(records, remove_missing=remove_missing)
        )

    @rule(seconds=st.sampled_from([1, 3, 4, 5, 30, 300, 600, 3600, 7200]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(timedelta(seconds=seconds))
        self.model.now += seconds

    # -- the first phase -----------------------------------------------------------------------

    @rule(
        data=st.data(),
        user=st.sampled_from([*NAMES * 4, "eve"]),
        addresses=st.lists(st.sampled_from([*RANGES, *RANGES, TOO_BROAD]), max_size=2),
        lifetime=st.sampled_from([None, None, None, 300, 3600]),
        allow_lockout=st.booleans(),
        mail_fails=st.sampled_from([False] * 7 + [True]),
    )
    def request_one(
        self,
        data: st.DataObject,
        user: str,
        addresses: list[str],
        lifetime: int | None,
        allow_lockout: bool,
        mail_fails: bool,
    ) -> None:
        usual = [name for name in ACTORS if self.model.sees(name, user)]
        actor = data.draw(st.sampled_from([*usual * 4, *sorted(ACTORS)]), label="actor")
        own = list(self.model.restrictions_of(user))
        ids = st.sampled_from([*own * 20, *self.model.restriction_ids(), "none"])
        some = bool(own) and data.draw(st.booleans(), label="replace")
        least = int(some or not addresses)
        replaces = data.draw(st.lists(ids, min_size=least, max_size=2 * least), label="replaces")
        self.request_as(
            actor,
            user,
            addresses,
            lifetime,
            replaces,
            allow_lockout=allow_lockout,
            mail_fails=mail_fails,
        )

    def request_as(
        self,
        actor: str,
        user: str,
        addresses: list[str],
        lifetime: int | None,
        replaces: list[str],
        *,
        allow_lockout: bool,
        mail_fails: bool,
    ) -> None:
        model, until = self.model, None if lifetime is None else self.model.now + lifetime
        replaces = list(dict.fromkeys(replaces))

        def predict() -> Any:
            if not model.sees(actor, user) or (user in model.removed and addresses):
                raise Refused("UnknownUser", user)
            for key in replaces:
                found = model.restrictions.get(key)
                if found is None or found.user != user:
                    raise Refused("UnknownRestriction", key)
            if TOO_BROAD in addresses:
                raise Refused("AddressTooBroad")
            runs = tuple(RANGES[each] for each in addresses)
            return self.predict_begun(
                actor, [model.plan(user, runs, until, replaces)], allow_lockout, mail_fails
            )

        self.run_step(
            predict,
            lambda: self.deliver(
                lambda: self.flow.request(
                    self.actor(actor),
                    SPELLINGS[user],
                    addresses or None,
                    replaces=replaces,
                    expires_at=self.time(until),
                    allow_lockout=allow_lockout,
                ),
                fails=mail_fails,
            ),
        )

    @rule(
        actor=st.sampled_from(["root", "bob", "kim", "ann"]),
        users=st.lists(st.sampled_from([*NAMES * 4, "eve"]), min_size=1, max_size=3, unique=True),
        addresses=st.lists(st.sampled_from(sorted(RANGES)), min_size=1, max_size=2),
        lifetime=st.sampled_from([None, 3600]),
        allow_lockout=st.booleans(),
        mail_fails=st.sampled_from([False] * 7 + [True]),
    )
    def request_many(
        self,
        actor: str,
        users: list[str],
        addresses: list[str],
        lifetime: int | None,
        allow_lockout: bool,
        mail_fails: bool,
    ) -> None:
        self.request_many_as(actor, users, addresses, lifetime, allow_lockout, mail_fails)

    def request_many_as(
        self,
        actor: str,
        users: list[str],
        addresses: list[str],
        lifetime: int | None,
        allow_lockout: bool,
        mail_fails: bool,
    ) -> None:
        model, until = self.model, None if lifetime is None else self.model.now + lifetime
        runs = tuple(RANGES[each] for each in addresses)

        def predict() -> Any:
            plans = []
            for user in users:
                if not model.sees(actor, user) or user in model.removed:
                    raise Refused("UnknownUser", user)
                plans.append(model.plan(user, runs, until))
            return self.predict_begun(actor, plans, allow_lockout, mail_fails)

        self.run_step(
            predict,
            lambda: self.deliver(
                lambda: self.flow.request_many(
                    self.actor(actor),
                    [SPELLINGS[user] for user in users],
                    addresses,
                    expires_at=self.time(until),
                    allow_lockout=allow_lockout,
                ),
                fails=mail_fails,
            ),
        )

    def time(self, until: float | None) -> datetime | None:
        return None if until is None else self.started + timedelta(seconds=until)

    @rule(
        data=st.data(),
        name=st.sampled_from(["ann", "bob"]),
        addresses=st.sampled_from(sorted(RANGES)),
        lifetime=st.sampled_from([None, 300]),
    )
    def restrict_oneself(
        self, data: st.DataObject, name: str, addresses: str, lifetime: int | None
    ) -> None:
        """Restrict oneself and confirm, which may be a lockout."""
        if self.model.sees(name, name):
            before = set(self.model.requests)
            self.request_as(
                name, name, [addresses], lifetime, [], allow_lockout=False, mail_fails=False
            )
            for key in set(self.model.requests) - before:
                self.confirm_as(name, key, "right", allow_lockout=False)

    def deliver(self, call: Callable[[], Any], *, fails: bool) -> Any:
        """Return the outcome, or the id of the request if the mail fails."""
        self.outbox.fail = fails
        try:
            return call()
        except ipguard.DeliveryError as exc:
            assert fails
            return exc.request_id
        finally:
            self.outbox.fail = False

    def predict_begun(
        self, actor: str, plans: list[ModelPlan], allow_lockout: bool, mail_fails: bool
    ) -> Any:
        """Predict requests that share a number, or the change if nothing is demanded."""
        model = self.model
        if not allow_lockout:
            for plan in plans:
                model.check_lockout(actor, plan.user, plan.after)
        needed = joined(*(model.demanded(plan.kind, plan.direction) for plan in plans))
        if needed == NOTHING:
            return lambda outcome: self.apply_at_once(actor, plans, outcome)
        model.check_rate(actor)
        for plan in plans:
            model.check_not_pending(plan)
        return lambda outcome: self.add_requests(actor, plans, needed, outcome, mail_fails)

    def apply_at_once(self, actor: str, plans: list[ModelPlan], outcome: Any) -> None:
        found = outcome if isinstance(outcome, tuple) else (outcome,)
        by_user = {each.username: each for each in found}
        for plan in plans:
            held = set(self.model.restrictions)
            ids = [r.id for r in self.store.load_policy(plan.user).restrictions if r.id not in held]
            self.model.change(plan, ids)
            action = "confirm" if plan.runs else "delete"
            revision = self.model.append(action, actor, plan.user)
            assert (by_user[plan.user].revision, by_user[plan.user].state) == (
                revision,
                "confirmed",
            )
            assert by_user[plan.user].impact.direction == plan.direction

    def add_requests(
        self,
        actor: str,
        plans: list[ModelPlan],
        needed: DemandOf,
        outcome: Any,
        mail_fails: bool,
    ) -> None:
        model, mails = self.model, needed[0] and not needed[2]
        assert isinstance(outcome, str) is (mails and mail_fails)
        found: Iterable[ipguard.PendingRequest]
        if isinstance(outcome, str):
            found = self.stored(outcome)
        else:
            found = outcome if isinstance(outcome, tuple) else (outcome,)
        by_user = {each.username: each for each in found}
        assert set(by_user) == {plan.user for plan in plans}
        first = by_user[plans[0].user].id
        made = []
        for plan in plans:
            request = by_user[plan.user]
            assert request.impact is not None
            assert request.impact.direction == plan.direction
            assert request.demand == demand(*needed)
            assert (request.adds != (), set(request.removes)) == (
                plan.runs != (),
                set(plan.removes),
            )
            made.append(
                ModelRequest(
                    request.id,
                    plan.user,
                    actor,
                    plan.runs,
                    request.removes,
                    plan.until,
                    model.now,
                    needed,
                    plan.direction,
                    first if len(plans) > 1 else None,
                )
            )
            model.requests[request.id] = made[-1]
            model.append("request", actor, plan.user)
        if mails:
            self.mailed(made, first, failed=isinstance(outcome, str), by=actor)

    def stored(self, key: str) -> list[ipguard.PendingRequest]:
        """Return a request and the others of its batch."""
        with self.store.transaction() as tx:
            stored = tx.request(key)
            assert stored is not None
            batch = stored.request.batch
            return [each.request for each in ([stored] if batch is None else tx.batch(batch))]

    def mailed(self, members: list[ModelRequest], first: str, *, failed: bool, by: str) -> None:
        """A number was minted for requests, and its mail perhaps failed."""
        model = self.model
        for each in members:
            each.left, each.tried_at = ATTEMPTS, model.now
            each.number_ends = min(model.now + NUMBER_LIVES, each.ends)
            each.failed = each.failed + 1 if failed else 0
            each.sent += not failed
            each.numbers.append("" if failed else self.outbox.number_for(first))
        if failed:
            model.append("delivery_failed", by, members[0].user)

    def find_request(self, actor: str, key: str, *, own: bool) -> ModelRequest:
        request = self.model.requests.get(key)
        if (
            request is None
            or not self.model.sees(actor, request.user)
            or (own and request.by != actor)
        ):
            raise Refused("UnknownRequest", key)
        return request

    def draw_request(self, data: st.DataObject) -> str:
        """Draw a recent request, most often the newest, and sometimes an unknown id."""
        newest = list(reversed(self.model.requests))[:4]
        usual = [key for n, key in enumerate(newest) for _ in range(8 >> n)]
        return str(data.draw(st.sampled_from([*usual, "none"]), label="request"))

    def draw_actor(self, data: st.DataObject, key: str) -> str:
        """Draw an actor, most often the requester."""
        request = self.model.requests.get(key)
        usual = [request.by] * 12 if request else []
        return str(data.draw(st.sampled_from([*usual, *sorted(ACTORS)]), label="actor"))

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), in_time=st.booleans(), mail_fails=st.sampled_from([False] * 3 + [True]))
    def resend(self, data: st.DataObject, in_time: bool, mail_fails: bool) -> None:
        key = self.draw_request(data)
        if in_time:
            self.wait(INTERVAL)
        self.resend_as(self.draw_actor(data, key), key, mail_fails=mail_fails)

    def resend_as(self, actor: str, key: str, *, mail_fails: bool = False) -> None:
        model = self.model

        def predict() -> Any:
            request = self.find_request(actor, key, own=True)
            if request.state_at(model.now) != "pending":
                raise Refused("RequestClosed", request.state_at(model.now))
            members = model.batch(actor, request)
            needed = model.check_ready(members)
            if request.numbered or not needed[0]:
                return lambda _: None
            if request.sent > RESENDS:
                raise Refused("TooManyRequests", request.ends - model.now)
            # Failed mails do not count until as many failed in a row as may be resent.
            at_once = 0 < request.failed <= RESENDS
            tried = request.tried_at
            if tried is not None and not at_once and model.now < tried + INTERVAL:
                raise Refused("TooManyRequests", tried + INTERVAL - model.now)

            def then(outcome: Any) -> None:
                model.append("resend", actor, request.user)
                self.mailed(members, key, failed=isinstance(outcome, str), by=actor)
                assert isinstance(outcome, str) or outcome.attempts_left == ATTEMPTS

            return then

        self.run_step(
            predict,
            lambda: self.deliver(
                lambda: self.flow.resend(self.actor(actor), key), fails=mail_fails
            ),
        )

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        model, key = self.model, self.draw_request(data)
        actor = self.draw_actor(data, key)

        def predict() -> Any:
            request = model.requests.get(key)
            told = request is not None and (request.demand[1] or request.demand[2])
            own = request is not None and request.user == actor and model.registered(actor)
            if request is None or not (told and own):
                request = self.find_request(actor, key, own=False)
            if request.state_at(model.now) != "pending":
                raise Refused("RequestClosed", request.state_at(model.now))
            cancelled = request

            def then(_: object) -> None:
                cancelled.state = "cancelled"
                model.append("cancel", actor, cancelled.user)

            return then

        self.run_step(predict, lambda: self.flow.cancel(self.actor(actor), key))

    # -- the second phase ----------------------------------------------------------------------

    @precondition(lambda self: self.model.requests)
    @rule(
        data=st.data(),
        which=st.sampled_from(["right", "right", "old", "other's"]),
        allow_lockout=st.booleans(),
    )
    def confirm(self, data: st.DataObject, which: str, allow_lockout: bool) -> None:
        key = self.draw_request(data)
        self.confirm_as(self.draw_actor(data, key), key, which, allow_lockout=allow_lockout)

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), times=st.integers(1, ATTEMPTS), then_right=st.booleans())
    def guess(self, data: st.DataObject, times: int, then_right: bool) -> None:
        """Guess a number, and then the numbers of the actor's other requests."""
        key = self.draw_request(data)
        actor = self.draw_actor(data, key)
        for _ in range(times):
            self.confirm_as(actor, key, "junk", allow_lockout=False)
        for other in [k for k, a in self.model.requests.items() if a.by == actor][-2:]:
            self.confirm_as(actor, other, "right" if then_right else "junk", allow_lockout=False)

    def confirm_as(self, actor: str, key: str, which: str, *, allow_lockout: bool) -> None:
        model = self.model
        number = self.number(key, which)

        def predict() -> Any:
            request = self.find_request(actor, key, own=True)
            members = model.batch(actor, request)
            needed = model.check_ready(members)
            giving = needed[0] and not request.numbered
            if giving:
                if request.tried_at is None or model.now >= request.number_ends:
                    raise Refused("NumberExpired")
                if model.failures.get(actor, 0) >= CAP:
                    raise Refused("TooManyAttempts")
                if not number or not request.numbers or number != request.numbers[-1]:
                    left = min(each.left for each in members) - 1
                    for each in members:
                        each.left = left
                        each.state = "pending" if left else "locked"
                        model.append("wrong_number", actor, each.user)
                    model.failures[actor] = model.failures.get(actor, 0) + 1
                    raise Refused("WrongNumber", left)
                members = [each for each in members if each.numbers[-1:] == [number]]
            plans = self.predict_plans(actor, members, allow_lockout)
            if model.approvals_missing(members, needed[1]):
                return lambda outcome: self.accept_number(actor, members, outcome, giving)
            return lambda applied: self.apply(actor, members, plans, applied, giving)

        applied = self.run_step(
            predict,
            lambda: self.flow.confirm(
                self.actor(actor), key, number or "00000-00000", allow_lockout=allow_lockout
            ),
        )
        if isinstance(applied, ipguard.Applied):
            self.check_answers(applied)

    def predict_plans(
        self, actor: str, members: list[ModelRequest], allow_lockout: bool
    ) -> list[ModelPlan]:
        plans = [self.model.replan(each) for each in members]
        if not allow_lockout:
            for plan in plans:
                self.model.check_lockout(actor, plan.user, plan.after)
        return plans

    def accept_number(
        self, actor: str, members: list[ModelRequest], outcome: Any, giving: bool
    ) -> None:
        """The number was right, and an approval is missing."""
        assert isinstance(outcome, ipguard.PendingRequest)
        if giving:
            self.model.failures[actor] = 0
            for each in members:
                each.numbered = True
                self.model.append("number_accepted", actor, each.user)
        assert outcome.numbered is members[0].numbered

    def apply(
        self,
        actor: str,
        members: list[ModelRequest],
        plans: list[ModelPlan],
        applied: Any,
        giving: bool,
    ) -> None:
        """The requests hold."""
        model = self.model
        assert isinstance(applied, ipguard.Applied)
        new: dict[str, list[str]] = {}
        for restriction in applied.added:
            new.setdefault(restriction.username, []).append(restriction.id)
        if giving:
            model.failures[actor] = 0
        ended = []
        for request, plan in zip(members, plans, strict=True):
            request.state = "confirmed"
            ended += [*plan.removes, *plan.expired]
            model.change(plan, new.get(plan.user, []))
            model.append("confirm", actor, plan.user)
        assert {r.id for r in applied.removed} == set(ended)
        assert applied.revision == len(model.log)
        assert applied.impact is not None
        assert applied.impact.direction == max(plan.direction for plan in plans)
        assert applied.unrestricted is any(not plan.after for plan in plans)
        if plans[0].after:  # else it opens, which was requested
            assert not applied.impact.gained - AddressSet(r.addresses for r in applied.added)

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), allow_lockout=st.booleans())
    def approve(self, data: st.DataObject, allow_lockout: bool) -> None:
        actor = str(data.draw(st.sampled_from(sorted(ACTORS)), label="actor"))
        self.approve_as(actor, self.draw_request(data), allow_lockout=allow_lockout)

    @rule(
        data=st.data(),
        actor=st.sampled_from(["root", "bob", "kim"]),
        users=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True),
        addresses=st.permutations(sorted(RANGES)),
        rivals=st.booleans(),
        steps=st.lists(st.sampled_from(STORY), min_size=4, max_size=10),
    )
    def tell_a_story(
        self,
        data: st.DataObject,
        actor: str,
        users: list[str],
        addresses: list[str],
        rivals: bool,
        steps: list[str],
    ) -> None:
        """Make requests that belong together, and do all that may become of them."""
        before = set(self.model.requests)
        for n in range(1 + rivals):
            if len(users) == 1:
                own = list(self.model.restrictions_of(users[0]))[:n]
                self.request_as(
                    actor,
                    users[0],
                    addresses[n : n + 1],
                    None,
                    own,
                    allow_lockout=True,
                    mail_fails=False,
                )
            else:
                self.request_many_as(actor, users, addresses[n : n + 1], None, True, False)
        made = [key for key in self.model.requests if key not in before]
        for step in steps if made else ():
            key = data.draw(st.sampled_from(made), label=step)
            request = self.model.requests[key]
            if step == "confirm":
                self.confirm_as(request.by, key, "right", allow_lockout=True)
            elif step == "guess":
                self.confirm_as(request.by, key, "junk", allow_lockout=True)
            elif step == "approve":
                approver = data.draw(st.sampled_from(["bob", "dan", "kim", "ann", "root"]))
                self.approve_as(approver, key, allow_lockout=True)
            elif step == "resend":
                self.wait(INTERVAL)
                self.resend_as(request.by, key)
            elif step == "wait":
                needed = self.model.demand_of([request])
                self.wait(max(0, request.asked_at + needed[2] - self.model.now))
                if request.tried_at is None:
                    self.resend_as(request.by, key)
            elif step == "move" and request.user in self.model.accounts:
                self.put(request.user, data.draw(st.sampled_from(["U1", "U2"])))
            elif step == "settings":
                self.change_settings(data.draw(st.sampled_from(sorted(SETTINGS))))
            elif step == "lift":
                for held in self.model.restrictions_of(request.user):
                    self.lift_as("root", held)

    def approve_as(self, actor: str, key: str, *, allow_lockout: bool) -> None:
        model = self.model

        def predict() -> Any:
            request = self.find_request(actor, key, own=False)
            if request.state_at(model.now) != "pending":
                raise Refused("RequestClosed", request.state_at(model.now))
            members = model.batch(actor, request)
            needed = model.demand_of(members)
            if any(self.not_an_approver(actor, each, needed[1]) for each in members):
                raise Refused("NotAnApprover")
            given = {}
            for each in members:
                account = None if ACTORS[actor][0] is None else model.accounts[each.user]
                given[each.key] = each.approvals | {actor: (each.user, account)}
            waits = model.now < request.asked_at + needed[2]
            missing = model.approvals_missing(members, needed[1], given)
            plans = None
            if not waits and not missing and (request.numbered or not needed[0]):
                plans = self.predict_plans(actor, members, allow_lockout)

            def then(outcome: Any) -> None:
                for each in members:
                    if each.approvals != given[each.key]:
                        each.approvals = given[each.key]
                        model.append("approve", actor, each.user)
                if plans is None:
                    assert set(outcome.approved_by) == set(request.approvals)
                else:
                    self.apply(actor, members, plans, outcome, False)

            return then

        outcome = self.run_step(
            predict,
            lambda: self.flow.approve(self.actor(actor), key, allow_lockout=allow_lockout),
        )
        if isinstance(outcome, ipguard.Applied):
            self.check_answers(outcome)

    def number(self, key: str, which: str) -> str:
        """Return the right, an old or another request's number; "" if there is none."""
        request = self.model.requests.get(key)
        mine = [n for n in request.numbers if n] if request else []
        if which == "right":
            return request.numbers[-1] if request and request.numbers else ""
        if which == "old":
            return mine[-2] if len(mine) > 1 else ""
        if which == "other's":
            others = (
                a.numbers[-1] for k, a in self.model.requests.items() if k != key and a.numbers
            )
            return next(others, "")
        return ""

    def check_answers(self, applied: ipguard.Applied) -> None:
        """Check the answers of a guard that is asked for at least the new revision."""
        for user in {r.username for r in (*applied.added, *applied.removed)}:
            for address, client in CLIENTS.items():
                decision = self.prompt.check(user, address, at_least=applied.revision)
                assert decision.allowed is allows(self.model.policy(user), client, self.model.now)

    # -- deleting, imposing, lifting -----------------------------------------------------------

    @precondition(lambda self: self.model.restrictions)
    @rule(
        data=st.data(),
        allow_lockout=st.booleans(),
        mail_fails=st.sampled_from([False] * 7 + [True]),
    )
    def delete(self, data: st.DataObject, allow_lockout: bool, mail_fails: bool) -> None:
        model = self.model
        key = data.draw(
            st.sampled_from([*model.restriction_ids() * 4, "none"]), label="restriction"
        )
        user = model.restrictions[key].user if key in model.restrictions else "ann"
        usual = [name for name in ACTORS if model.sees(name, user)]
        actor = data.draw(st.sampled_from([*usual * 4, *sorted(ACTORS)]), label="actor")

        def predict() -> Any:
            restriction = model.restrictions.get(key)
            if restriction is None or not model.sees(actor, restriction.user):
                raise Refused("UnknownRestriction", key)
            plan = model.plan(restriction.user, (), None, [key])
            if model.demanded("delete", plan.direction) != NOTHING:
                plan.until = restriction.until
                return self.predict_begun(actor, [plan], allow_lockout, mail_fails)
            if not allow_lockout:
                model.check_lockout(actor, plan.user, plan.after)
            return lambda applied: self.apply_removal(applied, "delete", actor, key)

        outcome = self.run_step(
            predict,
            lambda: self.deliver(
                lambda: self.flow.delete(self.actor(actor), key, allow_lockout=allow_lockout),
                fails=mail_fails,
            ),
        )
        if isinstance(outcome, ipguard.Applied):
            self.check_answers(outcome)

    def apply_removal(self, applied: ipguard.Applied, action: str, actor: str, key: str) -> None:
        model = self.model
        user = model.restrictions[key].user
        model.remove_restriction(key)
        assert applied.unrestricted is (not model.restrictions_of(user))
        assert applied.revision == model.append(action, actor, user)

    @rule(
        actor=st.sampled_from(["root"] * 8 + ["bob"]),
        user=st.sampled_from([*NAMES * 4, "eve"]),
        addresses=st.lists(st.sampled_from(sorted(RANGES)), min_size=1, max_size=2),
        lifetime=st.sampled_from([None, 3, 300]),
        only=st.booleans(),
    )
    def impose(
        self, actor: str, user: str, addresses: list[str], lifetime: int | None, only: bool
    ) -> None:
        model = self.model
        until = None if lifetime is None else model.now + lifetime

        def predict() -> Any:
            if actor != "root" or user not in model.accounts or user in model.removed:
                raise Refused("UnknownUser", user)
            runs = tuple(RANGES[each] for each in addresses)
            plan = model.plan(user, runs, until, only=only)

            def then(applied: ipguard.Applied) -> None:
                model.change(plan, [r.id for r in applied.added])
                assert not applied.unrestricted
                assert applied.impact is not None
                assert applied.impact.direction == plan.direction
                assert applied.revision == model.append("impose", actor, user)

            return then

        applied = self.run_step(
            predict,
            lambda: self.flow.impose(
                self.actor(actor),
                user,
                addresses,
                reason="x",
                expires_at=self.time(until),
                only=only,
            ),
        )
        if applied is not None:
            self.check_answers(applied)

    @rule(
        actor=st.sampled_from(["root"] * 8 + ["bob"]),
        users=st.lists(st.sampled_from([*NAMES * 4, "eve"]), min_size=1, max_size=2, unique=True),
        addresses=st.lists(st.sampled_from(sorted(RANGES)), min_size=1, max_size=2),
        lifetime=st.sampled_from([None, None, 300]),
        options=st.sampled_from([{}, {"replace": True}, {"skip_existing": True}]),
    )
    def impose_many(
        self,
        actor: str,
        users: list[str],
        addresses: list[str],
        lifetime: int | None,
        options: dict[str, bool],
    ) -> None:
        model = self.model
        until = None if lifetime is None else model.now + lifetime
        runs = [RANGES[each] for each in addresses]
        rows = [(user, each, "", self.time(until)) for user in users for each in addresses]

        def predict() -> Any:
            if actor != "root":
                raise Refused("UnknownUser")
            for user in users:
                if not model.registered(user):
                    raise Refused("UnknownUser")
            if len(set(runs)) < len(runs):
                raise Refused("DuplicateRestriction")
            changes = [self.predict_import(user, runs, until, options) for user in users]
            if any(
                len(model.restrictions_of(user)) - len(ends) + len(new) > PER_USER
                for user, new, ends in changes
                if new
            ):
                raise Refused("TooManyRestrictions")

            def then(applied: ipguard.Applied) -> None:
                for user, new, ends in changes:
                    for key in ends:
                        model.remove_restriction(key)
                    held = set(model.restrictions)
                    for r in self.store.load_policy(user).restrictions:
                        if r.id not in held:
                            run = (r.addresses.version, r.addresses.first, r.addresses.last)
                            assert run in new
                            model.restrictions[r.id] = ModelRestriction(user, run, until)
                counts = applied.counts
                assert counts is not None
                assert (counts.added, counts.ended) == (
                    sum(len(new) for _, new, _ in changes),
                    sum(len(ends) for _, _, ends in changes),
                )
                assert applied.revision == model.append("impose_many", actor, None)

            return then

        self.run_step(
            predict, lambda: self.flow.impose_many(self.actor(actor), rows, reason="x", **options)
        )

    def predict_import(
        self, user: str, runs: list[Run], until: float | None, options: dict[str, bool]
    ) -> tuple[str, list[Run], list[str]]:
        """Return a user, the additions of an import, and the ids that it ends."""
        model = self.model
        held = model.restrictions_of(user)
        live = {r.run: key for key, r in held.items() if not r.over(model.now)}
        if "replace" in options:
            same = {run: key for run, key in live.items() if held[key].until == until}
            kept = {same[run] for run in runs if run in same}
            new = [run for run in runs if run not in same]
            return user, new, [key for key in held if key not in kept]
        if "skip_existing" not in options and set(live) & set(runs):
            raise Refused("DuplicateRestriction")
        new = [run for run in runs if run not in live]
        return user, new, [key for key, r in held.items() if r.run in new]

    @precondition(lambda self: self.model.restrictions)
    @rule(data=st.data(), actor=st.sampled_from(["root"] * 6 + ["bob"]))
    def lift(self, data: st.DataObject, actor: str) -> None:
        ids = [*self.model.restriction_ids() * 4, "none"]
        self.lift_as(actor, data.draw(st.sampled_from(ids), label="restriction"))

    def lift_as(self, actor: str, key: str) -> None:
        model = self.model

        def predict() -> Any:
            if actor != "root" or key not in model.restrictions:
                raise Refused("UnknownRestriction", key)
            return lambda applied: self.apply_removal(applied, "lift", actor, key)

        applied = self.run_step(predict, lambda: self.flow.lift(self.actor(actor), key, reason="x"))
        if applied is not None:
            self.check_answers(applied)

    @precondition(lambda self: any(count >= CAP - 1 for count in self.model.failures.values()))
    @rule(actor=st.sampled_from(["root", "dan", "dan"]), name=st.sampled_from(sorted(ACTORS)))
    def unlock(self, actor: str, name: str) -> None:
        model = self.model

        def predict() -> Any:
            if actor != "root":
                raise Refused("UnknownUser", name)

            def then(_: object) -> None:
                model.failures[name] = 0
                model.append("unlock", actor, name)

            return then

        self.run_step(
            predict,
            lambda: self.flow.unlock(self.actor(actor), SPELLINGS.get(name, name), reason="x"),
        )

    # -- logging in ----------------------------------------------------------------------------

    def log_in(self, user: str, address: str) -> None:
        """Ask the guard that syncs by itself: its answer may be stale."""
        acceptable = self.model.possible_answers(user, CLIENTS[address])
        assert self.guard.is_allowed(SPELLINGS[user], address) in acceptable

    @rule()
    def log_in_after_a_sync(self) -> None:
        """Ask the guard after a sync: each answer must be right."""
        model = self.model
        assert self.guard.sync() == len(model.log)
        for user in NAMES:
            for address, client in CLIENTS.items():
                right = allows(model.policy(user), client, model.now)
                assert self.guard.is_allowed(user, address) is right
                assert self.guard.check(SPELLINGS[user], address).allowed is right

    @invariant()
    def log_in_any_time(self) -> None:
        """Ask after every step, so that the guard has answers in its cache."""
        for user in NAMES:
            for address in ("203.0.113.1", "203.0.113.5"):
                self.log_in(user, address)

    # -- always --------------------------------------------------------------------------------

    @invariant()
    def check_head(self) -> None:
        assert self.store.changes_since(None).head == len(self.model.log)

    @invariant()
    def check_failures(self) -> None:
        with self.store.transaction() as turn:
            found = {name: turn.failures(name) for name in ACTORS}
        assert found == {name: self.model.failures.get(name, 0) for name in ACTORS}

    @invariant()
    def check_policies(self) -> None:
        expected = {
            user: {key: r.run for key, r in self.model.restrictions_of(user).items()}
            for user in NAMES
        }
        for user in NAMES:
            assert runs_of(self.store.load_policy(user)) == expected[user]
        self.earlier[len(self.model.log)] = expected

    def check_record(self) -> None:
        """At the end, every policy is read as it was, and the chain of tokens is whole."""
        for revision, policies in self.earlier.items():
            for user, expected in policies.items():
                assert runs_of(self.store.policy_at(user, revision)) == expected
        assert self.store.verify().damage == ()

    @rule(actor=st.sampled_from(sorted(ACTORS)))
    def check_list(self, actor: str) -> None:
        """The list shows the users of the actor's accounts, as in the model."""
        model = self.model
        lines = {line.user.username: line for line in self.flow.overview(self.actor(actor))}
        assert set(lines) == {
            name
            for name in NAMES
            if model.sees(actor, name)
            and (name not in model.removed or model.restrictions_of(name))
        }
        for name, line in lines.items():
            assert {r.id for r in line.restrictions} == set(model.restrictions_of(name))
            assert (line.summary == "No restrictions") is (not model.restrictions_of(name))
            assert line.removed is (name in model.removed)
            waiting = {key: a for key, a in model.requests.items() if a in model.pending(name)}
            assert {
                r.id: (r.attempts_left, r.numbered, set(r.approved_by)) for r in line.pending
            } == {
                key: (request.left, request.numbered, set(request.approvals))
                for key, request in waiting.items()
            }

    @rule(actor=st.sampled_from(sorted(ACTORS)))
    def check_waiting(self, actor: str) -> None:
        """An actor is shown its own requests, and those that it can approve."""
        model = self.model
        expected = set()
        for key in model.waiting():
            request = model.requests[key]
            if not model.sees(actor, request.user):
                continue
            members = model.batch(actor, request)
            needed = model.demand_of(members)[1]
            approvable = request.demand[1] and not any(
                self.not_an_approver(actor, each, needed) for each in members
            )
            missing = model.approvals_missing(members, needed)
            _, account = request.approvals.get(actor, (None, ""))
            approved = actor in request.approvals and account in (
                None,
                model.accounts[request.user],
            )
            if request.by == actor or (approvable and missing and not approved):
                expected.add(key)
        assert {each.id for each in self.flow.waiting(self.actor(actor))} == expected

    @staticmethod
    def not_an_approver(actor: str, request: ModelRequest, needed: int) -> bool:
        others = {email_of(name) for name in request.approvals if name != actor}
        mine = email_of(actor)
        return (
            not needed
            or mine == email_of(request.by)
            or (actor == request.user and needed == 1)
            or mine in others
        )

    @rule()
    def check_history(self) -> None:
        """Each actor sees the entries of its accounts in the audit log, without gaps."""
        for name, (manages, _) in ACTORS.items():
            rows = self.flow.history(self.actor(name), limit=1000).items
            assert [
                (row.revision, str(row.action), row.actor, row.username, row.account_id)
                for row in reversed(rows)
            ] == [
                (revision, *entry)
                for revision, entry in enumerate(self.model.log, start=1)
                if manages is None or entry[3] in manages
            ]


def runs_of(policy: ipguard.Policy) -> dict[str, tuple[int, int, int]]:
    """Return the addresses of restrictions, by id."""
    return {
        r.id: (r.addresses.version, r.addresses.first, r.addresses.last)
        for r in policy.restrictions
    }


def data_of(error: Exception) -> tuple[object, ...]:
    """Return the data of an error, with durations in seconds."""
    return tuple(a.total_seconds() if isinstance(a, timedelta) else a for a in error.args)


class MemoryMachine(Machine):
    def url(self) -> str:
        return "memory://"


class SQLiteMachine(Machine):
    def url(self) -> str:
        return f"sqlite:///{self.folder / 'a.db'}"


class PostgresMachine(Machine):
    server: ClassVar[Server | Given]

    def url(self) -> str:
        return self.server.url(schema=fresh_schema(), listen="off", timeout=20)


@pytest.fixture
def _server(postgres: Server | Given) -> None:
    PostgresMachine.server = postgres


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=rounds(100, 2000), stateful_step_count=50)
TestSQLite = pytest.mark.slow(SQLiteMachine.TestCase)
TestSQLite.settings = settings(max_examples=rounds(20, 300), stateful_step_count=50)
TestPostgres = pytest.mark.slow(pytest.mark.usefixtures("_server")(PostgresMachine.TestCase))
TestPostgres.settings = settings(max_examples=rounds(10, 300), stateful_step_count=50)
