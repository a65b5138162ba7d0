"""Rows of a comparison with round numbers, so that a chart's positions can be worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from engine.protocol import LayerCounts, Sample, Steps
from reports.judging.groups import Row
from reports.judging.statistics import Ratio, Summary
from reports.metrics import METRICS
from reports.records import Run, Verdict

Spread = tuple[float, float, float]  # low quartile, median, high quartile
SERIES = {"naive-swap": 0, "edgemoe": 1, "lru": 2}


def summary(value: float | Spread) -> Summary:
    low, middle, high = value if isinstance(value, tuple) else (value, value, value)
    return Summary(middle, low, high, values=1, runs=1)


def row(strategy: str, *, runs: Sequence[Run] = (), speed_up: Ratio | None = None, **values: float | Spread) -> Row:
    """A row with the given medians, or (low quartile, median, high quartile); it has no other metric."""
    found = {name: summary(values[name]) if name in values else None for name in METRICS}
    return Row(strategy, "default", tuple(runs), Verdict.VALID, found, speed_up, "")


def sample(
    time_s: Sequence[float], stall_s: Sequence[float] | None = None, repetition: int = 0, **changes: Any
) -> Sample:
    """One repetition with the given time and wait of each step. Counts by `layers` are of its last step."""
    n = len(time_s)
    zeros = (0,) * n
    layers = changes.get("layers") or LayerCounts((), (), ())
    counts = {name: (*zeros[1:], sum(getattr(layers, name))) for name in ("hits", "late", "misses")}
    times = {"time_s": tuple(time_s), "stall_s": tuple(stall_s or (0.0,) * n)}
    steps = Steps(**{**dict.fromkeys(Steps.__dataclass_fields__, zeros), **times, **counts})
    return Sample(**{
        "prompt": 0, "repetition": repetition, "warmup": False, "tokens": (1,) * n, "steps": steps,
        "major_faults": None, "peak_resident_bytes": None, **changes,
    })  # fmt: skip


def positions(path: str) -> list[tuple[float, float]]:
    """The points of a path of M and L commands."""
    assert re.fullmatch(r"M[^MHVhvz]*Z?", path), path
    return [tuple(map(float, point.split())) for point in path.strip("MZ").split("L")]  # type: ignore[misc]
