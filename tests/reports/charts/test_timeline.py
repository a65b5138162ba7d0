from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.spans import COMPUTED, LOADED, ComputeSpans, LoadSpans, Timeline
from reports.charts.timeline import GAP, STEPS_HEIGHT, TRACK, Pipeline, pipelines
from tests.reports.charts.rows import SERIES, row, sample

LOADS_TOP = STEPS_HEIGHT + TRACK + GAP  # 44
ATTENTION, EXPERTS, STALL, HEAD = range(4)
DEMANDED, PRELOADED, LATE, BROKEN_OFF = range(4)

Span = tuple[int, int, int, int]  # kind, layer, start and time in microseconds
Load = tuple[int, int, int, int, int]  # kind, layer, expert, start, time


def columns(spans: list[Span] | list[Load], n: int) -> list[tuple[int, ...]]:
    return list(zip(*spans, strict=True)) if spans else [()] * n


def pipeline(
    make: SimpleNamespace, compute: list[Span], loads: list[Load], starts: tuple[int, ...] = (0,),
    times: tuple[int, ...] = (1000,), first_step: int = 7,
) -> Pipeline:  # fmt: skip
    kept = Timeline(
        first_step, starts, times, ComputeSpans(*columns(compute, 4)),
        LoadSpans(*columns(loads, 5), (1,) * len(loads)), {},
    )  # fmt: skip
    run = replace(make.run(), samples=(sample([1.0, 1.0]), sample([1.0, 1.0], warmup=True, timeline=kept)))
    (found,) = pipelines([row("edgemoe", runs=[run]), row("lru", runs=[make.run()])], SERIES, "pi5")
    return found


def paths(chart: Pipeline) -> dict[str, str]:
    return {spans.kind: spans.d for spans in chart.spans}


def test_the_kinds_are_those_of_the_records() -> None:
    assert (COMPUTED, LOADED) == (("attention", "experts", "stall", "head"),
                                  ("demanded", "preloaded", "late", "broken-off"))  # fmt: skip


def test_a_span_is_a_box_from_its_start_over_its_time(make: SimpleNamespace) -> None:
    compute = [(EXPERTS, 0, 400, 100), (ATTENTION, 0, 0, 300), (STALL, 0, 300, 100), (ATTENTION, 1, 500, 200)]
    chart = pipeline(make, compute, [(DEMANDED, 0, 5, 300, 90)])
    assert paths(chart) == {
        "attention": "M0 14h300v22H0zM500 14h200v22H500z",
        "experts": "M400 14h100v22H400z",
        "stall": "M300 14h100v22H300z",
        "demanded": "M300 44h90v22H300z",
    }
    assert [spans.name for spans in chart.spans][-1] == "read when asked for"
    assert chart.values.splitlines() == [
        "compute attention: layer 0, at 0.000 ms, 0.300 ms",
        "compute stall: layer 0, at 0.300 ms, 0.100 ms",
        "compute experts: layer 0, at 0.400 ms, 0.100 ms",
        "compute attention: layer 1, at 0.500 ms, 0.200 ms",
        "load demanded: layer 0 expert 5, at 0.300 ms, 0.090 ms",
    ]
    assert "waited 0.100\u202fms for experts, 1 experts were read" in chart.description
    assert (chart.time_us, chart.height, chart.series) == (1000, LOADS_TOP + TRACK + 2, 1)


def test_loads_at_the_same_time_have_tracks_of_their_own_up_to_three(make: SimpleNamespace) -> None:
    loads = [
        (DEMANDED, 0, 0, 0, 500), (PRELOADED, 0, 1, 100, 100), (LATE, 0, 2, 150, 500), (BROKEN_OFF, 0, 3, 160, 40),
        (PRELOADED, 0, 4, 200, 50),
    ]  # fmt: skip
    chart = pipeline(make, [], loads)
    second, third = LOADS_TOP + TRACK + 2, LOADS_TOP + 2 * (TRACK + 2)
    assert paths(chart) == {
        "demanded": f"M0 {LOADS_TOP:g}h500v22H0z",
        "preloaded": f"M100 {second:g}h100v22H100zM200 {second:g}h50v22H200z",  # the second is free again at 200
        "late": f"M150 {third:g}h500v22H150z",
        "broken-off": f"M160 {third:g}h40v22H160z",  # there are no more than three
    }
    assert chart.height == LOADS_TOP + 3 * (TRACK + 2)


def test_what_began_before_or_ends_after_is_cut_at_the_edges(make: SimpleNamespace) -> None:
    loads = [(PRELOADED, 0, 0, -50, 80), (PRELOADED, 0, 1, 900, 500), (PRELOADED, 0, 2, 1000, 10)]
    compute = [(HEAD, 0, 950, 100), (HEAD, 0, 1000, 100)]
    assert paths(pipeline(make, compute, loads)) == {
        "head": "M950 14h50v22H950z", "preloaded": "M0 44h30v22H0zM900 44h100v22H900z"
    }  # fmt: skip


def test_a_span_of_no_time_can_be_seen(make: SimpleNamespace) -> None:
    assert paths(pipeline(make, [(HEAD, 0, 10, 0)], []))["head"] == "M10 14h1v22H10z"


def test_steps_and_ticks_stand_at_their_times(make: SimpleNamespace) -> None:
    chart = pipeline(make, [], [], starts=(0, 2000, 3000), times=(2000, 1000, 1500))
    assert [(tick.at, tick.label) for tick in chart.steps] == [(0, "7"), (2000, "8"), (3000, "9")]
    assert chart.time_us == 4500
    assert [tick.label for tick in chart.ticks] == ["0 ms", "1 ms", "2 ms", "3 ms", "4 ms"]
    assert [tick.at for tick in chart.ticks] == pytest.approx([0, 1000, 2000, 3000, 4000])
    assert (chart.height, chart.note) == (LOADS_TOP + TRACK + 2, "")


def test_as_many_steps_are_shown_as_have_spans_that_can_be_drawn(make: SimpleNamespace) -> None:
    compute = [(EXPERTS, 0, i, 1) for i in range(1400)] + [(EXPERTS, 0, 2000 + i, 1) for i in range(400)]
    chart = pipeline(make, compute, [], starts=(0, 2000), times=(2000, 2000))
    assert chart.note == "The first 1 of 2 steps." and chart.time_us == 2000
    assert len(chart.values.splitlines()) == 1400 and [tick.label for tick in chart.steps] == ["7"]
