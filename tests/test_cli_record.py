"""The command line: `as-of`, `verify`, `report`, `prune`, and one entry of `history`."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import ipguard
from ipguard.model import Sighting, User
from ipguard.stores.postgres import grants
from ipguard.testing import FakeClock, Outbox
from tests.cli import Shell
from tests.postgres import Given, Server, fresh_schema
from tests.test_cli_ocsf import valid
from tests.test_docs import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")

START = datetime.now(UTC).replace(microsecond=0) - timedelta(days=10)


def day(number: float) -> str:
    """Return the time so many days after the start, in ISO 8601."""
    return (START + timedelta(days=number)).isoformat()


DESK = ipguard.Actor(
    username="desk", email="d@bank.example", manages=ipguard.Actor.EVERY_ACCOUNT, address="::7"
)


class World:
    """A shell with a store in which something happened on each of eight days."""

    def __init__(self, shell: Shell) -> None:
        self.shell, self.clock = shell, FakeClock(START)
        url = shell.env["IPGUARD_URL"]
        with ipguard.open_store(url, migrate=True, clock=self.clock) as store:
            flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
            names = ("jsmith", "mlee", "=zed")
            users = [User(username=name, full_name=name, account_id="U1") for name in names]
            store.put_users(users)  # 1
            self._day()
            first = flow.impose(DESK, "jsmith", "203.0.113.7", reason="x", label="=1+1")  # 2
            self._day()
            flow.impose(DESK, "jsmith", "198.51.100.0/29", reason="x", only=True)  # 3
            self._day()
            rows = [("mlee", "203.0.113.8"), ("mlee", "203.0.113.9"), ("jsmith", "192.0.2.1")]
            flow.impose_many(DESK, rows, reason="x", replace=True)  # 4
            self._day()
            until = self.clock() + timedelta(hours=12)
            flow.impose(DESK, "mlee", "192.0.2.9", reason="x", expires_at=until)  # 5
            self._day()
            seen = Sighting(
                username="mlee",
                address="203.0.113.8",
                first_at=self.clock(),
                last_at=self.clock(),
                allowed=3,
            )
            store.record_sightings((seen,))
        assert first.restriction is not None
        self.first = first.restriction.id

    def _day(self) -> None:
        self.clock.advance(timedelta(days=1))

    def sql(self, statement: str) -> None:
        """Change the tables behind the library's back."""
        raise NotImplementedError


class SQLiteWorld(World):
    def sql(self, statement: str) -> None:
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(self.shell.folder / "ipguard.db")) as db, db:
            db.execute(statement)


class PostgresWorld(World):
    server: Server | Given
    schema: str

    def sql(self, statement: str) -> None:
        self.server.execute(f"SET search_path TO {self.schema}; {statement}")


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    shell = Shell(tmp_path, IPGUARD_KEY="k" * 64, IPGUARD_MAIL="console")
    shell.env.pop("IPGUARD_KEY_FILE")
    if request.param == "sqlite":
        return SQLiteWorld(shell)
    server, schema = request.getfixturevalue("postgres"), fresh_schema()
    shell.env["IPGUARD_URL"] = server.url(schema=schema, timeout=20)
    found = PostgresWorld(shell)
    found.server, found.schema = server, schema
    return found


def _addresses(found: Any) -> list[str]:
    return [each["addresses"] for each in found["restrictions"]]


# -- as-of -----------------------------------------------------------------------------------------


def test_as_of_a_revision(world: World):
    """Replaced and imported restrictions included; the text says what held."""
    shell = world.shell
    held = [
        _addresses(shell.json("as-of", "JSmith", "--revision", str(revision)))
        for revision in range(1, 6)
    ]
    now = [["192.0.2.1"], ["192.0.2.1"]]
    assert held == [[], ["203.0.113.7"], ["198.51.100.0/29"], *now]
    shown = shell.good("as-of", "jsmith", "--revision", "2").splitlines()
    assert shown[0] == f"{START + timedelta(days=1):%Y-%m-%d %H:%M:%S} UTC, revision 2: 203.0.113.7"
    assert shown[2].startswith(f"{world.first}\t203.0.113.7\t=1+1\t")
    assert "No restrictions" in shell.good("as-of", "jsmith", "--revision", "1")


def test_as_of_a_time(world: World):
    """A time or an age; a restriction that had expired by then is listed, and not in the text."""
    shell = world.shell
    found = shell.json("as-of", "jsmith", "--at", day(1.9))
    assert (found["revision"], _addresses(found)) == (2, ["203.0.113.7"])
    found = shell.json("as-of", "mlee", "--at", day(4.6))
    assert _addresses(found) == ["203.0.113.8", "203.0.113.9", "192.0.2.9"]
    assert found["summary"] == "203.0.113.8, 203.0.113.9"
    assert shell.json("as-of", "jsmith", "--at", "0m")["revision"] == 5
    assert shell.json("as-of", "jsmith", "--at", "20d")["revision"] == 0
    done = shell("as-of", "jsmiht", "--revision", "3")
    assert (done.code, "is registered today" in done.err) == (0, True)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "--at or --revision"),
        (["--at", "30d", "--revision", "1"], 2, "--at or --revision"),
        (["--at", "yesterday"], 2, "2027-01-31T18:00Z"),
        (["--at", "2999-01-01T00:00Z"], 3, "future"),
        (["--revision", "99"], 3, "revision"),
        (["--revision", "-1"], 3, "revision"),
    ],
)
def test_as_of_what_cannot_be_asked(world: World, args: list[str], code: int, words: str):
    assert words in world.shell.bad(code, "as-of", "jsmith", *args)


# -- history ---------------------------------------------------------------------------------------


def test_history_of_one_entry(world: World):
    """Its restrictions on request: all that an import added and ended."""
    shell = world.shell
    (entry,) = shell.json("history", "--revision", "4")["changes"]
    assert (entry["revision"], entry["action"]) == (4, "impose_many")
    found = shell.json("history", "--revision", "4", "--restrictions")
    assert found["revision"] == 4
    what = {(r["added"], r["restriction"]["addresses"]) for r in found["restrictions"]}
    added = {(True, "203.0.113.8"), (True, "203.0.113.9"), (True, "192.0.2.1")}
    assert what == added | {(False, "198.51.100.0/29")}
    lines = shell.good("history", "--revision", "3", "--restrictions").splitlines()
    assert [line.split("\t")[:3] for line in lines[1:]] in (
        [["ended", "jsmith", "203.0.113.7"], ["added", "jsmith", "198.51.100.0/29"]],
        [["added", "jsmith", "198.51.100.0/29"], ["ended", "jsmith", "203.0.113.7"]],
    )
    assert valid(json.loads(shell.good("history", "--revision", "4", "--format", "ocsf")))
    assert shell("history", "--revision", "99").err.endswith("no entries with revision 99\n")
    for args, code in (
        (["--restrictions"], 2),
        (["--revision", "4", "--restrictions", "--format", "ocsf"], 2),
        (["--revision", "4", "--since", "1"], 2),
        (["--revision", "99", "--restrictions"], 3),
    ):
        shell.bad(code, "history", *args)


# -- verify and prune ------------------------------------------------------------------------------


def test_a_whole_record_is_verified(world: World):
    """The head is printed, and found again later by --expect."""
    shell = world.shell
    found = shell.json("verify")
    assert found["damage"] == []
    assert (found["first"], found["head"], found["entries"]) == (1, 5, 5)
    assert (found["restrictions"], found["uncovered"]) == (6, 0)
    head = f"5:{found['token']}"
    shown = shell.good("verify").splitlines()
    assert shown == ["whole: revisions 1 to 5, 5 entries, 6 restrictions", f"head: {head}"]
    shell.impose("mlee", "203.0.113.77")
    assert shell.json("verify", "--expect", head)["head"] == 6
    other = shell.json("verify", "--expect", f"5:{'0' * 64}", code=1)
    assert [each["revision"] for each in other["damage"]] == [5]
    assert shell.json("verify", "--expect", f"9:{'0' * 64}", code=1)["damage"]
    for text in ("5", "5:", ":x", "-1:x", "x:y"):
        assert "REVISION:TOKEN" in shell.bad(2, "verify", "--expect", text)


@pytest.mark.parametrize(
    ("statement", "revision"),
    [
        ("UPDATE changes SET actor = 'rita' WHERE revision = 2", 2),
        ("UPDATE changes SET at = at + 1 WHERE revision = 3", 3),
        ("DELETE FROM changes WHERE revision = 3", 3),
        ("UPDATE restrictions SET label = 'x' WHERE username = 'jsmith'", 4),
        ("UPDATE past_restrictions SET label = 'x' WHERE username = 'jsmith'", 2),
        ("DELETE FROM past_restrictions", 2),
        ("UPDATE restrictions SET expires_at = NULL", 5),
    ],
)
def test_damage_is_found(world: World, statement: str, revision: int):
    """With the revision, and exit code 1."""
    world.sql(statement)
    found = world.shell.json("verify", code=1)
    assert revision in [each["revision"] for each in found["damage"]]
    done = world.shell("verify")
    assert (done.code, done.err) == (1, "")
    assert done.out.startswith("revision\tdamage\n")
    assert "\nDAMAGED: revisions 1 to 5" in done.out


def test_prune_leaves_an_anchor(world: World):
    """It asks first; then entries are gone, and the rest is verified from the anchor."""
    shell = world.shell
    before = day(1.5)
    assert "will be deleted" in shell.bad(10, "prune", "--before", before)
    terminal = shell.terminal("prune", "--before", before)
    terminal.sees(r"the audit entries before \S+ \S+ UTC will be deleted. Continue\?")
    terminal.process.sendline("n")
    assert "nothing was changed" in terminal.ends(10)
    found = shell.json("prune", "--before", before, "--yes")
    assert found["deleted"] == 3  # with the entry 0 that every store has
    anchor = found["anchor"]
    assert (anchor["action"], anchor["detail"]["kept_from"]) == ("prune", "3")
    assert shell.json("history", "--all")["changes"][-1]["revision"] == 3
    assert shell.json("verify")["damage"] == []
    assert shell.json("verify")["first"] == 3
    assert _addresses(shell.json("as-of", "jsmith", "--revision", "3")) == ["198.51.100.0/29"]
    assert "record begins" in shell.bad(3, "as-of", "jsmith", "--revision", "1")
    shown = shell.good("prune", "--before", day(2.5), "--yes").splitlines()
    assert shown[0] == "the record begins at revision 4"
    assert re.fullmatch(r"anchor: revision \d+, kept_from=4 token=[0-9a-f]{64} .+", shown[1])
    again = shell.good("prune", "--before", "40000d", "--yes").splitlines()
    assert again == ["there was nothing to delete", *shown]


# -- report ----------------------------------------------------------------------------------------


def test_report_as_json(world: World):
    """A line for each restriction, and one for each user without any."""
    lines = world.shell.json("report")["lines"]
    assert world.shell.good("report", "--format", "json").count("\n") == 1
    shown = [
        (each["user"]["username"], each["state"], (each["restriction"] or {}).get("addresses"))
        for each in lines
    ]
    assert shown == [
        ("=zed", "open", None),
        ("jsmith", "in force", "192.0.2.1"),
        ("mlee", "in force", "203.0.113.8"),
        ("mlee", "in force", "203.0.113.9"),
        ("mlee", "expired", "192.0.2.9"),
    ]
    by_address = {each[2]: line for each, line in zip(shown, lines, strict=True)}
    assert by_address["203.0.113.8"]["last_used"] == day(5)
    assert by_address["203.0.113.9"]["last_used"] is None
    changed = by_address["203.0.113.8"]["changed"]
    assert (changed["revision"], changed["actor"]) == (5, "desk")
    assert by_address["192.0.2.1"]["changed"]["detail"]["direction"] == "loosens"
    assert by_address[None]["changed"] is None


def test_report_as_csv(world: World):
    """`every address` is in words, times have their zone, and cells are never formulas."""
    rows = list(csv.DictReader(io.StringIO(world.shell.good("report", "--format", "csv"))))
    assert [row["addresses"] for row in rows][:2] == ["every address", "192.0.2.1"]
    assert [row["username"] for row in rows][:2] == ["'=zed", "jsmith"]
    used = rows[2]
    assert (used["state"], used["last_used"]) == ("in force", day(5))
    assert (used["change"], used["changed_by"], used["action"]) == ("5", "desk", "impose")
    assert used["by"] == "desk"
    assert used["since"] == day(3)
    with world.shell.store() as store:
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        flow.impose(DESK, "=zed", "203.0.113.5", label="@SUM(A1)", reason="x")
    rows = list(csv.DictReader(io.StringIO(world.shell.good("report", "--format", "csv"))))
    assert rows[0]["label"] == "'@SUM(A1)"


def test_report_as_a_table(world: World):
    lines = world.shell.good("report").splitlines()
    assert lines[0].split("\t")[:4] == ["username", "account_id", "state", "addresses"]
    assert lines[1].split("\t")[:4] == ["=zed", "U1", "open", "every address"]
    assert "203.0.113.9" in world.shell.terminal("report").ends()


def test_report_of_restrictions_that_are_not_used(world: World):
    """Used ones, those just added, and users without restrictions are left out."""
    with ipguard.open_store(world.shell.env["IPGUARD_URL"]) as store:
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        flow.impose(DESK, "mlee", "203.0.113.99", reason="x")
        now = store.now()
        seen = Sighting(
            username="mlee", address="203.0.113.8", first_at=now, last_at=now, allowed=1
        )
        store.record_sightings((seen,))
    found = world.shell.json("report", "--unused", "3d")["lines"]
    assert [each["restriction"]["addresses"] for each in found] == [
        "192.0.2.1",
        "203.0.113.9",
        "192.0.2.9",
    ]
    assert "90 days" in world.shell.bad(3, "report", "--unused", "91d")
    assert "length of time" in world.shell.bad(2, "report", "--unused", "2026-01-01T00:00Z")


# -- the manual ------------------------------------------------------------------------------------


def _commands() -> set[str]:
    """Return the commands of the page that end and need no other's output."""
    page = (ROOT / "docs" / "evidence.md").read_text()
    found = set(re.findall(r"`(ipguard [^`]+)`", page))
    return found - {"ipguard watch --format ocsf", "ipguard verify --expect"}


@pytest.mark.parametrize("command", sorted(_commands()))
def test_the_commands_of_the_page_for_auditors_work(tmp_path: Path, command: str):
    """Each prints its proof."""
    args = shlex.split(command)[1:]
    world = SQLiteWorld(Shell(tmp_path))
    world.shell.write("logins.csv", "username,address\nmlee,203.0.113.8\n")
    done = world.shell(*args)
    expected = 1 if args[0] == "explain" else 0
    assert (done.code, bool(done.out + done.err)) == (expected, True), done.err


def test_which_role_each_command_needs(own_postgres: Server, tmp_path: Path):
    """On PostgreSQL: logins are recorded by readers, and entries are deleted by the owner alone."""
    schema = fresh_schema()
    shell = Shell(tmp_path, IPGUARD_URL=own_postgres.url(schema=schema, timeout=20))
    World(shell)
    reader, writer = f"{schema}_reader", f"{schema}_writer"
    for role in (reader, writer):
        own_postgres.execute(f"CREATE ROLE {role} LOGIN")
    own_postgres.execute(grants(schema=schema, reader=reader, writer=writer))
    urls = [own_postgres.url(user=role, schema=schema, timeout=20) for role in (reader, writer)]
    with ipguard.open_store(urls[0]) as store, ipguard.Guard(store) as guard:
        guard.saw("jsmith", "203.0.113.99", False)
    commands = {
        "explain jsmith 203.0.113.99": (1, 1),
        "sightings jsmith": (7, 0),
        "suggest mlee": (7, 0),
        "as-of jsmith --revision 2": (7, 0),
        "verify": (7, 0),
        "report": (7, 0),
        "history --revision 4 --restrictions": (7, 0),
        "forget jsmith": (7, 0),
        "prune --before 1d --yes": (7, 7),
    }
    for command, codes in commands.items():
        for url, code in zip(urls, codes, strict=True):
            done = shell(*command.split(), "--store", url)
            assert done.code == code, (command, url, done.err)
            if command.startswith("explain"):
                assert "203.0.113.99" in done.out.split("Refused logins")[1]
    assert "the owner's" in shell("prune", "--before", "1d", "--yes", "--store", urls[1]).err
    assert shell.good("verify").startswith("whole: ")
