"""The rules against plain restatements of them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import rules
from ipguard.addresses import AddressRange
from ipguard.errors import (
    AddressError,
    AddressTooBroad,
    DuplicateRestriction,
    LockoutRisk,
    RequestClosed,
)
from ipguard.model import (
    Actor,
    Decision,
    PendingRequest,
    Policy,
    Reason,
    RequestKind,
    RequestState,
    Restriction,
    User,
)
from ipguard.rules import STEPS, Step

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def parsed(text: str) -> AddressRange:
    return AddressRange.parse(text)


def restriction(addresses: AddressRange | str, expires_at: datetime | None = None, name="r"):
    found = parsed(addresses) if isinstance(addresses, str) else addresses
    return Restriction(
        id=name,
        username="jsmith",
        addresses=found,
        label="",
        created_at=NOW,
        created_by="boss",
        expires_at=expires_at,
    )


def policy(*restrictions: Restriction, known: bool = True) -> Policy:
    return Policy(revision=7, restrictions=restrictions, known=known)


# A small world: 16 addresses of each version, so that ranges meet, touch and miss one another.
small = st.integers(0, 15)


@st.composite
def ranges(draw) -> AddressRange:
    first, last = sorted((draw(small), draw(small)))
    return AddressRange(version=draw(st.sampled_from([4, 6])), first=first, last=last)


addresses = st.builds(
    lambda version, number: AddressRange(version=version, first=number, last=number),
    st.sampled_from([4, 6]),
    small,
)
expiries = st.none() | st.sampled_from([NOW - SECOND, NOW, NOW + SECOND])


@st.composite
def restricted(draw, most: int = 5) -> list[Restriction]:
    drawn = draw(st.lists(st.tuples(ranges(), expiries), max_size=most))
    return [restriction(run, until, f"r{n}") for n, (run, until) in enumerate(drawn)]


def lets_in(one: Restriction, address: AddressRange) -> bool:
    """Whether a restriction names an address, expired or not: compared number by number."""
    same = one.addresses.version == address.version
    return same and address.first in range(one.addresses.first, one.addresses.last + 1)


def raised(call: Callable[[], None]) -> Any:
    """The error that a rule raises, or None where it lets pass."""
    try:
        call()
    except (AddressTooBroad, LockoutRisk) as error:
        return error
    return None


class TestDecide:
    @given(restricted(), addresses, st.booleans(), st.booleans())
    def test_against_the_rule_in_plain_words(self, held, address, known, deny_unknown):
        """No restriction: any address. One or more: only those, of which none has expired."""
        decision = rules.decide(policy(*held, known=known), address, NOW, deny_unknown=deny_unknown)
        live = [r for r in held if r.expires_at is None or r.expires_at > NOW]
        holding = [r.id for r in live if lets_in(r, address)]
        if deny_unknown and not known:
            expected = (False, Reason.UNKNOWN_USER, None)
        elif not held:
            expected = (True, Reason.UNRESTRICTED, None)
        elif holding:
            expected = (True, Reason.LISTED, holding[0])
        else:
            expected = (False, Reason.NOT_LISTED, None)
        assert decision == Decision(
            allowed=expected[0], reason=expected[1], restriction_id=expected[2], revision=7
        )

    @given(restricted(), st.booleans(), st.booleans())
    def test_what_is_no_address_is_never_allowed(self, held, known, deny_unknown):
        """Not even where there is no restriction, and before anything else is asked."""
        decision = rules.decide(policy(*held, known=known), None, NOW, deny_unknown=deny_unknown)
        assert decision == Decision(allowed=False, reason=Reason.BAD_ADDRESS, revision=7)

    @given(restricted(), addresses)
    def test_more_restrictions_never_shut_a_restricted_user_out(self, held, address):
        """Of several restrictions any one lets in; the order does not matter."""
        whole = bool(rules.decide(policy(*held), address, NOW))
        assert bool(rules.decide(policy(*reversed(held)), address, NOW)) == whole
        singly = [bool(rules.decide(policy(one), address, NOW)) for one in held]
        assert whole == (any(singly) if held else True)

    @given(restricted().filter(bool), addresses, st.integers(0, 5))
    def test_time_never_opens_a_door(self, held, address, seconds):
        """Who is kept out of an address now is kept out later, as long as nobody acts."""
        before = rules.decide(policy(*held), address, NOW)
        later = rules.decide(policy(*held), address, NOW + seconds * SECOND)
        assert before or not later

    def test_the_last_one_expired_leaves_the_user_restricted_to_nothing(self):
        """An expired restriction goes on restricting."""
        held = policy(restriction("203.0.113.7", NOW + SECOND))
        at = parsed("203.0.113.7")
        assert rules.decide(held, at, NOW).reason is Reason.LISTED
        for later in (NOW + SECOND, NOW + timedelta(days=999)):
            assert rules.decide(held, at, later) == Decision(
                allowed=False, reason=Reason.NOT_LISTED, revision=7
            )

    def test_ipv4_and_ipv6_are_worlds_apart(self):
        """All of IPv4 holds no IPv6 address, and the other way round."""
        four, six = restriction("0.0.0.0/0"), restriction("::/0")
        assert rules.decide(policy(four), parsed("203.0.113.7"), NOW)
        assert rules.decide(policy(six), parsed("2001:db8::1"), NOW)
        assert not rules.decide(policy(four), parsed("2001:db8::1"), NOW)
        assert not rules.decide(policy(six), parsed("203.0.113.7"), NOW)

    def test_an_unknown_user_is_allowed_unless_told_otherwise(self):
        """Registration is asked for only where the host wants it."""
        at = parsed("203.0.113.7")
        assert rules.decide(policy(known=False), at, NOW).reason is Reason.UNRESTRICTED
        assert rules.decide(policy(known=True), at, NOW, deny_unknown=True)


class TestLasting:
    @given(restricted(), addresses)
    def test_leaves_out_the_temporary_ones(self, held, address):
        """What holds whatever the time is what names no end."""
        forever = any(lets_in(r, address) for r in held if r.expires_at is None)
        assert (address in rules.lasting(iter(held))) == forever


# The states and steps once more, written out: a table that loses or gains a step is found out.
LEADS_TO = {
    ("pending", "confirm"): "confirmed",
    ("pending", "cancel"): "cancelled",
    ("pending", "expire"): "expired",
    ("pending", "lock"): "locked",
    ("pending", "guess"): "pending",
    ("pending", "resend"): "pending",
}


class TestSteps:
    @pytest.mark.parametrize("state", RequestState)
    @pytest.mark.parametrize("step", Step)
    def test_every_state_and_step(self, state, step):
        """Each pair leads where the table says, or raises with the state it is in."""
        if (state, step) in LEADS_TO:
            assert rules.after(state, step) is RequestState(LEADS_TO[state, step])
        else:
            with pytest.raises(RequestClosed) as raised:
                rules.after(state, step)
            assert raised.value.state is state
            assert raised.value.__cause__ is None
            assert raised.value.__suppress_context__

    def test_the_table_has_no_other_step(self):
        """What is not in the table does not happen, and nobody adds to it at run time."""
        assert {(a.value, b.value): c.value for (a, b), c in STEPS.items()} == LEADS_TO
        with pytest.raises(TypeError):
            cast(dict[Any, Any], STEPS)[RequestState.LOCKED, Step.CONFIRM] = RequestState.CONFIRMED

    def test_only_pending_is_open(self):
        """No step leads out of any other state."""
        assert {state for state, _ in STEPS} == {RequestState.PENDING}

    def test_steps_have_the_texts_of_their_names(self):
        """The documentation's diagram is made from them."""
        assert [*Step] == ["confirm", "cancel", "expire", "lock", "guess", "resend"]


REQUEST = PendingRequest(
    id="q1",
    username="jsmith",
    kind=RequestKind.ADD,
    addresses=parsed("203.0.113.7"),
    label="",
    requested_by="boss",
    requested_at=NOW,
    expires_at=NOW,
    number_expires_at=NOW - SECOND,
    attempts_left=5,
    state=RequestState.PENDING,
)


class TestStateAt:
    @pytest.mark.parametrize("seconds", [-1, 0, 1])
    @pytest.mark.parametrize("state", RequestState)
    def test_only_a_pending_request_expires(self, state, seconds):
        """From its very moment on a pending request has expired; a closed one stays as it is."""
        request = attrs.evolve(REQUEST, state=state)
        expected = state
        if state is RequestState.PENDING and seconds >= 0:
            expected = RequestState.EXPIRED
        assert rules.state_at(request, NOW + seconds * SECOND) is expected
        assert request.state is state

    def test_the_numbers_end_is_not_the_requests(self):
        """A number that has expired leaves the request pending."""
        request = attrs.evolve(REQUEST, expires_at=NOW + SECOND)
        assert rules.state_at(request, NOW) is RequestState.PENDING


def locks_out(
    address: AddressRange | None, before: list[Restriction], left: list[Restriction]
) -> bool:
    """The rule once more: in now, something restricts afterwards, and nothing lasting lets in."""
    if address is None or not left:
        return False
    now_in = not before or any(
        lets_in(r, address) and (r.expires_at is None or r.expires_at > NOW) for r in before
    )
    lasting_in = any(lets_in(r, address) and r.expires_at is None for r in left)
    return now_in and not lasting_in


class TestCheckLockout:
    @given(st.none() | addresses, restricted(), restricted())
    def test_against_the_rule_in_plain_words(self, address, before, left):
        """Refused exactly where the actor gets in now and would not for good."""
        risk = raised(lambda: rules.check_lockout(address, policy(*before), iter(left), NOW))
        if locks_out(address, before, left):
            assert isinstance(risk, LockoutRisk)
            assert risk.address == str(address)
        else:
            assert risk is None

    @given(addresses, restricted(), restricted(), st.booleans())
    def test_whether_the_actor_is_registered_is_no_matter(self, address, before, left, known):
        """An administrator need not be a user."""
        one, other = policy(*before, known=known), policy(*before, known=not known)
        assert type(raised(lambda: rules.check_lockout(address, one, left, NOW))) is type(
            raised(lambda: rules.check_lockout(address, other, left, NOW))
        )

    @pytest.mark.parametrize(
        ("address", "before", "left", "risk"),
        [
            # the first restriction, to elsewhere, or to here
            ("192.0.2.1", [], ["198.51.100.1"], True),
            ("192.0.2.1", [], ["192.0.2.0/24"], False),
            # one of two goes, and with it the actor's own address
            ("192.0.2.1", ["192.0.2.1", "198.51.100.1"], ["198.51.100.1"], True),
            ("192.0.2.1", ["192.0.2.1", "198.51.100.1"], ["192.0.2.1"], False),
            # the last one goes: then any address gets in
            ("192.0.2.1", ["192.0.2.1"], [], False),
            # already outside: nothing to lose
            ("192.0.2.1", ["198.51.100.1"], ["198.51.100.2"], False),
            # where the actor comes from is not known
            (None, [], ["198.51.100.1"], False),
            # an IPv6 actor and IPv4 restrictions
            ("2001:db8::1", [], ["0.0.0.0/0"], True),
        ],
    )
    def test_cases(self, address, before, left, risk):
        """The cases that people meet."""
        at = None if address is None else parsed(address)
        held = policy(*map(restriction, before))
        error = raised(lambda: rules.check_lockout(at, held, map(restriction, left), NOW))
        assert (error is not None) is risk
        assert error is None or error.address == address

    def test_temporary_restrictions_do_not_count_afterwards(self):
        """Once they end nobody gets in: that is a lock-out to come."""
        at = parsed("192.0.2.1")
        temporary = restriction("192.0.2.1", NOW + timedelta(days=365))
        with pytest.raises(LockoutRisk):
            rules.check_lockout(at, policy(), [temporary], NOW)
        with pytest.raises(LockoutRisk):
            rules.check_lockout(at, policy(temporary), [temporary], NOW)
        rules.check_lockout(at, policy(), [temporary, restriction("192.0.2.0/24")], NOW)

    def test_who_is_outside_already_by_expiry_has_nothing_to_lose(self):
        """An expired restriction lets nobody in now."""
        expired = restriction("192.0.2.1", NOW)
        rules.check_lockout(parsed("192.0.2.1"), policy(expired), [expired], NOW)


class TestCheckWidth:
    @pytest.mark.parametrize(
        ("text", "widest_ipv4", "widest_ipv6", "widest"),
        [
            ("10.0.0.0/16", 16, 32, None),
            ("10.0.0.0/15", 16, 32, 16),
            ("10.0.0.0-10.0.255.255", 16, 32, None),
            ("10.0.0.1-10.1.0.0", 16, 32, None),  # as many addresses, though no /16
            ("10.0.0.1-10.1.0.1", 16, 32, 16),
            ("10.0.0.0-10.1.0.0", 16, 32, 16),
            ("203.0.113.7", 32, 128, None),
            ("203.0.113.6/31", 32, 128, 32),
            ("0.0.0.0/0", 0, 128, None),
            ("0.0.0.0/0", 1, 0, 1),
            ("2001:db8::/32", 32, 32, None),
            ("2001:db8::/31", 0, 32, 32),
            ("2001:db8::1", 0, 128, None),
            ("2001:db8::/127", 0, 128, 128),
            ("::/0", 32, 0, None),
            ("::/0", 0, 1, 1),
        ],
    )
    def test_cases(self, text, widest_ipv4, widest_ipv6, widest):
        """Each version has its own limit, in addresses and not in the shape of the range."""
        run = parsed(text)
        error = raised(
            lambda: rules.check_width(run, widest_ipv4=widest_ipv4, widest_ipv6=widest_ipv6)
        )
        assert (error is not None) is (widest is not None)
        if error is not None:
            assert (error.addresses, error.widest) == (text, widest)

    @given(st.sampled_from([4, 6]), st.integers(0, 128), st.integers(0, 128), st.data())
    def test_against_the_sizes_of_networks(self, version, prefix, widest, data):
        """A network passes exactly where its prefix is not shorter than the widest."""
        bits = {4: 32, 6: 128}[version]
        prefix, widest = min(prefix, bits), min(widest, bits)
        size = 2 ** (bits - prefix)
        first = data.draw(st.integers(0, 2**bits // size - 1)) * size
        mapped = range(0xFFFF << 32, (0xFFFF << 32) + 2**32)
        if version == 6 and first in mapped:
            return
        run = AddressRange(version=version, first=first, last=first + size - 1)
        limits = {"widest_ipv4": 0, "widest_ipv6": 0, f"widest_ipv{version}": widest}
        error = raised(lambda: rules.check_width(run, **limits))
        assert (error is not None) is (prefix < widest)


class TestReadAddresses:
    @pytest.mark.parametrize(
        ("text", "widest", "hint"),
        [
            ("10.0.0.0/255.0.0.0", 16, None),
            ("10.0.0.0/255.0.0.0", 8, "10.0.0.0/8"),
            ("10.*.*.*", 9, None),
            ("10.1.*.*", 16, "10.1.0.0/16"),
            ("2001:db8::1/24", 32, None),
            ("2001:db8::1/64", 64, "2001:db8::/64"),
            ("2001:db8::1/64", 65, None),
            ("10.1.2.3/8", 16, None),
            ("10.0.0.1-300", 0, None),
        ],
    )
    def test_a_hint_is_accepted_by_the_settings(self, text, widest, hint):
        """What would be refused as too wide is not proposed; the error says what is allowed."""
        limits = {"widest_ipv4": min(widest, 32), "widest_ipv6": widest}
        with pytest.raises(AddressError) as caught:
            rules.read_addresses(text, **limits)
        assert caught.value.hint == hint
        said = f"the widest network allowed is a /{widest}" in caught.value.reason
        assert said is (hint is None and widest != 0)
        assert caught.value.text == repr(text)
        if hint is not None:
            assert str(rules.read_addresses(hint, **limits)) == hint


class TestJudgeAdditions:
    def judge(self, held, new, per_user=10):
        replaced, refused = rules.judge_additions("u", held, new, per_user=per_user, now=NOW)
        return replaced, [(each, str(error)) for each, error in refused]

    def test_other_addresses_are_added(self):
        """A wider or a narrower range is another restriction."""
        held = [restriction("203.0.113.0/24")]
        new = [restriction("203.0.113.0/25"), restriction("203.0.112.0/23")]
        assert self.judge(iter(held), iter(new)) == ([], [])

    def test_expired_ones_are_replaced(self):
        """Every expired restriction to the same addresses makes way, and no other."""
        old = [restriction("203.0.113.7", NOW - SECOND), restriction("203.0.113.7", NOW)]
        held = [*old, restriction("203.0.113.8", NOW)]
        new = restriction("203.0.113.7")
        assert self.judge(held, [new], per_user=2) == (old, [])
        (refused,) = self.judge(held, [new], per_user=1)[1]
        assert refused == (new, "u already has 1 restrictions, as many as are allowed")

    def test_duplicates_say_what_differs(self):
        """The error has the label and the expiry of what exists."""
        held = restriction("203.0.113.7", NOW + SECOND)
        same = restriction("203.0.113.7", NOW + SECOND)
        for new, differs in (
            (same, False),
            (restriction("203.0.113.7"), True),
            (attrs.evolve(same, label="new"), True),
        ):
            replaced, ((each, error),) = rules.judge_additions(
                "u", [held], [new], per_user=10, now=NOW
            )
            assert (replaced, each) == ([], new)
            assert isinstance(error, DuplicateRestriction)
            assert error.found == "restriction"
            assert (error.label, error.expires_at) == (held.label, held.expires_at)
            assert error.differs is differs

    def test_the_same_twice(self):
        """Of two new ones to the same addresses the second is refused, expired or not."""
        one, two = restriction("203.0.113.7", NOW), restriction("203.0.113.7")
        assert self.judge([], [one, two]) == ([], [(two, "u 203.0.113.7 is there twice")])

    def test_too_many(self):
        """The last ones beyond the limit are refused; replaced and refused ones do not count."""
        held = [restriction("203.0.113.1", NOW), restriction("203.0.113.2")]
        new = [restriction(f"203.0.113.{n}") for n in (1, 2, 3, 4, 5)]
        replaced, refused = self.judge(held, new, per_user=3)
        assert replaced == held[:1]
        assert [each for each, _ in refused] == [new[1], new[3], new[4]]
        assert self.judge(held, new[3:], per_user=1)[1] == [
            (each, "u already has 1 restrictions, as many as are allowed") for each in new[3:]
        ]


class TestWithout:
    @given(restricted(), st.sampled_from(["r0", "r1", "r9"]), addresses)
    def test_agrees_with_the_decision(self, held, deleted, address):
        """What is left opens the user, shuts the user out, or ends, as the decisions say."""
        found = rules.without(held, deleted, NOW)
        assert found.left == tuple(each for each in held if each.id != deleted)
        decision = rules.decide(policy(*found.left), address, NOW)
        assert found.opens == (decision.reason is Reason.UNRESTRICTED)
        assert found.shuts == bool(found.left and all(each.expired(NOW) for each in found.left))
        assert not (found.shuts and decision)
        if found.ends is not None:
            assert all(each.expired(found.ends) for each in found.left)
            assert not all(each.expired(found.ends - SECOND) for each in found.left)
        else:
            assert found.opens or any(each.expires_at is None for each in found.left)


class TestSummarise:
    def test_none(self):
        """The words of the page where there is no restriction, and only there."""
        assert rules.summarise([], NOW) == rules.NO_RESTRICTIONS == "No restrictions"

    def test_live_ones_are_listed_in_their_order(self):
        """Addresses are in canonical text; what has expired is left out."""
        held = [
            restriction("203.0.113.8/29"),
            restriction("192.0.2.1", NOW),
            restriction("2001:db8::/32", NOW + SECOND),
            restriction("192.0.2.1-192.0.2.3"),
        ]
        text = "203.0.113.8/29, 2001:db8::/32, 192.0.2.1-192.0.2.3"
        assert rules.summarise(iter(held), NOW) == text

    def test_all_expired_is_said(self):
        """A user whom nothing lets in is not shown as one without restrictions."""
        held = [restriction("192.0.2.1", NOW)]
        text = "No address allowed (every restriction has expired)"
        assert rules.summarise(held, NOW) == text
        assert rules.summarise(held, NOW - SECOND) == "192.0.2.1"

    @given(restricted(), addresses)
    def test_agrees_with_the_decision(self, held, address):
        """The page says "No restrictions" exactly where any address gets in for want of any."""
        said = rules.summarise(held, NOW) == "No restrictions"
        reason = rules.decide(policy(*held), address, NOW).reason
        assert said == (reason is Reason.UNRESTRICTED)


# ------------------------------------------------------------------------------ searches


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("", True),
        ("JSM", True),
        ("u12", True),
        ("smith", False),
        ("li\u2010wei", True),
        ("wei", True),
        ("o'brien", True),
        ("o\xb4brien", True),
        ("brien, li", True),
        ("brien lee", False),
        ("an (", False),
        ("- -", False),
        ("203.0.113.7", True),
        ("203.0.114.7", False),
        ("203.0.113.0/24", True),
        ("203.0.113.0-203.0.113.255", True),
        ("203.0.113.7/32", False),
        ("2001:db8::", False),
        ("a.b", False),
    ],
)
def test_search(typed: str, found: bool) -> None:
    """A search finds names by their words, and restrictions by their addresses."""
    person = User(username="jsmith", full_name="Li-Wei O\u2019Brien", account_id="U12")
    search = rules.Search.of(typed)
    assert search.matches(person, [restriction("203.0.113.0/24")]) is found


@pytest.mark.parametrize("restricted", [True, False])
def test_visibility(restricted: bool) -> None:
    """Removed users are visible to actors of every account only, if they are restricted."""
    every, own = Actor.EVERY_ACCOUNT, frozenset({"U1"})
    for accounts, removed, visible in (
        (every, False, True),
        (own, False, True),
        (frozenset({"u1"}), False, False),
        (every, True, restricted),
        (own, True, False),
    ):
        shown = rules.is_visible(accounts, "U1", removed=removed, restricted=restricted)
        assert shown is visible
