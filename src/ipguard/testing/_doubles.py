"""Test doubles: a clock that tests set, and a notifier that keeps its messages."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import attrs

from ipguard._checks import check_time
from ipguard.model import Actor, Change, PendingRequest, Sighting, User


class FakeClock:
    """A clock that moves only when a test moves it. Thread-safe.

    Call it for the time of day, as a store does. Pass its `monotonic` to a guard:

        clock = FakeClock()
        store = open_store("memory://", clock=clock)
        guard = Guard(store, monotonic=clock.monotonic)
        clock.advance(timedelta(minutes=10))

    Args:
        start: The initial time, aware; by default noon on 1 January 2030 in UTC.

    Raises:
        InvalidValue: `start` is not an aware datetime.
    """

    def __init__(self, start: datetime | None = None) -> None:
        self._now = check_time("start", start or datetime(2030, 1, 1, 12, tzinfo=UTC))
        # Not 0, to expose code that uses 0 for "never".
        self._elapsed = timedelta(hours=1)
        self._lock = threading.Lock()

    def __call__(self) -> datetime:
        """Return the current time, aware and in UTC."""
        with self._lock:
            return self._now

    def monotonic(self) -> float:
        """Return the monotonic time in seconds."""
        with self._lock:
            return self._elapsed.total_seconds()

    def advance(self, by: timedelta) -> None:
        """Move both the time of day and `monotonic` forward.

        Args:
            by: How much time passes, not negative.

        Raises:
            ValueError: `by` is negative. Use `set` to move the time of day back.
        """
        if by < timedelta():
            raise ValueError("cannot advance by a negative time; set() moves the time of day back")
        with self._lock:
            self._now += by
            self._elapsed += by

    def set(self, to: datetime) -> None:
        """Set the time of day, as NTP does; `monotonic` does not change.

        Args:
            to: The new time, aware, earlier or later.

        Raises:
            InvalidValue: `to` is not an aware datetime.
        """
        moment = check_time("to", to)
        with self._lock:
            self._now = moment

    def __repr__(self) -> str:
        return f"<FakeClock {self().isoformat()}>"


@attrs.frozen(kw_only=True)
class Message:
    """A message that a notifier was asked to send.

    Attributes:
        kind: The method called: `number_issued`, `change_applied` or `login_refused`.
        to: The recipients' e-mail addresses without duplicates, the actor's first.
        actor: The actor; None for a refused login.
        request: The request to confirm; None for a notice.
        number: The confirmation number as mailed; None for a notice. Not in the repr.
        change: The change that was made; None for a number.
        user: The user that the change or the refused login concerns; None for a number and for
            unregistered users.
        sighting: The refused login; None for a number or a change.
    """

    kind: Literal["number_issued", "change_applied", "login_refused"]
    to: tuple[str, ...]
    actor: Actor | None = None
    request: PendingRequest | None = None
    number: str | None = attrs.field(default=None, repr=False)
    change: Change | None = None
    user: User | None = None
    sighting: Sighting | None = None


class Outbox:
    """A `Notifier` that keeps every message instead of sending it. Thread-safe.

    Attributes:
        fail: Set it to True to simulate a mail server that is down: every call raises `OSError`
            and keeps nothing.
    """

    def __init__(self) -> None:
        self.fail = False
        self._messages: list[Message] = []
        self._lock = threading.Lock()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages so far, oldest first."""
        with self._lock:
            return tuple(self._messages)

    def number_for(self, request_id: str) -> str:
        """Return the newest confirmation number of a request, as mailed.

        Args:
            request_id: The id of the request.

        Raises:
            KeyError: No number was issued for this request.
        """
        for message in reversed(self.messages):
            request = message.request
            if request is not None and message.number is not None and request.id == request_id:
                return message.number
        raise KeyError(request_id)

    def clear(self) -> None:
        """Remove all messages."""
        with self._lock:
            self._messages.clear()

    def number_issued(self, request: PendingRequest, number: str, actor: Actor) -> None:
        """Keep a confirmation number; see `ipguard.notify.Notifier`."""
        self._keep("number_issued", [actor.email], actor=actor, request=request, number=number)

    def change_applied(self, change: Change, actor: Actor, user: User | None) -> None:
        """Keep a notice; see `ipguard.notify.Notifier`."""
        to = [actor.email, *([user.email] if user is not None and user.email else [])]
        self._keep("change_applied", to, actor=actor, change=change, user=user)

    def login_refused(self, sighting: Sighting, user: User) -> None:
        """Keep a notice about a refused login; see `ipguard.notify.RefusalNotifier`."""
        to = [user.email] if user.email else []
        self._keep("login_refused", to, sighting=sighting, user=user)

    def _keep(self, kind: Any, to: list[str], **fields: Any) -> None:
        if self.fail:
            raise OSError("Outbox.fail is set")
        with self._lock:
            self._messages.append(Message(kind=kind, to=tuple(dict.fromkeys(to)), **fields))

    def __repr__(self) -> str:
        return f"<Outbox of {len(self.messages)}>"
