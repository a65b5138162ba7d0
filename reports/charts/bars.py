"""Bars, one for each strategy: a metric's median with its quartiles, or what a token's time consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports import units
from reports.charts.axes import WIDTH, Axis, Tick, log_ticks, nice_ticks, tick_label, ticks_between
from reports.judging.groups import Row
from reports.metrics import Metric

PITCH = 36.0  # from bar to bar
_BELOW = 40.0  # the axis
_INNER = WIDTH - 24.0


@dataclass(frozen=True)
class Part:
    """A piece of a bar, `kind` a class of page.css."""

    kind: str
    x: float
    width: float
    title: str = ""


@dataclass(frozen=True)
class Bar:
    series: int  # of the strategy: its colour
    name: str
    value: str
    top: float  # of its label
    parts: tuple[Part, ...] = ()
    low: float = 0.0  # of the whisker
    high: float = 0.0
    dot: float | None = None  # instead of parts: one value, with its interval as whisker


@dataclass(frozen=True)
class BarChart:
    title: str
    description: str
    axis: str
    height: float
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    rule: float | None = None  # a value to compare with
    keys: tuple[tuple[str, str], ...] = ()  # kind, name


def bar_chart(metric: Metric, rows: Sequence[Row], series: dict[str, int], place: str) -> BarChart | None:
    """Draws the median of a metric for each row, with its quartiles; None where no row has one."""
    shown = [(row, summary) for row in rows if (summary := row.summaries[metric.name]) is not None]
    if not shown:
        return None
    scale = units.scale(metric.unit, [summary.median for _, summary in shown])
    ticks = nice_ticks(max(summary.high_quartile for _, summary in shown) / scale.divisor)
    axis = Axis(0.0, ticks[-1] * scale.divisor, 0.0, _INNER)
    bars = tuple(
        Bar(
            series[row.strategy],
            row.name,
            scale.text(summary.median),
            top=i * PITCH,
            parts=(Part("bar", 0.0, axis.at(summary.median)),),
            low=axis.at(summary.low_quartile),
            high=axis.at(summary.high_quartile),
        )
        for i, (row, summary) in enumerate(shown)
    )
    return BarChart(
        title=metric.label,
        description=f"{metric.label} on {place}, median: " + ", ".join(f"{bar.name} {bar.value}" for bar in bars) + ".",
        axis=f"{scale.symbol}, {metric.better} is better",
        height=len(bars) * PITCH + _BELOW,
        bars=bars,
        ticks=axis.ticks(ticks, scale.divisor),
    )


@dataclass(frozen=True)
class Interval:
    """A ratio with its interval, if it has one."""

    name: str
    ratio: float
    low: float | None
    high: float | None
    series: int


def speed_up_chart(rows: Sequence[Row], series: dict[str, int], place: str, baseline: str) -> BarChart | None:
    shown = [
        Interval(row.name, speed.ratio, speed.low, speed.high, series[row.strategy])
        for row in rows
        if (speed := row.speed_up) is not None and speed.ratio > 0
    ]
    title = f"Speed-up against {baseline}"
    description = f"Speed-up on {place} against {baseline}, with 95 % intervals"
    return ratio_chart(shown, title, description, "times as fast, 95 % interval")


def ratio_chart(intervals: Sequence[Interval], title: str, description: str, label: str) -> BarChart | None:
    """Draws each ratio as a dot with its interval; on a logarithmic axis, twice is as far from 1 as half."""
    if not intervals:
        return None
    ends = [x for i in intervals for x in (i.ratio, i.low or i.ratio, i.high or i.ratio) if x > 0]
    low, high = min(1.0, *ends), max(1.0, *ends)
    is_narrow = high / low < 2
    ticks = ticks_between(low, high) if is_narrow else log_ticks(low, high)
    axis = Axis(ticks[0], ticks[-1], 6.0, _INNER - 6.0, is_log=not is_narrow)
    bars = tuple(
        Bar(
            each.series,
            each.name,
            f"{each.ratio:.3f}" if is_narrow else units.text(each.ratio, "ratio"),
            top=i * PITCH,
            low=axis.at(each.low or each.ratio),
            high=axis.at(each.high or each.ratio),
            dot=axis.at(each.ratio),
        )
        for i, each in enumerate(intervals)
    )
    told = ", ".join(f"{bar.name} {bar.value}" + _between(each) for bar, each in zip(bars, intervals, strict=True))
    return BarChart(
        title=title,
        description=f"{description}: {told}.",
        axis=label,
        height=len(bars) * PITCH + _BELOW,
        bars=bars,
        ticks=tuple(Tick(axis.at(t), tick_label(t) + ("" if is_narrow else "×")) for t in ticks),
        rule=axis.at(1.0),
    )


def _between(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" ({units.interval(interval.low, interval.high)})"


def stacked_chart(
    rows: Sequence[tuple[Row, dict[str, float]]], kinds: dict[str, str], series: dict[str, int], place: str
) -> BarChart | None:
    """Draws each row's seconds by kind, one after another, in the order of `kinds` (kind -> name)."""
    rows = [(row, parts) for row, parts in rows if sum(parts.values()) > 0]
    if not rows:
        return None
    scale = units.scale("s", [sum(parts.values()) for _, parts in rows])
    ticks = nice_ticks(max(sum(parts.values()) for _, parts in rows) / scale.divisor)
    axis = Axis(0.0, ticks[-1] * scale.divisor, 0.0, _INNER)
    bars, told = [], []
    for i, (row, seconds) in enumerate(rows):
        pieces, end = [], 0.0
        for kind, name in kinds.items():
            if seconds.get(kind, 0.0) > 0:
                title = f"{name} {scale.text(seconds[kind])}"
                pieces.append(Part(kind, axis.at(end), axis.at(end + seconds[kind]) - axis.at(end), title))
                end += seconds[kind]
        bars.append(Bar(series[row.strategy], row.name, scale.text(end), i * PITCH, tuple(pieces)))
        told.append(f"{row.name} " + ", ".join(piece.title for piece in pieces))
    used = {part.kind for bar in bars for part in bar.parts}
    return BarChart(
        title="Where a token's time goes",
        description=f"Mean time of a decoded token on {place} by what it was spent on: {'; '.join(told)}.",
        axis=f"{scale.symbol} a token, mean",
        height=len(bars) * PITCH + _BELOW,
        bars=tuple(bars),
        ticks=axis.ticks(ticks, scale.divisor),
        keys=tuple((kind, name) for kind, name in kinds.items() if kind in used),
    )
