import math

import pytest

from reports import units
from reports.charts.bars import Interval, Part, bar_chart, ratio_chart, speed_up_chart, stacked_chart
from reports.judging.statistics import Ratio
from reports.metrics import METRICS
from tests.reports.charts.rows import SERIES, row

INNER = 316.0  # of the canvas, without its margin
MS = f"{units.SPACE}ms"


def test_a_bar_is_as_long_as_its_median_and_its_whisker_spans_the_quartiles() -> None:
    rows = [row("naive-swap", tpot_s=(0.09, 0.1, 0.12)), row("edgemoe", tpot_s=(0.02, 0.025, 0.03))]
    chart = bar_chart(METRICS["tpot_s"], rows, SERIES, "pi5")
    assert chart is not None
    # The axis runs from 0 to 150 ms.
    assert [(tick.at, tick.label) for tick in chart.ticks] == [
        (pytest.approx(INNER * i / 3), label) for i, label in enumerate(("0", "50", "100", "150"))
    ]
    slow, fast = chart.bars
    assert slow.parts == (Part("bar", 0.0, pytest.approx(INNER * 100 / 150)),)
    assert fast.parts == (Part("bar", 0.0, pytest.approx(INNER * 25 / 150)),)
    assert (slow.low, slow.high) == pytest.approx((INNER * 90 / 150, INNER * 120 / 150))
    assert (fast.low, fast.high) == pytest.approx((INNER * 20 / 150, INNER * 30 / 150))
    assert [(bar.series, bar.top, bar.value, bar.dot) for bar in chart.bars] == [
        (0, 0.0, f"100{MS}", None), (1, 36.0, f"25{MS}", None)
    ]  # fmt: skip
    assert chart.height == 2 * 36.0 + 40.0
    assert chart.axis == "ms, lower is better" and chart.rule is None
    assert chart.description == f"Time per token on pi5, median: naive-swap 100{MS}, edgemoe 25{MS}."


def test_a_row_without_the_metric_has_no_bar() -> None:
    rows = [row("naive-swap", tpot_s=0.1), row("edgemoe", ttft_s=0.2)]
    chart = bar_chart(METRICS["tpot_s"], rows, SERIES, "pi5")
    assert chart is not None and [bar.name for bar in chart.bars] == ["naive-swap"]
    assert bar_chart(METRICS["perplexity"], rows, SERIES, "pi5") is None


def test_a_speed_up_is_a_dot_on_a_logarithmic_axis_with_a_rule_at_one() -> None:
    rows = [
        row("naive-swap"),
        row("edgemoe", speed_up=Ratio(4.0, 2.0, 8.0)),
        row("lru", speed_up=Ratio(0.5)),
    ]
    chart = speed_up_chart(rows, SERIES, "pi5", "naive-swap")
    assert chart is not None and chart.title == "Speed-up against naive-swap"
    # From 0.5 to 10, twenty times as much, between margins of 6.
    assert [tick.label for tick in chart.ticks] == ["0.5×", "1×", "2×", "5×", "10×"]
    step = (chart.ticks[-1].at - chart.ticks[0].at) / math.log(20)

    def at(ratio: float) -> object:
        return pytest.approx(6.0 + step * math.log(ratio / 0.5))

    assert (chart.ticks[0].at, chart.ticks[-1].at) == pytest.approx((6.0, INNER - 6.0))
    assert chart.rule == at(1.0)
    edgemoe, lru = chart.bars
    assert (edgemoe.low, edgemoe.dot, edgemoe.high) == (at(2.0), at(4.0), at(8.0))
    assert (lru.low, lru.dot, lru.high) == (at(0.5), at(0.5), at(0.5))
    assert (edgemoe.series, lru.series, lru.top) == (1, 2, 36.0)
    assert chart.description.endswith("with 95 % intervals: edgemoe 4.0× (2.0–8.0), lru 0.50×.")


def test_ratios_close_to_one_have_a_linear_axis_and_three_digits() -> None:
    chart = ratio_chart([Interval("a", 1.1, 1.05, 1.15, 4)], "title", "Ratios", "new / old")
    assert chart is not None
    assert [tick.label for tick in chart.ticks] == ["1", "1.05", "1.1", "1.15"]
    assert [tick.at for tick in chart.ticks] == pytest.approx([6.0 + 304.0 * i / 3 for i in range(4)])
    (bar,) = chart.bars
    assert (bar.low, bar.dot, bar.high) == pytest.approx((6 + 304 / 3, 6 + 304 * 2 / 3, 310.0))
    assert bar.value == "1.100" and chart.rule == 6.0
    assert ratio_chart([], "title", "Ratios", "new / old") is None


def test_a_ratio_without_a_value_is_not_drawn() -> None:
    assert speed_up_chart([row("naive-swap"), row("lru", speed_up=Ratio(0.0))], SERIES, "pi5", "naive-swap") is None


def test_the_parts_of_a_stack_follow_one_another() -> None:
    kinds = {"stall": "waiting", "experts": "experts", "head": "head"}
    rows = [
        (row("naive-swap"), {"experts": 0.02, "stall": 0.06}),
        (row("edgemoe"), {"stall": 0.01, "experts": 0.02, "head": 0.01}),
        (row("lru"), {}),
    ]
    chart = stacked_chart(rows, kinds, SERIES, "pi5")
    assert chart is not None
    assert [tick.label for tick in chart.ticks] == ["0", "20", "40", "60", "80"]
    ms = INNER / 80
    first, second = (
        [(part.kind, round(part.x / ms, 6), round(part.width / ms, 6)) for part in bar.parts] for bar in chart.bars
    )
    assert first == [("stall", 0, 60), ("experts", 60, 20)]
    assert second == [("stall", 0, 10), ("experts", 10, 20), ("head", 30, 10)]
    assert [bar.value for bar in chart.bars] == [f"80{MS}", f"40{MS}"]
    assert chart.bars[0].parts[0].title == f"waiting 60{MS}"
    assert chart.keys == (("stall", "waiting"), ("experts", "experts"), ("head", "head"))
    without_head = stacked_chart(rows[:1], kinds, SERIES, "pi5")
    assert without_head is not None and without_head.keys == (("stall", "waiting"), ("experts", "experts"))
    assert stacked_chart(rows[2:], kinds, SERIES, "pi5") is None
