"""The program `ipguard`, also `python -m ipguard`. What it does is in `ipguard.cli`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDS_EXTRA = 7  # as `ipguard.cli._codes.Exit.CONFIG`, which cannot be had without the extra


def main() -> int:
    """Run the command line with the process's arguments; return its exit code."""
    if find_spec("typer") is None or find_spec("rich") is None:
        sys.stderr.write(
            'ipguard: the command line needs two more packages: pip install "ipguard[cli]"\n'
        )
        return _NEEDS_EXTRA
    # Late: without the extra it cannot be imported at all.
    from ipguard.cli import run  # noqa: PLC0415

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
