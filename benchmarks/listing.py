"""What a page of `overview` and `history` costs as the users grow, in both SQL stores.

.venv/bin/python -m benchmarks.listing [users ...]

Each figure is the median of some calls, in milliseconds, over the store's own connection. The
world is made to be unkind: one account holds a tenth of the users, an actor has a hundred thousand
accounts, words and addresses are common early in the alphabet, late, or only in other accounts.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, Accounts, Action, Actor, Restriction, User
from ipguard.store import RestrictionStore
from ipguard.stores import open_store
from tests.postgres import running_server

EVERY = Actor.EVERY_ACCOUNT
START = datetime(2030, 1, 1, tzinfo=UTC)
FIRST = ("John", "Mary", "Wei", "Ana", "Ivan", "Fatima", "Olu", "Priya", "Jürgen", "Zoë")
ENOUGH = 0.5  # seconds that are spent on one figure, about


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


def figure(store: RestrictionStore, accounts: Accounts, search: str, after: str | None) -> float:
    took: list[float] = []
    while not took or (sum(took) < ENOUGH and len(took) < 21):
        began = time.perf_counter()
        store.overview(accounts, search=search, after=after)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000


def figures(store: RestrictionStore, world: World) -> None:
    actors = world.actors()
    pages = {
        "first": None,
        "middle": f"user{world.users // 2:07d}",
        "last": f"user{world.users:07d}",
    }
    print(f"  {'overview':28}" + "".join(f"{name:>24}" for name in actors))
    worst: tuple[float, str] = (0, "")
    for kind, search in world.searches().items():
        line = f"  {kind:28}"
        for actor, accounts in actors.items():
            cells = []
            for page, after in pages.items():
                cells.append(figure(store, accounts, search, after))
                worst = max(worst, (cells[-1], f"{kind}, {actor}, {page}"))
            line += f"{' '.join(f'{cell:7.1f}' for cell in cells):>24}"
        print(line, flush=True)
    print(f"  worst: {worst[0]:.1f} ms: {worst[1]}", flush=True)
    for actor, accounts in {**actors, "few rows": frozenset({"FEW"})}.items():
        cells = []
        for username, before in (
            (None, None),
            (None, world.users // 2),
            (None, 3),
            ("user0000009", None),
        ):
            took = []
            while not took or (sum(took) < ENOUGH and len(took) < 21):
                began = time.perf_counter()
                store.history(accounts, username=username, before=before)
                took.append(time.perf_counter() - began)
            cells.append(statistics.median(took) * 1000)
        print(f"  history: {actor:19} {' '.join(f'{cell:7.1f}' for cell in cells)}", flush=True)


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or [1_000, 10_000, 100_000, 1_000_000]
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            world = World(size)
            for name, url in {
                "SQLite": f"sqlite:///{Path(folder)}/{size}.db",
                "PostgreSQL": server.url(schema=f"w{size}", bulk_timeout=3600),
            }.items():
                print(f"{name}, {size:,} users", flush=True)
                with open_store(url) as store:
                    world.fill(store)
                    figures(store, world)


if __name__ == "__main__":
    main()
