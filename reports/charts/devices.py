"""Charts of one device: memory against speed, and speed against what had to be read, under the device's limits."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from reports import units
from reports.charts.axes import line, log_ticks, nice_ticks
from reports.charts.plot import BOTTOM, LEFT, RIGHT, TOP, Dot, Label, Plot, Stroke, placed, x_axis, y_axis
from reports.judging.groups import Row


def pareto_chart(rows: Sequence[Row], series: dict[str, int], place: str) -> Plot | None:
    """Draws peak memory against time per token; the line joins rows that no other beats in both."""
    points = [
        (memory.median, tpot.median, row)
        for row in rows
        if (memory := row.summaries["peak_resident_bytes"]) and (tpot := row.summaries["tpot_s"]) and tpot.median > 0
    ]
    if not points:
        return None
    points.sort(key=lambda point: point[:2])
    size = units.scale("bytes", [memory for memory, _, _ in points])
    time = units.scale("s", [tpot for _, tpot, _ in points])
    x_ticks = nice_ticks(points[-1][0] * 1.04 / size.divisor, most=4)
    y_ticks = log_ticks(min(t for _, t, _ in points) / time.divisor, max(t for _, t, _ in points) / time.divisor)
    x = x_axis(0.0, x_ticks[-1] * size.divisor)
    y = y_axis(y_ticks[0] * time.divisor, y_ticks[-1] * time.divisor, is_log=True)
    front: list[tuple[float, float, Row]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    (first_x, first_y), *rest = [(x.at(memory), y.at(tpot)) for memory, tpot, _ in front]
    path = f"M{first_x:.1f} {TOP:.1f}V{first_y:.1f}" + "".join(f"H{a:.1f}V{b:.1f}" for a, b in rest) + f"H{RIGHT:.1f}"
    best = [row.name for _, _, row in front]
    dots, labels = _dots([(x.at(m), y.at(t), row, f"{size.text(m)}, {time.text(t)}") for m, t, row in points], series)
    told = "; ".join(f"{row.name} {size.text(m)}, {time.text(t)}" for m, t, row in points)
    return Plot(
        f"Memory and time, {rows[0].runs[0].cell.device}",
        f"Peak memory and time per token on {place}: {told}. None is both smaller and faster than {', '.join(best)}.",
        f"peak memory, {size.symbol}",
        f"time per token, {time.symbol}, logarithmic",
        x.ticks(x_ticks, size.divisor),
        y.ticks(y_ticks, time.divisor),
        (Stroke("front", path),),
        dots,
        labels,
    )


def roofline_chart(rows: Sequence[Row], series: dict[str, int], place: str) -> Plot | None:
    """Draws tokens per second against bytes read per token, under two roofs.

    One roof is what the storage delivers, the other what the arithmetic would do if it never waited. The tick above a
    dot is the estimate's floor, if there is one. A row that reads nothing stands at the left edge, as a logarithmic
    axis has no zero.
    """
    points = [
        (read.median, 1 / tpot.median, row)
        for row in rows
        if (read := row.summaries["read_bytes_per_token"]) and (tpot := row.summaries["tpot_s"]) and tpot.median > 0
    ]
    reading = [read for read, _, _ in points if read > 0]
    rate, arithmetic = _storage_rate(rows), _arithmetic_rate(rows)
    if not reading or not points:
        return None
    size = units.scale("bytes", reading)
    x_ticks = log_ticks(min(reading) / 2 / size.divisor, max(reading) * 1.2 / size.divisor)
    x = x_axis(x_ticks[0] * size.divisor, x_ticks[-1] * size.divisor, is_log=True)
    roofs = [*([rate / x.high] if rate else []), *([arithmetic] if arithmetic else [])]
    speeds = [speed for _, speed, _ in points]
    floors = [(read, 1 / floor, row) for read, _, row in points if (floor := _floor_s(row))]
    top = max([*speeds, *roofs, *(speed for _, speed, _ in floors)])
    y_ticks = log_ticks(min([*speeds, *roofs]), top * 1.15)
    y = y_axis(y_ticks[0], y_ticks[-1], is_log=True)
    strokes, notes = [], []
    if rate:
        start, end = max(x.low, rate / y.high), min(x.high, rate / y.low)
        if start < end:
            strokes.append(Stroke("roof", line([(x.at(start), y.at(rate / start)), (x.at(end), y.at(rate / end))])))
        notes.append(f"storage {units.text(rate, 'bytes')}/s")
    if arithmetic:
        strokes.append(Stroke("roof level", line([(LEFT, y.at(arithmetic)), (RIGHT, y.at(arithmetic))])))
        notes.append(f"arithmetic {units.number(float(f'{arithmetic:.3g}'))} tokens/s")
    ticks_up = [
        Stroke("floor", f"M{x.at(read) - 6:.1f} {y.at(speed):.1f}h12", series[row.strategy])
        for read, speed, row in floors
    ]
    dots, labels = _dots(
        [
            (x.at(read) if read > 0 else LEFT, y.at(speed), row, f"{units.number(float(f'{speed:.3g}'))} tokens/s")
            for read, speed, row in points
        ],
        series,
    )
    told = "; ".join(
        f"{row.name} {units.number(float(f'{speed:.3g}'))} tokens/s reading {size.text(read)} a token"
        for read, speed, row in points
    )
    return Plot(
        f"Roofline, {rows[0].runs[0].cell.device}",
        f"Tokens per second against bytes read per token on {place}, under the roofs {', '.join(notes) or 'unknown'}: "
        f"{told}.",
        f"read per token, {size.symbol}, logarithmic",
        "tokens/s, logarithmic",
        x.ticks(x_ticks, size.divisor),
        y.ticks(y_ticks),
        (*strokes, *ticks_up),
        dots,
        labels,
        note="Roofs: " + ", ".join(notes) + "." if notes else "",
    )


def _dots(
    points: Sequence[tuple[float, float, Row, str]], series: dict[str, int]
) -> tuple[tuple[Dot, ...], tuple[Label, ...]]:
    """Returns dots and their names: beside the dot, left of it on the right half, none over another."""
    dots = tuple(Dot(x, y, f"{row.name}: {value}", series[row.strategy]) for x, y, row, value in points)
    middle = (LEFT + RIGHT) / 2
    right = [Label(x + 8, y + 4, row.name) for x, y, row, _ in points if x <= middle]
    left = [Label(x - 8, y + 4, row.name, "end") for x, y, row, _ in points if x > middle]
    return dots, (*placed(right, high=BOTTOM - 2), *placed(left, high=BOTTOM - 2))


def _storage_rate(rows: Sequence[Row]) -> float | None:
    """Returns bytes/s: the emulated limit, or else the median of what a probe of the storage found."""
    runs = [run for row in rows for run in row.runs]
    emulated = [rate for run in runs if run.request and (rate := run.request.emulated_read_bytes_per_s)]
    probed = [
        rate for run in runs if run.load and run.load.storage and (rate := run.load.storage.bytes_per_s) is not None
    ]
    found = emulated or probed
    return median(found) if found else None


def _arithmetic_rate(rows: Sequence[Row]) -> float | None:
    """Returns the tokens/s of the row that computed fastest, had it never waited."""
    times = [(row.summaries["tpot_s"], row.summaries["stall_per_token_s"]) for row in rows if not row.is_lossy]
    computing = [left for tpot, stall in times if tpot and stall and (left := tpot.median - stall.median) > 0]
    return 1 / min(computing) if computing else None


def _floor_s(row: Row) -> float | None:
    floors = [run.estimate.floor_s for run in row.runs if run.estimate and run.estimate.floor_s > 0]
    return median(floors) if floors else None
