"""Read secrets from files, the environment or a prompt, never from arguments.

Every user of the machine can read the arguments of a process.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from ipguard.cli._output import Exit, Problem
from ipguard.confirmation import Keyring
from ipguard.errors import InvalidValue

_NUMBER_LIMIT: Final = 200
_KEYS_LIMIT: Final = 2**16
HOW_TO_GIVE_NUMBER: Final = "type it when asked, or write it to standard input"
_SECRET_OPTIONS: Final = frozenset({"password", "sslpassword"})
# libpq accepts `#` and `?` in a password; a `/` may be there unencoded.
_USER_AND_PASSWORD: Final = re.compile(r"[^/@]*:([^?@]*|[^/@]*)@")


def holds_password(url: str) -> bool:
    """Return whether any reader of URLs could find a password in this one."""
    _, scheme, rest = url.partition("://")
    if _USER_AND_PASSWORD.match(rest) if scheme else "@" in url:
        return True
    for pair in url.partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        value = unquote(value)
        if unquote(name).strip().lower() in _SECRET_OPTIONS:
            return True
        if "://" in value and holds_password(value):
            return True
    # libpq also accepts name=value pairs instead of a URL.
    return "password=" in unquote(url).replace(" ", "").lower()


def refuse_password(option: str, url: str, alternative: str) -> None:
    """Refuse a URL from the arguments that holds a password, without repeating it."""
    if holds_password(url):
        raise Problem(
            Exit.USAGE,
            f"every user of this machine can read a password in {option}",
            f"put the URL into {alternative}",
        )


def key_in_environment() -> list[bytes]:
    return os.environ.get("IPGUARD_KEY", "").encode(errors="surrogateescape").split()


def read_keys(path: str | None) -> list[bytes]:
    """Return the keys in a key file or else `IPGUARD_KEY`, separated by blanks; the first mints."""
    if not path:
        keys = key_in_environment()
    else:
        try:
            with Path(path).open("rb") as file:
                keys = file.read(_KEYS_LIMIT).split()
        except OSError as exc:
            hint = "`ipguard init` makes one for a new store; all servers share their key"
            raise Problem(Exit.CONFIG, f"the key file {path}: {exc.strerror}", hint) from None
    if not keys:
        message = f"the key file {path} is empty" if path else "no key for confirmation numbers"
        raise Problem(Exit.CONFIG, message, "use --key-file, IPGUARD_KEY_FILE or IPGUARD_KEY")
    try:
        Keyring(keys)
    except InvalidValue as exc:
        raise Problem(Exit.CONFIG, str(exc), kind="InvalidValue") from None
    return keys


def read_number() -> str:
    """Read the confirmation number from the terminal or from standard input.

    The terminal echoes it: it is valid for one change only, and a typing error costs an attempt.
    """
    if sys.stdin.isatty():
        sys.stderr.write("Confirmation number: ")
        sys.stderr.flush()
    number = sys.stdin.readline(_NUMBER_LIMIT).strip()
    if not number:
        raise Problem(Exit.USAGE, "no confirmation number", HOW_TO_GIVE_NUMBER)
    return number
