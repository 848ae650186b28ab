"""The command line: the two phases and the commands of operators, with real mail."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipguard
from ipguard.cli import _identity
from tests.cli import Shell
from tests.smtp_server import BadServer, MailServer

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")

ME = f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"
RITA = ("--as", "rita", "--email", "rita@firm.example", "--account", "U1")


@pytest.fixture(scope="module")
def mail() -> Iterator[MailServer]:
    with MailServer() as server:
        yield server


@pytest.fixture
def shell(tmp_path: Path, mail: MailServer) -> Shell:
    """A shell with two users, a key and a mail server."""
    it = Shell(tmp_path, IPGUARD_MAIL=mail.url, IPGUARD_MAIL_FROM="Bank <no-reply@bank.example>")
    (tmp_path / "ipguard.key").write_text("k" * 64)
    with _store(it) as store:
        store.put_users(
            ipguard.User(
                username=name, full_name=name, account_id=account, email=f"{name}@firm.example"
            )
            for name, account in (("jsmith", "U1"), ("zed", "U2"))
        )
    return it


def _store(shell: Shell) -> ipguard.RestrictionStore:
    return ipguard.open_store(shell.env["IPGUARD_URL"])


def _held(shell: Shell, username: str = "jsmith") -> list[str]:
    with _store(shell) as store:
        return [str(r.addresses) for r in store.load_policy(username).restrictions]


def _rows(shell: Shell) -> tuple[ipguard.Change, ...]:
    with _store(shell) as store:
        return store.history(ipguard.Actor.EVERY_ACCOUNT).items


def _number(mail: MailServer, before: int) -> str:
    """Return the number in the next mail after `before` mails."""
    (*_, found) = mail.wait_for(before + 1)[: before + 1]
    assert found.recipients == ("rita@firm.example",)
    (number,) = re.findall(r"^ +(\d{5}-\d{5})$", found.part("plain"), re.MULTILINE)
    return str(number)


def test_the_two_phases_in_a_terminal(shell: Shell, mail: MailServer):
    """A wrong number is counted, a mistyped one is not, and the right one applies the request."""
    before = len(mail.mails)
    asking = shell.terminal("request", "jsmith", " 203.0.113.0/29 ", "--label", "office", *RITA)
    asking.sees(r"request ([0-9a-f]{16}) is pending")
    assert asking.process.match
    request = asking.process.match[1]
    assert "mailed to rita@firm.example" in asking.ends()
    number = _number(mail, before)
    wrong = shell.terminal("confirm", request, *RITA)
    wrong.sees("Confirmation number: ")
    wrong.types("00000-00000")
    assert "attempts left: 4" in wrong.ends(5)
    for text in ("49201\n", "4920l-77340\n"):
        mistyped = shell("confirm", request, *RITA, stdin=text)
        assert mistyped.code == 5
        assert "no attempt was counted" in mistyped.err
    assert _held(shell) == []
    right = shell.terminal("confirm", request, *RITA)
    right.sees("Confirmation number: ")
    right.types(number.replace("-", " "))
    assert re.search(r"done, revision \d+: jsmith 203.0.113.0/29", right.ends())
    assert _held(shell) == ["203.0.113.0/29"]
    told = mail.wait_for(before + 3)[before + 1 :]
    assert {one.recipients[0] for one in told} == {"rita@firm.example", "jsmith@firm.example"}
    rows = [row for row in _rows(shell) if row.actor is not None]
    assert [row.actor for row in rows] == ["rita"] * 3
    assert all(f"command_line={ME}" in row.detail["via"] for row in rows)


def test_confirm_asks_no_number_for_an_unknown_request(shell: Shell):
    """Another actor's request is unknown too."""
    made = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    for request, actor in (("nothing", RITA), (made["id"], ())):
        shown = shell.terminal("confirm", request, *actor).ends(4)
        assert f"no request '{request}'" in shown
        assert "Confirmation number" not in shown


def test_an_unknown_id_hints_at_where_ids_are_listed(shell: Shell):
    """People often give an address or a name instead."""
    for args in (
        ("lift", "10.0.0.5", "--reason", "x"),
        ("delete", "10.0.0.5", *RITA),
        ("cancel", "10.0.0.5", *RITA),
        ("resend", "10.0.0.5", *RITA),
    ):
        failed = shell(*args, "--json")
        assert failed.code == 4
        assert "`ipguard list` shows ids" in failed.error["hint"]
    failed = shell("impose", "jsmiht", "10.0.0.5", "--reason", "x", "--json")
    assert "ipguard users list" in failed.error["hint"]


def test_the_two_phases_in_a_pipe(shell: Shell, mail: MailServer):
    """The number is read from standard input; as an argument it is refused and not repeated."""
    before = len(mail.mails)
    wanted = ("request", "jsmith", "203.0.113.7", *RITA, "--expires", "30d")
    assert "from no address" in shell.bad(10, *wanted)
    asked = shell.json(*wanted, "--allow-lockout")
    number = _number(mail, before)
    said = shell("confirm", asked["id"], number, *RITA)
    assert (said.code, said.out) == (2, "")
    assert "every user of this machine" in said.err
    assert number not in said.err
    nothing = shell("confirm", asked["id"], *RITA, "--json")
    assert (nothing.code, nothing.error["type"]) == (2, "usage")
    wrong = shell("confirm", asked["id"], *RITA, "--json", stdin="12345-67890\n")
    assert (wrong.code, wrong.error["details"]) == (5, {"attempts_left": 4})
    # Only the requester can confirm.
    other = ("--as", "adam", "--email", "adam@firm.example", "--account", "U1")
    assert "no request" in shell.bad(4, "confirm", asked["id"], *other, stdin=number)
    applied = shell.json("confirm", asked["id"], *RITA, stdin=f"{number}\n")
    assert applied["restriction"]["addresses"] == "203.0.113.7"
    assert applied["restriction"]["expires_at"] == asked["restriction_expires_at"]
    assert applied["notices_failed"] == 0
    again = shell("confirm", asked["id"], *RITA, "--json", stdin=number)
    assert (again.code, again.error["details"]) == (5, {"state": "confirmed"})


def test_cancel_and_resend(shell: Shell, mail: MailServer):
    """Any administrator of the account can cancel; a closed request stays closed."""
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    _number(mail, before)
    soon = shell("resend", asked["id"], *RITA, "--json")
    assert (soon.code, soon.error["type"]) == (3, "TooManyRequests")
    assert 0 < soon.error["details"]["retry_after"] <= 30
    stranger = ("--as", "carol", "--account", "U2")
    assert "no request" in shell.bad(4, "cancel", asked["id"], *stranger)
    assert shell.json("cancel", asked["id"], *RITA)["state"] == "cancelled"
    assert "closed: cancelled" in shell.bad(5, "resend", asked["id"], *RITA)
    second = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert "is cancelled" in shell.good("cancel", second["id"], *RITA)


def test_resend_after_a_failed_mail(shell: Shell, mail: MailServer):
    """If the mail server fails, the request stays pending, and `resend` works at once."""
    with BadServer("drop") as bad:
        url = f"smtp://127.0.0.1:{bad.port}"
        lost = shell("request", "jsmith", "203.0.113.7", *RITA, "--mail", url, "--json")
    assert (lost.code, lost.error["type"]) == (8, "DeliveryError")
    before = len(mail.mails)
    sent = shell.json("resend", lost.error["details"]["request_id"], *RITA)
    applied = shell.json("confirm", sent["id"], *RITA, stdin=_number(mail, before))
    assert applied["unrestricted"] is False


@pytest.mark.slow
def test_operators_act_as_their_os_user(shell: Shell, mail: MailServer):
    """No variable of the environment changes the actor; `SUDO_USER` is recorded as a claim."""
    before = len(mail.mails)
    lying = {"USER": "eve", "LOGNAME": "eve", "HOSTNAME": "evil", "IPGUARD_ACTOR": "eve"}
    lying |= {"SUDO_USER": "bob\x1b[2J"}
    imposed = shell.json("impose", "JSmith", "203.0.113.7", "--reason", "ticket 1", env=lying)
    assert imposed["restriction"]["created_by"] == ME
    mails = mail.wait_for(before + 2)[before:]
    assert [one.recipients[0] for one in mails] == ["ops@bank.example", "jsmith@firm.example"]
    assert "ticket 1" in mails[1].part("plain")
    (row,) = [row for row in _rows(shell) if row.action == "impose"]
    assert row.actor == ME
    assert row.detail["reason"] == "ticket 1"
    via = row.detail["via"]
    assert f"command_line={ME}" in via
    assert "SUDO_USER" in via
    assert "bob" in via
    assert "eve" not in via


def test_lift_of_the_last_restriction_needs_consent(shell: Shell):
    """By an answer in a terminal, or by `--allow-open`."""
    restriction = shell.json("impose", "jsmith", "203.0.113.7", "--reason", "x")["restriction"][
        "id"
    ]
    done = shell("lift", restriction, "--reason", "x", "--json")
    assert (done.code, done.error["type"]) == (10, "NotConfirmed")
    assert "--allow-open" in done.error["hint"]
    asked = shell.terminal("lift", restriction, "--reason", "x")
    asked.sees("can log in from every address. Continue\\? \\[y/N\\] ")
    asked.types("n")
    assert "nothing was changed" in asked.ends(10)
    assert _held(shell) == ["203.0.113.7"]
    asked = shell.terminal("lift", restriction, "--reason", "x")
    asked.sees("y/N")
    asked.types("y")
    assert "from every address" in asked.ends()
    assert _held(shell) == []
    assert "no restriction" in shell.bad(4, "lift", restriction, "--reason", "x")
    again = shell.json("impose", "jsmith", "203.0.113.7", "--reason", "x")["restriction"]["id"]
    lifted = shell.json("lift", again, "--reason", "x", "--allow-open")
    assert lifted["unrestricted"] is True


@pytest.mark.slow
def test_impose_and_unlock_in_a_terminal(shell: Shell, mail: MailServer):
    """The result is green; without a permanent restriction, a temporary one needs consent."""
    log = shell.folder / "ipguard.log"
    shown = shell.terminal("impose", "zed", "2001:db8::/64", "--reason", "x", IPGUARD_LOG=str(log))
    assert "\x1b[32mdone, revision" in shown.ends()
    assert "action=impose" in log.read_text()
    assert "already has" in shell.bad(3, "impose", "zed", "2001:db8::/64", "--reason", "x")
    assert "unlocked" in shell.good("unlock", "zed", "--reason", "x")
    unlocked = shell.json("unlock", "zed", "--reason", "x")
    assert unlocked == {"username": "zed", "notices_failed": 0}
    assert _rows(shell)[0].action == "unlock"
    temporary = ("198.51.100.7", "--reason", "x", "--expires", "2099-01-01T00:00Z")
    asked = shell.terminal("impose", "jsmith", *temporary)
    asked.sees("once this one has expired, jsmith can log in from no address. Continue")
    asked.types("n")
    asked.ends(10)
    assert _held(shell) == []
    assert shell("impose", "zed", *temporary).code == 0
    assert "is not a username" in shell.bad(3, "unlock", " ", "--reason", "x")


def test_unlock_of_an_unknown_name(shell: Shell):
    """It is an error; an unregistered actor who gave wrong numbers can be unlocked."""
    before = _rows(shell)
    assert "no user 'ritta' is registered" in shell.bad(4, "unlock", "Ritta", "--reason", "x")
    refused = shell("unlock", "ritta", "--reason", "x", "--json").error
    assert (refused["type"], refused["details"]) == ("UnknownUser", {"username": "ritta"})
    assert _rows(shell) == before
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert shell("confirm", asked["id"], *RITA, stdin="12345-67890\n").code == 5
    assert shell.json("unlock", "rita", "--reason", "x")["username"] == "rita"
    assert _rows(shell)[0].detail["failures"] == "1"
    assert "no user 'rita'" in shell.bad(4, "unlock", "rita", "--reason", "x")


def test_cancel_and_resend_need_no_email_address(shell: Shell, mail: MailServer):
    """`cancel` mails nothing, and `resend` mails to the address of the first number."""
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    _number(mail, before)
    (shell.folder / "settings.toml").write_text("resend_interval = 0\n")
    shell.env |= {"IPGUARD_EMAIL": "", "IPGUARD_SETTINGS": str(shell.folder / "settings.toml")}
    nameless = [each for each in RITA if "mail" not in each and "@" not in each]
    assert shell.json("resend", asked["id"], *nameless)["state"] == "pending"
    _number(mail, before + 1)
    assert shell.json("cancel", asked["id"], *nameless)["state"] == "cancelled"
    assert "your e-mail address" in shell.bad(7, "request", "jsmith", "203.0.113.7", *nameless)


def test_a_failed_notice_is_reported(shell: Shell):
    """The change holds, and the command succeeds."""
    with BadServer("drop") as bad:
        url = f"smtp://127.0.0.1:{bad.port}"
        done = shell("impose", "jsmith", "203.0.113.7", "--reason", "x", "--mail", url)
    assert done.code == 0
    assert "done, revision" in done.out
    assert "a notice was not sent" in done.err
    assert _held(shell) == ["203.0.113.7"]


@pytest.mark.parametrize(
    ("args", "env", "code", "words"),
    [
        (["--mail", "smtp://u:hunter2@127.0.0.1"], {}, 2, "IPGUARD_MAIL"),
        ([], {"IPGUARD_MAIL": ""}, 7, "has no mail server"),
        ([], {"IPGUARD_MAIL": "ftp://x"}, 7, "smtp://"),
        ([], {"IPGUARD_MAIL_FROM": ""}, 7, "no sender"),
        ([], {"IPGUARD_MAIL_FROM": "x"}, 7, "sender"),
        ([], {"IPGUARD_EMAIL": ""}, 7, "IPGUARD_EMAIL"),
        ([], {"IPGUARD_EMAIL": "x"}, 3, "e-mail"),
        ([], {"IPGUARD_KEY_FILE": "gone"}, 7, "gone: No such file"),
        ([], {"IPGUARD_KEY_FILE": "", "IPGUARD_KEY": ""}, 7, "no key"),
        ([], {"IPGUARD_KEY_FILE": "", "IPGUARD_KEY": "short"}, 7, "32 bytes"),
        (["--as", "rita"], {}, 2, "accounts that it manages"),
        (["--account", "U1", "--every-account"], {}, 2, "exclude each other"),
        (["--account", "U2"], {}, 4, "no user"),
        (["--from", "nowhere"], {}, 3, "nowhere"),
        (["--expires", "tomorrow"], {}, 2, "with its zone"),
        (["--expires", "2027-01-01T00:00"], {}, 2, "with its zone"),
        (["--expires", "2020-01-01T00:00Z", "--allow-lockout"], {}, 3, "in the future"),
        (["--expires", "1h", "--account", "U2"], {}, 4, "no user"),
        (["--settings", "gone.toml"], {}, 7, "No such file"),
        (["--settings", "settings.toml"], {}, 7, "nonsense"),
    ],
)
def test_a_request_with_a_wrong_option_or_variable(
    shell: Shell, args, env, code, words, monkeypatch
):
    """Nothing is changed, the error says what to do, and no password is repeated."""
    (shell.folder / "settings.toml").write_text("nonsense = 1\n")
    shell.env |= env
    monkeypatch.chdir(shell.folder)
    done = shell("request", "jsmith", "203.0.113.7", *args)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert "hunter2" not in done.err
    assert len(_rows(shell)) == 1


def test_settings_from_a_file(shell: Shell, mail: MailServer):
    """Limits apply; with `confirm_deletes`, `delete` makes a request that needs its number."""
    (shell.folder / "settings.toml").write_text(
        'confirm_deletes = "last"\nnumber_lifetime = 120\nwidest_ipv4 = 24\n'
    )
    shell.env["IPGUARD_SETTINGS"] = str(shell.folder / "settings.toml")
    assert "holds more addresses" in shell.bad(
        3, "impose", "jsmith", "203.0.112.0/23", "--reason", "x"
    )
    restriction = shell.json("impose", "jsmith", "203.0.113.7", "--reason", "x")["restriction"]
    before = len(mail.mails)
    refused = shell("delete", restriction["id"], *RITA, "--json")
    assert (refused.code, refused.error["type"]) == (10, "NotConfirmed")
    asked = shell.json("delete", restriction["id"], *RITA, "--allow-open", "--reason", "moved")
    assert (asked["kind"], asked["reason"]) == ("delete", "moved")
    number = _number(mail, before)
    assert shell("confirm", asked["id"], *RITA, stdin=number).code == 10
    done = shell.json("confirm", asked["id"], *RITA, "--allow-open", stdin=number)
    assert done["unrestricted"] is True


def test_delete_at_once_and_a_lockout(shell: Shell):
    """Locking oneself out needs consent, in a terminal by an answer."""
    own = ["--as", "jsmith", "--email", "jsmith@firm.example", "--account", "U1"]
    own += ["--from", "203.0.113.7"]
    first = shell.json("impose", "jsmith", "203.0.113.7", "--reason", "x")["restriction"]["id"]
    shell.json("impose", "jsmith", "198.51.100.7", "--reason", "x")
    refused = shell("delete", first, *own, "--json")
    assert (refused.code, refused.error["type"]) == (10, "NotConfirmed")
    asked = shell.terminal("delete", first, *own)
    asked.sees("could not log in from 203.0.113.7, where you are now. Continue")
    asked.types("yes")
    asked.ends()
    assert _held(shell) == ["198.51.100.7"]
    assert "no restriction" in shell.bad(4, "delete", first, *own)


def test_mail_to_the_console(shell: Shell):
    """`--mail console` prints mails to standard error; the result stays as it is."""
    done = shell("request", "jsmith", "203.0.113.7", *RITA, "--mail", "console")
    assert done.code == 0
    assert re.search(r"^    \d{5}-\d{5}$", done.err, re.MULTILINE)
    assert "is pending" in done.out


def test_a_user_id_without_a_name(monkeypatch: pytest.MonkeyPatch):
    """The audit log then has the number."""
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert _identity.operator_name() == f"uid54321@{socket.gethostname()}"
    assert f"effective={pwd.getpwuid(os.geteuid()).pw_name}" in _identity.via()


def test_questions_reveal_nothing_hidden_from_the_actor(shell: Shell):
    """A removed user's restriction, and another account's user, do not exist for the actor."""
    held = shell.json("impose", "jsmith", "203.0.113.7", "--reason", "a test", "--email", "b@b.c")
    with _store(shell) as store:
        store.remove_users(["jsmith"])
    for args in (
        ("delete", held["restriction"]["id"], *RITA),
        ("request", "zed", "203.0.113.7", "--expires", "1h", *RITA),
    ):
        shown = shell.terminal(*args).ends(4)
        assert "203.0.113.7" not in shown
        assert "Continue?" not in shown
    assert _held(shell) == ["203.0.113.7"]
