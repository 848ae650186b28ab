"""The project holds together: what it installs, what it ships, what it promises about imports."""

import tomllib
from importlib import metadata, resources
from pathlib import Path

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
