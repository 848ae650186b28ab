"""Define commands, and make the store, actor, workflow and notifier from their shared options.

An option that is not on the command line is read from its environment variable.
"""

from __future__ import annotations

import inspect
import os
import pwd
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import attrs
import typer

import ipguard
from ipguard import audit
from ipguard.cli._output import Exit, Output, Problem, clean
from ipguard.cli._secrets import read_keys, refuse_password
from ipguard.errors import InvalidValue, IPGuardError
from ipguard.model import Actor, Change, PendingRequest, User
from ipguard.notify import Notifier
from ipguard.store import RestrictionStore

# Plain help looks the same everywhere and needs no import of rich.
app: Final = typer.Typer(
    name="ipguard",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Function = TypeVar("Function", bound=Callable[..., int | None])

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", envvar="IPGUARD_URL", metavar="URL", help="Store, as sqlite:///ipguard.db."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for errors too.")]
_EVERY = typer.Option("--every-account", help="The administrator manages all accounts.")
_FLAGS: Final[Mapping[str, Any]] = {"as_json": JsonOption, "every_account": Annotated[bool, _EVERY]}
# The other options by their environment variable, each with its metavar and its help. The rest of
# the variable, in small letters, is the option's name in `Context.options`.
_TEXTS: Final = {
    "IPGUARD_KEY_FILE": ("--key-file FILE", "File with the key; or set IPGUARD_KEY to the key."),
    "IPGUARD_SETTINGS": ("--settings FILE", "TOML file with WorkflowSettings."),
    "IPGUARD_MAIL": (
        "--mail URL",
        (
            "Mail server, such as smtp+starttls://mail.example.com:587, or `console` to print"
            " mails. The variable may hold a password."
        ),
    ),
    "IPGUARD_MAIL_FROM": ("--mail-from ADDRESS", "Sender of the mails."),
    "IPGUARD_PRODUCT": ("--product NAME", "Name of the platform in mails."),
    "IPGUARD_EMAIL": ("--email ADDRESS", "Your e-mail address."),
    "IPGUARD_ACTOR": (
        "--as USERNAME",
        "Act on behalf of this administrator; your OS user is recorded too.",
    ),
    "IPGUARD_ACCOUNTS": (
        "--account ID",
        "Account of the administrator; may be repeated. The variable separates IDs by blanks.",
    ),
    "IPGUARD_ACTOR_ADDRESS": (
        "--from ADDRESS",
        "The administrator's IP address; a change that would lock it out needs consent.",
    ),
}
_SHARED: Final = ("store", "as_json")
KEY: Final = ("key_file",)
SETTINGS: Final = ("settings",)
MAIL: Final = ("mail", "mail_from", "product")
ACTOR: Final = ("actor", "email", "accounts", "every_account", "actor_address")
OPERATOR: Final = ("email", *MAIL, *SETTINGS)
ADMINISTRATOR: Final = (*ACTOR, *MAIL, *KEY, *SETTINGS)


def _hint(name: str) -> Any:
    """Return the annotation of an option in a command's signature."""
    variable = f"IPGUARD_{name.upper()}"
    if variable not in _TEXTS:
        return _FLAGS.get(name, StoreOption)
    flag, metavar = _TEXTS[variable][0].split()
    option = typer.Option(flag, envvar=variable, metavar=metavar, help=_TEXTS[variable][1])
    kind: Any = list[str] if name == "accounts" else str
    return Annotated[kind | None, option]


_NO_LOGIN: Final = 2**32 - 1  # the login uid was never set, see proc_pid_loginuid(5)
_CLAIM_LIMIT: Final = 64
NO_EMAIL: Final = "-@localhost"
"""The e-mail address of an actor to whom nothing is mailed."""
READER: Final = Actor(username="-", email=NO_EMAIL, manages=Actor.EVERY_ACCOUNT)
"""The actor of commands that only read."""


class OutputClosed(Exception):
    """The reader of standard output has closed it. typer would handle a `BrokenPipeError`."""


def typed(context: typer.Context, name: str) -> bool:
    """Return whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def command(
    *groups: tuple[str, ...], name: str | None = None, group: typer.Typer = app
) -> Callable[[Function], Function]:
    """Make a command from a function whose first argument is the `Context`.

    Shared options are added to the signature but not passed on; read them from the context.
    """
    shared = dict.fromkeys(chain(*groups, _SHARED))

    def register(function: Function) -> Function:
        def run(click: typer.Context, **given: Any) -> int | None:
            # --store and --json may also stand before the command.
            early: Mapping[str, Any] = click.obj or {}
            options = {each: given.pop(each) for each in shared}
            arguments = {each for each in shared if typed(click, each)}
            options |= {each: early[each] for each in early.keys() - arguments}
            output = Output(as_json=bool(options["as_json"]))
            try:
                return function(Context(output, options, arguments | early.keys()), **given)
            except BrokenPipeError:
                raise OutputClosed from None

        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter("click", kind, annotation=typer.Context),
            *(each.replace(kind=kind, annotation=hints[each.name]) for each in own),
            *(inspect.Parameter(s, kind, annotation=_hint(s), default=None) for s in shared),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__doc__ = inspect.getdoc(function)
        group.command(name or function.__name__)(run)
        return function

    return register


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"


def operator_name() -> str:
    """Return the user and host of this process. The environment is not consulted."""
    return f"{_name(os.getuid())}@{socket.gethostname()}"


def _login() -> str | None:
    """Return who logged in, which the kernel remembers through `su` and `sudo`."""
    try:
        uid = int(Path("/proc/self/loginuid").read_text())
    except (OSError, ValueError):
        return None
    return None if uid == _NO_LOGIN else _name(uid)


def via() -> str:
    """Return the process's identity for audit entries; anyone could have set `SUDO_USER`."""
    login, euid = _login(), os.geteuid()
    found = audit.detail(
        command_line=operator_name(),
        effective=None if euid == os.getuid() else _name(euid),
        login=None if login == _name(os.getuid()) else login,
        SUDO_USER=clean(os.environ.get("SUDO_USER", ""))[:_CLAIM_LIMIT],
    )
    return clean(audit.encode(found))


class RecordingNotifier:
    """A notifier that records why notices failed, without secrets; a workflow only logs that."""

    def __init__(self, notifier: Notifier | None) -> None:
        self._notifier = notifier  # None for commands that send no mail
        self.failures: list[str] = []

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        assert self._notifier is not None, "a command without mail minted a number"
        self._notifier.number_issued(request, number, actor)

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        if self._notifier is None:
            return
        try:
            self._notifier.change_applied(change, actor, user)
        except Exception as exc:
            self.failures.append(str(exc) if isinstance(exc, IPGuardError) else type(exc).__name__)
            raise


def _demand(name: str, table: dict[str, Any]) -> ipguard.Demand:
    """Read a table of the settings file; its `wait` is in seconds."""
    known = [each.name for each in attrs.fields(ipguard.Demand)]
    for key in table.keys() - set(known):
        raise InvalidValue(f"{name}.{key}", f"is unknown; a demand has {', '.join(known)}")
    if type(table.get("wait")) in (int, float):
        table = table | {"wait": timedelta(seconds=table["wait"])}
    return ipguard.Demand(**table)


@attrs.define
class Context:
    """One run of a command.

    `options` has the values of the shared options, `arguments` the names of those that were given
    on the command line, and `notifier` is the workflow's, once there is one.
    """

    out: Output
    options: Mapping[str, Any]
    arguments: set[str]
    notifier: RecordingNotifier | None = None

    @property
    def url(self) -> str:
        """The store's URL; raise Problem if it is missing, or shows a password as an argument."""
        url: str | None = self.options["store"]
        if not url:
            hint = "use --store sqlite:///ipguard.db, or IPGUARD_URL"
            raise Problem(Exit.CONFIG, "no store", hint)
        if "store" in self.arguments:
            refuse_password("--store", url, "IPGUARD_URL, or the password into PGPASSWORD")
        if self.scheme == "memory":
            message = "memory:// would end with this command"
            raise Problem(Exit.CONFIG, message, "name a file or a server")
        return url

    @property
    def scheme(self) -> str:
        """The scheme of the store's URL: `sqlite`, `postgresql` or another store's."""
        scheme = str(self.options["store"]).partition("://")[0].lower()
        return "postgresql" if scheme == "postgres" else scheme

    def store(self, *, migrate: bool = False) -> AbstractContextManager[RestrictionStore]:
        """Open the store; create or migrate it only with `migrate`."""
        return ipguard.open_store(self.url, migrate=migrate)

    def actor(self, *, mailed: bool = True) -> Actor:
        """Return the administrator that the options name, or else the operator.

        With `mailed`, mail is sent to the actor, so an e-mail address is required.
        """
        options, accounts = self.options, self.options.get("accounts") or []
        every_account = bool(options.get("every_account"))
        if accounts and every_account:
            raise Problem(Exit.USAGE, "--account and --every-account exclude each other")
        if options.get("actor") and not (accounts or every_account):
            message = "--as needs the accounts that it manages: --account ID, or --every-account"
            raise Problem(Exit.USAGE, message)
        email = options.get("email") or (None if mailed else NO_EMAIL)
        if not email:
            message = "this command sends mail and needs your e-mail address"
            raise Problem(Exit.CONFIG, message, "use --email or IPGUARD_EMAIL")
        return Actor(
            username=options.get("actor") or operator_name(),
            email=email,
            manages=frozenset(accounts) if accounts else Actor.EVERY_ACCOUNT,
            address=options.get("actor_address"),
            via=via(),
        )

    @contextmanager
    def workflow(
        self, *, mails: bool = True, numbers: bool = False
    ) -> Iterator[tuple[RestrictionStore, ipguard.Workflow]]:
        """Open the store with a workflow.

        With `mails`, the options must name a mail server; with `numbers`, a key.
        """
        self.notifier = RecordingNotifier(self.mailer() if mails else None)
        keys = read_keys(self.options["key_file"]) if numbers else [secrets.token_bytes(32)]
        settings = self.settings()
        with self.store() as store:
            yield store, ipguard.Workflow(store, self.notifier, key=keys, settings=settings)

    def settings(self) -> ipguard.WorkflowSettings:
        """Read the workflow's settings from their file, if there is one."""
        path = self.options.get("settings")
        if not path:
            return ipguard.WorkflowSettings()
        import tomllib

        fields = {field.name: field.default for field in attrs.fields(ipguard.WorkflowSettings)}
        try:
            found = tomllib.loads(Path(path).read_text("utf-8"))
            for name, value in found.items():
                if name not in fields:
                    raise InvalidValue(name, f"is unknown; known settings: {', '.join(fields)}")
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and isinstance(fields[name], timedelta):
                    found[name] = timedelta(seconds=value)
                if isinstance(value, dict) and isinstance(fields[name], ipguard.Demand):
                    found[name] = _demand(name, value)
            return ipguard.WorkflowSettings(**found)
        except OSError as exc:
            raise Problem(Exit.CONFIG, f"the settings {path}: {exc.strerror}") from None
        except (ValueError, OverflowError) as exc:
            raise Problem(Exit.CONFIG, f"the settings {path}: {exc}") from None

    def mailer(self) -> Notifier:
        """Return the notifier that the options name; one has to be named."""
        url = self.options["mail"]
        if not url:
            hint = "use --mail smtp://127.0.0.1 or IPGUARD_MAIL; `console` prints the mails"
            raise Problem(Exit.CONFIG, "this command sends mail, and has no mail server", hint)
        if "mail" in self.arguments:
            refuse_password("--mail", url, "IPGUARD_MAIL")
        from ipguard.mail import ConsoleNotifier, EmailNotifier

        product = self.options["product"] or "the trading platform"
        sender = self.options["mail_from"]
        try:
            if url == "console":
                return ConsoleNotifier(sys.stderr, product=product)
            if not sender:
                hint = "use --mail-from or IPGUARD_MAIL_FROM"
                raise Problem(Exit.CONFIG, "the mails have no sender", hint)
            return EmailNotifier(url, sender=sender, product=product)
        except InvalidValue as exc:
            raise Problem(Exit.CONFIG, f"mail: {exc}", kind="InvalidValue") from None

    def report_failures(self) -> int:
        """Report the notices that could not be sent; return how many."""
        failures = [] if self.notifier is None else self.notifier.failures
        for reason in failures:
            self.out.note(f"done, but a notice was not sent: {reason}")
        return len(failures)
