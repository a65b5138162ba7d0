"""The geometry of the charts: numbers in, positions out. The templates draw them as SVG; colours are in page.css.

All charts are drawn on a canvas of the same width, which is about their width on the page: text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from reports import units
from reports.comparison import Row
from reports.metrics import Metric

WIDTH = 340.0
_MAX_POINTS = 320  # of one line: more than one a pixel shows nothing

_BAR_PITCH = 40.0
_BAR_TOP = 18.0  # below its label
_BAR_HEIGHT = 10.0
_AXIS = 38.0

_PLOT_LEFT, _PLOT_TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 44.0, 18.0, WIDTH - 52.0, 128.0


@dataclass(frozen=True)
class Tick:
    at: float  # along the axis, on the canvas
    label: str


@dataclass(frozen=True)
class Bar:
    series: int  # of the strategy: its colour
    name: str
    value: str
    top: float  # of its label
    width: float
    low: float  # quartiles
    high: float


@dataclass(frozen=True)
class BarChart:
    title: str
    description: str
    axis: str
    height: float
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class LatencyChart:
    """Time of each decode step of one strategy: every sample light, their median bold, the median wait as an area."""

    series: int
    title: str
    description: str
    unit: str
    lines: tuple[str, ...]  # SVG paths
    middle: str
    stall: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    beyond: int  # steps above the axis


def nice_ticks(top: float, most: int = 5) -> list[float]:
    """From 0 to at least `top` in steps of 1, 2 or 5 times a power of ten, `most` steps or fewer."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= top * (1 - 1e-9))
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def bar_chart(metric: Metric, rows: Sequence[Row], series: dict[str, int], place: str) -> BarChart | None:
    """The median of a metric for each row, with its quartiles. None where no row has one."""
    shown = [(row, summary) for row in rows if (summary := row.summaries[metric.name]) is not None]
    if not shown:
        return None
    scale = units.scale(metric.unit, [summary.median for _, summary in shown])
    ticks = nice_ticks(max(summary.high_quartile for _, summary in shown) / scale.divisor)
    per_unit = (WIDTH - 24.0) / (ticks[-1] * scale.divisor)
    bars = tuple(
        Bar(
            series[row.strategy],
            row.name,
            scale.text(summary.median),
            top=i * _BAR_PITCH,
            width=summary.median * per_unit,
            low=summary.low_quartile * per_unit,
            high=summary.high_quartile * per_unit,
        )
        for i, (row, summary) in enumerate(shown)
    )
    return BarChart(
        title=metric.label,
        description=f"{metric.label} on {place}, median: " + ", ".join(f"{bar.name} {bar.value}" for bar in bars) + ".",
        axis=f"{scale.symbol}, {metric.better} is better",
        height=len(bars) * _BAR_PITCH + _AXIS,
        bars=bars,
        ticks=tuple(Tick(t * scale.divisor * per_unit, units.number(t)) for t in ticks),
    )


def latency_charts(rows: Sequence[Row], series: dict[str, int], place: str) -> list[LatencyChart]:
    """One for each row that decoded, all on the same axes."""
    decoded = [(row, lines) for row in rows if (lines := _decode_times(row))]
    if not decoded:
        return []
    every = sorted(t for _, lines in decoded for line in lines for t in line)
    usual = every[math.ceil(0.98 * len(every)) - 1]
    top = every[-1] if every[-1] <= 3 * usual else usual * 1.2  # one outlier must not flatten all the rest
    scale = units.scale("s", [top])
    ticks = nice_ticks(top / scale.divisor, most=4)
    steps = max(len(line) for _, lines in decoded for line in lines)
    axes = _Axes(steps, ticks[-1] * scale.divisor)
    return [_latency_chart(row, lines, series, place, axes, scale, ticks) for row, lines in decoded]


@dataclass(frozen=True)
class _Axes:
    """Step 1 .. steps across, 0 .. top upwards; what is above stops at the edge."""

    steps: int
    top: float

    def x(self, step: float) -> float:
        return _PLOT_LEFT + _PLOT_WIDTH * (step - 1) / max(1, self.steps - 1)

    def y(self, value: float) -> float:
        return _PLOT_TOP + _PLOT_HEIGHT * (1 - min(value, self.top) / self.top)

    def path(self, values: Sequence[float]) -> str:
        """A line through (1, values[0]), (2, values[1]) ...; a single value becomes a short dash."""
        width = math.ceil(len(values) / _MAX_POINTS)
        bins = [values[i : i + width] for i in range(0, len(values), width)]
        points = [(self.x(1 + i * width + (len(b) - 1) / 2), self.y(median(b))) for i, b in enumerate(bins)]
        if len(points) == 1:
            points.append((points[0][0] + 6, points[0][1]))
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _latency_chart(
    row: Row,
    lines: list[Sequence[float]],
    series: dict[str, int],
    place: str,
    axes: _Axes,
    scale: units.Scale,
    ticks: Sequence[float],
) -> LatencyChart:
    stalls = [s.steps.stall_s[1:] for run in row.runs for s in run.timed_samples if s.steps.stall_s[1:]]
    middle, stall = _medians(lines), _medians(stalls)
    area = f"{axes.path(stall)}L{axes.x(len(stall)):.1f} {axes.y(0):.1f}L{axes.x(1):.1f} {axes.y(0):.1f}Z"
    x_steps = [1, *(int(t) for t in nice_ticks(axes.steps, most=4)[1:] if t == int(t) and t <= axes.steps)]
    return LatencyChart(
        series=series[row.strategy],
        title=row.name,
        description=(
            f"Time of each generated token on {place} with {row.name}: {len(lines)} samples, median over all steps "
            f"{scale.text(median(middle))}, of which {scale.text(median(stall))} waiting for experts."
        ),
        unit=scale.symbol,
        lines=tuple(axes.path(line) for line in lines),
        middle=axes.path(middle),
        stall=area,
        x_ticks=tuple(Tick(axes.x(step), units.number(step)) for step in dict.fromkeys(x_steps)),
        y_ticks=tuple(Tick(axes.y(t * scale.divisor), units.number(t)) for t in ticks),
        beyond=sum(t > axes.top for line in lines for t in line),
    )


def _decode_times(row: Row) -> list[Sequence[float]]:
    return [s.steps.time_s[1:] for run in row.runs for s in run.timed_samples if s.steps.time_s[1:]]


def _medians(lines: Sequence[Sequence[float]]) -> list[float]:
    """Of each step over the samples that reached it."""
    return [median(line[i] for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
