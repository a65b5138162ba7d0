"""The table of comparisons: a line for each strategy, or for each on every device, a column for each metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports import units
from reports.judging.groups import Group, Row
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
    value: float | None = None  # by which it is sorted


@dataclass(frozen=True)
class Line:
    device: str
    row: Row
    series: int
    anchor: str  # of its raw samples
    cells: tuple[TableCell, ...]
    speed_up: TableCell
    is_baseline: bool

    @property
    def is_suspect(self) -> bool:
        return self.row.verdict is Verdict.SUSPECT

    @property
    def samples(self) -> int:
        return sum(len(run.timed_samples) for run in self.row.runs)


@dataclass(frozen=True)
class ComparisonTable:
    headings: tuple[tuple[str, str], ...]  # label, unit
    lines: tuple[Line, ...]
    has_lossy: bool


def comparison_table(groups: Sequence[Group], series: dict[str, int], raw: Raw) -> ComparisonTable:
    """Returns the table, with one scale for each column."""
    by_group = [(group, fastest_first(group)) for group in groups]
    rows = [row for _, found in by_group for row in found]
    scales = {
        name: units.scale(METRICS[name].unit, [s.median for row in rows if (s := row.summaries[name])])
        for name in COLUMNS
    }
    has_lossy = any(row.is_lossy for row in rows)
    names = [name for name in COLUMNS if name not in _OPTIONAL or any(row.summaries[name] for row in rows)]
    names += ["perplexity"] if has_lossy and "perplexity" not in names else []
    return ComparisonTable(
        tuple((METRICS[name].label, scales[name].symbol) for name in names),
        tuple(
            _line(group.device, row, reference_of(group), {name: scales[name] for name in names}, series, raw)
            for group, found in by_group
            for row in found
        ),
        has_lossy,
    )


def reference_of(group: Group) -> Row | None:
    return next((row for row in group.rows if row.strategy == group.baseline), None)


def fastest_first(group: Group) -> list[Row]:
    """Returns the rows by time per token, so that all comparisons read alike."""
    return sorted(group.rows, key=lambda row: math.inf if (s := row.summaries["tpot_s"]) is None else s.median)


def _line(
    device: str, row: Row, reference: Row | None, scales: dict[str, units.Scale], series: dict[str, int], raw: Raw
) -> Line:
    is_baseline = reference is not None and row.strategy == reference.strategy
    return Line(
        device=device,
        row=row,
        series=series[row.strategy],
        anchor=raw.anchor(row.runs[0]),
        cells=tuple(_cell(row, name, scale, reference) for name, scale in scales.items()),
        speed_up=_speed_up(row, is_baseline),
        is_baseline=is_baseline,
    )


def _speed_up(row: Row, is_baseline: bool) -> TableCell:
    ratio = row.speed_up
    if ratio is None:
        return TableCell("1×", "baseline", 1.0) if is_baseline else TableCell(units.ABSENT, row.no_speed_up)
    known = ratio.low is not None and ratio.high is not None
    spread = units.interval(ratio.low or 0, ratio.high or 0) if known else "one block, no interval"
    return TableCell(units.text(ratio.ratio, "ratio"), spread, ratio.ratio)


def _cell(row: Row, metric: str, scale: units.Scale, reference: Row | None) -> TableCell:
    summary = row.summaries[metric]
    if summary is None:
        return TableCell(units.ABSENT, "loss not measured" if metric == "perplexity" and row.is_lossy else "")
    if metric == "perplexity":
        other = None if reference is None or reference is row else reference.summaries[metric]
        rise = "" if other is None else f"{summary.median / other.median - 1:+.2%}"
        return TableCell(scale.number(summary.median), rise, summary.median)
    low, high = scale.number(summary.low_quartile), scale.number(summary.high_quartile)
    spread = f"{low}–{high}" if metric in _SPREAD and low != high else ""
    return TableCell(scale.number(summary.median), spread, summary.median)
