#!/usr/bin/env python3
"""Run the development tasks of ipguard. Needs Python 3.11 or later with pip, nothing else.

    python3 dev.py demo [--keep]            show a request and its confirmation in a terminal
    python3 dev.py demo --serve [--port N]  run a login server with the administration page
    python3 dev.py test                     run the tests for every change (under 3 minutes)
    python3 dev.py test --all               run every test and check the core's branch coverage
    python3 dev.py test --rest              run only the tests that `test` leaves out
    python3 dev.py test --long              run every test with its full number of rounds
    python3 dev.py test ARG ...             run pytest with these arguments
    python3 dev.py coverage                 check the core's coverage by the core's own tests
    python3 dev.py lint | types | layers    run ruff, mypy or import-linter
    python3 dev.py docs                     build the documentation into docs/_build/html
    python3 dev.py build                    build the wheel and run the core's tests on it
    python3 dev.py pythons                  the same on every Python found on this machine, and the
                                            kit for Django with the current Django
    python3 dev.py screenshots              recreate the pictures in docs/screenshots/
    python3 dev.py mutate [MODULE ...]      run mutation tests; see docs/mutation.md
    python3 dev.py model [NAME ...]         check the lease's model with Spin; see docs/proof.md
    python3 dev.py bench [--quick]          run the benchmarks; see docs/performance.md
    python3 dev.py pin                      update constraints.txt and benchmarks/constraints.txt

The first run creates `.venv` and installs what its command needs; later runs add what is missing.
`model` needs only Spin and gcc.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ipguard-setup"
CONSTRAINTS = ROOT / "constraints.txt"
BENCH_CONSTRAINTS = ROOT / "benchmarks" / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The modules with 100 % branch coverage. Their tests, tests/test_<module>*.py, also run on the
# built wheel and on every other Python.
CORE = (
    "errors",
    "addresses",
    "usernames",
    "client_address",
    "model",
    "confirmation",
    "audit",
    "rules",
    "row",
    "workflow",
    "guard",
    "aio",
)
MUTATED = ("addresses", "usernames", "client_address", "confirmation", "rules", "row", "guard")
# Test files that judge a module's mutants besides its own: many rules are tested through the
# workflow.
JUDGES = {
    "rules": (
        "users",
        "workflow_changes",
        "workflow_demands",
        "workflow_lookups",
        "workflow_operators",
        "workflow_pages",
    )
}
# The explorer of schedules has mutants of its own, and takes a minute for each run.
EXPLORERS = set(ROOT.glob("tests/*_explorer.py"))


class StepError(Exception):
    """A step failed after printing the reason."""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    code = subprocess.run(command, cwd=cwd, check=False).returncode
    if code:
        raise StepError(f"{Path(command[0]).name} failed with exit code {code}")


def tool(name: str, *args: str | Path) -> None:
    """Run a program of the environment."""
    run(VENV / "bin" / name, *args)


def pip(python: Path, *args: str | Path) -> None:
    """Run the host's pip on another interpreter, so that no environment needs its own pip."""
    run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *args)


def source(name: str) -> str:
    """Return the pattern of a module's source files."""
    folder = ROOT / "src" / "ipguard" / name
    package = (folder / "__init__.py").is_file()
    return f"src/ipguard/{name}/*" if package else f"src/ipguard/{name}.py"


def core_tests(tests: Path) -> list[Path]:
    """Return the test files of the core modules."""
    return [path for name in CORE for path in sorted(tests.glob(f"test_{name}*.py"))]


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group (pip reads groups only since 25.1)."""
    found: list[str] = []
    for entry in PROJECT["dependency-groups"][name]:
        found += [entry] if isinstance(entry, str) else group(entry["include-group"])
    return found


# ---------------------------------------------------------------------------- the environment


# Dependency groups that include each other in this order: an environment with one serves the
# commands that need an earlier one. Commands that are not here need the last.
GROUPS = ("demo", "serve", "test", "dev")


def needed(command: str, *args: str) -> str:
    """Return the dependency group of a command."""
    if command == "demo":
        return "serve" if "--serve" in args else "demo"
    return "test" if command == "test" and not args else "dev"


def wanted(kind: str = "dev") -> str:
    """Return a digest of everything that an environment depends on."""
    parts = {key: PROJECT[key] for key in ("build-system", "project", "dependency-groups")}
    text = json.dumps([parts, CONSTRAINTS.read_text(), sys.version, str(ROOT)], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {kind}"


def setup(command: str, *args: str) -> None:
    """Create or update the environment, unless it already has what the command needs."""
    kind = needed(command, *args)
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second command waits, then finds the work done
        found = STAMP.read_text() if STAMP.exists() else ""
        if found in [wanted(each) for each in GROUPS[GROUPS.index(kind) :]]:
            return
        # Without a stamp the last set-up was interrupted: start over. With an old stamp the
        # environment is complete, and pip changes only what differs.
        if not STAMP.exists() or subprocess.run([PYTHON, "-c", ""], check=False).returncode:
            venv.create(VENV, clear=True, with_pip=False, symlinks=True)
        STAMP.unlink(missing_ok=True)
        # Python compiles what it imports; compiling everything takes a third of the set-up.
        install = ("install", "-qq", "--no-compile")
        needs = [*PROJECT["project"]["dependencies"], *group(kind)]
        pip(PYTHON, *install, "-c", CONSTRAINTS, *needs)
        pip(PYTHON, *install, "--no-deps", "--no-build-isolation", "-e", ROOT)
        STAMP.write_text(wanted(kind))


@contextlib.contextmanager
def fresh_venv(python: str | Path) -> Iterator[Path]:
    """Create a temporary environment of the given Python, outside the source tree."""
    with tempfile.TemporaryDirectory(prefix="ipguard-") as folder:
        run(python, "-m", "venv", "--without-pip", f"{folder}/venv")
        yield Path(folder)


# ---------------------------------------------------------------------------- the commands


def demo(*args: str) -> None:
    if "--serve" in args:
        # Replace this process, so that Ctrl-C reaches the server alone.
        rest = [arg for arg in args if arg != "--serve"]
        os.execv(PYTHON, [str(PYTHON), str(ROOT / "examples" / "serve.py"), *rest])
    run(PYTHON, "examples/demo.py", *args)


# A file stays in one process: the code blocks of a document share a namespace, and Chromium starts
# once for each file. The order is that of tests/conftest.py, the slowest files first.
PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
QUICK = ("-m", "not slow")


def test(*args: str) -> None:
    """Run the tests: the short run, the rest, all with coverage, or what pytest is told to."""
    which = {"--all", "--rest", "--long"} & set(args)
    rest = [arg for arg in args if arg not in which]
    os.environ["IPGUARD_LONG"] = "1" if "--long" in which else ""
    if rest:
        tool("pytest", *rest)
    elif "--long" in which:
        # Without coverage, which makes the rounds in pure Python take three times as long.
        tool("pytest", *PARALLEL, "-o", "timeout=3600")
    elif "--all" in which:
        measure(*PARALLEL)
        tool("coverage", "report", "--skip-covered")
        check_core()
    else:
        tool("pytest", *PARALLEL, *(("-m", "slow") if which else QUICK))


def coverage() -> None:
    """Check that the core's own tests cover every branch of the core.

    The slow tests and the explorer of schedules are left out.
    """
    measure(*PARALLEL, *QUICK, *sorted(set(core_tests(ROOT / "tests")) - EXPLORERS))
    check_core()


def measure(*args: str | Path) -> None:
    """Run pytest and measure the coverage."""
    for old in ROOT.glob(".coverage*"):
        old.unlink(missing_ok=True)
    tool("coverage", "run", "-m", "pytest", *args)
    tool("coverage", "combine", "-q")


def check_core() -> None:
    """Require that every branch of the core is covered."""
    core = ",".join(map(source, CORE))
    tool("coverage", "report", f"--include={core}", "--fail-under=100", "--skip-covered")


def screenshots() -> None:
    """Recreate the pictures of the administration page; this needs Chromium."""
    run(PYTHON, "-m", "tests.screenshots")


def lint() -> None:
    tool("ruff", "check", ".")
    tool("ruff", "format", "--check", ".")


def types() -> None:
    tool("mypy")


def layers() -> None:
    # The cache misses imports that moved between modules.
    tool("lint-imports", "--no-cache")


def docs() -> None:
    shutil.rmtree(ROOT / "docs" / "_build", ignore_errors=True)
    tool("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")


def wheel() -> Path:
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    tool("hatchling", "build", "-t", "wheel")
    return next((ROOT / "dist").glob("*.whl"))


def check_wheel(built: Path, python: str | Path, *, lowest: bool = False) -> None:
    """Install the wheel with its dependencies alone, run the smoke test, then the core's tests."""
    with fresh_venv(python) as folder:
        inside, pins = folder / "venv" / "bin" / "python", folder / "pins.txt"
        # With `lowest`, the lower bounds of the dependencies replace their pins.
        bounds = [need.replace(">=", "==") for need in PROJECT["project"]["dependencies"] if lowest]
        names = tuple(bound.partition("==")[0] + "==" for bound in bounds)
        kept = [pin for pin in CONSTRAINTS.read_text().splitlines() if not pin.startswith(names)]
        pins.write_text("\n".join([*kept, *bounds]))
        pip(inside, "install", "-qq", "-c", pins, built)
        run(inside, "-I", ROOT / "tests" / "smoke.py", cwd=folder)
        # Copy the tests: next to the source tree they might import it instead of the wheel.
        shutil.copytree(ROOT / "tests", folder / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        pip(inside, "install", "-qq", "-c", pins, *group("core-test"))
        found = core_tests(folder / "tests")
        # The slow tests run once, from the source tree.
        run(inside, "-m", "pytest", "-q", "-n", "2", *QUICK, *found, cwd=folder)


def build() -> None:
    check_wheel(wheel(), sys.executable)


def pythons() -> None:
    """Check the wheel on every Python found, on the oldest with the lowest dependencies."""
    built = wheel()
    found = sorted(all_pythons().items())
    for number, (_, python) in enumerate(found):
        check_wheel(built, python, lowest=number == 0)
    version, newest = found[-1]
    if version >= (3, 12):
        check_django(built, newest)


def check_django(built: Path, python: Path) -> None:
    """Run the tests of the kit with the current Django.

    The pin is the oldest one that is maintained, which is the last one for Python 3.11.
    """
    with fresh_venv(python) as folder:
        inside, pins = folder / "venv" / "bin" / "python", folder / "pins.txt"
        kept = [pin for pin in CONSTRAINTS.read_text().splitlines() if "Django==" not in pin]
        pins.write_text("\n".join(kept))
        needs = [need for need in group("test") if need != "django"]
        pip(inside, "install", "-qq", "-c", pins, built, "django>=6.1", *needs)
        options = ("-q", "-n", "2", *QUICK, "-p", "no:cacheprovider")
        run(inside, "-m", "pytest", *options, "tests/test_contrib_django.py")


def all_pythons() -> dict[tuple[int, int], Path]:
    """Return an interpreter for each version from 3.11 on, from the PATH and from pyenv."""
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    folders += sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin"), reverse=True)
    found: dict[tuple[int, int], Path] = {sys.version_info[:2]: Path(sys.executable)}
    for minor in range(11, 20):
        for candidate in (folder / f"python3.{minor}" for folder in folders):
            # Run it: pyenv has shims for versions that are switched off, too.
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
    """Run mutation tests of the given modules with their own test files, and with `JUDGES`."""
    for name in modules or MUTATED:
        # A fresh copy for each module: mutmut has one set of settings, and never retries a mutant
        # that survived, even if a new test would catch it.
        work = ROOT / "build" / "mutation" / name
        shutil.rmtree(work, ignore_errors=True)
        for folder in ("src", "tests"):
            shutil.copytree(ROOT / folder, work / folder)
        own = ROOT.glob(f"tests/test_{name}*.py")
        judges = [ROOT / "tests" / f"test_{judge}.py" for judge in JUDGES.get(name, ())]
        files = sorted({*own, *judges} - EXPLORERS)
        tests = [f"tests/{path.name}" for path in files]
        if not tests:
            raise StepError(f"no tests/test_{name}*.py")
        # A mutant that survives runs every test of its function: leave out the slow ones.
        options = (*QUICK, "-p", "no:cacheprovider", "--hypothesis-profile=mutation")
        settings = {
            "source_paths": ["src"],
            "only_mutate": [source(name)],
            "pytest_add_cli_args": options,
            "pytest_add_cli_args_test_selection": tests,
        }
        # JSON and TOML write a list of strings in the same way.
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        project = (ROOT / "pyproject.toml").read_text()
        (work / "pyproject.toml").write_text("\n".join([project, "[tool.mutmut]", *lines, ""]))
        # Many mutants wait, for a lock that stays closed or for their time limit.
        children = str(4 * (os.cpu_count() or 2))
        run(VENV / "bin" / "mutmut", "run", "--max-children", children, cwd=work)
        run(VENV / "bin" / "mutmut", "results", cwd=work)


class Variant(NamedTuple):
    """The model in one configuration, sound or broken by one switch."""

    configuration: str
    switch: str
    truth: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.switch or self.configuration


MODEL = ROOT / "proof" / "lease.pml"


def variants() -> list[Variant]:
    """Return the variants that the model's first comment lists, the sound ones first."""
    text = MODEL.read_text()
    found = re.findall(r"^ \* configuration (\w+) +(-D.*)$", text, re.MULTILINE)
    flags = {name: tuple(each.split()) for name, each in found}
    sound = [Variant(name, "", "", flags[name]) for name in flags]
    switches = re.findall(r"^ \* switch (\w+) +(\w+) +(\d+) ", text, re.MULTILINE)
    return sound + [
        Variant(name, switch, truth, (*flags[name], f"-D{switch}"))
        for switch, name, truth in switches
    ]


def search(variant: Variant) -> tuple[str, str, float]:
    """Search all states of a variant with Spin; return the result, the states and the seconds.

    The result is "sound" only if the search was complete: Spin kept every state whole, reached no
    limit, and found no error.
    """
    began = time.monotonic()
    level = "-O1" if variant.switch else "-O2"  # an error is found before -O2 has paid off
    commands = [
        ("spin", "-a", *variant.flags, str(MODEL)),
        ("gcc", level, "-w", "-DSAFETY", "-DCOLLAPSE", "-DNOFAIR", "-o", "pan", "pan.c"),
        ("./pan", "-m100000"),
    ]
    if variant.switch:  # most errors are few steps away, and soon found if the search is shallow
        commands.insert(2, ("./pan", "-m60"))
    printed = ""
    with tempfile.TemporaryDirectory(prefix="ipguard-") as folder:
        for command in commands:
            made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            printed = made.stdout
            # Spin exits with 0 after most errors.
            if made.returncode or "Error:" in printed:
                print(printed, made.stderr, sep="\n")
                break
            if "assertion violated" in printed:
                break
    states = re.search(r"^ *([\d.e+]+) states, stored", printed, re.MULTILINE)
    limits = re.search(r"not completed|too small|out of memory|compact", printed, re.IGNORECASE)
    result = "failed"
    if "assertion violated" in printed and re.search(r"errors: [1-9]", printed):
        result = "refuted"
    elif "Full statespace search" in printed and "errors: 0\n" in printed and not limits:
        result = "sound"
    return result, states[1] if states else "", time.monotonic() - began


def model(*names: str) -> None:
    """Check that the model of the lease is sound, and that each of its switches is refuted."""
    if missing := [program for program in ("spin", "gcc") if not shutil.which(program)]:
        command = "apt-get install --yes --no-install-recommends spin gcc libc6-dev"
        message = f"{' and '.join(missing)} not installed; as root: {command}"
        if os.environ.get("CI"):
            raise StepError(message)
        print(f"skipped: {message}")
        return
    chosen = [each for each in variants() if not names or each.name in names]
    if unknown := set(names) - {each.name for each in chosen}:
        raise StepError(f"no such variant: {', '.join(sorted(unknown))}")
    wrong = []
    print(f"{'variant':24}{'configuration':15}{'truth':>5}  {'result':10}{'states':>12}{'s':>7}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for variant, (result, states, seconds) in zip(
            chosen, pool.map(search, chosen), strict=True
        ):
            if result != ("refuted" if variant.switch else "sound"):
                wrong.append(variant.name)
            print(
                f"{variant.switch or '(none)':24}{variant.configuration:15}{variant.truth:>5}"
                f"  {result:10}{states:>12}{seconds:>7.1f}",
                flush=True,
            )
    if wrong:
        raise StepError(f"not as they should be: {', '.join(wrong)}")


def bench(*args: str) -> None:
    """Install the libraries that ipguard is compared with, then run the benchmarks."""
    pins, needs = ("-c", CONSTRAINTS, "-c", BENCH_CONSTRAINTS), group("bench")
    try:
        pip(PYTHON, "install", "-qq", *pins, *needs)
    except StepError:
        # Install one by one; the benchmarks report those that failed.
        for need in needs:
            with contextlib.suppress(StepError):
                pip(PYTHON, "install", "-qq", *pins, need)
    run(PYTHON, "-m", "benchmarks", *args)


def resolved(*args: str | Path) -> set[str]:
    """Return the pins that pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--dry-run", "--ignore-installed", "--report", report, "--target", folder)
        pip(PYTHON, "install", "-qq", *options, *args)
        chosen = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {f"{found['name']}=={found['version']}" for found in chosen}


def write_pins(file: Path, pins: set[str]) -> None:
    """Replace the pins in a file, keeping the comment at its top."""
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    file.write_text("\n".join([*head, *sorted(pins, key=str.lower), ""]))


def pin() -> None:
    """Resolve all dependencies for the oldest supported Python and write the pins."""
    oldest = ("--python-version", "3.11.0", "--only-binary", ":all:")
    pins = resolved(*oldest, *PROJECT["project"]["dependencies"], *group("dev"))
    write_pins(CONSTRAINTS, pins)
    # Some benchmark dependencies have no wheels, so pip can only resolve them for this Python.
    write_pins(BENCH_CONSTRAINTS, resolved("-c", CONSTRAINTS, *group("bench")) - pins)


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        demo,
        test,
        coverage,
        screenshots,
        lint,
        types,
        layers,
        docs,
        build,
        pythons,
        mutate,
        model,
        bench,
        pin,
    )
}


def main(name: str = "", *args: str) -> int:
    """Set up the environment and run one command."""
    if name not in COMMANDS:
        if name not in ("", "-h", "--help", "help"):
            print(f"dev.py: unknown command {name!r}\n", file=sys.stderr)
        print(__doc__)
        return 2
    try:
        if name != "model":
            setup(name, *args)
        COMMANDS[name](*args)
    except StepError as failure:
        print(f"dev.py {name}: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
