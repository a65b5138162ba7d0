"""What is derived from a run's raw samples: one table of metrics. Nothing here is stored.

Decode metrics leave out step 0, the prefill. A metric that a run cannot answer yields no value, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from engine.protocol import Sample
from reports.records import Run

PerSample = Callable[[Run, Sample], float | None]
PerRun = Callable[[Run], float | None]

_MOST_NATS = 700.0  # a token; e to the power of more is no float


@dataclass(frozen=True)
class Metric:
    """One metric, how it is shown and computed; a `unit` that reports.units does not know is shown as it stands."""

    name: str
    label: str
    unit: str
    better: Literal["lower", "higher"]
    definition: str
    per_sample: PerSample | None = None
    per_run: PerRun | None = None

    def __post_init__(self) -> None:
        assert (self.per_sample is None) != (self.per_run is None), f"{self.name}: per sample or per run"

    def values(self, run: Run) -> list[float]:
        """Returns a value for each timed sample, or one for the run, without those that are not known."""
        if self.per_run is not None:
            found = [self.per_run(run)]
        else:
            assert self.per_sample is not None
            found = [self.per_sample(run, sample) for sample in run.timed_samples]
        return [value for value in found if value is not None]

    def of(self, run: Run) -> float | None:
        """Returns the median of a run's values."""
        values = self.values(run)
        return median(values) if values else None


def tpot_s(sample: Sample) -> float | None:
    """Returns the time per output token: the mean time of a sample's decode steps, or None where it has none."""
    decode = sample.steps.time_s[1:]
    return sum(decode) / len(decode) if decode else None


def _ttft_s(_: Run, sample: Sample) -> float | None:
    return sample.steps.time_s[0] if sample.steps.time_s else None


def _prefill_rate(run: Run, sample: Sample) -> float | None:
    seconds = _ttft_s(run, sample)
    return len(run.request.prompts[sample.prompt]) / seconds if run.request and seconds else None


def _decode_rate(_: Run, sample: Sample) -> float | None:
    seconds = tpot_s(sample)
    return 1 / seconds if seconds else None


def _share(part: Sequence[float], *whole: Sequence[float]) -> float | None:
    total = sum(map(sum, whole))
    return sum(part) / total if total else None


def _hit_rate(_: Run, sample: Sample) -> float | None:
    s = sample.steps
    return _share(s.hits[1:], s.hits[1:], s.late[1:], s.misses[1:])


def _late_rate(_: Run, sample: Sample) -> float | None:
    s = sample.steps
    return _share(s.late[1:], s.hits[1:], s.late[1:], s.misses[1:])


def _wasted_share(_: Run, sample: Sample) -> float | None:
    return _share(sample.steps.wasted_bytes, sample.steps.prefetched_bytes)


def _read_bytes_per_token(_: Run, sample: Sample) -> float | None:
    decode = sample.steps.read_bytes[1:]
    return sum(decode) / len(decode) if decode else None


def _stall_per_token_s(_: Run, sample: Sample) -> float | None:
    decode = sample.steps.stall_s[1:]
    return sum(decode) / len(decode) if decode else None


def _recall(_: Run, sample: Sample) -> float | None:
    return sample.recall.first_k / sample.recall.activated if sample.recall and sample.recall.activated else None


def _major_faults_per_token(_: Run, sample: Sample) -> float | None:
    return None if sample.major_faults is None or not sample.tokens else sample.major_faults / len(sample.tokens)


def _load_s(run: Run) -> float | None:
    return run.load.load_s if run.load else None


def _peak_resident_bytes(run: Run) -> float | None:
    seen = [sample.peak_resident_bytes for sample in run.samples]
    if run.totals:
        seen.append(run.totals.peak_resident_bytes)
    return max((float(n) for n in seen if n is not None), default=None)


def _energy_per_token_j(run: Run, sample: Sample) -> float | None:
    seen, seconds = run.conditions, tpot_s(sample)
    if seen is None or seen.energy_j is None or not seen.watched_s or seconds is None:
        return None
    return seen.energy_j / seen.watched_s * seconds


def _perplexity(run: Run) -> float | None:
    if run.request is None or run.totals is None or not run.totals.passage_nats:
        return None
    tokens = sum(len(passage.continuation) for passage in run.request.passages)
    nats_per_token = sum(run.totals.passage_nats) / tokens if tokens else math.inf
    return math.exp(nats_per_token) if nats_per_token < _MOST_NATS else None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "tpot_s", "Time per token", "s", "lower", "Mean time of the decode steps of a sample.",
            lambda _, sample: tpot_s(sample),
        ),
        Metric(
            "estimated_tpot_s", "Estimated", "s", "lower",
            "Time per token that was to be expected before the run: not measured.",
            per_run=lambda run: run.estimate.token_s if run.estimate else None,
        ),
        Metric("ttft_s", "First token", "s", "lower", "Time of the prefill, which yields the first token.", _ttft_s),
        Metric(
            "prefill_tokens_per_s", "Prefill rate", "tokens/s", "higher",
            "Tokens of the prompt over the time of the prefill.", _prefill_rate,
        ),
        Metric(
            "decode_tokens_per_s", "Decode rate", "tokens/s", "higher",
            "Decode steps of a sample over their time.", _decode_rate,
        ),
        Metric(
            "load_s", "Load", "s", "lower",
            "From the start of the engine to the first prefill.", per_run=_load_s,
        ),
        Metric(
            "peak_resident_bytes", "Peak memory", "bytes", "lower",
            "Largest resident set of the engine's process.", per_run=_peak_resident_bytes,
        ),
        Metric(
            "expert_hit_rate", "Hit rate", "share", "higher",
            "Experts that were resident when the router asked for them, over all that it asked for; decode steps.",
            _hit_rate,
        ),
        Metric(
            "expert_late_rate", "Late", "share", "lower",
            "Experts whose preload was still under way when the router asked for them; decode steps.", _late_rate,
        ),
        Metric(
            "read_bytes_per_token", "Read per token", "bytes", "lower",
            "Bytes of experts read from storage over decode steps.", _read_bytes_per_token,
        ),
        Metric(
            "stall_per_token_s", "Waiting per token", "s", "lower",
            "Time in which the arithmetic waited for an expert, over decode steps.", _stall_per_token_s,
        ),
        Metric(
            "wasted_share", "Wasted preloads", "share", "lower",
            "Bytes preloaded and dropped unused, over all bytes preloaded; all steps.", _wasted_share,
        ),
        Metric(
            "predictor_recall", "Predictor's recall", "share", "higher",
            "Activated experts that were among the k that the predictor ranked first, where it had an opinion; decode "
            "steps.", _recall,
        ),
        Metric(
            "major_faults_per_token", "Major faults per token", "faults", "lower",
            "Page faults that had to wait for storage, over the tokens of a sample.", _major_faults_per_token,
        ),
        Metric(
            "energy_per_token_j", "Energy per token", "J", "lower",
            "Mean power of the board while the engine ran, by its own sensor, times the time per token.",
            _energy_per_token_j,
        ),
        Metric(
            "perplexity", "Perplexity", "", "lower",
            "Of the matrix's accuracy text, predicted token by token under the strategy after all that is timed.",
            per_run=_perplexity,
        ),
    )
}  # fmt: skip
