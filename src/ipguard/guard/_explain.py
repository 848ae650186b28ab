"""What an operator wants to see of one question, read from the store at that moment."""

from __future__ import annotations

from ipguard.addresses import parse_address
from ipguard.errors import AddressError, StoreUnavailable, UsernameError, shorten
from ipguard.model import Decision, Explanation, Reason
from ipguard.rules import decide, summarise
from ipguard.store import RestrictionStore
from ipguard.usernames import canonical_username


def explain(
    store: RestrictionStore, username: str, address: str, *, deny_unknown: bool, revision: int
) -> Explanation:
    """Explain one question; see `Guard.explain`.

    Args:
        store: What is read.
        username: As for `Guard.check`.
        address: As for `Guard.check`.
        deny_unknown: Whether users that nobody registered are refused.
        revision: The guard's, for an answer that needs no store.

    Raises:
        StoreUnavailable: The store does not answer.
    """
    now = store.now()
    try:
        client = parse_address(address)
    except AddressError:
        client = None
    try:
        name = canonical_username(username)
    except UsernameError as exc:
        return Explanation(
            username=str(exc.text),
            address=None if client is None else str(client),
            decision=Decision(allowed=False, reason=Reason.BAD_USERNAME, revision=revision),
            restrictions=(),
            known=False,
            at=now,
            summary=str(exc),
        )
    try:
        policy = store.load_policy(name)
    except StoreUnavailable:
        raise
    except Exception as exc:
        raise StoreUnavailable(f"the store does not answer: {exc}") from exc
    decision = decide(policy, client, now, deny_unknown=deny_unknown)
    verdict = "allowed" if decision else "not allowed"
    return Explanation(
        username=name,
        address=None if client is None else str(client),
        decision=decision,
        restrictions=policy.restrictions,
        known=policy.known,
        at=now,
        summary=(
            f"{name} from {shorten(address) if client is None else client}: {verdict} "
            f"({decision.reason}). {'Registered' if policy.known else 'Not registered'}; "
            f"restricted to: {summarise(policy.restrictions, now)}."
        ),
    )
