"""Where every number leads: the runs of a cell, with their samples, conditions, verdict and command.

A page stays small enough to be mailed. So the samples of many cells are told in less detail than those of a few, all in
the same, and the page says how to get the rest.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median

from engine.protocol import Sample, Steps
from reports import units
from reports.metrics import METRICS
from reports.records import Cell, Run, emulated_in

BUDGET_BYTES = 700_000  # of all the text together


class Detail(enum.StrEnum):
    """How much is told of the samples; the values say it."""

    STEPS = "As the devices measured them, warm-ups included. Step 0 is the prefill."
    TIMES = "So that the page stays small, the times of each step only, without warm-ups. Step 0 is the prefill."
    SAMPLES = "So that the page stays small, a line for each sample, without warm-ups."
    RUNS = "So that the page stays small, a line for each run."


@dataclass(frozen=True)
class RawRun:
    title: str
    verdict: str
    reasons: tuple[str, ...]
    identity: str
    conditions: str
    engaged: str  # empty where it is as in the run before
    command: str  # the same
    samples: tuple[tuple[str, str], ...]  # title, text


@dataclass(frozen=True)
class RawCell:
    anchor: str
    cell: Cell
    sweep: str  # with what separates it; empty where all is of one
    emulated: tuple[str, ...]
    count: int
    runs: tuple[RawRun, ...]
    lines: str = ""  # instead of runs


@dataclass(frozen=True)
class Raw:
    detail: Detail
    cells: tuple[RawCell, ...]
    anchors: dict[tuple[str, str], str]  # (sweep, cell key) ->

    def anchor(self, run: Run) -> str:
        """Empty where nothing was measured."""
        return self.anchors.get((run.sweep_id, run.cell.key), "")


def raw_samples(runs: Iterable[Run], budget_bytes: int = BUDGET_BYTES) -> Raw:
    """In as much detail as fits."""
    by_cell: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.samples:
            by_cell[run.sweep_id, run.cell.key].append(run)
    anchors = {key: f"raw-{i}" for i, key in enumerate(by_cell)}
    are_several = len({sweep_id for sweep_id, _ in by_cell}) > 1
    steps = sum(len(sample.tokens) for found in by_cell.values() for run in found for sample in run.samples)
    for detail in Detail:
        if detail is Detail.STEPS and steps * 40 > budget_bytes:  # at least: no need to write it all to see that
            continue
        cells: list[RawCell] = []
        left = budget_bytes
        for key, found in by_cell.items():
            cells.append(_cell(anchors[key], f"{key[0]}, " if are_several else "", found, detail))
            left -= _size(cells[-1])
            if left < 0 and detail is not Detail.RUNS:
                break
        else:
            return Raw(detail, tuple(cells), anchors)
    raise AssertionError("the last detail is taken in any case")


def _size(cell: RawCell) -> int:
    """Bytes, about."""
    texts = [
        (r.title, r.identity, r.conditions, r.engaged, r.command, *r.reasons, *sum(r.samples, ())) for r in cell.runs
    ]
    return 300 + len(cell.lines) + sum(300 + sum(map(len, text)) for text in texts)


def _cell(anchor: str, sweep: str, runs: Sequence[Run], detail: Detail) -> RawCell:
    shown: list[RawRun] = []
    engaged = command = ""
    for run in runs if detail is not Detail.RUNS else ():
        new_engaged, new_command = _engaged(run), run.command
        shown.append(
            RawRun(
                title=f"Block {run.block + 1}",
                verdict=run.verdict.value,
                reasons=run.reasons,
                identity=f"{run.id}, started {units.moment(run.started_at)}, loaded in {_loaded(run)}",
                conditions=_conditions(run),
                engaged=new_engaged if new_engaged != engaged else "",
                command=new_command if new_command != command else "",
                samples=_samples(run, detail),
            )
        )
        engaged, command = new_engaged, new_command
    lines = "\n".join(map(_run_line, runs)) if detail is Detail.RUNS else ""
    if lines:
        lines += f"\n{_engaged(runs[-1])}\n{runs[-1].command}"
    return RawCell(anchor, runs[0].cell, sweep, emulated_in(runs), len(runs), tuple(shown), lines)


def _samples(run: Run, detail: Detail) -> tuple[tuple[str, str], ...]:
    if detail is Detail.STEPS:
        return tuple((_sample_title(sample), _columns(sample)) for sample in run.samples)
    if detail is Detail.TIMES:
        return tuple((_sample_title(s), _columns(s, names=("time_s", "stall_s"))) for s in run.timed_samples)
    return (("", "\n".join(_sample_line(run, sample) for sample in run.timed_samples)),)


def _run_line(run: Run) -> str:
    parts = [f"block {run.block + 1}", run.verdict.value]
    for name in ("tpot_s", "ttft_s", "peak_resident_bytes", "expert_hit_rate"):
        parts.append(units.text(METRICS[name].of(run), METRICS[name].unit))
    heat = run.conditions.temperature_c if run.conditions else None
    parts += [f"{heat.before:.0f} to {heat.after:.0f} °C"] if heat and heat.before and heat.after else []
    return "  ".join((*parts, run.id, *run.reasons))


def _sample_line(run: Run, sample: Sample) -> str:
    decode = sample.steps.time_s[1:]
    scale = units.scale("s", decode)
    spread = " / ".join(scale.number(f(decode)) for f in _ORDERED) + f" {scale.symbol}" if decode else "no other token"
    hits = METRICS["expert_hit_rate"].per_sample
    share = hits(run, sample) if hits else None
    first = sample.steps.time_s[0] if sample.steps.time_s else None
    return (
        f"prompt {sample.prompt + 1} repetition {sample.repetition + 1}: {len(sample.tokens)} tokens, first "
        f"{units.text(first, 's')}, then least / median / most {spread}, waiting "
        f"{units.text(sum(sample.steps.stall_s[1:]), 's')}, hits {units.text(share, 'share')}"
    )


_ORDERED: tuple[Callable[[Sequence[float]], float], ...] = (min, median, max)


def _loaded(run: Run) -> str:
    return units.text(run.load.load_s, "s") if run.load else units.ABSENT


def _engaged(run: Run) -> str:
    """What the engine said it did, which is more than what it was asked to do."""
    if run.load is None:
        return "nothing: it ended before the model was loaded"
    load = run.load
    budget = "unlimited" if load.expert_budget_bytes is None else units.text(load.expert_budget_bytes, "bytes")
    parts = [f"{part} {name}" for part, name in load.strategy.items()]
    parts += [f"expert budget {budget}", f"reader {load.reader}", f"lanes {load.lanes or 1}", f"backend {load.backend}"]
    parts += [] if load.storage is None else [f"reading chosen: {load.storage.why}"]
    return "; ".join((*parts, *load.warnings, *load.notes))


def _conditions(run: Run) -> str:
    """What was seen of the device beside the run; what it has no sensor for is named at the end."""
    fraction = run.load.page_cache_resident_fraction if run.load else None
    cached = units.text(fraction, "share").replace(units.ABSENT, "an unknown share")
    seen = run.conditions
    if seen is None:
        return f"not recorded, but {cached} of the container cached before"
    parts = [f"{cached} of the container cached before"]
    for label, course, form in (
        ("processor", seen.temperature_c, "{:.1f} °C"),
        ("load", seen.load, "{:.2f}"),
        ("battery", seen.battery, "{:.0%}"),
    ):
        if course.before is not None and course.after is not None:
            parts.append(f"{label} {form.format(course.before)}, then {form.format(course.after)}")
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


def _columns(sample: Sample, names: Sequence[str] | None = None) -> str:
    """The steps as text, one line a column of the record; seconds as milliseconds, to the microsecond."""
    lines = []
    if names is None:
        lines += [("step", [str(i) for i in range(len(sample.tokens))]), ("token", [str(t) for t in sample.tokens])]
    for column in names or [field.name for field in fields(Steps)]:
        values = getattr(sample.steps, column)
        if column.endswith("_s"):
            lines.append((column.removesuffix("_s") + "_ms", [f"{value * 1e3:.3f}" for value in values]))
        else:
            lines.append((column, [str(value) for value in values]))
    width = max((len(value) for _, values in lines for value in values), default=0)
    return "\n".join(f"{name:<17}" + " ".join(f"{value:>{width}}" for value in values) for name, values in lines)
