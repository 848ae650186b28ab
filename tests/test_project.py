"""Tests of the project's metadata and pins."""

import re
import tomllib
from importlib import metadata, resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_three_dependencies():
    """The library depends on attrs, cachetools and netaddr only."""
    names = {need.split(">=")[0] for need in PROJECT["project"]["dependencies"]}
    assert names == {"attrs", "cachetools", "netaddr"}


def test_metadata():
    """The installed metadata is that of pyproject.toml, and the package is typed."""
    assert metadata.version("ipguard") == PROJECT["project"]["version"]
    assert metadata.metadata("ipguard")["License-Expression"] == "MIT"
    assert resources.files("ipguard").joinpath("py.typed").is_file()


def test_every_requirement_is_pinned():
    """Each requirement of the library and of the groups has a pin."""
    needs = list(PROJECT["project"]["dependencies"])
    for group in PROJECT["dependency-groups"].values():
        needs += [need for need in group if isinstance(need, str)]
    files = (ROOT / "constraints.txt", ROOT / "benchmarks" / "constraints.txt")
    pins = "".join(file.read_text() for file in files).lower().replace("_", "-").splitlines()
    pinned = {pin.partition("==")[0] for pin in pins if "==" in pin}
    assert {re.split(r">=|\[", need)[0] for need in needs} <= pinned
