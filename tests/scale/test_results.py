"""The database of years that others measure on is what it says."""

from statistics import median

import pytest

from reports.metrics import METRICS
from reports.results.database import ResultsDatabase
from tests.programs.scale.results import LIMITS_S, measure
from tests.programs.scale.years import BLOCKS, DEVICES, NAME, WORKLOADS, Change, fill


def filled(path, **options):
    with ResultsDatabase.open(path) as database:
        sweeps = fill(database, 2 * 135, **options)
        return [sweep.id for sweep in sweeps], database.runs(), database.baseline(NAME)


def test_nights_are_seeded_complete_and_as_slow_as_they_should_be(tmp_path):
    change = Change("pi5", "edgemoe", 1, 1.5)
    (first, second), runs, baseline = filled(tmp_path / "a.db", changes=[change])
    assert baseline.sweep_id == first
    assert len(runs) == 2 * len(DEVICES) * len(WORKLOADS) * 3 * BLOCKS
    assert filled(tmp_path / "b.db", changes=[change])[1] == runs
    assert filled(tmp_path / "c.db", changes=[change], seed=2)[1] != runs

    def tpot_s(sweep_id, device):
        found = [run for run in runs if run.sweep_id == sweep_id and run.cell.device == device]
        return median(METRICS["tpot_s"].of(run) for run in found if run.cell.strategy == "edgemoe")

    assert tpot_s(second, "pi5") / tpot_s(first, "pi5") == pytest.approx(1.5, rel=0.05)
    assert tpot_s(second, "pi4b") / tpot_s(first, "pi4b") == pytest.approx(1.0, rel=0.05)


@pytest.mark.heavy
def test_a_database_of_years_answers(tmp_path):
    """ci/bench-results holds the limits, on a machine that does nothing else; here only that all of it works."""
    result = measure(tmp_path / "farm.db", 5000, tmp_path)
    assert result["runs"] >= 5000
    assert all(result[name] > 0 for name in LIMITS_S)
