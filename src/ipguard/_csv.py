"""Cells of CSV that people open in a spreadsheet."""

from __future__ import annotations

import re
from typing import Final

_FORMULA: Final = re.compile("[\t\r\n]|\\s*[-=+@\uff0d\uff1d\uff0b\uff20]")


def safe_cell(value: object) -> str:
    """Return the text of a cell; one that a spreadsheet could run as a formula gets a prefix.

    The prefix, an apostrophe, is what OWASP advises.

    Args:
        value: Anything; None becomes an empty cell.
    """
    text = "" if value is None else str(value)
    return f"'{text}" if _FORMULA.match(text) else text
