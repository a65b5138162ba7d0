"""Devices side by side: what runs where, how fast, and in how much memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from reports import units
from reports.charts.devices import pareto_chart, roofline_chart
from reports.charts.plot import Plot
from reports.judging.groups import Group, Row, Variant, budget_text, compare
from reports.judging.headline import across_devices
from reports.metrics import METRICS
from reports.nights.gate import Measured
from reports.pages.layout import counted, self_contained, words
from reports.pages.raw import Raw, raw_samples
from reports.pages.strategies import common, drawn_rows, in_plan_order, place_of, series_of
from reports.pages.table import COLUMNS, ComparisonTable, comparison_table
from reports.records import Run, RunStatus, Verdict, emulated_in

_LEVELS = 8  # of shade in page.css
_MOST_DRAWN = 40  # pairs of charts

Task = tuple[str, str, str]  # container, workload, page cache


@dataclass(frozen=True)
class HeatCell:
    """What a strategy takes on a device, or why there is no number."""

    text: str
    beside: str = ""  # the speed-up, or the fault
    value: float | None = None  # by which it is sorted
    level: int | None = None  # the faster, the stronger; None: no number
    anchor: str = ""  # of its raw samples
    is_suspect: bool = False


@dataclass(frozen=True)
class HeatRow:
    device: str
    emulated: tuple[str, ...]
    cells: tuple[HeatCell, ...]


@dataclass(frozen=True)
class DeviceCharts:
    device: str
    emulated: tuple[str, ...]
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Map:
    """One container, workload and state of the page cache, on every device."""

    anchor: str
    container: str
    workload: str
    page_cache: str
    sentence: str
    strategies: tuple[tuple[str, str], ...]  # name, expert budget
    unit: str  # of the cells
    rows: tuple[HeatRow, ...]
    emulated: tuple[str, ...]
    table: ComparisonTable
    charts: tuple[DeviceCharts, ...]


def devices_page(sides: Sequence[Measured], superseded: int = 0) -> str:
    """`superseded`: attempts that later ones replaced."""
    sides = [in_plan_order(side) for side in sides]
    runs = [run for side in sides for run in side.runs]
    raw = raw_samples(runs)
    names = _names(sides)
    groups: dict[Task, list[Group]] = {_task(run): [] for run in runs}  # what gave no number has its place, too
    for side in sides:
        for group in compare(side.sweep, side.runs):
            task = group.container, group.workload, group.page_cache
            groups[task].append(replace(group, device=names[side.sweep.id, group.device]))
    every = [group for found in groups.values() for group in found]
    colours = series_of(every)
    is_brief = len(every) > _MOST_DRAWN
    maps = [
        _map(f"map-{i}", task, found, [run for run in runs if _task(run) == task], names, colours, raw, is_brief)
        for i, (task, found) in enumerate(groups.items())
    ]
    return self_contained(
        "devices.html.j2",
        kind="devices",
        title=", ".join(dict.fromkeys(side.sweep.name for side in sides)),
        lede=_lede(maps, every),
        maps=maps,
        metrics=[METRICS[name] for name in COLUMNS],
        superseded=superseded,
        **common(sides, runs, raw),
    )


def _task(run: Run) -> Task:
    return run.cell.container, run.cell.workload, run.cell.page_cache


def _names(sides: Sequence[Measured]) -> dict[tuple[str, str], str]:
    """(sweep, device) -> as it is shown: a device that several sweeps measured is one in each."""
    seen = dict.fromkeys((side.sweep.id, run.cell.device) for side in sides for run in side.runs)
    times = Counter(device for _, device in seen)
    return {(sweep, device): device if times[device] == 1 else f"{device}, {sweep}" for sweep, device in seen}


def _map(
    anchor: str,
    task: Task,
    groups: Sequence[Group],
    runs: Sequence[Run],
    names: dict[tuple[str, str], str],
    series: dict[str, int],
    raw: Raw,
    is_brief: bool,
) -> Map:
    rows = {(group.device, row.strategy, row.expert_budget): row for group in groups for row in group.rows}
    tried: dict[str, dict[Variant, list[Run]]] = {}
    for run in runs:
        of_device = tried.setdefault(names[run.sweep_id, run.cell.device], {})
        of_device.setdefault((run.cell.strategy, run.cell.expert_budget), []).append(run)
    seen = list(dict.fromkeys(variant for found in tried.values() for variant in found))
    strategies = list(dict.fromkeys(strategy for strategy, _ in seen))
    columns = sorted(seen, key=lambda variant: strategies.index(variant[0]))
    times = [summary.median for row in rows.values() if (summary := row.summaries["tpot_s"]) is not None]
    scale = units.scale("s", times)
    shades = _shades(times)
    charts = []
    for group in groups if not is_brief else ():
        drawn, title = drawn_rows(group), place_of(group)
        pair = pareto_chart(drawn, series, title), roofline_chart(drawn, series, title)
        charts.append(DeviceCharts(group.device, group.emulated, tuple(plot for plot in pair if plot is not None)))
    return Map(
        anchor,
        *task,
        sentence=across_devices(groups),
        strategies=tuple(_column(variant) for variant in columns),
        unit=scale.symbol,
        rows=tuple(
            HeatRow(
                device,
                emulated_in(run for found in variants.values() for run in found),
                tuple(
                    _heat_cell(rows.get((device, *variant)), variants.get(variant, []), scale, shades, raw)
                    for variant in columns
                ),
            )
            for device, variants in tried.items()
        ),
        emulated=emulated_in(runs),
        table=comparison_table(groups, series, raw),
        charts=tuple(charts),
    )


def _column(variant: Variant) -> tuple[str, str]:
    """(strategy, budget as people write it)."""
    strategy, budget = variant
    return strategy, budget_text(budget)


def _shades(times: Sequence[float]) -> Callable[[float], int]:
    """Time -> shade, even on a logarithmic scale from the slowest to the fastest."""
    known = [math.log(time) for time in times if time > 0]
    slowest, span = max(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)

    def shade(time: float) -> int:
        share = (slowest - math.log(time)) / span if span and time > 0 else 1.0
        return min(_LEVELS - 1, int(share * _LEVELS))

    return shade


def _heat_cell(
    row: Row | None, runs: Sequence[Run], scale: units.Scale, shades: Callable[[float], int], raw: Raw
) -> HeatCell:
    summary = row.summaries["tpot_s"] if row else None
    if row is not None and summary is not None:
        speed = "" if row.speed_up is None else units.text(row.speed_up.ratio, "ratio")
        is_suspect = row.verdict is Verdict.SUSPECT
        return HeatCell(
            scale.number(summary.median),
            speed,
            summary.median,
            shades(summary.median),
            raw.anchor(row.runs[0]),
            is_suspect,
        )
    if not runs:
        return HeatCell("not tried")
    last = runs[-1]
    why = last.verdict.value if last.status is RunStatus.OK else words(last.status.value)
    fault = words(last.fault.value) if last.fault else ""
    return HeatCell(why, fault if fault != why else "", anchor=raw.anchor(last))


def _lede(maps: Sequence[Map], groups: Sequence[Group]) -> str:
    if not groups:
        return "Nothing was measured: every run failed, was skipped or is missing."
    if len(maps) == 1:
        return maps[0].sentence
    devices = counted(len({row.device for each in maps for row in each.rows}), "device")
    return f"{devices} and {counted(len(maps), 'task')}: each has its map and its sentence below."
