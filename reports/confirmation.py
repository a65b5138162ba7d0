"""A suspicion is confirmed by pairs: old and new engine in turns on the same device, so that drift favours neither.

The logarithms of the pairs' ratios are compared with 0 by a one-sided t test; with symmetric noise of heavier tails it
errs towards silence. ALARM is the chance of a false alarm in a whole night: it is shared out among the suspicions and
the rounds in which more is measured of what is undecided.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from reports.gate import describe, worse_share
from reports.metrics import METRICS
from reports.night import Confirmation
from reports.records import Cell, Run, RunStatus, Verdict

ALARM = 0.005
CONFIDENCE = 0.95  # of the interval that is shown, and with which a suspicion is dropped
LEAST_PAIRS = 4


@dataclass(frozen=True)
class Suspicion:
    """What is to be confirmed, and by how much it must be worse to matter."""

    cell: Cell
    metric: str
    limit: float  # share
    old_sha256: str  # engines
    new_sha256: str


@dataclass(frozen=True)
class Decision:
    """`confirmation` as it stands; None of `settled`: more pairs may decide."""

    confirmation: Confirmation
    settled: bool


def paired_ratios(suspicion: Suspicion, runs: Iterable[Run]) -> list[float]:
    """New over old, of blocks 2 i and 2 i + 1, where both are valid."""
    pairs: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for run in runs:
        value = METRICS[suspicion.metric].of(run)
        if run.cell.key != suspicion.cell.key or run.status is not RunStatus.OK or run.verdict is not Verdict.VALID:
            continue
        if value is not None and value > 0:
            side = "old" if run.engine_sha256 == suspicion.old_sha256 else "new"
            pairs[run.sweep_id, run.block // 2][side] = value
    return [pair["new"] / pair["old"] for _, pair in sorted(pairs.items()) if len(pair) == 2]


def decide(suspicion: Suspicion, ratios: Sequence[float], *, suspicions: int, rounds: int, sweep_id: str) -> Decision:
    """From all pairs so far. `suspicions` of the night and `rounds` in all share the chance of a false alarm."""
    cell, metric = suspicion.cell, suspicion.metric
    if len(ratios) < LEAST_PAIRS:
        note = f"only {len(ratios)} valid pairs: see why the runs of sweep {sweep_id} are not valid"
        return Decision(Confirmation(cell, metric, None, None, None, False, sweep_id, note, pairs=len(ratios)), False)
    logs = np.log(ratios)
    ratio, low, high = (math.exp(x) for x in _interval(logs))
    worse = logs if METRICS[metric].better == "lower" else -logs
    p_value = _p_value(worse)
    confirmed = p_value <= ALARM / (suspicions * rounds) and worse_share(metric, ratio) >= suspicion.limit
    bound = worse_share(metric, high if METRICS[metric].better == "lower" else low)
    refuted = not confirmed and bound < suspicion.limit
    what = describe(metric, ratio, low, high)
    state = "confirmed" if confirmed else "not confirmed" if refuted else "undecided"
    note = f"{state}: {what}, {len(ratios)} pairs of old and new engine in turns"
    confirmation = Confirmation(
        cell, metric, ratio, low, high, confirmed, sweep_id, note, p_value, len(ratios), refuted
    )
    return Decision(confirmation, confirmed or refuted)


def _interval(logs: np.ndarray) -> tuple[float, float, float]:
    """Mean and the t interval at CONFIDENCE."""
    mean = float(logs.mean())
    spread = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    reach = spread * float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1))
    return mean, mean - reach, mean + reach


def _p_value(worse: np.ndarray) -> float:
    if float(np.ptp(worse)) == 0.0:  # no noise at all, as of a memory that is counted in whole buffers
        return 0.0 if worse[0] > 0 else 1.0
    spread = float(worse.std(ddof=1)) / math.sqrt(len(worse))
    return float(stats.t.sf(float(worse.mean()) / spread, len(worse) - 1))  # as ttest_1samp, without its care for axes
