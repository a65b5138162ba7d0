import random
from dataclasses import replace

import pytest

from reports.metrics import METRICS, tpot_s
from reports.statistics import speed_up, summarize


def slowed(run, factor):
    """The same run with every step `factor` times as long."""
    samples = tuple(
        replace(s, steps=replace(s.steps, time_s=tuple(t * factor for t in s.steps.time_s))) for s in run.samples
    )
    return replace(run, samples=samples)


def test_a_summary_has_median_quartiles_and_counts(make):
    runs = [make.run(block=b) for b in range(3)]
    values = sorted(v for run in runs for v in METRICS["tpot_s"].values(run))
    summary = summarize(METRICS["tpot_s"], [*runs, make.failed(block=3)])
    assert (summary.values, summary.runs) == (12, 3)
    assert summary.median == pytest.approx((values[5] + values[6]) / 2)
    assert values[2] <= summary.low_quartile <= summary.median <= summary.high_quartile <= values[9]
    assert summarize(METRICS["tpot_s"], [make.failed()]) is None


def test_an_exact_ratio_has_no_spread(make):
    fast = [make.run(block=b) for b in range(3)]
    ratio = speed_up(tpot_s, [slowed(run, 2.0) for run in fast], fast)
    assert (ratio.ratio, ratio.blocks, ratio.pairs) == (pytest.approx(2.0), 3, 12)
    assert ratio.conclusive


def test_blocks_are_paired_so_that_drift_cancels(make):
    """The device is 10 times slower in the last block; the ratio within each block is 1.5 all the same."""
    drift = (1.0, 1.0, 10.0)
    fast = [slowed(make.run(block=b), drift[b]) for b in range(3)]
    paired = speed_up(tpot_s, [slowed(run, 1.5) for run in fast], fast)
    assert paired.low == pytest.approx(1.5) and paired.high == pytest.approx(1.5)
    unpaired = speed_up(tpot_s, [slowed(run, 1.5) for run in fast[:2]], fast)
    assert (unpaired.blocks, unpaired.ratio) == (2, pytest.approx(1.5))


def test_no_difference_is_not_conclusive(make):
    ratio = speed_up(
        tpot_s, [make.run(block=b, seed=1) for b in range(4)], [make.run(block=b, seed=2) for b in range(4)]
    )
    assert ratio.low < 1 < ratio.high
    assert not ratio.conclusive


def test_the_interval_is_the_same_every_time_and_holds_the_estimate(make):
    baseline = [make.run(strategy="naive-swap", block=b) for b in range(3)]
    candidate = [make.run(block=b) for b in range(3)]
    first = speed_up(tpot_s, baseline, candidate)
    assert first == speed_up(tpot_s, baseline, candidate)
    assert first.low < first.ratio < first.high
    assert first != speed_up(tpot_s, baseline, candidate, seed=1)


def test_unequal_blocks_are_resampled_within_their_own_size(make):
    fast = [make.run(block=0, repetitions=1), make.run(block=1, repetitions=3)]
    ratio = speed_up(tpot_s, [slowed(run, 3.0) for run in fast], fast)
    assert (ratio.blocks, ratio.pairs) == (2, 8)
    assert ratio.low == pytest.approx(3.0) and ratio.high == pytest.approx(3.0)


def test_one_pair_has_no_interval_and_none_has_no_ratio(make):
    one = make.run(prompts=1, repetitions=1)
    single = speed_up(tpot_s, [slowed(one, 2.0)], [one])
    assert (single.ratio, single.low, single.high) == (pytest.approx(2.0), None, None)
    assert not single.conclusive
    assert speed_up(tpot_s, [make.run(block=0)], [make.run(block=1)]) is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says(make):
    """150 experiments of five blocks with block effects that both share: the true ratio is 2."""
    rng, template, covered = random.Random(5), make.run(tokens=2, prompts=4, repetitions=1), 0
    for _ in range(150):
        baseline, candidate = [], []
        for block in range(5):
            drift = rng.lognormvariate(0, 0.05)
            for runs, factor in ((baseline, 2.0), (candidate, 1.0)):
                samples = tuple(
                    replace(s, steps=replace(s.steps, time_s=(1.0, factor * drift * rng.lognormvariate(0, 0.05))))
                    for s in template.samples
                )
                runs.append(replace(template, block=block, samples=samples))
        ratio = speed_up(tpot_s, baseline, candidate)
        covered += ratio.low <= 2.0 <= ratio.high
    assert 0.85 <= covered / 150 <= 1.0
