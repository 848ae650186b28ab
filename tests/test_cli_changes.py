"""The command line as a process: the two phases and what operators do, with real mail."""

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
    """A store with two users, a key, and a mail server."""
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
    """Return the number of the first mail after so many."""
    (*_, found) = mail.wait_for(before + 1)[: before + 1]
    assert found.recipients == ("rita@firm.example",)
    (number,) = re.findall(r"^ +(\d{5}-\d{5})$", found.part("plain"), re.MULTILINE)
    return str(number)


def test_the_two_phases_in_a_terminal(shell: Shell, mail: MailServer):
    """Request, a wrong number, the right one: typed in, told in mails, and never shown again."""
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


def test_a_request_that_is_not_there_asks_for_no_number(shell: Shell):
    """Nor does another's: it is the workflow that says whose a request is."""
    terminal = shell.terminal("confirm", "nothing", *RITA)
    shown = terminal.ends(4)
    assert "no request 'nothing'" in shown
    assert "Confirmation number" not in shown
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    shown = shell.terminal("confirm", asked["id"]).ends(4)  # the operator did not ask for it
    assert f"no request '{asked['id']}'" in shown
    assert "Confirmation number" not in shown
    assert "no request" in shell.bad(4, "confirm", "nothing", *RITA)


def test_an_id_that_is_none_says_where_ids_are(shell: Shell):
    """Most often an address or a name was given for it."""
    for args in (
        ("lift", "10.0.0.5", "--reason", "x"),
        ("delete", "10.0.0.5", *RITA),
        ("cancel", "10.0.0.5", *RITA),
        ("resend", "10.0.0.5", *RITA),
    ):
        told = shell(*args, "--json")
        assert told.code == 4
        assert "ipguard list" in told.error["hint"]
        assert "--json" in told.error["hint"]
    told = shell("impose", "jsmiht", "10.0.0.5", "--reason", "x", "--json")
    assert "ipguard users list" in told.error["hint"]


def test_the_two_phases_piped(shell: Shell, mail: MailServer):
    """The same for programs; the number is read from standard input and never an argument."""
    before = len(mail.mails)
    wanted = ("request", "jsmith", "203.0.113.7", *RITA, "--expires", "30d")
    assert "from nowhere" in shell.bad(10, *wanted)
    asked = shell.json(*wanted, "--allow-lockout")
    number = _number(mail, before)
    said = shell("confirm", asked["id"], number, *RITA)
    assert (said.code, said.out) == (2, "")
    assert "everybody on this machine" in said.err
    assert number not in said.err
    nothing = shell("confirm", asked["id"], *RITA, "--json")
    assert (nothing.code, nothing.error["type"]) == (2, "usage")
    wrong = shell("confirm", asked["id"], *RITA, "--json", stdin="12345-67890\n")
    assert (wrong.code, wrong.error["details"]) == (5, {"attempts_left": 4})
    # Only who asked may confirm.
    other = ("--as", "adam", "--email", "adam@firm.example", "--account", "U1")
    assert "no request" in shell.bad(4, "confirm", asked["id"], *other, stdin=number)
    applied = shell.json("confirm", asked["id"], *RITA, stdin=f"{number}\n")
    assert applied["restriction"]["addresses"] == "203.0.113.7"
    assert applied["restriction"]["expires_at"] == asked["restriction_expires_at"]
    assert applied["notices_failed"] == 0
    again = shell("confirm", asked["id"], *RITA, "--json", stdin=number)
    assert (again.code, again.error["details"]) == (5, {"state": "confirmed"})


def test_cancel_and_resend(shell: Shell, mail: MailServer):
    """By whom it may be, in a terminal and piped; what is closed stays closed."""
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    _number(mail, before)
    soon = shell("resend", asked["id"], *RITA, "--json")
    assert (soon.code, soon.error["type"]) == (3, "TooManyRequests")
    assert 0 < soon.error["details"]["retry_after"] <= 30
    refused = shell.terminal("resend", asked["id"], *RITA)
    assert "too many requests" in refused.ends(3)
    stranger = ("--as", "carol", "--account", "U2")
    assert "no request" in shell.bad(4, "cancel", asked["id"], *stranger)
    assert "is cancelled" in shell.terminal("cancel", asked["id"], *RITA).ends()
    assert "closed: cancelled" in shell.bad(5, "resend", asked["id"], *RITA)
    second = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert shell.json("cancel", second["id"], *RITA)["state"] == "cancelled"


def test_a_number_that_was_not_mailed_can_be_had_again(shell: Shell, mail: MailServer):
    """A mail server that fails: the request waits, and `resend` works at once."""
    with BadServer("drop") as bad:
        url = f"smtp://127.0.0.1:{bad.port}"
        lost = shell("request", "jsmith", "203.0.113.7", *RITA, "--mail", url, "--json")
    assert (lost.code, lost.error["type"]) == (8, "DeliveryError")
    before = len(mail.mails)
    sent = shell.json("resend", lost.error["details"]["request_id"], *RITA)
    applied = shell.json("confirm", sent["id"], *RITA, stdin=_number(mail, before))
    assert applied["unrestricted"] is False


@pytest.mark.slow
def test_operators_act_as_identity_they_are(shell: Shell, mail: MailServer, tmp_path: Path):
    """`impose`, `lift` and `unlock`: the OS user and host, whatever the environment says."""
    before = len(mail.mails)
    lying = {"USER": "eve", "LOGNAME": "eve", "HOSTNAME": "evil", "IPGUARD_ACTOR": "eve"}
    lying |= {"SUDO_USER": "bob\x1b[2J"}
    imposed = shell.json("impose", "JSmith", "203.0.113.7", "--reason", "ticket 1", env=lying)
    assert imposed["restriction"]["created_by"] == ME
    told = mail.wait_for(before + 2)[before:]
    assert [one.recipients[0] for one in told] == ["ops@bank.example", "jsmith@firm.example"]
    assert "ticket 1" in told[1].part("plain")
    (row,) = [row for row in _rows(shell) if row.action == "impose"]
    assert row.actor == ME
    assert row.detail["reason"] == "ticket 1"
    via = row.detail["via"]
    assert f"command_line={ME}" in via
    assert "SUDO_USER" in via
    assert "bob" in via
    assert "eve" not in via
    # A last restriction: somebody has to say that this is wanted.
    restriction = imposed["restriction"]["id"]
    done = shell("lift", restriction, "--reason", "x", "--json")
    assert (done.code, done.error["type"]) == (10, "NotConfirmed")
    assert "--allow-open" in done.error["hint"]
    asked = shell.terminal("lift", restriction, "--reason", "x")
    asked.sees("can log in from every address. Go on\\? \\[y/N\\] ")
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
    """What was done in green; what is wrong in a line."""
    log = shell.folder / "ipguard.log"
    shown = shell.terminal("impose", "zed", "2001:db8::/64", "--reason", "x", IPGUARD_LOG=str(log))
    assert "\x1b[32mdone, revision" in shown.ends()
    assert "action=impose" in log.read_text()
    assert "already has" in shell.terminal("impose", "zed", "2001:db8::/64", "--reason", "x").ends(
        3
    )
    assert "unlocked" in shell.terminal("unlock", "zed", "--reason", "x").ends()
    assert shell.json("unlock", "zed", "--reason", "x") == {
        "username": "zed",
        "notices_failed": 0,
    }
    assert _rows(shell)[0].action == "unlock"
    # For jsmith nothing lasts; for zed something does.
    temporary = ("198.51.100.7", "--reason", "x", "--expires", "2099-01-01T00:00Z")
    asked = shell.terminal("impose", "jsmith", *temporary)
    asked.sees("once this has ended, jsmith can log in from nowhere. Go on")
    asked.types("n")
    asked.ends(10)
    assert _held(shell) == []
    assert shell.within("impose", "zed", *temporary).code == 0
    assert "is not a username" in shell.bad(3, "unlock", " ", "--reason", "x")


def test_unlock_of_nobody(shell: Shell, mail: MailServer):
    """A typing error unlocks nobody and says so; who gave wrong numbers need not be registered."""
    before = _rows(shell)
    assert "no user 'ritta'" in shell.bad(4, "unlock", "Ritta", "--reason", "x")
    refused = shell("unlock", "ritta", "--reason", "x", "--json").error
    assert (refused["type"], refused["details"]) == ("UnknownUser", {"username": "ritta"})
    assert _rows(shell) == before
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert shell("confirm", asked["id"], *RITA, stdin="12345-67890\n").code == 5
    assert shell.json("unlock", "rita", "--reason", "x")["username"] == "rita"
    assert _rows(shell)[0].detail["failures"] == "1"
    assert "no user 'rita'" in shell.bad(4, "unlock", "rita", "--reason", "x")


def test_what_is_mailed_to_nobody_needs_no_address(shell: Shell, mail: MailServer):
    """`cancel` tells nobody, and a new number goes to where the first one went."""
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    _number(mail, before)
    (shell.folder / "settings.toml").write_text("resend_interval = 0\n")
    shell.env |= {
        "IPGUARD_EMAIL": "",
        "IPGUARD_SETTINGS": str(shell.folder / "settings.toml"),
    }
    nameless = [each for each in RITA if "mail" not in each and "@" not in each]
    assert shell.json("resend", asked["id"], *nameless)["state"] == "pending"
    _number(mail, before + 1)
    assert shell.json("cancel", asked["id"], *nameless)["state"] == "cancelled"
    assert "your address is needed" in shell.bad(7, "request", "jsmith", "203.0.113.7", *nameless)


def test_a_notice_that_fails_is_told(shell: Shell):
    """The change holds; its notices were not sent, and the command says so and succeeds."""
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
        ([], {"IPGUARD_MAIL": ""}, 7, "no mail server is named"),
        ([], {"IPGUARD_MAIL": "ftp://x"}, 7, "smtp://"),
        ([], {"IPGUARD_MAIL_FROM": ""}, 7, "no sender"),
        ([], {"IPGUARD_MAIL_FROM": "x"}, 7, "sender"),
        ([], {"IPGUARD_EMAIL": ""}, 7, "IPGUARD_EMAIL"),
        ([], {"IPGUARD_EMAIL": "x"}, 3, "e-mail"),
        ([], {"IPGUARD_KEY_FILE": "gone"}, 7, "gone: No such file"),
        ([], {"IPGUARD_KEY_FILE": "", "IPGUARD_KEY": ""}, 7, "no key"),
        ([], {"IPGUARD_KEY_FILE": "", "IPGUARD_KEY": "short"}, 7, "32 bytes"),
        (["--as", "rita"], {}, 2, "what it manages"),
        (["--account", "U1", "--every-account"], {}, 2, "contradict"),
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
def test_what_a_request_needs(shell: Shell, args, env, code, words, monkeypatch):
    """Without it nothing is changed, and the line says what to do; no password is repeated."""
    (shell.folder / "settings.toml").write_text("nonsense = 1\n")
    shell.env |= env
    monkeypatch.chdir(shell.folder)
    done = shell.within("request", "jsmith", "203.0.113.7", *args)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert "hunter2" not in done.err
    assert len(_rows(shell)) == 1


def test_the_settings_are_the_hosts(shell: Shell, mail: MailServer):
    """With `confirm_deletes`, deleting makes a request; the number ends the restriction."""
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
    """Who would keep itself out is asked; the explicit option does it where nobody can be asked."""
    own = ["--as", "jsmith", "--email", "jsmith@firm.example", "--account", "U1"]
    own += ["--from", "203.0.113.7"]
    first = shell.json("impose", "jsmith", "203.0.113.7", "--reason", "x")["restriction"]["id"]
    shell.json("impose", "jsmith", "198.51.100.7", "--reason", "x")
    refused = shell("delete", first, *own, "--json")
    assert (refused.code, refused.error["type"]) == (10, "NotConfirmed")
    asked = shell.terminal("delete", first, *own)
    asked.sees("could not log in from 203.0.113.7, where you are now. Go on")
    asked.types("yes")
    asked.ends()
    assert _held(shell) == ["198.51.100.7"]
    assert "no restriction" in shell.bad(4, "delete", first, *own)


def test_console_is_an_explicit_choice(shell: Shell):
    """`--mail console` prints the mails beside the result, which stays what it is."""
    done = shell("request", "jsmith", "203.0.113.7", *RITA, "--mail", "console")
    assert done.code == 0
    assert re.search(r"^    \d{5}-\d{5}$", done.err, re.MULTILINE)
    assert "is pending" in done.out


def test_identity_runs_a_process_without_a_name(monkeypatch: pytest.MonkeyPatch):
    """A user id that the system has no name for is a name too."""
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert _identity.operator_name() == f"uid54321@{socket.gethostname()}"
    assert f"effective={pwd.getpwuid(os.geteuid()).pw_name}" in _identity.via()


def test_what_an_actor_may_not_see_is_not_shown_in_a_question(shell: Shell):
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
        assert "Go on?" not in shown
    assert _held(shell) == ["203.0.113.7"]
