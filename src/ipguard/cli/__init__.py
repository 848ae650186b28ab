"""The command line: `ipguard`, for operators. It translates, and owns no rule.

A command is a function in one of the modules here: it asks the workflow, the guard or the store,
and shows what they answer. `run` sees to what all have in common: what an error looks like, and the
exit code. docs/cli.md is its manual.
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
from ipguard.cli import checks, doctor, lists, operators, requests, setup, transfer, users, watching
from ipguard.cli._app import JsonOption, NobodyReads, StoreOption
from ipguard.cli._codes import Exit, Problem, problem_of
from ipguard.cli._output import Output
from ipguard.errors import IPGuardError

__all__ = ["run"]

# Plain help: it is the same everywhere, and there at once.
app: Final = typer.Typer(
    name="ipguard",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:  # noqa: FBT001 - so it is called
    if asked:
        sys.stdout.write(f"ipguard {ipguard.__version__}\n")
        raise typer.Exit


@app.callback()
def _ipguard(
    context: typer.Context,
    *,
    store: StoreOption = None,
    as_json: JsonOption = False,
    version: Annotated[  # noqa: ARG001 - what it does is done by then
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which it is.")
    ] = False,
) -> None:
    """Restrict users of a trading platform to the addresses that they may log in from."""
    context.obj = {"store": store, "as_json": as_json}


for _module in (setup, users, lists, requests, checks, operators, transfer, watching, doctor):
    _module.add_to(app)

# What is raised for wrong arguments is not public, but its subclass is.
_UsageError: Final[Any] = typer.BadParameter.__mro__[2]


def run(args: list[str]) -> int:
    """Run one command.

    Args:
        args: The arguments, without the program's name.

    Returns:
        The exit code, one of `Exit`. Whatever is wrong is told on standard error.
    """
    _make_streams()
    if not args or args == ["users"]:
        args = [*args, "--help"]
    out = Output(as_json="--json" in args)
    try:
        code = _run(args, out)
        sys.stdout.flush()
    except (NobodyReads, BrokenPipeError):
        _give_up_output()  # who read has had enough
        return Exit.PIPE
    except OSError as exc:  # a full disk, perhaps
        _give_up_output()
        return out.fail(_problem(exc))
    return code


def _give_up_output() -> None:
    """Let what is still to be written go nowhere: Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _make_streams() -> None:
    """Make standard output and error accept any text.

    Output that is not for a terminal is data for another program: it is UTF-8, whatever the locale
    says. A terminal gets escapes for the characters that its encoding lacks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - as long as we live
        elif isinstance(stream, io.TextIOWrapper):
            piped = name == "stdout" and not stream.isatty()
            stream.reconfigure(encoding="utf-8" if piped else None, errors="backslashreplace")


def _run(args: list[str], out: Output) -> int:
    try:
        _log()
        return app(args, prog_name="ipguard", standalone_mode=False) or Exit.OK
    except NobodyReads:
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
        return Problem(Exit.USAGE, exc.format_message(), hint="see --help")
    if isinstance(exc, OSError):
        place = f"{exc.filename}: " if exc.filename else ""
        return Problem(Exit.FILE, f"{place}{exc.strerror or exc}")
    message = f"a defect of ipguard: {type(exc).__name__}: {exc}"
    return Problem(Exit.DEFECT, message, hint="IPGUARD_DEBUG=1 shows where")


def _log() -> None:
    """Write the library's log to a file, where the environment names one.

    It is opened before anything is done: one that cannot be would fail after the change, with the
    mails still to be sent.
    """
    path = os.environ.get("IPGUARD_LOG")
    if path:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger = logging.getLogger("ipguard")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
