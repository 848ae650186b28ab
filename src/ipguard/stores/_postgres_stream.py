"""Every restricted user from one snapshot: as policies, or packed by the server.

A guard that preloads wants little of each row, and wants it a million times. So the server packs,
in the form of `ipguard.packed`: what then crosses the wire is one row for each user, and no value
is made of it before that user logs in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, cast

from ipguard.errors import StoreUnavailable
from ipguard.model import Policy
from ipguard.stores import _sql_read as read
from ipguard.stores._postgres import Session
from ipguard.stores._postgres_client import Client
from ipguard.stores._postgres_schema import RESTORE
from ipguard.stores._sql import Row

_FETCHED: Final = 5_000

# Written so that most rows need the fewest steps: no expiry, and three values joined. `textsend`
# gives the connection's encoding, which is UTF-8. The users are joined by nothing but their names:
# with a condition more, a planner without statistics expects so few that it looks them up in turn.
_PACKED: Final = """
SELECT q.username,
    CASE WHEN u.removed = 0 THEN decode('01', 'hex') ELSE decode('00', 'hex') END || q.packed
FROM (
    SELECT o.username, string_agg(o.packed, decode('00', 'hex')) || decode('00', 'hex') AS packed
    FROM (
        SELECT r.username,
            CASE WHEN r.expires_at IS NULL
            THEN
                CASE WHEN length(r.first_ip) = 4
                THEN decode('00', 'hex') ELSE decode('01', 'hex') END
                || r.first_ip || r.last_ip || textsend(r.id)
            ELSE
                CASE WHEN length(r.first_ip) = 4
                THEN decode('02', 'hex') ELSE decode('03', 'hex') END
                || r.first_ip || r.last_ip || int8send(r.expires_at) || textsend(r.id)
            END AS packed
        FROM restrictions r
        ORDER BY r.username, r.created_at, r.id
    ) o
    GROUP BY o.username
) q
LEFT JOIN users u ON u.username = q.username
"""


_RESTORE: Final = f"SELECT {RESTORE} FROM zz_restore_marker m WHERE m.id = 1"


class PolicyStream:
    """An iterator over users and their policies, which holds a connection until its end.

    Args:
        client: The connections.

    Attributes:
        revision: The store's revision in the snapshot.
    """

    def __init__(self, client: Client) -> None:
        self._packed = False
        self._stream = self._streamed(client)
        # Started here, so that the snapshot is of now, and closing the iterator always ends it.
        self.revision = cast("int", next(self._stream))

    def _streamed(self, client: Client) -> Iterator[int | tuple[str, Policy] | tuple[str, bytes]]:
        with client.snapshot(patience=client.options.bulk_timeout) as session:
            revision, _ = read.head(session)
            restore = session.rows(_RESTORE)
            yield revision
            statement = _PACKED if self._packed else read.ALL_POLICIES
            session.run(f"DECLARE policies NO SCROLL CURSOR FOR {statement}")
            rows = _fetched(session)
            if self._packed:
                yield from cast("Iterator[tuple[str, bytes]]", rows)
            else:
                yield from read.policies_of(revision, rows)
        # A snapshot does not protect from TRUNCATE and DROP: to an older snapshot, the tables that
        # they leave are empty.
        if client.read(lambda it: it.rows(_RESTORE)) != restore:
            raise StoreUnavailable(f"{client.options.place}: {read.UNFINISHED}")

    def __iter__(self) -> PolicyStream:
        return self

    def __next__(self) -> tuple[str, Policy]:
        return cast("tuple[str, Policy]", next(self._stream))

    def packed(self) -> Iterator[tuple[str, bytes]]:
        """Give users with what `ipguard.packed.pack` makes of their policies, instead."""
        self._packed = True
        return cast("Iterator[tuple[str, bytes]]", self._stream)

    def close(self) -> None:
        """Give the connection back."""
        self._stream.close()  # type: ignore[attr-defined]


def _fetched(session: Session) -> Iterator[Row]:
    while True:
        rows = session.rows(f"FETCH FORWARD {_FETCHED} FROM policies")
        yield from rows
        if len(rows) < _FETCHED:
            return
