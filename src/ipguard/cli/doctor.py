"""`doctor`: is all well, and if not, what is to be done?"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import unquote

import attrs
import typer

from ipguard.cli._app import KEY, MAIL, SETTINGS, command
from ipguard.cli._call import Call
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._secret import read_keys
from ipguard.confirmation import Keyring
from ipguard.errors import IPGuardError, StoreError, StoreUnavailable
from ipguard.store import RestrictionStore
from ipguard.stores.sqlite import SCHEMA_VERSION

_SKEW: Final = 2.0  # seconds that nobody would notice
_NAMED: Final = 10
_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


@attrs.frozen
class Finding:
    """One line of the diagnosis.

    Attributes:
        check: What was looked at.
        state: `ok`, `warn` or `fail`.
        found: What it is like.
        todo: What to do, or "".
    """

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    todo: str = ""


Findings = Iterator[Finding]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, KEY, MAIL, SETTINGS)(doctor)


def doctor(
    call: Call,
    *,
    send_test: Annotated[
        str | None, typer.Option("--send-test", metavar="ADDRESS", help="Mail a test there.")
    ] = None,
) -> int:
    """Look whether all is well, and say what to do.

    It changes nothing. The exit code is 11 where something fails.
    """
    found: list[Finding] = []

    def tell(findings: Findings) -> None:
        for finding in findings:
            found.append(finding)
            todo = f" - {finding.todo}" if finding.todo else ""
            style = _STYLES[finding.state]
            call.out.line(f"{finding.state:<4}  {finding.check}: {finding.found}{todo}", style)
            call.out.flush()

    tell(_guarded("store", lambda: _store(call, tell)))
    tell(_guarded("key", lambda: _key(call)))
    tell(_guarded("settings", lambda: _settings(call)))
    tell(_guarded("mail", lambda: _mail(call, send_test)))
    if call.out.as_json:
        call.out.data({"healthy": all(f.state != "fail" for f in found), "findings": found})
    return Exit.UNHEALTHY if any(f.state == "fail" for f in found) else Exit.OK


def _guarded(check: str, look: Callable[[], Findings]) -> Findings:
    """Make a finding of what keeps from looking."""
    try:
        yield from look()
    except Problem as exc:
        yield Finding(check, "fail", exc.message, exc.hint)
    except IPGuardError as exc:
        yield Finding(check, "fail", str(exc), _TODO.get(type(exc).__name__, ""))


_TODO: Final = {
    "StoreUnavailable": "is it running, and can it be reached from here?",
    "SchemaVersionError": "ipguard init makes a new store, ipguard migrate brings one up to date",
    "StoreConfigError": "correct --store or IPGUARD_URL",
}


def _store(call: Call, tell: Callable[[Findings], None]) -> Findings:
    with call.store() as store:
        began = time.perf_counter()
        try:
            head = store.changes_since(None).head
        except StoreUnavailable as exc:
            causes = _causes(call.url)
            if not causes:
                raise
            tell(iter(causes))
            yield Finding("store", "fail", str(exc))
            return
        took = (time.perf_counter() - began) * 1000
        place = repr(store).strip("<>")
        yield Finding("store", "ok", f"{place} answers in {took:.0f} ms, revision {head}")
        fits = f"fits this library, which is of version {SCHEMA_VERSION}"
        yield Finding("schema", "ok", fits)
        tell(_guarded("clock", lambda: _clock(store)))
        scheme = call.url.partition("://")[0].lower()
        if scheme == "sqlite":
            tell(_guarded("permissions", lambda: _sqlite(call)))
        elif scheme in ("postgresql", "postgres"):
            from ipguard.cli._doctor_postgres import look

            tell(_guarded("role", lambda: look(call.url, store, head)))
        tell(_guarded("restrictions", lambda: _restrictions(store)))


def _causes(url: str) -> list[Finding]:
    """Return what makes a server that can be reached refuse to answer, if that is known."""
    if url.partition("://")[0].lower() not in ("postgresql", "postgres"):
        return []
    from ipguard.cli._doctor_postgres import explain

    with suppress(StoreError):
        return list(explain(url))
    return []


def _clock(store: RestrictionStore) -> Findings:
    skew = (store.now() - datetime.now(UTC)).total_seconds()
    if abs(skew) <= _SKEW:
        yield Finding("clock", "ok", "the store's and this host's agree")
        return
    yield Finding(
        "clock",
        "warn",
        f"the store's is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this host's",
        "set both by NTP: the store's decides when temporary restrictions and numbers end",
    )


def _sqlite(call: Call) -> Findings:
    place = call.url.partition("://")[2].partition("?")[0]
    path = Path(unquote(place[1:], errors="surrogateescape"))
    yield _mode("permissions", path)
    folder = path.absolute().parent
    if not os.access(folder, os.W_OK):
        yield Finding(
            "permissions", "fail", f"{folder} is not writable", "SQLite keeps two more files there"
        )


def _mode(check: str, path: Path) -> Finding:
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        found = f"others than its owner have rights to {path} (mode {mode & 0o777:o})"
        return Finding(check, "warn", found, f"chmod 600 {path}")
    return Finding(check, "ok", f"{path} is its owner's alone")


def _restrictions(store: RestrictionStore) -> Findings:
    """Look for users whom nothing lets in any more."""
    nowhere: list[str] = []
    users = restrictions = count = 0
    now = store.now()
    _, policies = store.load_all_policies()
    with closing(policies):  # type: ignore[type-var]
        for username, policy in policies:
            users += 1
            restrictions += len(policy.restrictions)
            if all(r.expired(now) for r in policy.restrictions):
                count += 1
                if count <= _NAMED:
                    nowhere.append(username)
    yield Finding("restrictions", "ok", f"{restrictions:,}, for {users:,} users")
    if count:
        more = f" and {count - _NAMED:,} more" if count > _NAMED else ""
        yield Finding(
            "restrictions",
            "warn",
            f"{count:,} can log in from nowhere, as all theirs have expired:"
            f" {', '.join(nowhere)}{more}",
            "ipguard impose gives a new one; ipguard lift of the last opens the user",
        )


def _key(call: Call) -> Findings:
    path = call.given.get("key_file") or os.environ.get("IPGUARD_KEY_FILE")
    keys = read_keys(call.given.get("key_file"))
    Keyring(keys)
    several = f"{len(keys)} keys, of which the first mints" if len(keys) > 1 else "one key"
    yield Finding("key", "ok", several)
    if path:
        yield _mode("key", Path(path))


def _settings(call: Call) -> Findings:
    settings = call.settings()
    if settings.confirm_deletes is False:
        yield Finding(
            "settings",
            "warn",
            "anybody who administers can delete a user's last restriction without a number",
            'confirm_deletes = "last", in the settings here and on the servers',
        )
    else:
        yield Finding("settings", "ok", f"confirm_deletes is {settings.confirm_deletes}")


def _mail(call: Call, send_test: str | None) -> Findings:
    from ipguard.mail import EmailNotifier

    notifier = call.notifier()
    if not isinstance(notifier, EmailNotifier):
        todo = "name a mail server: --mail smtp://127.0.0.1, or IPGUARD_MAIL"
        if send_test is None:
            yield Finding("mail", "warn", "is printed, not sent", todo)
        else:
            found = f"no test was sent to {send_test}: mail is printed, not sent"
            yield Finding("mail", "fail", found, todo)
        return
    if send_test is None:
        yield Finding("mail", "ok", f"{notifier!r}".strip("<>") + ", not tried: --send-test")
        return
    notifier.send_test(send_test)
    yield Finding("mail", "ok", f"{notifier!r}".strip("<>") + f" took a test for {send_test}")
