"""Mail over SMTP: content, failures, time limits and secrets, with real servers."""

import base64
import io
import logging
import pickle
import re
import smtplib
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard.addresses import AddressRange, AddressSet
from ipguard.audit import decode
from ipguard.errors import DeliveryError, InvalidValue, IPGuardError
from ipguard.mail import ConsoleNotifier, EmailNotifier
from ipguard.mail._messages import notices, number_message, refusal_message
from ipguard.mail._smtp import Connection, _literal
from ipguard.model import (
    Action,
    Actor,
    Applied,
    Change,
    Demand,
    Direction,
    Impact,
    PendingRequest,
    RequestKind,
    RequestState,
    Sighting,
    User,
)
from ipguard.stores import open_store
from ipguard.testing import FakeClock
from ipguard.workflow import Workflow
from tests.smtp_server import BadServer, Mail, MailServer

NUMBER = "49201-77340"
SENDER = "no-reply@bank.example"
NOW = datetime(2026, 11, 21, 13, 55, 2, tzinfo=UTC)
AGES = 60.0  # reached only if a time limit does not work

ALICE = Actor(
    username="alice", email="alice@example.com", manages=Actor.EVERY_ACCOUNT, address="198.51.100.4"
)
JSMITH = User(
    username="jsmith", full_name="John Smith", account_id="U1", email="jsmith@example.net"
)
REQUEST = PendingRequest(
    id="r1",
    username="jsmith",
    kind=RequestKind.ADD,
    adds=(AddressRange.parse("203.0.113.7"),),
    label="head office",
    requested_by="alice",
    requested_at=NOW,
    expires_at=NOW + timedelta(hours=24),
    number_expires_at=NOW + timedelta(minutes=10),
    attempts_left=5,
    state=RequestState.PENDING,
)
CHANGE = Change(
    revision=7,
    at=NOW,
    actor="alice",
    actor_address="198.51.100.4",
    action=Action.CONFIRM,
    username="jsmith",
    detail={"addresses": "203.0.113.7", "label": "head office", "restriction": "ab12"},
)


def notifier(server, **settings) -> EmailNotifier:
    settings = {"sender": SENDER, "tls": getattr(server, "client_tls", None), **settings}
    url = settings.pop("url", None) or server.url
    return EmailNotifier(url, **settings)


def connected(server: MailServer) -> Connection:
    return Connection(server.host, server.port, helo=None, timeout=9, deadline=9, tls=None)


class Page(HTMLParser):
    """What a mail client shows of the HTML part."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.cells: dict[str, str] = {}
        self.shown = ""
        self._in = ""
        self._name = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "th":
            self._name = ""
        if tag == "td":
            self.cells[self._name] = ""

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        self.shown += data
        if self._in == "th":
            self._name += data
        if self._in == "td":
            self.cells[self._name] += data


def text_facts(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\w.*?): +(.*)$", text, re.MULTILINE))


def html_facts(mail: Mail | str) -> dict[str, str]:
    return Page(mail if isinstance(mail, str) else mail.part("html")).cells


def delivery_error(send) -> DeliveryError:
    """Return the DeliveryError of a call, which must not take as long as AGES."""
    began = time.monotonic()
    with pytest.raises(DeliveryError) as caught:
        send()
    assert time.monotonic() - began < AGES / 2
    return caught.value


def refusal(mailer: EmailNotifier) -> DeliveryError:
    """Return the error of a mail with a number."""
    return delivery_error(lambda: mailer.number_issued(REQUEST, NUMBER, ALICE))


# ------------------------------------------------------------------ the mail with the number


@pytest.mark.parametrize("security", ["plain", "starttls", "tls"])
@pytest.mark.parametrize("login", [None, ("bank", "p:a/s@s %41?#")])
def test_number_arrives(security, login):
    with MailServer(security, login=login) as server:
        notifier(server).number_issued(REQUEST, NUMBER, ALICE)
        (mail,) = server.wait_for(1)
    assert (mail.sender, mail.recipients) == (SENDER, ("alice@example.com",))
    assert mail.encrypted is (security != "plain")
    assert mail.user == (login and login[0])
    message = mail.message
    assert message["To"] == "alice@example.com"
    assert message["From"] == SENDER
    assert message["Subject"] == "Confirmation number to add login addresses"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Message-ID"].endswith("@bank.example>")
    sent = parsedate_to_datetime(message["Date"])
    assert abs(datetime.now(UTC) - sent) < timedelta(minutes=5)
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert not message.defects
    assert not any(part.defects for part in message.walk())
    head = mail.raw.partition(b"\r\n\r\n")[0].decode()
    assert NUMBER not in head
    assert NUMBER.replace("-", "") not in head


def test_number_mail_shows_what_is_confirmed():
    """Both parts show the number and all details of the change, and warn not to pass it on."""
    with MailServer() as server:
        notifier(server, product="Example Trading").number_issued(REQUEST, NUMBER, ALICE)
        (mail,) = server.wait_for(1)
    text, page = mail.part("plain"), Page(mail.part("html"))
    assert f"\n    {NUMBER}\n" in text
    assert NUMBER in page.shown
    facts = {
        "Change": "add these addresses",
        "User": "jsmith",
        "Addresses": "203.0.113.7",
        "Label": "head office",
        "Asked for by": "alice",
        "From address": "198.51.100.4",
        "Asked for at": "2026-11-21 13:55:02 UTC",
        "Number valid until": "2026-11-21 14:05:02 UTC",
    }
    assert text_facts(text) == facts
    assert page.cells == facts
    for shown in (" ".join(text.split()), " ".join(page.shown.split())):
        assert "You asked Example Trading to change" in shown
        assert "type this number in on the page where you asked for it" in shown
        assert "Nobody who works for Example Trading will ever ask you for it" in shown
        assert "Do not pass it on" in shown
        assert "If you did not ask for this change" in shown
        assert "tell your administrator at once" in shown


def test_number_mail_of_a_deletion():
    """A deletion is named as one, and the size of a range is shown."""
    request = attrs.evolve(
        REQUEST,
        kind=RequestKind.DELETE,
        adds=(),
        removed=(AddressRange.parse("2001:db8::/64"),),
        label="",
        reason="left the firm",
        restriction_expires_at=NOW + timedelta(days=1),
    )
    message = number_message(request, NUMBER, attrs.evolve(ALICE, address=None), "the bank")
    assert message.subject == "Confirmation number to delete login addresses"
    facts = dict(message.facts)
    assert facts["Change"] == "delete these addresses"
    assert facts["Addresses"] == "2001:db8::/64 (18,446,744,073,709,551,616 addresses)"
    assert facts["Reason"] == "left the firm"
    assert facts["Temporary, until"] == "2026-11-22 13:55:02 UTC"
    assert facts["From address"] == "not known"
    assert "Label" not in facts


def test_number_mail_is_the_one_in_the_guide():
    """docs/mail.md shows the mail as it is sent."""
    afterwards = "Then also from 203.0.113.0/29."
    adds = (AddressRange.parse("203.0.113.0/29"),)
    impact = Impact(
        direction=Direction.LOOSENS, gained=AddressSet(adds), lost=AddressSet(), summary=afterwards
    )
    request = attrs.evolve(REQUEST, adds=adds, requested_by="rjones", impact=impact)
    rita = Actor(
        username="rjones", email="rita.jones@example.com", manages={"U1"}, address="192.0.2.10"
    )
    stream = io.StringIO()
    ConsoleNotifier(stream, product="Example Trading").number_issued(request, NUMBER, rita)
    guide = Path(__file__).resolve().parent.parent / "docs" / "mail.md"
    assert f"```text\n{stream.getvalue().rstrip()}\n```" in guide.read_text(encoding="utf-8")


def test_number_mail_of_a_change_of_several():
    """It lists all addresses, those that end, and the users; a long list is bounded."""
    adds = tuple(AddressRange.parse(f"10.0.{at // 256}.{at % 256}") for at in range(102))
    request = attrs.evolve(
        REQUEST,
        kind=RequestKind.REPLACE,
        adds=adds,
        removed=(AddressRange.parse("203.0.113.7"), AddressRange.parse("203.0.113.8")),
        demand=Demand(number=True, approvals=2),
        also_for=("MLee", "kim"),
    )
    message = number_message(request, NUMBER, ALICE, "the bank")
    assert message.subject == "Confirmation number to replace login addresses"
    facts = dict(message.facts)
    assert facts["Change"] == "replace addresses by others"
    assert facts["Users"] == "jsmith, MLee, kim"
    assert facts["Addresses"].startswith("10.0.0.0, 10.0.0.1, ")
    assert facts["Addresses"].endswith(", 10.0.0.99 and 2 more")
    assert facts["Addresses that end"] == "203.0.113.7, 203.0.113.8"
    assert facts["Approvals needed"] == "2"


def assert_no_links(html: str, text: str) -> None:
    page = Page(html)
    assert page.tags <= {"html", "head", "meta", "title", "body", "p", "table", "tr", "th", "td"}
    own = {"lang", "charset", "name", "content", "style", "align", "cellpadding"}
    assert page.attributes <= own
    assert "url(" not in html
    assert 'content="telephone=no' in html  # iOS would turn numbers and addresses into links
    for part in (html, text):
        assert "://" not in part
        assert "www." not in part


def test_mails_contain_no_links():
    """Mails contain no links, and no text that mail programs turn into links."""
    hostile = "http://evil.example/x and www.evil.example, HTTPS://a.b"
    request = attrs.evolve(REQUEST, label=hostile, reason=hostile)
    message = number_message(request, NUMBER, ALICE, "the bank")
    assert_no_links(message.html(), message.text())
    assert dict(message.facts)["Label"].startswith("http[:]//evil[.]example/x and www[.]evil[.]")
    user = attrs.evolve(JSMITH, full_name=hostile)
    change = attrs.evolve(CHANGE, detail={"label": hostile, "reason": hostile})
    for notice in notices(change, ALICE, user, "the bank"):
        assert_no_links(notice.html(), notice.text())


def test_other_dots_and_slashes_are_kept():
    message = number_message(attrs.evolve(REQUEST, label="Dr. K, 3.5/7 a/b"), NUMBER, ALICE, "x")
    assert dict(message.facts)["Label"] == "Dr. K, 3.5/7 a/b"


# ------------------------------------------------------------------ untrusted text

HOSTILE = [
    "x\r\nBcc: thief@example.com",
    "x\nBcc: thief@example.com\n\nanother body",
    "=?utf-8?q?a=0d=0aBcc:_thief@example.com?=",
    "<b>bold</b> & \"quoted\" 'text' </td></table>",
    "Zürich 東京 🏢 e\u0301",
    "\u202eevil\u2066 \u0085 \u2028 \x00 \x1b[31m",
    ".\r\n.\r\nMAIL FROM:<x@y>",
    "  Number valid until: 2099-01-01 00:00:00 UTC",
    "y" * 100_000,
    "ü " * 5_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_untrusted_text_is_one_fact(text):
    request = attrs.evolve(REQUEST, label=text, reason=text, username="jsmith")
    with MailServer() as server:
        notifier(server).number_issued(request, NUMBER, ALICE)
        (mail,) = server.wait_for(1)
    assert mail.recipients == ("alice@example.com",)
    assert {name.lower() for name in mail.message} == {
        "from", "to", "subject", "date", "message-id", "mime-version", "content-type",
        "auto-submitted", "x-auto-response-suppress",
    }  # fmt: skip
    assert mail.message["Subject"] == "Confirmation number to add login addresses"
    shown = text_facts(mail.part("plain"))
    assert list(shown) == [name for name, _ in number_message(request, "", ALICE, "x").facts]
    spelled = attrs.evolve(request, spelling="JSmith")
    assert dict(number_message(spelled, "", ALICE, "x").facts)["User"] == "JSmith"
    user = attrs.evolve(JSMITH, username="JSmith")
    assert dict(notices(CHANGE, ALICE, user, "x")[0].facts)["User"] == "JSmith"
    assert html_facts(mail) == shown
    assert len(shown["Label"]) <= 601
    assert all(len(line) <= 998 for line in mail.raw.split(b"\r\n"))


@given(st.text(max_size=700))
def test_any_text_is_one_printable_line(text):
    change = attrs.evolve(
        CHANGE, actor=text or "x", username=text or None, detail={"": text, "label": text}
    )
    for message in notices(change, ALICE, None, "the bank"):
        lines = message.text().split("\n")
        assert all(line.isprintable() for line in lines)
        values = list(html_facts(message.html()).values())
        assert values == [value for _, value in message.facts]


@pytest.mark.parametrize(
    "address",
    [
        "=?utf-8?q?a=0aBcc=3athief=40example.com?=@example.com",  # decoded when the header is read
        "a:b@example.com",  # a group: the mail would go to b@example.com
        "a@b@example.com",
        "@example.com",
    ],
)
def test_ambiguous_address_is_refused(address):
    """An address that mail software can read in two ways is refused."""
    actor: Any = SimpleNamespace(username="a", email=address, address=None)
    with MailServer() as server:
        error = delivery_error(lambda: notifier(server).number_issued(REQUEST, NUMBER, actor))
        assert server.connections == 0
    assert "address" in error.reason


def test_non_ascii_local_part_needs_smtputf8():
    """A non-ASCII local part needs a server with SMTPUTF8; otherwise the error says so."""
    actor = attrs.evolve(ALICE, email="jürgen@exämple.de")
    with MailServer(utf8=True) as server:
        notifier(server).number_issued(REQUEST, NUMBER, actor)
        (mail,) = server.wait_for(1)
    assert mail.recipients == ("jürgen@xn--exmple-cua.de",)
    assert mail.message["To"] == "jürgen@xn--exmple-cua.de"
    with MailServer(utf8=False) as server:
        error = delivery_error(lambda: notifier(server).number_issued(REQUEST, NUMBER, actor))
    assert error.reason == "the server does not offer SMTPUTF8, which the recipient's address needs"


@pytest.mark.parametrize(
    ("mailbox", "sent_to"),
    [
        ("rita@bücher.example", "rita@xn--bcher-kva.example"),
        ("rita@bu\u0308cher.example", "rita@xn--bcher-kva.example"),  # decomposed
        ("rita@mail.例え。jp", "rita@mail.xn--r8jz45g.jp"),  # the full stop of an input method
        ("rita@xn--bcher-kva.example", "rita@xn--bcher-kva.example"),
    ],
)
def test_non_ascii_domain_needs_no_smtputf8(mailbox, sent_to):
    actor = attrs.evolve(ALICE, email=mailbox)
    with MailServer(utf8=False) as server:
        mailer = notifier(server)
        mailer.number_issued(REQUEST, NUMBER, actor)
        mailer.send_test(mailbox)
        mails = server.wait_for(2)
    assert [mail.recipients for mail in mails] == [(sent_to,)] * 2
    assert [mail.message["To"] for mail in mails] == [sent_to] * 2


@pytest.mark.parametrize(
    "mailbox",
    [
        "rita@straße.example",  # IDNA 2003 would write to strasse.example
        "rita@a\u200db.example",
        "rita@ü..example",
        f"rita@{'ü' * 64}.example",
    ],
)
def test_domain_without_unambiguous_ascii_form_is_refused(mailbox):
    """A domain that IDNA 2003 and 2008 encode differently is refused."""
    with MailServer(utf8=True) as server:
        error = delivery_error(lambda: notifier(server).send_test(mailbox))
        assert server.connections == 0
    assert "no unambiguous ASCII form" in error.reason


def test_test_mail():
    """A test mail arrives and says that it is a test; failures are raised."""
    with MailServer(refuse=["nobody@example.com"]) as server:
        notifier = EmailNotifier(server.url, sender=SENDER, product="Example Trading")
        notifier.send_test("ops@example.com")
        (mail,) = server.wait_for(1)
        for address in ("nobody@example.com", "not an address"):
            with pytest.raises(DeliveryError) as failed:
                notifier.send_test(address)
            assert failed.value.request_id is None
    assert mail.recipients == ("ops@example.com",)
    for subtype in ("plain", "html"):
        assert "This is a test" in mail.part(subtype)
        assert "Example Trading" in mail.part(subtype)


def test_notice_goes_to_actor_and_user_separately():
    """Actor and user each get a mail; neither mail shows the other's address."""
    with MailServer() as server:
        notifier(server).change_applied(CHANGE, ALICE, JSMITH)
        first, second = server.wait_for(2)
        assert server.connections == 2
    assert first.recipients == ("alice@example.com",)
    assert second.recipients == ("jsmith@example.net",)
    assert b"jsmith@" not in first.raw
    assert b"alice@" not in second.raw
    for mail in (first, second):
        assert mail.message["Subject"] == "Login addresses were added"
        facts = text_facts(mail.part("plain"))
        assert facts == {
            "User": "jsmith",
            "Name": "John Smith",
            "Addresses": "203.0.113.7",
            "Label": "head office",
            "Done by": "alice",
            "From address": "198.51.100.4",
            "Done at": "2026-11-21 13:55:02 UTC",
        }
        assert html_facts(mail) == facts
        assert_no_links(mail.part("html"), mail.part("plain"))
        assert "If you did not expect it, tell your" in " ".join(mail.part("plain").split())


@pytest.mark.parametrize(
    "user",
    [
        None,
        attrs.evolve(JSMITH, email=None),
        attrs.evolve(JSMITH, email="alice@example.com"),
        attrs.evolve(JSMITH, email="Alice@EXAMPLE.com"),
    ],
)
def test_same_address_gets_one_notice(user):
    """Without a user who has another address, only the actor gets a notice."""
    with MailServer() as server:
        notifier(server).change_applied(CHANGE, ALICE, user)
        assert [mail.recipients for mail in server.mails] == [("alice@example.com",)]


@pytest.mark.parametrize(
    "refused", [["alice@example.com"], ["alice@example.com", "jsmith@example.net"]]
)
def test_both_notices_are_tried(refused):
    """The second notice is sent although the first failed, and one error names all failures."""
    with MailServer(refuse=set(refused)) as server:
        error = delivery_error(lambda: notifier(server).change_applied(CHANGE, ALICE, JSMITH))
        sent = {address for mail in server.mails for address in mail.recipients}
        assert server.connections == 2
    assert sent == {"alice@example.com", "jsmith@example.net"} - set(refused)
    assert error.reason.count("550 5.1.1") == len(refused)
    assert isinstance(error.__cause__, smtplib.SMTPRecipientsRefused)


@pytest.mark.parametrize(
    ("action", "detail", "subject", "opening"),
    [
        (
            Action.CONFIRM,
            "",
            "Login addresses were added",
            "Logins from any other address are refused.",
        ),
        (Action.CONFIRM, "kind=delete", "Login addresses were deleted", "Addresses were deleted"),
        (Action.DELETE, "", "Login addresses were deleted", "Addresses were deleted"),
        (Action.LIFT, "", "Login addresses were deleted", "Addresses were deleted"),
        (Action.IMPOSE, "", "Login addresses were added", "Addresses were added to those"),
        (
            Action.IMPOSE_MANY,
            "restrictions=12",
            "Login addresses of several users were added",
            "several users",
        ),
        (
            Action.UNLOCK,
            "failures=100",
            "Confirmation numbers are accepted again",
            "The bank now accepts numbers from that user again.",
        ),
        (Action.CONFIRM, "kind=replace", "Login addresses were replaced", "by others"),
        (Action.IMPOSE, "only=true", "Login addresses were replaced", "have ended"),
        (
            Action.IMPOSE_MANY,
            "replace=true ended=3",
            "Login addresses of several users were replaced",
            "Addresses that several users may log in to the bank from were replaced by others.",
        ),
        (Action.CONFIRM, "users=a", "Login addresses of several users were added", "several"),
        (
            Action.REQUEST,
            "ready_at=2026-12-01T00:00:00+00:00",
            "A change of login addresses was asked for",
            "Nothing has changed yet. The change waits until the time below.",
        ),
        (Action.REQUEST, "approvals=2", "A change of login addresses was asked for", "approval of"),
        (Action.APPROVE, "", "A change of login addresses was approved", "Nothing has changed"),
        (Action.REMOVE_USERS, "", "A change was recorded", "in the bank: remove users."),
    ],
)
def test_notice_says_what_was_done(action, detail, subject, opening):
    change = attrs.evolve(CHANGE, action=action, detail=decode(detail))
    (message,) = notices(change, ALICE, None, "the bank")
    assert message.subject == subject
    assert opening in message.opening


@pytest.mark.parametrize(
    ("detail", "any_address", "no_address"),
    [
        ("addresses=203.0.113.7 unrestricted=true", True, False),
        ("addresses=203.0.113.7 restricted_to_nothing=true", False, True),
        ('addresses=203.0.113.7 label="unrestricted=true"', False, False),
        (r'label="a\" unrestricted=true \"" reason=x', False, False),
    ],
)
def test_notice_warns_of_open_and_shut_out_users(detail, any_address, no_address):
    """The notice says if a user can log in from anywhere or nowhere; labels cannot fake that."""
    change = attrs.evolve(CHANGE, action=Action.DELETE, detail=decode(detail))
    (message,) = notices(change, ALICE, None, "the bank")
    for part in (" ".join(message.text().split()), Page(message.html()).shown):
        assert ("can now log in from any address" in part) is any_address
        assert ("cannot log in from any address" in part) is no_address


def test_notice_formats_the_detail():
    """Addresses and times are formatted for people."""
    detail = {
        "addresses": "203.0.113.0/29",
        "label": 'a "b" = c',
        "reason": "moved, see 7",
        "expires_at": "2026-12-01T00:00:00+01:00",
    }
    change = attrs.evolve(CHANGE, action=Action.IMPOSE, detail=detail, actor_address=None)
    facts = dict(notices(change, ALICE, None, "the bank")[0].facts)
    assert facts["Addresses"] == "203.0.113.0/29 (8 addresses)"
    assert facts["Label"] == 'a "b" = c'
    assert facts["Reason"] == "moved, see 7"
    assert facts["Temporary, until"] == "2026-11-30 23:00:00 UTC"
    assert facts["From address"] == "not known"


def test_notice_of_a_request_that_waits():
    """The user learns the requester, the change, when it can be completed, and how to cancel it."""
    detail = {
        "addresses": "203.0.113.7, 203.0.113.0/29",
        "ends": "198.51.100.7",
        "direction": "loosens",
        "afterwards": "Then also from 203.0.113.0/29; no longer from 198.51.100.7.",
        "ready_at": "2026-12-01T00:00:00+00:00",
        "approvals": "2",
        "reason": "moved to www.evil.example",
    }
    change = attrs.evolve(CHANGE, action=Action.REQUEST, detail=detail)
    to_user = attrs.evolve(ALICE, email=JSMITH.email)
    (message,) = notices(change, to_user, JSMITH, "the bank")
    assert message.to == "jsmith@example.net"
    assert dict(message.facts) == {
        "Change": "add these addresses",
        "User": "jsmith",
        "Name": "John Smith",
        "Addresses": "203.0.113.7, 203.0.113.0/29 (8 addresses)",
        "Addresses that end": "198.51.100.7",
        "Allows": "addresses that were refused before",
        "Afterwards": "Then also from 203.0.113.0/29; no longer from 198.51.100.7.",
        "Reason": "moved to www[.]evil[.]example",
        "Waits until": "2026-12-01 00:00:00 UTC",
        "Approvals needed": "2",
        "Asked for by": "alice",
        "From address": "198.51.100.4",
        "Asked for at": "2026-11-21 13:55:02 UTC",
    }
    assert "You may cancel it, and so may everybody who manages your account" in message.closing
    assert "moved" not in message.subject


def test_notice_shows_unreadable_detail():
    """Values that cannot be parsed are shown unchanged."""
    detail = {"addresses": "somewhere", "expires_at": "soon", "": 'label="\\q"'}
    change = attrs.evolve(CHANGE, actor=None, detail=detail)
    facts = dict(notices(change, ALICE, None, "the bank")[0].facts)
    assert facts["Addresses"] == "somewhere"
    assert facts["Temporary, until"] == "soon"
    assert facts["Particulars"] == 'label="\\q"'
    assert facts["Done by"] == "alice"


# ------------------------------------------------------------------ refused logins

REFUSED = Sighting(
    username="jsmith",
    address="2001:db8::7",
    first_at=NOW - timedelta(days=2),
    last_at=NOW,
    refused=1_234,
)


def test_notice_of_a_refused_login():
    """It goes to the user, says from where, and what to do if it was somebody else."""
    with MailServer() as server:
        notifier(server).login_refused(REFUSED, attrs.evolve(JSMITH, username="JSmith"))
        (mail,) = server.wait_for(1)
    assert mail.recipients == ("jsmith@example.net",)
    assert mail.message["Subject"] == "A login with your password was refused"
    assert text_facts(mail.part("plain")) == {
        "User": "JSmith",
        "Name": "John Smith",
        "From address": "2001:db8::7",
        "Last refused at": "2026-11-21 13:55:02 UTC",
        "Refused logins from there": "1,234",
    }
    assert html_facts(mail)["From address"] == "2001:db8::7"
    assert "change it, and tell your administrator at once" in " ".join(mail.part("plain").split())
    assert_no_links(mail.part("html"), mail.part("plain"))


def test_notice_of_a_refused_login_shows_allowed_ones():
    """An address that was allowed before may belong to the user."""
    message = refusal_message(attrs.evolve(REFUSED, allowed=3), JSMITH, "x@y.example", "the bank")
    assert dict(message.facts)["Allowed logins from there"] == "3"


def test_notice_of_a_refused_login_needs_an_address():
    stream = io.StringIO()
    nobody = attrs.evolve(JSMITH, email=None)
    with MailServer() as server:
        notifier(server).login_refused(REFUSED, nobody)
        assert not server.mails
    ConsoleNotifier(stream).login_refused(REFUSED, nobody)
    assert stream.getvalue().startswith("To: -\nSubject: A login with your password was refused\n")


def test_notice_of_a_refused_login_that_is_refused():
    with MailServer(refuse={"jsmith@example.net"}) as server:
        error = delivery_error(lambda: notifier(server).login_refused(REFUSED, JSMITH))
    assert error.reason.startswith("the recipient was refused")


# ------------------------------------------------------------------ with the workflow


def test_number_from_the_mail_confirms():
    """With a real workflow and server, the number in the mail confirms the change."""
    clock = FakeClock()
    with (
        MailServer("starttls", login=("bank", "s3cret")) as server,
        open_store("memory://", clock=clock) as store,
    ):
        store.put_users([JSMITH])
        flow = Workflow(store, notifier(server), key=b"k" * 32)
        request = flow.request(
            ALICE, "jsmith", "203.0.113.0/29", label="office", expires_at=clock() + timedelta(1)
        )
        (mail,) = server.wait_for(1)
        (number,) = re.findall(r"^ {4}([\d-]+)$", mail.part("plain"), re.MULTILINE)
        assert text_facts(mail.part("plain"))["Temporary, until"].startswith(f"{clock():%Y-%m}")
        applied = flow.confirm(ALICE, request.id, number)
        assert isinstance(applied, Applied)
        added = text_facts(server.wait_for(3)[2].part("plain"))
        assert added["Addresses"] == "203.0.113.0/29 (8 addresses)"
        assert added["Label"] == "office"
        assert added["Temporary, until"] == text_facts(mail.part("plain"))["Temporary, until"]
        second = flow.impose(ALICE, "jsmith", "198.51.100.9", reason="on the phone")
        clock.advance(timedelta(days=2))
        assert second.restriction is not None
        assert applied.restriction is not None
        flow.lift(ALICE, second.restriction.id, reason="was wrong")
        assert "have expired: this user cannot log in" in server.wait_for(7)[6].part("plain")
        flow.delete(ALICE, applied.restriction.id)
        assert "can now log in from any address" in server.wait_for(9)[8].part("plain")
        flow.impose_many(ALICE, [("jsmith", "192.0.2.1"), ("jsmith", "192.0.2.2")], reason="r")
        to_actor, to_user = (text_facts(mail.part("plain")) for mail in server.wait_for(11)[9:])
        assert (to_actor["Restrictions"], to_user["User"]) == ("2", "jsmith")
        assert "User" not in to_actor
        flow.unlock(ALICE, "jsmith", reason="asked for it")
        assert server.wait_for(13)[12].message["Subject"].startswith("Confirmation numbers are")
        assert flow.notices_failed == 0


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"MAIL": "553 5.1.8 sender not known"}, "the mail was refused: 553 5.1.8 sender"),
        ({"RCPT": "550 5.1.1 no such mailbox"}, "the recipient was refused: 550 5.1.1 no such"),
        ({"RCPT": "421 4.3.2 closing"}, "the recipient was refused: 421 4.3.2 closing"),
        (
            {"DATA": "554 5.7.1 not\twanted " + "x" * 300},
            "the mail was refused: 554 5.7.1 not wanted",
        ),
        ({"MAIL": "drop"}, "Connection unexpectedly closed"),
        ({"RCPT": "drop"}, "Connection unexpectedly closed"),
        ({"DATA": "drop"}, "Connection unexpectedly closed"),
    ],
)
def test_server_that_refuses_or_hangs_up(trouble, reason):
    """A refusal or a lost connection before the end is a DeliveryError."""
    with MailServer(trouble=trouble) as server:
        error = refusal(notifier(server))
        assert server.mails == ()
    assert error.reason.startswith(reason)
    assert len(error.reason) < 300
    assert error.request_id == "r1"
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize("trouble", [{"QUIT": "drop"}, {"QUIT": "hang"}, {"QUIT": "500 what?"}])
def test_failures_after_acceptance_are_ignored(trouble):
    with MailServer(trouble=trouble) as server:
        notifier(server, timeout=0.2, deadline=AGES).number_issued(REQUEST, NUMBER, ALICE)
        assert len(server.mails) == 1


def test_wrong_login_is_an_error():
    with MailServer("tls", login=("bank", "right")) as server:
        error = refusal(notifier(server, url=server.url.replace("right", "wr0ng")))
        assert error.reason.startswith("the login was refused: 535 ")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("smtp://bank:wr0ng@", "No suitable authentication method found."),
        ("smtp+starttls://", "STARTTLS extension not supported by server."),
        ("smtps://", "no encrypted connection: "),
    ],
)
def test_server_without_login_or_tls_gets_no_mail(url, reason):
    """If the server lacks what the URL asks for, nothing is sent without it instead."""
    with MailServer() as server:
        error = refusal(notifier(server, url=f"{url}127.0.0.1:{server.port}"))
        assert server.mails == ()
    assert error.reason.startswith(reason)


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_unknown_certificate_is_refused(security):
    with MailServer(security, login=("bank", "s3cret")) as server:
        error = refusal(notifier(server, tls=None))
        assert server.mails == ()
    assert error.reason.startswith("the server's certificate was not accepted: ")
    assert isinstance(error.__cause__, ssl.SSLCertVerificationError)


def test_closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    error = refusal(EmailNotifier(f"smtp://127.0.0.1:{port}", sender=SENDER))
    assert error.reason == "the server cannot be reached: Connection refused"


def test_unknown_host_name(monkeypatch):
    """A host name that does not resolve, or cannot, is a DeliveryError."""

    def unknown(*_args, **_settings):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    error = refusal(EmailNotifier("smtp://a..b", sender=SENDER))
    assert isinstance(error.__cause__, UnicodeError)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = refusal(EmailNotifier("smtp://mail.bank.example", sender=SENDER))
    assert error.reason == "the server cannot be reached: Name or service not known"


def test_every_address_of_a_host_is_tried(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        closed = listening.getsockname()
    with MailServer() as server:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in (closed, (server.host, server.port))
        ]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *_args, **_settings: found)
            notifier(server).number_issued(REQUEST, NUMBER, ALICE)
        assert len(server.mails) == 1


# ------------------------------------------------------------------ time


LATE = "the server did not answer in time"


@pytest.mark.parametrize(
    ("behaviour", "scheme", "bounds", "reason"),
    [
        ("silent", "smtp", {"timeout": 0.2}, LATE),
        ("silent", "smtp", {"deadline": 0.2}, LATE),
        ("silent", "smtps", {"deadline": 0.2}, LATE),
        ("stall", "smtp+starttls", {"timeout": 0.5}, LATE),
        ("stall", "smtp+starttls", {"deadline": 0.5}, LATE),
        ("drip", "smtp", {"deadline": 0.3}, LATE),  # never exceeds the timeout
        ("flood", "smtp", {}, "the server's replies do not end"),
        ("drop", "smtp", {}, "Connection unexpectedly closed"),
    ],
)
def test_bad_server_is_given_up(behaviour, scheme, bounds, reason):
    """Servers that do not answer, or not properly, cannot hold a mail up."""
    settings: Any = {"timeout": AGES, "deadline": AGES, **bounds}
    with BadServer(behaviour) as server:
        url = f"{scheme}://{server.host}:{server.port}"
        error = refusal(EmailNotifier(url, sender=SENDER, **settings))
    assert reason in error.reason


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("bound", ["timeout", "deadline"])
def test_server_that_hangs_in_the_middle_is_given_up(command, bound):
    """Either limit ends a mail to a server that stops answering."""
    bounds: Any = {"timeout": AGES, "deadline": AGES, bound: 0.5}
    with MailServer(trouble={command: "hang"}) as server:
        error = refusal(notifier(server, **bounds))
    assert error.reason == LATE


def test_deadline_covers_all_addresses(monkeypatch):
    clock = iter([0.0, 1.0, 7.0, 8.0])
    tried = []
    monkeypatch.setattr("ipguard.mail._smtp.monotonic", lambda: next(clock))

    class Deaf(socket.socket):
        def connect(self, address):
            tried.append((address, self.gettimeout()))
            raise TimeoutError("timed out")

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", n)) for n in (1, 2, 3)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_settings: found)
    monkeypatch.setattr(socket, "socket", Deaf)
    with pytest.raises(TimeoutError, match="deadline has passed"):
        Connection("mail.test", 25, helo=None, timeout=5, deadline=7.5, tls=None)
    assert tried == [(("127.0.0.1", 1), 5), (("127.0.0.1", 2), 0.5)]


def test_reply_in_time_is_used(monkeypatch):
    """A reply in time is used even if the deadline passes afterwards."""
    late = threading.Event()
    real = time.monotonic
    monkeypatch.setattr(
        "ipguard.mail._smtp.monotonic", lambda: real() + (1e6 if late.is_set() else 0)
    )
    with MailServer() as server:
        connection = connected(server)
        getreply = smtplib.SMTP.getreply

        def answered(self):
            reply = getreply(self)
            late.set()
            return reply

        with monkeypatch.context() as patch:
            patch.setattr(smtplib.SMTP, "getreply", answered)
            assert connection.noop()[0] == 250
        with pytest.raises(TimeoutError):
            connection.noop()
        connection.close()


def test_closed_connection_is_an_error():
    with MailServer() as server:
        connection = connected(server)
        connection.close()
        with pytest.raises(smtplib.SMTPServerDisconnected):
            connection.noop()


# ------------------------------------------------------------------ secrets

PASSWORD = "s3cret-Pa55"


def everything_about(error: BaseException | None) -> str:
    """Return everything that a log or an error tracker could show of an error."""
    text = ""
    while error is not None:
        text += repr(error) + str(error) + repr(error.args) + repr(vars(error))
        assert error.__context__ is None or error.__context__ is error.__cause__
        error = error.__cause__
    return text


@pytest.mark.parametrize(
    "reply",
    [
        f"535 5.7.8 password {PASSWORD} is wrong",
        "535 " + base64.b64encode(f"\0bank\0{PASSWORD}".encode()).decode(),
        "535 " + base64.b64encode(PASSWORD.encode()).decode(),
    ],
)
def test_password_that_the_server_repeats_is_not_shown(reply):
    with MailServer("tls", login=("bank", PASSWORD), trouble={"AUTH": reply}) as server:
        error = refusal(notifier(server))
    text = everything_about(error)
    assert PASSWORD not in text
    assert reply[4:] not in text
    assert error.reason == "the server refused; its reply contains a secret and is not shown"
    assert pickle.loads(pickle.dumps(error)).reason == error.reason


@pytest.mark.parametrize("number", [NUMBER, NUMBER.replace("-", "")])
def test_number_that_the_server_repeats_is_not_shown(number):
    with MailServer(trouble={"DATA": f"554 5.6.0 looks like spam: {number}"}) as server:
        error = refusal(notifier(server))
    assert number not in everything_about(error)


def test_nothing_secret_is_logged(caplog, capfd):
    """Neither the number nor the password is logged or printed, even at DEBUG."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("mail.log").setLevel(logging.WARNING)
    with MailServer("starttls", login=("bank", PASSWORD)) as server:
        mailer = notifier(server)
        mailer.number_issued(REQUEST, NUMBER, ALICE)
        mailer.change_applied(CHANGE, ALICE, JSMITH)
        server.trouble["DATA"] = "554 no"
        refusal(mailer)
        ours = [record for record in caplog.records if record.name.startswith("ipguard")]
        message_id = server.mails[0].message["Message-ID"]
    assert ours[0].getMessage() == f"{message_id} was accepted by 127.0.0.1:{server.port}"
    out = "".join(capfd.readouterr()) + caplog.text + repr(mailer)
    for secret in (NUMBER, NUMBER.replace("-", ""), PASSWORD):
        assert secret not in out
        assert base64.b64encode(secret.encode()).decode() not in out


class Refusal(Exception):
    """An error of a host's own mail system."""


def test_a_mail_system_of_the_host():
    """A function gets the mail; its errors are delivery errors, and hide the number."""
    sent: list[Any] = []
    mailer = EmailNotifier(sent.append, sender="Desk <desk@bank.example>")
    assert repr(mailer) == "<EmailNotifier by the host>"
    mailer.number_issued(REQUEST, NUMBER, ALICE)
    (mail,) = sent
    assert (mail["From"], mail["To"]) == ("Desk <desk@bank.example>", ALICE.email)
    assert NUMBER in mail.get_body(("plain",)).get_content()

    def refuse(mail: Any) -> None:
        raise Refusal("no room" if mail["To"] == ALICE.email else NUMBER)

    mailer = EmailNotifier(refuse, sender="desk@bank.example")
    assert "no room" in str(refusal(mailer))
    other = attrs.evolve(ALICE, email="other@bank.example")
    error = delivery_error(lambda: mailer.number_issued(REQUEST, NUMBER, other))
    assert "contains a secret" in str(error)
    assert NUMBER not in everything_about(error)


def test_repr_of_a_message_hides_the_number():
    """Tracebacks may contain the repr."""
    assert NUMBER not in repr(number_message(REQUEST, NUMBER, ALICE, "the bank"))


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("smtp://mail.example", "smtp://mail.example:25"),
        ("smtp+starttls://mail.example/", "smtp+starttls://mail.example:587"),
        ("smtps://u:p@mail.example", "smtps://mail.example:465"),
        ("SMTPS://Mail.Example:4650", "smtps://mail.example:4650"),
        ("smtp://u:p@localhost", "smtp://localhost:25"),
        ("smtp://u:p@127.9.9.9", "smtp://127.9.9.9:25"),
        ("smtp://u:p@[::1]:2525", "smtp://::1:2525"),
    ],
)
def test_url_and_default_ports(url, shown):
    """The URL names scheme, host and port; the repr leaves the login out."""
    assert repr(EmailNotifier(url, sender=SENDER)) == f"<EmailNotifier {shown}>"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mail.example",
        "http://u:s3cret@mail.example",
        "smtp://",
        "smtps://u:s3cret@",
        "smtps://u:s3cret@mail.example:0",
        "smtps://u:s3cret/x@mail.example",
        "smtps://u:s3cret@[mail.example",
        "smtps://u:s3cret@mail.example/path",
        "smtps://u:s3cret@mail.example?tls=no",
        "smtps://u@mail.example",
        "smtps://:s3cret@mail.example",
        "smtps://u:@mail.example",
        "smtps://u:s3cret%0d%0aRSET@mail.example",
        "smtps://u:s3cret%ff@mail.example",
        "smtps://u:s3cret @mail.example",
        "smtps://u:s3cret@mäil.example",
        "smtp://u:s3cret@mail.example",
        "smtp://u:s3cret@127.0.0.1.example",
        "smtp://u:s3cret@localhost.example",
        b"smtps://u:s3cret@mail.example",
        None,
    ],
)
def test_bad_url_is_refused_without_repeating_it(url):
    """An unusable or insecure URL is refused, and no part of it is shown."""
    with pytest.raises(InvalidValue) as caught:
        EmailNotifier(url, sender=SENDER)
    assert isinstance(caught.value, IPGuardError)
    assert caught.value.name == "url"
    assert "s3cret" not in everything_about(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sender", ""),
        ("sender", "nobody"),
        ("sender", "a@b>"),
        ("sender", "Bank <a@b"),
        ("sender", "Bank\r\nBcc: x <a@b>"),
        ("sender", "=?utf-8?q?a=0aBcc:x?= <a@b>"),
        ("sender", "jürgen@exämple.de"),
        ("sender", None),
        ("timeout", 0),
        ("timeout", True),
        ("deadline", None),
        ("product", ""),
        ("product", "a\nb"),
        ("helo", ""),
        ("helo", "a\r\nRSET"),
        ("helo", "bänk"),
        ("tls", ssl.create_default_context()),
    ],
)
def test_invalid_settings(name, value):
    with pytest.raises(InvalidValue) as caught:
        EmailNotifier("smtp://127.0.0.1", **{"sender": SENDER, name: value})
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("sender", "shown"),
    [
        ("Example Bank <no-reply@bank.example>", "Example Bank"),
        ("Zürcher Börse, AG <no-reply@bank.example>", "Zürcher Börse, AG"),
    ],
)
def test_sender_with_a_name(sender, shown):
    """The sender's name is in the header, the envelope has the address alone."""
    with MailServer() as server:
        notifier(server, sender=sender).number_issued(REQUEST, NUMBER, ALICE)
        (mail,) = server.mails
    assert mail.sender == SENDER
    (address,) = mail.message["From"].addresses
    assert (address.display_name, address.addr_spec) == (shown, SENDER)


def test_client_names_itself():
    """The client uses the given name, or the address that it connects from."""
    with MailServer() as server:
        notifier(server).number_issued(REQUEST, NUMBER, ALICE)
        notifier(server, helo="login1.bank.example").number_issued(REQUEST, NUMBER, ALICE)
        assert [mail.helo for mail in server.mails] == ["[127.0.0.1]", "login1.bank.example"]


def test_client_names_itself_over_ipv6():
    """An IPv6 address has a tag (RFC 5321 4.1.3)."""

    class Connected:
        family = socket.AF_INET6

        def getsockname(self):
            return ("2001:db8::1", 50000, 0, 0)

    assert _literal(Connected()) == "[IPv6:2001:db8::1]"  # type: ignore[arg-type]


# ------------------------------------------------------------------ the console


def test_console_prints_the_number(capsys):
    ConsoleNotifier().number_issued(REQUEST, NUMBER, ALICE)
    out = capsys.readouterr().out
    assert out.startswith("To: alice@example.com\nSubject: Confirmation number to add")
    assert f"\n    {NUMBER}\n" in out


def test_console_prints_every_notice():
    stream = io.StringIO()
    ConsoleNotifier(stream, product="Example Trading").change_applied(CHANGE, ALICE, JSMITH)
    assert re.findall("^To: (.*)$", stream.getvalue(), re.MULTILINE) == [
        "alice@example.com",
        "jsmith@example.net",
    ]
    assert "log in to Example Trading" in " ".join(stream.getvalue().split())
