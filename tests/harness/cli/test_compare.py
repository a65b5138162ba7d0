"""`compare` as a user types it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from reports.judging.noise import SWEEPS
from reports.judging.tables import FORMATS
from reports.records import Verdict
from reports.results.database import ResultsDatabase
from tests.command_line import farm
from tests.reports.conftest import STRATEGIES, run, sweep
from tests.reports.judging.test_judgement import other_tokens
from tests.reports.judging.test_statistics import slowed

DEVICE, STRATEGY = "jetson-tx2-emulated", "edgemoe"
NIGHTS = 6
LEVELS = (1.0, 1.003, 0.996, 1.001, 1.004, 0.999)  # of the nights


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nights of one engine; then sweeps of other names, with a change each of one strategy on one device."""
    place = tmp_path_factory.mktemp("compare") / "farm.db"
    patterns = [run(device, s, tokens=8) for device in ("pi4b-emulated", DEVICE) for s in STRATEGIES]
    changes = {
        "slower": lambda r: slowed(r, 1.10),
        "throttled": lambda r: replace(slowed(r, 2.0), verdict=Verdict.SUSPECT, reasons=("throttled during the run",)),
        "wrong": lambda r: other_tokens(slowed(r, 0.5)),
        "other-engine": lambda r: replace(r, engine_sha256="e2" * 32),
    }
    with ResultsDatabase.open(place) as database:
        names = [*(f"2026-01-0{n + 1}" for n in range(NIGHTS)), *changes]
        for n, name in enumerate(names):
            measured = []
            for block, wobble in enumerate((1.0, 1.004, 0.997)):
                for pattern in patterns:
                    one = slowed(pattern, LEVELS[n % NIGHTS] * wobble)
                    if name in changes and (pattern.cell.device, pattern.cell.strategy) == (DEVICE, STRATEGY):
                        one = changes[name](one)
                    number = f"{name}-{len(measured)}"
                    measured.append(replace(one, id=number, sweep_id=name, block=block))
            at = f"2026-01-{n + 1:02d}T22:00:00+00:00"
            database.add_sweep(sweep(measured, id=name, name="nightly", started_at=at))
            for one in measured:
                database.add_run(one)
    return place


def compare(results: Path, *arguments: str, code: int = 0) -> Result:
    return farm("compare", *arguments, "--results", results, code=code, columns=200)


@pytest.mark.parametrize(
    ("name", "code", "verdict"), [("slower", 1, "worse"), ("throttled", 5, "suspect"), ("wrong", 1, "worse")]
)
def test_the_gate_tells_by_its_exit_code_and_names_the_cell(results: Path, name: str, code: int, verdict: str) -> None:
    found = json.loads(compare(results, "2026-01-06", name, "--gate", "--json", code=code).stdout)
    told = [pair for pair in found["pairs"] if pair["verdict"] not in ("unchanged", "better")]
    assert {(pair["device"], pair["strategy"], pair["verdict"]) for pair in told} == {(DEVICE, STRATEGY, verdict)}
    assert {pair["metric"] for pair in told} >= ({"answer"} if name == "wrong" else {"tpot_s"})
    assert found["exit_code"] == code
    compare(results, "2026-01-06", name, "--json")  # without --gate nothing fails


def test_nights_of_one_engine_are_unchanged_and_tell_their_noise(results: Path) -> None:
    found = json.loads(compare(results, "2026-01-05", "2026-01-06", "--gate", "--format", "json").stdout)
    assert {pair["verdict"] for pair in found["pairs"]} == {"unchanged"}
    tpot = [pair for pair in found["pairs"] if pair["metric"] == "tpot_s"]
    assert len(tpot) == 6
    assert all(0 < pair["noise"] < 0.03 and pair["ci_low"] <= pair["ratio"] <= pair["ci_high"] for pair in tpot)
    assert all(pair["ratio"] == pytest.approx(pair["candidate"] / pair["baseline"]) for pair in tpot)
    early = json.loads(compare(results, "2026-01-01", "2026-01-02", "--json").stdout)
    assert {pair["noise"] for pair in early["pairs"]} == {None}


def test_devices_strategies_and_engines(results: Path) -> None:
    devices = json.loads(compare(results, "device:pi4b-emulated", f"device:{DEVICE}", "--json").stdout)
    assert {pair["device"] for pair in devices["pairs"]} == {DEVICE}
    assert "emulation" in {difference["what"] for difference in devices["environment"]}
    strategies = compare(results, "strategy:naive-swap", "strategy:edgemoe", "--metric", "tpot_s", "--json")
    pairs = [pair for pair in json.loads(strategies.stdout)["pairs"] if pair["metric"] == "tpot_s"]
    assert [(pair["strategy"], pair["verdict"]) for pair in pairs] == [("edgemoe", "better")] * 2
    engines = json.loads(compare(results, "engine:e1@2026-01-06", "engine:e2", "--json").stdout)
    assert engines["baseline"].startswith("engine:e1e1e1e1")
    assert {"what": f"{DEVICE}: engine", "baseline": "e1" * 8, "candidate": "e2" * 8} in engines["environment"]


def test_the_terminal_has_all_or_what_changed(results: Path) -> None:
    everything = compare(results, "2026-01-06", "slower").stdout
    assert everything.splitlines()[0] == "slower against 2026-01-06"
    assert everything.splitlines()[-1] == "2 worse, 22 unchanged"
    assert everything.count("✗ worse") == 2 and everything.count("= unchanged") == 22
    changed = compare(results, "2026-01-06", "slower", "--changed").stdout
    assert "unchanged" not in changed.replace(changed.splitlines()[-1], "")
    assert "1.10" in changed


def test_thresholds_are_of_all_metrics_or_of_one(results: Path) -> None:
    for options in (("--threshold", "15%"), ("--threshold", "tpot_s=0.15", "--threshold", "ttft_s=0.15")):
        compare(results, "2026-01-06", "slower", "--gate", *options)
    compare(results, "2026-01-06", "slower", "--gate", "--threshold", "15%", "--threshold", "tpot_s=0.05", code=1)
    compare(results, "2026-01-06", "slower", "--gate", "--metric", "peak_resident_bytes")


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_all_that_is_written(results: Path, name: str) -> None:
    output = compare(results, "2026-01-06", "slower", "--format", name).stdout
    starts = {"markdown": "**slower** against", "csv": "device,", "json": "{", "latex": "% slower against 2026-01-06"}
    assert output.startswith(starts[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latest", "nothing"), "no sweep 'nothing'"),
        (("device:pi9", "latest"), "device:pi9@other-engine: no run there with device pi9"),
        (("--threshold", "much"), "write a share such as 0.05 or 5%"),
        (("--threshold", "speed=1%"), "no metric 'speed', write one of tpot_s"),
        (("--metric", "speed"), "'speed' is not one of"),
    ],
)
def test_a_mistake_is_usage(results: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in " ".join(compare(results, *arguments, code=2).stderr.split())


def test_as_much_is_read_as_is_compared(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sweeps there are: both sides, and what the noise is told by."""
    read: list[str] = []
    runs, records = ResultsDatabase._stream, ResultsDatabase.records
    monkeypatch.setattr(
        ResultsDatabase, "_stream", lambda self, **w: (read.append(r.sweep_id) or r for r in runs(self, **w))
    )
    monkeypatch.setattr(
        ResultsDatabase, "records", lambda self, sweep_id, *_: read.append(sweep_id) or records(self, sweep_id, *_)
    )
    compare(results, "other-engine~1", "other-engine")
    assert len(set(read)) <= SWEEPS + 1 < NIGHTS + 4
    assert len(read) == 2 * 18 + SWEEPS
