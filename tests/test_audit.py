"""The detail of an audit entry: written, read, and kept when it cannot be read."""

from __future__ import annotations

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
from ipguard.audit import log_change
from ipguard.model import Change

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
