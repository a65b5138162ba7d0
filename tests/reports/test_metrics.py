from dataclasses import replace
from math import log

import pytest

from engine.protocol import Passage, Recall, Sample, Steps
from reports.metrics import METRICS
from reports.records import Conditions, RunEstimate


@pytest.fixture
def run(make):
    """One warm-up that must not count, and one sample: a prefill of 24 tokens, then three decode steps."""
    steps = Steps(
        time_s=(2.0, 0.1, 0.2, 0.6),
        stall_s=(1.5, 0.0, 0.1, 0.5),
        hits=(1, 4, 3, 2),
        late=(0, 0, 1, 1),
        misses=(9, 0, 0, 1),
        read_bytes=(9000, 0, 300, 600),
        prefetched_bytes=(0, 200, 300, 500),
        wasted_bytes=(0, 0, 50, 200),
    )
    recall = Recall(first=5, first_two=7, first_k=8, activated=10)
    timed = Sample(0, 0, False, (5, 6, 7, 8), steps, major_faults=6, peak_resident_bytes=700, recall=recall)
    other = replace(steps, time_s=(9.0, 9.0, 9.0, 9.0))
    warmup = replace(timed, warmup=True, steps=other, peak_resident_bytes=800)
    whole = make.run(prompts=1, repetitions=1)
    passages = (Passage((1,), (2, 3, 4)), Passage((5,), (6,)))
    return replace(
        whole,
        request=replace(whole.request, passages=passages),
        conditions=Conditions(energy_j=30.0, watched_s=10.0, energy_sensor="ina VDD_IN"),
        estimate=RunEstimate(0.25, 0.2, 0.8, 400.0, 900, "by hand"),
        samples=(warmup, timed),
        totals=replace(whole.totals, peak_resident_bytes=1000, passage_nats=(log(4**3.5), log(4**0.5))),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tpot_s", 0.3),
        ("estimated_tpot_s", 0.25),
        ("ttft_s", 2.0),
        ("prefill_tokens_per_s", 12.0),
        ("decode_tokens_per_s", 1 / 0.3),
        ("load_s", 0.31),
        ("peak_resident_bytes", 1000),
        ("expert_hit_rate", 9 / 12),
        ("expert_late_rate", 2 / 12),
        ("read_bytes_per_token", 300),
        ("stall_per_token_s", 0.2),
        ("wasted_share", 0.25),
        ("predictor_recall", 0.8),
        ("major_faults_per_token", 1.5),
        ("energy_per_token_j", 0.9),  # 3 W for 0.3 s
        ("perplexity", 4.0),
    ],
)
def test_each_metric_is_what_its_definition_says(run, name, expected) -> None:
    assert METRICS[name].values(run) == [pytest.approx(expected)]


def test_the_table_above_misses_no_metric() -> None:
    cases = test_each_metric_is_what_its_definition_says.pytestmark[0].args[1]
    assert [name for name, _ in cases] == list(METRICS)


def test_what_cannot_be_told_is_absent_and_not_zero(make) -> None:
    one_token = make.run(tokens=1)
    silent = replace(one_token.samples[-1], major_faults=None, peak_resident_bytes=None)
    run = replace(one_token, samples=(silent,), totals=replace(one_token.totals, peak_resident_bytes=None))
    absent = {name for name, metric in METRICS.items() if metric.of(run) is None}
    decode = {"tpot_s", "decode_tokens_per_s", "expert_hit_rate", "expert_late_rate", "read_bytes_per_token"}
    assert absent >= decode | {"stall_per_token_s", "peak_resident_bytes", "major_faults_per_token"}
    assert all(metric.values(make.failed()) == [] for metric in METRICS.values())


def test_a_run_is_its_median_sample(make) -> None:
    run = make.run(prompts=1, repetitions=3)
    assert METRICS["tpot_s"].of(run) == sorted(METRICS["tpot_s"].values(run))[1]
