"""Import whole files through the command line, compared with the driver's own bulk insert."""

from __future__ import annotations

import csv
import ipaddress
import re
import secrets
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from benchmarks.measure import Fact, Part, Row, Scale
from ipguard import open_store
from tests.cli import PROGRAM, Shell
from tests.postgres import fresh_schema, running_server

NAMES = {"postgres": "PostgreSQL", "sqlite": "SQLite"}
FLOOR = "the driver's bulk insert of as many rows, without checks"
INTO = "restrictions (username, created_at, id, first_ip, last_ip, label, created_by)"


def imports(scale: Scale) -> Part:
    """Users and restrictions, one for each, into both SQL stores."""
    count = scale.imported
    limits = 1.0, None  # SQLite writes the rows under the lock
    rows = [
        row
        for (kind, store), limit in zip(NAMES.items(), limits, strict=True)
        for row in (
            Row(f"`users import`, {count:,} rows, {store}", "", f"{kind} users", None, "ours"),
            Row(f"`import`, {count:,} rows, {store}", FLOOR, f"{kind} restrictions", None),
            Row(f"memory of `import`, {store}", "", f"{kind} peak", 300e6, "ours", "B"),
            Row(f"another writer waits for `import`, {store}", "", f"{kind} lock", limit, "ours"),
        )
    ]

    def facts() -> Iterator[Fact]:
        for kind in NAMES:
            figures = measure(kind, count)
            yield f"{kind} users", figures["users_seconds"], None
            yield f"{kind} restrictions", figures["restrictions_seconds"], figures["driver"]
            yield f"{kind} peak", figures["restrictions_peak_mb"] * 1e6, None
            yield f"{kind} lock", figures["restrictions_lock_seconds"], None

    return Part(title="Bulk import", rows=rows, facts=facts, processes=1)


def measure(kind: str, count: int) -> dict[str, float]:
    """Import users and restrictions, then the restrictions again, so that every row is refused."""
    with place(kind) as (shell, folder), place(kind) as (other, _):
        shell.env |= {"IPGUARD_MAIL": "console"}
        users = write_users(folder / "users.csv", count)
        rows = write_restrictions(folder / "rows.csv", count)
        figures = {"driver": insert(other.env["IPGUARD_URL"], rows)}
        imported = ("import", rows, "--reason", "measured")
        for name, code, *args in (
            ("users", 0, "users", "import", users),
            ("restrictions", 0, *imported),
            ("all_bad", 9, *imported),
        ):
            watched = Watched(shell, code, *map(str, args))
            figures |= {
                f"{name}_seconds": watched.seconds,
                f"{name}_peak_mb": watched.peak / 1e6,
                f"{name}_lock_seconds": watched.longest,
            }
    return figures


@contextmanager
def place(kind: str) -> Iterator[tuple[Shell, Path]]:
    """Provide a command line with an empty store, and its folder."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder}/ipguard.db"
        if kind == "postgres":
            url = stack.enter_context(running_server()).url(schema=fresh_schema())
        open_store(url, migrate=True).close()
        yield Shell(folder, IPGUARD_URL=url), folder


def write_users(path: Path, count: int) -> Path:
    """Write a file of users."""
    lines = (f"user{n:07},User {n},U{n % 1000},u{n}@x.example\n" for n in range(count))
    path.write_text("username,full_name,account_id,email\n" + "".join(lines))
    return path


def write_restrictions(path: Path, count: int) -> Path:
    """Write a file with one restriction for each user, all of different addresses."""
    first = ipaddress.ip_address("11.0.0.0")
    lines = (f"user{n:07},{first + n},office {n},\n" for n in range(count))
    path.write_text("username,addresses,label,expires_at\n" + "".join(lines))
    return path


class Watched:
    """A command that ran while another writer took the store's lock again and again."""

    def __init__(self, shell: Shell, code: int, *args: str) -> None:
        self.peak = 0  # its largest resident memory, in bytes
        self.longest = 0.0  # how long the other writer waited at most, in seconds
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*PROGRAM, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=shell.folder,
            env=shell.env,
            text=True,
        )
        over = threading.Event()
        watchers = [
            threading.Thread(target=self._watch, args=(process.pid, over)),
            threading.Thread(target=self._write, args=(shell.env["IPGUARD_URL"], over)),
        ]
        for watcher in watchers:
            watcher.start()
        try:
            _, errors = process.communicate(timeout=3600)
        finally:
            self.seconds = time.perf_counter() - begun
            over.set()
            for watcher in watchers:
                watcher.join()
        assert process.returncode == code, errors[-1000:]

    def _watch(self, pid: int, over: threading.Event) -> None:
        while not over.wait(0.02):
            with suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                self.peak = max(self.peak, int(found[1]) * 1024 if found else 0)

    def _write(self, url: str, over: threading.Event) -> None:
        separator = "&" if "?" in url else "?"
        with open_store(f"{url}{separator}timeout=600") as store:
            while not over.wait(0.1):
                begun = time.perf_counter()
                with store.transaction():
                    self.longest = max(self.longest, time.perf_counter() - begun)


def insert(url: str, file: Path) -> float:
    """Insert restrictions with the driver alone; return the seconds."""
    begun = time.perf_counter()
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            db.executemany(f"INSERT INTO {INTO} VALUES (?, ?, ?, ?, ?, ?, ?)", _rows(file))
        return time.perf_counter() - begun
    import psycopg  # noqa: PLC0415 - an extra

    dsn, _, schema = url.rpartition("&schema=")
    statement = f"COPY {schema}.{INTO} FROM STDIN"
    with psycopg.connect(dsn) as pg, pg.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for row in _rows(file):
            copy.write_row(row)
    return time.perf_counter() - begun


def _rows(path: Path) -> Iterator[tuple[object, ...]]:
    with path.open(newline="") as file:
        lines = csv.reader(file)
        next(lines)
        for user, text, label, _ in lines:
            packed = ipaddress.ip_address(text).packed
            yield user, 0, secrets.token_hex(8), packed, packed, label, "boss"
