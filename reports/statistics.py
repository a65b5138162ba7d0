"""Statistics of raw samples: medians with their spread, and speed-ups with an interval. Deterministic: seeded.

Samples of one run share its process and its moment, and are no independent witnesses of one another. What is
resampled is therefore first the interleaved block, then the samples within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.protocol import Sample
from reports.metrics import Metric
from reports.records import Run

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 20230828


@dataclass(frozen=True)
class Summary:
    """Of one metric over the values of several runs, in the metric's unit."""

    median: float
    low_quartile: float
    high_quartile: float
    values: int
    runs: int


@dataclass(frozen=True)
class SpeedUp:
    """Baseline over candidate: above 1 the candidate is faster. The interval is None where one pair is all there is."""

    ratio: float
    low: float | None
    high: float | None
    blocks: int
    pairs: int

    @property
    def conclusive(self) -> bool:
        """Whether the interval leaves out 1, which is no difference."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def summarize(metric: Metric, runs: Iterable[Run]) -> Summary | None:
    """None where no run can tell."""
    by_run = [values for run in runs if (values := metric.values(run))]
    if not by_run:
        return None
    values = [value for values in by_run for value in values]
    low, middle, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Summary(middle, low, high, values=len(values), runs=len(by_run))


def speed_up(
    value: Callable[[Run, Sample], float | None],
    baseline: Sequence[Run],
    candidate: Sequence[Run],
    *,
    seed: int = SEED,
) -> SpeedUp | None:
    """The ratio of the medians over pairs of samples: same block, same prompt, same repetition.

    The interval is the percentile interval of a bootstrap over blocks, then over the pairs in each. With one block it
    tells the variation within that block and nothing of the drift between blocks. None without a pair.
    """
    blocks = _pairs_by_block(value, baseline, candidate)
    if not blocks:
        return None
    every = np.concatenate(blocks)  # (pairs, 2)
    ratio = float(_ratio_of_medians(every))
    if len(every) == 1:
        return SpeedUp(ratio, None, None, blocks=1, pairs=1)
    ratios = _ratio_of_medians(_resampled(blocks, np.random.Generator(np.random.PCG64(seed))))
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(q) for q in np.quantile(ratios, (tail, 1 - tail)))
    return SpeedUp(ratio, low, high, blocks=len(blocks), pairs=len(every))


def _pairs_by_block(
    value: Callable[[Run, Sample], float | None], baseline: Sequence[Run], candidate: Sequence[Run]
) -> list[np.ndarray]:
    """One array (pairs, 2) for each block that has both: column 0 the baseline, column 1 the candidate."""

    def by_key(runs: Sequence[Run]) -> dict[tuple[int, int, int], float]:
        found = {(run.block, s.prompt, s.repetition): value(run, s) for run in runs for s in run.timed_samples}
        return {key: v for key, v in found.items() if v}

    ours, theirs = by_key(baseline), by_key(candidate)
    shared = sorted(ours.keys() & theirs.keys())
    return [
        np.array([(ours[key], theirs[key]) for key in shared if key[0] == block])
        for block in sorted({key[0] for key in shared})
    ]


def _resampled(blocks: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, blocks * pairs in the largest, 2): blocks drawn with replacement, then pairs within each.

    Where blocks differ in size, NaN fills the smaller ones up.
    """
    sizes = np.array([len(pairs) for pairs in blocks])
    table = np.full((len(blocks), sizes.max(), 2), np.nan)
    for row, pairs in zip(table, blocks, strict=True):
        row[: len(pairs)] = pairs
    block = rng.integers(len(blocks), size=(RESAMPLES, len(blocks)))
    pair = (rng.random((RESAMPLES, len(blocks), sizes.max())) * sizes[block][..., None]).astype(int)
    drawn = table[block[..., None], pair]  # (RESAMPLES, blocks, largest, 2)
    drawn[np.arange(sizes.max()) >= sizes[block][..., None]] = np.nan
    resampled: np.ndarray = drawn.reshape(RESAMPLES, -1, 2)
    return resampled


def _ratio_of_medians(pairs: np.ndarray) -> np.ndarray:
    """(..., pairs, 2) -> (...)."""
    medians = np.nanmedian(pairs, axis=-2)
    return np.asarray(medians[..., 0] / medians[..., 1])
