"""The kit for Django, in the sample bank of examples/site_django."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urljoin

import django
import pytest
from django.contrib import auth
from django.core import checks, mail
from django.core.management import CommandError, call_command
from django.test import AsyncClient, Client, override_settings
from django.urls import reverse

import ipguard
from ipguard import Actor
from ipguard.contrib import django as contrib
from tests.hosts import PLACES, serving, walk
from tests.logins import ROOT
from tests.pages import Page
from tests.postgres import until

SITE = ROOT / "examples" / "site_django"
PASSWORD = "correct horse"
OFFICE, HOME, CAFE = "203.0.113.5", "203.0.113.77", "198.51.100.7"
DESK = Actor(username="desk", email="desk@bank.example", manages=Actor.EVERY_ACCOUNT)
NUMBER = re.compile(r"^ {4}([\d-]{11})$", re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set Django up with the sample bank; this can be done once in a process."""
    sys.path.insert(0, str(SITE))
    os.environ["BANK_DATA"] = str(tmp_path_factory.mktemp("bank"))
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.bank_settings"
    django.setup()
    from django.test.utils import setup_test_environment, teardown_test_environment

    setup_test_environment()
    call_command("migrate", run_syncdb=True, verbosity=0)
    yield
    teardown_test_environment()
    sys.path.remove(str(SITE))


class Bank:
    """The project with a store of its own, and its customers rjones (staff), jsmith and mlee."""

    def __init__(self, folder: Path) -> None:
        from bank.models import Customer

        self.path = folder / "ipguard.db"
        self.users = Customer.objects
        key = folder / "ipguard.key"
        key.write_text("k" * 64)
        self.settings = {
            "URL": f"sqlite:///{self.path}",
            "KEY_FILE": key,
            "PROXIES": [],
            "ACTOR": "bank.models.ipguard_actor",
        }

    @contextlib.contextmanager
    def configured(self, **more: Any) -> Iterator[None]:
        """Use settings of ipguard; those that are None are left out."""
        given = {name: value for name, value in (self.settings | more).items() if value is not None}
        with override_settings(IPGUARD=given):
            yield

    def add(self, name: str, **more: Any) -> Any:
        return self.users.create_user(
            name, f"{name}@bank.example", PASSWORD, **{"account_id": "U1", **more}
        )

    def restrict(self, username: str, addresses: str = OFFICE) -> None:
        """Impose a restriction, and wait until the guard has seen it."""
        kit = contrib.kit()
        applied = kit.workflow.impose(DESK, username, addresses, reason="a test")
        assert kit.guard.wait_for(applied.revision, timeout=30)

    def registered(self) -> dict[str, str | None]:
        """Return the uids of the registered users by their spelling."""
        return {
            each.user.spelling: each.user.uid
            for each in contrib.kit().workflow.overview(DESK)
            if not each.removed
        }

    @contextlib.contextmanager
    def behind_badges(self) -> Iterator[None]:
        """Let users log in with a badge, too."""
        paths = [
            "ipguard.contrib.django.GuardBackend",
            f"{__name__}.Badges",
            "django.contrib.auth.backends.ModelBackend",
        ]
        with override_settings(AUTHENTICATION_BACKENDS=paths):
            yield

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Take the store away."""
        away = self.path.with_suffix(".away")
        self.path.rename(away)
        try:
            yield
        finally:
            away.rename(self.path)


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    bank = Bank(tmp_path)
    with bank.configured():
        bank.users.all().delete()
        bank.add("rjones", is_staff=True)
        bank.add("jsmith")
        bank.add("mlee")
        mail.outbox.clear()
        yield bank


def log_in(
    username: str = "jsmith", password: str = PASSWORD, address: str = OFFICE, **more: Any
) -> tuple[Client, Any]:
    """Log in with Django's own form; return the client and its answer."""
    client = Client(REMOTE_ADDR=address, **more)
    form = {"username": username, "password": password}
    return client, client.post(reverse("login"), form)


def is_signed_in(client: Client) -> bool:
    """Return whether the home page shows a signed-in user, not the sign-in."""
    answer = client.get(reverse("home"))
    assert answer.status_code in (200, 302), answer
    return bool(answer.status_code == 200)


def words(answer: Any) -> tuple[int, str, dict[str, str]]:
    """Return what a client sees, without the random token and its cookie."""
    text = re.sub(r'value="\w{64}"', "", answer.content.decode())
    headers = {name: value for name, value in answer.headers.items() if name != "Expires"}
    return answer.status_code, text, headers  # Expires is the second of the answer


# -- the login


def test_a_login(bank: Bank) -> None:
    """An unrestricted user logs in from anywhere, a restricted one from its addresses."""
    client, answer = log_in(address=CAFE)
    assert answer.status_code == 302
    assert is_signed_in(client)
    bank.restrict("jsmith")
    assert not is_signed_in(client)
    client, answer = log_in(address=OFFICE)
    assert answer.status_code == 302
    assert is_signed_in(client)


def test_logins_with_the_right_password_are_recorded(bank: Bank) -> None:
    """Users are mailed about those that were refused; wrong passwords are not recorded."""
    bank.restrict("jsmith")
    kit = contrib.kit()
    log_in(password="wrong")
    log_in("stranger")
    kit.guard.close()
    assert kit.store.sightings("jsmith") == ()
    client, _ = log_in()
    client.get("/")
    log_in(address=CAFE)
    assert auth.authenticate(username="jsmith", password=PASSWORD) is None
    kit.guard.close()
    found = {each.address: (each.allowed, each.refused) for each in kit.store.sightings("jsmith")}
    assert found == {OFFICE: (1, 0), CAFE: (0, 1)}
    (notice,) = (each for each in mail.outbox if CAFE in each.body)
    assert notice.to == ["jsmith@bank.example"]


def test_recording_can_be_turned_off(bank: Bank) -> None:
    with bank.configured(SIGHTINGS=False):
        kit = contrib.kit()
        log_in()
        kit.guard.close()
        assert kit.store.sightings("jsmith") == ()
    with bank.configured(SIGHTINGS="no"):
        assert any("SIGHTINGS" in each.msg for each in checks.run_checks(tags=["security"]))


def test_a_refusal_reads_like_a_wrong_password(bank: Bank) -> None:
    bank.restrict("jsmith")
    _, refused = log_in(address=CAFE)
    _, wrong = log_in(password="wrong", address=OFFICE)
    _, both = log_in(password="wrong", address=CAFE)
    assert "Please enter a correct username and password" in wrong.content.decode()
    assert words(refused) == words(wrong) == words(both)


def test_a_right_password_calls_the_host_no_more_often(bank: Bank) -> None:
    """The setting USER may read a database: its time would tell that the password was right."""
    bank.restrict("jsmith")
    asked: list[str] = []

    def described(user: Any) -> ipguard.User:
        asked.append(user.get_username())
        return ipguard.User(username=user.get_username(), full_name="U", account_id="U1")

    with bank.configured(USER=described):
        log_in(password="wrong", address=CAFE)
        wrong = list(asked)
        asked.clear()
        log_in(address=CAFE)
        kit = contrib.kit()
        kit.guard.close()
        assert [each.refused for each in kit.store.sightings("jsmith")] == [1]
    assert asked == wrong == ["jsmith"]


@pytest.mark.parametrize("typed", ["JSmith", "nobody"])
def test_a_typed_name_without_a_record(bank: Bank, typed: str) -> None:
    _, answer = log_in(typed)
    assert answer.status_code == 200


def test_a_refusal_is_not_a_failed_login(bank: Bank) -> None:
    """The signal `user_login_failed` tells of wrong passwords alone, under asyncio too."""
    from django.contrib.auth import aauthenticate, authenticate
    from django.contrib.auth.signals import user_login_failed

    failed: list[Any] = []

    def count(credentials: dict[str, str], **_: Any) -> None:
        failed.append(credentials["password"])

    bank.restrict("jsmith")
    user_login_failed.connect(count)
    try:
        for address, password, expected in (
            (CAFE, PASSWORD, 0),
            (CAFE, "wrong", 1),
            (OFFICE, "wrong", 1),
            (CAFE, PASSWORD, 0),
        ):
            request = Client(REMOTE_ADDR=address).get(reverse("login")).wsgi_request
            given = {"username": "jsmith", "password": password}
            assert authenticate(request, **given) is None
            assert len(failed) == expected
            assert asyncio.run(aauthenticate(request, **given)) is None
            assert len(failed) == 2 * expected
            failed.clear()
    finally:
        user_login_failed.disconnect(count)


def test_axes_locks_nobody_out_who_was_refused(bank: Bank) -> None:
    """With django-axes, wrong passwords count and refusals do not."""
    from django.conf import settings

    bank.restrict("jsmith")
    backends = ["axes.backends.AxesStandaloneBackend", *settings.AUTHENTICATION_BACKENDS]
    with override_settings(AXES_ENABLED=True, AUTHENTICATION_BACKENDS=backends):
        assert problems() == []
        for _ in range(5):
            assert log_in(address=CAFE)[1].status_code == 200
        assert log_in(address=OFFICE)[1].status_code == 302
        for _ in range(3):
            log_in(password="wrong", address=OFFICE)
        assert log_in(address=OFFICE)[1].status_code == 429
    call_command("axes_reset", verbosity=0)


def test_without_a_request(bank: Bank) -> None:
    """`Client.login` of Django's tests, which sends no request."""
    assert Client().login(username="jsmith", password=PASSWORD)
    bank.restrict("jsmith")
    assert not Client().login(username="jsmith", password=PASSWORD)


class Badges:
    """A backend without usernames, that knows one user."""

    def authenticate(self, request: Any, *, badge: str) -> Any:
        from bank.models import Customer

        if badge == "withdrawn":
            from django.core.exceptions import PermissionDenied

            raise PermissionDenied
        return Customer.objects.get(username="jsmith") if badge == "1" else None

    def get_user(self, user_id: Any) -> None:
        return None


def test_every_backend_behind_it_is_guarded(bank: Bank) -> None:
    from django.contrib.auth import authenticate

    bank.restrict("jsmith")
    with bank.behind_badges():
        for address, badge, allowed in (
            (OFFICE, "1", True),
            (CAFE, "1", False),
            (OFFICE, "2", False),
            (OFFICE, "withdrawn", False),
        ):
            request = Client(REMOTE_ADDR=address).get(reverse("login")).wsgi_request
            assert (authenticate(request, badge=badge) is not None) is allowed
        client, _ = log_in()
        assert is_signed_in(client)


# -- each request


def test_a_confirmed_restriction_ends_a_session(bank: Bank) -> None:
    """What an administrator confirms on the page holds at the next request of another user."""
    trader, _ = log_in(address=CAFE)
    other, _ = log_in("mlee", address=CAFE)
    staff, _ = log_in("rjones", address=HOME)
    assert is_signed_in(trader)
    add(staff, "jsmith", OFFICE)
    assert not is_signed_in(trader)
    assert is_signed_in(other)
    assert is_signed_in(staff)
    (numbered, *notices) = mail.outbox
    assert numbered.to == ["rjones@bank.example"]
    assert numbered.from_email == "no-reply@bank.example"
    assert HOME in numbered.body
    assert numbered.alternatives[0].content.startswith("<!DOCTYPE html>")
    assert sorted(each.to[0] for each in notices) == ["jsmith@bank.example", "rjones@bank.example"]


def add(client: Client, username: str, addresses: str) -> None:
    """Restrict a user on the page: ask, and confirm the number in the mail."""
    place = submit(
        client, reverse("ipguard:page", args=["add"]), user=username, addresses=addresses
    )
    (number,) = NUMBER.findall(mail.outbox[-1].body)
    assert submit(client, place, number=number).endswith(f"/user?user={username}")


def submit(client: Client, place: str, **fields: str) -> str:
    """Fill in the form of a page and send it; return the page that the answer leads to."""
    form = Page(client.get(place).content.decode()).form("Submit")
    answer = client.post(urljoin(place, form.action), form.fields | fields)
    assert answer.status_code == 303, answer.content
    return str(urljoin(place, answer["Location"]))


def test_an_outage_signs_nobody_out(bank: Bank) -> None:
    """While the store is away, each answer is 503, whatever the password; then all is as before."""
    from django.contrib.auth import authenticate

    with bank.configured(GUARD={"max_staleness": 0.2}):
        bank.restrict("jsmith")
        client, _ = log_in()
        assert is_signed_in(client)
        with bank.outage():
            until(lambda: client.get("/").status_code == 503, "the lease is over")
            answers = [client.get("/"), client.get(reverse("ipguard:page"))]
            answers += [log_in(password=each)[1] for each in (PASSWORD, "wrong")]
            answers += [log_in("nobody")[1]]
            for answer in answers:
                assert answer.status_code == 503
                assert answer["Retry-After"] == "5"
            assert len({answer.content for answer in answers}) == 1
            request = Client().get(reverse("login")).wsgi_request
            with bank.behind_badges():
                for badge in ("1", "2"):
                    with pytest.raises(ipguard.StoreUnavailable):
                        authenticate(request, badge=badge)
            assert Client().get(reverse("login")).status_code == 200
        until(lambda: client.get("/").status_code != 503, "the store is back")
        assert is_signed_in(client)


def test_forged_headers(bank: Bank) -> None:
    """Only what the trusted proxy wrote counts."""
    bank.restrict("jsmith")
    proxy = "192.0.2.1"
    with bank.configured(PROXIES=[proxy]):
        for peer, header, allowed in (
            (proxy, OFFICE, True),
            (proxy, f"{CAFE}, {OFFICE}", True),
            (proxy, f"{OFFICE}, {CAFE}", False),
            (proxy, "", False),
            (proxy, f"{OFFICE}, {proxy}x", False),
            (CAFE, OFFICE, False),
            (CAFE, f"{OFFICE}, {proxy}", False),
        ):
            more = {"HTTP_X_FORWARDED_FOR": header, "HTTP_X_REAL_IP": OFFICE}
            client, answer = log_in(address=peer, **more)
            assert (answer.status_code == 302) is allowed, (peer, header)
            assert is_signed_in(client) is allowed
    with bank.configured(PROXIES=[], UNIX_SOCKET=True):
        for header, allowed in ((OFFICE, True), (f"{OFFICE}, {CAFE}", False)):
            client, answer = log_in(address="", HTTP_X_FORWARDED_FOR=header)
            assert (answer.status_code == 302) is allowed


def test_under_asgi(bank: Bank) -> None:
    """The login, a request, the page and the end of a session on an event loop."""

    async def walk() -> None:
        client = AsyncClient()  # at 127.0.0.1
        form = {"username": "rjones", "password": PASSWORD}
        answer = await client.post(reverse("login"), form)
        assert answer.status_code == 302
        answer = await client.get(reverse("ipguard:page"))
        assert answer.status_code == 200
        assert "jsmith" in answer.content.decode()
        fields = Page(answer.content.decode()).form("Search").fields | {"search": "mlee"}
        answer = await client.post(reverse("ipguard:page", args=["search"]), fields)
        assert answer.status_code == 303
        await asyncio.to_thread(bank.restrict, "rjones")
        answer = await client.get(reverse("home"))
        assert answer.status_code == 302
        answer = await client.post(reverse("login"), form)
        assert "Please enter a correct username" in answer.content.decode()

    asyncio.run(walk())


# -- the page


def test_the_page_for_others(bank: Bank) -> None:
    """Visitors are sent to the project's sign-in, and customers are refused."""
    page = reverse("ipguard:page")
    assert page == "/ip-restrictions/"
    visitor = Client().get(page + "history?user=jsmith")
    assert visitor.status_code == 302
    assert visitor["Location"] == ("/login/?next=/ip-restrictions/history%3Fuser%3Djsmith")
    sent = Client().post(page + "confirm", {"number": "1"})
    assert sent["Location"] == "/login/?next=/ip-restrictions/"
    assert Client().get("/ip-restrictions")["Location"] == page
    trader, _ = log_in()
    assert trader.get(page).status_code == 403
    staff, _ = log_in("rjones")
    assert staff.get(page).status_code == 200
    assert staff.get(page + "nothing/here").status_code == 404
    assert staff.put(page).status_code == 405
    assert staff.head(page).content == b""


def test_the_page_extends_the_session(bank: Bank) -> None:
    """The project's middleware sees the page's requests, also those of files."""
    staff, _ = log_in("rjones")
    with override_settings(SESSION_SAVE_EVERY_REQUEST=True):
        answer = staff.get(reverse("ipguard:page"))
        assert "sessionid" in answer.cookies
        assert answer["Content-Security-Policy"].startswith("default-src 'none'")
        sheet = re.search(r'href="\./(static/[^"]+[.]css)"', answer.content.decode())
        assert sheet
        answer = staff.get(reverse("ipguard:page", args=[sheet[1]]))
        assert answer["Content-Type"] == "text/css; charset=utf-8"
        assert answer["Cache-Control"] == "private, max-age=31536000, immutable"


def test_cookies_of_the_page(bank: Bank) -> None:
    """They keep their attributes, and are `Secure` over TLS."""
    staff, _ = log_in("rjones")
    cookie = staff.get(reverse("ipguard:page")).cookies["ipguard-form"]
    assert (cookie["path"], cookie["httponly"], cookie["samesite"]) == ("/", True, "Lax")
    cookie = staff.get(reverse("ipguard:page"), secure=True).cookies["__Host-ipguard-form"]
    assert cookie["secure"]


def test_a_rotated_secret_key(bank: Bank) -> None:
    """With the old key in SECRET_KEY_FALLBACKS sessions go on, on the page too."""
    from django.conf import settings

    trader, _ = log_in()
    staff, _ = log_in("rjones")
    new = {"SECRET_KEY": "n" * 60, "SECRET_KEY_FALLBACKS": [settings.SECRET_KEY]}
    with override_settings(**new):
        assert staff.get(reverse("ipguard:page")).status_code == 200
        assert is_signed_in(trader)
    with override_settings(SECRET_KEY=new["SECRET_KEY"]):  # the sessions have moved on
        assert staff.get(reverse("ipguard:page")).status_code == 200
        assert is_signed_in(trader)
    with override_settings(SECRET_KEY="another" * 10):
        assert not is_signed_in(trader)


# -- users


def test_users_are_kept_in_step(bank: Bank) -> None:
    """Users that are created, renamed and deleted are so in ipguard, with their restrictions."""
    user = bank.users.get(username="jsmith")
    assert bank.registered()["jsmith"] == str(user.pk)
    bank.restrict("jsmith")
    user.username = "John.Smith"
    user.save()
    assert sorted(bank.registered()) == ["John.Smith", "mlee", "rjones"]
    assert log_in("John.Smith", address=CAFE)[1].status_code == 200
    assert log_in("John.Smith")[1].status_code == 302
    user.delete()
    assert sorted(bank.registered()) == ["mlee", "rjones"]
    bank.add("John.Smith")
    assert log_in("John.Smith", address=CAFE)[1].status_code == 200


def test_a_rename_without_a_signal(bank: Bank) -> None:
    """A login registers the user as it is now, so that `update` opens no user."""
    bank.restrict("jsmith")
    bank.users.filter(username="jsmith").update(username="john.smith")
    assert log_in("john.smith", address=CAFE)[1].status_code == 200
    assert log_in("john.smith", address=OFFICE)[1].status_code == 302
    assert "john.smith" in bank.registered()


def test_a_rolled_back_change(bank: Bank) -> None:
    from django.db import transaction

    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        bank.add("never")
        bank.users.get(username="mlee").delete()
        1 / 0  # noqa: B018
    assert sorted(bank.registered()) == ["jsmith", "mlee", "rjones"]


def test_a_store_that_is_down_breaks_no_save(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    with bank.configured(GUARD={"max_staleness": 0.2}):
        assert contrib.kit().guard.healthy()
        with bank.outage():
            user = bank.users.get(username="jsmith")
            user.username = "john.smith"
            user.save()
        assert "on_commit" in caplog.text
        call_command("ipguard_sync", stdout=io.StringIO())
        assert "john.smith" in bank.registered()


def test_a_username_of_another_user(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    """Users that differ in capitals alone: the second one is not registered."""
    bank.add("JSmith", account_id="U2")
    assert "JSmith" not in bank.registered()
    assert "was not registered" in caplog.text


def test_users_that_are_not_described(bank: Bank) -> None:
    """They are not registered; restrictions on their names hold."""
    bank.restrict("jsmith")
    with bank.configured(USER=lambda user: None):
        bank.add("robot")
        bank.users.get(username="mlee").delete()
        assert sorted(bank.registered()) == ["jsmith", "mlee", "rjones"]
        assert log_in(address=CAFE)[1].status_code == 200
        assert log_in("robot", address=CAFE)[1].status_code == 302


def test_odd_users(bank: Bank) -> None:
    """Django lets in users without an account, with a long name, or without a valid e-mail."""
    bank.add("no-account", account_id="")
    user = bank.add("odd", first_name="F" * 150, last_name="L" * 150)
    bank.users.filter(pk=user.pk).update(email="nothing")
    for name in ("no-account", "odd"):
        assert is_signed_in(log_in(name)[0])
    assert "no-account" not in bank.registered()
    (line,) = contrib.kit().workflow.overview(DESK, search="odd")
    assert line.user.email is None


def describe(user: Any) -> ipguard.User:
    """Describe a user, as a setting `USER` of a project."""
    if user.username == "mlee":
        raise LookupError("no account")
    return ipguard.User(
        username=f"bank-{user.username}", full_name="", account_id="U7", uid=f"c{user.pk}"
    )


def test_a_function_that_fails_breaks_no_change(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    user = bank.users.get(username="mlee")
    with bank.configured(USER=describe):
        user.save()
        user.delete()
    assert caplog.text.count("LookupError: no account") == 2
    assert "mlee" in bank.registered()


def test_the_command_for_all_users(bank: Bank) -> None:
    out, errors = io.StringIO(), io.StringIO()
    bank.users.filter(username="jsmith").update(username="john.smith")
    bank.users.filter(username="mlee")._raw_delete("default")
    call_command("ipguard_sync", "--remove-missing", stdout=out)
    assert out.getvalue().strip() == (
        "0 added, 0 changed, 1 renamed, 0 moved, 1 removed, 0 refused"
    )
    bank.add("mlee")
    with bank.configured(USER=f"{__name__}.describe"):
        with pytest.raises(CommandError):
            call_command("ipguard_sync", "--remove-missing", stdout=out, stderr=errors)
        assert sorted(bank.registered()) == ["bank-john.smith", "bank-rjones", "mlee"]
    assert "USER failed: mlee: LookupError" in errors.getvalue()
    assert "refused: mlee:" in errors.getvalue()


# -- settings, checks and commands


def problems() -> list[str]:
    return [str(each.id) for each in checks.run_checks(tags=["security"]) if "ipguard" in each.id]


def test_checks(bank: Bank, tmp_path: Path) -> None:
    """They find missing and invalid settings, and those in the wrong order."""
    from django.conf import settings

    assert problems() == []
    (tmp_path / "short").write_text("short")
    values: list[dict[str, Any]] = [
        {"URL": None},
        {"PROXIES": None},
        {"HOPS": 1},
        {"PROXIES": ["10.0.0.1/8"]},
        {"ACTOR": "bank.models.nothing"},
        {"USER": 7},
        {"WORKFLOW": {"number_digits": 1}},
        {"MAIL": "smtp://user:pass@mail.example.com"},
        {"KEY_FILE": tmp_path / "short"},
        {"PROXY": []},
    ]
    for wrong in values:
        with bank.configured(**wrong):
            assert problems() == ["ipguard.E001"], wrong
    with bank.configured(KEY_FILE=tmp_path / "none"):
        assert problems() == ["ipguard.W001"]
    with override_settings(IPGUARD=None):
        assert problems() == ["ipguard.E001"]
    middleware, backends = settings.MIDDLEWARE, settings.AUTHENTICATION_BACKENDS
    others = [each for each in middleware if "Guard" not in each]
    for paths in (middleware[::-1], middleware[:4], others):
        with override_settings(MIDDLEWARE=paths):
            assert problems() == ["ipguard.E002"]
    for paths in (backends[:1], backends[::-1], backends[1:]):
        with override_settings(AUTHENTICATION_BACKENDS=paths):
            assert problems() == ["ipguard.E003"]


def test_notifiers(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    from ipguard.testing import Outbox

    box = Outbox()
    for given in ("console", box, f"{__name__}.BOX", "smtp://127.0.0.1:1"):
        more = {"MAIL": given, "PRODUCT": "Example Bank", "HOPS": 0, "PROXIES": None}
        with bank.configured(**more), contextlib.suppress(ipguard.DeliveryError):
            actor = Actor(username="a", email="a@bank.example", manages={"U1"})
            contrib.kit().workflow.request(actor, "jsmith", "10.0.0.1")
        bank.users.all().delete()
        bank.add("jsmith")
    assert "Example Bank" in capsys.readouterr().out
    assert len(box.messages) == 1
    assert len(BOX.messages) == 1


BOX = SimpleNamespace(messages=[], change_applied=lambda *_: None)
BOX.number_issued = lambda *given: BOX.messages.append(given)


def test_the_command_line(bank: Bank, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """`manage.py ipguard` works on the project's store, with options of its own."""
    for name in ("URL", "KEY_FILE", "MAIL_FROM"):
        monkeypatch.setenv(f"IPGUARD_{name}", "of another project")
    call_command("ipguard", "list")
    assert "jsmith" in capfd.readouterr().out
    from django.core.management import execute_from_command_line

    execute_from_command_line(["manage.py", "ipguard", "--version"])
    assert ipguard.__version__ in capfd.readouterr().out
    with pytest.raises(SystemExit):
        execute_from_command_line(["manage.py", "ipguard", "nothing"])
    execute_from_command_line(["manage.py", "help", "ipguard"])
    assert "manage.py ipguard list" in capfd.readouterr().out


@pytest.mark.slow
def test_without_django() -> None:
    script = "import sys; sys.modules['django'] = None; import ipguard.contrib.django"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode
    assert "ipguard.contrib.django needs Django: pip install django" in found.stderr


# -- real servers

PREPARE = """
from django.core.management import call_command
from bank.models import Customer
call_command("ipguard", "init")
call_command("migrate", run_syncdb=True, verbosity=0)
for name in ("rjones", "jsmith", "mlee"):
    more = {"is_staff": name == "rjones", "account_id": "U1"}
    Customer.objects.create_user(name, f"{name}@bank.example", "correct horse", **more)
"""
SERVERS = {
    "gunicorn": (
        "django.core.wsgi:get_wsgi_application()",
        ("--workers", "3", "--preload", "--no-control-socket"),
    ),
    "uvicorn": ("django.core.asgi:get_asgi_application", ("--workers", "2", "--factory")),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("over", "store"), PLACES)
@pytest.mark.parametrize("server", SERVERS)
def test_the_example_on_real_servers(server: str, over: str, store: str, chromium: Any) -> None:
    application, options = SERVERS[server]
    settings = {
        "DJANGO_SETTINGS_MODULE": "tests.bank_served",
        "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}",
    }
    prepare = [sys.executable, str(SITE / "manage.py"), "shell", "-c", PREPARE]
    kind = f"{server} over {over}"
    with serving(application, kind, store, *options, prepare=prepare, settings=settings) as site:
        walk(chromium, site, 200, "Please enter a correct username and password")
