"""A results database of years of nightly runs: seeded, in a minute, of records that are complete and valid.

Five devices measure three strategies on three workloads in three blocks each night: 135 runs. Time per token varies by
device, night, run and token, as real ones do; `Change` makes a strategy slower on a device from a night on. The same
seed gives the same records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa

from reports.records import Run, Sweep, run_to_json
from reports.results import schema
from reports.results.baselines import Baseline
from reports.results.database import ResultsDatabase, run_row
from tests.reports.conftest import STRATEGIES, cell, run

DEVICES = ("jetson-nano", "phone", "pi3b", "pi4b", "pi5")
WORKLOADS = ("code", "dialogue", "novel")
BLOCKS = 3
NAME = "nightly"
FIRST = datetime(2024, 1, 1, 2, tzinfo=UTC)
_BETWEEN = timedelta(seconds=90)  # runs
_ENGINE_NIGHTS = 5  # for which an engine stays the same


@dataclass(frozen=True)
class Change:
    """From `night` on (0 is the first), each token of a strategy on a device takes `factor` of the time."""

    device: str
    strategy: str
    night: int
    factor: float


@dataclass(frozen=True)
class Noise:
    """Relative standard deviations of the time per token, each level on top of the one above."""

    night: float = 0.004
    run: float = 0.006
    token: float = 0.03


def fill(
    database: ResultsDatabase, n_runs: int, *, seed: int = 1, changes: Iterable[Change] = (), noise: Noise | None = None
) -> list[Sweep]:
    """Adds whole nights of at least `n_runs` runs in all, and pins the first as baseline NAME; returns their sweeps."""
    patterns = _patterns()
    sweeps = []
    for night in range(math.ceil(n_runs / len(patterns))):
        sweep, rows = _night(night, patterns, np.random.default_rng((seed, night)), tuple(changes), noise or Noise())
        database.add_sweep(sweep)
        with database._turn, database._writer.begin() as connection:
            connection.execute(sa.insert(schema.runs), list(rows))
        sweeps.append(sweep)
    database.pin(Baseline(NAME, sweeps[0].id, sweeps[0].started_at, "years@tests"))
    return sweeps


def _patterns() -> list[tuple[Run, str]]:
    """(run, its record) of one night, in the order of the plan."""
    found = []
    for block in range(BLOCKS):
        for device in DEVICES:
            for workload in WORKLOADS:
                for strategy in STRATEGIES:
                    measured = run("pi4b-emulated", strategy, block, prompts=4, repetitions=1)
                    at = cell(device, strategy, workload=workload)
                    pattern = replace(measured, cell=at, emulated=())
                    found.append((pattern, json.dumps(run_to_json(pattern))))
    return found


def _night(
    night: int, patterns: list[tuple[Run, str]], rng: np.random.Generator, changes: tuple[Change, ...], noise: Noise
) -> tuple[Sweep, Iterator[dict[str, Any]]]:
    start = FIRST + timedelta(days=night)
    planned = tuple((pattern.cell.key, pattern.block) for pattern, _ in patterns)
    sweep = Sweep(
        f"{start:%Y%m%d-%H%M%S}-{night:04x}", NAME, "[matrix]\n", "naive-swap", planned, start.isoformat(), "0.1.0"
    )
    of_device = {device: rng.normal(1, noise.night) for device in DEVICES}
    engine = f"{1 + night // _ENGINE_NIGHTS:064x}"

    def rows() -> Iterator[dict[str, Any]]:
        for i, (pattern, text) in enumerate(patterns):
            began = start + i * _BETWEEN
            measured = replace(
                pattern,
                id=f"{sweep.id}-{i:04d}",
                sweep_id=sweep.id,
                started_at=began.isoformat(),
                ended_at=(began + _BETWEEN).isoformat(),
                engine_sha256=engine,
            )
            record = json.loads(text)
            changed = ("id", "sweep_id", "started_at", "ended_at", "engine_sha256")
            record |= {name: getattr(measured, name) for name in changed}
            factor = of_device[pattern.cell.device] * rng.normal(1, noise.run)
            for change in changes:
                if (change.device, change.strategy) == (pattern.cell.device, pattern.cell.strategy):
                    factor *= change.factor if night >= change.night else 1.0
            for sample in record["samples"]:
                steps = sample["steps"]
                factors = factor * np.maximum(0.1, rng.normal(1, noise.token, len(steps["time_s"])))
                for column in ("time_s", "stall_s"):
                    steps[column] = [round(x, 7) for x in (np.array(steps[column]) * factors).tolist()]
            yield run_row(measured, record)

    return sweep, rows()
