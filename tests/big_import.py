"""An import of many restrictions, as a process that is measured: `python -m tests.big_import`.

python -m tests.big_import sqlite 1000000
python -m tests.big_import postgres 1000000
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ipguard
from tests.cli import Shell
from tests.postgres import fresh_schema, running_server


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
    """A command in a terminal, whose memory is watched through the kernel.

    Attributes:
        peak: The most resident memory, in bytes.
        longest: The longest that another writer waited for its turn meanwhile, in seconds.
        seconds: How long it took.
        shown: What the terminal showed.
    """

    def __init__(self, shell: Shell, *args: str | Path) -> None:
        began = time.perf_counter()
        self.peak = 0
        self.longest = 0.0
        terminal = shell.terminal(*args)
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(terminal.process.pid, over))
        writer = threading.Thread(target=self._write, args=(shell.env["IPGUARD_URL"], over))
        watcher.start()
        writer.start()
        try:
            terminal.process.timeout = 3600
            self.shown = terminal.ends()
        finally:
            over.set()
            watcher.join()
            writer.join()
        self.seconds = time.perf_counter() - began

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
        """Take the writer's turn again and again, and see how long it takes to get."""
        separator = "&" if "?" in url else "?"
        with ipguard.open_store(f"{url}{separator}timeout=600") as store:
            while not over.wait(0.1):
                began = time.perf_counter()
                with store.transaction():
                    self.longest = max(self.longest, time.perf_counter() - began)


@contextmanager
def place(kind: str) -> Iterator[tuple[Shell, Path]]:
    """Give a folder and an empty store in it, or in PostgreSQL."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "sqlite":
            shell = Shell(folder)
            ipguard.open_store(shell.env["IPGUARD_URL"]).close()
            yield shell, folder
            return
        with running_server() as server:
            url = server.url(schema=fresh_schema())
            ipguard.open_store(url, migrate=True).close()
            yield Shell(folder, IPGUARD_URL=url), folder


def measure(kind: str, count: int) -> dict[str, Any]:
    """Import users and restrictions, and return the figures."""
    with place(kind) as (shell, folder):
        shell.env |= {"IPGUARD_MAIL": "console"}
        users = Watched(shell, "users", "import", write_users(folder / "users.csv", count))
        rows = write_restrictions(folder / "rows.csv", count)
        done = Watched(shell, "import", rows, "--reason", "measured")
        assert f"{count:,} restrictions hold" in done.shown, done.shown
        began = time.perf_counter()
        again = shell("import", rows, "--reason", "again", "--dry-run", "--json")
        assert again.code == 9
        assert len(again.error["rows"]) == count
        named = time.perf_counter() - began
        with ipguard.open_store(shell.env["IPGUARD_URL"]) as store:
            _, policies = store.load_all_policies()
            with closing(policies):  # type: ignore[type-var]
                assert sum(1 for _ in policies) == count
    return {
        "store": kind,
        "rows": count,
        "users_seconds": round(users.seconds, 1),
        "users_peak_mb": round(users.peak / 1e6),
        "users_lock_seconds": round(users.longest, 2),
        "seconds": round(done.seconds, 1),
        "peak_mb": round(done.peak / 1e6),
        "lock_seconds": round(done.longest, 2),
        "all_bad_seconds": round(named, 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
