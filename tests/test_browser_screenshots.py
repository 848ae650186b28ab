"""The pictures of the documentation."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import WIDTHS

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "screenshots"


def size(path: Path) -> tuple[int, int]:
    """Return a PNG's width and height (PNG specification, 11.2.1)."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_the_pictures_are_made(chromium: Browser, tmp_path: Path):
    """`dev.py screenshots` makes exactly the pictures of the documentation, in their widths."""
    from tests import screenshots

    screenshots.take(chromium, tmp_path)
    made = {path.name: size(path)[0] for path in tmp_path.iterdir()}
    assert made == {path.name: size(path)[0] for path in FOLDER.glob("*.png")}
    assert set(made.values()) == {width for width, _ in WIDTHS.values()}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.png")), ids=lambda path: path.name)
def test_a_picture_is_small_and_shown(path: Path):
    """No picture is larger than 150 KiB, and a page of the documentation shows it."""
    assert path.stat().st_size < 150 * 1024
    shown = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert f"screenshots/{path.name}" in shown
