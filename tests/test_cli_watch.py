"""The command line as a process: `watch` and `doctor`, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import re
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
from tests.cli import PROGRAM, Shell, validator
from tests.pooler import transaction_pooler
from tests.postgres import Given, Server, fresh_schema
from tests.smtp_server import BadServer, MailServer

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A store with a user, and a key."""
    it = Shell(tmp_path, IPGUARD_MAIL="console")
    (tmp_path / "ipguard.key").write_text("k" * 64)
    (tmp_path / "ipguard.key").chmod(0o600)
    with ipguard.open_store(it.env["IPGUARD_URL"]) as store:
        store.put_users([ipguard.User(username="jsmith", full_name="John", account_id="U1")])
    return it


def _write(shell: Shell, detail: str, username: str = "jsmith") -> None:
    with ipguard.open_store(shell.env["IPGUARD_URL"]) as store, store.transaction() as turn:
        turn.append(Action.CANCEL, actor="rita", username=username, detail={"": detail})


def _states(report: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    """Return the worst state of each check."""
    found: dict[str, str] = {}
    for one in report["findings"]:
        before = found.get(one["check"], "ok")
        found[one["check"]] = max(before, one["state"], key=("ok", "warn", "fail").index)
    return found


# -- watch -------------------------------------------------------------------------------------


def test_watch_shows_changes_as_they_happen(shell: Shell):
    """In a terminal, until Ctrl-C, which is no error; also those that touch no policy."""
    terminal = shell.terminal("watch")
    terminal.sees("watching from revision 1; Ctrl-C ends it")
    _write(shell, "first \x1b[2J")
    terminal.sees(r"2  20\d\d-.*  rita  cancel  jsmith  first \\x1b\[2J")
    _write(shell, "second")
    terminal.sees("second")
    terminal.process.sendintr()
    assert terminal.ends().replace("^C", "").strip() == ""


def test_watch_of_a_name_that_is_mistyped_says_so(shell: Shell):
    """It waits all the same: the name may come to be registered."""
    terminal = shell.terminal("watch", "--user", "jsmiht")
    terminal.sees("no user 'jsmiht' is registered")
    terminal.sees("watching from revision 1; Ctrl-C ends it")
    terminal.process.sendintr()
    terminal.ends()


def test_watch_piped(shell: Shell):
    """One object on a line, at once; a line of cells without `--json`; only a user's, if asked."""
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
        assert process.stderr.read() == "ipguard: watching from revision 0; Ctrl-C ends it\n"
    for each in (first, second):
        validator("watch").validate(each)
    assert (first["action"], second["detail"]) == ("put_users", {"": "x"})
    assert "is not a username" in shell.bad(3, "watch", "--user", " ")


def test_entries_of_a_newer_version_are_shown_as_they_are(shell: Shell):
    """`history` and `watch` show an unknown action and an unreadable detail as text."""
    with ipguard.open_store(shell.env["IPGUARD_URL"]) as store, store.transaction() as turn:
        turn.append("teleport", actor="rita", username="jsmith", detail={"to": "the moon"})
        turn.append(Action.UNLOCK, actor="rita", username="jsmith", detail={"": 'by="x'})
    found = shell.json("history")["changes"]
    assert [(each["action"], each["detail"]) for each in found[:2]] == [
        ("unlock", {"": 'by="x'}),
        ("teleport", {"to": "the moon"}),
    ]
    terminal = shell.terminal("watch", "--since", "1")
    terminal.sees('2  20.*  rita  teleport  jsmith  to="the moon"')
    terminal.sees('3  20.*  rita  unlock  jsmith  by="x')
    terminal.process.sendintr()
    terminal.ends()


def test_watch_from_a_revision_of_another_history(shell: Shell):
    """A revision that is yet to come is another store's: it says so, and begins at the head."""
    terminal = shell.terminal("watch", "--since", "99")
    terminal.sees("revision 99 belongs to another history.*: this one is at revision 1")
    terminal.sees("watching from revision 1; Ctrl-C ends it")
    _write(shell, "new")
    terminal.sees("2  20.*  new")
    terminal.process.sendintr()
    terminal.ends()


def test_watch_outlives_an_outage_and_a_restored_backup(shell: Shell, tmp_path: Path):
    """It says so once, goes on when the store is back, and notices another history."""
    path, away = tmp_path / "ipguard.db", tmp_path / "away.db"
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(away)) as copy:
        live.backup(copy)
    _write(shell, "lost")
    terminal = shell.terminal("watch")
    terminal.sees("watching from revision 2")
    path.rename(tmp_path / "gone.db")
    terminal.sees("the store does not answer, trying again")
    (tmp_path / "gone.db").rename(path)
    terminal.sees("the store answers again")
    with closing(sqlite3.connect(away)) as copy, closing(sqlite3.connect(path)) as live:
        copy.backup(live)
    terminal.sees("another history now, at revision 1")
    _write(shell, "after")
    terminal.sees("after")
    terminal.process.sendintr()
    terminal.ends()


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_all_well(shell: Shell):
    """Each line ok; a test mail arrives; in a terminal in colours."""
    (shell.folder / "settings.toml").write_text('confirm_deletes = "last"\n')
    with MailServer() as server:
        shell.env |= {
            "IPGUARD_MAIL": server.url,
            "IPGUARD_MAIL_FROM": "no-reply@bank.example",
            "IPGUARD_SETTINGS": str(shell.folder / "settings.toml"),
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
    assert "not tried: --send-test" in shown


def test_doctor_says_what_to_do(shell: Shell):
    """What is risky is a warning, what fails fails; nothing is changed."""
    path = Path(shell.env["IPGUARD_URL"].removeprefix("sqlite:///"))
    with ipguard.open_store(shell.env["IPGUARD_URL"]) as store, store.transaction() as turn:
        old = ipguard.Restriction(
            id="x",
            username="jsmith",
            addresses=ipguard.AddressRange.parse("203.0.113.7"),
            label="",
            created_at=datetime.now(UTC),
            created_by="x",
            expires_at=datetime.now(UTC) - timedelta(days=1),
        )
        turn.add_restriction(old)
        turn.append(Action.IMPOSE, actor="x", touches=frozenset({"jsmith"}))
    path.chmod(0o644)
    (shell.folder / "ipguard.key").chmod(0o640)
    asked = {
        one["check"]: one
        for one in shell.json("doctor", "--send-test", "a@b.example", code=11)["findings"]
    }
    assert (asked["mail"]["state"], asked["mail"]["found"]) == (
        "fail",
        "no test was sent to a@b.example: mail is printed, not sent",
    )
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


@pytest.mark.parametrize(
    ("ahead", "state", "words"),
    [(1, "ok", "agree"), (60, "warn", "ahead of"), (-60, "warn", "behind")],
)
def test_doctor_compares_the_clocks(ahead: int, state: str, words: str):
    """The store's decides; who reads the host's should know that they differ."""
    with ipguard.open_store(
        "memory://", clock=lambda: datetime.now(UTC) + timedelta(seconds=ahead)
    ) as store:
        (finding,) = doctor._clock(store)
    assert finding.state == state
    assert words in finding.found


def test_doctor_on_postgresql(own_postgres: Server, tmp_path: Path):
    """The listener, the role, the clock; a server that is not there."""
    schema = fresh_schema()
    url = own_postgres.url(schema=schema)
    ipguard.open_store(url, migrate=True).close()
    reader, writer = f"{schema}_reader", f"{schema}_writer"
    own_postgres.execute(f"CREATE ROLE {reader} LOGIN; CREATE ROLE {writer} LOGIN")
    own_postgres.execute(f"CREATE ROLE {schema}_none LOGIN")
    own_postgres.execute(grants(schema=schema, reader=reader, writer=writer))
    shell = Shell(tmp_path, IPGUARD_URL=url, IPGUARD_MAIL="console", IPGUARD_KEY="k" * 64)
    shell.env.pop("IPGUARD_KEY_FILE")
    states = _states(shell.json("doctor"))
    expected = {"store": "ok", "clock": "ok", "pooler": "ok", "listener": "ok", "role": "warn"}
    assert expected.items() <= states.items()
    for user, words in ((reader, "is a reader"), (writer, "is a writer")):
        found = shell.within("doctor", "--store", own_postgres.url(user=user, schema=schema))
        assert found.code == 0
        assert f"{user} {words}" in found.out
    readers = own_postgres.url(user=reader, schema=schema)
    assert "the writer's" in shell.within("list", "--store", readers, "--json").error["hint"]
    none = shell.within("doctor", "--store", own_postgres.url(user=f"{schema}_none", schema=schema))
    assert none.code == 11
    assert "permission denied" in none.out
    off = shell.within("doctor", "--store", own_postgres.url(schema=schema, listen="off"))
    assert "listener: off" in off.out
    gone = shell.within("doctor", "--store", "postgresql://127.0.0.1:1/x?timeout=0.5")
    assert gone.code == 11
    assert "is it running" in gone.out
    # What `migrate --sql` prints is what `migrate` does, grants as well.
    printed = shell.json("migrate", "--sql", "--reader", reader, "--writer", writer)
    other = fresh_schema()
    script = shell.good(
        "migrate", "--sql", "--reader", reader, "--store", own_postgres.url(schema=other)
    )
    own_postgres.execute(script)
    seen = shell("list", "--store", own_postgres.url(schema=other))
    assert (seen.code, seen.out.count("\n")) == (0, 1)
    assert f"TO {writer}" in printed["grants"].replace('"', "")


def test_doctor_names_row_level_security(own_postgres: Server, tmp_path: Path):
    """The tables whose rows are hidden from the role, and for the owner those of other roles."""
    schema = fresh_schema()
    ipguard.open_store(own_postgres.url(schema=schema), migrate=True).close()
    role = f"{schema}_reader"
    own_postgres.execute(f"CREATE ROLE {role} LOGIN; {grants(schema=schema, reader=role)}")
    shell = Shell(tmp_path, IPGUARD_MAIL="console", IPGUARD_KEY="k" * 64)
    reader = ("doctor", "--store", own_postgres.url(user=role, schema=schema))
    healthy = shell.within(*reader)
    assert "row security" not in healthy.out
    enable = f"ALTER TABLE {schema}.%s ENABLE ROW LEVEL SECURITY"
    own_postgres.execute(enable % "requests")  # a table that logins do not read
    found = shell.within(*reader)
    assert f"fail  row security: hides rows of requests from {role}" in found.out
    assert "ok    store" in found.out
    own_postgres.execute(enable % "restrictions")
    found = shell.within(*reader)
    assert found.code == 11
    assert f"fail  row security: hides rows of requests, restrictions from {role}" in found.out
    assert re.search("^fail  store: .*row-level security", found.out, re.MULTILINE)
    assert "is it running" not in found.out
    owner = shell.within("doctor", "--store", own_postgres.url(schema=schema))
    assert "warn  row security: is on for requests, restrictions" in owner.out


def test_doctor_through_a_pooler(own_postgres: Server, tmp_path: Path):
    """That there is one, and that notifications do not come through it."""
    schema = fresh_schema()
    ipguard.open_store(own_postgres.url(schema=schema), migrate=True).close()
    shell = Shell(tmp_path, IPGUARD_MAIL="console", IPGUARD_KEY="k" * 64)
    with transaction_pooler(own_postgres) as port:
        url = own_postgres.url(port=port, schema=schema)
        found = shell("doctor", "--store", url)
        assert "ok    pooler: there is one between" in found.out
        assert re.search(r"^warn  listener: guards poll.*listen=", found.out, re.MULTILINE)
        direct = own_postgres.url(schema=schema, tcp=True)
        both = own_postgres.url(port=port, schema=schema, listen=direct.partition("?")[0])
        assert "listener" in shell.within("doctor", "--store", both).out


def test_a_password_of_the_environment_is_shown_nowhere(postgres: Server | Given, tmp_path: Path):
    """IPGUARD_URL may have one; no output repeats it."""
    url = postgres.url(schema=fresh_schema()).replace("postgres@", "postgres:hunter2@")
    shell = Shell(tmp_path, IPGUARD_URL=url, IPGUARD_MAIL="smtp://u:hunter2@127.0.0.1:1")
    shell.env["IPGUARD_MAIL_FROM"] = "no-reply@bank.example"
    for args in (["init"], ["init"], ["doctor", "--send-test", "a@b.example"], ["list", "--json"]):
        done = shell(*args)
        assert "hunter2" not in done.out + done.err
    broken = shell("doctor", env={"IPGUARD_URL": "postgresql://u:hunter2@[x/y"})
    assert broken.code == 11
    assert "hunter2" not in broken.out + broken.err
