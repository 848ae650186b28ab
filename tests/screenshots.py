"""Take the pictures in docs/screenshots/: `python3 dev.py screenshots`.

Data and clock are fixed, so that pictures differ between machines only by their fonts.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from ipguard import Actor, Demand, User
from ipguard.testing import FakeClock
from tests.browser import SEND, SWITCHES, Walk, Way, program, walking, window
from tests.browser_world import ACTORS, HOSTS, World
from tests.smtp_server import MailServer

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "screenshots"
WIDE, NARROW = Way("asgi", True, "wide"), Way("asgi", True, "narrow")
RITA = Actor(
    username="rjones",
    email="rita.jones@example.com",
    manages=frozenset({"U1234567"}),
    address="192.0.2.10",
)
OTTO = Actor(username="olund", email="otto.lund@example.com", manages=frozenset({"U1234567"}))
OPERATOR = Actor(username="operator", email="desk@example.com", manages=Actor.EVERY_ACCOUNT)
NAMES = {
    "aokafor": "Adaeze Okafor",
    "cweber": "Clara Weber",
    "jsmith": "John Smith",
    "mlee": "Mei Lee",
    "tnovak": "Tereza Nováková",
}


def fill(world: World) -> None:
    """Create users, restrictions, logins and pending requests."""
    ACTORS[RITA.username] = RITA
    world.store.remove_users(["jsmith", "mary", "alice", "zed"])
    world.store.put_users(
        User(username=name, full_name=full, account_id="U1234567") for name, full in NAMES.items()
    )
    impose = functools.partial(world.quiet.impose, OPERATOR, reason="by their contracts")
    impose("aokafor", "192.0.2.10", label="head office")
    impose("jsmith", "203.0.113.0/29", label="branch")
    world.log_in("203.0.113.4", 17)
    world.wait(days=3)
    until = world.clock() + timedelta(days=5)
    impose("jsmith", "198.51.100.7", label="hotel", expires_at=until)
    impose("tnovak", "203.0.113.16-203.0.113.25", label="trading floor")
    world.log_in("203.0.113.5", 4)
    world.log_in("2001:db8:51:7::2c", 0, 2)
    world.wait(hours=2, minutes=17)
    world.ask("198.51.100.20", "cweber", RITA, label="new office")
    careful = world.workflow(loosens=Demand(approvals=1, wait=timedelta(hours=4)))
    old = world.flow.user(OPERATOR, "tnovak").restrictions[0]
    moved = {"replaces": [old.id], "label": "new floor"}
    careful.request(OTTO, "tnovak", ["203.0.113.64/28", "2001:db8:9::/64"], **moved)
    world.wait(minutes=2)


def pictures(walk: Walk) -> Iterator[str]:
    """Yield the name of each picture when its page is open in a wide window."""
    walk.open()
    yield "list"
    walk.page.emulate_media(color_scheme="dark")
    yield "list-dark"
    walk.page.emulate_media(color_scheme="light")
    walk.follow("Add IP Address Restriction")
    walk.field("Trader").select_option("mlee")
    walk.fill("IP Address", "203.0.113.5-203.0.113.9")
    walk.fill("Label (optional)", "branch office")
    walk.waits_for("Understood as")
    yield "add"
    walk.press(SEND)
    yield "number"
    walk.open("add")
    walk.field("Trader").select_option("mlee")
    walk.page.get_by_text("Add the same for several traders").click()
    walk.fill("More traders", "cweber, jsmith, tnovak")
    walk.fill("IP Address", "192.0.2.77\n192.0.2.78")
    walk.fill("Label (optional)", "trade fair")
    walk.press(SEND)
    yield "review"
    walk.open()
    walk.follow("Approve 203.0.113.64/28, 2001:db8:9::/64 for Tereza Nováková")
    yield "approve"
    walk.open("user?user=jsmith")
    yield "user"
    walk.open()
    walk.follow("Delete 192.0.2.10 of Adaeze Okafor")
    yield "delete-last"


def take(browser: Browser, folder: Path) -> None:
    """Take all pictures."""
    clock = FakeClock(datetime(2027, 5, 4, 7, 30, tzinfo=UTC))
    with tempfile.TemporaryDirectory() as place, MailServer() as mails:
        world = World(Path(place), mails, clock=clock, confirm_deletes="last")
        with world.store, world.guard, HOSTS["asgi"](world) as world.page_url:
            fill(world)
            with walking(window(browser, WIDE), world, WIDE, RITA.username) as walk:
                for name in pictures(walk):
                    walk.page.screenshot(path=folder / f"{name}.png", full_page=True)
            with walking(window(browser, NARROW), world, NARROW, RITA.username) as walk:
                walk.open()
                walk.page.screenshot(path=folder / "phone.png")


def main() -> int:
    """Recreate all pictures."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=program(), args=SWITCHES) as browser,
    ):
        take(browser, FOLDER)
    for path in sorted(FOLDER.glob("*.png")):
        print(f"{path.relative_to(FOLDER.parent.parent)}  {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
