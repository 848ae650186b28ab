"""Line breaks, searches and the drop-down, in a real browser."""

import pytest

from tests.browser import Way
from tests.flows import OFFICE

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ line breaks

NARROW = pytest.mark.parametrize("way", [Way("asgi", True, "narrow")], ids=str)
_LINES = """all => all.map(one => {
  const range = document.createRange();
  range.selectNodeContents(one);
  const tops = [...range.getClientRects()].map(rect => Math.round(rect.top));
  return [new Set(tops).size, one.textContent];
})"""


@NARROW
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


# ------------------------------------------------------------------ searches


def test_searches_in_two_tabs(walk, world):
    """A search in another tab affects neither this tab's next page nor its Back button."""
    world.crowd(120)
    walk.open()
    walk.fill("Search", "trader")
    walk.press("Search")
    other = walk.page.context.new_page()
    other.goto(walk.world.page_url)
    other.get_by_label("Search", exact=True).fill("smith")
    other.get_by_role("button", name="Search", exact=True).click()
    other.get_by_text("Traders found for “smith”").wait_for()
    other.close()
    walk.follow("Next page")
    walk.sees("Traders found for “trader”", "trader00051")
    walk.page.go_back()
    walk.sees("Traders found for “trader”", "trader00001")
