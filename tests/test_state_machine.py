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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ipguard
from ipguard import Actor, Guard, User, Workflow, WorkflowSettings
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
}


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

    kind: str
    user: str
    run: tuple[int, int, int]
    by: str
    ends: float
    number_ends: float
    until: float | None
    target: str | None
    state: str = "pending"
    left: int = ATTEMPTS
    sent: int = 1
    failed: int = 0  # in a row
    tried_at: float = 0.0
    numbers: list[str] = attrs.field(factory=list)

    def state_at(self, now: float) -> str:
        return "expired" if self.state == "pending" and now >= self.ends else self.state


Policy = tuple[tuple[tuple[int, int, int], float | None], ...]


def allows(policy: Policy, client: tuple[int, int] | None, now: float) -> bool:
    """Return whether restrictions allow a client."""
    if client is None:
        return False
    version, number = client
    return not policy or any(
        run[0] == version and run[1] <= number <= run[2] and (until is None or now < until)
        for run, until in policy
    )


class Model:
    """The expected state."""

    def __init__(self, deletes: bool | str) -> None:
        self.deletes = deletes
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

    def restrictions_of(self, user: str) -> dict[str, ModelRestriction]:
        return {key: r for key, r in self.restrictions.items() if r.user == user}

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

    def check_new(self, user: str, run: tuple[int, int, int], until: float | None) -> str | None:
        """Check a new restriction; return the id of the expired one that it replaces."""
        if until is not None and until <= self.now:
            raise Refused("InvalidValue")
        same = [key for key, r in self.restrictions_of(user).items() if r.run == run]
        if any(not self.restrictions[key].over(self.now) for key in same):
            raise Refused("DuplicateRestriction")
        if len(self.restrictions_of(user)) - len(same) >= PER_USER:
            raise Refused("TooManyRestrictions", user, PER_USER)
        return same[0] if same else None

    def check_lockout(self, actor: str, user: str, after: Policy) -> None:
        address = ACTORS[actor][1]
        if actor != user or address is None:
            return
        client = CLIENTS[address]
        forever = float("inf")
        if allows(self.policy(user), client, self.now) and not allows(after, client, forever):
            raise Refused("LockoutRisk", address)

    def check_rate(self, actor: str) -> None:
        times = [r.ends - REQUEST_LIVES for r in self.requests.values() if r.by == actor]
        recent = sorted(t for t in times if t > self.now - HOUR)
        if len(recent) >= PER_HOUR:
            raise Refused("TooManyRequests", recent[-PER_HOUR] + HOUR - self.now)

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

    def remove_restriction(self, key: str) -> None:
        user = self.restrictions.pop(key).user
        for request in self.pending(user):
            if request.target == key:
                request.state = "cancelled"


class Machine(RuleBasedStateMachine):
    """The library and the model, side by side."""

    def url(self) -> str:
        """Return the URL of the store."""
        raise NotImplementedError

    @initialize(deletes=st.sampled_from([False, "last", True]))
    def open(self, deletes: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ipguard-"))
        self.clock = FakeClock()
        self.started = self.clock()
        self.store = ipguard.open_store(self.url(), clock=self.clock)
        self.outbox = Outbox()
        self.flow = Workflow(
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
                confirm_deletes=deletes,
            ),
        )
        # One guard syncs by itself; the other is request for each new revision.
        self.guard, self.prompt = (
            Guard(self.store, max_staleness=STALE, monotonic=self.clock.monotonic) for _ in range(2)
        )
        self.model = Model(deletes)
        self.put("ann", "U1")
        self.put("bob", "U2")
        self.put("cat", "U2")

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.check_history()
        self.store.close()
        shutil.rmtree(self.folder)

    # -- steps ---------------------------------------------------------------------------------

    def actor(self, name: str) -> Actor:
        manages, address = ACTORS[name]
        return Actor(
            username=SPELLINGS.get(name, name),
            email=f"{name}@x.example",
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
        addresses=st.sampled_from([*RANGES, *RANGES, TOO_BROAD]),
        lifetime=st.sampled_from([None, None, None, 300, 3600]),
        allow_lockout=st.booleans(),
        mail_fails=st.sampled_from([False] * 7 + [True]),
    )
    def request_one(
        self,
        data: st.DataObject,
        user: str,
        addresses: str,
        lifetime: int | None,
        allow_lockout: bool,
        mail_fails: bool,
    ) -> None:
        usual = [name for name in ACTORS if self.model.sees(name, user)]
        actor = data.draw(st.sampled_from([*usual * 4, *sorted(ACTORS)]), label="actor")
        self.request_as(
            actor, user, addresses, lifetime, allow_lockout=allow_lockout, mail_fails=mail_fails
        )

    def request_as(
        self,
        actor: str,
        user: str,
        addresses: str,
        lifetime: int | None,
        *,
        allow_lockout: bool,
        mail_fails: bool,
    ) -> None:
        model, until = self.model, None if lifetime is None else self.model.now + lifetime

        def predict() -> Any:
            if not model.sees(actor, user) or user in model.removed:
                raise Refused("UnknownUser", user)
            if addresses == TOO_BROAD:
                raise Refused("AddressTooBroad")
            run = RANGES[addresses]
            replaced = model.check_new(user, run, until)
            if any(a.kind == "add" and a.run == run for a in model.pending(user)):
                raise Refused("DuplicateRestriction")
            after = {k: h for k, h in model.restrictions_of(user).items() if k != replaced}
            lets = (*((h.run, h.until) for h in after.values()), (run, until))
            if not allow_lockout:
                model.check_lockout(actor, user, lets)
            model.check_rate(actor)
            return lambda outcome: self.add_request(outcome, "add", actor, user, run, until, None)

        expires = None if until is None else self.started + timedelta(seconds=until)
        self.run_step(
            predict,
            lambda: self.deliver(
                mail_fails,
                lambda: self.flow.request(
                    self.actor(actor),
                    SPELLINGS[user],
                    addresses,
                    expires_at=expires,
                    allow_lockout=allow_lockout,
                ),
            ),
        )

    @rule(
        data=st.data(),
        name=st.sampled_from(["ann", "bob"]),
        addresses=st.sampled_from(sorted(RANGES)),
        lifetime=st.sampled_from([None, 300]),
    )
    def restrict_oneself(
        self, data: st.DataObject, name: str, addresses: str, lifetime: int | None
    ) -> None:
        """Restrict oneself and confirm, which may be a check_lockout."""
        if self.model.sees(name, name):
            before = set(self.model.requests)
            self.request_as(name, name, addresses, lifetime, allow_lockout=False, mail_fails=False)
            for key in set(self.model.requests) - before:
                self.confirm_as(name, key, "right", allow_lockout=False)

    def deliver(self, fails: bool, call: Callable[[], Any]) -> Any:
        """Return the request, or its id if the mail fails."""
        self.outbox.fail = fails
        try:
            outcome = call()
        except ipguard.DeliveryError as exc:
            assert fails
            return exc.request_id
        finally:
            self.outbox.fail = False
        assert not fails or isinstance(outcome, ipguard.Applied)
        return outcome

    def add_request(
        self,
        outcome: ipguard.PendingRequest | str,
        kind: str,
        actor: str,
        user: str,
        run: tuple[int, int, int],
        until: float | None,
        target: str | None,
    ) -> None:
        model = self.model
        request = ModelRequest(
            kind,
            user,
            run,
            actor,
            ends=model.now + REQUEST_LIVES,
            number_ends=model.now + NUMBER_LIVES,
            until=until,
            target=target,
            tried_at=model.now,
        )
        model.append("request", actor, user)
        if isinstance(outcome, str):
            model.requests[outcome] = request
            request.sent, request.failed = 0, 1
            model.append("delivery_failed", actor, user)
        else:
            model.requests[outcome.id] = request
            request.numbers.append(self.outbox.number_for(outcome.id))

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
        model, key = self.model, self.draw_request(data)
        actor = self.draw_actor(data, key)
        if in_time:
            self.wait(INTERVAL)

        def predict() -> Any:
            request = self.find_request(actor, key, own=True)
            if request.state_at(model.now) != "pending":
                raise Refused("RequestClosed", request.state_at(model.now))
            if request.sent > RESENDS:
                raise Refused("TooManyRequests", request.ends - model.now)
            # Failed mails do not count until as many failed in a row as may be resent.
            at_once = 0 < request.failed <= RESENDS
            if not at_once and model.now < request.tried_at + INTERVAL:
                raise Refused("TooManyRequests", request.tried_at + INTERVAL - model.now)

            def then(outcome: Any) -> None:
                request.left = ATTEMPTS
                request.number_ends = min(model.now + NUMBER_LIVES, request.ends)
                request.numbers.append("")  # the previous number is invalid
                model.append("resend", actor, request.user)
                request.tried_at = model.now
                if isinstance(outcome, str):
                    request.failed += 1
                    model.append("delivery_failed", actor, request.user)
                else:
                    request.sent, request.failed = request.sent + 1, 0
                    request.numbers.append(self.outbox.number_for(key))
                    assert outcome.attempts_left == ATTEMPTS

            return then

        self.run_step(
            predict,
            lambda: self.deliver(mail_fails, lambda: self.flow.resend(self.actor(actor), key)),
        )

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        model, key = self.model, self.draw_request(data)
        actor = self.draw_actor(data, key)

        def predict() -> Any:
            request = self.find_request(actor, key, own=False)
            if request.state_at(model.now) != "pending":
                raise Refused("RequestClosed", request.state_at(model.now))

            def then(_: object) -> None:
                request.state = "cancelled"
                model.append("cancel", actor, request.user)

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
            state = request.state_at(model.now)
            if state == "locked":
                raise Refused("TooManyAttempts")
            if state != "pending":
                raise Refused("RequestClosed", state)
            if model.now >= request.number_ends:
                raise Refused("NumberExpired")
            if model.failures.get(actor, 0) >= CAP:
                raise Refused("TooManyAttempts")
            if not number or not request.numbers or number != request.numbers[-1]:
                request.left -= 1
                request.state = "pending" if request.left else "locked"
                model.failures[actor] = model.failures.get(actor, 0) + 1
                model.append("wrong_number", actor, request.user)
                raise Refused("WrongNumber", request.left)
            return self.predict_applied(actor, request, allow_lockout)

        applied = self.run_step(
            predict,
            lambda: self.flow.confirm(
                self.actor(actor), key, number or "00000-00000", allow_lockout=allow_lockout
            ),
        )
        if applied is not None:
            self.check_answers(applied)

    def predict_applied(self, actor: str, request: ModelRequest, allow_lockout: bool) -> Any:
        model = self.model
        current = model.restrictions_of(request.user)
        if request.kind == "add":
            replaced = model.check_new(request.user, request.run, request.until)
            new: Policy = ((request.run, request.until),)
        else:
            replaced, new = request.target, ()
        after = (*((h.run, h.until) for k, h in current.items() if k != replaced), *new)
        if not allow_lockout:
            model.check_lockout(actor, request.user, after)

        def then(applied: ipguard.Applied) -> None:
            assert applied.restriction is not None
            request.state = "confirmed"
            model.failures[actor] = 0
            if replaced is not None:
                model.remove_restriction(replaced)
            if new:
                model.restrictions[applied.restriction.id] = ModelRestriction(
                    request.user, request.run, request.until
                )
            else:
                assert applied.restriction.id == replaced
            assert applied.unrestricted is (not model.restrictions_of(request.user))
            assert applied.revision == model.append("confirm", actor, request.user)

        return then

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
        """Check the answers of a guard that is request for at least the new revision."""
        assert applied.restriction is not None
        user = applied.restriction.username
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
            st.sampled_from([*list(model.restrictions) * 4, "none"]), label="restriction"
        )
        user = model.restrictions[key].user if key in model.restrictions else "ann"
        usual = [name for name in ACTORS if model.sees(name, user)]
        actor = data.draw(st.sampled_from([*usual * 4, *sorted(ACTORS)]), label="actor")

        def predict() -> Any:
            restriction = model.restrictions.get(key)
            if restriction is None or not model.sees(actor, restriction.user):
                raise Refused("UnknownRestriction", key)
            others = {k: h for k, h in model.restrictions_of(restriction.user).items() if k != key}
            if not allow_lockout and others:
                model.check_lockout(
                    actor, restriction.user, tuple((h.run, h.until) for h in others.values())
                )
            if model.deletes is True or (model.deletes == "last" and not others):
                if any(a.target == key for a in model.pending(restriction.user)):
                    raise Refused("DuplicateRestriction")
                model.check_rate(actor)
                return lambda outcome: self.add_request(
                    outcome,
                    "delete",
                    actor,
                    restriction.user,
                    restriction.run,
                    restriction.until,
                    key,
                )
            return lambda applied: self.apply_removal(applied, "delete", actor, key)

        outcome = self.run_step(
            predict,
            lambda: self.deliver(
                mail_fails,
                lambda: self.flow.delete(self.actor(actor), key, allow_lockout=allow_lockout),
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
        addresses=st.sampled_from(sorted(RANGES)),
        lifetime=st.sampled_from([None, 3, 300]),
    )
    def impose(self, actor: str, user: str, addresses: str, lifetime: int | None) -> None:
        model = self.model
        until = None if lifetime is None else model.now + lifetime

        def predict() -> Any:
            if actor != "root" or user not in model.accounts or user in model.removed:
                raise Refused("UnknownUser", user)
            replaced = model.check_new(user, RANGES[addresses], until)

            def then(applied: ipguard.Applied) -> None:
                assert applied.restriction is not None
                if replaced is not None:
                    model.remove_restriction(replaced)
                model.restrictions[applied.restriction.id] = ModelRestriction(
                    user, RANGES[addresses], until
                )
                assert applied.revision == model.append("impose", actor, user)

            return then

        expires = None if until is None else self.started + timedelta(seconds=until)
        applied = self.run_step(
            predict,
            lambda: self.flow.impose(
                self.actor(actor), user, addresses, reason="x", expires_at=expires
            ),
        )
        if applied is not None:
            self.check_answers(applied)

    @precondition(lambda self: self.model.restrictions)
    @rule(data=st.data(), actor=st.sampled_from(["root"] * 6 + ["bob"]))
    def lift(self, data: st.DataObject, actor: str) -> None:
        model = self.model
        key = data.draw(
            st.sampled_from([*list(model.restrictions) * 4, "none"]), label="restriction"
        )

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
        for user in NAMES:
            policy = self.store.load_policy(user)
            found = {
                r.id: (r.addresses.version, r.addresses.first, r.addresses.last)
                for r in policy.restrictions
            }
            assert found == {key: r.run for key, r in self.model.restrictions_of(user).items()}

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
            assert {r.id: r.attempts_left for r in line.pending} == {
                key: request.left for key, request in waiting.items()
            }

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
