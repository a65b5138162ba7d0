"""The gate: what of a comparison with the baseline somebody must look at, and what is only suspected.

Hard facts need no second look: an answer that changed, an accuracy that was lost, a result that is no more. Times and
memory vary; a nightly run measures again what is suspected (see reports/nights/confirmation.py), a gate of one sweep
goes by the intervals and the device's noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from reports import units
from reports.judging.judgement import ACCURACY, ANSWER, RESULT, Comparison, Judged, Mark, Side, compare_sides
from reports.judging.noise import Noise
from reports.metrics import METRICS
from reports.nights.night import Finding, Kind
from reports.records import Fault, Run, RunStatus, Sweep, by_cell, last_attempts
from reports.results.database import ResultsDatabase

Limits = Mapping[str, float]  # by metric, the share by which it may get worse
_FACTS = (RESULT, ANSWER, ACCURACY)


@dataclass(frozen=True)
class Measured:
    """A sweep and its last attempts: one side of a gate."""

    sweep: Sweep
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, sweep: Sweep, runs: Iterable[Run]) -> Measured:
        return cls(sweep, tuple(last_attempts(runs)))

    @classmethod
    def read(cls, database: ResultsDatabase, sweep: Sweep) -> Measured:
        """Reads the last attempts of a sweep."""
        return cls.of(sweep, database.runs(sweep_id=sweep.id))


def against_baseline(
    baseline_name: str, baseline: Measured, candidate: Measured, limits: Limits, noise: Noise
) -> Comparison:
    """Compares a sweep with the pinned baseline; `noise` is that of the sweeps before it."""
    sides = Side(baseline_name, baseline.runs), Side(candidate.sweep.id, candidate.runs)
    return compare_sides(*sides, limits, noise=noise)


def worse_share(metric: str, ratio: float) -> float:
    """Of candidate over baseline: 0.1 is a tenth slower, larger or less."""
    return (ratio if METRICS[metric].better == "lower" else 1 / ratio) - 1


def hard_findings(comparison: Comparison, candidate: Measured) -> list[Finding]:
    """All that is one without a look at times and memory."""
    if candidate.runs and all(run.status in (RunStatus.UNREACHABLE, RunStatus.SKIPPED) for run in candidate.runs):
        reasons = dict.fromkeys(run.reasons[0] for run in candidate.runs)
        return [Finding(Kind.INFRASTRUCTURE, f"no device could be used: {'; '.join(list(reasons)[:3])}")]
    cells = {run.cell.key: run.cell for run in candidate.runs}
    found = [finding for judged in comparison.judged for finding in _fact(judged, candidate)]
    found += _never_tried(candidate)
    for key, reason in comparison.incomparable:
        found.append(Finding(Kind.INCONCLUSIVE, f"not comparable with the baseline: {reason}", cells.get(key)))
    return list(dict.fromkeys(found))


def suspects(comparison: Comparison, limits: Limits) -> list[Judged]:
    """Times and memory that are worse by more than their limit, as far as one night can tell."""
    return [
        judged
        for judged in comparison.judged
        if judged.metric not in _FACTS
        and judged.mark in (Mark.WORSE, Mark.INCONCLUSIVE)
        and judged.ratio is not None
        and worse_share(judged.metric, judged.ratio) >= limits[judged.metric]
    ]


def findings_of(judged: Iterable[Judged]) -> list[Finding]:
    """Times and memory by their intervals, where nothing is measured again."""
    kinds = {Mark.WORSE: Kind.REGRESSION, Mark.INCONCLUSIVE: Kind.INCONCLUSIVE}
    return [
        Finding(kinds[each.mark], "; ".join(filter(None, (_described(each), each.reason))), each.cell, each.metric)
        for each in judged
        if each.metric not in _FACTS and each.mark in kinds
    ]


def describe(metric: str, ratio: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f", interval {low - 1:+.1%} to {high - 1:+.1%}"
    return f"{METRICS[metric].label} {ratio - 1:+.1%}{interval}"


def _described(judged: Judged) -> str:
    return "" if judged.ratio is None else describe(judged.metric, judged.ratio, judged.ci_low, judged.ci_high)


def _fact(judged: Judged, candidate: Measured) -> Iterator[Finding]:
    cell, metric, reason = judged.cell, judged.metric, judged.reason
    if judged.mark is Mark.FAILING:
        kind = Kind.REGRESSION if judged.is_regression else Kind.MISSING
        yield Finding(kind, reason, cell, ANSWER if judged.fault is Fault.WRONG_ANSWER else metric)
    elif judged.mark is Mark.GONE and cell.key not in dict(candidate.sweep.planned):
        yield Finding(Kind.MISSING, f"{reason}, but the baseline has it: move the baseline", cell, metric)
    elif judged.mark is Mark.GONE and metric != RESULT:
        yield Finding(Kind.MISSING, f"{METRICS[metric].label}: {reason}", cell, metric)
    elif judged.mark is Mark.SUSPECT:
        yield Finding(Kind.INCONCLUSIVE, f"suspect, so not judged: {reason}", cell)
    elif judged.mark is Mark.WORSE and metric == ANSWER:
        yield Finding(Kind.REGRESSION, reason, cell, ANSWER)
    elif judged.mark is Mark.WORSE and metric == ACCURACY:
        sides = (judged.baseline, judged.candidate)
        values = " → ".join(units.text(side.median, "") for side in sides if side is not None)
        yield Finding(Kind.REGRESSION, f"{METRICS[ACCURACY].label} {reason or values}", cell, ACCURACY)


def _never_tried(candidate: Measured) -> Iterator[Finding]:
    """What was planned and has no record at all: cut off, or out of time."""
    after = by_cell(candidate.runs)
    for key, planned in Counter(key for key, _ in candidate.sweep.planned).items():
        runs = after.get(key, [])
        if len(runs) < planned:
            where = "" if runs else f"{key}: "
            reason = f"{where}{planned - len(runs)} of {planned} results are missing, never tried"
            yield Finding(Kind.MISSING, reason, runs[0].cell if runs else None, RESULT)
