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


def test_search(walk, world):
    """A word of a name or a listed address finds users; the URL does not show the text."""
    world.crowd(60)
    world.add("203.0.113.8/30")
    walk.open()
    for text, found in (
        ("trader00058", "trader00058"),
        ("number00059", "trader00059"),
        ("203.0.113.9", "jsmith"),
    ):
        walk.fill("Search", text)
        walk.press("Search")
        assert walk.page.get_by_role("row").count() == 2
        walk.sees(found, f"Traders found for “{text}”")
        assert text not in walk.page.url
        assert walk.field("Search").input_value() == text
    walk.fill("Search", "<b>nobody</b>")
    walk.press("Search")
    walk.sees("No trader matches “<b>nobody</b>”")
    walk.follow("Show all")
    walk.sees("Next page")


def test_searches_in_two_tabs(walk, world):
    """A search in another tab affects neither this tab's next page nor its Back button."""
    world.crowd(120)
    walk.open()
    walk.fill("Search", "trader")
    walk.press("Search")
    other = walk.page.context.new_page()
    other.goto(walk.world.url)
    other.get_by_label("Search", exact=True).fill("smith")
    other.get_by_role("button", name="Search", exact=True).click()
    other.get_by_text("Traders found for “smith”").wait_for()
    other.close()
    walk.follow("Next page")
    walk.sees("Traders found for “trader”", "trader00051")
    walk.page.go_back()
    walk.sees("Traders found for “trader”", "trader00001")


def test_drop_down_becomes_a_search(walk, world):
    """With too many traders for a drop-down, one is typed, or searched for and chosen."""
    world.crowd(120)
    walk.open("add")
    walk.fill("Trader", "number0011")
    walk.fill("IP Address", OFFICE)
    walk.fill("Label (optional)", "desk")
    walk.press("Submit")
    walk.sees("Choose the trader that you mean")
    assert walk.field("IP Address").input_value() == OFFICE
    options = walk.field("Trader").locator("option").all_inner_texts()
    assert len([text for text in options if "trader0011" in text]) == 10
    walk.field("Trader").select_option("trader00114")
    walk.press("Submit")
    walk.sees("Confirm the restriction", "trader00114", "desk")

    walk.open("add")
    walk.fill("Trader", "trader00077")
    walk.fill("IP Address", OFFICE)
    walk.press("Submit")
    walk.sees("Confirm the restriction", "trader00077")
