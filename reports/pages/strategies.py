"""Strategies side by side on each device: the page of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.charts.bars import BarChart, bar_chart, speed_up_chart, stacked_chart
from reports.charts.layers import layers_chart
from reports.charts.plot import Plot
from reports.charts.samples import PARTS, distribution_chart, latency_charts, memory_chart, time_parts
from reports.charts.timeline import Pipeline, pipelines
from reports.judging.groups import Group, Row, compare
from reports.judging.headline import headline, sentence
from reports.metrics import METRICS
from reports.nights.gate import Measured
from reports.pages.layout import counted, self_contained
from reports.pages.problems import problems, run_counts
from reports.pages.provenance import device_cards
from reports.pages.raw import Raw, raw_samples
from reports.pages.table import COLUMNS, ComparisonTable, comparison_table, fastest_first
from reports.records import Run, emulated_in

_SERIES = 8  # colours in page.css
_MOST_DRAWN = 8  # strategies in one chart
_MOST_DRAWN_IN_ALL = 96  # of all charts: beyond that the page has fewer kinds of them
_MOST_PIPELINES = 4  # of one section
_CHARTS = ("peak_resident_bytes", "read_bytes_per_token")


@dataclass(frozen=True)
class Section:
    """A group as it is shown."""

    group: Group
    sweep: str  # empty where there is but one
    anchor: str
    sentence: str
    caption: str
    table: ComparisonTable
    drawn: str  # where the charts do not have all of it
    bars: tuple[BarChart, ...]
    plots: tuple[Plot, ...]
    latencies: tuple[Plot, ...]
    pipelines: tuple[Pipeline, ...]


def strategies_page(sides: Sequence[Measured], superseded: int = 0) -> str:
    """`superseded`: attempts that later ones replaced."""
    sides = [in_plan_order(side) for side in sides]
    runs = [run for side in sides for run in side.runs]
    raw = raw_samples(runs)
    by_sweep = [(side, compare(side.sweep, side.runs)) for side in sides]
    groups = [group for _, found in by_sweep for group in found]
    colours = series_of(groups)
    is_brief = sum(min(len(group.rows), _MOST_DRAWN) for group in groups) > _MOST_DRAWN_IN_ALL
    sections: list[Section] = []
    for side, found in by_sweep:
        name = f"{side.sweep.name}, {side.sweep.id}" if len(sides) > 1 else ""
        sections += [_section(len(sections) + i, group, name, colours, raw, is_brief) for i, group in enumerate(found)]
    return self_contained(
        "strategies.html.j2",
        kind="strategies",
        title=", ".join(dict.fromkeys(side.sweep.name for side in sides)),
        lede=headline(groups),
        sections=sections,
        metrics=[METRICS[name] for name in COLUMNS],
        superseded=superseded,
        **common(sides, runs, raw),
    )


def common(sides: Sequence[Measured], runs: Sequence[Run], raw: Raw) -> dict[str, object]:
    """What every page about sweeps ends with."""
    return {
        "sweeps": [side.sweep for side in sides],
        "emulated": emulated_in(runs),
        "run_counts": run_counts(sides),
        "problems": problems(sides),
        "devices": device_cards(runs),
        "raw": raw,
    }


def in_plan_order(side: Measured) -> Measured:
    order = {key: i for i, key in enumerate(dict.fromkeys(key for key, _ in side.sweep.planned))}
    runs = sorted(side.runs, key=lambda run: (order.get(run.cell.key, len(order)), run.cell.key, run.block))
    return Measured(side.sweep, tuple(runs))


def series_of(groups: Iterable[Group]) -> dict[str, int]:
    """Each strategy's colour, the same in all charts: the baseline is grey, the others in the order of the plan."""
    groups = list(groups)
    baselines = dict.fromkeys(group.baseline for group in groups)
    strategies = dict.fromkeys(row.strategy for group in groups for row in group.rows)
    others = [strategy for strategy in strategies if strategy not in baselines]
    return dict.fromkeys(baselines, 0) | {strategy: 1 + i % (_SERIES - 1) for i, strategy in enumerate(others)}


def place_of(group: Group) -> str:
    return group.device + (" (emulated)" if group.emulated else "")


def drawn_rows(group: Group) -> list[Row]:
    """The fastest, and the baseline in any case."""
    rows = fastest_first(group)
    chosen = rows[:_MOST_DRAWN]
    if not any(row.strategy == group.baseline for row in chosen):
        chosen[-1:] = [row for row in rows if row.strategy == group.baseline][:1] or chosen[-1:]
    return chosen


def _section(index: int, group: Group, sweep: str, series: dict[str, int], raw: Raw, is_brief: bool) -> Section:
    rows, place = drawn_rows(group), place_of(group)
    bars = [bar_chart(METRICS["tpot_s"], rows, series, place), speed_up_chart(rows, series, place, group.baseline)]
    plots: list[Plot | None] = []
    if not is_brief:
        bars.append(stacked_chart([(row, time_parts(row)) for row in rows], PARTS, series, place))
        bars += [bar_chart(METRICS[name], rows, series, place) for name in _CHARTS]
        plots = [chart(rows, series, place) for chart in (distribution_chart, memory_chart, layers_chart)]
    left = len(group.rows) - len(rows)
    table = comparison_table([group], series, raw)
    return Section(
        group=group,
        sweep=sweep,
        anchor=f"comparison-{index}",
        sentence=sentence(group),
        caption=_caption(group, table),
        table=table,
        drawn=f"The charts show the fastest and the baseline; {counted(left, 'other')} in the table." if left else "",
        bars=tuple(chart for chart in bars if chart is not None),
        plots=tuple(plot for plot in plots if plot is not None),
        latencies=() if is_brief else tuple(latency_charts(rows, series, place)),
        pipelines=() if is_brief else tuple(pipelines(rows, series, place)[:_MOST_PIPELINES]),
    )


def _caption(group: Group, table: ComparisonTable) -> str:
    caption = f"Medians against {group.baseline}."
    if group.other_tokens == ():
        caption += f" All strategies{' that lose nothing' if table.has_lossy else ''} generated the same tokens."
    return caption
