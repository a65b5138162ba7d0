"""Change points of a series: E-divisive (Matteson and James, 2014), hierarchical bisection with the energy statistic.

A split of a segment into X of n and Y of m points has the statistic

    n m / (n + m) (2 E|X - Y| - E|X - X'| - E|Y - Y'|)

with the means of pairs within a side over n (n - 1) / 2. The best split of all segments is a change point where few
random orders of that segment, of REORDERINGS, have one as good. No distribution is assumed. Deterministic: seeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from reports.nights.night import ChangePoint

SIGNIFICANCE = 0.01
REORDERINGS = 199
LEAST_POINTS = 3  # of a side: fewer are no level
SEED = 20230828


def change_points(
    values: Sequence[float], *, significance: float = SIGNIFICANCE, seed: int = SEED
) -> list[ChangePoint]:
    """Returns the changes in the order of the series, with the medians of the neighbouring segments."""
    series = np.asarray(values, dtype=np.float64)
    rng = np.random.Generator(np.random.PCG64(seed))
    found: dict[int, float] = {}  # index -> p value
    open_segments = [(0, len(series))]
    while open_segments:
        start, end = open_segments.pop()
        split, statistic = best_split(series[start:end])
        if statistic <= 0:
            continue
        p_value = _p_value(series[start:end], statistic, rng)
        if p_value <= significance:
            found[start + split] = p_value
            open_segments += [(start, start + split), (start + split, end)]
    edges = [0, *sorted(found), len(series)]
    levels = [float(median(series[a:b].tolist())) for a, b in pairwise(edges) if b > a]
    return [ChangePoint(at, levels[i], levels[i + 1], found[at]) for i, at in enumerate(sorted(found))]


def best_split(segment: np.ndarray) -> tuple[int, float]:
    """Returns where the second side begins, and the statistic there; (0, 0) for a segment too short for two."""
    if len(segment) < 2 * LEAST_POINTS:
        return 0, 0.0
    statistics = _statistics(_distances(segment)[None])[0]
    at = int(np.argmax(statistics))
    return at + LEAST_POINTS, float(statistics[at])


def _distances(segment: np.ndarray) -> np.ndarray:
    distances: np.ndarray = np.abs(segment[:, None] - segment[None, :])  # (n, n)
    return distances


def _statistics(distances: np.ndarray) -> np.ndarray:
    """Returns (orders, splits) from distances (orders, n, n): splits that leave LEAST_POINTS on both sides."""
    n = distances.shape[-1]
    sums = distances.cumsum(axis=-1).cumsum(axis=-2)  # of the leading squares
    left = np.arange(LEAST_POINTS, n - LEAST_POINTS + 1)
    right = n - left
    within_left = sums[:, left - 1, left - 1]  # each pair twice
    across = sums[:, left - 1, n - 1] - within_left
    within_right = sums[:, -1:, -1] - within_left - 2 * across
    energy = 2 * across / (left * right) - within_left / (left * (left - 1)) - within_right / (right * (right - 1))
    return np.asarray(left * right / n * energy)


def _p_value(segment: np.ndarray, statistic: float, rng: np.random.Generator) -> float:
    distances = _distances(segment)
    orders = [rng.permutation(len(segment)) for _ in range(REORDERINGS)]
    reordered = np.stack([distances[order][:, order] for order in orders])
    as_good = int((_statistics(reordered).max(axis=1) >= statistic - 1e-12).sum())
    return (1 + as_good) / (1 + REORDERINGS)
