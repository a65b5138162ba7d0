"""Suspicions, confirmed by pairs: old and new engine in turns on the same device, so that drift favours neither.

Were both engines alike, each pair would be as likely to fall this way as that, whatever the noise. So the logarithms of
the pairs' ratios are held against 0 by a signed-rank test, exact and one-sided, whose ranks are capped at a quarter of
the pairs: near 0 a pair counts by its size, beyond it by its sign, and a run that something else disturbed does not
outweigh those that nothing did. The estimate is that of Hodges and Lehmann (1963), the median of the means of all two
pairs, with its exact interval.

ALARM is the chance of a false alarm in a whole night: it is shared out among the suspicions and the rounds in which
more is measured of what is undecided.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from reports.judging.statistics import run_value
from reports.metrics import METRICS
from reports.nights.gate import describe, worse_share
from reports.nights.night import Confirmation
from reports.records import Cell, Run, RunStatus, Verdict

ALARM = 0.01
CONFIDENCE = 0.95  # of the interval that is shown, and by which a suspicion is dropped
LEAST_PAIRS = 4


@dataclass(frozen=True)
class Suspicion:
    """A regression to be confirmed, and by how much it must be worse to matter."""

    cell: Cell
    metric: str
    limit: float  # share
    old_sha256: str  # engines
    new_sha256: str


@dataclass(frozen=True)
class Decision:
    """The confirmation as it stands; unless it is settled, more pairs may decide."""

    confirmation: Confirmation
    settled: bool


def paired_ratios(suspicion: Suspicion, runs: Iterable[Run]) -> list[float]:
    """Returns new over old for each pair of blocks 2 i and 2 i + 1 in which both runs are valid."""
    pairs: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for run in runs:
        value = run_value(METRICS[suspicion.metric], run)
        if run.cell.key != suspicion.cell.key or run.status is not RunStatus.OK or run.verdict is not Verdict.VALID:
            continue
        if value is not None and value > 0:
            side = "old" if run.engine_sha256 == suspicion.old_sha256 else "new"
            pairs[run.sweep_id, run.block // 2][side] = value
    return [pair["new"] / pair["old"] for _, pair in sorted(pairs.items()) if len(pair) == 2]


def decide(suspicion: Suspicion, ratios: Sequence[float], *, suspicions: int, rounds: int, sweep_id: str) -> Decision:
    """Decides from all pairs so far; the night's `suspicions` and `rounds` share the chance of a false alarm."""
    cell, metric = suspicion.cell, suspicion.metric
    if len(ratios) < LEAST_PAIRS:
        note = f"only {len(ratios)} valid pairs: see why the runs of sweep {sweep_id} are not valid"
        return Decision(Confirmation(cell, metric, None, None, None, False, sweep_id, note, pairs=len(ratios)), False)
    logs = np.log(ratios)
    ratio, low, high = (math.exp(x) for x in _estimate(logs))
    is_lower_better = METRICS[metric].better == "lower"
    p_value = signed_rank_p_value(logs if is_lower_better else -logs)
    confirmed = p_value <= ALARM / (suspicions * rounds) and worse_share(metric, ratio) >= suspicion.limit
    refuted = not confirmed and worse_share(metric, high if is_lower_better else low) < suspicion.limit
    state = "confirmed" if confirmed else "not confirmed" if refuted else "undecided"
    what = describe(metric, ratio, low, high)
    note = f"{state}: {what}, {len(ratios)} pairs of old and new engine in turns"
    confirmation = Confirmation(
        cell, metric, ratio, low, high, confirmed, sweep_id, note, p_value, len(ratios), refuted
    )
    return Decision(confirmation, confirmed or refuted)


def signed_rank_p_value(values: np.ndarray, cap: int | None = None) -> float:
    """Returns the one-sided p-value that values lie above 0; ranks are capped at `cap`, by default a quarter."""
    n = len(values)
    cap = cap or max(1, n // 4)
    ranks = np.empty(n, dtype=int)
    ranks[np.argsort(np.abs(values), kind="stable")] = np.minimum(np.arange(1, n + 1), cap)
    return float(_null(n, cap)[int(ranks[values > 0].sum()) :].sum())


def _estimate(values: np.ndarray) -> tuple[float, float, float]:
    """Returns the median of all means of two values, and its interval at CONFIDENCE."""
    means = np.sort(_walsh(values))
    below = np.cumsum(_null(len(values), len(values)))
    cut = int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right"))  # so many on each side lie outside
    return float(np.median(means)), float(means[max(cut - 1, 0)]), float(means[min(len(means) - cut, len(means) - 1)])


def _walsh(values: np.ndarray) -> np.ndarray:
    """Returns the means of all pairs of values, each with itself too: (n (n + 1) / 2)."""
    i, j = np.triu_indices(len(values))
    means: np.ndarray = (values[i] + values[j]) / 2
    return means


@functools.cache
def _null(n: int, cap: int) -> np.ndarray:
    """Returns the distribution, from 0 on, of a sum of n ranks, none over `cap`, each counted or not."""
    chances = np.ones(1)
    for rank in np.minimum(np.arange(1, n + 1), cap):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return chances
