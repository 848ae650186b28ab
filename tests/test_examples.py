"""The examples of the kits are as short as the documentation says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LONGEST, GLUE = 60, {"flask_app": 10, "fastapi_app": 10}  # lines


def section_of_settings(text: str) -> set[int]:
    """Return the numbers of the lines of the settings and templates."""
    headings = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("# -----")]
    first, last = headings
    return set(range(first, last))


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines with code, without the module's docstring."""
    docstring = ast.parse(text).body[0]
    lines = enumerate(text.splitlines(), 1)
    found = {n for n, line in lines if line.strip() and not line.lstrip().startswith("#")}
    return found - set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))


def glue_lines(text: str) -> set[int]:
    """Return the numbers of the lines that name ipguard or an object made of it."""
    tree = ast.parse(text)
    ours = {"ipguard", "IPGuard"}
    for each in tree.body:
        if isinstance(each, ast.Assign) and ours.intersection(makers(each.value)):
            ours.update(names(each.targets))
    found = {
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in ours
    }
    lines = enumerate(text.splitlines(), 1)
    return found | {n for n, line in lines if re.match(r"(import|from) ipguard\b", line)}


def makers(value: ast.expr) -> Iterator[str]:
    """Yield the names that an expression begins with: `a` of `a.b(c)`."""
    match value:
        case ast.Name():
            yield value.id
        case ast.Call():
            yield from makers(value.func)
        case ast.Attribute():
            yield from makers(value.value)
        case ast.Tuple():
            for each in value.elts:
                yield from makers(each)
        case _:
            pass


def names(targets: list[ast.expr]) -> Iterator[str]:
    for target in targets:
        yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


@pytest.mark.parametrize("name", GLUE)
def test_an_example_is_short(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(code_lines(text) - section_of_settings(text)) <= LONGEST
    glue = glue_lines(text)
    lines = text.splitlines()
    assert len(glue) <= GLUE[name], "\n".join(lines[number - 1] for number in sorted(glue))


def test_the_site_of_django_is_short() -> None:
    """Its settings and templates are not counted; as glue, they are."""
    site = EXAMPLES / "site_django"
    texts = {path.name: path.read_text() for path in site.rglob("*.py")}
    code = [
        line for name, text in texts.items() if name != "settings.py" for line in text.splitlines()
    ]
    assert len(code) <= LONGEST
    glue: list[str] = []
    for name in ("settings.py", "models.py", "urls.py"):
        whole = {
            number
            for node in ast.parse(texts[name]).body[1:]  # without the docstring
            if "ipguard"
            in (ast.get_source_segment(texts[name], node) or "").partition("\n")[0].lower()
            for number in range(node.lineno, (node.end_lineno or 0) + 1)
        }
        glue += [
            line
            for number, line in enumerate(texts[name].splitlines(), 1)
            if number in whole or re.search(r"^ .*ipguard", line)
        ]
    assert len(glue) <= 15, "\n".join(glue)
