"""Write the measured figures as JSON, as one page, and as a picture."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sqlite3
import statistics
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import login
from benchmarks.fixtures import server
from benchmarks.measure import Part, Row, Samples, Scale
from benchmarks.peers import PEERS, QUESTIONS, Differences

Results = dict[str, Any]
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTES = ((1e6, "MB"), (1, "B"))


def machine() -> dict[str, str]:
    """Describe the machine without identifying it."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    release = ".".join(re.findall(r"\d+", platform.release())[:2])
    return {
        "processor": cpu[1] if cpu else platform.processor() or "unknown",
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {release} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{it: importlib.metadata.version(it) for it in ("ipguard", "attrs", "netaddr")},
        "sqlite": sqlite3.sqlite_version,
        "postgresql": _postgres(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _postgres() -> str:
    with suppress(Exception):
        import psycopg  # noqa: PLC0415 - an extra

        with psycopg.connect(server()) as connection:
            return (connection.info.parameter_status("server_version") or "unknown").split()[0]
    return "none"


def results(
    scale: Scale,
    parts: Mapping[str, Part],
    measured: Mapping[str, Samples],
    answers: Mapping[str, Differences | str],
    about: Mapping[str, str],
) -> Results:
    """Return all results, ready for JSON."""
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "scale": scale.name,
        "machine": dict(about),
        "goals": [
            {"part": name} | _row(row, measured[name])
            for name, part in parts.items()
            for row in part.rows
        ],
        "failed": {name: samples.failed for name, samples in measured.items() if samples.failed},
        "compared": {
            parts[name].title: {
                subject.name: {
                    "seconds": _median([s for s, _ in measured[name].pairs.get(subject.name, [])]),
                    "ratio": _median(measured[name].ratios(subject.name)),
                }
                for subject in parts[name].subjects
            }
            for name in login.COMPARED
            if name in parts
        },
        "peers": [
            {
                **{it: getattr(peer, it) for it in ("name", "how", "lacks")},
                "version": peer.version(),
                "answers": answers[peer.name],
            }
            for peer in PEERS
        ],
    }


def _row(row: Row, samples: Samples) -> dict[str, Any]:
    """Return a row of the table of goals with its figures; None stands for a missing figure."""
    ratios = samples.ratios(row.of)
    ratios = [1 / ratio for ratio in ratios] if row.judged == "speed" else ratios
    pairs = samples.pairs.get(row.of, [])
    ours = _median([ours for ours, _ in pairs])
    judged = ours if row.judged == "ours" else _median(ratios)
    return {
        **{it: getattr(row, it) for it in ("figure", "floor", "unit", "judged", "limit")},
        "ours": ours,
        "floor_figure": _median([floor for _, floor in pairs if floor is not None]),
        "ratio": _median(ratios),
        "quartiles": statistics.quantiles(ratios, method="inclusive")[::2] if ratios[1:] else None,
        "met": is_met(row, judged),
    }


def is_met(row: Row, judged: float | None) -> bool | None:
    """Return whether a goal is met; None without a goal or a figure."""
    if row.limit is None or judged is None:
        return None
    return judged >= row.limit if row.judged == "speed" else judged <= row.limit


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


# ---------------------------------------------------------------------------- the page


def quantity(value: float | None, unit: str) -> str:
    """Write a figure with three digits and a unit that suits."""
    if value is None:
        return "-"
    for size, name in {"s": SECONDS, "B": BYTES}.get(unit, ()):
        if abs(value) >= size:
            return f"{_three(value / size)} {name}"
    return f"{_three(value)} {unit}".strip()


def _three(value: float) -> str:
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _goal(row: Mapping[str, Any]) -> str:
    if row["limit"] is None:
        return "-"
    sign = "≥" if row["judged"] == "speed" else "≤"
    return f"{sign} {quantity(row['limit'], row['unit'] if row['judged'] == 'ours' else '')}"


def goals(found: Results) -> list[list[str]]:
    """Return the table of goals as text."""
    table = [["", "floor", "floor's figure", "ipguard", "ratio (quartiles)", "goal", "met"]]
    for row in found["goals"]:
        ratio = quantity(row["ratio"], "")
        if row["quartiles"]:
            ratio += " ({} to {})".format(*(_three(it) for it in row["quartiles"]))
        met = {True: "yes", False: "**no**", None: "-"}[row["met"]]
        figures = (quantity(row[it], row["unit"]) for it in ("floor_figure", "ours"))
        table.append([row["figure"], row["floor"] or "-", *figures, ratio, _goal(row), met])
    return table


def _table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(found: Results) -> str:
    """Return the page of results."""
    failed = [[part, *it] for part, names in found["failed"].items() for it in names.items()]
    titles = list(found["compared"])
    peers = [["", "used as", *titles, "right", "lacks"]]
    differences = [["", "lets in", "keeps out", "raises"]]
    for peer in found["peers"]:
        costs = (found["compared"][title].get(peer["name"], {}).get("ratio") for title in titles)
        answers, right = peer["answers"], "-"
        if isinstance(answers, dict):
            right = f"{len(QUESTIONS) - sum(map(len, answers.values()))} of {len(QUESTIONS)}"
            differences.append([peer["name"], *map(_grouped, answers.values())])
        else:
            differences.append([peer["name"], f"could not be asked: {answers}", "", ""])
        shown = (quantity(cost, "") for cost in costs)
        how = f"{peer['how']} ({peer['version']})"
        peers.append([peer["name"], how, *shown, right, peer["lacks"]])
    pieces = [
        "# Measured figures\n",
        f"Written by `python3 dev.py bench` on {found['made']} ({found['scale']} run).\n",
        "; ".join(f"{name}: {text}" for name, text in found["machine"].items()) + ".\n",
        "## Goals\n",
        _table(goals(found)),
        *(["## Failures\n", _table([["part", "subject", "error"], *failed])] if failed else []),
        "## Peers\n",
        "The cost of a question, in units of what it costs ipguard (below 1 the peer is faster).\n",
        _table(peers),
        "The answers that differ from ipguard's:\n",
        _table(differences),
    ]
    return "\n".join(pieces)


def _grouped(questions: list[list[str]]) -> str:
    by_topic: dict[str, list[str]] = {}
    for topic, ip in questions:
        by_topic.setdefault(topic, []).append(f"`{ip!r}`")
    return "; ".join(f"{topic}: {', '.join(ips)}" for topic, ips in by_topic.items()) or "-"


def as_json(found: Results) -> str:
    """Return the figures as JSON, each on a line, so that a diff shows which have changed."""
    parts = [f" {json.dumps(name)}: {_lines(value)}" for name, value in found.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(value: object) -> str:
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    items = ",\n".join(f"  {json.dumps(each, ensure_ascii=False)}" for each in value)
    return f"[\n{items}\n ]"


def write(found: Results, folder: Path) -> None:
    """Write the JSON, the page and the picture into a folder."""
    (folder / "results.json").write_text(as_json(found))
    (folder / "results.md").write_text(page(found))
    if found["compared"]:
        try:
            draw(found, folder)
        except ImportError as exc:
            print(f"no picture: {exc}")


def draw(found: Results, folder: Path) -> None:
    """Draw the cost of one question for ipguard, its floor and its peers."""
    import matplotlib as mpl  # noqa: PLC0415 - `dev.py bench` installs it

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = ["floor", login.OURS, *(peer["name"] for peer in found["peers"])]
    figure, axes = plt.subplots(figsize=(9, 4))
    marks = zip(found["compared"].items(), "os^D", strict=False)
    for number, ((title, subjects), mark) in enumerate(marks):
        seconds = [subjects[name]["seconds"] for name in names]
        points = [(it * 1e6, n + 0.15 * (number - 1.5)) for n, it in enumerate(seconds) if it]
        axes.plot(*zip(*points, strict=True), mark, label=title)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd")
    axes.set_xlabel("µs for one question (logarithmic)")
    axes.legend()
    figure.savefig(folder / "compared.png", bbox_inches="tight", dpi=110)
