"""A log handler that finds confirmation numbers in the log of a whole test run.

`tests/conftest.py` installs it. It looks for numbers of at least ten digits, with or without
hyphens, as whole words: shorter numbers occur in logs by chance.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ipguard import confirmation

_WORDS = re.compile(r"(?<![0-9A-Za-z])[0-9](?:[- ]{0,3}[0-9]){9,}(?![0-9A-Za-z])")
_SHORTEST = 10
_mint = confirmation.mint


class Watch(logging.Handler):
    """Search every record of `ipguard.*` as it would be formatted, tracebacks included.

    Attributes:
        minted: The digits of all numbers so far.
        found: The log lines that contain a number.
        read: The number of records.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.minted: set[str] = set()
        self._sizes: set[int] = set()
        self.found: list[str] = []
        self.read = 0
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    def mint(self, digits: int) -> str:
        """Mint a number and remember it."""
        number = _mint(digits)
        if len(number) >= _SHORTEST:
            self.minted.add(number)
            self._sizes.add(digits)
        return number

    def holds_a_number(self, text: str) -> bool:
        """Return whether a text contains a number that was minted."""
        words = (re.sub("[- ]", "", word) for word in _WORDS.findall(text))
        return any(
            word[n : n + size] in self.minted
            for word in words
            for size in self._sizes
            for n in range(len(word) - size + 1)
        )

    def emit(self, record: logging.LogRecord) -> None:
        self.read += 1
        line = self.format(record)
        line += "".join(
            f" {vars(record)[key]}" for key in vars(record) if key.startswith("ipguard_")
        )
        if self.holds_a_number(line):
            self.found.append(line)


@contextmanager
def watching() -> Iterator[Watch]:
    """Fail at the end of the block if it logged a number."""
    watch, logger = Watch(), logging.getLogger("ipguard")
    patch = pytest.MonkeyPatch()
    patch.setattr(confirmation, "mint", watch.mint)
    level = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.DEBUG)
    try:
        yield watch
    finally:
        logger.setLevel(level)
        logger.removeHandler(watch)
        patch.undo()
    assert not watch.found, f"confirmation numbers were logged: {watch.found}"
