import json
import math
from dataclasses import replace

import numpy as np
import pytest

from reports.errors import RecordError
from reports.judging.noise import SWEEPS, noise_before, noise_floors
from reports.records import Verdict, run_to_json
from reports.results.database import ResultsDatabase
from tests.reports.judging.test_statistics import slowed

DEVICE, TPOT = "pi4b-emulated", ("pi4b-emulated", "tpot_s")


def nights(make, deviation, n, *, seed=1, engines=1, strategies=("edgemoe",)):
    """Runs of n sweeps; a night has its level, and all engines take turns."""
    rng, runs = np.random.default_rng(seed), []
    patterns = [make.run(strategy=strategy, prompts=1, repetitions=1, tokens=4) for strategy in strategies]
    for night in range(n):
        level = math.exp(rng.normal(0, deviation))
        for block in range(3):
            for pattern in patterns:
                runs.append(
                    replace(
                        slowed(pattern, level * math.exp(rng.normal(0, deviation / 10))),
                        id=f"{pattern.id}-{night}-{block}",
                        sweep_id=f"night-{night:02d}",
                        block=block,
                        engine_sha256=f"{night % engines:064d}",
                    )
                )
    return runs


def test_two_sweeps_of_one_engine_differ_by_less_as_often_as_it_says(make) -> None:
    inside = total = 0
    rng = np.random.default_rng(9)
    for seed in range(25):
        floor = noise_floors(nights(make, 0.02, 5, seed=seed), ["tpot_s"])[TPOT]
        differences = rng.normal(0, 0.02 * math.sqrt(2), 100)
        inside += (np.abs(differences) < math.log1p(floor)).sum()
        total += 100
    assert 0.97 <= inside / total <= 1.0


def test_it_grows_with_what_varies_between_sweeps_and_not_with_what_varies_within(make) -> None:
    quiet, loud = (noise_floors(nights(make, d, 6), ["tpot_s"])[TPOT] for d in (0.005, 0.05))
    assert quiet < 0.05 < loud
    assert loud / quiet == pytest.approx(10, rel=0.3)


def test_engines_are_not_mixed(make) -> None:
    """Every other night is that of an engine twice as slow."""
    runs = [slowed(r, 2.0) if int(r.engine_sha256) else r for r in nights(make, 0.005, 10, engines=2)]
    assert noise_floors(runs, ["tpot_s"])[TPOT] < 0.05
    assert noise_floors(nights(make, 0.005, 10, engines=10), ["tpot_s"]) == {}


def test_too_little_history_is_none(make) -> None:
    assert noise_floors(nights(make, 0.01, 3), ["tpot_s"]) == {}
    many = nights(make, 0.01, 3, strategies=("edgemoe", "full-load", "naive-swap"))
    assert noise_floors(many, ["tpot_s"]) == {}  # cells of a night are no nights


def test_suspect_runs_and_other_conditions_are_left_out(make) -> None:
    runs = nights(make, 0.005, 6)
    throttled = [replace(slowed(r, 9.0), id=f"{r.id}-hot", verdict=Verdict.SUSPECT, reasons=("hot",)) for r in runs[:3]]
    elsewhere = [replace(slowed(r, 9.0), id=f"{r.id}-fast", emulated=()) for r in runs[3:6]]
    assert noise_floors([*runs, *throttled], ["tpot_s"]) == noise_floors(runs, ["tpot_s"])
    assert noise_floors([*runs, *elsewhere], ["tpot_s"])[TPOT] < 0.1


@pytest.fixture
def stored(tmp_path, make):
    """Ten nights, and a sweep of another matrix among them."""
    runs = nights(make, 0.01, 10)
    with ResultsDatabase.open(tmp_path / "farm.db") as database:
        sweeps = []
        for night in range(10):
            mine = [run for run in runs if run.sweep_id == f"night-{night:02d}"]
            at = f"2026-11-{night + 1:02d}T22:00:00+00:00"
            sweeps.append(make.sweep(mine, id=mine[0].sweep_id, name="nightly", started_at=at))
            database.add_sweep(sweeps[-1])
            for run in mine:
                database.add_run(run)
        yield database, runs, sweeps


def test_history_is_that_of_the_matrix_before_the_sweep(stored) -> None:
    database, runs, sweeps = stored
    expected = [run for run in runs if "night-03" <= run.sweep_id < "night-09"]
    assert len({run.sweep_id for run in expected}) == SWEEPS
    assert noise_before(database, sweeps[9], ["tpot_s", "perplexity"]) == noise_floors(expected, ["tpot_s"])
    assert noise_before(database, sweeps[2], ["tpot_s"]) == {}
    assert noise_before(database, replace(sweeps[9], name="other"), ["tpot_s"]) == {}


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"verdict": "valid", "cell": {}}', '{"samples": 7}', '{"a b": {"c": []}}']
)
def test_a_damaged_record_is_one_line(stored, monkeypatch, damage) -> None:
    database, runs, sweeps = stored
    text = damage if damage[-1] != "}" else json.dumps(run_to_json(runs[0]) | json.loads(damage))
    monkeypatch.setattr(ResultsDatabase, "records", lambda *_: [text] * 4)
    try:
        noise_before(database, sweeps[9], ["tpot_s"])
    except RecordError as error:
        assert "damaged" in str(error) and "\n" not in str(error)
    else:
        assert damage == '{"a b": {"c": []}}'
