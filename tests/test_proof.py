"""Tests that the lease's model, the command that checks it and its page agree."""

import re
from pathlib import Path

import dev

ROOT = Path(__file__).resolve().parent.parent


def switches() -> set[str]:
    """Return the switches that `dev.py model` tries."""
    return {variant.switch for variant in dev.variants() if variant.switch}


def test_every_switch_breaks_the_model_somewhere():
    """The switches that are listed are those that the model's text depends on."""
    text = dev.MODEL.read_text()
    conditions = "\n".join(re.findall(r"^#(?:if|elif).*$", text, re.MULTILINE))
    names = set(re.findall(r"\b[A-Z][A-Z_]+\b", conditions))
    assert names - {"EVENTS", "MAX_STALENESS", "MONOTONIC", "ORDER", "PRELOAD"} == switches()


def test_every_configuration_is_checked_sound():
    sound = [variant.configuration for variant in dev.variants() if not variant.switch]
    assert {variant.configuration for variant in dev.variants()} == set(sound)
    assert len(sound) == len(set(sound)) > 1


def test_the_page_explains_every_switch_and_names_code_that_exists():
    page = (ROOT / "docs" / "proof.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| \d+ \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == [v.switch for v in dev.variants() if v.switch]
    code = "\n".join(path.read_text() for path in (ROOT / "src" / "ipguard").rglob("*.py"))
    for _, where in rows:
        for owner, name in re.findall(r"`([A-Z]\w+|_\w+)\.(\w+)`", where):
            assert owner.startswith("_") or re.search(rf"^class {owner}\b", code, re.MULTILINE)
            assert re.search(rf"def {name}\b", code), name


def test_the_page_says_of_each_truth_what_checks_it():
    page = (ROOT / "docs" / "proof.md").read_text()
    rows = re.findall(r"^\| (\d+) [^|]*\| (.*) \|$", page, re.MULTILINE)
    assert [int(truth) for truth, _ in rows] == list(range(1, 14))
    for truth, how in rows:
        named = re.findall(r"`([A-Z_]+)`", how)
        assert named == [v.switch for v in dev.variants() if v.truth == truth]
        files = re.findall(r"`(tests/\w+\.py)`", how)
        assert named or files
        assert all((ROOT / file).exists() for file in files)
