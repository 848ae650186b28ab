"""What an adopter might use instead, each as its own documentation advises and at its fastest.

Most of them know no users: then a dict of ours finds a user's own, and `lacks` says so. The answers
of all are compared with ipguard's on the table in `common.py` before anything is timed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers import databases, engines, tries, web, written
from benchmarks.work import Ask, Policies


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One of them.

    Attributes:
        name: What it is called in the tables.
        packages: Which packages it is, for their versions.
        load: Makes it know the policies, and returns what is asked: `ask(user, ip)` is whether it
            lets in.
        how: How it is used.
        lacks: What it has no notion of, so that it is ours, or missing.
        linear: Whether it looks at every user's rule, or takes long to make: then it is asked about
            fewer users than the others.
        cached: Whether it remembers answers.
    """

    name: str
    packages: tuple[str, ...]
    load: Callable[[Policies], Ask]
    how: str
    lacks: str = ""
    linear: bool = False
    cached: bool = False

    def version(self) -> str:
        """Return the versions of its packages, or why it is not there."""
        try:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)
        except importlib.metadata.PackageNotFoundError as exc:
            return f"not installed: {exc}"


_USERS = "users (a dict of ours), how old what it knows is"

PEERS = (
    Peer(
        name="TTLCache + netaddr",
        packages=("cachetools", "netaddr"),
        load=written.ttl_cache_over_netaddr,
        how="answers in a TTLCache of 5 s, under a lock; else a list of IPNetwork is asked",
        lacks="all of it is written for this; the packages cache and match",
        cached=True,
    ),
    Peer(
        name="TTLCache + ipaddress",
        packages=("cachetools",),
        load=written.ttl_cache_over_ipaddress,
        how="the same over the standard library's ip_network",
        lacks="all of it is written for this; the packages cache and match",
        cached=True,
    ),
    Peer(
        name="netaddr.IPSet",
        packages=("netaddr",),
        load=written.ipset,
        how="`IPAddress(ip) in IPSet`, one set for each user",
        lacks=_USERS,
    ),
    Peer(
        name="pytricia",
        packages=("pytricia",),
        load=tries.pytricia,
        how="`ip in PyTricia`, frozen, one for each user and version",
        lacks=f"{_USERS}; ranges (split into networks)",
    ),
    Peer(
        name="py-radix",
        packages=("py-radix",),
        load=tries.py_radix,
        how="`Radix.search_best(ip)`, one for each user",
        lacks=f"{_USERS}; ranges (split into networks)",
    ),
    Peer(
        name="pycasbin Enforcer",
        packages=("pycasbin",),
        load=engines.casbin_enforcer,
        how="`enforce(user, ip)` with the matcher `r.sub == p.sub && ipMatch(r.ip, p.net)`",
        lacks="users without restrictions; ranges (split into networks); how old what it knows is",
        linear=True,
    ),
    Peer(
        name="pycasbin FastEnforcer",
        packages=("pycasbin",),
        load=engines.casbin_fast_enforcer,
        how="the same with `cache_key_order=[0, 1]`, which picks the user's rules first",
        lacks="users without restrictions; ranges (split into networks); how old what it knows is",
    ),
    Peer(
        name="cedarpy",
        packages=("cedarpy",),
        load=engines.cedar,
        how="`is_authorized` with a PolicySet and Entities parsed before",
        lacks="ranges (split into networks); how old what it knows is",
        linear=True,
    ),
    Peer(
        name="guard-core",
        packages=("guard-core",),
        load=web.guard_core,
        how="`is_ip_allowed(ip, config)`, synchronous, one SecurityConfig for each user",
        lacks=f"{_USERS}; ranges (split into networks)",
        linear=True,
    ),
    Peer(
        name="django-fast-iprestrict",
        packages=("django-fast-iprestrict", "Django"),
        load=web.fast_iprestrict,
        how="`Rule.objects.match_ip(ip, rule_id=...)`, one rule for each user, its own local cache",
        lacks=f"{_USERS}; ranges (split into networks)",
        linear=True,
    ),
    Peer(
        name="PostgreSQL inet",
        packages=("psycopg", "psycopg-pool"),
        load=databases.postgres_inet,
        how="`ip <<= network`, prepared, autocommit, through psycopg_pool",
        lacks="ranges (split into networks)",
    ),
)
