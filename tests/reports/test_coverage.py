"""Whether intervals cover the truth as often as they say, in simulation: the reason for the method that is used.

Runs differ from one another, samples of one run among themselves, and blocks drift; all of it lognormal, in shares
chosen from a quiet device's to a noisy one's. Two bootstraps stand beside the method: of three blocks a percentile
interval covers four times in five, and of ten it may cover always, since the samples within a run are resampled as if
they were further runs.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import stats

from reports.judging.statistics import paired_ratio, ratio, unpaired_ratio
from reports.metrics import METRICS

NOISES = [(0.01, 0.01), (0.005, 0.03), (0.03, 0.01), (0.05, 0.1)]  # standard deviations of runs, and of their samples
TRUTH = math.log(1.1)


@dataclass(frozen=True)
class Design:
    blocks: int
    samples: int
    noise: tuple[float, float]


def experiment(rng, design, effect, drift):
    """Logarithms, (blocks, samples)."""
    of_runs = rng.normal(effect, design.noise[0], (design.blocks, 1))
    return drift + of_runs + rng.normal(0, design.noise[1], (design.blocks, design.samples))


def coverage(design, method, *, paired, experiments, seed=1):
    rng, covered = np.random.default_rng(seed), 0
    for _ in range(experiments):
        drift = rng.normal(0, 0.05, (design.blocks, 1)) if paired else 0.0
        low, high = method(rng, experiment(rng, design, 0.0, drift), experiment(rng, design, TRUTH, drift))
        covered += low <= TRUTH <= high
    return covered / experiments


def pairs(_, before, after):
    found = paired_ratio(list(np.median(after, 1) - np.median(before, 1)))
    return math.log(found.low), math.log(found.high)


def sweeps(_, before, after):
    found = unpaired_ratio(list(np.median(before, 1)), list(np.median(after, 1)))
    return math.log(found.low), math.log(found.high)


def hierarchical_percentiles(rng, before, after):
    """Blocks resampled, then the samples within; the ratio of all medians."""
    blocks, samples = before.shape
    block = rng.integers(blocks, size=(400, blocks))[..., None]
    sample = rng.integers(samples, size=(400, blocks, samples))
    medians = [np.median(side[block, sample].reshape(400, -1), axis=1) for side in (before, after)]
    return np.quantile(medians[1] - medians[0], (0.025, 0.975))


def bca(rng, before, after):
    differences = np.median(after, 1) - np.median(before, 1)
    found = stats.bootstrap((differences,), np.mean, n_resamples=500, method="BCa", rng=rng).confidence_interval
    return found.low, found.high


@pytest.mark.parametrize("noise", NOISES[:2])
def test_three_blocks_are_enough_for_the_interval_to_cover_what_it_says(noise) -> None:
    design = Design(3, 4, noise)
    assert 0.93 <= coverage(design, pairs, paired=True, experiments=1500) <= 0.97
    assert 0.93 <= coverage(design, sweeps, paired=False, experiments=1500) <= 0.97


@pytest.mark.heavy
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("samples", [4, 16])
@pytest.mark.parametrize("blocks", [3, 5, 10])
def test_the_interval_covers_what_it_says(blocks, samples, noise) -> None:
    design = Design(blocks, samples, noise)
    assert 0.93 <= coverage(design, pairs, paired=True, experiments=10_000) <= 0.97
    assert 0.93 <= coverage(design, sweeps, paired=False, experiments=10_000) <= 0.97


@pytest.mark.heavy
def test_bootstraps_of_few_blocks_do_not() -> None:
    few = Design(3, 4, (0.03, 0.01))
    assert coverage(few, hierarchical_percentiles, paired=True, experiments=1000) < 0.90
    assert coverage(few, bca, paired=True, experiments=300) < 0.85
    assert coverage(Design(10, 4, (0.005, 0.03)), hierarchical_percentiles, paired=True, experiments=1000) > 0.975


@pytest.mark.heavy
def test_it_covers_from_records_to_ratio_too(make) -> None:
    """Through runs and their samples, of four prompts that differ tenfold."""
    rng, template, covered, experiments = np.random.default_rng(5), make.run(tokens=2, prompts=4), 0, 400
    for _ in range(experiments):
        sides = []
        for sweep, effect in (("a", 0.0), ("b", TRUTH)):
            runs = []
            for block in range(4):
                level = rng.normal(effect, 0.02)
                samples = tuple(
                    replace(
                        s, steps=replace(s.steps, time_s=(1.0, math.exp(level + rng.normal(s.prompt, 0.03))))
                    )
                    for s in template.samples
                )  # fmt: skip
                runs.append(replace(template, sweep_id=sweep, block=block, samples=samples))
            sides.append(runs)
        found = ratio(METRICS["tpot_s"], *sides)
        covered += found.low <= math.exp(TRUTH) <= found.high
    assert 0.92 <= covered / experiments <= 0.98
