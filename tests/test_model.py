"""The values: checked at construction, frozen, comparable, and without secrets in their text."""

import pickle
import sys
import unicodedata
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import model
from ipguard._checks import check_text, check_time
from ipguard.addresses import AddressRange
from ipguard.errors import AddressError, InvalidValue, UsernameError
from ipguard.model import (
    EVERYBODY,
    RESET,
    Action,
    Actor,
    Applied,
    Change,
    Changes,
    Decision,
    Explanation,
    Page,
    PendingRequest,
    Policy,
    Reason,
    RequestKind,
    RequestState,
    Restriction,
    StoredRequest,
    StoredUser,
    Touched,
    User,
    UserOverview,
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
    addresses=AddressRange.parse("203.0.113.7"),
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
    CHANGE,
    Applied(revision=1, restriction=RESTRICTION, unrestricted=False),
    UserOverview(user=USER, restrictions=(), pending=(REQUEST,), summary=""),
    Page(items=(1, 2), next="b"),
    Changes(1, "token", frozenset({"jsmith"})),
    Changes(1, "token", EVERYBODY),
]
each_value = pytest.mark.parametrize("value", VALUES, ids=[type(v).__name__ for v in VALUES])


class TestValues:
    def test_every_value_has_its_case(self):
        """No value of the module is left out of the cases of this class."""
        defined = {
            kind
            for kind in map(vars(model).get, model.__all__)
            if isinstance(kind, type) and attrs.has(kind)
        }
        assert defined == {type(value) for value in VALUES} - {Changes}

    @each_value
    def test_is_frozen(self, value):
        """What was decided or shown is changed by nobody afterwards."""
        name = "head" if isinstance(value, Changes) else attrs.fields(type(value))[0].name
        with pytest.raises(AttributeError):
            setattr(value, name, "another")

    @each_value
    def test_has_no_room_for_other_attributes(self, value):
        """A misspelt attribute is an error, and a value costs no dictionary."""
        assert not hasattr(value, "__dict__")

    @each_value
    def test_is_made_with_names_alone(self, value):
        """Fields cannot be mixed up by their order."""
        if isinstance(value, Changes):
            return
        with pytest.raises(TypeError):
            type(value)(*attrs.asdict(value, recurse=False).values())

    @each_value
    def test_crosses_processes(self, value):
        """A pickled copy is equal to its original."""
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(value, protocol)) == value

    @each_value
    def test_is_equal_and_hashed_by_its_fields(self, value):
        """Two of the same are one in a set."""
        copy = pickle.loads(pickle.dumps(value))
        assert len({value, copy}) == 1

    def test_enums_are_the_same_objects_after_pickling(self):
        """`is` goes on working where a value crossed processes."""
        for each in (Actor.EVERY_ACCOUNT, EVERYBODY, RESET, *Reason, *RequestState, *RequestKind):
            assert pickle.loads(pickle.dumps(each)) is each

    def test_texts_of_the_enums_are_those_of_the_contract(self):
        """Hosts store and compare these texts."""
        assert [*RequestState] == ["pending", "confirmed", "cancelled", "expired", "locked"]
        assert [*RequestKind] == ["add", "delete"]
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

    def test_no_secret_is_shown(self):
        """Neither what verifies a number nor where it went is in a text of the stored request."""
        for text in (repr(STORED), str(STORED)):
            assert "boss@example.com" not in text
            assert "digest of it" not in text
            assert "key id" not in text
            assert "q1" in text

    def test_an_actors_accounts_are_not_shown(self):
        """An actor of 100,000 accounts does not fill a log."""
        assert "U1" not in repr(ACTOR)
        assert "boss" in repr(ACTOR)

    def test_what_may_be_left_out(self):
        """The defaults are those of a value to which nothing special applies."""
        assert USER.email == "j@example.com"
        assert User(username="a", full_name="", account_id="U1").email is None
        assert Actor(username="a", email="a@b", manages=()).address is None
        assert RESTRICTION.expires_at is None
        assert (REQUEST.restriction_id, REQUEST.restriction_expires_at) == (None, None)
        assert REQUEST.reason == ""
        assert (STORED.resends, STORED.sent_at) == (0, None)
        assert StoredUser(user=USER).removed is False
        assert (DECISION.stale, CHANGE.account_id) == (False, None)
        refused = Decision(allowed=False, reason=Reason.BAD_ADDRESS, revision=0)
        assert refused.restriction_id is None
        assert UserOverview(user=USER, restrictions=(), pending=(), summary="").removed is False
        assert Page(items=()).next is None


class TestDecision:
    def test_is_true_only_when_allowed(self):
        """A refusal is falsy, whatever its reason."""
        for reason in Reason:
            assert bool(attrs.evolve(DECISION, reason=reason)) is True
            assert bool(attrs.evolve(DECISION, reason=reason, allowed=False)) is False


class TestPage:
    def test_is_its_items(self):
        """A page iterates over its items and has their number."""
        page = Page(items=("a", "b"), next="b")
        assert list(page) == ["a", "b"]
        assert len(page) == 2
        assert not Page(items=())


class TestExpired:
    @pytest.mark.parametrize(("seconds", "expired"), [(-1, False), (0, True), (1, True)])
    def test_expires_at_its_moment(self, seconds, expired):
        """A restriction has expired from its very moment on."""
        temporary = attrs.evolve(RESTRICTION, expires_at=NOW)
        assert temporary.expired(NOW + timedelta(seconds=seconds)) is expired

    def test_without_a_moment_it_never_does(self):
        """Time never lifts a lasting restriction."""
        assert RESTRICTION.expired(datetime.max.replace(tzinfo=UTC)) is False


BIDI = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = ["\x00", "\t", "\n", "\r", "\x0b", "\x1b", "\x7f", "\x85", "\x9b"]
BREAKING = [*CONTROLS, "\u2028", "\u2029", "\ud800", "\udfff", *BIDI]


class TestCheckedText:
    @pytest.mark.parametrize("text", ["", " ", "office", "Büro 漢字 مكتب", "\U0001f3e2", "a\u0301"])
    def test_returns_what_is_fine(self, text):
        """A line of text in any language comes back as it is."""
        assert check_text("label", text, 20) is text

    @pytest.mark.parametrize("text", BREAKING, ids=ascii)
    def test_refuses_what_breaks_lines_or_turns_them(self, text):
        """Control characters, separators of lines, halves of characters, changes of direction."""
        for whole in (text, f"a{text}", f"{text}a", f"a{text}a"):
            with pytest.raises(InvalidValue) as raised:
                check_text("label", whole, 10)
            assert raised.value.name == "label"
            assert raised.value.reason == "must not hold control characters"

    def test_judges_every_character_alike(self):
        """The whole of Unicode, one by one, against the standard's properties."""
        for code in range(sys.maxunicode + 1):
            character = chr(code)
            bad = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
            # The property Bidi_Control of Unicode, whose classes are these but for the three marks.
            turns = unicodedata.bidirectional(character) in (
                *("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"),
            )
            refused = bad or turns or character in "\u200e\u200f\u061c"
            try:
                check_text("label", character, 1)
            except InvalidValue:
                assert refused, ascii(character)
            else:
                assert not refused, ascii(character)

    def test_counts_characters(self):
        """The limit is in characters, and reached by what has just as many."""
        assert check_text("label", "\U0001f3e2" * 10, 10)
        with pytest.raises(InvalidValue) as raised:
            check_text("label", "x" * 11, 10)
        assert raised.value.reason == "has more than 10 characters"

    @pytest.mark.parametrize("value", [None, 1, b"x", ["x"]])
    def test_takes_text_alone(self, value):
        """Nothing is turned into text on the way."""
        with pytest.raises(InvalidValue) as raised:
            check_text("reason", value, 10)
        assert raised.value.name == "reason"
        assert raised.value.reason == f"must be text, not {type(value).__name__}"

    @pytest.mark.parametrize("text", ["", " ", "\u3000 \u00a0"])
    def test_what_is_required_is_not_blank(self, text):
        """A required text says something; one that is not may be empty."""
        assert check_text("reason", text, 10) == text
        with pytest.raises(InvalidValue) as raised:
            check_text("reason", text, 10, required=True)
        assert raised.value.reason == "must not be empty"
        assert check_text("reason", " x ", 10, required=True) == " x "

    def test_the_limits_are_those_of_the_contract(self):
        """Labels have 100 characters, reasons 500."""
        assert (model.LABEL_LIMIT, model.REASON_LIMIT) == (100, 500)


class Unhelpful(tzinfo):
    """A zone that does not know its offset."""

    def utcoffset(self, moment):
        return None

    dst = tzname = utcoffset


class TestCheckedTime:
    def test_returns_utc(self):
        """The same moment in UTC comes back, whatever the zone."""
        given = datetime(2030, 1, 1, 17, 30, 0, 1, tzinfo=timezone(timedelta(hours=5, minutes=30)))
        moment = check_time("expires_at", given)
        assert moment == given == NOW.replace(microsecond=1)
        assert moment.tzinfo is UTC

    @pytest.mark.parametrize("value", [NOW.replace(tzinfo=None), NOW.replace(tzinfo=Unhelpful())])
    def test_refuses_naive_times(self, value):
        """A time that does not say its offset is another moment on each host."""
        with pytest.raises(InvalidValue) as raised:
            check_time("expires_at", value)
        assert (raised.value.name, raised.value.reason) == (
            "expires_at",
            "must be an aware datetime",
        )

    @pytest.mark.parametrize(
        "moment",
        [
            datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        ],
    )
    def test_refuses_what_utc_cannot_say(self, moment):
        """A moment before the first or after the last that a datetime has is a bad value."""
        with pytest.raises(InvalidValue) as raised:
            check_time("expires_at", moment)
        assert raised.value.name == "expires_at"
        assert raised.value.reason == "is outside the range of times in UTC"

    @pytest.mark.parametrize("value", [None, 0, 1.5, "2030-01-01T12:00:00Z", date(2030, 1, 1)])
    def test_takes_datetimes_alone(self, value):
        """Nothing is guessed to be a time."""
        with pytest.raises(InvalidValue) as raised:
            check_time("at", value)
        assert raised.value.name == "at"
        assert raised.value.reason == f"must be a datetime, not {type(value).__name__}"


def user(**fields) -> User:
    return User(**({"username": "jsmith", "full_name": "", "account_id": "U1"} | fields))


class TestUser:
    def test_the_username_is_canonical(self):
        """`JSmith` given is `jsmith` held."""
        assert user(username="\uff2aSmith").username == "jsmith"
        with pytest.raises(UsernameError):
            user(username=" jsmith")

    def test_names_have_256_characters_at_the_most(self):
        """The full name may be empty, the account id may not; both are one line."""
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
    def test_an_email_is_taken_as_it_is(self, email):
        """Whether a mailbox exists only mail can tell."""
        assert user(email=email).email == email
        assert Actor(username="a", email=email, manages=()).email == email

    @pytest.mark.parametrize(
        "email",
        [
            "",
            "a@b@example.com",
            "a:b@example.com",
            "=?utf-8?q?a=0a?=@example.com",
            "a\u00a0b@example.com",
            " ",
            "a",
            "@",
            "a@",
            "@b",
            *(f"a{c}b@example.com" for c in ' ,;<>()[]\\"'),
            *(f"a@exam{c}ple.com" for c in ' ,;<>()[]\\"'),
            "a@b\nBcc: c@d",
            "a@b\r",
            "a\x00@b",
            "a\u202e@b",
            "x" * 243 + "@example.com",
            7,
            b"a@b",
        ],
    )
    def test_an_email_is_one_address(self, email):
        """What could become several recipients, or a header, is refused."""
        for make in (
            lambda: user(email=email),
            lambda: Actor(username="a", email=email, manages=()),
        ):
            with pytest.raises(InvalidValue) as raised:
                make()
            assert raised.value.name == "email"

    def test_a_user_may_have_no_email_and_an_actor_may_not(self):
        """Numbers have to go somewhere; notices go where they can."""
        assert user(email=None).email is None
        with pytest.raises(InvalidValue):
            Actor(username="a", email=None, manages=())


def actor(**fields) -> Actor:
    return Actor(**({"username": "boss", "email": "b@example.com", "manages": ()} | fields))


class TestActor:
    def test_the_username_is_canonical(self):
        """An actor is the same under any spelling."""
        assert actor(username="BOSS").username == "boss"
        with pytest.raises(UsernameError):
            actor(username="")

    @pytest.mark.parametrize(
        "given", [{"U1", "U2"}, ["U1", "U2", "U1"], ("U2", "U1"), {"U1": 1, "U2": 2}]
    )
    def test_manages_becomes_a_frozenset(self, given):
        """Any collection of account ids will do."""
        assert actor(manages=given).manages == frozenset({"U1", "U2"})
        assert type(actor(manages=iter(given)).manages) is frozenset

    @pytest.mark.parametrize("given", ["U1", "", b"U1", None, 7, object()])
    def test_manages_is_no_text(self, given):
        """`"U1" in "xU1"` holds: a substring would become a right."""
        with pytest.raises(TypeError, match="must be a set of account ids"):
            actor(manages=given)

    @pytest.mark.parametrize("given", [[None], ["U1", 2], [b"U1"], [("U1",)]])
    def test_account_ids_are_text(self, given):
        """An id that is no str would match no user, silently."""
        with pytest.raises(TypeError, match="as str"):
            actor(manages=given)

    def test_every_account_is_an_object_of_its_own(self):
        """It holds every account, the missing one too, and no text stands for it."""
        every = actor(manages=Actor.EVERY_ACCOUNT)
        assert every.manages is Actor.EVERY_ACCOUNT
        for account in ("U1", "", None, object()):
            assert account in every.manages
        assert repr(Actor.EVERY_ACCOUNT) == "Actor.EVERY_ACCOUNT"
        assert actor(manages=["every account"]).manages != Actor.EVERY_ACCOUNT
        assert "EVERY_ACCOUNT" not in {field.name for field in attrs.fields(Actor)}

    def test_manages_nothing_holds_nothing(self):
        """No accounts are no rights, not all of them."""
        assert "U1" not in actor(manages=()).manages
        assert None not in actor(manages=["U1"]).manages

    @pytest.mark.parametrize(
        ("given", "held"),
        [
            (None, None),
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:DB8:0:0::1", "2001:db8::1"),
            ("0.0.0.0", "0.0.0.0"),
        ],
    )
    def test_the_address_is_in_canonical_text(self, given, held):
        """The lock-out check and the trail see one spelling."""
        assert actor(address=given).address == held

    def test_an_empty_address_is_none(self):
        """Servers on a Unix socket pass empty text if no address is known."""
        assert actor(address="").address is None

    @pytest.mark.parametrize(
        "given", [" ", "192.0.2.1 ", "192.0.2.0/24", "fe80::1%eth0", "testclient", "unix:", 7, 0]
    )
    def test_the_address_is_one_address(self, given):
        """Anything else that is not an address is refused."""
        with pytest.raises(AddressError):
            actor(address=given)

    @pytest.mark.parametrize("given", [None, 7, "two\nlines", "x" * 401])
    def test_the_way_is_a_line_of_text(self, given):
        """What goes into the trail is checked when the actor is made."""
        assert (actor().via, actor(via="x" * 400).via) == ("", "x" * 400)
        with pytest.raises(InvalidValue) as refused:
            actor(via=given)
        assert refused.value.name == "via"


@given(st.frozensets(st.text(max_size=5), max_size=5), st.text(max_size=5))
def test_an_actor_manages_just_what_it_was_given(accounts, asked):
    """Membership is exact: no prefix, no case, no other form."""
    assert (asked in actor(manages=accounts).manages) == any(asked == one for one in accounts)
