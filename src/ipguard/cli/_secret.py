"""Secrets: from a file or the environment, never from the arguments, which everybody can read."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from ipguard.cli._codes import Exit, Problem

_NUMBER_AT_MOST: Final = 200
_KEYS_AT_MOST: Final = 2**16
_SECRET_OPTIONS: Final = frozenset({"password", "sslpassword"})
# libpq reads `#` and `?` as part of a password; and a `/` is what somebody forgot to encode.
_USER_AND_PASSWORD: Final = re.compile(r"[^/@]*:([^?@]*|[^/@]*)@")


def holds_password(url: str) -> bool:
    """Tell whether a URL has a password in it, as far as anybody would read one there."""
    _, scheme, rest = url.partition("://")
    if _USER_AND_PASSWORD.match(rest) if scheme else "@" in url:
        return True
    query = url.partition("?")[2]
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        value = unquote(value)
        if unquote(name).strip().lower() in _SECRET_OPTIONS or (
            "://" in value and holds_password(value)
        ):
            return True
    # libpq takes name=value pairs too, wherever a URL may stand.
    return "password=" in unquote(url).replace(" ", "").lower()


def refuse_password(option: str, url: str, variable: str, also: str = "") -> None:
    """Refuse a URL from the arguments that has a password in it, without repeating it."""
    if holds_password(url):
        raise Problem(
            Exit.USAGE,
            f"a password in {option} can be read by everybody on this machine",
            hint=f"put the URL into {variable}{also}",
        )


def read_keys(path: str | None) -> list[bytes]:
    """Return the keys of the numbers, the one that mints first.

    A key is a text without blanks; a file or a variable holds one, or several with blanks or line
    breaks between.

    Args:
        path: A file, or None for what the environment says.
    """
    named = path or os.environ.get("IPGUARD_KEY_FILE")
    if named:
        try:
            with Path(named).open("rb") as file:
                found = file.read(_KEYS_AT_MOST).split()
        except OSError as exc:
            raise Problem(
                Exit.CONFIG,
                f"the key file {named}: {exc.strerror}",
                hint="`ipguard init` makes one for a new store; all servers share theirs",
            ) from None
    else:
        found = os.environ.get("IPGUARD_KEY", "").encode(errors="surrogateescape").split()
    if not found:
        raise Problem(
            Exit.CONFIG,
            f"the key file {named} is empty" if named else "no key for confirmation numbers",
            hint="--key-file, IPGUARD_KEY_FILE or IPGUARD_KEY",
        )
    return found


def read_number() -> str:
    """Read the confirmation number from the terminal or from standard input.

    The terminal echoes it: the number is valid for one change only, and a wrong digit costs one of
    a few attempts.
    """
    if sys.stdin.isatty():
        sys.stderr.write("Confirmation number: ")
        sys.stderr.flush()
    number = sys.stdin.readline(_NUMBER_AT_MOST).strip()
    if not number:
        raise Problem(
            Exit.USAGE,
            "no confirmation number",
            hint="type it when asked, or write it to standard input",
        )
    return number
