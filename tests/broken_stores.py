"""Stores that break one promise each, made from the reference's own source."""

import sys
import types
from pathlib import Path
from typing import Any

from ipguard import stores

_NAMES = ("broken_memory",)
SOURCES = [Path(stores.__file__ or "").with_name(name) for name in ("memory.py",)]

# A piece of the reference, the same piece broken, and the test that has to notice.
BREAKAGES: list[tuple[str, str, str]] = [
    (
        "self._copied = dict(self.rows), True",
        "self._copied = self.rows, True",
        "an_exception_undoes_everything",
    ),
    (
        "self._rows[base.head :] = turn.rows",
        "self._rows += turn.rows[:1]",
        "append_returns_the_row_that_history_shows",
    ),
    (
        "self._rows[base.head :] = turn.rows",
        "self._rows[:0] = turn.rows",
        "writers_lose_nothing_and_leave_no_gaps",
    ),
    (
        "self._commit(turn)\n            finally:",
        "pass\n            finally:\n                self._commit(turn)",
        "an_exception_undoes_everything",
    ),
    ("revision=self.head + 1", "revision=self.head", "append_returns_the_row_that_history_shows"),
    (
        "revision=self.head + 1",
        "revision=self._base.head + 1",
        "append_returns_the_row_that_history_shows",
    ),
    (
        "at=self.now,",
        "at=self.now.replace(microsecond=0),",
        "append_returns_the_row_that_history_shows",
    ),
    (
        "Turn(self._snapshot(), self.now()",
        "Turn(State(token=''), self.now()",
        "a_waiting_writer_sees_what_the_one_before_wrote",
    ),
    (
        "self._turn = threading.Lock()",
        "self._turn = threading.Semaphore(9)",
        "a_waiting_writer_sees_what_the_one_before_wrote",
    ),
    ("self._turn.release()", "pass", "an_undone_turn_leaves_no_gap"),
    (
        "self._writer == threading.get_ident()",
        "self._writer",
        "a_waiting_writer_sees_what_the_one_before_wrote",
    ),
    ("self._writer == threading.get_ident()", "False", "turns_do_not_nest"),
    ("secrets.token_hex(8)", "'0'", "every_revision_has_a_token_of_its_own"),
    ("self._origin = new_token()", "self._origin = '0'", "the_token_of_revision_0_is_random"),
    (
        "if cursor is None:",
        "cursor = cursor or (0, self._origin)\n        if not cursor:",
        "beginning_names_nobody",
    ),
    (
        "0 <= revision <= state.head or",
        "0 <= revision or",
        "a_history_that_is_not_there_is_a_reset",
    ),
    (
        "0 <= revision <= state.head or",
        "revision <= state.head or",
        "a_history_that_is_not_there_is_a_reset",
    ),
    ("token != self._token_of(revision)", "False", "a_history_that_is_not_there_is_a_reset"),
    (
        "or token != self._token_of(revision)",
        "or revision and token != self._token_of(revision)",
        "a_history_that_is_not_there_is_a_reset",
    ),
    (
        "self._rows[revision : state.head]",
        "self._rows[max(revision - 1, 0) : state.head]",
        "names_those_touched_after_the_cursor",
    ),
    (
        "self._rows[revision : state.head]",
        "self._rows[revision + 1 : state.head]",
        "names_those_touched_after_the_cursor",
    ),
    ("return Changes(state.head, state.token, EVERYBODY)", "continue", "everybody_outweighs_names"),
    ("names |= row.touches", "names = set(row.touches)", "names_those_touched_after_the_cursor"),
    ("len(names) <= NAMED_AT_MOST", "len(names) < NAMED_AT_MOST", "many_new_users_touch_everybody"),
    ("len(names) <= NAMED_AT_MOST", "True", "many_new_users_touch_everybody"),
    ("if new.touching > base.touching:", "if False:", "wait_is_woken_by_a_commit"),
    (
        "touching[-1] if touching else self._base.touching",
        "self.head",
        "wait_is_not_woken_by_what_touches_nobody",
    ),
    (
        "touching[-1] if touching else self._base.touching",
        "touching[-1] if touching else 0",
        "wait_is_not_woken_by_what_touches_nobody",
    ),
    (
        "            return self._state.touching > revision",
        "            return True",
        "wait_gives_up",
    ),
    (
        "self._closed or self._state.touching > revision",
        "False",
        "wait_returns_at_once_for_what_is_there",
    ),
    (
        "known=stored is not None and not stored.removed",
        "known=stored is not None",
        "removing_a_user",
    ),
    (
        "(name, state.policy(name))",
        "(name, self._state.policy(name))",
        "the_policies_are_of_one_snapshot",
    ),
    (
        "for name in sorted(state.restrictions))",
        "for name in sorted(state.users))",
        "policies_of_all_with_restrictions",
    ),
    (
        "in sorted(state.restrictions))",
        "in state.restrictions)",
        "policies_of_all_with_restrictions",
    ),
    (
        "((name, state.policy(name)) for name in sorted(state.restrictions))",
        "map(lambda n: (n, state.policy(n)), sorted(state.restrictions))",
        "the_policies_can_be_left_half_read",
    ),
    (
        "restriction.created_at, restriction.id\n",
        "restriction.created_at, ''\n",
        "restrictions_come_in_their_order",
    ),
    (
        "restriction.created_at, restriction.id\n",
        "restriction.created_at.second, restriction.id\n",
        "restrictions_come_in_their_order",
    ),
    ("        if left:\n", "        if True:\n", "removing_a_restriction"),
    ("        self._owners.drop(restriction_id)\n", "", "removing_a_restriction"),
    ("        if owner is None:\n            return\n", "", "removing_a_restriction"),
    ("if restriction.id in self._owners.rows:", "if False:", "an_id_is_taken_once"),
    (
        "stored.removed:\n                raise",
        "False:\n                raise",
        "an_unknown_user_refuses_all",
    ),
    (
        "if stored is None or stored.removed:\n                raise",
        "if stored and stored.removed:\n                raise",
        "an_unknown_user_refuses_all",
    ),
    ("self.restrictions(username), new,", "(), new,", "a_duplicate_refuses_all"),
    (
        "self.remove_restriction(old.id)\n            self._replaced",
        "self._replaced",
        "an_expired_duplicate_is_replaced",
    ),
    ("per_user=per_user, now", "per_user=per_user - 1, now", "no_user_gets_more_than_it_may_have"),
    ("per_user=per_user, now", "per_user=per_user + 1, now", "no_user_gets_more_than_it_may_have"),
    ("min(errors, key=_error_order)", "errors[0]", "the_first_error_is_the_same_everywhere"),
    (
        "if request.restriction_id in self._replaced",
        "if request.restriction_id",
        "requests_to_delete_what_is_replaced",
    ),
    ("return len(self._staged)", "return len(by_user)", "staged_restrictions_are_added"),
    (
        (
            "rows = () if staged is None else tuple(staged)\n"
            "        with self._take_turn(rows) as turn:\n"
        ),
        "with self._take_turn() as turn:\n            turn._staged = tuple(staged or ())\n",
        "a_slow_source_holds_nobody_up",
    ),
    (
        "rows = () if staged is None else tuple(staged)\n",
        "rows = ()\n",
        "staged_restrictions_are_added",
    ),
    ("tuple(e for e in asked if e != entry)", "asked", "when_an_actor_asked"),
    (
        "self._pending[old.request.username] = waiting - {new.id}",
        "pass",
        "saving_a_request_again_replaces_it",
    ),
    ("if new.state is RequestState.PENDING:", "if True:", "pending_requests_in_their_order"),
    ("key=lambda entry: entry[0])", "key=lambda entry: entry[0], hi=0)", "when_an_actor_asked"),
    ("(request.requested_at, request.id)", "request.id", "pending_requests_in_their_order"),
    (".get(actor, 0)", ".get(actor, len(self._failures.rows))", "failures_are_each_actors_own"),
    (
        "if stored is None or stored.removed:\n                added",
        "if stored is None:\n                added",
        "the_name_registered_again_inherits",
    ),
    ("elif stored.user != user:", "else:", "what_is_already_so_appends_nothing"),
    (
        "[*added, *updated], added, counts",
        "[*added, *updated], [*added, *updated], counts",
        "each_field_can_be_changed",
    ),
    ("[*added, *updated], added, counts", "added, added, counts", "each_field_can_be_changed"),
    ("removed, removed, audit", "removed, [], audit", "removing_a_user"),
    ("concerned[0] if len(concerned) == 1 else None", "concerned[0]", "the_row_of_several_users"),
    ("one.account_id if one else None", "None", "the_row_of_one_user"),
    ("user=stored.user, removed=True", "user=stored.user", "removing_a_user"),
    (
        "self.save_request(attrs.evolve(kept, request=closed))",
        "pass",
        "a_removed_users_requests_are_cancelled",
    ),
    (
        "{user.username: user for user in users}",
        "{u.username: u for u in users if u.email}",
        "a_user_comes_back_as_it_was_put",
    ),
    ("set(canonical_usernames(usernames))", "set([*usernames])", "removing_a_user"),
    (
        "set(canonical_usernames(usernames))",
        "set(canonical_usernames([*usernames]))",
        "one_text_is_not_several_usernames",
    ),
    ("log_change(row.change)", "pass", "the_audit_log_has_a_line_for_each_change"),
    ("after is None or name > after", "after is None or name >= after", "pages_follow_one_another"),
    (
        "found[limit - 1] if len(found) > limit",
        "found[limit - 1] if len(found) >= limit",
        "pages_follow_one_another",
    ),
    ("found[limit - 1] if len(found) > limit else None", "None", "pages_follow_one_another"),
    ("and _visible(state, stored, accounts)", "", "only_users_of_the_accounts"),
    ("accounts is Actor.EVERY_ACCOUNT and", "", "removed_users"),
    ("and stored.user.username in state.restrictions", "", "removed_users"),
    (
        "_folded(user.username).startswith(self._start)",
        "self._start in user.username",
        "search_for_the_start_of_a_name",
    ),
    ("_folded(user.account_id)", "user.account_id", "search_for_the_start_of_a_name"),
    (
        'f" {self._start}" in f" {_folded(user.full_name)}"',
        "self._start in _folded(user.full_name)",
        "search_for_the_start_of_a_name",
    ),
    (
        "self._address in r.addresses for",
        "self._address == r.addresses for",
        "search_for_an_address",
    ),
    (
        "self._address in r.addresses for",
        "self._address.first <= r.addresses.last for",
        "search_for_an_address",
    ),
    (
        'normalize("NFKC", once).casefold()',
        "text.casefold()",
        "search_for_the_start_of_a_name",
    ),
    ("if rules.state_at(request, now) is RequestState.PENDING", "", "what_has_expired"),
    ("        removed=stored.removed,\n", "", "removed_users"),
    ("change.account_id in accounts and", "", "rows_are_seen_by_the_account_of_their_time"),
    (
        "change.account_id in accounts",
        "change.account_id in (None, *accounts)",
        "rows_without_account_are_for_every_account",
    ),
    ("and username in (None, change.username)", "", "rows_of_one_user"),
    ("min(head, before - 1)", "min(head, before)", "the_newest_is_first"),
    (
        "items[-1].revision if len(found) > limit",
        "items[-1].revision if items",
        "the_newest_is_first",
    ),
    (
        'check_whole("limit", limit, 1)\n        accounts = check_accounts(accounts)\n        head',
        "accounts = check_accounts(accounts)\n        head",
        "a_page_has_room_for_one",
    ),
    ("if self._closed:", "if False:", "a_closed_store_refuses"),
    (
        "self._closed = True\n            self._touched.notify_all()",
        "self._closed = True",
        "a_closed_store_lets_the_waiting_go",
    ),
    (
        "class MemoryStore(Closing):\n",
        "class MemoryStore(Closing):\n    def __exit__(self, *_): pass\n",
        "a_store_is_a_context_manager",
    ),
    ("accounts = check_accounts(accounts)\n        state", "state", "one_text_is_no_set"),
    ("accounts = check_accounts(accounts)\n        head", "head", "one_text_is_no_set"),
]


def store_class(old: str = "", new: str = "") -> Any:
    """The reference, made from its source with one piece replaced."""
    texts = [source.read_text() for source in SOURCES]
    assert not old or sum(text.count(old) for text in texts) == 1, f"not there, or not once: {old}"
    modules: list[types.ModuleType] = []
    for name, text in zip(_NAMES, texts, strict=True):
        module = types.ModuleType(name)
        sys.modules[name] = module  # attrs looks modules up by name
        modules.append(module)
        broken = text.replace(old, new) if old else text
        exec(broken.replace("from ipguard.stores.memory", "from broken_memory_turn"), vars(module))
    return modules[0].MemoryStore


def forget() -> None:
    """Take the modules of broken stores out of the way again."""
    for name in _NAMES:
        sys.modules.pop(name, None)
