"""The file, the locks and the processes of the SQLite store."""

import gc
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ipguard._fork import alive
from ipguard.addresses import AddressRange
from ipguard.errors import (
    InvalidValue,
    SchemaVersionError,
    StoreConfigError,
    StoreError,
    StoreUnavailable,
)
from ipguard.model import EVERYBODY, RESET, Action, Actor, Restriction, User
from ipguard.stores import open_store
from ipguard.stores._sql import CHANGES_SINCE, SCHEMA_VERSION
from ipguard.stores.sqlite import Connection, SQLiteStore, file_id, migrations
from ipguard.testing._case import Call
from tests.conftest import rounds

NOW = datetime(2025, 1, 1, tzinfo=UTC)
EVERY = Actor.EVERY_ACCOUNT
# These tests fork while threads are running, on purpose.
may_fork = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def user(name: str, full_name: str = "Jo", account_id: str = "U1") -> User:
    return User(username=name, full_name=full_name, account_id=account_id)


def restriction(name: str, number: int, addresses: str = "203.0.113.7") -> Restriction:
    return Restriction(
        id=f"{name}-{number}",
        username=name,
        addresses=AddressRange.parse(addresses),
        label="office",
        created_at=NOW + timedelta(microseconds=number),
        created_by="admin",
    )


def impose(store: SQLiteStore, name: str, number: int) -> int:
    with store.transaction() as turn:
        turn.add_restriction(restriction(name, number, f"10.0.{number >> 8}.{number & 255}"))
        return turn.append(Action.IMPOSE, actor="admin", touches=frozenset({name})).revision


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ipguard.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    with SQLiteStore(path, timeout=30) as opened:
        opened.put_users([user("jo")])
        yield opened


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def until(condition: Callable[[], bool]) -> None:
    """Wait for other threads and processes; the test's time limit ends it."""
    while not condition():
        time.sleep(0.001)


# ------------------------------------------------------------------------- other processes

PROLOGUE = """
import os, sys
from datetime import UTC, datetime
from ipguard.errors import *
from ipguard.model import *
from ipguard.stores.sqlite import SQLiteStore
path = sys.argv[1]
def ready():
    print("ready", flush=True)
    sys.stdin.readline()
def append(store, by=""):
    with store.transaction() as turn:
        change = turn.append(Action.IMPOSE, actor="admin", detail={"by": by}, touches=EVERYBODY)
    return change.revision
"""


@contextmanager
def process(script: str, path: Path, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Run a script in another process; kill it at the end if it is still running."""
    command = [sys.executable, "-c", PROLOGUE + script, str(path), *map(str, args)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def finish(running: subprocess.Popen[str]) -> str:
    """Let a script that waits in `ready()` continue, and return its output."""
    out, err = running.communicate("\n")
    assert running.returncode == 0, err
    return out


def all_at_once(script: str, path: Path, count: int, *args: object) -> list[str]:
    """Run a script in several processes, which all wait in `ready()` for the last one."""
    with ExitStack() as stack:
        running = [stack.enter_context(process(script, path, n, *args)) for n in range(count)]
        for each in running:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for each in running:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        return [finish(each) for each in running]


@pytest.mark.slow
def test_ten_processes_open_a_new_file_at_once(path: Path) -> None:
    """The schema is created once, and they share one order of revisions without gaps."""
    each = rounds(25, 500)
    for _ in range(rounds(1, 20)):
        script = """
ready()
store = SQLiteStore(path, timeout=60)
for number in range(int(sys.argv[3])):
    print(append(store, sys.argv[2]))
"""
        outputs = all_at_once(script, path, 10, each)
        written = [[int(line) for line in out.splitlines()] for out in outputs]
        assert all(revisions == sorted(revisions) for revisions in written)
        assert sorted(chain.from_iterable(written)) == list(range(1, 10 * each + 1))
        with SQLiteStore(path, migrate=False) as store:
            for change in store.history(EVERY, limit=10 * each):
                assert change.revision in written[int(change.detail["by"])]
        for name in (path, *path.parent.glob("*-*")):
            name.unlink()


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half_done(path: Path) -> None:
    """`kill -9` inside a transaction rolls it back and releases the lock."""
    with SQLiteStore(path, timeout=30) as store:
        script = """
store = SQLiteStore(path)
with store.transaction() as turn:
    for number in range(1000):
        turn.append(Action.IMPOSE, actor="admin", detail={"x": "x" * 5000}, touches=EVERYBODY)
    ready()
"""
        for _ in range(rounds(3, 50)):
            before = store.changes_since(None)
            with process(script, path) as running:
                assert running.stdout is not None
                assert running.stdout.readline() == "ready\n"
                running.send_signal(signal.SIGKILL)
                running.wait()
            assert store.changes_since(before[:2]) == before
            assert impose(store, "jo", before.head) == before.head + 1


def test_acknowledged_commits_survive_a_kill(path: Path) -> None:
    script = "s = SQLiteStore(path)\nwhile True: print(append(s), flush=True)"
    with SQLiteStore(path) as store:
        for number in range(rounds(3, 100)):
            head = store.changes_since(None).head
            with process(script, path) as running:
                assert running.stdout is not None
                for _ in range(5 + number % 7):
                    head = int(running.stdout.readline())
                running.send_signal(signal.SIGKILL)
                head = int((["", *running.stdout.read().split("\n")[:-1]])[-1] or head)
            assert store.changes_since(None).head in (head, head + 1)
        revisions = [change.revision for change in store.history(EVERY, limit=100_000)]
        assert revisions == list(range(len(revisions), 0, -1))


def test_a_commit_of_another_process_wakes_a_waiter(store: SQLiteStore, path: Path) -> None:
    """`wait` notices a commit of another process long before its timeout."""
    with process("ready(); append(SQLiteStore(path))", path) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        assert not store.wait(1, 0.01)
        assert running.stdin is not None
        running.stdin.write("\n")
        running.stdin.flush()
        assert store.wait(1, 60)
        finish(running)


# ------------------------------------------------------------------------------------ fork


def in_child(act: Callable[[], object], *, at_once: bool = False) -> str:
    """Fork; return in the parent what `act` returned in the child, as text, or how it failed.

    `at_once`: the child ends without a word to the tool that measures coverage, which waits for a
    lock of its own then, and among busy threads one that the child does not have may hold it.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = repr(act())
        except BaseException as exc:
            answer = type(exc).__name__
        os.write(writing, answer.encode())
        if at_once:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


@may_fork
def test_a_forked_transaction_stays_the_parents(store: SQLiteStore, path: Path) -> None:
    """The child cannot use it, nor anything on that file; the parent commits."""

    def use(turn_usable: Callable[[], object]) -> list[str]:
        answers = []
        for act in (
            turn_usable,
            lambda: store.load_policy("jo"),
            lambda: SQLiteStore(path),
            lambda: store.changes_since(None),
        ):
            try:
                answers.append(repr(act()))
            except StoreUnavailable:
                answers.append("unavailable")
        return answers

    with store.transaction() as turn:
        turn.add_restriction(restriction("jo", 1))
        assert in_child(lambda: use(lambda: turn.user("jo"))) == str(["unavailable"] * 4)
        turn.append(Action.IMPOSE, actor="admin", touches=frozenset({"jo"}))
    assert len(store.load_policy("jo").restrictions) == 1
    assert in_child(lambda: store.load_policy("jo").revision) == "2"


@may_fork
def test_a_child_does_not_commit_for_its_parent(store: SQLiteStore) -> None:
    """Leaving the block in the child raises; only the parent commits."""
    transaction = store.transaction()
    tx = transaction.__enter__()
    tx.add_restriction(restriction("jo", 1))
    tx.append(Action.IMPOSE, actor="admin", touches=frozenset({"jo"}))
    assert in_child(lambda: transaction.__exit__(None, None, None)) == "StoreUnavailable"
    assert store.load_policy("jo").restrictions == ()
    transaction.__exit__(None, None, None)
    assert len(store.load_policy("jo").restrictions) == 1


def test_an_inherited_connection_is_never_closed(path: Path) -> None:
    """A child that ends while its parent is in a transaction does not touch the file."""
    script = """
import gc
store = SQLiteStore(path)
store.put_users([User(username="jo", full_name="Jo", account_id="U1")])
with store.transaction() as turn:
    turn.append(Action.IMPOSE, actor="admin", detail={"x": "x" * 5_000_000}, touches=EVERYBODY)
    pid = os.fork()
    if pid == 0:
        try:
            turn.failures("jo")
        except StoreUnavailable:
            del turn, store
            gc.collect()
            sys.exit(7)  # through the interpreter's whole shutdown
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert os.path.getsize(path + "-wal") > 0
    turn.append(Action.IMPOSE, actor="admin", touches=EVERYBODY)
assert store.changes_since(None).head == 3
"""
    with process(script, path) as running:
        finish(running)
    with SQLiteStore(path) as store:
        assert [change.revision for change in store.history(EVERY)] == [3, 2, 1]


@may_fork
def test_a_half_read_iterator_is_abandoned_in_a_child(store: SQLiteStore) -> None:
    """Collecting it in the child does not affect the parent's connection."""
    store.put_users([user("ann")])
    for name in ("ann", "jo"):
        impose(store, name, 1)
    revision, policies = store.load_all_policies()
    held = [policies]
    next(policies)

    def collect() -> str:
        held.clear()
        gc.collect()
        return "collected"

    assert "collected" in in_child(collect)
    assert [name for name, _ in policies] == ["jo"]
    assert store.changes_since(None).head == revision


@pytest.mark.slow
@may_fork
def test_forks_among_busy_threads(store: SQLiteStore) -> None:
    """Children work although threads of the parent were reading, writing and waiting."""
    store.put_users([user("al")])
    store._patience = store.timeout  # on a busy machine, a fork may take more than a login's second
    over = threading.Event()
    failed: list[BaseException] = []

    def repeat(act: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                act()
        except BaseException as exc:
            failed.append(exc)

    acts: list[Callable[[], object]] = [
        lambda: store.load_policy("jo"),
        lambda: store.changes_since(None),
        lambda: store.wait(10**9, 60),
        # Of another user: reads that become longer and longer would delay the forks.
        lambda: impose(store, "al", store.changes_since(None).head),
    ]
    threads = [threading.Thread(target=repeat, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    answers = {
        in_child(lambda: store.load_policy("jo").known, at_once=True)
        for _ in range(rounds(10, 300))
    }
    over.set()
    store.put_users([user("the last")])
    store.close()
    for thread in threads:
        thread.join()
    assert answers == {"True"}
    assert [exc for exc in failed if "closed" not in str(exc)] == []
    assert {type(exc) for exc in failed} <= {StoreUnavailable}


@may_fork
def test_a_fork_waits_in_bounds(path: Path) -> None:
    """A thread that stays in its transaction delays a fork by at most the timeout."""
    with SQLiteStore(path, timeout=0.1) as store:
        inside, leave = threading.Event(), threading.Event()

        def write() -> None:
            with store.transaction():
                inside.set()
                leave.wait()

        call = Call(write)
        inside.wait()
        assert in_child(lambda: store.load_policy("jo")) == "StoreUnavailable"
        leave.set()
        call.result()
        assert store.load_policy("jo").revision == 0


@may_fork
def test_a_connection_half_open_at_a_fork(path: Path) -> None:
    """If another thread was opening a connection, the child refuses the file."""
    with SQLiteStore(path, timeout=0.1) as store:
        with store._pool._opening:
            assert in_child(lambda: store.load_policy("jo")) == "StoreUnavailable"
        assert store.load_policy("jo").revision == 0
        assert in_child(lambda: store.load_policy("jo").revision) == "0"


# --------------------------------------------------------------------------- replaced files


def remove(path: Path) -> None:
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        name.unlink(missing_ok=True)


def other_database(tmp_path: Path, changes: int) -> Path:
    other = tmp_path / "other.db"
    with SQLiteStore(other) as store:
        store.put_users([user("jo")])
        for number in range(changes - 1):
            impose(store, "jo", number)
    return other


def test_a_replaced_file_is_detected(store: SQLiteStore, path: Path, tmp_path: Path) -> None:
    """`changes_since` returns RESET with the new file's head, and reads use the new file."""
    cursor = store.changes_since(None)[:2]
    other = other_database(tmp_path, 3)
    remove(path)
    other.rename(path)
    assert store.load_policy("jo").revision == 1  # the stated limit: until the next sync
    changes = store.changes_since(cursor)
    assert (changes.head, changes.usernames) == (3, RESET)
    assert store.changes_since(changes[:2]).usernames == frozenset()
    assert store.load_policy("jo").revision == 3
    assert impose(store, "jo", 100) == 4
    with SQLiteStore(path) as again:
        assert again.changes_since(changes[:2]).usernames == frozenset({"jo"})


def test_the_old_connections_leave_the_new_file_alone(
    store: SQLiteStore, path: Path, tmp_path: Path
) -> None:
    """Closing them neither writes to the new file nor removes its log."""
    store.load_policy("jo")
    other = other_database(tmp_path, 1)
    remove(path)
    other.rename(path)
    with SQLiteStore(path) as new:
        impose(new, "jo", 1)
        before = Path(f"{path}-wal").stat().st_ino
        assert store.changes_since((1, "x")).head == 2
        assert Path(f"{path}-wal").stat().st_ino == before
        assert impose(new, "jo", 2) == 3
        assert store.changes_since(None).head == 3


@pytest.mark.parametrize("linked", [False, True])
def test_a_log_that_was_left_makes_the_store_unavailable(
    store: SQLiteStore, path: Path, tmp_path: Path, linked: bool
) -> None:
    """SQLite would apply it to the new file, so every call is refused until it is removed.

    It is looked for in the folder of the file itself, not of a symbolic link to it.
    """
    if linked:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "store.db").symlink_to(path)
        store.close()
        store = SQLiteStore(tmp_path / "links" / "store.db")
    impose(store, "jo", 1)
    cursor = store.changes_since(None)[:2]
    other_database(tmp_path, 3).replace(path)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="-wal"):
            store.changes_since(cursor)
        with pytest.raises(StoreUnavailable, match="-wal"), store.transaction():
            pytest.fail("the transaction began")
    Path(f"{path}-wal").unlink()
    with pytest.raises(StoreUnavailable, match="-shm"):
        store.changes_since(cursor)
    Path(f"{path}-shm").unlink()
    changes = store.changes_since(cursor)
    assert (changes.head, changes.usernames) == (3, RESET)


def test_a_link_to_another_file_is_followed(store: SQLiteStore, path: Path, tmp_path: Path) -> None:
    other_database(tmp_path, 3)
    folder = tmp_path / "current"
    folder.symlink_to(tmp_path)
    (tmp_path / "next").mkdir()
    (tmp_path / "other.db").rename(tmp_path / "next" / "ipguard.db")
    with SQLiteStore(folder / "ipguard.db") as linked:
        cursor = linked.changes_since(None)[:2]
        folder.unlink()
        folder.symlink_to(tmp_path / "next")
        assert linked.changes_since(cursor)[::2] == (3, RESET)
        assert impose(linked, "jo", 100) == 4
        assert (tmp_path / "next" / "ipguard.db-wal").exists()
    assert store.changes_since(None).head == 1


def test_a_file_with_two_names_is_refused(path: Path, tmp_path: Path) -> None:
    """Each name would have its own log."""
    SQLiteStore(path).close()
    (tmp_path / "second.db").hardlink_to(path)
    for name in (path, tmp_path / "second.db"):
        with pytest.raises(StoreConfigError, match="hard link"):
            SQLiteStore(name)
    path.unlink()
    SQLiteStore(tmp_path / "second.db").close()


@pytest.mark.parametrize("name", ["a.db", "a b\\c.db"])
def test_a_file_that_is_mounted_alone_is_refused(tmp_path: Path, name: str) -> None:
    """Two containers that mount the file but not its folder would have two logs."""
    path = tmp_path / name
    SQLiteStore(path).close()
    script = 'mount --bind "$0" "$1" && exec "$2" -c "$3" "$1"'
    opening = PROLOGUE + "SQLiteStore(path)"
    for target, refused in ((path, True), (tmp_path, False)):
        source = path if refused else tmp_path
        run = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, source, target, sys.executable, opening],
            capture_output=True,
            text=True,
            check=False,
        )
        if "unshare" in run.stderr or "mount:" in run.stderr:
            pytest.skip(f"no mounting here: {run.stderr}")
        assert ("mounted alone" in run.stderr) == refused, run.stderr


def test_a_vanished_file_is_not_created_again(store: SQLiteStore, path: Path) -> None:
    """A new empty database would let all users in."""
    remove(path)
    with pytest.raises(StoreUnavailable):
        store.changes_since(None)
    store._pool.forget()
    with pytest.raises(StoreUnavailable):
        store.load_policy("jo")
    with pytest.raises(StoreUnavailable):
        store.overview(EVERY)
    with pytest.raises(StoreUnavailable):
        store.put_users([user("jo")])
    assert not path.exists()


def test_a_file_that_vanishes_at_the_last_moment(
    store: SQLiteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself is told not to create a file."""
    store._pool.forget()
    main = file_id(str(path))
    remove(path)
    monkeypatch.setattr("ipguard.stores.sqlite.file_id", lambda path: main)
    monkeypatch.setattr("ipguard.stores.sqlite.files_at", lambda path: store._pool._files)
    with pytest.raises(StoreUnavailable):
        store.load_policy("jo")
    assert not path.exists()


def test_a_copy_of_the_same_history_is_another_file(store: SQLiteStore, path: Path) -> None:
    """A replaced file is a RESET even if its tokens are the same."""
    store.close()
    with SQLiteStore(path) as again:
        cursor = again.changes_since(None)[:2]
        shutil.copy(path, path.with_name("copy.db"))
        remove(path)
        path.with_name("copy.db").rename(path)
        assert again.changes_since(cursor).usernames is RESET
        assert again.changes_since(cursor).usernames == frozenset()


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000])
def test_a_file_replaced_by_something_else(store: SQLiteStore, path: Path, content: bytes) -> None:
    """An empty file, or a file that is not a database, does not count as an empty store."""
    remove(path)
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            store.changes_since(None)
        with pytest.raises(StoreUnavailable):
            store.load_policy("jo")
    assert path.read_bytes() == content


@pytest.mark.parametrize("lost", ["-wal", "-shm", "all"])
@pytest.mark.parametrize("when", ["during the transaction", "during the commit"])
def test_no_commit_is_acknowledged_without_all_three_files(
    store: SQLiteStore, path: Path, when: str, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit to a removed log, or to a replaced file, raises, and the next one succeeds."""
    other = other_database(path.parent, 1)

    def lose() -> None:
        if lost == "all":
            remove(path)
            other.rename(path)
        else:
            Path(f"{path}{lost}").unlink()

    def change() -> None:
        with store.transaction() as turn:
            turn.append(Action.IMPOSE, actor="admin", touches=EVERYBODY)
            if when == "during the transaction":
                lose()
                if lost == "all":
                    assert store.changes_since(None).head == 1  # lets go of the old file

    with monkeypatch.context() as patch:
        if when == "during the commit":
            at_statement(patch, "COMMIT", before=lose)
        with pytest.raises(StoreUnavailable, match=f"replaced {when}"):
            change()
    assert not store._pool._open or lost == "all"
    impose(store, "jo", 1)
    assert "1" in elsewhere(path, "len(store.load_policy('jo').restrictions)")


def elsewhere(path: Path, expression: str) -> str:
    """Return the value of an expression about `store` in another process, as text."""
    with process(
        f"with SQLiteStore(path, migrate=False) as store: print({expression})", path
    ) as other:
        return finish(other).strip()


WITHOUT = pytest.mark.parametrize("lost", [["-wal"], ["-shm"], ["-wal", "-shm"]])


@WITHOUT
def test_a_removed_log_or_index_is_noticed(store: SQLiteStore, path: Path, lost: list[str]) -> None:
    """The next sync returns RESET, and both processes see each other's commits again."""
    cursor = store.changes_since(None)[:2]
    for suffix in lost:
        Path(f"{path}{suffix}").unlink()
    assert elsewhere(path, "append(store)") == "2"
    changes = store.changes_since(cursor)
    assert (changes.head, changes.usernames) == (2, RESET)
    assert store.load_policy("jo").revision == 2
    assert store.changes_since(changes[:2]).usernames == frozenset()
    assert impose(store, "jo", 1) == 3
    assert elsewhere(path, "append(store)") == "4"
    assert store.changes_since(None).head == 4


@WITHOUT
def test_a_transaction_starts_with_the_files_that_are_there(
    store: SQLiteStore, path: Path, lost: list[str]
) -> None:
    """An acknowledged commit survives even if files were removed before it."""
    script = """
store = SQLiteStore(path)
store.load_policy("jo")
for suffix in sys.argv[2:]:
    os.remove(path + suffix)
print(append(store), flush=True)
os.kill(os.getpid(), 9)
"""
    store.close()
    with process(script, path, *lost) as running:
        assert running.communicate()[0] == "2\n"
    with SQLiteStore(path) as again:
        assert again.changes_since(None).head == 2


@pytest.mark.parametrize("read", [[""], ["-shm"], ["", "-wal", "-shm"]])
def test_a_process_that_read_the_file_itself(
    store: SQLiteStore, path: Path, read: list[str]
) -> None:
    """Closing any descriptor drops SQLite's locks: another process then removes log and index."""
    cursor = store.changes_since(None)[:2]
    for suffix in read:
        Path(f"{path}{suffix}").read_bytes()
    assert elsewhere(path, "append(store)") == "2"
    assert Path(f"{path}-wal").exists() == ("" not in read)
    assert elsewhere(path, "append(store)") == "3"
    assert store.changes_since(cursor).head == 3
    assert store.load_policy("jo").revision == 3
    assert impose(store, "jo", 1) == 4
    assert elsewhere(path, "store.changes_since(None).head") == "4"


@WITHOUT
def test_a_stale_connection_keeps_the_log_of_a_killed_process(
    store: SQLiteStore, path: Path, lost: list[str]
) -> None:
    """A normal close would take itself for the last user and remove the other log."""
    script = """
store = SQLiteStore(path)
with store._pool.connection() as reader, reader.snapshot():  # keeps the commit in the log
    reader.rows("SELECT * FROM head")
    print(append(store), flush=True)
    os.kill(os.getpid(), 9)
"""
    cursor = store.changes_since(None)[:2]
    for suffix in lost:
        Path(f"{path}{suffix}").unlink()
    with process(script, path) as killed:
        assert killed.communicate()[0] == "2\n"
    assert Path(f"{path}-wal").stat().st_size > 0
    assert store.changes_since(cursor)[::2] == (2, RESET)
    store.close()
    assert elsewhere(path, "store.changes_since(None).head") == "2"


def test_a_waiting_thread_returns_a_stale_connection(store: SQLiteStore, path: Path) -> None:
    """If it kept the connection, new ones would share the removed index with it."""
    cursor = store.changes_since(None)[:2]
    answers: list[bool] = []
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(store.wait, 10**9, 60)
        until(lambda: any(connection.thread for connection in alive(store._pool._open)))
        Path(f"{path}-shm").unlink()
        assert elsewhere(path, "append(store)") == "2"
        assert store.changes_since(cursor).usernames is RESET
        answers.append(waiting.result())
    assert answers == [False]
    assert store.load_policy("jo").revision == 2


def test_a_stale_snapshot_that_is_half_read_ends(store: SQLiteStore, path: Path) -> None:
    """A preload from a removed log fails; its own thread can sync afterwards."""
    for name in ("jo", "ann"):
        impose(store, name, 1)
    _, policies = store.load_all_policies()
    next(policies)
    Path(f"{path}-shm").unlink()
    elsewhere(path, "append(store)")
    with pytest.raises(StoreUnavailable, match="removed"):
        store.changes_since(None)
    with pytest.raises(StoreUnavailable):
        next(policies)
    assert store.changes_since(None).head == 4


def test_two_stores_of_one_process_notice_together(store: SQLiteStore, path: Path) -> None:
    """Idle connections of one store do not keep the other at the removed index."""
    with SQLiteStore(path) as second:
        cursor = second.changes_since(None)[:2]
        Path(f"{path}-shm").unlink()
        elsewhere(path, "append(store)")
        assert store.changes_since(None).head == 2
        assert store.load_policy("jo").revision == 2
        changes = second.changes_since(cursor)
        assert (changes.head, changes.usernames) == (2, RESET)


def test_a_foreign_connection_of_the_process(store: SQLiteStore, path: Path) -> None:
    """If a connection outside of the store keeps the removed index open, every call is refused."""
    with raw(path) as foreign:
        foreign.execute("SELECT * FROM head").fetchall()
        cursor = store.changes_since(None)[:2]
        Path(f"{path}-shm").unlink()
        elsewhere(path, "append(store)")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="removed"):
                store.changes_since(cursor)
            with pytest.raises(StoreUnavailable, match="removed"):
                store.load_policy("jo")
    assert store.changes_since(cursor)[::2] == (2, RESET)


def test_a_commit_leaves_nothing_in_the_log(store: SQLiteStore, path: Path) -> None:
    """The file alone has all commits, unless a reader needed an older state."""
    impose(store, "jo", 1)
    assert Path(f"{path}-wal").stat().st_size == 0
    with store._pool.connection() as reader, reader.snapshot():
        reader.rows("SELECT * FROM head")
        impose(store, "jo", 2)
        assert Path(f"{path}-wal").stat().st_size > 0
    impose(store, "jo", 3)
    assert Path(f"{path}-wal").stat().st_size == 0
    shutil.copy(path, path.with_name("copy.db"))
    with SQLiteStore(path.with_name("copy.db")) as copy:
        assert len(copy.load_policy("jo").restrictions) == 3


def test_an_older_copy_restored_by_sqlite(store: SQLiteStore, path: Path, tmp_path: Path) -> None:
    """The token shows that the history differs, even after as many other changes."""
    with raw(path) as live, raw(tmp_path / "copy.db") as copy:
        live.backup(copy)
        impose(store, "jo", 1)
        cursor = store.changes_since(None)[:2]
        copy.backup(live)
    assert store.load_policy("jo").restrictions == ()
    with SQLiteStore(path) as another:
        impose(another, "jo", 2)
    changes = store.changes_since(cursor)
    assert (changes.head, changes.usernames) == (2, RESET)
    assert changes.token != cursor[1]


def copied_over(store: SQLiteStore, path: Path) -> tuple[int, str]:
    """Write revision 2 over a file at revision 3, in place; return the cursor of before."""
    old = path.with_name("old.db")
    for number in range(1, 3):
        impose(store, "jo", number)
        with raw(path) as live:
            live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if number == 1:
            shutil.copy(path, old)
    cursor = store.changes_since(None)[:2]
    with store._pool.connection() as one, store._pool.connection() as two:
        for connection in (one, two):  # both have the pages in their cache now
            assert connection.rows("SELECT revision FROM head") == [(3,)]
        shutil.copyfile(old, path)
    return cursor


def test_an_older_copy_written_over_the_file(store: SQLiteStore, path: Path) -> None:
    """SQLite does not notice `cp old.db live.db`; the next `changes_since` does."""
    changes = store.changes_since(copied_over(store, path))
    assert (changes.head, changes.usernames) == (2, RESET)
    with store._pool.connection() as one, store._pool.connection() as two:
        for connection in (one, two):
            assert connection.rows("SELECT revision FROM head") == [(2,)]
    assert len(store.load_policy("jo").restrictions) == 1


def test_a_transaction_reads_the_file_that_is_there(store: SQLiteStore, path: Path) -> None:
    """A writer does not mix its cache with a file that was copied over the database."""
    copied_over(store, path)
    assert impose(store, "jo", 3) == 3
    assert len(store.load_policy("jo").restrictions) == 2


def test_a_copy_without_wal_gets_it_back(store: SQLiteStore, path: Path, tmp_path: Path) -> None:
    """A copy may have lost WAL mode; the store turns it on again."""
    other = other_database(tmp_path, 3)
    with raw(other) as connection:
        assert connection.execute("PRAGMA journal_mode = DELETE").fetchall() == [("delete",)]
    remove(path)
    other.rename(path)
    assert store.changes_since(None).head == 3
    with raw(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]


# ----------------------------------------------------------------------------- damaged files


def test_a_damaged_file_is_unavailable(store: SQLiteStore, path: Path) -> None:
    """A damaged file leads to no answer, and in particular not to an unrestricted user."""
    for number in range(50):
        impose(store, "jo", number)
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreUnavailable):
        SQLiteStore(path).load_policy("jo")
    path.write_bytes(content[:5000])
    with pytest.raises(StoreUnavailable):
        SQLiteStore(path).load_policy("jo")


def test_a_file_that_is_cut_off_while_in_use(store: SQLiteStore, path: Path) -> None:
    for number in range(50):
        impose(store, "jo", number)
    with raw(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, 8192)
    with pytest.raises(StoreUnavailable):
        store.changes_since(None)
    assert not store._pool._open  # a connection that failed is not used again
    with pytest.raises(StoreUnavailable):
        store.load_policy("jo")


@pytest.mark.parametrize("column", ["first_ip = x'00'", "last_ip = 'text'", "created_at = 'soon'"])
def test_a_damaged_row_is_unavailable(store: SQLiteStore, path: Path, column: str) -> None:
    """A row that cannot be decoded is not skipped: that could leave the user unrestricted."""
    impose(store, "jo", 1)
    with raw(path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE restrictions SET {column}")
    with pytest.raises(StoreUnavailable):
        store.load_policy("jo")
    with pytest.raises(StoreUnavailable):
        store.overview(EVERY)
    with pytest.raises(StoreUnavailable):
        list(store.load_all_policies()[1])


# ------------------------------------------------------------------------------------- locks


def test_a_thread_that_stays_is_given_up_in_time(path: Path) -> None:
    """The queue of one process's threads is bounded as well."""
    with SQLiteStore(path, timeout=0.2) as store, store.transaction():
        call = Call(lambda: store.put_users([user("jo")]))
        with pytest.raises(StoreUnavailable):
            call.result()


class Time:
    """A clock that the store's waits move, in place of the module `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.then: Callable[[], object] = lambda: None
        monkeypatch.setattr("ipguard.stores.sqlite.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


def test_one_budget_for_all_the_waits_of_a_call(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening and acquiring the writer's lock share the timeout."""
    with SQLiteStore(path, timeout=30) as store, raw(path) as reader, raw(path) as writer:
        reader.execute("PRAGMA locking_mode = EXCLUSIVE")
        reader.execute("UPDATE head SET revision = revision")
        clock = Time(monkeypatch)

        def then() -> None:
            if clock.now > 20 and not writer.in_transaction:
                reader.close()
                writer.execute("BEGIN IMMEDIATE")

        clock.then = then
        with pytest.raises(StoreUnavailable, match="locked"), store.transaction():
            pytest.fail("the transaction began")
        assert writer.in_transaction
        assert clock.now == pytest.approx(30)


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.load_policy("jo"),
        lambda store: store.changes_since(None),
        lambda store: store.load_all_policies(),
        lambda store: store.wait(1, 60),
    ],
)
def test_the_login_path_waits_for_a_second(
    path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[SQLiteStore], object]
) -> None:
    """Reads of logins wait for one second, even if writers may wait longer."""
    with SQLiteStore(path, timeout=30) as store, raw(path) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("UPDATE head SET revision = revision")
        clock = Time(monkeypatch)
        with pytest.raises(StoreUnavailable, match="locked"):
            read(store)
        assert clock.now == pytest.approx(1)


@pytest.mark.parametrize("mode", ["NORMAL", "EXCLUSIVE"])
def test_opening_a_locked_file_waits_for_the_timeout_once(
    path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration waits for the writer's lock, for the timeout and no longer."""
    path.touch()
    clock = Time(monkeypatch)
    with raw(path) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute(f"PRAGMA locking_mode = {mode}")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            SQLiteStore(path, timeout=30)
    assert clock.now == pytest.approx(30)


def test_a_read_waits_for_a_lock_that_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteStore(path, timeout=30) as store, ExitStack() as stack:
        other = stack.enter_context(raw(path))
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("UPDATE head SET revision = revision")
        monkeypatch.setattr("ipguard.stores.sqlite.time.sleep", lambda seconds: stack.close())
        assert store.load_policy("jo").revision == 0


def test_an_opened_store_holds_nothing_open(path: Path) -> None:
    """A server that opens its store and then forks hands its workers no connection."""
    with SQLiteStore(path) as store:
        assert not store._pool._open


def test_threads_that_end_leave_no_connection(store: SQLiteStore) -> None:
    """However many threads come and go, few connections stay open."""
    for _ in range(3):
        barrier = threading.Barrier(40)

        def read(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with store._pool.connection():
                barrier.wait()

        threads = [threading.Thread(target=read) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 0 < len(store._pool._open) <= 16


def test_a_connection_returned_during_close_is_closed(store: SQLiteStore) -> None:
    """Closing empties the pool; a connection that is returned at that moment is closed too."""

    class Idle(deque[Connection]):
        def append(self, connection: Connection) -> None:
            store.close()
            super().append(connection)

    store._pool.forget()
    store._pool._idle = Idle()
    assert store.load_policy("jo").known
    assert not store._pool._open


def test_a_refused_read_leaves_no_snapshot(store: SQLiteStore) -> None:
    """After an error inside a read, the next one sees later commits."""
    with pytest.raises(InvalidValue):
        store.overview(EVERY, limit=0)
    impose(store, "jo", 1)
    assert len(store.overview(EVERY).items[0].restrictions) == 1


# --------------------------------------------------------------------------- the commit itself


def at_statement(
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    plain = Connection.run

    def run(self: Connection, sql: str, params: tuple[object, ...] = ()) -> None:
        if sql != statement:
            plain(self, sql, params)
            return
        before()
        plain(self, sql, params)
        after()

    monkeypatch.setattr(Connection, "run", run)


def fail() -> None:
    raise StoreUnavailable("disk I/O error")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [fail, interrupt])
def test_a_failed_commit_is_undone(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], None]
) -> None:
    """Nothing of it remains, and the next transaction starts afresh."""
    with monkeypatch.context() as patch:
        at_statement(patch, "COMMIT", before=failure)
        with pytest.raises((StoreUnavailable, KeyboardInterrupt)):
            impose(store, "jo", 1)
    assert store.load_policy("jo").restrictions == ()
    assert impose(store, "jo", 2) == 2


def test_a_lost_answer_to_a_commit(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller does not know the outcome; the commit holds."""
    with monkeypatch.context() as patch:
        at_statement(patch, "COMMIT", after=fail)
        with pytest.raises(StoreUnavailable):
            impose(store, "jo", 1)
    assert len(store.load_policy("jo").restrictions) == 1
    assert impose(store, "jo", 2) == 3


@pytest.mark.parametrize(
    ("error", "keeps"),
    [
        (ValueError("no"), True),
        (sqlite3.OperationalError("the caller's own"), True),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_callers_error_keeps_the_connection(
    store: SQLiteStore, error: BaseException, keeps: bool
) -> None:
    """An error of the caller, unlike an interrupt, does not open the file again."""
    impose(store, "jo", 1)
    used = set(store._pool._open)
    assert used
    with pytest.raises(type(error)) as raised, store.transaction() as turn:  # noqa: PT012
        turn.add_restriction(restriction("jo", 2))
        raise error
    assert raised.value is error
    assert used & set(store._pool._open) == (used if keeps else set())
    assert len(store.load_policy("jo").restrictions) == 1
    assert impose(store, "jo", 3) == 3


def test_a_read_that_fails_closes_its_connection(
    store: SQLiteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy is read completely, or its connection is discarded."""
    for failure in (interrupt, fail):
        store.load_policy("jo")
        with monkeypatch.context() as patch:
            patch.setattr(
                Connection, "rows", lambda self, sql, params=(), failure=failure: failure()
            )
            with pytest.raises((StoreUnavailable, KeyboardInterrupt)):
                store.load_policy("jo")
        assert not store._pool._open
    store.load_policy("jo")
    with raw(path) as connection:
        connection.execute("DROP TABLE restrictions")
    for call in (lambda: store.load_policy("jo"), lambda: list(store.load_all_policies()[1])):
        with pytest.raises(StoreUnavailable, match="restrictions"):
            call()
    assert not store._pool._open


def test_a_contradiction_is_not_an_outage(store: SQLiteStore) -> None:
    """A second restriction with one id is the caller's mistake, and rolled back like any other."""
    impose(store, "jo", 1)
    with pytest.raises(StoreError) as raised, store.transaction() as turn:
        turn.add_restriction(restriction("jo", 1))
    assert not isinstance(raised.value, StoreUnavailable)
    assert impose(store, "jo", 2) == 3


# ------------------------------------------------------------------------------- the settings


def test_the_files_are_their_owners_alone(path: Path) -> None:
    """The database, its log and its index have mode 0600 with any umask."""
    old = os.umask(0)
    try:
        with SQLiteStore(path) as store:
            store.put_users([user("jo")])
            store.load_policy("jo")
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == dict.fromkeys(("ipguard.db", "ipguard.db-wal", "ipguard.db-shm"), 0o600)


def test_creating_a_store_logs_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store created in place of a lost file restricts no user; the log warns once."""
    with SQLiteStore(path), SQLiteStore(path):
        assert caplog.messages == [f"{path}: created a new store, in which no user is restricted"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_file_that_others_can_access_logs_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A restored backup has the permissions of the copy."""
    SQLiteStore(path).close()
    caplog.clear()
    path.chmod(0o640)
    SQLiteStore(path).close()
    assert caplog.messages == [f"{path}: users other than its owner have access (mode 640)"]


def test_commits_are_durable(store: SQLiteStore) -> None:
    """Every connection has the settings that survive a power cut."""
    wanted = {
        "journal_mode": "wal",
        "synchronous": 2,
        "fullfsync": 1,
        "foreign_keys": 1,
        "trusted_schema": 0,
    }
    with store._pool.connection() as one, store._pool.connection() as two:
        for connection in (one, two):
            found = {name: connection.rows(f"PRAGMA {name}")[0][0] for name in wanted}
            assert found == wanted
            assert connection.driver.isolation_level is None


def test_one_statement_is_a_policy(store: SQLiteStore) -> None:
    """A policy is one SELECT, so one snapshot, and finds every row by a key."""
    impose(store, "jo", 1)
    with store._pool.connection() as connection:
        seen: list[str] = []
        connection.driver.set_trace_callback(seen.append)
    store.load_policy("jo")
    assert len([sql for sql in seen if "SELECT" in sql]) == len(seen) == 1
    with store._pool.connection() as connection:
        connection.driver.set_trace_callback(None)
        plan = connection.rows("EXPLAIN QUERY PLAN " + seen[0])
    assert all(row[3].startswith("SEARCH") for row in plan)


def test_a_sync_reads_only_changes(store: SQLiteStore) -> None:
    """A sync finds its entries by keys, however long the audit log is."""
    impose(store, "jo", 1)
    with store._pool.connection() as connection:
        plan = connection.rows("EXPLAIN QUERY PLAN " + CHANGES_SINCE, (1, 1, 10))
    steps = [row[3] for row in plan if row[3].split()[1] != "t"]  # t: the subquery
    assert len(steps) == 4
    assert all(step.startswith("SEARCH") for step in steps)


# ------------------------------------------------------------------------------------ opening


def test_a_place_that_cannot_hold_the_file(tmp_path: Path) -> None:
    """The error says what is wrong with a directory, or a missing one."""
    with pytest.raises(StoreConfigError, match="not a file"):
        SQLiteStore(tmp_path)
    with pytest.raises(StoreConfigError, match="No such file or directory"):
        SQLiteStore(tmp_path / "missing" / "a.db")


@may_fork
def test_a_file_that_may_not_be_written() -> None:
    """A store needs to write even to read: in WAL mode readers mark their position in a file."""
    with TemporaryDirectory() as folder:  # that others can reach, as they cannot reach `tmp_path`
        Path(folder).chmod(0o755)
        path = Path(folder) / "a.db"
        SQLiteStore(path).close()
        path.chmod(0o444)

        def use() -> str:
            as_nobody()
            with pytest.raises(StoreConfigError) as caught:
                SQLiteStore(path)
            return str(caught.value).removeprefix(f"{path}: ")

        assert "may" in in_child(use, at_once=True)


def as_nobody() -> None:
    if os.geteuid() == 0:  # root may write everywhere
        nobody = pwd.getpwnam("nobody")
        os.setegid(nobody.pw_gid)
        os.seteuid(nobody.pw_uid)


@may_fork
@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_file_that_was_read_only_is_written_again(where: str) -> None:
    """At once, although connections from that time are idle, and one is waiting."""
    with TemporaryDirectory() as name:  # that others can reach, as they cannot reach `tmp_path`
        folder = Path(name)
        path = folder / "a.db"
        store = SQLiteStore(path, timeout=30)
        store.put_users([user("jo")])
        store._pool.forget()
        if os.geteuid() == 0:
            for each in (folder, path):
                shutil.chown(each, "nobody")

        def use() -> list[object]:
            as_nobody()
            place = path if where == "file" else folder
            mode = place.stat().st_mode
            place.chmod(mode & ~0o222)
            refused = []
            for write in (lambda: impose(store, "jo", 1), lambda: store.put_users([user("ann")])):
                with suppress(StoreUnavailable):
                    refused.append(write())
            threads: list[threading.Thread] = []
            if where == "file":  # in a folder that is read-only nothing can be read either
                barrier = threading.Barrier(4)

                def read() -> None:
                    with store._pool.connection() as connection:
                        connection.rows("SELECT * FROM head")
                        barrier.wait()

                readers = [threading.Thread(target=read) for _ in range(4)]
                threads = [threading.Thread(target=store.wait, args=(10**9, 60))]
                for thread in (*readers, *threads):
                    thread.start()
                for thread in readers:
                    thread.join()
                until(lambda: any(connection.thread for connection in alive(store._pool._open)))
            place.chmod(mode)
            written = [impose(store, "jo", 2), store.put_users([user("ann")])]
            store.close()
            for thread in threads:
                thread.join()
            return [refused, written]

        assert in_child(use, at_once=True) == "[[], [2, 3]]"
        store.close()


@pytest.mark.parametrize("content", [b"hello", b"not a database" * 1000])
def test_a_file_that_is_not_a_database(path: Path, content: bytes) -> None:
    """A file of another format is refused and left unchanged."""
    path.write_bytes(content)
    with pytest.raises(StoreConfigError, match="not an SQLite database"):
        SQLiteStore(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE users (id)", "PRAGMA application_id = 7", "PRAGMA user_version = 3"]
)
def test_another_programs_database(path: Path, statement: str) -> None:
    """A database of another program is refused and left unchanged; an empty one is used."""
    with raw(path) as connection:
        connection.execute(statement)
    before = path.read_bytes()
    if "user_version" in statement:
        SQLiteStore(path).close()
        return
    with pytest.raises(StoreConfigError, match="another program"):
        SQLiteStore(path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_checking_only_creates_nothing(path: Path) -> None:
    with pytest.raises(StoreConfigError, match="No such file"):
        SQLiteStore(path, migrate=False)
    assert not path.exists()
    path.touch()
    with pytest.raises(SchemaVersionError) as raised:
        open_store(f"sqlite:///{path}", migrate=False)
    assert (raised.value.found, raised.value.needed) == (None, SCHEMA_VERSION)
    assert path.read_bytes() == b""
    SQLiteStore(path).close()
    SQLiteStore(path, migrate=False).close()


def test_a_host_may_migrate_by_itself(path: Path) -> None:
    """The SQL of `migrations` is all that a store needs."""
    path.touch()
    with raw(path) as connection:
        for version, sql in migrations():
            connection.executescript(f"BEGIN; {sql}; COMMIT;")
            assert connection.execute("SELECT version FROM schema_version").fetchall() == [
                (version,)
            ]
    with SQLiteStore(path, migrate=False) as store:
        assert store.put_users([user("jo")]) == 1


def set_schema(path: Path, version: int, oldest: int) -> None:
    with raw(path) as connection:
        connection.execute("UPDATE schema_version SET version = ?, oldest = ?", (version, oldest))


def test_a_newer_schema_that_does_not(store: SQLiteStore, path: Path) -> None:
    """A store whose schema needs a newer library cannot be opened; an open one stops answering."""
    store.load_policy("jo")
    set_schema(path, 99, SCHEMA_VERSION + 1)
    for migrate in (None, True, False):
        with pytest.raises(SchemaVersionError) as raised:
            SQLiteStore(path, migrate=migrate)
        assert (raised.value.found, raised.value.needed) == (99, SCHEMA_VERSION + 1)
    with pytest.raises(StoreUnavailable):
        store.changes_since(None)
    with pytest.raises(StoreUnavailable), store.transaction():
        pytest.fail("the transaction began")


def test_an_older_schema_needs_a_migration(path: Path) -> None:
    SQLiteStore(path).close()
    set_schema(path, 0, 0)
    with pytest.raises(SchemaVersionError) as raised:
        SQLiteStore(path, migrate=False)
    assert (raised.value.found, raised.value.needed) == (0, SCHEMA_VERSION)


def test_a_failed_migration_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *before, (version, sql) = migrations()
    broken = [*before, (version, sql + "INSERT INTO missing VALUES (1);\n")]
    with monkeypatch.context() as patch:
        patch.setattr("ipguard.stores.sqlite._schema.migrations", lambda dialect: broken)
        with pytest.raises(StoreUnavailable, match="missing"):
            SQLiteStore(path)
    with pytest.raises(SchemaVersionError):
        SQLiteStore(path, migrate=False)
    SQLiteStore(path).close()


# ------------------------------------------------------------------------------- many of them


@pytest.mark.slow
def test_many_users_do_not_fill_the_memory(store: SQLiteStore) -> None:
    """A generator of users is read as a stream, and adding them again changes nothing."""
    count = rounds(5_000, 100_000)

    def users() -> Iterator[User]:
        return (user(f"user{n:06}", f"Jo Smith {n}", f"U{n:06}") for n in range(count))

    tracemalloc.start()
    assert store.put_users(users()) == 2
    assert store.put_users(users()) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert store.changes_since((1, store_token(store, 1))).usernames is EVERYBODY
    assert len(store.overview(EVERY, search="smith 1", limit=count)) > count / 10
    everyone = frozenset(f"U{n:06}" for n in range(100_000))
    page = store.overview(everyone, search="SMITH 77")
    assert [item.user.username for item in page][:2] == ["user000077", "user000770"]
    assert len(store.history(everyone)) == 0


def store_token(store: SQLiteStore, revision: int) -> str:
    with store._pool.connection() as connection:
        ((token,),) = connection.rows("SELECT token FROM changes WHERE revision = ?", (revision,))
    return str(token)


def test_a_guard_far_behind_gets_everybody(store: SQLiteStore) -> None:
    """The list of users to drop is bounded."""
    cursor = store.changes_since(None)[:2]
    with store.transaction() as turn:
        for number in range(10_001):
            turn.append(Action.IMPOSE, actor="admin", touches=frozenset({f"u{number}"}))
    assert store.changes_since(cursor).usernames is EVERYBODY
    newer = (2, store_token(store, 2))
    found = store.changes_since(newer).usernames
    assert isinstance(found, frozenset)
    assert len(found) == 10_000


def test_numbers_and_texts_that_no_column_holds(store: SQLiteStore) -> None:
    """Arguments that no column holds find nothing, and raise no error of the driver."""
    huge = 2**70
    assert store.changes_since((huge, "x")).usernames is RESET
    assert not store.wait(huge, 0.01)
    assert len(store.history(EVERY, before=huge, limit=huge)) == 1
    assert len(store.history(EVERY, before=-huge)) == 0
    assert len(store.overview(EVERY, limit=huge)) == 1
    assert len(store.overview(EVERY, search="\ud800")) == 0
    assert len(store.overview(EVERY, after="\ud800")) in (0, 1)
    assert len(store.overview(frozenset({"\ud800"}))) == 0
    assert len(store.history(EVERY, username="\ud800")) == 0
    with store.transaction() as turn:
        assert turn.request("\ud800") is None
        assert turn.restriction("\ud800") is None
        assert turn.user("\ud800") is None


def test_an_action_of_a_newer_library(store: SQLiteStore, path: Path) -> None:
    """The audit log stays readable after a newer library has written to it."""
    with raw(path) as connection:
        connection.execute("UPDATE changes SET action = 'teleport' WHERE revision = 1")
    assert [change.action for change in store.history(EVERY)] == ["teleport"]


def test_nothing_secret_shows(store: SQLiteStore, path: Path) -> None:
    """The `repr` has the path only."""
    assert repr(store) == f"<SQLiteStore {path}>"
    assert isinstance(open_store(f"sqlite:///{path}"), SQLiteStore)
