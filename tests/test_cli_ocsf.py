"""Events for a SIEM: each agrees with the published schema of the OCSF."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema.validators import Draft202012Validator  # type: ignore[import-untyped]
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

import ipguard
from ipguard import User
from ipguard.cli import _ocsf
from ipguard.errors import WrongNumber
from ipguard.model import Action, Change, Sighting
from ipguard.testing import FakeClock, Outbox
from tests.cli import PROGRAM, Shell
from tests.conftest import rounds
from tests.test_docs import table

AT = datetime(2027, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)
VERSIONS = ("1.4.0", "1.5.0", "1.6.0", "1.7.0", "1.8.0")


@cache
def validators(version: str) -> dict[int, Draft202012Validator]:
    """Return the validators of the two classes of events, in a version of the schema."""
    published = OcsfJsonSchemaEmbedded(get_ocsf_schema(version=version))
    return {
        uid: Draft202012Validator(
            published.get_class_schema(published.lookup_class_name_from_uid(uid))
        )
        for uid in (3001, 3002)
    }


def valid(event: Any, *versions: str) -> dict[str, Any]:
    """Return an event as it is written, once it agrees with the published schema."""
    found: dict[str, Any] = json.loads(json.dumps(event))
    for version in versions or VERSIONS[:1]:
        validators(version)[found["class_uid"]].validate(found)
    assert found["type_uid"] == found["class_uid"] * 100 + found["activity_id"]
    assert found["metadata"]["version"] == VERSIONS[0]
    return found


def event(action: Action | str, username: str | None = "jsmith", **detail: str) -> dict[str, Any]:
    """Return the event of an entry, valid in every version."""
    change = Change(
        revision=7,
        at=AT,
        actor="rjones",
        actor_address="2001:db8::7",
        action=action,
        username=username,
        account_id="U1" if username else None,
        detail=detail,
    )
    return valid(_ocsf.change_event(change), *VERSIONS)


# -- each action -----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [*Action, "made_up_by_a_newer_version"])
def test_every_action_has_an_event(action: Action | str):
    """It names the action, the actor, its address and the user, and has the whole detail."""
    found = event(action, request="3f1c", via="command_line=root@db1")
    assert found["metadata"]["event_code"] == action
    assert found["metadata"]["sequence"] == 7
    assert found["metadata"]["correlation_uid"] == "3f1c"
    assert found["actor"] == {"user": {"name": "rjones"}}
    assert found["src_endpoint"] == {"ip": "2001:db8::7"}
    assert found["time"] == int(AT.timestamp() * 1000)
    assert found["unmapped"] == {"request": "3f1c", "via": "command_line=root@db1"}
    assert str(action) in found["message"]
    known = action in list(Action)
    assert (found["status_id"] == 0) is (found["severity_id"] == 0) is not known


@pytest.mark.parametrize(
    ("action", "detail", "kind"),
    [
        ("confirm", {}, (3001, 7, "Attach Policy")),
        ("confirm", {"kind": "replace"}, (3001, 7, "Attach Policy")),
        ("confirm", {"kind": "delete"}, (3001, 8, "Detach Policy")),
        ("impose", {}, (3001, 7, "Attach Policy")),
        ("impose_many", {"restrictions": "3", "ended": "2"}, (3001, 7, "Attach Policy")),
        ("impose_many", {"restrictions": "0", "ended": "2"}, (3001, 8, "Detach Policy")),
        ("delete", {}, (3001, 8, "Detach Policy")),
        ("lift", {}, (3001, 8, "Detach Policy")),
        ("unlock", {}, (3001, 12, "Unlock")),
        ("put_users", {"added": "2", "updated": "1"}, (3001, 1, "Create")),
        ("put_users", {"added": "0", "updated": "1"}, (3001, 99, "put_users")),
        ("remove_users", {}, (3001, 6, "Delete")),
        ("request", {"direction": "opens"}, (3001, 99, "request")),
        ("wrong_number", {}, (3002, 99, "wrong_number")),
        ("number_accepted", {}, (3002, 99, "number_accepted")),
    ],
)
def test_what_an_entry_did_decides_the_activity(action, detail, kind):
    found = event(action, **detail)
    assert (found["class_uid"], found["activity_id"], found["activity_name"]) == kind


def test_the_page_lists_the_class_and_activity_of_each_action():
    rows = [
        (re.findall(r"\w+", row[0]), row) for row in table("docs/siem.md", "entry of the audit log")
    ]
    named = {name: row for names, row in rows for name in names}
    for action in Action:
        _, kind, activity = named.get(action, rows[-1][1])
        found = event(action)
        name = "Other" if found["activity_id"] == 99 else found["activity_name"]
        assert kind == f"{found['class_uid']} {found['class_name']}"
        assert activity.startswith(f"{found['activity_id']} {name}")


@pytest.mark.parametrize(
    ("action", "detail", "severity", "status"),
    [
        ("confirm", {"direction": "tightens"}, "Informational", "Success"),
        ("confirm", {"direction": "loosens"}, "Low", "Success"),
        ("confirm", {"direction": "opens"}, "Medium", "Success"),
        ("lift", {"unrestricted": "true"}, "Medium", "Success"),
        ("wrong_number", {"attempts_left": "4"}, "Low", "Failure"),
        ("wrong_number", {"attempts_left": "0", "locked": "true"}, "Medium", "Failure"),
        ("delivery_failed", {}, "Low", "Failure"),
        ("prune", {}, "Low", "Success"),
        ("from_the_future", {"direction": "opens"}, "Unknown", "Unknown"),
    ],
)
def test_severity_and_status(action, detail, severity, status):
    found = event(action, **detail)
    assert (found["severity"], found["status"]) == (severity, status)


def test_restrictions_are_policies():
    """Those added are applied, those that ended are not."""
    found = event(
        "confirm",
        kind="replace",
        label="office",
        restriction="a1, a2",
        addresses="203.0.113.7, 2001:db8::/64",
        replaces="b1",
        ends="198.51.100.0/29",
        afterwards="jsmith can log in from two addresses.",
    )
    assert found["policies"] == [
        {"uid": "a1", "name": "203.0.113.7", "desc": "office", "is_applied": True},
        {"uid": "a2", "name": "2001:db8::/64", "desc": "office", "is_applied": True},
        {"uid": "b1", "name": "198.51.100.0/29", "is_applied": False},
    ]
    assert found["message"] == "confirm jsmith: jsmith can log in from two addresses."
    (lifted,) = event("lift", restriction="a1", addresses="203.0.113.7")["policies"]
    assert lifted == {"uid": "a1", "name": "203.0.113.7", "is_applied": False}
    assert "policies" not in event("request", addresses="203.0.113.7")


def test_users_that_were_renamed_or_moved():
    """The event has the user before and after; an entry without names is about several users."""
    renamed = event("rename_user", "new", old="old", new="new")
    assert renamed["user"] == {"name": "old", "account": {"uid": "U1"}}
    assert renamed["user_result"] == {"name": "new", "account": {"uid": "U1"}}
    moved = event("move_user", old="U0", new="U1")
    assert moved["user"] == {"name": "jsmith", "account": {"uid": "U0"}}
    assert moved["user_result"] == {"name": "jsmith", "account": {"uid": "U1"}}
    assert event("impose_many", None)["user"]["type_id"] == 99
    assert event("wrong_number")["user"] == {"name": "rjones"}


def test_an_entry_of_the_host_has_no_actor():
    change = Change(revision=1, at=AT, actor=None, action=Action.WRONG_NUMBER, detail={"": "a b"})
    found = valid(_ocsf.change_event(change), *VERSIONS)
    assert found["actor"] == {"app_name": "host"}
    assert "src_endpoint" not in found
    assert found["unmapped"] == {"detail": "a b"}


def test_sightings_are_logons():
    """Allowed and refused logins are an event each, with their count."""
    seen = Sighting(
        username="jsmith",
        address="2001:db8::7",
        first_at=AT - timedelta(days=2),
        last_at=AT,
        allowed=3,
        refused=1,
    )
    allowed, refused = (valid(each, *VERSIONS) for each in _ocsf.sighting_events(seen))
    assert (allowed["status"], allowed["count"], allowed["activity_name"]) == (
        "Success",
        3,
        "Logon",
    )
    assert (refused["status"], refused["count"]) == ("Failure", 1)
    assert refused["end_time"] - refused["start_time"] == 2 * 24 * 3600 * 1000


def test_the_schema_refuses_what_it_should():
    """The validators are not satisfied with anything."""
    good = event("confirm", direction="opens")
    wrongs: tuple[dict[str, Any], ...] = (
        {"activity_id": 77},
        {"severity_id": "3"},
        {"user": {}},
        {"made_up": 1},
        {"src_endpoint": {"ip": "not an address"}},
        {"time": "2027-01-01"},
    )
    for wrong in wrongs:
        assert not validators("1.4.0")[3001].is_valid(good | wrong), wrong
    assert not validators("1.4.0")[3001].is_valid({k: v for k, v in good.items() if k != "time"})


_TEXTS = st.text(max_size=20)
_NAMES = st.sampled_from(
    ["kind", "restriction", "addresses", "replaces", "ends", "old", "new", "direction", "label",
     "request", "restrictions", "ended", "added", "unrestricted", "locked", "afterwards", ""]
)  # fmt: skip


@settings(max_examples=rounds(200, 20_000), deadline=None)
@given(
    st.sampled_from([*Action, "other"]),
    st.none() | _TEXTS.filter(bool),
    st.none() | st.sampled_from(["203.0.113.7", "2001:db8::", "::1"]),
    st.none() | _TEXTS.filter(bool),
    st.dictionaries(_NAMES, _TEXTS | st.sampled_from(["delete", "0", "a, b", "opens"])),
)
def test_no_entry_makes_an_invalid_event(action, actor, address, username, detail):
    """Not even an entry with a detail that this version would not write."""
    change = Change(
        revision=1,
        at=AT,
        actor=actor,
        actor_address=address,
        action=action,
        username=username,
        detail=detail,
    )
    valid(_ocsf.change_event(change))


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell with a store in which most actions happened."""
    it = Shell(tmp_path)
    it.write("ipguard.key", "k" * 64).chmod(0o600)
    desk = ipguard.Actor(
        username="desk", email="d@bank.example", manages=ipguard.Actor.EVERY_ACCOUNT, address="::7"
    )
    clock, outbox = FakeClock(AT), Outbox()
    with ipguard.open_store(it.env["IPGUARD_URL"], clock=clock) as store:
        store.put_users([User(username=n, full_name=n, account_id="U1") for n in ("ann", "bob")])
        flow = ipguard.Workflow(store, outbox, key=bytes(32))
        first = flow.request(desk, "ann", ["203.0.113.7", "2001:db8::/64"], label="office")
        number = outbox.number_for(first.id)
        wrong = f"{(int(number.replace('-', '')) + 1) % 10**10:010}"
        with pytest.raises(WrongNumber):
            flow.confirm(desk, first.id, wrong)
        added = flow.confirm(desk, first.id, number)
        assert isinstance(added, ipguard.Applied)
        second = flow.request(desk, "ann", "198.51.100.7", replaces=[added.added[0].id])
        clock.advance(timedelta(minutes=5))
        flow.resend(desk, second.id)
        flow.confirm(desk, second.id, outbox.number_for(second.id))
        flow.cancel(desk, flow.request(desk, "bob", "198.51.100.7").id)
        bobs = flow.impose(desk, "bob", "198.51.100.7", reason="ticket 1").restriction
        assert bobs is not None
        flow.lift(desk, bobs.id, reason="ticket 2")
        flow.impose_many(desk, [("bob", "198.51.100.9")], reason="ticket 3")
        flow.unlock(desk, "desk", reason="ticket 4")
        store.rename_user("bob", "rob")
        store.remove_users(["rob"])
    return it


def _lines(text: str) -> list[dict[str, Any]]:
    return [valid(json.loads(line), *VERSIONS) for line in text.splitlines()]


def test_history_writes_valid_events(shell: Shell):
    """One a line, newest first; --since leaves out what was exported before."""
    found = _lines(shell.good("history", "--format", "ocsf", "--all"))
    revisions = [each["metadata"]["sequence"] for each in found]
    assert revisions == list(range(len(found), 0, -1))
    acts = {each["metadata"]["event_code"] for each in found}
    assert acts >= {"request", "wrong_number", "confirm", "resend", "cancel", "impose", "lift"}
    assert acts >= {"impose_many", "unlock", "put_users", "rename_user", "remove_users"}
    (replaced,) = (e for e in found if e["unmapped"].get("kind") == "replace" and "policies" in e)
    assert [each["is_applied"] for each in replaced["policies"]] == [True, False]
    since = shell.good("history", "--format", "ocsf", "--since", str(len(found) - 2))
    assert _lines(since) == found[:2]
    assert len(_lines(shell.good("history", "--format", "ocsf", "--limit", "3"))) == 3
    assert _lines(shell.good("history", "--format", "ocsf", "--user", "zed")) == []


def test_history_since_a_revision(shell: Shell):
    """For people and as JSON too; a note says if there is none."""
    head = shell.json("history")["changes"][0]["revision"]
    found = shell.json("history", "--since", str(head - 2))
    assert [each["revision"] for each in found["changes"]] == [head, head - 1]
    assert found["next"] is None
    done = shell("history", "--since", str(head))
    assert done.err == f"ipguard: the audit log has no entries after revision {head}\n"


def test_watch_writes_valid_events(shell: Shell):
    """Oldest first, each at once."""
    command = [*PROGRAM, "watch", "--format", "ocsf", "--since", "0"]
    with subprocess.Popen(
        command, env=shell.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = _lines("".join(process.stdout.readline() for _ in range(4)))
        assert [each["metadata"]["sequence"] for each in found] == [1, 2, 3, 4]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        process.stderr.read()
    assert process.returncode == 0
