"""Axes: where a value stands on the canvas, and which values are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from reports import units

WIDTH = 340.0  # of every chart's canvas, which is about its width on the page: text keeps its size
_MOST_POINTS = 320  # of one line: more than one a pixel shows nothing


@dataclass(frozen=True)
class Tick:
    at: float  # along the axis, on the canvas
    label: str


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to the canvas from `start` to `end`; what lies beyond stops at the edge."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        share = ((math.log(value) if self.is_log else value) - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * share

    def ticks(self, values: Sequence[float], divisor: float = 1.0) -> tuple[Tick, ...]:
        """Returns a tick for each value; `values` are in the axis's unit over `divisor`, as they are written."""
        return tuple(Tick(self.at(value * divisor), tick_label(value)) for value in values)


def tick_label(value: float) -> str:
    """Returns a round value with no more digits than it needs."""
    return units.number(value) if abs(value) >= 1000 else f"{value:.6g}"


def nice_ticks(top: float, most: int = 5) -> list[float]:
    """Returns values from 0 to at least `top` in steps of 1, 2 or 5 times a power of ten, `most` steps or fewer."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= top * (1 - 1e-9))
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def ticks_between(low: float, high: float, most: int = 4) -> list[float]:
    """Returns round values around `low` and `high`: nice_ticks for an axis that does not start at 0."""
    if not high > low:
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    step = nice_ticks(high - low, most)[1]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten around positive `low` and `high`; powers alone if they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if len(powers) <= 3 else (1,))]
    below = [value for value in every if value <= low * (1 + 1e-9)]
    above = [value for value in every if value >= high * (1 - 1e-9)]
    first, last = below[-1] if below else every[0], above[0] if above else every[-1]
    return [value for value in every if first <= value <= last]


def line(points: Sequence[tuple[float, float]]) -> str:
    """Returns the SVG path through positions on the canvas; a single one becomes a short dash."""
    if len(points) == 1:
        points = [points[0], (points[0][0] + 6, points[0][1])]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def steps(points: Sequence[tuple[float, float]]) -> str:
    """Returns the SVG path of a line that keeps its height until the next point, for what is counted."""
    (x, y), *rest = points
    return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)


def thinned(values: Sequence[float], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Returns (mean index, median) of groups of neighbours, at most `most` of them."""
    width = max(1, math.ceil(len(values) / most))
    bins = [values[i : i + width] for i in range(0, len(values), width)]
    return [(i * width + (len(b) - 1) / 2, median(b)) for i, b in enumerate(bins)]
