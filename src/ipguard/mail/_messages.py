"""The wording of the mails, apart from how they are sent.

Text that a person or a host wrote goes into no header other than `To`: the mail library parses
header values again and decodes `=?utf-8?q?…?=` in them, line breaks included, and some supported
Python versions do not stop those (CVE-2024-6923). In the body each such text is one line, so that
no label can imitate another line of the mail. Mails contain no links, and text that a person wrote
is shown so that mail programs turn no part of it into a link.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from textwrap import fill
from typing import Final

import attrs

from ipguard.addresses import AddressRange
from ipguard.errors import AddressError
from ipguard.model import Action, Actor, Change, PendingRequest, RequestKind, Sighting, User

_LONGEST_FACT: Final = 600
_LINKS: Final = re.compile(r"(?<=\w)\.(?=[^\W\d])|:(?=//)")
# Without format-detection, iOS turns confirmation numbers and addresses into telephone links.
_HEAD: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="format-detection" content="telephone=no, date=no, address=no, email=no">
"""
_BODY: Final = 'style="font-family: sans-serif; font-size: 15px; color: #111"'
_NUMBER: Final = 'style="font-family: monospace; font-size: 26px; font-weight: bold"'
_KINDS: Final[Mapping[str, str]] = {
    RequestKind.ADD: "add these addresses",
    RequestKind.DELETE: "delete these addresses",
    RequestKind.REPLACE: "replace addresses by others",
}
_EFFECTS: Final = {
    "neutral": "the same addresses as before",
    "tightens": "fewer addresses than before",
    "loosens": "addresses that were refused before",
    "opens": "every address",
}
_LISTED: Final = 100  # as many users as one number can confirm for
_LONGEST_EFFECT: Final = 20_000
_UNRESTRICTED: Final = "No restriction is left: this user can now log in from any address."
_SHUT: Final = "All remaining restrictions have expired: this user cannot log in from any address."


def _known(facts: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple(fact for fact in facts if fact[1])


@attrs.frozen(kw_only=True)
class Message:
    """One mail to one person; facts without a value are left out."""

    to: str
    subject: str
    opening: str
    number: str | None = attrs.field(default=None, repr=False)
    facts: tuple[tuple[str, str], ...] = attrs.field(converter=_known)
    closing: str

    def text(self) -> str:
        """Return the mail as plain text."""
        width = max(len(name) for name, _ in self.facts) + 1
        facts = "\n".join(f"  {name + ':':<{width}} {value}" for name, value in self.facts)
        number = [] if self.number is None else [f"    {self.number}"]
        return "\n\n".join([_wrap(self.opening), *number, facts, _wrap(self.closing)]) + "\n"

    def html(self) -> str:
        """Return the mail as HTML without links or external resources."""
        facts = (
            f'<tr><th align="left">{escape(name)}</th><td>{escape(value)}</td></tr>'
            for name, value in self.facts
        )
        number = [] if self.number is None else [f"<p {_NUMBER}>{escape(self.number)}</p>"]
        head = f"{_HEAD}<title>{escape(self.subject)}</title></head>\n<body {_BODY}>"
        body = (*_paragraphs(self.opening), *number, '<table cellpadding="4">', *facts, "</table>")
        return "\n".join([head, *body, *_paragraphs(self.closing), "</body></html>\n"])


def number_message(request: PendingRequest, number: str, actor: Actor, product: str) -> Message:
    """Write the mail with a confirmation number; it shows what would be confirmed."""
    words, impact = _KINDS[request.kind], request.impact
    users = (request.spelling, *request.also_for)
    return Message(
        to=actor.email,
        subject=f"Confirmation number to {request.kind} login addresses",
        opening=f"You asked {product} to change the addresses that a user may log in from. Nothing "
        "has changed yet. To confirm the change below, type this number in on the page where you "
        "asked for it:",
        number=number,
        facts=(
            ("Change", words),
            ("User" if len(users) == 1 else "Users", _joined(list(map(_line, users)))),
            ("Addresses", _several(request.adds)),
            ("Addresses that end" if request.adds else "Addresses", _several(request.removed)),
            ("Allows", "" if impact is None else _EFFECTS[impact.direction.name.lower()]),
            ("Afterwards", "" if impact is None else _words(impact.summary, _LONGEST_EFFECT)),
            ("Label", _words(request.label)),
            ("Reason", _words(request.reason)),
            ("Temporary, until", _moment(request.restriction_expires_at)),
            ("Approvals needed", str(request.demand.approvals or "")),
            ("Asked for by", _line(request.requested_by)),
            ("From address", actor.address or "not known"),
            ("Asked for at", _moment(request.requested_at)),
            ("Number valid until", _moment(request.number_expires_at)),
        ),
        closing="The number is valid for this one change only. Nobody who works for "
        f"{product} will ever ask you for it. Do not pass it on: not by phone, mail or chat.\n"
        "If you did not ask for this change, do not type the number in, and tell your "
        "administrator at once: somebody may be using your account.",
    )


def refusal_message(sighting: Sighting, user: User, to: str, product: str) -> Message:
    """Write the notice about a refused login with the right password."""
    return Message(
        to=to,
        subject="A login with your password was refused",
        opening=f"Somebody tried to log in to {product} with your password, from an address that "
        "your restrictions do not allow. The login was refused, and nothing has changed.",
        facts=(
            ("User", _line(user.spelling)),
            ("Name", _words(user.full_name)),
            ("From address", _line(sighting.address)),
            ("Last refused at", _moment(sighting.last_at)),
            ("Refused logins from there", f"{sighting.refused:,}"),
            ("Allowed logins from there", f"{sighting.allowed or ''}"),
        ),
        closing="If that was you, ask your administrator to add the address to those that you may "
        "log in from.\nIf that was not you, somebody knows your password: change it, and tell your "
        "administrator at once.\nWhile logins from this address go on, you get this mail at most "
        "once a day.",
    )


def trial_message(to: str, product: str, now: datetime) -> Message:
    """Write a test mail."""
    return Message(
        to=to,
        subject="Test of the mails about login addresses",
        opening=f"This is a test: mails from {product} about login addresses arrive here.",
        facts=(("Sent at", _moment(now)),),
        closing="Nothing has changed, and there is nothing to do.",
    )


def notices(change: Change, actor: Actor, user: User | None, product: str) -> tuple[Message, ...]:
    """Write the notices of a change: to the actor, and to the user if not the same person."""
    details, asked = change.detail, change.action is Action.REQUEST
    subject, opening = _summary(change.action, details, product)
    if details.get("unrestricted") == "true":
        opening += f"\n{_UNRESTRICTED}"
    if details.get("restricted_to_nothing") == "true":
        opening += f"\n{_SHUT}"
    if details.get("only") == "true":
        opening += "\nAll other restrictions of this user have ended."
    # The same text for both: one mailbox may receive both mails.
    closing = (
        "You get this mail because the change concerns you. You may cancel it, and so may "
        "everybody who manages your account. If you did not expect it, tell your administrator at "
        "once."
        if asked
        else "You get this mail because you made or asked for this change, or because it concerns "
        "you. If you did not expect it, tell your administrator at once."
    )
    to = [actor.email]
    # Servers may distinguish capitals before the @ (RFC 5321 2.4); hardly any does, and then both
    # addresses belong to the same person.
    if user is not None and user.email and user.email.casefold() != actor.email.casefold():
        to.append(user.email)
    name = (change.username or "") if user is None else user.spelling
    done = "Asked for" if asked else "Approved" if change.action is Action.APPROVE else "Done"
    kind = _KINDS.get(details.get("kind") or RequestKind.ADD, "")
    facts = (
        ("Change", kind if asked or change.action is Action.APPROVE else ""),
        ("User", "" if "users" in details else _line(name)),
        ("Users", _words(details.get("users", ""), _LONGEST_EFFECT)),
        ("Name", "" if user is None else _words(user.full_name)),
        ("Addresses", _known_addresses(details.get("addresses", ""))),
        ("Addresses that end", _known_addresses(details.get("ends", ""))),
        ("Allows", _EFFECTS.get(details.get("direction", ""), "")),
        ("Afterwards", _words(details.get("afterwards", ""), _LONGEST_EFFECT)),
        ("Label", _words(details.get("label", ""))),
        ("Restrictions", _line(details.get("restrictions", ""))),
        ("Restrictions that ended", _line(details.get("ended", ""))),
        ("Temporary, until", _known_moment(details.get("expires_at", ""))),
        ("Reason", _words(details.get("reason", ""))),
        ("Waits until", _known_moment(details.get("ready_at", ""))),
        ("Approvals needed", _line(details.get("approvals", ""))),
        ("Particulars", _line(details.get("", ""))),
        ("Asked for by", _line(details.get("requested_by", ""))),
        (f"{done} by", _line(change.actor or actor.username)),
        ("From address", change.actor_address or "not known"),
        (f"{done} at", _moment(change.at)),
    )
    return tuple(
        Message(to=address, subject=subject, opening=opening, facts=facts, closing=closing)
        for address in to
    )


def _summary(action: str, details: Mapping[str, str], product: str) -> tuple[str, str]:
    """Return the subject and the first sentences of a notice."""
    kind = details.get("kind")
    if action is Action.UNLOCK:
        subject = "Confirmation numbers are accepted again"
        opening = (
            "Too many wrong confirmation numbers were typed in under the name below. "
            f"{product[0].upper()}{product[1:]} now accepts numbers from that user again."
        )
    elif action is Action.REQUEST:
        subject = "A change of login addresses was asked for"
        opening = (
            f"Somebody asked {product} to change the addresses that you may log in from. Nothing "
            "has changed yet."
        )
        if "ready_at" in details:
            opening += " The change waits until the time below."
        if "approvals" in details:
            opening += " It needs the approval of other administrators."
    elif action is Action.APPROVE:
        subject = "A change of login addresses was approved"
        opening = (
            f"Somebody approved a change of the addresses that a user may log in to {product} "
            "from. Nothing has changed yet: the change still needs its number, another approval, "
            "or its requester's confirmation after the wait."
        )
    elif action in (Action.DELETE, Action.LIFT) or kind == "delete":
        subject = "Login addresses were deleted"
        opening = f"Addresses were deleted from those that a user may log in to {product} from."
    elif action in (Action.CONFIRM, Action.IMPOSE, Action.IMPOSE_MANY):
        many = action is Action.IMPOSE_MANY or "users" in details
        who = "several users" if many else "a user"
        replaced = kind == "replace" or "true" in (details.get("only"), details.get("replace"))
        subject = f"Login addresses{f' of {who}' if many else ''} were "
        subject += "replaced" if replaced else "added"
        opening = (
            f"Addresses that {who} may log in to {product} from were replaced by others."
            if replaced
            else f"Addresses were added to those that {who} may log in to {product} from."
        )
        opening += " Logins from any other address are refused."
    else:
        subject = "A change was recorded"
        opening = f"This was done in {product}: {action.replace('_', ' ')}."
    return subject, opening


def _known_addresses(text: str) -> str:
    with contextlib.suppress(AddressError):
        return _several([AddressRange.parse(each) for each in text.split(", ") if each])
    return _line(text)


def _known_moment(text: str) -> str:
    with contextlib.suppress(ValueError):
        return _moment(datetime.fromisoformat(text).astimezone(UTC))
    return _line(text)


def _wrap(text: str) -> str:
    lines = (fill(p, 72, break_long_words=False, break_on_hyphens=False) for p in text.split("\n"))
    return "\n\n".join(lines)


def _paragraphs(text: str) -> Iterator[str]:
    return (f"<p>{escape(paragraph)}</p>" for paragraph in text.split("\n"))


def _line(text: str, most: int = _LONGEST_FACT) -> str:
    """Return untrusted text as one printable line of bounded length."""
    shown = text[:most] + ("…" if len(text) > most else "")
    return "".join(c if c.isprintable() else "\ufffd" for c in shown).strip()


def _words(text: str, most: int = _LONGEST_FACT) -> str:
    """Return a person's words so that mail programs turn no part of them into a link."""
    return _LINKS.sub(lambda found: f"[{found[0]}]", _line(text, most))


def _several(ranges: Sequence[AddressRange]) -> str:
    return _joined(list(map(_addresses, ranges)))


def _joined(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more


def _addresses(addresses: AddressRange) -> str:
    return f"{addresses} ({addresses.size:,} addresses)" if addresses.size > 1 else str(addresses)


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"
