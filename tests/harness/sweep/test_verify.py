"""What is checked of a run that came back."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from engine.protocol import Course, ExpertBudget, Passage, RunRequest, Sampling, Steps
from engine.spans import ComputeSpans, LoadSpans, Timeline
from harness.sweep.verify import Answers, incomplete, judge, malformed_samples
from reports.records import Cell, Conditions, Verdict
from tests.harness.conftest import load_of, ok, samples_of

REQUEST = RunRequest("r", "c", "edgemoe", ((1, 2), (3,)), 3, repetitions=2, expert_budget=ExpertBudget(bytes=100))
CELL = Cell("pi", "c", "c" * 64, "edgemoe", "100", "w", "d" * 64, "cold")
GOOD = {"expert_budget_bytes": 100}


def test_what_engaged_as_asked_is_valid() -> None:
    assert judge(REQUEST, load_of(REQUEST, **GOOD)) == (Verdict.VALID, ())
    warm = replace(REQUEST, page_cache="warm")
    assert judge(warm, load_of(warm, **GOOD)) == (Verdict.VALID, ())


@pytest.mark.parametrize(
    ("request_changes", "load_changes", "reason"),
    [
        ({}, {"page_cache_resident_fraction": 0.02}, "2.0% of the container was resident"),
        ({}, {"page_cache_resident_fraction": None}, "cannot say what was resident"),
        ({"page_cache": "warm"}, {"page_cache_resident_fraction": 0.5}, "only 50.0%"),
        ({"page_cache": "warm"}, {"page_cache_resident_fraction": None}, "cannot say what was resident"),
        ({"reader": "direct"}, {"reader": "pread"}, "direct was asked for, pread engaged"),
        ({"lanes": 2}, {"lanes": 1}, "lanes: 2 were asked for, 1 engaged"),
        ({"backend": "numpy"}, {"backend": "c"}, "numpy was asked for, c engaged"),
        ({}, {"expert_budget_bytes": 101}, "100 bytes were asked for, 101 were used"),
        ({}, {"expert_budget_bytes": None}, "100 bytes were asked for, None were used"),
        ({}, {"warnings": ("the clock jumped",)}, "the engine warns: the clock jumped"),
    ],
)
def test_what_was_not_seen_to_hold_is_suspect(request_changes, load_changes, reason) -> None:
    request = replace(REQUEST, **request_changes)
    verdict, reasons = judge(request, load_of(request, **{**GOOD, **load_changes}))
    assert verdict is Verdict.SUSPECT
    assert len(reasons) == 1
    assert reason in reasons[0]


SEEN = Conditions(
    readings=40, temperature_c=Course(45.0, 61.0, 45.0, 62.0), throttled=False, under_voltage=False,
    governor="ondemand", governor_after="ondemand", power="mains", power_after="mains",
)  # fmt: skip


@pytest.mark.parametrize(
    "seen",
    [
        SEEN,
        Conditions(readings=2, absent=("temperature", "throttled", "governor", "battery", "energy")),  # a plain server
        replace(SEEN, power="battery", power_after="battery", battery=Course(0.9, 0.8)),
    ],
)
def test_a_device_that_kept_its_state_is_valid(seen) -> None:
    """What it has no sensor for is recorded as absent, and speaks against nothing."""
    assert judge(REQUEST, load_of(REQUEST, **GOOD), seen) == (Verdict.VALID, ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"throttled": True, "throttle_causes": ("soft temperature limit",)}, r"soft temperature limit.*cool"),
        ({"throttled": True, "under_voltage": True, "throttle_causes": ("under-voltage",)}, "under-voltage"),
        ({"under_voltage": True}, "under-voltage during the run: use a stronger power supply"),
        ({"throttled": None, "unknown": ("throttled: vcgencmd failed: add the user to the group `video`",)},
         "throttled: vcgencmd failed.*should be known and is not"),
        ({"unsettled": ("the processor is at 70.0 °C, over 60.0 °C",), "waited_s": 120.0},
         "before the run, the processor is at 70.0 °C, over 60.0 °C, after a wait of 120 s"),
        ({"governor_after": "powersave"}, "governor changed during the run, from ondemand to powersave"),
        ({"power_after": "battery"}, "power supply changed during the run, from mains to battery"),
        ({"power": "battery", "power_after": "battery", "battery": Course(0.16, 0.15)}, "battery is down to 15%"),
    ],
)  # fmt: skip
def test_a_device_that_did_not_is_suspect(changes, reason) -> None:
    verdict, reasons = judge(REQUEST, load_of(REQUEST, **GOOD), replace(SEEN, **changes))
    assert verdict is Verdict.SUSPECT
    assert len(reasons) == 1
    assert re.search(reason, reasons[0])


def test_a_memory_limit_that_did_not_hold_is_suspect() -> None:
    request = replace(REQUEST, memory_limit_bytes=1 << 29)
    held = replace(SEEN, memory_limit_bytes=1 << 29, memory_limit_method="cgroup-v2", memory_peak_bytes=1 << 29)
    assert judge(request, load_of(request, **GOOD), held) == (Verdict.VALID, ())
    verdict, (reason,) = judge(request, load_of(request, **GOOD), replace(held, memory_limit_method="none"))
    assert (verdict, "nothing on the device can hold" in reason) == (Verdict.SUSPECT, True)
    over = replace(held, memory_peak_bytes=(1 << 29) + 4096)
    assert "were used" in judge(request, load_of(request, **GOOD), over)[1][0]


def test_an_automatic_backend_may_be_any() -> None:
    assert judge(REQUEST, load_of(REQUEST, **GOOD, backend="c"))[0] is Verdict.VALID


def test_a_run_must_be_complete() -> None:
    whole = ok(REQUEST)
    assert incomplete(REQUEST, whole) is None
    assert "3 of 4 samples" in (incomplete(REQUEST, replace(whole, samples=whole.samples[:3])) or "")
    for part in ("facts", "load", "totals"):
        assert "without saying" in (incomplete(REQUEST, replace(whole, **{part: None})) or "")
    asked = replace(REQUEST, passages=(Passage((1,), (2,)),))
    assert "0 of 1 passages: deploy the engine again" in (incomplete(asked, whole) or "")
    assert incomplete(asked, replace(whole, totals=replace(whole.totals, passage_nats=(0.5,)))) is None
    short = samples_of(replace(REQUEST, max_new_tokens=2))
    assert "2 of 3 tokens" in (incomplete(REQUEST, replace(whole, samples=short)) or "")
    assert incomplete(replace(REQUEST, stop_at_eos=True), replace(whole, samples=short)) is None


def test_samples_of_nothing_that_was_asked_are_refused() -> None:
    samples = samples_of(REQUEST)
    assert malformed_samples(REQUEST, samples) is None
    assert "prompt 9" in (malformed_samples(REQUEST, (replace(samples[0], prompt=9),)) or "")
    assert "twice" in (malformed_samples(REQUEST, (samples[0], samples[0])) or "")


def test_another_answer_is_wrong_and_names_the_run_it_differs_from() -> None:
    answers = Answers()
    load = load_of(REQUEST)
    samples = samples_of(REQUEST)
    assert answers.disagreement("first", CELL, REQUEST, load, samples) is None
    assert answers.disagreement("second", replace(CELL, strategy="full-load"), REQUEST, load, samples) is None
    wrong = tuple(replace(s, tokens=(*s.tokens[:2], 9)) if s.prompt == 1 else s for s in samples)
    reason = answers.disagreement("third", CELL, REQUEST, load, wrong)
    assert reason == "wrong answer: from token 2 on, prompt 1 differs from that of run first (edgemoe)"
    # What was wrong does not become the measure of others.
    assert answers.disagreement("fourth", CELL, REQUEST, load, samples) is None


def test_a_sample_for_the_timeline_is_cut_short_and_no_other_answer() -> None:
    spans = ((),) * 4
    timeline = Timeline(1, (0,), (1,), ComputeSpans(*spans), LoadSpans(*spans, (), ()), {})
    samples = samples_of(REQUEST)
    steps = Steps(**dict.fromkeys(Steps.__dataclass_fields__, (0,) * 2))
    short = replace(samples[0], repetition=0, warmup=True, tokens=samples[0].tokens[:2], steps=steps, timeline=timeline)
    assert Answers().disagreement("r", CELL, REQUEST, load_of(REQUEST), (*samples, short)) is None
    assert incomplete(REQUEST, replace(ok(REQUEST), samples=(*samples, short))) is None


def test_repetitions_of_a_greedy_prompt_must_agree() -> None:
    samples = samples_of(REQUEST)
    wrong = (samples[0], replace(samples[1], tokens=(9, 9, 9)), *samples[2:])
    assert "differ between repetitions" in (Answers().disagreement("r", CELL, REQUEST, load_of(REQUEST), wrong) or "")
    sampled = replace(REQUEST, sampling=Sampling(temperature=1.0))
    assert Answers().disagreement("r", CELL, sampled, load_of(REQUEST), wrong) is None


@pytest.mark.parametrize(
    ("cell", "request_", "load"),
    [
        (replace(CELL, device="pi5"), REQUEST, load_of(REQUEST)),
        (replace(CELL, container_sha256="b" * 64), REQUEST, load_of(REQUEST)),
        (replace(CELL, workload_sha256="b" * 64), REQUEST, load_of(REQUEST)),
        (CELL, REQUEST, load_of(REQUEST, strategy={"precision": "int2"})),
        (CELL, REQUEST, load_of(REQUEST, backend="c")),
    ],
)
def test_what_may_differ_is_not_compared(cell: Cell, request_: RunRequest, load) -> None:
    answers = Answers()
    assert answers.disagreement("first", CELL, REQUEST, load_of(REQUEST), samples_of(REQUEST)) is None
    assert answers.disagreement("second", cell, request_, load, samples_of(REQUEST, shift=1)) is None
