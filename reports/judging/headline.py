"""What a comparison says, in one sentence. Every number in it is derived from the rows that it names."""

from __future__ import annotations

from collections.abc import Sequence

from reports import units
from reports.judging.groups import Group, Row
from reports.judging.statistics import Ratio, Summary
from reports.records import Verdict


def headline(groups: Sequence[Group]) -> str:
    """Returns one sentence for the whole sweep."""
    if not groups:
        return "Nothing was measured: every run failed, was skipped or is missing."
    if len(groups) == 1:
        return sentence(groups[0])
    baseline = groups[0].baseline
    subjects = [row for group in groups if (row := subject(group)) is not None]
    ratios = [row.speed_up for row in subjects if row.speed_up is not None]
    names = {row.strategy for row in subjects if row.speed_up is not None}
    devices = _count(len({group.device for group in groups}), "device")
    if not ratios or len(names) != 1:
        return f"{_count(len(groups), 'comparison')} on {devices}: each has its sentence below."
    name = names.pop()
    span = _span([ratio.ratio for ratio in ratios])
    faster = sum(ratio.conclusive and ratio.ratio > 1 for ratio in ratios)
    if faster == len(groups):
        return f"On {devices}, {name} generates a token {span} faster than {baseline}{_memory_span(groups)}."
    of = f"{faster} of {_count(len(groups), 'comparison')}"
    return f"{name} generates a token measurably faster than {baseline} in {of} on {devices} (speed-up {span})."


def sentence(group: Group) -> str:
    """Returns one sentence for a group: its fastest strategy with limited memory against the baseline."""
    place = f"On {group.device}"
    row = subject(group)
    if row is None:
        row = group.rows[0]
        tpot = row.summaries["tpot_s"]
        if tpot is None:
            return f"{place}, {row.name} was measured, but generated no token after the first."
        return f"{place}, {row.name} takes {units.text(tpot.median, 's')} a token, and nothing was measured beside it."
    if row.speed_up is None:
        return f"{place}, {row.name} cannot be compared with {group.baseline}: {row.no_speed_up}."
    return f"{place}, {row.name} {_speed(row.speed_up, group.baseline)}{_memory(group, row)}."


def across_devices(groups: Sequence[Group]) -> str:
    """Returns one sentence for a task on several devices: where it is fastest, and how far behind the slowest is."""
    limited = {group.device: [row for row in group.rows if not row.keeps_all_experts] for group in groups}
    is_limited = any(limited.values())  # who keeps every expert in memory is compared where all do
    rows = [(group, limited[group.device] if is_limited else group.rows) for group in groups]
    best = [(*found, group) for group, of in rows if (found := _fastest(of)) is not None]
    if not best:
        return "No device generated a token after the first."
    best.sort(key=lambda each: each[0].median)
    time, row, group = best[0]
    less = any(row.keeps_all_experts for group in groups for row in group.rows) and is_limited
    first = f"{'Of what does not keep all experts in memory, ' if less else ''}{group.device}"
    told = f"{units.text(time.median, 's')} a token with {row.name}"
    if len(best) == 1:
        return f"{first} alone gave numbers: {told}."
    slowest, other, last = best[-1]
    times = _times(slowest.median / time.median)
    return f"{first} is fastest: {told}. {last.device} takes {times} as long, with {other.name}."


def _fastest(rows: Sequence[Row]) -> tuple[Summary, Row] | None:
    timed = [(summary, row) for row in rows if (summary := row.summaries["tpot_s"]) is not None and summary.median > 0]
    return min(timed, key=lambda each: (each[1].verdict is not Verdict.VALID, each[0].median), default=None)


def subject(group: Group) -> Row | None:
    """Returns the row that the sentence is about: the best that does not keep all experts in memory, if any."""
    others = [row for row in group.rows if row.strategy != group.baseline]
    limited = [row for row in others if not row.keeps_all_experts]
    return max(limited or others, key=_rank, default=None)


def _rank(row: Row) -> tuple[bool, float]:
    return row.verdict is Verdict.VALID, row.speed_up.ratio if row.speed_up else 0.0


def _speed(speed: Ratio, baseline: str) -> str:
    if speed.low is None or speed.high is None:
        way, ratio = ("faster", speed.ratio) if speed.ratio >= 1 else ("slower", 1 / speed.ratio)
        return f"generated a token {_times(ratio)} {way} than {baseline} in the one block there is"
    if not speed.conclusive:
        interval = units.interval(speed.low, speed.high)
        return f"is neither measurably faster nor slower than {baseline} (speed-up, 95 % interval {interval})"
    if speed.ratio >= 1:
        way, ratio, low, high = "faster", speed.ratio, speed.low, speed.high
    else:
        way, ratio, low, high = "slower", 1 / speed.ratio, 1 / speed.high, 1 / speed.low
    interval = units.interval(low, high)
    return f"generates a token {_times(ratio)} {way} than {baseline} (95 % interval {interval})"


def _memory(group: Group, row: Row) -> str:
    saving = _memory_saving(group, row)
    if saving is None:
        return ""
    name, ratio = saving
    return (
        f", with {_times(ratio)} less memory than {name}"
        if ratio >= 1
        else f", with {_times(1 / ratio)} the memory of {name}"
    )


def _memory_span(groups: Sequence[Group]) -> str:
    savings = [_memory_saving(group, row) for group in groups if (row := subject(group)) is not None]
    found = [saving for saving in savings if saving is not None and saving[1] > 1]
    if len(found) < len(groups) or len({name for name, _ in found}) != 1:
        return ""
    return f", with {_span([ratio for _, ratio in found])} less memory than {found[0][0]}"


def _memory_saving(group: Group, row: Row) -> tuple[str, float] | None:
    """Returns (name of the row that keeps everything, its peak memory over that of `row`)."""
    ours = row.summaries["peak_resident_bytes"]
    for other in group.rows:
        theirs = other.summaries["peak_resident_bytes"]
        if other.keeps_all_experts and other is not row and ours and theirs and ours.median:
            return other.name, theirs.median / ours.median
    return None


def _times(ratio: float) -> str:
    return units.text(ratio, "ratio")


def _span(ratios: Sequence[float]) -> str:
    return units.interval(min(ratios), max(ratios)) + "×"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
