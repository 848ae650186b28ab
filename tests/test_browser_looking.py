"""Finding users, checking an address and reading the history, in a real browser."""

import pytest

from tests.browser import Way
from tests.flows import BOSS, HOME, OFFICE

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ what is not broken

NARROW = pytest.mark.parametrize("way", [Way("asgi", True, "narrow")], ids=str)
_LINES = """all => all.map(one => {
  const range = document.createRange();
  range.selectNodeContents(one);
  const tops = [...range.getClientRects()].map(rect => Math.round(rect.top));
  return [new Set(tops).size, one.textContent];
})"""


@NARROW
def test_addresses_are_not_broken(walk, world):
    """An address stays in one piece beside what can be done with it, however long its label."""
    world.add("203.0.113.128/25", "jsmith")
    world.ask("198.51.100.128/25", label="a long label " * 5)
    walk.open()
    _whole(walk.page.locator(".address"), "203.0.113.128/25", "198.51.100.128/25")
    walk.open("check?user=jsmith")
    walk.fill("IP Address", "203.0.113.129")
    walk.press("Check")
    _whole(walk.page.get_by_role("rowheader"), "203.0.113.128/25")
    walk.open("add")
    _whole(walk.page.locator(".together"), "203.0.113.5-203.0.113.9")


@pytest.mark.parametrize("way", [Way("asgi", True, "wide")], ids=str)
def test_names_are_not_broken_in_the_history(walk, world):
    """However long what stands beside them is."""
    world.crowd(1)
    world.add(OFFICE, "trader00001", label="a long label " * 7)
    walk.open("history")
    _whole(walk.page.locator("td .username").first, "trader00001")


def _whole(found, *addresses):
    assert found.evaluate_all(_LINES) == [[1, address] for address in addresses]


# ------------------------------------------------------------------ finding


def test_paging(walk, world):
    """The list comes in pages of 50, one after the other, and back to the first."""
    world.crowd(60)
    walk.open()
    assert walk.page.get_by_role("row").count() == 51  # with the heads
    walk.sees("alice", "trader00047")
    walk.follow("Next page")
    walk.sees("trader00048", "trader00060")
    walk.misses("trader00047", "Next page")
    walk.follow("First page")
    walk.sees("trader00001")


def test_search(walk, world):
    """A name, a word of it or an address that is listed finds the users; the URL says neither."""
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
    """A search in another tab changes neither this tab's next page nor its way back."""
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


def test_an_account_without_users(walk, world):
    """An empty list says that it is empty."""
    world.store.remove_users(["jsmith", "mary", "alice"])
    walk.open()
    walk.sees("There are no traders in your accounts")


def test_drop_down_becomes_a_search(walk, world):
    """With more traders than a drop-down should hold, one is typed, or searched for and chosen."""
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


# ------------------------------------------------------------------ looking


def test_check_an_address(walk, world):
    """Could a trader log in from there, and why."""
    world.add("203.0.113.0/29", label="office")
    walk.open()
    walk.follow("John Smith")
    walk.follow("Check an address")
    for typed, answer, why in (
        ("203.0.113.5", "203.0.113.5: allowed", "A restriction of jsmith lists this address"),
        (HOME, f"{HOME}: not allowed", "No restriction of jsmith lists this address"),
    ):
        walk.fill("IP Address", typed)
        walk.press("Check")
        walk.sees(answer, why, "203.0.113.0/29", "office")
        assert typed not in walk.page.url
    walk.fill("IP Address", "203.0.113.05")
    walk.press("Check")
    walk.sees("leading zero", within=walk.page.locator("#address-problem"))


def test_history(walk, world):
    """What was done, by whom, the newest first; of one trader where one is named."""
    world.add(OFFICE, "jsmith")
    world.add(HOME, "mary")
    walk.open()
    walk.follow("History")
    rows = walk.page.get_by_role("row")
    walk.sees("mary", HOME, BOSS.username, within=rows.nth(1))
    walk.sees("jsmith", OFFICE, within=rows.nth(2))
    walk.fill("Trader", "jsmith")
    walk.press("Show")
    walk.sees("History of jsmith", OFFICE)
    walk.misses("mary", HOME)
    walk.follow("Show all")
    walk.sees("mary")
    walk.fill("Trader", "nobody")
    walk.press("Show")
    walk.sees("nothing of such a trader", within=walk.page.locator("#user-problem"))


def test_history_in_pages(walk, world):
    """A long history comes in pages."""
    for number in range(60):
        world.add(f"203.0.113.{number}", "jsmith")
    walk.open("history")
    walk.sees("203.0.113.59")
    walk.misses("203.0.113.9 ")
    walk.follow("Older")
    walk.sees("203.0.113.0")
    walk.follow("Newest")
    walk.sees("203.0.113.59")
