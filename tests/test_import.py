"""Imports: what `import ipguard` loads, which names are public, and how modules depend."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import ipguard

HEAVY = {
    "aiosqlite",
    "asyncpg",
    "django",
    "fastapi",
    "flask",
    "http.client",
    "opentelemetry",
    "prometheus_client",
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
    """Run Python with the standard library and the given folders only."""
    # -I: no environment, no working directory; -S: no site-packages, and no .pth files.
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _link_dependencies(folder: Path) -> None:
    """Link the library and its three dependencies into a folder."""
    (folder / "ipguard").symlink_to(Path(ipguard.__file__).parent)
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (folder / name).symlink_to(Path(spec.origin).parent)


def test_three_packages_are_enough(tmp_path: Path) -> None:
    """The library works with attrs, netaddr and cachetools alone."""
    _link_dependencies(tmp_path)
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
    raise SystemExit(f"{name} can be imported: the environment is wrong")
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


def _loaded(folder: Path, code: str) -> set[str]:
    """Return the modules that are loaded by some code."""
    _link_dependencies(folder)
    first = "import json, sys; before = set(sys.modules); sys.path.append(sys.argv[1])"
    last = "print(json.dumps(sorted(set(sys.modules) - before)))"
    return set(json.loads(_run(f"{first}\n{code}\n{last}", folder)))


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    """The import loads no database driver, mail, TLS or framework."""
    loaded = _loaded(tmp_path, "import ipguard")
    assert "ipguard.workflow" in loaded
    assert HEAVY & loaded == set()
    standard = sys.stdlib_module_names
    roots = {name.partition(".")[0] for name in loaded}
    assert roots - standard == {"ipguard", *NEEDED} & roots


def test_memory_needs_no_sqlite_and_testing_no_pytest(tmp_path: Path) -> None:
    """Opening a store loads that store alone, and `ipguard.testing` loads no test runner."""
    code = "import ipguard, ipguard.testing; ipguard.open_store('memory://').close()"
    loaded = _loaded(tmp_path, code)
    assert {"ipguard.testing", "ipguard.stores.memory"} <= loaded
    assert loaded & (HEAVY | {"pytest", "_pytest", "hypothesis", "ipguard.stores.sqlite"}) == set()


def test_the_metadata_requires_three_packages() -> None:
    needs = importlib.metadata.requires("ipguard") or []
    plain = {need.partition(">")[0] for need in needs if "extra ==" not in need}
    assert plain == {"attrs", "cachetools", "netaddr"}


def _documented() -> list[tuple[str, str]]:
    """Return the names that docs/api.md documents, each with the module to import it from."""
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    found, module = [], ""
    for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", text, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        elif directive != "automodule":
            found.append((module, name))
    return found


def test_the_reference_documents_the_public_names() -> None:
    documented = _documented()
    assert len(set(documented)) == len(documented)
    for module, name in documented:
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"
    here = {name for module, name in documented if module == "ipguard"}
    assert here == set(ipguard.__all__)
    for module in {module for module, _ in documented}:
        names = {name for there, name in documented if there == module}
        assert names | here >= set(importlib.import_module(module).__all__), module


def test_the_contract_is_public() -> None:
    """The names of the contract can be imported from `ipguard`."""
    promised = (
        "open_store Guard Workflow WorkflowSettings User Actor AddressRange Restriction "
        "PendingRequest Decision Reason Applied Change Page IPGuardError AddressError "
        "UsernameError AddressTooBroad LockoutRisk DuplicateRestriction UnknownUser "
        "UnknownRequest UnknownRestriction RequestClosed NumberExpired WrongNumber "
        "TooManyAttempts TooManyRequests TooManyRestrictions DeliveryError StoreError "
        "StoreUnavailable StoreConfigError SchemaVersionError RestrictionStore"
    )
    assert set(promised.split()) <= set(ipguard.__all__)


# -- imports between modules -----------------------------------------------------------------------


def _imports() -> dict[str, set[str]]:
    """Return the full names that each module imports from ipguard, late imports included."""
    source = Path(ipguard.__file__).parent
    found = {}
    for path in source.rglob("*.py"):
        parts = ("ipguard", *path.relative_to(source).with_suffix("").parts)
        module = ".".join(parts).removesuffix(".__init__")
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
        found[module] = {name for name in names if name.startswith("ipguard.")}
    return found


def test_no_room_imports_what_another_keeps_private() -> None:
    crossings = {
        f"{module} -> {name}"
        for module, names in _imports().items()
        for name in names
        if name.split(".")[1] != module.partition(".")[2].partition(".")[0]
        and any(part.startswith("_") for part in name.split(".")[2:])
    }
    assert crossings == set()


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    imports = _imports()

    def module_of(name: str) -> str:
        return name if name in imports else name.rpartition(".")[0]

    graph = {
        module: {module_of(name) for name in names} & set(imports) - {module}
        for module, names in imports.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules
