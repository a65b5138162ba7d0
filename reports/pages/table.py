"""The table of a comparison: a line for each strategy, a column for each metric."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reports import units
from reports.comparison import Group, Row
from reports.metrics import METRICS
from reports.pages.raw import Raw
from reports.records import Verdict

COLUMNS = (
    "tpot_s", "estimated_tpot_s", "ttft_s", "peak_resident_bytes", "expert_hit_rate", "read_bytes_per_token",
    "stall_per_token_s", "energy_per_token_j", "perplexity",
)  # fmt: skip
_OPTIONAL = ("estimated_tpot_s", "energy_per_token_j", "perplexity")  # left out where no row has a value
_SPREAD = ("tpot_s",)  # whose quartiles stand beside them


@dataclass(frozen=True)
class TableCell:
    text: str
    spread: str = ""


@dataclass(frozen=True)
class Line:
    row: Row
    series: int
    anchor: str  # of its raw samples
    cells: tuple[TableCell, ...]
    speed_up: TableCell
    is_baseline: bool

    @property
    def is_suspect(self) -> bool:
        return self.row.verdict is Verdict.SUSPECT


@dataclass(frozen=True)
class ComparisonTable:
    headings: tuple[tuple[str, str], ...]  # label, unit
    lines: tuple[Line, ...]
    has_lossy: bool


def comparison_table(group: Group, series: dict[str, int], raw: Raw) -> ComparisonTable:
    rows = fastest_first(group)
    scales = {
        name: units.scale(METRICS[name].unit, [s.median for row in rows if (s := row.summaries[name])])
        for name in COLUMNS
    }
    has_lossy = any(row.is_lossy for row in rows)
    reference = next((row for row in rows if row.strategy == group.baseline), None)
    names = [name for name in COLUMNS if name not in _OPTIONAL or any(row.summaries[name] for row in rows)]
    names += ["perplexity"] if has_lossy and "perplexity" not in names else []
    return ComparisonTable(
        tuple((METRICS[name].label, scales[name].symbol) for name in names),
        tuple(
            Line(
                row=row,
                series=series[row.strategy],
                anchor=raw.anchor(row.runs[0]),
                cells=tuple(_cell(row, name, scales[name], reference) for name in names),
                speed_up=speed_up_cell(row, reference),
                is_baseline=reference is not None and row.strategy == reference.strategy,
            )
            for row in rows
        ),
        has_lossy,
    )


def fastest_first(group: Group) -> list[Row]:
    """So that one comparison reads like the other."""
    return sorted(group.rows, key=lambda row: math.inf if (s := row.summaries["tpot_s"]) is None else s.median)


def speed_up_cell(row: Row, reference: Row | None) -> TableCell:
    ratio = row.speed_up
    if ratio is None:
        is_baseline = reference is not None and row.strategy == reference.strategy
        return TableCell("1×" if is_baseline else units.ABSENT, "baseline" if is_baseline else row.no_speed_up)
    known = ratio.low is not None and ratio.high is not None
    spread = units.interval(ratio.low or 0, ratio.high or 0) if known else "one block, no interval"
    return TableCell(units.text(ratio.ratio, "ratio"), spread)


def _cell(row: Row, metric: str, scale: units.Scale, reference: Row | None) -> TableCell:
    summary = row.summaries[metric]
    if summary is None:
        return TableCell(units.ABSENT, "loss not measured" if metric == "perplexity" and row.is_lossy else "")
    if metric == "perplexity":
        other = None if reference is None or reference is row else reference.summaries[metric]
        rise = "" if other is None else f"{summary.median / other.median - 1:+.2%}"
        return TableCell(scale.number(summary.median), rise)
    low, high = scale.number(summary.low_quartile), scale.number(summary.high_quartile)
    return TableCell(scale.number(summary.median), f"{low}–{high}" if metric in _SPREAD and low != high else "")
