"""How a function becomes a command: the shared options are the same in all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import typer

from ipguard.cli._call import Call
from ipguard.cli._output import Output


class NobodyReads(Exception):
    """Who read our output has gone. A `BrokenPipeError` would be typer's to deal with."""


Options = Mapping[str, tuple[Any, object]]
Function = TypeVar("Function", bound=Callable[..., int | None])

StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="Where the store is.  [IPGUARD_URL]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, errors too.")]

EVERYWHERE: Final[Options] = {"store": (StoreOption, None), "as_json": (JsonOption, False)}
KEY: Final[Options] = {
    "key_file": (
        Annotated[
            str | None,
            typer.Option(
                "--key-file",
                metavar="FILE",
                help="The key of the numbers.  [IPGUARD_KEY_FILE; the key itself: IPGUARD_KEY]",
            ),
        ],
        None,
    ),
}
SETTINGS: Final[Options] = {
    "settings": (
        Annotated[
            str | None,
            typer.Option(
                "--settings",
                metavar="FILE",
                help="TOML with the host's WorkflowSettings.  [IPGUARD_SETTINGS]",
            ),
        ],
        None,
    ),
}
MAIL: Final[Options] = {
    "mail": (
        Annotated[
            str | None,
            typer.Option(
                "--mail",
                metavar="URL",
                help="smtp://, smtp+starttls:// or smtps:// host:port; `console` prints the mails."
                "  [IPGUARD_MAIL, where it may have user and password]",
            ),
        ],
        None,
    ),
    "mail_from": (
        Annotated[
            str | None,
            typer.Option(
                "--mail-from", metavar="ADDRESS", help="The mails' sender.  [IPGUARD_MAIL_FROM]"
            ),
        ],
        None,
    ),
    "product": (
        Annotated[
            str | None,
            typer.Option(
                "--product",
                metavar="NAME",
                help="What the mails call the platform.  [IPGUARD_PRODUCT]",
            ),
        ],
        None,
    ),
}
EMAIL: Final[Options] = {
    "email": (
        Annotated[
            str | None,
            typer.Option(
                "--email", metavar="ADDRESS", help="Where you get your mails.  [IPGUARD_EMAIL]"
            ),
        ],
        None,
    ),
}
ACTOR: Final[Options] = {
    "acting": (
        Annotated[
            str | None,
            typer.Option(
                "--as",
                metavar="USERNAME",
                help="Act as this administrator; you are noted beside.  [IPGUARD_ACTOR]",
            ),
        ],
        None,
    ),
    **EMAIL,
    "account": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--account",
                metavar="ID",
                help="An account that is managed; may be repeated."
                "  [IPGUARD_ACCOUNTS, with blanks between]",
            ),
        ],
        None,
    ),
    "every_account": (
        Annotated[bool, typer.Option("--every-account", help="All accounts are managed.")],
        False,
    ),
    "address_of_actor": (
        Annotated[
            str | None,
            typer.Option(
                "--from",
                metavar="ADDRESS",
                help="Where the administrator comes from: a change that would keep it out is"
                " refused.  [IPGUARD_ACTOR_ADDRESS]",
            ),
        ],
        None,
    ),
}
OPERATOR: Final[Options] = {**EMAIL, **MAIL, **SETTINGS}
ADMINISTRATOR: Final[Options] = {**ACTOR, **MAIL, **KEY, **SETTINGS}


def command(
    app: typer.Typer, *groups: Options, name: str | None = None
) -> Callable[[Function], Function]:
    """Make a command of a function whose first argument is the `Call`.

    The shared options are added to its own and do not reach it: the call has them.

    Args:
        app: Where the command belongs.
        groups: The shared options beside those of every command.
        name: What it is called, where that is no name of a function.
    """
    shared = {each: option for group in (*groups, EVERYWHERE) for each, option in group.items()}

    def register(function: Function) -> Function:
        def run(context: typer.Context, **given: Any) -> int | None:
            before = context.obj or {}
            options = {each: given.pop(each) or before.get(each) for each in shared}
            call = Call(Output(as_json=bool(options["as_json"])), options)
            try:
                return function(call, **given)
            except BrokenPipeError:
                raise NobodyReads from None

        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        made = [
            inspect.Parameter("context", _KEYWORD, annotation=typer.Context),
            *(each.replace(kind=_KEYWORD, annotation=hints[each.name]) for each in own),
            *(
                inspect.Parameter(each, _KEYWORD, annotation=kind, default=default)
                for each, (kind, default) in shared.items()
            ),
        ]
        run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in made}
        run.__doc__ = inspect.getdoc(function)
        app.command(name or function.__name__)(run)
        return function

    return register


_KEYWORD: Final = inspect.Parameter.KEYWORD_ONLY
