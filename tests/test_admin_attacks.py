"""Attacks on the page: forged forms, ids of others, scripts, headers, replays."""

import logging
import re
import time
from urllib.parse import quote

import pytest

from ipguard import Actor, IPGuardError, StoreUnavailable, User, Workflow
from ipguard.admin import asgi_app
from ipguard.admin._http import BODY_LIMIT, POLICY
from ipguard.admin._site import ROUTES
from tests.flows import ADAM, ALICE, BOSS, CAROL, HOME, OFFICE
from tests.pages import FORM, Browser, Office, query
from tests.pages import each_office as each_office  # noqa: PLC0414 - a fixture
from tests.pages import office as office  # noqa: PLC0414 - a fixture

POSTS = [path for path, views in ROUTES.items() if "POST" in views]


def valid_fields(office: Office) -> dict[str, dict[str, str]]:
    """Return the fields of each form, about things that exist."""
    restriction = office.add("203.0.113.0/29")
    office.add("192.0.2.0/24")
    request = office.ask(HOME)
    one = {"user": "jsmith", "request": request.id}
    return {
        "/search": {"search": "smith"},
        "/add": {"user": "jsmith", "addresses": "192.0.2.99", "label": "", "expires_at": ""},
        "/change": {"user": "jsmith", "restriction": restriction.id, "addresses": "192.0.2.99"},
        "/understood": {"addresses": "10.9.9.9"},
        "/confirm": {**one, "number": office.number(request), "seen": ""},
        "/approve": {**one, "seen": ""},
        "/resend": one,
        "/cancel": one,
        "/delete": {"user": "jsmith", "restriction": restriction.id, "reason": "", "seen": ""},
        "/check": {"user": "jsmith", "address": OFFICE},
        "/history": {"user": "jsmith"},
    }


def csrf_token(browser: Browser) -> str:
    browser.open("/add")
    return browser.page.form("Submit").fields["token"]


# -- cross-site request forgery


def test_a_token_that_is_not_of_this_form(office: Office):
    """A form without a CSRF token, with a made-up one, or with a value for another purpose."""
    alice = office.browser(ALICE)
    alice.press("Search", search="smith")
    made_up = [None, "", "x", "A" * 59, "é", "A" * 10_000, "\x00", query(alice.address)["search"]]
    alice.open("/add")
    alice.press("Submit", addresses="x")
    made_up.append(query(alice.address)["again"])
    stranger = office.stranger(ALICE, Workflow(office.store, office.outbox, key=b"x" * 32))
    stranger.cookies = dict(alice.cookies)
    others = (office.browser(CAROL), office.browser(ALICE), stranger)
    forms = valid_fields(office)
    assert set(forms) == set(POSTS)
    for text in [*made_up, *(csrf_token(other) for other in others)]:
        with office.unchanged():
            for path, own in forms.items():
                alice.post(path, own if text is None else {**own, "token": text})
                assert alice.answer.status_code == 403, path
                assert "not one that you opened here" in alice.text
                assert "set-cookie" not in alice.answer.headers


@pytest.mark.parametrize("planted", [True, False])
def test_a_token_with_other_cookies(office: Office, planted: bool):
    """An attacker's token does not work with a planted cookie, nor any without its cookie."""
    attacker, victim = office.browser(CAROL), office.browser(ALICE)
    token = csrf_token(attacker if planted else victim)
    victim.cookies = dict(attacker.cookies) if planted else {}
    victim.post("/cancel", {"token": token})
    assert victim.answer.status_code == 403


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
def test_a_cross_site_form(each_office: Office, headers: dict[str, str]):
    """A form that another site sent is refused even with a valid token."""
    office = each_office
    alice = office.browser(ALICE)
    body = f"token={csrf_token(alice)}&user=jsmith&addresses={OFFICE}".encode()
    with office.unchanged():
        assert alice.send("POST", "/add", body, FORM | headers).status_code == 403
    good = FORM | {"Origin": "http://BANK.example"}
    assert alice.send("POST", "/add", body, good).status_code == 303


def test_a_get_changes_nothing(office: Office):
    """The fields of each form in a URL have no effect, with any method but POST."""
    alice = office.browser(ALICE)
    token = csrf_token(alice)
    forms = valid_fields(office)
    with office.unchanged():
        for path, own in forms.items():
            pairs = "&".join(f"{name}={value}" for name, value in {**own, "token": token}.items())
            for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
                answer = alice.send(method, f"{path}?{pairs}", headers=FORM)
                assert answer.status_code in (200, 404, 405, 409), (method, path)
                assert ("allow" in answer.headers) is (answer.status_code == 405)


def test_without_an_actor(each_office: Office):
    office = each_office
    stranger = office.browser(lambda _: None)
    forms = valid_fields(office)
    with office.unchanged():
        for path in ("/", "/user?user=jsmith", "/add", "/nothing", "/history"):
            stranger.open(path)
            assert stranger.answer.status_code == 401
            assert "Sign in" in stranger.text
            assert "John" not in stranger.text
        for path, own in forms.items():
            stranger.post(path, own)
            assert stranger.answer.status_code == 401


# -- other accounts


def test_other_accounts_do_not_exist(office: Office):
    """Responses about another account's things equal those about made-up ones, to the byte."""
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
            f"/change?user={user}&restriction={restriction}",
        ):
            carol.open(path)
            found.append((carol.answer.status_code, carol.answer.text))
        token = csrf_token(carol)
        for path, own in (
            ("/check", {"user": user, "address": OFFICE}),
            ("/confirm", {"user": user, "request": request, "number": "1"}),
            ("/approve", {"user": user, "request": request}),
            ("/change", {"user": user, "restriction": restriction, "addresses": OFFICE}),
            ("/resend", {"user": user, "request": request}),
            ("/cancel", {"user": user, "request": request}),
            ("/delete", {"user": user, "restriction": restriction, "open": "accept"}),
        ):
            carol.post(path, {**own, "token": token})
            found.append((carol.answer.status_code, carol.answer.text))
        return found

    with office.unchanged():
        others = answers("jsmith", restriction.id, request.id)
        assert {status for status, _ in others} == {404}
        assert others == answers("nobody", "0" * 16, "1" * 16)
        # The same with a user of carol's own.
        assert others[3:6] == answers("zed", restriction.id, request.id)[3:6]
        assert others[7:] == answers("zed", restriction.id, request.id)[7:]


def test_other_accounts_are_not_listed(office: Office):
    """Lists, searches, the drop-down and the history contain only the actor's accounts."""
    office.add(OFFICE)
    office.ask(HOME)
    carol = office.browser(CAROL)
    for path in ("/", "/add", "/history", "/?after=a", "/history?user=jsmith"):
        carol.open(path)
        assert carol.answer.status_code == 200
        assert "John" not in carol.text
        assert "asked for" not in carol.text
    for text in ("jsmith", "John", "U1", OFFICE):
        carol.open("/")
        carol.press("Search", search=text)
        assert "No trader matches" in carol.text


def test_an_id_under_the_wrong_user(office: Office):
    """An id of another user is not found, even if the actor manages both users."""
    request, restriction = office.ask(HOME), office.add(OFFICE)
    alice = office.browser(ALICE)
    token = csrf_token(alice)
    with office.unchanged():
        for path in ("/confirm", "/delete", "/change"):
            ids = f"request={request.id}&restriction={restriction.id}"
            alice.open(f"{path}?{ids}&user=mary")
            assert alice.answer.status_code == 404
        fields = {"user": "mary", "request": request.id, "number": office.number(request)}
        for path in ("/confirm", "/approve", "/resend", "/cancel"):
            alice.post(path, {**fields, "token": token})
            assert alice.answer.status_code == 404, path


def test_rights_are_checked_each_time(office: Office):
    """An actor who lost an account cannot continue with an open form."""
    request = office.ask()
    actors = [ALICE]
    alice = office.browser(lambda _: actors[-1], f"/confirm?user=jsmith&request={request.id}")
    number = office.number(request)
    actors.append(Actor(username="alice", email="alice@firm.example", manages=frozenset({"U9"})))
    with office.unchanged():
        alice.press("Submit", number=number)
    assert alice.answer.status_code == 404


# -- injection

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&lt;'


def test_scripts_in_names_and_labels(office: Office):
    """Names, labels and reasons are escaped; no page has inline scripts or styles."""
    name = "o'<b>&\"x"
    office.store.put_users([User(username=name, full_name=EVIL, account_id="<i>U1")])
    evil = office.browser(
        Actor(username="<u>alice", email="a@x.example", manages=Actor.EVERY_ACCOUNT, address=OFFICE)
    )
    pages = [evil.page]
    evil.press("Search", search=EVIL)
    evil.open("/add")
    evil.press("Submit", user=name, addresses="203.0.113.0/29", label=EVIL)
    pages.append(evil.press("Submit"))
    request = office.request_of(query(evil.address)["request"])
    pages.append(evil.press("Submit", number=office.number(request)))
    evil.follow("Check an address")
    pages.append(evil.press("Check", address=OFFICE))
    pages += [evil.open(path) for path in ("/add", "/")]
    pages.append(evil.follow("Delete"))
    pages.append(evil.press("Delete", open="accept", reason=EVIL))
    pages.append(evil.open("/history"))
    assert EVIL in evil.text
    (script,) = pages[0].select("script")
    for page in pages:
        assert page.select("script") == [script]
        assert not page.select("style, b, i, u, img, [style]")
        for element in page.select("*"):
            assert not [each for each in element.attrs if each.startswith("on")], element


def test_the_brand_is_escaped(office: Office):
    app = asgi_app(office.flow, office.guard, authenticate=lambda _: ALICE, brand="<b>A&B")
    text = Browser(app).send("GET", "/").text
    assert "&lt;b&gt;A&amp;B" in text
    assert "<b>" not in text


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: x=1", "a\r\nLocation: //evil.example"])
def test_header_injection_in_a_response(each_office: Office, text: str):
    """Text from a URL or a form cannot break a header of the response."""
    alice = each_office.browser(ALICE)
    token = csrf_token(alice)
    answers = [
        alice.send("GET", f"/user?user={quote(text)}"),
        alice.send("GET", f"/?search={quote(text)}&after={quote(text)}"),
        alice.send("GET", f"/{quote(text)}"),
    ]
    for path in POSTS:
        alice.post(path, {"token": token, "search": text, "user": text, "request": text})
        answers.append(alice.answer)
    for answer in answers:
        for name, value in answer.headers.multi_items():
            assert "\r" not in value
            assert "\n" not in value
            assert name != "set-cookie" or value.startswith("ipguard-")
            assert name != "location" or "evil" not in value or "%0D" in value


@pytest.mark.parametrize("where", ["//evil.example", "https://evil.example/", "\\\\evil.example"])
def test_redirects_stay_on_this_host(each_office: Office, where: str):
    alice = each_office.browser(ALICE)
    token = csrf_token(alice)
    for path in (f"/{quote(where)}", f"/{quote(where)}/cancel"):
        assert alice.send("GET", path).status_code == 404
    alice.post("/search", {"token": token, "search": where})
    assert alice.address.startswith("/?search=")


# -- messages


def cancel_request(office: Office, browser: Browser) -> None:
    office.ask()
    browser.open("/")
    browser.submit("/cancel", browser.page.form("Cancel").fields)


def test_messages_cannot_be_forged(office: Office):
    """A message is signed for one actor, browser and page, and shown once."""
    alice, adam = office.browser(ALICE), office.browser(ADAM)
    cancel_request(office, adam)
    stolen = adam.cookies["ipguard-note"]
    for text in (stolen, "x", stolen[:-1] + "A", '{"text": "You won"}'):
        alice.cookies["ipguard-note"] = text
        alice.open("/user?user=jsmith")
        assert "note" not in alice.page.ids
    adam.open("/")  # another tab
    assert "note" not in adam.page.ids
    adam.open("/user?user=jsmith")
    assert adam.page.part("note")
    adam.open("/user?user=jsmith")
    assert "note" not in adam.page.ids


def test_messages_expire(office: Office, monkeypatch):
    """A message that was not shown within two minutes is dropped."""
    alice = office.browser(ALICE)
    cancel_request(office, alice)
    late = time.time() + 121
    monkeypatch.setattr(time, "time", lambda: late)
    alice.open("/user?user=jsmith")
    assert "note" not in alice.page.ids
    assert "ipguard-note" not in alice.cookies


# -- replays


def test_the_end_of_a_request_is_not_made_up(office: Office):
    """One wrong number is not a lock, and a restriction that was lifted is not an expiry."""
    office.use(confirm_deletes=True)
    late = office.ask()
    office.guess(late)
    restriction = office.add(HOME)
    lifted = office.ask_to_delete(restriction)
    office.flow.lift(BOSS, restriction.id, reason="a ticket")
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={lifted.id}")
    assert "or what it was about has changed" in alice.page.part("over")
    alice.open(f"/confirm?user=jsmith&request={late.id}")
    number = office.number(late)
    office.wait(hours=25)
    with office.unchanged():
        alice.press("Submit", number=number)
    assert "locked" not in alice.page.part("over")
    assert "nobody confirmed it in time" in alice.page.part("over")


def test_malformed_bodies(each_office: Office):
    """A body that no form sends is a client error and changes nothing."""
    office = each_office
    alice = office.browser(ALICE)
    good = f"token={csrf_token(alice)}"
    with office.unchanged():
        for body, headers, status in (
            (f"{good}&user={'x' * BODY_LIMIT}".encode(), FORM, 413),
            (good.encode(), {"Content-Type": "text/plain"}, 415),
            (good.encode(), {}, 415),
            (b'{"token": 1}', {"Content-Type": "application/json"}, 415),
            (f"{good}&{'&'.join(f'a{n}=1' for n in range(40))}".encode(), FORM, 400),
            (f"{good}&user=a&user=b".encode(), FORM, 400),
            (f"{good}&user=%ff".encode(), FORM, 400),
            (f"{good}&user=\xff".encode("latin-1"), FORM, 400),
        ):
            answer = alice.send("POST", "/add", body, headers)
            assert answer.status_code == status, body[:80]
        assert alice.send("GET", "/user?user=%ff").status_code == 400
        assert alice.send("GET", "/user?user=a&user=b").status_code == 400


# -- failures


def test_a_store_that_is_closed(office: Office, caplog):
    """The page is 503, and after a POST it says that a change may have been made."""
    alice = office.browser(ALICE, "/add")
    form = alice.page.form("Submit")
    office.store.close()
    with caplog.at_level(logging.ERROR, "ipguard.admin"):
        alice.open("/")
        assert alice.answer.status_code == 503
        assert alice.answer.headers["retry-after"] == "5"
        assert "it may have been made" not in alice.text
        alice.post("/add", {**form.fields, "user": "jsmith", "addresses": OFFICE})
    assert alice.answer.status_code == 503
    assert "it may have been made" in alice.text
    assert OFFICE not in caplog.text


@pytest.mark.parametrize("method", ["request", "confirm", "delete", "cancel", "resend"])
def test_a_store_that_fails_at_the_change(office: Office, monkeypatch, method):
    """The page is 503, too, if the store fails only when the change is made."""
    forms = valid_fields(office)
    path = {"request": "/add"}.get(method, f"/{method}")
    alice = office.browser(ALICE)
    alice.open(f"/delete?user=jsmith&restriction={forms['/delete']['restriction']}")
    known = alice.page.form("Delete").fields
    monkeypatch.setattr(office.flow, method, raising(StoreUnavailable("lost")))
    alice.post(path, {**forms[path], "seen": known["seen"], "token": known["token"]})
    assert alice.answer.status_code == 503


def raising(error: Exception):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_defect_shows_no_details(office: Office, monkeypatch, caplog):
    """An unexpected exception is a page without details, and a log entry without secrets."""
    fields = valid_fields(office)["/confirm"]
    alice = office.browser(ALICE, f"/confirm?user=jsmith&request={fields['request']}")

    def broken(*args, **more):
        raise RuntimeError(*args)

    monkeypatch.setattr(office.flow, "confirm", broken)
    with caplog.at_level(logging.DEBUG):
        alice.press("Submit", number=fields["number"])
    assert alice.answer.status_code == 500
    assert "Something went wrong" in alice.text
    for text in (alice.text, caplog.text):
        assert fields["number"] not in text
        assert "alice@firm.example" not in text
    assert "RuntimeError" in caplog.text
    assert "in broken" in caplog.text


def test_an_unknown_error_of_the_library(office: Office, monkeypatch):
    monkeypatch.setattr(office.flow, "cancel", raising(IPGuardError("that is new")))
    request = office.ask()
    alice = office.browser(ALICE)
    alice.press("Cancel")
    assert alice.answer.status_code == 409
    assert "that is new" in alice.text
    monkeypatch.setattr(office.flow, "confirm", raising(IPGuardError("that is new")))
    alice.open(f"/confirm?user=jsmith&request={request.id}")
    alice.press("Submit", number="1")
    assert "That is new." in alice.page.part("problems")


def test_error_pages_lead_back_to_the_list(office: Office, monkeypatch):
    """Every error page has the navigation, except for visitors who are not signed in."""
    alice = office.browser(ALICE)
    token = csrf_token(alice)

    def errors():
        yield 404, lambda: alice.open("/nothing")
        yield 404, lambda: alice.open("/user?user=nobody")
        yield 400, lambda: alice.open("/user?user=%ff")
        yield 403, lambda: alice.post("/add", {"token": "x"})
        yield 405, lambda: alice.open("/cancel")
        yield 413, lambda: alice.post("/add", {"token": token, "label": "x" * 40_000})
        monkeypatch.setattr(office.flow, "overview", raising(StoreUnavailable("down")))
        yield 503, lambda: alice.open("/")
        monkeypatch.setattr(office.flow, "overview", None)
        yield 500, lambda: alice.open("/")

    for status, send in errors():
        send()
        assert alice.answer.status_code == status
        assert ("IP Restrictions", "./") in alice.page.links, status
        assert ("History", "./history") in alice.page.links, status
        assert "Signed in as alice" in alice.text
        assert alice.page.select("[aria-current]")
    stranger = office.browser(None)
    assert stranger.answer.status_code == 401
    assert "History" not in stranger.text


# -- headers, cookies and logs


def test_security_headers(each_office: Office):
    """Pages may not be cached, framed, or run anything inline."""
    alice = each_office.browser(ALICE)
    for path, status in (("/", 200), ("/nothing", 404), ("/user?user=%ff", 400)):
        answer = alice.send("GET", path)
        assert answer.status_code == status
        for name, value in {
            "content-security-policy": POLICY,  # as the guide quotes it
            "cache-control": "no-store",
            "x-frame-options": "DENY",
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "content-type": "text/html; charset=utf-8",
        }.items():
            assert answer.headers.get_list(name) == [value]


@pytest.mark.parametrize("https", [False, True])
def test_cookies(each_office: Office, https: bool):
    """Cookies are hidden from scripts and other sites; over TLS they are bound to this host."""
    office = each_office
    office.ask()
    alice = office.browser(ALICE, https=https)
    first = alice.answer.headers["set-cookie"]
    form = alice.page.form("Cancel")
    second = alice.submit("/cancel", form.fields).headers["set-cookie"]
    for line in (first, second):
        parts = line.split("; ")
        assert {"Path=/", "HttpOnly", "SameSite=Lax"} <= set(parts)
        assert ("Secure" in parts) is https
        assert "Domain" not in line
        assert line.startswith("__Host-ipguard-" if https else "ipguard-")
    assert re.fullmatch(r"(__Host-)?ipguard-form=[\w-]{22}", first.split(";")[0])
    alice.open("/")
    assert "-form=" not in alice.answer.headers.get("set-cookie", "")


def test_no_number_and_no_address_in_logs_and_urls(office: Office, caplog):
    """No URL shows a number or an address, and no log a number."""
    with caplog.at_level(logging.DEBUG):
        boss = office.browser(BOSS, "/add")
        boss.press("Submit", user="jsmith", addresses="203.0.113.0/29")
        boss.press("Submit")
        number = office.outbox.number_for(query(boss.address)["request"])
        boss.press("Submit", number=number)
        boss.open("/")
        boss.press("Search", search=OFFICE)
        boss.open("/check?user=jsmith")
        boss.press("Check", address=OFFICE)
        boss.open("/")
        boss.follow("Delete")
        boss.press("Delete", open="accept")
    assert office.held() == []
    assert not [url for url in boss.log if "203.0.113" in url or number in url]
    for record in caplog.records:
        assert number not in record.getMessage()
        assert record.name == "ipguard.audit" or OFFICE not in record.getMessage()
