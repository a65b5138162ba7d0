"""One sweep as one self-contained HTML file: no script, no network, the same bytes for the same records.

This module decides what is shown; templates/page.html.j2 how, templates/page.css how it looks. Whatever a device or a
user wrote reaches the page through autoescape and units.plain, and the content security policy allows the one inline
style sheet, by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from engine.protocol import CoreKind, DeviceFacts, Sample, Steps
from reports import charts, units
from reports.comparison import Group, Row, compare, emulated_conditions
from reports.database import ResultsDatabase
from reports.files import replacing
from reports.headline import headline, sentence
from reports.metrics import METRICS
from reports.records import Run, RunStatus, Sweep, Verdict, by_cell, last_attempts

_SERIES = 8  # colours in page.css
_TABLE = (
    "tpot_s", "estimated_tpot_s", "ttft_s", "peak_resident_bytes", "expert_hit_rate", "read_bytes_per_token",
    "stall_per_token_s", "energy_per_token_j", "perplexity",
)  # fmt: skip
_LABELS = {
    "machine": "architecture", "os": "system", "cpu": "processor", "memory_bytes": "memory",
    "page_bytes": "memory page", "boot_id": "boot", "blas": "BLAS", "python": "Python", "core_kinds": "kinds of cores",
    "read_ahead_bytes": "read-ahead", "swap_bytes": "swap",
}  # fmt: skip
_PROBED_ONLY = ("memory_limit_method", "now")  # facts that a run's Conditions tell better
_OPTIONAL = (
    "estimated_tpot_s",
    "energy_per_token_j",
    "perplexity",
)  # columns that are left out where no row has a value
_SPREAD = ("tpot_s",)  # metrics whose quartiles stand in the table
_CHARTS = ("tpot_s", "peak_resident_bytes", "read_bytes_per_token")


@dataclass(frozen=True)
class TableCell:
    text: str
    spread: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a comparison table."""

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
class Section:
    """A group as it is shown."""

    group: Group
    anchor: str
    sentence: str
    headings: tuple[tuple[str, str], ...]  # label, unit
    has_lossy: bool
    lines: tuple[Line, ...]
    bars: tuple[charts.BarChart, ...]
    latencies: tuple[charts.LatencyChart, ...]


@dataclass(frozen=True)
class Problem:
    """Runs of one cell that gave no number, or none that may be trusted, for the same reason."""

    cell: str
    emulated: tuple[str, ...]
    mark: str  # the status, or the verdict of a run that ended well
    blocks: str
    reasons: tuple[str, ...]
    log_tail: str


@dataclass(frozen=True)
class DeviceCard:
    name: str
    emulated: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class RawRun:
    run: Run
    engaged: str
    conditions: str
    samples: tuple[tuple[str, str], ...]  # title, columns as text


@dataclass(frozen=True)
class RawCell:
    anchor: str
    cell: str
    emulated: tuple[str, ...]
    runs: tuple[RawRun, ...]


def render(database: ResultsDatabase, sweep_id: str, output: Path) -> Path:
    """Writes the page of a sweep, given by id, by the beginning of one or as `latest`; returns `output`."""
    sweep = database.sweep(sweep_id)
    html = render_html(sweep, database.runs(sweep_id=sweep.id))
    with replacing(output) as file:
        file.write(html.encode())
    return output


def render_html(sweep: Sweep, runs: Sequence[Run]) -> str:
    last = last_attempts(runs)
    order = {key: i for i, key in enumerate(dict.fromkeys(key for key, _ in sweep.planned))}
    last.sort(key=lambda run: (order.get(run.cell.key, len(order)), run.cell.key, run.block))
    groups = compare(sweep, last)
    series = _series(sweep, last)
    raw = _raw(last)
    anchors = {cell.cell: cell.anchor for cell in raw}
    return self_contained(
        "page.html.j2",
        sweep=sweep,
        headline=headline(groups),
        emulated=emulated_conditions(last),
        tally=_tally(sweep, last),
        superseded=len(runs) - len(last),
        sections=[_section(i, group, series, anchors) for i, group in enumerate(groups)],
        problems=_problems(sweep, last),
        devices=_devices(last),
        metrics=[METRICS[name] for name in _TABLE],
        raw=raw,
        width=charts.WIDTH,
        moment=units.moment,
    )


def self_contained(template: str, **values: Any) -> str:
    """A page with its style inside, which its content security policy allows by its hash, and nothing else."""
    style = (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template(template)
        .render(
            **values,
            style=Markup(style),  # noqa: S704 - our own file; the policy allows these very bytes
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: Any) -> Any:
    return units.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# --- what was compared ----------------------------------------------------------------------------------------------


def _series(sweep: Sweep, runs: Iterable[Run]) -> dict[str, int]:
    """Each strategy's colour, the same in all charts: the baseline is grey, the others in the order of the plan."""
    strategies = dict.fromkeys(run.cell.strategy for run in runs)
    others = [strategy for strategy in strategies if strategy != sweep.baseline]
    return {sweep.baseline: 0, **{strategy: 1 + i % (_SERIES - 1) for i, strategy in enumerate(others)}}


def _section(index: int, group: Group, series: dict[str, int], anchors: dict[str, str]) -> Section:
    scales = {
        name: units.scale(METRICS[name].unit, [s.median for row in group.rows if (s := row.summaries[name])])
        for name in _TABLE
    }
    place = group.device + (" (emulated)" if group.emulated else "")
    rows = sorted(group.rows, key=_time_per_token)
    has_lossy = any(row.is_lossy for row in rows)
    reference = next((row for row in rows if row.strategy == group.baseline), None)
    wanted = [name for name in _TABLE if name not in _OPTIONAL or any(row.summaries[name] for row in rows)]
    names = [*wanted, *(["perplexity"] if has_lossy and "perplexity" not in wanted else [])]
    bars = [charts.bar_chart(METRICS[name], rows, series, place) for name in _CHARTS]
    return Section(
        group=group,
        anchor=f"comparison-{index}",
        sentence=sentence(group),
        headings=tuple((METRICS[name].label, scales[name].symbol) for name in names),
        has_lossy=has_lossy,
        lines=tuple(
            _line(row, reference, series, anchors, tuple(_cell(row, name, scales[name], reference) for name in names))
            for row in rows
        ),
        bars=tuple(chart for chart in bars if chart is not None),
        latencies=tuple(charts.latency_charts(rows, series, place)),
    )


def _time_per_token(row: Row) -> float:
    """The fastest row stands first, so that one section reads like the other."""
    summary = row.summaries["tpot_s"]
    return math.inf if summary is None else summary.median


def _line(
    row: Row, reference: Row | None, series: dict[str, int], anchors: dict[str, str], cells: tuple[TableCell, ...]
) -> Line:
    is_baseline = reference is not None and row.strategy == reference.strategy
    ratio = row.speed_up
    if ratio is None:
        speed_up = TableCell("1×" if is_baseline else units.ABSENT, "baseline" if is_baseline else row.no_speed_up)
    else:
        known = ratio.low is not None and ratio.high is not None
        spread = units.interval(ratio.low or 0, ratio.high or 0) if known else "one pair, no interval"
        speed_up = TableCell(units.text(ratio.ratio, "ratio"), spread)
    return Line(
        row=row,
        series=series[row.strategy],
        anchor=anchors[row.runs[0].cell.key],
        cells=cells,
        speed_up=speed_up,
        is_baseline=is_baseline,
    )


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


# --- what is missing or not to be trusted ---------------------------------------------------------------------------


def _tally(sweep: Sweep, last: Sequence[Run]) -> list[tuple[int, str]]:
    """(how many, of what); zeros are left out."""
    by_status = Counter(run.status for run in last)
    by_verdict = Counter(run.verdict for run in last if run.status is RunStatus.OK)
    counts = [(len(sweep.planned), "planned"), (by_status[RunStatus.OK], "measured")]
    counts += [(by_status[status], _words(status.value)) for status in RunStatus if status is not RunStatus.OK]
    counts += [(by_verdict[verdict], verdict.value) for verdict in (Verdict.SUSPECT, Verdict.INVALID)]
    counts += [(len(_missing(sweep, last)), "missing")]
    return [(n, what) for n, what in counts if n or what in ("planned", "measured")]


def _missing(sweep: Sweep, last: Iterable[Run]) -> list[tuple[str, int]]:
    found = {(run.cell.key, run.block) for run in last}
    return [pair for pair in sweep.planned if pair not in found]


def _problems(sweep: Sweep, last: Sequence[Run]) -> list[Problem]:
    alike: dict[tuple[str, str, tuple[str, ...]], list[Run]] = defaultdict(list)
    for run in last:
        if run.status is not RunStatus.OK or run.verdict is not Verdict.VALID:
            mark = run.verdict.value if run.status is RunStatus.OK else _words(run.status.value)
            alike[run.cell.key, mark, run.reasons].append(run)
    problems = [
        Problem(cell, emulated_conditions(runs), mark, _blocks(r.block for r in runs), reasons, runs[-1].log_tail)
        for (cell, mark, reasons), runs in alike.items()
    ]
    missing: dict[str, list[int]] = defaultdict(list)
    for cell, block in _missing(sweep, last):
        missing[cell].append(block)
    reason = ("no record: the sweep was interrupted, or is still under way; resume it to measure what is missing",)
    return problems + [Problem(cell, (), "missing", _blocks(b), reason, "") for cell, b in missing.items()]


def _blocks(numbers: Iterable[int]) -> str:
    listed = [str(n + 1) for n in sorted(numbers)]
    return ("block " if len(listed) == 1 else "blocks ") + ", ".join(listed)


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- devices --------------------------------------------------------------------------------------------------------


def _devices(last: Sequence[Run]) -> list[DeviceCard]:
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in last:
        by_name[run.cell.device].append(run)
    return [_device(name, runs) for name, runs in by_name.items()]


def _device(name: str, runs: Sequence[Run]) -> DeviceCard:
    facts: list[tuple[str, str]] = []
    answered = [run.facts for run in runs if run.facts]
    for fact in fields(DeviceFacts) if answered else ():
        if fact.name not in _PROBED_ONLY:
            label = _LABELS.get(fact.name, fact.name.replace("_", " "))
            facts.append((label, _distinct(_fact(fact.name, getattr(f, fact.name)) for f in answered)))
    threads = [str(run.load.threads) for run in runs if run.load and run.load.threads]
    facts += [
        ("threads", _distinct(threads)),
        ("engine sha256", _distinct(run.engine_sha256 for run in runs)),
        ("farm", _distinct(run.farm_version for run in runs)),
        ("containers", _distinct(f"{run.cell.container} sha256 {run.cell.container_sha256}" for run in runs)),
        ("measured", _span(runs)),
    ]
    commands = tuple(dict.fromkeys(run.command for run in runs if run.command))
    return DeviceCard(name, emulated_conditions(runs), tuple(facts), commands)


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name == "core_kinds":
        return ", ".join(_cores(kind) for kind in value) or "unknown"
    return units.text(value, "bytes") if name.endswith("_bytes") else str(value)


def _cores(kind: CoreKind) -> str:
    rate = "" if kind.highest_hz is None else f" at {kind.highest_hz / 1e9:.2f} GHz"
    return f"{kind.cores} {kind.name or 'of unknown kind'}{rate}"


def _span(runs: Sequence[Run]) -> str:
    return f"{units.moment(min(run.started_at for run in runs))} to {units.moment(max(run.ended_at for run in runs))}"


def _distinct(values: Iterable[str]) -> str:
    """Each value once: a fact that changed within a sweep must be seen."""
    return ", then ".join(dict.fromkeys(value for value in values if value)) or "unknown"


# --- raw samples ----------------------------------------------------------------------------------------------------


def _raw(last: Sequence[Run]) -> list[RawCell]:
    return [
        RawCell(f"raw-{i}", key, emulated_conditions(runs), tuple(_raw_run(run) for run in runs))
        for i, (key, runs) in enumerate(by_cell(run for run in last if run.samples).items())
    ]


def _raw_run(run: Run) -> RawRun:
    return RawRun(
        run, _engaged(run), _conditions(run), tuple((_sample_title(sample), _columns(sample)) for sample in run.samples)
    )


def _engaged(run: Run) -> str:
    """What the engine said it did, which is more than what it was asked to do."""
    if run.load is None:
        return "nothing: it ended before the model was loaded"
    load = run.load
    budget = "unlimited" if load.expert_budget_bytes is None else units.text(load.expert_budget_bytes, "bytes")
    cached = units.text(load.page_cache_resident_fraction, "share").replace(units.ABSENT, "an unknown share")
    parts = [f"{part} {name}" for part, name in load.strategy.items()]
    parts += [f"expert budget {budget}", f"reader {load.reader}", f"lanes {load.lanes or 1}", f"backend {load.backend}"]
    parts += [
        f"loaded in {units.text(load.load_s, 's')}",
        f"{cached} of the container cached before",
        *([] if load.storage is None else [f"reading chosen: {load.storage.why}"]),
        *load.warnings,
        *load.notes,
    ]
    return "; ".join(parts)


def _conditions(run: Run) -> str:
    """What was seen of the device beside the run; what it has no sensor for is named at the end."""
    seen = run.conditions
    if seen is None:
        return "not recorded"
    parts = []
    for label, course, words in (
        ("processor", seen.temperature_c, "{:.1f} °C"),
        ("load", seen.load, "{:.2f}"),
        ("battery", seen.battery, "{:.0%}"),
    ):
        if course.before is not None and course.after is not None:
            parts.append(f"{label} {words.format(course.before)}, then {words.format(course.after)}")
    if seen.frequency_hz.lowest is not None and seen.frequency_hz.highest is not None:
        parts.append(f"{seen.frequency_hz.lowest / 1e9:.2f} to {seen.frequency_hz.highest / 1e9:.2f} GHz")
    parts += [f"governor {seen.governor}"] if seen.governor else []
    parts += [f"on {seen.power}"] if seen.power else []
    if seen.throttled is not None:
        parts.append(f"throttled: {', '.join(seen.throttle_causes)}" if seen.throttled else "not throttled")
    if seen.energy_j is not None:
        parts.append(f"{units.text(seen.energy_j, 'J')} in {units.text(seen.watched_s, 's')} by {seen.energy_sensor}")
    if seen.memory_limit_bytes is not None:
        limit, peak = units.text(seen.memory_limit_bytes, "bytes"), units.text(seen.memory_peak_bytes, "bytes")
        parts.append(f"memory limit {limit} by {seen.memory_limit_method}, peak {peak}")
    parts += [f"waited {units.text(seen.waited_s, 's')} before"] if seen.waited_s >= 1 else []
    if seen.readings:
        parts.append(f"{seen.readings} readings, which took {units.text(seen.cpu_s, 's')} of a processor")
    parts += [f"unknown {what}" for what in seen.unknown]
    parts += [f"no sensor for {', '.join(seen.absent)}"] if seen.absent else []
    return "; ".join(parts)


def _sample_title(sample: Sample) -> str:
    faults = "unknown" if sample.major_faults is None else str(sample.major_faults)
    untimed = "warm-up" if sample.timeline is None else "for the timeline"
    kind = untimed if sample.warmup else f"repetition {sample.repetition + 1}"
    peak = "unknown" if sample.peak_resident_bytes is None else units.text(sample.peak_resident_bytes, "bytes")
    return f"prompt {sample.prompt + 1}, {kind}; major faults {faults}; peak memory so far {peak}"


def _columns(sample: Sample) -> str:
    """The steps as text, one line a column of the record; seconds as milliseconds, to the microsecond."""
    lines = [("step", [str(i) for i in range(len(sample.tokens))]), ("token", [str(t) for t in sample.tokens])]
    for column in fields(Steps):
        values = getattr(sample.steps, column.name)
        if column.name.endswith("_s"):
            lines.append((column.name.removesuffix("_s") + "_ms", [f"{value * 1e3:.3f}" for value in values]))
        else:
            lines.append((column.name, [str(value) for value in values]))
    width = max((len(value) for _, values in lines for value in values), default=0)
    return "\n".join(f"{name:<17}" + " ".join(f"{value:>{width}}" for value in values) for name, values in lines)
