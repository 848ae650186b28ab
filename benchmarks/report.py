"""What was measured, as JSON and as Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ipguard
from benchmarks import goals
from benchmarks.measure import Figures
from benchmarks.parts import PARTS
from benchmarks.peers import PEERS
from benchmarks.peers.common import TABLE, Answers
from benchmarks.scale import Scale

FORMAT = 1
Results = dict[str, Any]


def machine() -> dict[str, str]:
    """Return what it was measured on, as far as it matters and says nothing about whose it is."""
    cpu = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+)", _text("/proc/meminfo"))
    return {
        "processor": cpu[1] if cpu else platform.processor() or "unknown",
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {_kernel()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "ipguard": ipguard.__version__,
        **{name: _version(name) for name in ("attrs", "cachetools", "netaddr", "pyperf")},
        "sqlite": sqlite3.sqlite_version,
        "postgresql": _postgres(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _kernel() -> str:
    # Who built it for whom is nobody's business.
    return ".".join(re.findall(r"\d+", platform.release())[:2])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _postgres() -> str:
    try:
        from tests.postgres import programs  # noqa: PLC0415 - it needs the driver

        command = [str(programs() / "postgres"), "--version"]
        return subprocess.check_output(command, text=True).split()[2]
    except Exception as exc:
        return f"none: {exc}".splitlines()[0]


def results(
    scale: Scale,
    told: Mapping[str, Figures],
    answers: Mapping[str, Answers],
    on: Mapping[str, str],
    seconds: float,
) -> Results:
    """Put everything together that is written down."""
    return {
        "format": FORMAT,
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "scale": {"name": scale.name, "processes": scale.processes, "rounds": scale.rounds},
        "seconds": round(seconds),
        "machine": dict(on),
        "parts": {part: _part(part, scale, figures) for part, figures in told.items()},
        "peers": [
            {
                "name": peer.name,
                "version": peer.version(),
                "how": peer.how,
                "lacks": peer.lacks,
                "questions": len(TABLE),
                "right": answers[peer.name].right,
                "lets in": answers[peer.name].lets_in,
                "keeps out": answers[peer.name].keeps_out,
                "raises": answers[peer.name].raises,
                "error": answers[peer.name].error,
                "ipguard's cost to its": {
                    part: goals.ahead(told, part).get(peer.name)
                    for part in goals.AHEAD
                    if part in told
                },
            }
            for peer in PEERS
        ],
        "goals": [
            {
                "goal": goal.text,
                "wanted": goal.wanted(),
                "measured": (measured := goal.measured(told)),
                "reached": goal.reached(measured),
                "about": goal.about(told),
            }
            for goal in goals.goals(scale)
        ],
    }


def _part(name: str, scale: Scale, figures: Figures) -> dict[str, Any]:
    part = PARTS[name](scale)
    floor = part.subjects[0].name
    subjects: dict[str, dict[str, Any]] = {}
    for subject in part.subjects:
        seconds = list(figures.seconds.get(subject.name, {}).values())
        per = None if subject.name == floor else subject.per or floor
        ratios = figures.ratios(subject.name, per) if per else []
        if subject.kind == "ours":
            ratios = list(figures.over_its_own(subject.name).values())
        singles = figures.singles.get(subject.name, [])
        subjects[subject.name] = {
            "kind": subject.kind,
            "per": per,
            "note": subject.note,
            "values": len(seconds),
            "median_ns": 1e9 * statistics.median(seconds) if seconds else None,
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_from_to": _middle(ratios),
            **{
                f"single_{told}_ns": statistics.median(found) if found else None
                for told in ("p50", "p99", "p999")
                for found in [[it[told] for it in singles if told in it]]
            },
            "failed": figures.failed.get(subject.name),
        }
    return {
        "title": part.title,
        "floor": floor,
        "subjects": subjects,
        "facts": {
            told: _median([facts[told] for facts in figures.facts if facts.get(told) is not None])
            for told in (figures.facts[0] if figures.facts else ())
        }
        | {
            f"{told}: {part.a_second} a second": 1e9 / it["median_ns"]
            for told, it in subjects.items()
            if part.a_second and it["median_ns"]
        },
        "failed": {who: why for who, why in figures.failed.items() if who in ("the part", "facts")},
    }


def _middle(ratios: list[float]) -> list[float] | None:
    """Return between what the middle half of them lies."""
    if len(ratios) < 2:
        return None
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [low, high]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def write(found: Results, folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text(as_markdown(found))


# ------------------------------------------------------------------------------- Markdown


def duration(nanoseconds: float | None) -> str:
    """Write a length of time with three digits and a unit that suits."""
    if nanoseconds is None:
        return "-"
    for unit, length in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= length:
            return f"{_three(nanoseconds / length)} {unit}"
    return f"{_three(nanoseconds)} ns"


def _three(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def number(value: float | None) -> str:
    return "-" if value is None else _three(value)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def goals_as_rows(found: Results) -> list[list[str]]:
    said = {True: "yes", False: "**no**", None: "not measured"}
    return [
        [
            goal["goal"] + (f" ({goal['about']})" if goal["about"] else ""),
            goal["wanted"],
            number(goal["measured"]),
            said[goal["reached"]],
        ]
        for goal in found["goals"]
    ]


def goals_as_text(found: Results) -> str:
    rows = [["goal", "wanted", "measured", "reached"], *goals_as_rows(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def as_markdown(found: Results) -> str:
    """Return the page of all figures; it is made anew by each run."""
    pieces = [
        "# All figures\n",
        _made(found),
        table(["", "measured on"], [[key, text] for key, text in found["machine"].items()]),
        "## Goals\n",
        "Each is the median of the ratios within one run.\n",
        table(["goal", "wanted", "measured", "reached"], goals_as_rows(found)),
        "## What it is compared with\n",
        table(
            ["", "version", "used as", "right", "has no notion of"],
            [
                [
                    peer["name"],
                    peer["version"],
                    peer["how"],
                    f"{peer['right']} of {peer['questions']}",
                    peer["lacks"] or "-",
                ]
                for peer in found["peers"]
            ],
        ),
        "Where their answers to the common table differ from ipguard's:\n",
        table(
            ["", "lets in what must stay out", "keeps out what may come in", "raises an exception"],
            [
                [peer["name"], *(_grouped(peer[key]) for key in _DIFFERENCES)]
                if peer["error"] is None
                else [peer["name"], f"could not be asked: {peer['error']}", "", ""]
                for peer in found["peers"]
            ],
        ),
        _ahead(found),
        _expected(found),
        *(_section(part) for part in found["parts"].values()),
    ]
    return "\n".join(pieces)


def _made(found: Results) -> str:
    scale = found["scale"]
    return (
        f"Made by `python3 dev.py bench` on {found['made']} in {found['seconds']} s; not edited by"
        f" hand. What it means: [Performance](../performance.md). Way of running: {scale['name']},"
        f" up to {scale['processes']} processes with {scale['rounds']} rounds each.\n"
    )


def _grouped(questions: list[list[str]]) -> str:
    by_what: dict[str, list[str]] = {}
    for about, ip in questions:
        by_what.setdefault(about, []).append(f"`{ip!r}`")
    return "; ".join(f"{about}: {', '.join(ips)}" for about, ips in by_what.items()) or "-"


_DIFFERENCES = ("lets in", "keeps out", "raises")


def _ahead(found: Results) -> str:
    titles = {part: found["parts"][part]["title"] for part in goals.AHEAD if part in found["parts"]}
    rows = [
        [
            peer["name"],
            *(
                "-" if ratio is None else f"{number(1 / ratio)}"
                for ratio in (peer["ipguard's cost to its"].get(part) for part in titles)
            ),
        ]
        for peer in found["peers"]
    ]
    return "How many times ipguard's cost theirs is (below 1, they are faster):\n\n" + table(
        ["", *titles.values()], rows
    )


def _expected(found: Results) -> str:
    """Return what to expect of one process, by how many users it holds."""
    parts = found["parts"]
    if not {"users", "memory"} <= parts.keys():
        return ""
    facts, speeds = parts["users"]["facts"], parts["memory"]["subjects"]
    rows = []
    for kind in ("remembered", "preloaded"):
        costs = {
            int(match[1].replace(",", "")): it["ratio"]
            for told, it in parts["users"]["subjects"].items()
            if (match := re.fullmatch(rf"{kind}, ([\d,]+) users", told)) and it["ratio"]
        }
        each = speeds[f"ipguard, {kind}"]["median_ns"]
        if not costs or not each:
            continue
        for count in (10, 1_000, 100_000, 1_000_000, 10_000_000):
            # The nearest that was measured speaks for the others.
            near = min(costs, key=lambda had: abs(math.log(had / count)))
            size = facts[f"bytes a user, {near:,} {kind}"] * count
            rows.append(
                [
                    f"{count:,} {kind}",
                    f"{number(costs[near])}{'' if near == count else f' (as with {near:,})'}",
                    f"{number(size / 2**20)} MiB{'' if near == count else ' (reckoned)'}",
                    f"{duration(each * count)} (reckoned)",
                ]
            )
    heads = ["users in one process", "warm check ÷ floor", "memory", "until all are in memory"]
    return (
        "## What to expect as users grow\n\n"
        "Two restrictions and one remembered address a user. What was not measured is reckoned from"
        " the nearest that was. How long it takes leaves the store's own time out.\n\n"
        + table(heads, rows)
    )


def _section(part: dict[str, Any]) -> str:
    rows = [
        [
            told,
            duration(it["median_ns"]),
            _ratio(it, part["floor"]),
            duration(it["single_p50_ns"]),
            duration(it["single_p99_ns"]),
            duration(it["single_p999_ns"]),
            "; ".join(
                filter(None, [f"failed: {it['failed']}" if it["failed"] else "", it["note"]])
            ),
        ]
        for told, it in part["subjects"].items()
    ]
    heads = ["", "median", "ratio", "one call: median", "p99", "p99.9", ""]
    text = f"## {part['title']}\n\n"
    for who, why in part["failed"].items():
        text += f"**{who} failed**: {why}\n\n"
    text += f"Ratios are to *{part['floor']}*, where nothing else is said.\n\n"
    text += table(heads, rows)
    if part["facts"]:
        facts = [[told, number(value)] for told, value in part["facts"].items()]
        text += "\n" + table(["", "figure"], facts)
    return text


def _ratio(it: dict[str, Any], floor: str) -> str:
    if it["ratio"] is None:
        return "-"
    text = number(it["ratio"])
    if it["ratio_from_to"]:
        low, high = it["ratio_from_to"]
        text += f" ({number(low)} to {number(high)})"
    return text if it["per"] == floor else f"{text} to *{it['per']}*"


if __name__ == "__main__":
    # The page again, from the JSON.
    folder = Path(sys.argv[1])
    (folder / "results.md").write_text(
        as_markdown(json.loads((folder / "results.json").read_text()))
    )
