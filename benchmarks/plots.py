"""The plots: PNG and SVG. Colours that the colour-blind can tell apart, and never colour alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, Any]

# Okabe and Ito's colours, and a mark for each.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#777777"
MARKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (RED, "D"), (PURPLE, "v"), (SKY, "P"))


def draw(results: Results, folder: Path) -> str:
    """Draw what there are figures for, and tell what was drawn."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only `dev.py bench` installs it

        mpl.use("agg")
        import matplotlib.pyplot as plt  # noqa: PLC0415
    except ImportError as exc:
        return f"no plots: {exc}"
    # Text stays text, and the same figures give the same file.
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ipguard", "font.size": 10}
    drawn = []
    for name, plot in PLOTS.items():
        figure = None
        try:
            figure = plot(plt, results)
            for suffix, more in (("png", {"dpi": 120}), ("svg", {"metadata": {"Date": None}})):
                figure.savefig(folder / f"{name}.{suffix}", bbox_inches="tight", **more)
            drawn.append(name)
        except KeyError as exc:
            drawn.append(f"({name}: not measured, {exc})")
        finally:
            if figure is not None:
                plt.close(figure)
    return "plots: " + ", ".join(drawn)


def _median(results: Results, part: str, subject: str) -> float | None:
    found = results["parts"][part]["subjects"].get(subject)
    return found["median_ns"] if found else None


def _grid(axes: Any) -> None:
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _times(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: PLC0415

    def written(value: float, _: int) -> str:
        for unit, length in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
            if value >= length:
                return f"{value / length:g} {unit}"
        return f"{value:g} ns"

    axis.set_major_locator(LogLocator(10))
    axis.set_major_formatter(FuncFormatter(written))


def _counts(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: PLC0415

    axis.set_major_locator(LogLocator(10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def compared(plt: Any, results: Results) -> Any:
    """What one question costs ipguard, the floors, and everything it is compared with."""
    kinds = {
        "warm": "asked before, one user",
        "warm-many": "asked before, many users at random",
        "first-ipv4": "new IPv4 address",
        "first-ipv6": "new IPv6 address",
    }
    subjects = ["floor", "ipguard", *(peer["name"] for peer in results["peers"])]
    figure, axes = plt.subplots(figsize=(9, 6))
    for (part, label), (colour, mark), lift in zip(
        kinds.items(), MARKS, (0.24, 0.08, -0.08, -0.24), strict=False
    ):
        floor = results["parts"][part]["floor"]
        found = [_median(results, part, floor if it == "floor" else it) for it in subjects]
        rows = [(n + lift, it) for n, it in enumerate(reversed(found)) if it is not None]
        axes.plot(
            [it for _, it in rows], [n for n, _ in rows], mark, color=colour, label=label, ms=7
        )
    axes.set_xscale("log")
    _times(axes.xaxis)
    axes.set_yticks(range(len(subjects)), list(reversed(subjects)))
    axes.set_xlabel("median time of one question (logarithmic; left is faster)")
    axes.axhspan(len(subjects) - 2.5, len(subjects) - 1.5, color="#f0f0f0", zorder=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False)
    _grid(axes)
    axes.set_title("One question, side by side in the same process")
    return figure


def restrictions(plt: Any, results: Results) -> Any:
    """How the cost grows with the restrictions of a user."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    ours = results["parts"]["restrictions"]["subjects"]
    styles = iter(((BLUE, "o", "-"), (GREEN, "^", "-")))
    for kind, label in (("warm", "ipguard, asked before"), ("first sight", "ipguard, new address")):
        colour, mark, line = next(styles)
        points = _by_number(ours, rf"{kind}, ([\d,]+) restrictions?")
        axes.plot(*zip(*points, strict=True), f"{line}{mark}", color=colour, label=label, lw=2.5)
    peers = results["parts"].get("restrictions-peers", {"subjects": {}})["subjects"]
    lines = ("--", ":")
    marks = "svDPX*<>hd1"
    colours = (ORANGE, RED, PURPLE, SKY, GREY, BLACK)
    for number, peer in enumerate(results["peers"]):
        points = _by_number(peers, rf"{re.escape(peer['name'])}, ([\d,]+)")
        if points:
            axes.plot(
                *zip(*points, strict=True),
                lines[number // len(colours)],
                marker=marks[number % len(marks)],
                color=colours[number % len(colours)],
                label=f"{peer['name']}, new address",
                lw=1.2,
                ms=6,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _times(axes.yaxis)
    _counts(axes.xaxis)
    axes.set_xlabel("restrictions of the user (logarithmic, as is the time)")
    axes.set_ylabel("median time of one question")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _grid(axes)
    axes.set_title("More restrictions")
    return figure


def _by_number(subjects: dict[str, Any], pattern: str) -> list[tuple[int, float]]:
    found = []
    for told, it in subjects.items():
        match = re.fullmatch(pattern, told)
        if match and it["median_ns"] is not None:
            found.append((int(match[1].replace(",", "")), it["median_ns"]))
    return found


def users(plt: Any, results: Results) -> Any:
    """How the cost and the memory grow with the users that are remembered."""
    part = results["parts"]["users"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    floors = _by_number(part["subjects"], r"floor, ([\d,]+) users")
    left.plot(*zip(*floors, strict=True), "--x", color=BLACK, label="floor: one dict look-up")
    for kind, (colour, mark) in zip(("remembered", "preloaded"), MARKS, strict=False):
        points = _by_number(part["subjects"], rf"{kind}, ([\d,]+) users")
        if points:
            left.plot(
                *zip(*points, strict=True), f"-{mark}", color=colour, label=f"ipguard, {kind}"
            )
        sizes = [
            (int(match[1].replace(",", "")), value)
            for told, value in part["facts"].items()
            if (match := re.fullmatch(rf"bytes a user, ([\d,]+) {kind}", told)) and value
        ]
        if sizes:
            right.plot(
                [count for count, _ in sizes],
                [count * size / 2**20 for count, size in sizes],
                f"-{mark}",
                color=colour,
                label=f"ipguard, {kind}",
            )
    left.set_xscale("log")
    left.set_ylim(bottom=0)
    left.set_xlabel("users in memory")
    left.set_ylabel("median time of one question, ns")
    right.set_xscale("log")
    right.set_yscale("log")
    _counts(right.yaxis)
    right.set_xlabel("users in memory")
    right.set_ylabel("resident memory for them, MiB")
    for axes in (left, right):
        _counts(axes.xaxis)
        if axes.lines:
            axes.legend(framealpha=1)
        _grid(axes)
    figure.suptitle("More users, asked about at random")
    figure.tight_layout()
    return figure


def threads(plt: Any, results: Results) -> Any:
    """What threads answer together."""
    subjects = results["parts"]["threads"]["subjects"]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    points: list[tuple[int, float]] = []
    for (tail, label), (colour, mark) in zip(
        (("", "nobody writes"), (", with a writer", "another process commits 50 changes a second")),
        MARKS,
        strict=False,
    ):
        points = _by_number(subjects, rf"([\d,]+) threads?{tail}")
        axes.plot(
            [count for count, _ in points],
            [1e3 / cost for _, cost in points],
            f"-{mark}",
            color=colour,
            label=label,
        )
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({count for count, _ in points}))
    axes.set_xlabel("threads that ask one guard")
    axes.set_ylabel("answers of all together, million a second")
    axes.legend(framealpha=1)
    _grid(axes)
    axes.set_title("Threads (one interpreter lock)")
    return figure


def steps(plt: Any, results: Results) -> Any:
    """Where the time of a warm check and of a first sight goes."""
    subjects = results["parts"]["steps"]["subjects"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6))
    for axes, kind, title in zip(
        panels, ("warm: ", "first sight: "), ("Asked before", "New IPv4 address"), strict=True
    ):
        rows = [
            (told.removeprefix(kind), it["median_ns"])
            for told, it in subjects.items()
            if told.startswith(kind) and it["median_ns"] is not None
        ]
        before = 0.0
        for n, (told, cost) in enumerate(rows):
            whole = told == "ipguard"
            axes.barh(
                n,
                cost if whole else cost - before,
                left=0 if whole else before,
                color=BLUE if whole else SKY,
                edgecolor=BLACK,
                hatch="" if whole else "//",
                linewidth=0.8,
            )
            axes.text(cost, n, f" {cost:.0f}", va="center")
            before = cost
        axes.set_yticks(range(len(rows)), [told for told, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, max(cost for _, cost in rows) * 1.15)
        axes.set_xlabel("ns for one question, the loop included")
        axes.set_title(title)
        _grid(axes)
    figure.suptitle("Step by step: each bar adds one step to those above it")
    figure.tight_layout()
    return figure


def cold(plt: Any, results: Results) -> Any:
    """What a user costs who is not remembered."""
    subjects = results["parts"]["cold"]["subjects"]
    rows = [(told, it["median_ns"]) for told, it in subjects.items() if it["median_ns"] is not None]
    if not rows:
        raise KeyError("cold")
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for n, (told, cost) in enumerate(rows):
        ours = told.startswith("ipguard")
        axes.barh(
            n,
            cost / 1e3,
            color=BLUE if ours else ORANGE,
            hatch="" if ours else "//",
            edgecolor=BLACK,
            linewidth=0.8,
        )
        axes.text(cost / 1e3, n, f" {cost / 1e3:.1f}", va="center")
    axes.set_yticks(range(len(rows)), [told for told, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(cost for _, cost in rows) / 1e3 * 1.1)
    axes.set_xlabel("median time of one question or one read, µs")
    axes.set_title("A user who is not remembered (hatched: the bare driver)")
    _grid(axes)
    return figure


PLOTS: dict[str, Callable[[Any, Results], Any]] = {
    "compared": compared,
    "steps": steps,
    "cold": cold,
    "restrictions": restrictions,
    "users": users,
    "threads": threads,
}
