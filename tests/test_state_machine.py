"""Workflow and guard against a small model, in whatever order hypothesis thinks of.

The model is written from the contract and knows nothing of `ipguard.rules`: addresses are pairs of
integers, times are seconds, and each step is foretold before it is made. What must agree: every
refusal, every change, the revisions, the trail, the page; and each answer of the guard is one that
was right at some moment of the last `max_staleness` seconds.
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
SPELLINGS = {"ann": "Ann", "bob": "bob", "cat": "ＣＡＴ", "eve": "eve"}  # noqa: RUF001
ACTORS: dict[str, tuple[frozenset[str] | None, str | None]] = {
    "ann": (frozenset({"U1"}), "203.0.113.1"),
    "bob": (frozenset({"U1", "U2"}), "203.0.113.5"),
    "dan": (frozenset({"U2"}), None),
    "root": (None, "203.0.113.1"),
}


class Refused(Exception):
    """What the model foretells instead of an outcome."""

    def __init__(self, name: str, *data: object) -> None:
        super().__init__(name, *data)
        self.name, self.data = name, data


@attrs.define
class Held:
    """A restriction of the model."""

    user: str
    run: tuple[int, int, int]
    until: float | None

    def over(self, now: float) -> bool:
        return self.until is not None and now >= self.until


@attrs.define
class Asked:
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


Lets = tuple[tuple[tuple[int, int, int], float | None], ...]


def lets_in(held: Lets, client: tuple[int, int] | None, now: float) -> bool:
    """The question that everything is about."""
    if client is None:
        return False
    version, number = client
    return not held or any(
        run[0] == version and run[1] <= number <= run[2] and (until is None or now < until)
        for run, until in held
    )


class Model:
    """What the contract says, as plainly as it can be said."""

    def __init__(self, deletes: bool | str) -> None:
        self.deletes = deletes
        self.now = 0.0
        self.accounts: dict[str, str] = {}
        self.gone: set[str] = set()
        self.held: dict[str, Held] = {}
        self.asked: dict[str, Asked] = {}
        self.failures: dict[str, int] = {}
        self.trail: list[tuple[str, str | None, str | None, str | None]] = []
        # What each user was restricted to since when, for answers that may be a little old.
        self.past: dict[str, list[tuple[float, Lets]]] = {name: [(0.0, ())] for name in NAMES}

    # What there is.

    def of(self, user: str) -> dict[str, Held]:
        return {key: held for key, held in self.held.items() if held.user == user}

    def lets(self, user: str) -> Lets:
        return tuple((held.run, held.until) for held in self.of(user).values())

    def might_be_let_in(self, user: str, client: tuple[int, int] | None) -> set[bool]:
        story = [*self.past[user], (float("inf"), ())]
        return {
            lets_in(lets, client, self.now)
            for (_, lets), (replaced, _) in itertools.pairwise(story)
            if replaced > self.now - STALE
        }

    def sees(self, actor: str, user: str) -> bool:
        manages = ACTORS[actor][0]
        if user not in self.accounts:
            return False
        return manages is None or (self.accounts[user] in manages and user not in self.gone)

    def note(self, action: str, actor: str | None, user: str | None) -> int:
        account = None if user is None else self.accounts.get(user)
        self.trail.append((action, actor, user, account))
        for name in NAMES:
            if self.past[name][-1][1] != self.lets(name):
                self.past[name].append((self.now, self.lets(name)))
        return len(self.trail)

    # What may not be.

    def room_for(self, user: str, run: tuple[int, int, int], until: float | None) -> str | None:
        """Return what a new restriction would replace."""
        if until is not None and until <= self.now:
            raise Refused("InvalidValue")
        same = [key for key, held in self.of(user).items() if held.run == run]
        if any(not self.held[key].over(self.now) for key in same):
            raise Refused("DuplicateRestriction")
        if len(self.of(user)) - len(same) >= PER_USER:
            raise Refused("TooManyRestrictions", user, PER_USER)
        return same[0] if same else None

    def lockout(self, actor: str, user: str, after: Lets) -> None:
        address = ACTORS[actor][1]
        if actor != user or address is None:
            return
        client = CLIENTS[address]
        forever = float("inf")
        if lets_in(self.lets(user), client, self.now) and not lets_in(after, client, forever):
            raise Refused("LockoutRisk", address)

    def pace(self, actor: str) -> None:
        times = [a.ends - REQUEST_LIVES for a in self.asked.values() if a.by == actor]
        recent = sorted(t for t in times if t > self.now - HOUR)
        if len(recent) >= PER_HOUR:
            raise Refused("TooManyRequests", recent[-PER_HOUR] + HOUR - self.now)

    def pending(self, user: str) -> list[Asked]:
        return [
            a for a in self.asked.values() if a.user == user and a.state_at(self.now) == "pending"
        ]

    def drop(self, key: str) -> None:
        user = self.held.pop(key).user
        for asked in self.pending(user):
            if asked.target == key:
                asked.state = "cancelled"


class Machine(RuleBasedStateMachine):
    """The real thing and the model, side by side."""

    def url(self) -> str:
        """Where this machine's store is."""
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
        # One guard that nobody hurries, and one that is asked for each new revision.
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
        self.the_trail()
        self.store.close()
        shutil.rmtree(self.folder)

    # -- carrying out --------------------------------------------------------------------------

    def actor(self, name: str) -> Actor:
        manages, address = ACTORS[name]
        return Actor(
            username=SPELLINGS.get(name, name),
            email=f"{name}@x.example",
            manages=Actor.EVERY_ACCOUNT if manages is None else manages,
            address=address,
        )

    def carry_out(self, foretell: Callable[[], Any], call: Callable[[], Any]) -> Any:
        """Do a thing, and see that it is refused exactly where the model says so.

        `foretell` refuses by raising, or returns what has to be done to the model with the outcome.
        """
        refused: Refused | None = None
        raised: ipguard.IPGuardError | None = None
        then: Callable[[Any], object] = lambda _: None  # noqa: E731
        outcome: Any = None
        try:
            then = foretell()
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
        assert not refused.data or refused.data == carried_by(raised), (
            f"{raised!r}, not {refused!r}"
        )
        return None

    # -- the host ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), account=st.sampled_from(["U1", "U2"]))
    def put(self, name: str, account: str) -> None:
        model = self.model
        revision = self.store.put_users(
            [User(username=SPELLINGS[name], full_name=name, account_id=account)]
        )
        if model.accounts.get(name) != account or name in model.gone:
            model.accounts[name] = account
            model.gone.discard(name)
            model.note("put_users", None, name)
        assert revision == len(model.trail)

    @rule(name=st.sampled_from(NAMES), back=st.sampled_from([True, True, False]))
    def remove_and_perhaps_put_back(self, name: str, back: bool) -> None:
        self.remove(name)
        if back:
            self.put(name, self.model.accounts[name])

    def remove(self, name: str) -> None:
        model = self.model
        revision = self.store.remove_users([name])
        if name in model.accounts and name not in model.gone:
            model.gone.add(name)
            for asked in model.asked.values():
                if asked.user == name and asked.state == "pending":
                    asked.state = "cancelled"
            model.note("remove_users", None, name)
        assert revision == len(model.trail)

    @rule(seconds=st.sampled_from([1, 3, 4, 5, 30, 300, 600, 3600, 7200]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(timedelta(seconds=seconds))
        self.model.now += seconds

    # -- the first phase -----------------------------------------------------------------------

    @rule(
        data=st.data(),
        user=st.sampled_from([*NAMES * 4, "eve"]),
        addresses=st.sampled_from([*RANGES, *RANGES, TOO_BROAD]),
        lives=st.sampled_from([None, None, None, 300, 3600]),
        insist=st.booleans(),
        mail_fails=st.sampled_from([False] * 7 + [True]),
    )
    def ask(
        self,
        data: st.DataObject,
        user: str,
        addresses: str,
        lives: int | None,
        insist: bool,
        mail_fails: bool,
    ) -> None:
        usual = [name for name in ACTORS if self.model.sees(name, user)]
        actor = data.draw(st.sampled_from([*usual * 4, *sorted(ACTORS)]), label="actor")
        self.ask_as(actor, user, addresses, lives, insist=insist, mail_fails=mail_fails)

    def ask_as(
        self,
        actor: str,
        user: str,
        addresses: str,
        lives: int | None,
        *,
        insist: bool,
        mail_fails: bool,
    ) -> None:
        model, until = self.model, None if lives is None else self.model.now + lives

        def foretell() -> Any:
            if not model.sees(actor, user) or user in model.gone:
                raise Refused("UnknownUser", user)
            if addresses == TOO_BROAD:
                raise Refused("AddressTooBroad")
            run = RANGES[addresses]
            replaced = model.room_for(user, run, until)
            if any(a.kind == "add" and a.run == run for a in model.pending(user)):
                raise Refused("DuplicateRestriction")
            after = {k: h for k, h in model.of(user).items() if k != replaced}
            lets = (*((h.run, h.until) for h in after.values()), (run, until))
            if not insist:
                model.lockout(actor, user, lets)
            model.pace(actor)
            return lambda request: self.waits(request, "add", actor, user, run, until, None)

        expires = None if until is None else self.started + timedelta(seconds=until)
        self.carry_out(
            foretell,
            lambda: self.deliver(
                mail_fails,
                lambda: self.flow.request(
                    self.actor(actor),
                    SPELLINGS[user],
                    addresses,
                    expires_at=expires,
                    allow_lockout=insist,
                ),
            ),
        )

    @rule(
        data=st.data(),
        name=st.sampled_from(["ann", "bob"]),
        addresses=st.sampled_from(sorted(RANGES)),
        lives=st.sampled_from([None, 300]),
    )
    def ask_for_oneself(
        self, data: st.DataObject, name: str, addresses: str, lives: int | None
    ) -> None:
        """Restrict oneself, and go through with it: what locking oneself out is about."""
        if self.model.sees(name, name):
            before = set(self.model.asked)
            self.ask_as(name, name, addresses, lives, insist=False, mail_fails=False)
            for key in set(self.model.asked) - before:
                self.confirm_as(name, key, "right", insist=False)

    def deliver(self, fails: bool, call: Callable[[], Any]) -> Any:
        """Return the request, whether its mail gets through or not."""
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

    def waits(
        self,
        request: ipguard.PendingRequest | str,
        kind: str,
        actor: str,
        user: str,
        run: tuple[int, int, int],
        until: float | None,
        target: str | None,
    ) -> None:
        model = self.model
        asked = Asked(
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
        model.note("request", actor, user)
        if isinstance(request, str):
            model.asked[request] = asked
            asked.sent, asked.failed = 0, 1
            model.note("delivery_failed", actor, user)
        else:
            model.asked[request.id] = asked
            asked.numbers.append(self.outbox.number_for(request.id))

    def known(self, actor: str, key: str, *, own: bool) -> Asked:
        asked = self.model.asked.get(key)
        if asked is None or not self.model.sees(actor, asked.user) or (own and asked.by != actor):
            raise Refused("UnknownRequest", key)
        return asked

    def a_request(self, data: st.DataObject) -> str:
        """Draw one of the last requests, the newest most often, and rarely one that never was."""
        newest = list(reversed(self.model.asked))[:4]
        usual = [key for n, key in enumerate(newest) for _ in range(8 >> n)]
        return str(data.draw(st.sampled_from([*usual, "none"]), label="request"))

    def someone(self, data: st.DataObject, key: str) -> str:
        """Draw the requester more often than not."""
        asked = self.model.asked.get(key)
        usual = [asked.by] * 12 if asked else []
        return str(data.draw(st.sampled_from([*usual, *sorted(ACTORS)]), label="actor"))

    @precondition(lambda self: self.model.asked)
    @rule(data=st.data(), in_time=st.booleans(), mail_fails=st.sampled_from([False] * 3 + [True]))
    def resend(self, data: st.DataObject, in_time: bool, mail_fails: bool) -> None:
        model, key = self.model, self.a_request(data)
        actor = self.someone(data, key)
        if in_time:
            self.wait(INTERVAL)

        def foretell() -> Any:
            asked = self.known(actor, key, own=True)
            if asked.state_at(model.now) != "pending":
                raise Refused("RequestClosed", asked.state_at(model.now))
            if asked.sent > RESENDS:
                raise Refused("TooManyRequests", asked.ends - model.now)
            # What failed does not count, until as many have failed in a row as may be resent.
            at_once = 0 < asked.failed <= RESENDS
            if not at_once and model.now < asked.tried_at + INTERVAL:
                raise Refused("TooManyRequests", asked.tried_at + INTERVAL - model.now)

            def then(outcome: Any) -> None:
                asked.left = ATTEMPTS
                asked.number_ends = min(model.now + NUMBER_LIVES, asked.ends)
                asked.numbers.append("")  # what was sent before is dead
                model.note("resend", actor, asked.user)
                asked.tried_at = model.now
                if isinstance(outcome, str):
                    asked.failed += 1
                    model.note("delivery_failed", actor, asked.user)
                else:
                    asked.sent, asked.failed = asked.sent + 1, 0
                    asked.numbers.append(self.outbox.number_for(key))
                    assert outcome.attempts_left == ATTEMPTS

            return then

        self.carry_out(
            foretell,
            lambda: self.deliver(mail_fails, lambda: self.flow.resend(self.actor(actor), key)),
        )

    @precondition(lambda self: self.model.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        model, key = self.model, self.a_request(data)
        actor = self.someone(data, key)

        def foretell() -> Any:
            asked = self.known(actor, key, own=False)
            if asked.state_at(model.now) != "pending":
                raise Refused("RequestClosed", asked.state_at(model.now))

            def then(_: object) -> None:
                asked.state = "cancelled"
                model.note("cancel", actor, asked.user)

            return then

        self.carry_out(foretell, lambda: self.flow.cancel(self.actor(actor), key))

    # -- the second phase ----------------------------------------------------------------------

    @precondition(lambda self: self.model.asked)
    @rule(
        data=st.data(),
        which=st.sampled_from(["right", "right", "old", "other's"]),
        insist=st.booleans(),
    )
    def confirm(self, data: st.DataObject, which: str, insist: bool) -> None:
        key = self.a_request(data)
        self.confirm_as(self.someone(data, key), key, which, insist=insist)

    @precondition(lambda self: self.model.asked)
    @rule(data=st.data(), times=st.integers(1, ATTEMPTS), then_right=st.booleans())
    def guess(self, data: st.DataObject, times: int, then_right: bool) -> None:
        """Guess, on a request and then on what else the same actor has asked for."""
        key = self.a_request(data)
        actor = self.someone(data, key)
        for _ in range(times):
            self.confirm_as(actor, key, "junk", insist=False)
        for other in [k for k, a in self.model.asked.items() if a.by == actor][-2:]:
            self.confirm_as(actor, other, "right" if then_right else "junk", insist=False)

    def confirm_as(self, actor: str, key: str, which: str, *, insist: bool) -> None:
        model = self.model
        number = self.number(key, which)

        def foretell() -> Any:
            asked = self.known(actor, key, own=True)
            state = asked.state_at(model.now)
            if state == "locked":
                raise Refused("TooManyAttempts")
            if state != "pending":
                raise Refused("RequestClosed", state)
            if model.now >= asked.number_ends:
                raise Refused("NumberExpired")
            if model.failures.get(actor, 0) >= CAP:
                raise Refused("TooManyAttempts")
            if not number or not asked.numbers or number != asked.numbers[-1]:
                asked.left -= 1
                asked.state = "pending" if asked.left else "locked"
                model.failures[actor] = model.failures.get(actor, 0) + 1
                model.note("wrong_number", actor, asked.user)
                raise Refused("WrongNumber", asked.left)
            return self.foretell_applied(actor, asked, insist)

        applied = self.carry_out(
            foretell,
            lambda: self.flow.confirm(
                self.actor(actor), key, number or "00000-00000", allow_lockout=insist
            ),
        )
        if applied is not None:
            self.holds(applied)

    def foretell_applied(self, actor: str, asked: Asked, insist: bool) -> Any:
        model = self.model
        held = model.of(asked.user)
        if asked.kind == "add":
            gone = model.room_for(asked.user, asked.run, asked.until)
            new: Lets = ((asked.run, asked.until),)
        else:
            gone, new = asked.target, ()
        after = (*((h.run, h.until) for k, h in held.items() if k != gone), *new)
        if not insist:
            model.lockout(actor, asked.user, after)

        def then(applied: ipguard.Applied) -> None:
            assert applied.restriction is not None
            asked.state = "confirmed"
            model.failures[actor] = 0
            if gone is not None:
                model.drop(gone)
            if new:
                model.held[applied.restriction.id] = Held(asked.user, asked.run, asked.until)
            else:
                assert applied.restriction.id == gone
            assert applied.unrestricted is (not model.of(asked.user))
            assert applied.revision == model.note("confirm", actor, asked.user)

        return then

    def number(self, key: str, which: str) -> str:
        """Return a number that was mailed, or one that never was; "" where there is none."""
        asked = self.model.asked.get(key)
        mine = [n for n in asked.numbers if n] if asked else []
        if which == "right":
            return asked.numbers[-1] if asked and asked.numbers else ""
        if which == "old":
            return mine[-2] if len(mine) > 1 else ""
        if which == "other's":
            others = (a.numbers[-1] for k, a in self.model.asked.items() if k != key and a.numbers)
            return next(others, "")
        return ""

    def holds(self, applied: ipguard.Applied) -> None:
        """What was applied holds for whoever asks for at least that revision."""
        assert applied.restriction is not None
        user = applied.restriction.username
        for address, client in CLIENTS.items():
            decision = self.prompt.check(user, address, at_least=applied.revision)
            assert decision.allowed is lets_in(self.model.lets(user), client, self.model.now)

    # -- deleting, imposing, lifting -----------------------------------------------------------

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), insist=st.booleans(), mail_fails=st.sampled_from([False] * 7 + [True]))
    def delete(self, data: st.DataObject, insist: bool, mail_fails: bool) -> None:
        model = self.model
        key = data.draw(st.sampled_from([*list(model.held) * 4, "none"]), label="restriction")
        user = model.held[key].user if key in model.held else "ann"
        usual = [name for name in ACTORS if model.sees(name, user)]
        actor = data.draw(st.sampled_from([*usual * 4, *sorted(ACTORS)]), label="actor")

        def foretell() -> Any:
            held = model.held.get(key)
            if held is None or not model.sees(actor, held.user):
                raise Refused("UnknownRestriction", key)
            others = {k: h for k, h in model.of(held.user).items() if k != key}
            if not insist and others:
                model.lockout(actor, held.user, tuple((h.run, h.until) for h in others.values()))
            if model.deletes is True or (model.deletes == "last" and not others):
                if any(a.target == key for a in model.pending(held.user)):
                    raise Refused("DuplicateRestriction")
                model.pace(actor)
                return lambda outcome: self.waits(
                    outcome, "delete", actor, held.user, held.run, held.until, key
                )
            return lambda applied: self.gone(applied, "delete", actor, key)

        outcome = self.carry_out(
            foretell,
            lambda: self.deliver(
                mail_fails,
                lambda: self.flow.delete(self.actor(actor), key, allow_lockout=insist),
            ),
        )
        if isinstance(outcome, ipguard.Applied):
            self.holds(outcome)

    def gone(self, applied: ipguard.Applied, action: str, actor: str, key: str) -> None:
        model = self.model
        user = model.held[key].user
        model.drop(key)
        assert applied.unrestricted is (not model.of(user))
        assert applied.revision == model.note(action, actor, user)

    @rule(
        actor=st.sampled_from(["root"] * 8 + ["bob"]),
        user=st.sampled_from([*NAMES * 4, "eve"]),
        addresses=st.sampled_from(sorted(RANGES)),
        lives=st.sampled_from([None, 3, 300]),
    )
    def impose(self, actor: str, user: str, addresses: str, lives: int | None) -> None:
        model = self.model
        until = None if lives is None else model.now + lives

        def foretell() -> Any:
            if actor != "root" or user not in model.accounts or user in model.gone:
                raise Refused("UnknownUser", user)
            replaced = model.room_for(user, RANGES[addresses], until)

            def then(applied: ipguard.Applied) -> None:
                assert applied.restriction is not None
                if replaced is not None:
                    model.drop(replaced)
                model.held[applied.restriction.id] = Held(user, RANGES[addresses], until)
                assert applied.revision == model.note("impose", actor, user)

            return then

        expires = None if until is None else self.started + timedelta(seconds=until)
        applied = self.carry_out(
            foretell,
            lambda: self.flow.impose(
                self.actor(actor), user, addresses, reason="x", expires_at=expires
            ),
        )
        if applied is not None:
            self.holds(applied)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), actor=st.sampled_from(["root"] * 6 + ["bob"]))
    def lift(self, data: st.DataObject, actor: str) -> None:
        model = self.model
        key = data.draw(st.sampled_from([*list(model.held) * 4, "none"]), label="restriction")

        def foretell() -> Any:
            if actor != "root" or key not in model.held:
                raise Refused("UnknownRestriction", key)
            return lambda applied: self.gone(applied, "lift", actor, key)

        applied = self.carry_out(
            foretell, lambda: self.flow.lift(self.actor(actor), key, reason="x")
        )
        if applied is not None:
            self.holds(applied)

    @precondition(lambda self: any(count >= CAP - 1 for count in self.model.failures.values()))
    @rule(actor=st.sampled_from(["root", "dan", "dan"]), name=st.sampled_from(sorted(ACTORS)))
    def unlock(self, actor: str, name: str) -> None:
        model = self.model

        def foretell() -> Any:
            if actor != "root":
                raise Refused("UnknownUser", name)

            def then(_: object) -> None:
                model.failures[name] = 0
                model.note("unlock", actor, name)

            return then

        self.carry_out(
            foretell,
            lambda: self.flow.unlock(self.actor(actor), SPELLINGS.get(name, name), reason="x"),
        )

    # -- logging in ----------------------------------------------------------------------------

    def log_in(self, user: str, address: str) -> None:
        """Ask a guard that nobody has synchronised: what was right a moment ago is acceptable."""
        acceptable = self.model.might_be_let_in(user, CLIENTS[address])
        assert self.guard.is_allowed(SPELLINGS[user], address) in acceptable

    @rule()
    def everybody_logs_in_after_a_sync(self) -> None:
        """Ask a guard that is up to date: each answer is the right one."""
        model = self.model
        assert self.guard.sync() == len(model.trail)
        for user in NAMES:
            for address, client in CLIENTS.items():
                right = lets_in(model.lets(user), client, model.now)
                assert self.guard.is_allowed(user, address) is right
                assert self.guard.check(SPELLINGS[user], address).allowed is right

    @invariant()
    def logins_at_any_time(self) -> None:
        """Ask after every step, so that there always is something old to be remembered."""
        for user in NAMES:
            for address in ("203.0.113.1", "203.0.113.5"):
                self.log_in(user, address)

    # -- always --------------------------------------------------------------------------------

    @invariant()
    def the_head(self) -> None:
        assert self.store.changes_since(None).head == len(self.model.trail)

    @invariant()
    def the_failures(self) -> None:
        with self.store.transaction() as turn:
            found = {name: turn.failures(name) for name in ACTORS}
        assert found == {name: self.model.failures.get(name, 0) for name in ACTORS}

    @invariant()
    def the_policies(self) -> None:
        for user in NAMES:
            policy = self.store.load_policy(user)
            found = {
                r.id: (r.addresses.version, r.addresses.first, r.addresses.last)
                for r in policy.restrictions
            }
            assert found == {key: held.run for key, held in self.model.of(user).items()}

    @rule(actor=st.sampled_from(sorted(ACTORS)))
    def look(self, actor: str) -> None:
        """The page shows what the model has, and nothing beyond the actor's accounts."""
        model = self.model
        lines = {line.user.username: line for line in self.flow.overview(self.actor(actor))}
        assert set(lines) == {
            name
            for name in NAMES
            if model.sees(actor, name) and (name not in model.gone or model.of(name))
        }
        for name, line in lines.items():
            assert {r.id for r in line.restrictions} == set(model.of(name))
            assert (line.summary == "No restrictions") is (not model.of(name))
            assert line.removed is (name in model.gone)
            waiting = {key: a for key, a in model.asked.items() if a in model.pending(name)}
            assert {r.id: r.attempts_left for r in line.pending} == {
                key: asked.left for key, asked in waiting.items()
            }

    @rule()
    def the_trail(self) -> None:
        """The history is the model's, for everybody, without gaps."""
        for name, (manages, _) in ACTORS.items():
            rows = self.flow.history(self.actor(name), limit=1000).items
            assert [
                (row.revision, str(row.action), row.actor, row.username, row.account_id)
                for row in reversed(rows)
            ] == [
                (revision, *entry)
                for revision, entry in enumerate(self.model.trail, start=1)
                if manages is None or entry[3] in manages
            ]


def carried_by(error: Exception) -> tuple[object, ...]:
    """Return what an error carries, with lengths of time in seconds as the model has them."""
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
        return self.server.url(schema=fresh_schema(), listen="off")


@pytest.fixture
def _server(postgres: Server | Given) -> None:
    PostgresMachine.server = postgres


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=rounds(100, 2000), stateful_step_count=50)
TestSQLite = SQLiteMachine.TestCase
TestSQLite.settings = settings(max_examples=rounds(20, 300), stateful_step_count=50)
TestPostgres = pytest.mark.usefixtures("_server")(PostgresMachine.TestCase)
TestPostgres.settings = settings(max_examples=rounds(10, 300), stateful_step_count=50)
