import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from reports.judging.statistics import (
    POWER,
    Ratio,
    paired_ratio,
    ratio,
    run_value,
    speed_up,
    summarize,
    summarize_runs,
    unpaired_ratio,
)
from reports.metrics import METRICS

TPOT = METRICS["tpot_s"]


def slowed(run, factor):
    """The same run with every step `factor` times as long."""
    samples = tuple(
        replace(s, steps=replace(s.steps, time_s=tuple(t * factor for t in s.steps.time_s))) for s in run.samples
    )
    return replace(run, samples=samples)


def test_a_summary_has_median_quartiles_and_counts(make) -> None:
    runs = [make.run(block=b) for b in range(3)]
    values = sorted(v for run in runs for v in TPOT.values(run))
    summary = summarize(TPOT, [*runs, make.failed(block=3)])
    assert (summary.values, summary.runs) == (12, 3)
    assert summary.median == pytest.approx((values[5] + values[6]) / 2)
    assert values[2] <= summary.low_quartile <= summary.median <= summary.high_quartile <= values[9]
    assert summarize(TPOT, [make.failed()]) is None


def test_a_run_has_one_value_in_which_every_prompt_counts_alike(make) -> None:
    run = make.run(prompts=2, repetitions=3)
    by_prompt = [
        sorted(TPOT.per_sample(run, s) for s in run.timed_samples if s.prompt == prompt)[1] for prompt in (0, 1)
    ]
    assert run_value(TPOT, run) == pytest.approx(math.sqrt(by_prompt[0] * by_prompt[1]))
    values = sorted(run_value(TPOT, make.run(block=b)) for b in range(3))
    summary = summarize_runs(TPOT, [make.run(block=b) for b in range(3)])
    assert (summary.median, summary.values, summary.runs) == (values[1], 3, 3)
    assert summarize_runs(TPOT, []) is None


def test_a_share_of_nothing_is_a_value(make) -> None:
    assert run_value(METRICS["expert_hit_rate"], make.run(strategy="naive-swap")) == 0.0


def test_the_interval_of_pairs_is_that_of_scipy() -> None:
    differences = np.random.default_rng(3).normal(0.1, 0.02, 7)
    found = paired_ratio(list(differences))
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((expected.low, expected.high))
    assert found.ratio == pytest.approx(math.exp(np.median(differences)))
    assert found.blocks == 7


@pytest.mark.parametrize("sizes", [(3, 3), (4, 9), (10, 2)])
def test_the_interval_of_two_sweeps_is_that_of_scipy(sizes) -> None:
    rng = np.random.default_rng(4)
    before, after = rng.normal(0.0, 0.01, sizes[0]), rng.normal(0.1, 0.03, sizes[1])
    found = unpaired_ratio(list(before), list(after))
    expected = stats.ttest_ind(after, before, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((interval.low, interval.high))
    assert found.freedom == pytest.approx(expected.df)
    assert found.blocks is None


def test_an_exact_ratio_has_no_spread(make) -> None:
    fast = [make.run(block=b) for b in range(3)]
    found = speed_up([slowed(run, 2.0) for run in fast], fast)
    assert (found.ratio, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (found.blocks, found.conclusive) == (3, True)


def test_blocks_are_paired_so_that_drift_cancels(make) -> None:
    """The device is 10 times slower in the last block; the ratio within each block is 1.5 all the same."""
    drift = (1.0, 1.0, 10.0)
    fast = [slowed(make.run(block=b), drift[b]) for b in range(3)]
    slow = [slowed(run, 1.5) for run in fast]
    paired = speed_up(slow, fast)
    assert paired.low == pytest.approx(1.5) and paired.high == pytest.approx(1.5)
    assert speed_up(slow[:2], fast).blocks == 2
    elsewhere = [replace(run, sweep_id="another") for run in fast]
    unpaired = ratio(TPOT, slow, elsewhere)
    assert unpaired.blocks is None
    assert unpaired.low < 1 / 1.5 < unpaired.high
    assert not unpaired.conclusive


def test_a_run_that_something_else_disturbed_widens_the_interval_and_leaves_the_estimate(make) -> None:
    fast = [make.run(block=b) for b in range(5)]
    disturbed = [slowed(run, 3.0 if run.block == 2 else 1.0) for run in fast]
    found = ratio(TPOT, fast, disturbed)
    assert found.ratio == pytest.approx(1.0)
    assert found.low < 1 < 1.5 < found.high


def test_no_difference_is_not_conclusive(make) -> None:
    found = speed_up([make.run(block=b, seed=1) for b in range(4)], [make.run(block=b, seed=2) for b in range(4)])
    assert found.low < 1 < found.high
    assert not found.conclusive


def test_one_block_has_no_interval_and_none_has_no_ratio(make) -> None:
    one = make.run()
    single = speed_up([slowed(one, 2.0)], [one])
    assert (single.ratio, single.low, single.high) == (pytest.approx(2.0), None, None)
    assert not single.conclusive
    assert single.minimum_detectable() is None
    assert speed_up([make.run(block=0)], [make.run(block=1)]) is None
    alone = ratio(TPOT, [one], [replace(slowed(one, 2.0), sweep_id="another")])
    assert (alone.ratio, alone.low) == (pytest.approx(2.0), None)


def test_what_is_zero_has_no_ratio(make) -> None:
    swap = [make.run(strategy="naive-swap", block=b) for b in range(3)]
    assert ratio(METRICS["expert_hit_rate"], swap, swap) is None


def test_the_inverse_of_a_ratio_is_the_other_sides(make) -> None:
    found = Ratio(2.0, 1.6, 2.5, 0.1, 4.0, 5)
    assert found.inverse == Ratio(0.5, 0.4, 1 / 1.6, 0.1, 4.0, 5)
    assert Ratio(2.0).inverse == Ratio(0.5)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_minimum_detectable_change_is_found_as_often_as_it_says(n) -> None:
    """With the true error known: of 2000 experiments with that change, a share of POWER is conclusive."""
    rng = np.random.default_rng(n)
    deviation = 0.02
    error = deviation / math.sqrt(n)
    change = math.log1p(Ratio(1.0, 1.0, 1.0, error, n - 1).minimum_detectable())
    found = [paired_ratio(list(rng.normal(change, deviation, n))) for _ in range(2000)]
    power = sum(r.conclusive and r.ratio > 1 for r in found) / len(found)
    assert POWER - 0.05 < power < POWER + 0.12
    assert Ratio(1.0, 1.0, 1.0, error, n - 1).minimum_detectable(0.5) > 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_that_misses_the_estimate_is_widened_to_it(sign: int) -> None:
    """The median is 0, and the interval about the mean of 0.45 begins above it."""
    found = paired_ratio([0.0] * 11 + [sign * 1.0] * 9)
    assert found.ratio == 1.0
    assert (found.low if sign > 0 else found.high) == 1.0
    assert not found.conclusive
    other = found.high if sign > 0 else found.low
    half = stats.t.ppf(0.975, 19) * np.std([0.0] * 11 + [1.0] * 9, ddof=1) / math.sqrt(20)
    assert math.log(other) == pytest.approx(sign * (0.45 + half))
