"""Run the command line in this process, in a process of its own, or in a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pexpect  # type: ignore[import-untyped]
import pytest
from jsonschema.validators import Draft202012Validator  # type: ignore[import-untyped]
from referencing import Registry, Resource

import ipguard
from ipguard.cli import run
from ipguard.model import Action

SCHEMAS = Path(__file__).resolve().parent.parent / "docs" / "schemas"
PROGRAM = (sys.executable, "-m", "ipguard")
PATIENCE = 60


@cache
def schemas() -> dict[str, Any]:
    """Return the schemas of the docs by the name of their file, each one checked."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(SCHEMAS.glob("*.json"))}
    for schema in found.values():
        Draft202012Validator.check_schema(schema)
    return found


@cache
def validator(name: str) -> Draft202012Validator:
    """Return the validator of a schema."""
    known: Registry[Any] = Registry().with_resources(
        (each, Resource.from_contents(schema)) for each, schema in schemas().items()
    )
    return Draft202012Validator(
        schemas()[f"{name}.json"], registry=known, format_checker=jsonschema.FormatChecker()
    )


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> Any:
        """The error that `--json` wrote to standard error; checked against its schema."""
        found = json.loads(self.err)
        validator("error").validate(found)
        assert found["error"]["exit"] == self.code
        return found["error"]


class Shell:
    """A command line in a folder, with an environment.

    Args:
        folder: The working directory; the store is `ipguard.db` in it unless `env` says otherwise.
        env: Variables to add to those of this process.
    """

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.env = {name: text for name, text in os.environ.items() if "IPGUARD" not in name}
        self.env |= {
            "TERM": "xterm-256color",
            "COLUMNS": "200",
            "IPGUARD_URL": f"sqlite:///{folder}/ipguard.db",
            "IPGUARD_KEY_FILE": str(folder / "ipguard.key"),
            "IPGUARD_EMAIL": "ops@bank.example",
        }
        self.env.pop("NO_COLOR", None)
        self.env.pop("PYTHONUNBUFFERED", None)  # output must be flushed to be seen
        self.env |= env

    def __call__(
        self, *args: str | Path, stdin: str | bytes = b"", env: Mapping[str, str] | None = None
    ) -> Done:
        """Run a command in this process, without a terminal, which saves half a second of CPU."""
        given = stdin.encode() if isinstance(stdin, str) else stdin
        streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (given, b"", b"")]
        names, logger = ("stdin", "stdout", "stderr"), logging.getLogger("ipguard")
        state = list(logger.handlers), logger.level
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(self.folder):
            for name, stream in zip(names, streams, strict=True):
                patch.setattr(sys, name, stream)
            environment = dict(os.environ)
            os.environ.clear()
            os.environ.update(self.env | dict(env or {}))
            try:
                code = run(list(map(str, args)))
            except SystemExit as left:  # shell completion
                code = int(left.code or 0)
            finally:
                os.environ.clear()
                os.environ.update(environment)
                for handler in set(logger.handlers) - set(state[0]):
                    logger.removeHandler(handler)
                    handler.close()
                logger.setLevel(state[1])
        for stream in streams[1:]:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])  # type: ignore[attr-defined]
        return Done(code, out, err)

    def process(
        self, *args: str | Path, stdin: str | bytes = b"", env: Mapping[str, str] | None = None
    ) -> Done:
        """Run a command in a process of its own, without a terminal."""
        done = subprocess.run(
            [*PROGRAM, *map(str, args)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            cwd=self.folder,
            env=self.env | dict(env or {}),
            timeout=60 * PATIENCE,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def good(self, *args: str | Path, **more: Any) -> str:
        """Run a command that succeeds, and return its output."""
        done = self(*args, **more)
        assert (done.code, done.err) == (0, "")
        return done.out

    def json(self, *args: str | Path, code: int = 0, **more: Any) -> Any:
        """Run a command with `--json`, and return the value, checked against its schema."""
        done = self(*args, "--json", **more)
        assert (done.code, done.err) == (code, "")
        name = "-".join(map(str, args[:2] if args[0] == "users" else args[:1]))
        assert done.out.count("\n") == 1
        found = json.loads(done.out)
        validator(name).validate(found)
        return found

    def bad(self, code: int, *args: str | Path, **more: Any) -> str:
        """Run a command that fails, and return its error message."""
        done = self(*args, **more)
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith("ipguard: ")
        assert done.err.count("\n") == 1
        return done.err.removeprefix("ipguard: ").removesuffix("\n")

    def error(self, code: int, *args: str | Path, **more: Any) -> Any:
        """Run a command that fails with `--json`, and return its error."""
        done = self(*args, "--json", **more)
        assert (done.code, done.out) == (code, "")
        return done.error

    def store(self) -> ipguard.RestrictionStore:
        """Open the store."""
        return ipguard.open_store(self.env["IPGUARD_URL"])

    def register(self, **accounts: str) -> None:
        """Register users, given as `username=account_id`; create the store if needed."""
        with self.store() as store:
            store.put_users(
                ipguard.User(
                    username=name, full_name=name, account_id=each, email=f"{name}@firm.example"
                )
                for name, each in accounts.items()
            )

    def held(self, username: str) -> list[str]:
        """Return the addresses of a user's restrictions."""
        with self.store() as store:
            return [str(r.addresses) for r in store.load_policy(username).restrictions]

    def impose(self, username: str, addresses: str) -> str:
        """Impose a restriction, and return its id."""
        options = ("--reason", "x", "--email", "ops@bank.example", "--json")
        done = self("impose", username, addresses, *options)
        assert done.code == 0
        return str(json.loads(done.out)["restriction"]["id"])

    def hold(self, username: str, **days: float) -> None:
        """Add restrictions to 203.0.113.N that expire in so many days, given as `_N=days`."""
        with self.store() as store, store.transaction() as tx:
            for name, each in days.items():
                tx.add_restriction(
                    ipguard.Restriction(
                        id=username + name,
                        username=username,
                        addresses=ipguard.AddressRange.parse(f"203.0.113.{name[1:]}"),
                        label="",
                        created_at=tx.now,
                        created_by="x",
                        expires_at=tx.now + timedelta(days=each),
                    )
                )
            tx.append(Action.IMPOSE, actor="x", touches=frozenset({username}))

    def write(self, name: str, text: str | bytes) -> Path:
        """Write a file in the folder."""
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def terminal(self, *args: str | Path, **env: str) -> Terminal:
        """Run a command in a terminal."""
        return Terminal(self, [str(arg) for arg in args], env)


class Terminal:
    """A command in a terminal of 200 columns."""

    def __init__(self, shell: Shell, args: list[str], env: Mapping[str, str]) -> None:
        self.process: Any = pexpect.spawn(
            PROGRAM[0],
            [*PROGRAM[1:], *args],
            cwd=str(shell.folder),
            env=shell.env | dict(env),
            encoding="utf-8",
            dimensions=(50, 200),
            timeout=PATIENCE,
        )

    def sees(self, pattern: str) -> None:
        """Wait until the terminal shows text that matches a pattern."""
        self.process.expect(pattern)

    def answers(self, pattern: str, text: str, code: int = 0) -> str:
        """Wait for a question, type the answer, and wait until the command ends."""
        self.sees(pattern)
        self.process.sendline(text)
        return self.ends(code)

    def ends(self, code: int = 0) -> str:
        """Wait until the command ends; return what it showed since the last `sees`."""
        self.process.expect(pexpect.EOF)
        shown: str = self.process.before
        self.process.close()
        assert "Traceback" not in shown
        assert self.process.exitstatus == code, shown
        return shown.replace("\r\n", "\n")
