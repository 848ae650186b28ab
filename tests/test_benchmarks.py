"""The benchmarks measure for real, tell what failed, and what is published is what was measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals, measure, report, work
from benchmarks.measure import Figures, Part, Rounds, Subject
from benchmarks.parts import PARTS
from benchmarks.peers import PEERS, common
from benchmarks.peers.databases import DSN
from benchmarks.scale import FULL, QUICK, SCALES, TINY

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "docs" / "performance"
FEW = ("warm", "first-ipv6", "cold", "threads", "floods")


def run(*command: str, **env: str) -> str:
    """Run a module of the benchmarks as `dev.py bench` does."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run in the tiny way, of a few parts; of all with `--long`; pytricia is not there."""
    out = tmp_path_factory.mktemp("bench")
    (out / "pytricia.py").write_text("raise ImportError('it is not there')\n")
    parts = PARTS if os.environ.get("IPGUARD_LONG") else FEW
    said = run("benchmarks", "--tiny", "--out", str(out), "--only", *parts, PYTHONPATH=str(out))
    return out, said


@pytest.fixture(scope="module")
def results(ran: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran[0] / "results.json").read_text())
    return found


def check_shape(results: dict[str, Any]) -> None:
    """Check what is promised of the JSON."""
    assert results["format"] == report.FORMAT
    assert results["scale"]["name"] in SCALES
    assert {"processor", "cores", "memory", "system", "python", "sqlite"} <= set(results["machine"])
    scale = SCALES[results["scale"]["name"]]
    for name, part in results["parts"].items():
        assert list(part["subjects"]) == [s.name for s in PARTS[name](scale).subjects]
        assert part["floor"] in part["subjects"]
        for told, it in part["subjects"].items():
            if it["failed"] is None:
                assert it["values"] > 0, told
                assert it["median_ns"] > 0, told
                assert (it["ratio"] is None) == (told == part["floor"]), told
    assert [peer["name"] for peer in results["peers"]] == [peer.name for peer in PEERS]
    assert [goal["goal"] for goal in results["goals"]] == [g.text for g in goals.goals(scale)]
    for goal in results["goals"]:
        assert (goal["measured"] is None) == (goal["reached"] is None)


def test_a_run_ends_with_all_figures(ran: tuple[Path, str], results: dict[str, Any]):
    """Everything of ours is measured, and every goal of the parts that ran has its figure."""
    check_shape(results)
    for name, part in results["parts"].items():
        assert part["failed"] == {}, name
        for told, it in part["subjects"].items():
            if it["kind"] != "peer":
                assert it["failed"] is None, (name, told)
    measured = {goal["goal"] for goal in results["goals"] if goal["measured"] is not None}
    assert "warm, one user ÷ one dict look-up" in measured
    assert "cold user on PostgreSQL ÷ psycopg_pool reading the same rows" in measured
    assert (ran[0] / "results.md").read_text() == report.as_markdown(results)
    for goal in results["goals"]:
        assert goal["goal"] in ran[1]


def test_the_facts_are_measured(results: dict[str, Any]):
    """What is no time: commits that guards heard of, memory under floods, nobody pushed out."""
    assert results["parts"]["threads"]["facts"]["commits"] > 0
    facts = results["parts"]["floods"]["facts"]
    assert [value for told, value in facts.items() if "forgotten" in told] == [0, 0, 0]
    assert results["parts"]["cold"]["facts"]


def test_a_peer_that_is_not_there_is_told(results: dict[str, Any]):
    """It is in the tables with its error, and the others are measured."""
    (peer,) = (peer for peer in results["peers"] if peer["name"] == "pytricia")
    assert peer["error"] == "ImportError: it is not there"
    subjects = results["parts"]["warm"]["subjects"]
    assert subjects["pytricia"]["failed"] == "ImportError: it is not there"
    assert subjects["pytricia"]["median_ns"] is None
    assert subjects["TTLCache + netaddr"]["failed"] is None
    assert "could not be asked: ImportError: it is not there" in report.as_markdown(results)


# ---------------------------------------------------------------------- the common table


@pytest.fixture(scope="module")
def answers(postgres: Any) -> dict[str, dict[str, Any]]:
    """What everything answers that is installed here, asked in a process of its own."""
    found: dict[str, dict[str, Any]] = json.loads(
        run("benchmarks.peers.common", **{DSN: postgres.url()})
    )
    return found


def test_ipguard_answers_the_common_table():
    """The table is what ipguard answers, read from the store and remembered."""
    common.ours_is_right()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_what_is_published_of_a_peer_is_what_it_answers(
    peer: Any, answers: dict[str, dict[str, Any]]
):
    """Nothing wrong is said of anybody: the published table is what this version answers here."""
    (told,) = (
        it
        for it in json.loads((PUBLISHED / "results.json").read_text())["peers"]
        if it["name"] == peer.name
    )
    if peer.version() != told["version"]:
        pytest.skip(f"here: {peer.version()}; published: {told['version']}")
    found = answers[peer.name]
    keys = {"lets in": "lets_in", "keeps out": "keeps_out"}
    for key in ("right", "lets in", "keeps out", "raises", "error"):
        assert told[key] == found[keys.get(key, key)], key


def test_the_usual_way_of_writing_it_errs_where_the_table_says(answers: dict[str, dict[str, Any]]):
    """The table can tell: mapped addresses are kept out by what most would write."""
    found = answers["TTLCache + ipaddress"]
    assert ["IPv4-mapped login", "::ffff:203.0.113.5"] in found["keeps_out"]
    assert 0 < found["right"] < len(common.TABLE)


# ---------------------------------------------------------------------- how it is measured


class Clockwork:
    """Work that takes what it is told to, on a machine that is slower in each round."""

    def __init__(self, seconds: float, rounds: list[Rounds], *, fails: bool = False) -> None:
        self.seconds = seconds
        self.rounds = rounds
        self.fails = fails

    def ready(self, loops: int) -> None:
        if self.fails:
            raise OSError(f"no {loops} loops")

    def time(self, loops: int) -> float:
        return float(loops * self.seconds * (self.rounds[0]._round + 1))

    def singles(self, count: int) -> list[int]:
        return list(range(count))


def test_ratios_are_of_one_round(tmp_path: Path):
    """Each has its turn in each round, and a slow moment cancels out; what fails is told."""
    made: list[Rounds] = []
    part = Part(
        title="a part",
        subjects=[
            Subject(name="floor", kind="floor", make=lambda: Clockwork(1, made)),
            Subject(name="ours", make=lambda: Clockwork(3, made)),
            Subject(name="peer", kind="peer", make=lambda: Clockwork(5, made)),
            Subject(name="broken", kind="peer", make=lambda: Clockwork(1, made, fails=True)),
        ],
        facts=lambda: {"a figure": 7},
    )
    made.append(rounds := Rounds(part, TINY, tmp_path / "told"))
    rounds.warm_up(1)
    for _ in range(4):
        rounds.one(1)
    rounds.last()
    figures = Figures.read(tmp_path / "told")
    assert set(figures.over_its_own("ours").values()) == {3.0}
    assert set(figures.ratios("peer", "floor")) == {5.0}
    assert len(set(figures.seconds["floor"].values())) == 4
    assert figures.failed == {"broken": "OSError: no 1 loops"}
    assert figures.facts == [{"a figure": 7}]
    assert set(figures.singles) == {"floor", "ours", "peer"}


@pytest.mark.parametrize("number", [0, 7, 65_536, 999_999])
def test_a_crowd_is_the_same_however_it_is_made(number: int):
    """What a guard is given without reading text is what the others are given as text."""
    user = work.name(number)
    made = work.Rows(count=1_000_000).load_policy(user)
    assert made == work.Rows({user: work.networks(number)}).load_policy(user)
    assert work.guard_of({user: work.networks(number)}).is_allowed(user, work.home(number))


@pytest.mark.parametrize(
    ("count", "told"), [(50, {"p50"}), (100, {"p50", "p99"}), (1000, {"p50", "p99", "p999"})]
)
def test_percentiles_need_enough_calls(count: int, told: set[str]):
    """The 99.9th percentile of a hundred calls would be an invention."""
    assert set(measure._percentiles(list(range(count)))) == told


def test_a_goal_is_the_median_of_ratios():
    """A goal is reached at its limit, missed beyond it, and neither where nothing was measured."""
    (goal, *_) = goals.goals(FULL)
    figures = Figures(
        seconds={"ipguard": {(1, 0): 1.0, (1, 1): 1.9, (1, 2): 9.0}},
        beside={"ipguard": {(1, 0): 1.0, (1, 1): 1.0, (1, 2): 1.0}},
    )
    assert goal.measured({"warm": figures}) == pytest.approx(1.9)
    assert goal.reached(1.9) is True
    assert goal.reached(1.91) is False
    assert goal.measured({}) is None
    assert goal.reached(None) is None
    least = next(goal for goal in goals.goals(FULL) if goal.least)
    assert least.reached(0.95) is True
    assert least.reached(0.85) is False


# ---------------------------------------------------------------------- what is published


def test_what_is_published_is_whole():
    """The page of figures is the JSON's, with its plots, of a run that measured every part."""
    results = json.loads((PUBLISHED / "results.json").read_text())
    check_shape(results)
    assert set(results["parts"]) == set(PARTS)
    assert results["scale"]["name"] in (FULL.name, QUICK.name)
    assert (PUBLISHED / "results.md").read_text() == report.as_markdown(results)
    page = (ROOT / "docs" / "performance.md").read_text()
    for plot in ("compared", "steps", "cold", "restrictions", "users", "threads"):
        assert f"performance/{plot}.png" in page
        assert (PUBLISHED / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (PUBLISHED / f"{plot}.svg").read_text()


def test_what_is_published_tells_no_more_of_a_machine_than_matters():
    """What it is called, where its files are and who built its kernel belongs in no publication."""
    text = (PUBLISHED / "results.json").read_text()
    machine = json.loads(text)["machine"]
    assert set(machine) == set(report.machine())
    assert re.fullmatch(r"\w+ \d+\.\d+ \w+", machine["system"])
    assert str(ROOT) not in text
