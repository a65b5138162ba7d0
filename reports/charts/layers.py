"""The hit rate by layer: where a strategy's predictions hold and where they do not."""

from __future__ import annotations

from collections.abc import Sequence

from reports import units
from reports.charts.axes import Tick, line, nice_ticks
from reports.charts.plot import Key, Plot, Stroke, x_axis, y_axis
from reports.judging.groups import Row


def layers_chart(rows: Sequence[Row], series: dict[str, int], place: str) -> Plot | None:
    """Draws each row's hit rate by layer; None where no record has counts by layer."""
    rates = [(row, found) for row in rows if len(found := _hit_rates(row)) > 1]
    if not rates:
        return None
    last = max(max(found) for _, found in rates)
    x, y = x_axis(0, last), y_axis(0.0, 1.0)
    strokes, told = [], []
    for row, found in rates:
        strokes.append(Stroke("line", line([(x.at(n), y.at(rate)) for n, rate in found.items()]), series[row.strategy]))
        worst, best = (units.text(f(found.values()), "share") for f in (min, max))
        told.append(f"{row.name} {worst} to {best}")
    ticks = [n for n in nice_ticks(last, most=6) if n == int(n) and n <= last]
    return Plot(
        "Hit rate by layer",
        f"Share of the experts asked for that were resident, by MoE layer, on {place}: {'; '.join(told)}.",
        "MoE layer",
        "hits",
        x.ticks(ticks),
        tuple(Tick(y.at(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)),
        tuple(strokes),
        keys=tuple(Key(series[row.strategy], row.name) for row, _ in rates),
    )


def _hit_rates(row: Row) -> dict[int, float]:
    """Returns the rate by layer over all timed samples, without layers of which no expert was asked for."""
    counts = [sample.layers for run in row.runs for sample in run.timed_samples if sample.layers is not None]
    found = {}
    for layer in range(max((len(each.hits) for each in counts), default=0)):
        of = [each for each in counts if layer < len(each.hits)]
        hits = sum(each.hits[layer] for each in of)
        every = hits + sum(each.late[layer] + each.misses[layer] for each in of)
        if every:
            found[layer] = hits / every
    return found
