"""What most would write themselves: a cache with a lock over a list of networks; or an IPSet."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable
from typing import Any

import netaddr
from cachetools import TTLCache

from benchmarks.work import Ask, Policies

Match = Callable[[str, str], bool]


def ttl_cache_over_netaddr(policies: Policies) -> Ask:
    held = {
        user: [
            netaddr.IPRange(*text.split("-")) if "-" in text else netaddr.IPNetwork(text)
            for text in texts
        ]
        for user, texts in policies.items()
    }

    def match(user: str, ip: str) -> bool:
        try:
            # INET_PTON: without it netaddr reads `10.1` and `010.0.0.1` as inet_aton does.
            address = netaddr.IPAddress(ip, flags=netaddr.INET_PTON)
        except (netaddr.AddrFormatError, ValueError):
            return False
        networks = held.get(user)
        return not networks or any(address in network for network in networks)

    return _remembering(match, len(policies))


def ttl_cache_over_ipaddress(policies: Policies) -> Ask:
    held: dict[str, list[Any]] = {
        user: [
            network
            for text in texts
            for network in (
                ipaddress.summarize_address_range(*map(ipaddress.ip_address, text.split("-")))
                if "-" in text
                else (ipaddress.ip_network(text),)
            )
        ]
        for user, texts in policies.items()
    }

    def match(user: str, ip: str) -> bool:
        try:
            address = ipaddress.ip_address(ip)
        except ValueError:
            return False
        networks = held.get(user)
        return not networks or any(address in network for network in networks)

    return _remembering(match, len(policies))


def _remembering(match: Match, users: int) -> Ask:
    # Room for each user and then some; the age is that of a guard's lease.
    cache: TTLCache[tuple[str, str], bool] = TTLCache(maxsize=max(1000, 2 * users), ttl=5.0)
    lock = threading.Lock()

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


def ipset(policies: Policies) -> Ask:
    held = {
        user: netaddr.IPSet(
            netaddr.IPRange(*text.split("-")) if "-" in text else netaddr.IPNetwork(text)
            for text in texts
        )
        for user, texts in policies.items()
    }
    address, flags = netaddr.IPAddress, netaddr.INET_PTON

    def ask(user: str, ip: str) -> bool:
        networks = held.get(user)
        client = address(ip, flags=flags)
        return not networks or client in networks

    return ask


def as_networks(text: str) -> list[str]:
    """Split a range into networks, for those that know no ranges."""
    if "-" not in text:
        return [text]
    return [str(network) for network in netaddr.iprange_to_cidrs(*text.split("-"))]
