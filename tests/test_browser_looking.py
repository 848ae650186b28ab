"""Line breaks in a real browser."""

import pytest

from tests.browser import Way
from tests.flows import OFFICE

pytestmark = pytest.mark.slow

_LINES = """all => all.map(one => {
  const range = document.createRange();
  range.selectNodeContents(one);
  const tops = [...range.getClientRects()].map(rect => Math.round(rect.top));
  return [new Set(tops).size, one.textContent];
})"""


@pytest.mark.parametrize("way", [Way("asgi", True, "narrow")], ids=str)
def test_addresses_are_not_broken(walk, world):
    """An address stays on one line, however long its label is."""
    world.add("203.0.113.128/25", "jsmith")
    world.ask("198.51.100.128/25", label="a long label " * 5)
    walk.open()
    assert_unbroken(walk.page.locator(".address"), "203.0.113.128/25", "198.51.100.128/25")
    walk.open("check?user=jsmith")
    walk.fill("IP Address", "203.0.113.129")
    walk.press("Check")
    assert_unbroken(walk.page.get_by_role("rowheader"), "203.0.113.128/25")
    walk.open("add")
    assert_unbroken(walk.page.locator(".together"), "203.0.113.5-203.0.113.9")


@pytest.mark.parametrize("way", [Way("asgi", True, "wide")], ids=str)
def test_names_are_not_broken_in_the_history(walk, world):
    """A username stays on one line, however long the label next to it is."""
    world.crowd(1)
    world.add(OFFICE, "trader00001", label="a long label " * 7)
    walk.open("history")
    assert_unbroken(walk.page.locator("td .username").first, "trader00001")


def assert_unbroken(found, *addresses):
    assert found.evaluate_all(_LINES) == [[1, address] for address in addresses]
