"""The common table: questions that everything compared has to answer as ipguard does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from benchmarks.peers import PEERS, Peer
from benchmarks.work import Policies, guard_of

POLICIES: Policies = {
    "desk": ["203.0.113.0/29", "2001:db8:7::/64"],
    "between": ["198.51.100.5-198.51.100.9"],
    "mapped": ["::ffff:192.0.2.0/120"],
    "free": [],
}

#: What is asked about, user, address, and the answer.
TABLE: tuple[tuple[str, str, str, bool], ...] = (
    ("IPv4", "desk", "203.0.113.5", True),
    ("IPv4", "desk", "203.0.113.8", False),
    ("IPv6", "desk", "2001:db8:7::1", True),
    ("IPv6", "desk", "2001:db8:8::1", False),
    ("another spelling of IPv6", "desk", "2001:0DB8:0007:0:0:0:0:1", True),
    ("another spelling of IPv6", "desk", "2001:0DB8:0008:0:0:0:0:1", False),
    ("IPv4-mapped login", "desk", "::ffff:203.0.113.5", True),
    ("IPv4-mapped login", "desk", "::ffff:203.0.113.8", False),
    ("IPv4-mapped login", "desk", "::ffff:cb00:7105", True),
    ("IPv4-mapped restriction", "mapped", "192.0.2.7", True),
    ("IPv4-mapped restriction", "mapped", "192.0.3.7", False),
    ("leading zeros", "desk", "203.0.113.05", False),
    ("leading zeros", "desk", "0313.0.113.5", False),
    ("malformed", "desk", "203.0.113.5.evil", False),
    ("malformed", "desk", "203.0.113", False),
    ("malformed", "desk", "203.0.113.5\n", False),
    ("malformed", "desk", " 203.0.113.5", False),
    ("malformed", "desk", "203.0.113.5/32", False),
    ("malformed", "desk", "2001:db8:7::1%eth0", False),
    ("malformed", "desk", "3405803781", False),
    ("malformed", "desk", "", False),
    ("users apart", "between", "203.0.113.5", False),
    ("users apart", "desk", "198.51.100.5", False),
    ("range", "between", "198.51.100.5", True),
    ("range", "between", "198.51.100.9", True),
    ("range", "between", "198.51.100.4", False),
    ("range", "between", "198.51.100.10", False),
    ("no restrictions", "free", "203.0.113.5", True),
    ("no restrictions", "free", "2001:db8:8::1", True),
    ("malformed, for who may come from anywhere", "free", "203.0.113.5.evil", False),
    ("username in capitals", "DESK", "203.0.113.5", True),
    ("username in capitals", "DESK", "203.0.113.8", False),
)


#: What is asked about, and the address.
Question = tuple[str, str]


@dataclass
class Answers:
    """How a peer answers the table.

    Attributes:
        right: How many questions it answers as ipguard does.
        lets_in: The others; here those who must not come in and are let in.
        keeps_out: Those who may come in and are kept out.
        raises: Those where the answer is an exception.
        error: Why it could not be asked at all.
    """

    right: int = 0
    lets_in: list[Question] = field(default_factory=list)
    keeps_out: list[Question] = field(default_factory=list)
    raises: list[Question] = field(default_factory=list)
    error: str | None = None


def ours_is_right() -> None:
    """Check the table itself.

    Raises:
        AssertionError: ipguard answers otherwise.
    """
    guard = guard_of(POLICIES)
    for _, user, ip, wanted in TABLE:
        for _ in range(2):  # read, and remembered
            assert guard.is_allowed(user, ip) is wanted, (user, ip)


def ask(peer: Peer) -> Answers:
    """Let a peer answer the table."""
    answers, left_out = Answers(), ""
    try:
        put = peer.load({user: list(texts) for user, texts in POLICIES.items()})
    except Exception:
        # One policy may be more than it can take; without it the others can be asked.
        try:
            put = peer.load({**POLICIES, "mapped": ["192.0.2.0/24"]})
        except Exception as exc:
            answers.error = f"{type(exc).__name__}: {exc}".splitlines()[0][:300]
            return answers
        left_out = "mapped"
    for about, user, ip, wanted in TABLE:
        try:
            got = None if user == left_out else bool(put(user, ip))
        except Exception:
            got = None
        if got is wanted:
            answers.right += 1
        else:
            where = {True: answers.lets_in, False: answers.keeps_out, None: answers.raises}
            where[got].append((about, ip))
    return answers


def ask_all() -> dict[str, Answers]:
    return {peer.name: ask(peer) for peer in PEERS}


if __name__ == "__main__":
    ours_is_right()
    print(json.dumps({name: asdict(answers) for name, answers in ask_all().items()}))
