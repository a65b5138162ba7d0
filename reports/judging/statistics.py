"""Statistics of raw samples: medians with their spread, and ratios of two sides with an interval.

Samples of one run share its process and its moment, and are no independent witnesses of one another. So a run has one
value, and what varies is the runs: in pairs where both sides ran in the same interleaved blocks, as what drifts is then
in both, else each side by itself. Ratios are of logarithms: twice as fast is as far from equal as half as fast.

The interval is Student's, of the blocks' ratios (Welch's, of the runs, where there are no pairs). It covers what it
says from three runs on; bootstraps of so few do not (tests/reports/test_coverage.py simulates both).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

import numpy as np

from reports.metrics import METRICS, Metric
from reports.records import Run

CONFIDENCE = 0.95
POWER = 0.80  # with which a change of the minimum detectable size is found


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of one metric over several runs, in the metric's unit."""

    median: float
    low_quartile: float
    high_quartile: float
    values: int
    runs: int


@dataclass(frozen=True)
class Ratio:
    """One side over the other. Without an interval where there is but one block, or one run on a side."""

    ratio: float
    low: float | None = None
    high: float | None = None
    error: float | None = None  # standard error of the ratio's logarithm
    freedom: float = 0.0  # degrees of freedom of that error
    blocks: int | None = None  # pairs; None: not paired

    @property
    def conclusive(self) -> bool:
        """Returns whether the interval excludes 1, which is no difference."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def inverse(self) -> Ratio:
        low, high = (None if bound is None else 1 / bound for bound in (self.high, self.low))
        return Ratio(1 / self.ratio, low, high, self.error, self.freedom, self.blocks)

    def minimum_detectable(self, margin: float = 0.0) -> float | None:
        """Returns the change, as a share, that is found with POWER: conclusive, and larger than `margin`."""
        if self.error is None:
            return None
        power = student(POWER, self.freedom) * self.error
        certain = student((1 + CONFIDENCE) / 2, self.freedom) * self.error
        return math.expm1(max(certain, math.log1p(margin)) + power)


def summarize(metric: Metric, runs: Iterable[Run]) -> Summary | None:
    """Returns the summary of all samples, None where no run has a value."""
    by_run = [values for run in runs if (values := metric.values(run))]
    return _summary([value for values in by_run for value in values], len(by_run)) if by_run else None


def summarize_runs(metric: Metric, runs: Iterable[Run]) -> Summary | None:
    """Returns the summary of the runs' values, of which ratios are made."""
    values = [value for run in runs if (value := run_value(metric, run)) is not None]
    return _summary(values, len(values)) if values else None


def run_value(metric: Metric, run: Run) -> float | None:
    """Returns the geometric mean of the prompts' medians over repetitions: prompts may differ tenfold."""
    if metric.per_sample is None:
        return metric.of(run)
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for sample in run.timed_samples:
        value = metric.per_sample(run, sample)
        if value is not None:
            by_prompt[sample.prompt].append(value)
    medians = [median(values) for values in by_prompt.values()]
    if not medians:
        return None
    return geometric_mean(medians) if min(medians) > 0 else sum(medians) / len(medians)


def ratio(metric: Metric, baseline: Sequence[Run], candidate: Sequence[Run]) -> Ratio | None:
    """Returns candidate over baseline, from the blocks in which both ran, or from all runs if those are less than two.

    None where a side has no value, or one that has no logarithm.
    """
    before, after = _logarithms(metric, baseline), _logarithms(metric, candidate)
    shared = sorted(before.keys() & after.keys())
    if len(shared) > 1 or (shared and len(before) == len(after) == 1):
        return paired_ratio([after[block] - before[block] for block in shared])
    return unpaired_ratio(list(before.values()), list(after.values())) if before and after else None


def speed_up(baseline: Sequence[Run], candidate: Sequence[Run]) -> Ratio | None:
    """Returns baseline over candidate of the time per token, from the blocks in which both ran: above 1 is faster."""
    tpot = METRICS["tpot_s"]
    before, after = _logarithms(tpot, baseline), _logarithms(tpot, candidate)
    shared = sorted(before.keys() & after.keys())
    return paired_ratio([before[block] - after[block] for block in shared]) if shared else None


def paired_ratio(differences: Sequence[float]) -> Ratio:
    """Returns the median of ratios, from their logarithms by block, with the interval of scipy.stats.ttest_1samp."""
    n, typical = len(differences), median(differences)
    if n < 2:
        return Ratio(math.exp(typical), blocks=n)
    values = np.array(differences)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    return _with_interval(typical, float(values.mean()), error, n - 1, n)


def unpaired_ratio(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """Returns the ratio of medians, from the logarithms of the runs' values, with the interval of Welch's test."""
    typical = median(after) - median(before)
    if min(len(before), len(after)) < 2:
        return Ratio(math.exp(typical))
    shares = [float(np.var(values, ddof=1)) / len(values) for values in (before, after)]
    error = math.sqrt(sum(shares))
    parts = [share**2 / (len(values) - 1) for share, values in zip(shares, (before, after), strict=True)]
    freedom = sum(shares) ** 2 / sum(parts) if sum(parts) > 0 else len(before) + len(after) - 2
    return _with_interval(typical, float(np.mean(after) - np.mean(before)), error, freedom, None)


def student(share: float, freedom: float) -> float:
    """Returns a quantile of Student's distribution."""
    from scipy.special import stdtrit  # takes longer to import than most commands take

    return float(stdtrit(freedom, share))


def _with_interval(typical: float, middle: float, error: float, freedom: float, blocks: int | None) -> Ratio:
    """Returns the median with the interval about the mean: a disturbed run moves the median less.

    In rare, lopsided cases the median lies outside the interval, which is then widened to it.
    """
    half = student((1 + CONFIDENCE) / 2, freedom) * error
    low, high = min(middle - half, typical), max(middle + half, typical)
    return Ratio(math.exp(typical), math.exp(low), math.exp(high), error, freedom, blocks)


def _logarithms(metric: Metric, runs: Iterable[Run]) -> dict[tuple[str, int], float]:
    """Returns logarithms by sweep and block, without values that have none."""
    values = {(run.sweep_id, run.block): run_value(metric, run) for run in runs}
    return {block: math.log(value) for block, value in values.items() if value is not None and value > 0}


def _summary(values: Sequence[float], runs: int) -> Summary:
    low, middle, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Summary(middle, low, high, values=len(values), runs=runs)
