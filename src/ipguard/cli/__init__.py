"""The command line, `ipguard`: it translates for operators, and owns no rule.

A command is a function in one of these modules that asks the workflow, the guard or the store, and
shows the answer. `run` handles errors and exit codes. docs/cli.md is the manual.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import ipguard
from ipguard.cli._context import JsonOption, OutputClosed, StoreOption, app, typed
from ipguard.cli._output import Exit, Output, Problem, problem_of
from ipguard.errors import IPGuardError

# The modules define their commands when they are imported; `--help` has them in this order.
# isort: off
from ipguard.cli import setup, users, changes, checks, sightings, history, record  # noqa: F401
from ipguard.cli import transfer, doctor  # noqa: F401
# isort: on

__all__ = ["run"]

# typer exports this class of errors in arguments only through a subclass.
_UsageError: Final[Any] = typer.BadParameter.__mro__[2]


def _version(asked: bool) -> None:  # noqa: FBT001 - typer passes it by position
    if asked:
        sys.stdout.write(f"ipguard {ipguard.__version__}\n")
        raise typer.Exit


@app.callback()
def _ipguard(
    context: typer.Context,
    *,
    store: StoreOption = None,
    as_json: JsonOption = False,
    version: Annotated[  # noqa: ARG001 - the callback has handled it
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Restrict the users of a trading platform to the IP addresses they may log in from.

    Example: ipguard request jsmith 203.0.113.0/29 --label office
    """
    given = {"store": store, "as_json": as_json}
    context.obj = {name: value for name, value in given.items() if typed(context, name)}


def run(args: list[str]) -> int:
    """Run one command, and return its exit code; `args` is without the program's name."""
    _prepare_streams()
    if not args or args == ["users"]:
        args = [*args, "--help"]
    out = Output(as_json="--json" in args)
    try:
        code = _run(args, out)
        sys.stdout.flush()
    except (OutputClosed, BrokenPipeError):
        _discard_output()
        return Exit.PIPE
    except OSError as exc:  # such as a full disk
        _discard_output()
        return out.fail(_problem(exc))
    return code


def _discard_output() -> None:
    """Discard unwritten output, which Python would otherwise try to write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Let standard output and standard error accept any text.

    Output to another program is UTF-8 in every locale. A terminal gets escapes for characters that
    its encoding lacks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until exit
        elif isinstance(stream, io.TextIOWrapper):
            piped = name == "stdout" and not stream.isatty()
            stream.reconfigure(encoding="utf-8" if piped else None, errors="backslashreplace")


def _run(args: list[str], out: Output) -> int:
    try:
        _start_log()
        return app(args, prog_name="ipguard", standalone_mode=False) or Exit.OK
    except OutputClosed:
        raise
    except (KeyboardInterrupt, typer.Abort):
        return Exit.INTERRUPTED
    except Exception as exc:
        problem = _problem(exc)
        if problem.code is Exit.DEFECT and os.environ.get("IPGUARD_DEBUG"):
            raise
        return out.fail(problem)


def _problem(exc: Exception) -> Problem:
    if isinstance(exc, Problem):
        return exc
    if isinstance(exc, IPGuardError):
        return problem_of(exc)
    if isinstance(exc, _UsageError):
        return Problem(Exit.USAGE, exc.format_message(), "see --help")
    if isinstance(exc, OSError):
        place = f"{exc.filename}: " if exc.filename else ""
        return Problem(Exit.FILE, f"{place}{exc.strerror or exc}")
    message = f"a defect of ipguard: {type(exc).__name__}: {exc}"
    return Problem(Exit.DEFECT, message, "IPGUARD_DEBUG=1 shows the traceback")


def _start_log() -> None:
    """Write the library's log to the file named by `IPGUARD_LOG`.

    Open it before the command runs: a failure to open it later would come after the change, with
    mails still unsent.
    """
    path = os.environ.get("IPGUARD_LOG")
    if path:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger = logging.getLogger("ipguard")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
