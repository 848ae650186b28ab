"""Tests that tables, diagrams and links of the documentation match the code."""

import re
import tomllib
from datetime import timedelta
from pathlib import Path

import attrs
import pytest

import dev
import ipguard
from ipguard import AddressError, AddressRange, Demand, Reason, WorkflowSettings, errors, rules
from tests.guard_mutants import MUTANTS
from tests.guard_scenarios import SCENARIOS
from tests.outages import BROKEN
from tests.test_outage import PLANTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/adr/*.md")])


def table(page: str, first: str) -> list[tuple[str, ...]]:
    """Return the rows of the table with these first headings, without backticks."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")))
    return rows


def test_diagram_and_table_of_states():
    """The docstring of `rules` and docs/settings.md have exactly the transitions of the code."""
    held = {(str(before), str(step)): str(after) for (before, step), after in rules.STEPS.items()}
    drawn = re.findall(r"^ *(\w+) --(\w+)-+> (\w+)", rules.__doc__ or "", re.MULTILINE)
    for rows in (drawn, table("docs/settings.md", "from")):
        assert {(before, step): after for before, step, after in rows} == held


def test_rooms_and_layers():
    """ARCHITECTURE.md lists every room with its layer in import-linter's contract."""
    here = {
        path.stem
        for path in (ROOT / "src" / "ipguard").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = reversed(project["tool"]["importlinter"]["contracts"][0]["layers"])
    held = {
        (room, str(number))
        for number, layer in enumerate(layers)
        for room in re.findall(r"\w+", layer)
        if room in here
    }
    assert {(row[1], row[0]) for row in table("ARCHITECTURE.md", "layer")} == held


def written(value: object) -> str:
    """Format a default as the table of settings does."""
    if isinstance(value, timedelta):
        seconds = int(value.total_seconds())
        for unit, length in (("hours", 3600), ("minutes", 60)):
            if seconds % length == 0:
                return f"{seconds // length} {unit}"
        return f"{seconds} seconds"
    if isinstance(value, Demand):
        return {Demand(number=True): "a number", Demand(): "nothing"}[value]
    return str(value)


def test_table_of_settings():
    defaults = {field.name: written(field.default) for field in attrs.fields(WorkflowSettings)}
    assert {row[0]: row[1] for row in table("docs/settings.md", "setting")} == defaults


def test_table_of_errors():
    every = {
        name
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, ipguard.IPGuardError)
    }
    listed = [row[0] for row in table("docs/settings.md", "error")]
    assert sorted(listed) == sorted(every - {"IPGuardError"})


def test_table_of_reasons():
    """docs/operations.md lists every reason and whether it allows."""
    listed = {row[0]: row[1] for row in table("docs/operations.md", "reason")}
    allowing = {Reason.UNRESTRICTED, Reason.LISTED}
    assert listed == {reason.name: "yes" if reason in allowing else "no" for reason in Reason}


@pytest.mark.parametrize(("text", "canonical"), table("docs/restrictions.md", "text | canonical"))
def test_accepted_addresses(text, canonical):
    assert str(AddressRange.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "reason", "hint"), table("docs/restrictions.md", "text | reason | hint")
)
def test_refused_addresses(text, reason, hint):
    with pytest.raises(AddressError) as refused:
        AddressRange.parse(text)
    assert (refused.value.reason, refused.value.hint) == (reason, hint or None)


def test_files_of_the_promises():
    named = [
        pattern
        for row in table("README.md", "promise")
        for pattern in re.findall(r"[\w/]+/[\w.*]*", row[1])
    ]
    assert len(named) > 5
    assert [pattern for pattern in named if not list(ROOT.glob(pattern.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        other = (page.parent / file) if file else page
        assert other.exists(), target
        if other.suffix != ".md":  # a picture
            assert not fragment, target
            continue
        headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}
        assert not fragment or fragment in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_imports_submodules(page):
    """Code does not use `ipguard.mail` or `ipguard.testing` after `import ipguard` alone.

    Other tests import them, so running the code would not show the error.
    """
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    code = re.sub(r"#.*", "", "".join(blocks))
    used = set(re.findall(r"\bipguard\.(?:mail|testing)\.", code))
    assert not used, "import the names from these modules"


def test_the_page_of_the_tests_counts_right() -> None:
    """The scenarios, mutants, switches and planted wrongs that it names exist."""
    page = (ROOT / "docs" / "how-tested.md").read_text()
    variants = dev.variants()
    sound = [variant for variant in variants if not variant.switch]
    counted = {
        "configurations": len(sound),
        "switches": len(variants) - len(sound),
        "scenarios": len(SCENARIOS),
        "mutants": len(MUTANTS),
        "planted wrongs": len(PLANTS),
        "broken guards": len(BROKEN),
    }
    for what, count in counted.items():
        assert re.findall(rf"(\d+) {what}", page) == [str(count)], what
