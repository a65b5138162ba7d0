"""What a results database of years costs. ci/bench-results has the command line.

insert   one record, durable on return, beside all that is there
list     `results list`, from the shell
compare  `compare latest~1 latest`, from the shell
nightly  the page of the last of 61 judged nights, from the shell
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from reports.judging.judgement import GATED, Side, compare_sides
from reports.nights.gate import Measured
from reports.nights.outcome import Context, judge_sweep
from reports.nights.trends import NIGHTS, trends
from reports.records import Sweep
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase
from tests.command_line import COMMAND
from tests.programs.scale.years import NAME, fill

_INSERTS = 200
LIMITS_S = {"insert_s": 0.010, "list_s": 5.0, "compare_s": 2.0, "nightly_s": 5.0}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ci/bench-results",
        description="Times what a results database of years is asked for; exits with 1 where one is over its limit: "
        + ", ".join(f"{name[:-2]} {limit:g} s" for name, limit in LIMITS_S.items())
        + ". Two minutes to make it, 2 GB of disk.",
        epilog="examples: ci/bench-results --json    ci/bench-results --database /tmp/years.db",
    )
    parser.add_argument("--runs", type=int, default=100_000, help="in the database (default 100,000)")
    parser.add_argument("--database", type=Path, help="use this one, or make it, and keep it")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-results-") as folder:
        result = measure(options.database or Path(folder) / "farm.db", options.runs, Path(folder))
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:12} {value:.6g}")
    over = [name for name, limit in LIMITS_S.items() if result[name] > limit]
    for name in over:
        print(f"ci/bench-results: {name} is over {LIMITS_S[name]:g} s", file=sys.stderr)
    return 1 if over else 0


def measure(place: Path, n_runs: int, folder: Path) -> dict[str, Any]:
    is_new = not place.exists()
    with ResultsDatabase.open(place) as database:
        if is_new:
            fill(database, n_runs)
        judge_last(database)
        inserts = sorted(_inserts(database))
        runs = sum(sum(endings.values()) for endings in database.endings().values())
    farm = COMMAND
    there = ("--results", str(place))
    page = folder / "report.html"
    return {
        "runs": runs,
        "bytes": place.stat().st_size,
        "insert_s": median(inserts),
        "insert_95_s": inserts[int(0.95 * len(inserts))],
        "insert_max_s": inserts[-1],
        "list_s": _timed(*farm, "results", "list", *there),
        "compare_s": _timed(*farm, "compare", f"{NAME}~1", NAME, *there),
        "nightly_s": _timed(*farm, "report", NAME, "-o", str(page), *there),
        "page_bytes": page.stat().st_size,
    }


def judge_last(database: ResultsDatabase) -> None:
    """The last nights, each against the pinned baseline and those before it, as `nightly` would have; none twice."""
    pinned = database.baseline(NAME)
    assert pinned is not None
    baseline = _measured(database, database.sweep(pinned.sweep_id))
    for sweep in database.sweeps(name=NAME, last=NIGHTS + 1):
        if database.night(sweep.id) is not None:
            continue
        candidate = _measured(database, sweep)
        comparison = compare_sides(Side(pinned.name, baseline.runs), Side(sweep.id, candidate.runs))
        night = judge_sweep(NAME, comparison, candidate, Context(), sweep.started_at)
        night = replace(night, trends=trends(candidate, GATED, []))
        database.add_night(NightRecord(sweep.id, NAME, pinned.sweep_id, night.at, night.exit_code, night.to_json()))


def _measured(database: ResultsDatabase, sweep: Sweep) -> Measured:
    return Measured.of(sweep, database.runs(sweep_id=sweep.id))


def _inserts(database: ResultsDatabase) -> list[float]:
    """Seconds of each; into a sweep of their own that is not compared."""
    sweep = database.sweep(NAME)
    runs = database.runs(sweep_id=sweep.id)
    own = replace(sweep, id=f"bench-{time.time_ns()}", name="bench (inserts)", started_at="2020-01-01T00:00:00+00:00")
    database.add_sweep(own)
    seconds = []
    for i in range(_INSERTS):
        run = replace(runs[i % len(runs)], id=f"{own.id}-{i}", sweep_id=own.id)
        began = time.perf_counter()
        database.add_run(run)
        seconds.append(time.perf_counter() - began)
    return seconds


def _timed(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
