"""Peers: packages that adopters might use instead, each as its documentation advises.

Most of them know no users: then a dict finds a user's own object, and `lacks` says so. Before
anything is timed, every peer answers common questions.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import logging
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netaddr
from cachetools import TTLCache

from benchmarks.fixtures import Ask, Policies, guard_of, server


def rules(policies: Policies) -> Iterator[tuple[str, str]]:
    """Yield every user with each of their networks; ranges are split into networks."""
    for user, texts in policies.items():
        for text in texts:
            first, dash, last = text.partition("-")
            for network in netaddr.iprange_to_cidrs(first, last) if dash else [text]:
                yield user, str(network)


def ttl_cache(policies: Policies) -> Ask:
    held: dict[str, list[Any]] = {user: [] for user in policies}
    for user, text in rules(policies):
        held[user].append(ipaddress.ip_network(text))
    # Room for every user; the age is that of a guard's lease.
    cache: TTLCache[tuple[str, str], bool] = TTLCache(maxsize=max(1000, 2 * len(held)), ttl=5.0)
    lock = threading.Lock()

    def match(user: str, ip: str) -> bool:
        try:
            client = ipaddress.ip_address(ip)
        except ValueError:
            return False
        listed = held.get(user)
        return not listed or any(client in network for network in listed)

    def ask(user: str, ip: str) -> bool:
        key = user, ip
        with lock:
            try:
                return cache[key]
            except KeyError:
                pass
        answer = match(user, ip)
        with lock:
            cache[key] = answer
        return answer

    return ask


def pytricia(policies: Policies) -> Ask:
    from pytricia import PyTricia  # noqa: PLC0415 - each peer may be missing

    held: dict[str, tuple[Any, Any]] = {}
    for user, network in rules(policies):
        if user not in held:
            held[user] = PyTricia(32), PyTricia(128, socket.AF_INET6)
        held[user][":" in network].insert(network, True)
    for tries in held.values():
        for trie in tries:
            trie.freeze()  # compacts it, for faster access

    def ask(user: str, ip: str) -> bool:
        tries = held.get(user)
        return tries is None or ip in tries[":" in ip]

    return ask


def py_radix(policies: Policies) -> Ask:
    from radix import Radix  # noqa: PLC0415

    trees: dict[str, Any] = {}
    for user, network in rules(policies):
        trees.setdefault(user, Radix()).add(network)
    held = {user: tree.search_best for user, tree in trees.items()}

    def ask(user: str, ip: str) -> bool:
        best = held.get(user)
        return best is None or best(ip) is not None

    return ask


_CASBIN = """
[request_definition]
r = sub, act, ip
[policy_definition]
p = sub, act, net
[policy_effect]
e = some(where (p.eft == allow))
[matchers]
m = r.sub == p.sub && r.act == p.act && ipMatch(r.ip, p.net)
"""


def casbin(policies: Policies) -> Ask:
    from casbin import FastEnforcer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        # Loaded from files: adding rules one by one takes quadratic time.
        model, policy = Path(folder, "model.conf"), Path(folder, "policy.csv")
        model.write_text(_CASBIN)
        policy.write_text("\n".join(f"p, {user}, login, {net}" for user, net in rules(policies)))
        enforcer = FastEnforcer(str(model), str(policy), cache_key_order=[0, 1])
    logging.getLogger("casbin").setLevel(logging.WARNING)  # it would log each decision
    enforce = enforcer.enforce
    return lambda user, ip: enforce(user, "login", ip)


_INET = """
SELECT NOT EXISTS (SELECT FROM bench_peer WHERE username = %s)
    OR EXISTS (SELECT FROM bench_peer WHERE username = %s AND %s::inet <<= network)
"""


def postgres_inet(policies: Policies) -> Ask:
    from psycopg_pool import ConnectionPool  # noqa: PLC0415

    pool = ConnectionPool(server(), kwargs={"autocommit": True}, min_size=1, max_size=1, open=True)
    with pool.connection() as connection, connection.cursor() as cursor:
        # A session's own, so that each process has its table.
        cursor.execute("DROP TABLE IF EXISTS bench_peer")
        cursor.execute("CREATE TEMP TABLE bench_peer (username text, network inet)")
        with cursor.copy("COPY bench_peer FROM STDIN") as copy:
            for rule in rules(policies):
                copy.write_row(rule)
        cursor.execute("CREATE INDEX ON bench_peer (username, network)")
        cursor.execute("ANALYZE bench_peer")

    def ask(user: str, ip: str) -> bool:
        with pool.connection() as connection:
            found = connection.execute(_INET, (user, user, ip), prepare=True).fetchone()
        return found is not None and found[0]

    return ask


@dataclass(frozen=True)
class Peer:
    """Something that ipguard is compared with."""

    name: str
    packages: tuple[str, ...]
    load: Callable[[Policies], Ask]  # gives it the policies and returns `ask(user, ip)`
    how: str
    lacks: str  # parts of ipguard that it does not have

    def version(self) -> str:
        """Return the versions of its packages."""
        try:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)
        except importlib.metadata.PackageNotFoundError as exc:
            return f"not installed: {exc}"


_USERS = "users, ranges, news of a change"

PEERS = (
    Peer("TTLCache + ipaddress", ("cachetools",), ttl_cache,
         "a `TTLCache` of 5 s under a lock, over a list of `ip_network`",
         "news of a change; the rest is written around the packages"),
    Peer("pytricia", ("pytricia",), pytricia,
         "`ip in PyTricia`, frozen, one for each user and version", _USERS),
    Peer("py-radix", ("py-radix",), py_radix, "`Radix.search_best(ip)`, one for each user", _USERS),
    Peer("pycasbin", ("pycasbin",), casbin,
         "`FastEnforcer.enforce` with `ipMatch`, `cache_key_order=[0, 1]`",
         "ranges, news of a change, users without restrictions"),
    Peer("PostgreSQL inet", ("psycopg", "psycopg-pool"), postgres_inet,
         "`ip <<= network`, prepared, through psycopg_pool", "ranges, a cache"),
)  # fmt: skip


# ------------------------------------------------------------------- what they answer

POLICIES: Policies = {
    "desk": ["203.0.113.0/29", "2001:db8:7::/64"],
    "between": ["198.51.100.5-198.51.100.9"],
    "mapped": ["::ffff:192.0.2.0/120"],
    "free": [],
}

_MALFORMED = (
    "203.0.113.5.evil", "203.0.113", "203.0.113.5\n", " 203.0.113.5", "203.0.113.5/32",
    "2001:db8:7::1%eth0", "3405803781", "",
)  # fmt: skip
_BESIDE_RANGE = ("203.0.113.5", "198.51.100.4", "198.51.100.10")
TABLE: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("IPv4", "desk", ("203.0.113.5",), ("203.0.113.8", "198.51.100.5")),
    ("IPv6", "desk", ("2001:db8:7::1",), ("2001:db8:8::1",)),
    ("long IPv6", "desk", ("2001:0DB8:0007:0:0:0:0:1",), ("2001:0DB8:0008:0:0:0:0:1",)),
    ("mapped login", "desk", ("::ffff:203.0.113.5", "::ffff:cb00:7105"), ("::ffff:203.0.113.8",)),
    ("mapped restriction", "mapped", ("192.0.2.7",), ("192.0.3.7",)),
    ("leading zeros", "desk", (), ("203.0.113.05", "0313.0.113.5")),
    ("malformed", "desk", (), _MALFORMED),
    ("range", "between", ("198.51.100.5", "198.51.100.9"), _BESIDE_RANGE),
    ("no restrictions", "free", ("203.0.113.5", "2001:db8:8::1"), ("203.0.113.5.evil",)),
    ("username in capitals", "DESK", ("203.0.113.5",), ("203.0.113.8",)),
)
"""What is asked about, the username, the addresses to allow, and those to refuse."""
QUESTIONS = [
    (about, user, ip, answer)
    for about, user, *both in TABLE
    for ips, answer in zip(both, (True, False), strict=True)
    for ip in ips
]

Differences = dict[str, list[list[str]]]
"""The questions that a peer answers otherwise, by what it does instead."""


def check_ours() -> None:
    """Check that ipguard gives the table's answers, from its store and from memory."""
    guard = guard_of(POLICIES)
    for _, user, ip, answer in 2 * QUESTIONS:
        assert guard.is_allowed(user, ip) is answer, (user, ip)


def ask(peer: Peer) -> Differences:
    """Return the questions that a peer answers otherwise, by its answer."""
    found: Differences = {"lets in": [], "keeps out": [], "raises": []}
    try:
        asked = peer.load(POLICIES)
    except Exception:  # a policy that it cannot hold: it is asked without it
        asked = peer.load({**POLICIES, "mapped": ["192.0.2.0/24"]})
        found["keeps out"] += [["mapped restriction", "192.0.2.7"]]
    for about, user, ip, answer in QUESTIONS:
        try:
            given = bool(asked(user, ip))
        except Exception:
            found["raises"].append([about, ip])
        else:
            if given is not answer:
                found["lets in" if given else "keeps out"].append([about, ip])
    return found


def ask_all() -> dict[str, Differences | str]:
    """Ask every peer; the error of a peer that cannot be asked stands for its answers."""
    answers: dict[str, Differences | str] = {}
    for peer in PEERS:
        try:
            answers[peer.name] = ask(peer)
        except Exception as exc:
            answers[peer.name] = f"{type(exc).__name__}: {exc}".splitlines()[0][:300]
    return answers


if __name__ == "__main__":
    check_ours()
    print(json.dumps(ask_all()))
