"""Middleware of web frameworks: the check that is inside it, without the request around it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.peers.written import as_networks
from benchmarks.work import Ask, Policies


def guard_core(policies: Policies) -> Ask:
    from guard_core import SecurityConfig  # noqa: PLC0415
    from guard_core.sync.utils import is_ip_allowed  # noqa: PLC0415

    held = {
        user: SecurityConfig(whitelist=tuple(net for text in texts for net in as_networks(text)))
        for user, texts in policies.items()
    }

    def ask(user: str, ip: str) -> bool:
        return is_ip_allowed(ip, held[user])

    return ask


def fast_iprestrict(policies: Policies) -> Ask:
    import django  # noqa: PLC0415
    from django.conf import settings  # noqa: PLC0415
    from django.core.management import call_command  # noqa: PLC0415

    if not settings.configured:
        folder = Path(tempfile.mkdtemp(prefix="ipguard-bench-"))
        settings.configure(
            INSTALLED_APPS=["django_fast_iprestrict"],
            DATABASES={
                "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": folder / "rules.db"}
            },
            IPRESTRICT_DEFAULT_ACTION="deny",
            USE_TZ=True,
        )
        django.setup()
        call_command("migrate", verbosity=0)
    from django_fast_iprestrict.models import Rule, RuleNetwork  # noqa: PLC0415

    Rule.objects.all().delete()
    restricted = {user: texts for user, texts in policies.items() if texts}
    Rule.objects.bulk_create(
        Rule(name=user[:50], action="a", position=number) for number, user in enumerate(restricted)
    )
    rules = dict(Rule.objects.values_list("name", "id"))
    RuleNetwork.objects.bulk_create(
        RuleNetwork(rule_id=rules[user], network=network)
        for user, texts in restricted.items()
        for text in texts
        for network in as_networks(text)
    )
    Rule.objects.clear_local_caches()
    match = Rule.objects.match_ip

    def ask(user: str, ip: str) -> bool:
        rule = rules.get(user)
        if rule is None:
            return True
        return match(ip, rule_id=rule, remote=False)[1] == "a"

    return ask
