"""Determine who acts: the operator, as the kernel identifies this process, or an administrator."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path
from typing import Final

from ipguard import audit
from ipguard.cli._output import clean
from ipguard.model import Actor

_NO_LOGIN: Final = 2**32 - 1  # the login uid was never set, see proc_pid_loginuid(5)
_CLAIM_LIMIT: Final = 64
NO_EMAIL: Final = "-@localhost"
"""The e-mail address of an actor to whom nothing is mailed."""
READER: Final = Actor(username="-", email=NO_EMAIL, manages=Actor.EVERY_ACCOUNT)
"""The actor of commands that only read."""


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
