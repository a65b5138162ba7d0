from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.protocol import Sample, Series
from engine.spans import ComputeSpans, LoadSpans, Timeline
from reports import units
from reports.charts.plot import BOTTOM, LEFT, RIGHT, TOP, Key
from reports.charts.samples import (
    PARTS,
    decode_times,
    distribution_chart,
    latency_charts,
    memory_chart,
    time_parts,
)
from reports.records import Conditions, Run
from tests.reports.charts.rows import SERIES, positions, row, sample

MIDDLE = (LEFT + RIGHT) / 2
HEIGHT = BOTTOM - TOP
MIB = 1 << 20


def run_of(make: SimpleNamespace, *samples: Sample) -> Run:
    return replace(make.run(), samples=samples)


def timeline(**phases_s: float | None) -> Timeline:
    return Timeline(0, (0,), (1,), ComputeSpans((), (), (), ()), LoadSpans((), (), (), (), (), ()), phases_s)


# --- each token's time ------------------------------------------------------------------------------------------------


def test_latencies_are_lines_over_the_decode_steps(make: SimpleNamespace) -> None:
    run = run_of(
        make,
        sample([9.0, 7.0, 7.0, 7.0], warmup=True),
        sample([9.0, 0.1, 0.2, 0.3], [9.0, 0.0, 0.1, 0.2]),
        sample([9.0, 0.3, 0.2, 0.4], [9.0, 0.2, 0.1, 0.2], repetition=1),
    )
    (chart,) = latency_charts([row("edgemoe", runs=[run])], SERIES, "pi5")
    # Steps 1 to 3 across, 0 to 400 ms upwards.
    assert [(tick.at, tick.label) for tick in chart.x_ticks] == [(LEFT, "1"), (MIDDLE, "2"), (RIGHT, "3")]
    assert [tick.label for tick in chart.y_ticks] == ["0", "100", "200", "300", "400"]
    assert [tick.at for tick in chart.y_ticks] == pytest.approx([BOTTOM - HEIGHT * i / 4 for i in range(5)])

    def points(*ms: float) -> list[tuple[float, float]]:
        places = zip((LEFT, MIDDLE, RIGHT), ms, strict=True)
        return [(x, pytest.approx(BOTTOM - HEIGHT * each / 400, abs=0.06)) for x, each in places]

    area, samples, middle = chart.strokes
    assert [stroke.kind for stroke in chart.strokes] == ["area", "sample", "line"]
    assert [positions(f"M{path}") for path in samples.d.split("M")[1:]] == [
        points(100, 200, 300),
        points(300, 200, 400),
    ]
    assert positions(middle.d) == points(200, 200, 350)
    assert positions(area.d) == [*points(100, 100, 200), (RIGHT, BOTTOM), (LEFT, BOTTOM)]
    assert (chart.title, chart.series, chart.note) == ("edgemoe", 1, "")
    ms = f"{units.SPACE}ms"
    assert chart.description.endswith(
        f"2 samples, median over all steps 200{ms}, of which 100{ms} waiting for experts."
    )


def test_all_rows_have_the_same_axes_and_the_median_ends_with_the_longest_sample(make: SimpleNamespace) -> None:
    short, long = sample([1.0, 0.1, 0.1]), sample([1.0, 0.3, 0.3, 0.3], repetition=1)
    rows = [row("naive-swap", runs=[run_of(make, short)]), row("edgemoe", runs=[run_of(make, short, long)])]
    first, second = latency_charts(rows, SERIES, "pi5", each_sample=False)
    assert (first.x_ticks, first.y_ticks) == (second.x_ticks, second.y_ticks)
    assert [stroke.kind for stroke in second.strokes] == ["area", "line"]
    assert [x for x, _ in positions(first.strokes[-1].d)] == [LEFT, MIDDLE]
    high = [y for _, y in positions(second.strokes[-1].d)]
    assert high[0] == high[1] == pytest.approx(BOTTOM - HEIGHT * 2 / 3, abs=0.06)  # of 0.1 and 0.3; the axis has 0.3
    assert high[2] == TOP


def test_an_outlier_does_not_flatten_the_rest(make: SimpleNamespace) -> None:
    run = run_of(make, sample([0.0, *[0.1] * 99, 50.0]))
    (chart,) = latency_charts([row("edgemoe", runs=[run])], SERIES, "pi5")
    assert float(chart.y_ticks[-1].label) <= 150
    assert chart.note == "1 step lies above the axis: see the raw samples."
    assert min(y for _, y in positions(chart.strokes[-1].d)) == TOP


def test_without_a_decode_step_there_is_no_chart(make: SimpleNamespace) -> None:
    rows = [row("edgemoe", runs=[run_of(make, sample([1.0]))])]
    assert latency_charts(rows, SERIES, "pi5") == []
    assert distribution_chart(rows, SERIES, "pi5") is None
    assert decode_times(rows[0]) == [] and time_parts(rows[0]) == {}


def test_a_distribution_rises_with_the_share_of_tokens(make: SimpleNamespace) -> None:
    steps = [1.0, *(0.01 * 10 ** (i / 30) for i in range(61))]  # 10 ms to 1 s, even by ratio
    rows = [row("edgemoe", runs=[run_of(make, sample(steps))]), row("lru", runs=[run_of(make, sample([1.0]))])]
    chart = distribution_chart(rows, SERIES, "pi5")
    assert chart is not None
    assert [tick.label for tick in chart.x_ticks] == ["10", "20", "50", "100", "200", "500", "1\u202f000"]
    assert [tick.at for tick in chart.x_ticks[::3]] == pytest.approx([LEFT, MIDDLE, RIGHT])
    points = positions(chart.strokes[0].d)
    assert len(points) == 61  # so one point for each share, on a straight line
    for i, (x, y) in enumerate(points):
        assert (x, y) == pytest.approx((LEFT + (RIGHT - LEFT) * i / 60, BOTTOM - HEIGHT * i / 60), abs=0.06)
    assert [(tick.at, tick.label) for tick in chart.y_ticks] == [
        (pytest.approx(BOTTOM - HEIGHT * i / 4), f"{25 * i}%") for i in range(5)
    ]  # fmt: skip
    assert chart.keys == (Key(1, "edgemoe"),)
    assert "edgemoe half within 100\u202fms, 95 % within 794\u202fms" in chart.description


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_drawn_as_it_was_seen_from_beside_the_run(make: SimpleNamespace) -> None:
    conditions = Conditions(resident=Series((0.0, 1.0, 4.0), (0, 100 * MIB, 50 * MIB)))
    rows = [row("edgemoe", runs=[replace(make.run(), conditions=conditions)]), row("lru", runs=[make.run()])]
    chart = memory_chart(rows, SERIES, "pi5")
    assert chart is not None
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2", "3", "4"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "50", "100"]
    assert positions(chart.strokes[0].d) == [
        (LEFT, BOTTOM), (LEFT + (RIGHT - LEFT) / 4, TOP), (RIGHT, (TOP + BOTTOM) / 2)
    ]  # fmt: skip
    assert (chart.x_label, chart.y_label) == ("s, first run", "MiB resident")
    assert chart.keys == (Key(1, "edgemoe"),)


def test_where_nobody_looked_memory_is_the_peak_after_each_repetition(make: SimpleNamespace) -> None:
    run = run_of(
        make,
        sample([1.0, 1.0], peak_resident_bytes=50 * MIB, warmup=True),
        sample([0.5, 0.5]),
        sample([0.5, 0.5], repetition=1, peak_resident_bytes=100 * MIB),
    )
    chart = memory_chart([row("edgemoe", runs=[run])], SERIES, "pi5")
    assert chart is not None
    assert chart.strokes[0].d == f"M{MIDDLE:.1f} {(TOP + BOTTOM) / 2:.1f}H{RIGHT:.1f}V{TOP:.1f}"
    assert (chart.x_label, chart.y_label) == ("s of generating, first run", "MiB, peak so far")
    assert chart.description.endswith("edgemoe up to 100\u202fMiB.")
    assert memory_chart([row("edgemoe", runs=[run_of(make, sample([1.0]))])], SERIES, "pi5") is None


# --- what a token's time consists of ----------------------------------------------------------------------------------


def test_without_a_timeline_a_token_waits_or_computes(make: SimpleNamespace) -> None:
    run = run_of(make, sample([5.0, 0.3, 0.5], [5.0, 0.1, 0.1]), sample([5.0, 0.4], [5.0, 0.1], repetition=1))
    assert time_parts(row("edgemoe", runs=[run])) == pytest.approx({"stall": 0.1, "compute": 0.3})


def test_a_timeline_divides_the_computing_and_expanding_is_no_part_of_the_experts(make: SimpleNamespace) -> None:
    kept = sample(
        [9.0, 10.0, 10.0], warmup=True,
        timeline=timeline(stall=4.0, experts=8.0, dequantise=3.0, attention=4.0, head=2.0),
    )  # fmt: skip
    run = run_of(make, sample([5.0, 0.3, 0.3], [5.0, 0.1, 0.1]), kept)
    # Of 16 s of computing 5 by experts, 3 expanding, 4 attention, 2 head; 2 s are nobody's.
    parts = time_parts(row("edgemoe", runs=[run]))
    assert parts == pytest.approx({
        "stall": 0.1, "experts": 0.2 * 5 / 16, "dequantise": 0.2 * 3 / 16, "attention": 0.2 * 4 / 16,
        "head": 0.2 * 2 / 16, "other": 0.2 * 2 / 16,
    })  # fmt: skip
    assert sum(parts.values()) == pytest.approx(0.3)
    assert set(parts) <= set(PARTS)


def test_native_kernels_have_no_step_of_expanding(make: SimpleNamespace) -> None:
    kept = sample([9.0, 8.0], warmup=True, timeline=timeline(stall=0.0, experts=6.0, dequantise=None, attention=2.0))
    parts = time_parts(row("edgemoe", runs=[run_of(make, sample([5.0, 0.8]), kept)]))
    assert parts == pytest.approx(
        {"stall": 0.0, "experts": 0.6, "dequantise": 0.0, "attention": 0.2, "head": 0.0, "other": 0.0}
    )
