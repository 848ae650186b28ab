"""The demo succeeds, and fails if the library is broken."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ipguard

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"


def run_demo(*args: str, broken: str = "") -> subprocess.CompletedProcess[str]:
    """Run the demo in its own process after the statements `broken`."""
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
    """Return the group of the first match of a pattern."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"nothing like {pattern}"
    return match[1]


def test_success():
    """All expectations are met, and no files are left."""
    demo = run_demo()
    assert (demo.returncode, demo.stderr) == (0, "")
    assert re.search(r"^All \d\d expectations were met\.$", demo.stdout, re.MULTILINE)
    assert "\x1b" not in demo.stdout, "colours are for terminals alone"
    folder = found(r"^database (.+)/ipguard\.db$", demo.stdout)
    assert not Path(folder).exists()


@pytest.mark.slow
def test_keep_leaves_the_database():
    """`--keep` prints the path of the database, which can be opened."""
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
        shutil.rmtree(path.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(
            "import ipguard\n"
            "yes = ipguard.Decision(allowed=True, reason=ipguard.Reason.LISTED, revision=0)\n"
            "ipguard.Guard.check = lambda *_: yes",
            id="a guard that allows everything",
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
            "import logging, ipguard.mail as m\nsend = m.EmailNotifier.change_applied\n"
            "def change_applied(*args):\n"
            "    logging.getLogger('ipguard.mail').warning('something is wrong')\n"
            "    send(*args)\n"
            "m.EmailNotifier.change_applied = change_applied",
            id="a warning in the log",
        ),
    ],
)
def test_a_broken_library(broken):
    """The demo fails if an expectation is not met or a step raises."""
    demo = run_demo(broken=broken)
    assert demo.returncode == 1
    assert "NOT AS EXPECTED" in demo.stdout or "TimeoutError: no mail arrived" in demo.stderr
    assert "expectations were met" not in demo.stdout
