#!/usr/bin/env python3
"""A sample login server with the administration page, to explore in a browser.

    python3 dev.py demo --serve              on a free port, until Ctrl-C
    python3 dev.py demo --serve --port 8000
    python3 dev.py demo --serve --keep       keeps the database

It has users, a mailbox with the mails that a real SMTP server received, and a sign-in form in which
you choose the client's address. It listens on this machine alone.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

import ipguard
from ipguard import Actor, Guard, User, Workflow, WorkflowSettings
from ipguard.mail import EmailNotifier

sys.path.insert(0, str(Path(__file__).parent))
from demo_parts import Mailbox
from login_server import PASSWORD
from serve_site import PAGE, Person, create_site

HARBOUR, ORCHARD = "U1234567", "U7654321"
PEOPLE = (
    Person(
        username="rjones",
        full_name="Rita Jones",
        email="rita.jones@example.com",
        role="administers the account U1234567",
        manages=frozenset({HARBOUR}),
    ),
    Person(
        username="operator",
        full_name="Olu Perera",
        email="desk@example.com",
        role="works for the broker, for every account",
        manages=Actor.EVERY_ACCOUNT,
    ),
    Person(username="jsmith", full_name="John Smith", role="a trader, restricted to two networks"),
    Person(username="mlee", full_name="Mei Lee", role="a trader without restrictions"),
    Person(username="tnovak", full_name="Tereza Nováková", role="a trader, restricted to a range"),
)
USERS = [
    ("jsmith", "John Smith", HARBOUR),
    ("mlee", "Mei Lee", HARBOUR),
    ("tnovak", "Tereza Nováková", HARBOUR),
    ("rjones", "Rita Jones", HARBOUR),
    ("aokafor", "Adaeze Okafor", HARBOUR),
    ("bmartin", "Benoît Martin", HARBOUR),
    ("cweber", "Clara Weber", HARBOUR),
    ("dcosta", "Diogo Costa", HARBOUR),
    ("esato", "Emi Satō", ORCHARD),
    ("fhall", "Frank Hall", ORCHARD),
]
RESTRICTIONS = [
    ("jsmith", "203.0.113.0/29", "branch office"),
    ("jsmith", "2001:db8:7::/64", "home"),
    ("tnovak", "203.0.113.16-203.0.113.25", "trading floor"),
    ("aokafor", "192.0.2.10", "head office"),
    ("esato", "198.51.100.64/26", "office"),
]


def fill(store: ipguard.RestrictionStore, flow: Workflow) -> None:
    """Register the users, restrict some, and leave one request pending."""
    store.put_users(
        User(username=name, full_name=full, account_id=account, email=f"{name}@example.com")
        for name, full, account in USERS
    )
    operator = PEOPLE[1].actor("192.0.2.200")
    flow.impose_many(operator, RESTRICTIONS, reason="samples of the demo")
    flow.request(PEOPLE[0].actor("192.0.2.10"), "cweber", "198.51.100.20", label="new office")


@contextlib.contextmanager
def database(*, keep: bool) -> Iterator[str]:
    """Yield a database's URL, in a folder that is deleted at the end unless it is kept."""
    folder = Path(tempfile.mkdtemp(prefix="ipguard-demo-"))
    try:
        yield f"sqlite:///{folder / 'ipguard.db'}"
    finally:
        if keep:
            print(f"The database is kept: {folder / 'ipguard.db'}")
        else:
            shutil.rmtree(folder)


def announce(base: str) -> None:
    width = max(len(person.username) for person in PEOPLE)
    print("ipguard: a sample login server, on this machine alone. Ctrl-C ends it.\n")
    for what, path in (
        ("begin here", "/"),
        ("sign in", "/sign-in"),
        ("IP restrictions", f"{PAGE}/"),
        ("mailbox", "/mailbox"),
    ):
        print(f"  {what:<16} {base}{path}")
    print(f"\nSample sign-ins, all with the password {PASSWORD!r}:\n")
    for person in PEOPLE:
        print(f"  {person.username:<{width}}  {person.full_name}, {person.role}")
    print(flush=True)


def stop(_signal: int, _frame: FrameType | None) -> None:
    """Raise SystemExit, so that `with` blocks close everything."""
    sys.exit(0)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py demo --serve", description="Serve ipguard's demo, to explore in a browser."
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the database")
    options = parser.parse_args(args)
    try:
        # Listen before printing, so that the printed address works.
        listener = socket.create_server(("127.0.0.1", options.port))
    except (OSError, OverflowError) as wrong:
        print(f"port {options.port} of 127.0.0.1 cannot be opened: {wrong}", file=sys.stderr)
        return 1
    # Handle both signals before the server starts and after it ends, too.
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    with (
        listener,
        database(keep=options.keep) as url,
        Mailbox() as mailbox,
        ipguard.open_store(url) as store,
    ):
        flow = Workflow(
            store,
            EmailNotifier(mailbox.url, sender="Example Trading <no-reply@example.com>"),
            key=secrets.token_bytes(32),
            settings=WorkflowSettings(confirm_deletes="last"),
        )
        fill(store, flow)
        app = create_site(flow, Guard(store), mailbox, PEOPLE)
        # By default, uvicorn trusts X-Forwarded-For from 127.0.0.1.
        config = uvicorn.Config(
            app, proxy_headers=False, log_level="warning", timeout_graceful_shutdown=3
        )
        announce(f"http://127.0.0.1:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    logging.lastResort = None  # hide the warning that the store is new
    sys.exit(main(sys.argv[1:]))
