import pytest

from reports.charts.axes import log_ticks, nice_ticks, ticks_between


@pytest.mark.parametrize(
    ("top", "ticks"),
    [
        (100, [0, 20, 40, 60, 80, 100]),
        (7.3, [0, 2, 4, 6, 8]),
        (0.031, [0, 0.01, 0.02, 0.03, 0.04]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_top(top, ticks):
    assert nice_ticks(top) == pytest.approx(ticks)


@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_an_axis_without_values_still_exists(nothing):
    assert nice_ticks(nothing) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 1.12, [1.0, 1.05, 1.1, 1.15]),
        (181, 199, [180, 185, 190, 195, 200]),
        (7.0, 7.0, [6, 6.5, 7, 7.5, 8]),
        (0.0, 0.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_an_axis_that_does_not_start_at_nought_lies_closely_around_its_values(low, high, ticks):
    assert ticks_between(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1.0, 6.3, [1, 2, 5, 10]), (0.7, 1.0, [0.5, 1]), (3.0, 40000.0, [1, 10, 100, 1000, 10000, 100000])],
)
def test_a_logarithmic_axis_holds_its_values(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)
