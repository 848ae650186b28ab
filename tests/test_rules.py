"""The rules, compared with plain restatements and with examples."""

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
    InvalidValue,
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
    StoredRequest,
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


# 16 addresses of each version, so that ranges overlap, touch and differ.
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
    """Return whether a restriction, expired or not, lists an address."""
    same = one.addresses.version == address.version
    return same and address.first in range(one.addresses.first, one.addresses.last + 1)


def raised(call: Callable[[], None]) -> Any:
    """Return the error that a rule raises, or None."""
    try:
        call()
    except (AddressTooBroad, LockoutRisk) as error:
        return error
    return None


class TestDecide:
    @given(restricted(), addresses, st.booleans(), st.booleans())
    def test_agrees_with_a_plain_restatement(self, held, address, known, deny_unknown):
        """Without restrictions any address is allowed, otherwise only the listed, live ones."""
        decision = rules.decide(policy(*held, known=known), address, NOW, deny_unknown=deny_unknown)
        live = [r for r in held if r.expires_at is None or r.expires_at > NOW]
        holding = [r.id for r in live if r.expires_at is None and lets_in(r, address)]
        holding += [r.id for r in live if r.expires_at is not None and lets_in(r, address)]
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

    def test_names_the_oldest_permanent_restriction(self):
        temporary = restriction("203.0.113.7", NOW + SECOND, name="temporary")
        older, newer = restriction("203.0.113.7", name="a"), restriction("203.0.113.7", name="b")
        held = policy(temporary, older, newer)
        assert rules.decide(held, parsed("203.0.113.7"), NOW).restriction_id == "a"

    @given(restricted(), st.booleans(), st.booleans())
    def test_a_malformed_address_is_never_allowed(self, held, known, deny_unknown):
        """Not even for users without restrictions."""
        decision = rules.decide(policy(*held, known=known), None, NOW, deny_unknown=deny_unknown)
        assert decision == Decision(allowed=False, reason=Reason.BAD_ADDRESS, revision=7)

    @given(restricted().filter(bool), addresses, st.integers(0, 5))
    def test_time_never_allows_an_address(self, held, address, seconds):
        """An address that is refused now is refused later, if nothing changes."""
        before = rules.decide(policy(*held), address, NOW)
        later = rules.decide(policy(*held), address, NOW + seconds * SECOND)
        assert before or not later

    def test_if_all_have_expired_no_address_is_allowed(self):
        """An expired restriction still restricts."""
        held = policy(restriction("203.0.113.7", NOW + SECOND))
        at = parsed("203.0.113.7")
        assert rules.decide(held, at, NOW).reason is Reason.LISTED
        for later in (NOW + SECOND, NOW + timedelta(days=999)):
            assert rules.decide(held, at, later) == Decision(
                allowed=False, reason=Reason.NOT_LISTED, revision=7
            )

    def test_an_unknown_user_is_allowed_by_default(self):
        """With `deny_unknown`, registered users only."""
        at = parsed("203.0.113.7")
        assert rules.decide(policy(known=False), at, NOW).reason is Reason.UNRESTRICTED
        assert rules.decide(policy(known=True), at, NOW, deny_unknown=True)


class TestLasting:
    @given(restricted(), addresses)
    def test_omits_temporary_restrictions(self, held, address):
        """Only restrictions without an expiry are permanent."""
        forever = any(lets_in(r, address) for r in held if r.expires_at is None)
        assert (address in rules.lasting(iter(held))) == forever


# The table of transitions, repeated so that a change of it fails a test.
LEADS_TO = {
    ("pending", "confirm"): "confirmed",
    ("pending", "cancel"): "cancelled",
    ("pending", "expire"): "expired",
    ("pending", "lock"): "locked",
    ("pending", "guess"): "pending",
    ("pending", "resend"): "pending",
    ("pending", "approve"): "pending",
}


class TestSteps:
    @pytest.mark.parametrize("state", RequestState)
    @pytest.mark.parametrize("step", Step)
    def test_every_state_and_step(self, state, step):
        if (state, step) in LEADS_TO:
            assert rules.after(state, step) is RequestState(LEADS_TO[state, step])
        else:
            with pytest.raises(RequestClosed) as raised:
                rules.after(state, step)
            assert raised.value.state is state
            assert raised.value.__cause__ is None
            assert raised.value.__suppress_context__

    def test_the_table_has_no_other_step(self):
        """The table is complete and read-only, and steps have the texts of the documentation."""
        assert {(a.value, b.value): c.value for (a, b), c in STEPS.items()} == LEADS_TO
        with pytest.raises(TypeError):
            cast(dict[Any, Any], STEPS)[RequestState.LOCKED, Step.CONFIRM] = RequestState.CONFIRMED


REQUEST = PendingRequest(
    id="q1",
    username="jsmith",
    kind=RequestKind.ADD,
    adds=(parsed("203.0.113.7"),),
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
        """A pending request has expired from that time on; a closed one keeps its state."""
        request = attrs.evolve(REQUEST, state=state)
        expected = state
        if state is RequestState.PENDING and seconds >= 0:
            expected = RequestState.EXPIRED
        assert rules.state_at(request, NOW + seconds * SECOND) is expected
        assert request.state is state

    def test_an_expired_number_leaves_the_request_pending(self):
        request = attrs.evolve(REQUEST, expires_at=NOW + SECOND)
        assert rules.state_at(request, NOW) is RequestState.PENDING


class TestTimes:
    @pytest.mark.parametrize(
        ("sent", "expires", "expired"),
        [(-1, 1, False), (0, 1, False), (1, 2, True), (-1, 0, True), (None, 1, False)],
    )
    def test_a_number_expires(self, sent, expires, expired):
        """A number from the future counts as expired: its age is unknown."""
        stored = StoredRequest(
            request=attrs.evolve(REQUEST, number_expires_at=NOW + expires * SECOND),
            email="boss@example.com",
            key_id=b"",
            digest=b"",
            sent_at=None if sent is None else NOW + sent * SECOND,
        )
        assert rules.number_expired(stored, NOW) is expired

    @pytest.mark.parametrize(
        ("ages", "most", "wait"),
        [
            ([], 1, 0),
            ([0], 1, 10),
            ([9], 1, 1),
            ([10], 1, 0),
            ([3, 7], 3, 0),
            ([7, 3, 5], 2, 5),
            ([-1, -99], 1, 0),
            ([2, 8, -99, 5], 3, 2),
        ],
    )
    def test_a_rate_limit(self, ages, most, wait):
        """The wait ends when fewer than `most` calls are within the last 10 seconds."""
        times = [NOW - age * SECOND for age in ages]
        assert rules.wait_left(times, most, 10 * SECOND, NOW) == wait * SECOND

    def test_times_are_clamped(self):
        assert rules.shifted(NOW, SECOND) == NOW + SECOND
        assert rules.shifted(NOW, timedelta.max) == datetime.max.replace(tzinfo=UTC)
        assert rules.shifted(NOW, timedelta.min) == datetime.min.replace(tzinfo=UTC)


def locks_out(
    address: AddressRange | None, before: list[Restriction], left: list[Restriction]
) -> bool:
    """Restate the rule: allowed now, restricted afterwards, and by no permanent one allowed."""
    if address is None or not left:
        return False
    now_in = not before or any(
        lets_in(r, address) and (r.expires_at is None or r.expires_at > NOW) for r in before
    )
    lasting_in = any(lets_in(r, address) and r.expires_at is None for r in left)
    return now_in and not lasting_in


class TestCheckLockout:
    @given(st.none() | addresses, restricted(), restricted())
    def test_agrees_with_a_plain_restatement(self, address, before, left):
        """Temporary and expired restrictions do not count afterwards."""
        risk = raised(lambda: rules.check_lockout(address, policy(*before), iter(left), NOW))
        if locks_out(address, before, left):
            assert isinstance(risk, LockoutRisk)
            assert risk.address == str(address)
        else:
            assert risk is None


class TestCheckWidth:
    @pytest.mark.parametrize(
        ("text", "widest_ipv4", "widest_ipv6", "widest"),
        [
            ("10.0.0.0/15", 16, 32, 16),
            ("10.0.0.1-10.1.0.0", 16, 32, None),  # as many addresses, though no /16
            ("10.0.0.1-10.1.0.1", 16, 32, 16),
            ("10.0.0.0-10.1.0.0", 16, 32, 16),
            ("0.0.0.0/0", 1, 0, 1),
            ("2001:db8::/31", 0, 32, 32),
        ],
    )
    def test_cases(self, text, widest_ipv4, widest_ipv6, widest):
        """Each version has its own limit, which counts addresses."""
        run = parsed(text)
        error = raised(
            lambda: rules.check_width(run, widest_ipv4=widest_ipv4, widest_ipv6=widest_ipv6)
        )
        assert (error is not None) is (widest is not None)
        if error is not None:
            assert (error.addresses, error.widest) == (text, widest)

    @given(st.sampled_from([4, 6]), st.integers(0, 128), st.integers(0, 128), st.data())
    def test_against_the_sizes_of_networks(self, version, prefix, widest, data):
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
            ("2001:db8::1/64", 64, "2001:db8::/64"),
            ("2001:db8::1/64", 65, None),
            ("10.1.2.3/8", 16, None),
            ("10.0.0.1-300", 0, None),
        ],
    )
    def test_a_hint_is_accepted_by_the_settings(self, text, widest, hint):
        """A wider network is not hinted at; the error says what is allowed."""
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
        found = rules.judge_additions("u", held, new, per_user=per_user, now=NOW)
        assert found.kept == []
        return found.ends, [(each, str(error)) for each, error in found.refused]

    def test_other_addresses_are_added(self):
        """A wider or a narrower range is not a duplicate."""
        held = [restriction("203.0.113.0/24")]
        new = [restriction("203.0.113.0/25"), restriction("203.0.112.0/23")]
        assert self.judge(iter(held), iter(new)) == ([], [])

    def test_expired_ones_are_replaced(self):
        old = [restriction("203.0.113.7", NOW - SECOND), restriction("203.0.113.7", NOW)]
        held = [*old, restriction("203.0.113.8", NOW)]
        new = restriction("203.0.113.7")
        assert self.judge(held, [new], per_user=2) == (old, [])
        (refused,) = self.judge(held, [new], per_user=1)[1]
        assert refused == (new, "u already has 1 restrictions, as many as are allowed")

    def test_duplicates_report_differences(self):
        held = restriction("203.0.113.7", NOW + SECOND)
        same = restriction("203.0.113.7", NOW + SECOND)
        for new, differs in (
            (same, False),
            (restriction("203.0.113.7"), True),
            (attrs.evolve(same, label="new"), True),
        ):
            found = rules.judge_additions("u", [held], [new], per_user=10, now=NOW)
            ((each, error),) = found.refused
            assert (found.ends, each) == ([], new)
            assert isinstance(error, DuplicateRestriction)
            assert error.found == "restriction"
            assert (error.username, error.addresses) == ("jsmith", "203.0.113.7")
            assert (error.label, error.expires_at) == (held.label, held.expires_at)
            assert error.differs is differs

    def test_a_list_is_replaced(self):
        """A live one with the same addresses, label and expiry is kept, and no other."""
        held = [
            restriction("203.0.113.7", NOW + SECOND),
            restriction("203.0.113.8", NOW + SECOND),
            restriction("203.0.113.9", NOW),
            restriction("203.0.113.10"),
        ]
        held = [attrs.evolve(each, id=f"r{n}") for n, each in enumerate(held)]
        new = [restriction(f"203.0.113.{n}", r.expires_at) for n, r in zip((7, 8, 9), held)]  # noqa: B905
        new[1] = restriction("203.0.113.8")
        found = rules.judge_additions("u", held, new, per_user=3, now=NOW, replace=True)
        assert found == (new[1:], new[:1], held[1:], [])
        found = rules.judge_additions("u", held, new, per_user=2, now=NOW, replace=True)
        assert [each for each, _ in found.refused] == new[2:]
        found = rules.judge_additions("u", held, new * 2, per_user=9, now=NOW, replace=True)
        assert [each for each, _ in found.refused] == new

    def test_existing_ones_are_skipped(self):
        """With any label and expiry, if they are live."""
        held = [restriction("203.0.113.7", NOW + SECOND), restriction("203.0.113.8", NOW)]
        new = [restriction("203.0.113.7"), restriction("203.0.113.8"), restriction("203.0.113.9")]
        found = rules.judge_additions("u", held, new, per_user=3, now=NOW, skip_existing=True)
        assert found == (new[1:], new[:1], held[1:], [])
        found = rules.judge_additions("u", held, new[:1], per_user=1, now=NOW, skip_existing=True)
        assert found == ([], new[:1], [], [])

    def test_a_pending_request_is_a_duplicate(self):
        """The error has the label and the expiry of the restriction that it would add."""
        error = rules.duplicate(attrs.evolve(REQUEST, label="office"), restriction("203.0.113.7"))
        assert (error.found, error.label, error.expires_at) == ("request", "office", None)
        assert error.differs

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


def test_all_expired():
    """Only restrictions that have all expired shut a user out; a user without any is free."""
    expired, live = restriction("192.0.2.1", NOW), restriction("192.0.2.2", NOW + SECOND)
    assert rules.all_expired([expired], NOW)
    assert not rules.all_expired([expired], NOW - SECOND)
    assert not rules.all_expired([expired, live], NOW)
    assert not rules.all_expired([], NOW)


class TestSummarise:
    def test_none(self):
        assert rules.summarise([], NOW) == rules.NO_RESTRICTIONS == "No restrictions"

    def test_live_ones_are_listed_in_their_order(self):
        held = [
            restriction("203.0.113.8/29"),
            restriction("192.0.2.1", NOW),
            restriction("2001:db8::/32", NOW + SECOND),
            restriction("192.0.2.1-192.0.2.3"),
        ]
        text = "203.0.113.8/29, 2001:db8::/32, 192.0.2.1-192.0.2.3"
        assert rules.summarise(iter(held), NOW) == text

    def test_all_expired(self):
        """The text differs from that for users without restrictions."""
        held = [restriction("192.0.2.1", NOW)]
        text = "No address allowed (every restriction has expired)"
        assert rules.summarise(held, NOW) == text
        assert rules.summarise(held, NOW - SECOND) == "192.0.2.1"

    @given(restricted(), addresses)
    def test_agrees_with_the_decision(self, held, address):
        """The text is "No restrictions" exactly if the decision is UNRESTRICTED."""
        said = rules.summarise(held, NOW) == "No restrictions"
        reason = rules.decide(policy(*held), address, NOW).reason
        assert said == (reason is Reason.UNRESTRICTED)


# ------------------------------------------------------------------------------ searches


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("", True),
        ("li\u2010wei", True),
        ("203.0.113.7", True),
        ("203.0.114.7", False),
        ("203.0.113.0/24", True),
        ("203.0.113.0-203.0.113.255", True),
        ("203.0.113.7/32", False),
        ("203.0.113.777", False),
        ("2001:db8::", False),
    ],
)
def test_search(typed: str, found: bool) -> None:
    """A search finds restrictions by their addresses, and names in any hyphens."""
    person = User(username="jsmith", full_name="Li-Wei O\u2019Brien", account_id="U12")
    search = rules.Search.of(typed)
    assert search.matches(person, [restriction("203.0.113.0/24")]) is found


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        ("jsmith", ("js", "JSMITH", "smi", "john smi", "JOHN", "u123", "\uff4a\uff53")),
        ("jan mary", ("v", "van d", "ber", "  Berg ")),
        ("mary", ("mary van",)),
        ("söhne", ("STRASSE", "abc", "SÖH", "ÜBER")),
        ("anna", ("lena", "schmidt", "schm anna", "Schmidt, Anna", "müller anna-lena")),
        ("dora", ("orléans", "d'orl", "a1 dora")),
        ("jan", ("jan berg", "Berg, J")),
        ("o'hara", ("brien", "o\u2019brien", "o\xb4brien", "jr pat", "(jr", "o'", "s-1 b")),
        ("anna dora jan jsmith mary o'hara söhne", ("", "  ")),
        ("", ("mith", "jsmithx", "1234", "99", "an d", "x" * 5000, "lena muller", "anna jan")),
        ("", ("erg jan", "s-1 brien", "hara", "1 b", "- -", "%", "_", "'", "x' OR '1'='1", "\0")),
    ],
)
def test_whom_a_search_finds(names: str, texts: tuple[str, ...]) -> None:
    """A search finds the start of usernames, of account ids and of words of the name."""
    people = [
        User(username=username, full_name=full_name, account_id=account_id)
        for username, full_name, account_id in (
            ("anna", "Anna-Lena Müller-Schmidt", "A1"),
            ("dora", "Dora d\u2019Orléans", "A1"),
            ("jan", "Van der Berg, Jan", "A2"),
            ("jsmith", "John Smith", "U1234567"),
            ("mary", "Mary  van der Berg", "V-99"),
            ("o'hara", "Pat O'Brien (Jr.)", "S-1 B"),
            ("söhne", "Straße \uff21\uff22\uff23", "Übersee"),
        )
    ]
    for text in texts:
        search = rules.Search.of(text)
        assert [one.username for one in people if search.matches(one, [])] == names.split(), text


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


class TestPlanUsers:
    """Who a user is; tests/test_users.py and the conformance suite have the rest."""

    @staticmethod
    def user(name: str, uid: str | None = None, account: str = "U1") -> User:
        return User(username=name, full_name="", account_id=account, uid=uid)

    def plan(self, held: dict[str, rules.UserHeld], *users: User) -> rules.UserPlan:
        records = [rules.UserRecord(seq, user) for seq, user in enumerate(users)]
        return rules.plan_users(records, held)

    @pytest.mark.parametrize(
        ("one", "other", "two"),
        [
            (("jo", "1"), ("JO", "1", "U2"), False),
            (("jo", "1"), ("jo", "2"), True),
            (("jo", None), ("JO", "2"), False),
            (("jo", None), ("jo", None, "U2"), False),
            (("jo", "1"), ("JO", None, "U2"), True),
        ],
    )
    def test_two_users(self, one: Any, other: Any, two: bool) -> None:
        assert rules.two_users(self.user(*one), self.user(*other)) is two
        assert rules.two_users(self.user(*other), self.user(*one)) is two

    def test_renames_that_depend_on_a_refused_one_are_refused(self) -> None:
        """Nobody gets a username that its user could not leave, along the whole chain."""
        held = {
            name: rules.UserHeld(self.user(name, uid), restricted=True)
            for name, uid in (("a", "1"), ("b", "2"), ("c", "3"))
        }
        moved = [self.user("b", "1"), self.user("c", "2"), self.user("a", "4")]
        plan = self.plan(held, *moved)
        assert (plan.steps, [seq for seq, _ in plan.refused]) == ([], [0, 1, 2])
        assert [(error.username, error.removed) for _, error in plan.refused] == [
            ("b", False), ("c", False), ("a", False),
        ]  # fmt: skip
        plan = self.plan(held, *moved, self.user("d", "3"))
        assert [(step.old, step.user.username) for step in plan.steps] == [
            (None, "a"), ("a", "b"), ("b", "c"), ("c", "d"),
        ]  # fmt: skip
        assert plan.refused == []

    def test_renames_in_two_chains_that_depend_on_refused_ones_are_refused(self) -> None:
        held = {
            "a": rules.UserHeld(attrs.evolve(self.user("A", "1"), account_id="U7")),
            "b": rules.UserHeld(self.user("b", "2")),
            "c": rules.UserHeld(self.user("c", "3"), removed=True, restricted=True),
            "d": rules.UserHeld(self.user("d", "4")),
            "x": rules.UserHeld(self.user("x", "5"), restricted=True),
            "y": rules.UserHeld(self.user("y", "6"), restricted=True),
        }
        wanted = [("x", "1"), ("a", "2"), ("y", "3"), ("c", "4")]
        plan = self.plan(held, *(self.user(*each) for each in wanted))
        assert plan.steps == []
        assert [
            (error.username, error.spellings, error.accounts, error.removed)
            for _, error in plan.refused
        ] == [
            ("x", ("x", "x"), ("U1", "U1"), False),
            ("a", ("A", "a"), ("U7", "U1"), False),
            ("y", ("y", "y"), ("U1", "U1"), False),
            ("c", ("c", "c"), ("U1", "U1"), True),
        ]

    def test_username_of_a_removed_user(self) -> None:
        """It is free without restrictions; with them, only the same user gets it back."""
        removed = rules.UserHeld(self.user("A", "1"), removed=True)
        (step,) = self.plan({"a": removed}, self.user("a", "2")).steps
        assert (step.before, step.back, step.added, step.free) == (None, False, True, True)
        held = {"a": removed._replace(restricted=True)}
        ((_, error),) = self.plan(held, self.user("a", "2")).refused
        assert (error.username, error.spellings, error.removed) == ("a", ("A", "a"), True)
        (step,) = self.plan(held, self.user("A", "1")).steps
        assert (step.back, step.added, step.old, step.free) == (True, True, None, False)
        plan = self.plan(held, self.user("A", "1"), self.user("a", "2"))
        assert [step.user for step in plan.steps] == [self.user("A", "1")]
        ((_, error),) = plan.refused
        assert not error.removed, "it belongs to the first record"

    @pytest.mark.parametrize(
        ("how", "uid", "removed"),
        [
            ("there", "2", False),
            ("there", None, False),
            ("removed", "2", True),
            ("removed", None, True),
            ("missing", "2", True),
            ("missing", None, False),  # the record may be about that user
        ],
    )
    def test_rename_to_a_restricted_username(
        self, how: str, uid: str | None, removed: bool
    ) -> None:
        """It is refused; the error says if the restrictions are those of a removed user."""
        held = {
            "a": rules.UserHeld(self.user("a", "1")),
            "b": rules.UserHeld(self.user("b", uid), removed=how == "removed", restricted=True),
        }
        records = [rules.UserRecord(0, self.user("b", "1"))]
        plan = rules.plan_users(records, held, remove_missing=how == "missing")
        ((_, error),) = plan.refused
        assert (error.username, error.removed) == ("b", removed)

    def test_which_usernames_must_have_no_restrictions_of_their_own(self) -> None:
        """The new one of a rename, unless its user is renamed too; not that of a user who stays."""
        held = {
            "a": rules.UserHeld(self.user("a", "1"), restricted=True),
            "b": rules.UserHeld(self.user("b", "2"), restricted=True),
            "c": rules.UserHeld(self.user("c", "3"), restricted=True),
        }
        users = [self.user("b", "1"), self.user("z", "2"), self.user("C", "3")]
        steps = self.plan(held, *users).steps
        assert [(step.old, step.user.username, step.free) for step in steps] == [
            ("a", "b", False), (None, "c", False), ("b", "z", True),
        ]  # fmt: skip

    def test_restrictions_of_a_username_that_was_never_registered(self) -> None:
        """They are inherited by a new user, but not by one that has others."""
        held = {
            "a": rules.UserHeld(self.user("a", "1"), restricted=True),
            "b": rules.UserHeld(None, restricted=True),
        }
        ((seq, error),) = self.plan(held, self.user("b", "1")).refused
        assert (seq, error.spellings, error.accounts, error.removed) == (
            0, ("b", "b"), ("", "U1"), True,
        )  # fmt: skip
        (step,) = self.plan(held, self.user("b", "2")).steps
        assert (step.added, step.free) == (True, False)

    def test_records_about_one_user(self) -> None:
        """The last one counts, and its uid may come from an earlier one."""
        plan = self.plan({}, self.user("a", "1"), self.user("b", "1"), self.user("B"))
        assert [step.user for step in plan.steps] == [self.user("B", "1")]
        assert plan.refused == []
        held = {
            "a": rules.UserHeld(self.user("a", "1"), restricted=True),
            "b": rules.UserHeld(None),
        }
        (step,) = self.plan(held, self.user("b", "1"), self.user("B")).steps
        assert (step.old, step.user) == ("a", self.user("B", "1"))
        (step,) = self.plan(held, self.user("B"), self.user("b", "1")).steps
        assert (step.old, step.user) == ("a", self.user("b", "1"))

    def test_rename_to_the_username_of_a_user_without_a_uid(self) -> None:
        """It is refused, even if spelling and account are the same."""
        held = {
            "a": rules.UserHeld(self.user("a", "1")),
            "b": rules.UserHeld(self.user("b")),
        }
        ((seq, error),) = self.plan(held, self.user("b", "1")).refused
        assert (seq, error.spellings, error.accounts, error.removed) == (
            0, ("b", "b"), ("U1", "U1"), False,
        )  # fmt: skip

    def test_missing_users_are_removed_on_request(self) -> None:
        held = {
            "a": rules.UserHeld(self.user("a")),
            "b": rules.UserHeld(self.user("b")),
            "c": rules.UserHeld(self.user("c"), removed=True),
            "d": rules.UserHeld(self.user("d"), kept=True),
        }
        records = [rules.UserRecord(0, self.user("b"))]
        plan = rules.plan_users(records, held, remove_missing=True)
        assert plan.removed == [self.user("a")]
        assert rules.plan_users(records, held).removed == []


@pytest.mark.parametrize(
    ("expiries", "ends"),
    [
        ([], None),
        ([None, SECOND], None),
        ([SECOND, 2 * SECOND, -SECOND], NOW + 2 * SECOND),
        ([-SECOND], NOW - SECOND),
    ],
)
def test_the_end_of_what_a_change_leaves(expiries, ends):
    """It is the end of the last temporary restriction, if no permanent one is left."""
    left = [
        restriction(f"203.0.113.{at}", None if each is None else NOW + each)
        for at, each in enumerate(expiries)
    ]
    assert rules.impact([restriction("198.51.100.7")], left, NOW).ends == ends


def test_the_record_has_the_revisions_from_its_beginning_to_the_head() -> None:
    for revision in (3, 5):
        rules.check_revision(revision, 3, 5)
    rules.check_revision(0, 0, 5)
    refused = {-1: "must be a whole number", 2: "the record begins at revision 3"}
    for revision, reason in (refused | {6: "the store is at revision 5"}).items():
        with pytest.raises(InvalidValue, match=f"^revision: {reason}"):
            rules.check_revision(revision, 3, 5)
    for wrong in (True, "4"):
        with pytest.raises(InvalidValue, match=r"^revision: must be a whole number"):
            rules.check_revision(wrong, 3, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("only", ["everybody", "", "PENDING"])
def test_unknown_filter_is_refused(only: str) -> None:
    with pytest.raises(InvalidValue, match=r"must be one of .*, expiring") as caught:
        rules.check_filter(only)
    assert caught.value.name == "only"


def test_lists_are_replaced_or_rows_skipped() -> None:
    with pytest.raises(InvalidValue, match="replace") as caught:
        rules.check_bulk_options(replace=True, skip_existing=True)
    assert caught.value.name == "skip_existing"
    rules.check_bulk_options(replace=True, skip_existing=False)
    rules.check_bulk_options(replace=False, skip_existing=True)


@pytest.mark.parametrize(
    ("left", "expiring"),
    [
        (timedelta(0), False),
        (timedelta(microseconds=1), True),
        (timedelta(days=7), True),
        (timedelta(days=7, microseconds=1), False),
    ],
)
def test_expiring_within_a_week(left: timedelta, expiring: bool) -> None:
    """A restriction that has expired is not about to expire."""
    held = [restriction("203.0.113.7"), restriction("203.0.113.8", NOW + left)]
    assert rules.is_listed("expiring", held, pending=False, now=NOW) is expiring
