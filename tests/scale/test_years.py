"""Comparing in a database of years of nightly runs."""

from __future__ import annotations

import json
import subprocess
from time import perf_counter

import pytest

from reports.results.database import ResultsDatabase
from tests.command_line import COMMAND
from tests.programs.scale.years import Change, fill

RUNS = 100_000
PATH = ("pi5", "edgemoe")


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_comparison_does_not_wait_for_years_of_runs(tmp_path, capsys):
    """Its time is printed; in few seconds nobody has read 100,000 records."""
    place = tmp_path / "farm.db"
    with ResultsDatabase.open(place) as database:
        sweeps = fill(database, RUNS, changes=[Change(*PATH, night=RUNS // 135, factor=1.10)])
    command = [*COMMAND, "compare", "--json", "--results", str(place)]
    times = []
    for _ in range(3):
        started = perf_counter()
        done = subprocess.run([*command, sweeps[-2].id, sweeps[-1].id], capture_output=True, text=True, timeout=60)
        times.append(perf_counter() - started)
        assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\ncompare in a database of {RUNS} runs: {min(times):.2f} s, with the start of Python")
    pairs = json.loads(done.stdout)["pairs"]
    found = [p for p in pairs if p["ratio"] and p["ratio"] > 1.06]
    assert {(p["device"], p["strategy"]) for p in found} == {PATH}
    assert {p["metric"] for p in found} == {"tpot_s", "ttft_s"}
