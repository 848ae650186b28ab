"""The benchmarks measure, report failures, and publish what they measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fixtures, peers, report
from benchmarks.__main__ import FULL, PARTS, SCALES, TINY
from benchmarks.measure import Part, Row, Samples, Subject, measure

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "docs" / "performance"
FEW = ("warm", "cold", "floods")


def run(*command: str, **env: str) -> str:
    """Run a module as `dev.py bench` does."""
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


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The smallest run, of a few parts or (`--long`) of all; pytricia cannot be imported."""
    out = tmp_path_factory.mktemp("bench")
    (out / "pytricia.py").write_text("raise ImportError('not installed here')\n")
    parts = PARTS if os.environ.get("IPGUARD_LONG") else FEW
    run("benchmarks", "--tiny", "--out", str(out), "--only", *parts, PYTHONPATH=str(out))
    return out, json.loads((out / "results.json").read_text())


def test_a_run_measures_every_row(ran: tuple[Path, dict[str, Any]]):
    out, results = ran
    assert results["goals"]
    for row in results["goals"]:
        assert row["ours"] is not None, row["figure"]
        assert (row["ratio"] is None) == (row["floor_figure"] is None), row["figure"]
        assert (row["met"] is None) == (row["limit"] is None), row["figure"]
    failed = {name for names in results["failed"].values() for name in names}
    assert failed <= {peer.name for peer in peers.PEERS}
    assert (out / "results.md").read_text() == report.page(results)


def test_a_peer_that_is_missing_is_reported(ran: tuple[Path, dict[str, Any]]):
    out, results = ran
    error = "ImportError: not installed here"
    assert results["failed"]["warm"]["pytricia"] == error
    assert next(it for it in results["peers"] if it["name"] == "pytricia")["answers"] == error
    page = (out / "results.md").read_text()
    assert f"| warm | pytricia | {error} |" in page
    assert f"could not be asked: {error}" in page
    for compared in results["compared"].values():
        assert compared["TTLCache + ipaddress"]["ratio"] > 0


def test_the_published_answers_are_those_of_the_installed_peers(postgres: Any):
    answers = json.loads(run("benchmarks.peers", **{fixtures.DSN: postgres.url()}))
    published = json.loads((PUBLISHED / "results.json").read_text())["peers"]
    assert [peer["name"] for peer in published] == [peer.name for peer in peers.PEERS]
    for peer, told in zip(peers.PEERS, published, strict=True):
        if peer.version() == told["version"]:
            assert answers[peer.name] == told["answers"], peer.name
    keeps_out = answers["TTLCache + ipaddress"]["keeps out"]
    assert ["mapped login", "::ffff:203.0.113.5"] in keeps_out


def test_a_failing_subject_leaves_the_others_measured(tmp_path: Path):
    def broken(loops: int) -> float:
        raise OSError(f"no {loops} loops")

    part = Part(
        title="a part",
        rows=[],
        subjects=[Subject("floor", lambda: float), Subject("broken", lambda: broken)],
        facts=lambda: [("a figure", 7.0, 2.0)],
    )
    measure(part, TINY, tmp_path / "samples.jsonl")
    samples = Samples()
    samples.read(tmp_path / "samples.jsonl")
    assert samples.failed == {"broken": "OSError: no 1 loops"}
    assert samples.pairs == {"floor": [(1.0, None)] * TINY.rounds, "a figure": [(7.0, 2.0)]}
    assert samples.ratios("a figure") == [3.5]


def test_each_sample_is_timed_back_to_back_with_its_floor(tmp_path: Path):
    calls: list[str] = []

    def noting(name: str) -> Subject:
        def work(loops: int) -> float:
            calls.append(name)
            return float(loops)

        return Subject(name, lambda: work)

    part = Part(title="a part", rows=[], subjects=[noting("floor"), noting("a"), noting("b")])
    measure(part, TINY, tmp_path / "samples.jsonl")
    first, second = calls[3:8], calls[8:]  # after one call of each for the calibration
    assert first == ["floor", "a", "floor", "b", "floor"]
    assert second == ["floor", "a", "floor", "b", "floor"]


@pytest.mark.parametrize(
    ("judged", "limit", "figure", "met"),
    [
        ("ratio", 1.5, 1.5, True),
        ("ratio", 1.5, 1.51, False),
        ("ours", 400, 399.0, True),
        ("speed", 0.9, 0.9, True),
        ("speed", 0.9, 0.89, False),
        ("ratio", None, 2.0, None),
        ("ratio", 1.5, None, None),
    ],
)
def test_when_a_goal_is_met(judged: Any, limit: Any, figure: Any, met: Any):
    assert report.is_met(Row("a figure", "a floor", "it", limit, judged), figure) is met


@pytest.mark.parametrize("number", [0, 7, 65_536, 999_999])
def test_guards_and_peers_get_the_same_restrictions(number: int):
    user = fixtures.name(number)
    texts = [str(addresses) for addresses in fixtures.ranges(number)]
    assert fixtures.Rows(count=10**6).load_policy(user) == fixtures.Rows({user: texts}).load_policy(
        user
    )
    assert fixtures.guard_of({user: texts}).is_allowed(user, fixtures.home(number))


def test_the_published_page_is_complete():
    results = json.loads((PUBLISHED / "results.json").read_text())
    scale = SCALES[results["scale"]]
    rows = [row.figure for part in PARTS.values() for row in part(scale).rows]
    assert [row["figure"] for row in results["goals"]] == rows
    assert (PUBLISHED / "results.md").read_text() == report.page(results)
    assert (PUBLISHED / "compared.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_page_does_not_identify_the_machine():
    text = (PUBLISHED / "results.json").read_text()
    machine = json.loads(text)["machine"]
    assert set(machine) == set(report.machine())
    assert re.fullmatch(r"\w+ \d+\.\d+ \w+", machine["system"])
    assert str(ROOT) not in text


def test_every_part_has_rows_with_a_floor_or_a_figure_of_its_own():
    for name, part in PARTS.items():
        for row in part(FULL).rows:
            assert row.floor or row.judged == "ours", (name, row.figure)
