"""SSH logins that are checked through PAM, by a real sshd with the lines of docs/pam.md."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

import ipguard
from ipguard.cli._context import READER
from ipguard.testing import Outbox
from tests.postgres import free_port, until
from tests.requirements import missing

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parent.parent / "docs" / "pam.md"
PROGRAM = Path(sys.executable).with_name("ipguard")
USER = pwd.getpwuid(os.getuid()).pw_name
LISTED, OTHER = "127.0.0.2", "127.0.0.3"


def lines(phase: str) -> list[str]:
    """Return the lines of the page for one phase."""
    found = re.findall(rf"^   ({phase} .+)$", PAGE.read_text(), re.MULTILINE)
    assert len(found) == 2
    return found


@attrs.define
class Sshd:
    """An sshd on loopback, and its clients. All users log in with the same key and password."""

    folder: Path
    port: int
    service: Path

    def rules(
        self, *phases: str, breakglass: str = "nobody-here", store: str = "ipguard.db"
    ) -> None:
        """Write the PAM service: the lines of the page for these phases, and a password check."""
        page = [line for phase in phases for line in lines(phase)]
        text = "\n".join(
            [
                *page,
                f"auth required pam_exec.so quiet expose_authtok {self.folder}/password",
                "auth required pam_permit.so",
                "account required pam_permit.so",
                "session required pam_permit.so",
                "",
            ]
        )
        for old, new in (
            ("user = breakglass", f"user = {breakglass}"),
            ("/opt/ipguard/bin/ipguard", str(PROGRAM)),
            ("/var/lib/ipguard/ipguard.db", f"{self.folder}/{store}"),
            ("/var/log/ipguard-pam.log", f"{self.folder}/log"),
        ):
            assert old in text or not page
            text = text.replace(old, new)
        self.service.write_text(text)

    def log_in(self, source: str, *options: str, password: str | None = None) -> tuple[int, str]:
        """Log in from a loopback address; return the exit code, and what the client was shown."""
        means = ["-o", "BatchMode=yes"]
        if password is not None:
            means = ["-o", "PubkeyAuthentication=no", "-o", "NumberOfPasswordPrompts=1"]
        asking = {"SSH_ASKPASS": f"{self.folder}/ask", "SSH_ASKPASS_REQUIRE": "force"}
        done = subprocess.run(
            [
                *("ssh", "-F", "none", "-b", source, "-p", str(self.port), *means),
                *("-o", f"UserKnownHostsFile={self.folder}/known", "-o", "IdentitiesOnly=yes"),
                *("-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"),
                *("-i", f"{self.folder}/id", *options, f"{USER}@127.0.0.1", "echo in"),
            ],
            capture_output=True,
            text=True,
            env=os.environ | asking | {"PASSWORD": password or ""},
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert (done.stdout == "in\n") == (done.returncode == 0), done
        return done.returncode, done.stderr

    def lets_in(self, source: str) -> bool:
        """Return whether a login with the right key gets in."""
        return self.log_in(source)[0] == 0

    def answers(self) -> list[str]:
        """Return what `ipguard check` has written, oldest first."""
        log = (self.folder / "log").read_text().splitlines()
        return [line for line in log if not line.startswith("***")]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if os.geteuid() != 0:
        pytest.skip("only root can write a PAM service and run an sshd that uses it")
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if not (program and shutil.which("ssh")):
        missing("sshd or ssh", "openssh-server openssh-client")
    folder = tmp_path_factory.mktemp("sshd")
    # sshd takes the name of the PAM service from its own name.
    name = f"ipguard-test-{uuid.uuid4().hex[:8]}"
    (folder / name).symlink_to(program)
    for script, line in (("password", '[ "$(cat)" = right ]'), ("ask", 'echo "$PASSWORD"')):
        (folder / script).write_text(f"#!/bin/sh\n{line}\n")
        (folder / script).chmod(0o755)
    for key in ("host", "id"):
        command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        subprocess.run(command, check=True)
    port = free_port()
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "id.pub",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
        "UsePAM": "yes",
        "UseDNS": "no",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    Path("/run/sshd").mkdir(exist_ok=True)
    service = Path("/etc/pam.d") / name
    with ipguard.open_store(f"sqlite:///{folder}/ipguard.db") as store:
        store.put_users([ipguard.User(username=USER, full_name=USER, account_id="U1")])
        flow = ipguard.Workflow(store, Outbox(), key=bytes(range(32)))
        flow.impose(READER, USER, LISTED, reason="for this file")
    process = subprocess.Popen(
        [folder / name, "-D", "-E", folder / "sshd.log", "-f", "/dev/null", *options],
        stdin=subprocess.DEVNULL,
    )
    try:
        until(lambda: _listens(port), "sshd listens")
        yield Sshd(folder, port, service)
    finally:
        process.terminate()
        process.wait(10)
        service.unlink(missing_ok=True)


def _listens(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 10).close()
        return True
    return False


def test_a_key_is_checked_in_the_account_phase(sshd: Sshd) -> None:
    """The client's address decides, and the client is not told why."""
    sshd.rules("account")
    assert sshd.lets_in(LISTED)
    code, shown = sshd.log_in(OTHER)
    assert code == 255
    assert "ipguard" not in shown
    assert "by PAM account configuration" in (sshd.folder / "sshd.log").read_text()
    assert [answer.split(" by ")[0] for answer in sshd.answers()[-2:]] == [
        "allowed: listed",
        "not allowed: not_listed",
    ]


def test_a_key_skips_the_auth_phase(sshd: Sshd) -> None:
    """As the page warns: there, the check is not asked."""
    sshd.rules("auth")
    assert sshd.lets_in(OTHER)


def test_a_refused_address_looks_like_a_wrong_password(sshd: Sshd) -> None:
    """With the check in both phases; without it in the auth phase, the answer differs."""
    sshd.rules("auth", "account")
    assert sshd.log_in(LISTED, password="right")[0] == 0
    refused = sshd.log_in(OTHER, password="right")
    assert refused == sshd.log_in(LISTED, password="wrong")
    assert "Permission denied" in refused[1]
    sshd.rules("account")
    assert sshd.log_in(OTHER, password="right") != refused


@pytest.mark.parametrize("broken", ["store", "program"])
def test_a_missing_part_refuses_all_but_break_glass(sshd: Sshd, broken: str) -> None:
    """A missing store or program refuses all logins but those of the exempted account."""
    for breakglass in ("nobody-here", USER):
        sshd.rules("account", breakglass=breakglass, store="gone.db")
        if broken == "program":
            text = sshd.service.read_text().replace(str(PROGRAM), f"{sshd.folder}/gone")
            sshd.service.write_text(text)
        assert sshd.lets_in(LISTED) == (breakglass == USER)
