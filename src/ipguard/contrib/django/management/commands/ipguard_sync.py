"""`manage.py ipguard_sync`: register the project's users, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser

from ipguard.contrib.django import kit
from ipguard.model import User


class Command(BaseCommand):
    help = "Register the project's users with ipguard; run it once, and then every night."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--remove-missing",
            action="store_true",
            help="Remove registered users that the project does not have.",
        )

    def handle(self, *_: str, remove_missing: bool = False, **__: Any) -> None:
        done = kit().store.sync_users(self._records(), remove_missing=remove_missing)
        for record, error in done.refused:
            name = record.spelling if isinstance(record, User) else record["username"]
            self.stderr.write(f"refused: {name}: {error}")
        self.stdout.write(
            f"{done.added} added, {done.changed} changed, {done.renamed} renamed, "
            f"{done.moved} moved, {done.removed} removed, {len(done.refused)} refused"
        )
        if done.refused:
            raise CommandError("some users were refused")

    def _records(self) -> Iterator[User | dict[str, str]]:
        for user in get_user_model()._default_manager.iterator():  # noqa: SLF001
            try:
                record = kit().record(user)
            except Exception as error:
                # Incomplete, so that the store reports it and does not take the user for missing.
                self.stderr.write(f"USER failed: {user.get_username()}: {error!r}")
                yield {"username": user.get_username(), "uid": str(user.pk)}
            else:
                if record is not None:
                    yield record
