"""The values: checked at construction, frozen, comparable, and without secrets in their text."""

import pickle
from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import model
from ipguard.addresses import AddressRange, AddressSet
from ipguard.errors import AddressError, InvalidValue, UsernameError
from ipguard.model import (
    EVERYBODY,
    RESET,
    AccessLine,
    Action,
    Actor,
    Applied,
    Approval,
    Change,
    Changes,
    Decision,
    Demand,
    Direction,
    Explanation,
    Impact,
    Outcome,
    Page,
    PendingRequest,
    Policy,
    Reason,
    Refusal,
    RequestKind,
    RequestState,
    Restriction,
    Sighting,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserOverview,
    UserSync,
    Verification,
)

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
USER = User(username="jsmith", full_name="John Smith", account_id="U1", email="j@example.com")
ACTOR = Actor(username="boss", email="boss@example.com", manages={"U1"}, address="192.0.2.1")
RESTRICTION = Restriction(
    id="r1",
    username="jsmith",
    addresses=AddressRange.parse("203.0.113.0/29"),
    label="office",
    created_at=NOW,
    created_by="boss",
)
REQUEST = PendingRequest(
    id="q1",
    username="jsmith",
    kind=RequestKind.ADD,
    adds=(AddressRange.parse("203.0.113.7"),),
    label="",
    requested_by="boss",
    requested_at=NOW,
    expires_at=NOW,
    number_expires_at=NOW,
    attempts_left=5,
    state=RequestState.PENDING,
)
STORED = StoredRequest(
    request=REQUEST, email="boss@example.com", key_id=b"key id", digest=b"digest of it"
)
CHANGE = Change(
    revision=1,
    at=NOW,
    actor=None,
    actor_address=None,
    action=Action.PUT_USERS,
    username=None,
    detail={"added": "1"},
)
SIGHTING = Sighting(username="jsmith", address="203.0.113.7", first_at=NOW, last_at=NOW, allowed=1)
DECISION = Decision(allowed=True, reason=Reason.LISTED, revision=3, restriction_id="r1")
VALUES: list[object] = [
    USER,
    ACTOR,
    attrs.evolve(ACTOR, manages=Actor.EVERY_ACCOUNT),
    RESTRICTION,
    REQUEST,
    STORED,
    StoredUser(user=USER),
    Policy(revision=1, restrictions=(RESTRICTION,), known=True),
    DECISION,
    Explanation(
        username="jsmith",
        address=None,
        decision=DECISION,
        restrictions=(RESTRICTION,),
        known=True,
        at=NOW,
        summary="",
    ),
    SIGHTING,
    Refusal(address="203.0.113.9", last_at=NOW, times=2, hint="It is not listed."),
    AccessLine(user=USER, removed=False, restriction=RESTRICTION, last_used=NOW, changed=CHANGE),
    Verification(first=1, head=2, token="t", entries=2, restrictions=1, uncovered=0),
    CHANGE,
    Applied(revision=1, restriction=RESTRICTION, unrestricted=False),
    Impact(direction=Direction.OPENS, gained=AddressSet(), lost=AddressSet()),
    Demand(number=True, approvals=1, wait=timedelta(hours=1)),
    Approval(username="boss", email="b@example.com", account_id=None, subject="1"),
    UserSync(revision=1, added=1),
    UserOverview(user=USER, restrictions=(), pending=(REQUEST,), summary=""),
    Page(items=(1, 2), next="b"),
    Changes(1, "token", frozenset({"jsmith"})),
    Changes(1, "token", EVERYBODY),
]
each_value = pytest.mark.parametrize("value", VALUES, ids=[type(v).__name__ for v in VALUES])


class TestValues:
    def test_every_value_has_a_case(self):
        defined = {
            kind
            for kind in map(vars(model).get, model.__all__)
            if isinstance(kind, type) and attrs.has(kind)
        }
        assert defined == {type(value) for value in VALUES} - {Changes}

    @each_value
    def test_is_immutable_and_equal_by_its_fields(self, value):
        """A value has no other attributes, and its pickled copies are equal and hash alike."""
        name = "head" if isinstance(value, Changes) else attrs.fields(type(value))[0].name
        with pytest.raises(AttributeError):
            setattr(value, name, "another")
        assert not hasattr(value, "__dict__")
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert len({value, pickle.loads(pickle.dumps(value, protocol))}) == 1

    @each_value
    def test_takes_keywords_only(self, value):
        """Fields cannot be confused by their order."""
        if isinstance(value, Changes):
            return
        with pytest.raises(TypeError):
            type(value)(*attrs.asdict(value, recurse=False).values())

    def test_enums_are_the_same_objects_after_pickling(self):
        for each in (Actor.EVERY_ACCOUNT, EVERYBODY, RESET, *Reason, *RequestState, *RequestKind):
            assert pickle.loads(pickle.dumps(each)) is each

    def test_the_texts_of_the_enums(self):
        """Hosts store and compare these texts."""
        assert [*RequestState] == ["pending", "confirmed", "cancelled", "expired", "locked"]
        assert [*RequestKind] == ["add", "delete", "replace"]
        assert [each.name for each in sorted(Direction)] == [
            "NEUTRAL",
            "TIGHTENS",
            "LOOSENS",
            "OPENS",
        ]
        assert [*Reason] == [
            "unrestricted",
            "listed",
            "not_listed",
            "bad_address",
            "bad_username",
            "unknown_user",
            "store_unavailable",
        ]
        assert all(each == each.name.lower() for each in (*Reason, *RequestState, *Action))
        assert [each.value for each in Touched] == ["everybody", "reset"]
        assert (EVERYBODY, RESET) == (Touched.EVERYBODY, Touched.RESET)

    def test_the_repr_has_no_secret(self):
        """The repr of a stored request has neither the digest nor the address of its number."""
        for text in (repr(STORED), str(STORED)):
            assert "boss@example.com" not in text
            assert "digest of it" not in text
            assert "key id" not in text
            assert "q1" in text

    def test_the_repr_of_an_actor_omits_its_accounts(self):
        """An actor of 100,000 accounts does not fill a log."""
        assert "U1" not in repr(ACTOR)
        assert "boss" in repr(ACTOR)


class TestDecision:
    def test_is_true_only_when_allowed(self):
        """A refusal is falsy for every reason."""
        for reason in Reason:
            assert bool(attrs.evolve(DECISION, reason=reason)) is True
            assert bool(attrs.evolve(DECISION, reason=reason, allowed=False)) is False


class TestExpired:
    @pytest.mark.parametrize(("seconds", "expired"), [(-1, False), (0, True), (1, True)])
    def test_expires_at_its_time(self, seconds, expired):
        temporary = attrs.evolve(RESTRICTION, expires_at=NOW)
        assert temporary.expired(NOW + timedelta(seconds=seconds)) is expired


def user(**fields) -> User:
    return User(**({"username": "jsmith", "full_name": "", "account_id": "U1"} | fields))


class TestUser:
    def test_the_username_is_canonical(self):
        assert user(username="\uff2aSmith").username == "jsmith"
        with pytest.raises(UsernameError):
            user(username=" jsmith")

    def test_names_have_at_most_256_characters(self):
        """Full names and account ids are one line; only the full name may be empty."""
        assert user(full_name="x" * 256, account_id="y" * 256).full_name == "x" * 256
        for field in ("full_name", "account_id"):
            for bad in ("x" * 257, "a\nb", None, 7):
                with pytest.raises(InvalidValue) as raised:
                    user(**{field: bad})
                assert raised.value.name == field
        assert user(full_name=" ").full_name == " "
        for blank in ("", " "):
            with pytest.raises(InvalidValue) as raised:
                user(account_id=blank)
            assert raised.value.name == "account_id"

    @pytest.mark.parametrize(
        "email",
        [
            "a@b",
            "john.o'smith+ipguard@mail.example.com",
            "söhne@exämple.com",
            "x" * 242 + "@example.com",
        ],
    )
    def test_an_email_is_not_changed(self, email):
        """Local parts may contain most characters, and domains may be international."""
        assert user(email=email).email == email
        assert Actor(username="a", email=email, manages=()).email == email

    @pytest.mark.parametrize(
        "email",
        [
            " ",
            "a@b@example.com",
            "=?utf-8?q?a=0a?=@example.com",
            "a\u00a0b@example.com",
            "a",
            "@",
            "@b",
            *(f"a{c}b@example.com" for c in ' ,;<>()[]\\"'),
            *(f"a@exam{c}ple.com" for c in ' ,;<>()[]\\"'),
            "a@b\nBcc: c@d",
            "a\x00@b",
            "a\u202e@b",
            "x" * 243 + "@example.com",
            7,
            b"a@b",
        ],
    )
    def test_an_email_is_one_address(self, email):
        """Text that could become several recipients or a header is refused."""
        for make in (
            lambda: user(email=email),
            lambda: Actor(username="a", email=email, manages=()),
        ):
            with pytest.raises(InvalidValue) as raised:
                make()
            assert raised.value.name == "email"

    def test_the_spelling_is_kept(self):
        """`username` is canonical, and follows when a copy gets another spelling."""
        each = user(username="JSmith")
        assert (each.username, each.spelling) == ("jsmith", "JSmith")
        assert attrs.evolve(each, full_name="New").spelling == "JSmith"
        other = attrs.evolve(each, username="ＭＬｅｅ")  # noqa: RUF001
        assert (other.username, other.spelling) == ("mlee", "ＭＬｅｅ")  # noqa: RUF001
        assert type(user(username=type("Name", (str,), {})("Jo")).spelling) is str

    def test_a_uid_is_a_short_text(self):
        assert user(uid="x" * 128).uid == "x" * 128
        assert user(uid="").uid is None
        for uid in (7, "x" * 129, "a\nb", "\ud800"):
            with pytest.raises(InvalidValue) as raised:
                user(uid=uid)
            assert raised.value.name == "uid"

    def test_records_of_a_sync(self):
        """A mapping has the fields of a user, and no others."""
        fields = {"username": "Jo", "full_name": "", "account_id": "U1"}
        assert User.of(fields) == User(**fields)
        assert User.of(user()) == user()
        for record in (7, "jo", {**fields, "id": "1"}, {"username": "jo", "full_name": ""}):
            with pytest.raises(InvalidValue):
                User.of(record)

    def test_only_actors_need_an_email(self):
        """Numbers need a recipient, notices do not."""
        assert user(email=None).email is None
        assert user(email="").email is None
        with pytest.raises(InvalidValue):
            Actor(username="a", email=None, manages=())


def actor(**fields) -> Actor:
    return Actor(**({"username": "boss", "email": "b@example.com", "manages": ()} | fields))


class TestActor:
    def test_the_username_is_canonical(self):
        assert actor(username="BOSS").username == "boss"
        with pytest.raises(UsernameError):
            actor(username="")

    @pytest.mark.parametrize(
        "given", [{"U1", "U2"}, ["U1", "U2", "U1"], ("U2", "U1"), {"U1": 1, "U2": 2}]
    )
    def test_manages_becomes_a_frozenset(self, given):
        assert actor(manages=given).manages == frozenset({"U1", "U2"})
        assert type(actor(manages=iter(given)).manages) is frozenset

    @pytest.mark.parametrize("given", ["U1", "", b"U1", None, 7, object()])
    def test_manages_is_not_text(self, given):
        """`"U1" in "xU1"` is true: a substring would grant access."""
        with pytest.raises(TypeError, match="must be a set of account ids"):
            actor(manages=given)

    @pytest.mark.parametrize("given", [[None], ["U1", 2], [b"U1"], [("U1",)]])
    def test_account_ids_are_text(self, given):
        """An id of another type would silently match no user."""
        with pytest.raises(TypeError, match="as str"):
            actor(manages=given)

    def test_every_account_is_a_separate_object(self):
        """`EVERY_ACCOUNT` contains every account, None too, and no text equals it."""
        every = actor(manages=Actor.EVERY_ACCOUNT)
        assert every.manages is Actor.EVERY_ACCOUNT
        for account in ("U1", "", None, object()):
            assert account in every.manages
        assert repr(Actor.EVERY_ACCOUNT) == "Actor.EVERY_ACCOUNT"
        assert actor(manages=["every account"]).manages != Actor.EVERY_ACCOUNT
        assert "EVERY_ACCOUNT" not in {field.name for field in attrs.fields(Actor)}

    @pytest.mark.parametrize(
        ("given", "held"),
        [
            (None, None),
            ("", None),  # servers on a Unix socket pass an empty text
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:DB8:0:0::1", "2001:db8::1"),
            ("0.0.0.0", "0.0.0.0"),
        ],
    )
    def test_the_address_is_in_canonical_text(self, given, held):
        """The lock-out check and the audit log use one spelling."""
        assert actor(address=given).address == held

    @pytest.mark.parametrize(
        "given", [" ", "192.0.2.1 ", "192.0.2.0/24", "fe80::1%eth0", "testclient", "unix:", 7, 0]
    )
    def test_the_address_is_one_address(self, given):
        with pytest.raises(AddressError):
            actor(address=given)

    @pytest.mark.parametrize("given", [None, 7, "two\nlines", "x" * 401])
    def test_via_is_a_line_of_text(self, given):
        """`via` has at most 400 characters."""
        assert (actor().via, actor(via="x" * 400).via) == ("", "x" * 400)
        with pytest.raises(InvalidValue) as refused:
            actor(via=given)
        assert refused.value.name == "via"


@given(st.frozensets(st.text(max_size=5), max_size=5), st.text(max_size=5))
def test_accounts_are_compared_exactly(accounts, asked):
    """No prefix, other case or other form matches."""
    assert (asked in actor(manages=accounts).manages) == any(asked == one for one in accounts)


def test_only_the_outcome_allow_is_true():
    assert [outcome for outcome in Outcome if outcome] == [Outcome.ALLOW]
