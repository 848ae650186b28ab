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
from ipguard.cli import _context
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
    it.register(jsmith="U1", zed="U2")
    return it


def _rows(shell: Shell) -> tuple[ipguard.Change, ...]:
    with shell.store() as store:
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
    shown = asking.ends()
    (request,) = re.findall(r"request ([0-9a-f]{16}) is pending", shown)
    assert "mailed to rita@firm.example" in shown
    number, prompt = _number(mail, before), "Confirmation number: "
    wrong = shell.terminal("confirm", request, *RITA)
    assert "attempts left: 4" in wrong.answers(prompt, "00000-00000", 5)
    for text in ("49201\n", "4920l-77340\n"):
        mistyped = shell.bad(5, "confirm", request, *RITA, stdin=text)
        assert "no attempt was counted" in mistyped
    assert shell.held("jsmith") == []
    right = shell.terminal("confirm", request, *RITA).answers(prompt, number.replace("-", " "))
    assert re.search(r"done, revision \d+: jsmith 203.0.113.0/29", right)
    assert shell.held("jsmith") == ["203.0.113.0/29"]
    mails = mail.wait_for(before + 3)[before + 1 :]
    assert {one.recipients[0] for one in mails} == {"rita@firm.example", "jsmith@firm.example"}
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
        assert "`ipguard list` shows ids" in shell.error(4, *args)["hint"]
    mistyped = shell.error(4, "impose", "jsmiht", "10.0.0.5", "--reason", "x")
    assert "ipguard users list" in mistyped["hint"]


def test_the_two_phases_in_a_pipe(shell: Shell, mail: MailServer):
    """The number is read from standard input; as an argument it is refused and not repeated."""
    before = len(mail.mails)
    wanted = ("request", "jsmith", "203.0.113.7", *RITA, "--expires", "30d")
    assert "from no address" in shell.bad(10, *wanted)
    asked = shell.json(*wanted, "--allow-lockout")
    number = _number(mail, before)
    argument = shell.bad(2, "confirm", asked["id"], number, *RITA)
    assert "every user of this machine" in argument
    assert number not in argument
    assert shell.error(2, "confirm", asked["id"], *RITA)["type"] == "usage"
    wrong = shell.error(5, "confirm", asked["id"], *RITA, stdin="12345-67890\n")
    assert wrong["details"] == {"attempts_left": 4}
    # Only the requester can confirm.
    other = ("--as", "adam", "--email", "adam@firm.example", "--account", "U1")
    assert "no request" in shell.bad(4, "confirm", asked["id"], *other, stdin=number)
    applied = shell.json("confirm", asked["id"], *RITA, stdin=f"{number}\n")
    assert applied["restriction"]["addresses"] == "203.0.113.7"
    assert applied["restriction"]["expires_at"] == asked["restriction_expires_at"]
    assert applied["notices_failed"] == 0
    again = shell.error(5, "confirm", asked["id"], *RITA, stdin=number)
    assert again["details"] == {"state": "confirmed"}


def test_cancel_and_resend(shell: Shell, mail: MailServer):
    """A closed request stays closed; neither command needs an e-mail address.

    `cancel` mails nothing, and `resend` mails to the address of the first number.
    """
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    _number(mail, before)
    soon = shell.error(3, "resend", asked["id"], *RITA)
    assert soon["type"] == "TooManyRequests"
    assert 0 < soon["details"]["retry_after"] <= 30
    stranger = ("--as", "carol", "--account", "U2")
    assert "no request" in shell.bad(4, "cancel", asked["id"], *stranger)
    settings = shell.write("settings.toml", "resend_interval = 0\n")
    shell.env |= {"IPGUARD_EMAIL": "", "IPGUARD_SETTINGS": str(settings)}
    nameless = [each for each in RITA if "mail" not in each and "@" not in each]
    assert shell.json("resend", asked["id"], *nameless)["state"] == "pending"
    _number(mail, before + 1)
    assert shell.json("cancel", asked["id"], *nameless)["state"] == "cancelled"
    assert "closed: cancelled" in shell.bad(5, "resend", asked["id"], *RITA)
    assert "your e-mail address" in shell.bad(7, "request", "jsmith", "203.0.113.7", *nameless)
    second = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert "is cancelled" in shell.good("cancel", second["id"], *RITA)


def test_resend_after_a_failed_mail(shell: Shell, mail: MailServer):
    """If the mail server fails, the request stays pending, and `resend` works at once."""
    with BadServer("drop") as bad:
        url = f"smtp://127.0.0.1:{bad.port}"
        lost = shell.error(8, "request", "jsmith", "203.0.113.7", *RITA, "--mail", url)
    assert lost["type"] == "DeliveryError"
    before = len(mail.mails)
    sent = shell.json("resend", lost["details"]["request_id"], *RITA)
    applied = shell.json("confirm", sent["id"], *RITA, stdin=_number(mail, before))
    assert applied["unrestricted"] is False


@pytest.mark.slow
def test_operators_act_as_their_os_user(shell: Shell, mail: MailServer):
    """No variable of the environment changes the actor; `SUDO_USER` is recorded as a claim."""
    before = len(mail.mails)
    lying = dict.fromkeys(("USER", "LOGNAME", "HOSTNAME", "IPGUARD_ACTOR"), "eve")
    lying["SUDO_USER"] = "bob\x1b[2J"
    imposed = shell.json("impose", "JSmith", "203.0.113.7", "--reason", "ticket 1", env=lying)
    assert imposed["restriction"]["created_by"] == ME
    mails = mail.wait_for(before + 2)[before:]
    assert [one.recipients[0] for one in mails] == ["ops@bank.example", "jsmith@firm.example"]
    assert "ticket 1" in mails[1].part("plain")
    (row,) = [row for row in _rows(shell) if row.action == "impose"]
    assert row.actor == ME
    assert row.detail["reason"] == "ticket 1"
    assert re.search(rf"command_line={ME} .*SUDO_USER=.*bob", row.detail["via"])
    assert "eve" not in row.detail["via"]


def test_lift_of_the_last_restriction_needs_consent(shell: Shell):
    """By an answer in a terminal, or by `--allow-open`."""
    lift = ("lift", shell.impose("jsmith", "203.0.113.7"), "--reason", "x")
    refused = shell.error(10, *lift)
    assert refused["type"] == "NotConfirmed"
    assert "--allow-open" in refused["hint"]
    question = "could log in from every address. Continue\\? \\[y/N\\] "
    assert "nothing was changed" in shell.terminal(*lift).answers(question, "n", 10)
    assert shell.held("jsmith") == ["203.0.113.7"]
    assert "Then from anywhere" in shell.terminal(*lift).answers(question, "y")
    assert shell.held("jsmith") == []
    assert "no restriction" in shell.bad(4, *lift)
    again = shell.impose("jsmith", "203.0.113.7")
    assert shell.json("lift", again, "--reason", "x", "--allow-open")["unrestricted"] is True


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
    question = "after 2099-01-01 00:00 UTC, jsmith can log in from no address. Continue"
    shell.terminal("impose", "jsmith", *temporary).answers(question, "n", 10)
    assert shell.held("jsmith") == []
    assert shell("impose", "zed", *temporary).code == 0
    assert "is not a username" in shell.bad(3, "unlock", " ", "--reason", "x")


def test_unlock_of_an_unknown_name(shell: Shell):
    """An unknown name is an error, unless an actor of that name gave wrong numbers."""
    before = _rows(shell)
    assert "no user 'ritta' is registered" in shell.bad(4, "unlock", "Ritta", "--reason", "x")
    refused = shell.error(4, "unlock", "ritta", "--reason", "x")
    assert (refused["type"], refused["details"]) == ("UnknownUser", {"username": "ritta"})
    assert _rows(shell) == before
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert shell("confirm", asked["id"], *RITA, stdin="12345-67890\n").code == 5
    assert shell.json("unlock", "rita", "--reason", "x")["username"] == "rita"
    assert _rows(shell)[0].detail["failures"] == "1"
    assert "no user 'rita'" in shell.bad(4, "unlock", "rita", "--reason", "x")


def test_a_failed_notice_is_reported(shell: Shell):
    """The change holds, and the command succeeds."""
    with BadServer("drop") as bad:
        url = f"smtp://127.0.0.1:{bad.port}"
        done = shell("impose", "jsmith", "203.0.113.7", "--reason", "x", "--mail", url)
    assert (done.code, "done, revision" in done.out) == (0, True)
    assert "a notice was not sent" in done.err
    assert shell.held("jsmith") == ["203.0.113.7"]


@pytest.mark.parametrize(
    ("args", "env", "code", "words"),
    [
        (["--mail", "smtp://u:hunter2@127.0.0.1"], {}, 2, "IPGUARD_MAIL"),
        ([], {"IPGUARD_MAIL": ""}, 7, "has no mail server"),
        ([], {"IPGUARD_MAIL": "ftp://x"}, 7, "smtp://"),
        ([], {"IPGUARD_MAIL_FROM": ""}, 7, "no sender"),
        ([], {"IPGUARD_EMAIL": ""}, 7, "IPGUARD_EMAIL"),
        ([], {"IPGUARD_EMAIL": "x"}, 3, "e-mail"),
        ([], {"IPGUARD_KEY_FILE": "gone"}, 7, "gone: No such file"),
        ([], {"IPGUARD_KEY_FILE": "", "IPGUARD_KEY": ""}, 7, "no key"),
        (["--as", "rita"], {}, 2, "accounts that it manages"),
        (["--account", "U1", "--every-account"], {}, 2, "exclude each other"),
        (["--from", "nowhere"], {}, 3, "nowhere"),
        (["--expires", "tomorrow"], {}, 2, "with its zone"),
        (["--expires", "2027-01-01T00:00"], {}, 2, "with its zone"),
        (["--expires", "2020-01-01T00:00Z", "--allow-lockout"], {}, 3, "in the future"),
        (["--settings", "gone.toml"], {}, 7, "No such file"),
        (["--settings", "settings.toml"], {}, 7, "nonsense"),
    ],
)
def test_a_request_with_a_wrong_option(shell: Shell, args, env, code, words):
    """Nothing is changed, the error says what to do, and no password is repeated."""
    shell.write("settings.toml", "nonsense = 1\n")
    error = shell.bad(code, "request", "jsmith", "203.0.113.7", *args, env=env)
    assert words in error
    assert "hunter2" not in error
    assert len(_rows(shell)) == 1


def test_settings_from_a_file(shell: Shell, mail: MailServer):
    """Limits apply; with `confirm_deletes`, `delete` makes a request that needs its number."""
    text = 'confirm_deletes = "last"\nnumber_lifetime = 120\nwidest_ipv4 = 24\n'
    shell.env["IPGUARD_SETTINGS"] = str(shell.write("settings.toml", text))
    wide = shell.bad(3, "impose", "jsmith", "203.0.112.0/23", "--reason", "x")
    assert "holds more addresses" in wide
    delete = ("delete", shell.impose("jsmith", "203.0.113.7"), *RITA)
    before = len(mail.mails)
    asked = shell.json(*delete, "--reason", "moved")
    assert (asked["kind"], asked["reason"]) == ("delete", "moved")
    number = _number(mail, before)
    assert shell("confirm", asked["id"], *RITA, stdin=number).code == 10
    done = shell.json("confirm", asked["id"], *RITA, "--allow-open", stdin=number)
    assert done["unrestricted"] is True


def test_delete_at_once_and_a_lockout(shell: Shell):
    """Locking oneself out needs consent, in a terminal by an answer."""
    own = ("--as", "jsmith", "--email", "jsmith@firm.example", "--account", "U1")
    delete = ("delete", shell.impose("jsmith", "203.0.113.7"), *own, "--from", "203.0.113.7")
    shell.impose("jsmith", "198.51.100.7")
    assert shell.error(10, *delete)["type"] == "NotConfirmed"
    question = "could not log in from 203.0.113.7, where you are now. Continue"
    shell.terminal(*delete).answers(question, "yes")
    assert shell.held("jsmith") == ["198.51.100.7"]
    assert "no restriction" in shell.bad(4, *delete)


def test_a_user_id_without_a_name(monkeypatch: pytest.MonkeyPatch):
    """The audit log then has the number."""
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert _context.operator_name() == f"uid54321@{socket.gethostname()}"
    assert f"effective={pwd.getpwuid(os.geteuid()).pw_name}" in _context.via()


def test_questions_reveal_nothing_hidden_from_the_actor(shell: Shell):
    """A removed user's restriction, and another account's user, do not exist for the actor."""
    held = shell.impose("jsmith", "203.0.113.7")
    with shell.store() as store:
        store.remove_users(["jsmith"])
    for args in (
        ("delete", held, *RITA),
        ("request", "zed", "203.0.113.7", "--expires", "1h", *RITA),
    ):
        shown = shell.terminal(*args).ends(4)
        assert "203.0.113.7" not in shown
        assert "Continue?" not in shown
    assert shell.held("jsmith") == ["203.0.113.7"]


def test_the_actor_in_the_environment(shell: Shell):
    """Variables set the actor and several accounts; options override them."""
    rita = {"IPGUARD_ACTOR": "rita", "IPGUARD_ACCOUNTS": "U9 U1", "IPGUARD_EMAIL": "r@firm.example"}
    request = ("request", "jsmith", "203.0.113.7")
    assert "no user" in shell.bad(4, *request, "--account", "U2", env=rita)
    assert shell.json(*request, env=rita)["requested_by"] == "rita"
    other = shell.json("request", "jsmith", "203.0.113.8", "--as", "adam", env=rita)
    assert other["requested_by"] == "adam"


# -- changes of several restrictions, and their demands ----------------------------------------

ANNA = ("--as", "anna", "--email", "anna@firm.example", "--account", "U1")


def _settings(shell: Shell, text: str) -> None:
    shell.env["IPGUARD_SETTINGS"] = str(shell.write("settings.toml", text))


def test_one_request_adds_several_and_replaces(shell: Shell, mail: MailServer):
    """All of it holds in one revision, and each step says what will hold afterwards."""
    old, before = shell.impose("jsmith", "203.0.113.7"), len(mail.mails)
    change = ("jsmith", "198.51.100.7", "198.51.100.8", "--replaces", old)
    seen = shell.json("preview", *change, *RITA)
    assert seen["direction"] == "loosens"
    assert (seen["gained"], seen["lost"]) == (["198.51.100.7-198.51.100.8"], ["203.0.113.7"])
    afterwards = "Then also from 198.51.100.7-198.51.100.8; no longer from 203.0.113.7."
    assert (seen["summary"], seen["ends"]) == (afterwards, None)
    assert shell.good("preview", *change, *RITA).splitlines()[1].split("\t") == [
        "loosens", "198.51.100.7-198.51.100.8", "203.0.113.7", afterwards,
    ]  # fmt: skip
    asked = shell.json("request", *change, *RITA, "--label", "office", "--reason", "moved")
    assert (asked["kind"], asked["reason"], asked["label"]) == ("replace", "moved", "office")
    assert (asked["adds"], asked["removed"]) == (["198.51.100.7", "198.51.100.8"], ["203.0.113.7"])
    assert asked["impact"] == seen
    assert asked["demand"] == {"number": True, "approvals": 0, "wait": 0}
    listed = shell.json("list", "jsmith")["users"][0]["pending"][0]
    assert (listed["impact"], listed["removes"]) == (seen, [old])
    number = _number(mail, before)
    done = shell.good("confirm", asked["id"], *RITA, stdin=number)
    assert re.findall(r"done, revision (\d+): jsmith (\S+)", done) == [
        (done.split()[2].strip(":"), each) for each in ("198.51.100.7", "198.51.100.8")
    ]
    assert done.endswith(f"{afterwards}\n")
    assert shell.held("jsmith") == ["198.51.100.7", "198.51.100.8"]


def test_a_request_that_only_ends_restrictions(shell: Shell):
    """If nothing is demanded, it holds at once; the last one needs consent."""
    first, second = shell.impose("jsmith", "203.0.113.7"), shell.impose("jsmith", "203.0.113.8")
    ends = ("request", "jsmith", "--replaces", first)
    assert shell.json(*ends, *RITA)["state"] == "confirmed"
    assert shell.held("jsmith") == ["203.0.113.8"]
    ends = ("request", "jsmith", "--replaces", second)
    assert "every address" in shell.bad(10, *ends, *RITA)
    opened = shell.good(*ends, "--allow-open", *RITA)
    assert re.search(r"is confirmed, revision \d+: delete 203.0.113.8 for jsmith", opened)
    assert "Then from anywhere: no restriction is left." in opened
    assert "it names no address" in shell.bad(3, "request", "jsmith", *RITA)


def test_another_label_or_expiry_is_edited(shell: Shell, mail: MailServer):
    """The refusal hints at --replaces, which edits it."""
    held = shell.impose("jsmith", "203.0.113.7")
    wanted = ("request", "jsmith", "203.0.113.7", "--label", "office", *RITA)
    assert "--replaces" in shell.error(3, *wanted)["hint"]
    before = len(mail.mails)
    asked = shell.json(*wanted, "--replaces", held)
    done = shell.json("confirm", asked["id"], *RITA, stdin=_number(mail, before))
    assert done["impact"]["direction"] == "neutral"
    assert (done["restriction"]["label"], shell.held("jsmith")) == ("office", ["203.0.113.7"])


def test_several_users_share_a_number(shell: Shell, mail: MailServer):
    shell.register(jsmith="U1", mlee="U1")
    before = len(mail.mails)
    wanted = ("request", "jsmith", "203.0.113.7", "203.0.113.8", "--also", "mlee", *RITA)
    first, second = shell.json(*wanted)["requests"]
    assert (first["username"], second["username"]) == ("jsmith", "mlee")
    assert first["batch"] == second["batch"] == first["id"]
    done = shell.json("confirm", first["id"], *RITA, stdin=_number(mail, before))
    added = [(each["username"], each["addresses"]) for each in done["added"]]
    both = ("203.0.113.7", "203.0.113.8")
    assert added == [(name, each) for name in ("jsmith", "mlee") for each in both]
    assert shell.held("mlee") == list(both)
    assert "exclude each other" in shell.bad(2, *wanted, "--replaces", "x")
    before = len(mail.mails)
    lines = shell.good("request", "mlee", "203.0.113.9", "--also", "jsmith", *RITA).splitlines()
    assert [line.split(": ", 1)[1] for line in lines[::2][:2]] == [
        "add 203.0.113.9 for mlee", "add 203.0.113.9 for jsmith",
    ]  # fmt: skip
    shown = shell.good("confirm", lines[0].split()[1], *RITA, stdin=_number(mail, before))
    assert shown.count("done, revision") == 2
    assert shown.endswith("Then also from 203.0.113.9.\n")


def test_impose_only(shell: Shell):
    """All other restrictions end in the same change."""
    shell.impose("jsmith", "203.0.113.7")
    only = ("impose", "jsmith", "198.51.100.7", "198.51.100.8", "--only", "--reason", "stolen")
    done = shell.json(*only)
    assert [each["addresses"] for each in done["removed"]] == ["203.0.113.7"]
    assert done["impact"]["lost"] == ["203.0.113.7"]
    assert shell.held("jsmith") == ["198.51.100.7", "198.51.100.8"]
    seen = shell.json("preview", "jsmith", "203.0.113.7", "--only")
    assert seen["lost"] == ["198.51.100.7-198.51.100.8"]


def test_an_approval_completes_a_request(shell: Shell, mail: MailServer):
    """The requester cannot give it; `confirm` reports what is missing."""
    _settings(shell, "[loosens]\napprovals = 1\n")
    shell.impose("jsmith", "203.0.113.7")
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "198.51.100.7", *RITA)
    assert asked["demand"] == {"number": True, "approvals": 1, "wait": 0}
    _, told = mail.wait_for(before + 2)[before:]  # the number comes first
    assert told.recipients == ("jsmith@firm.example",)
    number = _number(mail, before)
    waiting = shell.json("confirm", asked["id"], *RITA, stdin=number)
    assert (waiting["state"], waiting["numbered"], waiting["approvals"]) == ("pending", True, [])
    again = shell.good("confirm", asked["id"], *RITA)
    assert "has 0 of 1 approvals, its number was accepted; somebody else: ipguard appr" in again
    refused = shell.error(3, "approve", asked["id"], *RITA)
    assert (refused["type"], refused["message"]) == (
        "NotAnApprover", "you cannot approve this request: you made it",
    )  # fmt: skip
    (waits,) = shell.json("waiting", *ANNA)["requests"]
    assert (waits["id"], waits["username"]) == (asked["id"], "jsmith")
    cells = shell.good("waiting", *ANNA).splitlines()[1].split("\t")
    assert cells[1:4] == ["jsmith", "add 198.51.100.7", "rita"]
    assert cells[4:] == [
        "Then also from 198.51.100.7.", "has 0 of 1 approvals, its number was accepted",
    ]  # fmt: skip
    shown = shell.terminal("list", "jsmith").ends()
    assert "asked for by rita, has 0 of 1 approvals, its number was accepted" in " ".join(
        shown.split()
    )
    assert "your e-mail address" in shell.bad(7, "approve", asked["id"], env={"IPGUARD_EMAIL": ""})
    done = shell.json("approve", asked["id"], *ANNA)
    assert done["restriction"]["addresses"] == "198.51.100.7"
    assert "no request waits for you" in shell("waiting", *ANNA).err
    newest = shell.json("history", "--limit", "4")["changes"]
    actions = ["confirm", "approve", "number_accepted", "request"]
    assert [each["action"] for each in newest] == actions
    detail = newest[0]["detail"]
    assert (detail["direction"], detail["gained"]) == ("loosens", "198.51.100.7")
    shown = shell.terminal("history", "--limit", "1").ends()
    assert "direction=loosens" in shown
    assert "gained=" not in shown, "afterwards says it"
    assert 'afterwards="Then also from 198.51.100.7."' in " ".join(shown.split())
    assert "gained=198.51.100.7" in shell("history", "--limit", "1").out
    assert shell.error(5, "approve", asked["id"], *ANNA)["details"] == {"state": "confirmed"}


def test_an_approval_that_opens_needs_consent(shell: Shell):
    """In a terminal by an answer."""
    _settings(shell, "[opens]\napprovals = 1\n")
    asked = shell.json("delete", shell.impose("jsmith", "203.0.113.7"), *RITA)
    approve = ("approve", asked["id"], *ANNA)
    assert shell.error(10, *approve)["type"] == "NotConfirmed"
    question = "Then from anywhere: no restriction is left. Continue"
    shell.terminal(*approve).answers(question, "n", 10)
    assert shell.held("jsmith") == ["203.0.113.7"]
    assert shell.json(*approve, "--allow-open")["unrestricted"] is True


def test_an_approval_before_the_number(shell: Shell):
    _settings(shell, "[add]\nnumber = true\napprovals = 2\n")
    asked = shell.json("request", "jsmith", "198.51.100.7", *RITA)
    assert "has 1 of 2 approvals, needs its number" in shell.good("approve", asked["id"], *ANNA)
    assert shell.json("approve", asked["id"], *ANNA)["approvals"] == ["anna"]


def test_a_request_that_waits(shell: Shell):
    """`confirm` does not ask for a number during the wait, or if none is demanded."""
    _settings(shell, "[add]\nwait = 3600\n[loosens]\nnumber = true\n")
    asked = shell.good("request", "jsmith", "203.0.113.7", *RITA)
    assert re.search(r"It waits until .* UTC; then ipguard confirm (\w+)", asked)
    request = asked.split()[1]
    soon = shell.error(3, "confirm", request, *RITA)
    assert (soon["type"], list(soon["details"])) == ("TooSoon", ["ready_at"])
    _settings(shell, "[add]\nnumber = true\n")
    shell.impose("zed", "203.0.113.7")
    asked = shell.json("request", "zed", "203.0.113.8")
    _settings(shell, "[add]\nwait = 3600\nnumber = true\n")
    soon = shell.error(3, "confirm", asked["id"])
    assert "`ipguard resend`" in soon["hint"]
    waits = shell.good("request", "zed", "203.0.113.9")
    assert "needs its number; then ipguard resend" in waits


def test_a_failed_notice_of_a_request_is_reported(shell: Shell):
    """The user could not be told that a request waits; it is pending nevertheless."""
    _settings(shell, "[add]\nwait = 3600\n")
    with BadServer("drop") as bad:
        mail = ("--mail", f"smtp://127.0.0.1:{bad.port}")
        done = shell("request", "jsmith", "203.0.113.7", *RITA, *mail)
    assert (done.code, "is pending" in done.out) == (0, True)
    assert "a notice was not sent" in done.err


def test_a_request_without_a_demanded_number(shell: Shell):
    """`confirm` asks for none; a number that stricter settings demand is mailed by `resend`."""
    _settings(shell, "[add]\napprovals = 1\n")
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert shell.json("confirm", asked["id"], *RITA)["numbered"] is False
    assert shell.json("approve", asked["id"], *ANNA)["restriction"]["addresses"] == "203.0.113.7"


def test_a_change_that_would_do_worse(shell: Shell, mail: MailServer):
    """Nothing changes, and the directions are words."""
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    number = _number(mail, before)
    shell.impose("jsmith", "198.51.100.7")
    changed = shell.error(3, "confirm", asked["id"], *RITA, stdin=number)
    directions = {"requested": "tightens", "now": "loosens", "username": "jsmith"}
    assert (changed["type"], changed["details"]) == ("DirectionChanged", directions)
    assert "`ipguard cancel`" in changed["hint"]
    assert shell.held("jsmith") == ["198.51.100.7"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[opens]\nnumbers = true\n", "opens.numbers: is unknown"),
        ("[opens]\napprovals = 99\n", "approvals"),
        ('[opens]\nwait = "1h"\n', "wait"),
        ("opens = 1\n", "must be a Demand"),
    ],
)
def test_a_wrong_demand_in_the_settings(shell: Shell, text: str, words: str):
    _settings(shell, text)
    assert words in shell.bad(7, "request", "jsmith", "203.0.113.7", *RITA)


def test_the_first_number_of_a_request_that_waited(shell: Shell, mail: MailServer):
    """`resend` mails it once the wait is over, to the requester alone."""
    _settings(shell, "[add]\nwait = 0.001\nnumber = true\n")
    before = len(mail.mails)
    asked = shell.json("request", "jsmith", "203.0.113.7", *RITA)
    assert asked["demand"] == {"number": True, "approvals": 0, "wait": 0.001}
    (told,) = mail.wait_for(before + 1)[before:]
    assert told.recipients == ("jsmith@firm.example",)
    assert "it, and so may everybody who manages" in " ".join(told.part("plain").split())
    assert "`ipguard resend`" in shell.error(5, "confirm", asked["id"], *RITA, stdin="1\n")["hint"]
    sent = shell.good("resend", asked["id"], *RITA)
    assert "It needs its number\n" in sent
    assert "A number was mailed to the address recorded at the request" in sent
    number = _number(mail, before + 1)
    assert shell.json("confirm", asked["id"], *RITA, stdin=number)["notices_failed"] == 0
    assert shell.held("jsmith") == ["203.0.113.7"]


def test_sixty_users_get_the_same_two_addresses_with_one_number(shell: Shell, mail: MailServer):
    """One mail to the requester for the request, and one for the change."""
    names = [f"trader{number:02}" for number in range(60)]
    shell.register(**dict.fromkeys(names, "U1"))
    before = len(mail.mails)
    also = [text for name in names[1:] for text in ("--also", name)]
    both = ("203.0.113.7", "203.0.113.8")
    asked = shell.json("request", names[0], *both, *also, *RITA)["requests"]
    assert [each["username"] for each in asked] == names
    number = _number(mail, before)
    facts = mail.mails[before].part("plain")
    assert f"Users:{' ' * 14}{', '.join(names)}" in facts.replace("\n", " ")
    done = shell.json("confirm", asked[0]["id"], *RITA, stdin=number)
    assert len(done["added"]) == 120
    assert {tuple(shell.held(name)) for name in names} == {both}
    told = [each.recipients[0] for each in mail.wait_for(before + 62)[before:]]
    wanted = ["rita@firm.example"] * 2 + [f"{name}@firm.example" for name in names]
    assert sorted(told) == sorted(wanted)
