"""The command line: `sightings`, `suggest`, `forget`, and what `preview` and `explain` add."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import ipguard
from ipguard.model import Sighting
from tests.cli import Shell
from tests.postgres import Given, Server, fresh_schema
from tests.test_cli_ocsf import valid

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")


@pytest.fixture(params=["sqlite", "postgresql"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """A shell with two users, one of whom logged in from three addresses."""
    it = Shell(tmp_path, IPGUARD_KEY="k" * 64, IPGUARD_MAIL="console")
    it.env.pop("IPGUARD_KEY_FILE")
    if request.param == "postgresql":
        server: Server | Given = request.getfixturevalue("postgres")
        it.env["IPGUARD_URL"] = server.url(schema=fresh_schema(), timeout=20)
    ipguard.open_store(it.env["IPGUARD_URL"], migrate=True).close()
    it.register(jsmith="U1", mlee="U1")
    with it.store() as store:
        now = store.now()
        seen = (
            _seen("203.0.113.7", now - timedelta(days=3), allowed=5),
            _seen("198.51.100.9", now - timedelta(days=2), allowed=9, refused=1),
            _seen("2001:db8::7", now - timedelta(days=1), refused=2),
        )
        store.record_sightings(seen)
    return it


def _seen(address: str, at: datetime, *, allowed: int = 0, refused: int = 0) -> Sighting:
    return Sighting(
        username="jsmith",
        address=address,
        first_at=at - timedelta(days=1),
        last_at=at,
        allowed=allowed,
        refused=refused,
    )


def test_sightings_are_listed(shell: Shell):
    """Newest first; in any spelling of the username; as OCSF too."""
    found = shell.json("sightings", "JSmith")["sightings"]
    assert [each["address"] for each in found] == ["2001:db8::7", "198.51.100.9", "203.0.113.7"]
    assert [(each["allowed"], each["refused"]) for each in found] == [(0, 2), (9, 1), (5, 0)]
    lines = shell.good("sightings", "jsmith").splitlines()
    assert lines[0].split("\t") == ["address", "last_at", "first_at", "allowed", "refused"]
    assert lines[2].split("\t")[0] == "198.51.100.9"
    events = [
        valid(json.loads(line))
        for line in shell.good("sightings", "jsmith", "--format", "ocsf").splitlines()
    ]
    assert [each["status"] for each in events] == ["Failure", "Success", "Failure", "Success"]
    assert shell("sightings", "mlee").err == "ipguard: nothing is known about logins of 'mlee'\n"
    assert shell.json("sightings", "mlee")["sightings"] == []
    assert "no user" in shell.bad(4, "sightings", "nobody")


def test_addresses_are_suggested(shell: Shell):
    """Those of allowed logins that no restriction contains, the most used first."""
    assert shell.good("suggest", "jsmith") == "198.51.100.9\n203.0.113.7\n"
    shell.impose("jsmith", "198.51.100.0/24")
    assert shell.json("suggest", "jsmith")["suggestions"] == ["203.0.113.7"]
    assert shell("suggest", "mlee").err == "ipguard: no addresses to suggest for 'mlee'\n"
    assert "no user" in shell.bad(4, "suggest", "nobody")


def test_preview_says_what_it_would_have_refused(shell: Shell):
    found = shell.json("preview", "jsmith", "203.0.113.0/24")
    assert [each["address"] for each in found["seen_lost"]] == ["2001:db8::7", "198.51.100.9"]
    assert "would have refused 9 of 14 recent logins" in shell.good(
        "preview", "jsmith", "203.0.113.0/24"
    )
    assert "would have refused" not in shell.good("preview", "mlee", "203.0.113.0/24")


def test_explain_shows_recent_refusals(shell: Shell):
    """With a hint why the restrictions may not fit."""
    shell.impose("jsmith", "203.0.113.0/24")
    found = shell.json("explain", "jsmith", "2001:db8::7", code=1)
    assert [(e["address"], e["times"]) for e in found["refused"]] == [
        ("2001:db8::7", 2),
        ("198.51.100.9", 1),
    ]
    assert "IPv4" in found["refused"][0]["hint"]
    shown = shell("explain", "jsmith", "2001:db8::7")
    assert "Refused logins with the right password:" in shown.out


def test_list_shows_when_a_restriction_was_used_last(shell: Shell):
    """Logins from before it was there do not count."""
    restriction = shell.impose("jsmith", "203.0.113.0/24")
    (user,) = shell.json("list", "--only", "restricted")["users"]
    assert user["last_used"] == {}
    with shell.store() as store:
        store.record_sightings((_seen("203.0.113.8", store.now(), allowed=1),))
    (user,) = shell.json("list", "--only", "restricted")["users"]
    assert list(user["last_used"]) == [restriction]
    assert datetime.fromisoformat(user["last_used"][restriction]).tzinfo is not None
    assert " last used 20" in shell.terminal("list", "--only", "restricted").ends()


def test_sightings_are_forgotten(shell: Shell):
    """The audit log says who did it, and has none of the addresses."""
    assert shell.json("forget", "JSMITH") == {"username": "JSMITH", "forgotten": 3}
    assert shell.json("sightings", "jsmith")["sightings"] == []
    assert shell.good("forget", "jsmith") == "0 addresses of jsmith were forgotten\n"
    entry = shell.json("history", "--limit", "1")["changes"][0]
    assert (entry["action"], entry["username"]) == ("forget_sightings", "jsmith")
    assert "@" in entry["actor"]
    assert "198.51" not in json.dumps(entry)
    assert "is not a username" in shell.bad(3, "forget", "a\nb")
