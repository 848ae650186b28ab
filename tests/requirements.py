"""What to do about programs that are not installed."""

import os
from typing import NoReturn

import pytest


def missing(program: str, package: str) -> NoReturn:
    """Skip the test, or fail it on CI, with the command that installs the program."""
    command = f"apt-get install --yes --no-install-recommends {package}"
    message = f"{program} is not installed; as root: {command}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
