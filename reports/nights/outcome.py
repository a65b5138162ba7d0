"""How a night is judged: against its baseline, against the nights before, and by what is measured again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from reports.errors import UnknownSweepError
from reports.judging.judgement import ACCURACY, GATED, Comparison, Mark
from reports.judging.noise import Noise
from reports.nights.confirmation import Suspicion, decide, paired_ratios
from reports.nights.gate import Limits, Measured, against_baseline, describe, findings_of, hard_findings, suspects
from reports.nights.night import Confirmation, Finding, Kind, Night, Trend, exit_code, with_history
from reports.nights.trends import NIGHTS, recent_worsening, trends
from reports.records import Run, Sweep, by_cell
from reports.results.baselines import Acknowledgement, NightRecord
from reports.results.database import ResultsDatabase

ROUNDS = 3
DOUBT = 0.01  # the chance of what was seen, were there nothing, up to which an undecided suspicion is told

# (suspicions, round) -> the sweep that measured them, and its runs; None where it could not be measured to its end
Again = Callable[[Sequence[Suspicion], int], tuple[str, Sequence[Run]] | None]


@dataclass(frozen=True)
class Context:
    """What a night is judged by."""

    limits: Limits = field(default_factory=lambda: GATED)
    rounds: int = ROUNDS
    acknowledgements: Sequence[Acknowledgement] = ()


@dataclass(frozen=True)
class Evidence:
    """What is known of a night before anything is measured again."""

    candidate: Measured  # the night itself
    baseline_name: str
    baseline: Measured | None  # None where none is pinned
    noise: Noise  # of each device, from the sweeps before
    earlier: Sequence[Night]  # the nights before


def judge_night(
    name: str, evidence: Evidence, context: Context, again: Again, is_kept: Callable[[str], bool], at: str
) -> Night:
    """Returns the night, judged against its baseline and the nights before; doubts go to `again`.

    `is_kept` tells whether an engine, by its hash, can still be deployed; `at` is now, UTC.
    """
    candidate, baseline = evidence.candidate, evidence.baseline
    lines = trends(candidate, context.limits, evidence.earlier)
    if baseline is None:
        hint = (
            f"no baseline {evidence.baseline_name} is pinned, so nothing was compared: "
            f"`edgemoe-farm baseline pin {evidence.baseline_name} {candidate.sweep.id}`"
        )
        return without_baseline(name, candidate, lines, hint, at)
    comparison = against_baseline(evidence.baseline_name, baseline, candidate, context.limits, evidence.noise)
    return _judge_against(name, comparison, baseline, candidate, lines, context, again, is_kept, at)


def load_night(database: ResultsDatabase, record: NightRecord) -> Night:
    """As it was judged, its trends with the points of the nights before it."""
    earlier = database.nights(name=record.name, before=record, last=NIGHTS)
    before = [Night.from_json(other.record, trends_only=True) for other in earlier]
    return with_history(Night.from_json(record.record), before)


def sweeps_behind(database: ResultsDatabase, record: NightRecord) -> list[Sweep]:
    """Those of which a night tells beside its own, as far as they are still there: the baseline's, and what was
    measured again."""
    confirmations = Night.from_json(record.record).confirmations
    wanted = dict.fromkeys((record.baseline_sweep_id, *(c.sweep_id for c in confirmations)))
    found = []
    for sweep_id in wanted:
        if sweep_id and sweep_id != record.sweep_id:
            with contextlib.suppress(UnknownSweepError):
                sweep = database.sweep(sweep_id)
                found += [sweep] if sweep.id == sweep_id else []
    return found


def without_baseline(name: str, candidate: Measured, trends: tuple[Trend, ...], hint: str, at: str) -> Night:
    """The first night, or one whose baseline was removed: there is nothing to compare with."""
    finding = Finding(Kind.INCONCLUSIVE, hint)
    return Night(candidate.sweep.id, name, at, exit_code([finding]), findings=(finding,), trends=trends)


def judge_sweep(name: str, comparison: Comparison, candidate: Measured, context: Context, at: str) -> Night:
    """As judge_night, by the intervals that there are: nothing is measured again."""
    findings = hard_findings(comparison, candidate) + findings_of(comparison.judged)
    return _night(name, comparison, candidate, findings, context, at)


def _judge_against(
    name: str,
    comparison: Comparison,
    baseline: Measured,
    candidate: Measured,
    trends: tuple[Trend, ...],
    context: Context,
    again: Again,
    is_kept: Callable[[str], bool],
    at: str,
) -> Night:
    """`is_kept`: whether an engine, by its hash, can still be deployed; `at`: now, UTC."""
    findings = hard_findings(comparison, candidate)
    suspicions, dismissed = _suspicions(comparison, baseline, candidate, trends, context.limits)
    findings += dismissed
    confirmable = [s for s in suspicions if is_kept(s.old_sha256)]
    confirmations = [_not_kept(s) for s in suspicions if not is_kept(s.old_sha256)]
    confirmations += _confirm(confirmable, context.rounds, again)
    findings += [finding for c in confirmations if (finding := _finding(c)) is not None]
    return _night(name, comparison, candidate, findings, context, at, tuple(confirmations), trends)


def _night(
    name: str,
    comparison: Comparison,
    candidate: Measured,
    findings: Sequence[Finding],
    context: Context,
    at: str,
    confirmations: tuple[Confirmation, ...] = (),
    trends: tuple[Trend, ...] = (),
) -> Night:
    known = tuple(f for f in findings if _is_acknowledged(f, context.acknowledgements, at))
    left = tuple(f for f in findings if f not in known)
    alarms = tuple(str(f) for f in left if f.kind in (Kind.MISSING, Kind.INFRASTRUCTURE))
    return Night(
        candidate.sweep.id, name, at, exit_code(left), comparison.baseline, comparison, left, confirmations, known,
        alarms, trends,
    )  # fmt: skip


def _suspicions(
    comparison: Comparison, baseline: Measured, candidate: Measured, trends: Iterable[Trend], limits: Limits
) -> tuple[list[Suspicion], list[Finding]]:
    """(what is to be measured again, what cannot be the engine's fault: it is the one of the baseline)."""
    old, new = _engines(baseline), _engines(candidate)
    wanted, dismissed = {}, []
    for judged in suspects(comparison, limits):
        key = judged.cell.key
        if old.get(key) != new.get(key):
            wanted[key, judged.metric] = judged.cell
        elif judged.mark is Mark.WORSE:
            what = describe(judged.metric, judged.ratio or 1.0, judged.ci_low, judged.ci_high)
            reason = f"{what}, of the baseline's own engine: the device has changed"
            dismissed.append(Finding(Kind.INCONCLUSIVE, reason, judged.cell, judged.metric))
    for trend in trends:
        limit, key = limits.get(trend.metric), trend.cell.key
        is_new = key in old and old[key] != new.get(key)
        if limit is not None and trend.metric != ACCURACY and is_new and recent_worsening(trend, limit):
            wanted[key, trend.metric] = trend.cell
    found = [Suspicion(cell, metric, limits[metric], old[key], new[key]) for (key, metric), cell in wanted.items()]
    return found, dismissed


def _engines(side: Measured) -> Mapping[str, str]:
    return {key: runs[-1].engine_sha256 for key, runs in by_cell(side.runs).items()}


def _confirm(suspicions: Sequence[Suspicion], rounds: int, again: Again) -> list[Confirmation]:
    """Rounds of pairs, each of what is undecided after the one before."""
    runs: list[Run] = []
    decided: dict[int, Confirmation] = {}
    open_ones = list(range(len(suspicions)))
    for round_ in range(rounds):
        if not open_ones:
            break
        measured = again([suspicions[i] for i in open_ones], round_)
        if measured is None:
            break
        sweep_id, more = measured
        runs += more
        for i in list(open_ones):
            ratios = paired_ratios(suspicions[i], runs)
            decision = decide(suspicions[i], ratios, suspicions=len(suspicions), rounds=rounds, sweep_id=sweep_id)
            decided[i] = decision.confirmation
            if decision.settled:
                open_ones.remove(i)
    return [decided.get(i) or _unmeasured(s, "not measured again: no time was left") for i, s in enumerate(suspicions)]


def _not_kept(suspicion: Suspicion) -> Confirmation:
    engine = suspicion.old_sha256[:16] or "without a hash"
    return _unmeasured(
        suspicion, f"not measured again: the baseline's engine {engine} is not kept here: move the baseline"
    )


def _unmeasured(suspicion: Suspicion, note: str) -> Confirmation:
    return Confirmation(suspicion.cell, suspicion.metric, None, None, None, False, "", note)


def _finding(confirmation: Confirmation) -> Finding | None:
    if confirmation.confirmed:
        return Finding(Kind.REGRESSION, confirmation.note, confirmation.cell, confirmation.metric)
    could_tell = 0.5**confirmation.pairs <= DOUBT
    if confirmation.is_refuted or (could_tell and confirmation.p_value is not None and confirmation.p_value > DOUBT):
        return None  # nothing speaks for it; how much would have been seen is in its interval
    return Finding(Kind.INCONCLUSIVE, confirmation.note, confirmation.cell, confirmation.metric)


def _is_acknowledged(finding: Finding, acknowledgements: Iterable[Acknowledgement], at: str) -> bool:
    if finding.kind is not Kind.REGRESSION or finding.cell is None:
        return False
    cell = finding.cell
    return any(known.covers(cell, finding.metric, at) for known in acknowledgements)
