"""Charts of raw samples: each token's time and its distribution, and memory in the course of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from reports import units
from reports.charts.axes import Axis, Tick, line, log_ticks, nice_ticks, steps, thinned
from reports.charts.plot import BOTTOM, LEFT, Key, Plot, Stroke, x_axis, y_axis
from reports.judging.groups import Row
from reports.records import Run

_SHARES = 60  # of a distribution's line


def latency_charts(rows: Sequence[Row], series: dict[str, int], place: str, *, each_sample: bool = True) -> list[Plot]:
    """Draws the time of each decode step, a chart for each row, all on the same axes.

    Samples are light, their median is bold, and the median wait is an area.
    """
    decoded = [(row, lines) for row in rows if (lines := decode_times(row))]
    if not decoded:
        return []
    every = sorted(t for _, lines in decoded for line_ in lines for t in line_)
    usual = every[math.ceil(0.98 * len(every)) - 1]
    top = every[-1] if every[-1] <= 3 * usual else usual * 1.2  # one outlier must not flatten all the rest
    scale = units.scale("s", [top])
    y_ticks = nice_ticks(top / scale.divisor, most=4)
    longest = max(len(line_) for _, lines in decoded for line_ in lines)
    x, y = x_axis(1, max(2, longest)), y_axis(0.0, y_ticks[-1] * scale.divisor)
    x_ticks = [1, *(int(t) for t in nice_ticks(longest, most=4)[1:] if t == int(t) and t <= longest)]
    frame = Plot(
        "", "", "generated token", scale.symbol, x.ticks(list(dict.fromkeys(x_ticks))), y.ticks(y_ticks, scale.divisor)
    )
    return [
        _latency(row, lines, series[row.strategy], place, frame, x, y, scale, each_sample) for row, lines in decoded
    ]


def _latency(
    row: Row,
    lines: list[Sequence[float]],
    series: int,
    place: str,
    frame: Plot,
    x: Axis,
    y: Axis,
    scale: units.Scale,
    each_sample: bool,
) -> Plot:
    def path(values: Sequence[float]) -> str:
        return line([(x.at(1 + i), y.at(value)) for i, value in thinned(values)])

    stalls = [s.steps.stall_s[1:] for run in row.runs for s in run.timed_samples if s.steps.stall_s[1:]]
    middle, stall = _medians(lines), _medians(stalls)
    area = f"{path(stall)}L{x.at(len(stall)):.1f} {BOTTOM:.1f}L{LEFT:.1f} {BOTTOM:.1f}Z"
    beyond = sum(t > y.high for values in lines for t in values)
    return replace(
        frame,
        title=row.name,
        description=(
            f"Time of each generated token on {place} with {row.name}: {len(lines)} samples, median over all steps "
            f"{scale.text(median(middle))}, of which {scale.text(median(stall))} waiting for experts."
        ),
        strokes=(
            Stroke("area", area),
            *([Stroke("sample", "".join(map(path, lines)))] if each_sample else []),
            Stroke("line", path(middle)),
        ),
        note=f"{beyond} {'step lies' if beyond == 1 else 'steps lie'} above the axis: see the raw samples."
        if beyond
        else "",
        series=series,
    )


def distribution_chart(rows: Sequence[Row], series: dict[str, int], place: str) -> Plot | None:
    """Draws the share of decoded tokens that took at most so long, a line for each row, over logarithmic time."""
    decoded = [(row, np.concatenate(lines)) for row in rows if (lines := decode_times(row))]
    decoded = [(row, times) for row, times in decoded if times.min() > 0]
    if not decoded:
        return None
    low, high = min(times.min() for _, times in decoded), max(times.max() for _, times in decoded)
    scale = units.scale("s", [float(np.median(times)) for _, times in decoded])
    ticks = log_ticks(float(low) / scale.divisor, float(high) / scale.divisor)
    x, y = x_axis(ticks[0] * scale.divisor, ticks[-1] * scale.divisor, is_log=True), y_axis(0.0, 1.0)
    shares = np.linspace(0.0, 1.0, _SHARES + 1)
    strokes, told = [], []
    for row, times in decoded:
        points = [(x.at(float(t)), y.at(float(s))) for t, s in zip(np.quantile(times, shares), shares, strict=True)]
        strokes.append(Stroke("line", line(points), series[row.strategy]))
        half, most = (scale.text(float(q)) for q in np.quantile(times, (0.5, 0.95)))
        told.append(f"{row.name} half within {half}, 95 % within {most}")
    return Plot(
        "Distribution over tokens",
        f"Distribution of the time of each generated token on {place}: {'; '.join(told)}.",
        f"{scale.symbol}, logarithmic",
        "share of tokens",
        x.ticks(ticks, scale.divisor),
        tuple(Tick(y.at(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)),
        tuple(strokes),
        keys=_keys(rows, series, [row for row, _ in decoded]),
    )


def memory_chart(rows: Sequence[Row], series: dict[str, int], place: str) -> Plot | None:
    """Draws the resident memory of each row's first run over time, as it was seen from beside it.

    Where nobody looked, it is the peak so far, after each repetition.
    """
    seen = [(row, course) for row in rows if (course := _resident(row.runs[0]))]
    courses = seen or [(row, course) for row in rows if (course := _peaks(row.runs[0]))]
    if not courses:
        return None
    scale = units.scale("bytes", [max(n for _, n in course) for _, course in courses])
    seconds = units.scale("s", [max(course[-1][0] for _, course in courses)])
    x_ticks = nice_ticks(max(course[-1][0] for _, course in courses) / seconds.divisor, most=4)
    y_ticks = nice_ticks(max(n for _, course in courses for _, n in course) / scale.divisor, most=4)
    x, y = x_axis(0.0, x_ticks[-1] * seconds.divisor), y_axis(0.0, y_ticks[-1] * scale.divisor)
    draw, told = line if seen else steps, []
    strokes = []
    for row, course in courses:
        points = [(x.at(t), y.at(n)) for t, n in course]
        strokes.append(Stroke("line", draw(points), series[row.strategy]))
        told.append(f"{row.name} up to {scale.text(max(n for _, n in course))}")
    return Plot(
        "Memory over time",
        f"Resident memory on {place} in the course of one run: {'; '.join(told)}.",
        f"{seconds.symbol}, first run" if seen else f"{seconds.symbol} of generating, first run",
        f"{scale.symbol} resident" if seen else f"{scale.symbol}, peak so far",
        x.ticks(x_ticks, seconds.divisor),
        y.ticks(y_ticks, scale.divisor),
        tuple(strokes),
        keys=_keys(rows, series, [row for row, _ in courses]),
    )


def _resident(run: Run) -> list[tuple[float, float]]:
    series = run.conditions.resident if run.conditions else None
    return list(zip(series.time_s, map(float, series.values), strict=True)) if series else []


def _peaks(run: Run) -> list[tuple[float, float]]:
    """Returns (seconds of generating so far, peak resident bytes so far) after each repetition."""
    course, elapsed = [], 0.0
    for sample in run.samples:
        elapsed += sum(sample.steps.time_s)
        if sample.peak_resident_bytes is not None:
            course.append((elapsed, float(sample.peak_resident_bytes)))
    return course


PARTS = {
    "stall": "waiting for experts", "experts": "experts", "dequantise": "dequantising",
    "attention": "attention, router", "head": "head", "other": "other", "compute": "computing",
}  # fmt: skip


def time_parts(row: Row) -> dict[str, float]:
    """Returns the mean seconds of a decoded token by PARTS.

    Samples that kept a timeline tell how the time without waiting divides; without one all of it is `compute`.
    """
    samples = [s for run in row.runs for s in run.timed_samples if len(s.steps.time_s) > 1]
    if not samples:
        return {}
    stall = _mean([s.steps.stall_s[1:] for s in samples])
    compute = max(0.0, _mean([s.steps.time_s[1:] for s in samples]) - stall)
    phases: dict[str, float] = {}
    for sample in (s for run in row.runs for s in run.samples if s.timeline is not None):
        assert sample.timeline is not None
        for name, seconds in sample.timeline.phases_s.items():
            phases[name] = phases.get(name, 0.0) + (seconds or 0.0)
        phases["decode"] = phases.get("decode", 0.0) + sum(sample.steps.time_s[1:])
    seen = {name: phases.get(name, 0.0) for name in ("experts", "dequantise", "attention", "head")}
    seen["experts"] = max(0.0, seen["experts"] - seen["dequantise"])
    seen["other"] = max(0.0, phases.get("decode", 0.0) - phases.get("stall", 0.0) - sum(seen.values()))
    if not sum(seen.values()):
        return {"stall": stall, "compute": compute}
    return {"stall": stall} | {name: compute * part / sum(seen.values()) for name, part in seen.items()}


def decode_times(row: Row) -> list[Sequence[float]]:
    return [s.steps.time_s[1:] for run in row.runs for s in run.timed_samples if s.steps.time_s[1:]]


def _mean(columns: list[tuple[float, ...]]) -> float:
    return sum(map(sum, columns)) / sum(map(len, columns))


def _medians(lines: Sequence[Sequence[float]]) -> list[float]:
    """Returns the median of each step over the samples that reached it."""
    return [median(line_[i] for line_ in lines if i < len(line_)) for i in range(max(map(len, lines)))]


def _keys(rows: Sequence[Row], series: dict[str, int], drawn: Sequence[Row]) -> tuple[Key, ...]:
    return tuple(Key(series[row.strategy], row.name) for row in rows if any(row is other for other in drawn))
