"""What people look at: users with their restrictions, and what was done."""

from __future__ import annotations

from ipguard._checks import check_text, check_whole
from ipguard.errors import InvalidValue
from ipguard.model import Actor, Change, Page, UserOverview
from ipguard.usernames import canonical_username
from ipguard.workflow._base import Base

_SEARCH_LIMIT = 256
_PAGE_LIMIT = 1000
_REVISION_LIMIT = 2**63 - 1  # what databases hold


class Reading(Base):
    """The calls of a workflow that change nothing."""

    def overview(
        self, actor: Actor, *, search: str = "", after: str | None = None, limit: int = 50
    ) -> Page[UserOverview]:
        """List the users of the actor's accounts with their restrictions and pending requests.

        Args:
            actor: Who looks.
            search: The start of a username, an account ID or any word of the name; or an address:
                who has a restriction that holds it. Empty: everyone.
            after: The `next` of the page before.
            limit: How many users at the most, 1 to 1,000.

        Raises:
            InvalidValue: The search, `after` or the limit makes no sense.
        """
        check_text("search", search, _SEARCH_LIMIT)
        if after is not None and not isinstance(after, str):
            raise InvalidValue("after", f"must be text, not {type(after).__name__}")
        return self._store.overview(
            actor.manages,
            search=search.strip(),
            after=after,
            limit=check_whole("limit", limit, 1, _PAGE_LIMIT),
        )

    def history(
        self,
        actor: Actor,
        *,
        username: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[Change]:
        """List what was done, the newest first.

        A row is seen by who manages the account that the user had at its time.

        Args:
            actor: Who looks.
            username: Only what concerns this user, or None.
            before: The `next` of the page before.
            limit: How many changes at the most, 1 to 1,000.

        Raises:
            InvalidValue: `before` or the limit makes no sense.
            UsernameError: The username has no canonical form.
        """
        return self._store.history(
            actor.manages,
            username=None if username is None else canonical_username(username),
            before=None if before is None else check_whole("before", before, 1, _REVISION_LIMIT),
            limit=check_whole("limit", limit, 1, _PAGE_LIMIT),
        )
