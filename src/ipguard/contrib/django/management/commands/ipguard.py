"""`manage.py ipguard`: the command line of ipguard, with the project's settings."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import Any, Final

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

_NAMES: Final = ("URL", "KEY_FILE", "MAIL", "MAIL_FROM", "PRODUCT")


class Command(BaseCommand):
    help = "Run ipguard's command line with the project's settings: manage.py ipguard list"
    requires_system_checks = ()  # `init` makes the key file that a check misses

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("args", nargs=argparse.REMAINDER)

    def run_from_argv(self, argv: list[str]) -> None:
        """Leave all options to ipguard; Django would take some for its own."""
        try:
            self.handle(*argv[2:])
        except CommandError as error:
            self.stderr.write(str(error))
            sys.exit(1)

    def handle(self, *args: str, **_: Any) -> None:
        if find_spec("typer") is None or find_spec("rich") is None:
            raise CommandError('this needs two more packages: pip install "ipguard[cli]"')
        from ipguard.cli import run

        given = getattr(settings, "IPGUARD", {})
        for name in _NAMES:
            if isinstance(given.get(name), (str, os.PathLike)):
                os.environ[f"IPGUARD_{name}"] = os.fspath(given[name])
        os.environ.setdefault("IPGUARD_MAIL_FROM", settings.DEFAULT_FROM_EMAIL)
        if code := run(list(args)):
            sys.exit(code)
