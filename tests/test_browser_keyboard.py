"""The page with the keyboard alone; the focus is always visible."""

import pytest

from tests.browser import Walk

pytestmark = pytest.mark.slow


class Keys:
    """A person who uses only the keyboard."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.page = walk.page

    def to(self, name: str) -> None:
        """Press Tab until the element with this name has the focus, which must be visible."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            if self.focused() == name:
                self.shows()
                return
        pytest.fail(f"Tab does not lead to {name!r}")

    def focused(self) -> str:
        """Return the name of the focused element as a screen reader would announce it."""
        text: str = self.page.evaluate(
            "(e => (e.labels && e.labels.length ? e.labels[0].textContent : e.textContent)"
            ".replace(/\\s+/g, ' ').trim())(document.activeElement)"
        )
        return text

    def shows(self) -> None:
        """Fail unless the focused element has an outline and is inside the window."""
        style, width, top, bottom, height = self.page.evaluate(
            "(e => [getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth),"
            " e.getBoundingClientRect().top, e.getBoundingClientRect().bottom, innerHeight])"
            "(document.activeElement)"
        )
        assert style != "none", f"{self.focused()} shows no focus"
        assert width >= 2
        assert top >= 0
        assert bottom <= height

    def enter(self) -> None:
        """Press Enter and wait for the next page."""
        with self.page.expect_navigation():
            self.page.keyboard.press("Enter")
        self.walk.look()


def test_keyboard_alone(walk, world):
    """A restriction is added and deleted with Tab, Enter and typing."""
    walk.open()
    keys = Keys(walk)
    keys.to("Skip to main content")
    keys.page.keyboard.press("Enter")
    keys.to("Add IP Address Restriction")
    keys.enter()
    keys.to("Trader")
    keys.page.keyboard.type("John")
    keys.to("IP Address")
    keys.page.keyboard.type("203.0.113.07")
    keys.to("Submit: Send confirmation number")
    keys.enter()
    # The list of errors has the focus; its first link leads to the field.
    keys.page.keyboard.press("Tab")
    keys.shows()
    keys.page.keyboard.press("Enter")
    assert keys.focused() == "IP Address"
    keys.page.keyboard.press("Control+A")
    keys.page.keyboard.type("203.0.113.7")
    keys.to("Label (optional)")
    keys.enter()  # in a field: the form is sent
    keys.to("Confirmation Number")
    keys.page.keyboard.type(world.next_number())
    keys.enter()
    assert world.held() == ["203.0.113.7"]

    walk.open()
    keys.to("Delete 203.0.113.7 of John Smith")
    keys.enter()
    keys.to("John Smith shall be able to log in from any address")
    keys.page.keyboard.press("Space")
    keys.to("Delete restriction")
    keys.enter()
    assert world.held() == []
