"""The command line: `watch` and `doctor`, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import subprocess
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import ipguard
from ipguard.cli import doctor
from ipguard.model import Action
from ipguard.stores.postgres import grants
from tests.cli import PROGRAM, Shell, Terminal, validator
from tests.logins import ROOT
from tests.pooler import transaction_pooler
from tests.postgres import Given, Server, fresh_schema
from tests.smtp_server import BadServer, MailServer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell with a user and a key."""
    it = Shell(tmp_path, IPGUARD_MAIL="console")
    it.write("ipguard.key", "k" * 64).chmod(0o600)
    it.register(jsmith="U1")
    return it


def _write(shell: Shell, detail: str, username: str = "jsmith") -> None:
    with shell.store() as store, store.transaction() as tx:
        tx.append(Action.CANCEL, actor="rita", username=username, detail={"": detail})


def _interrupt(terminal: Terminal) -> str:
    """Press Ctrl-C, which ends `watch` with 0."""
    terminal.process.sendintr()
    return terminal.ends()


def _states(report: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    """Return the worst state of each check."""
    found: dict[str, str] = {}
    for one in report["findings"]:
        before = found.get(one["check"], "ok")
        found[one["check"]] = max(before, one["state"], key=("ok", "warn", "fail").index)
    return found


# -- watch -------------------------------------------------------------------------------------


def test_watch_shows_entries_as_they_happen(shell: Shell):
    """Entries that touch no policy are shown too, and control characters are escaped."""
    terminal = shell.terminal("watch")
    terminal.sees("watching from revision 1; Ctrl-C stops")
    _write(shell, "first \x1b[2J")
    terminal.sees(r"2  20\d\d-.*  rita  cancel  jsmith  first \\x1b\[2J")
    _write(shell, "second")
    terminal.sees("second")
    assert _interrupt(terminal).replace("^C", "").strip() == ""


def test_watch_in_a_pipe(shell: Shell):
    """With --json each entry is written at once as one object; --user selects entries."""
    _write(shell, "another's", username="zed")
    command = [*PROGRAM, "watch", "--json", "--since", "0", "--user", "JSmith"]
    with subprocess.Popen(
        command, env=shell.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = json.loads(process.stdout.readline())
        _write(shell, "x")
        second = json.loads(process.stdout.readline())
        process.send_signal(2)
        assert process.wait(60) == 0
        assert process.stderr.read() == "ipguard: watching from revision 0; Ctrl-C stops\n"
    for each in (first, second):
        validator("watch").validate(each)
    assert (first["action"], second["detail"]) == ("put_users", {"": "x"})
    assert "is not a username" in shell.bad(3, "watch", "--user", " ")


def test_entries_of_a_newer_version_are_shown_unchanged(shell: Shell):
    """`history` and `watch` show unknown actions and unreadable details as text."""
    with shell.store() as store, store.transaction() as tx:
        tx.append("teleport", actor="rita", username="jsmith", detail={"to": "the moon"})
        tx.append(Action.UNLOCK, actor="rita", username="jsmith", detail={"": 'by="x'})
    found = shell.json("history")["changes"]
    assert [(each["action"], each["detail"]) for each in found[:2]] == [
        ("unlock", {"": 'by="x'}),
        ("teleport", {"to": "the moon"}),
    ]
    terminal = shell.terminal("watch", "--since", "1")
    terminal.sees('2  20.*  rita  teleport  jsmith  to="the moon"')
    terminal.sees('3  20.*  rita  unlock  jsmith  by="x')
    _interrupt(terminal)


def test_watch_notes_an_unknown_user_and_another_history(shell: Shell):
    """`watch` accepts an unregistered name, and starts now if the revision does not exist yet."""
    terminal = shell.terminal("watch", "--user", "jsmiht", "--since", "99")
    terminal.sees("revision 99 belongs to another history.*: this store is at revision 1")
    terminal.sees("no user 'jsmiht' is registered")
    terminal.sees("watching from revision 1; Ctrl-C stops")
    _write(shell, "new", username="jsmiht")
    terminal.sees("2  20.*  new")
    _interrupt(terminal)


def test_watch_survives_an_outage_and_a_restored_backup(shell: Shell, tmp_path: Path):
    path, away = tmp_path / "ipguard.db", tmp_path / "away.db"
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(away)) as copy:
        live.backup(copy)
    _write(shell, "lost")
    terminal = shell.terminal("watch")
    terminal.sees("watching from revision 2")
    path.rename(tmp_path / "gone.db")
    terminal.sees("the store does not respond, retrying")
    (tmp_path / "gone.db").rename(path)
    terminal.sees("the store responds again")
    with closing(sqlite3.connect(away)) as copy, closing(sqlite3.connect(path)) as live:
        copy.backup(live)
    terminal.sees("another history now, at revision 1")
    _write(shell, "after")
    terminal.sees("after")
    _interrupt(terminal)


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_everything_healthy(shell: Shell):
    """Every check is ok, and a test mail arrives."""
    settings = shell.write("settings.toml", 'confirm_deletes = "last"\n')
    with MailServer() as server:
        shell.env |= {
            "IPGUARD_MAIL": server.url,
            "IPGUARD_MAIL_FROM": "no-reply@bank.example",
            "IPGUARD_SETTINGS": str(settings),
        }
        report = shell.json("doctor", "--send-test", "ops@bank.example")
        assert set(_states(report).values()) == {"ok"}
        assert report["healthy"] is True
        assert set(_states(report)) == {
            "store", "schema", "clock", "permissions", "restrictions", "key", "settings", "mail",
        }  # fmt: skip
        (mail,) = server.wait_for(1)
        assert mail.recipients == ("ops@bank.example",)
        assert "This is a test" in mail.part("plain")
    shown = shell.terminal("doctor").ends()
    assert "\x1b[32mok    store: SQLiteStore" in shown
    assert "not tested: use --send-test" in shown


def test_doctor_advises(shell: Shell):
    """Risks are warnings and errors are failures, each with what to do; nothing is changed."""
    path = Path(shell.env["IPGUARD_URL"].removeprefix("sqlite:///"))
    shell.hold("jsmith", _7=-1)
    path.chmod(0o644)
    (shell.folder / "ipguard.key").chmod(0o640)
    found = shell.json("doctor", "--send-test", "a@b.example", code=11)["findings"]
    assert ("mail", "fail", "no test was sent to a@b.example: mail is printed, not sent") in {
        (one["check"], one["state"], one["found"]) for one in found
    }
    without = shell("doctor", "--send-test", "a@b.example", env={"IPGUARD_MAIL": ""})
    assert without.code == 11
    assert "fail  mail: " in without.out
    warned = shell.json("doctor")
    states = _states(warned)
    for check in ("permissions", "restrictions", "key", "settings", "mail"):
        assert states[check] == "warn"
    todo = {one["found"]: one["todo"] for one in warned["findings"]}
    assert any("jsmith" in found and "impose" in todo[found] for found in todo)
    assert f"chmod 600 {path}" in todo.values()
    with BadServer("drop") as bad:
        broken = {
            "IPGUARD_MAIL": f"smtp://127.0.0.1:{bad.port}",
            "IPGUARD_MAIL_FROM": "no-reply@bank.example",
            "IPGUARD_KEY_FILE": "gone.key",
            "IPGUARD_URL": f"sqlite:///{shell.folder}/gone.db",
            "IPGUARD_SETTINGS": "gone.toml",
        }
        done = shell("doctor", "--send-test", "ops@bank.example", env=broken)
    assert (done.code, done.err) == (11, "")
    failed = re.findall(r"^fail  (\w+): ", done.out, re.MULTILINE)
    assert failed == ["store", "key", "settings", "mail"]
    assert "ipguard init" in done.out
    assert not (shell.folder / "gone.db").exists()


PEER = ["--proxy", "10.0.0.0/28", "--peer", "10.0.0.5"]
IGNORED = "X-Forwarded-For: ignored - if the peer is a proxy of yours, use"
UNKNOWN = (
    "fail  client: unknown, and refused by every guard"
    " - each proxy has to add its peer's address to X-Forwarded-For"
)
HOST_BITS = (
    "fail  client: '10.0.0.5/28' is not accepted: it has host bits set (did you mean 10.0.0.0/28?)"
)


@pytest.mark.parametrize(
    ("args", "pasted", "code", "lines"),
    [
        (
            PEER,
            "Host: x\nx-forwarded-for:203.0.113.5\nX-Forwarded-For: 192.0.2.7:80,10.0.0.6",
            0,
            [
                "ok    peer: 10.0.0.5 is a trusted proxy, in 10.0.0.0/28",
                "ok    X-Forwarded-For: 10.0.0.6 is a trusted proxy, in 10.0.0.0/28",
                "ok    X-Forwarded-For: 192.0.2.7:80 is the client, as it is not a trusted proxy",
                "ok    client: 192.0.2.7",
            ],
        ),
        (
            ["--hops", "1", "--unix-socket", "--header", "forwarded"],
            "Forwarded: for=192.0.2.7",
            0,
            [
                "ok    peer: unix: is a trusted Unix socket",
                "ok    forwarded: 192.0.2.7 is the client, by the count",
                "ok    client: 192.0.2.7",
            ],
        ),
        (
            ["--proxy", "10.0.0.5", "--peer", "192.0.2.7"],
            "X-Forwarded-For: 203.0.113.5",
            0,
            [
                "ok    peer: 192.0.2.7 is the client, as it is not a trusted proxy",
                f"warn  {IGNORED} --proxy",
                "ok    client: 192.0.2.7",
            ],
        ),
        (
            ["--hops", "1"],
            "X-Forwarded-For: 203.0.113.5",
            11,
            [
                "fail  peer: unix: is an untrusted Unix socket",
                f"warn  {IGNORED} --unix-socket",
                UNKNOWN,
            ],
        ),
        (
            ["--unix-socket"],
            "X-Forwarded-For: \x1b[2J",
            11,
            [
                "ok    peer: unix: is a trusted Unix socket",
                "fail  X-Forwarded-For: \\x1b[2J is not an address",
                UNKNOWN,
            ],
        ),
        (
            PEER,
            "",
            11,
            [
                "ok    peer: 10.0.0.5 is a trusted proxy, in 10.0.0.0/28",
                "warn  X-Forwarded-For: not among the headers - --header names another one",
                UNKNOWN,
            ],
        ),
        (
            ["--proxy", "10.0.0.5/28"],
            "",
            11,
            [
                HOST_BITS,
            ],
        ),
    ],
)
def test_doctor_explains_headers(
    shell: Shell, args: list[str], pasted: str, code: int, lines: list[str]
):
    """Each step from the peer to the client is a line, and no store is needed."""
    nowhere = {"IPGUARD_URL": f"sqlite:///{shell.folder}/gone.db"}
    done = shell("doctor", *args, "--headers", pasted, env=nowhere)
    assert (done.code, done.out.splitlines(), done.err) == (code, lines, "")
    assert shell("doctor", *args, "--headers", "-", stdin=pasted).out == done.out
    report = shell.json("doctor", *args, "--headers", pasted, code=code)
    assert len(report["findings"]) == len(lines)


def test_doctor_explains_the_headers_of_the_manual(shell: Shell):
    """The command of docs/behind-a-proxy.md prints what the page shows."""
    page = (ROOT / "docs" / "behind-a-proxy.md").read_text().partition("## Check it")[2]
    (command,) = re.findall(r"^ipguard (.+)$", page, re.MULTILINE)
    (shown,) = re.findall(r"```text\n(.+?)```", page, re.DOTALL)
    assert shell.good(*shlex.split(command)) == shown


@pytest.mark.parametrize(
    ("ahead", "state", "words"),
    [(1, "ok", "agree"), (60, "warn", "ahead of"), (-60, "warn", "behind")],
)
def test_doctor_compares_the_clocks(ahead: int, state: str, words: str):
    """The store's clock decides about expiry; a difference to the host's is a warning."""
    with ipguard.open_store(
        "memory://", clock=lambda: datetime.now(UTC) + timedelta(seconds=ahead)
    ) as store:
        (finding,) = doctor._clock(store)
    assert finding.state == state
    assert words in finding.found


def test_doctor_on_postgresql(own_postgres: Server, tmp_path: Path):
    """`doctor` names the listener, the rights of the role, and a server that does not respond."""
    schema = fresh_schema()
    url = own_postgres.url(schema=schema)
    ipguard.open_store(url, migrate=True).close()
    reader, writer, none = (f"{schema}_{kind}" for kind in ("reader", "writer", "none"))
    for role in (reader, writer, none):
        own_postgres.execute(f"CREATE ROLE {role} LOGIN")
    own_postgres.execute(grants(schema=schema, reader=reader, writer=writer))
    shell = Shell(tmp_path, IPGUARD_URL=url, IPGUARD_MAIL="console", IPGUARD_KEY="k" * 64)
    shell.env.pop("IPGUARD_KEY_FILE")
    shell.register(jsmith="U1")
    states = _states(shell.json("doctor"))
    expected = {"store": "ok", "clock": "ok", "pooler": "ok", "listener": "ok", "role": "warn"}
    assert expected.items() <= states.items()
    for user, words in ((reader, "is a reader"), (writer, "is a writer")):
        found = shell("doctor", "--store", own_postgres.url(user=user, schema=schema))
        assert found.code == 0
        assert f"{user} {words}" in found.out
    readers = own_postgres.url(user=reader, schema=schema)
    assert "writer role" in shell("list", "--store", readers, "--json").error["hint"]
    for place, words in (
        (own_postgres.url(user=none, schema=schema), "permission denied"),
        ("postgresql://127.0.0.1:1/x?timeout=0.5", "is it running"),
    ):
        failed = shell("doctor", "--store", place)
        assert failed.code == 11
        assert words in failed.out
    off = shell("doctor", "--store", own_postgres.url(schema=schema, listen="off"))
    assert "listener: off" in off.out


def test_migrate_prints_the_sql_of_postgresql(own_postgres: Server, tmp_path: Path):
    """The printed SQL does what `migrate` does, including the grants."""
    schema = fresh_schema()
    reader, writer = f"{schema}_reader", f"{schema}_writer"
    shell = Shell(tmp_path, IPGUARD_URL=own_postgres.url(schema=schema))
    own_postgres.execute(f"CREATE ROLE {reader} LOGIN; CREATE ROLE {writer} LOGIN")
    printed = shell.json("migrate", "--sql", "--reader", reader, "--writer", writer)
    assert f"TO {writer}" in printed["grants"].replace('"', "")
    own_postgres.execute(shell.good("migrate", "--sql", "--reader", reader, "--writer", writer))
    for user in (reader, writer):
        url = own_postgres.url(user=user, schema=schema)
        assert shell("check", "jsmith", "192.0.2.1", "--store", url).code == 0
    assert shell.json("list") == {"users": [], "next": None}


def test_doctor_names_row_level_security(own_postgres: Server, tmp_path: Path):
    """Rows that are hidden from the role are a failure, from other roles a warning."""
    schema = fresh_schema()
    ipguard.open_store(own_postgres.url(schema=schema), migrate=True).close()
    role = f"{schema}_reader"
    own_postgres.execute(f"CREATE ROLE {role} LOGIN; {grants(schema=schema, reader=role)}")
    shell = Shell(tmp_path, IPGUARD_MAIL="console", IPGUARD_KEY="k" * 64)
    reader = ("doctor", "--store", own_postgres.url(user=role, schema=schema))
    assert "row security" not in shell(*reader).out
    enable = f"ALTER TABLE {schema}.%s ENABLE ROW LEVEL SECURITY"
    own_postgres.execute(enable % "requests")  # a table that logins do not read
    found = shell(*reader)
    assert f"fail  row security: hides rows of requests from {role}" in found.out
    assert "ok    store" in found.out
    own_postgres.execute(enable % "restrictions")
    found = shell(*reader)
    assert found.code == 11
    assert f"fail  row security: hides rows of requests, restrictions from {role}" in found.out
    assert re.search("^fail  store: .*row-level security", found.out, re.MULTILINE)
    assert "is it running" not in found.out
    owner = shell("doctor", "--store", own_postgres.url(schema=schema))
    assert "warn  row security: is on for requests, restrictions" in owner.out


def test_doctor_through_a_pooler(own_postgres: Server, tmp_path: Path):
    """`doctor` detects the pooler, and that notifications do not pass it."""
    schema = fresh_schema()
    ipguard.open_store(own_postgres.url(schema=schema), migrate=True).close()
    shell = Shell(tmp_path, IPGUARD_MAIL="console", IPGUARD_KEY="k" * 64)
    with transaction_pooler(own_postgres) as port:
        found = shell("doctor", "--store", own_postgres.url(port=port, schema=schema))
        assert "ok    pooler: there is one" in found.out
        assert re.search(r"^warn  listener: guards poll.*listen=", found.out, re.MULTILINE)
        direct = own_postgres.url(schema=schema, tcp=True)
        both = own_postgres.url(port=port, schema=schema, listen=direct.partition("?")[0])
        assert "listener" in shell("doctor", "--store", both).out


def test_a_password_in_the_environment_is_never_shown(postgres: Server | Given, tmp_path: Path):
    url = postgres.url(schema=fresh_schema()).replace("postgres@", "postgres:hunter2@")
    shell = Shell(tmp_path, IPGUARD_URL=url, IPGUARD_MAIL="smtp://u:hunter2@127.0.0.1:1")
    shell.env["IPGUARD_MAIL_FROM"] = "no-reply@bank.example"
    for args in (["init"], ["init"], ["doctor", "--send-test", "a@b.example"], ["list", "--json"]):
        done = shell(*args)
        assert "hunter2" not in done.out + done.err
    broken = shell("doctor", env={"IPGUARD_URL": "postgresql://u:hunter2@[x/y"})
    assert broken.code == 11
    assert "hunter2" not in broken.out + broken.err
