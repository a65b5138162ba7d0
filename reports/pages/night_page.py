"""A night: how it ended, what changed, where, and since when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reports import units
from reports.charts.bars import BarChart, Interval, ratio_chart
from reports.charts.plot import Plot
from reports.charts.trend import sparkline, trend_chart
from reports.judging.groups import budget_text
from reports.judging.judgement import ANSWER, RESULT, Judged, Mark
from reports.judging.statistics import Summary, summarize_runs
from reports.metrics import METRICS
from reports.nights.gate import Measured
from reports.nights.night import Confirmation, Finding, Kind, Night, Trend, TrendPoint
from reports.nights.summary import TITLES
from reports.pages.layout import counted, self_contained, where
from reports.pages.raw import Raw, raw_samples
from reports.pages.strategies import common, in_plan_order
from reports.records import Cell, Run, by_cell

_MOST_FOUND = 60  # of one kind that are told: all of them are in the table
_MOST_TRENDS = 40  # that are drawn: what was found, what changed, then the others
_RAW_BYTES = 450_000
_MOST_INTERVALS = 16  # in one chart
_MOST_NAMED = 3  # in the first sentence
_ENGINE = 12  # characters of a hash
_GRAVEST = (
    Mark.FAILING, Mark.GONE, Mark.WORSE, Mark.SUSPECT, Mark.INCONCLUSIVE, Mark.NEW, Mark.BETTER, Mark.UNCHANGED,
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    anchor: str
    text: str


@dataclass(frozen=True)
class Item:
    """A finding as it is shown."""

    finding: Finding
    task: str  # container, workload, page cache
    metric: str
    since: str
    links: tuple[Link, ...]


@dataclass(frozen=True)
class FindingGroup:
    """The findings on one strategy on one device."""

    name: str  # empty: of no cell
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Again:
    """A confirmation as it is shown."""

    confirmation: Confirmation
    name: str
    task: str
    metric: str
    mark: str
    ratio: str
    interval: str
    anchor: str  # of the raw samples of the last round


@dataclass(frozen=True)
class Change:
    """One metric of one cell."""

    text: str
    beside: tuple[str, ...] = ()
    value: float | None = None  # by which it is sorted
    mark: str = ""


@dataclass(frozen=True)
class NightRow:
    cell: Cell
    name: str  # of the strategy, with its budget
    task: str  # container, workload, page cache
    mark: str  # the gravest of its changes
    changes: tuple[Change, ...]
    trend: str  # SVG path
    tonight: str  # anchors of the raw samples
    before: str


@dataclass(frozen=True)
class DrawnTrend:
    anchor: str
    cell: Cell
    name: str
    task: str
    plot: Plot
    values: str


def night_page(
    night: Night, tonight: Measured, behind: Sequence[Measured] = (), baseline_sweep_id: str | None = None
) -> str:
    """Returns the page; for `behind`, the other sweeps that it tells of, see outcome.sweeps_behind."""
    tonight = in_plan_order(tonight)
    raw = raw_samples((run for side in (tonight, *behind) for run in side.runs), _RAW_BYTES)
    trends = _drawn(night)
    metrics = _metrics(night)
    tells = _Tells(night, raw, {(t.cell.key, t.plot.title): t.anchor for t in trends}, tonight, baseline_sweep_id)
    by_kind = {kind: [finding for finding in night.findings if finding.kind is kind] for kind in Kind}
    counts = Counter(judged.mark for judged in night.comparison.judged) if night.comparison else Counter[Mark]()
    return self_contained(
        "night.html.j2",
        kind="nightly",
        title=night.name,
        lede=_lede(night),
        night=night,
        baseline_sweep_id=baseline_sweep_id,
        outcome="good" if not night.exit_code else "bad" if night.exit_code in (1, 3, 4) else "warn",
        findings=[
            (TITLES[kind], len(found), tells.grouped(found[:_MOST_FOUND])) for kind, found in by_kind.items() if found
        ],
        most_found=_MOST_FOUND,
        acknowledged=tells.grouped(night.acknowledged),
        again=[tells.again(confirmation) for confirmation in night.confirmations],
        again_chart=_again_chart(night.confirmations),
        trends=trends,
        left=len(night.trends) - len(trends),
        rows=tells.rows(metrics),
        columns=[METRICS[metric].label for metric in metrics],
        marks=[(counts[mark], mark.value) for mark in _GRAVEST if counts[mark]],
        metrics=[METRICS[metric] for metric in metrics],
        superseded=0,
        **common([tonight], tonight.runs, raw),
    )


def _lede(night: Night) -> str:
    against = f" against {night.baseline}" if night.baseline else ""
    regressions = [finding for finding in night.findings if finding.kind is Kind.REGRESSION]
    if regressions:
        names = list(dict.fromkeys(_name(finding.cell) for finding in regressions if finding.cell))
        more = f" and {len(names) - _MOST_NAMED} more" if names[_MOST_NAMED:] else ""
        places = f": {', '.join(names[:_MOST_NAMED])}{more}" if names else ""
        return f"{counted(len(regressions), 'regression')}{against}{places}."
    compared = night.comparison.judged if night.comparison else ()
    gravest = next((f for kind in Kind for f in night.findings if f.kind is kind), None)
    if gravest is None:
        noisy = f"; too noisy to say in {night.too_noisy} of {len(compared)} comparisons" if night.too_noisy else ""
        return f"No regression{against}{noisy}."
    count = sum(finding.kind is gravest.kind for finding in night.findings)
    what = {
        Kind.MISSING: f"{counted(count, 'result')} missing",
        Kind.INFRASTRUCTURE: "The devices could not be used",
        Kind.INCONCLUSIVE: f"{counted(count, 'result')} inconclusive",
    }[gravest.kind]
    return f"{what}{against}, and no regression. {gravest.reason}."


def _metrics(night: Night) -> list[str]:
    judged = [each.metric for each in night.comparison.judged] if night.comparison else []
    seen = dict.fromkeys(judged + [trend.metric for trend in night.trends])
    return [metric for metric in METRICS if metric in seen]


class _Tells:
    """Puts what a night has to say beside the samples and trends that it comes from."""

    def __init__(
        self, night: Night, raw: Raw, anchors: Mapping[tuple[str, str], str], tonight: Measured, baseline: str | None
    ) -> None:
        self._night, self._raw, self._anchors = night, raw, anchors
        self._tonight, self._baseline = by_cell(tonight.runs), baseline
        self._trends = {(trend.cell.key, trend.metric): trend for trend in night.trends}
        self._order = {key: i for i, key in enumerate(self._tonight)}

    def grouped(self, findings: Sequence[Finding]) -> list[FindingGroup]:
        """Returns the findings by strategy and device, in the order in which they were found."""
        found: dict[str, list[Item]] = {}
        for finding in findings:
            found.setdefault(_name(finding.cell) if finding.cell else "", []).append(self._item(finding))
        return [FindingGroup(name, tuple(items)) for name, items in found.items()]

    def _item(self, finding: Finding) -> Item:
        cell, metric = finding.cell, finding.metric
        if cell is None:
            return Item(finding, "", label_of(metric), "", ())
        trend = self._trends.get((cell.key, metric))
        links = (
            Link(self._anchors.get((cell.key, _trend_title(cell, metric)), ""), "trend"),
            Link(self._raw_of(self._night.sweep_id, cell), "tonight's samples"),
            Link(self._raw_of(self._baseline, cell), "the baseline's samples"),
        )
        return Item(
            finding, _task(cell), label_of(metric), _since(trend) if trend else "", tuple(x for x in links if x.anchor)
        )

    def again(self, confirmation: Confirmation) -> Again:
        c = confirmation
        mark = "confirmed" if c.confirmed else "refuted" if c.is_refuted else "undecided"
        known = c.ci_low is not None and c.ci_high is not None
        return Again(
            c,
            _name(c.cell),
            _task(c.cell),
            label_of(c.metric),
            mark,
            units.ABSENT if c.ratio is None else _percent(c.ratio),
            f"{_percent(c.ci_low or 0.0)} to {_percent(c.ci_high or 0.0)}" if known else "",
            self._raw_of(c.sweep_id, c.cell),
        )

    def rows(self, metrics: Sequence[str]) -> list[NightRow]:
        """Returns a row for each cell, in the order of the plan; cells that are gone come last."""
        judged: dict[str, dict[str, Judged]] = {}
        cells = {key: runs[0].cell for key, runs in self._tonight.items()}
        for each in self._night.comparison.judged if self._night.comparison else ():
            judged.setdefault(each.cell.key, {})[each.metric] = each
            cells.setdefault(each.cell.key, each.cell)
        return [self._row(cell, judged.get(key, {}), metrics) for key, cell in cells.items()]

    def _row(self, cell: Cell, judged: Mapping[str, Judged], metrics: Sequence[str]) -> NightRow:
        runs = self._tonight.get(cell.key, [])
        changes = [_change(judged.get(metric), metric, runs) for metric in metrics]
        facts = [_fact(judged[metric]) for metric in (RESULT, ANSWER) if metric in judged]
        fact = next((f for f in facts if f.mark != Mark.UNCHANGED), facts[0] if facts else Change(units.ABSENT))
        marks = {each.mark for each in (*changes, fact)}
        trend = self._trends.get((cell.key, "tpot_s"))
        return NightRow(
            cell,
            strategy_of(cell),
            _task(cell),
            next((mark.value for mark in _GRAVEST if mark in marks), ""),
            (*changes, fact),
            sparkline(trend) if trend and len(trend.points) > 1 else "",
            self._raw_of(self._night.sweep_id, cell),
            self._raw_of(self._baseline, cell),
        )

    def _raw_of(self, sweep_id: str | None, cell: Cell) -> str:
        return self._raw.anchors.get((sweep_id or "", cell.key), "")


def strategy_of(cell: Cell) -> str:
    budget = budget_text(cell.expert_budget)
    return f"{cell.strategy} ({budget})" if budget else cell.strategy


def _name(cell: Cell) -> str:
    return f"{strategy_of(cell)} on {cell.device}"


def _task(cell: Cell) -> str:
    return where(cell, but=("device", "strategy", "expert_budget"))


def label_of(metric: str) -> str:
    known = METRICS.get(metric)
    return known.label if known else {ANSWER: "Answer", RESULT: "Result"}.get(metric, metric)


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _change(judged: Judged | None, metric: str, runs: Iterable[Run]) -> Change:
    if judged is None:
        return _value(summarize_runs(METRICS[metric], runs), metric)
    sides = [None if side is None else side.median for side in (judged.baseline, judged.candidate)]
    scale = units.scale(METRICS[metric].unit, sides)
    beside = [f"{scale.number(sides[0])} → {scale.text(sides[1])}"]
    if judged.ci_low is not None and judged.ci_high is not None and judged.ci_low != judged.ci_high:
        beside.append(f"{_percent(judged.ci_low)} to {_percent(judged.ci_high)}")
    if judged.mark is not Mark.UNCHANGED and judged.reason:
        beside.append(judged.reason)
    text = units.ABSENT if judged.ratio is None else _percent(judged.ratio)
    return Change(text, tuple(beside), judged.ratio, judged.mark.value)


def _value(summary: Summary | None, metric: str) -> Change:
    """Returns a value that there was nothing to compare with."""
    if summary is None:
        return Change(units.ABSENT)
    return Change(units.text(summary.median, METRICS[metric].unit), (), summary.median)


def _fact(judged: Judged) -> Change:
    text = "" if judged.metric == RESULT else "same answer" if judged.mark is Mark.UNCHANGED else label_of(ANSWER)
    return Change(text, (judged.reason,) if judged.reason else (), None, judged.mark.value)


# --- trends -----------------------------------------------------------------------------------------------------------


def _drawn(night: Night) -> list[DrawnTrend]:
    found = {(f.cell.key, f.metric) for f in night.findings if f.cell}
    known = {(f.cell.key, f.metric) for f in night.acknowledged if f.cell}
    again = {(c.cell.key, c.metric) for c in night.confirmations}

    def rank(trend: Trend) -> tuple[bool, ...]:
        which = trend.cell.key, trend.metric
        return which not in found, which not in known, which not in again, not trend.changes, not trend.environment

    chosen = sorted((trend for trend in night.trends if len(trend.points) > 1), key=rank)[:_MOST_TRENDS]
    drawn = []
    for i, trend in enumerate(chosen):
        plot = trend_chart(trend, _trend_title(trend.cell, trend.metric))
        if plot is not None:
            cell = trend.cell
            drawn.append(DrawnTrend(f"trend-{i}", cell, _name(cell), _task(cell), plot, _values(trend)))
    return drawn


def _trend_title(cell: Cell, metric: str) -> str:
    return f"{label_of(metric)}: {where(cell)}"


def _values(trend: Trend) -> str:
    scale = units.scale(METRICS[trend.metric].unit, [point.median for point in trend.points])

    def line(point: TrendPoint) -> str:
        spread = f"{scale.number(point.low)}–{scale.number(point.high)}"
        return f"{point.started_at[:10]}  {scale.text(point.median)} ({spread})  {point.sweep_id}  {_engine(point)}"

    return "\n".join(map(line, trend.points))


def _engine(point: TrendPoint) -> str:
    return f"engine {point.engine_sha256[:_ENGINE]}" if point.engine_sha256 else "engine without a hash"


def _software(point: TrendPoint) -> str:
    return f"{_engine(point)} of farm {point.farm_version}" if point.farm_version else _engine(point)


def _since(trend: Trend) -> str:
    """Returns since when a series is as it is, as far as the nights tell."""
    if not trend.changes:
        return f"no change point in {counted(len(trend.points), 'night')}" if len(trend.points) > 1 else ""
    index = trend.changes[-1].index
    point, before = trend.points[index], trend.points[max(0, index - 1)]
    engines = _software(point)
    if before.engine_sha256 != point.engine_sha256:
        engines += f", before that {_software(before)}"
    beside = "; ".join(what for at, what in trend.environment if at == index)
    return f"since the night of {point.started_at[:10]}, sweep {point.sweep_id}, {engines}" + (
        f"; that night changed, too: {beside}" if beside else ""
    )


def _again_chart(confirmations: Sequence[Confirmation]) -> BarChart | None:
    measured = [c for c in confirmations if c.ratio is not None and c.ratio > 0][:_MOST_INTERVALS]
    return ratio_chart(
        [
            Interval(f"{c.cell.device}, {strategy_of(c.cell)}: {label_of(c.metric)}", c.ratio or 1.0, c.ci_low,
                     c.ci_high, 4 if c.confirmed else 0)
            for c in measured
        ],
        "New engine over old, in turns on the same device",
        "Ratio of what was measured again, with 95 % intervals",
        "new / old, 95 % interval",
    )  # fmt: skip
