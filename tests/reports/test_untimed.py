"""What is generated for a timeline is cut short, and counts as no other answer and no measurement."""

from dataclasses import replace

from engine.protocol import Steps
from engine.spans import ComputeSpans, LoadSpans, Timeline
from reports.judging.answers import answers, first_change
from reports.judging.groups import compare
from reports.metrics import METRICS
from reports.records import run_from_json, run_to_json

EMPTY = ((),) * 4
TIMELINE = Timeline(
    1, (0,), (9,), ComputeSpans((0,), (0,), (0,), (9,)), LoadSpans(*EMPTY, (), ()), {"stall": 0.1, "dequantise": None}
)


def with_timeline(run):
    first = run.samples[1]
    steps = Steps(**{name: column[:3] for name, column in vars(first.steps).items()})
    short = replace(first, repetition=7, warmup=True, tokens=first.tokens[:3], steps=steps, timeline=TIMELINE)
    return replace(run, samples=(*run.samples, short))


def test_a_record_keeps_it(make) -> None:
    run = with_timeline(make.run())
    assert run_from_json(run_to_json(run)) == run
    assert run.samples[-1].timeline == TIMELINE
    assert len(run.timed_samples) == len(make.run().timed_samples)


def test_it_is_no_other_answer(make) -> None:
    before = make.runs(blocks=1)
    after = [with_timeline(run) for run in before]
    assert first_change(answers(before), answers(after)) is None
    assert first_change(answers(after), answers(before)) is None
    assert all(group.other_tokens == () for group in compare(make.sweep(after), after))


def test_it_is_measured_by_nothing(make) -> None:
    run = make.run()
    other = with_timeline(run)
    assert {name: m.values(run) for name, m in METRICS.items()} == {
        name: m.values(other) for name, m in METRICS.items()
    }
