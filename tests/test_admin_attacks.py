"""Attacks on the page: forged forms, other people's ids, scripts, headers, replays."""

import logging
import re
import time
from urllib.parse import quote

import pytest

from ipguard import Actor, IPGuardError, StoreUnavailable, User, Workflow
from ipguard.admin import asgi_app
from ipguard.admin._http import BODY_LIMIT
from ipguard.admin._signing import Signer
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, KEY, OFFICE
from tests.pages import Browser, Office, asgi, query
from tests.pages import office as office  # noqa: PLC0414 - a fixture

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
POSTS = (
    "/search",
    "/add",
    "/understood",
    "/confirm",
    "/resend",
    "/cancel",
    "/delete",
    "/check",
    "/history",
)


def fields(office: Office) -> dict[str, dict[str, str]]:
    """What each form would send, for things that are there."""
    restriction = office.add("203.0.113.0/29")
    office.add("192.0.2.0/24")
    request = office.ask(HOME)
    one = {"user": "jsmith", "request": request.id}
    return {
        "/search": {"search": "smith"},
        "/add": {"user": "jsmith", "addresses": "10.9.9.9", "label": "", "expires_at": ""},
        "/understood": {"addresses": "10.9.9.9"},
        "/confirm": {**one, "number": office.number(request), "seen": ""},
        "/resend": one,
        "/cancel": one,
        "/delete": {"user": "jsmith", "restriction": restriction.id, "reason": "", "seen": ""},
        "/check": {"user": "jsmith", "address": OFFICE},
        "/history": {"user": "jsmith"},
    }


def token(browser: Browser) -> str:
    browser.open("/add")
    return browser.form("Submit")[0].fields["token"]


def forged(office: Office, browser: Browser, sent: dict[str, str]) -> None:
    """Send every form with these fields more; nothing may come of it."""
    every = fields(office) if not office.held() else {path: {} for path in POSTS}
    assert set(every) == set(POSTS)
    with office.unchanged():
        for path, own in every.items():
            browser.post(path, {**own, **sent})
            assert browser.answer.status == 403, path
            assert "not one that you opened here" in browser.text
            assert not browser.answer.header("set-cookie")


# -- forged forms


def test_no_token(office: Office):
    """A form without a token does nothing."""
    forged(office, office.browser(ALICE), {})


@pytest.mark.parametrize("text", ["", "x", "A" * 59, "é", "A" * 100_00, "Qm" * 30, "=", "\x00"])
def test_no_such_token(office: Office, text: str):
    """Nor does one with a token that was made up."""
    forged(office, office.browser(ALICE), {"token": text})


def test_the_token_of_another_actor(office: Office):
    """The token that an attacker gets on its own page is worth nothing in a victim's browser."""
    attacker, victim = office.browser(CAROL), office.browser(ALICE)
    forged(office, victim, {"token": token(attacker)})
    victim.cookies = dict(attacker.cookies)  # planted, as a sibling domain could
    forged(office, victim, {"token": token(attacker)})


def test_the_token_of_another_browser(office: Office):
    """The same actor's token of another browser is worth nothing either."""
    forged(office, office.browser(ALICE), {"token": token(office.browser(ALICE))})


def test_the_token_without_its_cookie(office: Office):
    """A browser that keeps no cookies is told so."""
    alice = office.browser(ALICE)
    sent = {"token": token(alice)}
    alice.cookies = {}
    forged(office, alice, sent)


def test_a_token_under_another_key(office: Office):
    """A page with other keys makes other tokens."""
    other = Workflow(office.store, office.outbox, key=b"x" * 32)
    stranger = office.stranger(ALICE, other)
    alice = office.browser(ALICE)
    stranger.cookies = dict(alice.cookies)
    forged(office, alice, {"token": token(stranger)})


def test_what_is_signed_for_a_search_is_no_token(office: Office):
    """Whatever else the page signs is signed for that alone."""
    alice = office.browser(ALICE)
    alice.press("Search", search="smith")
    forged(office, alice, {"token": query(alice.address)["search"]})


def test_keys_are_not_shown():
    """Who prints the signer learns how many keys there are, no more."""
    assert repr(Signer([b"secret" * 6, b"x" * 32])) == "<Signer of 2 keys>"


def test_the_servers_of_a_balancer_agree(office: Office):
    """A form of one server works on another, also while keys are being changed."""
    keys = (b"n" * 32, KEY)
    newer = Workflow(office.store, office.outbox, key=keys)
    alice = office.browser(ALICE, "/add")
    form = alice.form("Submit")[0]
    other = office.stranger(ALICE, newer)
    other.cookies = alice.cookies
    other.post("/add", {**form.fields, "user": "jsmith", "addresses": OFFICE})
    assert "Confirmation Number" in other.page.labels


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://bank.example.evil.example"},
        {"Origin": "http://bank.example:8080"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://bank.example"},
        {"Sec-Fetch-Site": ""},
    ],
)
def test_a_form_that_comes_from_elsewhere(office: Office, headers: dict[str, str]):
    """What a browser says that another site sent is refused, right token or not."""
    alice = office.browser(ALICE)
    body = f"token={token(alice)}&user=jsmith&addresses={OFFICE}".encode()
    with office.unchanged():
        assert alice.send("POST", "/add", body, FORM | headers).status == 403
    assert alice.send("POST", "/add", body, FORM | {"Origin": "http://BANK.example"}).status == 303


def test_nothing_changes_by_a_get(office: Office):
    """Each form's fields in a URL do nothing; what only takes forms says so."""
    alice = office.browser(ALICE)
    good = token(alice)
    every = fields(office)
    with office.unchanged():
        for path, own in every.items():
            pairs = "&".join(f"{name}={value}" for name, value in {**own, "token": good}.items())
            for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
                answer = alice.send(method, f"{path}?{pairs}", headers=FORM)
                assert answer.status in (200, 404, 405, 409), (method, path)
                if answer.status == 405:
                    assert answer.header("allow")


def test_who_is_not_signed_in(office: Office):
    """Nothing is shown and nothing done; the words say what to do."""
    stranger = office.browser(lambda _: None)
    every = fields(office)
    with office.unchanged():
        for path in ("/", "/user?user=jsmith", "/add", "/nothing", "/history"):
            stranger.open(path)
            assert stranger.answer.status == 401
            assert "Sign in" in stranger.text
            assert "John" not in stranger.text
        for path, own in every.items():
            stranger.post(path, own)
            assert stranger.answer.status == 401


# -- what is another account's


def test_what_is_another_accounts_does_not_exist(office: Office):
    """Users, restrictions and requests of another account are as good as made up, to the byte."""
    restriction, request = office.add(OFFICE), office.ask(HOME)
    carol = office.browser(CAROL)

    def answers(user: str, restriction: str, request: str) -> list[tuple[int, str]]:
        found = []
        for path in (
            f"/user?user={user}",
            f"/add?user={user}",
            f"/check?user={user}",
            f"/confirm?user={user}&request={request}",
            f"/delete?user={user}&restriction={restriction}",
        ):
            carol.open(path)
            found.append((carol.answer.status, carol.answer.text))
        good = token(carol)
        for path, own in (
            ("/check", {"user": user, "address": OFFICE}),
            ("/confirm", {"user": user, "request": request, "number": "1"}),
            ("/resend", {"user": user, "request": request}),
            ("/cancel", {"user": user, "request": request}),
            ("/delete", {"user": user, "restriction": restriction, "open": "accept"}),
        ):
            carol.post(path, {**own, "token": good})
            found.append((carol.answer.status, carol.answer.text))
        return found

    with office.unchanged():
        others = answers("jsmith", restriction.id, request.id)
        assert {status for status, _ in others} == {404}
        assert others == answers("nobody", "0" * 16, "1" * 16)
        # Nor do they with a user of carol's own.
        assert others[3:5] == answers("zed", restriction.id, request.id)[3:5]
        assert others[6:] == answers("zed", restriction.id, request.id)[6:]


def test_nothing_of_another_account_is_listed(office: Office):
    """Lists, searches, the drop-down and the history hold what is the actor's own."""
    office.add(OFFICE)
    office.ask(HOME)
    carol = office.browser(CAROL)
    for path in ("/", "/add", "/history", "/?after=a", "/history?user=jsmith"):
        carol.open(path)
        assert carol.answer.status == 200
        assert "John" not in carol.text
        assert "asked for" not in carol.text
    for text in ("jsmith", "John", "U1", OFFICE):
        carol.open("/")
        carol.press("Search", search=text)
        assert "No trader matches" in carol.text


def test_a_request_of_another_user_of_ones_own(office: Office):
    """An id under the wrong user is not found, however much both are the actor's."""
    request, restriction = office.ask(HOME), office.add(OFFICE)
    alice = office.browser(ALICE)
    good = token(alice)
    with office.unchanged():
        alice.open(f"/confirm?user=mary&request={request.id}")
        assert alice.answer.status == 404
        alice.open(f"/delete?user=mary&restriction={restriction.id}")
        assert alice.answer.status == 404
        number = office.number(request)
        for path in ("/confirm", "/resend", "/cancel"):
            sent = {"user": "mary", "request": request.id, "number": number, "token": good}
            alice.post(path, sent)
            assert alice.answer.status == 404, path


def test_a_number_of_somebody_elses(office: Office):
    """Who knows a number but did not ask cannot use it, nor have another sent."""
    request = office.ask()
    adam = office.browser(ADAM, f"/confirm?user=jsmith&request={request.id}")
    good = adam.form("Cancel")[0].fields["token"]
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    seen = alice.form("Submit")[0].fields["seen"]
    own = {"user": "jsmith", "request": request.id, "token": good, "seen": seen}
    with office.unchanged():
        adam.post("/confirm", {**own, "number": office.number(request)})
        assert adam.answer.status == 404
        adam.post("/resend", own)
        assert adam.answer.status == 404


def test_rights_are_asked_for_each_time(office: Office):
    """An actor who lost an account cannot go on with the forms that it has open."""
    request = office.ask()
    actors = [ALICE]
    alice = office.browser(lambda _: actors[-1], f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    actors.append(Actor(username="alice", email="alice@firm.example", manages=frozenset({"U9"})))
    with office.unchanged():
        alice.press("Submit", number=number)
    assert alice.answer.status == 404


# -- what is written into pages, cookies and mails

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&lt;'


def test_scripts_in_names_and_labels(office: Office):
    """Whatever people are called, it is words; no page has a script or a style of its own."""
    office.store.put_users(
        [User(username="o'<b>&\"x", full_name=EVIL, account_id="<i>U1")],
    )
    actor = Actor(
        username="<u>alice", email="a@x.example", manages=Actor.EVERY_ACCOUNT, address=OFFICE
    )
    name = "o'<b>&\"x"
    evil = office.browser(actor)
    evil.press("Search", search=EVIL)
    evil.open("/add")
    evil.press("Submit", user=name, addresses="203.0.113.0/29", label=EVIL)
    evil.press("Submit")
    pages = [evil.page]
    request = office.request_of(office.outbox.messages[-1].request.id)  # type: ignore[union-attr]
    evil.press("Submit", number=office.number(request))
    pages.append(evil.page)
    evil.follow("Check an address")
    evil.press("Check", address=OFFICE)
    pages.append(evil.page)
    pages += [evil.open(path) for path in ("/", "/history", "/add")]
    evil.open("/")
    evil.follow("Delete")
    pages.append(evil.page)
    evil.press("Delete", open="accept", reason=EVIL)
    pages.append(evil.page)
    pages.append(evil.open("/history"))
    assert EVIL in evil.text
    for page in pages:
        assert [own["src"] for tag, own in page.elements if tag == "script"] == [
            own["src"] for tag, own in pages[0].elements if tag == "script"
        ]
        assert not {"style", "b", "i", "u", "img"} & {tag for tag, _ in page.elements}
        for _, own in page.elements:
            assert not [n for n in own if n.startswith("on") or n == "style"], own


def test_a_brand_is_words(office: Office):
    """What the host puts at the top is escaped as well."""
    app = asgi_app(office.flow, office.guard, authenticate=lambda _: ALICE, brand="<b>A&B")
    text = asgi(app, "GET", "/", b"", {"Host": "h"}).text
    assert "&lt;b&gt;A&amp;B" in text
    assert "<b>" not in text


@pytest.mark.parametrize("label", ["a\r\nBcc: x@evil.example", "a\nb", "a\x85b", "a\u2028b"])
def test_header_injection_in_a_label(office: Office, label: str):
    """A label that would break a line of a mail, a cookie or a header is refused."""
    alice = office.browser(ALICE, "/add")
    with office.unchanged():
        alice.press("Submit", user="jsmith", addresses=OFFICE, label=label)
    assert "control characters" in alice.page.part("label-problem")


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: x=1", "a\r\nLocation: //evil.example"])
def test_header_injection_in_what_comes_back(office: Office, text: str):
    """What is sent in a URL or a form breaks no header of the answer."""
    alice = office.browser(ALICE)
    good = token(alice)
    answers = [
        alice.send("GET", f"/user?user={quote(text)}"),
        alice.send("GET", f"/?search={quote(text)}&after={quote(text)}"),
        alice.send("GET", f"/{quote(text)}"),
    ]
    for path in POSTS:
        alice.post(path, {"token": good, "search": text, "user": text, "request": text})
        answers.append(alice.answer)
    for answer in answers:
        for name, value in answer.headers:
            assert "\r" not in value
            assert "\n" not in value
            assert name.lower() != "set-cookie" or value.startswith("ipguard-")
            assert name.lower() != "location" or "evil" not in value or "%0D" in value


@pytest.mark.parametrize("where", ["//evil.example", "https://evil.example/", "\\\\evil.example"])
def test_no_redirect_leads_elsewhere(office: Office, where: str):
    """However odd the path, a redirect stays on this host."""
    alice = office.browser(ALICE)
    good = token(alice)
    for path in (f"/{quote(where)}", f"/{quote(where)}/cancel"):
        answer = alice.send("GET", path)
        assert answer.status == 404
    alice.post("/search", {"token": good, "search": where})
    assert alice.address.startswith("/?search=")


def test_messages_cannot_be_forged(office: Office):
    """What a page says after a redirect is signed: no link, no planted cookie makes it say more."""
    office.ask()
    alice, adam = office.browser(ALICE), office.browser(ADAM)
    form = adam.form("Cancel")[0]
    adam.send(
        "POST", "/cancel", "&".join(f"{k}={v}" for k, v in form.fields.items()).encode(), FORM
    )
    stolen = adam.cookies["ipguard-note"]
    for text in (stolen, "x", stolen[:-1] + "A", '{"text": "You won"}'):
        alice.cookies["ipguard-note"] = text
        alice.open("/user?user=jsmith")
        assert "note" not in alice.page.ids
    adam.open("/")  # another tab
    assert "note" not in adam.page.ids
    adam.open("/user?user=jsmith")
    assert adam.page.part("note")


def test_messages_do_not_last(office: Office, monkeypatch):
    """A message that was not shown within two minutes is not shown at all."""
    office.ask()
    alice = office.browser(ALICE)
    form = alice.form("Cancel")[0]
    body = "&".join(f"{k}={v}" for k, v in form.fields.items()).encode()
    alice.send("POST", "/cancel", body, FORM)
    late = time.time() + 121
    monkeypatch.setattr(time, "time", lambda: late)
    alice.open("/user?user=jsmith")
    assert "note" not in alice.page.ids
    assert "ipguard-note" not in alice.cookies


# -- replays


def test_a_replayed_cancel_and_confirm(office: Office):
    """Each form sent again says what became of the request, and by whom; nothing is done twice."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    confirm, cancel = alice.form("Submit")[0], alice.form("Cancel")[0]
    again = alice.form("Send a new number")[0]
    sent = {**confirm.fields, "number": office.number(request)}
    alice.post("/confirm", sent)
    assert alice.answer.status == 200
    with office.unchanged():
        for path, own in (
            ("/confirm", sent),
            ("/cancel", cancel.fields),
            ("/resend", again.fields),
        ):
            alice.post(path, own)
            assert alice.answer.status == 409
            assert "You confirmed 203.0.113.7 on 1 Jan 2030, 12:00 UTC." in alice.page.part("over")
        alice.open(f"/confirm?user=jsmith&request={request.id}")
        assert "You confirmed" in alice.page.part("over")


def test_a_replayed_delete(office: Office):
    """A deletion sent again says that it was done."""
    restriction = office.add(OFFICE)
    alice = office.browser(ALICE, f"/delete?user=jsmith&restriction={restriction.id}")
    form = alice.form("Delete")[0]
    for _ in range(2):
        alice.post("/delete", {**form.fields, "open": "accept"})
    assert alice.answer.status == 409
    assert "You deleted 203.0.113.7" in alice.page.part("over")
    alice.open(f"/delete?user=jsmith&restriction={restriction.id}")
    assert alice.answer.status == 409


def test_requests_that_are_over(office: Office):
    """What expired is said to have; the form of a request that time ended does nothing."""
    request = office.ask()
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    office.wait(hours=25)
    with office.unchanged():
        alice.press("Submit", number=number)
        assert "nobody confirmed it in time" in alice.page.part("over")


def test_what_ended_a_request_is_not_made_up(office: Office):
    """One wrong number locks nothing, and what an operator lifted nobody was too late for."""
    office.use(confirm_deletes=True)
    late = office.ask()
    office.guess(late)
    restriction = office.add(HOME)
    lifted = office.ask_to_delete(restriction)
    office.flow.lift(BOSS, restriction.id, reason="a ticket")
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={lifted.id}")
    assert "or what it was about has changed" in alice.page.part("over")
    office.wait(hours=25)
    alice.open(f"/confirm?user=jsmith&request={late.id}")
    assert "locked" not in alice.page.part("over")
    assert "nobody confirmed it in time" in alice.page.part("over")


@pytest.mark.parametrize("user", ["", "%00", "+jsmith", "nobody", "zed"])
def test_a_name_that_is_none_is_unknown_too(office: Office, user: str):
    """Everywhere in the same words: 404."""
    alice = office.browser(ALICE)
    for path in ("/user?", "/check?", "/confirm?request=1&", "/delete?restriction=1&"):
        alice.open(f"{path}user={user}")
        assert alice.answer.status == 404, path
        assert "Not found" in alice.text


# -- forms that no browser sends


def test_bodies_that_are_no_forms(office: Office):
    """Too much, another kind, what cannot be read: a client error that says so, nothing done."""
    alice = office.browser(ALICE)
    good = f"token={token(alice)}"
    plain = {"Content-Type": "text/plain"}
    with office.unchanged():
        for body, headers, status in (
            (f"{good}&user={'x' * BODY_LIMIT}".encode(), FORM, 413),
            (good.encode(), plain, 415),
            (good.encode(), {}, 415),
            (b'{"token": 1}', {"Content-Type": "application/json"}, 415),
            (f"{good}&{'&'.join(f'a{n}=1' for n in range(40))}".encode(), FORM, 400),
            (f"{good}&user=a&user=b".encode(), FORM, 400),
            (f"{good}&user=%ff".encode(), FORM, 400),
            (f"{good}&user=\xff".encode("latin-1"), FORM, 400),
        ):
            answer = alice.send("POST", "/add", body, headers)
            assert answer.status == status, body[:80]
        assert alice.send("GET", "/user?user=%ff").status == 400
        assert alice.send("GET", "/user?user=a&user=b").status == 400


# -- what goes wrong


def test_a_store_that_does_not_answer(office: Office, caplog):
    """A page says so, with 503, and that a change may have been made."""
    alice = office.browser(ALICE, "/add")
    form = alice.form("Submit")[0]
    office.store.close()
    with caplog.at_level(logging.ERROR, "ipguard.admin"):
        alice.open("/")
        assert alice.answer.status == 503
        assert alice.answer.header("retry-after") == "5"
        assert "it may have been made" not in alice.text
        alice.post("/add", {**form.fields, "user": "jsmith", "addresses": OFFICE})
    assert alice.answer.status == 503
    assert "it may have been made" in alice.text
    assert OFFICE not in caplog.text


@pytest.mark.parametrize("method", ["request", "confirm", "delete", "cancel", "resend"])
def test_a_store_that_goes_away_in_between(office: Office, monkeypatch, method):
    """The same where it answers until the change itself."""

    def lost(*args, **more):
        raise StoreUnavailable("lost")

    own = fields(office)
    path = {"request": "/add"}.get(method, f"/{method}")
    alice = office.browser(ALICE)
    good = token(alice)
    seen = seen_of(alice, own["/delete"])
    monkeypatch.setattr(office.flow, method, lost)
    alice.post(path, {**own[path], "seen": seen, "token": good})
    assert alice.answer.status == 503


def seen_of(browser: Browser, own: dict[str, str]) -> str:
    browser.open(f"/delete?user=jsmith&restriction={own['restriction']}")
    return browser.form("Delete")[0].fields["seen"]


def test_a_defect_shows_no_details(office: Office, monkeypatch, caplog):
    """An exception that nobody foresaw is a page without details, and logged without secrets."""
    own = fields(office)["/confirm"]
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={own['request']}")

    def broken(*args, **more):
        raise RuntimeError(*args)

    monkeypatch.setattr(office.flow, "confirm", broken)
    with caplog.at_level(logging.DEBUG):
        alice.press("Submit", number=own["number"])
    assert alice.answer.status == 500
    assert "Something went wrong" in alice.text
    for text in (alice.text, caplog.text):
        assert own["number"] not in text
        assert "alice@firm.example" not in text
    assert "RuntimeError" in caplog.text
    assert "in broken" in caplog.text


def test_an_error_of_a_later_version(office: Office, monkeypatch):
    """An error of the library that the page does not know is told in its own words."""

    def refused(*args, **more):
        raise IPGuardError("that is new")

    monkeypatch.setattr(office.flow, "cancel", refused)
    request = office.ask()
    alice = office.browser(ALICE)
    alice.press("Cancel")
    assert alice.answer.status == 409
    assert "that is new" in alice.text
    monkeypatch.setattr(office.flow, "confirm", refused)
    alice.open(f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number="1")
    assert "That is new." in alice.page.part("problems")


def test_every_error_leads_back_to_the_list(office: Office, monkeypatch):
    """Whatever went wrong, the page's own navigation is there; not for who is not signed in."""
    alice = office.browser(ALICE)
    token = office.browser(ALICE, "/add").form("Submit")[0].fields["token"]
    big = "x" * 40_000

    def errors():
        yield 404, lambda: alice.open("/nothing")
        yield 404, lambda: alice.open("/user?user=nobody")
        yield 400, lambda: alice.open("/user?user=%ff")
        yield 403, lambda: alice.post("/add", {"token": "x"})
        yield 405, lambda: alice.open("/cancel")
        yield 413, lambda: alice.post("/add", {"token": token, "label": big})
        monkeypatch.setattr(office.flow, "overview", _down)
        yield 503, lambda: alice.open("/")
        monkeypatch.setattr(office.flow, "overview", None)
        yield 500, lambda: alice.open("/")

    for status, send in errors():
        send()
        assert alice.answer.status == status
        assert ("IP Restrictions", "./") in alice.page.links, status
        assert ("History", "./history") in alice.page.links, status
        assert "Signed in as alice" in alice.text
        assert "aria-current" in alice.answer.text
    nobody = office.browser(None)
    assert nobody.answer.status == 401
    assert "History" not in nobody.text


def _down(*_: object, **__: object) -> None:
    raise StoreUnavailable("down")


# -- headers


def test_headers(office: Office):
    """Each page may be kept by nobody, framed by nobody, and run nothing of its own."""
    alice = office.browser(ALICE)
    for path, status in (("/", 200), ("/nothing", 404), ("/user?user=%ff", 400)):
        answer = alice.send("GET", path)
        assert answer.status == status
        policy = answer.header("content-security-policy")
        for part in (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "form-action 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ):
            assert part in policy.split("; ")
        assert "unsafe" not in policy
        assert answer.header("cache-control") == "no-store"
        assert answer.header("x-frame-options") == "DENY"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("referrer-policy") == "same-origin"
        assert answer.header("content-type") == "text/html; charset=utf-8"
        assert len([name for name, _ in answer.headers if name.lower() == "content-type"]) == 1


@pytest.mark.parametrize("https", [False, True])
def test_cookies(office: Office, https: bool):
    """Cookies are out of reach of scripts and other sites, and bound to this host over TLS."""
    office.ask()
    alice = office.browser(ALICE, https=https)
    first = alice.answer.header("set-cookie")
    alice.press("Search", search="smith")
    form = alice.form("Cancel")[0]
    body = "&".join(f"{k}={v}" for k, v in form.fields.items()).encode()
    second = alice.send("POST", "/cancel", body, FORM).header("set-cookie")
    for line in (first, second):
        parts = line.split("; ")
        assert {"Path=/", "HttpOnly", "SameSite=Lax"} <= set(parts)
        assert ("Secure" in parts) is https
        assert "Domain" not in line
        assert line.startswith("__Host-ipguard-" if https else "ipguard-")
    assert re.fullmatch(r"(__Host-)?ipguard-form=[\w-]{22}", first.split(";")[0])
    alice.open("/")
    assert "-form=" not in alice.answer.header("set-cookie")


def test_no_number_and_no_address_in_a_log_or_a_url(office: Office, caplog):
    """A whole procedure leaves neither in a URL, nor the number in any log at all."""
    boss = Actor(username="boss", email="b@x.example", manages=Actor.EVERY_ACCOUNT)
    with caplog.at_level(logging.DEBUG):
        alice = office.browser(boss, "/add")
        alice.press("Submit", user="jsmith", addresses="203.0.113.0/29")
        alice.press("Submit")
        request = office.request_of(office.outbox.messages[-1].request.id)  # type: ignore[union-attr]
        number = office.number(request)
        alice.press("Submit", number=number)
        alice.open("/")
        alice.press("Search", search=OFFICE)
        alice.open("/check?user=jsmith")
        alice.press("Check", address=OFFICE)
        alice.open("/")
        alice.follow("Delete")
        alice.press("Delete", open="accept")
    assert office.held() == []
    assert not [url for url in alice.log if "203" in url or number in url]
    for record in caplog.records:
        assert number not in record.getMessage()
        assert record.name == "ipguard.audit" or OFFICE not in record.getMessage()
    assert BOSS.username == "boss"
