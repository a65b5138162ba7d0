"""Cells over the nights: a point a night, where a series became another, and when its device did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from reports.judging.statistics import summarize_runs
from reports.metrics import METRICS
from reports.nights.change_points import change_points
from reports.nights.gate import Measured, worse_share
from reports.nights.night import ChangePoint, Night, Trend, TrendPoint
from reports.records import Run, RunStatus, Verdict, by_cell

NIGHTS = 60  # that are looked back at
RECENT_NIGHTS = 3  # within which a change is news
_FACTS = ("kernel", "os", "model", "cpu", "cores", "memory_bytes", "python", "numpy", "power_mode", "storage")
_CONDITIONS = ("governor", "power")


def trends(candidate: Measured, metrics: Iterable[str], earlier: Sequence[Night]) -> tuple[Trend, ...]:
    """Returns the trends of every cell that has a valid run tonight; of `earlier` nights the oldest comes first."""
    past: dict[tuple[str, str, str, str], list[TrendPoint]] = {}
    for night in earlier[-NIGHTS:]:
        for trend in night.trends:
            past.setdefault(trend.series, []).extend(trend.points[-1:])
    found = []
    for runs in by_cell(candidate.runs).values():
        valid = [run for run in runs if run.status is RunStatus.OK and run.verdict is Verdict.VALID]
        for metric in metrics:
            summary = summarize_runs(METRICS[metric], valid)
            if summary is None:
                continue
            point = TrendPoint(
                candidate.sweep.id, candidate.sweep.started_at, summary.median, summary.low_quartile,
                summary.high_quartile, valid[0].engine_sha256, _environment(valid[0]), valid[0].farm_version,
            )  # fmt: skip
            trend = Trend(valid[0].cell, metric, (point,))
            points = (*past.get(trend.series, ()), point)
            changes = tuple(change_points([p.median for p in points]))
            found.append(Trend(trend.cell, metric, points, changes, _environment_changes(points)))
    return tuple(found)


def recent_worsening(trend: Trend, limit: float) -> ChangePoint | None:
    """Returns a change of the last nights by which a series got worse, by `limit` or more."""
    last = trend.changes[-1] if trend.changes else None
    if last is None or last.index < len(trend.points) - RECENT_NIGHTS or last.before <= 0 or last.after <= 0:
        return None
    return last if worse_share(trend.metric, last.after / last.before) >= limit else None


def _environment(run: Run) -> tuple[tuple[str, str], ...]:
    seen = [(name, getattr(run.facts, name, None)) for name in _FACTS]
    seen += [(name, getattr(run.conditions, name, None)) for name in _CONDITIONS]
    if run.load is not None:
        seen += [("kernels", run.load.variant or run.load.backend), ("threads", run.load.threads)]
    return tuple((name, str(value)) for name, value in seen if value is not None)


def _environment_changes(points: Sequence[TrendPoint]) -> tuple[tuple[int, str], ...]:
    changes = []
    for index, (before, after) in enumerate(pairwise(points), start=1):
        old, new = dict(before.environment), dict(after.environment)
        changed = [
            f"{name} {old.get(name, 'unknown')} → {new.get(name, 'unknown')}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if changed:
            changes.append((index, "; ".join(changed)))
    return tuple(changes)
