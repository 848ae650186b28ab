"""pgbouncer in transaction mode in front of a server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator

import psycopg

from tests.postgres import Server, free_port, until
from tests.requirements import missing


@contextlib.contextmanager
def transaction_pooler(server: Server, *, user: str = "postgres") -> Iterator[int]:
    """Run pgbouncer in front of a server, and yield its port.

    Args:
        server: The server.
        user: The role of every session on the server, independent of the client's login.
    """
    path = "/usr/sbin:/usr/bin:/usr/local/bin"
    program = shutil.which("pgbouncer", path=path) or missing("pgbouncer", "pgbouncer")
    folder, port = server.account.folder(), free_port()
    users, settings = folder / "users.txt", folder / "pgbouncer.ini"
    users.write_text('"postgres" ""\n')
    settings.write_text(
        f"""
        [databases]
        * = host=127.0.0.1 port={server.port} user={user}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = transaction
        default_pool_size = 3
        max_client_conn = 200
        """.replace("        ", "")
    )
    for each in (users, settings):
        server.account.own(each)
    process = subprocess.Popen(
        [program, settings],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **server.account.options(),
    )
    try:
        until(lambda: _answers(server.url(port=port)), "pgbouncer answers")
        yield port
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url) as connection:
        connection.execute("SELECT 1")
        return True
    return False
