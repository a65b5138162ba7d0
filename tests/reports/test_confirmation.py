from dataclasses import replace

import numpy as np
import pytest

from reports.confirmation import ALARM, Suspicion, decide, paired_ratios
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


def test_a_real_slow_down_is_confirmed(suspicion):
    decision = outcome(suspicion, ratios(1.10))
    assert decision.settled
    assert decision.confirmation.confirmed
    assert decision.confirmation.ci_low < 1.10 < decision.confirmation.ci_high
    assert "Time per token +" in decision.confirmation.note


def test_no_difference_is_refuted(suspicion):
    decision = outcome(suspicion, ratios(1.0, spread=0.02))
    assert decision.settled
    assert decision.confirmation.is_refuted
    assert not decision.confirmation.confirmed


def test_what_is_in_between_waits_for_more_pairs(suspicion):
    decision = outcome(suspicion, ratios(1.04, spread=0.08, pairs=6))
    assert not decision.settled
    assert "undecided" in decision.confirmation.note


def test_a_slow_down_under_its_limit_is_none(suspicion):
    assert not outcome(suspicion, ratios(1.02, spread=0.001)).confirmation.confirmed


def test_a_rate_is_worse_where_it_is_lower(suspicion):
    rate = replace(suspicion, metric="decode_tokens_per_s")
    assert outcome(rate, ratios(0.9)).confirmation.confirmed
    assert outcome(rate, ratios(1.1)).confirmation.is_refuted


def test_memory_without_any_noise(suspicion):
    memory = replace(suspicion, metric="peak_resident_bytes")
    assert outcome(memory, [1.05] * 6).confirmation.confirmed
    assert outcome(memory, [1.0] * 6).confirmation.is_refuted


def test_too_few_pairs_decide_nothing(suspicion):
    decision = outcome(suspicion, [1.5, 1.5, 1.5])
    assert not decision.settled
    assert decision.confirmation.ratio is None
    assert "only 3 valid pairs" in decision.confirmation.note


def test_false_alarms_are_as_rare_as_promised_whatever_the_number_of_suspicions(suspicion):
    nights, suspicions, alarms = 400, 5, 0
    rng = np.random.Generator(np.random.PCG64(1))
    for _ in range(nights):
        noise = np.exp(rng.normal(0, 0.08, (suspicions, 18)))
        decided = [outcome(suspicion, row[:n].tolist(), suspicions) for row in noise for n in (6, 12, 18)]
        alarms += any(d.confirmation.confirmed for d in decided)
    assert alarms <= 5  # of an expected 2 at most: beyond it is one chance in seventy
    assert nights * ALARM == 2


def test_pairs_are_of_one_pair_of_blocks_and_both_valid(make, suspicion):
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
