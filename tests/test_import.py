"""What `import ipguard` brings along: three packages, no driver, no mail, no framework."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import ipguard

HEAVY = {
    "aiosqlite",
    "asyncpg",
    "django",
    "fastapi",
    "flask",
    "http.client",
    "psycopg",
    "psycopg_pool",
    "requests",
    "smtplib",
    "sqlalchemy",
    "sqlite3",
    "ssl",
    "starlette",
    "typer",
    "urllib3",
    "uvicorn",
}
NEEDED = ("attr", "attrs", "netaddr", "cachetools")


def _run(code: str, *args: object) -> str:
    """Run Python in an interpreter that sees the folders given and the standard library alone."""
    # -I: no environment, no working directory; -S: no site-packages, and no .pth files.
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _only_what_is_needed(folder: Path) -> None:
    """Put links to the library and its three dependencies into a folder."""
    (folder / "ipguard").symlink_to(Path(ipguard.__file__).parent)
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (folder / name).symlink_to(Path(spec.origin).parent)


def test_three_packages_are_enough(tmp_path: Path) -> None:
    """With attrs, netaddr and cachetools beside it and nothing else, it imports and works."""
    _only_what_is_needed(tmp_path)
    code = """
import sys
sys.path.append(sys.argv[1])
import ipguard
from ipguard.testing import Outbox
for name in ("pytest", "hypothesis", "aiosmtpd", "fastapi"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported: this is not the environment it should be")
boss = ipguard.Actor(username="boss", email="b@x.example", manages=ipguard.Actor.EVERY_ACCOUNT)
for url in ("memory://", f"sqlite:///{sys.argv[1]}/a.db"):
    with ipguard.open_store(url) as store, ipguard.Guard(store) as guard:
        store.put_users([ipguard.User(username="j", full_name="J", account_id="U1")])
        outbox = Outbox()
        flow = ipguard.Workflow(store, outbox, key=bytes(32))
        request = flow.request(boss, "j", "203.0.113.7")
        applied = flow.confirm(boss, request.id, outbox.number_for(request.id))
        assert guard.wait_for(applied.revision, 20)
        print(guard.is_allowed("j", "203.0.113.7"), guard.is_allowed("j", "203.0.113.8"))
"""
    assert _run(code, tmp_path).split() == ["True", "False"] * 2


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither a database driver nor mail, TLS or a framework is in `sys.modules` after it."""
    _only_what_is_needed(tmp_path)
    code = """
import json, sys
before = set(sys.modules)
sys.path.append(sys.argv[1])
import ipguard
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = set(json.loads(_run(code, tmp_path)))
    assert "ipguard.workflow" in loaded
    assert HEAVY & loaded == set()
    standard = sys.stdlib_module_names
    roots = {name.partition(".")[0] for name in loaded}
    assert roots - standard == {"ipguard", *NEEDED} & roots


def test_memory_needs_no_sqlite_and_testing_no_pytest(tmp_path: Path) -> None:
    """Opening a store loads that store alone, and the tools for tests bring no test runner."""
    _only_what_is_needed(tmp_path)
    code = """
import json, sys
sys.path.append(sys.argv[1])
import ipguard, ipguard.testing
ipguard.open_store("memory://").close()
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(json.loads(_run(code, tmp_path)))
    assert {"ipguard.testing", "ipguard.stores.memory"} <= loaded
    assert loaded & (HEAVY | {"pytest", "_pytest", "hypothesis", "ipguard.stores.sqlite"}) == set()


def test_the_metadata_asks_for_three_packages() -> None:
    """What is declared is what is needed."""
    needs = importlib.metadata.requires("ipguard") or []
    plain = {need.partition(">")[0] for need in needs if "extra ==" not in need}
    assert plain == {"attrs", "cachetools", "netaddr"}


def test_all_that_is_promised_is_there() -> None:
    """`__all__` names what exists, sorted, each once; the contract's names are among them."""
    assert sorted(set(ipguard.__all__)) == sorted(ipguard.__all__)
    for name in ipguard.__all__:
        assert hasattr(ipguard, name)
    promised = (
        "open_store Guard Workflow WorkflowSettings User Actor AddressRange Restriction "
        "PendingRequest Decision Reason Applied Change Page IPGuardError AddressError "
        "UsernameError AddressTooBroad LockoutRisk DuplicateRestriction UnknownUser "
        "UnknownRequest UnknownRestriction RequestClosed NumberExpired WrongNumber "
        "TooManyAttempts TooManyRequests TooManyRestrictions DeliveryError StoreError "
        "StoreUnavailable StoreConfigError SchemaVersionError RestrictionStore"
    )
    assert set(promised.split()) <= set(ipguard.__all__)
