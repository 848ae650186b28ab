"""Run the Python code blocks of README.md and docs/ as tests."""

import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def _enter(namespace: dict[str, Any]) -> None:
    # Documents open databases: run each in a folder of its own.
    namespace["_before"] = Path.cwd()
    namespace["_folder"] = tempfile.TemporaryDirectory(prefix="ipguard-docs-")
    os.chdir(namespace["_folder"].name)


def _leave(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


# The blocks of one document share a namespace; `<!-- skip: next -->` skips the next one.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_enter,
    teardown=_leave,
).pytest()
