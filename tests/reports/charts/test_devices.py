import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.protocol import ReadingRate, StorageRates
from reports import units
from reports.charts.devices import pareto_chart, roofline_chart
from reports.charts.plot import BOTTOM, LEFT, RIGHT, TOP, Plot
from reports.judging.groups import Row
from reports.records import Run, RunEstimate
from tests.reports.charts.rows import SERIES, positions, row

GIB = float(1 << 30)
MIB = float(1 << 20)


def pareto_rows(make: SimpleNamespace) -> list[Row]:
    runs = [make.run()]
    return [
        row("naive-swap", runs=runs, peak_resident_bytes=1 * GIB, tpot_s=1.0),
        row("edgemoe", runs=runs, peak_resident_bytes=2 * GIB, tpot_s=0.1),
        row("lru", runs=runs, peak_resident_bytes=3 * GIB, tpot_s=0.2),  # larger and slower than edgemoe
    ]


def test_memory_and_time_place_a_dot_each(make: SimpleNamespace) -> None:
    chart = pareto_chart(pareto_rows(make), SERIES, "pi5")
    assert chart is not None
    # Memory from 0 to 4 GiB, time from 100 ms to 1 s on a logarithmic axis.
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2", "3", "4"]
    assert [tick.at for tick in chart.x_ticks] == pytest.approx([LEFT + (RIGHT - LEFT) * i / 4 for i in range(5)])
    assert [tick.label for tick in chart.y_ticks] == ["100", "200", "500", "1\u202f000"]
    by_name = {dot.title.split(":")[0]: dot for dot in chart.dots}
    at = {name: (dot.x, dot.y) for name, dot in by_name.items()}
    width, height = RIGHT - LEFT, BOTTOM - TOP
    assert at["naive-swap"] == pytest.approx((LEFT + width / 4, TOP))
    assert at["edgemoe"] == pytest.approx((LEFT + width / 2, BOTTOM))
    assert at["lru"] == pytest.approx((LEFT + width * 3 / 4, BOTTOM - height * math.log10(2)))
    assert {name: dot.series for name, dot in by_name.items()} == SERIES


def test_the_front_joins_what_nothing_beats_in_both(make: SimpleNamespace) -> None:
    chart = pareto_chart(pareto_rows(make), SERIES, "pi5")
    assert chart is not None
    (front,) = chart.strokes
    first, second = LEFT + (RIGHT - LEFT) / 4, LEFT + (RIGHT - LEFT) / 2
    top, bottom = f"{TOP:.1f}", f"{BOTTOM:.1f}"
    assert front.d == f"M{first:.1f} {top}V{top}H{second:.1f}V{bottom}H{RIGHT:.1f}"
    assert chart.description.endswith("None is both smaller and faster than naive-swap, edgemoe.")


def test_names_stand_beside_their_dots_and_clear_of_one_another(make: SimpleNamespace) -> None:
    chart = pareto_chart(pareto_rows(make), SERIES, "pi5")
    assert chart is not None
    labels = {label.text: label for label in chart.labels}
    dots = {dot.title.split(":")[0]: dot for dot in chart.dots}
    assert [(name, label.anchor, label.x - dots[name].x) for name, label in labels.items()] == [
        ("naive-swap", "start", 8), ("edgemoe", "start", 8), ("lru", "end", -8)
    ]  # fmt: skip
    assert labels["naive-swap"].y == dots["naive-swap"].y + 4
    assert labels["edgemoe"].y == BOTTOM - 2  # the dot stands on the axis: its name may not


def test_without_memory_or_time_there_is_no_chart(make: SimpleNamespace) -> None:
    assert pareto_chart([row("lru", tpot_s=0.1), row("edgemoe", peak_resident_bytes=GIB)], SERIES, "pi5") is None
    assert roofline_chart([row("lru", tpot_s=0.1), row("edgemoe", tpot_s=0.1, read_bytes_per_token=0.0)],
                          SERIES, "pi5") is None  # fmt: skip


def measured(
    make: SimpleNamespace, *, emulated: float | None = None, probed: float | None = None, floor: float = 0.0
) -> Run:
    run: Run = make.run()
    assert run.request is not None and run.load is not None
    rates = () if probed is None else (ReadingRate("pread", 1, probed, probed, probed),)
    return replace(
        run,
        request=replace(run.request, emulated_read_bytes_per_s=emulated),
        load=replace(run.load, storage=StorageRates("pread", 1, "fastest", rates=rates)),
        estimate=RunEstimate(0.5, floor, 0.5, 1e6, 1, "test") if floor else None,
    )


def roofline(make: SimpleNamespace, **changes: float) -> Plot:
    runs = [measured(make, **changes)]
    rows = [
        row("naive-swap", runs=runs, tpot_s=1.0, read_bytes_per_token=10 * MIB, stall_per_token_s=0.9),
        row("edgemoe", runs=runs, tpot_s=0.2, read_bytes_per_token=1 * MIB, stall_per_token_s=0.1),
        row("lru", runs=runs, tpot_s=0.25, read_bytes_per_token=0.0, stall_per_token_s=0.0),
    ]
    chart = roofline_chart(rows, SERIES, "pi5")
    assert chart is not None
    return chart


def number(label: str) -> float:
    return float(label.replace(units.SPACE, ""))


def scale_of(chart: Plot) -> tuple[Callable[[float], object], Callable[[float], object]]:
    """(x of bytes, y of tokens/s), from the chart's own ticks, whose unit is MiB."""
    (x0, low), (x1, high) = ((t.at, number(t.label) * 2**20) for t in (chart.x_ticks[0], chart.x_ticks[-1]))
    (y0, slow), (y1, fast) = ((t.at, number(t.label)) for t in (chart.y_ticks[0], chart.y_ticks[-1]))
    return (
        lambda size: pytest.approx(x0 + (x1 - x0) * math.log(size / low) / math.log(high / low), abs=0.06),
        lambda rate: pytest.approx(y0 + (y1 - y0) * math.log(rate / slow) / math.log(fast / slow), abs=0.06),
    )


def test_a_roofline_has_a_dot_for_what_was_read_and_generated(make: SimpleNamespace) -> None:
    chart = roofline(make, emulated=20 * MIB)
    assert chart.x_label == "read per token, MiB, logarithmic"
    x, y = scale_of(chart)
    naive, edgemoe, lru = chart.dots
    assert (naive.x, naive.y) == (x(10 * MIB), y(1.0))
    assert (edgemoe.x, edgemoe.y) == (x(1 * MIB), y(5.0))
    assert (lru.x, lru.y) == (LEFT, y(4.0))  # reads nothing: at the edge


def test_the_roofs_are_the_storage_rate_and_the_fastest_arithmetic(make: SimpleNamespace) -> None:
    chart = roofline(make, emulated=20 * MIB)
    x, y = scale_of(chart)
    slope, level = chart.strokes
    assert (slope.kind, level.kind) == ("roof", "roof level")
    (start_x, start_y), (end_x, end_y) = positions(slope.d)
    top, right = number(chart.y_ticks[-1].label), number(chart.x_ticks[-1].label) * 2**20
    assert (start_x, start_y) == (x(20 * MIB / top), pytest.approx(TOP))  # where the storage gives no more
    assert (end_x, end_y) == (pytest.approx(RIGHT), y(20 * MIB / right))
    # 0.2 s, of which 0.1 s waiting; 1 s, of which 0.9 s: 10 tokens/s without a wait.
    assert positions(level.d) == [(LEFT, y(10.0)), (RIGHT, y(10.0))]
    assert chart.note == "Roofs: storage 20\u202fMiB/s, arithmetic 10 tokens/s."


def test_the_emulated_rate_counts_before_the_probed_one(make: SimpleNamespace) -> None:
    assert "storage 20\u202fMiB/s" in roofline(make, emulated=20 * MIB, probed=90 * MIB).note
    assert "storage 90\u202fMiB/s" in roofline(make, probed=90 * MIB).note
    assert "storage" not in roofline(make).note


def test_the_floor_of_the_estimate_is_a_tick_over_the_dot(make: SimpleNamespace) -> None:
    chart = roofline(make, emulated=20 * MIB, floor=0.125)
    x, y = scale_of(chart)
    ticks = [stroke for stroke in chart.strokes if stroke.kind == "floor"]
    assert [tick.series for tick in ticks] == [0, 1, 2]
    left, height = map(float, ticks[0].d.removeprefix("M").removesuffix("h12").split())
    assert (left + 6, height) == (x(10 * MIB), y(8.0))


def test_a_lossy_row_is_no_measure_of_the_arithmetic(make: SimpleNamespace) -> None:
    run = measured(make, emulated=20 * MIB)
    lossy = replace(run, load=replace(run.load, strategy={"precision": "int2"}))
    rows = [
        row("naive-swap", runs=[run], tpot_s=1.0, read_bytes_per_token=MIB, stall_per_token_s=0.5),
        row("edgemoe", runs=[lossy], tpot_s=0.1, read_bytes_per_token=MIB, stall_per_token_s=0.05),
    ]
    chart = roofline_chart(rows, SERIES, "pi5")
    assert chart is not None and "arithmetic 2 tokens/s" in chart.note
