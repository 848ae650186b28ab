"""Random requests to the page: never a 500, never a change without the right to make it."""

from collections import Counter
from typing import Any
from urllib.parse import quote, urlencode, urljoin

import attrs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ipguard import Actor, Change, Demand
from ipguard.admin._changes import digest_restrictions
from ipguard.admin._http import BODY_LIMIT
from ipguard.admin._site import ROUTES
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, OFFICE
from tests.pages import HOST, Browser, Office
from tests.pages import office as office  # noqa: PLC0414 - a fixture

pytestmark = pytest.mark.slow

EXPECTED = {200, 303, 400, 401, 403, 404, 405, 409, 413, 415}
NAMES = [
    *("token", "user", "addresses", "label", "expires_at", "seen", "do", "request", "number"),
    *("users", "numbered", "action", "since", "until"),
    *("restriction", "reason", "open", "lockout", "asked", "search", "address", "after", "before"),
    "again",
]
ODD = [
    "",
    "\x00",
    "a\r\nb: c",
    '"><script>alert(1)</script>',
    "\ud7ff",
    "9" * 400,
    "-1",
    "x" * 5000,
    "2030-13-45T99:99",
    "2030-01-01",
    "203.0.113.0/24",
    "accept",
    "mine",
    "edit",
    OFFICE,
    HOME,
]
PEOPLE = (None, ALICE, ADAM, CAROL, BOSS)


@attrs.frozen
class Shot:
    """One request: the sender's index, the request, and whose CSRF token (None: the sender's)."""

    who: int
    method: str
    path: str
    query: list[tuple[str, str]] | str
    fields: list[tuple[str, str]] | bytes
    token: int | None
    headers: dict[str, str]


def shots() -> st.SearchStrategy[Shot]:
    # Placeholders for existing things, see Range.refill.
    kind = st.sampled_from(["user", "request", "restriction", "number"])
    known = st.tuples(kind, st.integers(0, 5)).map(lambda it: f"<{it[0]} {it[1]}>")
    text = known | st.sampled_from(ODD) | st.text(max_size=40)
    pairs = st.lists(st.tuples(st.sampled_from(NAMES) | st.text(max_size=5), text), max_size=10)
    paths = st.sampled_from([*ROUTES, "/static/", "/static/page.css", "//", "/user/", "/nothing"])
    kinds = ["application/x-www-form-urlencoded"] * 12 + ["text/plain", "multipart/form-data", ""]
    headers = st.fixed_dictionaries(
        {"Content-Type": st.sampled_from(kinds)},
        optional={
            "Origin": st.sampled_from([f"http://{HOST}", "null", "http://evil.example"]),
            "Sec-Fetch-Site": st.sampled_from(["same-origin", "none", "cross-site", "x"]),
            "Cookie": st.text('abcdef=;,"\\ %-_', max_size=60),
        },
    )
    complete = st.sampled_from(
        ["/add", "/change", "/confirm", "/approve", "/delete", "/cancel", "/resend"]
    )
    # Fields that belong together, as a browser would send them, or nearly.
    ours = st.tuples(
        complete,
        st.integers(0, 5),
        st.sampled_from([0, 0, 0, 0, 1, 3]),
        st.sampled_from(["accept", "accept", ""]),
    ).map(
        lambda it: (
            it[0],
            [
                ("user", f"<user {it[1]}>"),
                ("request", f"<request {it[1] + it[2]}>"),
                ("restriction", f"<restriction {it[1] + it[2]}>"),
                ("number", f"<number {it[1] + it[2] // 2}>"),
                ("seen", "<seen>"),
                ("addresses", f"198.51.{it[1]}.{it[2]}"),
                ("label", ""),
                ("open", it[3]),
                ("lockout", it[3]),
            ],
        )
    )
    own = st.sampled_from([None, None, None, *range(len(PEOPLE) + 1)])
    odd = st.builds(
        Shot,
        who=st.integers(0, len(PEOPLE) - 1),
        method=st.sampled_from(["GET", "GET", *["POST"] * 5, "HEAD", "PUT", "DELETE", "PATCH"]),
        path=paths | st.text(max_size=20).map(lambda it: "/" + it),
        query=pairs | st.text(max_size=60),
        fields=pairs | st.binary(max_size=200) | st.just(b"a" * (BODY_LIMIT + 1)),
        token=own,
        headers=headers,
    )
    likely = st.builds(
        lambda who, sent, token: Shot(
            who, "POST", sent[0], "", sent[1], token, {"Content-Type": kinds[0]}
        ),
        st.integers(0, len(PEOPLE) - 1),
        ours,
        own,
    )
    return odd | likely


class Range:
    """The page, a browser for each person, and existing things to aim at."""

    def __init__(self, office: Office) -> None:
        self.office = office
        office.use(requests_per_hour=10**6, failures_per_actor=10**6, attempts_per_number=10**6)
        self.browsers = [office.browser(who) for who in PEOPLE]
        self.tokens = ["none", *(self._token(browser) for browser in self.browsers[1:]), "x"]
        self.seen: Counter[int] = Counter()
        self.changes = 0
        self.revision = 0
        self._seen = ""
        self.refill()

    def _token(self, browser: Browser) -> str:
        browser.open("/add")
        return browser.page.form("Submit").fields["token"]

    def refill(self) -> None:
        """Create restrictions and requests whose ids and numbers the fuzzer knows."""
        office = self.office
        self.targets: dict[str, str] = {}
        for user, actor in (("jsmith", ALICE), ("zed", CAROL)):
            for restriction in office.store.load_policy(user).restrictions:
                office.flow.lift(BOSS, restriction.id, reason="x")
            for line in office.flow.overview(BOSS, search=user):
                for waiting in line.pending:
                    office.flow.cancel(BOSS, waiting.id)
            for k in range(3):
                n = len(self.targets) // 4
                held = office.add(f"192.0.2.{k}", username=user)
                demand = Demand(number=k > 0, approvals=int(k < 2))
                flow = office.workflow(add=demand, requests_per_hour=10**6)
                asked = flow.request(actor, user, f"198.51.100.{n}")
                self.targets |= {
                    f"<user {n}>": user,
                    f"<restriction {n}>": held.id,
                    f"<request {n}>": asked.id,
                    f"<number {n}>": office.number(asked) if k else "none",
                }
        self.revision = self._newest()[0].revision

    def aim(self, text: str) -> str:
        return self._seen if text == "<seen>" else self.targets.get(text, text)

    def fire(self, shot: Shot) -> None:
        browser, who = self.browsers[shot.who], PEOPLE[shot.who]
        # The current version, so that a form may succeed.
        user = self.targets.get(dict(self._fields(shot)).get("user", ""), "")
        self._seen = self._look(user) if user else ""
        token = self.tokens[shot.who if shot.token is None else shot.token]
        fields = [(name, self.aim(text)) for name, text in self._fields(shot)]
        if isinstance(shot.fields, bytes):
            body = shot.fields
        else:
            body = urlencode([*dict(fields).items(), ("token", token)], errors="replace").encode()
        query = (
            quote(shot.query, safe="%&=+;", errors="replace")
            if isinstance(shot.query, str)
            else urlencode([(n, self.aim(t)) for n, t in shot.query], errors="replace")
        )
        path = quote(shot.path, errors="replace")
        cookies = dict(browser.cookies)
        answer = browser.send(
            shot.method,
            f"{path}?{query}",
            b"" if shot.method == "GET" else body,
            dict(shot.headers),
        )
        if answer.status_code == 303:
            shown = browser.send("GET", urljoin(path, answer.headers.get("location", "")))
            assert shown.status_code in EXPECTED, (shown.status_code, shown.text[:2000])
        elif shot.method == "POST" and path != "/understood":
            assert answer.status_code != 200, path  # a reload would send the form again
        browser.cookies = cookies
        self.seen[answer.status_code] += 1
        assert answer.status_code in EXPECTED, (answer.status_code, answer.text[:2000])
        for _, value in answer.headers.multi_items():
            assert "\r" not in value
            assert "\n" not in value
        self._judge(shot, who)

    def _fields(self, shot: Shot) -> list[tuple[str, str]]:
        return [] if isinstance(shot.fields, bytes) else shot.fields

    def _look(self, user: str) -> str:
        for line in self.office.flow.overview(BOSS, search=user, limit=10):
            if line.user.username == user:
                return f"0.{digest_restrictions(line)}"
        return ""

    def _newest(self) -> tuple[Change, ...]:
        return self.office.store.history(Actor.EVERY_ACCOUNT, limit=20).items

    def _judge(self, shot: Shot, who: Actor | None) -> None:
        rows = [row for row in self._newest() if row.revision > self.revision]
        if not rows:
            return
        self.revision = rows[0].revision
        self.changes += 1
        assert who is not None
        assert shot.method == "POST"
        assert shot.token in (None, shot.who), "with a token that is not this actor's"
        assert "Cookie" not in shot.headers
        assert shot.headers.get("Origin", f"http://{HOST}") == f"http://{HOST}" or (
            shot.headers.get("Sec-Fetch-Site") in ("same-origin", "none")
        )
        assert shot.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
        for row in rows:
            assert row.actor == who.username
            assert row.account_id in who.manages, row


def test_random_requests(office: Office, rounds: Any):
    """Every response is an expected one, and every change was made by someone who may."""
    target = Range(office)
    fired = 0

    @settings(
        max_examples=rounds(300, 10_000),
        phases=[Phase.generate],  # earlier requests matter, so examples cannot be shrunk
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(shots())
    def fire(shot: Shot) -> None:
        nonlocal fired
        fired += 1
        target.fire(shot)
        if fired % 100 == 0:
            target.refill()

    fire()
    assert fired >= rounds(300, 10_000)
    assert target.changes > fired // 100, target.seen
    assert {200, 303, 401, 403, 404, 405} <= set(target.seen), target.seen
