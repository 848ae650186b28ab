"""The command line: shared behaviour, `init`, `migrate`, `users`, `list`, `history`, `check`."""

from __future__ import annotations

import io
import json
import os
import pwd
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ipguard
from ipguard.cli import _output, _secrets
from ipguard.cli._context import READER
from ipguard.cli._output import clean
from ipguard.testing import Outbox
from tests.cli import PROGRAM, Shell, schemas, validator
from tests.conftest import rounds
from tests.test_docs import ROOT, table

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")

USERS = """username,full_name,account_id,email
jsmith,John Smith,U1,jsmith@firm.example
mlee,Mary Lee,U1,
zed,Zed Zulu,U2,zed@other.example
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell with three users, one of them restricted."""
    it = Shell(tmp_path_factory.mktemp("cli"))
    it.write("ipguard.key", "k" * 64)
    with it.store() as store:
        rows = [line.split(",") for line in USERS.splitlines()[1:]]
        store.put_users(
            ipguard.User(username=u, full_name=n, account_id=a, email=e or None)
            for u, n, a, e in rows
        )
        flow = ipguard.Workflow(store, Outbox(), key=b"k" * 64)
        flow.impose(READER, "jsmith", "203.0.113.0/29", reason="x", label="head office")
    return it


# -- shared behaviour -------------------------------------------------------------------


def test_the_exit_codes_are_documented():
    listed = {row[1]: int(row[0]) for row in table("docs/cli.md", "exit code")}
    assert listed == {code.name.lower(): code.value for code in _output.Exit}
    errors = {
        name
        for name, error in vars(ipguard.errors).items()
        if isinstance(error, type) and issubclass(error, ipguard.IPGuardError)
    } - {"IPGuardError"}
    documented = {row[0]: row[1] for row in table("docs/cli.md", "error")}
    assert set(documented) == errors
    for name, code in documented.items():
        kind = getattr(ipguard.errors, name)
        found = next(code for code, bases in _output.ERRORS if issubclass(kind, bases))
        assert found.name.lower() == code, name


def test_help_names_every_command_and_the_manual_has_each(shell: Shell):
    """No arguments show the help; commands have a schema and a line in the manual."""
    plain, module = shell.good("--help"), shell.good()
    assert plain == module
    assert "\x1b" not in plain
    found = set(_commands(plain)) - {"users"}
    found |= {f"users {name}" for name in _commands(shell.good("users"))}
    assert {row[0] for row in table("docs/cli.md", "command")} == found
    named = {f"{name.replace(' ', '-')}.json" for name in found}
    assert set(schemas()) == named | {"common.json", "error.json"}
    assert shell.good("--version") == f"ipguard {ipguard.__version__}\n"


def _commands(help_text: str) -> list[str]:
    return re.findall(r"^  ([a-z-]+)  ", help_text.split("Commands:")[1], re.MULTILINE)


def test_the_installed_script(shell: Shell):
    """`ipguard` does the same as `python -m ipguard`."""
    script, args = Path(sys.executable).parent / "ipguard", ("check", "mlee", "192.0.2.1")
    done = subprocess.run([script, *args], env=shell.env, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == shell.process(*args).out == shell.good(*args)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nonsense"], 2, "No such command"),
        (["list", "--limit", "0"], 2, "limit"),
        (["check", "jsmith"], 2, "USERNAME and ADDRESS"),
        (["check", "jsmith", "1.2.3.4", "--pam"], 2, "or --pam"),
        (["check", "--pam"], 2, "needs PAM_USER"),
        (["check", "jsmith", "1.2.3.4", "--unknown-users", "maybe"], 2, "allow"),
        (["list", "x" * 300], 3, "more than 256"),
        (["history", "--user", "a\nb"], 3, "is not a username"),
        (["cancel", "nothing"], 4, "no request"),
        (["list", "--store", "memory://"], 7, "would end"),
        (["list", "--store", "nowhere://x"], 7, "no store has the scheme"),
        (["list", "--store", "sqlite:///gone/gone.db"], 7, "ipguard init"),
        (["users", "import", "gone.csv"], 9, "No such file"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(shell: Shell, args, code, words):
    """With `--json`, before or after the command, the line is an object."""
    assert words in shell.bad(code, *args)
    for error in (shell.error(code, *args), shell("--json", *args).error):
        assert words in error["message"] + error["hint"]


def test_passwords_in_urls_are_recognised():
    """Anywhere in the URL; a user, a port and a password file are not passwords."""
    for url in (
        "postgresql://u:hunter2@db/x",
        "postgresql://u@db/x?sslmode=require&pass%77ord=hunter2",
        "postgresql://u@db/x?listen=postgresql%3A%2F%2Fu%3Ahunter2%40db2%2Fx",
        "postgresql://u@db/x?sslpassword=hunter2",
        "host=db user=u password=hunter2",
        "mine://u:hunter2@[broken/x",
        "postgresql://u:hunter2#x@db/x",
        "postgresql://u:x?hunter2@db/x",
        "u:hunter2@db/x",
    ):
        assert _secrets.holds_password(url), url
    for url in (
        "postgresql://u@db/x",
        "postgresql://db:5432/x?sslmode=require&passfile=/etc/pgpass",
        "sqlite:////var/lib/a@b:c.db",
        "sqlite:///ipguard.db?timeout=2",
        "postgresql://u@db/x?listen=postgresql%3A%2F%2Fu%40db2%2Fx",
        "postgresql://u@db:5432/x?application_name=a@b",
    ):
        assert not _secrets.holds_password(url), url


@pytest.mark.parametrize("url", ["postgresql://u:hunter2@db/x", "u:hunter2@db/x"])
def test_a_password_in_the_arguments_is_refused(shell: Shell, url: str):
    """Before or after the command; the error does not repeat it."""
    before, after = shell.bad(2, "--store", url, "list"), shell.error(2, "list", "--store", url)
    assert "IPGUARD_URL" in before
    assert "PGPASSWORD" in after["hint"]
    assert "hunter2" not in before + json.dumps(after)


def test_where_the_store_is(shell: Shell, tmp_path: Path):
    """`--store`, before or after the command, overrides the environment; one is required."""
    other = f"sqlite:///{tmp_path}/other.db"
    ipguard.open_store(other).close()
    empty = "username\tfull_name\taccount_id\temail\n"
    for args in (("users", "list", "--store", other), ("--store", other, "users", "list")):
        assert shell(*args).out == empty
    assert "IPGUARD_URL" in shell.bad(7, "list", env={"IPGUARD_URL": ""})


def test_a_broken_pipe_is_quiet(shell: Shell):
    """As in `ipguard history | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, "list"], stdout=writing, stderr=subprocess.PIPE, env=shell.env, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_control_characters_are_escaped(tmp_path: Path):
    """A store may hold text that ipguard itself would refuse; all users are listed."""
    it = Shell(tmp_path, IPGUARD_MAIL="console")
    it.register(ann="U1", bob="U1", cyd="U1")
    it.impose("ann", "1.2.3.4")
    hostile, shown = "\x1b[2Jgone\x07\t\u202eevil\n\u2066x", r"\x1b[2Jgone\x07\t\u202eevil\n\u2066x"
    for statement in (
        f"UPDATE restrictions SET label = '{hostile}'",
        "UPDATE users SET full_name = 'N\x1b[2J\u202e' WHERE username = 'ann'",
        "UPDATE users SET username = 'b\x07b', email = 'a\rb' WHERE username = 'bob'",
    ):
        with closing(sqlite3.connect(tmp_path / "ipguard.db")) as db, db:
            db.execute(statement)
    rows = [line.split("\t") for line in it.good("users", "list", "--all").splitlines()[1:]]
    assert rows == [
        ["ann", r"N\x1b[2J\u202e", "U1", "ann@firm.example"],
        [r"b\x07b", "bob", "U1", ""],
        ["cyd", "cyd", "U1", "cyd@firm.example"],
    ]
    assert len(it.json("list")["users"]) == 3
    assert it.good("explain", "ann", "1.2.3.4").splitlines()[2].split("\t")[2] == shown
    assert it.json("explain", "ann", "1.2.3.4")["restrictions"][0]["label"] == hostile
    terminal = it.terminal("explain", "ann", "1.2.3.4").ends()
    assert shown in terminal
    assert re.sub(r"\x1b\[[0-9;]*m", "", terminal).replace("\n", "").isprintable()
    imposed = it("impose", "ann", "1.2.3.5", "--reason", "x")
    assert imposed.code == 0
    assert "\x1b" not in imposed.out + imposed.err
    assert it("check", "a\x1b[2Jb", "1.2.3.4").out == "not allowed: bad_username\n"
    assert clean("déjà vu 漢字") == "déjà vu 漢字"


@pytest.mark.slow
def test_unusual_streams(tmp_path: Path):
    """Output in a pipe is UTF-8 in every locale; streams may be closed, and a disk full."""
    shell = Shell(tmp_path, IPGUARD_MAIL="console")
    shell.register()
    users = "username,full_name,account_id\nünal,Ünal Şahin 漢,U1\n"
    shell.good("users", "import", "-", stdin=users)
    rows = "username,addresses,label\nünal,203.0.113.7,東京\n"
    assert shell("import", "-", "--reason", "Zürich", stdin=rows).code == 0
    env = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    for args, words in (
        (("users", "list"), "Ünal Şahin 漢"),
        (("list",), "ünal"),
        (("history",), "Zürich"),
        (("export",), "ünal,203.0.113.7,東京"),
    ):
        assert words in shell.process(*args, env=env).out
    program = " ".join(map(shlex.quote, PROGRAM))
    for way, code in ((">&-", 0), (">/dev/full", 9), (">&- 2>&-", 0)):
        command = ["sh", "-c", f"{program} users list {way}"]
        ended = subprocess.run(command, env=shell.env, capture_output=True, check=False)
        assert ended.returncode == code
        assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("place", ["no such folder/x.log", "."])
def test_an_unwritable_log_stops_a_change(shell: Shell, place: str):
    """The command fails before the change, not after it with its mails unsent."""
    env = {"IPGUARD_LOG": str(shell.folder / place), "IPGUARD_MAIL": "console"}
    before = shell.json("history")
    error = shell.bad(9, "impose", "zed", "203.0.113.9", "--reason", "x", env=env)
    assert str(shell.folder) in error
    assert shell.json("history") == before


_WORDS = st.one_of(
    st.sampled_from(
        ["jsmith", "203.0.113.7", "--json", "--limit", "1", "--reason", "x", "--all", "--", "-",
         "--expires", "9999d", "--as", "rita", "--every-account", "--mail", "console", "--removed",
         "0x", "--before", "99999999999999999999", "--since", "--format", "csv", "--user", "ocsf",
         "--revision", "--restrictions", "--at", "--unused", "--expect", "3:x", "90d", "--yes"]
    ),
    st.text(max_size=8).filter(lambda text: "\0" not in text),
)  # fmt: skip
_COMMANDS = st.sampled_from(
    ["list", "history", "check", "explain", "impose", "lift", "unlock", "request", "confirm",
     "cancel", "resend", "delete", "doctor", "users list", "suggest", "sightings", "forget",
     "as-of", "verify", "report", "prune"]
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=rounds(150, 5_000))
@given(_COMMANDS, st.lists(_WORDS, max_size=6))
def test_arguments_never_cause_a_defect(shell: Shell, command: str, words: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("12345-67890\n"))
        done = shell(*command.split(), *words)
    assert done.code in set(_output.Exit) - {_output.Exit.DEFECT}, done.err


def test_completion(shell: Shell):
    asked = {"_IPGUARD_COMPLETE": "complete_bash", "COMP_WORDS": "ipguard un", "COMP_CWORD": "1"}
    assert shell.good(env=asked).split() == ["unlock"]
    source = shell.good(env={"_IPGUARD_COMPLETE": "source_bash"})
    assert "complete -o default -F" in source
    assert "ipguard" in source


def test_without_the_extra(tmp_path: Path):
    """With only the library's three packages, the error names the extra."""
    for name in ("ipguard", "attr", "attrs", "netaddr", "cachetools"):
        module = __import__(name)
        assert module.__file__ is not None
        (tmp_path / name).symlink_to(Path(module.__file__).parent)
    code = "import sys; sys.path.append(sys.argv.pop(1)); import ipguard.__main__ as m"
    command = [sys.executable, "-I", "-S", "-c", f"{code}; sys.exit(m.main())", tmp_path, "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.count("\n") == 1
    assert 'pip install "ipguard[cli]"' in done.stderr


def _blocks(kind: str, page: str) -> list[str]:
    """Return the code blocks of a page of the documentation."""
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path):
    """A shell runs its commands as printed, except for the number and the id."""
    _, settings, first, second = _blocks("sh", "first-commands.md")
    shell = Shell(tmp_path, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def bash(script: str) -> subprocess.CompletedProcess[str]:
        console = "export IPGUARD_MAIL=console\n"
        command = ["bash", "-e", "-c", settings + console + script]
        return subprocess.run(
            command, cwd=tmp_path, env=shell.env, capture_output=True, text=True, check=False
        )

    asked = bash(first)
    (printed,) = _blocks("text", "first-commands.md")
    (given,) = re.findall(r"request (\w{16}) is", printed)
    (request,) = re.findall(r"request (\w{16}) is", asked.stdout)
    assert printed.replace(given, request) in asked.stdout
    (number,) = re.findall(r"^ +(\d{5}-\d{5})$", asked.stderr, re.MULTILINE)
    confirm, *rest = second.replace(given, request).splitlines()
    done = bash(f"echo {number} | {confirm}")
    assert done.returncode == 0
    assert "203.0.113.0/29" in done.stdout
    for line, code in zip(rest, (0, 0, 1, 0), strict=True):
        assert bash(line.replace(" --send-test you@example.com", "")).returncode == code, line


def test_the_manual_has_every_variable_and_option(shell: Shell):
    """The table of variables agrees with the code, the help names both, and its JSON is valid."""
    (example,) = _blocks("json", "cli.md")
    validator("error").validate(json.loads(example))
    read = set()
    for path in (ROOT / "src" / "ipguard" / "cli").glob("*.py"):
        read |= set(re.findall(r'"(IPGUARD_[A-Z_]+)"', path.read_text()))
    listed = {row[0]: row[1] for row in table("docs/cli.md", "variable")}
    assert set(listed) == read | {"NO_COLOR"}
    shown = " ".join(shell.good("request", "--help").split())
    for variable, option in listed.items():
        if option:
            assert f" {option} " in shown
            assert f"[env var: {variable}]" in shown


# -- init and migrate --------------------------------------------------------------------------


def test_init_creates_a_store_and_a_key(tmp_path: Path):
    """Only the owner can read the key; a second or failed `init` changes nothing."""
    shell = Shell(tmp_path)
    key = tmp_path / "ipguard.key"
    assert "no place to keep the key" in shell.bad(2, "init", env={"IPGUARD_KEY_FILE": ""})
    assert "not a file" in shell.bad(7, "init", "--store", "sqlite:////dev/null")
    assert not key.exists()
    old = os.umask(0)
    try:
        made = shell.json("init")
    finally:
        os.umask(old)
    assert made["key_file"] == str(key)
    assert made["revision"] == 0
    assert key.stat().st_mode & 0o777 == 0o600
    (text,) = key.read_bytes().split()
    assert len(text) == 64
    assert key.read_text().strip() not in json.dumps(made)
    again = shell.bad(7, "init")
    assert "is not overwritten" in again
    assert "ipguard migrate" in again
    assert key.read_bytes().split() == [text]
    # A new key for an existing store.
    other = shell.good("init", "--key-file", "other.key")
    assert "exists already" in other
    assert (tmp_path / "other.key").read_bytes() != key.read_bytes()


def test_init_with_the_key_in_the_environment(tmp_path: Path):
    """`init` then creates the store alone; the key must be valid, and a key file has precedence."""
    shell = Shell(tmp_path, IPGUARD_KEY="k" * 64, IPGUARD_KEY_FILE="")
    assert "32 bytes" in shell.bad(7, "init", env={"IPGUARD_KEY": "short"})
    assert not (tmp_path / "ipguard.db").exists()
    made = shell.json("init")
    assert (made["made"], made["key_file"]) == (True, None)
    assert [path.name for path in tmp_path.iterdir() if "key" in path.name] == []
    assert "key: IPGUARD_KEY" in shell.good("init")
    assert shell.json("init", "--key-file", "own.key")["key_file"] == str(tmp_path / "own.key")


def test_migrate_creates_the_schema_or_prints_it(tmp_path: Path):
    """The SQL that `--sql` prints does the same as `migrate`."""
    shell = Shell(tmp_path)
    script = shell.good("migrate", "--sql")
    assert not (tmp_path / "ipguard.db").exists()
    with closing(sqlite3.connect(tmp_path / "ipguard.db", isolation_level=None)) as db:
        db.executescript(script)
        db.execute("PRAGMA journal_mode = WAL")
    assert shell.json("users", "list") == {"users": [], "next": None}
    assert shell.json("migrate")["revision"] == 0
    sql = shell.json("migrate", "--sql")
    assert all(part["sql"] in script for part in sql["migrations"])
    versions = [part["version"] for part in sql["migrations"]]
    assert versions == list(range(1, len(versions) + 1))
    last = shell.good("migrate", "--sql", "--since", str(versions[-2]))
    assert re.findall("^-- version ([0-9]+)$", last, re.MULTILINE) == [str(versions[-1])]
    assert shell.good("migrate", "--sql", "--since", str(versions[-1])) == ""
    assert "SQLite has no roles" in shell.bad(2, "migrate", "--sql", "--reader", "r")
    assert "need --sql" in shell.bad(2, "migrate", "--reader", "r")


# -- users, list, history ----------------------------------------------------------------------


def test_users_import_is_all_or_nothing(tmp_path: Path):
    """Every bad row is named with its line; repeating an import changes nothing."""
    shell = Shell(tmp_path)
    ipguard.open_store(shell.env["IPGUARD_URL"]).close()
    good = shell.write("users.csv", "\ufeff" + USERS)
    bad = shell.write(
        "bad.csv",
        b'username,full_name,account_id,email\njsmith,John\n"two\nlines",Name,U1,\n\n'
        b"ok,\xff,U1,\nok,Name,,\nok,Name,U1,x\n" + b'ok,"' + b"x" * 2**20 + b'",U1,\n',
    )
    lines = shell.write(
        "bad.jsonl",
        '{"username": "ok", "full_name": "Name", "account_id": "U1"}\n[]\n{\n'
        '{"username": "ok", "full_name": "Name", "account_id": 7}\n'
        '{"username": "ok", "full_name": "Name", "account": "U1"}\n',
    )
    done = shell("users", "import", bad)
    assert (done.code, done.out) == (9, "")
    assert [line.split(":")[0] for line in done.err.splitlines()] == [
        "line 2", "line 3", "line 6", "line 7", "line 8", "line 9", "ipguard",
    ]  # fmt: skip
    failed = shell.error(9, "users", "import", lines)
    assert [row["line"] for row in failed["rows"]] == [2, 3, 4, 5]
    assert shell.json("users", "list")["users"] == []
    made = shell.json("users", "import", good)
    assert made == {"rows": 3, "revision": 1, "changed": True}
    assert shell.json("users", "import", "-", stdin=USERS)["changed"] is False
    assert "nothing to change" in shell.good("users", "import", good)
    assert [user["username"] for user in shell.json("users", "list")["users"]] == [
        "jsmith", "mlee", "zed",
    ]  # fmt: skip
    header = "username,full_name,account_id"
    for text, words in (("", "is empty"), (f"{header},x\n", "not a column"), (header, "no users")):
        assert words in shell.bad(9, "users", "import", "-", stdin=text)


SYNCED = """username,full_name,account_id,uid
JSmith,John Smith,U1,7
mlee,Mei Lee,U1,8
"""


def test_users_import_syncs(tmp_path: Path):
    """Good rows are registered, bad ones are reported with their lines, and renames are found."""
    shell = Shell(tmp_path)
    ipguard.open_store(shell.env["IPGUARD_URL"]).close()
    made = shell.json("users", "import", "-", "--sync", stdin=SYNCED)
    assert made["users"] == {
        "added": 2, "changed": 0, "renamed": 0, "moved": 0, "removed": 0, "refused": 0,
    }  # fmt: skip
    again = shell.json("users", "import", "-", "--sync", "--remove-missing", stdin=SYNCED)
    assert (again["changed"], again["revision"]) == (False, made["revision"])
    night = shell.write(
        "night.csv",
        "username,full_name,account_id,uid\nJane.Miller,Jane Miller,U2,7\n"
        "MLEE,Max Lee,U9,9\nzed,,U1,10\nmlee,Mei Lee,,8\n",
    )
    done = shell("users", "import", night, "--sync", "--remove-missing", "--json")
    assert done.code == 9
    report = json.loads(done.out)
    assert report["users"] == {
        "added": 0, "changed": 0, "renamed": 1, "moved": 1, "removed": 0, "refused": 3,
    }  # fmt: skip
    assert [row["line"] for row in done.error["rows"]] == [3, 4, 5]
    assert "'MLEE' (account 'U9')" in done.error["rows"][0]["reason"]
    assert shell.good("users", "list").splitlines()[1:] == [
        "Jane.Miller\tJane Miller\tU2\t",
        "mlee\tMei Lee\tU1\t",
    ]
    assert shell.json("users", "list", "--limit", "1")["next"] == "Jane.Miller"
    assert "mlee" in shell.good("users", "list", "--after", "Jane.Miller")
    text = shell("users", "import", night, "--sync").out
    assert text == "4 rows: nothing to change, revision 3\n"
    refused = shell.error(9, "users", "import", "-", stdin=SYNCED + "MLEE,Max Lee,U9,9\n")
    assert [row["line"] for row in refused["rows"]] == [4]
    assert shell.json("users", "rename", "jane.miller", "jsmith") == {"revision": 4}
    assert shell.error(4, "users", "rename", "jane.miller", "x")["type"] == "UnknownUser"
    assert shell.error(3, "users", "rename", "jsmith", "mlee")["type"] == "UsernameCollision"


def test_users_import_removes_those_that_are_missing(tmp_path: Path):
    """A file with a row that could be about any user removes no user."""
    shell = Shell(tmp_path)
    ipguard.open_store(shell.env["IPGUARD_URL"]).close()
    shell.json("users", "import", "-", stdin=SYNCED)
    header, first, _ = SYNCED.splitlines()
    cut = f"{header}\n{first}\nmlee,Mei\n"
    failed = shell.error(9, "users", "import", "-", "--sync", "--remove-missing", stdin=cut)
    assert "nothing was changed" in failed["message"]
    assert shell.bad(2, "users", "import", "-", "--remove-missing", stdin=cut)
    found = shell.json(
        "users", "import", "-", "--sync", "--remove-missing", stdin=f"{header}\n{first}\n"
    )
    assert found["users"]["removed"] == 1


def test_list(shell: Shell):
    """In a terminal it writes a table; in a pipe, lines that are never cut."""
    head, *rows = shell.good("list").splitlines()
    assert head.split("\t")[:4] == ["username", "full_name", "account_id", "restrictions"]
    assert [row.split("\t")[3] for row in rows] == ["203.0.113.0/29"] + ["No restrictions"] * 2
    shown = shell.terminal("list", "--limit", "2").ends()
    assert re.search(
        r"jsmith +John Smith +U1 +203\.0\.113\.0/29 head office \[[0-9a-f]{16}\]", shown
    )
    assert "there are more: --after mlee" in shown
    assert "\x1b[" in shown
    assert "zed" not in shown
    narrow = shell.terminal("list", "203.0.113.1", NO_COLOR="1", COLUMNS="60").ends()
    assert "head" in narrow
    assert "mlee" not in narrow
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", narrow)


def test_list_only_some(shell: Shell):
    """The workflow's filters; an unknown one is refused with those that exist."""
    (found,) = shell.json("list", "--only", "restricted")["users"]
    assert found["user"]["username"] == "jsmith"
    assert "jsmith" not in shell.good("list", "--only", "unrestricted")
    assert "no pending user found\n" in shell("list", "--only", "pending").err
    assert "restricted" in shell.bad(3, "list", "--only", "locked")


def test_list_in_pages(shell: Shell):
    """`--limit` and `--after` give pages, and `--all` gives all; an address finds its users."""
    first = shell.json("list", "--limit", "2")
    rest = shell.json("list", "--limit", "2", "--after", first["next"])
    assert [one["user"]["username"] for one in (*first["users"], *rest["users"])] == [
        "jsmith", "mlee", "zed",
    ]  # fmt: skip
    assert rest["next"] is None
    assert shell.json("list", "--all")["users"] == [*first["users"], *rest["users"]]
    (found,) = shell.json("list", "203.0.113.2")["users"]
    assert found["restrictions"][0]["label"] == "head office"
    assert shell.json("list", "--removed")["users"] == []


def test_history(shell: Shell):
    """Entries are listed newest first, in pages, for one user or all."""
    first = shell.json("history", "--limit", "1")
    assert [row["action"] for row in first["changes"]] == ["impose"]
    rest = shell.json("history", "--before", str(first["next"]))
    assert [row["action"] for row in rest["changes"]] == ["put_users"]
    assert shell.good("history", "--user", "JSMITH").count("\n") == 2
    assert "impose" in shell.terminal("history").ends()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["list", "jsmiht"], "no user found for 'jsmiht'"),
        (["list", "jsmith", "--after", "zzz"], "no user found for 'jsmith' after 'zzz'"),
        (["list", "--removed"], "no removed user with restrictions found\n"),
        (["list", "--removed", "mlee"], "no removed user with restrictions found for 'mlee'"),
        (["users", "list", "--search", "jsmiht"], "no user found for 'jsmiht'"),
        (["history", "--user", "jsmiht"], "no user 'jsmiht' is registered"),
        (["history", "--user", "mlee"], "no entries about 'mlee'\n"),
        (["history", "--user", "jsmith", "--before", "1"], "about 'jsmith' before revision 1"),
    ],
)
def test_an_empty_result_is_noted(shell: Shell, args: list[str], words: str):
    """The exit code is 0; JSON output has no note."""
    done = shell(*args)
    assert (done.code, done.out.count("\n")) == (0, 1)  # the names of the columns
    assert re.fullmatch(r"ipguard: .+\n", done.err)
    assert words in done.err
    found = shell("--json", *args)
    assert (found.code, found.err) == (0, "")
    assert [] in json.loads(found.out).values()


def test_an_empty_result_in_a_terminal(shell: Shell, tmp_path: Path):
    """A note replaces the table; for a store without users, it says what to do."""
    assert shell.terminal("list", "jsmiht").ends().startswith("ipguard: no user found for 'jsmiht'")
    other = f"sqlite:///{tmp_path}/other.db"
    ipguard.open_store(other).close()
    for args in (["list"], ["users", "list"]):
        assert "ipguard users import FILE" in shell(*args, "--store", other).err
    assert "the audit log has no entries" in shell("history", "--store", other).err


# -- check and explain -------------------------------------------------------------------------


def test_check_answers_with_its_exit_code(shell: Shell):
    """0 is allowed and 1 is not, for any input; without an answer there is another code."""
    assert "\x1b[32mallowed: listed" in shell.terminal("check", "jsmith", "203.0.113.2").ends()
    assert "\x1b[31mnot allowed" in shell.terminal("check", "jsmith", "192.0.2.1").ends(1)
    assert shell.json("check", "JSmith", "203.0.113.2")["decision"]["reason"] == "listed"
    assert shell.json("check", "jsmith", "203.0.113.9", code=1)["decision"]["allowed"] is False
    for username, address, answer in (
        ("jsmith", "203.0.113.02", (1, "not allowed: bad_address\n")),
        ("", "203.0.113.2", (1, "not allowed: bad_username\n")),
        ("nobody", "192.0.2.1", (0, "allowed: unrestricted\n")),
    ):
        done = shell("check", username, address)
        assert (done.code, done.out) == answer
    strict = shell("check", "nobody", "192.0.2.1", "--unknown-users", "deny")
    assert (strict.code, strict.out) == (1, "not allowed: unknown_user\n")
    gone = shell.bad(6, "check", "x", "192.0.2.1", "--store", "postgresql://127.0.0.1:1/x")
    assert "the store" in gone


def test_check_for_pam(shell: Shell):
    """The environment that pam_exec sets; without a name or an address the login is refused."""
    for env, answer in (
        ({"PAM_USER": "jsmith", "PAM_RHOST": "203.0.113.2"}, "allowed: listed"),
        ({"PAM_USER": "jsmith", "PAM_RHOST": "203.0.113.9"}, "not allowed: not_listed"),
        ({"PAM_USER": "jsmith", "PAM_RHOST": "client.example.com"}, "not allowed: bad_address"),
        ({"PAM_USER": "jsmith"}, "not allowed: bad_address"),
        ({"PAM_USER": "", "PAM_RHOST": "203.0.113.2"}, "not allowed: bad_username"),
    ):
        done = shell("check", "--pam", env=env)
        assert done.out.startswith(answer)
        assert done.code == (0 if answer.startswith("allowed") else 1)


def test_check_for_pam_takes_the_name_of_the_systems_record(shell: Shell, monkeypatch):
    """A directory service may accept other spellings of a user's name."""
    record = pwd.getpwuid(os.getuid())
    entry = pwd.struct_passwd(("jsmith", *record[1:]))
    monkeypatch.setattr(pwd, "getpwnam", {"EXAMPLE\\jsmith": entry}.__getitem__)
    for typed in ("jsmith", "EXAMPLE\\jsmith"):
        found = shell.json("check", "--pam", env={"PAM_USER": typed, "PAM_RHOST": "203.0.113.2"})
        assert found["username"] == "jsmith"


def test_explain_shows_why(shell: Shell):
    """`explain` shows a sentence and the restrictions, also for an invalid address."""
    found = shell.json("explain", "jsmith", "203.0.113.2")
    assert found["known"]
    assert [one["addresses"] for one in found["restrictions"]] == ["203.0.113.0/29"]
    refused = shell("explain", "jsmith", "nonsense")
    assert refused.code == 1
    assert "203.0.113.0/29" in refused.out
    assert "head office" in shell.terminal("explain", "jsmith", "192.0.2.1").ends(1)
