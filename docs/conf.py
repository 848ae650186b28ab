"""How the documentation is built; `python3 dev.py docs` does it, with warnings as errors."""

import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

project = "ipguard"
author = copyright = "the ipguard authors"
version = release = _project["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ipguard {version}"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
# An "Attributes:" section is the description of attributes that autodoc lists already.
napoleon_use_ivar = True
# Docstrings are prose for a reader of the source: they name things in backticks.
default_role = "code"
