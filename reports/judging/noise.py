"""Noise floors: by how much two sweeps of the same engine under the same conditions differ on a device.

From what was measured anyway: sweeps of one matrix, between which nothing changed, are A/A comparisons.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, cast

from reports.errors import RecordError
from reports.judging.statistics import run_value, student
from reports.metrics import METRICS
from reports.records import Cell, Run, RunStatus, Sweep, Verdict
from reports.results.database import ResultsDatabase

SWEEPS = 6  # that are looked at: what a device was like years ago is no measure
LEAST_FREEDOM = 3  # degrees of it: four sweeps of one engine, or two each of three
CONFIDENCE = 0.99  # with which two sweeps of one engine differ by less

Noise = Mapping[tuple[str, str], float]  # (device, metric) -> a share


def noise_floors(runs: Iterable[Run], metrics: Iterable[str]) -> Noise:
    """Returns the noise floors from runs of several sweeps, without those of which too few can be compared.

    A cell's sweeps have the medians of their valid runs, which are held against the mean of those of the same engine,
    container and workload. A device's cells share its good and bad days: they sharpen the estimate, and count as one.
    """
    series: dict[tuple[str, str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.status == RunStatus.OK and run.verdict == Verdict.VALID:
            alike = (run.cell.container_sha256, run.cell.workload_sha256, run.engine_sha256, *run.emulated)
            series[run.cell.device, _variant(run.cell), "/".join(alike)][run.sweep_id].append(run)
    found = {}
    for metric in metrics:
        squares: dict[str, float] = defaultdict(float)
        freedom: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # device -> cell -> degrees
        for (device, cell, _), sweeps in series.items():
            levels = [level for runs in sweeps.values() if (level := _level(metric, runs)) is not None]
            if len(levels) > 1:
                middle = fmean(levels)
                squares[device] += sum((level - middle) ** 2 for level in levels)
                freedom[device][cell] += len(levels) - 1
        for device, cells in freedom.items():
            degrees = max(cells.values())
            if degrees >= LEAST_FREEDOM:
                deviation = math.sqrt(2 * squares[device] / sum(cells.values()))  # of a difference
                found[device, metric] = math.expm1(student((1 + CONFIDENCE) / 2, degrees) * deviation)
    return found


def noise_before(database: ResultsDatabase, sweep: Sweep, metrics: Iterable[str]) -> Noise:
    """Returns the noise floors from the sweeps of the same matrix that came before this one."""
    earlier = database.sweeps_before(sweep, SWEEPS)
    try:
        runs = [_glance(record) for each in earlier for record in database.records(each.id, RunStatus.OK)]
        return noise_floors(runs, metrics)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise RecordError(
            f"a record of matrix {sweep.name} in the results database is damaged: {error}: restore the database"
        ) from None


class _Glance(SimpleNamespace):
    def __getattr__(self, _: str) -> None:
        """Returns None for what older records do not have."""

    @property
    def timed_samples(self) -> list[Any]:
        return [sample for sample in self.samples if not sample.warmup]


def _glance(record: str) -> Run:
    """Returns a run whose parts are neither checked nor typed again: in a quarter of the time."""
    return cast(Run, json.loads(record, object_hook=lambda part: _Glance(**part)))


def _variant(cell: Cell) -> str:
    """Returns Cell.key_on_device of a glance at a cell."""
    return "/".join((cell.container, cell.strategy, cell.expert_budget, cell.workload, cell.page_cache))


def _level(metric: str, runs: Iterable[Run]) -> float | None:
    values = [value for run in runs if (value := run_value(METRICS[metric], run)) is not None]
    return math.log(median(values)) if values and min(values) > 0 else None
