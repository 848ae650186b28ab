"""One call of a command: its shared options, and what they lead to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs

import ipguard
from ipguard.cli import _who
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._output import Output
from ipguard.cli._secret import read_keys, refuse_password
from ipguard.errors import InvalidValue, IPGuardError
from ipguard.model import Actor, Change, PendingRequest, User
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore


class Telling:
    """A notifier that remembers which notices could not be sent: a workflow only logs that.

    Args:
        notifier: Who sends.

    Attributes:
        failures: Why, in words that hold no secret.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self.failures: list[str] = []

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Send a number; see `ipguard.notify.Notifier`."""
        self._notifier.number_issued(request, number, actor)

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Send a notice; see `ipguard.notify.Notifier`."""
        try:
            self._notifier.change_applied(change, actor, user)
        except Exception as exc:
            shown = str(exc) if isinstance(exc, IPGuardError) else type(exc).__name__
            self.failures.append(shown)
            raise


class Silent:
    """For what mails nobody: a workflow wants a notifier all the same."""

    def number_issued(self, *_: object, **__: object) -> None:
        """Send nothing; see `ipguard.notify.Notifier`."""
        raise AssertionError("a number was made by a command that mails nobody")

    def change_applied(self, *_: object, **__: object) -> None:
        """Send nothing; see `ipguard.notify.Notifier`."""


@attrs.define
class Call:
    """One call of a command.

    Attributes:
        out: Where its results go.
        given: The shared options, as they were given.
        told: What mailed for it, once there is a workflow.
    """

    out: Output
    given: Mapping[str, Any]
    told: Telling | None = None

    def _setting(self, name: str, variable: str) -> str | None:
        return self.given.get(name) or os.environ.get(variable) or None

    # -- the store -------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The store's URL; a password in the arguments is refused."""
        given = self.given.get("store")
        if given:
            refuse_password(
                "--store",
                given,
                "IPGUARD_URL",
                ", or the password into PGPASSWORD or PostgreSQL's password file (~/.pgpass)",
            )
        url = self._setting("store", "IPGUARD_URL")
        if not url:
            raise Problem(
                Exit.CONFIG, "no store", hint="--store sqlite:///ipguard.db, or IPGUARD_URL"
            )
        if url.partition("://")[0].lower() == "memory":
            raise Problem(
                Exit.CONFIG, "memory:// would end with this command", hint="name a file or a server"
            )
        return url

    @contextmanager
    def store(self, *, migrate: bool = False) -> Iterator[RestrictionStore]:
        """Open the store; one that is not there is made only where `migrate` says so."""
        with ipguard.open_store(self.url, migrate=migrate) as store:
            yield store

    # -- who acts --------------------------------------------------------------------------------

    def operator(self) -> Actor:
        """Return the operator, as an actor of every account."""
        return _who.operator(self._setting("email", "IPGUARD_EMAIL"))

    def actor(self, *, mailed: bool = True) -> Actor:
        """Return whom the operator acts for.

        Args:
            mailed: Whether what it does is told to it by mail, so that its address is needed.
        """
        accounts = self.given.get("account") or os.environ.get("IPGUARD_ACCOUNTS", "").split()
        return _who.actor(
            self._setting("acting", "IPGUARD_ACTOR"),
            self._setting("email", "IPGUARD_EMAIL") or (None if mailed else _who.NO_EMAIL),
            list(accounts),
            every_account=bool(self.given.get("every_account")),
            address=self._setting("address_of_actor", "IPGUARD_ACTOR_ADDRESS"),
        )

    # -- the workflow ----------------------------------------------------------------------------

    def workflow(
        self, store: RestrictionStore, *, mails: bool = True, numbers: bool = False
    ) -> ipguard.Workflow:
        """Return a workflow over the store.

        Args:
            store: The store.
            mails: Whether what is about to be done is told by mail.
            numbers: Whether it mints or reads confirmation numbers: only that needs the key.
        """
        self.told = Telling(self.notifier() if mails else Silent())
        keys = read_keys(self.given.get("key_file")) if numbers else [secrets.token_bytes(32)]
        try:
            return ipguard.Workflow(store, self.told, key=keys, settings=self.settings())
        except InvalidValue as exc:
            raise Problem(Exit.CONFIG, str(exc), kind="InvalidValue") from None

    def settings(self) -> ipguard.WorkflowSettings:
        """Return the workflow's figures: those of the host, where a file has them."""
        path = self._setting("settings", "IPGUARD_SETTINGS")
        if path is None:
            return ipguard.WorkflowSettings()
        import tomllib

        try:
            found = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as exc:
            raise Problem(Exit.CONFIG, f"the settings {path}: {exc.strerror}") from None
        except ValueError as exc:
            raise Problem(Exit.CONFIG, f"the settings {path}: {exc}") from None
        fields = {field.name: field.default for field in attrs.fields(ipguard.WorkflowSettings)}
        try:
            for name, value in found.items():
                if name not in fields:
                    raise InvalidValue(name, f"is no setting; there is {', '.join(fields)}")
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and isinstance(fields[name], timedelta):
                    found[name] = timedelta(seconds=value)
            return ipguard.WorkflowSettings(**found)
        except (InvalidValue, OverflowError) as exc:
            raise Problem(Exit.CONFIG, f"the settings {path}: {exc}") from None

    def notifier(self) -> Notifier:
        """Return what sends numbers and notices; without any there is none."""
        given = self.given.get("mail")
        if given:
            refuse_password("--mail", given, "IPGUARD_MAIL")
        url = self._setting("mail", "IPGUARD_MAIL")
        if url is None:
            raise Problem(
                Exit.CONFIG,
                "this is told by mail, and no mail server is named",
                hint="--mail smtp://127.0.0.1, or IPGUARD_MAIL; `console` prints the mails here",
            )
        from ipguard.mail import ConsoleNotifier, EmailNotifier

        product = self._setting("product", "IPGUARD_PRODUCT") or "the trading platform"
        sender = self._setting("mail_from", "IPGUARD_MAIL_FROM")
        try:
            if url == "console":
                import sys

                return ConsoleNotifier(sys.stderr, product=product)
            if sender is None:
                raise Problem(
                    Exit.CONFIG, "the mails have no sender", hint="--mail-from, IPGUARD_MAIL_FROM"
                )
            return EmailNotifier(url, sender=sender, product=product)
        except InvalidValue as exc:
            raise Problem(Exit.CONFIG, f"mail: {exc}", kind="InvalidValue") from None

    def tell_failures(self) -> int:
        """Say which notices were not sent, and return how many: the change holds all the same."""
        failures = [] if self.told is None else self.told.failures
        for reason in failures:
            self.out.note(f"the change holds, but a notice was not sent: {reason}")
        return len(failures)
