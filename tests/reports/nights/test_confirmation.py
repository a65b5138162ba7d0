from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, wilcoxon

from reports.nights.confirmation import ALARM, Suspicion, decide, paired_ratios, signed_rank_p_value
from reports.records import Verdict

OLD, NEW = "0" * 64, "1" * 64


@pytest.fixture
def suspicion(make):
    return Suspicion(make.cell(), "tpot_s", 0.03, OLD, NEW)


def ratios(effect, spread=0.03, pairs=12, seed=0):
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.exp(rng.normal(np.log(effect), spread, pairs)).tolist()


def outcome(suspicion, values, suspicions=1, rounds=3):
    return decide(suspicion, values, suspicions=suspicions, rounds=rounds, sweep_id="s")


def slowed(run, factor):
    samples = tuple(
        replace(s, steps=replace(s.steps, time_s=tuple(factor * t for t in s.steps.time_s))) for s in run.samples
    )
    return replace(run, samples=samples)


def test_a_real_slow_down_is_confirmed(suspicion) -> None:
    decision = outcome(suspicion, ratios(1.10))
    assert decision.settled
    assert decision.confirmation.confirmed
    assert decision.confirmation.ci_low < 1.10 < decision.confirmation.ci_high
    assert "Time per token +" in decision.confirmation.note


def test_no_difference_is_refuted(suspicion) -> None:
    decision = outcome(suspicion, ratios(1.0, spread=0.02))
    assert decision.settled
    assert decision.confirmation.is_refuted
    assert not decision.confirmation.confirmed


def test_what_is_in_between_waits_for_more_pairs(suspicion) -> None:
    decision = outcome(suspicion, ratios(1.04, spread=0.08, pairs=6))
    assert not decision.settled
    assert "undecided" in decision.confirmation.note


def test_a_slow_down_under_its_limit_is_none(suspicion) -> None:
    assert not outcome(suspicion, ratios(1.02, spread=0.001)).confirmation.confirmed


def test_a_rate_is_worse_where_it_is_lower(suspicion) -> None:
    rate = replace(suspicion, metric="decode_tokens_per_s")
    assert outcome(rate, ratios(0.9)).confirmation.confirmed
    assert outcome(rate, ratios(1.1)).confirmation.is_refuted


def test_its_ends_are_the_tests_of_scipy() -> None:
    for seed in range(10):
        values = np.random.Generator(np.random.PCG64(seed)).normal(0.3, 1, 5 + seed)
        expected = wilcoxon(values, alternative="greater", method="exact").pvalue
        assert signed_rank_p_value(values, cap=len(values)) == pytest.approx(expected)
        above = int((values > 0).sum())
        sign_test = binomtest(above, len(values), alternative="greater").pvalue
        assert signed_rank_p_value(values, cap=1) == pytest.approx(sign_test)


def test_the_interval_covers_the_truth_as_often_as_it_says(suspicion) -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    covered = 0
    for _ in range(1000):
        found = outcome(suspicion, np.exp(0.05 + 0.03 * rng.standard_t(3, 12)).tolist()).confirmation
        covered += found.ci_low <= np.exp(0.05) <= found.ci_high
    assert 0.93 <= covered / 1000 <= 0.97


def test_one_disturbed_run_hides_nothing(suspicion) -> None:
    values = ratios(1.10, spread=0.01, pairs=18)
    values[4] = 0.5
    decision = outcome(suspicion, values)
    assert decision.confirmation.confirmed
    assert decision.confirmation.ratio == pytest.approx(1.10, abs=0.01)


def test_memory_without_any_noise(suspicion) -> None:
    memory = replace(suspicion, metric="peak_resident_bytes")
    assert outcome(memory, [1.05] * 12).confirmation.confirmed
    assert outcome(memory, [1.0] * 6).confirmation.is_refuted


def test_too_few_pairs_decide_nothing(suspicion) -> None:
    decision = outcome(suspicion, [1.5, 1.5, 1.5])
    assert not decision.settled
    assert decision.confirmation.ratio is None
    assert "only 3 valid pairs" in decision.confirmation.note


def test_false_alarms_are_as_rare_as_promised_whatever_the_number_of_suspicions(suspicion) -> None:
    nights, suspicions, alarms = 400, 5, 0
    rng = np.random.Generator(np.random.PCG64(1))
    for _ in range(nights):
        noise = np.exp(rng.normal(0, 0.08, (suspicions, 18)))
        decided = [outcome(suspicion, row[:n].tolist(), suspicions) for row in noise for n in (6, 12, 18)]
        alarms += any(d.confirmation.confirmed for d in decided)
    assert alarms <= 9  # of an expected 4 at most: beyond it is one chance in a hundred
    assert nights * ALARM == 4


def test_pairs_are_of_one_pair_of_blocks_and_both_valid(make, suspicion) -> None:
    runs = []
    for pair in range(4):
        old = make.run(block=2 * pair, engine_sha256=OLD)
        new = slowed(make.run(block=2 * pair, engine_sha256=NEW), 1.1)
        runs += [replace(old, id=f"o{pair}"), replace(new, id=f"n{pair}", block=2 * pair + 1)]
    assert paired_ratios(suspicion, runs) == pytest.approx([1.1] * 4)
    runs[0] = replace(runs[0], verdict=Verdict.SUSPECT, reasons=("throttled",))
    assert len(paired_ratios(suspicion, runs)) == 3
    assert paired_ratios(suspicion, runs[:3]) == []
    other = replace(suspicion, cell=make.cell(strategy="full-load"))
    assert paired_ratios(other, runs) == []
