"""The project holds together: what it installs, what it ships, what it promises about imports."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parent.parent


def test_core_dependencies_are_three():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {need.split(">=")[0] for need in project["dependencies"]}
    assert names == {"attrs", "cachetools", "netaddr"}


def test_metadata_is_what_pyproject_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.version("ipguard") == project["version"]
    assert metadata.metadata("ipguard")["License-Expression"] == "MIT"


def test_the_package_says_that_it_is_typed():
    assert resources.files("ipguard").joinpath("py.typed").is_file()


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = list(project["project"]["dependencies"])
    for group in project["dependency-groups"].values():
        needs += [need for need in group if isinstance(need, str)]
    files = (ROOT / "constraints.txt", ROOT / "benchmarks" / "constraints.txt")
    text = "".join(file.read_text() for file in files)
    pins = text.lower().replace("_", "-").splitlines()
    pinned = {pin.partition("==")[0] for pin in pins if "==" in pin}
    assert {re.split(r">=|\[", need)[0] for need in needs} <= pinned


def test_the_longest_files_are_there():
    """A file that is renamed, or split, keeps its place in the order of the run."""
    assert len(set(LONGEST)) == len(LONGEST)
    assert {name for name in LONGEST if not (ROOT / "tests" / name).is_file()} == set()


def test_import_loads_nothing_heavy():
    heavy = "sqlite3", "smtplib", "ssl", "email", "fastapi", "starlette", "django", "psycopg"
    script = f"import sys, ipguard; print(*[m for m in {heavy} if m in sys.modules])"
    # Measuring coverage would load some of these itself.
    env = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    found = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
