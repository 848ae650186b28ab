"""The command line: `import`, `export` and `check --file`."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bulk import measure, place, write_restrictions, write_users
from tests.cli import PROGRAM, Shell, validator

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")]

GOOD = """username,addresses,label,expires_at
jsmith,203.0.113.7,"office, ground floor",
mlee,2001:db8::/64,,2099-01-01T00:00Z
mlee,203.0.113.5-203.0.113.9,,
"""
BAD = """username,addresses,label,expires_at
jsmith,203.0.113.7,,
mlee,10.0.0.1/24,,
nobody,198.51.100.1,,
mlee,198.51.100.4,,
MLEE,198.51.100.4,,
mlee,198.51.100.5,,2020-01-01T00:00Z
mlee,198.51.100.6,,yesterday
,198.51.100.7,,
mlee,,,
mlee,010.1.1.1,,
mlee,198.51.100.8,"a\tb",
mlee,198.0.0.0/8,,
mlee,198.51.100.9
mlee,198.51.100.10,fine,
"""
# The error of each bad line, if `jsmith` has the first restriction.
WRONG = {
    2: "already has",
    3: "host bits",
    4: "no user",
    6: "on line 5",
    7: "in the future",
    8: "is not a time",
    9: "username: is missing",
    10: "addresses: is missing",
    11: "leading zero",
    12: "control characters",
    13: "holds more addresses",
    14: "it has 2 columns",
}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell with two users."""
    it = Shell(tmp_path, IPGUARD_MAIL="console")
    it.register(jsmith="U1", mlee="U1")
    return it


def _state(shell: Shell) -> tuple[int, dict[str, list[str]]]:
    """Return the store's revision and the restrictions of each user."""
    with shell.store() as store:
        revision, policies = store.load_all_policies()
        return revision, {
            name: sorted(str(r.addresses) for r in policy.restrictions) for name, policy in policies
        }


def _imported(shell: Shell, *args: str | Path, **more: Any) -> Any:
    """Import, and return the JSON result; the mails go to standard error."""
    done = shell("import", "--reason", "x", *args, "--json", **more)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    validator("import").validate(found)
    return found


def test_import_and_export(shell: Shell, tmp_path: Path):
    """A dry run changes nothing; an import is one revision; an export can be imported again."""
    file = shell.write("rows.csv", GOOD)
    dry = _imported(shell, file, "--dry-run")
    assert (dry["added"], dry["users"], dry["newly"], dry["ended"]) == (3, 2, 2, 0)
    jsmith, mlee = dry["effects"]
    assert (jsmith["username"], jsmith["direction"], jsmith["gained"]) == ("jsmith", "tightens", [])
    assert jsmith["lost"] == ["0.0.0.0-203.0.113.6", "203.0.113.8-255.255.255.255", "::/0"]
    assert mlee["summary"].startswith("Today from anywhere; then only from 2001:db8::/64 (until")
    assert _state(shell) == (1, {})
    shown = shell.terminal("import", file, "--reason", "x", "--dry-run").ends()
    assert re.search(r"jsmith +tightens .*Today from anywhere", shown)
    assert "would add 3 restrictions to 2 users" in shown
    assert _imported(shell, file)["rows"] == 3
    held = {"jsmith": ["203.0.113.7"], "mlee": ["2001:db8::/64", "203.0.113.5-203.0.113.9"]}
    assert _state(shell) == (2, held)
    lines = [json.loads(line) for line in shell.good("export", "--json").splitlines()]
    for each in lines:
        validator("export").validate(each)
    assert {each["label"] for each in lines} == {"office, ground floor", ""}
    table = shell.good("export")
    for name, text in (("out.csv", table), ("out.jsonl", shell.good("export", "--json"))):
        path, old = tmp_path / name, os.umask(0)
        assert shell.json("export", "-o", name)["rows"] == 3
        os.umask(old)
        assert path.read_text() == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "is not overwritten" in shell("export", "-o", path).err
        other = Shell(tmp_path, IPGUARD_URL=f"sqlite:///{path}.db", IPGUARD_MAIL="console")
        other.register(jsmith="U1", mlee="U1")
        assert _imported(other, path)["rows"] == 3
        assert _state(other) == (2, held)
    written = shell.terminal("export", "-o", "third.csv").ends()
    assert "3 restrictions of revision 2" in written
    assert " rows" in written, "progress is shown"
    assert shell.terminal("export").ends().startswith("username,addresses")
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_bad_row_is_named(shell: Shell, tmp_path: Path, kind: str):
    """Rows are named in the order of the file, whichever check refuses them."""
    shell.impose("jsmith", "203.0.113.7")
    before = _state(shell)
    text, wrong = BAD, WRONG
    if kind == "jsonl":
        rows = [line.split(",") for line in BAD.replace('"', "").splitlines()]
        named = [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
        named[12] = {"username": "mlee", "addresses": 7}  # type: ignore[dict-item]
        text = "\n" + "".join(json.dumps(row) + "\n" for row in named)
        wrong = WRONG | {14: "addresses is not text"}
    file = shell.write(f"bad.{kind}", text)
    error = shell.error(9, "import", file, "--reason", "x")
    reasons = {row["line"]: row["reason"] for row in error["rows"]}
    assert list(reasons) == list(wrong)
    for line, words in wrong.items():
        assert words in reasons[line]
    assert _state(shell) == before
    if kind == "csv":
        shown = shell.terminal("import", file, "--reason", "x", "--dry-run").ends(9)
        assert [int(line) for line in re.findall(r"line (\d+):", shown)] == list(reasons)
        assert "12 bad rows; nothing was changed" in shown
        piped = shell("import", "-", "--reason", "x", stdin=text)
        assert (piped.code, piped.err.count("\n")) == (9, 13)


@pytest.mark.parametrize(
    ("text", "args", "code", "words"),
    [
        (b"", [], 9, "is empty"),
        (b"username\n", [], 9, "there is no addresses"),
        (b"username,addresses,colour\n", [], 9, "'colour' is not a column"),
        (b"username,addresses,username\n", [], 9, "there twice"),
        (b"username,addresses\n", [], 9, "rows.csv holds no restrictions"),
        (b"\n", ["--format", "jsonl"], 9, "rows.csv holds no restrictions"),
        (GOOD.encode(), ["--format", "xml"], 2, "'csv', 'jsonl'"),
        (GOOD.replace(",", ";").encode(), [], 9, "columns are separated by semicolons,"),
        (GOOD.replace(",", "\t").encode(), [], 9, "columns are separated by tabs,"),
        (b'username,addresses\n"jsmith,203.0.113.7\n', [], 9, "line 2: it is not CSV"),
        (b"username,addresses\njsmith,203.0.113.7\nmlee,\xff\n", [], 9, "line 3: it is not UTF-8"),
    ],
)
def test_an_unusable_file(shell: Shell, tmp_path: Path, text, args, code, words):
    """The error is one line, and nothing is changed."""
    file = shell.write("rows.csv", text)
    done = shell("import", file, "--reason", "x", *args)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert _state(shell) == (1, {})


def test_every_bad_row_of_a_pipe_is_named(shell: Shell):
    """A pipe is read twice, whether it is standard input or a path."""
    reading, writing = os.pipe()
    os.write(writing, b"username,addresses\njsmith,203.0.113.7\nmlee,x\nzed,203.0.113.7\n")
    os.close(writing)
    error = shell.error(9, "import", f"/dev/fd/{reading}", "--reason", "x")
    os.close(reading)
    assert [row["line"] for row in error["rows"]] == [3, 4]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["import", "--reason", "x"], '{"username": "mlee", "addresses": "1.2.3.4"%s}'),
        (["users", "import"], '{"username": "mlee", "full_name": "x", "account_id": "U1"%s}'),
        (["check", "--file"], '{"username": "mlee", "address": "1.2.3.4"%s}'),
    ],
)
def test_a_name_twice_in_one_object(shell: Shell, tmp_path: Path, args: list[str], line: str):
    """JSON leaves open which of the two counts, so the line is bad."""
    file = shell.write("rows.jsonl", f"{line % ''}\n" + line % ', "username": "jsmith"' + "\n")
    done = shell(*args, file, "--json")
    assert done.code == 9
    _, _, reported = done.err.partition('"rows": ')
    assert json.loads(reported.removesuffix("}}\n")) == [
        {"line": 2, "reason": "'username' is there twice"}
    ]
    assert _state(shell) == (1, {})


@pytest.mark.parametrize(
    "text",
    [
        "username,addresses,label\r\njsmith,203.0.113.7,office\r\n,,\r\n , ,\r\n,,,,\r\n",
        "username,addresses,label,,\r\njsmith,203.0.113.7,office,,\r\n,,,,\r\n",
        "username,addresses\njsmith,203.0.113.7,,\n",
    ],
)
def test_empty_cells_of_spreadsheets_are_ignored(shell: Shell, text: str):
    """Rows of empty cells, columns without a name, and empty cells after the last column."""
    assert _imported(shell, "-", stdin=text)["rows"] == 1
    users = "username,full_name,account_id,\nzoe,Zoe,U1,\n,,,\n"
    assert shell.json("users", "import", "-", stdin=users)["rows"] == 1


def test_values_without_a_column_are_refused(shell: Shell):
    """A value under an empty name or beyond the last column may be misplaced."""
    text = "username,addresses,\njsmith,203.0.113.7,x\njsmith,203.0.113.8,,x\n"
    done = shell("import", "-", "--reason", "x", stdin=text)
    assert done.code == 9
    assert "line 2: it has a value in a column without a name" in done.err
    assert "line 3: it has 4 columns, and the first line has 3" in done.err


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(shell: Shell, kind: str, encoding: str):
    """A file that was saved as "Unicode text" is refused, and the error says what to do."""
    text = GOOD if kind == "csv" else '{"username": "jsmith", "addresses": "203.0.113.7"}\n'
    for args in (["import", "--reason", "x"], ["import", "--reason", "x", "--dry-run"]):
        done = shell(*args, "--format", kind, "-", stdin=text.encode(encoding))
        assert done.err.startswith("ipguard: the file is not UTF-8 but UTF-16 or UTF-32 (save it")
        assert (done.code, done.err.count("\n")) == (9, 1)


def test_skip_existing(shell: Shell, tmp_path: Path):
    """New addresses are added; those that the user has are skipped, with any label."""
    _imported(shell, "-", stdin=GOOD)
    shell.good("export", "-o", tmp_path / "all.csv")
    before = _state(shell)
    done = _imported(shell, tmp_path / "all.csv", "--skip-existing")
    assert (done["rows"], done["skipped"]) == (0, 3)
    assert _state(shell)[1] == before[1]
    text = (tmp_path / "all.csv").read_text() + "mlee,198.51.100.1,new,,,,\n"
    text = text.replace("office, ground floor", "store")
    shown = _imported(shell, "-", "--skip-existing", "--dry-run", stdin=text)
    assert (shown["added"], shown["skipped"], shown["users"], shown["newly"]) == (1, 3, 2, 0)
    directions = {each["username"]: each["direction"] for each in shown["effects"]}
    assert directions == {"jsmith": "neutral", "mlee": "loosens"}
    done = _imported(shell, "-", "--skip-existing", stdin=text)
    assert (done["rows"], done["skipped"]) == (1, 3)
    assert sorted(shell.held("mlee")) == sorted([*before[1]["mlee"], "198.51.100.1"])
    assert "already has" in shell("import", tmp_path / "all.csv", "--reason", "x").err


def test_replace(shell: Shell):
    """The file is the whole list of its users; other users and equal restrictions stay."""
    _imported(shell, "-", stdin=GOOD)
    shell.register(zed="U1")
    shell.impose("zed", "198.51.100.9")
    text = "username,addresses\nmlee,203.0.113.5-203.0.113.9\nmlee,198.51.100.1\n"
    before = _state(shell)
    dry = _imported(shell, "-", "--replace", "--dry-run", stdin=text)
    assert (dry["added"], dry["skipped"], dry["ended"], dry["users"]) == (1, 1, 1, 1)
    effect = {"username": "mlee", "direction": "loosens", "gained": ["198.51.100.1"]}
    effect |= {"lost": ["2001:db8::/64"]}
    summary = "Then also from 198.51.100.1; no longer from 2001:db8::/64."
    assert dry["effects"] == [effect | {"summary": summary}]
    piped = shell("import", "-", "--reason", "x", "--replace", "--dry-run", stdin=text)
    assert piped.out.splitlines()[1] == f"mlee\tloosens\t198.51.100.1\t2001:db8::/64\t{summary}"
    assert "would add 1 restrictions to 1 users, of whom 0 are not restricted now; 1" in piped.err
    assert _state(shell) == before
    done = _imported(shell, "-", "--replace", stdin=text)
    assert (done["rows"], done["skipped"], done["ended"]) == (1, 1, 1)
    held = {"mlee": ["198.51.100.1", "203.0.113.5-203.0.113.9"], "jsmith": ["203.0.113.7"]}
    assert _state(shell) == (before[0] + 1, held | {"zed": ["198.51.100.9"]})
    again = shell("import", "-", "--reason", "x", "--replace", stdin=text)
    assert "2 rows skipped: their restrictions exist already" in again.out
    both = ("import", "-", "--reason", "x", "--replace", "--skip-existing")
    assert "exclude each other" in shell.bad(2, *both, stdin=text)
    bad = shell("import", "-", "--reason", "x", "--replace", stdin=text + "mlee,198.51.100.1\n")
    assert "first on line 3" in bad.err


def test_a_dry_run_of_many_users_in_a_terminal(shell: Shell):
    """The first 50 users are shown, and how many others there are."""
    names = [f"u{number:03}" for number in range(52)]
    shell.register(**dict.fromkeys(names, "U1"))
    rows = "".join(f"{name},203.0.113.7\n" for name in names)
    file = shell.write("rows.csv", f"username,addresses\n{rows}")
    shown = shell.terminal("import", file, "--reason", "x", "--dry-run").ends()
    assert "u049" in shown
    assert "u050" not in shown
    assert "and 2 more; pipe the output" in shown


def test_an_export_for_excel(shell: Shell):
    """CSV starts with a byte order mark, which imports accept; JSON Lines have none."""
    _imported(shell, "-", stdin=GOOD)
    plain, marked = shell.good("export"), shell.good("export", "--excel")
    assert marked == "\ufeff" + plain
    assert _imported(shell, "-", "--skip-existing", stdin=marked)["skipped"] == 3
    refused = shell("export", "--excel", "--format", "jsonl")
    assert (refused.code, refused.out) == (2, "")


def test_expired_restrictions_are_not_exported(shell: Shell, tmp_path: Path):
    """The export can be imported; a note counts the users that it leaves out."""
    shell.hold("jsmith", _0=-1)
    shell.hold("mlee", _1=-1, _2=1)
    done = shell("export")
    assert (done.code, done.out.count("\n"), "mlee,203.0.113.2," in done.out) == (0, 2, True)
    assert "expired restrictions left out: 2" in done.err
    assert "users with expired restrictions only: 1; they can log in from no address" in done.err
    written = shell.json("export", "-o", "out.csv")
    assert (written["rows"], written["expired"], written["users_left_out"]) == (1, 2, 1)
    other = Shell(tmp_path, IPGUARD_URL=f"sqlite:///{tmp_path}/other.db", IPGUARD_MAIL="console")
    other.register(mlee="U1")
    assert _imported(other, "out.csv")["rows"] == 1
    assert other.held("mlee") == ["203.0.113.2"]


def test_an_import_is_checked_alike_for_few_and_many_users(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
):
    """The limit of the settings applies; many users are compared in one walk over the store."""
    shell.impose("jsmith", "203.0.113.7")
    settings = shell.write("settings.toml", "restrictions_per_user = 2\n")
    rows = "".join(f"mlee,198.51.100.{n},\n" for n in range(1, 5)) + "zed,1.2.3.4,\nabe,1.2.3.4,\n"
    rows += "jsmith,203.0.113.7,\njsmith,203.0.113.8,\nkim,1.2.3.4,\n"
    file = shell.write("rows.csv", "username,addresses,label\n" + rows)
    monkeypatch.setattr("ipguard.cli._output.BATCH", 1)
    found = []
    for few in (5_000, 0):
        monkeypatch.setattr("ipguard.cli.transfer._FEW", few)
        error = shell.error(9, "import", file, "--reason", "x", "--settings", settings)
        found.append([(row["line"], row["reason"]) for row in error["rows"]])
    assert found[0] == found[1]
    assert [line for line, _ in found[0]] == [4, 5, 6, 7, 8, 10]
    assert "as many as are allowed" in found[0][0][1]


def test_check_a_whole_login_log(shell: Shell, tmp_path: Path):
    """The report names the refused logins; other columns are ignored."""
    shell.impose("jsmith", "203.0.113.0/29")
    log = shell.write(
        "log.csv",
        "when,username,address\n1,jsmith,203.0.113.1\n2,JSmith,192.0.2.1\n3,jsmith,192.0.2.1\n"
        "4,jsmith,192.0.2.1\n5,mlee,192.0.2.1\n6,mlee,nonsense\n7,\x1b[2J,192.0.2.1\n",
    )
    report = shell.json("check", "--file", log, code=1)
    assert (report["logins"], report["allowed"], report["refused"]) == (7, 2, 5)
    assert report["by_reason"] == {"bad_address": 1, "bad_username": 1, "not_listed": 3}
    worst = report["refused_logins"][1]
    assert (worst["username"], worst["count"], worst["first_line"]) == ("jsmith", 2, 4)
    shown = shell.terminal("check", "--file", log).ends(1)
    assert "7 logins: 2 allowed, 5 refused (not_listed 3" in shown
    assert " rows" in shown, "progress is shown"
    assert "[2J" not in shown.replace("\\x1b[2J", "")
    lines = '{"username": "mlee", "address": "192.0.2.1", "more": {}}\n[]\n'
    done = shell("check", "--file", "-", "--format", "jsonl", stdin=lines)
    assert done.code == 9
    assert "1 logins: 1 allowed, 0 refused" in done.err
    assert "line 2: it is not a JSON object" in done.err
    for text, words in (
        ("", "is empty"),
        ("username,address\n\n", "standard input holds no logins"),
    ):
        assert words in shell.bad(9, "check", "--file", "-", stdin=text)
    assert "holds no logins" in shell.bad(9, "check", "--file", "-", "--format", "jsonl")
    assert "USERNAME and ADDRESS" in shell.bad(2, "check", "mlee", "1.2.3.4", "--file", log)
    gone = ("--store", "postgresql://127.0.0.1:1/x")
    assert "the store" in shell.bad(6, "check", "--file", log, *gone)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_import_of_many_rows(kind: str, rounds: Any, record_property: Any):
    """A million for a million users with `--long`: within 300 MB of the command's own memory."""
    figures = measure(kind, rounds(5_000, 1_000_000))
    record_property("figures", figures)
    for name in ("users", "restrictions", "all_bad"):
        assert 0 < figures[f"{name}_peak_mb"] <= 300
    if rounds(0, 1):
        print(json.dumps(figures))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_import_that_is_killed_leaves_nothing(kind: str, rounds: Any):
    """Whenever an import is killed, either all its rows hold or none."""
    count = rounds(5_000, 50_000)
    with place(kind) as (shell, folder):
        shell.env |= {"IPGUARD_MAIL": "console"}
        assert shell("users", "import", write_users(folder / "u.csv", count)).code == 0
        rows = write_restrictions(folder / "r.csv", count).read_bytes()

        def start() -> subprocess.Popen[bytes]:
            # With a small pipe, a write returns only when nearly all of it has been read.
            return subprocess.Popen(
                [*PROGRAM, "import", "-", "--reason", "x"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                bufsize=0, pipesize=4096, env=shell.env, cwd=folder,
            )  # fmt: skip

        with start() as process:
            assert process.stdin is not None
            process.stdin.write(rows[: len(rows) // 2])
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert _state(shell) == (1, {})
        for moment in range(rounds(3, 30)):
            with start() as process:
                assert process.stdin is not None
                process.stdin.write(rows)
                process.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05 * moment)
                process.kill()
            revision, held = _state(shell)
            assert (revision, len(held)) in ((1, 0), (2, count))
            if revision == 2:
                return
        assert shell("import", folder / "r.csv", "--reason", "x").code == 0
        assert len(_state(shell)[1]) == count
