"""Conformance, part 7: the trail that people see."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from ipguard.model import Accounts, Actor, Change
from ipguard.testing._base import Hooks

EVERY = Actor.EVERY_ACCOUNT
A1 = frozenset({"A1"})
MOST_PAGES = 50


class HistoryTests(Hooks):
    """What `history` promises."""

    def _rows(self, accounts: Accounts = EVERY, **options: Any) -> list[int]:
        return [change.revision for change in self.store.history(accounts, **options)]

    def _rows_by_page(self, limit: int, **options: Any) -> Iterator[Change]:
        before: int | None = None
        for _ in range(MOST_PAGES):
            page = self.store.history(EVERY, before=before, limit=limit, **options)
            yield from page
            if page.next is None:
                return
            assert len(page) == limit
            before = page.next
        raise AssertionError("the pages have no end")

    def test_the_newest_is_first(self) -> None:
        """Rows come newest first, each once, page after page."""
        for _ in range(12):
            self.touch()
        everything = list(range(12, 0, -1))
        assert self._rows() == everything
        for limit in (1, 5, 6, 12, 13):
            assert [change.revision for change in self._rows_by_page(limit)] == everything
        assert self.store.history(EVERY, limit=12).next is None
        assert self._rows(before=3) == [2, 1]
        assert self._rows(before=1) == self._rows(before=0) == []
        assert self._rows(before=10**15) == everything

    def test_a_page_has_a_hundred_rows(self) -> None:
        """Without a limit a page of changes has 100."""
        with self.store.transaction() as turn:
            for _ in range(101):
                self.note(turn)
        page = self.store.history(EVERY)
        assert (len(page), page.next) == (100, 2)

    def test_pages_hold_while_rows_are_added(self) -> None:
        """What is committed between two pages shifts nothing."""
        for _ in range(6):
            self.touch()
        seen = []
        for change in self._rows_by_page(2):
            seen.append(change.revision)
            self.touch()
        assert seen == [6, 5, 4, 3, 2, 1]

    def test_rows_are_seen_by_the_account_of_their_time(self) -> None:
        """A user who changes accounts leaves the old rows to the old account."""
        self.put("alice")
        self.touch("alice", username="alice", account_id="A1")
        self.put("alice", account_id="B2")
        self.touch("alice", username="alice", account_id="B2")
        assert self._rows(A1) == [2, 1]
        assert self._rows(frozenset({"B2"})) == [4, 3]
        assert self._rows(frozenset({"A1", "B2"})) == [4, 3, 2, 1]
        assert self._rows(frozenset({"a1", "A", "A10"})) == self._rows(frozenset()) == []
        many = frozenset(f"C{n}" for n in range(self.many * 10))
        assert self._rows(many | A1) == [2, 1]

    def test_rows_without_account_are_for_every_account(self) -> None:
        """A bulk row is shown to actors of every account alone."""
        self.put("alice", "bob")
        self.touch(username="alice")
        assert self._rows(A1) == self._rows(frozenset({"", "None"})) == []
        assert self._rows() == [2, 1]

    def test_rows_of_one_user(self) -> None:
        """With a username, only the rows that concern it are shown, page after page."""
        for number in range(10):
            name = "alice" if number % 3 else "bob"
            self.touch(username=name, account_id="A1")
        self.touch("alice")
        assert self._rows(username="bob") == self._rows(A1, username="bob") == [10, 7, 4, 1]
        assert self._rows(username="bob", before=7) == [4, 1]
        assert [row.revision for row in self._rows_by_page(2, username="bob")] == [10, 7, 4, 1]
        assert self._rows(username="nobody") == self._rows(username="bo") == []
        assert self._rows(frozenset({"B2"}), username="bob") == []

    def test_texts_in_the_trail(self) -> None:
        """What rows say comes back as it was said."""
        detail = {"reason": 'Ω漢字 \U0001f3e2 \\" %s=\n' * 40, "via": " a=b "}
        self.touch(username="söhne", account_id="Übersee", detail=detail, actor="bøss")
        (row,) = self.store.history(EVERY)
        assert (row.username, row.account_id) == ("söhne", "Übersee")
        assert (row.detail, row.actor) == (detail, "bøss")
        assert row.at.utcoffset() == timedelta()
