"""PostgreSQL asked each time, with its own type for addresses."""

from __future__ import annotations

import os

from benchmarks.peers.written import as_networks
from benchmarks.work import Ask, Policies

#: Where the server is that `benchmarks/__main__.py` started.
DSN = "IPGUARD_BENCH_POSTGRES"

_ASK = """
SELECT NOT EXISTS (SELECT FROM bench_peer WHERE username = %s)
    OR EXISTS (SELECT FROM bench_peer WHERE username = %s AND %s::inet <<= network)
"""


def server() -> str:
    """Return the DSN of the server, or say that there is none."""
    dsn = os.environ.get(DSN, "")
    if not dsn:
        raise RuntimeError(os.environ.get(f"{DSN}_ERROR") or "no PostgreSQL server was started")
    return dsn


def postgres_inet(policies: Policies) -> Ask:
    from psycopg_pool import ConnectionPool  # noqa: PLC0415

    pool = ConnectionPool(server(), kwargs={"autocommit": True}, min_size=1, max_size=1, open=True)
    with pool.connection() as connection:
        # A session's own, so that each process has its table.
        connection.execute("DROP TABLE IF EXISTS bench_peer")
        connection.execute("CREATE TEMP TABLE bench_peer (username text, network inet)")
        with (
            connection.cursor() as cursor,
            cursor.copy("COPY bench_peer FROM STDIN") as copy,
        ):
            for user, texts in policies.items():
                for text in texts:
                    for network in as_networks(text):
                        copy.write_row((user, network))
        connection.execute("CREATE INDEX ON bench_peer (username, network)")
        connection.execute("CREATE INDEX ON bench_peer USING gist (network inet_ops)")
        connection.execute("ANALYZE bench_peer")

    def ask(user: str, ip: str) -> bool:
        with pool.connection() as connection:
            found = connection.execute(_ASK, (user, user, ip), prepare=True).fetchone()
        return found is not None and found[0]

    return ask
