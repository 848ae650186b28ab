"""`doctor`: check the store, the key, the settings and the mail server, and advise what to do.

With the headers of a request, it explains which address is the client's instead.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal
from urllib.parse import unquote

import attrs
from typer import Option

from ipguard.cli._context import KEY, MAIL, SETTINGS, Context, command
from ipguard.cli._output import Exit, Problem
from ipguard.cli._secrets import read_keys
from ipguard.client_address import ClientAddress
from ipguard.errors import IPGuardError, StoreError, StoreUnavailable, shorten
from ipguard.model import Direction, RequestKind
from ipguard.rules import all_expired, demanded
from ipguard.store import RestrictionStore

if TYPE_CHECKING:
    from ipguard.stores.postgres import Examination, PostgresStore

_SKEW: Final = 2.0  # a difference of clocks, in seconds, that does no harm
_NAMED: Final = 10
_LISTEN_TIMEOUT: Final = 5.0
_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "red"}
_ADVICE: Final = {
    "StoreUnavailable": "is it running, and can this host reach it?",
    "SchemaVersionError": "ipguard init makes a new store, ipguard migrate updates one",
    "StoreConfigError": "correct --store or IPGUARD_URL",
}
_GRANTS: Final = "ipguard migrate --sql --reader ROLE --writer ROLE prints the grants"

State = Literal["ok", "warn", "fail"]


@attrs.frozen
class Finding:
    """One line of the report: a check, its result and advice."""

    check: str
    state: State
    found: str
    todo: str = ""


Findings = Iterator[Finding]


@command(KEY, MAIL, SETTINGS)
def doctor(
    context: Context,
    *,
    send_test: Annotated[
        str | None, Option("--send-test", metavar="ADDRESS", help="Mail a test to it.")
    ] = None,
    headers: Annotated[
        str,
        Option("--headers", metavar="LINES", help="A request's headers to explain; - is stdin."),
    ] = "",
    header: Annotated[
        str, Option("--header", metavar="NAME", help="The one that the proxies write.")
    ] = "X-Forwarded-For",
    peer: Annotated[
        str,
        Option(
            "--peer", metavar="ADDRESS", help="The connection's peer.  [default: a Unix socket]"
        ),
    ] = "",
    proxy: Annotated[
        list[str] | None, Option("--proxy", metavar="ADDRESS", help="A trusted proxy or network.")
    ] = None,
    hops: Annotated[int | None, Option("--hops", help="The number of proxies.")] = None,
    unix_socket: Annotated[
        bool, Option("--unix-socket", help="Trust the peer of a Unix socket.")
    ] = False,
) -> int:
    """Check the store, key, settings and mail server; or explain the headers of a proxy.

    Nothing is changed; the exit code is 11 if a check fails.

    Example: ipguard doctor --send-test you@example.com

    Example: ipguard doctor --proxy 10.0.0.5 --peer 10.0.0.5 --headers "X-Forwarded-For: 192.0.2.1"
    """
    checks = [
        _guarded("store", lambda: _store(context)),
        _guarded("key", lambda: _key(context)),
        _guarded("settings", lambda: _settings(context)),
        _guarded("mail", lambda: _mail(context, send_test)),
    ]
    if headers or peer or proxy or hops is not None or unix_socket:
        proxies = proxy or ([] if unix_socket and hops is None else None)
        text = sys.stdin.buffer.read().decode("latin-1") if headers == "-" else headers

        def explain() -> Findings:
            client = ClientAddress(
                header=header, proxies=proxies, hops=hops, unix_socket=unix_socket
            )
            return _client(client, peer, text.splitlines())

        checks = [_guarded("client", explain)]
    found: list[Finding] = []
    for finding in chain(*checks):
        found.append(finding)
        todo = f" - {finding.todo}" if finding.todo else ""
        text = f"{finding.state:<4}  {finding.check}: {finding.found}{todo}"
        context.out.line(text, _STYLES[finding.state])
        sys.stdout.flush()
    healthy = all(finding.state != "fail" for finding in found)
    context.out.data({"healthy": healthy, "findings": found})
    return Exit.OK if healthy else Exit.UNHEALTHY


def _guarded(check: str, examine: Callable[[], Findings]) -> Findings:
    """Turn the error that ends a check into a finding."""
    try:
        yield from examine()
    except Problem as exc:
        yield Finding(check, "fail", exc.message, exc.hint)
    except IPGuardError as exc:
        yield Finding(check, "fail", str(exc), _ADVICE.get(type(exc).__name__, ""))


def _client(client: ClientAddress, peer: str, lines: list[str]) -> Findings:
    """Explain each step from the peer to the client's address."""
    name = client.header
    pairs = (line.partition(":") for line in lines)
    values = [value for found, _, value in pairs if found.strip().lower() == name.lower()]
    steps = client.explain(peer, values)
    for place, hop in enumerate(steps):
        known = hop.trusted or hop.address
        found = f"{shorten(hop.text)[1:-1] or 'an empty entry'} is {hop.reason}"
        networks = [str(run) for run in client.proxies or () if hop.address in run]
        if networks and networks != [hop.address]:
            found += f", in {networks[0]}"
        yield Finding(name if place else "peer", "ok" if known else "fail", found)
    if not values:
        yield Finding(name, "warn", "not among the headers", "--header names another one")
    elif not steps[0].trusted:
        option = "--proxy" if steps[0].address else "--unix-socket"
        yield Finding(name, "warn", "ignored", f"if the peer is a proxy of yours, use {option}")
    address = client.of(peer, values)
    if address:
        yield Finding("client", "ok", address)
    else:
        todo = f"each proxy has to add its peer's address to {name}"
        yield Finding("client", "fail", "unknown, and refused by every guard", todo)


def _permissions(check: str, path: Path) -> Finding:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        found = f"other users have rights to {path} (mode {mode:o})"
        return Finding(check, "warn", found, f"chmod 600 {path}")
    return Finding(check, "ok", f"only its owner has rights to {path}")


def _key(context: Context) -> Findings:
    path = context.options["key_file"]
    keys = read_keys(path)
    several = f"{len(keys)} keys, of which the first mints" if len(keys) > 1 else "one key"
    yield Finding("key", "ok", several)
    if path:
        yield _permissions("key", Path(path))


def _settings(context: Context) -> Findings:
    settings = context.settings()
    each = {name: getattr(settings, name) for name in ("add", "delete", "loosens", "opens")}
    demand = demanded(RequestKind.DELETE, Direction.OPENS, **each)
    if not demand:
        found = "an administrator can delete a user's last restriction without a number"
        todo = 'set confirm_deletes = "last" here and on the servers'
        yield Finding("settings", "warn", found, todo)
    else:
        needs = [f"approvals: {demand.approvals}", f"wait: {demand.wait}"]
        found = f"deleting a last restriction needs a number: {'yes' if demand.number else 'no'}"
        yield Finding("settings", "ok", ", ".join([found, *needs]))


def _mail(context: Context, send_test: str | None) -> Findings:
    from ipguard.mail import EmailNotifier

    notifier = context.mailer()
    server = f"{notifier!r}".strip("<>")
    if not isinstance(notifier, EmailNotifier):
        test = f"no test was sent to {send_test}: " if send_test else ""
        todo = "name a mail server: --mail smtp://127.0.0.1, or IPGUARD_MAIL"
        state: State = "fail" if send_test else "warn"
        yield Finding("mail", state, f"{test}mail is printed, not sent", todo)
    elif send_test is None:
        yield Finding("mail", "ok", f"{server}, not tested: use --send-test")
    else:
        notifier.send_test(send_test)
        yield Finding("mail", "ok", f"{server} accepted a test for {send_test}")


def _store(context: Context) -> Findings:
    from ipguard.stores.sqlite import SCHEMA_VERSION

    with context.store() as store:
        began = time.perf_counter()
        try:
            head = store.changes_since(None).head
        except StoreUnavailable as exc:
            causes = _causes(context)
            if not causes:
                raise
            yield from (*causes, Finding("store", "fail", str(exc)))
            return
        took = (time.perf_counter() - began) * 1000
        place = repr(store).strip("<>")
        yield Finding("store", "ok", f"{place} responds in {took:.0f} ms, revision {head}")
        yield Finding("schema", "ok", f"fits this version of ipguard, whose is {SCHEMA_VERSION}")
        yield from _guarded("clock", lambda: _clock(store))
        if context.scheme == "sqlite":
            yield from _guarded("permissions", lambda: _sqlite(context.url))
        elif context.scheme == "postgresql":
            yield from _guarded("role", lambda: _postgres(context.url, store, head))
        yield from _guarded("restrictions", lambda: _restrictions(store))


def _clock(store: RestrictionStore) -> Findings:
    skew = (store.now() - datetime.now(UTC)).total_seconds()
    if abs(skew) <= _SKEW:
        yield Finding("clock", "ok", "the store and this host agree")
        return
    found = f"the store is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this host"
    todo = "set both by NTP: the store's clock decides when restrictions and numbers expire"
    yield Finding("clock", "warn", found, todo)


def _restrictions(store: RestrictionStore) -> Findings:
    """Count restrictions, and find users whose restrictions have all expired."""
    shut: list[str] = []
    users = restrictions = 0
    now = store.now()
    _, policies = store.load_all_policies()
    with closing(policies):  # type: ignore[type-var]
        for username, policy in policies:
            users += 1
            restrictions += len(policy.restrictions)
            if all_expired(policy.restrictions, now):
                shut.append(username)
    yield Finding("restrictions", "ok", f"{restrictions:,} for {users:,} users")
    if shut:
        more = f" and {len(shut) - _NAMED:,} more" if len(shut) > _NAMED else ""
        found = f"{len(shut):,} users have only expired restrictions and can log in from no address"
        todo = "ipguard impose adds a restriction; ipguard lift of the last one opens the user"
        yield Finding("restrictions", "warn", f"{found}: {', '.join(shut[:_NAMED])}{more}", todo)


def _sqlite(url: str) -> Findings:
    place = url.partition("://")[2].partition("?")[0]
    path = Path(unquote(place[1:], errors="surrogateescape"))
    yield _permissions("permissions", path)
    folder = path.absolute().parent
    if not os.access(folder, os.W_OK):
        found = f"{folder} is not writable"
        yield Finding("permissions", "fail", found, "SQLite keeps two more files there")


def _causes(context: Context) -> list[Finding]:
    """Return known reasons for which a PostgreSQL server refuses to answer."""
    if context.scheme == "postgresql":
        from ipguard.stores.postgres import examine

        with suppress(StoreError):
            return list(_row_security(examine(context.url)))
    return []


def _postgres(url: str, store: RestrictionStore, head: int) -> Findings:
    from ipguard.stores.postgres import PostgresStore, examine

    assert isinstance(store, PostgresStore)
    found = examine(url)
    if found.recovering:
        recovery = "is in recovery: its data may be of any age"
        yield Finding("server", "warn", recovery, "name the primary")
    pooler = "there is one; no statement is prepared" if found.pooled else "there is none"
    yield Finding("pooler", "ok", pooler)
    yield _role(found)
    yield from _row_security(found)
    yield _listener(store, head, listens=found.listens)


def _role(found: Examination) -> Finding:
    role = found.role
    if found.rights == "owner":
        text = f"{role} may change the audit log, as its owner may"
        return Finding("role", "warn", text, _GRANTS)
    if found.rights == "none":
        return Finding("role", "fail", f"{role} may not read the restrictions", _GRANTS)
    if found.rights == "reader":
        return Finding("role", "ok", f"{role} is a reader: for login servers, not to administer")
    if not found.temporary:
        todo = f"GRANT TEMPORARY on the database to {role}"
        return Finding("role", "fail", f"{role} may not create temporary tables", todo)
    return Finding("role", "ok", f"{role} is a writer: it may administer")


def _row_security(found: Examination) -> Findings:
    if not found.row_security:
        return
    hidden = ", ".join(table for table, hides in found.row_security.items() if hides)
    off = f"ALTER TABLE {found.schema}. … DISABLE ROW LEVEL SECURITY"
    if hidden:
        text = f"hides rows of {hidden} from {found.role}, which makes every read of them fail"
        todo = f"{off}, or ALTER ROLE {found.role} BYPASSRLS"
        yield Finding("row security", "fail", text, todo)
    else:
        tables = ", ".join(found.row_security)
        text = f"is on for {tables}: it does not apply to {found.role}, but may to other roles"
        yield Finding("row security", "warn", text, off)


def _listener(store: PostgresStore, head: int, *, listens: bool) -> Finding:
    if not listens:
        return Finding("listener", "ok", "off: guards poll, a change takes up to a second")
    until, state = time.monotonic() + _LISTEN_TIMEOUT, ""
    while not state and time.monotonic() < until:
        try:
            store.wait(head, 0.05)
            state = store.wake_ups
        except StoreError as exc:
            state = f"polling: {exc}"
    if state.startswith("listening"):
        return Finding("listener", "ok", "wakes guards within milliseconds")
    reason = state.removeprefix("polling: ") or "no notification arrived"
    return Finding("listener", "warn", f"guards poll, a change takes up to a second: {reason}")
