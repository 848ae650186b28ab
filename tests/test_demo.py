"""The demo works, and says so truthfully: whatever is broken makes it end non-zero."""

import os
import pty
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ipguard

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"


def run_demo(*args: str, broken: str = "") -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own, in which `broken` was carried out before."""
    start = (
        f"import runpy, sys; sys.argv[0] = {str(DEMO)!r}; sys.path.insert(0, {str(DEMO.parent)!r})"
    )
    run = f"runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    script = f"{start}\n{broken}\n{run}"
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def found(pattern: str, text: str) -> str:
    """Return what the pattern's group matches on one of the lines."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"nothing like {pattern}"
    return match[1]


def test_it_goes_all_the_way():
    """All expectations are met, and no trace is left."""
    demo = run_demo()
    assert (demo.returncode, demo.stderr) == (0, "")
    assert re.search(r"^All \d\d expectations were met\.$", demo.stdout, re.MULTILINE)
    assert "\x1b" not in demo.stdout, "colours are for terminals alone"
    folder = found(r"^database (.+)/ipguard\.db$", demo.stdout)
    assert not Path(folder).exists()


@pytest.mark.slow
def test_keep_leaves_the_database():
    """`--keep` prints where the database is, and it can be opened."""
    demo = run_demo("--keep")
    path = Path(found(r"^The database is kept: (.+)$", demo.stdout))
    try:
        assert demo.returncode == 0
        url = found(r'ipguard\.open_store\("(.+)"\)$', demo.stdout)
        with ipguard.open_store(url) as store:
            assert [str(r.addresses) for r in store.load_policy("jsmith").restrictions] == [
                "203.0.113.0/29"
            ]
    finally:
        for file in sorted(path.parent.iterdir()):
            file.unlink()
        path.parent.rmdir()


def test_colours_in_a_terminal():
    """A terminal gets ANSI colours, unless the person asked for none (no-color.org)."""
    report = "import demo_parts; demo_parts.Report().expect('it', 1, 1)"
    for colourless in (False, True):
        ours, theirs = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(DEMO.parent)}
        env |= {"NO_COLOR": "1"} if colourless else {}
        subprocess.run([sys.executable, "-c", report], stdout=theirs, env=env, check=True)
        os.close(theirs)
        shown = os.read(ours, 1000)
        os.close(ours)
        assert b"as expected: it" in re.sub(rb"\x1b\[[0-9]*m", b"", shown)
        assert (b"\x1b[32m" in shown) is not colourless


def test_one_unmet_expectation_is_enough(capsys):
    """The sum of the report is bad as soon as one expectation was not met."""
    report = runpy.run_path(str(DEMO.parent / "demo_parts.py"))["Report"]()
    report.expect("good", 1, 1)
    assert report.end()
    report.expect("bad", 1, 2)
    report.expect("good", 2, 2)
    assert not report.end()
    shown = capsys.readouterr().out
    assert "NOT AS EXPECTED: bad\n      expected 2\n      but got  1\n" in shown
    assert "1 of 3 not as expected:\n   bad\n" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(
            "import ipguard\n"
            "yes = ipguard.Decision(allowed=True, reason=ipguard.Reason.LISTED, revision=0)\n"
            "ipguard.Guard.check = lambda *_: yes",
            id="a guard that lets everybody in",
        ),
        pytest.param(
            "from ipguard.guard import _answers\nparse = _answers.login_address\n"
            "_answers.login_address = lambda text: parse(text.strip())",
            id="a guard that forgives a blank",
        ),
        pytest.param(
            "from ipguard.confirmation import Keyring\nKeyring.matches = lambda *_: True",
            id="any number confirms",
        ),
        pytest.param(
            "import demo_parts\nfrom ipguard.mail import EmailNotifier\n"
            "demo_parts._PATIENCE = 0.2\nEmailNotifier.change_applied = lambda *_: None",
            id="no notice is mailed",
        ),
        pytest.param(
            "import demo_parts, ipguard.confirmation as c\n"
            "mint = c.mint\nc.mint = lambda digits: mint(digits)[:-1] + 'x'",
            id="a number that is none",
        ),
        pytest.param(
            "import logging, ipguard.mail as m\nsend = m.EmailNotifier.change_applied\n"
            "def change_applied(*args):\n"
            "    logging.getLogger('ipguard.mail').warning('something is wrong')\n"
            "    send(*args)\n"
            "m.EmailNotifier.change_applied = change_applied",
            id="a warning in the log",
        ),
    ],
)
def test_what_is_broken_is_noticed(broken):
    """The demo ends non-zero, whether an expectation is not met or a step cannot be taken."""
    demo = run_demo(broken=broken)
    assert demo.returncode == 1
    assert "NOT AS EXPECTED" in demo.stdout or "TimeoutError: no mail arrived" in demo.stderr
    assert "expectations were met" not in demo.stdout
