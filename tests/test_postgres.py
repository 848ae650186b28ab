"""The PostgreSQL store: opening, roles, round trips, pruning, forked children.

The promises of every store are in test_stores.py, failures and recovery in
test_postgres_failures.py, wake-ups in test_postgres_listen.py.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.sql import Literal

import ipguard
from ipguard import (
    Actor,
    DuplicateRestriction,
    RequestState,
    SchemaVersionError,
    StoreConfigError,
    StoreError,
    StoreUnavailable,
)
from ipguard.addresses import AddressRange
from ipguard.model import EVERYBODY, Action, Restriction
from ipguard.stores import open_store
from ipguard.stores._sql import SCHEMA_VERSION
from ipguard.stores.postgres import _CHANGES, _POLICY, PostgresStore, grants, migrations
from ipguard.stores.postgres._connection import dialect, quoted
from ipguard.stores.postgres._options import Options
from ipguard.testing import Outbox
from ipguard.testing._case import Call
from tests.flows import HOME, OFFICE, Desk
from tests.pooler import transaction_pooler
from tests.postgres import Given, Server, execute, fresh_schema
from tests.proxy import Proxy

START = datetime(2030, 1, 1, 12, tzinfo=UTC)
EVERY = Actor.EVERY_ACCOUNT
BOSS = Actor(username="boss", email="boss@example.com", manages=EVERY)


def user(name: str) -> ipguard.User:
    return ipguard.User(username=name, full_name="Some One", account_id="A1", email="s@example.com")


def restriction(n: int) -> Restriction:
    return Restriction(
        id=f"id{n}",
        username=f"user{n}",
        addresses=AddressRange.parse("203.0.113.7"),
        label="",
        created_at=START,
        created_by="boss",
    )


def touch(store: PostgresStore, *names: str) -> int:
    with store.transaction() as turn:
        return turn.append(Action.IMPOSE, actor="boss", touches=frozenset(names)).revision


@pytest.fixture
def url(postgres: Server | Given) -> str:
    """The URL of a schema that does not exist yet."""
    return postgres.url(schema=fresh_schema())


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    with PostgresStore(url, timeout=20.0) as store:  # the machine may be busy
        yield store


# ------------------------------------------------------------------------------- the URL


def options(url: str = "postgresql://host/db", **keywords: Any) -> Options:
    return Options.parse(url, keywords)


def test_default_options() -> None:
    """By default the pool is small, waits end before a guard's lease, the schema is ours."""
    found = options()
    assert (found.pool_size, found.timeout, found.bulk_timeout) == (5, 2.0, 300.0)
    assert (found.schema, found.prepare, found.replica) == ("ipguard", -1, False)
    assert found.listen is not None
    assert len(found.listen) == len(found.servers) == 1


def test_options_in_the_url_and_as_keywords_are_the_same() -> None:
    given = {
        "pool_size": 3,
        "timeout": 0.5,
        "bulk_timeout": 7.0,
        "schema": "other",
        "prepare_threshold": 9,
        "listen": "off",
        "replica": "allow",
    }
    query = "&".join(f"{name}={value}" for name, value in given.items())
    assert options(f"postgresql://host/db?{query}") == options(**given)
    assert options(listen="off").listen is None
    assert options(prepare="off").prepare is None
    assert options(prepare="on").prepare == 0
    assert options(prepare_threshold=9).prepare == 9


def test_other_options_are_libpqs() -> None:
    (server,) = options("postgres://u%40x:p%2F@host:1/d?sslmode=require&timeout=1").servers
    for part in ("user=u@x", "password=p/", "host=host", "port=1", "dbname=d", "sslmode=require"):
        assert part in server
    assert "timeout=1" not in server.replace("connect_timeout", "")


def test_each_of_several_hosts_is_a_server() -> None:
    """Hosts are tried one by one, with their own ports or one common port."""
    servers = options("postgresql://u@a:1,b:2/db").servers
    assert ["host=a" in s and "port=1" in s for s in servers] == [True, False]
    assert ["host=b" in s and "port=2" in s for s in servers] == [False, True]
    assert len(options("postgresql://u@/db?host=a,b,c&port=7").servers) == 3
    with pytest.raises(StoreConfigError):
        options("postgresql://u@/db?host=a,b,c&port=7,8")


@pytest.mark.parametrize(
    "query",
    [
        "timeout=0",
        "timeout=nan",
        "timeout=soon",
        "timeout",
        "timeout=1&timeout=2",
        "bulk_timeout=0",
        "pool_size=0",
        "pool_size=1.5",
        "schema=",
        "schema=" + "x" * 64,
        "prepare=maybe",
        "prepare_threshold=-1",
        "replica=yes",
        "listen=nonsense",
        "pool=5",
        "sslmode",
    ],
)
def test_a_bad_option_is_refused(query: str) -> None:
    """An option that is unknown, repeated or invalid is a StoreConfigError."""
    with pytest.raises(StoreConfigError):
        open_store(f"postgresql://host/db?{query}")


@pytest.mark.parametrize("url", ["u:hunter2/x@db/x", "u@db/x?port=hunter2", "u@db:1,db2:hunter2/x"])
def test_no_part_of_a_password_is_taken_for_a_port(url: str) -> None:
    """If its `/` is not encoded, libpq would put the port in its error, and so in logs."""
    with pytest.raises(StoreConfigError, match="percent-encoded") as caught:
        open_store(f"postgresql://{url}")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "keywords",
    [
        {"timeout": True},
        {"pool_size": True},
        {"pool_size": 2.0},
        {"schema": 5},
        {"schema": "a\0b"},
        {"listen": 5},
        {"timeout": object()},
    ],
)
def test_a_bad_keyword_is_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(StoreConfigError):
        PostgresStore("postgresql://host/db", **keywords)


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(StoreConfigError, match="twice"):
        PostgresStore("postgresql://host/db?timeout=1", timeout=1.0)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2%@host/db",
        "postgresql://u:hunter2@[/db",
        "postgresql://u:hunter2@host:x/db?nonsense=1",
        "postgresql://u:hunter2@host/db?listen=postgresql://v:hunter2%25@h/",
        "postgresql://u:hunter2@127.0.0.1:1/db",
    ],
)
def test_a_password_is_shown_nowhere(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """No error, traceback, repr or log line at DEBUG contains the password."""
    caplog.set_level(logging.DEBUG)
    text = ""
    try:
        with PostgresStore(url, timeout=0.5) as store:
            text += repr(store) + repr(store._options) + repr(vars(store._pool))
            store.load_policy("jo")
    except StoreError as error:
        text += "".join(traceback.format_exception(error)) + repr(error)
    assert text
    # The lines of this test itself are in the traceback, the URL is not.
    assert "hunter2" not in text + caplog.text


# ------------------------------------------------------------------------------- opening


def test_opening_may_only_check(url: str) -> None:
    """With `migrate=False` a missing schema is an error, and is not created."""
    for _ in range(2):
        with pytest.raises(SchemaVersionError) as raised:
            PostgresStore(url, migrate=False)
        assert raised.value.found is None
    PostgresStore(url, migrate=True).close()
    PostgresStore(url, migrate=False).close()


def test_the_sql_alone_makes_the_same_schema(postgres: Server | Given, url: str) -> None:
    """A host that runs `migrations()` itself gets the same schema as by opening."""
    name = options(url).schema
    text = "".join(text for _, text in migrations())
    postgres.execute(f"CREATE SCHEMA {name}; SET search_path TO {name}; {text}")
    assert [version for version, _ in migrations()] == list(range(1, SCHEMA_VERSION + 1))
    with PostgresStore(url, migrate=False) as store:
        assert store.put_users([user("jo")]) == 1


def _open(url: str, answers: Any) -> None:
    try:
        with PostgresStore(url) as store:
            answers.put(store.changes_since(None).token)
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.slow
def test_ten_processes_open_at_once(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    children = [context.Process(target=_open, args=(url, answers)) for _ in range(10)]
    for child in children:
        child.start()
    tokens = {answers.get(timeout=60) for _ in children}
    for child in children:
        child.join(60)
    with PostgresStore(url, migrate=False) as store:
        assert tokens == {store.changes_since(None).token}


def test_a_schema_that_vanished_is_not_created_again(postgres: Server | Given, url: str) -> None:
    """A new schema restricts no user, so an open store fails instead."""
    with PostgresStore(url) as store:
        store.put_users([user("jo")])
        postgres.execute(f"DROP SCHEMA {options(url).schema} CASCADE")
        for _ in range(3):
            with pytest.raises(StoreError):
                store.changes_since(None)
        with pytest.raises(StoreError):
            store.load_policy("jo")


def test_another_programs_tables_are_left_alone(postgres: Server | Given, url: str) -> None:
    """A schema with tables of these names but no version belongs to another program."""
    name = options(url).schema
    postgres.execute(f"CREATE SCHEMA {name}; CREATE TABLE {name}.users (id int)")
    with pytest.raises(StoreConfigError, match="another program"):
        PostgresStore(url)
    assert postgres.execute(f"SELECT count(*) FROM {name}.users") == [(0,)]


def test_another_encoding_is_refused(postgres: Server | Given) -> None:
    """A database that cannot hold every name is refused at opening."""
    name = fresh_schema()
    postgres.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    with pytest.raises(StoreConfigError, match="LATIN1"):
        PostgresStore(postgres.url(name))


# ------------------------------------------------------------------------------- the roles


@pytest.fixture
def roles(postgres: Server | Given) -> dict[str, str]:
    """A URL for each of the three roles, over one schema that the owner created."""
    schema = fresh_schema()
    names = {kind: f"{schema}_{kind}" for kind in ("owner", "reader", "writer")}
    for name in names.values():
        postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    postgres.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {names['owner']}")
    urls = {kind: postgres.url(user=name, schema=schema) for kind, name in names.items()}
    PostgresStore(urls["owner"]).close()
    text = grants(schema=schema, reader=names["reader"], writer=names["writer"])
    plain = postgres.url(user=names["owner"])
    execute(plain, text)
    execute(plain, text)  # again raises nothing
    return urls


def test_each_role_can_do_its_part(roles: dict[str, str]) -> None:
    """A guard works as the reader, users and a workflow as the writer, pruning as the owner."""
    with (
        PostgresStore(roles["writer"]) as writer,
        PostgresStore(roles["reader"]) as reader,
        PostgresStore(roles["owner"]) as owner,
    ):
        writer.put_users([user("jo"), user("al")])
        outbox = Outbox()
        flow = ipguard.Workflow(writer, outbox, key=bytes(32))
        request = flow.request(BOSS, "jo", "203.0.113.7")
        with pytest.raises(ipguard.WrongNumber):
            flow.confirm(BOSS, request.id, "0" * 10)
        applied = flow.confirm(BOSS, request.id, outbox.number_for(request.id))
        assert isinstance(applied, ipguard.Applied)
        flow.impose_many(BOSS, [("al", "203.0.113.8")], reason="import")
        assert [o.user.username for o in flow.overview(BOSS, search="jo")] == ["jo"]
        writer.remove_users(["al"])
        with ipguard.Guard(reader) as guard:
            assert guard.check("jo", "203.0.113.7", at_least=applied.revision)
            assert not guard.is_allowed("jo", "203.0.113.8")
            assert applied.restriction is not None
            flow.delete(BOSS, applied.restriction.id)
            assert guard.wait_for(writer.changes_since(None).head, 5.0)
            assert guard.is_allowed("jo", "203.0.113.8")
        assert dict(reader.load_all_policies()[1])["al"].known is False
        assert owner.prune(datetime.now(UTC) + timedelta(days=1)) > 0


def test_a_reader_records_sightings_and_reads_them(roles: dict[str, str]) -> None:
    """Login servers write what they see, and explain refusals; the writer renames and forgets."""
    with PostgresStore(roles["writer"]) as writer, PostgresStore(roles["reader"]) as reader:
        writer.put_users([user("jo"), user("al")])
        with ipguard.Guard(reader) as guard:
            guard.saw("jo", "203.0.113.7", False)
        assert guard.stats().sightings_lost == 0
        assert [each.times for each in guard.explain("jo", "203.0.113.7").refused] == [1]
        assert len(writer.record_sightings(reader.sightings("jo"))) == 0
        writer.rename_user("jo", "joe")
        assert writer.forget_sightings("joe") == 1
        assert reader.sightings("joe") == ()


def test_sightings_wait_for_no_writer(postgres: Server | Given) -> None:
    """An import that holds the writer's lock for minutes loses no sighting."""
    with PostgresStore(postgres.url(schema=fresh_schema())) as store:
        store.put_users([user("jo")])
        now = store.now()
        seen = ipguard.Sighting(
            username="jo", address="203.0.113.7", first_at=now, last_at=now, refused=1
        )
        with store.transaction() as tx:
            assert len(Call(lambda: store.record_sightings([seen])).result()) == 1
            tx.append(ipguard.Action.UNLOCK, actor="boss")
        assert [each.refused for each in store.sightings("jo")] == [1]


def test_no_sighting_is_recorded_during_a_restore(postgres: Server | Given) -> None:
    """The rows would be in the way of those that are restored."""
    schema = fresh_schema()
    with PostgresStore(postgres.url(schema=schema)) as store:
        store.put_users([user("jo")])
        now = store.now()
        seen = ipguard.Sighting(
            username="jo", address="203.0.113.7", first_at=now, last_at=now, refused=1
        )
        execute(postgres.url(), f"DELETE FROM {schema}.zz_restore_marker")
        with pytest.raises(StoreUnavailable):
            store.record_sightings([seen])
        ((count,),) = execute(postgres.url(), f"SELECT count(*) FROM {schema}.sightings")
        assert count == 0


FORBIDDEN = {
    "reader": [
        "SELECT digest FROM {s}.requests",
        "SELECT email FROM {s}.users",
        "SELECT full_name FROM {s}.users",
        "SELECT actor, detail FROM {s}.changes",
        "SELECT * FROM {s}.failures",
        "SELECT * FROM {s}.search_terms",
        "SELECT * FROM {s}.head FOR UPDATE",
        "INSERT INTO {s}.changes (revision, token, at, action, detail) VALUES (9, '', 0, '', '')",
        "UPDATE {s}.head SET revision = 9",
        "DELETE FROM {s}.restrictions",
        "UPDATE {s}.users SET removed = 1",
        "SELECT * FROM {s}.past_restrictions",
        "INSERT INTO {s}.imports (number, revision) VALUES (-1, 1)",
        "TRUNCATE {s}.restrictions",
        "CREATE TABLE {s}.mine (id int)",
        "DROP TABLE {s}.restrictions",
    ],
    "writer": [
        "UPDATE {s}.changes SET detail = ''",
        "DELETE FROM {s}.changes",
        "TRUNCATE {s}.changes",
        "DELETE FROM {s}.head",
        "INSERT INTO {s}.head (id, revision, token, touching) VALUES (1, 0, '', 0)",
        "DELETE FROM {s}.users",
        "DELETE FROM {s}.requests",
        "UPDATE {s}.restrictions SET expires_at = NULL",
        "UPDATE {s}.restrictions SET began = 0",
        "UPDATE {s}.past_restrictions SET label = ''",
        "DELETE FROM {s}.past_restrictions",
        "UPDATE {s}.imports SET revision = 0",
        "DELETE FROM {s}.imports",
        "UPDATE {s}.schema_version SET version = 9",
        "ALTER TABLE {s}.changes ADD COLUMN more int",
        "CREATE TABLE {s}.mine (id int)",
        "DROP TABLE {s}.changes",
    ],
}


def test_each_role_can_do_no_more(roles: dict[str, str], postgres: Server | Given) -> None:
    """The server itself refuses all other statements of a role."""
    import psycopg

    for kind, statements in FORBIDDEN.items():
        parsed = options(roles[kind])
        for statement in statements:
            with psycopg.connect(parsed.servers[0]) as connection:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.format(s=parsed.schema))
                connection.rollback()


def test_roles_of_the_first_schema_keep_working(postgres: Server | Given) -> None:
    """A role with the grants of schema 1 writes and lists users after the migration.

    So does a store that was open before it, like that of an old server.
    """
    schema = fresh_schema()
    owner, writer = f"{schema}_owner", f"{schema}_writer"
    for name in (owner, writer):
        postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    postgres.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {owner}")
    ((_, first), *_) = migrations()
    rights = "SELECT, INSERT, DELETE"
    execute(
        postgres.url(user=owner),
        f"SET search_path TO {schema}; {first}"
        f"GRANT USAGE ON SCHEMA {schema} TO {writer};"
        f"GRANT SELECT ON schema_version TO {writer}; GRANT SELECT, UPDATE ON head TO {writer};"
        f"GRANT SELECT, INSERT ON changes TO {writer};"
        f"GRANT SELECT, INSERT, UPDATE ON users, requests, failures TO {writer};"
        f"GRANT {rights} ON restrictions, search_terms TO {writer}",
    )
    PostgresStore(postgres.url(user=owner, schema=schema)).close()
    with PostgresStore(postgres.url(user=writer, schema=schema)) as store:
        store.put_users([user(f"jo{n:05d}") for n in range(2_500)])
        store.put_users([user("jo")])
        assert len(store.overview(EVERY, search="jo", limit=1_000)) == 1_000
        assert [line.user.username for line in store.overview(EVERY, search="jo0249")] == [
            f"jo{n:05d}" for n in range(2_490, 2_500)
        ]
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        flow.impose_many(BOSS, [("jo", "203.0.113.7")], reason="import")
        (held,) = store.load_policy("jo").restrictions
        flow.lift(BOSS, held.id, reason="moved")
        assert store.policy_at("jo", 3).restrictions == (held,)
        store.rename_user("jo", "joe")
        assert store.verify().damage == ()


def test_a_schema_that_was_renamed_keeps_its_record(postgres: Server | Given) -> None:
    """The trigger that keeps ended restrictions writes to the schema of its table."""
    schema, other = fresh_schema(), fresh_schema()
    PostgresStore(postgres.url(schema=schema)).close()
    postgres.execute(f"ALTER SCHEMA {schema} RENAME TO {other}")
    with PostgresStore(postgres.url(schema=other)) as store:
        store.put_users([user("jo")])
        flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
        held = flow.impose(BOSS, "jo", "203.0.113.7", reason="office").restriction
        assert held is not None
        flow.lift(BOSS, held.id, reason="moved")
        assert store.policy_at("jo", 2).restrictions == (held,)
        assert store.verify().damage == ()


def test_a_role_without_a_right_gets_an_error(roles: dict[str, str]) -> None:
    """The reader's writes, and pruning by the writer, raise errors of this library."""
    with PostgresStore(roles["reader"]) as reader, PostgresStore(roles["writer"]) as writer:
        writer.put_users([user("jo")])
        for call in (
            lambda: reader.put_users([user("jo")]),
            lambda: reader.overview(EVERY),
            lambda: reader.history(EVERY),
            lambda: writer.prune(START),
            lambda: touch(reader, "jo"),
        ):
            with pytest.raises(StoreConfigError, match="denied"):
                call()
        assert touch(writer, "jo") == 2
        assert reader.changes_since(None).head == 2


def test_a_role_that_may_not_make_the_schema_checks_it(
    roles: dict[str, str], postgres: Server | Given
) -> None:
    missing = roles["reader"].replace("schema=t", "schema=missing_t")
    with pytest.raises(SchemaVersionError):
        PostgresStore(missing)
    with pytest.raises(StoreConfigError, match="denied"):
        PostgresStore(missing, migrate=True)
    PostgresStore(roles["reader"], migrate=True).close()  # there is nothing to do


def test_names_are_quoted_in_grants() -> None:
    text = grants(schema='a"b', reader="x y", writer="Writer")
    assert '"a""b"' in text
    assert '"x y"' in text
    assert '"Writer"' in text
    assert grants() == ""


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("pooled", [False, True])
def test_round_trips(own_postgres: Server, pooled: bool) -> None:
    """A policy load and a sync are one round trip each, a confirm is seven, with a pooler too."""
    with contextlib.ExitStack() as stack:
        port = own_postgres.port
        if pooled:
            port = stack.enter_context(transaction_pooler(own_postgres))
        proxy = stack.enter_context(Proxy(port))
        url = own_postgres.url(
            port=proxy.port,
            schema=fresh_schema(),
            sslmode="disable",
            gssencmode="disable",
            listen="off",
        )
        with open_store(url) as store:
            outbox = Outbox()
            flow = ipguard.Workflow(store, outbox, key=bytes(32))
            store.put_users([user("jo")])
            cursor = store.changes_since(None)[:2]
            counts: dict[str, int] = {}

            def count(name: str, call: Any) -> None:
                before = proxy.round_trips
                call()
                took = proxy.round_trips - before
                # On a busy machine the server may answer between two parts of one message.
                counts[name] = min(took, counts.get(name, took))

            for _ in range(2):  # the first time prepares
                count("load", lambda: store.load_policy("jo"))
                count("sync", lambda: store.changes_since(cursor))
            for last in (7, 8, 9):
                request = flow.request(BOSS, "jo", f"203.0.113.{last}")
                number = outbox.number_for(request.id)
                count("confirm", partial(flow.confirm, BOSS, request.id, number))
            assert counts == {"load": 1, "sync": 1, "confirm": 7}
        assert proxy.connections <= 3


@pytest.mark.parametrize("analyzed", [False, True], ids=["no statistics", "statistics"])
@pytest.mark.parametrize(
    ("statement", "given"),
    [
        (_POLICY, ("user1", "user1", "user1")),
        (_CHANGES, (3_000, 3_000, 10_001)),
    ],
    ids=["policy", "changes"],
)
def test_logins_use_indexes(
    store: PostgresStore,
    statement: str,
    given: tuple[object, ...],
    analyzed: bool,
) -> None:
    """Generic plans, as prepared statements get them, scan no whole table."""
    store.put_users(user(f"user{n}") for n in range(3_000))
    for start in range(0, 3_000, 500):
        with store.transaction() as turn:
            for n in range(start, start + 500):
                turn.append(Action.IMPOSE, actor="boss", touches=frozenset({f"user{n}"}))
    with store.transaction(staged=(restriction(n) for n in range(3_000))) as turn:
        turn.add_staged(per_user=1)
        turn.append(Action.IMPOSE_MANY, actor="boss", touches=EVERYBODY)
    schema = store._options.schema
    tables = ("changes", "users", "restrictions")
    text = re.sub("%s|%%", lambda it: "%" if it[0] == "%%" else "$n", dialect(statement, schema))
    for number in range(len(given)):
        text = text.replace("$n", f"${number + 1}", 1)
    server = store._options.servers[0]
    with psycopg.connect(server, autocommit=True, prepare_threshold=None) as connection:
        if analyzed:
            for table in tables:
                connection.execute(f"ANALYZE {quoted(schema)}.{table}")
        connection.execute("SET plan_cache_mode = force_generic_plan")
        kinds = ", ".join("text" if isinstance(each, str) else "bigint" for each in given)
        connection.execute(f"PREPARE it ({kinds}) AS {text}")
        values = ", ".join(Literal(each).as_string() for each in given)
        ((plan,),) = connection.execute(f"EXPLAIN (FORMAT JSON) EXECUTE it ({values})").fetchall()
    found = list(nodes(plan[0]["Plan"]))
    assert {node["Relation Name"] for node in found} & set(tables)
    assert [
        (node["Node Type"], node["Relation Name"])
        for node in found
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in tables
    ] == []


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a plan that read a table."""
    if "Relation Name" in plan:
        yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


# ------------------------------------------------------------------------------- time


def test_the_servers_clock_decides(url: str, store: PostgresStore) -> None:
    """Without `clock` the store has the server's time, and entries carry it."""
    ((server,),) = execute(url.partition("schema=")[0].rstrip("&?"), "SELECT clock_timestamp()")
    assert abs(store.now() - server) < timedelta(seconds=1)
    with store.transaction() as turn:
        assert abs(turn.now - server) < timedelta(seconds=5)
        change = turn.append(Action.IMPOSE, actor=None)
    assert change.at == turn.now


def test_now_does_no_io(url: str) -> None:
    """Time continues when the server is down, and before it was ever reached."""
    with PostgresStore("postgresql://127.0.0.1:1/none?timeout=0.2") as store:
        assert abs(store.now() - datetime.now(UTC)) < timedelta(seconds=1)


# ------------------------------------------------------------------------------- lending


def test_no_thread_before_it_is_needed(url: str) -> None:
    """Only waiting starts a thread, and closing ends it."""
    before = set(threading.enumerate())
    with PostgresStore(url) as store:
        store.put_users([user("jo")])
        store.load_policy("jo")
        assert set(threading.enumerate()) == before
        store.wait(10**6, 0.01)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before


def test_a_pool_that_is_used_up_is_waited_for(url: str) -> None:
    """A call waits for a connection, and fails at its deadline."""
    with PostgresStore(url, pool_size=1, timeout=0.3) as store:
        pool = store._pool
        connection = pool.take(time.monotonic() + 60)
        with pytest.raises(StoreUnavailable, match="in use"):
            store.load_policy("jo")
        timer = threading.Timer(0.1, pool.give, (connection,))
        timer.start()
        assert store.load_policy("jo").revision == 0
        timer.join()


def test_stagers_do_not_take_every_connection(url: str) -> None:
    """However many bulk changes read slow sources, logins and another writer get a connection."""
    with PostgresStore(url, pool_size=2, timeout=1.0) as store:
        staging, go_on = threading.Event(), threading.Event()

        def slowly() -> Iterator[ipguard.User]:
            yield user("jo")
            staging.set()
            assert go_on.wait(20)

        call = Call(lambda: store.put_users(slowly()))
        assert staging.wait(20)
        assert store.load_policy("jo").revision == 0
        assert touch(store, "al") == 1
        go_on.set()
        call.result()
        assert store.load_policy("jo").known


def test_connections_are_not_left_behind(url: str, postgres: Server | Given) -> None:
    """After every kind of call, some of them failing, the pool is complete; closing empties it."""
    ask = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    name = fresh_schema()
    with PostgresStore(f"{url}&application_name={name}", listen="off") as store:
        store.put_users([user(f"u{n}") for n in range(200)])
        with pytest.raises(ZeroDivisionError), store.transaction():
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), store.transaction(staged=[]):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            store.put_users(user(f"u{1 // n}") for n in (1, 0))
        _, policies = store.load_all_policies()
        next(policies, None)
        del policies
        pool = store._pool
        assert len(pool._slots) == len(pool._idle) == postgres.execute(ask, name)[0][0] <= 2
    assert len(pool._slots) == 0


def test_a_failed_statement_undoes_the_transaction(url: str, store: PostgresStore) -> None:
    """A caller that suppresses a server's error cannot commit the rest."""
    with pytest.raises(StoreError), store.transaction() as turn:  # noqa: PT012
        with contextlib.suppress(StoreError):
            turn.db.rows("SELECT 1 / 0")  # type: ignore[attr-defined]
        turn.append(Action.IMPOSE, actor=None)
    assert store.changes_since(None).head == 0


def test_changes_are_accepted_again(
    postgres: Server | Given, url: str, store: PostgresStore
) -> None:
    """A database that refused changes for a while, as with a full disk, accepts them afterwards."""
    place = f'"{store._options.schema}"'

    def touch() -> int:
        with store.transaction() as turn:
            return turn.append(Action.IMPOSE, actor="boss", touches=frozenset({"jo"})).revision

    with pytest.raises(ZeroDivisionError), store.transaction():
        raise ZeroDivisionError
    assert [touch(), touch()] == [1, 2]
    postgres.execute(
        f"CREATE FUNCTION {place}.refused() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full'; END $$;"
        f" CREATE TRIGGER refused BEFORE INSERT ON {place}.changes"
        f" EXECUTE FUNCTION {place}.refused()"
    )
    for _ in range(8):  # more often than a statement is run before it is prepared
        with pytest.raises(StoreUnavailable):
            touch()
    postgres.execute(f"DROP TRIGGER refused ON {place}.changes")
    assert touch() == 3


# ------------------------------------------------------------------------------- children


def test_imports_cancel_deletions_and_say_how_duplicates_differ(url: str) -> None:
    """As in the other stores: orphaned deletions are cancelled, duplicates are compared."""
    desk = Desk(url=url)
    with desk.store:
        desk.use(confirm_deletes=True)
        old, other = desk.add(OFFICE, expires_at=desk.later(hours=1)), desk.add(HOME)
        dead, kept = desk.ask_to_delete(old), desk.ask_to_delete(other)
        desk.wait(hours=2)
        until = desk.later(days=9)
        wanted = [f"192.0.2.{n * 7 % 20}" for n in range(20)]
        rows = [("mary", text) for text in wanted]
        desk.flow.impose_many(BOSS, [*rows, ("jsmith", OFFICE, "fair", until)], reason="a file")
        assert desk.held("mary") == wanted
        assert desk.request(dead).state is RequestState.CANCELLED
        assert desk.request(kept).state is RequestState.PENDING
        for label, expires_at in (("fair", until), ("", until), ("fair", None)):
            row = ("jsmith", OFFICE, label, expires_at)
            with pytest.raises(DuplicateRestriction) as caught:
                desk.flow.impose_many(BOSS, [row], reason="a file")
            assert (caught.value.label, caught.value.expires_at) == ("fair", until)
            assert caught.value.differs is ((label, expires_at) != ("fair", until))
