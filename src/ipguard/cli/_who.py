"""Who acts. The operator is whom the kernel says runs this process, on which host."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path
from typing import Final

from ipguard import audit
from ipguard.cli._codes import Exit, Problem
from ipguard.cli._output import clean
from ipguard.model import Actor

_NOBODY: Final = 2**32 - 1  # a login that was never set (see proc_pid_loginuid(5))
_LONGEST: Final = 64
NO_EMAIL: Final = "-@localhost"
"""What an actor has for an address where nothing is mailed to it."""


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"


def operator_name() -> str:
    """Return who runs this process and where. No variable of the environment is asked."""
    return f"{_name(os.getuid())}@{socket.gethostname()}"


def _login() -> str | None:
    """Return who logged in: the kernel keeps that through `su` and `sudo`."""
    try:
        uid = int(Path("/proc/self/loginuid").read_text())
    except (OSError, ValueError):
        return None
    return None if uid == _NOBODY else _name(uid)


def via() -> str:
    """Return what the trail says of this process. `SUDO_USER` is noted as what it is: a claim."""
    login, sudo = _login(), os.environ.get("SUDO_USER", "")
    euid = os.geteuid()
    found = audit.detail(
        command_line=operator_name(),
        effective=None if euid == os.getuid() else _name(euid),
        login=None if login == _name(os.getuid()) else login,
        SUDO_USER=clean(sudo)[:_LONGEST],
    )
    return clean(audit.encode(found))


def operator(email: str | None) -> Actor:
    """Return the operator as an actor of every account."""
    return Actor(
        username=operator_name(), email=_needed(email), manages=Actor.EVERY_ACCOUNT, via=via()
    )


def actor(
    name: str | None,
    email: str | None,
    accounts: list[str],
    *,
    every_account: bool,
    address: str | None,
) -> Actor:
    """Return whom the operator acts for, or the operator where that is nobody."""
    if accounts and every_account:
        raise Problem(Exit.USAGE, "--account and --every-account contradict each other")
    if name is not None and not (accounts or every_account):
        raise Problem(
            Exit.USAGE, "--as needs to know what it manages: --account ID, or --every-account"
        )
    return Actor(
        username=operator_name() if name is None else name,
        email=_needed(email),
        manages=frozenset(accounts) if accounts else Actor.EVERY_ACCOUNT,
        address=address,
        via=via(),
    )


def _needed(email: str | None) -> str:
    if not email:
        raise Problem(
            Exit.CONFIG,
            "this is told by mail, so your address is needed",
            hint="--email, or IPGUARD_EMAIL",
        )
    return email
