from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.protocol import LayerCounts
from reports.charts.layers import layers_chart
from reports.charts.plot import BOTTOM, LEFT, RIGHT, TOP, Key
from reports.records import Run
from tests.reports.charts.rows import SERIES, positions, row, sample


def run_with(make: SimpleNamespace, *counts: LayerCounts) -> Run:
    """A run whose timed samples have these counts; its warm-up has others."""
    warmup = sample([1.0, 1.0], layers=LayerCounts((9, 9, 9), (0, 0, 0), (0, 0, 0)), warmup=True)
    timed = [sample([1.0, 1.0], repetition=i, layers=each) for i, each in enumerate(counts)]
    return replace(make.run(), samples=(warmup, *timed))


def test_the_rate_of_a_layer_is_its_hits_over_all_that_was_asked_for(make: SimpleNamespace) -> None:
    first = LayerCounts(hits=(1, 4, 0), late=(1, 0, 0), misses=(2, 0, 0))
    second = LayerCounts(hits=(1, 2, 0), late=(1, 2, 4), misses=(2, 0, 4))
    rows = [row("edgemoe", runs=[run_with(make, first, second)]), row("lru", runs=[make.run()])]
    chart = layers_chart(rows, SERIES, "pi5")
    assert chart is not None
    (line,) = chart.strokes  # lru's record has no counts
    height = BOTTOM - TOP
    assert positions(line.d) == [
        (LEFT, BOTTOM - height * 2 / 8), ((LEFT + RIGHT) / 2, BOTTOM - height * 6 / 8), (RIGHT, BOTTOM)
    ]  # fmt: skip
    assert (line.kind, line.series, chart.keys) == ("line", 1, (Key(1, "edgemoe"),))
    assert [(tick.at, tick.label) for tick in chart.x_ticks] == [
        (LEFT, "0"), ((LEFT + RIGHT) / 2, "1"), (RIGHT, "2")
    ]  # fmt: skip
    assert [(tick.at, tick.label) for tick in chart.y_ticks] == [
        (pytest.approx(BOTTOM - height * i / 4), f"{25 * i}%") for i in range(5)
    ]  # fmt: skip
    assert chart.description.endswith("on pi5: edgemoe 0% to 75%.")


def test_a_layer_that_nothing_was_asked_of_has_no_rate(make: SimpleNamespace) -> None:
    counts = LayerCounts(hits=(1, 0, 1), late=(0, 0, 0), misses=(1, 0, 3))
    chart = layers_chart([row("edgemoe", runs=[run_with(make, counts)])], SERIES, "pi5")
    assert chart is not None and [x for x, _ in positions(chart.strokes[0].d)] == [LEFT, RIGHT]


def test_without_counts_or_with_one_layer_there_is_no_chart(make: SimpleNamespace) -> None:
    assert layers_chart([row("edgemoe", runs=[make.run()])], SERIES, "pi5") is None
    one = LayerCounts((1,), (0,), (1,))
    assert layers_chart([row("edgemoe", runs=[run_with(make, one)])], SERIES, "pi5") is None
