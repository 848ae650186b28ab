"""Watches a whole test run: no confirmation number that was minted may turn up in a log.

`tests/conftest.py` begins it with the session. Numbers of ten digits and more are looked for, as
whole words, with or without their hyphens: shorter ones are found in any log by chance.
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
    """Reads every record of `ipguard.*` as it would be written, tracebacks included.

    Attributes:
        minted: The numbers so far, digits alone.
        found: What was logged that held one.
        read: How many records were read.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.minted: set[str] = set()
        self._sizes: set[int] = set()
        self.found: list[str] = []
        self.read = 0
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    def mint(self, digits: int) -> str:
        """Mint as the library does, and remember the number."""
        number = _mint(digits)
        if len(number) >= _SHORTEST:
            self.minted.add(number)
            self._sizes.add(digits)
        return number

    def holds_a_number(self, text: str) -> bool:
        """Tell whether a text holds a number that was minted."""
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
        if self.holds_a_number(line):
            self.found.append(line)


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch until the block ends, then fail if a number was logged in it."""
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
