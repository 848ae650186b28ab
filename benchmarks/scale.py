"""How much is measured: all of it, what fits into two minutes, or just enough for the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The numbers of one way of running.

    Attributes:
        name: What it is called.
        processes: How many processes measure each part, one after another.
        rounds: How many rounds each makes; in a round everything of the part has its turn.
        slot: How long a turn is at the least, in seconds. Short, so that most turns are not
            interrupted by whatever else the machine does.
        singles: How many calls are timed one by one, for the 99th percentiles.
        patience: After how many seconds a part that does not end is given up.
        many: How many users "many users" are.
        crowds: How many users a guard remembers, where that grows.
        lengths: How many restrictions a user has, where that grows.
        lengths_of_peers: The same for what ipguard is compared with.
        linear: How many users whoever looks at each user's rule is given.
        cold: How many users are in a store that is asked for users not remembered.
        threads: How many threads ask at once.
        flood: How many users a guard remembers that is flooded; three times as many come.
    """

    name: str
    processes: int
    rounds: int
    slot: float
    singles: int
    patience: float
    many: int
    crowds: tuple[int, ...]
    lengths: tuple[int, ...]
    lengths_of_peers: tuple[int, ...]
    linear: int
    cold: int
    threads: tuple[int, ...]
    flood: int


FULL = Scale(
    name="full",
    processes=3,
    rounds=30,
    slot=0.002,
    singles=20_000,
    patience=400.0,
    many=100_000,
    crowds=(1_000, 100_000, 1_000_000),
    lengths=(1, 10, 100, 1_000, 10_000),
    lengths_of_peers=(1, 10, 100, 1_000, 10_000),
    linear=1_000,
    cold=5_000,
    threads=(1, 2, 4, 8),
    flood=20_000,
)
QUICK = Scale(
    name="quick",
    processes=1,
    rounds=7,
    slot=0.002,
    singles=5_000,
    patience=120.0,
    many=20_000,
    crowds=(1_000, 20_000, 100_000),
    lengths=(1, 100, 10_000),
    lengths_of_peers=(1, 100, 1_000),
    linear=100,
    cold=1_000,
    threads=(1, 8),
    flood=2_000,
)
TINY = Scale(
    name="tiny",
    processes=1,
    rounds=2,
    slot=0.0001,
    singles=20,
    patience=60.0,
    many=50,
    crowds=(10, 50),
    lengths=(1, 20),
    lengths_of_peers=(20,),
    linear=5,
    cold=20,
    threads=(1, 2),
    flood=100,
)
SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
