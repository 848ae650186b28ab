"""Numbers, keys and passwords appear in no database, log, repr or traceback."""

from __future__ import annotations

import base64
import logging
import pickle
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import ipguard
from ipguard import Action, DeliveryError, Guard, IPGuardError, Workflow
from ipguard.mail._smtp import failure_of
from ipguard.testing import Outbox
from tests.flows import ALICE, BOSS, HOME, KEY, OFFICE, Desk
from tests.secrets_watch import Watch

PASSWORD = "swordfish-of-the-mail-server"


def spellings(number: str) -> list[bytes]:
    """Return the forms in which a number could be stored or logged."""
    plain = number.replace("-", "")
    texts = [number, plain, number.replace("-", " ")]
    value = int(plain)
    packed = value.to_bytes(max(4, -(-value.bit_length() // 8)), "big")  # as SQLite packs numbers
    return [
        *(text.encode() for text in texts),
        plain.encode("utf-16-le"),
        base64.b64encode(plain.encode()).rstrip(b"="),
        plain.encode().hex().encode(),
        packed,
    ]


def key_spellings(key: bytes) -> list[bytes]:
    """Return the forms in which a key could be stored or logged."""
    return [key, key.hex().encode(), base64.b64encode(key).rstrip(b"="), repr(key)[2:-1].encode()]


def hits(haystack: bytes, needles: list[bytes]) -> list[bytes]:
    """Return the needles that were found."""
    return [needle for needle in needles if needle in haystack]


def files_of(desk: Desk) -> bytes:
    """Return all bytes of the database and its log."""
    assert desk.path is not None
    found = sorted(desk.path.parent.glob(desk.path.name + "*"))
    assert found
    return b"".join(path.read_bytes() for path in found)


class Recorder(logging.Handler):
    """Keeps every record as it is formatted."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record) + repr(record.__dict__))


@contextmanager
def listening() -> Iterator[Recorder]:
    """Record all log messages of the block, at every level."""
    handler, root = Recorder(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def walk(desk: Desk, seen: list[object]) -> set[str]:
    """Use the whole workflow, and return every number that was mailed."""
    flow, errors = desk.flow, []

    def refused(kind: type[BaseException], call: Any) -> Any:
        with pytest.raises(kind) as caught:
            call()
        errors.append(caught.value)
        return caught.value

    request = desk.ask(label="office")
    seen += [request, flow, desk.store, desk.outbox, *desk.outbox.messages]
    desk.guess(request, times=3)
    refused(ipguard.WrongNumber, lambda: flow.confirm(ALICE, request.id, desk.wrong(request)))
    desk.wait(seconds=30)
    flow.resend(ALICE, request.id)
    refused(ipguard.WrongNumber, lambda: flow.confirm(ALICE, request.id, desk.wrong(request)))
    seen.append(desk.confirm(request))
    refused(ipguard.RequestClosed, lambda: desk.confirm(request))
    locked = desk.ask(HOME)
    desk.guess(locked, times=5)
    refused(ipguard.TooManyAttempts, lambda: desk.confirm(locked))
    late = desk.ask("203.0.113.9")
    desk.wait(minutes=10)
    refused(ipguard.NumberExpired, lambda: desk.confirm(late))
    stranger = Workflow(desk.store, desk.outbox, key=bytes(reversed(KEY)))
    desk.flow.resend(ALICE, late.id)
    refused(ipguard.NumberExpired, lambda: stranger.confirm(ALICE, late.id, desk.number(late)))
    desk.add("203.0.113.9")
    refused(ipguard.DuplicateRestriction, lambda: desk.confirm(late))
    desk.outbox.fail = True
    refused(DeliveryError, lambda: desk.ask("203.0.113.10"))
    seen.append(flow.impose(BOSS, "mary", OFFICE, reason="x"))
    desk.outbox.fail = False
    desk.use(confirm_deletes=True)
    deletion = desk.ask_to_delete(desk.store.load_policy("mary").restrictions[0])
    desk.confirm(deletion)
    desk.flow.cancel(ALICE, desk.ask("203.0.113.11").id)
    guard = Guard(desk.store)
    guard.is_allowed("jsmith", OFFICE)
    with desk.store.transaction() as turn:
        stored = turn.request(late.id)
        seen += [turn, stored]
        turn.append(Action.UNLOCK, actor="boss")
    seen += [stranger, stranger._keys, desk.flow, guard, guard.stats(), *desk.rows(), *errors]
    seen += list(desk.flow.overview(BOSS))
    return {m.number for m in desk.outbox.messages if m.number is not None}


def test_no_number_and_no_key_in_the_database(tmp_path: Path) -> None:
    """The database and its log contain digests, but no number in any form, and no key."""
    desk = Desk(tmp_path / "desk.db")
    with desk.store:
        numbers = walk(desk, [])
        assert len(numbers) >= 6
        data = files_of(desk)
        with closing(sqlite3.connect(str(desk.path))) as connection:
            digests = connection.execute("SELECT id, digest FROM requests").fetchall()
        # The digests are found, so the right data is searched.
        assert len(digests) >= 6
        assert {len(digest) for _, digest in digests} == {32}
        for request_id, digest in digests:
            assert hits(data, [digest, request_id.encode()]) == [digest, request_id.encode()]
        for number in numbers:
            assert hits(data, spellings(number)) == []
        assert hits(data, key_spellings(KEY)) == []
    data = files_of(desk)
    for number in numbers:
        assert hits(data, spellings(number)) == []


def test_no_number_and_no_key_in_any_log_or_notice(desk: Desk) -> None:
    """Numbers go to the requester's mailbox only; no logger writes one, in any field of a record.

    Neither does the audit log.
    """
    with listening() as recorded:
        numbers = walk(desk, [])
    log = "\n".join(recorded.lines).encode()
    assert b"ipguard.audit" in log
    assert b"ERROR" in log
    shown = repr([desk.rows(), *(m for m in desk.outbox.messages if m.kind == "change_applied")])
    for number in numbers:
        assert hits(log + shown.encode(), spellings(number)[:-1]) == []
    assert {m.to for m in desk.outbox.messages if m.number is not None} == {("alice@firm.example",)}
    assert hits(log, key_spellings(KEY)) == []
    with listening() as recorded:
        logging.getLogger("planted").debug("the number is %s", min(numbers))
    assert hits("\n".join(recorded.lines).encode(), spellings(min(numbers))) != []


def test_no_number_and_no_key_in_any_repr(desk: Desk) -> None:
    """No `repr`, `str` or traceback of an object shows a number or a key."""
    seen: list[object] = []
    numbers = walk(desk, seen)
    texts = [repr(seen)]
    for thing in seen:
        texts += [repr(thing), str(thing), f"{thing}"]
        if isinstance(thing, BaseException):
            texts += traceback.format_exception(thing)
    text = "\n".join(texts).encode()
    assert b"WrongNumber" in text
    for number in numbers:
        assert hits(text, spellings(number)[:-1]) == []
    assert hits(text, key_spellings(KEY)) == []
    assert b"digest=" not in text


def test_no_number_in_the_traceback_of_a_failed_mail(desk: Desk) -> None:
    """The text of a notifier's error is not repeated."""

    class Failing(Outbox):
        number = ""

        def number_issued(self, request, number, actor) -> None:
            Failing.number = number
            raise ValueError(f"{PASSWORD}: cannot send {number}")

    flow = Workflow(desk.store, Failing(), key=KEY)
    with listening() as recorded, pytest.raises(DeliveryError) as caught:
        flow.request(ALICE, "jsmith", OFFICE)
    shown = "\n".join(["".join(traceback.format_exception(caught.value)), *recorded.lines])
    assert "DeliveryError" in shown
    assert Failing.number not in shown
    assert PASSWORD not in shown


# -- passwords in URLs ---------------------------------------------------------------------------


def everything_in(error: BaseException) -> str:
    """Return all texts of an error and of its causes and contexts, suppressed ones included."""
    chain, text = [error], ""
    for link in chain:
        chain += [each for each in (link.__cause__, link.__context__) if each is not None]
        text += "".join(traceback.format_exception(link))
        text += f"{link!r} {link.args!r} {vars(link)!r} {pickle.dumps(link)!r}"
    return text


@pytest.mark.parametrize("migrate", [None, True])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:{}@[::1/x",
        "POSTGRESQL://u:{}@127.0.0.1:99999/x",
        "postgresql://u:{}%@127.0.0.1/x",
        "postgresql://u:{}%FF@127.0.0.1/x",
        "postgresql://u:{}\udcff@127.0.0.1/x",
        "postgresql://u:{}%00@127.0.0.1/x",
        "postgresql://u:{}/@127.0.0.1/x",
        "postgresql://u:1/{}@127.0.0.1/x",
        "postgresql://u:1@{}@127.0.0.1:1/x",
        "postgresql://u:1?{}=1@127.0.0.1/x",
        "postgresql://u:{}@127.0.0.1:1/x?timeout=0.2",
        "postgresql://u:{}@127.0.0.1:1/x?nonsense=1",
        "postgresql://u:{}@127.0.0.1:1/x?sslmode=bogus",
        "postgresql://127.0.0.1:1/x?password={}&password=1",
        "postgresql://127.0.0.1:1/x?listen=postgresql%3A%2F%2Fu%3A{}%40%5Bh",
        "postgresql://127.0.0.1:1/x?listen=postgresql%3A%2F%2Fu%3A1%40{}%40h",
        "sqlite://u:{}@host/x",
        "sqlite:///x.db?timeout={}",
        "mysql://u:{}@host/x",
        "u:{}@host/x",
    ],
)
def test_no_password_in_an_error_of_a_store(
    url: str, migrate: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error and its chain do not contain the password, however the URL is mistyped."""
    monkeypatch.chdir(tmp_path)
    with listening() as recorded:
        try:
            with closing(ipguard.open_store(url.format(PASSWORD), migrate=migrate)) as store:
                text = repr(store)
                store.load_policy("jsmith")
        except IPGuardError as error:
            text = everything_in(error)
    assert "Error" in text or "StoreUnavailable" in text
    assert PASSWORD not in text + "".join(recorded.lines)


def test_no_password_in_an_error_deep_in_a_chain() -> None:
    """A server's reply may be in an error that was raised while another was handled."""
    error = OSError("the connection is closed")
    error.__context__ = OSError("once more")
    error.__context__.__context__ = OSError(f"535 no: {PASSWORD}")
    assert failure_of(OSError("x"), [PASSWORD]).cause is not None
    assert failure_of(error, [PASSWORD]).cause is None


def test_the_whole_run_is_watched(desk: Desk, watch: Watch) -> None:
    """The watch of the test run knows the numbers minted here, and reads the logs."""
    read = watch.read
    request = desk.ask()
    assert desk.number(request).replace("-", "") in watch.minted
    assert watch.read > read
    assert watch.found == []
