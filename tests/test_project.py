"""Tests of the project's metadata and pins."""

import re
import tomllib
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path
from types import FrameType

import ipguard
from ipguard.testing import Outbox
from tests.tracing import profiled

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_metadata():
    """The installed metadata is that of pyproject.toml, and the package is typed."""
    assert metadata.version("ipguard") == PROJECT["project"]["version"]
    assert metadata.metadata("ipguard")["License-Expression"] == "MIT"
    assert resources.files("ipguard").joinpath("py.typed").is_file()


def test_every_requirement_is_pinned():
    """Each requirement of the library and of the groups has a pin."""
    needs = list(PROJECT["project"]["dependencies"])
    for group in PROJECT["dependency-groups"].values():
        needs += [need for need in group if isinstance(need, str)]
    files = (ROOT / "constraints.txt", ROOT / "benchmarks" / "constraints.txt")
    pins = "".join(file.read_text() for file in files).lower().replace("_", "-").splitlines()
    pinned = {pin.partition("==")[0] for pin in pins if "==" in pin}
    assert {re.split(r">=|\[", need)[0] for need in needs} <= pinned


def files_run(call: Callable[[], object]) -> set[str]:
    """Return the library's source files in which a Python function runs during a call."""
    source, found = str(Path(ipguard.__file__).parent), set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(source):
            found.add(frame.f_code.co_filename.removeprefix(source))

    with profiled(profile):
        call()
    return {name for name in found if not name.startswith("/testing/")}


def test_an_operation_runs_through_few_files(tmp_path):
    """A reader who follows one operation on SQLite opens this many files."""
    desk = ipguard.Actor(username="desk", email="d@example.com", manages=frozenset({"U1"}))
    user = ipguard.User(username="jsmith", full_name="John Smith", account_id="U1")
    with ipguard.open_store(f"sqlite:///{tmp_path / 'ipguard.db'}") as store:
        store.put_users([user])
        outbox = Outbox()
        flow = ipguard.Workflow(store, outbox, key=bytes(32))
        guard = ipguard.Guard(store)
        guard.sync()
        miss = files_run(lambda: guard.is_allowed("jsmith", "203.0.113.7"))
        hit = files_run(lambda: guard.is_allowed("jsmith", "203.0.113.7"))
        request = flow.request(desk, "jsmith", "203.0.113.7")
        number = outbox.number_for(request.id)
        confirm = files_run(lambda: flow.confirm(desk, request.id, number))
        search = files_run(lambda: flow.overview(desk, search="sm"))
    assert len(hit) == 1, hit
    assert len(miss) <= 11, miss
    assert len(confirm) <= 13, confirm
    assert len(search) <= 11, search
