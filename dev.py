#!/usr/bin/env python3
"""Everything a developer of ipguard runs, on a machine that has just Python and pip.

    python3 dev.py demo [--keep]            the whole way once, in a terminal
    python3 dev.py demo --serve [--port N]  a login server with the page in it, for a browser
    python3 dev.py test [--long] [ARG ...]  the tests; with ARGs, which go to pytest, no coverage
    python3 dev.py lint | types | layers | docs | build | pythons
    python3 dev.py screenshots              makes the pictures in docs/screenshots/ anew
    python3 dev.py mutate [MODULE ...]      mutation testing, see docs/mutation.md
    python3 dev.py bench [--quick]          measures, into docs/performance/; docs/performance.md
    python3 dev.py pin                      renew constraints.txt and benchmarks/constraints.txt

The first use makes `.venv`; later ones notice that nothing changed. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ipguard-setup"
CONSTRAINTS = ROOT / "constraints.txt"
BENCH_CONSTRAINTS = ROOT / "benchmarks" / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The rooms that must be covered to the last branch, and whose tests need no server: these tests,
# tests/test_<room>*.py, also run against the built wheel and on every other Python.
CORE = (
    "errors",
    "addresses",
    "usernames",
    "model",
    "confirmation",
    "audit",
    "rules",
    "packed",
    "workflow",
    "guard",
    "aio",
)
MUTATED = ("addresses", "usernames", "confirmation", "rules", "packed", "guard")


class StepError(Exception):
    """A step failed; its own output has said why."""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    code = subprocess.run(command, cwd=cwd, check=False).returncode
    if code:
        raise StepError(f"{Path(command[0]).name} ended with {code}")


def tool(name: str, *args: str | Path) -> None:
    """Run one of the environment's own programs."""
    run(VENV / "bin" / name, *args)


def pip(python: Path, *args: str | Path) -> None:
    """Run the host's pip on another interpreter, which then needs no pip of its own."""
    run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *args)


def room(name: str, under: str = "src/ipguard") -> str:
    """The file of a room, or the files of one that became a package."""
    return (
        f"{under}/{name}/*" if (ROOT / "src" / "ipguard" / name).is_dir() else f"{under}/{name}.py"
    )


def group(name: str) -> list[str]:
    """The requirements of a dependency group (pip reads these itself only from 25.1 on)."""
    found: list[str] = []
    for entry in PROJECT["dependency-groups"][name]:
        found += [entry] if isinstance(entry, str) else group(entry["include-group"])
    return found


# ---------------------------------------------------------------------------- the environment


def wanted() -> str:
    """What the environment depends on; when this changes, it is set up again."""
    parts = {key: PROJECT[key] for key in ("build-system", "project", "dependency-groups")}
    text = json.dumps([parts, CONSTRAINTS.read_text(), sys.version, str(ROOT)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def setup(command: str, *args: str) -> None:
    # The demos are what a newcomer tries first, and need a tenth of it all.
    few = ["aiosmtpd", "editables", "hatchling"] if command == "demo" else []
    kinds = ["", " served", " few"] if few else [""]
    if few and "--serve" in args:
        few += ["fastapi", "uvicorn", *PROJECT["project"]["optional-dependencies"]["admin"]]
        kinds.remove(" few")
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once: the second finds the work done
        found = STAMP.read_text() if STAMP.exists() else ""
        if found in [wanted() + kind for kind in kinds]:
            return
        # An environment without a stamp was interrupted half way: start it anew.
        # One with an old stamp is whole, and pip changes only what differs.
        if not STAMP.exists() or subprocess.run([PYTHON, "-c", ""], check=False).returncode:
            venv.create(VENV, clear=True, with_pip=False, symlinks=True)
        STAMP.unlink(missing_ok=True)
        needs = [*PROJECT["project"]["dependencies"], *(few or group("dev"))]
        pip(PYTHON, "install", "-qq", "-c", CONSTRAINTS, *needs)
        pip(PYTHON, "install", "-qq", "--no-deps", "--no-build-isolation", "-e", ROOT)
        STAMP.write_text(wanted() + kinds[-1])


@contextlib.contextmanager
def fresh_venv(python: str | Path) -> Iterator[Path]:
    """A throwaway environment of the given Python, outside the source tree."""
    with tempfile.TemporaryDirectory(prefix="ipguard-") as folder:
        run(python, "-m", "venv", "--without-pip", f"{folder}/venv")
        yield Path(folder)


# ---------------------------------------------------------------------------- the commands


def demo(*args: str) -> None:
    if "--serve" in args:
        # In this process's place: Ctrl-C is then the server's alone.
        rest = [arg for arg in args if arg != "--serve"]
        os.execv(PYTHON, [str(PYTHON), str(ROOT / "examples" / "serve.py"), *rest])
    run(PYTHON, "examples/demo.py", *args)


def test(*args: str) -> None:
    long = "--long" in args
    rest = [arg for arg in args if arg != "--long"]
    os.environ["IPGUARD_LONG"] = "1" if long else ""
    if rest:
        tool("pytest", *rest)
        return
    for old in ROOT.glob(".coverage*"):
        old.unlink(missing_ok=True)
    limit = ["-o", "timeout=3600"] if long else []
    # A file stays with one process: the blocks of a document are one program.
    # They come in the order of `tests/conftest.py`, the longest first.
    spread = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    tool("coverage", "run", "-m", "pytest", *spread, *limit)
    tool("coverage", "combine", "-q")
    tool("coverage", "report", "--skip-covered")
    core = ",".join(room(name) for name in CORE)
    tool("coverage", "report", f"--include={core}", "--fail-under=100", "--skip-covered")


def screenshots() -> None:
    """Make the pictures of the administration page in docs/ anew; it needs Chromium."""
    run(PYTHON, "-m", "tests.screenshots")


def lint() -> None:
    tool("ruff", "check", ".")
    tool("ruff", "format", "--check", ".")


def types() -> None:
    tool("mypy")


def layers() -> None:
    # Its cache forgets to look again at a module whose imports have moved.
    tool("lint-imports", "--no-cache")


def docs() -> None:
    shutil.rmtree(ROOT / "docs" / "_build", ignore_errors=True)
    tool("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")


def wheel() -> Path:
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    tool("hatchling", "build", "-t", "wheel")
    return next((ROOT / "dist").glob("*.whl"))


def check_wheel(built: Path, python: str | Path, *, lowest: bool = False) -> None:
    """Install the wheel beside nothing but what it needs, import it, then run the core's tests."""
    with fresh_venv(python) as folder:
        inside, pins = folder / "venv" / "bin" / "python", folder / "pins.txt"
        # The lowest versions that the wheel admits take the place of their pins.
        bounds = [need.replace(">=", "==") for need in PROJECT["project"]["dependencies"] if lowest]
        names = tuple(bound.partition("==")[0] + "==" for bound in bounds)
        kept = [pin for pin in CONSTRAINTS.read_text().splitlines() if not pin.startswith(names)]
        pins.write_text("\n".join([*kept, *bounds]))
        pip(inside, "install", "-qq", "-c", pins, built)
        run(inside, "-I", ROOT / "tests" / "smoke.py", cwd=folder)
        # The tests run on a copy: beside the source tree they might import it instead of the wheel.
        shutil.copytree(ROOT / "tests", folder / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        pip(inside, "install", "-qq", "-c", pins, *group("core-test"))
        found = [p for name in CORE for p in sorted((folder / "tests").glob(f"test_{name}*.py"))]
        run(inside, "-m", "pytest", "-q", "-n", "2", *found, cwd=folder)


def build() -> None:
    check_wheel(wheel(), sys.executable)


def pythons() -> None:
    """Run the core's tests on every Python here; on the oldest with the lowest dependencies."""
    built = wheel()
    for number, (_, python) in enumerate(sorted(all_pythons().items())):
        check_wheel(built, python, lowest=number == 0)


def all_pythons() -> dict[tuple[int, int], Path]:
    """One interpreter for each version >= 3.11, from the PATH and from pyenv."""
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    folders += sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin"), reverse=True)
    found: dict[tuple[int, int], Path] = {sys.version_info[:2]: Path(sys.executable)}
    for minor in range(11, 20):
        for candidate in (folder / f"python3.{minor}" for folder in folders):
            # A pyenv shim exists for versions that are switched off too: only running it tells.
            works = (
                candidate.exists()
                and not subprocess.run(
                    [candidate, "-c", "import venv"], capture_output=True, check=False
                ).returncode
            )
            if works:
                found.setdefault((3, minor), candidate)
    return found


def mutate(*modules: str) -> None:
    """Break each line in turn and see whether that room's own tests notice."""
    for name in modules or MUTATED:
        # A copy, made anew: mutmut knows one set of settings, and takes what survived once for
        # survived even when a new test would catch it now.
        work = ROOT / "build" / "mutation" / name
        shutil.rmtree(work, ignore_errors=True)
        for folder in ("src", "tests"):
            shutil.copytree(ROOT / folder, work / folder)
        tests = [f"tests/{path.name}" for path in sorted(ROOT.glob(f"tests/test_{name}*.py"))]
        if not tests:
            raise StepError(f"no tests/test_{name}*.py")
        settings = {
            "source_paths": ["src"],
            "only_mutate": [room(name)],
            "pytest_add_cli_args": ["-p", "no:cacheprovider", "--hypothesis-profile=mutation"],
            "pytest_add_cli_args_test_selection": tests,
        }
        # A list of strings is written alike in JSON and TOML.
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        project = (ROOT / "pyproject.toml").read_text()
        (work / "pyproject.toml").write_text("\n".join([project, "[tool.mutmut]", *lines, ""]))
        run(VENV / "bin" / "mutmut", "run", "--max-children", "2", cwd=work)
        run(VENV / "bin" / "mutmut", "results", cwd=work)


def bench(*args: str) -> None:
    """Measure beside what else there is; that is installed here and nowhere else."""
    pins, needs = ("-c", CONSTRAINTS, "-c", BENCH_CONSTRAINTS), group("bench")
    try:
        pip(PYTHON, "install", "-qq", *pins, *needs)
    except StepError:
        # What cannot be installed on this machine is reported as that, beside the others.
        for need in needs:
            with contextlib.suppress(StepError):
                pip(PYTHON, "install", "-qq", *pins, need)
    run(PYTHON, "-m", "benchmarks", *args)


def resolved(*args: str | Path) -> set[str]:
    """Return the pins that pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        asked = ("--dry-run", "--ignore-installed", "--report", report, "--target", folder)
        pip(PYTHON, "install", "-qq", *asked, *args)
        chosen = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {f"{found['name']}=={found['version']}" for found in chosen}


def write_pins(file: Path, pins: set[str]) -> None:
    """Replace the pins in a file, below the comment that it begins with."""
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    file.write_text("\n".join([*head, *sorted(pins, key=str.lower), ""]))


def pin() -> None:
    """Resolve everything afresh for the oldest Python that may use it, and write that down."""
    oldest = ("--python-version", "3.11.0", "--only-binary", ":all:")
    pins = resolved(*oldest, *PROJECT["project"]["dependencies"], *group("dev"))
    write_pins(CONSTRAINTS, pins)
    # Some of it has no wheels, so pip resolves it for this Python alone.
    write_pins(BENCH_CONSTRAINTS, resolved("-c", CONSTRAINTS, *group("bench")) - pins)


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        demo,
        test,
        screenshots,
        lint,
        types,
        layers,
        docs,
        build,
        pythons,
        mutate,
        bench,
        pin,
    )
}


def main(name: str = "", *args: str) -> int:
    """Set up what is needed and carry out one command."""
    if name not in COMMANDS:
        print(__doc__)
        return 2
    try:
        setup(name, *args)
        COMMANDS[name](*args)
    except StepError as failure:
        print(f"dev.py {name}: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
