"""Radix trees in C: the fastest there is for finding the network that holds an address."""

from __future__ import annotations

import socket

from benchmarks.peers.written import as_networks
from benchmarks.work import Ask, Policies


def pytricia(policies: Policies) -> Ask:
    from pytricia import PyTricia  # noqa: PLC0415 - each peer may be missing

    held = {}
    for user, texts in policies.items():
        four, six = PyTricia(32), PyTricia(128, socket.AF_INET6)
        for text in texts:
            for network in as_networks(text):
                (six if ":" in network else four).insert(network, True)
        if texts:
            four.freeze()  # compacts it, for faster access
            six.freeze()
            held[user] = four, six

    def ask(user: str, ip: str) -> bool:
        tries = held.get(user)
        return tries is None or ip in tries[":" in ip]

    return ask


def py_radix(policies: Policies) -> Ask:
    from radix import Radix  # noqa: PLC0415

    held = {}
    for user, texts in policies.items():
        tree = Radix()
        for text in texts:
            for network in as_networks(text):
                tree.add(network)
        if texts:
            held[user] = tree.search_best

    def ask(user: str, ip: str) -> bool:
        best = held.get(user)
        return best is None or best(ip) is not None

    return ask
