"""A process that confirms one request, and may be killed at any moment."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import ipguard
from ipguard import Actor
from ipguard.stores.postgres import PostgresStore
from ipguard.testing import Outbox

KEY = bytes(32)
BOSS = Actor(username="boss", email="boss@example.com", manages=Actor.EVERY_ACCOUNT)


def confirm(url: str, request_id: str, number: str, line: Connection[Any, Any]) -> None:
    """Say when all is ready, wait for the word, confirm, and say what came of it."""
    with PostgresStore(url, listen="off", migrate=False) as store:
        flow = ipguard.Workflow(store, Outbox(), key=KEY)
        store.load_policy("jo")  # a connection is there
        line.send("ready")
        line.recv()
        flow.confirm(BOSS, request_id, number)
        line.send("acknowledged")
        line.recv()


def client(url: str, request_id: str, number: str) -> tuple[BaseProcess, Connection[Any, Any]]:
    """Start such a process, and return it with the line to it, as soon as it is ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=confirm, args=(url, request_id, number, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    return process, ours
