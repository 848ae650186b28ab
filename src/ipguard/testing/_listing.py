"""Conformance tests of what people read: the list of users with its search, and the history."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, get_args

from ipguard.addresses import AddressRange
from ipguard.errors import InvalidValue
from ipguard.model import Accounts, Demand, Page, RequestState, UserFilter, UserOverview
from ipguard.rules import NO_RESTRICTIONS, Search, summarise
from ipguard.testing._case import A1, EVERY, StoreCase, raises, user

MOST_PAGES = 50


def pages(load: Callable[[Any], Page[Any]], limit: int) -> Iterator[Any]:
    """Yield the items of all pages, each loaded after a cursor, with a limit."""
    cursor = None
    for _ in range(MOST_PAGES):
        page = load(cursor)
        assert len(page) <= limit
        yield from page
        if page.next is None:
            return
        assert len(page) == limit
        cursor = page.next
    raise AssertionError(f"more than {MOST_PAGES} pages")


class OverviewTests(StoreCase):
    def _found(self, search: str = "", accounts: Accounts = EVERY, **options: Any) -> list[str]:
        page = self.store.overview(accounts, search=search, **options)
        return [line.user.username for line in page]

    def _found_by_page(self, limit: int, **options: Any) -> Iterator[str]:
        load = functools.partial(self.store.overview, EVERY, limit=limit, **options)
        for line in pages(lambda after: load(after=after), limit):
            yield line.user.username

    def test_a_line_of_the_list(self) -> None:
        """A line has the user, all restrictions, the live pending requests and the summary."""
        self.put("alice", "bob")
        second = timedelta(seconds=1)
        soon = self.clock() + second
        held = tuple(self.restriction(expires_at=soon) for _ in range(2))
        self.add(*held)
        late, live = (self.request(expires_at=soon + timedelta(microseconds=n)) for n in (0, 1))
        first = self.request(requested_at=self.clock() - second)
        closed = (state for state in RequestState if state is not RequestState.PENDING)
        self.save(late, live, first, *(self.request(state=state) for state in closed))
        for pending in ((first, late, live), (first, live)):
            (alice, bob) = self.store.overview(A1)
            assert alice == UserOverview(
                user=user("alice"),
                restrictions=held,
                pending=tuple(stored.request for stored in pending),
                summary=summarise(held, self.clock()),
            )
            assert bob == UserOverview(
                user=user("bob"), restrictions=(), pending=(), summary=NO_RESTRICTIONS
            )
            self.clock.advance(second)

    def test_only_users_of_the_accounts_are_listed(self) -> None:
        """The list contains the users of the given accounts, which are compared exactly."""
        self.put("alice", "bob")
        self.put("carol", account_id="A10")
        self.put("dora", account_id="a1")
        self.add(self.restriction("carol", "203.0.113.7"))
        many = frozenset(f"B{n}" for n in range(self.many * 10))
        for accounts, names in (
            (A1, ["alice", "bob"]),
            (frozenset({"A1", "a1", "none"}), ["alice", "bob", "dora"]),
            (frozenset(), []),
            (EVERY, ["alice", "bob", "carol", "dora"]),
            (many, []),
            (many | A1, ["alice", "bob"]),
        ):
            assert self._found(accounts=accounts) == names
        assert self._found("carol", A1) == self._found("203.0.113.7", A1) == []

    def test_pages_of_users(self) -> None:
        """Pages have each user once, by code point in any locale, whatever changes in between."""
        names = ["a b", "a-b", "a1", "a_b", "aa", "b", "z", "ä", "ß".casefold(), "漢", "ꀀ", "𐐨"]
        self.put(*names, account_id="B2")
        for limit in (1, 5, 6, 11, 12, 13):
            assert list(self._found_by_page(limit)) == self._found() == sorted(names)
        assert list(self._found_by_page(2, search="a")) == sorted(names)[:5]
        assert self.store.overview(EVERY, limit=12).next is None
        assert self.store.overview(frozenset(), limit=1).next is None
        seen = []
        for name in self._found_by_page(2):
            seen.append(name)
            if name == "a1":
                self.put("a", "zz")
                self.store.remove_users(["a b", "𐐨"])
        assert seen == sorted({*names, "zz"} - {"𐐨"})

    def test_the_size_of_a_page(self) -> None:
        """By default it is 50 users or 100 changes; limits below 1 and a str are refused."""
        self.put(*(f"user{n:02d}" for n in range(51)))
        with self.store.transaction() as tx:
            for _ in range(100):
                self.append(tx)
        users, changes = self.store.overview(EVERY), self.store.history(EVERY)
        assert (len(users), users.next) == (50, "user49")
        assert (len(changes), changes.next) == (100, 2)
        for read in (self.store.overview, self.store.history):
            for limit in (0, -1):
                with raises(InvalidValue):
                    read(EVERY, limit=limit)
            for text in ("A1", "xA1", ""):  # any part of it would count as an account
                with raises(TypeError):
                    read(text)  # type: ignore[arg-type]

    def _searches(self, accounts: Accounts, texts: Sequence[str], *, found: bool) -> None:
        """Fail unless each text finds what the rule says; with `found`, at least one user."""
        lines = self.store.overview(EVERY, limit=1000).items
        for text in texts:
            search = Search.of(text)
            users = [line.user for line in lines if search.matches(line.user, line.restrictions)]
            assert bool(users) is found, text
            assert self._found(text) == [one.username for one in users], text
            seen = [one.username for one in users if one.account_id in accounts]
            assert self._found(text, accounts) == seen, text

    def test_search_by_text(self) -> None:
        """A search finds users by `rules.Search`, and no character is a wildcard or SQL."""
        odd = ("a%b", "a_b", "axb", "a'b", "a\\b", 'a"b', "a*b", "a?b", "a[x]b")
        self.put(*odd, account_id="B2")
        self.store.put_users(
            [
                user("jsmith", full_name="John Smith", account_id="U1234567"),
                user("mary", full_name="Mary  van der Berg", account_id="V-99"),
                user("söhne", full_name="Straße \uff21\uff22\uff23", account_id="Übersee"),
                user("anna", full_name="Anna-Lena Müller-Schmidt"),
                user("dora", full_name="Dora d\u2019Orléans"),
                user("jan", full_name="Van der Berg, Jan", account_id="A2"),
                user("o'hara", full_name="Pat O'Brien (Jr.)", account_id="S-1 B"),
            ]
        )
        one_word = "js JSMITH smi u123 \uff4a\uff53 v ber STRASSE abc SÖH ÜBER lena orléans d'orl"
        one_word += " schmidt brien o\u2019brien o\xb4brien (jr o' s-1 a% a_ a' a\\ a\" a* a? a[x]"
        several = ["", "  ", "john smi", "JOHN", "van d", "  Berg ", "schm anna", "Schmidt, Anna"]
        several += ["müller anna-lena", "a1 dora", "jan berg", "Berg, J", "jr pat", "s-1 b"]
        self._searches(A1 | {"V-99"}, [*one_word.split(), *several], found=True)
        missed = ["mith", "jsmithx", "1234", "99", "an d", "x" * 5000, "lena muller", "anna jan"]
        missed += ["erg jan", "s-1 brien", "hara", "1 b", "- -", "%", "_", "'", "\\", "a%x", "a_x"]
        self._searches(EVERY, [*missed, "x' OR '1'='1", "[a]", "\x00"], found=False)

    def test_search_follows_changes_of_users(self) -> None:
        """A new name or account is found at once and the old one no longer, also when removed."""
        self.store.put_users([user("jo", full_name="Ann Bell Ann", account_id="X9")])
        others = [user(f"user{n}", full_name="Bella Ann", account_id="B2") for n in range(3)]
        self.store.put_users(others)
        assert self._found("ann", frozenset({"X9"})) == ["jo"]
        assert self._found("bell") == ["jo", *(other.username for other in others)]
        self.store.put_users([user("jo", full_name="Ann Carr \uff22ell", account_id="Y9")])
        assert self._found("bell carr") == ["jo"]
        assert self._found("bella carr") == []
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

    def test_search_among_many_users(self) -> None:
        """Rare words are found among many users, and common words page by page."""
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
        assert self.store.remove_users(names) == 2

    def test_search_by_address(self) -> None:
        """An address finds the restrictions that contain it, a range those that are equal."""
        self.put("alice", "bob", "carol", "dora", "198.51.100.9", "four", "six")
        self.add(
            self.restriction("alice", "203.0.113.0/24"),
            self.restriction("bob", "203.0.113.7-203.0.113.9"),
            self.restriction("carol", "2001:db8::/32"),
            self.restriction("dora", "198.51.100.7", expires_at=self.clock()),
            self.restriction("dora", "203.0.113.6"),
            self.restriction("dora", "198.51.100.9"),
        )
        addresses = "203.0.113.6 203.0.113.9 ::ffff:203.0.113.9 198.51.100.7 2001:DB8::/32"
        addresses += " 203.0.113.0/24 203.0.113.0-203.0.113.255 203.0.113.7-203.0.113.9"
        addresses += " 203.0.113.6/32 198.51.100.9 2001:DB8:ffff:ffff:ffff:ffff:ffff:ffff"
        self._searches(A1, [" 203.0.113.7 ", *addresses.split()], found=True)
        missed = "203.0.114.0 203.0.112.255 2001:db9:: ::cb00:7107 203.0.113 203.0.113.007"
        self._searches(A1, [*missed.split(), "203.0.113.0/25", "203.0.113.7/32"], found=False)
        # A user is listed once, with all its restrictions, whichever of them was found.
        self.add(self.restriction("alice", "203.0.113.7"), self.restriction("alice", "::1"))
        (alice, _) = self.store.overview(EVERY, search="203.0.113.7")
        assert alice.restrictions == self.held("alice")
        self.add(
            self.restriction("four", AddressRange(version=4, first=0, last=2**32 - 1)),
            self.restriction("six", AddressRange(version=6, first=0, last=2**128 - 1)),
        )
        ends = "0.0.0.0 127.255.255.255 128.0.0.0 255.255.255.255 :: 7fff:: 8000::"
        self._searches(A1, [*ends.split(), ":".join(["ffff"] * 8)], found=True)

    def _filtered(self, accounts: Accounts, **options: Any) -> dict[UserFilter, list[str]]:
        filters: tuple[UserFilter, ...] = get_args(UserFilter)
        return {only: self._found(accounts=accounts, only=only, **options) for only in filters}

    def _counted(self, accounts: Accounts) -> None:
        """Fail unless `counts` counts what `overview` lists."""
        found = self._filtered(accounts, limit=1000)
        counts = self.store.counts(accounts)
        assert counts.users == len(self._found(accounts=accounts, limit=1000))
        sizes = {str(only): len(names) for only, names in found.items()}
        assert counts._asdict() == {"users": counts.users, "more": frozenset()} | sizes

    def test_filters_and_counts(self) -> None:
        """A filter lists the users that `rules.is_listed` says; `counts` counts them."""
        week, second = timedelta(days=7), timedelta(seconds=1)
        names = ("free", "held", "late", "lost", "now", "soon", "week")
        self.put(*names)
        self.put("asked", "over", "shut", account_id="B2")
        self.store.put_users([user("gone"), user("left")])
        self.add(
            self.restriction("held"),
            *(
                self.restriction(name, expires_at=self.clock() + after)
                for name, after in (
                    ("late", week + second),
                    ("now", timedelta(0)),
                    ("shut", -week),
                    ("soon", second),
                    ("soon", second),
                    ("week", week),
                    ("gone", second),
                )
            ),
            self.restriction("soon"),
            self.restriction("unknown"),
        )
        many = frozenset(f"C{n}" for n in range(self.many * 10))
        self.store.remove_users(["gone", "left"])
        self.save(
            self.request("asked"),
            self.request("asked", demand=Demand(approvals=1)),
            self.request("over", expires_at=self.clock()),
            self.request("soon", expires_at=self.clock() + second),
            self.request("gone"),
            self.request("left"),
            self.request("unknown"),
            self.request("free", state=RequestState.CANCELLED),
        )
        expected: dict[UserFilter, list[str]] = {
            "restricted": ["gone", "held", "late", "now", "shut", "soon", "week"],
            "unrestricted": ["asked", "free", "lost", "over"],
            "pending": ["asked", "gone", "soon"],
            "expiring": ["gone", "soon", "week"],
        }
        assert self._filtered(EVERY) == expected
        mine = {o: [n for n in found if n in names] for o, found in expected.items()}
        for accounts in (A1, A1 | many):
            assert self._filtered(accounts) == mine
        assert self._filtered(frozenset()) == {only: [] for only in expected}
        # With a search, and page by page.
        assert self._found("s", only="restricted") == ["gone", *expected["restricted"][1:]]
        for only, found in expected.items():
            assert list(self._found_by_page(1, only=only)) == found
            assert list(self._found_by_page(2, only=only, search="some")) == found
            assert self._found("so", A1, only=only, after="b") == mine[only]
            assert self._found("held", only=only) == [name for name in found if name == "held"]
            assert self._found("", only=only, after="n") == [n for n in found if n > "n"]
        for accounts in (EVERY, A1, frozenset({"B2"}), A1 | many, frozenset()):
            self._counted(accounts)
        self.clock.advance(second)
        assert self._filtered(EVERY)["expiring"] == ["late", "week"]
        assert self._filtered(EVERY)["pending"] == ["asked", "gone"]
        self._counted(EVERY)
        with raises(InvalidValue):
            self.store.overview(EVERY, only="expired")  # type: ignore[arg-type]
        with raises(TypeError):
            self.store.counts("A1")  # type: ignore[arg-type]

    def test_filters_among_many_users(self) -> None:
        """Filters that list most users and those that list few find them in any account."""
        names = [f"user{n:05d}" for n in range(self.many * 10)]
        self.store.put_users(
            [user(n, account_id="Z9" if place < 5 else "A1") for place, n in enumerate(names)]
        )
        rare = {names[0], names[len(names) // 2], names[-1]}
        soon = self.clock() + timedelta(days=1)
        for one in (rare, set(names) - rare):
            self.add_staged(self.restriction(name, expires_at=soon) for name in sorted(one))
            self.save(*(self.request(name) for name in sorted(one)[: self.many]))
            for only in ("restricted", "expiring", "pending"):
                listed = sorted(one)[: self.many] if only == "pending" else sorted(one)
                if one is not rare:
                    listed = sorted(rare | set(listed))
                assert self._found(limit=1000, only=only) == listed[:1000]
                assert self._found("some", limit=1000, only=only) == listed[:1000]
                theirs = [name for name in listed if name not in names[:5]]
                assert self._found("", A1, limit=1000, only=only) == theirs[:1000]
            counts = self.store.counts(EVERY)
            for name, count in (("users", len(names)), ("restricted", len(rare | one))):
                told = getattr(counts, name)
                assert (10_000 <= told <= count) if name in counts.more else told == count
            assert self.store.counts(frozenset({"Z9"})).users == 5

    def test_removed_users(self) -> None:
        """Removed users with restrictions are listed, for actors of every account only."""
        self.put("alice", "bob")
        held = self.restriction()
        self.add(held)
        self.store.remove_users(["alice", "bob"])
        assert self._found(accounts=A1) == self._found("alice", A1) == []
        (line,) = self.store.overview(EVERY)
        assert (line.user, line.restrictions, line.removed) == (user("alice"), (held,), True)
        assert self._found(str(held.addresses)) == ["alice"]
        with self.store.transaction() as tx:
            tx.remove_restriction(held.id)
            self.append(tx, frozenset({"alice"}))
        assert self._found() == []
        self.put("alice")
        (line,) = self.store.overview(A1)
        assert line.removed is False


class OpenRequestTests(StoreCase):
    def _open(self, accounts: Accounts = EVERY, **options: Any) -> list[str]:
        given = {"requested_by": "boss"} | options
        return [stored.request.id for stored, _ in self.store.open_requests(accounts, **given)]

    def test_open_requests(self) -> None:
        """Those of the requester come first, then those that demand approvals, newest first."""
        self.put("alice", "bob")
        self.put("carol", account_id="C3")
        second, other = timedelta(seconds=1), {"requested_by": "other"}
        strict = {"demand": Demand(number=True, approvals=1)}
        soon = {"expires_at": self.clock() + second}
        saved = [
            self.request("alice", id="a"),
            self.request("bob", id="b", requested_at=self.clock() + second, **strict),
            self.request("bob", id="c", **soon),
            self.request("alice", id="d", **other, **strict),
            self.request("carol", id="e", **other, **strict, requested_at=self.clock() - second),
            self.request("carol", id="f", **other, **strict, **soon),
            self.request("alice", id="no approval", **other),
            self.request("nobody", id="no user", **strict),
            *(
                self.request("bob", **strict, state=s)
                for s in RequestState
                if s is not RequestState.PENDING
            ),
        ]
        self.save(*saved)
        found = self.store.open_requests(EVERY, requested_by="boss")
        assert [stored.request.id for stored, _ in found] == list("bcafde")
        assert {stored.request.id: stored for stored, _ in found} == {
            stored.request.id: stored for stored in saved if len(stored.request.id) == 1
        }
        assert found[0][1] == user("bob")
        for limit in range(1, 8):
            assert self._open(limit=limit) == list("bcafde")[:limit]
        assert self._open(requested_by="other")[:3] == ["no approval", "f", "d"]
        assert self._open(A1) == list("bcad")
        assert self._open(frozenset({"C3"})) == list("fe")
        many = frozenset(f"B{n}" for n in range(self.many * 10))
        assert self._open(many) == self._open(frozenset()) == []
        assert self._open(many | A1, requested_by="\ud800") == list("bd")
        self.clock.advance(second)
        assert self._open() == list("bade")
        # The restrictions of a removed user can still be deleted.
        self.store.remove_users(["alice"])
        self.save(self.request("alice", id="g", **strict, requested_at=self.clock() + second))
        assert self._open() == list("gbe")
        assert self._open(A1) == list("b")

    def test_open_requests_are_checked(self) -> None:
        """Limits below 1 are refused, and a str instead of accounts."""
        for limit in (0, -1):
            with raises(InvalidValue):
                self.store.open_requests(EVERY, requested_by="boss", limit=limit)
        with raises(TypeError):
            self.store.open_requests("A1", requested_by="boss")  # type: ignore[arg-type]


class HistoryTests(StoreCase):
    def _revisions(self, accounts: Accounts = EVERY, **options: Any) -> list[int]:
        return [change.revision for change in self.store.history(accounts, **options)]

    def _revisions_by_page(self, limit: int, **options: Any) -> Iterator[int]:
        load = functools.partial(self.store.history, EVERY, limit=limit, **options)
        for change in pages(lambda before: load(before=before), limit):
            yield change.revision

    def test_pages_of_changes(self) -> None:
        """Changes come newest first, each once; commits between two pages shift no entry."""
        for _ in range(12):
            self.touch()
        everything = list(range(12, 0, -1))
        assert self._revisions() == everything
        for limit in (1, 5, 6, 12, 13):
            assert list(self._revisions_by_page(limit)) == everything
        assert self.store.history(EVERY, limit=12).next is None
        assert self._revisions(before=3) == [2, 1]
        assert self._revisions(before=1) == self._revisions(before=0) == []
        assert self._revisions(before=10**15) == everything
        seen = []
        for revision in self._revisions_by_page(2):
            seen.append(revision)
            self.touch()
        assert seen == everything

    def test_entries_keep_the_account_of_their_time(self) -> None:
        """Actors see the entries of their accounts; those without one need every account."""
        self.put("alice")
        self.touch("alice", username="alice", account_id="A1")
        self.put("alice", account_id="B2")
        self.touch("alice", username="alice", account_id="B2")
        assert self._revisions(A1) == [2, 1]
        assert self._revisions(frozenset({"B2"})) == [4, 3]
        assert self._revisions(frozenset({"A1", "B2"})) == [4, 3, 2, 1]
        assert self._revisions(frozenset({"a1", "A", "A10"})) == self._revisions(frozenset()) == []
        many = frozenset(f"C{n}" for n in range(self.many * 10))
        self.put("bob", "carol")
        self.touch(username="alice")
        assert self._revisions(many | A1 | {"", "None"}) == [2, 1]
        assert self._revisions() == [6, 5, 4, 3, 2, 1]

    def test_entries_of_one_user(self) -> None:
        """With a username, only the entries about this user are returned, page after page."""
        for number in range(10):
            name = "alice" if number % 3 else "bob"
            self.touch(username=name, account_id="A1")
        self.touch("alice")
        for found in (
            self._revisions(username="bob"),
            self._revisions(A1, username="bob"),
            list(self._revisions_by_page(2, username="bob")),
        ):
            assert found == [10, 7, 4, 1]
        assert self._revisions(username="bob", before=7) == [4, 1]
        assert self._revisions(username="nobody") == self._revisions(username="bo") == []
        assert self._revisions(frozenset({"B2"}), username="bob") == []
