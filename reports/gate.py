"""The gate: what in a comparison with the baseline is a regression, what is suspected, what is missing.

Hard facts need no second look: an answer that changed, an accuracy that was lost, a result that is no more. Times and
memory vary; a nightly run measures again what is suspected (see reports/confirmation.py), a gate of one sweep goes by
the intervals that it has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from reports import units
from reports.judgement import ANSWER, GATED, RESULT, Comparison, Judged, Mark
from reports.metrics import METRICS
from reports.night import Finding, Kind
from reports.records import Cell, Fault, Run, RunStatus, Sweep, Verdict, last_attempts

ACCURACY = "perplexity"
_RESULT_FAULTS = (Fault.ENGINE, Fault.OUT_OF_MEMORY, Fault.TIMED_OUT, Fault.WRONG_ANSWER)


@dataclass(frozen=True)
class Limits:
    """By metric, the share by which it may get worse."""

    worse: dict[str, float] = field(default_factory=lambda: dict(GATED))

    def exceeded(self, judged: Judged) -> bool:
        """By the estimate itself, whatever its interval."""
        limit, worse = self.worse.get(judged.metric), worsening(judged)
        return limit is not None and worse is not None and worse >= limit


@dataclass(frozen=True)
class Measured:
    """A sweep and its last attempts: one side of a gate."""

    sweep: Sweep
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, sweep: Sweep, runs: Iterable[Run]) -> Measured:
        return cls(sweep, tuple(last_attempts(runs)))

    def by_cell(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            found[run.cell.key].append(run)
        return found


def worsening(judged: Judged) -> float | None:
    """The share by which the candidate is worse; negative where it is better."""
    return None if judged.ratio is None else worse_share(judged.metric, judged.ratio)


def worse_share(metric: str, ratio: float) -> float:
    """Of candidate over baseline: 0.1 is a tenth slower, larger or less."""
    return (ratio if METRICS[metric].better == "lower" else 1 / ratio) - 1


def hard_findings(comparison: Comparison, baseline: Measured, candidate: Measured, limits: Limits) -> list[Finding]:
    """All that is one without a look at times and memory."""
    return [
        *_results(baseline, candidate),
        *_answers(baseline, candidate),
        *_accuracy(comparison, limits),
        *_incomparable(comparison, candidate),
    ]


def suspects(comparison: Comparison, limits: Limits) -> list[Judged]:
    """Times and memory that are worse by more than their limit, as far as one night can tell."""
    return [
        judged
        for judged in comparison.judged
        if judged.metric != ACCURACY and judged.mark in (Mark.WORSE, Mark.INCONCLUSIVE) and limits.exceeded(judged)
    ]


def judge_suspects(suspected: Iterable[Judged]) -> list[Finding]:
    """By their intervals, where nothing is measured again."""
    return [
        Finding(
            Kind.REGRESSION if judged.mark is Mark.WORSE else Kind.INCONCLUSIVE,
            describe(judged.metric, judged.ratio or 1.0, judged.ci_low, judged.ci_high),
            judged.cell,
            judged.metric,
        )
        for judged in suspected
    ]


def describe(metric: str, ratio: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f", interval {low - 1:+.1%} to {high - 1:+.1%}"
    return f"{METRICS[metric].label} {ratio - 1:+.1%}{interval}"


def _results(baseline: Measured, candidate: Measured) -> Iterable[Finding]:
    """Of each cell that was planned, and of each that the baseline has: is there a result?"""
    before, after = baseline.by_cell(), candidate.by_cell()
    planned: dict[str, int] = defaultdict(int)
    for key, _ in candidate.sweep.planned:
        planned[key] += 1
    if candidate.runs and all(run.status in (RunStatus.UNREACHABLE, RunStatus.SKIPPED) for run in candidate.runs):
        reasons = dict.fromkeys(run.reasons[0] for run in candidate.runs)
        yield Finding(Kind.INFRASTRUCTURE, f"no device could be used: {'; '.join(list(reasons)[:3])}")
        return
    for key, blocks in planned.items():
        runs = after.get(key, [])
        failed = [run for run in runs if run.status is not RunStatus.OK]
        known = {run.status for run in before.get(key, [])}
        result = next((run for run in failed if run.fault in _RESULT_FAULTS), None)
        if result is not None and result.fault is Fault.WRONG_ANSWER:
            yield Finding(Kind.REGRESSION, result.reasons[0], result.cell, ANSWER)
        elif result is not None and RunStatus.OK in known:
            yield Finding(Kind.REGRESSION, f"{result.status.value}: {result.reasons[0]}", result.cell, RESULT)
        elif result is not None and known != {result.status}:  # the baseline does not know the cell
            yield Finding(Kind.MISSING, f"{result.status.value}: {result.reasons[0]}", result.cell, RESULT)
        missing = blocks - len(runs) + sum(run.fault not in _RESULT_FAULTS for run in failed)
        if missing:
            reason = f": {failed[0].reasons[0]}" if failed else ", never tried"
            cell = next(iter(runs or before.get(key, [])), None)
            where = "" if cell else f"{key}: "
            text = f"{where}{missing} of {blocks} results are missing{reason}"
            yield Finding(Kind.MISSING, text, cell.cell if cell else None, RESULT)
        elif runs and not failed and not any(run.verdict is Verdict.VALID for run in runs):
            yield Finding(Kind.INCONCLUSIVE, f"suspect, so not judged: {runs[0].reasons[0]}", runs[0].cell)
    for key in before.keys() - planned.keys():
        yield Finding(
            Kind.MISSING,
            f"the baseline has it, sweep {candidate.sweep.id} does not measure it any more: move the baseline",
            before[key][0].cell,
            RESULT,
        )


def _answers(baseline: Measured, candidate: Measured) -> Iterable[Finding]:
    """Lossless strategies must say what they said: same container, same prompts, same kind of kernels."""
    known: dict[tuple[object, ...], tuple[int, ...]] = {}
    for run in baseline.runs:
        known.update(_tokens(run))
    for runs in candidate.by_cell().values():
        changed = [
            (run, key) for run in runs for key, tokens in _tokens(run).items() if known.get(key, tokens) != tokens
        ]
        if changed:
            run, key = changed[0]
            was, now = known[key], _tokens(run)[key]
            at = next((i for i, pair in enumerate(zip(was, now, strict=False)) if pair[0] != pair[1]), len(was))
            reason = f"the answer to prompt {key[-2]} is another than the baseline's from token {at} on"
            yield Finding(Kind.REGRESSION, reason, run.cell, ANSWER)


def _tokens(run: Run) -> dict[tuple[object, ...], tuple[int, ...]]:
    """By all that must make them equal; nothing of lossy runs, and of those that are no result."""
    if run.status is not RunStatus.OK or run.load is None or run.request is None:
        return {}
    if run.load.strategy.get("relief", "none") != "none" or run.load.strategy.get("precision", "stored") != "stored":
        return {}
    cell, request = run.cell, run.request
    common = (cell.key, cell.container_sha256, cell.workload_sha256, request.max_new_tokens, request.stop_at_eos)
    return {
        (*common, run.load.backend, s.prompt, (s.repetition, s.warmup) if request.sampling.temperature else None): (
            s.tokens
        )
        for s in run.samples
        if s.timeline is None  # else it is cut short
    }


def _accuracy(comparison: Comparison, limits: Limits) -> Iterable[Finding]:
    for judged in comparison.judged:
        if judged.metric == ACCURACY and limits.exceeded(judged) and judged.baseline and judged.candidate:
            values = (units.text(side.median, "") for side in (judged.baseline, judged.candidate))
            yield Finding(Kind.REGRESSION, "Perplexity {} → {}".format(*values), judged.cell, ACCURACY)


def _incomparable(comparison: Comparison, candidate: Measured) -> Iterable[Finding]:
    cells: dict[str, Cell] = {run.cell.key: run.cell for run in candidate.runs}
    for key, reason in comparison.incomparable:
        yield Finding(Kind.INCONCLUSIVE, f"not comparable with the baseline: {reason}", cells.get(key))
