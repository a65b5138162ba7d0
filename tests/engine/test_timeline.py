"""The pipeline's timeline: what it says agrees with the counters that every step has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.codec import from_json, to_json
from engine.container import Container
from engine.errors import DeadlineError, ProtocolError
from engine.experts.profile import PathProfile
from engine.experts.timeline import EXPERTS, HEAD, STALL, TimelineRecorder
from engine.generate import Engine, run
from engine.protocol import ExpertBudget, LayerCounts, RunRequest, Sample, Sampling, Steps
from engine.spans import COMPUTED, LOADED, MOST_SPANS, ComputeSpans, Timeline
from engine.strategies import STRATEGIES, Strategy

PROMPT = (1, 17, 5, 80, 33)
STEPS = 3


def traced(
    container: Container, profile: PathProfile, strategy: Strategy, backend: str
) -> tuple[Steps, Timeline, LayerCounts]:
    budget = ExpertBudget(experts=5) if strategy.has_budget else None
    engine = Engine(container, strategy, profile=profile, expert_budget=budget, backend=backend)
    try:
        _, steps = engine.generate(PROMPT, 7, Sampling(), timeline_steps=STEPS)
        timeline, layers = engine.take_timeline(), engine.supply.take_layer_counts()
        assert engine.take_timeline() is None
        assert timeline is not None
        assert from_json(Timeline, to_json(timeline)) == timeline
        assert steps.hits[1:] and sum(layers.misses) == sum(steps.misses[1:])
        return steps, timeline, layers
    finally:
        engine.close()


@pytest.mark.parametrize("backend", ["numpy", "auto"])
@pytest.mark.parametrize("model", ["mixtral", "switch"])
def test_spans_tile_the_last_steps_and_add_up_to_what_the_steps_say(
    container, profile, switch, switch_profile, model, backend
) -> None:
    for name in ("full-load", "naive-swap", "sti", "edgemoe-lookahead", "edgemoe-dequantised"):
        steps, timeline, layers = traced(
            *((container, profile) if model == "mixtral" else (switch, switch_profile)), STRATEGIES[name], backend
        )
        assert timeline.first_step == 7 - STEPS
        assert len(timeline.step_start_us) == STEPS
        compute = timeline.compute
        spans = sorted(zip(compute.start_us, compute.time_us, compute.kind, compute.layer, strict=True))
        end = 0
        for start, time_us, _, _ in spans:
            assert start >= end  # one thread does one thing at a time
            end = start + time_us
        for step in range(STEPS):
            start = timeline.step_start_us[step]
            stop = start + timeline.step_time_us[step]
            inside = [span for span in spans if start <= span[0] and span[0] + span[1] <= stop]
            kinds = [COMPUTED[kind] for _, _, kind, _ in inside]
            decoder_layers = sorted({layer for _, _, _, layer in inside})
            assert kinds.count("attention") == len(decoder_layers) == 3
            assert kinds.count("head") == 1 and kinds[-1] == "head"
            assert kinds.count("experts") >= 3
            stall_us = sum(span[1] for span in inside if span[2] == STALL)
            number = timeline.first_step + step
            assert stall_us == pytest.approx(steps.stall_s[number] * 1e6, abs=1 + len(inside))
            assert timeline.step_time_us[step] == pytest.approx(steps.time_s[number] * 1e6, abs=2)
        assert sum(1 for layer in layers.hits + layers.late + layers.misses if layer) > 0
        assert timeline.phases_s["stall"] == pytest.approx(sum(steps.stall_s[1:]))
        spent = sum(timeline.phases_s[kind] or 0.0 for kind in COMPUTED)
        assert 0 < spent <= sum(steps.time_s[1:])
        expanding_s = timeline.phases_s["dequantise"]
        if backend == "numpy":
            assert expanding_s is not None and expanding_s < (timeline.phases_s["experts"] or 0.0)


def test_what_was_read_is_what_the_steps_count(container: Container, profile: PathProfile) -> None:
    steps, timeline, _ = traced(container, profile, STRATEGIES["naive-swap"], "auto")
    assert sum(timeline.loads.read_bytes) == sum(steps.read_bytes[-STEPS:])
    assert len(timeline.loads.kind) == sum(steps.misses[-STEPS:])
    assert {LOADED[kind] for kind in timeline.loads.kind} == {"demanded"}
    _, whole, layers = traced(container, profile, STRATEGIES["full-load"], "auto")
    assert whole.loads.kind == ()
    assert layers == LayerCounts((12, 12, 12), (0, 0, 0), (0, 0, 0))  # 6 tokens, 2 experts


@pytest.mark.parametrize("warmups", [0, 2])
def test_the_timeline_is_of_one_prompt_more_after_all_that_is_timed(container: Container, warmups: int) -> None:
    samples: list[Sample] = []

    def emit(event: str, **content: Any) -> None:
        if event == "sample":
            samples.append(content["sample"])

    request = RunRequest(
        "r", container.path, "naive-swap", ((1, 2), (3,)), 9, warmups=warmups, repetitions=2, timeline_steps=2
    )
    run(request, emit)
    *others, last = samples
    assert len(others) == 2 * (warmups + 2) and not any(s.timeline for s in others)
    assert all(s.layers is not None for s in samples)
    assert (last.prompt, last.repetition, last.warmup, len(last.tokens)) == (1, warmups, True, 5)
    assert last.tokens == others[-1].tokens[:5]
    assert last.timeline is not None and last.timeline.first_step == 3
    assert RunRequest("r", "c", "s", ((1,),), 3, timeline_steps=2).timeline_tokens == 3
    assert RunRequest("r", "c", "s", ((1,),), 3).timeline_tokens == 0


def test_nobody_records_after_a_failure(container: Container) -> None:
    engine = Engine(container, STRATEGIES["naive-swap"])
    try:
        with pytest.raises(DeadlineError):
            engine.generate(PROMPT, 40, Sampling(), deadline=engine.clock(), timeline_steps=2)
        assert engine.supply._recorder is engine._kernels.clock is engine.take_timeline() is None
    finally:
        engine.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def test_a_recorder_forgets_the_oldest_steps() -> None:
    recorder = TimelineRecorder(8, Clock())
    for number in range(1, 21):
        recorder.begin_step(number, recorder.clock())
        for layer in range(MOST_SPANS // 4):
            recorder.begin()
            recorder.end(EXPERTS, layer)
        recorder.end_step(recorder.clock())
    timeline = recorder.timeline(None)
    assert timeline is not None
    assert timeline.first_step == 18  # fewer than were asked for: three steps with their heads fit
    assert timeline.step_start_us[0] == timeline.compute.start_us[0] - 1000 == 0
    assert len(timeline.compute.kind) == 3 * (MOST_SPANS // 4 + 1)
    assert timeline.compute.kind.count(HEAD) == 3


def test_a_read_is_of_the_kind_that_it_turned_out_to_be() -> None:
    recorder = TimelineRecorder(1, Clock())
    recorder.begin_step(1, 0.0)
    for speculative, wanted, read in ((False, True, 9), (True, False, 9), (True, True, 9), (True, False, 5)):
        entry: Any = SimpleNamespace(
            key=(0, 1), record=SimpleNamespace(slot_bytes=9), speculative=speculative, wanted=wanted
        )
        recorder.loaded(entry, 0.0, read)
    recorder.end_step(1.0)
    timeline = recorder.timeline(None)
    assert timeline is not None
    assert [LOADED[kind] for kind in timeline.loads.kind] == ["demanded", "preloaded", "late", "broken-off"]
    assert TimelineRecorder(1, Clock()).timeline(None) is None  # nothing was decoded


def test_a_timeline_that_cannot_be_is_refused() -> None:
    empty: tuple[int, ...] = ()
    for columns, message in (
        (((9,), (0,), (0,), (0,)), "unknown kind"),
        (((0,), empty, (0,), (0,)), "differ in length"),
        (((0,), (0,), (0,), (-1,)), "negative time_us"),
        (((0,), (0,), (1 << 60,), (0,)), "absurd start_us"),
        (tuple((0,) * (MOST_SPANS + 1) for _ in range(4)), "spans"),
    ):
        with pytest.raises(ProtocolError, match=message):
            ComputeSpans(*columns)
    steps = Steps(
        time_s=(0.5, 0.1), stall_s=(0.0, 0.05), hits=(1, 2), late=(0, 0), misses=(3, 0), read_bytes=(7, 0),
        prefetched_bytes=(0, 0), wasted_bytes=(0, 0),
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="hits by layer"):
        Sample(0, 1, False, (5, 6), steps, 3, None, layers=LayerCounts((3,), (0,), (0,)))
