#!/usr/bin/env python3
"""A walk through ipguard: from a page without restrictions to a login that is refused.

    python3 dev.py demo           install what it needs, then run it
    python3 dev.py demo --keep    the same, but keep the database

It uses a SQLite file, a real SMTP server on this machine, and a second process. Each step prints
its expectations; the exit status is 1 if one is not met.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import ipguard
from ipguard import (
    Actor,
    Applied,
    Guard,
    PendingRequest,
    Reason,
    User,
    Workflow,
    WorkflowSettings,
    audit,
)
from ipguard.mail import EmailNotifier

sys.path.insert(0, str(Path(__file__).parent))
from demo_parts import Commits, MailServer, Report, Troubles

ADMIN = Actor(
    username="rjones",
    email="rita.jones@example.com",
    manages=frozenset({"U1234567"}),
    address="192.0.2.10",
)
USERS = (
    User(
        username="jsmith",
        full_name="John Smith",
        account_id="U1234567",
        email="john.smith@example.com",
    ),
    User(username="mlee", full_name="Mei Lee", account_id="U1234567", email="mei.lee@example.com"),
    User(username="rjones", full_name="Rita Jones", account_id="U1234567", email=ADMIN.email),
    User(username="stranger", full_name="Somebody Else", account_id="U7654321"),
)
OFFICE, HOME = "203.0.113.0/29", "2001:db8:7::/64"
FROM_HOME = "2001:db8:7::25"
LOGINS = (
    ("jsmith", "203.0.113.5", Reason.LISTED, "in the office's network"),
    ("jsmith", "::ffff:203.0.113.5", Reason.LISTED, "the same address, IPv4-mapped"),
    ("JSmith", "203.0.113.5", Reason.LISTED, "the same user, spelt differently"),
    ("jsmith", FROM_HOME, Reason.LISTED, "in the network at home"),
    ("jsmith", "203.0.113.8", Reason.NOT_LISTED, "one past the office's network"),
    ("jsmith", "::ffff:198.51.100.7", Reason.NOT_LISTED, "elsewhere, IPv4-mapped"),
    ("jsmith", "2001:db8:8::25", Reason.NOT_LISTED, "elsewhere"),
    ("jsmith", "203.0.113.005", Reason.BAD_ADDRESS, "octal to some programs"),
    ("jsmith", "203.0.113.5 ", Reason.BAD_ADDRESS, "a space at the end"),
    ("jsmith", "3405803781", Reason.BAD_ADDRESS, "203.0.113.5 as one number"),
    ("jsmith", "203.0.113.5, 10.0.0.1", Reason.BAD_ADDRESS, "the whole header of a proxy"),
    ("mlee", "198.51.100.7", Reason.UNRESTRICTED, "a user without restrictions"),
)


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


class Demo:
    """The steps, with the store, the workflow, a login server's guard and the mails."""

    def __init__(self, store: ipguard.RestrictionStore, guard: Guard, mail: MailServer) -> None:
        self.store = store
        self.guard = guard
        self.mail = mail
        self.report = Report()
        self.numbers: list[str] = []
        self.flow = Workflow(
            store,
            EmailNotifier(mail.url, sender="Example Trading <no-reply@example.com>"),
            key=secrets.token_bytes(32),
            settings=WorkflowSettings(confirm_deletes="last"),
        )

    # -- helpers

    def page(self) -> list[tuple[str, ...]]:
        """Print the page and return its rows."""
        rows: list[tuple[str, ...]] = [
            (
                line.user.full_name,
                line.user.username,
                line.user.account_id,
                line.summary,
                ", ".join(ask.change for ask in line.pending),
            )
            for line in self.flow.overview(ADMIN)
        ]
        heads = ("Full name", "Username", "Account", "Restrictions", "Pending requests")
        self.report.table(heads, rows)
        return rows

    def next_mail(self) -> tuple[EmailMessage, list[str], str]:
        """Return the next mail, the lines of its text, and the number in it."""
        mail = self.mail.receive()
        body = mail.get_body(("plain",))
        lines = [] if body is None else str(body.get_content()).splitlines()
        numbers = [line.strip() for line in lines if re.fullmatch(r" +\d{5}-\d{5}", line)]
        self.numbers += numbers
        return mail, lines, "".join(numbers)

    def notices(self, count: int) -> list[str]:
        return sorted(str(self.mail.receive()["To"]) for _ in range(count))

    # -- the steps

    def the_page(self) -> None:
        say = self.report
        say.step("The page: the users of the account that rjones administers")
        self.store.put_users(USERS)
        rows = self.page()
        say.expect("the account's three users, and no user of another", len(rows), 3)
        say.expect("no user is restricted", {row[3] for row in rows}, {"No restrictions"})

    def a_request(self) -> PendingRequest:
        say = self.report
        say.step(f"A request: jsmith may log in from {OFFICE} only")
        try:
            self.flow.request(ADMIN, "jsmith", "203.0.113.3/29")
        except ipguard.AddressError as refused:
            say.line(f"typed wrongly first: {refused}")
            say.expect("refused, with a proposal", refused.hint, OFFICE)
        else:
            say.expect("a network with host bits set is refused", "accepted", "refused")
        request = self.flow.request(ADMIN, "jsmith", OFFICE, label="office")
        rows = self.page()
        say.expect("it is pending", rows[0][4], f"add {OFFICE}")
        decision = self.guard.check("jsmith", "198.51.100.7")
        say.expect("and restricts no user yet", decision.reason, Reason.UNRESTRICTED)
        return request

    def the_mail(self) -> str:
        say = self.report
        say.step("The mail with the number, as it arrived at the SMTP server")
        mail, lines, number = self.next_mail()
        for line in (*(f"{name}: {mail[name]}" for name in ("From", "To", "Subject")), "", *lines):
            say.quote(line)
        say.expect("it went to the requester", mail["To"], ADMIN.email)
        say.expect("and holds one number", len(number), 11)
        return number

    def confirmation(self, request: PendingRequest, number: str) -> None:
        say = self.report
        say.step("A wrong number, then the right one")
        wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
        try:
            self.flow.confirm(ADMIN, request.id, wrong)
        except ipguard.WrongNumber as refused:
            say.line(f"{wrong}: {refused}")
            say.expect("it is refused, and counted", refused.attempts_left, 4)
        else:
            say.expect("a wrong number is refused", "accepted", "refused")
        applied = self.flow.confirm(ADMIN, request.id, number.replace("-", " "))
        say.line(f"{number}: confirmed, as revision {applied.revision}")
        told = ["john.smith@example.com", ADMIN.email]
        say.expect("requester and user get a mail", self.notices(2), told)
        second = self.flow.request(ADMIN, "jsmith", HOME, label="home")
        applied = self.flow.confirm(ADMIN, second.id, self.next_mail()[2])
        assert isinstance(applied, ipguard.Applied)
        self.notices(2)
        rows = self.page()
        say.expect("a second one is added; both hold", rows[0][3:], (f"{OFFICE}, {HOME}", ""))
        caught_up = self.guard.wait_for(applied.revision, timeout=5)
        say.expect("the login server's guard has caught up", got=caught_up, wanted=True)

    def logins(self) -> None:
        say = self.report
        say.step("Logins: the guard's decisions and their reasons")
        rows = []
        for username, address, reason, what in LOGINS:
            decision = self.guard.check(username, address)
            agreed = self.guard.is_allowed(username, address) == decision.allowed
            answer = "allowed" if decision else "not allowed"
            rows.append((username, f'"{address}"', answer, str(decision.reason), what))
            wanted = reason in {Reason.LISTED, Reason.UNRESTRICTED}
            say.count(
                f"{username} from {address!r}",
                (decision.reason, decision.allowed, agreed),
                (reason, wanted, True),
            )
        say.table(("Username", "Address", "Answer", "Reason", ""), rows)
        say.line(self.guard.explain("jsmith", "203.0.113.8").summary)

    def second_process(self, path: Path) -> None:
        say = self.report
        say.step("Another login server, a process of its own, while a restriction is deleted")
        home = next(r for r in self.flow.overview(ADMIN).items[0].restrictions if HOME in str(r))
        with Commits() as commits, another_server(path) as server:
            before = json.loads(server.readline())
            say.line(f"before: jsmith from {FROM_HOME}: {before['reason']}")
            say.expect("it lets jsmith in, from memory", before["reason"], "listed")
            say.expect("and a thread keeps it current", before["woken_by"], "refresher")
            say.line(f"rjones deletes {HOME}")
            applied = self.flow.delete(ADMIN, home.id, reason="moved")
            after = json.loads(server.readline())
        took = max(0.0, after["at"] - commits.last)
        say.line(f"after:  jsmith from {FROM_HOME}: {after['reason']}")
        say.line(f"it changed its answer {1000 * took:.1f} ms after the commit")
        say.expect("it refuses", (after["reason"], after["allowed"]), ("not_listed", False))
        deleted = isinstance(applied, Applied) and applied.revision
        say.expect(f"and rests on revision {deleted}, the deletion", after["revision"], deleted)
        say.expect("within max_staleness, which is 5 s", got=took < 5, wanted=True)
        self.notices(2)

    def the_last_one(self) -> None:
        say = self.report
        say.step("Deleting the last restriction would open jsmith to every address")
        left = self.flow.overview(ADMIN).items[0].restrictions
        say.expect("one is left", [str(r.addresses) for r in left], [OFFICE])
        asked = self.flow.delete(ADMIN, left[0].id)
        self.next_mail()
        rows = self.page()
        say.expect("so its deletion waits for a number", rows[0][3:], (OFFICE, f"delete {OFFICE}"))
        if isinstance(asked, PendingRequest):
            self.flow.cancel(ADMIN, asked.id)
        say.expect("and can be cancelled", self.flow.overview(ADMIN).items[0].pending, ())

    def the_audit_log(self) -> None:
        say = self.report
        say.step("The audit log: every change, newest first")
        entries = self.flow.history(ADMIN).items
        rows = [
            (str(c.revision), f"{c.at:%H:%M:%S}", str(c.actor), str(c.action), _short(c.detail))
            for c in entries
        ]
        say.table(("Revision", "UTC", "Actor", "Action", "Particulars"), rows)
        wanted = "cancel request delete confirm request confirm wrong_number request"
        say.expect("every change, in order", " ".join(c.action for c in entries), wanted)
        # Revision 1 registered users of two accounts; only actors of every account see it.
        say.expect("no revision is missing", [c.revision for c in entries], list(range(9, 1, -1)))

    def what_is_kept(self, folder: Path, troubles: Troubles) -> None:
        say = self.report
        say.step("What is left behind")
        kept = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
        readable = [n for n in self.numbers if n.replace("-", "").encode() in kept]
        readable += [n for n in self.numbers if n.encode() in kept]
        say.expect("the database holds no confirmation number", readable, [])
        say.expect("every mail was read", self.mail.waiting(), 0)
        say.expect("the library logged no warning", troubles.lines, [])

    def walk(self, path: Path, troubles: Troubles) -> bool:
        """Run every step; return whether all expectations were met."""
        self.the_page()
        request = self.a_request()
        number = self.the_mail()
        self.confirmation(request, number)
        self.logins()
        self.second_process(path)
        self.the_last_one()
        self.the_audit_log()
        self.what_is_kept(path.parent, troubles)
        return self.report.end()


def _short(detail: Mapping[str, str]) -> str:
    """Return the particulars without the ids."""
    return audit.encode({k: v for k, v in detail.items() if k not in ("request", "restriction")})


@contextmanager
def another_server(path: Path) -> Iterator[Any]:
    """Start the second process and yield its output."""
    command = [sys.executable, __file__, "--follow", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout
        finally:
            process.kill()


def follow(path: Path) -> None:
    """Run the second process: check until the decision changes, and print when that was."""
    with ipguard.open_store(url_of(path)) as store, Guard(store) as guard:
        print_decision(guard)
        until = time.monotonic() + 20
        while guard.is_allowed("jsmith", FROM_HOME) and time.monotonic() < until:
            time.sleep(0.0002)
        print_decision(guard)


def print_decision(guard: Guard) -> None:
    at = time.monotonic()  # all processes of a machine share this clock
    decision = guard.check("jsmith", FROM_HOME)
    decided = {
        "at": at,
        "allowed": decision.allowed,
        "reason": decision.reason,
        "revision": decision.revision,
        "woken_by": guard.stats().woken_by,
    }
    print(json.dumps(decided), flush=True)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Walk through ipguard once, in a terminal.")
    parser.add_argument("--keep", action="store_true", help="keep the database")
    parser.add_argument("--follow", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.follow is not None:
        follow(options.follow)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="ipguard-demo-"))
    path = folder / "ipguard.db"
    started = time.monotonic()
    try:
        with (
            MailServer() as mail,
            ipguard.open_store(url_of(path)) as store,
            Troubles() as troubles,  # opened after the warning that the store is new
            Guard(store) as guard,
        ):
            print("A walk through ipguard: restrict a user to addresses, then log in")
            print(f"database {path}\nmail server {mail.url}")
            well = Demo(store, guard, mail).walk(path, troubles)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(f"{time.monotonic() - started:.1f} s")
    if options.keep:
        print(f"The database is kept: {path}")
        print(f'To explore it: store = ipguard.open_store("{url_of(path)}")')
    return 0 if well else 1


if __name__ == "__main__":
    logging.lastResort = None  # the demo itself prints what the library logged
    sys.exit(main(sys.argv[1:]))
