"""What a page of `overview` and `history` costs as the users grow, in both SQL stores.

.venv/bin/python -m benchmarks.listing [sqlite | postgresql] [users ...]

Each figure is the median of some calls in milliseconds: the time that processors worked on it, the
client's and the server's together, so that a busy machine says the same as an idle one. The world
is made to be unkind: one account holds a tenth of the users, an actor has a hundred thousand
accounts, words and addresses are common early in the alphabet, late, or only in other accounts.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, Accounts, Action, Actor, Restriction, User
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from tests.postgres import Given, Server, running_server

EVERY = Actor.EVERY_ACCOUNT
START = datetime(2030, 1, 1, tzinfo=UTC)
FIRST = ("John", "Mary", "Wei", "Ana", "Ivan", "Fatima", "Olu", "Priya", "Jürgen", "Zoë")
ENOUGH = 0.15  # seconds that are spent on one figure, about


class World:
    """So many users, their restrictions and a trail, the same each time."""

    def __init__(self, users: int) -> None:
        self.users = users

    def account(self, n: int) -> str:
        return "BIG" if n % 10 == 0 else f"U{n:07d}"

    def people(self) -> Iterator[User]:
        chance = random.Random(self.users)
        for n in range(self.users):
            words = [FIRST[n % 7 + n % 3], f"Last{chance.randrange(1000)}"]
            words.append(f"Zone{n * 10 // self.users}")
            if n % 10 == 3:
                words.append("Outsider")
            if n == self.users // 2:
                words.append("Xerxes")
            yield User(
                username=f"user{n:07d}",
                full_name=" ".join(words),
                account_id=self.account(n),
                email=f"user{n}@example.com",
            )

    def lists(self, n: int) -> Iterator[str]:
        yield f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"
        if n % 3 == 0:
            yield f"2001:db8:{n >> 16:x}:{n & 65535:x}::/64"
        if n % 10 == 5:
            yield "198.51.100.0/24"
        if n >= self.users // 2:
            yield "203.0.113.1-203.0.113.9"
        if n % 1000 in (7, 10):
            wide = n // 1000 % 60_000 + 300
            yield f"172.16.0.{n // 1000 % 200}-172.16.{wide >> 8}.{wide & 255}"

    def restrictions(self) -> Iterator[Restriction]:
        for n in range(self.users):
            for place, text in enumerate(self.lists(n)):
                yield Restriction(
                    id=f"{n:08d}{place}",
                    username=f"user{n:07d}",
                    addresses=AddressRange.parse(text),
                    label="office",
                    created_at=START,
                    created_by="boss",
                )

    def fill(self, store: RestrictionStore) -> None:
        began = time.perf_counter()
        store.put_users(self.people())
        put = time.perf_counter()
        with store.transaction(staged=self.restrictions()) as turn:
            turn.add_staged(per_user=1000)
            turn.append(Action.IMPOSE_MANY, actor="boss", touches=EVERYBODY)
        added = time.perf_counter()
        rows = iter(range(self.users))
        while some := list(islice(rows, 2_000)):
            with store.transaction() as turn:
                for n in some:
                    turn.append(
                        Action.REQUEST,
                        actor="boss",
                        username=f"user{n:07d}",
                        account_id="FEW" if n == 5 else self.account(n),
                    )
        print(
            f"  filled: users {put - began:.1f} s, restrictions {added - put:.1f} s,"
            f" changes {time.perf_counter() - added:.1f} s",
            flush=True,
        )

    def actors(self) -> dict[str, Accounts]:
        most = 100_000
        own = [self.account(n) for n in range(self.users) if n % 10]
        elsewhere = [f"X{n:07d}" for n in range(most)]
        spread = own[:: max(1, len(own) // most)][:most]
        return {
            "every": EVERY,
            "one": frozenset({"BIG"}),
            "tiny": frozenset({own[0]}),
            "100": frozenset(own[:: max(1, len(own) // 100)][:100]),
            "100k spread": frozenset([*spread, *elsewhere][:most]),
            "100k early": frozenset([*own[:most], *elsewhere][:most]),
            "100k none": frozenset(elsewhere),
        }

    def searches(self) -> dict[str, str]:
        last = self.users - 1
        return {
            "": "",
            "username": f"user{last // 2:07d}"[:-2],
            "username, common": "user",
            "account": f"U{last // 2:07d}"[:-2],
            "account, common": "U0",
            "name, common": "john",
            "name, late": "zone9",
            "name, others'": "outsider",
            "name, one letter": "z",
            "name, rare": "xerx",
            "name, nobody": "nobody at all",
            "two words": "john last77",
            "address, one": "10.0.0.3",
            "address, early": "198.51.100.7",
            "address, late": "203.0.113.7",
            "address, nested": "172.16.2.0",
            "address, nobody": "9.9.9.9",
        }


class Meter:
    """Tells how long processors have worked: this process, and a server's."""

    def __init__(self, server: Server | Given | None = None) -> None:
        self._server = server if isinstance(server, Server) else None

    def _servers(self) -> float:
        spent = 0.0
        for pid in self._server.backends() if self._server else ():
            with contextlib.suppress(OSError):
                spent += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
        return spent

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how long processors worked on a call, in seconds."""
        # What it costs to ask for the server's is not counted.
        others, own = self._servers(), time.process_time()
        call()
        own = time.process_time() - own
        return own + self._servers() - others

    def milliseconds(self, call: Callable[[], object]) -> float:
        call()
        took: list[float] = []
        while len(took) < 3 or (sum(took) < ENOUGH and len(took) < 15):
            took.append(self.seconds(call))
        return statistics.median(took) * 1000


def figures(store: RestrictionStore, world: World, meter: Meter) -> None:
    actors = world.actors()
    last = world.users
    pages: dict[str, str | None] = {
        "first": None,
        "middle": f"user{last // 2:07d}",
        "last": f"user{last:07d}",
    }
    print("  pages: first, middle, last; actors:", ", ".join(actors))
    above: list[tuple[float, str]] = []
    for kind, search in world.searches().items():
        cells = []
        for actor, accounts in actors.items():
            for page, after in pages.items():
                took = meter.milliseconds(
                    lambda: store.overview(accounts, search=search, after=after)  # noqa: B023
                )
                cells.append(f"{took:6.1f}")
                above.append((took, f"{kind or 'no search'}, {actor}, {page} page"))
            cells.append(" |")
        print(f"  {kind or 'no search':18}{''.join(cells)}", flush=True)
    for actor, accounts in {**actors, "few rows": frozenset({"FEW"})}.items():
        cells = []
        asked: dict[str, int | None] = {"newest": None, "middle": last // 2, "oldest": 3}
        for place, before in asked.items():
            took = meter.milliseconds(lambda: store.history(accounts, before=before))  # noqa: B023
            cells.append(f"{took:6.1f}")
            above.append((took, f"history, {actor}, {place}"))
        print(f"  history: {actor:14}{''.join(cells)}", flush=True)
    above.sort(reverse=True)
    print(f"  above 50 ms: {sum(took > 50 for took, _ in above)} of {len(above)}")
    for took, what in above[:12]:
        print(f"  {took:8.1f} ms  {what}", flush=True)


def main() -> None:
    only = [text for text in sys.argv[1:] if not text.isdigit()]
    sizes = [int(text) for text in sys.argv[1:] if text.isdigit()]
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        for size in sizes or [1_000, 10_000, 100_000, 1_000_000]:
            world = World(size)
            for name, url in {
                "SQLite": f"sqlite:///{Path(folder)}/{size}.db",
                "PostgreSQL": server.url(schema=f"w{size}", bulk_timeout=3600),
            }.items():
                if only and name.lower() not in only:
                    continue
                print(f"{name}, {size:,} users", flush=True)
                with open_store(url) as store:
                    world.fill(store)
                    figures(store, world, Meter(server if name == "PostgreSQL" else None))


if __name__ == "__main__":
    main()
