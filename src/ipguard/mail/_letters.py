"""The wording of the mails, apart from how they are sent.

Nothing that a person or a host wrote gets into a header other than `To`: a header's value is read
again by the mail library, which decodes `=?utf-8?q?…?=` in it, line breaks included, and not every
supported Python stops those (CVE-2024-6923). In the body each such text is one line, so that no
label can pretend to be another line of the mail. There are no links, and what a person wrote is
shown so that no program makes a link of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from textwrap import fill
from typing import Final

import attrs

from ipguard.addresses import AddressRange
from ipguard.errors import AddressError
from ipguard.model import Action, Actor, Change, PendingRequest, RequestKind, User

_LONGEST_FACT: Final = 600
_WIDTH: Final = 72
_LINKS: Final = re.compile(r"(?<=\w)\.(?=[^\W\d])|:(?=//)")


@attrs.frozen(kw_only=True)
class Letter:
    """One mail to one person.

    Attributes:
        to: The recipient's address.
        subject: Fixed words.
        opening: What happened.
        number: The confirmation number, or None.
        facts: What it is about: names and values.
        closing: What to do, and what not.
    """

    to: str
    subject: str
    opening: str
    number: str | None = attrs.field(default=None, repr=False)
    facts: tuple[tuple[str, str], ...]
    closing: str

    def text(self) -> str:
        """Return the mail as plain text."""
        width = max(len(name) for name, _ in self.facts) + 1
        facts = "\n".join(f"  {name + ':':<{width}} {value}" for name, value in self.facts)
        number = [] if self.number is None else [f"    {self.number}"]
        return "\n\n".join([_wrapped(self.opening), *number, facts, _wrapped(self.closing)]) + "\n"

    def html(self) -> str:
        """Return the mail as HTML that needs nothing from elsewhere and links nowhere."""
        return "\n".join(self._html())

    def _html(self) -> Iterator[str]:
        yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Without this, iOS makes telephone links of confirmation numbers and addresses.
        yield '<meta name="format-detection" content="telephone=no, date=no, address=no, email=no">'
        yield f"<title>{escape(self.subject)}</title></head>"
        yield '<body style="font-family: sans-serif; font-size: 15px; color: #111">'
        yield from _paragraphs(self.opening)
        if self.number is not None:
            style = "font-family: monospace; font-size: 26px; font-weight: bold"
            yield f'<p style="{style}">{escape(self.number)}</p>'
        yield '<table cellpadding="4">'
        for name, value in self.facts:
            yield f'<tr><th align="left">{escape(name)}</th><td>{escape(value)}</td></tr>'
        yield "</table>"
        yield from _paragraphs(self.closing)
        yield "</body></html>\n"


def number_letter(request: PendingRequest, number: str, actor: Actor, product: str) -> Letter:
    """Write the mail with a confirmation number; it shows what would be confirmed."""
    adding = request.kind is RequestKind.ADD
    facts = [
        ("Change", "add these addresses" if adding else "delete these addresses"),
        ("User", _line(request.username)),
        ("Addresses", _addresses(request.addresses)),
        ("Label", _written(request.label)),
        ("Reason", _written(request.reason)),
        ("Temporary, until", _moment(request.restriction_expires_at)),
        ("Asked for by", _line(request.requested_by)),
        ("From address", actor.address or "not known"),
        ("Asked for at", _moment(request.requested_at)),
        ("Number valid until", _moment(request.number_expires_at)),
    ]
    return Letter(
        to=actor.email,
        subject=f"Confirmation number to {'add' if adding else 'delete'} login addresses",
        opening=f"You asked {product} to change the addresses that a user may log in from. Nothing "
        "has changed yet. To confirm the change below, type this number in on the page where you "
        "asked for it:",
        number=number,
        facts=tuple(fact for fact in facts if fact[1]),
        closing="The number is good for this one change only. Nobody who works for "
        f"{product} will ever ask you for it. Do not pass it on: not by phone, mail or chat.\n"
        "If you did not ask for this change, do not type the number in, and tell your "
        "administrator at once: somebody may be using your account.",
    )


def trial_letter(to: str, product: str, now: datetime) -> Letter:
    """Write a mail that says no more than that mails arrive."""
    return Letter(
        to=to,
        subject="A test of the mails about login addresses",
        opening=f"This is a test: what {product} mails about login addresses arrives here.",
        facts=(("Sent at", _moment(now)),),
        closing="Nothing has changed, and there is nothing to do.",
    )


def notices(change: Change, actor: Actor, user: User | None, product: str) -> tuple[Letter, ...]:
    """Write the mails about a change: to the actor, and to the user where that is somebody else."""
    details = change.detail
    subject, opening = _told(change.action, details.get("kind"), product)
    after = [sentence for name, sentence in _AFTER.items() if details.get(name) == "true"]
    username = change.username or (user.username if user is not None else "")
    facts = (
        ("User", _line(username)),
        ("Name", "" if user is None else _written(user.full_name)),
        ("Addresses", _known_addresses(details.get("addresses", ""))),
        ("Label", _written(details.get("label", ""))),
        ("Restrictions", _line(details.get("restrictions", ""))),
        ("Temporary, until", _known_moment(details.get("expires_at", ""))),
        ("Reason", _written(details.get("reason", ""))),
        ("Particulars", _line(details.get("", ""))),
        ("Done by", _line(change.actor or actor.username)),
        ("From address", change.actor_address or "not known"),
        ("Done at", _moment(change.at)),
    )
    to = [actor.email]
    if user is not None and user.email is not None and not _same(user.email, actor.email):
        to.append(user.email)
    return tuple(
        Letter(
            to=address,
            subject=subject,
            opening="\n".join([opening, *after]),
            facts=tuple(fact for fact in facts if fact[1]),
            # The same to both: one address may be both of them.
            closing="You are told because you made this change, or because it concerns you. If you "
            "did not expect it, tell your administrator at once.",
        )
        for address in to
    )


_AFTER: Final = {
    "unrestricted": "No restriction is left: this user can now log in from any address.",
    "restricted_to_nothing": "What is left has expired: this user can log in from no address.",
}


def _told(action: str, kind: str | None, product: str) -> tuple[str, str]:
    """Return the subject and the first sentence of a notice."""
    if action is Action.IMPOSE_MANY:
        subject = "Login addresses of several users were added"
        told = (
            f"Addresses were added to those that several users may log in to {product} from. From "
            "any address that is not among their own they are refused."
        )
    elif action is Action.UNLOCK:
        subject = "Confirmation numbers are accepted again"
        told = (
            "Too many wrong confirmation numbers were typed in under the name below. "
            f"{product[0].upper()}{product[1:]} now accepts numbers from that user again."
        )
    elif action in (Action.DELETE, Action.LIFT) or kind == "delete":
        subject = "Login addresses were deleted"
        told = f"Addresses were deleted from those that a user may log in to {product} from."
    elif action in (Action.CONFIRM, Action.IMPOSE):
        subject = "Login addresses were added"
        told = (
            f"Addresses were added to those that a user may log in to {product} from. From any "
            "address that is not among them the user is refused."
        )
    else:
        subject = "A change was recorded"
        told = f"This was done in {product}: {action.replace('_', ' ')}."
    return subject, told


def _known_addresses(text: str) -> str:
    with contextlib.suppress(AddressError):
        return _addresses(AddressRange.parse(text))
    return _line(text)


def _known_moment(text: str) -> str:
    with contextlib.suppress(ValueError):
        return _moment(datetime.fromisoformat(text).astimezone(UTC))
    return _line(text)


def _wrapped(text: str) -> str:
    return "\n\n".join(
        fill(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.split("\n")
    )


def _paragraphs(text: str) -> Iterator[str]:
    return (f"<p>{escape(paragraph)}</p>" for paragraph in text.split("\n"))


def _line(text: str) -> str:
    """Return text from outside as one bounded line, whatever it holds."""
    shown = text[:_LONGEST_FACT] + ("…" if len(text) > _LONGEST_FACT else "")
    return "".join(c if c.isprintable() else "\ufffd" for c in shown).strip()


def _written(text: str) -> str:
    """Return a person's own words so that no mail program makes a link of them."""
    return _LINKS.sub(lambda found: f"[{found[0]}]", _line(text))


def _addresses(addresses: AddressRange) -> str:
    return f"{addresses} ({addresses.size:,} addresses)" if addresses.size > 1 else str(addresses)


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _same(one: str, other: str) -> bool:
    # A server may tell capitals before the @ apart (RFC 5321 2.4); hardly one does, and then the
    # two addresses are the same person's.
    return one.casefold() == other.casefold()
