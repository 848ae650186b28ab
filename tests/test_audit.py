"""The detail of an audit entry: written, read, and kept when it cannot be read."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import Action, Actor, audit, open_store
from ipguard.addresses import AddressRange
from ipguard.audit import Anchor, RecordedEntry, log_change
from ipguard.model import EVERYBODY, Change, Damage

NAMES = st.sampled_from(["addresses", "label", "reason", "a_1", "via"])


def test_a_detail_is_text_by_name() -> None:
    """Values become text; those that are None, False or empty are left out."""
    at = datetime(2030, 1, 31, 18, tzinfo=UTC)
    found = audit.detail(
        addresses=AddressRange.parse("203.0.113.0/29"),
        expires_at=at,
        failures=0,
        locked=True,
        unrestricted=False,
        label="",
        replaces=None,
    )
    assert found == {
        "addresses": "203.0.113.0/29",
        "expires_at": "2030-01-31T18:00:00+00:00",
        "failures": "0",
        "locked": "true",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Zürich", "x=Zürich"),
        ("two words", 'x="two words"'),
        ('say "hi"', r'x="say \"hi\""'),
        ("back\\slash", r'x="back\\slash"'),
        ("a\u00a0b\n", r'x="a\u00a0b\n"'),
        ("\ud800", r'x="\ud800"'),
        ("", 'x=""'),
    ],
)
def test_the_stored_text_of_a_value(value: str, text: str) -> None:
    """Servers of earlier versions read this format, so it must not change."""
    assert audit.encode({"x": value}) == text
    assert audit.decode(text) == {"x": value}


@given(st.dictionaries(NAMES, st.text(st.characters())))
def test_every_detail_is_read_as_it_was_written(detail: dict[str, str]) -> None:
    """No value can forge a pair or break the line."""
    text = audit.encode(detail)
    assert audit.decode(text) == detail
    assert text.isprintable()


@pytest.mark.parametrize(
    "text", ['by="x', "free text", "a=1 a=2", r'a="\q"', 'a="b"c', " a=b", "a=b  c=d"]
)
def test_a_detail_in_another_format_is_kept_whole(text: str) -> None:
    """Text in another format stays readable, and is written back unchanged."""
    assert audit.decode(text) == {"": text}
    assert audit.encode(audit.decode(text)) == text


@given(st.text(st.characters()) | st.text(st.sampled_from('ab=" \\u0')))
def test_reading_never_fails(text: str) -> None:
    found = audit.decode(text)
    assert found == {"": text} or audit.decode(audit.encode(found)) == found


def test_an_entry_of_a_newer_version_is_shown_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store returns an unknown action and an unreadable detail as text."""
    path = tmp_path / "a.db"
    with open_store(f"sqlite:///{path}") as store:
        with closing(sqlite3.connect(path)) as other, other:
            for revision, action, detail in ((1, "unlock_v2", "by=x"), (2, "unlock", 'by="x')):
                other.execute(
                    "INSERT INTO changes (revision, token, at, action, detail, account_id)"
                    " VALUES (?, 'aaaa', 1, ?, ?, 'U1')",
                    (revision, action, detail),
                )
            other.execute("UPDATE head SET revision = 2, token = 'aaaa'")
        newest, oldest = store.history(Actor.EVERY_ACCOUNT).items
    assert (newest.action, newest.detail) == (Action.UNLOCK, {"": 'by="x'})
    assert isinstance(newest.action, Action)
    assert (oldest.action, oldest.detail) == ("unlock_v2", {"by": "x"})
    with caplog.at_level(logging.INFO, "ipguard.audit"):
        log_change(newest)
        log_change(oldest)
    lines = [r.getMessage() for r in caplog.records if r.name == "ipguard.audit"]
    assert [line.partition(" action=")[2] for line in lines] == [
        'unlock account=U1 by="x',
        "unlock_v2 account=U1 by=x",
    ]


def test_a_logged_change_has_fields(caplog: pytest.LogCaptureFixture) -> None:
    """They are plain values, which a formatter can write as JSON."""
    change = Change(
        revision=7,
        at=datetime(2030, 1, 31, 18, tzinfo=UTC),
        actor="rjones",
        actor_address="192.0.2.1",
        action="confirm",
        username="jsmith",
        detail={"label": "the office"},
        account_id="U1",
    )
    with caplog.at_level(logging.INFO, "ipguard.audit"):
        log_change(change)
    (record,) = caplog.records
    found = {name: value for name, value in vars(record).items() if name.startswith("ipguard_")}
    assert json.loads(json.dumps(found)) == {
        "ipguard_revision": 7,
        "ipguard_at": "2030-01-31T18:00:00+00:00",
        "ipguard_action": "confirm",
        "ipguard_actor": "rjones",
        "ipguard_address": "192.0.2.1",
        "ipguard_username": "jsmith",
        "ipguard_account": "U1",
        "ipguard_detail": {"label": "the office"},
    }


def test_a_change_is_hashable() -> None:
    """The detail is compared, but not hashed."""
    made = [
        Change(
            revision=1,
            at=datetime(2030, 1, 1, tzinfo=UTC),
            actor=None,
            actor_address=None,
            action="put_users",
            username=None,
            detail={"added": added},
        )
        for added in ("1", "1", "2")
    ]
    assert made[0] == made[1] != made[2]
    assert len(set(made)) == 2


ORIGIN = "0123456789abcdef"
ROW = ("r1", "jo", b"\xcb\x00\x71\x07", b"\xcb\x00\x71\x07", "Bür\no", 1, "boss", None)


def test_a_token_is_what_its_documentation_says() -> None:
    """Auditors compute it without ipguard, so neither the token nor the digest may change."""
    change = Change(
        revision=7,
        at=datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC),
        actor=None,
        actor_address="::1",
        action="impose",
        username="jö",
        detail={"label": "x"},
    )
    columns = audit.entry_columns(change, frozenset({"jö", "al"}))
    canonical = (
        '[7,1000000,null,"::1","impose","j\\u00f6",null,"label=x",'
        '"[\\"al\\", \\"j\\\\u00f6\\"]","abc"]'
    )
    text = f"{ORIGIN}{canonical}salt"
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert audit.next_token(ORIGIN, columns, "abc", "salt") == expected
    lines = (
        '["+","r1","jo","cb007107","cb007107","B\\u00fcr\\no",1,"boss",null]\n'
        '["-","r0","jo"]\n["-","r2","al"]\n'
    )
    found = audit.digest_of([ROW], [("r2", "al"), ("r0", "jo")])
    assert found == hashlib.sha256(lines.encode()).hexdigest()
    assert audit.digest_of([]) == ""


def test_a_digest_can_be_continued_in_two_ways() -> None:
    first = audit.ChangedRestrictions()
    first.add(ROW)
    other = first.copy()
    other.end(("r0", "jo"))
    assert first.text() == audit.digest_of([ROW])
    assert other.text() == audit.digest_of([ROW], [("r0", "jo")])
    assert audit.ChangedRestrictions().copy().text() == ""


def test_the_users_touched_are_read_as_they_were_written() -> None:
    assert audit.touched_text(frozenset()) is None
    texts = [audit.touched_text(frozenset(names)) or "" for names in ("ab", "bc")]
    assert audit.read_touched(texts) == frozenset("abc")
    everybody = audit.touched_text(EVERYBODY) or ""
    assert audit.read_touched([everybody, *texts]) is EVERYBODY


def test_an_anchor_is_read_as_it_was_written() -> None:
    anchor = Anchor(8, "f" * 64, "")
    found = audit.anchor_detail(anchor, 7)
    assert found == {"kept_from": "8", "token": "f" * 64, "deleted": "7"}
    assert audit.read_anchor(found) == anchor
    whole = anchor._replace(restrictions="e" * 64)
    assert audit.read_anchor(audit.anchor_detail(whole, 0)) == whole
    assert audit.read_anchor({"": "kept_from=8"}) is None
    assert audit.read_anchor({"kept_from": "x", "token": "y"}) is None


def chain(length: int) -> list[RecordedEntry]:
    """Return entries of which each adds one restriction, and ends the one before it."""
    token, found = ORIGIN, []
    for n in range(1, length + 1):
        at = datetime(2030, 1, 1, 0, n, tzinfo=UTC)
        change = Change(revision=n, at=at, actor="boss", action="impose", username="jo")
        columns, salt = audit.entry_columns(change, frozenset({"jo"})), audit.new_salt()
        digest = audit.digest_of([added(n)[1:]], [ended(n)[1:]] if n > 1 else [])
        token = audit.next_token(token, columns, digest, salt)
        found.append(RecordedEntry(columns, token, salt, digest))
    return found


def added(n: int) -> tuple[object, ...]:
    return (n, f"r{n}", *ROW[1:])


def ended(n: int) -> tuple[object, ...]:
    return (n, f"r{n - 1}", "jo")


def damage_of(
    entries: list[RecordedEntry],
    begun: list[tuple[object, ...]] | None = None,
    over: list[tuple[object, ...]] | None = None,
    head: tuple[int, str] | None = None,
) -> list[Damage]:
    found: list[Damage] = []
    counts = audit.verify(
        entries,
        begun := list(map(added, range(1, 6))) if begun is None else begun,
        list(map(ended, range(2, 6))) if over is None else over,
        before=(0, ORIGIN),
        head=head or (entries[-1].columns[0], entries[-1].token),
        damage=found,
    )
    assert counts == (len(entries), len(begun))
    return found


def revisions(damage: list[Damage]) -> list[int | None]:
    return [each.revision for each in damage]


def test_a_whole_chain_has_no_damage() -> None:
    assert damage_of(chain(5)) == []


@pytest.mark.parametrize("column", range(1, 9))
def test_a_changed_column_is_found(column: int) -> None:
    """The revision is the place in the chain; every other column is in the token."""
    entries = chain(5)
    columns = list(entries[2].columns)
    columns[column] = "other"
    entries[2] = entries[2]._replace(columns=tuple(columns))
    assert revisions(damage_of(entries)) == [3]


@pytest.mark.parametrize("field", ["token", "salt", "restrictions"])
def test_a_changed_part_of_the_chain_is_found(field: str) -> None:
    entries = chain(5)
    entries[2] = entries[2]._replace(**{field: "a" * 64})
    assert 3 in revisions(damage_of(entries))


def test_an_entry_without_salt_is_reported() -> None:
    """An older library wrote it; the chain continues from its token."""
    entries = chain(5)
    entries[2] = entries[2]._replace(salt=None, restrictions=None)
    (damage,) = damage_of(entries)
    assert damage.revision == 3
    assert "salt" in damage.text


def test_missing_entries_are_found() -> None:
    """Their restrictions have no entry then."""
    entries = chain(5)
    one, two = damage_of(entries[:2] + entries[3:]), damage_of(entries[:1] + entries[3:])
    assert "revision 3 is missing" in one[0].text
    assert "revision 2 to 3 is missing" in two[0].text
    assert revisions(one) == [3, 3, 3]
    assert sorted(filter(None, revisions(two))) == [2, 2, 2, 3, 3]


def test_swapped_entries_are_found() -> None:
    """Two entries that exchange their places, with or without their tokens."""
    entries = chain(5)
    second, third = entries[1], entries[2]
    placed = [
        second._replace(columns=(2, *third.columns[1:])),
        third._replace(columns=(3, *second.columns[1:])),
    ]
    assert revisions(damage_of([entries[0], *placed, *entries[3:]])) == [2, 3]
    moved = [
        third._replace(columns=(2, *third.columns[1:])),
        second._replace(columns=(3, *second.columns[1:])),
    ]
    assert {2, 3} <= set(revisions(damage_of([entries[0], *moved, *entries[3:]])))


def test_changed_restrictions_are_found() -> None:
    """One that is changed, missing, inserted, or ended at another entry than recorded."""
    entries, begun = chain(5), list(map(added, range(1, 6)))
    over = list(map(ended, range(2, 6)))
    changed = [*begun[:2], (*begun[2][:-1], 5), *begun[3:]]
    for rows in (changed, [*begun[:2], *begun[3:]], [*begun[:3], (3, "r9", *ROW[1:]), *begun[3:]]):
        assert revisions(damage_of(entries, rows)) == [3]
    assert revisions(damage_of(entries, None, [*over[:1], *over[2:]])) == [3]
    assert revisions(damage_of(entries, None, [*over[:1], (4, "r2", "jo"), *over[2:]])) == [3, 4]
    odd = (3, "r3", "jo", "text", *ROW[3:])
    assert revisions(damage_of(entries, [*begun[:2], odd, *begun[3:]])) == [3]


def test_restrictions_without_an_entry_are_found() -> None:
    """They begin or end after the last entry, as when it was cut off."""
    entries = chain(5)
    head = (5, entries[4].token)
    assert revisions(damage_of(entries[:4], head=head)) == [5, 5, 5]
    assert revisions(damage_of(entries[:4])) == [5, 5]


def test_a_head_elsewhere_is_found() -> None:
    entries = chain(5)
    assert revisions(damage_of(entries, head=(5, "a" * 64))) == [5]
    assert revisions(damage_of(entries, head=(6, entries[4].token))) == [6]


def test_at_most_a_hundred_places_are_reported() -> None:
    begun = [*map(added, range(1, 6)), *((9, f"x{n}", *ROW[1:]) for n in range(200))]
    assert len(damage_of(chain(5), begun)) == 100


def test_a_noted_token_is_compared() -> None:
    """Another token is damage, and so is a missing entry; the same token is not."""
    found: list[Damage] = []
    audit.check_expected((7, "abc"), "abc", found)
    assert found == []
    audit.check_expected((7, "abc"), "abd", found)
    audit.check_expected((8, "abc"), None, found)
    assert [damage.revision for damage in found] == [7, 8]
    assert "another token" in found[0].text
    assert "not there" in found[1].text


def test_a_token_of_the_chain_has_its_form() -> None:
    assert audit.is_chained(audit.next_token("", (1,), "", "00"))
    assert not audit.is_chained("0123456789abcdef")
