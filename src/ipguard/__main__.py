"""Run the command line: `ipguard`, or `python -m ipguard`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDS_EXTRA = 7  # Exit.CONFIG of ipguard.cli, which cannot be imported without the extra


def main() -> int:
    """Run the command line with the process's arguments; return its exit code."""
    if find_spec("typer") is None or find_spec("rich") is None:
        sys.stderr.write(
            'ipguard: the command line needs two more packages: pip install "ipguard[cli]"\n'
        )
        return _NEEDS_EXTRA
    # Import late: the import fails without the extra.
    from ipguard.cli import run  # noqa: PLC0415

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
