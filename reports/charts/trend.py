"""One metric of one cell over the nights: medians with their band, where it changed, and what changed beside."""

from __future__ import annotations

from reports import units
from reports.charts.axes import line, ticks_between
from reports.charts.plot import BOTTOM, TOP, Dot, Label, Plot, Stroke, x_axis, y_axis
from reports.metrics import METRICS
from reports.nights.night import Trend

_SPARK_WIDTH, _SPARK_HEIGHT = 100, 20  # of a sparkline's canvas


def trend_chart(trend: Trend, title: str) -> Plot | None:
    """Draws a trend with its changes; None where there is no night."""
    points = trend.points
    if not points:
        return None
    metric = METRICS[trend.metric]
    scale = units.scale(metric.unit, [point.median for point in points])
    low, high = min(point.low for point in points), max(point.high for point in points)
    ticks = ticks_between(low / scale.divisor, high / scale.divisor)
    x = x_axis(-0.4, len(points) - 0.6)
    y = y_axis(ticks[0] * scale.divisor, ticks[-1] * scale.divisor)
    upper = [(x.at(i), y.at(point.high)) for i, point in enumerate(points)]
    lower = [(x.at(i), y.at(point.low)) for i, point in enumerate(points)]
    strokes = [
        Stroke("band", line([*upper, *reversed(lower)]) + "Z"),
        Stroke("line", line([(x.at(i), y.at(point.median)) for i, point in enumerate(points)])),
    ]
    labels, notes = [], []
    for index, what in trend.environment:
        at = (x.at(index - 1) + x.at(index)) / 2 if index else x.at(0)
        strokes.append(Stroke("rule environment", f"M{at:.1f} {TOP:.1f}V{BOTTOM:.1f}"))
        notes.append(f"{_day(points[index].started_at)}: {what}")
    for change in trend.changes:
        at = (x.at(change.index - 1) + x.at(change.index)) / 2 if change.index else x.at(0)
        strokes.append(Stroke("rule change", f"M{at:.1f} {TOP:.1f}V{BOTTOM:.1f}"))
        share = change.after / change.before - 1 if change.before else 0.0
        labels.append(
            Label(at + (4 if at < 200 else -4), TOP + 8, f"{share:+.1%}", "start" if at < 200 else "end", "change")
        )
        notes.append(
            f"{_day(points[change.index].started_at)}: from {scale.text(change.before)} to {scale.text(change.after)}, "
            f"p = {change.p_value:.2g}, engine {points[change.index].engine_sha256[:12]}"
        )
    news = {len(points) - 1, *(change.index for change in trend.changes), *(index for index, _ in trend.environment)}
    dots = tuple(
        Dot(x.at(i), y.at(point.median), f"{_day(point.started_at)}: {scale.text(point.median)}", None, "dot small")
        for i, point in enumerate(points)
        if i in news
    )
    first, last = points[0], points[-1]
    ends = [(0, first), (len(points) - 1, last)] if len(points) > 1 else [(0, first)]
    return Plot(
        title,
        f"{metric.label} of {title} over {len(points)} nights, from {scale.text(first.median)} on "
        f"{_day(first.started_at)} to {scale.text(last.median)} on {_day(last.started_at)}."
        + ("" if not notes else " Changes: " + "; ".join(notes) + "."),
        "",
        f"{metric.label}, {scale.symbol}" if scale.symbol else metric.label,
        (),
        y.ticks(ticks, scale.divisor),
        tuple(strokes),
        dots,
        (
            *labels,
            *(
                Label(x.at(i), BOTTOM + 16, _day(point.started_at), anchor, "tick")
                for (i, point), anchor in zip(ends, ("start", "end"), strict=False)
            ),
        ),
        note="; ".join(notes),
    )


def sparkline(trend: Trend) -> str:
    """Returns the SVG path of the medians, from the least to the most, on a canvas of 100 by 20."""
    values = [point.median for point in trend.points]
    low, span = min(values), max(values) - min(values)
    across = _SPARK_WIDTH / max(1, len(values) - 1)
    points = [
        (round(i * across), round(_SPARK_HEIGHT * (1 - (v - low) / span)) if span else _SPARK_HEIGHT // 2)
        for i, v in enumerate(values)
    ]
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _day(iso: str) -> str:
    return iso[:10]
