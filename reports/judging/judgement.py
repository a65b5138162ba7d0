"""The verdict of a comparison on each cell and metric: better, worse, unchanged, or inconclusive.

A change is better or worse only if three things hold. It exceeds the metric's threshold. Between different sweeps, it
exceeds the device's noise floor. Its 95 % interval excludes 1. A cell is `unchanged` only where a change that matters
would have been seen. Suspect runs never make a regression; another answer or a lost accuracy always does.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from reports.judging.answers import answers, first_change
from reports.judging.matching import DEVICE, Pair, environment, match
from reports.judging.noise import Noise
from reports.judging.statistics import Ratio, Summary, ratio, summarize_runs
from reports.metrics import METRICS
from reports.records import Cell, Fault, Run, RunStatus, Verdict

ACCURACY = "perplexity"
# By which share a metric must get worse for it to matter: less is unchanged, however certain.
GATED: Mapping[str, float] = {"tpot_s": 0.03, "ttft_s": 0.05, "peak_resident_bytes": 0.03, ACCURACY: 0.02}
THRESHOLD = 0.05  # of the others
BLIND = 0.10  # where only a larger change would have been found, nothing is said to be unchanged
ANSWER = "answer"  # instead of a metric: the tokens that were generated
RESULT = "result"  # instead of a metric: whether there is one

RESULT_FAULTS = (Fault.OUT_OF_MEMORY, Fault.TIMED_OUT, Fault.WRONG_ANSWER, Fault.ENGINE)
_FAULT_OF = {  # in records from before faults were kept
    RunStatus.FAILED: Fault.ENGINE,
    RunStatus.OUT_OF_MEMORY: Fault.OUT_OF_MEMORY,
    RunStatus.TIMED_OUT: Fault.TIMED_OUT,
    RunStatus.UNREACHABLE: Fault.UNREACHABLE,
    RunStatus.SKIPPED: Fault.UNTRIED,
}


class Mark(enum.StrEnum):
    """The verdict on one cell and metric, the candidate against the baseline."""

    BETTER = "better"
    WORSE = "worse"
    UNCHANGED = "unchanged"
    INCONCLUSIVE = "inconclusive"
    SUSPECT = "suspect"  # a device's state speaks against the numbers: they are not compared
    NEW = "new"
    GONE = "gone"
    FAILING = "failing"


@dataclass(frozen=True)
class Judged:
    """One cell and one metric. Ratios are candidate over baseline of the metric's value, whichever way is better."""

    cell: Cell  # the candidate's, or the baseline's where it is gone
    metric: str  # one of METRICS, or ANSWER or RESULT
    baseline: Summary | None  # of the runs' values
    candidate: Summary | None
    ratio: float | None
    ci_low: float | None  # 95 % interval of the ratio
    ci_high: float | None
    noise: float | None  # by how much two sweeps of one engine differ here, as a share; None: not known, or paired
    minimum_detectable: float | None  # the change, as a share, that would have been found 4 times in 5
    mark: Mark
    reason: str
    fault: Fault | None = None  # why it is failing

    @property
    def is_regression(self) -> bool:
        """Returns whether the engine is to blame, as far as one can tell."""
        return self.mark is Mark.WORSE or (self.mark is Mark.FAILING and self.fault in RESULT_FAULTS)


@dataclass(frozen=True)
class Comparison:
    baseline: str  # as shown
    candidate: str
    judged: tuple[Judged, ...]
    incomparable: tuple[tuple[str, str], ...]  # (cell key, reason)
    environment: tuple[tuple[str, str, str], ...]  # (device and fact, before, after)


@dataclass(frozen=True)
class Side:
    """One of two that are compared: its name, and the last attempts at its cells."""

    name: str
    runs: tuple[Run, ...]


def compare_sides(
    baseline: Side,
    candidate: Side,
    metrics: Mapping[str, float] = GATED,
    *,
    noise: Noise | None = None,
    across: Collection[str] = (),
) -> Comparison:
    """Compares two sides cell by cell.

    `metrics` has the threshold of each metric, `noise` the noise floors of devices, `across` what differs on purpose.
    """
    pairs, incomparable = match(baseline.runs, candidate.runs, across)
    judged: list[Judged] = []
    for pair in pairs:
        judged += _compared(pair, metrics, noise or {}, across)
        if _passages(pair.baseline) != _passages(pair.candidate) and pair.baseline and pair.candidate:
            incomparable.append((pair.cell.key, f"{METRICS[ACCURACY].label}: of another text, not compared"))
    different = environment(baseline.runs, candidate.runs, across)
    return Comparison(baseline.name, candidate.name, tuple(judged), tuple(incomparable), tuple(different))


def exit_code(comparison: Comparison) -> int:
    """Returns a gate's exit code: 0 no regression, 1 regression, 3 incomplete, 4 infrastructure, 5 inconclusive."""
    judged = comparison.judged
    if any(each.is_regression for each in judged):
        return 1
    missing = [each for each in judged if each.mark in (Mark.GONE, Mark.FAILING)]
    if missing:
        nothing_measured = len(missing) == len(judged) and any(each.mark is Mark.FAILING for each in missing)
        return 4 if nothing_measured else 3
    unsaid = any(each.mark in (Mark.INCONCLUSIVE, Mark.SUSPECT) for each in judged)
    return 5 if unsaid or comparison.incomparable or not judged else 0


# --- one cell ---------------------------------------------------------------------------------------------------------


def _compared(pair: Pair, metrics: Mapping[str, float], noise: Noise, across: Collection[str]) -> Iterator[Judged]:
    before, after = (_usable(side) for side in (pair.baseline, pair.candidate))
    yield from _result(pair, before, after)
    if not before or not after:
        return
    yield from _answer(pair.cell, before, after, across)
    valid_before, valid_after = (_valid(side) for side in (before, after))
    doubted = next((runs[0] for runs, valid in ((after, valid_after), (before, valid_before)) if not valid), None)
    for metric, threshold in metrics.items():
        if metric == ACCURACY:
            if _passages(before) == _passages(after):
                yield from _accuracy(pair.cell, before, after, threshold)
        elif doubted is not None:
            reason = f"{'; '.join(doubted.reasons)} (run {doubted.id})"
            yield _said(pair.cell, metric, Mark.SUSPECT, reason, before, after)
        else:
            floor = noise.get((pair.cell.device, metric)) if not across else None
            changed = "" if DEVICE in across else _less_of_the_device(valid_before, valid_after)
            for found in _value(pair.cell, metric, valid_before, valid_after, threshold, floor):
                is_verdict = found.mark in (Mark.WORSE, Mark.BETTER, Mark.UNCHANGED)
                yield replace(found, mark=Mark.INCONCLUSIVE, reason=changed) if changed and is_verdict else found


def _less_of_the_device(before: Sequence[Run], after: Sequence[Run]) -> str:
    """Returns what both sides had differently of one device, in words; empty where they had the same of it."""
    for fact, words in (("cores", "cores"), ("power_mode", "power mode")):
        sides = [sorted({str(getattr(run.facts, fact)) for run in side if run.facts}) for side in (before, after)]
        if all(sides) and sides[0] != sides[1]:
            old, new = (" and ".join(side) for side in sides)
            return f"measured with other {words} than the baseline ({old} → {new}): set it back, or move the baseline"
    return ""


def _result(pair: Pair, before: Sequence[Run], after: Sequence[Run]) -> Iterator[Judged]:
    """Yields whether there is a result now, against whether there was one."""

    def judged(mark: Mark, reason: str, fault: Fault | None = None) -> Judged:
        return replace(_said(pair.cell, RESULT, mark, reason), fault=fault)

    if not pair.candidate:
        yield judged(Mark.GONE, "not measured any more")
        return
    failed = [run for run in pair.candidate if run not in after]
    faults = {_fault(run) for run in pair.baseline if run not in before}
    if failed:
        first = next((run for run in failed if _fault(run) in RESULT_FAULTS), failed[0])
        fault = _fault(first)
        if fault in RESULT_FAULTS and fault in faults and len(after) >= min(1, len(before)):
            if not after:
                yield judged(Mark.UNCHANGED, f"{first.status.value.replace('_', ' ')}, as in the baseline")
            return
        count = f"{len(failed)} of {len(pair.candidate)} runs: " if after else ""
        reason = f"{count}{first.status.value.replace('_', ' ')}: {'; '.join(first.reasons)} (run {first.id})"
        yield judged(Mark.FAILING, reason, fault)
    elif not pair.baseline:
        yield judged(Mark.NEW, "not measured in the baseline")
    elif not before:
        was = pair.baseline[0].status.value.replace("_", " ")
        yield judged(Mark.BETTER if faults & set(RESULT_FAULTS) else Mark.NEW, f"the baseline's was {was}")


def _answer(cell: Cell, before: Sequence[Run], after: Sequence[Run], across: Collection[str]) -> Iterator[Judged]:
    known, found = answers(before), answers(after)
    if not known.keys() & found.keys():
        return
    change, mark, reason = first_change(known, found), Mark.UNCHANGED, ""
    if change is not None:
        mark = Mark.INCONCLUSIVE if DEVICE in across else Mark.WORSE
        why = ": other devices may round otherwise" if DEVICE in across else ", of a lossless strategy"
        reason = "the answer to prompt {} differs from token {} on".format(*change) + why
    yield _said(cell, ANSWER, mark, reason)


def _accuracy(cell: Cell, before: Sequence[Run], after: Sequence[Run], threshold: float) -> Iterator[Judged]:
    """Yields the verdict on accuracy. It is computed from one text, varies with nothing, and has no interval."""
    old, new = (summarize_runs(METRICS[ACCURACY], side) for side in (before, after))
    if old is None or new is None:
        if new is None and _passages(after):
            mark = Mark.WORSE if old is not None else Mark.UNCHANGED
            yield _said(cell, ACCURACY, mark, "beyond what a number can hold", before, after)
        return
    found = new.median / old.median
    mark = Mark.WORSE if found >= 1 + threshold else Mark.BETTER if found <= 1 / (1 + threshold) else Mark.UNCHANGED
    yield Judged(cell, ACCURACY, old, new, found, found, found, None, threshold, mark, "")


# --- one value --------------------------------------------------------------------------------------------------------


def _value(
    cell: Cell, metric: str, before: Sequence[Run], after: Sequence[Run], threshold: float, floor: float | None
) -> Iterator[Judged]:
    old, new = (summarize_runs(METRICS[metric], side) for side in (before, after))
    if old is None and new is None:
        return
    found = ratio(METRICS[metric], before, after)
    if old is None or new is None:
        mark = Mark.GONE if new is None else Mark.NEW
        reason = "not measured any more" if new is None else "not measured in the baseline"
        yield _said(cell, metric, mark, reason, before, after)
    elif found is None:
        mark = Mark.UNCHANGED if old.median == new.median else Mark.INCONCLUSIVE
        yield _said(cell, metric, mark, "a value of 0 has no ratio", before, after)
    else:
        noise = None if found.blocks else floor
        smallest = found.minimum_detectable(max(threshold, noise or 0.0))
        worse = found if METRICS[metric].better == "lower" else found.inverse
        mark, reason = _mark(worse, threshold, noise, smallest)
        yield Judged(cell, metric, old, new, found.ratio, found.low, found.high, noise, smallest, mark, reason)


def _mark(worse: Ratio, threshold: float, noise: float | None, smallest: float | None) -> tuple[Mark, str]:
    """Returns the mark and its reason; `worse` is above 1 where the candidate is worse."""
    change = max(worse.ratio, 1 / worse.ratio) - 1
    if smallest is None:
        return Mark.INCONCLUSIVE, "one run on a side, which tells nothing of how runs differ: measure more blocks"
    if change > threshold:
        if not worse.conclusive:
            return Mark.INCONCLUSIVE, "it may be no change at all: measure more blocks"
        if noise is not None and change <= noise:
            return Mark.INCONCLUSIVE, f"no more than sweeps of one engine differ here ({noise:.1%})"
        reason = "" if noise is not None or worse.blocks else "how sweeps of one engine differ here is not known yet"
        return (Mark.WORSE if worse.ratio > 1 else Mark.BETTER), reason
    seen = worse.minimum_detectable() or 0.0
    if min(seen, seen if noise is None else noise) > max(BLIND, threshold):
        return Mark.INCONCLUSIVE, f"only a change of {smallest:.0%} would have been found: measure more blocks"
    return Mark.UNCHANGED, ""


def _said(
    cell: Cell, metric: str, mark: Mark, reason: str, before: Sequence[Run] = (), after: Sequence[Run] = ()
) -> Judged:
    """Returns a verdict without a ratio."""
    known = METRICS.get(metric)
    old, new = (None if known is None else summarize_runs(known, side) for side in (before, after))
    return Judged(cell, metric, old, new, None, None, None, None, None, mark, reason)


# --- runs -------------------------------------------------------------------------------------------------------------


def _usable(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.status is RunStatus.OK and run.verdict is not Verdict.INVALID]


def _valid(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.verdict is Verdict.VALID]


def _fault(run: Run) -> Fault | None:
    return run.fault or _FAULT_OF.get(run.status)


def _passages(runs: Iterable[Run]) -> set[object]:
    """Returns the accuracy texts that were to be predicted, empty where none was."""
    return {run.request.passages for run in runs if run.request is not None and run.request.passages}
