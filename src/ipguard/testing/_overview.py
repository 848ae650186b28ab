"""Conformance, part 6: the list of users that people see, and its search."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from ipguard.addresses import AddressRange
from ipguard.errors import InvalidValue
from ipguard.model import Accounts, Actor, RequestState, UserOverview
from ipguard.rules import NO_RESTRICTIONS, summarise
from ipguard.testing._base import Hooks, raises, user

EVERY = Actor.EVERY_ACCOUNT
A1 = frozenset({"A1"})
MOST_PAGES = 50


class OverviewTests(Hooks):
    """What `overview` promises."""

    def _found(self, search: str = "", accounts: Accounts = EVERY, **options: Any) -> list[str]:
        page = self.store.overview(accounts, search=search, **options)
        return [line.user.username for line in page]

    def _lines_by_page(self, limit: int, **options: Any) -> Iterator[UserOverview]:
        after: str | None = None
        for _ in range(MOST_PAGES):
            page = self.store.overview(EVERY, after=after, limit=limit, **options)
            assert len(page) <= limit
            yield from page
            if page.next is None:
                return
            assert len(page) == limit
            after = page.next
        raise AssertionError("the pages have no end")

    def test_a_line_of_the_page(self) -> None:
        """A line has the user, its restrictions, its live requests and the text for them."""
        self.put("alice", "bob")
        now = self.clock()
        held = [self.restriction(), self.restriction(expires_at=now + timedelta(hours=1))]
        first = self.request(requested_at=now - timedelta(seconds=1))
        self.add(*held)
        self.save(self.request(), first)
        (alice, bob) = self.store.overview(A1)
        assert (alice.user, alice.removed) == (user("alice"), False)
        assert alice.restrictions == tuple(held)
        assert alice.pending[0] == first.request
        assert len(alice.pending) == 2
        assert alice.summary == summarise(held, now)
        assert bob == UserOverview(
            user=user("bob"), restrictions=(), pending=(), summary=NO_RESTRICTIONS
        )

    def test_what_has_expired(self) -> None:
        """Expired restrictions are shown and summed up as such; expired requests are not shown."""
        self.put("alice")
        now = self.clock()
        held = self.restriction(expires_at=now + timedelta(seconds=1))
        self.add(held)
        live = self.request(expires_at=now + timedelta(seconds=1, microseconds=1))
        closed = (state for state in RequestState if state is not RequestState.PENDING)
        self.save(
            self.request(expires_at=now + timedelta(seconds=1)),
            live,
            *(self.request(state=state) for state in closed),
        )
        self.clock.advance(timedelta(seconds=1))
        (line,) = self.store.overview(A1)
        assert line.restrictions == (held,)
        assert line.pending == (live.request,)
        assert line.summary == summarise([held], self.clock())
        assert line.summary != NO_RESTRICTIONS

    def test_only_users_of_the_accounts(self) -> None:
        """An actor sees the users of its accounts, compared exactly, and no others."""
        self.put("alice", "bob")
        self.put("carol", account_id="A10")
        self.put("dora", account_id="a1")
        self.add(self.restriction("carol", "203.0.113.7"))
        assert self._found(accounts=A1) == ["alice", "bob"]
        assert self._found(accounts=frozenset({"A1", "a1", "none"})) == ["alice", "bob", "dora"]
        assert self._found(accounts=frozenset()) == []
        assert self._found() == ["alice", "bob", "carol", "dora"]
        assert self._found("carol", A1) == self._found("203.0.113.7", A1) == []
        many = frozenset(f"B{n}" for n in range(self.many * 10))
        assert self._found(accounts=many) == []
        assert self._found(accounts=many | A1) == ["alice", "bob"]

    def test_one_text_is_no_set_of_accounts(self) -> None:
        """A str for the accounts is refused: any part of it would be taken for one of them."""
        self.put("alice", account_id="A1")
        for text in ("A1", "xA1", ""):
            with raises(TypeError):
                self.store.overview(text)  # type: ignore[arg-type]
            with raises(TypeError):
                self.store.history(text)  # type: ignore[arg-type]

    def test_pages_follow_one_another(self) -> None:
        """Pages hold each user once, in order; the last one says that it is the last."""
        names = [f"user{n:03d}" for n in range(12)]
        self.put(*reversed(names))
        for limit in (1, 5, 6, 11, 12, 13):
            assert [line.user.username for line in self._lines_by_page(limit)] == names
        found = self._lines_by_page(3, search="user00")
        assert [line.user.username for line in found] == names[:10]
        assert self.store.overview(EVERY, limit=12).next is None
        assert self.store.overview(frozenset(), limit=1).next is None

    def test_a_page_has_fifty_users(self) -> None:
        """Without a limit a page of users has 50."""
        self.put(*(f"user{n:02d}" for n in range(51)))
        page = self.store.overview(EVERY)
        assert (len(page), page.next) == (50, "user49")

    def test_a_page_has_room_for_one(self) -> None:
        """A limit below 1 is refused: its pages would have no end."""
        self.put("alice", "bob")
        for limit in (0, -1):
            with raises(InvalidValue):
                self.store.overview(EVERY, limit=limit)
            with raises(InvalidValue):
                self.store.history(EVERY, limit=limit)

    def test_users_come_in_the_order_of_their_characters(self) -> None:
        """The order is by code point, whatever the language of the machine."""
        names = ["a b", "a-b", "a1", "a_b", "aa", "b", "z", "ä", "ß".casefold(), "漢", "ꀀ", "𐐨"]
        self.put(*names)
        assert self._found() == sorted(names)
        assert [line.user.username for line in self._lines_by_page(1)] == sorted(names)

    def test_pages_hold_while_users_come_and_go(self) -> None:
        """Users put or removed between two pages shift nobody: none is lost or told twice."""
        names = [f"user{n}" for n in range(0, 20, 2)]
        self.put(*names)
        seen = []
        for number, line in enumerate(self._lines_by_page(2)):
            seen.append(line.user.username)
            if number == 3:
                self.put("aaa", "user1", "user61", "zzz")
                self.store.remove_users(["user0", names[-1]])
        assert set(seen) >= set(names[:-1])
        assert len(seen) == len(set(seen))
        assert "zzz" in seen
        assert "aaa" not in seen

    def test_search_for_the_start_of_a_name(self) -> None:
        """A username, an account id and any word of the full name are found by their start."""
        self.store.put_users(
            [
                user("jsmith", full_name="John Smith", account_id="U1234567"),
                user("mary", full_name="Mary  van der Berg", account_id="V-99"),
                user("söhne", full_name="Straße \uff21\uff22\uff23", account_id="Übersee"),
            ]
        )
        for search, names in {
            "js": ["jsmith"],
            "JSMITH": ["jsmith"],
            "smi": ["jsmith"],
            "john smi": ["jsmith"],
            "JOHN": ["jsmith"],
            "mith": [],
            "jsmithx": [],
            "u123": ["jsmith"],
            "1234": [],
            "99": [],
            "v": ["mary"],
            "van d": ["mary"],
            "mary van": ["mary"],
            "ber": ["mary"],
            "  Berg ": ["mary"],
            "an d": [],
            "STRASSE": ["söhne"],
            "abc": ["söhne"],
            "\uff4a\uff53": ["jsmith"],
            "SÖH": ["söhne"],
            "ÜBER": ["söhne"],
            "": ["jsmith", "mary", "söhne"],
            "  ": ["jsmith", "mary", "söhne"],
            "x" * 5000: [],
        }.items():
            assert self._found(search) == names, search

    def test_search_follows_what_users_become(self) -> None:
        """Another name or account is found at once, and the one before no more, removed or not."""
        self.store.put_users([user("jo", full_name="Ann Bell Ann", account_id="X9")])
        others = [user(f"user{n}", full_name="Bella Ann", account_id="B2") for n in range(3)]
        self.store.put_users(others)
        assert self._found("ann", frozenset({"X9"})) == ["jo"]
        assert self._found("bell") == ["jo", *(other.username for other in others)]
        self.store.put_users([user("jo", full_name="Ann Carr \uff22ell", account_id="Y9")])
        assert self._found("bell ann") == []
        assert self._found("carr") == self._found("carr bell") == self._found("bell", A1 | {"Y9"})
        assert self._found("x9") == self._found("ann", frozenset({"X9"})) == []
        assert self._found("y9") == self._found("y9", frozenset({"Y9"})) == ["jo"]
        self.add(self.restriction("jo"))
        self.store.remove_users(["jo", "user1"])
        assert self._found("carr") == ["jo"]
        assert self._found("bella") == ["user0", "user2"]
        assert self._found("carr", frozenset({"Y9"})) == []
        self.store.put_users([user("jo", full_name="Dee", account_id="Y9")])
        assert self._found("carr") == []
        assert self._found("dee", frozenset({"Y9"})) == ["jo"]

    def test_search_among_many(self) -> None:
        """What only few have is found among many, what many have is found page by page."""
        names = [f"user{n:05d}" for n in range(self.many * 10)]
        some = {names[0]: "Early", names[len(names) // 2]: "Middle", names[-1]: "Late"}
        self.store.put_users(
            [
                user(name, full_name=f"{some.get(name, 'Any')} One", account_id=f"A{number % 3}")
                for number, name in enumerate(names)
            ]
        )
        for name, word in some.items():
            assert self._found(word) == [name]
            assert self._found(word, frozenset({"A0", "A1", "A2"})) == [name]
        assert self._found("one", limit=3) == names[:3]
        assert self._found("any", after=names[-5]) == names[-4:-1]
        assert self._found("one", A1, after=names[-7]) == [
            name for number, name in enumerate(names) if number % 3 == 1 and name > names[-7]
        ]

    def test_search_takes_characters_for_what_they_are(self) -> None:
        """Nothing in a search text is a pattern or a piece of SQL."""
        self.put("a%b", "a_b", "axb", "a'b", "a\\b", 'a"b', "a*b", "a?b", "a[x]b")
        for name in ("a%", "a_", "a'", "a\\", 'a"', "a*", "a?", "a[x]"):
            assert self._found(name) == [f"{name}b"]
        for nobody in ("%", "_", "'", "\\", "x' OR '1'='1", "a%x", "a_x", "[a]", "\x00"):
            assert self._found(nobody) == []

    def test_search_for_an_address(self) -> None:
        """An address finds whoever has a restriction that holds it, and only those."""
        self.put("alice", "bob", "carol", "dora", "198.51.100.9")
        self.add(
            self.restriction("alice", "203.0.113.0/24"),
            self.restriction("bob", "203.0.113.7-203.0.113.9"),
            self.restriction("carol", "2001:db8::/32"),
            self.restriction("dora", "198.51.100.7", expires_at=self.clock()),
            self.restriction("dora", "203.0.113.6"),
            self.restriction("dora", "198.51.100.9"),
        )
        for search, names in {
            "203.0.113.7": ["alice", "bob"],
            " 203.0.113.9 ": ["alice", "bob"],
            "203.0.113.6": ["alice", "dora"],
            "203.0.113.10": ["alice"],
            "203.0.114.0": [],
            "203.0.112.255": [],
            "::ffff:203.0.113.9": ["alice", "bob"],
            "2001:db8::1": ["carol"],
            "2001:DB8:ffff:ffff:ffff:ffff:ffff:ffff": ["carol"],
            "2001:db9::": [],
            "::cb00:7107": [],
            "198.51.100.7": ["dora"],
            "198.51.100.9": ["198.51.100.9", "dora"],
            "203.0.113": [],
            "203.0.113.007": [],
            "203.0.113.0/24": [],
        }.items():
            assert self._found(search) == names, search

    def test_search_at_the_ends_of_the_address_space(self) -> None:
        """The first and the last address of each version are found like others."""
        self.put("four", "six")
        self.add(
            self.restriction("four", AddressRange(version=4, first=0, last=2**32 - 1)),
            self.restriction("six", AddressRange(version=6, first=0, last=2**128 - 1)),
        )
        for search in ("0.0.0.0", "127.255.255.255", "128.0.0.0", "255.255.255.255"):  # noqa: S104
            assert self._found(search) == ["four"]
        for search in ("::", "7fff::", "8000::", ":".join(["ffff"] * 8)):
            assert self._found(search) == ["six"]

    def test_a_line_found_by_address_is_whole(self) -> None:
        """A user found by one restriction is shown with all of them, once."""
        self.put("alice", "bob")
        held = [self.restriction("alice", text) for text in ("10.0.0.0/8", "10.0.0.1", "::1")]
        self.add(*held, self.restriction("bob", "10.0.0.0/9"))
        (alice, _) = self.store.overview(EVERY, search="10.0.0.1")
        assert alice.restrictions == tuple(held)
        page = self.store.overview(EVERY, search="10.0.0.1", limit=1)
        assert (page.items, page.next) == ((alice,), "alice")

    def test_removed_users(self) -> None:
        """Who was removed is shown to actors of every account, while restrictions hold."""
        self.put("alice", "bob")
        held = self.restriction()
        self.add(held)
        self.store.remove_users(["alice", "bob"])
        assert self._found(accounts=A1) == []
        assert self._found("alice", A1) == []
        (line,) = self.store.overview(EVERY)
        assert (line.user, line.restrictions, line.removed) == (user("alice"), (held,), True)
        assert self._found(str(held.addresses)) == ["alice"]
        with self.store.transaction() as turn:
            turn.remove_restriction(held.id)
            self.note(turn, frozenset({"alice"}))
        assert self._found() == []
        self.put("alice")
        (line,) = self.store.overview(A1)
        assert line.removed is False
