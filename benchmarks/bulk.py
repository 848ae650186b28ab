"""What whole files take: users and restrictions through the command line, as processes.

.venv/bin/python -m benchmarks.bulk [rows] [sqlite|postgres ...]

For both imports: the time, the most memory of the command, and the longest that another writer,
who takes turn after turn meanwhile, waited for one. `times_driver` is the time beside what the
driver's own bulk insert of the same file into the same tables takes in the same run, which checks
nothing and writes no search terms. Then the same restrictions again, so that every row is bad.
"""

from __future__ import annotations

import csv
import ipaddress
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import ipguard
from tests.cli import PROGRAM, Shell
from tests.postgres import fresh_schema, running_server

HOUR = 3600
USERS = "users (username, full_name, account_id, email)"
RESTRICTIONS = "restrictions (username, created_at, id, first_ip, last_ip, label, created_by)"


def address(number: int) -> str:
    """Return the address of a user: all of them are different."""
    return f"{11 + number // 2**24}.{number // 2**16 % 256}.{number // 2**8 % 256}.{number % 256}"


def write_users(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.write("username,full_name,account_id,email\n")
        for number in range(count):
            file.write(f"user{number:07},User {number},U{number % 1000},u{number}@x.example\n")
    return path


def write_restrictions(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.write("username,addresses,label,expires_at\n")
        for number in range(count):
            file.write(f"user{number:07},{address(number)},office {number},\n")
    return path


class Watched:
    """A process whose memory is watched through the kernel, while another writer takes turns.

    Args:
        url: The store.
        pid: The process.
        ends: Waits for its end.

    Attributes:
        peak: The most resident memory, in bytes.
        longest: The longest that the other writer waited for its turn, in seconds.
        seconds: How long the process took.
    """

    def __init__(self, url: str, pid: int, ends: Callable[[], object]) -> None:
        began = time.perf_counter()
        self.peak = 0
        self.longest = 0.0
        over = threading.Event()
        threads = [
            threading.Thread(target=self._watch, args=(pid, over)),
            threading.Thread(target=self._write, args=(url, over)),
        ]
        for thread in threads:
            thread.start()
        try:
            ends()
        finally:
            self.seconds = time.perf_counter() - began
            over.set()
            for thread in threads:
                thread.join()

    def _watch(self, pid: int, over: threading.Event) -> None:
        while not over.wait(0.02):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)

    def _write(self, url: str, over: threading.Event) -> None:
        separator = "&" if "?" in url else "?"
        with ipguard.open_store(f"{url}{separator}timeout=600") as store:
            while not over.wait(0.1):
                began = time.perf_counter()
                with store.transaction():
                    self.longest = max(self.longest, time.perf_counter() - began)

    def figures(self, name: str) -> dict[str, float]:
        return {
            f"{name}_seconds": round(self.seconds, 1),
            f"{name}_peak_mb": round(self.peak / 1e6),
            f"{name}_lock_seconds": round(self.longest, 2),
        }


def in_terminal(shell: Shell, expected: str, *args: str | Path) -> Watched:
    """Run a command that shows its progress, and then what is expected."""
    terminal, shown = shell.terminal(*args), []
    terminal.process.timeout = HOUR
    url, pid = shell.env["IPGUARD_URL"], terminal.process.pid
    watched = Watched(url, pid, lambda: shown.append(terminal.ends()))
    assert " rows" in shown[0], shown
    assert expected in shown[0], shown
    return watched


def refused(shell: Shell, count: int, *args: str | Path) -> Watched:
    """Run a command that refuses all rows of a file, and names each of them."""
    with (shell.folder / "refused").open("w+") as said:
        process = subprocess.Popen(
            [*PROGRAM, *map(str, args), "--json"],
            stdin=subprocess.DEVNULL,
            stderr=said,
            cwd=shell.folder,
            env=shell.env,
        )
        watched = Watched(shell.env["IPGUARD_URL"], process.pid, lambda: process.wait(HOUR))
        assert process.returncode == 9
        said.seek(0)
        lines = [row["line"] for row in json.load(said)["error"]["rows"]]
    assert lines == list(range(2, count + 2))
    return watched


@contextmanager
def place(kind: str) -> Iterator[tuple[Shell, Path]]:
    """Give a folder and an empty store in it, or in PostgreSQL."""
    with places(kind, 1) as ((url,), folder):
        yield Shell(folder, IPGUARD_URL=url), folder


@contextmanager
def places(kind: str, count: int) -> Iterator[tuple[list[str], Path]]:
    """Give the URLs of some empty stores, and a folder."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if kind == "sqlite":
            urls = [f"sqlite:///{folder}/ipguard{number}.db" for number in range(count)]
        else:
            server = stack.enter_context(running_server())
            urls = [server.url(schema=fresh_schema()) for _ in range(count)]
        for url in urls:
            ipguard.open_store(url, migrate=True).close()
        yield urls, folder


# ------------------------------------------------------------------- the driver's own bulk insert


def _user_rows(path: Path) -> Iterator[tuple[object, ...]]:
    with path.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        yield from (tuple(row) for row in rows)


def _restriction_rows(path: Path) -> Iterator[tuple[object, ...]]:
    with path.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for username, text, label, _ in rows:
            packed = ipaddress.ip_address(text).packed
            yield username, 0, secrets.token_hex(8), packed, packed, label, "boss"


def driver(url: str, users: Path, rows: Path) -> list[float]:
    """Insert both files with the driver alone, into another empty store; return the seconds."""
    insert, found = _psycopg if url.startswith("postgres") else _sqlite3, []
    for into, given in ((USERS, _user_rows(users)), (RESTRICTIONS, _restriction_rows(rows))):
        began = time.perf_counter()
        insert(url, into, given)
        found.append(time.perf_counter() - began)
    return found


def _sqlite3(url: str, into: str, rows: Iterator[tuple[object, ...]]) -> None:
    import sqlite3  # noqa: PLC0415

    marks = ", ".join("?" * len(into.split(",")))
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
        db.executemany(f"INSERT INTO {into} VALUES ({marks})", rows)


def _psycopg(url: str, into: str, rows: Iterator[tuple[object, ...]]) -> None:
    import psycopg  # noqa: PLC0415 - an extra

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    statement = f"COPY {options.pop('schema')}.{into} FROM STDIN"
    with (
        psycopg.connect(urlunsplit(parts._replace(query=urlencode(options)))) as db,
        db.cursor() as cursor,
        cursor.copy(statement.encode()) as copy,
    ):
        for row in rows:
            copy.write_row(row)


# ---------------------------------------------------------------------------------- all of it


def measure(kind: str, count: int) -> dict[str, Any]:
    """Import users and restrictions, and return the figures."""
    with places(kind, 2) as ((url, other), folder):
        shell = Shell(folder, IPGUARD_URL=url, IPGUARD_MAIL="console")
        users = write_users(folder / "users.csv", count)
        rows = write_restrictions(folder / "rows.csv", count)
        own = driver(other, users, rows)
        put = in_terminal(shell, f"{count} rows registered", "users", "import", users)
        args = ("import", rows, "--reason", "measured")
        done = in_terminal(shell, f"{count:,} restrictions hold", *args)
        bad = refused(shell, count, *args)
        with ipguard.open_store(url) as store:
            revision, policies = store.load_all_policies()
            with closing(policies):  # type: ignore[type-var]
                assert sum(1 for _ in policies) == count
            assert revision == 2
    return {
        "store": kind,
        "rows": count,
        **put.figures("users"),
        "users_times_driver": round(put.seconds / own[0], 1),
        **done.figures("restrictions"),
        "restrictions_times_driver": round(done.seconds / own[1], 1),
        **bad.figures("all_bad"),
    }


def main(args: list[str]) -> None:
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    numbers = [int(arg) for arg in args if arg.isdigit()]
    kinds = [arg for arg in args if not arg.isdigit()] or ["sqlite", "postgres"]
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for kind in kinds:
        for name, figure in measure(kind, *(numbers or [100_000])[:1]).items():
            print(f"{name:28} {figure if isinstance(figure, str) else f'{figure:>12,}'}")


if __name__ == "__main__":
    main(sys.argv[1:])
