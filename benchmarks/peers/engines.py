"""Policy engines, which decide more than addresses."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from benchmarks.peers.written import as_networks
from benchmarks.work import Ask, Policies

_MODEL = """
[request_definition]
r = sub, ip

[policy_definition]
p = sub, net

[policy_effect]
e = some(where (p.eft == allow))

[matchers]
m = r.sub == p.sub && ipMatch(r.ip, p.net)
"""


def casbin_enforcer(policies: Policies) -> Ask:
    from casbin import Enforcer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        enforcer = Enforcer(
            *_files(folder, _MODEL, [f"p, {u}, {net}" for u, net in _rules(policies)])
        )
    logging.getLogger("casbin").setLevel(logging.WARNING)  # it would log each decision
    return enforcer.enforce


def casbin_fast_enforcer(policies: Policies) -> Ask:
    from casbin import FastEnforcer  # noqa: PLC0415

    # It picks rules by two fields at the least, so there is an action as well.
    model = _MODEL.replace("sub, ip", "sub, act, ip").replace("sub, net", "sub, act, net")
    model = model.replace("p.sub &&", "p.sub && r.act == p.act &&")
    rules = [f"p, {user}, login, {network}" for user, network in _rules(policies)]
    with tempfile.TemporaryDirectory() as folder:
        enforcer = FastEnforcer(*_files(folder, model, rules), cache_key_order=[0, 1])
    logging.getLogger("casbin").setLevel(logging.WARNING)
    enforce = enforcer.enforce

    def ask(user: str, ip: str) -> bool:
        return enforce(user, "login", ip)

    return ask


def _files(folder: str, model: str, rules: list[str]) -> tuple[str, str]:
    """Write what it loads; adding rules one by one takes it a time that grows with their square."""
    paths = Path(folder) / "model.conf", Path(folder) / "policy.csv"
    for path, text in zip(paths, (model, "\n".join(rules)), strict=True):
        path.write_text(text)
    return str(paths[0]), str(paths[1])


def _rules(policies: Policies) -> list[list[str]]:
    return [
        [user, network]
        for user, texts in policies.items()
        for text in texts
        for network in as_networks(text)
    ]


def cedar(policies: Policies) -> Ask:
    from cedarpy import Entities, PolicySet, is_authorized  # noqa: PLC0415

    texts = ['permit (principal, action == Action::"login", resource) unless { principal.listed };']
    texts += [
        f'permit (principal == User::"{user}", action == Action::"login", resource)'
        f' when {{ context.ip.isInRange(ip("{network}")) }};'
        for user, network in _rules(policies)
    ]
    rules = PolicySet.from_str("\n".join(texts))
    entities = Entities.from_json_str(
        json.dumps(
            [
                {
                    "uid": {"type": "User", "id": user},
                    "attrs": {"listed": bool(held)},
                    "parents": [],
                }
                for user, held in policies.items()
            ]
        )
    )

    def ask(user: str, ip: str) -> bool:
        request = {
            "principal": f'User::"{user}"',
            "action": 'Action::"login"',
            "resource": 'Site::"this"',
            "context": {"ip": {"__extn": {"fn": "ip", "arg": ip}}},
        }
        return is_authorized(request, rules, entities).allowed

    return ask
